"""What each of several processes does: commands, one after the other, each written down.

    torchrun --nproc-per-node 2 two_processes.py FOLDER

Reads ``FOLDER/commands.json``: for each command its arguments, and the block after which the second
process, and no other, is interrupted. Writes ``FOLDER/said-RANK.json``, and at its end to
``FOLDER/joined-RANK.json`` whether it is joined to the other still.
"""

import atexit
import json
import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from typer.testing import CliRunner

from nvvl.cli import app
from nvvl.progress import Ticker

TICK = Ticker.tick


def main() -> None:
    """Run all commands."""
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    atexit.register(  # what is registered later, by a command, comes before it
        lambda: (folder / f"joined-{rank}.json").write_text(
            json.dumps(torch.distributed.is_initialized())
        )
    )
    said = []
    for command in json.loads((folder / "commands.json").read_text()):
        interrupts = [command["interrupt"]] if rank == "1" else []

        def tick(ticker: Ticker, interrupts: list[str] = interrupts) -> None:
            if ticker.stage in interrupts:
                interrupts.clear()  # a second one would end the run at once
                signal.raise_signal(signal.SIGINT)
            TICK(ticker)

        with patch.object(Ticker, "tick", tick):
            result = CliRunner().invoke(app, command["arguments"])
        outcome = {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
        said.append(outcome | {"exception": repr(result.exception)})
    (folder / f"said-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
