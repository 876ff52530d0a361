"""What the command line shows while it works.

Progress and errors go to stderr, results to stdout, so that ``nvvl ... --json > result.json`` holds
the result alone. Where stderr is no terminal, the bars are printed once, at the end.

A reader that goes away, as `head` does, ends the command quietly; a disk that is full is an error.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBars
from rich.table import Table
from rich.text import Text

from nvvl.errors import OutputError, writing
from nvvl.progress import Progress

EXIT_PIPE_CLOSED = 141  # what shells report of a process ended by SIGPIPE

_FILE_WIDTH = 200
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 but tab and line feed, DEL, C1

# torchrun passes one Ctrl-C on and kills its processes 30 seconds later, wherever they are.
_KILLER = "TORCHELASTIC_RUN_ID"
_STOPPING = {
    False: "finishing this block; Ctrl-C again stops at once",
    True: "torchrun stops soon: finished blocks are kept, and the same command goes on from there",
}


class _Stream(TextIOWrapper):
    """A standard stream whose faults are told from those of files.

    SIGPIPE itself stays ignored, as it would end nvvl for the connection of a download too.
    Progress that cannot be written stops no work.
    """

    def __init__(self, stream: TextIOWrapper, *, is_result: bool) -> None:
        """Write to what a stream writes to; a file name may be no UTF-8, and is escaped then."""
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        self._is_result = is_result

    def write(self, text: str) -> int:
        """Write, or raise as `_guarded`."""
        with self._guarded():
            return super().write(text)

    def flush(self) -> None:
        """Flush, or raise as `_guarded`."""
        with self._guarded():
            super().flush()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """End the command if nobody reads on; of what else goes wrong make an `OutputError`."""
        try:
            with writing(Path("stdout")):
                yield
        except OutputError as error:
            with open(os.devnull, "wb") as nowhere:  # for what is in buffers when Python ends
                os.dup2(nowhere.fileno(), self.fileno())
            if isinstance(error.__cause__, BrokenPipeError):
                raise SystemExit(EXIT_PIPE_CLOSED) from None
            if self._is_result:
                raise


@contextmanager
def standard_streams() -> Iterator[None]:
    """Print as `_Stream` does while the block runs; streams of another kind stay as they are."""
    with ExitStack() as stack:
        for stream, redirect in (sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr):
            if isinstance(stream, TextIOWrapper):
                ours = _Stream(stream, is_result=stream is sys.stdout)
                stack.callback(ours.detach)  # else it would close what both write to
                stack.enter_context(redirect(ours))
        yield


class _RateColumn(ProgressColumn):
    """How many are done a second, or how many seconds one takes."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task as text."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Show a bar with stage, rate and remaining time, then time taken, of each reported count."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with ProgressBars(*columns, console=_open_console(sys.stderr)) as bars:
        task = None
        last = (0, 0)

        def report(stage: str, num_done: int, num_all: int) -> None:
            nonlocal task, last
            if task is None or num_all != last[1] or num_done < last[0]:  # another count began
                task = bars.add_task(stage)
            bars.update(task, description=stage, completed=num_done, total=num_all)
            last = (num_done, num_all)

        yield report


@contextmanager
def defer_interrupt(*, quiet: bool = False) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C wait: what is yielded then says True; a second one ends at once.

    Args:
        quiet: Do not say so, on a process that is not the one that reports.
    """
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        if not quiet:
            print(_STOPPING[_KILLER in os.environ], file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


class TokenStream:
    """Prints a text while its tokens come, each character once it is complete."""

    def __init__(self, decode: Callable[[list[int]], str], stream: TextIO | None) -> None:
        """Take what turns ids into text, and where to print; None prints nothing."""
        self._decode = decode
        self._stream = stream
        self._text = ""
        self._printed = 0

    def show(self, ids: list[int]) -> None:
        """Print what the last token added."""
        if self._stream is None:
            return
        self._text = self._decode(ids)
        if not self._text.endswith("\ufffd"):  # else other bytes of a character are to come
            self._print_new()

    def end(self) -> None:
        """Print what is left, and end the line."""
        if self._stream is not None:
            self._print_new()
            self._stream.write("\n")

    def _print_new(self) -> None:
        assert self._stream is not None
        self._stream.write(without_controls(self._text[self._printed :]))
        self._stream.flush()
        self._printed = len(self._text)


def print_error(message: str) -> None:
    """Print an error on stderr: one line, and an indented one for each further line it has."""
    lines = [" ".join(line.split()) for line in message.splitlines()]
    shown = "\n  ".join(line for line in lines if line)
    print(without_controls(f"error: {shown}"), file=sys.stderr)


def without_controls(text: str) -> str:
    """Replace what a terminal would obey, such as escape sequences; line ends and tabs stay."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def print_json(value: Any) -> None:
    """Print a result for programs on stdout; what of a file name is no UTF-8 is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(text.encode(errors="backslashreplace").decode())


def print_table(table: Table) -> None:
    """Print a table on stdout; in full width where stdout is no terminal."""
    _open_console(sys.stdout).print(table)


def _open_console(stream: TextIO) -> Console:
    # names of layers and models may have brackets, which are no markup
    width = None if stream.isatty() else _FILE_WIDTH
    return Console(file=stream, width=width, markup=False)
