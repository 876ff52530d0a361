"""Rules C8 to C12: the two quantization configs.

hf_quant_config.json is ModelOpt's own; quantization_config in config.json says the same in another
form. vLLM reads the latter first, TensorRT-LLM and Edge-LLM the former, and neither compares them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nvvl.export.checks import Rule, rule
from nvvl.export.view import CheckpointView

_VLLM_ALGOS = {
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "NVFP4",
    "W4A16_NVFP4",
    "MXFP8",
    "MIXED_PRECISION",
}
_TRTLLM_ALGOS = {"FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"}


@rule("C8", "the two quantization configs agree", servers="V", silent=True)
def c8_configs_agree(view: CheckpointView) -> Sequence[str]:
    """C8: vLLM reads config.json first, TensorRT-LLM hf_quant_config.json: both must say one."""
    first, second = view.config_declaration, view.hf_declaration
    if view.declaration is None:
        return _missing_if_quantized(view, "quantization_config and hf_quant_config.json")
    faults = []
    if first is not None:
        method = str(view.config["quantization_config"].get("quant_method", ""))
        if not method.startswith("modelopt"):
            faults.append(f"quantization_config.quant_method: required modelopt, got {method!r}")
    if first is None or second is None:
        missing = "quantization_config" if first is None else "hf_quant_config.json"
        return [*faults, f"{missing}: missing while the other is there"]
    pairs: dict[str, tuple[Any, Any]] = {
        "quant_algo": (first.algo, second.algo),
        "ignore / exclude_modules": (set(first.exclude), set(second.exclude)),
        "kv cache": (first.kv_cache_algo, second.kv_cache_algo),
        "quantized_layers": (dict(first.layers), dict(second.layers)),
    }
    if first.algo in ("NVFP4", "W4A16_NVFP4"):
        pairs["group_size"] = (first.group_size, second.group_size)
    faults += [f"{key}: {_difference(one, two)}" for key, (one, two) in pairs.items() if one != two]
    return faults


@rule("C9", "vLLM knows the algorithm", servers="V")
def c9_vllm_algorithm(view: CheckpointView) -> Sequence[str]:
    """C9: an algorithm outside vLLM's list is refused."""
    return _unknown_algos(view, _VLLM_ALGOS)


@rule("C9", "TensorRT-LLM knows the algorithm", servers="T")
def c9_trtllm_algorithm(view: CheckpointView) -> Sequence[str]:
    """C9: TensorRT-LLM takes FP8, NVFP4, W4A16_NVFP4 (since 2026) and MIXED_PRECISION."""
    return _unknown_algos(view, _TRTLLM_ALGOS)


@rule("C10", "hf_quant_config.json has its keys", servers="VT")
def c10_hf_quant_config(view: CheckpointView) -> Sequence[str]:
    """C10: vLLM raises for NVFP4 if one of the three keys is absent, even where null is fine.

    Blocks are of 16 wherever a size is named, in config.json too.
    """
    if view.hf_quant_config is None:
        return _missing_if_quantized(view, "hf_quant_config.json")
    producer = (view.hf_quant_config.get("producer") or {}).get("name")
    faults = []
    if producer != "modelopt":
        faults.append(f"producer.name: required modelopt, got {producer!r}")
    part = view.hf_quant_config.get("quantization")
    if not isinstance(part, dict):
        return [*faults, "quantization: missing"]
    faults += [
        f"quantization.{key}: missing"
        for key in ("quant_algo", "kv_cache_quant_algo", "exclude_modules")
        if key not in part
    ]
    if not isinstance(part.get("exclude_modules"), list):
        faults.append("quantization.exclude_modules: required a list")
    algo = str(part.get("quant_algo") or "").upper()
    if algo in ("NVFP4", "W4A16_NVFP4") and part.get("group_size") is None:
        faults.append("quantization.group_size: missing")
    faults += _group_size_faults(part, view.config.get("quantization_config") or {})
    if (algo == "MIXED_PRECISION") != bool(part.get("quantized_layers")):
        faults.append("quantization.quantized_layers: required for MIXED_PRECISION, and only there")
    return faults


