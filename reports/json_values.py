"""Values of a JSON file, to a frozen dataclass whose annotations say what is allowed.

What runs and sweeps keep is drawn and summed, so a number must be finite and small enough for that,
and no whole number is negative, for all of them count or name something.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping, Set
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from nvvl.errors import DataError, first_line
from nvvl.toml_tables import require_choice

T = TypeVar("T")

# float32 ends far below; the sum of squares that float64 can hold begins far above
LARGEST = 1e100
MOST = 2**63 - 1

_SCALARS = (int, float, str, bool, Path)
_WHOLE = "a whole number from 0 to 2^63 - 1"
_NUMBER = f"a number from -{LARGEST:g} to {LARGEST:g}"
_NAMES = {str: "text", bool: "true or false"}


def read_object(cls: type[T], values: object, where: str, *, finite: bool = True, **read: Any) -> T:
    """Make a dataclass of a JSON object.

    Args:
        cls: A dataclass with fields of ``str``, ``int``, ``float``, ``bool``, ``Path``, a
            ``Literal``, tuples, mappings and dataclasses of these, or one of these or None.
        values: The object.
        where: What errors call it.
        finite: Refuse a ``float`` that is NaN, infinite or above `LARGEST`.
        read: Fields that are read already; the object must not have them.

    Raises:
        DataError: if it is no object, a key is unknown or missing, or a value is not allowed.
    """
    _require(isinstance(values, Mapping), where, "an object", values)
    assert isinstance(values, Mapping)
    _require_keys(cls, values.keys() | read.keys(), where)
    hints = _hints(typing.cast("Any", cls))
    given = {k: _convert(v, hints[k], f"{where}.{k}", finite) for k, v in values.items()}
    return cls(**{**given, **read})


def json_text(value: object) -> str:
    """Return a value as it stands in its JSON file, or the beginning of a long one."""
    return f"{json.dumps(value, ensure_ascii=False):.60}"


def describe_fault(error: Exception) -> str:
    """Say what is wrong with a JSON file, by what reading it has raised."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, TypeError | AttributeError):
        return "a value in it is of another kind"
    return first_line(error)


def _require_keys(cls: type, keys: Set[str], where: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(keys - fields.keys())
    missing = [
        name
        for name, field in fields.items()
        if name not in keys
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    for what, names in (("unknown key", unknown), ("missing", missing)):
        if names:
            raise DataError(f"{where}: {what} {', '.join(names):.200}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(value: Any, hint: Any, where: str, finite: bool) -> Any:
    kind, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return _convert_scalar(value, hint, where, finite)
    if kind is None:
        return read_object(hint, value, where, finite=finite)
    if kind is types.UnionType:
        kinds = [arg for arg in args if arg is not types.NoneType]
        if value is None and len(kinds) < len(args):
            return None
        # of a number or a pair of numbers, what it looks like
        alike = (k for k in kinds if (typing.get_origin(k) is tuple) == isinstance(value, list))
        return _convert(value, next(alike, kinds[0]), where, finite)
    if kind is typing.Literal:
        require_choice(value, args, where, DataError)
        return value
    if kind is tuple:
        _require(isinstance(value, list), where, "a list", value)
        each = args[:1] * len(value) if args[-1] is Ellipsis else args
        _require(len(value) == len(each), where, f"{len(each)} values", value)
        return tuple(
            _convert(entry, arg, f"{where}[{place}]", finite)
            for place, (entry, arg) in enumerate(zip(value, each, strict=True))
        )
    _require(isinstance(value, dict), where, "an object", value)
    return {k: _convert(v, args[1], f"{where}.{k}", finite) for k, v in value.items()}


def _convert_scalar(value: Any, kind: type, where: str, finite: bool) -> Any:
    if kind is int:
        fits = type(value) is int and 0 <= value <= MOST
        _require(fits, where, _WHOLE, value)
    elif kind is float:
        is_small = type(value) in (int, float) and abs(value) <= LARGEST  # NaN is not
        fits = is_small or (type(value) is float and not finite)
        _require(fits, where, _NUMBER, value)
        return float(value)
    elif kind is Path:
        _require(isinstance(value, str) and _is_path(value), where, "a path", value)
        return Path(value)
    else:
        _require(type(value) is kind, where, _NAMES[kind], value)
    return value


def _is_path(value: str) -> bool:
    """Tell whether the system can be asked for a path of this name."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of an escaped pair
        return False


def _require(fits: bool, where: str, required: str, value: object) -> None:
    if not fits:
        raise DataError(f"{where}: required {required}, got {json_text(value)}")
