"""Compares a set with evaluation suites and other sets, drawn by other processes while it is built.

What an earlier build kept of a suite mostly rules it out; then it is not drawn.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from nvvl.calib_data.fingerprints import Fingerprints, Overlap, find_overlaps
from nvvl.calib_data.items import Item
from nvvl.calib_data.kept_prints import KeptPrints
from nvvl.progress import Progress

# An evaluation suite by name, as its items.
Suites = Mapping[str, Callable[[], Iterable[Item]]]
# Gives the overlaps of a set, once it is built.
Compare = Callable[[Fingerprints, Progress | None], list[Overlap]]


@contextmanager
def comparison(
    suites: Suites, own: Suites, kept: KeptPrints | None, jobs: int
) -> Iterator[Compare]:
    """Draw suites beside whatever is done meanwhile, and give what compares a set with them.

    Args:
        suites: Of which prints may be kept.
        own: Sets of the user's, which may change.
        kept: What is kept of suites; None keeps nothing.
        jobs: Processes that draw; 1 draws when a set is compared, in this one.
    """
    every = {**suites, **own}
    known = {name for name in suites if kept is not None and kept.has(name)}

    with _drawing({name: every[name] for name in every if name not in known}, jobs) as draw:

        def compare(prints: Fingerprints, progress: Progress | None) -> list[Overlap]:
            overlaps: list[Overlap] = []
            for number, name in enumerate(every):
                if progress is not None:
                    progress(f"comparing with {name}", number, len(every))
                if kept is not None and name in known and kept.rules_out(name, prints):
                    continue
                theirs = _prints_of(every[name]) if name in known else draw(name)
                if kept is not None and name in suites:
                    kept.keep(name, theirs)
                overlaps += find_overlaps(prints, theirs, name)
            if progress is not None and every:
                progress("compared with what is evaluated on", len(every), len(every))
            return overlaps

        yield compare


@contextmanager
def _drawing(suites: Suites, jobs: int) -> Iterator[Callable[[str], Fingerprints]]:
    """Begin to draw suites, and give what waits for one of them; each can be had once."""
    if jobs == 1 or not suites:
        yield lambda name: _prints_of(suites[name])
        return
    # spawned, for forking a process that has threads of torch's can hang; Ctrl-C ends each quietly
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        drawn = {name: pool.submit(_prints_of, items) for name, items in suites.items()}
        yield lambda name: drawn.pop(name).result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prints_of(items: Callable[[], Iterable[Item]]) -> Fingerprints:
    return Fingerprints.of(items())
