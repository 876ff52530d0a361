"""Ctrl-C in the verbs that keep answers: what is said, and that the command goes on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvvl.cli import app


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["evaluate", "--suite", "line", "--items", "2", "--gate", "0"], "{out}/tiny"),
        (["sweep", "evs", "--value", "0", "--items", "2"], "{out}"),
        (["lm-eval", "--task", "nvvl_copy", "--limit", "2"], "{out}/tiny"),
    ],
    ids=["evaluate", "sweep", "lm-eval"],
)
def test_interrupt_says_what_is_kept_and_that_the_command_goes_on(
    words: list[str],
    kept: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def interrupt_at_first_batch() -> Iterator[Callable[..., None]]:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        yield interrupt

    monkeypatch.setattr("nvvl.console.show_progress", interrupt_at_first_batch)
    command = [*words, str(tiny_checkpoint), "--label", "tiny", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--device", "cpu"])
    assert result.exit_code == 130, result.output
    assert result.stderr.splitlines()[-1] == (
        f"error: interrupted; the answers so far are kept in {kept.format(out=tmp_path)}, and the "
        "same command goes on from there"
    )
