"""Kills runs with SIGKILL before a given event, and gives each the same command again.

    python killed_runs.py SOURCE FOLDER SEED NUM_POINTS

An event is anything through which a run changes the disk, and the end of an item in a block. The
process counts those of a whole run, draws points among them, and forks a run for each: it kills
itself at its point, whichever thread is there. Forks, because imports take far longer than runs;
what a run would import later is imported first.
Prints the events of a whole run, and the points, as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import modelopt.torch.quantization  # noqa: F401
import torch._dynamo  # noqa: F401

from nvvl.calib_data.manifest import load_calibration_set
from nvvl.quantize.activations import Activations
from nvvl.quantize.presets import mixed
from nvvl.quantize.walk import quantize_checkpoint

EVENTS: tuple[tuple[Any, str], ...] = (
    (os, "pwrite"),
    (os, "fsync"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "write_bytes"),
    (Path, "mkdir"),
    (shutil, "copyfile"),
    (shutil, "rmtree"),
    (Activations, "_store"),
)


def count_events(react: Callable[[int], None]) -> None:
    """Call ``react`` with the number of each event, before it happens."""
    count = 0

    def guard(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            react(count)
            # SIGKILL loses nothing that the system has taken, so flushing would only take time
            return None if name == "fsync" else function(*args, **kwargs)

        return guarded

    for owner, name in EVENTS:
        setattr(owner, name, guard(name, getattr(owner, name)))


def in_fork(work: Callable[[], None]) -> int:
    """Run in a process of its own; return what `os.waitpid` says of it."""
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    """Make the whole output, then kill and resume at each point."""
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    seed, num_points = int(sys.argv[3]), int(sys.argv[4])
    items = load_calibration_set("default", num_items=3)

    def run(name: str) -> None:
        quantize_checkpoint(source, folder / name, mixed(), items)

    def run_and_count() -> None:
        seen: list[int] = []
        count_events(seen.append)
        run("whole")
        (folder / "events.txt").write_text(str(len(seen)))

    def run_until(name: str, point: int) -> None:
        def react(count: int) -> None:
            if count >= point:
                os.kill(os.getpid(), signal.SIGKILL)

        count_events(react)
        run(name)

    assert in_fork(run_and_count) == 0
    num_events = int((folder / "events.txt").read_text())
    # the last three are the renames and removals that make the output appear
    points = random.Random(seed).sample(range(1, num_events - 2), num_points)
    points += range(num_events - 2, num_events + 1)
    for point in points:
        status = in_fork(partial(run_until, f"at{point}", point))
        assert os.WIFSIGNALED(status), f"event {point} was not reached"
        assert os.WTERMSIG(status) == signal.SIGKILL
        if not (folder / f"at{point}").exists():  # else it was killed while it dropped the journal
            assert in_fork(partial(run, f"at{point}")) == 0, f"event {point}: no resume"
    print(json.dumps({"num_events": num_events, "points": points}))


if __name__ == "__main__":
    main()
