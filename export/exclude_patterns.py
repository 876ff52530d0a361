r"""Which modules an exclude pattern reaches, as each server really matches it.

A checkpoint lists the modules that stay in 16 bit; every server reads that list in its own way,
under its own module names. A pattern that reads well can reach layers nobody meant
(``...layers.1`` also reaches 10 to 19 in vLLM) or none at all (``*mixer.q_proj`` where q, k and v
are one fused module). The functions below repeat each server's procedure.

vLLM (ModelOptQuantConfigBase.is_layer_excluded and apply_vllm_mapper): a trailing ``X*`` becomes
``X`` and ``X.*``; names are mapped by prefix, language_model.backbone to language_model.model;
then equality (of all of q, k, v for their fused module), substring, and fnmatch, in this order.

TensorRT-LLM: patterns lose a leading ``language_model.``, then ``(model.layers.)?backbone`` turns
into ``model``; a module is excluded if its name or any ancestor's matches by fnmatch, where a
trailing ``.*`` also stands for the parent. Releases before that keep the prefix, and match the
name alone. A fused module is excluded if any of its parts is.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from nvvl.model.patterns import matches_pattern

Exclusion = Callable[[str, Sequence[str]], str | None]

FUSED = ("q_proj", "k_proj", "v_proj")
_FUSED_NAME = "qkv_proj"
_VLLM_PREFIX = ("language_model.backbone", "language_model.model")


def vllm_exclusion(fqn: str, patterns: Sequence[str]) -> str | None:
    """Return the first pattern by which vLLM leaves a module unquantized, else None.

    Args:
        fqn: released module name.
        patterns: ``exclude_modules`` as written.
    """
    mapped = [(pattern, part) for pattern in patterns for part in _split_vllm(pattern)]
    parts = _fused_parts(_map_vllm(fqn))
    module = _fuse(_map_vllm(fqn))
    listed = {part for _, part in mapped}
    if all(part in listed for part in parts):
        return next(pattern for pattern, part in mapped if part in parts)
    for pattern, part in mapped:
        if part != module and part in module:
            return pattern
    for pattern, part in mapped:
        if fnmatchcase(module, part):
            return pattern
    return None


def vllm_split_fusion(mixer: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return which of q, k and v vLLM finds listed, if it finds some but not all: it raises then.

    Args:
        mixer: released name of an attention mixer.
        patterns: ``exclude_modules`` as written.
    """
    listed = {part for pattern in patterns for part in _split_vllm(pattern)}
    found = tuple(leaf for leaf in FUSED if _map_vllm(f"{mixer}.{leaf}") in listed)
    return found if len(found) < len(FUSED) else ()


def trtllm_exclusion(fqn: str, patterns: Sequence[str]) -> str | None:
    """Return the first pattern by which TensorRT-LLM's main branch excludes a module, else None.

    Args:
        fqn: released module name.
        patterns: ``exclude_modules`` as written.
    """
    for pattern in patterns:
        renamed = _rename_trtllm(pattern.removeprefix("language_model."))
        for name in _trtllm_names(fqn):
            if any(_matches_subtree(candidate, renamed) for candidate in _with_parents(name)):
                return pattern
    return None


def older_trtllm_exclusion(fqn: str, patterns: Sequence[str]) -> str | None:
    """Return the first pattern by which older TensorRT-LLM releases exclude a module, else None.

    Args:
        fqn: released module name.
        patterns: ``exclude_modules`` as written.
    """
    for pattern in patterns:
        renamed = _rename_trtllm(pattern)
        if any(fnmatchcase(name, renamed) for name in _trtllm_names(fqn)):
            return pattern
    return None


EXCLUSIONS: dict[str, Exclusion] = {
    "vLLM": vllm_exclusion,
    "TensorRT-LLM": trtllm_exclusion,
    "TensorRT-LLM, older releases": older_trtllm_exclusion,
}


def _split_vllm(pattern: str) -> tuple[str, ...]:
    if len(pattern) >= 2 and pattern.endswith("*") and not pattern.endswith(".*"):
        return (_map_vllm(pattern[:-1]), _map_vllm(f"{pattern[:-1]}.*"))
    return (_map_vllm(pattern),)


def _map_vllm(name: str) -> str:
    old, new = _VLLM_PREFIX
    return new + name.removeprefix(old) if name.startswith(old) else name


def _fused_parts(name: str) -> tuple[str, ...]:
    """Return the modules that share a server's module with this one, itself included."""
    mixer, _, leaf = name.rpartition(".")
    return tuple(f"{mixer}.{part}" for part in FUSED) if leaf in FUSED else (name,)


def _fuse(name: str) -> str:
    mixer, _, leaf = name.rpartition(".")
    return f"{mixer}.{_FUSED_NAME}" if leaf in FUSED else name


def _rename_trtllm(name: str) -> str:
    return re.sub(r"(model\.layers\.)?backbone", "model", name)


def _trtllm_names(fqn: str) -> tuple[str, ...]:
    name = _rename_trtllm(fqn.removeprefix("language_model."))
    return (_fuse(name), *_fused_parts(name)) if _fuse(name) != name else (name,)


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _matches_subtree(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return matches_pattern(pattern[3:], name, whole=True)
    return fnmatchcase(name, pattern) or (
        pattern.endswith(".*") and fnmatchcase(name, pattern[:-2])
    )
