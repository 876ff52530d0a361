"""Engines built for real by TensorRT-RTX, what is recorded of them, and what is refused."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from nvvl.cli import app
from nvvl.errors import EngineError, HardwareError, OutputError
from nvvl.export.engine import EngineOptions, build_engines
from nvvl.export.engine_memory import estimate_build_memory
from nvvl.export.engine_run import build_from_checkpoint, graph_bytes
from nvvl.export.engine_targets import TENSORRT, TENSORRT_RTX
from nvvl.export.onnx_export import export_onnx
from nvvl.export.onnx_recipe import GraphRecipe
from nvvl.export.parts import layer_sizes
from nvvl.export.shape_profile import Span
from nvvl.export.view import open_view

Folders = Callable[[str], Path]

pytestmark = pytest.mark.usefixtures("memory_for_engines")

RECIPE = GraphRecipe(kv_capacity=64, prefill_tokens=32, max_tiles=2)
BLACKWELL = EngineOptions(builder=TENSORRT_RTX, targets=("sm120",))
ENGINE_MAGIC = b"vtrt"


@pytest.fixture(scope="module")
def engines(written: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of the mixed checkpoint, whose layers have every format."""
    dest = tmp_path_factory.mktemp("engines") / "mixed"
    command = ["nvvl", "export", "engine"]
    build_from_checkpoint(written("mixed"), dest, RECIPE, BLACKWELL, command=command)
    return dest


