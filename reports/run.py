"""One evaluation run on disk: what was asked of which model, and every answer.

A run is a folder with two files. ``run.json`` holds the settings, complete enough that two runs
with equal settings give equal answers. ``answers.jsonl`` holds one answer a line; it grows by
whole windows of items while the run lasts, so an interrupted run goes on where it stopped, and is
put in order when the run ends.

A model is known by the hash of its files, not by its path: a folder whose weights were replaced is
another model. No torch here: reports are made from answers alone.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nvvl.errors import DataError
from nvvl.model.hashing import hash_file
from nvvl.quantize.compressed_tensors import declared_algorithm, is_compressed_tensors
from nvvl.quantize.staging import MANIFEST_NAME

ImageCondition = Literal["right", "blank", "other"]
AnswerKey = tuple[str, ImageCondition, int]

GATE_CONDITIONS: tuple[ImageCondition, ...] = ("blank", "other")

SETTINGS_NAME = "run.json"
ANSWERS_NAME = "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What determines the answers of a run.

    Attributes:
        model_sha256: `fingerprint` of the model's folder.
        teacher_sha256: the same of the BF16 model it is compared with; None without one.
        suites: names, in the order they are asked.
        metrics: the metric of each suite.
        seed: seed of the generated items.
        gate_suite: suite whose first ``gate_items`` items are asked again with a blank image and
            with another item's image; None if the gate is not run.
        arithmetic: what its rounding depends on, by name, as
            `nvvl.quantize.journal.describe_arithmetic` says it; empty where it was not recorded.
        dtype: dtype of the computation, such as ``bfloat16``.
        max_num_tiles: limit of tiles an image; None for the model's own.
        pruning_rate: share of the tokens of each video that was dropped.
    """

    model_sha256: str
    teacher_sha256: str | None
    suites: tuple[str, ...]
    metrics: tuple[str, ...]
    num_items: int
    seed: int
    batch_size: int
    gate_suite: str | None
    gate_items: int
    device: str
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    dtype: str
    max_num_tiles: int | None
    pruning_rate: float
    nvvl_version: str

    def expected_keys(self) -> Iterator[AnswerKey]:
        """Yield the key of every answer of a finished run, in order."""
        for suite in self.suites:
            for index in range(self.num_items):
                yield suite, "right", index
        if self.gate_suite is not None:
            for condition in GATE_CONDITIONS:
                for index in range(self.gate_items):
                    yield self.gate_suite, condition, index


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One item, as one model answered it.

    Attributes:
        index: number of the item in its suite; with suite and seed it names the item.
        condition: ``right`` for the item's own image, or what the image gate put in its place.
        item_sha256: hash of the messages and pixels that were asked.
        answer: empty where the suite asks for none.
        score: the suite's metric, 1.0 is perfect.
        correct: exact match after stripping; where no answer is asked for, whether greedy decoding
            would write the true one.
        cer: character error rate; None where no answer is asked for.
        anls: normalized Levenshtein similarity, as above.
        nll: mean negative log-likelihood of the true answer's tokens, in nats.
        kl: mean KL(teacher || model) over the tokens of the true answer, in nats.
        top1: fraction of those tokens at which both models rank the same token first.
        num_tokens: tokens of the true answer, the end of turn included.
        num_visual_tokens: image tokens in the prompt.
    """

    suite: str
    index: int
    condition: ImageCondition
    item_id: str
    item_sha256: str
    question: str
    truth: str
    answer: str
    score: float
    correct: bool
    cer: float | None
    anls: float | None
    nll: float
    kl: float | None
    top1: float | None
    num_tokens: int
    num_visual_tokens: int

    @property
    def key(self) -> AnswerKey:
        """What tells the answers of a run apart."""
        return self.suite, self.condition, self.index


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """What a model was asked, whoever asked it.

    Attributes:
        out: folder of the run.
        label: name of the run in reports.
        model: folder of the model.
        format: numeric format of the weights, such as ``BF16`` or ``NVFP4``.
        weights_bytes: bytes of the model's safetensors weights on disk.
        folder_bytes: bytes of all files of the model's folder.
        manifest_sha256: of its manifest.json; None without one, or where it was not recorded.
    """

    out: Path
    label: str
    model: Path
    format: str
    weights_bytes: int
    folder_bytes: int
    manifest_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunResult(ModelRun):
    """A finished run of suites."""

    settings: Settings
    answers: tuple[Answer, ...]

    def select(self, suite: str, condition: ImageCondition = "right") -> list[Answer]:
        """Return the answers to a suite in the order of its items."""
        return [a for a in self.answers if a.suite == suite and a.condition == condition]


def load_run(out: Path) -> RunResult:
    """Read the folder of a finished run.

    Raises:
        DataError: if it is no run folder, does not parse, or lacks answers.
    """
    out = Path(out)
    path = out / SETTINGS_NAME
    values = _read_json(path)
    settings = read_settings(path)
    found = {answer.key: answer for answer in read_answers(out / ANSWERS_NAME)}
    expected = list(settings.expected_keys())
    missing = [key for key in expected if key not in found]
    if missing:
        raise DataError(
            f"{out}: the run is not finished, {len(missing)} of {len(expected)} answers are "
            "missing; run nvvl evaluate with the same settings and it goes on"
        )
    try:
        return RunResult(
            out=out,
            label=values["label"],
            model=Path(values["model"]),
            format=values["format"],
            weights_bytes=values["weights_bytes"],
            folder_bytes=values["folder_bytes"],
            manifest_sha256=values.get("manifest_sha256"),
            settings=settings,
            answers=tuple(found[key] for key in expected),
        )
    except KeyError as error:
        raise DataError(f"{path}: missing {error.args[0]}") from None


def settings_by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run by name, each part of the arithmetic as one of them."""
    others = {name: value for name, value in settings.items() if name != "arithmetic"}
    return {**others, **settings["arithmetic"]}