@rule("C11", "config groups say what is quantized", servers="V", silent=True)
def c11_config_groups(view: CheckpointView) -> Sequence[str]:
    """C11: a group without input_activations turns NVFP4 into weight-only in vLLM, silently.

    vLLM takes what is excluded from ``ignore`` alone, and everything from ``quantization`` if that
    is there.
    """
    part = view.config.get("quantization_config")
    if not isinstance(part, dict):
        return _missing_if_quantized(view, "quantization_config")
    faults = []
    if not isinstance(part.get("ignore"), list):
        faults.append("quantization_config.ignore: required a list")
    if "quantization" in part:
        faults.append("quantization_config.quantization: present; vLLM would read nothing else")
    groups = part.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return [*faults, "quantization_config.config_groups: missing"]
    for name, group in groups.items():
        faults += _group_faults(f"config_groups.{name}", group, view)
    return faults


@rule("C12", "KV cache format has its scales", servers="VT")
def c12_kv_cache(view: CheckpointView) -> Sequence[str]:
    """C12: null for this family; where FP8 is declared, k_scale and v_scale must be there."""
    declaration = view.declaration
    scales = sorted(name for name in view.tensors if name.endswith((".k_scale", ".v_scale")))
    if declaration is None or declaration.kv_cache_algo is None:
        return [f"{name}: present, but no KV cache format is declared" for name in scales]
    if declaration.kv_cache_algo != "FP8":
        return [f"kv cache: required null or FP8, got {declaration.kv_cache_algo}"]
    wanted = [
        f"{mixer}.{leaf}"
        for mixer in view.attention_layers
        for leaf in ("k_proj.k_scale", "v_proj.v_scale")
    ]
    return [f"{name}: missing" for name in wanted if name not in view.tensors]


QUANT_CONFIG_RULES: tuple[Rule[CheckpointView], ...] = (
    c8_configs_agree,
    c9_vllm_algorithm,
    c9_trtllm_algorithm,
    c10_hf_quant_config,
    c11_config_groups,
    c12_kv_cache,
)


def _missing_if_quantized(view: CheckpointView, what: str) -> Sequence[str]:
    quantized = any(view.stored(fqn) != "bf16" for fqn in view.linears)
    return [f"{what}: missing, but weights are quantized"] if quantized else []


def _unknown_algos(view: CheckpointView, known: set[str]) -> list[str]:
    if view.declaration is None:
        return []
    algos = {view.declaration.algo, *view.declaration.layers.values()}
    return [f"quant_algo: {algo!r} is not one of {sorted(known)}" for algo in sorted(algos - known)]


def _group_size_faults(hf_part: Mapping[str, Any], part: Mapping[str, Any]) -> Iterator[str]:
    entries = {"quantization": hf_part, "quantization_config": part}
    for where, whole in list(entries.items()):
        for fqn, layer in (whole.get("quantized_layers") or {}).items():
            entries[f"{where}.quantized_layers.{fqn}"] = layer
    for name, group in (part.get("config_groups") or {}).items():
        entries[f"quantization_config.config_groups.{name}.weights"] = group.get("weights") or {}
    for where, entry in entries.items():
        if entry.get("group_size") not in (None, 16):
            yield f"{where}.group_size: required 16, got {entry['group_size']}"


def _group_faults(where: str, group: Any, view: CheckpointView) -> Iterator[str]:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        yield f"{where}.weights: missing"
        return
    inputs = group.get("input_activations")
    algos = _group_algos(group, view)
    if algos == {"W4A16_NVFP4"}:
        if inputs:
            yield f"{where}.input_activations: present, but W4A16_NVFP4 has 16-bit inputs"
    elif not inputs:
        yield f"{where}.input_activations: missing; vLLM would leave inputs in 16 bit"
    for algo in algos:
        wanted = 8 if algo == "FP8" else 4
        for part in ("weights", "input_activations"):
            numbers = group.get(part)
            if numbers and numbers.get("num_bits") != wanted:
                bits = numbers.get("num_bits")
                yield f"{where}.{part}.num_bits: required {wanted} for {algo}, got {bits}"


def _group_algos(group: Mapping[str, Any], view: CheckpointView) -> set[str]:
    declaration = view.config_declaration
    if declaration is None or not declaration.layers:
        return {declaration.algo} if declaration else set()
    targets = group.get("targets") or ()
    return {declaration.layers.get(target, "none") for target in targets}


def _difference(one: Any, two: Any) -> str:
    """Say how config.json's value differs from hf_quant_config.json's."""
    if isinstance(one, (set, dict)):
        entries_one = set(one.items()) if isinstance(one, dict) else one
        entries_two = set(two.items()) if isinstance(two, dict) else two
        return (
            f"only in config.json {sorted(entries_one - entries_two)}, "
            f"only in hf_quant_config.json {sorted(entries_two - entries_one)}"
        )
    return f"config.json has {one!r}, hf_quant_config.json {two!r}"
