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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nvvl.errors import ConfigError
from nvvl.model.config_values import MOST_SIZE, Section

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
        for whole, part in (
            ("num_attention_heads", "num_key_value_heads"),
            ("mamba_num_heads", "n_groups"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"llm_config: {whole} {getattr(self, whole)} is not a multiple of "
                    f"{part} {getattr(self, part)}"
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
        part = Section.of(values, "llm_config")
        pattern = part.text("hybrid_override_pattern")
        if not 1 <= len(pattern) <= _MOST_LAYERS:
            raise ConfigError(
                f"llm_config.hybrid_override_pattern: required 1 to {_MOST_LAYERS} layers, got "
                f"{len(pattern)}"
            )
        if unknown := sorted(set(pattern) - set(_PATTERN)):
            raise ConfigError(
                f"llm_config.hybrid_override_pattern: layers {unknown} are not supported; "
                "this family has M (Mamba2), - (MLP) and * (attention)"
            )
        declared = values.get("num_hidden_layers", len(pattern))
        if declared != len(pattern):
            raise ConfigError(
                f"llm_config: num_hidden_layers is {declared!s:.60} but hybrid_override_pattern "
                f"has {len(pattern)} layers"
            )
        for key in ("attention_bias", "mlp_bias", "use_bias", "tie_word_embeddings"):
            if part.flag(key, False):
                raise ConfigError(f"llm_config.{key}: only false is supported, got true")
        activation = values.get("mlp_hidden_act", "relu2")
        if activation != "relu2":
            raise ConfigError(f"llm_config.mlp_hidden_act: required relu2, got {activation!s:.60}")
        low, high = part.numbers("time_step_limit", 2, default=(0.0, math.inf))
        if not (math.isfinite(low) and low <= high):
            part.refuse(
                "time_step_limit",
                "a finite number and one that is no less",
                values["time_step_limit"],
            )
        hidden_size = part.positive_int("hidden_size")
        num_attention_heads = part.positive_int("num_attention_heads")
        vocab_size = part.positive_int("vocab_size")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            layers=tuple(_PATTERN[letter] for letter in pattern),
            num_attention_heads=num_attention_heads,
            num_key_value_heads=part.positive_int("num_key_value_heads"),
            head_dim=part.positive_int(
                "head_dim", "attention_head_dim", default=hidden_size // num_attention_heads
            ),
            intermediate_size=part.positive_int("intermediate_size"),
            mamba_num_heads=part.positive_int("mamba_num_heads"),
            mamba_head_dim=part.positive_int("mamba_head_dim"),
            ssm_state_size=part.positive_int("ssm_state_size"),
            n_groups=part.positive_int("n_groups"),
            conv_kernel=part.positive_int("conv_kernel"),
            chunk_size=part.positive_int("chunk_size", default=128),
            use_conv_bias=part.flag("use_conv_bias", True),
            layer_norm_epsilon=part.number(
                "layer_norm_epsilon",
                "rms_norm_eps",
                default=1e-5,
                what="a positive number of at most 1",
                fits=lambda value: 0 < value <= 1,
            ),
            time_step_limit=(low, high),
            bos_token_id=part.token_id("bos_token_id", vocab_size),
            eos_token_ids=part.token_ids("eos_token_id"),
            pad_token_id=part.token_id("pad_token_id", vocab_size) or 0,
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
        part = Section.of(values, "vision_config")
        args = part.section("args")
        name = args.text("model", "", what="a name")
        hidden, layers, heads = _VIT_SIZES.get(name, (None, None, None))
        sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
        if any(args.values.get(key, usual) is None for key, usual in sizes.items()):
            raise ConfigError(
                f"vision_config.args.model: {name!r} is not one of {sorted(_VIT_SIZES)}; give "
                "hidden_size, num_hidden_layers and num_attention_heads in vision_config.args"
            )
        hidden_size = args.positive_int("hidden_size", default=hidden)
        patch_size = part.positive_int("patch_size", default=16)
        rows = args.positive_int("cpe_max_size", default=2048) // patch_size
        return cls(
            hidden_size=hidden_size,
            num_layers=args.positive_int("num_hidden_layers", default=layers, most=_MOST_LAYERS),
            num_heads=args.positive_int("num_attention_heads", default=heads),
            intermediate_size=args.positive_int("intermediate_size", default=4 * hidden_size),
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
        if self.image_size % self.vision.patch_size or side % self.shuffle:
            raise ConfigError(
                f"force_image_size: {self.image_size} is not a multiple of patch_size x "
                f"{self.shuffle} = {self.vision.patch_size * self.shuffle}"
            )
        if self.ps_version not in ("v1", "v2"):
            raise ConfigError(f"ps_version: required v1 or v2, got {self.ps_version!r}")

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
        top = Section.of(values, "config.json", prefix="")
        architectures = values.get("architectures") or []
        if not isinstance(architectures, list):
            raise ConfigError(
                f"config.json: architectures: required a list, got {architectures!r:.60}"
            )
        if ARCHITECTURE not in architectures and values.get("model_type") != ARCHITECTURE:
            raise ConfigError(
                f"config.json: required architecture {ARCHITECTURE}, got {architectures or 'none'}"
            )
        if missing := [key for key in _TOP_KEYS if key not in values]:
            raise ConfigError(f"config.json: missing {', '.join(missing)}")
        for key in ("quantization_config", "auto_map"):
            if values.get(key) is not None:
                top.section(key)
        vision = VisionConfig.from_dict(values["vision_config"])
        for key, size, where in (
            ("vit_hidden_size", vision.hidden_size, "vision_config.args"),
            ("patch_size", vision.patch_size, "vision_config"),
        ):
            if values[key] != size:
                raise ConfigError(
                    f"config.json: {key} {values[key]!s:.60} disagrees with {where} ({size})"
                )
        parts = [key for key in ("llm_config", "text_config") if key in values]
        if not parts:
            raise ConfigError("config.json: missing llm_config or text_config")
        language = LanguageConfig.from_dict(values[parts[0]])
        image_token_id = top.token_id("img_context_token_id", language.vocab_size)
        if image_token_id is None:
            raise ConfigError("img_context_token_id: required a token id, got null")
        return cls(
            language=language,
            vision=vision,
            image_size=top.positive_int("force_image_size", most=_MOST_IMAGE_SIZE),
            downsample_ratio=top.number(
                "downsample_ratio",
                what=f"a number from {_LEAST_RATIO} to 1",
                fits=lambda value: _LEAST_RATIO <= value <= 1,
            ),
            ps_version=values["ps_version"],
            projector_hidden_size=top.positive_int("projector_hidden_size"),
            norm_mean=_triple(top, "norm_mean", _NORM_MEANS),
            norm_std=_triple(top, "norm_std", _NORM_STDS),
            use_thumbnail=top.flag("use_thumbnail"),
            max_num_tiles=top.positive_int("max_num_tiles", default=12, most=MOST_TILES),
            image_token_id=image_token_id,
            image_token=top.token("img_context_token", "<image>"),
            image_start_token=top.token("img_start_token", "<img>"),
            image_end_token=top.token("img_end_token", "</img>"),
            video_token=top.token("video_context_token", "<video>"),
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
        try:
            return cls.from_dict(Section.of(values, str(path)).values)
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


def _triple(top: Section, key: str, limits: tuple[float, float]) -> tuple[float, float, float]:
    red, green, blue = top.numbers(key, 3)
    low, high = limits
    if not all(low <= value <= high for value in (red, green, blue)):  # NaN is not
        top.refuse(key, f"3 numbers from {low:g} to {high:g}", top.values[key])
    return red, green, blue


def _count_prefix_tokens(args: Section) -> int:
    """Count cls and register tokens as RADIO's own constructor does."""
    teachers = args.values.get("teachers") or []
    if not isinstance(teachers, list) or not all(isinstance(t, Mapping) for t in teachers):
        raise ConfigError("vision_config.args.teachers: required a list of objects")
    names = [teacher.get("name") for teacher in teachers]
    if not all(name is None or isinstance(name, str) for name in names):
        args.refuse("teachers", "names as text", names)
    cls_tokens = max(1, len(set(names))) if args.flag("cls_token_per_teacher", False) else 1
    multiple = args.values.get("register_multiple") or 0
    if not isinstance(multiple, int) or not 0 <= multiple <= MOST_SIZE:
        args.refuse("register_multiple", "a count", multiple)
    return cls_tokens + (multiple - cls_tokens % multiple if multiple else 0)
