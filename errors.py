"""Errors a user can cause, each with one clear line: what was required, what came, the way out.

    NvvlError
      ConfigError        a config.json that is missing, incomplete or of another architecture
      CheckpointError    tensors missing, unexpected, truncated, of wrong shape or dtype
      RecipeError        a recipe that does not parse, or whose patterns match nothing
      CalibrationError   a layer never reached, or an amax that is zero or not finite
      DataError          an image, video, JSONL line or calibration set that cannot be used
      SourceError        a file that cannot be read just now: a network or disk that fails
      OutputError        an output folder that exists, or a disk that is full
      VerificationError  a written checkpoint that is not what it claims to be
      HardwareError      a device, memory or compiler that the request needs and the machine lacks
      TrainingError      a distillation that gave NaN, or diverged
      EngineError        an ONNX graph or TensorRT engine that cannot be built or run
      ReportedError      an error that another process of the same run reports

The command line prints the message, but for that of a `ReportedError`, and exits with 2. Every
other exception is a bug of nvvl's own and keeps its traceback.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class NvvlError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(NvvlError):
    """A config.json is missing, incomplete or describes another architecture."""


class CheckpointError(NvvlError):
    """A checkpoint's tensors are missing, unexpected, truncated or malformed."""


class RecipeError(NvvlError):
    """A recipe has an unknown key, an impossible value or a pattern that matches nothing."""


class CalibrationError(NvvlError):
    """Calibration left a layer without a usable amax."""


class DataError(NvvlError):
    """An input item, or a set of them, cannot be used."""


class SourceError(NvvlError):
    """What is read could be read before, and cannot now."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says about a file that is read into a `SourceError`."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error


class OutputError(NvvlError):
    """The output cannot be written where it was asked for."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a file or folder that is written into an `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def require_disk(folder: Path, required: int, what: str) -> None:
    """Refuse an output that the disk has no room for.

    Args:
        folder: Exists, on the disk that is written; named in the message.
        required: Bytes.
        what: Says what they are for: ``the graphs need about``.

    Raises:
        OutputError: if fewer bytes are free.
        OSError: if the folder's disk cannot be asked.
    """
    free = shutil.disk_usage(folder).free
    if free < required:
        raise OutputError(
            f"{folder}: {what} {required} bytes, the disk has {free} free; free {required - free} "
            "bytes or choose another disk"
        )


def require_unread(out: Path, sources: Iterable[Path], *, within: bool = False) -> None:
    """Refuse an output that would take the place of what it is made from, or come to lie in it.

    Args:
        out: The output.
        sources: Folders and files that are read.
        within: Allow ``out`` to lie in one of them.

    Raises:
        OutputError: if ``out`` is one of the sources, or holds one, or lies in one.
    """
    with writing(out):
        for source in sources:
            if out.resolve() in (source.resolve(), *source.resolve().parents):
                raise OutputError(f"{out}: holds {source}, which is read; choose another OUT")
            if not within and source.resolve() in out.resolve().parents:
                raise OutputError(f"{out}: lies in {source}, which is read; choose another OUT")


def name_some(names: Sequence[str], limit: int) -> str:
    """Name the first of many for a message: ``a, b, c and 12 more``."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, or its type's name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_misfit(error: Exception) -> str:
    """Say in words what is wrong with a file, of the exception that reading it as JSON raised."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, KeyError):
        return f"without {error.args[0]}"
    if isinstance(error, TypeError | AttributeError):
        return "its values are arranged otherwise"
    return first_line(error)


class VerificationError(NvvlError):
    """A written checkpoint is not what it claims to be."""


class HardwareError(NvvlError):
    """The machine lacks what the request needs."""


class TrainingError(NvvlError):
    """A distillation gave NaN or Inf, or moved away from its teacher."""


class EngineError(NvvlError):
    """An ONNX graph or TensorRT engine cannot be built or run."""


class ReportedError(NvvlError):
    """This process ends because of an error that the main process of the run reports."""
