"""The recipe: which linears become which format, and how their scales are found.

A recipe is a frozen dataclass, and a TOML file maps to it one to one: no imports, no
interpolation, no environment. An unknown key is an error that names the nearest known one, because
a misspelt setting that is silently skipped would quantize something else than was asked for. The
recipe in force is written beside every output.

    name = "nvfp4"
    num_calibration_items = 1024

    [[rules]]                # the first rule that matches a linear decides; the rest stays BF16
    target = "language_model.backbone.layers.*.mixer.*"
    format = "nvfp4"

Which linears exist, and which of them a rule matches, is in ``nvvl.quantize.targets``.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nvvl.errors import RecipeError
from nvvl.toml_tables import read_toml, require_choice, require_keys, toml_lines

Format = Literal["bf16", "fp8", "nvfp4", "nvfp4-w4a16"]
Algorithm = Literal["max"]

FORMATS: tuple[str, ...] = get_args(Format)
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)

# The formats whose inputs are quantized too, with a scale that calibration has to find.
CALIBRATED_FORMATS: tuple[Format, ...] = ("fp8", "nvfp4")

# More of them would be a mistake; a list of this many still fits in memory.
MOST_ITEMS = 1_000_000

# Those whose weights are E2M1 codes in blocks.
NVFP4_FORMATS: tuple[Format, ...] = ("nvfp4", "nvfp4-w4a16")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a recipe: linears whose name matches get a format.

    Attributes:
        target: Glob on the fully qualified module name, case-sensitive, ``*`` crosses dots.
        format: What the matched linears become; ``bf16`` leaves them as they are.
        layers: Layers the rule is for, negative ones counted from the last; empty means all.
    """

    target: str
    format: Format
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_type(self.target, str, "rules.target")
        if not self.target:
            raise RecipeError("rules.target: required a pattern, got an empty string")
        require_choice(self.format, FORMATS, "rules.format", RecipeError)
        for layer in self.layers:
            _require_type(layer, int, "rules.layers")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the bytes of a quantized checkpoint, besides model and data.

    Attributes:
        name: Shown in reports.
        rules: Tried in order, the first match decides; a linear without a match stays BF16.
        algorithm: How an amax is found: ``max`` takes the largest magnitude observed.
        num_calibration_items: Items asked of a calibration set that can make any number.
        image_weight: How much the rounding error of image tokens counts, 0 to 1, and that of text
            tokens the rest, when the scale of a linear's inputs is chosen
            (`nvvl.quantize.modalities`). None takes the scale of the amax.
    """

    name: str
    rules: tuple[Rule, ...]
    algorithm: Algorithm = "max"
    num_calibration_items: int = 1024
    image_weight: float | None = None

    def __post_init__(self) -> None:
        _require_type(self.name, str, "name")
        if not self.rules:
            raise RecipeError(f"{self.name}: required at least one rule, got none")
        require_choice(self.algorithm, ALGORITHMS, "algorithm", RecipeError)
        _require_type(self.num_calibration_items, int, "num_calibration_items")
        if not 1 <= self.num_calibration_items <= MOST_ITEMS:
            raise RecipeError(
                f"num_calibration_items: required 1 to {MOST_ITEMS}, got "
                f"{self.num_calibration_items}"
            )
        if self.image_weight is not None:
            _require_share(self.image_weight, "image_weight")
            if not self.is_calibrated:
                raise RecipeError(
                    "image_weight: weighs errors of inputs, and no rule quantizes inputs; leave it "
                    f"out, or use one of {', '.join(CALIBRATED_FORMATS)}"
                )

    @property
    def is_calibrated(self) -> bool:
        """Whether inputs are quantized, so that calibration items are needed."""
        return any(rule.format in CALIBRATED_FORMATS for rule in self.rules)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Build a recipe from nested plain values.

        Raises:
            RecipeError: if a key is unknown or missing, or a value is impossible.
        """
        require_keys(cls, values, "recipe", RecipeError)
        fields = dict(values)
        rules = fields.get("rules", ())
        if not isinstance(rules, list | tuple) or not all(isinstance(r, Mapping) for r in rules):
            raise RecipeError("rules: required a list of tables ([[rules]])")
        fields["rules"] = tuple(_rule_from_dict(rule) for rule in rules)
        return cls(**fields)

    @classmethod
    def from_toml(cls, path: Path) -> "Recipe":
        """Read a recipe file.

        Raises:
            RecipeError: if the file is missing, is not TOML, or as `from_dict`.
        """
        return read_toml(path, cls.from_dict, RecipeError)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` and JSON take."""
        rules = []
        for rule in self.rules:
            values = dataclasses.asdict(rule) | {"layers": list(rule.layers)}
            rules.append({key: value for key, value in values.items() if value != []})
        values = dataclasses.asdict(self) | {"rules": rules}
        return {key: value for key, value in values.items() if value is not None}

    def to_toml(self) -> str:
        """Return the text of a file that `from_toml` reads back to an equal recipe."""
        values = self.to_dict()
        rules = values.pop("rules")
        lines = toml_lines(values)
        for rule in rules:
            lines += ["", "[[rules]]", *toml_lines(rule)]
        return "\n".join(lines) + "\n"


def _rule_from_dict(values: Mapping[str, Any]) -> Rule:
    require_keys(Rule, values, "rules", RecipeError)
    fields = dict(values)
    layers = fields.get("layers", ())
    if not isinstance(layers, list | tuple):
        raise RecipeError(f"rules.layers: required a list of integers, got {layers!r}")
    fields["layers"] = tuple(layers)
    return Rule(**fields)


def _require_type(value: object, kind: type, where: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecipeError(f"{where}: required {kind.__name__}, got {value!r}")


def _require_share(value: object, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # type: ignore[operator]
        raise RecipeError(f"{where}: required a number from 0 to 1, got {value!r}")
