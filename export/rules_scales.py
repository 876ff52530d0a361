"""Rules D1 to D8 and Q1 to Q4: dtypes, shapes and scales of the tensors.

D9, the values themselves, needs the weights and is in `nvvl.export.value_proof`.
"""

import math
from collections.abc import Iterator, Sequence

from nvvl.export.checks import NotCheckedError, Rule, rule
from nvvl.export.exclude_patterns import (
    FUSED,
    older_trtllm_exclusion,
    trtllm_exclusion,
    vllm_exclusion,
    vllm_split_fusion,
)
from nvvl.export.view import LM_HEAD, SCALE_LEAVES, CheckpointView, is_scale

BLOCK_SIZE = 16


@rule("D1", "FP8 linears have their tensors", servers="VTE")
def d1_fp8_layout(view: CheckpointView) -> Sequence[str]:
    """D1: weight F8_E4M3 [out, in], weight_scale and input_scale F32 scalars."""
    faults: list[str] = []
    for fqn in _linears_stored(view, "fp8"):
        for leaf in ("weight_scale", "input_scale"):
            faults += _header_faults(view, f"{fqn}.{leaf}", "F32", ())
        if f"{fqn}.weight_scale_2" in view.tensors:
            faults.append(f"{fqn}.weight_scale_2: unexpected for FP8")
        faults += _logical_shape_faults(view, fqn, factor=1)
    return faults


