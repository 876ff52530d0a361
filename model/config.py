"""Typed reading of a released ``config.json``.

The released layout keeps the language model under ``llm_config`` (vLLM and newer configs say
``text_config``), RADIO under ``vision_config.args`` as a timm name plus overrides, and everything
that joins the two at the top level. This file turns it into frozen dataclasses and refuses what is
missing or contradictory; it never fills in a value that changes the numbers.

What a config cannot say is taken from tensor shapes when a checkpoint is opened
(`VLMConfig.with_shapes`): the number of cls and register tokens and the size of the position
table.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nvvl.errors import ConfigError

ARCHITECTURE = "NemotronH_Nano_VL_V2"

LayerKind = Literal["mamba", "mlp", "attention"]
_PATTERN: dict[str, LayerKind] = {"M": "mamba", "-": "mlp", "*": "attention"}

# (hidden size, layers, heads) of the timm names RADIO configs use; the MLP is 4x wide.
_VIT_SIZES = {
    "vit_small_patch16_224": (384, 12, 6),
    "vit_base_patch16_224": (768, 12, 12),
    "vit_large_patch16_224": (1024, 24, 16),
    "vit_huge_patch16_224": (1280, 32, 16),
}

# Far above any model of the family: what is larger can only exhaust memory, or overflow.
_MOST_SIZE = 1 << 24
_MOST_LAYERS = 1024
_MOST_IMAGE_SIZE = 8192
MOST_TILES = 1024  # every grid of at most so many is looked at
_LEAST_RATIO = 0.01
_NORM_MEANS = (-1e6, 1e6)
_NORM_STDS = (1e-6, 1e6)

# config.json keys without a default: a wrong guess would change the model's answers.
_TOP_KEYS = (
    "force_image_size",
    "patch_size",
    "downsample_ratio",
    "ps_version",
    "vit_hidden_size",
    "projector_hidden_size",
    "norm_mean",
    "norm_std",
    "use_thumbnail",
    "img_context_token_id",
    "vision_config",
)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The hybrid Mamba2-Transformer language model.

    Attributes:
        layers: Kind of each layer, first to last, from ``hybrid_override_pattern``.
        time_step_limit: (low, high) clamp of the Mamba2 time step after softplus.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerKind, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    use_conv_bias: bool = True
    layer_norm_epsilon: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (12,)
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"llm_config: num_attention_heads {self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(
            self.mamba_num_heads % self.n_groups == 0,
            f"llm_config: mamba_num_heads {self.mamba_num_heads} is not a multiple of "
            f"n_groups {self.n_groups}",
        )

    @property
    def mamba_inner_size(self) -> int:
        """Width of the Mamba2 inner activation, heads x head_dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C side by side."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LanguageConfig":
        """Read the ``llm_config`` part of a config.

        Raises:
            ConfigError: if a key is missing, or asks for something this architecture lacks.
        """
        _require_object(values, "llm_config")
        pattern = _get(values, "hybrid_override_pattern", "llm_config")
        _require(
            isinstance(pattern, str),
            f"llm_config.hybrid_override_pattern: required text, got {pattern!r:.60}",
        )
        _require(
            1 <= len(pattern) <= _MOST_LAYERS,
            f"llm_config.hybrid_override_pattern: required 1 to {_MOST_LAYERS} layers, got "
            f"{len(pattern)}",
        )
        unknown = sorted(set(pattern) - set(_PATTERN))
        _require(
            not unknown,
            f"llm_config.hybrid_override_pattern: layers {unknown} are not supported; "
            "this family has M (Mamba2), - (MLP) and * (attention)",
        )
        declared = values.get("num_hidden_layers", len(pattern))
        _require(
            declared == len(pattern),
            f"llm_config: num_hidden_layers is {declared} but hybrid_override_pattern "
            f"has {len(pattern)} layers",
        )
        for key in ("attention_bias", "mlp_bias", "use_bias", "tie_word_embeddings"):
            _require(
                not _flag(values, key, "llm_config.", default=False),
                f"llm_config.{key}: only false is supported, got true",
            )
        _require(
            values.get("mlp_hidden_act", "relu2") == "relu2",
            f"llm_config.mlp_hidden_act: required relu2, got {values.get('mlp_hidden_act')!s:.60}",
        )
        limits = values.get("time_step_limit", (0.0, math.inf))
        low, high = _numbers(limits, 2, "llm_config.time_step_limit")
        _require(
            math.isfinite(low) and low <= high,
            f"llm_config.time_step_limit: required a finite number and one that is no less, got "
            f"{limits!r:.60}",
        )
        sizes = {
            key: _get(values, key, "llm_config")
            for key in (
                "vocab_size",
                "hidden_size",
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "mamba_num_heads",
                "mamba_head_dim",
                "ssm_state_size",
                "n_groups",
                "conv_kernel",
            )
        }
        _require_positive_ints(sizes, "llm_config.")
        others = {"head_dim": _head_dim(values), "chunk_size": values.get("chunk_size", 128)}
        _require_positive_ints(others, "llm_config.")
        names = ("layer_norm_epsilon", "rms_norm_eps")
        epsilon = _first(values, names, "llm_config", default=1e-5)
        _require(
            _is_number(epsilon) and 0 < epsilon <= 1,
            "llm_config.layer_norm_epsilon: required a positive number of at most 1, got "
            f"{epsilon!r:.60}",
        )
        return cls(
            **sizes,
            **others,
            layers=tuple(_PATTERN[letter] for letter in pattern),
            use_conv_bias=_flag(values, "use_conv_bias", "llm_config.", default=True),
            layer_norm_epsilon=epsilon,
            time_step_limit=(low, high),
            bos_token_id=_token_id(values, "bos_token_id", "llm_config.", sizes["vocab_size"]),
            eos_token_ids=_token_ids(_get(values, "eos_token_id", "llm_config")),
            pad_token_id=_token_id(values, "pad_token_id", "llm_config.", sizes["vocab_size"]) or 0,
        )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The RADIO vision transformer.

    Attributes:
        num_prefix_tokens: cls and register tokens together; rows of ``cls_token.token``.
        num_positions: rows of the (square) position table ``pos_embed``.
        num_summary_idxs: length of the ``summary_idxs`` buffer; 0 where a checkpoint has none.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    num_prefix_tokens: int
    num_positions: int
    num_summary_idxs: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VisionConfig":
        """Read the ``vision_config`` part of a config.

        Sizes come from the timm name in ``args.model``; explicit ``hidden_size``,
        ``num_hidden_layers``, ``num_attention_heads`` and ``intermediate_size`` in ``args``
        override it, as they do in vLLM.

        Raises:
            ConfigError: if neither the name nor explicit sizes settle the geometry.
        """
        _require_object(values, "vision_config")
        args = _get(values, "args", "vision_config")
        _require_object(args, "vision_config.args")
        name = args.get("model", "")
        _require(
            isinstance(name, str), f"vision_config.args.model: required a name, got {name!r:.60}"
        )
        hidden, layers, heads = _VIT_SIZES.get(name, (None, None, None))
        hidden = args.get("hidden_size", hidden)
        layers = args.get("num_hidden_layers", layers)
        heads = args.get("num_attention_heads", heads)
        _require(
            None not in (hidden, layers, heads),
            f"vision_config.args.model: {name!r} is not one of {sorted(_VIT_SIZES)}; give "
            "hidden_size, num_hidden_layers and num_attention_heads in vision_config.args",
        )
        patch_size = _first(values, ("patch_size",), "vision_config", default=16)
        table_size = args.get("cpe_max_size", 2048)
        _require_positive_ints({"patch_size": patch_size}, "vision_config.")
        _require_positive_ints(
            {
                "hidden_size": hidden,
                "num_attention_heads": heads,
                "cpe_max_size": table_size,
            },
            "vision_config.args.",
        )
        _require_positive_ints(
            {"num_hidden_layers": layers}, "vision_config.args.", most=_MOST_LAYERS
        )
        intermediate = args.get("intermediate_size", 4 * hidden)
        _require_positive_ints({"intermediate_size": intermediate}, "vision_config.args.")
        rows = table_size // patch_size
        return cls(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            intermediate_size=intermediate,
            patch_size=patch_size,
            num_prefix_tokens=_count_prefix_tokens(args),
            num_positions=rows * rows,
        )


