import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvvl.distill.write import write_bf16
from nvvl.errors import CheckpointError, DataError
from nvvl.quantize.manifest import Manifest
from nvvl.reports.deployment import Engine, find_engines
from nvvl.reports.evidence import gather_evidence, read_proof
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.publish import publish
from nvvl.reports.run import describe_model

CHECK = {"rule": "H1", "name": "hashes", "status": "passed", "detail": "ok", "passed": True}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """A run of a checkpoint that nvvl did not write."""
    folder = tmp_path / "fp8"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return SimpleNamespace(label="FP8", model=folder, out=tmp_path, manifest_sha256=None)


def write_proof(path: Path, folder: Path, **changes: object) -> Path:
    values: dict[str, object] = {
        "folder": str(folder),
        "manifest_sha256": None,
        "passed": True,
        "counts": {"passed": 1, "failed": 0, "not checked": 0},
        "checks": [CHECK],
        "sqnr_db": {"a.0.b": 31.5, "a.1.b": None},
    }
    path.write_text(json.dumps(values | changes))
    return path


def test_proof_beside_a_checkpoint_is_found(run: Any, tmp_path: Path) -> None:
    assert gather_evidence([run])["FP8"].proof is None
    write_proof(tmp_path / "verify-fp8.json", run.model)
    known = gather_evidence([run])["FP8"]
    assert known.proof is not None
    assert known.proof.passed
    assert known.proof.sqnr_db == {"a.0.b": 31.5}
    assert [(check.rule, check.status) for check in known.proof.checks] == [("H1", "passed")]
    assert (known.manifest, known.recipe, known.source_sha256) == (None, None, None)


def test_given_proof_wins_over_the_one_found(run: Any, tmp_path: Path) -> None:
    write_proof(tmp_path / "verify-fp8.json", run.model)
    given = write_proof(tmp_path / "given.json", run.model, passed=False)
    known = gather_evidence([run], [given])["FP8"]
    assert known.proof is not None
    assert not known.proof.passed


def test_proof_older_than_its_checkpoint_is_refused(run: Any, tmp_path: Path) -> None:
    proof = write_proof(tmp_path / "verify-fp8.json", run.model)
    written = (run.model / "config.json").stat().st_mtime
    os.utime(proof, (written - 1, written - 1))
    with pytest.raises(DataError, match=r"older than the checkpoint .* run nvvl verify again"):
        gather_evidence([run])


def test_proof_of_what_was_there_before_is_refused_whatever_the_times(
    run: Any, tmp_path: Path
) -> None:
    digest = hashlib.sha256(b"{}").hexdigest()
    proof = write_proof(tmp_path / "verify-fp8.json", run.model, manifest_sha256=digest)
    with pytest.raises(DataError, match=r"proves another checkpoint than what is now at"):
        gather_evidence([run])
    write_proof(proof, run.model, passed="false")
    with pytest.raises(DataError, match=r"passed: required true or false, got \"false\""):
        gather_evidence([run])


def test_proof_of_another_checkpoint_is_refused(run: Any, tmp_path: Path) -> None:
    write_proof(tmp_path / "verify-fp8.json", tmp_path / "nvfp4")
    with pytest.raises(DataError, match=r"verify-fp8\.json: proves .*nvfp4, not the fp8 beside it"):
        gather_evidence([run])


def test_checkpoint_written_anew_since_it_was_asked_is_refused(
    tiny_checkpoint: Path, make_harness_run: Callable[..., HarnessRun], tmp_path: Path
) -> None:
    folder = tmp_path / "rotated"
    folder.mkdir()
    write_bf16(tiny_checkpoint, folder, {}, command=("nvvl", "rotate"))
    about = describe_model(folder)
    asked = make_harness_run("rotated", {"acc": [1.0]})
    asked = replace(asked, model=folder, manifest_sha256=about["manifest_sha256"])
    assert gather_evidence([asked])["rotated"].manifest is not None
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"rotate"', '"distill"'))
    with pytest.raises(DataError, match=r"rotated was written anew since it was asked"):
        gather_evidence([asked])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value: line 1"),
        ("[]", "a value in it is of another kind"),
        ("{}", "folder is missing"),
        ('{"folder": 1, "passed": true}', "a value in it is of another kind"),
    ],
)
def test_file_that_is_no_proof_is_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "proof.json"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"proof\.json: required the output .* \({reason}"):
        read_proof(path)