@pytest.fixture(scope="module")
def fp8_graphs(written: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("graphs") / "fp8"
    export_onnx(written("fp8"), dest, RECIPE)
    return dest


@pytest.fixture
def graphs(fp8_graphs: Path, tmp_path: Path) -> Path:
    """A folder of graphs that a test may break."""
    return Path(shutil.copytree(fp8_graphs, tmp_path / "graphs"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read(folder: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return values


def rewrite(graphs: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph and its recorded hash, so that only the builder can object."""
    path = graphs / name
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    manifest = read(graphs, "manifest.json")
    manifest["files"][name] = sha256(path)
    (graphs / "manifest.json").write_text(json.dumps(manifest))


def test_folder_has_engines_and_what_a_runtime_needs(engines: Path) -> None:
    names = {path.name for path in engines.iterdir()}
    assert {"vision.engine", "prefill.engine", "decode.engine"} <= names
    assert {"config.json", "io.json", "tokenizer.json", "embedding.safetensors"} <= names
    assert not {name for name in names if name.endswith((".onnx", ".data"))}
    for name in ("vision", "prefill", "decode"):
        assert (engines / f"{name}.engine").read_bytes()[:4] == ENGINE_MAGIC


def test_manifest_records_what_engines_were_made_from(engines: Path, written: Folders) -> None:
    manifest = read(engines, "manifest.json")
    assert manifest["builder"]["name"] == "tensorrt-rtx"
    assert manifest["targets"] == ["sm120"]
    assert manifest["command"] == ["nvvl", "export", "engine"]
    assert manifest["checkpoint"]["manifest_sha256"] == sha256(written("mixed") / "manifest.json")
    for name, entry in manifest["engines"].items():
        path = engines / entry["file"]
        assert entry["sha256"] == sha256(path), name
        assert entry["size_bytes"] == path.stat().st_size
        assert entry["build_seconds"] > 0
        assert entry["peak_memory_bytes"] > entry["size_bytes"]
        assert f"{name}.onnx" in manifest["graphs"][name]
    others = {path.name for path in engines.iterdir()} - {"manifest.json"}
    assert manifest["files"].keys() == {n for n in others if not n.endswith(".engine")}


def test_io_json_names_engines_and_the_shape_profile(engines: Path) -> None:
    io = read(engines, "io.json")
    assert {entry["file"] for entry in io["graphs"].values()} == {
        "vision.engine",
        "prefill.engine",
        "decode.engine",
    }
    assert io["dimensions"]["tokens"] == [1, 32, 32]
    assert io["dimensions"]["tiles"] == [1, 2, 2]


def test_builder_messages_are_kept(engines: Path) -> None:
    log = (engines / "build.log").read_text()
    assert log.count("Engine generation completed") == 3


def test_graphs_can_be_given_and_shapes_replaced(graphs: Path, tmp_path: Path) -> None:
    reported = []
    options = replace(
        BLACKWELL,
        targets=("sm89", "sm120"),
        spans={"tokens": Span(2, 4, 8), "batch": Span(1, 1, 1)},
    )
    result = build_engines(
        graphs, tmp_path / "engines", options, progress=lambda *step: reported.append(step)
    )
    assert list(result.engines) == ["vision", "prefill", "decode"]
    assert all(engine.path.is_file() for engine in result.engines.values())
    io = read(tmp_path / "engines", "io.json")
    assert (io["dimensions"]["tokens"], io["dimensions"]["batch"]) == ([2, 4, 8], [1, 1, 1])
    for name in result.engines:
        steps = [(done, every) for what, done, every in reported if what == f"build {name}"]
        assert steps == [(n + 1, steps[-1][1]) for n in range(steps[-1][1])]


def test_impossible_precision_is_refused_before_graphs_are_written(
    written: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvvl.export.engine_run.export_onnx", None)
    for scheme, target, precision in (("nvfp4", "sm89", "nvfp4"), ("fp8", "sm86", "fp8")):
        options = replace(BLACKWELL, targets=(target,))
        with pytest.raises(EngineError, match=f"--target {target}: it has no {precision}"):
            build_from_checkpoint(written(scheme), tmp_path / "engines", RECIPE, options)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_crashes_the_builder_is_refused(
    written: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, kv_dtype="fp8")
    export_onnx(written("nvfp4"), tmp_path / "graphs", recipe)
    monkeypatch.setattr("nvvl.export.engine_run.export_onnx", None)
    with pytest.raises(EngineError, match='kv_cache = "growing"'):
        build_from_checkpoint(written("nvfp4"), tmp_path / "engines", recipe, BLACKWELL)
    with pytest.raises(EngineError, match='kv_cache = "growing"'):
        build_engines(tmp_path / "graphs", tmp_path / "engines", BLACKWELL)
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


def test_growing_cache_and_vision_in_fp8_are_built(written: Folders, tmp_path: Path) -> None:
    recipe = replace(RECIPE, kv_dtype="fp8", kv_cache="growing", vision="fp8")
    result = build_from_checkpoint(written("nvfp4"), tmp_path / "engines", recipe, BLACKWELL)
    assert result.engines.keys() == {"vision", "prefill", "decode"}
    ports = read(tmp_path / "engines", "io.json")["graphs"]["decode"]["inputs"]
    assert {p["dtype"] for p in ports if p["name"].startswith("past_key")} == {"fp8"}


def test_fp8_of_the_graphs_alone_needs_hardware_that_has_it(source: Path, tmp_path: Path) -> None:
    options = replace(BLACKWELL, targets=("sm86",))
    for recipe in (
        replace(RECIPE, kv_dtype="fp8", kv_cache="growing"),
        replace(RECIPE, vision="fp8"),
    ):
        with pytest.raises(EngineError, match="--target sm86: it has no fp8"):
            build_from_checkpoint(source, tmp_path / "engines", recipe, options)


def test_too_little_memory_is_refused_and_parts_are_proposed(
    written: Folders, tmp_path: Path
) -> None:
    sizes = layer_sizes(graph_bytes(open_view(written("fp8")), RECIPE))
    options = replace(BLACKWELL, memory_bytes=estimate_build_memory(sum(sizes)) - 1)
    message = r"prefill: building takes about 0\.6 GB .* --memory allows 0\.6 GB.*--parts 2$"
    with pytest.raises(HardwareError, match=message):
        build_from_checkpoint(written("fp8"), tmp_path / "engines", RECIPE, options)


def test_graphs_too_large_for_the_machine_are_refused(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nvvl.export.engine.available_memory", lambda: 1000)
    with pytest.raises(HardwareError, match=r"vision: .*this machine has free.*more memory$"):
        build_engines(graphs, tmp_path / "engines", BLACKWELL)


def test_full_disk_is_refused(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"engines need about .* bytes, the disk has 1000 free"):
        build_engines(graphs, tmp_path / "engines", BLACKWELL)


@pytest.mark.parametrize("name", ["prefill.onnx", "language.data", "io.json", "config.json"])
def test_altered_graph_folder_is_refused(graphs: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((graphs / name).read_bytes())
    data[-2] ^= 32
    (graphs / name).write_bytes(data)
    with pytest.raises(EngineError, match=f"{name}: changed or lost since|not an io.json"):
        build_engines(graphs, tmp_path / "engines", BLACKWELL)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"files": [], "checkpoint": {}}', '{"files": {}, "checkpoint": {}}']
)
def test_manifest_of_something_else_is_refused(graphs: Path, tmp_path: Path, text: str) -> None:
    (graphs / "manifest.json").write_text(text)
    with pytest.raises(EngineError, match=r"manifest\.json: .*export again"):
        build_engines(graphs, tmp_path / "engines", BLACKWELL)


def test_lost_manifest_is_refused(graphs: Path, tmp_path: Path) -> None:
    (graphs / "manifest.json").unlink()
    with pytest.raises(EngineError, match=r"manifest\.json: cannot be read .*export again"):
        build_engines(graphs, tmp_path / "engines", BLACKWELL)


def test_lost_graph_is_refused(graphs: Path, tmp_path: Path) -> None:
    (graphs / "decode.onnx").unlink()
    with pytest.raises(EngineError, match=r"decode\.onnx: changed or lost since"):
        build_engines(graphs, tmp_path / "engines", BLACKWELL)


def test_refusal_of_the_builder_is_shown_and_leaves_only_the_log(
    graphs: Path, tmp_path: Path
) -> None:
    def break_it(model: onnx.ModelProto) -> None:
        model.graph.node[0].op_type = "NoSuchOperator"

    rewrite(graphs, "vision.onnx", break_it)
    with pytest.raises(
        EngineError, match=r"vision: tensorrt_rtx refused: .*NoSuchOperator"
    ) as info:
        build_engines(graphs, tmp_path / "engines", BLACKWELL)
    log = tmp_path / "engines.build.log"
    assert str(info.value).endswith(f"log: {log}")
    assert "NoSuchOperator" in log.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engines.build.log", "graphs"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL"),
        ("import os; os._exit(3)", "process ended with 3 and no engine"),
        ("raise RuntimeError('libcudart is missing')", "process ended with 1 and no engine"),
    ],
)
def test_dead_builder_is_reported(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "dead_builder.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    options = replace(BLACKWELL, builder=replace(TENSORRT_RTX, module="dead_builder"))
    with pytest.raises(EngineError, match=f"vision: .*{message}"):
        build_engines(graphs, tmp_path / "engines", options)
    assert not (tmp_path / "engines").exists()
    log = (tmp_path / "engines.build.log").read_text()
    assert ("libcudart is missing" in log) == ("libcudart" in body)


def test_interrupt_ends_the_builder_and_leaves_nothing(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*step: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(graphs, tmp_path / "engines", BLACKWELL, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["graphs"]


FAKE_TENSORRT = Path(__file__).with_name("fake_tensorrt.py")


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineOptions:
    """Options for TensorRT, of which a stand-in is installed."""
    packages = tmp_path / "packages"
    packages.mkdir()
    shutil.copyfile(FAKE_TENSORRT, packages / "tensorrt.py")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    return EngineOptions(builder=TENSORRT, targets=("sm90",))


def test_tensorrt_keeps_its_timing_cache_and_names_no_target(
    graphs: Path, tmp_path: Path, tensorrt: EngineOptions
) -> None:
    cache = tmp_path / "times.bin"
    cache.write_bytes(b"old")
    options = replace(tensorrt, timing_cache=cache, spans={"batch": Span(1, 2, 3)})
    build_engines(graphs, tmp_path / "engines", options)
    assert cache.read_bytes() == b"old+vision+prefill+decode"
    built = json.loads((tmp_path / "engines" / "decode.engine").read_bytes())
    assert built["num_targets"] == 0
    assert built["profile"]["past_ssm.0"][2][0] == 3
    manifest = read(tmp_path / "engines", "manifest.json")
    assert manifest["builder"] == {"name": "tensorrt", "version": "11.4.0.fake"}
    assert manifest["flags"]["timing_cache"] is True


def test_parts_become_engines_of_their_own(
    written: Folders, tmp_path: Path, tensorrt: EngineOptions
) -> None:
    dest = tmp_path / "engines"
    options = replace(tensorrt, targets=("sm100",))
    build_from_checkpoint(written("nvfp4"), dest, replace(RECIPE, num_parts=2), options)
    names = {"vision", "prefill.0", "prefill.1", "decode.0", "decode.1"}
    assert {path.stem for path in dest.glob("*.engine")} == names
    assert read(dest, "io.json")["parts"]["prefill"] == ["prefill.0", "prefill.1"]
    assert read(dest, "manifest.json")["engines"].keys() == names
    profiles = {name: json.loads((dest / f"{name}.engine").read_bytes()) for name in names}
    assert "hidden_in" in profiles["decode.1"]["profile"]
    assert "hidden_in" not in profiles["decode.0"]["profile"]


def test_timing_cache_is_refused_where_nothing_is_timed(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="--timing-cache: tensorrt-rtx measures nothing"):
        replace(BLACKWELL, timing_cache=tmp_path / "times")


@pytest.mark.parametrize("name", ["", "nowhere/times.bin"])
def test_timing_cache_that_cannot_be_written_is_refused_before_anything_is_built(
    tmp_path: Path, tensorrt: EngineOptions, name: str
) -> None:
    with pytest.raises(EngineError, match="--timing-cache: required a file in a folder"):
        replace(tensorrt, timing_cache=tmp_path / name)


def test_timing_cache_of_another_gpu_is_refused_and_kept(
    graphs: Path, tmp_path: Path, tensorrt: EngineOptions
) -> None:
    cache = tmp_path / "times.bin"
    cache.write_bytes(b"of another GPU")
    with pytest.raises(EngineError, match=r"times\.bin: the timing cache is of another GPU"):
        build_engines(graphs, tmp_path / "engines", replace(tensorrt, timing_cache=cache))
    assert cache.read_bytes() == b"of another GPU"
    assert not (tmp_path / "engines").exists()


def test_engines_may_lie_in_the_folder_of_graphs(graphs: Path, tensorrt: EngineOptions) -> None:
    build_engines(graphs, graphs / "engines", tensorrt)
    names = {path.name for path in (graphs / "engines").iterdir()}
    assert {"vision.engine", "tokenizer.json", "embedding.safetensors"} < names


def test_current_folder_can_be_the_destination(
    graphs: Path, tmp_path: Path, tensorrt: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest = tmp_path / "engines"
    dest.mkdir()
    monkeypatch.chdir(dest)
    result = build_engines(Path("../graphs"), Path("."), tensorrt, overwrite=True)
    assert result.folder == dest
    assert {engine.path for engine in result.engines.values()} == set(dest.glob("*.engine"))
    assert len(result.engines) == 3


def test_help_says_that_memory_is_compared_with_an_estimate() -> None:
    shown = CliRunner().invoke(app, ["export", "engine", "--help"]).stdout
    words = " ".join(shown.replace("│", " ").split())
    assert "by an estimate, take more memory" in words
    assert "Let no process take more" not in words


def test_existing_folder_is_kept(graphs: Path, tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        build_engines(graphs, tmp_path / "engines", BLACKWELL)


def test_worker_loads_neither_torch_nor_onnx() -> None:
    code = "import sys, nvvl.export.engine_worker; print({'torch', 'onnx'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
