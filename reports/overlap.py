"""The items that a calibration set must not hold: those of the suites, and the user's own."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from nvvl.calib_data.items import Item
from nvvl.calib_data.listing import list_own
from nvvl.calib_data.manifest import LazyItems
from nvvl.errors import DataError
from nvvl.reports.suites import SUITES

# As many of each suite, and of the seed, as ``nvvl evaluate`` asks unless told otherwise; of a set
# number of items all.
NUM_ITEMS = 1000
SEED = 0


def evaluation_sets(own: Sequence[str]) -> dict[str, Callable[[], Iterable[Item]]]:
    """Return the items of every suite, and of sets on disk, by name; made when called.

    Args:
        own: Built sets, folders or JSONL files.

    Raises:
        DataError: if a set is not there, has the name of a suite, or a line of it is malformed.
    """
    sets: dict[str, Callable[[], Iterable[Item]]] = {
        name: partial(suite.items, suite.num_available or NUM_ITEMS, seed=SEED)
        for name, suite in SUITES.items()
    }
    for path in own:
        if path in sets:
            raise DataError(
                f"--against {path}: is the name of a suite, which is compared anyway; give a "
                f"folder of that name as ./{path}"
            )
        items = LazyItems(list_own(Path(path)))
        sets[path] = partial(iter, items)
    return sets
