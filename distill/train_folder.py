"""``OUT.train``: what an unfinished run has done, gone on with by the same command.

Each way of training has files of its own there. One of them, JSON, says what the run is and names
the others by hash. It is replaced last, by a rename, so a run that is killed while it saves goes on
from the state before. One run at a time holds the folder; one that ends well leaves nothing in it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

import nvvl
from nvvl.distill.recipe import Method
from nvvl.errors import CheckpointError, OutputError, describe_misfit, writing
from nvvl.model.hashing import changed_files
from nvvl.model.safetensors_io import TensorInfo, read_tensor
from nvvl.quantize.identity import describe_differences
from nvvl.quantize.manifest import library_versions
from nvvl.staging import locked

LOG_NAME = "log.jsonl"

# The file that names the others comes first, so that it is the first to go.
_FILES: dict[Method, tuple[str, ...]] = {
    "whole": ("state.json", "step-*.safetensors", "best-*.safetensors", LOG_NAME),
    "layers": ("blocks.json", "layer-*.safetensors"),
}


def train_folder(out: Path) -> Path:
    """Return where the unfinished run of an output lies."""
    return out.with_name(f"{out.name}.train")


@contextmanager
def hold_train_folder(out: Path) -> Iterator[Path]:
    """Make ``OUT.train`` and hold it against other runs; one that is left empty goes.

    Raises:
        OutputError: if it cannot be made, or another run holds it.
    """
    folder = train_folder(out)
    with locked(folder):
        try:
            yield folder
        finally:
            with writing(folder):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


class TrainFolder:
    """The files of one run.

    Attributes:
        method: How the run trains.
        folder: ``OUT.train``.
        identity: What has to be equal for a run to be gone on with, versions of libraries too.
    """

    method: Method

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        versions = {"nvvl": nvvl.__version__, **library_versions()}
        self.identity = json.loads(json.dumps(identity))
        self.identity |= {f"version of {name}": text for name, text in versions.items()}

    @property
    def path(self) -> Path:
        """The file that names the others."""
        return self.folder / _FILES[self.method][0]

    def find(self, *, overwrite: bool) -> dict[str, Any] | None:
        """Return what a run of the same identity has left; else make the folder.

        Args:
            overwrite: Discard a run that cannot be gone on with, in place of refusing it.

        Raises:
            CheckpointError: if the state is not one.
            OutputError: if the folder holds another run, or cannot be made.
        """
        try:
            self._refuse_other_method()
            state = self.read() if self.path.exists() else None
            if state is not None:
                self._refuse_other_identity(state["identity"])
                for name in state["files"] if overwrite else ():
                    self.require_unchanged(name, state)
        except (CheckpointError, OutputError):
            if not overwrite:
                raise
            self.discard(*_FILES)
            state = None
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        return state

    def read(self) -> dict[str, Any]:
        """Read what the run is, and what its files are.

        Raises:
            CheckpointError: if it cannot be read.
        """
        try:
            state: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            self.check(state)
            if not isinstance(state["identity"], dict) or not isinstance(state["files"], dict):
                raise TypeError("identity and files")
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: not a training state of nvvl ({describe_misfit(error)}); pass "
                "--overwrite to start again"
            ) from None
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace what the run is.

        Args:
            state: With the SHA-256 of each file in ``files``; the identity is added.

        Raises:
            OutputError: if it cannot be written.
        """
        text = json.dumps({"identity": self.identity, **state}, indent=2) + "\n"
        partial = self.path.with_name(f"{self.path.name}.partial")
        with writing(self.path):
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise KeyError, TypeError or ValueError where a state lacks what the method needs."""

    def require_unchanged(self, name: str, state: Mapping[str, Any]) -> Path:
        """Return the path of a file that a state names.

        Raises:
            CheckpointError: if it is not what was saved.
        """
        path = self.folder / name
        if changed_files(self.folder, {name: state["files"].get(name, "")}):
            raise CheckpointError(
                f"{path}: missing or changed since it was saved; pass --overwrite to start again"
            )
        return path

    def own_files(self, *methods: Method) -> list[Path]:
        """List the files of this run, or of those methods."""
        patterns = [name for method in methods or (self.method,) for name in _FILES[method]]
        unfinished = [f"{pattern}.partial" for pattern in patterns]
        return [path for pattern in patterns + unfinished for path in self.folder.glob(pattern)]

    def discard(self, *methods: Method) -> None:
        """Remove the files of this run, or of those methods.

        Raises:
            OutputError: if they cannot be removed.
        """
        if not self.folder.is_dir():
            return
        with writing(self.folder):
            for path in self.own_files(*methods):
                path.unlink()

    def _refuse_other_method(self) -> None:
        for method, (name, *_) in _FILES.items():
            if method != self.method and (self.folder / name).exists():
                raise OutputError(
                    f'{self.folder}: holds a run of method "{method}"; give its recipe to go on '
                    "with it, pass --overwrite to discard it, or choose another OUT"
                )

    def _refuse_other_identity(self, found: Mapping[str, Any]) -> None:
        differing = describe_differences(found, self.identity)
        if differing:
            raise OutputError(
                f"{self.folder}: holds a run with other settings: {'; '.join(differing)}; give "
                "the same to go on with it, pass --overwrite to discard it, or choose another OUT"
            )


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of files, read anew each time they are used; that raises as `read_tensor`."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = infos

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._infos[name])

    def __contains__(self, name: object) -> bool:
        return name in self._infos  # a mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)