@rule("D2", "NVFP4 linears have their tensors", servers="VTE")
def d2_nvfp4_layout(view: CheckpointView) -> Sequence[str]:
    """D2: weight U8 [out, in/2], weight_scale F8_E4M3 [out, in/16], two F32 scalars.

    Weight-only linears have no input_scale: vLLM's loader knows no place for one.
    """
    faults: list[str] = []
    for fqn in _linears_stored(view, "nvfp4"):
        rows, packed = view.tensors[f"{fqn}.weight"].shape
        blocks = (rows, packed * 2 // BLOCK_SIZE)
        faults += _header_faults(view, f"{fqn}.weight_scale", "F8_E4M3", blocks)
        faults += _header_faults(view, f"{fqn}.weight_scale_2", "F32", ())
        if not view.is_weight_only(fqn):
            faults += _header_faults(view, f"{fqn}.input_scale", "F32", ())
        elif f"{fqn}.input_scale" in view.tensors:
            faults.append(f"{fqn}.input_scale: unexpected, W4A16_NVFP4 has 16-bit inputs")
        faults += _logical_shape_faults(view, fqn, factor=2)
    return faults


@rule("D3", "no scale missing, none orphaned", servers="V", silent=True)
def d3_scales_complete(view: CheckpointView) -> Sequence[str]:
    """D3: each quantized linear has its scales, and each scale a quantized linear.

    vLLM runs with a missing FP8 weight_scale or input_scale and answers NaN or nothing.
    """
    faults = []
    for fqn in view.linears:
        stored = view.stored(fqn)
        wanted = {"bf16": (), "fp8": ("weight_scale", "input_scale"), "nvfp4": SCALE_LEAVES}[stored]
        if stored == "nvfp4" and view.is_weight_only(fqn):
            wanted = ("weight_scale", "weight_scale_2")
        faults += [
            f"{fqn}.{leaf}: missing" for leaf in wanted if f"{fqn}.{leaf}" not in view.tensors
        ]
    quantized = {fqn for fqn in view.linears if view.stored(fqn) != "bf16"}
    faults += [
        f"{name}: its weight is not quantized"
        for name in sorted(view.tensors)
        if is_scale(name) and name.rpartition(".")[0] not in quantized
    ]
    return faults


@rule("D4", "vision tower and projector unquantized", servers="VT", silent=True)
def d4_vision_unquantized(view: CheckpointView) -> Sequence[str]:
    """D4: both servers build RADIO and mlp1 in 16 bit and would read codes without scales."""
    return [
        f"{name}: {header.dtype}"
        for name, header in sorted(view.tensors.items())
        if name.startswith(("vision_model.", "mlp1."))
        and (is_scale(name) or header.dtype in ("U8", "F8_E4M3", "F8_E5M2"))
    ]


@rule("D5", "conv1d unquantized and excluded", servers="VT")
def d5_conv1d(view: CheckpointView) -> Sequence[str]:
    """D5: vLLM builds conv1d in 16 bit; TensorRT-LLM quantizes it unless a pattern excludes it."""
    faults = []
    modules = [name for name in view.modules if name.endswith(".mixer.conv1d")]
    for fqn in modules:
        header = view.tensors.get(f"{fqn}.weight")
        if header is not None and header.dtype in ("U8", "F8_E4M3"):
            faults.append(f"{fqn}.weight: {header.dtype}, required 16 bit")
        declaration = view.declaration
        if declaration is None:
            continue
        if fqn in declaration.layers:
            faults.append(f"{fqn}: listed in quantized_layers")
        if declaration.algo == "MIXED_PRECISION":
            continue
        exclusions = (trtllm_exclusion, older_trtllm_exclusion)
        if not all(exclusion(fqn, declaration.exclude) for exclusion in exclusions):
            faults.append(f"{fqn}: no pattern excludes it; add *backbone.layers.N.mixer.conv1d")
    return faults


@rule("D6", "lm_head: stored as declared", servers="V")
def d6_lm_head(view: CheckpointView) -> Sequence[str]:
    """D6: a 16-bit lm_head must be excluded, a quantized one must not be: else a load error.

    In MIXED_PRECISION a layer that ``quantized_layers`` does not list is 16-bit without that.
    """
    declaration = view.declaration
    if declaration is None or LM_HEAD not in view.linears:
        return []
    excluded = vllm_exclusion(LM_HEAD, declaration.exclude) is not None
    quantized = view.stored(LM_HEAD) != "bf16"
    if quantized and excluded:
        return [f"{LM_HEAD}: stored {view.stored(LM_HEAD)}, but excluded"]
    if not quantized and not excluded and declaration.algo != "MIXED_PRECISION":
        return [f"{LM_HEAD}: stored in 16 bit, but no pattern excludes it; add *lm_head"]
    return []


@rule("D7", "scalar scales are finite and positive", servers="VTSE", silent=True)
def d7_scalar_scales(view: CheckpointView) -> Sequence[str]:
    """D7: a NaN, zero or negative scale makes every output of its layer meaningless."""
    _need_values(view)
    faults = []
    for name in sorted(view.tensors):
        value = view.scalar(name) if is_scale(name) else None
        if value is not None and not (math.isfinite(value) and value > 0):
            faults.append(f"{name}: {value}")
    return faults


@rule("D8", "NVFP4 inputs are whole blocks", servers="V")
def d8_whole_blocks(view: CheckpointView) -> Sequence[str]:
    """D8: in_features a multiple of 16; a shard that cuts a block fails under tensor parallel."""
    return [
        f"{fqn}: in_features {view.tensors[f'{fqn}.weight'].shape[1] * 2} is not a multiple of 16"
        for fqn in _linears_stored(view, "nvfp4")
        if view.tensors[f"{fqn}.weight"].shape[1] * 2 % BLOCK_SIZE
    ]


@rule("Q1", "NVFP4 q, k, v share weight_scale_2 and input_scale", servers="VT", silent=True)
def q1_nvfp4_scales_shared(view: CheckpointView) -> Sequence[str]:
    """Q1: vLLM takes the largest weight_scale_2 and leaves the block scales as they are."""
    return list(_unequal_scales(view, "nvfp4", ("weight_scale_2", "input_scale")))


@rule("Q2", "FP8 q, k, v share input_scale and weight_scale", servers="V")
def q2_fp8_scales_shared(view: CheckpointView) -> Sequence[str]:
    """Q2: servers fuse q, k and v; unequal weight_scale makes them round the weights again."""
    return list(_unequal_scales(view, "fp8", ("input_scale", "weight_scale")))


@rule("Q3", "q, k, v of a layer have one format", servers="VT")
def q3_one_format(view: CheckpointView) -> Sequence[str]:
    """Q3: one fused module has one format; naming only some of the three is a load error."""
    faults = []
    patterns = view.declaration.exclude if view.declaration else ()
    for mixer in view.attention_layers:
        formats = {leaf: view.stored(f"{mixer}.{leaf}") for leaf in _present(view, mixer)}
        if len(set(formats.values())) > 1:
            faults.append(f"{mixer}: {formats}")
        if listed := vllm_split_fusion(mixer, patterns):
            faults.append(f"{mixer}: exclude list names only {', '.join(listed)}")
    return faults


@rule("Q4", "Mamba in_proj has one scale of each kind", servers="VT", silent=True)
def q4_in_proj_scales(view: CheckpointView) -> Sequence[str]:
    """Q4: the five segments of in_proj share each scalar; servers load them as one."""
    faults = []
    for fqn in view.language_linears:
        if not fqn.endswith(".mixer.in_proj") or view.stored(fqn) == "bf16":
            continue
        rows = view.tensors[f"{fqn}.weight"].shape[0]
        for leaf in SCALE_LEAVES:
            header = view.tensors.get(f"{fqn}.{leaf}")
            if header is None:
                continue
            blocked = view.stored(fqn) == "nvfp4" and leaf == "weight_scale"
            if header.shape[:1] != ((rows,) if blocked else ()):
                faults.append(f"{fqn}.{leaf}: shape {list(header.shape)}")
    return faults


SCALE_RULES: tuple[Rule[CheckpointView], ...] = (
    d1_fp8_layout,
    d2_nvfp4_layout,
    d3_scales_complete,
    d4_vision_unquantized,
    d5_conv1d,
    d6_lm_head,
    d7_scalar_scales,
    d8_whole_blocks,
    q1_nvfp4_scales_shared,
    q2_fp8_scales_shared,
    q3_one_format,
    q4_in_proj_scales,
)


def _need_values(view: CheckpointView) -> None:
    if view.scalar_reader is None:
        raise NotCheckedError("needs the written scales")


def _linears_stored(view: CheckpointView, stored: str) -> list[str]:
    return [fqn for fqn in view.linears if view.stored(fqn) == stored]


def _header_faults(
    view: CheckpointView, name: str, dtype: str, shape: tuple[int, ...]
) -> Iterator[str]:
    header = view.tensors.get(name)
    if header is None:
        yield f"{name}: missing"
    elif (header.dtype, header.shape) != (dtype, shape):
        yield (f"{name}: required {dtype} {list(shape)}, got {header.dtype} {list(header.shape)}")


def _logical_shape_faults(view: CheckpointView, fqn: str, *, factor: int) -> Iterator[str]:
    """Compare a quantized weight's shape, unpacked, with the source's."""
    name = f"{fqn}.weight"
    if view.source is None or name not in view.source.tensors:
        return
    rows, columns = view.tensors[name].shape
    wanted = view.source.tensors[name].shape
    if (rows, columns * factor) != wanted:
        yield f"{name}: holds [{rows}, {columns * factor}], the source has {list(wanted)}"


def _present(view: CheckpointView, mixer: str) -> list[str]:
    return [leaf for leaf in FUSED if f"{mixer}.{leaf}.weight" in view.tensors]


def _unequal_scales(view: CheckpointView, stored: str, leaves: tuple[str, ...]) -> Iterator[str]:
    _need_values(view)
    for mixer in view.attention_layers:
        parts = [leaf for leaf in _present(view, mixer) if view.stored(f"{mixer}.{leaf}") == stored]
        for leaf in leaves:
            values = {part: view.scalar(f"{mixer}.{part}.{leaf}") for part in parts}
            present = {part: value for part, value in values.items() if value is not None}
            if len(set(present.values())) > 1:
                yield f"{mixer}: {leaf} differs: {present}"
