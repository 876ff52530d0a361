"""The folder of graphs: what is in it, and what is refused."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from nvvl.errors import CheckpointError, OutputError, RecipeError
from nvvl.export.onnx_export import export_onnx
from nvvl.export.onnx_recipe import GraphRecipe

UP_PROJ = "language_model.backbone.layers.6.mixer.up_proj"
SMALL = GraphRecipe(kv_capacity=64, prefill_tokens=32)

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(written: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Graphs of the mixed checkpoint, which has every format."""
    dest = tmp_path_factory.mktemp("graphs") / "mixed"
    export_onnx(written("mixed"), dest, SMALL, command=["nvvl", "export"])
    return dest


def test_weights_keep_names_and_bytes_of_the_checkpoint(exported: Path, written: Folders) -> None:
    manifest = json.loads((written("mixed") / "manifest.json").read_text())
    model = onnx.load(exported / "decode.onnx")
    kinds = set()
    for tensor in model.graph.initializer:
        if tensor.name.startswith("language_model") and ".mixer." in tensor.name:
            if tensor.name.endswith(("A_log", ".D", "dt_bias", "norm.weight")):
                continue
            kinds.add(onnx.TensorProto.DataType.Name(tensor.data_type))
            digest = hashlib.sha256(tensor.raw_data).hexdigest()
            assert digest == manifest["tensors"][tensor.name]["sha256"], tensor.name
    assert kinds == {"BFLOAT16", "FLOAT8E4M3FN", "FLOAT4E2M1", "FLOAT"}


def test_prefill_and_decode_share_one_data_file(exported: Path) -> None:
    places = []
    for name in ("prefill", "decode"):
        model = onnx.load(exported / f"{name}.onnx", load_external_data=False)
        places.append(
            {
                tensor.name: [(entry.key, entry.value) for entry in tensor.external_data]
                for tensor in model.graph.initializer
                if tensor.external_data
            }
        )
    assert places[0]
    assert places[0] == places[1]


def test_node_names_follow_module_names_and_are_unique(exported: Path) -> None:
    for name in ("vision", "prefill", "decode"):
        model = onnx.load(exported / f"{name}.onnx", load_external_data=False)
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        assert all(re.match(r"(language_model|vision_model|mlp1)[./]", n) for n in names)
    assert f"{UP_PROJ}/MatMul" in names


def test_io_json_describes_the_graphs(exported: Path) -> None:
    io = json.loads((exported / "io.json").read_text())
    assert list(io["graphs"]) == ["vision", "prefill", "decode"]
    dynamic = set()
    for name, entry in io["graphs"].items():
        graph = onnx.load(exported / entry["file"], load_external_data=False).graph
        assert [port["name"] for port in entry["inputs"]] == [value.name for value in graph.input]
        assert [port["name"] for port in entry["outputs"]] == [value.name for value in graph.output]
        for port, value in zip(entry["inputs"], graph.input, strict=True):
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert port["shape"] == dims
            dynamic |= {dim for dim in dims if isinstance(dim, str)}
        for state in entry["states"]:
            assert state["input"] in {value.name for value in graph.input}
            assert state["output"] in {value.name for value in graph.output}
        assert bool(entry["states"]) == (name != "vision")
    assert io["dimensions"].keys() == dynamic
    assert io["dimensions"]["tokens"] == [1, 32, 32]


def test_manifest_has_the_hash_of_every_file_and_tensor(exported: Path, written: Folders) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    names = {path.name for path in exported.iterdir()} - {"manifest.json"}
    assert manifest["files"].keys() == names
    for name, sha256 in manifest["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == sha256
    of_run = json.loads((written("mixed") / "manifest.json").read_text())
    recorded = {name: entry["sha256"] for name, entry in of_run["tensors"].items()}
    assert manifest["checkpoint"]["tensors"] == recorded


def test_same_checkpoint_gives_the_same_bytes(
    exported: Path, written: Folders, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    export_onnx(written("mixed"), again, SMALL, command=["nvvl", "export"])
    for path in exported.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_full_disk_is_refused_and_leaves_nothing(
    written: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"graphs need about \d+ bytes, the disk has 1000 free"):
        export_onnx(written("mixed"), tmp_path / "graphs", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_altered_weight_is_refused_and_leaves_nothing(copy_of: Folders, tmp_path: Path) -> None:
    run = copy_of("nvfp4")
    data = bytearray((run / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="bytes changed since the checkpoint was written"):
        export_onnx(run, tmp_path / "graphs", SMALL)
    assert list(tmp_path.glob("*graphs*")) == []


def test_altered_config_is_refused(copy_of: Folders, tmp_path: Path) -> None:
    run = copy_of("fp8")
    config = json.loads((run / "config.json").read_text())
    config["llm_config"]["layer_norm_epsilon"] = 1e-3
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: changed since"):
        export_onnx(run, tmp_path / "graphs", SMALL)


def test_quantized_checkpoint_without_manifest_is_refused(copy_of: Folders, tmp_path: Path) -> None:
    run = copy_of("fp8")
    (run / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        export_onnx(run, tmp_path / "graphs", SMALL)


def test_unexpected_tensor_is_refused_before_anything_is_written(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_checkpoint(tmp_path / "run", replace={"mlp1.4.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"mlp1\.4\.weight is unexpected"):
        export_onnx(run, tmp_path / "graphs", SMALL)


def test_existing_folder_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "mine").touch()
    with pytest.raises(OutputError, match="so it is not replaced"):
        export_onnx(source, tmp_path / "graphs", SMALL)
    assert [path.name for path in (tmp_path / "graphs").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtyp": "bf16"}, "unknown key 'dtyp'; did you mean dtype"),
        ({"dtype": "f64"}, "dtype: required one of bf16, f32, got 'f64'"),
        ({"kv_capacity": 0}, "kv_capacity: required an integer from 1 to 1048576, got 0"),
        ({"kv_capacity": 10**20}, "kv_capacity: required an integer from 1 to 1048576, got 1"),
        ({"kv_capacity": 100, "prefill_tokens": 200}, "200 new tokens do not fit"),
    ],
)
def test_impossible_recipe_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GraphRecipe.from_dict(values)


def test_recipe_file_maps_to_fields(tmp_path: Path) -> None:
    path = tmp_path / "graphs.toml"
    path.write_text('kv_cache = "growing"\nmax_tiles = 3\n', encoding="utf-8")
    assert GraphRecipe.from_toml(path) == GraphRecipe(kv_cache="growing", max_tiles=3)
    with pytest.raises(RecipeError, match="cannot be read"):
        GraphRecipe.from_toml(tmp_path / "none.toml")
