"""Text of files in Markdown: a label or an answer makes no line, tag or cell of its own."""

import re

_TAG = re.compile(r"<(?=[A-Za-z/!?])")  # what begins HTML or a link; "p < 0.05" does not
_BACKTICKS = re.compile("`+")


def plain_markdown(text: object) -> str:
    """Return a text as it stands within a line, without tags and line ends."""
    return _TAG.sub("&lt;", " ".join(str(text).splitlines()))


def markdown_cell(text: object) -> str:
    """Return a text as it stands in a cell of a table."""
    return plain_markdown(text).replace("|", r"\|")


def markdown_code(text: str) -> str:
    """Return a text as code within a line, in as many backticks as it takes."""
    line = " ".join(text.splitlines())
    longest = max((len(found) for found in _BACKTICKS.findall(line)), default=0)
    ticks = "`" * (longest + 1)
    padding = " " if longest else ""
    return f"{ticks}{padding}{line}{padding}{ticks}"
