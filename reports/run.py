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
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nvvl.errors import ConfigError, DataError, NvvlError, reading
from nvvl.model.checkpoint_writer import INDEX_NAME
from nvvl.model.hashing import hash_file
from nvvl.quantize.compressed_tensors import declared_algorithm, is_compressed_tensors
from nvvl.reports.json_values import json_text, read_object
from nvvl.staging import MANIFEST_NAME

MetricName = Literal[
    "exact_match", "character_accuracy", "anls", "relaxed_accuracy", "token_probability"
]
ImageCondition = Literal["right", "blank", "other"]
AnswerKey = tuple[str, ImageCondition, int]

# What a user calls a setting of a run.
_OPTIONS = {
    "num_items": "--items",
    "batch_size": "--batch",
    "seed": "--seed",
    "suites": "--suite",
    "gate_items": "--gate",
    "teacher_sha256": "--teacher",
    "device": "--device",
    "max_num_tiles": "--max-tiles",
    "pruning_rate": "--pruning-rate",
    "limit": "--limit",
    "num_fewshot": "--fewshot",
    "chat": "--chat",
    "max_length": "--max-length",
    "tasks_folder": "--tasks",
    "tasks_sha256": "files of --tasks",
    "model_sha256": "files of MODEL",
}

GATE_CONDITIONS: tuple[ImageCondition, ...] = ("blank", "other")

SETTINGS_NAME = "run.json"
ANSWERS_NAME = "answers.jsonl"

# Control characters, and what else ends a line.
_NOT_IN_LABELS = ("Cc", "Zl", "Zp")


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
            `nvvl.quantize.identity.describe_arithmetic` says it; empty where it was not recorded.
        dtype: dtype of the computation, such as ``bfloat16``.
        max_num_tiles: limit of tiles an image; None for the model's own.
        pruning_rate: share of the tokens of each video that was dropped.
    """

    model_sha256: str
    teacher_sha256: str | None
    suites: tuple[str, ...]
    metrics: tuple[MetricName, ...]
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

    @property
    def num_expected(self) -> int:
        """Answers of a finished run."""
        num_gates = 0 if self.gate_suite is None else len(GATE_CONDITIONS) * self.gate_items
        return len(self.suites) * self.num_items + num_gates

    def expects(self, key: AnswerKey) -> bool:
        """Whether an answer is one of the run's."""
        suite, condition, index = key
        if condition == "right":
            return suite in self.suites and index < self.num_items
        return suite == self.gate_suite and index < self.gate_items

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
        label: name of the run in reports; also names folders, see `check_label`.
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

    def __post_init__(self) -> None:
        check_label(self.label, "label")


@dataclass(frozen=True, kw_only=True)
class RunResult(ModelRun):
    """A finished run of suites."""

    settings: Settings
    answers: tuple[Answer, ...]

    def select(self, suite: str, condition: ImageCondition = "right") -> list[Answer]:
        """Return the answers to a suite in the order of its items."""
        return [a for a in self.answers if a.suite == suite and a.condition == condition]


def check_label(label: str, where: str) -> None:
    """Refuse a name of a run that cannot name a folder, or would name one elsewhere.

    Raises:
        DataError: beginning with ``where``.
    """
    if label in ("", ".", "..") or any(
        char == "/" or unicodedata.category(char) in _NOT_IN_LABELS for char in label
    ):
        raise DataError(
            f"{where}: required a name of one line without slashes, and neither . nor .., got "
            f"{label!r:.80}; choose another with --label"
        )


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
    num_missing = settings.num_expected - sum(settings.expects(key) for key in found)
    if num_missing:
        raise DataError(
            f"{out}: the run is not finished, {num_missing} of {settings.num_expected} answers are "
            "missing; run nvvl evaluate with the same settings and it goes on"
        )
    about = {f.name: values[f.name] for f in fields(ModelRun) if f.name in values}
    answers = tuple(found[key] for key in settings.expected_keys())
    try:
        return read_object(RunResult, about, "run", out=out, settings=settings, answers=answers)
    except DataError as error:
        raise DataError(f"{path}: {error}; evaluate again into another folder") from None


