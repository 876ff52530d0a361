"""FP8 in the vision graph of a checkpoint whose vision tower is BF16.

Servers build the vision tower without quantization, so a checkpoint keeps it BF16
(`nvvl.quantize.targets`); an engine need not. With ``vision = "fp8"`` in the recipe of the graphs,
the linears of the vision blocks and of the projector become FP8 there: weights with the scale of
their largest magnitude, inputs with that of the largest magnitude met on a few images. The patch
embedding stays BF16. The scales lie beside the graphs in ``vision_scales.safetensors``, from which
the proof makes the torch model that the graph must equal.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nvvl.calib_data.items import Item
from nvvl.errors import CalibrationError
from nvvl.export.onnx_weights import CheckpointWeights
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import materialize
from nvvl.model.processor import Processor
from nvvl.model.safetensors_io import read_header, read_tensor
from nvvl.model.vlm import NemotronNanoVL
from nvvl.progress import Progress
from nvvl.quantize import fp8
from nvvl.quantize.linear import QuantizedLinear

SCALES_NAME = "vision_scales.safetensors"
NUM_IMAGES = 64
# Tiles that go through the tower at once.
_TILES = 4


def list_vision_linears(model: NemotronNanoVL) -> dict[str, nn.Linear]:
    """Return the linears of vision blocks and projector by name."""
    parts = (("vision_model", model.vision_model), ("mlp1", model.mlp1))
    return {
        f"{prefix}.{name}": module
        for prefix, part in parts
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear) and "patch_generator" not in name
    }


def find_scales(
    weights: CheckpointWeights,
    items: Sequence[Item],
    *,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Run the vision tower of a checkpoint over images and return its FP8 scales.

    Args:
        weights: The checkpoint's tensors; the tower and the projector alone are loaded.
        items: Whose images are looked at; those without any are passed over.
        progress: Called after each item.

    Returns:
        FP32 scalars, ``{linear}.weight_scale`` and ``{linear}.input_scale``.

    Raises:
        CalibrationError: if no item has an image, or an amax gives no scale.
    """
    checkpoint = weights.checkpoint
    model = _load_vision(checkpoint)
    processor = Processor.from_folder(checkpoint.folder)
    amaxes: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(_observer(amaxes, fqn))
        for fqn, module in list_vision_linears(model).items()
    ]
    num_tiles = 0
    for number, item in enumerate(items, 1):
        inputs = processor(item.messages, images=item.images, videos=item.videos)
        num_tiles += len(inputs.pixel_values)
        for tiles in inputs.pixel_values.split(_TILES) if len(inputs.pixel_values) else ():
            with torch.inference_mode():
                model.encode_images(tiles.to(torch.bfloat16))
        if progress is not None:
            progress("vision scales", number, len(items))
    for handle in handles:
        handle.remove()
    if not num_tiles:
        raise CalibrationError(
            f"vision scales: required items with images, got {len(items)} without any; give "
            "--calib a set with images"
        )
    scales: dict[str, Tensor] = {}
    for fqn, linear in list_vision_linears(model).items():
        scales[f"{fqn}.weight_scale"] = fp8.scale_from_amax(linear.weight.abs().amax())
        scales[f"{fqn}.input_scale"] = fp8.scale_from_amax(amaxes[fqn])
    return scales


def use_scales(weights: CheckpointWeights, scales: Mapping[str, Tensor]) -> None:
    """Put FP8 weights with these scales in the place of the checkpoint's."""
    for fqn in _linears(scales):
        parts = {leaf: scales[f"{fqn}.{leaf}"] for leaf in ("weight_scale", "input_scale")}
        weight = weights.stored(f"{fqn}.weight").bfloat16()  # which the scales were found on
        codes = fp8.quantize(weight, parts["weight_scale"])
        weights.replace_linear(fqn, "fp8", {"weight": codes, **parts})


def quantize_vision(model: NemotronNanoVL, folder: Path, dtype: torch.dtype) -> None:
    """Give a model the FP8 vision linears that a folder of graphs was written with.

    Args:
        model: Loaded from the checkpoint of the graphs, in ``dtype``.
        folder: The folder of graphs.
        dtype: Of activations and products.
    """
    header = read_header(folder / SCALES_NAME)
    scales = {name: read_tensor(info) for name, info in header.items()}
    linears = list_vision_linears(model)
    for fqn in _linears(scales):
        linear = linears[fqn]
        shape = (linear.out_features, linear.in_features)
        quantized = QuantizedLinear(shape, "fp8", bias=linear.bias is not None)
        quantized.weight_scale = scales[f"{fqn}.weight_scale"]
        quantized.input_scale = scales[f"{fqn}.input_scale"]
        quantized.weight = fp8.quantize(linear.weight.bfloat16(), quantized.weight_scale)
        quantized.bias = linear.bias
        quantized.prepare(dtype)
        model.set_submodule(fqn, quantized)


def _load_vision(checkpoint: Checkpoint) -> NemotronNanoVL:
    with torch.device("meta"):
        model = NemotronNanoVL(checkpoint.config)
    for name in ("vision_model", "mlp1"):
        part = model.get_submodule(name)
        materialize(part, name, checkpoint, dtype=torch.bfloat16, device="cpu")
    return model.eval()


def _observer(amaxes: dict[str, Tensor], fqn: str) -> Callable[..., None]:
    def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        amax = inputs[0].abs().amax().float()
        amaxes[fqn] = torch.maximum(amaxes.get(fqn, amax), amax)

    return observe


def _linears(scales: Mapping[str, Tensor]) -> list[str]:
    suffix = ".weight_scale"
    return [name.removesuffix(suffix) for name in scales if name.endswith(suffix)]