def test_what_was_done_to_the_weights_is_told(run: Any) -> None:
    assert gather_evidence([run])["FP8"].changes == ()
    rotation = {"data": {"set": "default", "num_items": 1576}, "harm": 0.591}
    (run.model / "rotation.json").write_text(json.dumps(rotation))
    assert gather_evidence([run])["FP8"].changes == (
        (
            "Rotated",
            "into bases learned from 1,576 items of default, where rounding is expected to do "
            "0.59 times the harm",
        ),
    )


def test_bf16_weights_that_nvvl_wrote_are_reported_without_a_recipe(
    tiny_checkpoint: Path, make_harness_run: Callable[..., HarnessRun], tmp_path: Path
) -> None:
    rotated = tmp_path / "rotated"
    rotated.mkdir()
    rotation = {"data": {"set": "default", "num_items": 1576}, "harm": 0.591}
    write_bf16(
        tiny_checkpoint, rotated, {}, command=("nvvl", "rotate"), files={"rotation.json": rotation}
    )
    runs = [
        replace(make_harness_run(label, {"acc": [1.0, 0.0]}), model=folder)
        for label, folder in (("BF16", tiny_checkpoint), ("rotated", rotated))
    ]
    known = gather_evidence(runs)["rotated"]
    assert known.manifest is not None
    assert (known.recipe, known.num_linears) == (None, {})
    published = publish(runs, tmp_path / "report")
    assert published.cards == {}
    page = published.page.read_text(encoding="utf-8")
    assert "<code>nvvl rotate</code>" in page
    assert "<dt>Rotated</dt>" in page
    for absent in ("<dt>Linears</dt>", "<dt>Calibration</dt>", "Recipe"):
        assert absent not in page


def test_quantized_checkpoint_without_its_recipe_is_refused(run: Any) -> None:
    Manifest(
        format="fp8", command=(), source={}, tensors={}, files={}, items=(), versions={}
    ).write(run.model)
    with pytest.raises(CheckpointError, match=r"recipe\.json: cannot be read"):
        gather_evidence([run])


def test_file_that_is_no_rotation_is_named(run: Any) -> None:
    (run.model / "rotation.json").write_text('{"harm": 1}')
    with pytest.raises(DataError, match=r"rotation\.json: not what nvvl rotate wrote"):
        gather_evidence([run])


def test_missing_proof_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        read_proof(tmp_path / "nowhere.json")


def test_engines_beside_a_checkpoint_are_found_if_they_are_of_it(tmp_path: Path) -> None:
    checkpoint, folder = tmp_path / "nvfp4", tmp_path / "nvfp4-engines"
    checkpoint.mkdir()
    assert find_engines(checkpoint) is None
    (checkpoint / "manifest.json").write_text("{}")
    assert find_engines(checkpoint) is None
    folder.mkdir()
    values = {
        "builder": {"name": "tensorrt-rtx", "version": "1.7"},
        "targets": ["sm120"],
        "checkpoint": {"manifest_sha256": hashlib.sha256(b"{}").hexdigest()},
        "engines": {"vision": {"size_bytes": 5, "build_seconds": 1.5, "file": "vision.engine"}},
    }
    (folder / "manifest.json").write_text(json.dumps(values))
    found = find_engines(checkpoint)
    assert found is not None
    assert (found.builder, found.targets) == ("tensorrt-rtx 1.7", ("sm120",))
    assert found.engines == {"vision": Engine(size_bytes=5, build_seconds=1.5)}
    (checkpoint / "manifest.json").write_text("{} ")
    with pytest.raises(DataError, match="engines of another checkpoint"):
        find_engines(checkpoint)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not a manifest of engines"):
        find_engines(checkpoint)
