"""Which linears can be quantized, and which format a recipe gives to each.

Everything here follows from config.json alone, so a plan needs neither torch nor weights.
Quantizable are the linears inside the language model's layers. Vision tower, projector and head
are not on the list: servers build them without quantization, or read them wrongly (facts of vLLM
and TensorRT-LLM loaders), so a rule that names them matches nothing and is refused.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from nvvl.errors import RecipeError
from nvvl.model.config import VLMConfig
from nvvl.model.tensor_list import list_tensors
from nvvl.quantize.formats import BLOCK_SIZE
from nvvl.quantize.recipe import NVFP4_FORMATS, Format, Recipe, Rule
from nvvl.toml_tables import near_names

LAYERS = "language_model.backbone.layers"

LinearShape = tuple[int, int]


def list_linears(config: VLMConfig) -> dict[str, LinearShape]:
    """Return (out_features, in_features) of every quantizable linear, in layer order."""
    linears: dict[str, LinearShape] = {}
    for spec in list_tensors(config):
        if spec.name.startswith(f"{LAYERS}.") and spec.name.endswith("_proj.weight"):
            out_features, in_features = spec.shape
            linears[spec.name.removesuffix(".weight")] = (out_features, in_features)
    return linears


def layer_index(fqn: str) -> int:
    """Return the layer that a quantizable linear belongs to."""
    return int(fqn.removeprefix(f"{LAYERS}.").split(".", 1)[0])


def quantized_only(formats: Mapping[str, Format]) -> dict[str, Format]:
    """Leave out the linears that stay ``bf16``."""
    quantized = dict(formats)
    for fqn, linear_format in formats.items():
        if linear_format == "bf16":
            del quantized[fqn]
    return quantized


def qkv_groups(fqns: Mapping[str, object]) -> list[tuple[str, str, str]]:
    """Return the q, k and v projections of each attention layer.

    Servers fuse the three into one product, so they must share format and scales.
    """
    return [
        (query, query[: -len("q_proj")] + "k_proj", query[: -len("q_proj")] + "v_proj")
        for query in fqns
        if query.endswith(".q_proj")
    ]


def assign_formats(recipe: Recipe, linear_shapes: Mapping[str, LinearShape]) -> dict[str, Format]:
    """Decide the format of every linear: that of the first rule matching its name.

    Args:
        recipe: The rules.
        linear_shapes: (out_features, in_features) by name, as `list_linears` returns.

    Returns:
        A format for every name; ``bf16`` where no rule matches.

    Raises:
        RecipeError: if a rule matches nothing, an NVFP4 linear has in_features that are not a
            multiple of 16, q, k and v of a layer differ, or nothing would be quantized.
    """
    num_layers = 1 + max((layer_index(fqn) for fqn in linear_shapes), default=-1)
    formats: dict[str, Format] = dict.fromkeys(linear_shapes, "bf16")
    for rule in reversed(recipe.rules):  # earlier rules overwrite later ones
        matched = match_rule(rule, linear_shapes, num_layers)
        formats |= dict.fromkeys(matched, rule.format)
    _require_blocks(formats, linear_shapes)
    _require_equal_qkv(formats)
    if set(formats.values()) == {"bf16"}:
        raise RecipeError(f"{recipe.name}: every linear stays bf16; give one rule another format")
    return formats


def match_rule(rule: Rule, linear_shapes: Mapping[str, LinearShape], num_layers: int) -> list[str]:
    """Return the names that one rule matches, whatever other rules say.

    Raises:
        RecipeError: if it matches none, or names a layer that the model lacks.
    """
    layers = {_resolve_layer(layer, num_layers) for layer in rule.layers}
    matched = [
        fqn
        for fqn in linear_shapes
        if fnmatchcase(fqn, rule.target) and (not layers or layer_index(fqn) in layers)
    ]
    if not matched:
        where = f" in layers {sorted(layers)}" if layers else ""
        raise RecipeError(
            f"target {rule.target!r} matches no quantizable linear{where}"
            f"{near_names(rule.target, _candidates(linear_shapes))} (vision_model, mlp1, "
            "embeddings, lm_head and conv1d always stay BF16 and need no rule)"
        )
    return matched


def _resolve_layer(layer: int, num_layers: int) -> int:
    if not -num_layers <= layer < num_layers:
        raise RecipeError(
            f"rules.layers: {layer} is not one of the model's {num_layers} layers "
            f"(0 to {num_layers - 1}, or -1 down to {-num_layers})"
        )
    return layer % num_layers


def _candidates(linear_shapes: Mapping[str, LinearShape]) -> list[str]:
    """Return what a mistyped target may have meant: globs over all layers, then full names."""
    generic = {f"{LAYERS}.*.{fqn.split('.', 4)[-1]}": None for fqn in linear_shapes}
    short = {f"*.{pattern.rsplit('.', 1)[-1]}": None for pattern in generic}
    return [*generic, *short, *linear_shapes]


def _require_blocks(
    formats: Mapping[str, Format], linear_shapes: Mapping[str, LinearShape]
) -> None:
    for fqn, linear_format in formats.items():
        in_features = linear_shapes[fqn][1]
        if linear_format in NVFP4_FORMATS and in_features % BLOCK_SIZE:
            raise RecipeError(
                f"{fqn}: NVFP4 needs in_features divisible by {BLOCK_SIZE}, got {in_features}; "
                f'put a rule before the others: target = "{fqn}", format = "bf16" (or "fp8")'
            )


def _require_equal_qkv(formats: Mapping[str, Format]) -> None:
    for group in qkv_groups(formats):
        if len({formats[fqn] for fqn in group}) > 1:
            got = ", ".join(f"{fqn.rsplit('.', 1)[-1]} {formats[fqn]}" for fqn in group)
            raise RecipeError(
                f"{group[0].rsplit('.', 1)[0]}: servers fuse q_proj, k_proj and v_proj, so they "
                f"need one format, got {got}; use the target *.mixer.[qkv]_proj"
            )
