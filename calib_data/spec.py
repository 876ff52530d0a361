"""What a calibration set holds: a mixture of sources with counts, seeds and limits.

A spec is a TOML file that maps one to one to frozen dataclasses: no imports, no interpolation, no
environment. An unknown key is an error that names the nearest known one.

    name = "invoices"
    max_tokens = 16384           # longer items are reported and left out, never cut

    [[sources]]
    kind = "pdf"
    path = "invoices/"           # relative to this file
    count = 200

    [[sources]]
    kind = "documents"
    count = 100

The kinds of sources and their keys are in ``nvvl.calib_data.source_spec``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvvl.calib_data.source_spec import SOURCES, Source
from nvvl.calib_data.strict import read_table, require_choice, require_within
from nvvl.errors import DataError
from nvvl.toml_tables import near_names, read_toml

READY = Path(__file__).parent / "specs"


@dataclass(frozen=True, kw_only=True)
class SetSpec:
    """A calibration set to build.

    Attributes:
        name: Shown in reports.
        sources: What the set is mixed from, in this order.
        seed: Of sources that have none of their own.
        model: Whose tokenizer and tiles count the tokens: a folder, a Hub id, or ``embedded``.
        max_tokens: Longest item; None for no limit.
    """

    name: str
    sources: tuple[Source, ...]
    seed: int = 0
    model: str = "embedded"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise DataError("sources: required at least one ([[sources]]), got none")
        require_within(0, self.seed, "seed")
        require_within(1, self.max_tokens, "max_tokens")
        named = [
            dataclasses.replace(source, name=source.name or f"{source.kind}{index}")
            for index, source in enumerate(self.sources, start=1)
        ]
        names = [source.name for source in named]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"sources.name: {', '.join(twice)} is the name of several sources")
        object.__setattr__(self, "sources", tuple(named))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SetSpec":
        """Build a spec from nested plain values.

        Raises:
            DataError: if a key is unknown or missing, or a value is impossible.
        """
        tables = values.get("sources", ())
        if not isinstance(tables, list | tuple) or not all(isinstance(t, Mapping) for t in tables):
            raise DataError("sources: required a list of tables ([[sources]])")
        sources = tuple(_read_source(table) for table in tables)
        rest = {key: value for key, value in values.items() if key != "sources"}
        return read_table(cls, rest, "spec", sources=sources)

    @classmethod
    def from_toml(cls, path: Path) -> "SetSpec":
        """Read a spec file.

        Raises:
            DataError: if the file is missing, is not TOML, or as `from_dict`.
        """
        return read_toml(path, cls.from_dict, DataError)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` and JSON take."""
        tables = []
        for source in self.sources:
            values = dataclasses.asdict(source)
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
            tables.append({"kind": source.kind, **plain})
        top = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return top | {"sources": tables}


def find_spec(spec: str) -> Path:
    """Return the file of a spec: a path, or the name of one that comes with nvvl.

    Raises:
        DataError: if there is neither.
    """
    ready = sorted(path.stem for path in READY.glob("*.toml"))
    if spec in ready:
        return READY / f"{spec}.toml"
    path = Path(spec)
    if path.suffix != ".toml":
        hint = near_names(spec, ready)
        raise DataError(
            f"{spec}: required a .toml file, or one of the ready specs {', '.join(ready)}{hint}"
        )
    return path


def _read_source(table: Mapping[str, Any]) -> Source:
    kind = table.get("kind")
    require_choice(kind, tuple(SOURCES), "sources.kind")
    assert isinstance(kind, str)
    rest = {key: value for key, value in table.items() if key != "kind"}
    return read_table(SOURCES[kind], rest, f"sources ({kind})")
