"""What was built of a checkpoint to run elsewhere: its engines, as their manifest records them.

Engines are found in ``NAME-engines`` beside the checkpoint ``NAME``, where the demo puts them. They
are of this checkpoint only if they were made from exactly its manifest; others are refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvvl.errors import DataError
from nvvl.reports.json_values import describe_fault
from nvvl.staging import MANIFEST_NAME

# Names of folders beside the checkpoint whose name is put in.
GRAPHS_NAME = "{}-graphs"
ENGINES_NAME = "{}-engines"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One built engine."""

    size_bytes: int
    build_seconds: float


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The engines of one checkpoint.

    Attributes:
        folder: where they lie.
        builder: name and version of what built them.
        targets: GPUs they are for.
        engines: by the name of the graph.
    """

    folder: Path
    builder: str
    targets: tuple[str, ...]
    engines: Mapping[str, Engine]


def find_engines(checkpoint: Path) -> Engines | None:
    """Read what the engines beside a checkpoint are; None where there are none.

    Raises:
        DataError: if their manifest cannot be read, or they are of another checkpoint.
    """
    folder = checkpoint.with_name(ENGINES_NAME.format(checkpoint.name))
    path = folder / MANIFEST_NAME
    if not path.is_file() or not (checkpoint / MANIFEST_NAME).is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        made_from = values["checkpoint"]["manifest_sha256"]
        found = Engines(
            folder=folder,
            builder=f"{values['builder']['name']} {values['builder']['version']}",
            targets=tuple(values["targets"]),
            engines={
                name: Engine(size_bytes=entry["size_bytes"], build_seconds=entry["build_seconds"])
                for name, entry in values["engines"].items()
            },
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest of engines ({describe_fault(error)})") from None
    if made_from != hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest():
        raise DataError(
            f"{folder}: engines of another checkpoint than {checkpoint}; build them again with "
            "nvvl export engine, or remove the folder"
        )
    return found
