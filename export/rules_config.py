"""Rules C1 to C7, C13, C14 and A2: config.json and the files copied beside it.

Servers read config.json before a single tensor. Half of these rules end in a load error when
broken; the others let a server start with another channel order or other layers.
"""

from collections.abc import Sequence
from pathlib import Path

from nvvl.export.checks import NotCheckedError, Rule, rule
from nvvl.export.view import LAYER, CheckpointView
from nvvl.model.hashing import hash_file

_ARCHITECTURE = "NemotronH_Nano_VL_V2"
_VLLM_KEYS = (
    "force_image_size",
    "patch_size",
    "template",
    "downsample_ratio",
    "ps_version",
    "image_tag_type",
    "vit_hidden_size",
    "projector_hidden_size",
    "norm_mean",
    "norm_std",
    "use_thumbnail",
)
_TRTLLM_KEYS = ("img_context_token_id", "video_context_token_id")
_DTYPE_KEYS = ("torch_dtype", "dtype")  # transformers 5 writes the second, and reads both
# Files a server reads beside weights and config; copied, never rewritten.
_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
    "generation_config.json",
    "*.py",
)


@rule("C1", "architecture and model_type", servers="VTSE")
def c1_architecture(view: CheckpointView) -> Sequence[str]:
    """C1: both name NemotronH_Nano_VL_V2; another class name is not dispatched."""
    architectures = view.config.get("architectures")
    model_type = view.config.get("model_type")
    faults = []
    if architectures != [_ARCHITECTURE]:
        faults.append(f"architectures: required [{_ARCHITECTURE}], got {architectures}")
    if model_type != _ARCHITECTURE:
        faults.append(f"model_type: required {_ARCHITECTURE}, got {model_type}")
    return faults


@rule("C2", "keys that vLLM reads", servers="V")
def c2_vllm_keys(view: CheckpointView) -> Sequence[str]:
    """C2: vLLM reads these keys without a default; a missing one is a load error."""
    faults = [f"{key}: missing" for key in _VLLM_KEYS if key not in view.config]
    if not view.language_config:
        faults.append("llm_config: missing")
    vision = view.config.get("vision_config")
    if not isinstance(vision, dict):
        return [*faults, "vision_config: missing"]
    faults += [
        f"vision_config.{key}: missing"
        for key in ("args", "preferred_resolution", "patch_size")
        if key not in vision
    ]
    if "model" not in (vision.get("args") or {}):
        faults.append("vision_config.args.model: missing")
    return faults


@rule("C3", "keys that TensorRT-LLM reads", servers="T")
def c3_trtllm_keys(view: CheckpointView) -> Sequence[str]:
    """C3: TensorRT-LLM also needs token ids and torch_dtype."""
    faults = [f"{key}: missing" for key in _TRTLLM_KEYS if key not in view.config]
    if not any(key in view.config for key in _DTYPE_KEYS):
        faults.append("torch_dtype: missing")
    return faults


@rule("C4", "no dynamic resolution", servers="V", silent=True)
def c4_static_tiles(view: CheckpointView) -> Sequence[str]:
    """C4: min_num_patches in vision_config.args makes vLLM switch to dynamic resolution."""
    args = (view.config.get("vision_config") or {}).get("args") or {}
    return ["vision_config.args.min_num_patches: present"] if "min_num_patches" in args else []


@rule("C5", "pixel shuffle version", servers="TS", silent=True)
def c5_ps_version(view: CheckpointView) -> Sequence[str]:
    """C5: v1 and v2 order channels differently, so the source's value must be kept."""
    value = view.config.get("ps_version")
    faults = [] if value in ("v1", "v2") else [f"ps_version: required v1 or v2, got {value!r}"]
    if view.source is not None and value != view.source.config.get("ps_version"):
        source = view.source.config.get("ps_version")
        faults.append(f"ps_version: {value!r}, the source has {source!r}")
    return faults


