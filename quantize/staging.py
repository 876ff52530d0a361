"""An output folder that is either complete or not there.

Everything is written to a hidden sibling folder, which takes the final name by one rename when it
is complete. What stood there before is replaced only then, and only if the user said so.

`staged_folder` leaves nothing behind when it fails. `resumable_folder` is for runs that take long:
its hidden folder always has the same name, so that the same command finds again what a killed run
had finished:

    .OUT.partial/
      journal.jsonl                    which blocks are finished     (nvvl.quantize.journal)
      activations-00012-0.safetensors  the items after a block       (nvvl.quantize.spill)
      output/                          what takes the name OUT by one rename when it is complete
      old/                             what stood at OUT before, for the moment of that rename

A run that is killed, interrupted or out of disk space leaves that folder; one that fails because
source, recipe or items cannot be used removes it, since going on would fail again.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvvl.errors import NvvlError, OutputError

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class Stage:
    """The hidden folder of one unfinished output.

    Attributes:
        root: The folder itself.
    """

    root: Path

    @property
    def output(self) -> Path:
        """What becomes ``OUT``."""
        return self.root / "output"

    @property
    def journal(self) -> Path:
        """The record of finished blocks."""
        return self.root / "journal.jsonl"

    def clear(self) -> None:
        """Remove everything but the journal."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self.journal:
                path.unlink()


def resumable_stage(out: Path) -> Stage:
    """Return where an output is made that can be gone on with."""
    out = Path(out).absolute()
    return Stage(out.with_name(f".{out.name}.partial"))


@contextmanager
def staged_folder(out: Path, *, source: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an exception.

    Args:
        out: The final folder; its parents are made.
        source: A folder that must survive.
        overwrite: Whether an earlier output at ``out`` may be replaced.

    Raises:
        OutputError: if ``out`` exists and may not be replaced, or cannot be made.
    """
    out = Path(out).absolute()
    _require_free(out, source=source, overwrite=overwrite)
    stage = Stage(out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}"))
    with _locked(stage.root):
        try:
            stage.output.mkdir()
            yield stage.output
            _require_free(out, source=source, overwrite=overwrite)
            _replace(out, stage)
        except BaseException:
            shutil.rmtree(stage.root, ignore_errors=True)
            raise


@contextmanager
def resumable_folder(out: Path, *, source: Path, overwrite: bool) -> Iterator[Stage]:
    """Yield a stage whose ``output`` becomes ``out`` when the block ends without an exception.

    Args:
        out: The final folder; its parents are made.
        source: A folder that must survive.
        overwrite: Whether an earlier output at ``out`` may be replaced.

    Raises:
        OutputError: if ``out`` exists and may not be replaced, cannot be made, or another run is
            writing it.
        KeyboardInterrupt: again, saying how to go on.
    """
    out = Path(out).absolute()
    stage = resumable_stage(out)
    if out.exists() and stage.root.exists() and not stage.output.exists():
        with _locked(stage.root):
            shutil.rmtree(stage.root)  # of a run killed after its output took its name
    _require_free(out, source=source, overwrite=overwrite)
    with _locked(stage.root):
        try:
            yield stage
            _require_free(out, source=source, overwrite=overwrite)
            _replace(out, stage)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; finished blocks are kept in {stage.root}, and the same command "
                "goes on from there"
            ) from None
        except OutputError:
            raise
        except NvvlError:
            shutil.rmtree(stage.root)
            raise


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Make a folder and hold it; the system lets go when the process ends, however it ends."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"{root}: cannot be made ({error.strerror}); choose another OUT"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise OutputError(
            f"{root}: another run is writing there; wait for it, or choose another OUT"
        ) from None
    finally:
        os.close(descriptor)


def _require_free(out: Path, *, source: Path, overwrite: bool) -> None:
    source = Path(source).resolve()
    if out.resolve() == source or out.resolve() in source.parents:
        raise OutputError(f"{out}: holds the source checkpoint; choose another OUT")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{out}: exists already; choose another OUT, or pass --overwrite")
    if not out.is_dir() or out.is_symlink():
        raise OutputError(f"{out}: is not a folder, so it is not replaced; choose another OUT")
    if any(out.iterdir()) and not (out / MANIFEST_NAME).exists():
        raise OutputError(
            f"{out}: holds files but no {MANIFEST_NAME}, so nvvl did not write it and does not "
            "replace it; choose another OUT"
        )


def _replace(out: Path, stage: Stage) -> None:
    old = stage.root / "old"
    if old.exists():
        shutil.rmtree(old)  # of a run killed between the two renames below
    if out.exists():
        out.rename(old)
    try:
        stage.output.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(stage.root)