def fingerprint(folder: Path) -> str:
    """Return the sha256 of the names and contents of a model's safetensors and JSON files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json"):
            continue
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def describe_model(folder: Path) -> dict[str, Any]:
    """Return what `ModelRun` says of a model's folder, by the names it has there."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    quantization = config.get("quantization_config") or {}
    declared = quantization.get("quant_algo") or quantization.get("quant_method") or "BF16"
    if is_compressed_tensors(config):
        declared = declared_algorithm(quantization, path)
    manifest = folder / MANIFEST_NAME
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return {
        "format": declared,
        "weights_bytes": sum(
            size for path, size in sizes.items() if path.match("model*.safetensors")
        ),
        "folder_bytes": sum(sizes.values()),
        "manifest_sha256": hash_file(manifest) if manifest.is_file() else None,
    }


def read_answers(path: Path) -> Iterator[Answer]:
    """Yield the answers of complete lines; a kill in the middle of a write leaves half a line.

    Raises:
        DataError: if a complete line is not an answer.
    """
    if not path.is_file():
        return
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            yield Answer(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise DataError(
                f"{path}: line {number} is not an answer ({error}); remove the folder and run again"
            ) from None


def read_settings(path: Path) -> Settings:
    """Read the settings in ``run.json``.

    Raises:
        DataError: if the file is missing, does not parse, or has other keys than `Settings`.
    """
    values = _read_json(path).get("settings")
    names = {setting.name for setting in fields(Settings)}
    if isinstance(values, dict):
        values = {"arithmetic": {}, **values}  # which earlier runs did not record
    if not isinstance(values, dict) or set(values) != names:
        raise DataError(
            f"{path}: settings must have exactly the keys {', '.join(sorted(names))}; "
            "evaluate again into another folder"
        )
    return Settings(
        **{**values, "suites": tuple(values["suites"]), "metrics": tuple(values["metrics"])}
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: not found; give a folder that nvvl evaluate has written"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: required a JSON object, got {type(values).__name__}")
    return values
