"""The items that a calibration set must not hold: those of the suites, and the user's own."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import PIL

import nvvl.calib_data
import nvvl.model.video
from nvvl.calib_data.items import Item
from nvvl.calib_data.kept_prints import KeptPrints
from nvvl.calib_data.listing import list_own
from nvvl.calib_data.manifest import LazyItems
from nvvl.compiler import cache_folder
from nvvl.errors import DataError
from nvvl.model.hashing import hash_file
from nvvl.reports.suites import SUITES

# As many of each suite, and of the seed, as ``nvvl evaluate`` asks unless told otherwise; of a set
# number of items all.
NUM_ITEMS = 1000
SEED = 0


def suite_sets() -> dict[str, Callable[[], Iterable[Item]]]:
    """Return the items of every suite, by name; made when called."""
    return {
        name: partial(suite.items, suite.num_available or NUM_ITEMS, seed=SEED)
        for name, suite in SUITES.items()
    }


def kept_prints() -> KeptPrints:
    """Return what is kept of the suites as they are drawn now."""
    drawing, asking = Path(str(nvvl.calib_data.__file__)).parent, Path(__file__).parent
    files = [
        *(path for path in sorted(drawing.rglob("[!_]*.*")) if path.suffix != ".pyc"),
        *(asking / name for name in ("continuation.py", "overlap.py", "suites.py")),
        Path(nvvl.model.video.__file__),
    ]
    digest = hashlib.sha256(repr((NUM_ITEMS, SEED, PIL.__version__, sys.version_info)).encode())
    for path in files:
        digest.update(hash_file(path).encode())
    return KeptPrints(cache_folder(), digest.hexdigest()[:16])


def own_sets(paths: Sequence[str]) -> dict[str, Callable[[], Iterable[Item]]]:
    """Return the items of sets on disk, by path; read when called.

    Args:
        paths: Built sets, folders or JSONL files.

    Raises:
        DataError: if a set is not there, has the name of a suite, or a line of it is malformed.
    """
    for path in paths:
        if path in SUITES:
            raise DataError(
                f"--against {path}: is the name of a suite, which is compared anyway; give a "
                f"folder of that name as ./{path}"
            )
    return {path: partial(iter, LazyItems(list_own(Path(path)))) for path in paths}
