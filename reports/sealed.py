"""What tells the files of a report, which nvvl may write again, from the user's own.

A page, a table and a model card end in a comment with the hash of all above it. A file of their
name without it is somebody else's, and one that was changed since has the user's work in it, as a
card has once its licence is filled in. Numbers are written by nobody but nvvl: ``report.json`` is
known by its keys.
"""

import hashlib
import json
from pathlib import Path

from nvvl.errors import OutputError, reading

_SEAL = "<!-- nvvl report, SHA-256 of all above: {} -->\n"
_SEAL_BYTES = len(_SEAL.format("0" * 64))
_KEYS = {"nvvl_version", "baseline", "runs"}


def seal(text: str) -> bytes:
    """Return a page or a Markdown text as it is written; names of files in it may be no UTF-8."""
    return _seal(text.encode(errors="backslashreplace"))


def require_own(path: Path) -> None:
    """Refuse a file that is no report's, or was changed since nvvl wrote it.

    Raises:
        OutputError: naming the file, and the way out.
        SourceError: if it cannot be read.
    """
    if not path.exists():
        return
    with reading(path):
        content = path.read_bytes()
    is_own = _is_numbers if path.suffix == ".json" else _is_sealed
    if not is_own(content):
        raise OutputError(
            f"{path}: is there and was not written by nvvl report, or was changed since; give "
            "another --out, or say --overwrite to replace it"
        )


def _seal(content: bytes) -> bytes:
    return content + _SEAL.format(hashlib.sha256(content).hexdigest()).encode()


def _is_sealed(content: bytes) -> bool:
    return content == _seal(content[:-_SEAL_BYTES])


def _is_numbers(content: bytes) -> bool:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.keys() >= _KEYS
