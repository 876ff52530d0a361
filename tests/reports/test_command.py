"""What the verbs of reports make of their arguments."""

from pathlib import Path

import huggingface_hub
import pytest

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
