"""Builds the model from a checkpoint folder, with every tensor accounted for.

The network is made on the meta device, where it costs nothing, and its parameter names are the
released tensor names; so the set of tensors a checkpoint must have is read off the model itself,
and a missing, unexpected or misshapen tensor is named before a byte of weights is read.
Sub-modules can be filled one at a time, which is how a model larger than memory is walked.

BF16 (F16, F32) folders only; quantized ones are read by ``nvvl.quantize.load``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from nvvl.errors import CheckpointError
from nvvl.model.checkpoint import (
    Checkpoint,
    TensorInfo,
    require_bf16_config,
    require_finite,
    require_tensors,
)
from nvvl.model.config import VLMConfig
from nvvl.model.memory import require_memory
from nvvl.model.resolve import resolve_model as resolve_model
from nvvl.model.vlm import NemotronNanoVL

# A cast of these few numbers per layer moves every later state; they stay as they are stored.
_KEEP_STORED_DTYPE = ("A_log", "D", "dt_bias")

_FLOATS = ("BF16", "F16", "F32", "F64")
_INTEGERS = (".summary_idxs",)  # a buffer of indices


class TensorSource(Protocol):
    """Where `materialize` takes tensors from: a `Checkpoint`, or what was read of one before."""

    def info(self, name: str) -> TensorInfo:
        """Return the header entry of one tensor."""
        ...

    def load(self, name: str) -> Tensor:
        """Return one tensor in the dtype it is stored in."""
        ...


def expected_tensors(config: VLMConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that a BF16 checkpoint of this config holds."""
    state = _meta_model(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> NemotronNanoVL:
    """Load a whole model for inference.

    Args:
        folder: A BF16 checkpoint folder in the released layout.
        dtype: What the parameters are converted to, but for ``A_log``, ``D`` and ``dt_bias``,
            which keep their stored dtype as the buffers do; None keeps all as stored.
        device: Where the tensors go.

    Raises:
        ConfigError: if config.json cannot be used.
        CheckpointError: if tensors are missing, unexpected, of another shape, not finite, or if
            the folder is quantized.
        HardwareError: if memory cannot hold it.
    """
    checkpoint = Checkpoint(folder)
    model = _meta_model(checkpoint.config)
    check_tensors(checkpoint, expected_tensors(checkpoint.config))
    require_memory(num_bytes(model, dtype or torch.bfloat16), str(folder), device)
    materialize(model, "", checkpoint, dtype=dtype, device=device)
    return model.eval()


def num_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return how many bytes the parameters of a model take in a dtype."""
    return dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())


def check_tensors(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names, shapes and kinds of a checkpoint's tensors with those expected.

    Raises:
        CheckpointError: if the folder is quantized, whether it says so or not; or listing every
            missing, unexpected and misshapen tensor, sorted.
    """
    require_bf16_config(checkpoint.folder, checkpoint.config)
    _require_floats(checkpoint, expected)
    found = {name: info.shape for name, info in checkpoint.tensors.items()}
    require_tensors(checkpoint.folder, found, expected)


def _require_floats(checkpoint: Checkpoint, expected: Mapping[str, object]) -> None:
    """Refuse codes in the place of weights, which not every folder declares."""
    codes = [
        info
        for name, info in checkpoint.tensors.items()
        if name in expected and info.dtype not in _FLOATS and not name.endswith(_INTEGERS)
    ]
    if codes:
        more = f" (and {len(codes) - 1} more tensors)" if codes[1:] else ""
        raise CheckpointError(
            f"{codes[0].file}: {codes[0].name}: required one of {', '.join(_FLOATS)}, got "
            f"{codes[0].dtype}{more}; give the BF16 checkpoint that it was made from"
        )


def materialize(
    module: nn.Module,
    prefix: str,
    checkpoint: TensorSource,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Fill one sub-module, made on the meta device, from a checkpoint.

    Args:
        module: Its parameters and persistent buffers are replaced; parameters need no gradient.
        prefix: Fully qualified name of the module in the checkpoint; "" for the whole model.
        checkpoint: Where the tensors are.
        dtype: As in `load_model`.
        device: Where the tensors go.

    Raises:
        CheckpointError: if a tensor is missing, of another shape, not a float, or not finite.
    """
    for owner_name, owner in module.named_modules(prefix=prefix):
        where = f"{owner_name}." if owner_name else ""
        for leaf, parameter in list(owner.named_parameters(recurse=False)):
            keep = dtype is None or leaf in _KEEP_STORED_DTYPE
            loaded = _load_weight(checkpoint, where + leaf, parameter)
            loaded = loaded.to(device=device, dtype=loaded.dtype if keep else dtype)
            setattr(owner, leaf, nn.Parameter(loaded, requires_grad=False))
        for leaf, buffer in list(owner.named_buffers(recurse=False)):
            info = checkpoint.info(where + leaf)
            _require_shape(info, buffer)
            setattr(owner, leaf, checkpoint.load(info.name).to(device))


def _load_weight(checkpoint: TensorSource, name: str, placeholder: Tensor) -> Tensor:
    info = checkpoint.info(name)
    _require_shape(info, placeholder)
    if info.dtype not in _FLOATS:
        raise CheckpointError(
            f"{info.file}: {name}: required one of {', '.join(_FLOATS)}, got {info.dtype}"
        )
    weight = checkpoint.load(name)
    require_finite(weight, info)
    return weight


def _require_shape(info: TensorInfo, placeholder: Tensor) -> None:
    if info.shape != tuple(placeholder.shape):
        raise CheckpointError(
            f"{info.file}: {info.name}: required shape {tuple(placeholder.shape)}, got {info.shape}"
        )


def _meta_model(config: VLMConfig) -> NemotronNanoVL:
    with torch.device("meta"):
        return NemotronNanoVL(config)
