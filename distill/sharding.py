"""Layers sliced over processes: FSDP2, so that N devices hold one training state between them.

torch's ``fully_shard`` is called here directly, on each layer and on the whole: accelerate's own
plug-in refuses to shard on CPUs, where the tests run, and wraps models whose optimizer it owns.
Weights are gathered a layer at a time, forward and backward, and gradients come back as the
mean over processes, each process its slice. Slices are along the first dimension, so a row of a
weight, along which NVFP4's blocks lie, is never cut.
"""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def shard_layers(root: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> None:
    """Slice the parameters of layers, and what is left in the root, over all processes.

    Frozen scalars and float32 parameters stay whole: they are tiny, and of another dtype.

    Args:
        root: Its forward is the only one that may be called afterwards.
        layers: Modules inside it that are gathered one at a time.
        device: This process's.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # every layer's output is such a view, and nothing here changes one in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    whole = {p for p in root.parameters() if p.ndim == 0 or p.dtype == torch.float32}
    for module in (*layers, root):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=whole,
            reshard_after_forward=True,
        )


def slice_of(tensor: Tensor) -> Tensor:
    """Return this process's slice of a parameter or gradient; all of it where it is whole."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_whole(part: Tensor, parameter: Tensor) -> Tensor:
    """Join the slices that processes have of something shaped as ``parameter``."""
    if not isinstance(parameter, DTensor):
        return part
    joined: Tensor = DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()
    return joined


def to_slice(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's slice of something shaped as ``parameter``."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    chunks = whole.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]
