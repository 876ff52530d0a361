"""An output folder that is either complete or not there.

Everything is written to a hidden sibling folder, which takes the final name by one rename when it
is complete. What stood there before is replaced only then, and only if the user said so.

`staged_folder` leaves nothing behind when it fails, and removes what killed runs to the same place
left. `resumable_folder` is for runs that take long:
its hidden folder always has the same name, so that the same command finds again what a killed run
had finished:

    .OUT.partial/
      journal.jsonl                    which blocks are finished     (nvvl.quantize.journal)
      activations-00012-0.safetensors  the items after a block       (nvvl.quantize.spill)
      output/                          what takes the name OUT by one rename when it is complete
      old/                             what stood at OUT before, for the moment of that rename

A run that is killed, interrupted or out of disk space leaves that folder; one that fails because
source, recipe or items cannot be used removes it, since going on would fail again. A run that went
on with finished blocks never removes them: they show that all this could be used before.
"""

import fcntl
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nvvl.errors import NvvlError, OutputError, SourceError, require_unread, writing

MANIFEST_NAME = "manifest.json"

OUTPUT = "output of nvvl"
"""Whatever has a manifest with ``nvvl_version``: a checkpoint, graphs, engines, logits."""

_LEFT_BEHIND_AFTER = 60.0
"""Seconds after which a folder that nobody holds is a killed run's, not one of this moment."""


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
    def old(self) -> Path:
        """What stood at ``OUT``, for a moment."""
        return self.root / "old"

    @property
    def journal(self) -> Path:
        """The record of finished blocks."""
        return self.root / "journal.jsonl"

    def has_blocks(self) -> bool:
        """Tell whether a run finished a block: one more line than what the run is made from."""
        return self.journal.exists() and self.journal.read_bytes().count(b"\n") > 1

    def is_ours(self) -> bool:
        """Tell whether it holds nothing but what is left once the output has its name."""
        names = {path.name for path in self.root.iterdir()} - {self.journal.name, self.old.name}
        return all(name.startswith("activations-") for name in names)

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
def staged_folder(
    out: Path, *, sources: Sequence[Path], overwrite: bool, kind: str = OUTPUT
) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an exception.

    Args:
        out: The final folder; its parents are made.
        sources: Folders that must survive.
        overwrite: Whether an earlier output at ``out`` may be replaced.
        kind: What may be replaced: `OUTPUT`, or what ``format`` is in the manifest that is written.

    Raises:
        OutputError: if ``out`` exists and may not be replaced, or cannot be made; a finished output
            that only did not get its name is kept, and the error says where.
    """
    out = Path(out).absolute()
    _require_free(out, sources, overwrite=overwrite, kind=kind)
    _clear_left_behind(out)
    stage = Stage(out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}"))
    with locked(stage.root):
        try:
            stage.output.mkdir()
            yield stage.output
        except BaseException:
            shutil.rmtree(stage.root, ignore_errors=True)
            raise
        _replace(out, stage, sources, overwrite=overwrite, kind=kind)


@contextmanager
def resumable_folder(out: Path, *, sources: Sequence[Path], overwrite: bool) -> Iterator[Stage]:
    """Yield a stage whose ``output`` becomes ``out`` when the block ends without an exception.

    Args:
        out: The final folder; its parents are made.
        sources: Folders that must survive.
        overwrite: Whether an earlier output at ``out`` may be replaced.

    Raises:
        OutputError: if ``out`` exists and may not be replaced, cannot be made, or another run is
            writing it.
        SourceError: again, saying how to go on.
        KeyboardInterrupt: again, saying how to go on.
    """
    out = Path(out).absolute()
    _require_free(out, sources, overwrite=overwrite)
    stage = resumable_stage(out)
    with locked(stage.root):
        with writing(stage.root):
            if out.exists() and not stage.output.exists() and stage.is_ours():
                stage.clear()  # of a run killed after its output took its name
                stage.journal.unlink(missing_ok=True)
            resumed = stage.has_blocks()
        try:
            yield stage
            _replace(out, stage, sources, overwrite=overwrite)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; finished blocks are kept in {stage.root}, and the same command "
                "goes on from there"
            ) from None
        except OutputError:
            raise
        except SourceError as error:
            raise SourceError(
                f"{error}; finished blocks are kept in {stage.root}, and the same command goes on "
                "from there"
            ) from error
        except NvvlError:
            if not resumed:
                shutil.rmtree(stage.root)
            raise


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Make a folder and hold it; the system lets go when the process ends, however it ends.

    Raises:
        OutputError: if it cannot be made, or another run holds it.
    """
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


def _clear_left_behind(out: Path) -> None:
    """Remove the folders of killed runs that would have become ``out``; finished ones stay."""
    for root in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with suppress(OSError, OutputError):  # another run's, or gone by now
            is_old = time.time() - root.stat().st_mtime > _LEFT_BEHIND_AFTER
            if is_old and not (Stage(root).output / MANIFEST_NAME).exists():
                with locked(root):
                    shutil.rmtree(root)


def _require_free(
    out: Path, sources: Sequence[Path], *, overwrite: bool, kind: str = OUTPUT
) -> None:
    require_unread(out, sources)
    with writing(out):
        if not out.exists() and not out.is_symlink():
            return
        if os.path.ismount(out):
            raise OutputError(
                f"{out}: is a mount point, which cannot be replaced; choose a folder in it"
            )
        if not out.is_dir() or out.is_symlink():
            raise OutputError(f"{out}: is not a folder, so it is not replaced; choose another OUT")
        if any(out.iterdir()) and not _is_output(out, kind):
            raise OutputError(
                f"{out}: holds files but no {MANIFEST_NAME} of an {kind}, so it is not replaced; "
                "choose another OUT"
            )
        if not overwrite:
            raise OutputError(f"{out}: exists already; choose another OUT, or pass --overwrite")


def _is_output(folder: Path, kind: str) -> bool:
    """Whether this is what nvvl wrote; web applications have a manifest.json too."""
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, RecursionError):
        return False
    if not isinstance(manifest, dict):
        return False
    return "nvvl_version" in manifest if kind == OUTPUT else manifest.get("format") == kind


def _replace(
    out: Path, stage: Stage, sources: Sequence[Path], *, overwrite: bool, kind: str = OUTPUT
) -> None:
    kept = f"the finished output is kept as {stage.output}"
    try:
        _require_free(out, sources, overwrite=overwrite, kind=kind)
    except OutputError as error:  # made by somebody else meanwhile
        raise OutputError(f"{error}; {kept}") from None
    try:
        if stage.old.exists():
            shutil.rmtree(stage.old)  # of a run killed between the two renames below
        if out.exists():
            out.rename(stage.old)
        try:
            stage.output.rename(out)
        except OSError:
            if stage.old.exists():
                stage.old.rename(out)
            raise
    except OSError as error:
        raise OutputError(
            f"{out}: the finished output cannot get this name ({error.strerror}); {kept}"
        ) from error
    with writing(stage.root):
        shutil.rmtree(stage.root)
