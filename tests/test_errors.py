import shutil
from pathlib import Path

import pytest

from nvvl.errors import OutputError, name_some, require_disk, require_unread


def test_disk_that_is_too_small_is_refused_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    require_disk(tmp_path, 100, "the graphs need about")
    with pytest.raises(OutputError) as refused:
        require_disk(tmp_path, 142, "the graphs need about")
    assert str(refused.value) == (
        f"{tmp_path}: the graphs need about 142 bytes, the disk has 100 free; free 42 bytes or "
        "choose another disk"
    )


def test_output_within_what_is_read_is_refused(tmp_path: Path) -> None:
    source, link = tmp_path / "model", tmp_path / "link"
    source.mkdir()
    link.symlink_to(source)
    for out in (source / "out", source / "a" / "b", link / "out"):
        with pytest.raises(OutputError, match=rf"out: lies in {source}, |b: lies in {source}, "):
            require_unread(out, [source])
        require_unread(out, [source], within=True)
    require_unread(tmp_path / "model-out", [source])


def test_only_the_first_of_many_names_are_named() -> None:
    assert [name_some(["a", "b", "c"], limit=limit) for limit in (2, 3)] == [
        "a, b and 1 more",
        "a, b, c",
    ]
