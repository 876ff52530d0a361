"""What a set of items holds, in one hash, so that a run is not gone on with on other data.

Drawing every item of a long training would take long. So the items that are validated are hashed
whole, the others by the files they come from: a JSONL file and the manifest of a built set, which
has the hash of each item, by content, pictures and videos in a folder by name and size.
Generated items follow from their number, the seed and the version of nvvl.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from nvvl.calib_data.built import MANIFEST, is_built
from nvvl.calib_data.items import item_hash
from nvvl.calib_data.listing import DEFAULT
from nvvl.calib_data.manifest import CalibrationSet
from nvvl.calib_data.sources import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from nvvl.model.hashing import hash_file


def digest_set(items: CalibrationSet, validation: Sequence[int]) -> str:
    """Return a SHA-256, in hex, of a set.

    Args:
        items: The set.
        validation: Indices of the items that are hashed whole.

    Raises:
        DataError: if one of those cannot be used.
    """
    held_out = (items.items[index] for index in validation)
    lines = [*_describe_files(items.spec), *(f"{i.item_id} {item_hash(i)}" for i in held_out)]
    text = "".join(f"{line}\n" for line in lines)
    # names of files that are no UTF-8 have half characters for bytes
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _describe_files(spec: str) -> Iterator[str]:
    path = Path(spec)
    if spec == DEFAULT or not path.exists():
        return
    if path.is_file():
        yield hash_file(path)
    elif is_built(path):
        yield hash_file(path / MANIFEST)
    else:
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
                yield f"{file.relative_to(path).as_posix()} {file.stat().st_size}"
        for file in sorted(path.glob("*.jsonl")):
            yield f"{file.name} {hash_file(file)}"
