"""What tasks of evaluation harnesses say about answers: where they end and how long they may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nvvl.errors import DataError

DEFAULT_NEW_TOKENS = 256
"""Longest answer where a task sets none; lm-eval's own default."""


@dataclass(frozen=True)
class GenerationSettings:
    """How one answer is written.

    Attributes:
        stops: the answer is cut before the first of these; empty for none.
        max_new_tokens: longest answer.
    """

    stops: tuple[str, ...]
    max_new_tokens: int

    @classmethod
    def read(
        cls, values: Mapping[str, Any], *, default: int = DEFAULT_NEW_TOKENS
    ) -> "GenerationSettings":
        """Read ``generation_kwargs`` of lm-eval or lmms-eval.

        Args:
            values: of a task.
            default: longest answer where the task sets none.

        Raises:
            DataError: if the task samples or searches, or its length is not a number above 0.
        """
        samples = values.get("do_sample") and (values.get("temperature") or 0) > 0
        if samples or (values.get("num_beams") or 1) > 1:
            raise DataError(
                "the task samples its answers or searches (do_sample, num_beams); nvvl measures "
                "greedy answers, which can be repeated: choose another task"
            )
        stops = values.get("until") or ()
        longest = values.get("max_gen_toks", values.get("max_new_tokens", default))
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 1:
            raise DataError(f"the task's longest answer: required a number above 0, got {longest}")
        return cls((stops,) if isinstance(stops, str) else tuple(filter(None, stops)), longest)

    def cut(self, text: str) -> str:
        """Cut an answer before the first of the stop strings."""
        return text[: min((text.find(s) for s in self.stops if s in text), default=len(text))]


def longest_of(settings: Sequence[GenerationSettings]) -> int:
    """Return the longest answer of a batch."""
    return max(each.max_new_tokens for each in settings)