@rule("C6", "layer pattern fits the layers present", servers="VTE")
def c6_layer_pattern(view: CheckpointView) -> Sequence[str]:
    """C6: hybrid_override_pattern names each layer's kind; a wrong one builds other layers."""
    pattern = view.language_config.get("hybrid_override_pattern")
    if not isinstance(pattern, str):
        return ["hybrid_override_pattern: missing"]
    kinds = _find_layer_kinds(view)
    faults = []
    if sorted(kinds) != list(range(len(pattern))):
        faults.append(
            f"hybrid_override_pattern: {len(pattern)} layers, the tensors have {len(kinds)}"
        )
    faults += [
        f"hybrid_override_pattern[{index}]: {pattern[index]}, the tensors say {kind}"
        for index, kind in sorted(kinds.items())
        if index < len(pattern) and pattern[index] != kind
    ]
    declared = view.language_config.get("num_hidden_layers", len(pattern))
    if declared != len(pattern):
        faults.append(f"num_hidden_layers: {declared}, the pattern has {len(pattern)}")
    source = view.source
    if source and pattern != source.language_config.get("hybrid_override_pattern"):
        faults.append("hybrid_override_pattern: differs from the source's")
    return faults


@rule("C7", "tokenizer, template and processor files", servers="VT")
def c7_copied_files(view: CheckpointView) -> Sequence[str]:
    """C7: byte-identical to the source's; without them servers fail to make a processor."""
    if view.folder is None or view.source is None or view.source.folder is None:
        raise NotCheckedError("needs the source folder")
    ours, theirs = find_copied_files(view.folder), find_copied_files(view.source.folder)
    return [
        *(f"{name}: missing" for name in sorted(theirs.keys() - ours)),
        *(f"{name}: not in the source" for name in sorted(ours.keys() - theirs)),
        *(
            f"{name}: differs from the source's"
            for name in sorted(ours.keys() & theirs)
            if hash_file(ours[name]) != hash_file(theirs[name])
        ),
    ]


@rule("C13", "Mamba constants keep their dtype", servers="VT", silent=True)
def c13_mamba_dtypes(view: CheckpointView) -> Sequence[str]:
    """C13: A_log, D and dt_bias in the source's dtype; a cast to BF16 loses precision."""
    if view.source is None:
        raise NotCheckedError("needs the source")
    return [
        f"{name}: {header.dtype}, the source has {view.source.tensors[name].dtype}"
        for name, header in sorted(view.tensors.items())
        if name.endswith((".A_log", ".D", ".dt_bias"))
        and name in view.source.tensors
        and header.dtype != view.source.tensors[name].dtype
    ]


@rule("C14", "code files that auto_map names", servers="VT")
def c14_code_files(view: CheckpointView) -> Sequence[str]:
    """C14: a server that trusts the folder's code makes its configuration with these files."""
    if not view.code_files:
        return []
    if view.folder is None:
        raise NotCheckedError("needs the folder")
    return [f"{name}: named by auto_map, not in the folder" for name in view.missing_code_files]


@rule("A2", "config.json is the source's but for quantization_config", servers="VTSE", silent=True)
def a2_config_kept(view: CheckpointView) -> Sequence[str]:
    """A2: no id of a server's contract; every other key decides numbers and must be kept."""
    if view.source is None:
        raise NotCheckedError("needs the source")
    ours = {key: value for key, value in view.config.items() if key != "quantization_config"}
    theirs = view.source.config
    return [
        f"{key}: differs from the source's"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) or (key in ours) != (key in theirs)
    ]


CONFIG_RULES: tuple[Rule[CheckpointView], ...] = (
    a2_config_kept,
    c1_architecture,
    c2_vllm_keys,
    c3_trtllm_keys,
    c4_static_tiles,
    c5_ps_version,
    c6_layer_pattern,
    c7_copied_files,
    c13_mamba_dtypes,
    c14_code_files,
)


def find_copied_files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that are copied and never rewritten, by name."""
    found = (path for pattern in _COPIED for path in folder.glob(pattern))
    return {path.name: path for path in found if path.is_file()}


def _find_layer_kinds(view: CheckpointView) -> dict[int, str]:
    """Tell each layer's pattern letter from the tensors it has."""
    leaves = {".mixer.A_log": "M", ".mixer.up_proj.weight": "-", ".mixer.o_proj.weight": "*"}
    kinds: dict[int, str] = {}
    for name in view.tensors:
        if match := LAYER.match(name):
            index = int(match[1])
            kinds.setdefault(index, "?")
            for leaf, kind in leaves.items():
                if name.endswith(leaf):
                    kinds[index] = kind
    return kinds
