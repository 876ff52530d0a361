"""What long work calls as it goes on; `nvvl.console` shows it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is done now, steps done and steps in total."""


class Ticker:
    """Counts steps for a progress callback.

    Attributes:
        stage: What is done now.
    """

    def __init__(self, progress: Progress | None, *, total: int) -> None:
        """Begin with no step done.

        Args:
            progress: Called after each step; None counts for nobody.
            total: Steps in total.
        """
        self.stage = ""
        self._progress = progress
        self._total = total
        self._done = 0

    def skip(self, num_steps: int) -> None:
        """Count steps that an earlier run did."""
        self._done += num_steps

    def tick(self) -> None:
        """Count a step that was done."""
        self._done += 1
        if self._progress is not None:
            self._progress(self.stage, self._done, self._total)
