"""Models by Hub id: the Hub's own cache, with its links, and no network. Nothing leaves here."""

import errno
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from typer.testing import CliRunner, Result

from nvvl.cli import app
from nvvl.errors import CheckpointError, ConfigError
from nvvl.model.checkpoint import Checkpoint
from nvvl.model.load import resolve_model
from nvvl.quantize.presets import nvfp4_w4a16
from nvvl.quantize.walk import quantize_checkpoint

HUB_ID = "org/tiny-vl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and HF_HUB_OFFLINE=1; the library reads both once, when it is imported."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


@pytest.fixture
def snapshot(offline: Path, tiny_checkpoint: Path) -> Path:
    """The tiny model as the library keeps it: files by hash, and a folder of links per commit."""
    repository = offline / "models--org--tiny-vl"
    folder = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for index, path in enumerate(sorted(tiny_checkpoint.iterdir())):
        shutil.copyfile(path, repository / "blobs" / f"{index:040x}")
        (folder / path.name).symlink_to(Path("..") / ".." / "blobs" / f"{index:040x}")
    return folder


def test_cached_model_is_found_without_a_network(snapshot: Path, tiny_checkpoint: Path) -> None:
    assert resolve_model(HUB_ID) == snapshot
    planned = [json.loads(run("plan", model, "--json").stdout) for model in (HUB_ID, snapshot)]
    assert planned[0]["output_bytes"] == planned[1]["output_bytes"]
    assert planned[0]["exact"]


def test_links_of_the_cache_give_the_bytes_of_a_folder(
    snapshot: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    outs = tmp_path / "by id", tmp_path / "by folder"
    for source, out in zip((resolve_model(HUB_ID), tiny_checkpoint), outs, strict=True):
        quantize_checkpoint(source, out, nvfp4_w4a16(), None)
    by_id, by_folder = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outs)
    assert by_id == by_folder
    assert not [path for path in outs[0].iterdir() if path.is_symlink()]


def test_output_of_a_hub_model_has_the_code_that_its_config_names(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"AutoConfig": "configuration.Config", "AutoTokenizer": ["tokenization.Slow", None]}
    remote = make_checkpoint(tmp_path / "remote", auto_map=names)
    for name in ("configuration.py", "tokenization.py"):
        (remote / name).write_text("raise RuntimeError('nvvl runs no code of a model')\n")

    def download(_: str, *, allow_patterns: list[str]) -> str:
        cached = tmp_path / "cached"
        cached.mkdir()
        for path in remote.iterdir():
            if any(fnmatchcase(path.name, pattern) for pattern in allow_patterns):
                shutil.copyfile(path, cached / path.name)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    out = tmp_path / "out"
    quantize_checkpoint(resolve_model(HUB_ID), out, nvfp4_w4a16(), None)
    assert (out / "configuration.py").read_bytes() == (remote / "configuration.py").read_bytes()
    served = json.loads(run("export", "serve", out, "--for", "vllm", "--json").stdout)
    assert [rule["status"] for rule in served["rules"] if rule["rule"] == "C14"] == ["passed"]
    assert "--trust-remote-code" in served["commands"][0]


def test_model_that_is_not_cached_is_one_line_that_says_so(offline: Path, tmp_path: Path) -> None:
    result = run("quantize", "nvfp4-w4a16", HUB_ID, tmp_path / "out")
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {HUB_ID}: no such folder, and the Hub did not give a model")
    assert "outgoing traffic has been disabled" in line
    assert "download it elsewhere and pass the folder" in line
    assert not (tmp_path / "out").exists()


def test_weights_that_left_the_cache_are_named(snapshot: Path) -> None:
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(CheckpointError, match=r"names model\.safetensors, which the folder lacks"):
        Checkpoint(resolve_model(HUB_ID))


def test_folder_that_may_not_be_entered_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(ConfigError, match=r"/root/model: cannot be opened \(Permission denied\)"):
        resolve_model("/root/model")


@pytest.mark.parametrize("kind", [HTTPError, ConnectionError, TimeoutError])
def test_connection_that_breaks_is_one_clear_line(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        raise kind("the server hung up")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ConfigError, match=rf"{HUB_ID}: no such folder.*\(the server hung up\)"):
        resolve_model(HUB_ID)
