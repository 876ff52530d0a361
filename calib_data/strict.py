"""Plain values of a TOML table, to a frozen dataclass whose annotations say what is allowed."""

import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from nvvl import toml_tables
from nvvl.errors import DataError

T = TypeVar("T")

MOST = 2**63 - 1  # what columns of Parquet and the generators of random numbers hold


def read_table(cls: type[T], values: Mapping[str, Any], where: str, **read: Any) -> T:
    """Make a dataclass of plain values.

    Args:
        cls: A dataclass with fields of ``str``, ``int``, ``bool``, a ``Literal``, tuples of these,
            or one of these or None.
        values: The table.
        where: What errors call the table.
        read: Fields that are read already; the table must not have them.

    Raises:
        DataError: if a key is unknown or missing, or a value has another type.
    """
    hints = typing.get_type_hints(cls)
    toml_tables.require_keys(cls, values, where, DataError, given=read)
    given = {key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    return cls(**given, **read)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check a plain value against ``str``, ``int``, ``bool``, a choice, a tuple, or with None."""
    if typing.get_origin(hint) is typing.Literal:
        require_choice(value, typing.get_args(hint), where)
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise DataError(f"{where}: required a list, got {value!r}")
        return tuple(_convert(entry, typing.get_args(hint)[0], where) for entry in value)
    if isinstance(hint, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
        return None if value is None else _convert(value, kinds[0], where)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise DataError(f"{where}: required {hint.__name__}, got {value!r}")
    return value


def require_choice(value: object, choices: tuple[str, ...], where: str) -> None:
    """Refuse a value that is none of the choices."""
    toml_tables.require_choice(value, choices, where, DataError)


def require_within(least: int, value: int | None, where: str, *, most: int = MOST) -> None:
    """Refuse a number that is too small or too large; None is none."""
    if value is not None and value < least:
        raise DataError(f"{where}: required at least {least}, got {value}")
    if value is not None and value > most:
        raise DataError(f"{where}: required at most {most}, got {value}")
