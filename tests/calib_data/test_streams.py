"""Tables of the user's own are opened without a word to the network."""

import json
from pathlib import Path

import datasets.load
import pytest

from nvvl.calib_data.streams import open_dataset


def test_local_file_is_opened_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)  # the library's default
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append("session"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "word"}) + "\n")
    assert list(open_dataset("json", data_files=str(path), split="train")) == [{"text": "word"}]
    assert asked == []
    # what it is kept from, or this test would prove nothing
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
    assert asked == ["session"]
