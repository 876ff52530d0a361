"""What the verbs of reports make of their arguments."""

from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from nvvl.cli import app
from nvvl.errors import DataError
from nvvl.model.resolve import resolve_model
from nvvl.reports.command import name_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub whose models lie in folders named by a commit, as the library keeps them."""

    def download(hub_id: str, **_: object) -> str:
        folder = tmp_path / hub_id / COMMIT
        folder.mkdir(parents=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path


def test_model_by_hub_id_is_named_by_the_end_of_its_id(hub: Path) -> None:
    folder = hub / "fp8"
    folder.mkdir()
    assert name_models(["org/tiny-vl", str(folder), "embedded"], None) == {
        hub / "org/tiny-vl" / COMMIT: "tiny-vl",
        folder: "fp8",
        resolve_model("embedded").resolve(): "embedded",
    }


@pytest.mark.usefixtures("hub")
def test_ids_that_end_alike_need_labels() -> None:
    with pytest.raises(DataError, match=r"got tiny-vl, tiny-vl; tell them apart with --label"):
        name_models(["org/tiny-vl", "other/tiny-vl"], None)


@pytest.mark.usefixtures("hub")
def test_labels_name_models() -> None:
    named = name_models(["org/tiny-vl", "other/tiny-vl"], ["a", "b"])
    assert list(named.values()) == ["a", "b"]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("label", ["", ".", "..", "a/b", "a\nb", "a\0", "a\x1b[2J", "a\u2028b"])
def test_label_that_cannot_name_a_folder_is_refused(label: str) -> None:
    with pytest.raises(DataError, match="--label: required a name of one line without slashes"):
        name_models(["org/tiny-vl"], [label])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("evaluate MODEL --items HUGE", "line: has 17179869184 items, asked for 1"),
        ("evaluate MODEL --seed HUGE", "Invalid value for '--seed'"),
        ("evaluate MODEL --batch HUGE", "Invalid value for '--batch'"),
        ("evaluate MODEL --max-tiles HUGE", "--max-tiles: required 1 to 1024, got 1"),
        ("sweep evs MODEL --items HUGE", "video: has 17179869184 items, asked for 1"),
        ("sweep tiles MODEL --items HUGE", "page: has 17179869184 items, asked for 1"),
        ("sweep depth MODEL --teacher MODEL --items HUGE", "line: has 17179869184 items, asked"),
        ("sweep depth MODEL --teacher MODEL --timed 4", "and neither --value nor --timed"),
        ("sweep depth MODEL", "sweep depth: required --teacher"),
        ("lm-eval MODEL --task nvvl_copy --limit HUGE", "Invalid value for '--limit'"),
        ("demo --items HUGE", "line: has 17179869184 items, asked for 1"),
    ],
)
def test_what_would_never_end_or_is_of_another_kind_is_refused_at_once(
    arguments: str, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    words = {"MODEL": str(tiny_checkpoint), "HUGE": str(10**20)}
    out = ["-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*(words.get(w, w) for w in arguments.split()), *out])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
