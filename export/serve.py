"""``nvvl export serve``: whether a server can take a checkpoint, and the command that serves it.

The rules are those of `nvvl.export.server_rules`, of one server; beside them stand the limits that
it has for this model (`nvvl.export.servers`). No server is started here.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nvvl.export.checks import Check, summarize
from nvvl.export.server_rules import check_server_rules
from nvvl.export.servers import SERVERS, ServerName
from nvvl.export.view import CheckpointView


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What a server would make of a checkpoint.

    Attributes:
        server: Its name.
        checks: Its rules.
        obstacles: What of this checkpoint it cannot take.
        notes: What is good to know.
        commands: Lines for a shell, in order.
    """

    server: str
    checks: Sequence[Check]
    obstacles: Sequence[str]
    notes: Sequence[str]
    commands: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether no rule failed and nothing stands in the way."""
        return not self.obstacles and all(check.passed is not False for check in self.checks)

    def lines(self) -> list[str]:
        """Return the plan for a reader: faults first, the command last."""
        lines = summarize(self.server, self.checks)
        lines += [f"cannot take: {obstacle}" for obstacle in self.obstacles]
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, "", *self.commands]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        return {
            "server": self.server,
            "passed": self.passed,
            "rules": [check.to_dict() for check in self.checks],
            "obstacles": list(self.obstacles),
            "notes": list(self.notes),
            "commands": list(self.commands),
        }


def make_serving_plan(view: CheckpointView, name: ServerName) -> ServingPlan:
    """Judge a checkpoint by a server's rules and write down how it is served.

    Args:
        view: An opened checkpoint folder; with its source, names and files are compared too.
        name: Of the server.
    """
    assert view.folder is not None, "a serving plan is of a folder"
    server = SERVERS[name]
    obstacles, notes = server.find(view)
    return ServingPlan(
        server=server.title,
        checks=[check for check in check_server_rules(view) if server.title in check.servers],
        obstacles=obstacles,
        notes=notes,
        commands=server.write(view, shlex.quote(str(view.folder.resolve()))),
    )
