"""How much memory building an engine takes, and whether this machine has it.

A builder holds a graph's weights several times over. Its peak was measured for graphs of 0.05 to
0.8 GB of weights, each built in its own process (TensorRT-RTX 1.7): up to 0.6 GB, and about 2 to
3.2 times the weights. The largest is taken: better to refuse a build that would just have fitted
than to bring the machine down.
"""

from collections.abc import Sequence

from nvvl.errors import HardwareError
from nvvl.export.parts import largest_part
from nvvl.model.memory import free_memory

_BASE_BYTES = 600 * 10**6
_COPIES = 3.2


def estimate_build_memory(weight_bytes: int) -> int:
    """Return about how many bytes the builder needs at its peak."""
    return round(_BASE_BYTES + _COPIES * weight_bytes)


def require_build_memory(
    name: str,
    weight_bytes: int,
    allowed_bytes: int,
    *,
    layer_bytes: Sequence[int] = (),
    is_option: bool = False,
) -> None:
    """Refuse a build that is not going to fit.

    Args:
        name: Of the graph.
        weight_bytes: Of the graph, or of its largest part.
        allowed_bytes: What may be used.
        layer_bytes: Weights of what the graph can be split into, in order; empty if it cannot.
        is_option: Whether ``--memory`` says so, and not the machine.

    Raises:
        HardwareError: saying what it would take, and in how many parts it would fit.
    """
    needed = estimate_build_memory(weight_bytes)
    if needed <= allowed_bytes:
        return
    allowed_by, way_out = "this machine has free", "build on a machine with more memory"
    if is_option:
        allowed_by, way_out = "--memory allows", "allow more"
    for num_parts in range(2, len(layer_bytes) + 1):
        if estimate_build_memory(largest_part(layer_bytes, num_parts)) <= allowed_bytes:
            way_out += f", or build from the checkpoint with --parts {num_parts}"
            break
    raise HardwareError(
        f"{name}: building takes about {needed / 1e9:.1f} GB ({_COPIES} times its weights of "
        f"{weight_bytes / 1e9:.1f} GB), {allowed_by} {allowed_bytes / 1e9:.1f} GB; {way_out}"
    )


def available_memory() -> int:
    """Return how many bytes can be used without swapping."""
    free = free_memory()
    if free is None:
        raise HardwareError("the system does not say what memory is free; say it with --memory")
    return free
