"""The hash that manifests and states name a file by."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file of any size, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(folder: Path, recorded: Mapping[str, str]) -> list[str]:
    """List the files of a folder that are missing, or have another hash than the one recorded.

    Args:
        folder: Where they lie.
        recorded: SHA-256 in hex, by name in the folder.

    Returns:
        Names, sorted.

    Raises:
        OSError: if a file that is there cannot be read.
    """
    return [
        name
        for name, sha256 in sorted(recorded.items())
        if not (folder / name).is_file() or hash_file(folder / name) != sha256
    ]
