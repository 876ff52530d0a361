"""TensorBoard events of a run, where they are asked for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nvvl.errors import HardwareError, writing


class Events:
    """Writes the numbers of each step as curves; nothing without a writer."""

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(f"distill/{name}", value, step)


def prepare_events_folder(folder: Path | None) -> None:
    """Make a folder of events.

    Args:
        folder: None writes nothing.

    Raises:
        HardwareError: if the package that writes events is not installed.
        OutputError: if the folder cannot be made.
    """
    if folder is None:
        return
    if find_spec("tensorboardX") is None:
        raise HardwareError(
            "--tensorboard: needs the package tensorboardX; pip install 'nvvl[tensorboard]'"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def open_tensorboard(folder: Path | None, step: int) -> Iterator[Events]:
    """Open a folder of events; what an earlier start wrote after ``step`` is hidden.

    Args:
        folder: As in `prepare_events_folder`, which is called first.
        step: Steps done already.

    Raises:
        OutputError: if the events cannot be written.
    """
    if folder is None:
        yield Events()
        return
    from tensorboardX import SummaryWriter

    with writing(folder):
        writer = SummaryWriter(str(folder), purge_step=step + 1)
    with writer:
        yield Events(writer)
