import shutil
from pathlib import Path

import pytest

from nvvl.errors import OutputError, require_disk


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
