"""What long work calls as it goes on; `nvvl.console` shows it."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is done now, steps done and steps in total."""
