"""Rules E1 to E5: the exclude list means to every server what the tensors say.

For every linear layer: quantized, if and only if it has scales, if and only if no pattern excludes
it. Each server's own matching is repeated by `nvvl.export.exclude_patterns`.
"""

from collections.abc import Iterator, Sequence

from nvvl.export.checks import Rule, rule
from nvvl.export.exclude_patterns import EXCLUSIONS, Exclusion
from nvvl.export.view import LM_HEAD, CheckpointView, Declaration

_ALGO_FORMAT = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4"}


@rule("E1", "vLLM quantizes what is stored quantized", servers="V")
def e1_vllm_scope(view: CheckpointView) -> Sequence[str]:
    """E1: by equality, substring and fnmatch; ``layers.1`` there also reaches 10 to 19."""
    return list(_scope_faults(view, "vLLM"))


@rule("E2", "TensorRT-LLM quantizes what is stored quantized", servers="T")
def e2_trtllm_scope(view: CheckpointView) -> Sequence[str]:
    """E2: by fnmatch on TensorRT-LLM's names and their parents."""
    return list(_scope_faults(view, "TensorRT-LLM"))


@rule("E2", "older TensorRT-LLM quantizes what is stored quantized", servers="T")
def e2_older_trtllm_scope(view: CheckpointView) -> Sequence[str]:
    """E2: older releases keep the language_model. prefix of a pattern and match the name alone."""
    return list(_scope_faults(view, "TensorRT-LLM, older releases"))


@rule("E3", "every pattern and listed layer matches something", servers="VT")
def e3_no_dead_patterns(view: CheckpointView) -> Sequence[str]:
    """E3: a pattern that matches no module of the model protects nothing, whatever was meant."""
    declaration = view.declaration
    if declaration is None:
        return []
    faults = [
        f"{pattern}: matches no module in any server"
        for pattern in declaration.exclude
        if not any(_reached(view.modules, pattern))
    ]
    faults += [
        f"{fqn}: listed in quantized_layers, not a linear of this model"
        for fqn in declaration.layers
        if fqn not in view.linears
    ]
    return faults


@rule("E4", "no pattern covers the language model", servers="VT")
def e4_language_model_covered(view: CheckpointView) -> Sequence[str]:
    """E4: one broad pattern un-quantizes everything, and a server loads codes as values."""
    if view.declaration is None or not view.language_linears:
        return []
    return [
        f"{pattern}: matches every layer of the language model in {server}"
        for pattern in view.declaration.exclude
        for server, exclusion in EXCLUSIONS.items()
        if all(exclusion(fqn, [pattern]) for fqn in view.language_linears)
    ]


@rule("E5", "no pattern means another mlp", servers="VT", silent=True)
def e5_stray_mlp(view: CheckpointView) -> Sequence[str]:
    """E5: ``*mlp*`` never matches mixer.up_proj, but does match mlp1 and RADIO's mlp.fc1."""
    if view.declaration is None:
        return []
    return [
        f"{pattern}: matches no MLP of the language model (mixer.up_proj, mixer.down_proj)"
        for pattern in view.declaration.exclude
        if "mlp" in pattern.replace("mlp1", "")
        and not pattern.startswith("vision_model")
        and not any(_reached(view.language_linears, pattern))
    ]


EXCLUDE_RULES: tuple[Rule[CheckpointView], ...] = (
    e1_vllm_scope,
    e2_trtllm_scope,
    e2_older_trtllm_scope,
    e3_no_dead_patterns,
    e4_language_model_covered,
    e5_stray_mlp,
)


def _scope_faults(view: CheckpointView, server: str) -> Iterator[str]:
    declaration = view.declaration
    if declaration is None:
        return
    for fqn in view.linears:
        stored = view.stored(fqn)
        wanted, pattern = _expected_format(declaration, fqn, EXCLUSIONS[server])
        if stored == wanted:
            continue
        if pattern is not None:
            yield f"{fqn}: stored {stored}, but {pattern} excludes it"
        elif stored == "bf16":
            yield f"{fqn}: stored in 16 bit, but {server} takes it for {wanted}"
        else:
            yield f"{fqn}: stored {stored}, but {server} takes it for {wanted}"


def _expected_format(
    declaration: Declaration, fqn: str, exclusion: Exclusion
) -> tuple[str, str | None]:
    """Return the format a server expects of a linear, and the pattern that excludes it."""
    pattern = exclusion(fqn, declaration.exclude)
    if pattern is not None:
        return "bf16", pattern
    if declaration.algo == "MIXED_PRECISION":
        algo = declaration.layers.get(fqn, "")
    else:
        algo = declaration.algo
    return _ALGO_FORMAT.get(algo, "bf16"), None


def _reached(modules: Sequence[str], pattern: str) -> Iterator[str]:
    """Yield the modules that a pattern excludes in at least one server."""
    for fqn in (*modules, LM_HEAD):
        if any(exclusion(fqn, [pattern]) for exclusion in EXCLUSIONS.values()):
            yield fqn
