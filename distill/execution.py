"""How a distillation is run: what changes nothing of what it computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nvvl.model.processes import Processes
from nvvl.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a distillation is run, which does not change what it computes.

    Attributes:
        device: Where both models are: ``cpu`` or ``cuda``.
        processes: Those that train together; None finds out how the program was started.
        shard: Whether each of several processes holds a slice of the training state.
        logits: Folder of the teacher's logits, computed before.
        tensorboard: Folder to write TensorBoard events to.
        overwrite: Replace earlier outputs, and discard an unfinished run that cannot be gone on
            with.
        progress: Called after each item that is looked through, then after each step.
        command: The command line, for the manifest.
    """

    device: torch.device | str = "cpu"
    processes: Processes | None = None
    shard: bool = False
    logits: Path | None = None
    tensorboard: Path | None = None
    overwrite: bool = False
    progress: Progress | None = None
    command: Sequence[str] = ()
