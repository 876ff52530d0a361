"""Values of a ``config.json``, read key by key, each checked for what it has to be.

Errors name the key with the object that holds it, and what came.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from nvvl.errors import ConfigError

MOST_SIZE = 1 << 24  # far above any model of the family: what is larger can only exhaust memory
_REQUIRED = object()


@dataclass(frozen=True)
class Section:
    """One JSON object of a config.

    Attributes:
        values: What it holds.
        name: What errors call the object.
        prefix: What errors put before a key.
    """

    values: Mapping[str, Any]
    name: str
    prefix: str

    @classmethod
    def of(cls, values: object, name: str, *, prefix: str | None = None) -> Self:
        """Take a value for an object.

        Raises:
            ConfigError: if it is none.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name}: required a JSON object, got {type(values).__name__}")
        return cls(values, name, f"{name}." if prefix is None else prefix)

    def section(self, key: str) -> Self:
        """Return the object that a key holds."""
        return self.of(self.get(key), self.prefix + key)

    def get(self, key: str) -> Any:
        """Return what a key holds, unchecked.

        Raises:
            ConfigError: if there is no such key. As every method does, whose value is not what its
                name says, or whose key is missing and has no default.
        """
        return self._find((key,), _REQUIRED)[1]

    def positive_int(
        self, *keys: str, default: int | object = _REQUIRED, most: int = MOST_SIZE
    ) -> int:
        """Return the count that the first key present holds, from 1 to ``most``."""
        key, value = self._find(keys, default)
        if not _is_integer(value) or value <= 0:
            self.refuse(key, "a positive integer", value)
        if value > most:
            self.refuse(key, f"at most {most}", value)
        return int(value)

    def number(
        self,
        *keys: str,
        default: float | object = _REQUIRED,
        what: str,
        fits: Callable[[float], bool],
    ) -> float:
        """Return the number that the first key present holds.

        Args:
            keys: Names of one thing, the usual one first.
            default: Where none is present.
            what: Says in errors which numbers fit.
            fits: Whether one does.
        """
        key, value = self._find(keys, default)
        if not _is_number(value) or not fits(value):
            self.refuse(key, what, value)
        return float(value)

    def numbers(
        self, key: str, count: int, default: tuple[float, ...] | object = _REQUIRED
    ) -> tuple[float, ...]:
        """Return so many numbers; infinity may be written in each of its three ways."""
        _, value = self._find((key,), default)
        found = [_untagged(one) for one in value] if isinstance(value, list | tuple) else []
        if len(found) != count or not all(map(_is_number, found)):
            self.refuse(key, f"{count} numbers", value)
        try:
            return tuple(map(float, found))
        except OverflowError:
            self.refuse(key, f"{count} numbers that a float can hold", value)

    def flag(self, key: str, default: bool | object = _REQUIRED) -> bool:
        """Return a truth value; null is as good as missing."""
        value = self._known(key, default)
        if not isinstance(value, bool):  # text such as "false" would count as true
            self.refuse(key, "true or false", value)
        return value

    def text(self, key: str, default: str | object = _REQUIRED, *, what: str = "text") -> str:
        """Return a text; null is as good as missing."""
        value = self._known(key, default)
        if not isinstance(value, str):
            self.refuse(key, what, value)
        return value

    def token(self, key: str, default: str) -> str:
        """Return the text of a token, which is not empty."""
        what = "the text of a token"
        value = self.text(key, default, what=what)
        if not value:
            self.refuse(key, what, value)
        return value

    def token_id(self, key: str, vocab_size: int) -> int | None:
        """Return a token's id below ``vocab_size``, or None where there is none."""
        value = self.values.get(key)
        if value is not None and not (_is_token_id(value) and value < vocab_size):
            self.refuse(key, f"a token id below the vocab_size of {vocab_size}", value)
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Return one id or a list of them, at least one."""
        value = self.get(key)
        ids = tuple(value) if isinstance(value, list) else (value,)
        if not ids or not all(map(_is_token_id, ids)):
            self.refuse(key, "a token id or a list of them", value)
        return ids

    def refuse(self, key: str, required: str, value: object) -> NoReturn:
        """Refuse a value.

        Raises:
            ConfigError: always; the value in it is cut to 60 characters.
        """
        raise ConfigError(f"{self.prefix}{key}: required {required}, got {value!r:.60}")

    def _find(self, keys: tuple[str, ...], default: object) -> tuple[str, Any]:
        """Return the first key present and what it holds, or the first key and the default."""
        for key in keys:
            if key in self.values:
                return key, self.values[key]
        if default is _REQUIRED:
            raise ConfigError(f"{self.name}: missing {' or '.join(keys)}")
        return keys[0], default

    def _known(self, key: str, default: object) -> Any:
        _, value = self._find((key,), default)
        return default if value is None and default is not _REQUIRED else value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token_id(value: Any) -> bool:
    return _is_integer(value) and 0 <= value < MOST_SIZE


def _untagged(value: Any) -> Any:
    """Read infinity: bare, as text, and as transformers 5 writes it, ``{"__float__": ...}``."""
    value = value.get("__float__") if isinstance(value, dict) else value
    return math.inf if value == "Infinity" else value
