"""The state of a training run on disk: resumed bit for bit, or refused.

    OUT.train/state.json               what the run is, where it stands, names and hashes of files
    OUT.train/step-000050.safetensors  masters, AdamW's two moments, averages, input amaxes
    OUT.train/best-000050.safetensors  weights and input amaxes of the best validation
    OUT.train/log.jsonl                a line a step

Nothing random has to be kept: the order of the data is a function of seed and step, and the model
has no dropout. Names, shapes and dtypes must be exactly those of the run; the tensors are whole
ones, so a run may go on with another number of processes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nvvl.distill.train_folder import LOG_NAME, LazyTensors, TrainFolder
from nvvl.errors import CheckpointError, require_disk, writing
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.hashing import hash_file
from nvvl.model.safetensors_io import TensorInfo, read_header, torch_dtypes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Standing:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        start_loss: Validation loss of the untrained student.
        best_loss: The lowest validation loss.
        best_step: The step it was reached at, whose weights are kept.
    """

    step: int
    start_loss: float
    best_loss: float = math.inf
    best_step: int = 0

    def add(self, loss: float) -> bool:
        """Take a validation at the present step into account; return whether it is the best.

        Of equal losses the earlier one is the better.
        """
        if loss >= self.best_loss:
            return False
        self.best_loss, self.best_step = loss, self.step
        return True


class StateFolder(TrainFolder):
    """Saves and loads one run's state."""

    method = "whole"

    @property
    def log_path(self) -> Path:
        """The JSONL log."""
        return self.folder / LOG_NAME

    def open(self, *, size_bytes: int, overwrite: bool) -> bool:
        """Make the folder, or find a run of the same identity in it.

        Args:
            size_bytes: What saving will take: two states, and the best weights twice.
            overwrite: Discard a run that cannot be gone on with.

        Returns:
            Whether there is a state to load.

        Raises:
            CheckpointError: if the state is not one.
            OutputError: if the folder holds another run, cannot be made, or the disk has no room.
        """
        found = self.find(overwrite=overwrite) is not None
        if not found:
            require_disk(self.folder, size_bytes, "training state needs")
        return found

    def save(
        self, standing: Standing, state: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
    ) -> None:
        """Save a state, and the weights if they are the best.

        Args:
            standing: Names the step, and that of the best weights.
            state: Everything the run goes on from.
            weights: What would be written, if this step's are the best.

        Raises:
            OutputError: if the disk is full.
        """
        name = f"step-{standing.step:06}.safetensors"
        write_safetensors(self.folder / name, state)
        if weights is not None:
            write_safetensors(self.folder / _best_name(standing.step), weights)
        names = [name, _best_name(standing.best_step)]
        with writing(self.folder):
            files = {file: hash_file(self.folder / file) for file in names}
        self.write({"standing": asdict(standing), "files": files})
        with writing(self.folder):
            for path in self.own_files():
                if path.suffix == ".safetensors" and path.name not in names:
                    path.unlink()

    def standing(self) -> Standing:
        """Return how far the saved run has come.

        Raises:
            CheckpointError: if state.json cannot be read.
        """
        return Standing(**self.read()["standing"])

    def load(self, shapes: Shapes, *, check_bytes: bool = True) -> LazyTensors:
        """Return the saved state, each tensor read when it is used.

        Args:
            shapes: Of exactly the tensors there must be, all float32.
            check_bytes: Hash the file. Of several processes one is enough.

        Raises:
            CheckpointError: if a file changed, or a tensor is missing, unexpected or misshapen.
        """
        name = f"step-{self.standing().step:06}.safetensors"
        if check_bytes:
            self.require_unchanged(name, self.read())
        return self._open_tensors(name, shapes)

    def load_best(self, step: int, shapes: Shapes) -> LazyTensors:
        """Return the best weights, each read when it is used.

        Args:
            step: At which they were validated.
            shapes: As in `load`.

        Raises:
            CheckpointError: as `load`, or if those that are kept are of another step.
        """
        self.require_unchanged(_best_name(step), self.read())
        return self._open_tensors(_best_name(step), shapes)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to the log.

        Raises:
            OutputError: if it cannot be written.
        """
        with writing(self.log_path), self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def trim_log(self, step: int) -> None:
        """Drop the lines of steps that are done again after ``step``.

        Raises:
            OutputError: if it cannot be written.
        """
        if self.log_path.exists():
            with writing(self.log_path):
                text = self.log_path.read_text(encoding="utf-8")
                lines = text[: text.rfind("\n") + 1].splitlines()  # a kill leaves half a line
                kept = [line for line in lines if json.loads(line)["step"] <= step]
                self.log_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise KeyError, TypeError or ValueError where a state has no standing."""
        Standing(**state["standing"])

    def _open_tensors(self, name: str, shapes: Shapes) -> LazyTensors:
        header = read_header(self.folder / name)
        _require_fit(self.folder / name, header, shapes)
        return LazyTensors(header)


def _best_name(step: int) -> str:
    return f"best-{step:06}.safetensors"


def _require_fit(path: Path, header: Mapping[str, TensorInfo], shapes: Shapes) -> None:
    faults = [f"{name} is missing" for name in shapes.keys() - header.keys()]
    faults += [f"{name} is unexpected" for name in header.keys() - shapes.keys()]
    faults += [
        f"{name} is {torch_dtypes()[info.dtype]} {info.shape}, required float32 {shapes[name]}"
        for name, info in header.items()
        if name in shapes and (info.dtype != "F32" or info.shape != shapes[name])
    ]
    if faults:
        raise CheckpointError(f"{path}: the state does not fit: {'; '.join(sorted(faults))}")
