"""What the command line shows while it works."""

import io
import json

import pytest
from rich.table import Table

from nvvl.console import TokenStream, print_error, print_json, print_table, show_progress


def test_progress_goes_to_stderr_with_one_line_a_count(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as progress:
        for count in ("first", "second"):
            for done in range(1, 4):
                progress(f"{count}: block {done}", done, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split("  ")[0].split(" ━")[0].strip() for line in lines] == [
        "first: block 3",
        "second: block 3",
    ]
    assert all("3/3" in line for line in lines)


def test_each_bad_item_of_an_error_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("a.jsonl: 2 of 9 items cannot be used:\n\na.png:  not an image\r\nb.png: absent\n")
    assert capsys.readouterr().err == (
        "error: a.jsonl: 2 of 9 items cannot be used:\n  a.png: not an image\n  b.png: absent\n"
    )


def test_nothing_is_printed_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("\x1b]0;title\x07shard\x9b2J of \u00e9 \x7f")
    assert capsys.readouterr().err == "error: \ufffd]0;title\ufffdshard\ufffd2J of \u00e9 \ufffd\n"
    stream = io.StringIO()
    tokens = TokenStream(lambda ids: "a\tb\n\x1b[2J"[: len(ids)], stream)
    tokens.show(list(range(8)))
    tokens.end()
    assert stream.getvalue() == "a\tb\n\ufffd[2J\n"


def test_names_in_brackets_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as progress:
        progress("[/red].weight", 1, 1)
    assert "[/red].weight" in capsys.readouterr().err


def test_json_keeps_letters_of_every_script(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"answer": "größe"})
    out = capsys.readouterr().out
    assert "größe" in out
    assert json.loads(out) == {"answer": "größe"}


def test_json_names_a_file_whose_name_is_not_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"id": "id\udce9.png"})
    assert json.loads(capsys.readouterr().out) == {"id": "id\udce9.png"}


def test_table_is_not_folded_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    cells = ["a cell of thirty characters ..."] * 4
    for cell in cells:
        table.add_column(cell)
    table.add_row(*cells)
    print_table(table)
    assert any(line.count(cells[0]) == 4 for line in capsys.readouterr().out.splitlines())


def test_tokens_are_printed_once_their_characters_are_complete() -> None:
    stream = io.StringIO()
    texts = {1: "h", 2: "h\ufffd", 3: "hé", 4: "hé\ufffd"}
    tokens = TokenStream(lambda ids: texts[len(ids)], stream)
    shown = []
    for count in texts:
        tokens.show([0] * count)
        shown.append(stream.getvalue())
    tokens.end()
    assert shown == ["h", "h", "hé", "hé"]
    assert stream.getvalue() == "hé\ufffd\n"