@dataclass(frozen=True, kw_only=True)
class VLMConfig:
    """The whole model, and how images become tokens.

    Attributes:
        image_size: Side of the square tile in pixels (512 in the released model).
        norm_mean: Per-channel mean of pixel values in 0..1.
        norm_std: Per-channel standard deviation of pixel values in 0..1.
        raw: The untouched config.json, to be written back unchanged.
    """

    language: LanguageConfig
    vision: VisionConfig
    image_size: int
    downsample_ratio: float
    ps_version: Literal["v1", "v2"]
    projector_hidden_size: int
    norm_mean: tuple[float, float, float]
    norm_std: tuple[float, float, float]
    use_thumbnail: bool
    max_num_tiles: int
    image_token_id: int
    image_token: str = "<image>"
    image_start_token: str = "<img>"
    image_end_token: str = "</img>"
    video_token: str = "<video>"
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        side = self.image_size // self.vision.patch_size
        _require(
            self.image_size % self.vision.patch_size == 0 and side % self.shuffle == 0,
            f"force_image_size: {self.image_size} is not a multiple of patch_size x "
            f"{self.shuffle} = {self.vision.patch_size * self.shuffle}",
        )
        _require(
            self.ps_version in ("v1", "v2"),
            f"ps_version: required v1 or v2, got {self.ps_version!r}",
        )

    @property
    def shuffle(self) -> int:
        """Patches per side that pixel shuffle folds into one token (2)."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_side(self) -> int:
        """Image tokens along one side of a tile (16 at full size)."""
        return self.image_size // self.vision.patch_size // self.shuffle

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of one tile (256 at full size)."""
        return self.tokens_per_side**2

    @property
    def projector_input_size(self) -> int:
        """Channels after pixel shuffle."""
        return self.vision.hidden_size * self.shuffle**2

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VLMConfig":
        """Read a whole config.json.

        Raises:
            ConfigError: if the architecture is another one, a key is missing, or parts disagree.
        """
        architectures = values.get("architectures") or []
        _require(
            isinstance(architectures, list),
            f"config.json: architectures: required a list, got {architectures!r:.60}",
        )
        _require(
            ARCHITECTURE in architectures or values.get("model_type") == ARCHITECTURE,
            f"config.json: required architecture {ARCHITECTURE}, got {architectures or 'none'}",
        )
        missing = [key for key in _TOP_KEYS if key not in values]
        _require(not missing, f"config.json: missing {', '.join(missing)}")
        for key in ("quantization_config", "auto_map"):
            if values.get(key) is not None:
                _require_object(values[key], f"config.json: {key}")
        language = _first(values, ("llm_config", "text_config"), "config.json")
        vision = VisionConfig.from_dict(values["vision_config"])
        _require(
            values["vit_hidden_size"] == vision.hidden_size,
            f"config.json: vit_hidden_size {values['vit_hidden_size']!s:.60} disagrees with "
            f"vision_config.args ({vision.hidden_size})",
        )
        _require(
            values["patch_size"] == vision.patch_size,
            f"config.json: patch_size {values['patch_size']!s:.60} disagrees with vision_config "
            f"({vision.patch_size})",
        )
        ratio = values["downsample_ratio"]
        _require(
            _is_number(ratio) and _LEAST_RATIO <= ratio <= 1,
            f"downsample_ratio: required a number from {_LEAST_RATIO} to 1, got {ratio!r:.60}",
        )
        image_size, num_tiles = values["force_image_size"], values.get("max_num_tiles", 12)
        projector_size = values["projector_hidden_size"]
        _require_positive_ints({"force_image_size": image_size}, most=_MOST_IMAGE_SIZE)
        _require_positive_ints({"projector_hidden_size": projector_size})
        _require_positive_ints({"max_num_tiles": num_tiles}, most=MOST_TILES)
        language_config = LanguageConfig.from_dict(language)
        image_token_id = _token_id(values, "img_context_token_id", "", language_config.vocab_size)
        if image_token_id is None:
            raise ConfigError("img_context_token_id: required a token id, got null")
        return cls(
            language=language_config,
            vision=vision,
            image_size=image_size,
            downsample_ratio=ratio,
            ps_version=values["ps_version"],
            projector_hidden_size=projector_size,
            norm_mean=_triple(values["norm_mean"], "norm_mean", _NORM_MEANS),
            norm_std=_triple(values["norm_std"], "norm_std", _NORM_STDS),
            use_thumbnail=_flag(values, "use_thumbnail"),
            max_num_tiles=num_tiles,
            image_token_id=image_token_id,
            image_token=_token(values, "img_context_token", "<image>"),
            image_start_token=_token(values, "img_start_token", "<img>"),
            image_end_token=_token(values, "img_end_token", "</img>"),
            video_token=_token(values, "video_context_token", "<video>"),
            raw=dict(values),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "VLMConfig":
        """Read ``config.json`` of a checkpoint folder.

        Raises:
            ConfigError: if the file is missing, unreadable or not JSON, and as `from_dict`.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: not found; MODEL must be a folder that holds config.json"
            ) from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error}); download it again") from None
        _require_object(values, str(path))
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(
                f"{folder}: {error}; MODEL must be a checkpoint of this family, with the "
                "config.json that it was released with"
            ) from None

    def with_shapes(
        self, *, prefix_tokens: int, positions: int, summary_idxs: int = 0
    ) -> "VLMConfig":
        """Return a copy whose RADIO token counts are those of a checkpoint's tensors.

        Args:
            prefix_tokens: rows of ``patch_generator.cls_token.token``.
            positions: rows of ``patch_generator.pos_embed``.
            summary_idxs: length of ``radio_model.summary_idxs``; 0 if there is no such tensor.
        """
        vision = replace(
            self.vision,
            num_prefix_tokens=prefix_tokens,
            num_positions=positions,
            num_summary_idxs=summary_idxs,
        )
        return replace(self, vision=vision)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_object(value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: required a JSON object, got {type(value).__name__}")


def _require_positive_ints(
    values: Mapping[str, object], where: str = "", *, most: int = _MOST_SIZE
) -> None:
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{where}{key}: required a positive integer, got {value!r:.60}")
        if value > most:
            raise ConfigError(f"{where}{key}: required at most {most}, got {value!r:.60}")


def _get(values: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in values:
        raise ConfigError(f"{where}: missing {key}")
    return values[key]


def _first(values: Mapping[str, Any], keys: Sequence[str], where: str, default: Any = None) -> Any:
    for key in keys:
        if key in values:
            return values[key]
    if default is None:
        raise ConfigError(f"{where}: missing {' or '.join(keys)}")
    return default


def _head_dim(values: Mapping[str, Any]) -> int:
    return _first(
        values,
        ("head_dim", "attention_head_dim"),
        "llm_config",
        default=values["hidden_size"] // values["num_attention_heads"],
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(values: Any, count: int, where: str) -> tuple[float, ...]:
    numbers = [_untagged(value) for value in values] if isinstance(values, list | tuple) else []
    if len(numbers) != count or not all(map(_is_number, numbers)):
        raise ConfigError(f"{where}: required {count} numbers, got {values!r:.60}")
    try:
        return tuple(map(float, numbers))
    except OverflowError:
        raise ConfigError(
            f"{where}: required {count} numbers that a float can hold, got {values!r:.60}"
        ) from None


def _untagged(value: Any) -> Any:
    """Read infinity: bare, as text, and as transformers 5 writes it, ``{"__float__": ...}``."""
    value = value.get("__float__") if isinstance(value, dict) else value
    return math.inf if value == "Infinity" else value


def _triple(values: Any, where: str, limits: tuple[float, float]) -> tuple[float, float, float]:
    red, green, blue = _numbers(values, 3, where)
    low, high = limits
    _require(
        all(low <= value <= high for value in (red, green, blue)),  # NaN is not
        f"{where}: required 3 numbers from {low:g} to {high:g}, got {values!r:.60}",
    )
    return red, green, blue


def _flag(
    values: Mapping[str, Any], key: str, where: str = "", *, default: bool | None = None
) -> bool:
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, bool):  # text such as "false" would count as true
        raise ConfigError(f"{where}{key}: required true or false, got {value!r:.60}")
    return value


def _token(values: Mapping[str, Any], key: str, default: str) -> str:
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{key}: required the text of a token, got {value!r:.60}")
    return value


def _token_id(values: Mapping[str, Any], key: str, where: str, vocab_size: int) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if not _is_id(value) or value >= vocab_size:
        raise ConfigError(
            f"{where}{key}: required a token id below the vocab_size of {vocab_size}, got "
            f"{value!r:.60}"
        )
    return int(value)


def _count_prefix_tokens(args: Mapping[str, Any]) -> int:
    """Count cls and register tokens as RADIO's own constructor does."""
    teachers = args.get("teachers") or []
    if not isinstance(teachers, list) or not all(isinstance(t, Mapping) for t in teachers):
        raise ConfigError("vision_config.args.teachers: required a list of objects")
    names = [teacher.get("name") for teacher in teachers]
    if not all(name is None or isinstance(name, str) for name in names):
        raise ConfigError(f"vision_config.args.teachers: required names as text, got {names!r:.60}")
    per_teacher = _flag(args, "cls_token_per_teacher", "vision_config.args.", default=False)
    cls_tokens = max(1, len(set(names))) if per_teacher else 1
    multiple = args.get("register_multiple") or 0
    if not isinstance(multiple, int) or not 0 <= multiple <= _MOST_SIZE:
        raise ConfigError(
            f"vision_config.args.register_multiple: required a count, got {multiple!r:.60}"
        )
    return cls_tokens + (multiple - cls_tokens % multiple if multiple else 0)


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(map(_is_id, ids)):
        raise ConfigError(
            f"llm_config.eos_token_id: required a token id or a list of them, got {value!r:.60}"
        )
    return ids


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_SIZE
