"""The state of a training run on disk: resumed bit for bit, or refused.

    OUT.train/state.json               what the run is, where it stands, names and hashes of files
    OUT.train/step-000050.safetensors  masters, AdamW's two moments, averages, input amaxes
    OUT.train/best-000050.safetensors  weights and input amaxes of the best validations
    OUT.train/log.jsonl                a line a step

``state.json`` is replaced last, by a rename, so a run that is killed while it saves goes on from
the state before. Nothing random has to be kept: the order of the data is a function of seed and
step, and the model has no dropout. Names, shapes and dtypes must be exactly those of the run; the
tensors are whole ones, so a run may go on with another number of processes.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvvl.errors import CheckpointError, OutputError
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.safetensors_io import read_header, read_tensor

LOG_NAME = "log.jsonl"
_STATE_NAME = "state.json"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Standing:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        start_loss: Validation loss of the untrained student.
        best: (validation loss, step) of the best weights that are kept, best first.
    """

    step: int
    start_loss: float
    best: list[tuple[float, int]] = field(default_factory=list)

    @property
    def best_loss(self) -> float:
        """The lowest validation loss."""
        return self.best[0][0]

    @property
    def best_step(self) -> int:
        """The step it was reached at."""
        return self.best[0][1]

    def add(self, loss: float, *, keep: int) -> bool:
        """Take a validation at the present step into account; return whether its weights are kept.

        Of equal losses the earlier one is the better.
        """
        self.best = sorted([*self.best, (loss, self.step)])[:keep]
        return (loss, self.step) in self.best


class StateFolder:
    """Saves and loads one run's state.

    Attributes:
        folder: ``OUT.train``.
        identity: What has to be equal for a run to be gone on with.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))

    @property
    def log_path(self) -> Path:
        """The JSONL log."""
        return self.folder / LOG_NAME

    def open(self, *, size_bytes: int, overwrite: bool) -> bool:
        """Make the folder, or find a run of the same identity in it.

        Args:
            size_bytes: What saving will take: two states and the best weights.
            overwrite: Discard what is there.

        Returns:
            Whether there is a state to load.

        Raises:
            OutputError: if the folder holds a run with other settings, cannot be made, or the disk
                has no room.
        """
        if overwrite:
            self.discard()
        found = self._read() if (self.folder / _STATE_NAME).exists() else None
        if found is not None and found["identity"] != self.identity:
            keys = sorted(k for k, v in self.identity.items() if found["identity"].get(k) != v)
            raise OutputError(
                f"{self.folder}: holds a run with another {', '.join(keys)}; give the same "
                "settings to go on with it, pass --overwrite to discard it, or choose another OUT"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder}: cannot be made ({error.strerror})") from None
        free = shutil.disk_usage(self.folder).free
        if found is None and free < size_bytes:
            raise OutputError(
                f"{self.folder}: training state needs {size_bytes} bytes, the disk has {free} "
                "free; free some or choose another disk"
            )
        return found is not None

    def save(
        self, standing: Standing, state: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
    ) -> None:
        """Save a state, and the weights if they are among the best.

        Args:
            standing: Names the step, and which best weights are to be kept.
            state: Everything the run goes on from.
            weights: What would be written, if this step's are among the best.

        Raises:
            OutputError: if the disk is full.
        """
        name = f"step-{standing.step:06}.safetensors"
        write_safetensors(self.folder / name, state)
        if weights is not None:
            write_safetensors(self.folder / _best_name(standing.step), weights)
        names = [name, *(_best_name(step) for _, step in standing.best)]
        content = {
            "identity": self.identity,
            "standing": asdict(standing),
            "files": {file: _hash(self.folder / file) for file in names},
        }
        partial = self.folder / f"{_STATE_NAME}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.folder / _STATE_NAME)
        for path in self.folder.glob("*.safetensors"):
            if path.name not in names:
                path.unlink()

    def standing(self) -> Standing:
        """Return how far the saved run has come.

        Raises:
            CheckpointError: if state.json cannot be read.
        """
        return _standing(self._read())

    def load(self, shapes: Shapes) -> dict[str, Tensor]:
        """Return the saved state.

        Args:
            shapes: Of exactly the tensors there must be, all float32.

        Raises:
            CheckpointError: if a file changed, or a tensor is missing, unexpected or misshapen.
        """
        return self._read_tensors(f"step-{self.standing().step:06}.safetensors", shapes)

    def load_best(self, shapes: Shapes, *, step: int | None = None) -> dict[str, Tensor]:
        """Return the best weights, or other kept ones.

        Args:
            shapes: As in `load`.
            step: At which they were validated; None for the best.

        Raises:
            CheckpointError: as `load`, or if none of that step are kept.
        """
        kept = [kept_step for _, kept_step in self.standing().best]
        step = kept[0] if step is None else step
        if step not in kept:
            raise CheckpointError(
                f"{self.folder}: no weights of step {step} are kept; there are those of "
                f"{', '.join(map(str, kept))}"
            )
        return self._read_tensors(_best_name(step), shapes)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def trim_log(self, step: int) -> None:
        """Drop the lines of steps that are done again after ``step``."""
        if self.log_path.exists():
            lines = self.log_path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.log_path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def finish(self) -> None:
        """Leave only the best weights, where several are kept, and what names them."""
        standing = self.standing()
        if len(standing.best) < 2:
            self.discard()
            return
        for path in self.folder.glob("step-*.safetensors"):
            path.unlink()

    def discard(self) -> None:
        """Remove the files of a run, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        for pattern in (f"{_STATE_NAME}*", "step-*.safetensors*", "best-*.safetensors*", LOG_NAME):
            for path in self.folder.glob(pattern):
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _read(self) -> dict[str, Any]:
        path = self.folder / _STATE_NAME
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _standing(state)
            if not isinstance(state["identity"], dict) or not isinstance(state["files"], dict):
                raise TypeError("identity and files")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a training state of nvvl ({error!r}); pass --overwrite to start again"
            ) from None
        return state

    def _read_tensors(self, name: str, shapes: Shapes) -> dict[str, Tensor]:
        path = self.folder / name
        if not path.is_file() or self._read()["files"].get(name) != _hash(path):
            raise CheckpointError(
                f"{path}: missing or changed since it was saved; pass --overwrite to start again"
            )
        tensors = {key: read_tensor(info) for key, info in read_header(path).items()}
        _require_fit(path, tensors, shapes)
        return tensors


def _best_name(step: int) -> str:
    return f"best-{step:06}.safetensors"


def _standing(state: Mapping[str, Any]) -> Standing:
    values = dict(state["standing"])
    best = [(float(loss), int(step)) for loss, step in values.pop("best")]
    return Standing(**values, best=best)


def _require_fit(path: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    faults = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
    faults += [f"{name} is unexpected" for name in tensors.keys() - shapes.keys()]
    faults += [
        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, required float32 {shapes[name]}"
        for name, tensor in tensors.items()
        if name in shapes and (tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[name])
    ]
    if faults:
        raise CheckpointError(f"{path}: the state does not fit: {'; '.join(sorted(faults))}")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
