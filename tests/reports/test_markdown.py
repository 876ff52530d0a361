"""Text of files in Markdown."""

import pytest

from nvvl.reports.markdown import markdown_cell, markdown_code, plain_markdown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("W4", "W4"),
        ("a\n# b\r\nc\u2028d", "a # b c d"),
        (
            "<img src=x> </b> <!-- --> <https://x>",
            "&lt;img src=x> &lt;/b> &lt;!-- --> &lt;https://x>",
        ),
        ("p < 0.05, x <= 3", "p < 0.05, x <= 3"),
    ],
)
def test_text_makes_no_tag_and_no_line(text: str, expected: str) -> None:
    assert plain_markdown(text) == expected


def test_text_makes_no_cell() -> None:
    assert markdown_cell("a|b\n|---|") == r"a\|b \|---\|"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("nvvl <test>", "`nvvl <test>`"), ("a`b``c", "``` a`b``c ```"), ("a\n\n# b", "`a  # b`")],
)
def test_code_ends_where_it_should(text: str, expected: str) -> None:
    assert markdown_code(text) == expected
