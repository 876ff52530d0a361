"""TOML tables and the frozen dataclasses that they map to one to one: recipes and specs.

What they all hold to: no imports, no interpolation, no environment. An unknown key is an error that
names the nearest known one, and every error is one line that begins with the file. Which error it
is, the reader says. Values are checked where the dataclass is.
"""

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nvvl.errors import NvvlError, RecipeError

_T = TypeVar("_T")


def read_toml(path: Path, build: Callable[[dict[str, Any]], _T], error: type[NvvlError]) -> _T:
    """Read a file, and make of its content what it stands for.

    Args:
        path: The file.
        build: Makes the result of the nested plain values; its errors get the path put before them.
        error: The class of errors.

    Raises:
        NvvlError: of the class ``error``, if the file is missing or is not TOML, or if ``build``
            raises one of that class.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror})") from None
    except (ValueError, RecursionError) as fault:
        raise error(f"{path}: not valid TOML ({fault})") from None
    try:
        return build(values)
    except error as fault:
        raise error(f"{path}: {fault}") from None


def require_keys(
    cls: type,
    values: Mapping[str, Any],
    where: str,
    error: type[NvvlError],
    *,
    given: Collection[str] = (),
) -> None:
    """Refuse keys that are no field of a dataclass, and a table that lacks a field without default.

    Args:
        cls: The dataclass.
        values: The table.
        where: What errors call the table.
        error: The class of errors.
        given: Fields that are known from elsewhere; the table must not have them.

    Raises:
        NvvlError: of the class ``error``, naming the key.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields or key in given:
            raise error(f"{where}: unknown key {key!r}{near_names(key, list(fields))}")
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in values and name not in given
    ]
    if missing:
        raise error(f"{where}: missing {', '.join(missing)}")


def require_choice(
    value: object, choices: tuple[str, ...], where: str, error: type[NvvlError]
) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        NvvlError: of the class ``error``, naming the choices, and those that are near.
    """
    if value not in choices:
        hint = near_names(value, list(choices)) if isinstance(value, str) else ""
        raise error(f"{where}: required one of {', '.join(choices)}, got {value!r}{hint}")


def near_names(name: str, known: list[str]) -> str:
    """Return a hint ``; did you mean a, b`` for a name that is not known, or nothing."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}" if near else ""


def load_preset(
    spec: str | Path, presets: Mapping[str, Callable[[], _T]], read: Callable[[Path], _T]
) -> _T:
    """Return a recipe by name, or read a TOML file.

    Args:
        spec: A name, or a file that ends in ``.toml``.
        presets: What makes each recipe, by name.
        read: Reads a file.

    Raises:
        RecipeError: if there is no such preset and no such file, or the file is not a recipe.
    """
    if str(spec) in presets:
        return presets[str(spec)]()
    if Path(spec).suffix == ".toml":
        return read(Path(spec))
    raise RecipeError(
        f"{spec}: required one of {', '.join(presets)}, or a file that ends in .toml"
        f"{near_names(str(spec), list(presets))}"
    )


def toml_lines(values: Mapping[str, Any]) -> list[str]:
    """Write each value on a line: strings, numbers, truth values, and lists of these.

    As JSON, which is TOML too but for what strings escape.
    """
    # TOML knows no surrogate pairs, so nothing is escaped that need not be; but DEL must be there
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    return [f"{key} = {text}".replace("\x7f", r"\u007f") for key, text in texts.items()]
