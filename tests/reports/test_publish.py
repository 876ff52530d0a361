"""What a report replaces of that which is there before it, and what it leaves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nvvl.cli import app
from nvvl.errors import DataError, OutputError
from nvvl.quantize.presets import load_recipe
from nvvl.quantize.walk import quantize_checkpoint
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.publish import publish, require_publishable


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def w4(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized checkpoint, which gets a card."""
    out = tmp_path_factory.mktemp("checkpoints") / "w4"
    quantize_checkpoint(tiny_checkpoint, out, load_recipe("nvfp4-w4a16"), None)
    return out


@pytest.fixture
def runs(
    make_harness_run: Callable[..., HarnessRun], tiny_checkpoint: Path, w4: Path
) -> list[HarnessRun]:
    """A baseline, and the quantized checkpoint."""
    return [
        replace(make_harness_run(label, {"acc": [1.0, 0.0]}), model=folder)
        for label, folder in (("BF16", tiny_checkpoint), ("W4", w4))
    ]


def test_report_that_nobody_changed_is_written_again(
    runs: list[HarnessRun], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    publish(runs, out)
    before = read_all(out)
    assert set(before) == {"report.html", "report.md", "report.json", "cards/W4/README.md"}
    publish(runs, out)
    assert read_all(out) == before


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json", "cards/W4/README.md"])
@pytest.mark.parametrize("content", ["mine", '{"nvvl_version": "0.1.0"}', "", "[" * 100_000])
def test_file_of_the_user_is_replaced_only_if_asked(
    name: str, content: str, runs: list[HarnessRun], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text(content)
    with pytest.raises(OutputError, match=rf"{name}: is there and was not .* say --overwrite"):
        publish(runs, out)
    assert read_all(out) == {name: content.encode()}
    publish(runs, out, overwrite=True)
    assert len(read_all(out)) == 4
    publish(runs, out)


def test_card_that_was_filled_in_is_kept(runs: list[HarnessRun], tmp_path: Path) -> None:
    card = publish(runs, tmp_path / "report").cards["W4"]
    filled = card.read_text("utf-8").replace("# license: (of the", "license: apache-2.0 # (of the")
    card.write_text(filled, "utf-8")
    with pytest.raises(OutputError, match=r"README\.md: .* was changed since"):
        publish(runs, tmp_path / "report")
    assert card.read_text("utf-8") == filled


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_page_beside_a_checkpoint_does_not_replace_its_files(
    name: str, runs: list[HarnessRun], w4: Path
) -> None:
    before = read_all(w4)
    with pytest.raises(OutputError, match=rf"{name}: is there and was not written by nvvl report"):
        publish(runs, (w4 / name).with_suffix(".html"))
    assert read_all(w4) == before


def test_report_does_not_take_the_place_of_what_it_is_made_of(
    runs: list[HarnessRun], tmp_path: Path
) -> None:
    run = replace(runs[0], out=tmp_path / "run")
    for name in ("run.html", "lm-eval.html"):
        with pytest.raises(OutputError, match=r"\.json: holds .*, which is read"):
            publish([run], tmp_path / "run" / name)
    for sweep in ("sweep-evs", "depth"):
        with pytest.raises(OutputError, match=r"\.json: holds .*, which is read"):
            publish([run], tmp_path / f"{sweep}.html", sweeps=[tmp_path], overwrite=True)


def test_what_is_in_the_way_is_named_before_anything_is_written(
    runs: list[HarnessRun], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputError, match="file: required a folder for the report, got a file"):
        publish(runs, tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match=r"page\.html: required a file of the report, got a fol"):
        publish(runs, tmp_path / "page.html", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "page.html"}


@pytest.mark.parametrize(
    ("out", "label"), [("runs", "report.html"), ("runs", "cards"), ("runs.html", "BF16")]
)
def test_run_cannot_lie_where_the_report_goes(out: str, label: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a run cannot lie there, for .* of the report does"):
        require_publishable(tmp_path / out, [label], runs=[tmp_path / out / label])


def test_evaluate_refuses_before_it_asks(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("mine")
    options = ["-o", str(tmp_path), "--items", "1", "--suite", "line"]
    done = CliRunner().invoke(app, ["evaluate", str(tiny_checkpoint), *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "report.md: is there and was not written by nvvl report" in done.stderr
    assert read_all(tmp_path) == {"report.md": b"mine"}
