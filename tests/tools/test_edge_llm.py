"""What `make interop-edge` compares: what the exporter keeps is found, what it lost is named."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from nvvl.tools.interop.edge_llm import LANGUAGE, VISION, compare, read_digests

NORM = "language_model.backbone.norm_f.weight"
CODES = "language_model.layer.weight"
SCALE = "language_model.layer.weight_scale"
A_LOG = "language_model.mixer.A_log"


def make_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        NORM: torch.randn(8, generator=generator).bfloat16(),
        CODES: torch.randint(0, 256, (4, 4), dtype=torch.uint8, generator=generator),
        SCALE: torch.rand((), generator=generator),
        A_LOG: torch.rand(4, generator=generator),
        "vision_model.patch_generator.embedder.weight": torch.ones(2),
    }


def write_graph(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write a graph as the exporter does: half precision, packed codes, -exp(A_log)."""
    initializers = []
    for name, tensor in tensors.items():
        if name == CODES:
            data = tensor.numpy().tobytes()
            initializers.append(
                helper.make_tensor(name, TensorProto.FLOAT4E2M1, [4, 8], data, True)
            )
        elif name == A_LOG:
            initializers.append(numpy_helper.from_array(-np.exp(tensor.numpy()), name))
        elif name == NORM:
            initializers.append(numpy_helper.from_array(tensor.half().numpy(), name))
        else:
            initializers.append(numpy_helper.from_array(tensor.numpy(), name))
    folder.mkdir(exist_ok=True)
    onnx.save(
        helper.make_model(helper.make_graph([], "g", [], [], initializers)), folder / "model.onnx"
    )


def test_every_tensor_is_found(tmp_path: Path) -> None:
    tensors = make_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    write_graph(tmp_path / "llm", tensors)
    assert compare(tmp_path, read_digests(tmp_path / "llm"), LANGUAGE) == (4, [])
    # the patch generator is computed beside the graph
    assert compare(tmp_path, read_digests(tmp_path / "llm"), VISION) == (0, [])


@pytest.mark.parametrize("name", [NORM, CODES, SCALE, A_LOG])
def test_altered_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = make_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    changed = tensors[name].clone().flatten()
    changed[0] += 1
    write_graph(tmp_path / "llm", tensors | {name: changed.view(tensors[name].shape)})
    assert compare(tmp_path, read_digests(tmp_path / "llm"), LANGUAGE) == (3, [name])


def test_tensor_beside_the_graph_counts(tmp_path: Path) -> None:
    tensors = make_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if name != NORM}
    write_graph(tmp_path / "llm", rest)
    assert compare(tmp_path, read_digests(tmp_path / "llm"), LANGUAGE)[1] == [NORM]
    save_file({"w": tensors[NORM].half()}, tmp_path / "llm" / "embedding.safetensors")
    assert compare(tmp_path, read_digests(tmp_path / "llm"), LANGUAGE)[1] == []
