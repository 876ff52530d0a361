import hashlib
from pathlib import Path

from nvvl.model.hashing import changed_files, hash_file


def test_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "data").write_bytes(data)
    assert hash_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_missing_and_changed_files_are_listed_in_order(tmp_path: Path) -> None:
    names = ("same", "changed", "b lost", "folder", "a lost")
    for name in names:
        (tmp_path / name).write_text(name)
    recorded = {name: hash_file(tmp_path / name) for name in names}
    (tmp_path / "not recorded").write_text("")
    assert changed_files(tmp_path, recorded) == []
    (tmp_path / "changed").write_text("changes")
    for name in ("a lost", "b lost", "folder"):
        (tmp_path / name).unlink()
    (tmp_path / "folder").mkdir()
    assert changed_files(tmp_path, recorded) == ["a lost", "b lost", "changed", "folder"]
    assert changed_files(tmp_path / "nowhere", {}) == []
