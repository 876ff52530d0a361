"""The state of a training run on disk: resumed bit for bit, or refused.

    OUT.train/state.json               what the run is, where it stands, names and hashes of files
    OUT.train/step-000050.safetensors  FP32 masters and AdamW's two moments
    OUT.train/best-000050.safetensors  FP32 masters of the best validation
    OUT.train/log.jsonl                a line a step

``state.json`` is replaced last, by a rename, so a run that is killed while it saves goes on from
the state before. Nothing random has to be kept: the order of the data is a function of seed and
step, and the model has no dropout. Names, shapes and dtypes must be exactly those of the run.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvvl.errors import CheckpointError, OutputError
from nvvl.model.checkpoint_writer import write_safetensors
from nvvl.model.safetensors_io import read_header, read_tensor

LOG_NAME = "log.jsonl"
_STATE_NAME = "state.json"
_PARTS = ("master", "exp_avg", "exp_avg_sq")


@dataclass
class Standing:
    """How far a run has come.

    Attributes:
        step: Optimizer steps done.
        start_kl: Validation loss of the untrained student.
        best_kl: The lowest validation loss.
        best_step: The step it was reached at.
    """

    step: int
    start_kl: float
    best_kl: float
    best_step: int


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

    def open(self, masters: Mapping[str, Tensor], *, overwrite: bool) -> bool:
        """Make the folder, or find a run of the same identity in it.

        Args:
            masters: Give the size of a state.
            overwrite: Discard what is there.

        Returns:
            Whether there is a state to load.

        Raises:
            OutputError: if the folder holds a run with other settings, cannot be made, or the disk
                has no room for two states and the best weights.
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
        required = 7 * sum(master.numel() * 4 for master in masters.values())
        free = shutil.disk_usage(self.folder).free
        if found is None and free < required:
            raise OutputError(
                f"{self.folder}: training state needs {required} bytes, the disk has {free} free; "
                "free some or choose another disk"
            )
        return found is not None

    def save(
        self,
        standing: Standing,
        masters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Save masters and optimizer, and the masters as the best where they are.

        Raises:
            OutputError: if the disk is full.
        """
        name = f"step-{standing.step:06}.safetensors"
        write_safetensors(self.folder / name, _pack_state(masters, optimizer))
        if standing.best_step == standing.step:
            best = self.folder / f"best-{standing.step:06}.safetensors"
            write_safetensors(best, dict(masters))
        best_name = f"best-{standing.best_step:06}.safetensors"
        state = {
            "identity": self.identity,
            "standing": asdict(standing),
            "files": {file: _hash(self.folder / file) for file in (name, best_name)},
        }
        partial = self.folder / f"{_STATE_NAME}.partial"
        partial.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.folder / _STATE_NAME)
        for path in self.folder.glob("*.safetensors"):
            if path.name not in (name, best_name):
                path.unlink()

    def load(self, masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Standing:
        """Fill masters and optimizer from the saved state.

        Raises:
            CheckpointError: if a file changed, or a tensor is missing, unexpected or misshapen.
        """
        standing = Standing(**self._read()["standing"])
        tensors = self._read_tensors(f"step-{standing.step:06}.safetensors")
        _require_fit(self.folder, tensors, _expected(masters, with_moments=standing.step > 0))
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(tensors[f"master.{name}"])
                if standing.step:
                    optimizer.state[master] = {
                        "step": torch.tensor(float(standing.step), device=master.device),
                        **{
                            part: tensors[f"{part}.{name}"].to(master.device) for part in _PARTS[1:]
                        },
                    }
        return standing

    def load_best(self, masters: Mapping[str, Tensor]) -> None:
        """Fill the masters with the best ones.

        Raises:
            CheckpointError: as `load`.
        """
        standing = Standing(**self._read()["standing"])
        tensors = self._read_tensors(f"best-{standing.best_step:06}.safetensors")
        _require_fit(self.folder, tensors, {n: tuple(m.shape) for n, m in masters.items()})
        with torch.no_grad():
            for name, master in masters.items():
                master.copy_(tensors[name])

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
            state = json.loads(path.read_text(encoding="utf-8"))
            Standing(**state["standing"])
            if not isinstance(state["identity"], dict) or not isinstance(state["files"], dict):
                raise TypeError("identity and files")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not a training state of nvvl ({error!r}); pass --overwrite to start again"
            ) from None
        return state

    def _read_tensors(self, name: str) -> dict[str, Tensor]:
        path = self.folder / name
        if not path.is_file() or self._read()["files"].get(name) != _hash(path):
            raise CheckpointError(
                f"{path}: missing or changed since it was saved; pass --overwrite to start again"
            )
        return {key: read_tensor(info) for key, info in read_header(path).items()}


def _pack_state(
    masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {}
    for name, master in masters.items():
        tensors[f"master.{name}"] = master.detach()
        moments = optimizer.state.get(master, {})
        tensors |= {f"{part}.{name}": moments[part] for part in _PARTS[1:] if part in moments}
    return tensors


def _expected(masters: Mapping[str, Tensor], *, with_moments: bool) -> dict[str, tuple[int, ...]]:
    parts = _PARTS if with_moments else _PARTS[:1]
    return {f"{p}.{name}": tuple(m.shape) for name, m in masters.items() for p in parts}


def _require_fit(
    folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    faults = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    faults += [f"{name} is unexpected" for name in tensors.keys() - expected.keys()]
    faults += [
        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, required float32 {expected[name]}"
        for name, tensor in tensors.items()
        if name in expected
        and (tensor.dtype != torch.float32 or tuple(tensor.shape) != expected[name])
    ]
    if faults:
        raise CheckpointError(f"{folder}: the state does not fit: {'; '.join(sorted(faults))}")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
