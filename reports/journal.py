"""Writing a run so that it can be interrupted at any moment and go on.

Answers are appended by whole windows and forced to disk. A kill in the middle of a write leaves
half a line, which reading drops; a window of which only a part was kept is asked again.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvvl.errors import OutputError, writing
from nvvl.reports.harness_run import ITEMS_NAME, RESPONSES_NAME, RESULTS_NAME
from nvvl.reports.run import (
    ANSWERS_NAME,
    SETTINGS_NAME,
    Answer,
    AnswerKey,
    RunResult,
    Settings,
    check_label,
    load_run,
    name_setting,
    read_answers,
    read_settings,
    settings_by_name,
    value_in_words,
)


class Journal:
    """The growing run folder.

    Attributes:
        out: folder of the run.
        settings: of the run.
        answers: those there are.
        num_expected: how many there will be.
    """

    def __init__(self, out: Path, settings: Settings, answers: dict[AnswerKey, Answer]) -> None:
        self.out = out
        self.settings = settings
        self.answers = answers
        self.num_expected = settings.num_expected

    @classmethod
    def open(
        cls, out: Path, settings: Settings, about: Mapping[str, Any], *, overwrite: bool
    ) -> "Journal":
        """Start a run folder, or take up the one that is there.

        Args:
            out: folder of the run, made if needed.
            settings: of the run asked for.
            about: what else `RunResult` holds (label, model, format, sizes).
            overwrite: discard a run with other settings instead of refusing.

        Raises:
            DataError: if the label cannot name a folder, or what is there is damaged.
            OutputError: if ``out`` holds a run with other settings, or files of something else, or
                cannot be written.
        """
        check_label(about["label"], f"{out}: label")
        path = out / SETTINGS_NAME
        answers_path = out / ANSWERS_NAME
        answers: dict[AnswerKey, Answer] = {}
        if path.is_file():
            difference = _describe_difference(read_settings(path), settings)
            if difference is None:
                answers = {answer.key: answer for answer in read_answers(answers_path)}
            elif overwrite:
                with writing(answers_path):
                    answers_path.unlink(missing_ok=True)
            else:
                raise OutputError(
                    f"{out}: holds a run with {difference}; give another folder or --overwrite"
                )
        else:
            require_run_folder(out, {RESULTS_NAME, ITEMS_NAME, RESPONSES_NAME})
        values = {**about, "settings": asdict(settings)}
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(values, indent=2) + "\n")
        replace_text(answers_path, "".join(_to_line(answer) for answer in answers.values()))
        return cls(out, settings, answers)

    def append(self, answers: Iterable[Answer]) -> None:
        """Add answers; they are on disk when this returns.

        Raises:
            OutputError: if they cannot be written; those of before are kept.
        """
        batch = list(answers)
        self.answers.update((answer.key, answer) for answer in batch)
        path = self.out / ANSWERS_NAME
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(_to_line(answer) for answer in batch))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> RunResult:
        """Put the answers in the order of the suites and return the run."""
        ordered = [self.answers[key] for key in self.settings.expected_keys()]
        replace_text(self.out / ANSWERS_NAME, "".join(_to_line(answer) for answer in ordered))
        return load_run(self.out)


def _describe_difference(present: Settings, asked: Settings) -> str | None:
    """Name the first setting in which two runs differ; None if they are the same."""
    there, wanted = settings_by_name(asdict(present)), settings_by_name(asdict(asked))
    for name in {**wanted, **there}:
        before, now = there.get(name, "unknown"), wanted.get(name, "unknown")
        if before != now:
            words = f"{value_in_words(before)}, asked for {value_in_words(now)}"
            return f"{name_setting(name)} {words}"
    return None


def require_run_folder(out: Path, others: Collection[str]) -> None:
    """Refuse to begin a run in a folder that holds something else.

    Args:
        out: folder of the run, which need not exist.
        others: names of files that may lie there: those of a run of the other kind.

    Raises:
        OutputError: if it is a file, or has other files.
    """
    with writing(out):
        if out.exists() and (
            not out.is_dir() or any(path.name not in others for path in out.iterdir())
        ):
            raise OutputError(
                f"{out}: required a new or empty folder for a run, got one with other files; give "
                "another --out, or another --label"
            )


@contextmanager
def keeping_answers(*folders: Path) -> Iterator[None]:
    """Let an interrupt say that the answers there are in some folders are kept.

    Raises:
        KeyboardInterrupt: again, saying how to go on.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; the answers so far are kept in {', '.join(map(str, folders))}, and the "
            "same command goes on from there"
        ) from None


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new, never a part.

    Raises:
        OutputError: if it cannot be written.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write bytes as `replace_text` does a text.

    Raises:
        OutputError: if they cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_bytes(content)
        temporary.replace(path)


def _to_line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"
