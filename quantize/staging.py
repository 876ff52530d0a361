"""An output folder that is either complete or not there.

Everything is written to a hidden sibling folder, which takes the final name by one rename when it
is complete. What stood there before is replaced only then, and only if the user said so.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvvl.errors import OutputError

MANIFEST_NAME = "manifest.json"


@contextmanager
def staged_folder(out: Path, *, source: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an exception.

    Args:
        out: The final folder; its parents are made.
        source: A folder that must survive.
        overwrite: Whether an earlier output at ``out`` may be replaced.

    Raises:
        OutputError: if ``out`` exists and may not be replaced, or cannot be made.
    """
    out = Path(out).absolute()
    _require_free(out, source=source, overwrite=overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
        partial.mkdir()
    except OSError as error:
        raise OutputError(f"{out}: cannot be made ({error.strerror}); choose another OUT") from None
    try:
        yield partial
        _require_free(out, source=source, overwrite=overwrite)
        _replace(out, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _require_free(out: Path, *, source: Path, overwrite: bool) -> None:
    source = Path(source).resolve()
    if out.resolve() == source or out.resolve() in source.parents:
        raise OutputError(f"{out}: holds the source checkpoint; choose another OUT")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{out}: exists already; choose another OUT, or pass --overwrite")
    if not out.is_dir() or out.is_symlink():
        raise OutputError(f"{out}: is not a folder, so it is not replaced; choose another OUT")
    if any(out.iterdir()) and not (out / MANIFEST_NAME).exists():
        raise OutputError(
            f"{out}: holds files but no {MANIFEST_NAME}, so nvvl did not write it and does not "
            "replace it; choose another OUT"
        )


def _replace(out: Path, partial: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
