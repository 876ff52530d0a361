"""TensorBoard events of a run, where they are asked for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvvl.errors import HardwareError


class Events:
    """Writes the numbers of each step as curves; nothing without a writer."""

    def __init__(self, writer: Any = None) -> None:
        self._writer = writer

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        if self._writer is not None:
            for name, value in record.items():
                self._writer.add_scalar(f"distill/{name}", value, step)


@contextmanager
def open_tensorboard(folder: Path | None, step: int) -> Iterator[Events]:
    """Open a folder of events; what an earlier start wrote after ``step`` is hidden.

    Args:
        folder: None writes nothing.
        step: Steps done already.

    Raises:
        HardwareError: if the package that writes events is not installed.
    """
    if folder is None:
        yield Events()
        return
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise HardwareError(
            "--tensorboard: needs the package tensorboardX; pip install 'nvvl[tensorboard]'"
        ) from None
    with SummaryWriter(str(folder), purge_step=step + 1) as writer:
        yield Events(writer)
