"""Regular expressions that a checkpoint brings, which may be malformed or take for ever."""

import regex

from nvvl.errors import ConfigError

_SECONDS = 1.0
"""Longest time one name may take; those that servers write take microseconds."""


def matches_pattern(pattern: str, name: str, *, whole: bool) -> bool:
    """Tell whether a regular expression of a checkpoint matches a module's name.

    Args:
        pattern: the expression.
        name: the name.
        whole: whether it must match all of the name, or its beginning.

    Raises:
        ConfigError: if it is malformed, or takes longer than a second.
    """
    match = regex.fullmatch if whole else regex.match
    try:
        return match(pattern, name, timeout=_SECONDS) is not None
    except regex.error as error:
        raise ConfigError(f"pattern {pattern!r}: no regular expression ({error})") from None
    except TimeoutError:
        raise ConfigError(
            f"pattern {pattern!r}: takes more than {_SECONDS:g} s for {name}; write it without "
            "repetitions of repetitions"
        ) from None
