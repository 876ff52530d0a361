"""One thing at a time beside the main thread, in the order given.

The walk packs, hashes and writes a finished block here while the next one runs. At most one job
waits or runs: whoever gives the next one waits for the one before, so memory holds one block more
and an error comes out at the next call.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """A thread that runs one job at a time; or none, and jobs run where they are given."""

    def __init__(self, *, threaded: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write") if threaded else None
        self._job: Future[None] | None = None

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # waits: files are closed after this
        if kind is None:
            self.wait()

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the job before, and begin this one."""
        self.wait()
        if self._pool is None:
            job()
        else:
            self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Wait for the last job, and raise what it raised."""
        job, self._job = self._job, None
        if job is not None:
            job.result()