def settings_by_name(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run by name, each part of the arithmetic as one of them."""
    others = {name: value for name, value in settings.items() if name != "arithmetic"}
    return {**others, **settings["arithmetic"]}


def name_setting(name: str) -> str:
    """Return what a user calls a setting of `Settings` or of the harness."""
    return _OPTIONS.get(name, name.replace("_", " "))


def value_in_words(value: object) -> str:
    """Return the value of a setting as messages say it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def fingerprint(folder: Path) -> str:
    """Return the sha256 of the names and contents of a model's safetensors and JSON files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".json"):
            continue
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def describe_model(folder: Path) -> dict[str, Any]:
    """Return what `ModelRun` says of a model's folder, by the names it has there.

    Raises:
        ConfigError: if config.json is missing, or does not say what the formats are.
    """
    path = folder / "config.json"
    config = _read_model_json(path)
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ConfigError(
            f"{path}: quantization_config: required an object, got {json_text(quantization)}"
        )
    declared = quantization.get("quant_algo") or quantization.get("quant_method") or "BF16"
    if is_compressed_tensors(config):
        declared = declared_algorithm(quantization, path)
    manifest = folder / MANIFEST_NAME
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    weights = _name_weights(folder)
    return {
        "format": str(declared),
        "weights_bytes": sum(size for path, size in sizes.items() if path in weights),
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
    with reading(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    *lines, _ = text.split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            answer = read_object(Answer, json.loads(line), "answer")
        except (ValueError, RecursionError, DataError) as error:
            raise _no_answer(path, number, error) from None
        if not answer.num_tokens:
            raise _no_answer(path, number, "answer.num_tokens: required at least 1, got 0")
        yield answer


def _no_answer(path: Path, number: int, reason: object) -> DataError:
    return DataError(
        f"{path}: line {number} is not an answer ({reason}); remove the folder and run again"
    )


def read_settings(path: Path) -> Settings:
    """Read the settings in ``run.json``.

    Raises:
        DataError: if the file is missing, does not parse, or has other keys than `Settings`, or
            values that no run has.
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
    try:
        settings = read_object(Settings, values, "settings")
        _check_settings(settings)
    except DataError as error:
        raise DataError(f"{path}: {error}; evaluate again into another folder") from None
    return settings


def _check_settings(settings: Settings) -> None:
    """Refuse settings of which no report can be made."""
    suites, gate = settings.suites, settings.gate_suite
    if not suites or len(set(suites)) < len(suites) or len(suites) != len(settings.metrics):
        raise DataError(
            f"settings: required different suites, each with a metric, got {len(suites)} suites "
            f"and {len(settings.metrics)} metrics"
        )
    if not settings.num_items:
        raise DataError("settings.num_items: required at least 1, got 0")
    if gate is not None and (
        gate not in suites or not 1 <= settings.gate_items <= settings.num_items
    ):
        raise DataError(
            f"settings: required a gate_suite that is one of the suites, and gate_items from 1 to "
            f"{settings.num_items}, got {gate:.60} and {settings.gate_items}"
        )


def _name_weights(folder: Path) -> set[Path]:
    """Return the safetensors files of a model: those its index names, or model*.safetensors."""
    index = folder / INDEX_NAME
    if not index.is_file():
        return set(folder.rglob("model*.safetensors"))
    weight_map = _read_model_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ConfigError(f"{index}: weight_map is missing or not an object; download it again")
    return {folder / str(name) for name in weight_map.values()}


def _read_model_json(path: Path) -> dict[str, Any]:
    return _parse_object(path, ConfigError, way_out="; download it again")


def _read_json(path: Path) -> dict[str, Any]:
    absent = "not found; give a folder that nvvl evaluate has written"
    return _parse_object(path, DataError, absent=absent)


def _parse_object(
    path: Path,
    kind: type[NvvlError],
    *,
    absent: str = "cannot be read (No such file or directory)",
    way_out: str = "",
) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise kind(f"{path}: {absent}") from None
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: not valid JSON ({error}){way_out}") from None
    if not isinstance(values, dict):
        raise kind(f"{path}: required a JSON object, got {json_text(values)}")
    return values
