import shutil
import time
from pathlib import Path

import pytest

from nvvl import compiler
from nvvl.compiler import load_library
from nvvl.errors import HardwareError

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C file, with the cache in tmp_path / "cache"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def cached(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "nvvl").iterdir())


@needs_compiler
def test_second_load_uses_the_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_library(source).answer() == 42
    (library,) = cached(source)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load_library(source).answer() == 42
    assert cached(source) == [library]


@needs_compiler
def test_changed_source_is_compiled_anew(source: Path) -> None:
    load_library(source)
    source.write_text("int answer(void) { return 43; }\n")
    assert load_library(source).answer() == 43
    assert len(cached(source)) == 2


@needs_compiler
def test_changed_header_is_compiled_anew(source: Path) -> None:
    header = source.with_name("answer_number.h")
    header.write_text("#define NUMBER 1\n")
    source.write_text('#include "answer_number.h"\nint answer(void) { return NUMBER; }\n')
    assert load_library(source).answer() == 1
    header.write_text("#define NUMBER 2\n")
    assert load_library(source).answer() == 2


@needs_compiler
def test_compiler_error_is_reported_and_leaves_nothing(source: Path) -> None:
    source.write_text("this is not C\n")
    with pytest.raises(HardwareError, match=r"cc could not compile answer\.c: .*:1:1: error: "):
        load_library(source)
    assert cached(source) == []


def test_missing_compiler_is_reported(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.raises(HardwareError, match="no C compiler: no-such-compiler is not on PATH"):
        load_library(source)


@pytest.mark.parametrize(
    ("said", "message"),
    [("'", "CC: .* is no command .*; unset it"), (" ", "CC: required the command of a C compiler")],
)
def test_what_is_no_command_is_reported(
    said: str, message: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", said)
    with pytest.raises(HardwareError, match=message):
        load_library(source)


@needs_compiler
def test_compiler_may_have_arguments(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -Dunused=1")
    assert load_library(source).answer() == 42


def test_compiler_that_does_not_end_is_ended_with_all_it_started(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = source.parent / "slow"
    script.write_text('#!/bin/sh\nsleep 600 &\necho $! > "$(dirname "$0")/child"\nwait\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(compiler, "_TIMEOUT_S", 5)
    with pytest.raises(HardwareError, match="slow: no result after 5 s"):
        load_library(source)
    child = Path("/proc") / (source.parent / "child").read_text().strip() / "stat"
    for _ in range(100):  # a signal takes a moment
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("what the compiler started goes on")


@needs_compiler
def test_unwritable_cache_names_the_way_out(source: Path) -> None:
    (source.parent / "cache").write_text("a file where the folder should be")
    with pytest.raises(HardwareError, match="set XDG_CACHE_HOME"):
        load_library(source)


@needs_compiler
def test_damaged_library_names_its_path(source: Path) -> None:
    library = compiler.cache_folder() / f"answer-{compiler._digest(source)}.so"
    library.parent.mkdir(parents=True)
    library.write_text("not a library")
    with pytest.raises(HardwareError, match=library.name):
        load_library(source)
