"""Rules N1 to N8: tensor names and the shard index.

vLLM drops a tensor of unknown name without a word and never asks for a missing one, so most of
these rules guard against a server that starts, reads the prompt, and sees nothing.
"""

import re
from collections.abc import Iterator, Sequence

from nvvl.export.checks import NotCheckedError, Rule, rule
from nvvl.export.view import LM_HEAD, CheckpointView, is_scale

_ROOTS = ("language_model.", "mlp1.", "vision_model.radio_model.")
_RADIO = re.compile(
    r"vision_model\.radio_model\.("
    r"input_conditioner\.norm_(mean|std)|summary_idxs|"
    r"model\.patch_generator\.(cls_token\.token|pos_embed|embedder\.(weight|bias))|"
    r"model\.blocks\.\d+\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias))"
)
_PROJECTOR = {"mlp1.0.weight", "mlp1.1.weight", "mlp1.3.weight"}


@rule("N1", "every name has a known root", servers="V", silent=True)
def n1_roots(view: CheckpointView) -> Sequence[str]:
    """N1: vLLM drops every other name without a word; vision weights then stay random."""
    return [
        f"{name}: dropped by vLLM" for name in sorted(view.tensors) if not name.startswith(_ROOTS)
    ]


@rule("N2", "language model names", servers="VTSE")
def n2_language_names(view: CheckpointView) -> Sequence[str]:
    """N2: released form is language_model.backbone.* and language_model.lm_head.*."""
    return [
        f"{name}: required language_model.backbone.* or language_model.lm_head.*"
        for name in sorted(view.tensors)
        if name.startswith("language_model.")
        and not name.startswith(("language_model.backbone.", f"{LM_HEAD}."))
    ]


@rule("N3", "vision names are RADIO's own", servers="VTE", silent=True)
def n3_vision_names(view: CheckpointView) -> Sequence[str]:
    """N3: fused attn.qkv, patch_generator, blocks; renamed ones are lost or refused."""
    return [
        f"{name}: not a name of the released vision tower"
        for name in sorted(view.tensors)
        if name.startswith("vision_model.") and not _RADIO.fullmatch(name)
    ]


@rule("N4", "projector is exactly mlp1.0, .1, .3", servers="T")
def n4_projector_names(view: CheckpointView) -> Sequence[str]:
    """N4: TensorRT-LLM loads mlp1 strictly: three weights, no scales, nothing else."""
    found = {name for name in view.tensors if name.startswith("mlp1.")}
    return [f"{name}: missing" for name in sorted(_PROJECTOR - found)] + [
        f"{name}: unexpected" for name in sorted(found - _PROJECTOR)
    ]


@rule("N5", "same names as the source", servers="VTSE", silent=True)
def n5_source_names(view: CheckpointView) -> Sequence[str]:
    """N5: apart from scales nothing lost, nothing added; servers skip what they do not know."""
    if view.source is None:
        raise NotCheckedError("needs the source")
    source = view.source
    names = {name for name in view.tensors if not is_scale(name)}
    return [f"{name}: missing" for name in sorted(source.tensors.keys() - names)] + [
        f"{name}: not in the source" for name in sorted(names - source.tensors.keys())
    ]


@rule("N6", "no corrupted names", servers="VTSE", silent=True)
def n6_clean_names(view: CheckpointView) -> Sequence[str]:
    """N6: U+0000 and "sentinel" are marks of a broken rename; such exclusions never match."""
    places = {"tensor": list(view.tensors)}
    for where, declaration in (
        ("config.json", view.config_declaration),
        ("hf_quant_config.json", view.hf_declaration),
    ):
        if declaration is not None:
            places[f"pattern of {where}"] = list(declaration.exclude)
            places[f"quantized_layers of {where}"] = list(declaration.layers)
    return [
        f"{name!r} ({place})"
        for place, names in places.items()
        for name in names
        if "\0" in name or "sentinel" in name
    ]


@rule("N7", "index and files agree", servers="VTSE")
def n7_index(view: CheckpointView) -> Sequence[str]:
    """N7: the index names each tensor's file and their total size; a wrong one fails to load."""
    if not view.shards:
        raise NotCheckedError("needs the files")
    faults = list(_duplicates(view))
    if view.index is None:
        if len(view.shards) > 1:
            faults.append(f"{len(view.shards)} safetensors files without an index")
        return faults
    weight_map = view.index.get("weight_map")
    if not isinstance(weight_map, dict):
        return [*faults, "weight_map: missing"]
    for name in sorted(weight_map.keys() | view.tensors.keys()):
        listed = weight_map.get(name)
        if listed is None:
            faults.append(f"{name}: in {view.tensors[name].file}, not in the index")
        elif name not in view.shards.get(listed, ()):
            faults.append(f"{name}: the index says {listed}, which does not hold it")
    total = (view.index.get("metadata") or {}).get("total_size")
    stored = sum(header.nbytes for header in view.tensors.values())
    if total != stored:
        faults.append(f"metadata.total_size: {total}, the headers add up to {stored}")
    return faults


@rule("N8", "TensorRT-LLM reads nothing but weights as weights", servers="T")
def n8_other_files(view: CheckpointView) -> Sequence[str]:
    """N8: TensorRT-LLM loads every *.safetensors file, whatever the index lists."""
    return [f"{name}: TensorRT-LLM would read it as weights; move it" for name in _strays(view)]


@rule("N8", "vLLM reads nothing but weights as weights", servers="V")
def n8_other_files_without_index(view: CheckpointView) -> Sequence[str]:
    """N8: without an index vLLM loads every *.safetensors file too."""
    strays = [] if view.index is not None else _strays(view)
    return [f"{name}: vLLM would read it as weights; move it" for name in strays]


def _strays(view: CheckpointView) -> list[str]:
    """List safetensors files that are not the model's, by the index or else by name."""
    if view.folder is None:
        raise NotCheckedError("needs the files")
    weight_map = (view.index or {}).get("weight_map")
    if isinstance(weight_map, dict):
        return sorted(view.shards.keys() - set(weight_map.values()))
    return sorted(name for name in view.shards if not name.startswith("model"))


NAME_RULES: tuple[Rule[CheckpointView], ...] = (
    n1_roots,
    n2_language_names,
    n3_vision_names,
    n4_projector_names,
    n5_source_names,
    n6_clean_names,
    n7_index,
    n8_other_files,
    n8_other_files_without_index,
)


def _duplicates(view: CheckpointView) -> Iterator[str]:
    files: dict[str, list[str]] = {}
    for file, names in view.shards.items():
        for name in names:
            files.setdefault(name, []).append(file)
    for name, holders in sorted(files.items()):
        if len(holders) > 1:
            yield f"{name}: in {' and '.join(sorted(holders))}"
