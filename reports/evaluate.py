"""Ask checkpoints every item of some suites and keep each answer.

    suites -> windows of items -> Panel.ask -> one run folder a checkpoint

Several checkpoints are asked side by side: items are drawn once, images encoded once where the
vision towers are equal, and the teacher is run once for all. Their answers are those they would
give alone.

A window is a few batches of items. It is the unit of work: made, asked and written together, so
memory does not grow with the number of items, and the questions that have to be decoded token by
token fill whole batches. The plan depends on the settings alone: a run that was interrupted forms
the same windows again and skips those it has answered.

The image gate asks whether a model still looks. The first items of a suite are asked again with a
grey image and with another item's image; a model that answers as well from those has learned, or
kept, only what the text gives away.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

import nvvl
from nvvl.calib_data.items import Item, item_hash
from nvvl.errors import DataError
from nvvl.model.config import MOST_TILES
from nvvl.model.processor import Processor
from nvvl.progress import Progress
from nvvl.quantize.identity import describe_arithmetic
from nvvl.quantize.load import load_any
from nvvl.reports.journal import Journal, keeping_answers
from nvvl.reports.json_values import MOST
from nvvl.reports.measure import Panel, Response
from nvvl.reports.metrics import (
    METRICS,
    anls,
    character_error_rate,
    exact_match,
    token_probability,
)
from nvvl.reports.question import Question, prepare_question
from nvvl.reports.run import (
    GATE_CONDITIONS,
    Answer,
    ImageCondition,
    RunResult,
    Settings,
    describe_model,
    fingerprint,
)
from nvvl.reports.suites import Suite, require_items
from nvvl.reports.teacher import require_bf16
from nvvl.staging import locked

_BATCHES_PER_WINDOW = 8
_GREY = (128, 128, 128)
_OTHER_ITEMS_TRIED = 100


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint to evaluate.

    Attributes:
        folder: BF16 or quantized checkpoint.
        out: folder of its run.
        label: its name in reports; its format by default.
        pruning_rate: share of the image tokens of each video that it is not shown (EVS).
    """

    folder: Path
    out: Path
    label: str | None = None
    pruning_rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.pruning_rate < 1:
            raise DataError(f"--pruning-rate: required 0 to below 1, got {self.pruning_rate:g}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How checkpoints are asked.

    Attributes:
        num_items: items of each suite.
        batch_size: items asked at a time.
        seed: seed of the items; the same seed gives every checkpoint the same items.
        gate_items: items of the image gate, at most ``num_items``; 0 leaves the gate out.
        device: where the models run.
        dtype: dtype of their computation.
        max_num_tiles: most tiles an image is cut into; None for the model's own limit.
    """

    num_items: int = 1000
    batch_size: int = 32
    seed: int = 0
    gate_items: int = 100
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    max_num_tiles: int | None = None

    def __post_init__(self) -> None:
        _require_range("--items", self.num_items, 1, None)
        _require_range("--batch", self.batch_size, 1, None)
        _require_range("--seed", self.seed, 0, MOST)
        _require_range("--gate", self.gate_items, 0, self.num_items)
        if self.max_num_tiles is not None:
            _require_range("--max-tiles", self.max_num_tiles, 1, MOST_TILES)


def evaluate(
    candidates: Sequence[Candidate],
    suites: Sequence[Suite],
    options: Options | None = None,
    *,
    teacher: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[RunResult]:
    """Evaluate checkpoints side by side; go on with the runs their folders hold.

    Args:
        candidates: checkpoints of one model family member, such as BF16, FP8 and NVFP4.
        suites: what is asked, see `find_suites`; the image gate uses the first.
        options: how it is asked.
        teacher: BF16 checkpoint that KL and top-1 agreement are measured against; may be one of
            the candidates.
        overwrite: discard runs that have other settings.
        progress: called after each window.

    Returns:
        The finished run of each candidate, as `load_run` reads it from its folder.

    Raises:
        DataError: if no suite is given, none has videos to prune, an item cannot be used, or the
            checkpoints do not take the same tokens and pixels.
        OutputError: if a run's folder holds something else, or another run is writing there.
        ConfigError, CheckpointError: if a checkpoint cannot be loaded, or the teacher is quantized.
        KeyboardInterrupt: again, saying how to go on.
    """
    options = options or Options()
    if not suites or not candidates:
        raise DataError("evaluate: required at least one suite and one checkpoint")
    require_items(suites, options.num_items)
    _require_gate(suites[0], options)
    _require_videos(suites, candidates)
    if len({Path(candidate.out).resolve() for candidate in candidates}) < len(candidates):
        raise DataError("evaluate: required another folder for the run of each checkpoint")
    folders = [Path(candidate.folder) for candidate in candidates]
    # Wrong folders are named before any weight is read or anything is written.
    processor = _require_same_inputs(folders if teacher is None else [*folders, Path(teacher)])
    if teacher is not None:
        require_bf16(Path(teacher))
    with ExitStack() as held:
        for candidate in candidates:
            held.enter_context(locked(Path(candidate.out)))
        teacher_sha256 = None if teacher is None else fingerprint(Path(teacher))
        journals = [
            _open_journal(candidate, suites, options, teacher_sha256, overwrite)
            for candidate in candidates
        ]
        session = _Session(suites, options, processor, journals, progress)
        if session.num_missing:
            panel = _load_panel(folders, teacher, journals, processor, options)
            with keeping_answers(*(Path(candidate.out) for candidate in candidates)):
                session.answer_all(panel)
        return [journal.finish() for journal in journals]


def _open_journal(
    candidate: Candidate,
    suites: Sequence[Suite],
    options: Options,
    teacher_sha256: str | None,
    overwrite: bool,
) -> Journal:
    folder = Path(candidate.folder)
    settings = Settings(
        model_sha256=fingerprint(folder),
        teacher_sha256=teacher_sha256,
        suites=tuple(suite.name for suite in suites),
        metrics=tuple(suite.metric for suite in suites),
        num_items=options.num_items,
        seed=options.seed,
        batch_size=options.batch_size,
        gate_suite=suites[0].name if options.gate_items else None,
        gate_items=options.gate_items,
        device=options.device,
        arithmetic=describe_arithmetic(torch.device(options.device)),
        dtype=str(options.dtype).removeprefix("torch."),
        max_num_tiles=options.max_num_tiles,
        pruning_rate=candidate.pruning_rate,
        nvvl_version=nvvl.__version__,
    )
    about = {"model": str(folder), **describe_model(folder)}
    about = {"label": candidate.label or about["format"], **about}
    return Journal.open(Path(candidate.out), settings, about, overwrite=overwrite)


def _load_panel(
    folders: Sequence[Path],
    teacher: Path | None,
    journals: Sequence[Journal],
    processor: Processor,
    options: Options,
) -> Panel:
    """Load each distinct checkpoint once."""
    models = {}
    for folder, journal in zip(folders, journals, strict=True):
        sha256 = journal.settings.model_sha256
        if sha256 not in models:
            models[sha256] = load_any(folder, dtype=options.dtype, device=options.device)
    members = [models[journal.settings.model_sha256] for journal in journals]
    rates = [journal.settings.pruning_rate for journal in journals]
    if teacher is None:
        return Panel(members, processor, pruning_rates=rates)
    teacher_model = models.get(journals[0].settings.teacher_sha256 or "")
    if teacher_model is None:
        teacher_model = load_any(Path(teacher), dtype=options.dtype, device=options.device)
    return Panel(members, processor, teacher=teacher_model, pruning_rates=rates)


class _Session:
    """What is asked of the panel, and where the answers go."""

    def __init__(
        self,
        suites: Sequence[Suite],
        options: Options,
        processor: Processor,
        journals: Sequence[Journal],
        progress: Progress | None,
    ) -> None:
        self.suites = suites
        self.options = options
        self.processor = processor
        self.journals = journals
        self.progress = progress

    @property
    def num_missing(self) -> int:
        """Answers still to be given."""
        return sum(journal.num_expected - len(journal.answers) for journal in self.journals)

    def answer_all(self, panel: Panel) -> None:
        """Answer what is not answered yet: the suites, then the image gate."""
        for suite, condition, window in self._plan():
            members = [
                place
                for place, journal in enumerate(self.journals)
                if not all((suite.name, condition, index) in journal.answers for index in window)
            ]
            if members:
                self._answer_window(panel, members, suite, condition, window)

    def _plan(self) -> Iterator[tuple[Suite, ImageCondition, range]]:
        size = _BATCHES_PER_WINDOW * self.options.batch_size
        parts: list[tuple[Suite, ImageCondition, int]] = []
        parts.extend((suite, "right", self.options.num_items) for suite in self.suites)
        for condition in GATE_CONDITIONS:
            parts.append((self.suites[0], condition, self.options.gate_items))
        for suite, condition, num_items in parts:
            for start in range(0, num_items, size):
                yield suite, condition, range(start, min(start + size, num_items))

    def _answer_window(
        self,
        panel: Panel,
        members: Sequence[int],
        suite: Suite,
        condition: ImageCondition,
        window: range,
    ) -> None:
        questions = [self._prepare(suite, condition, index) for index in window]
        hashes = [item_hash(question.item) for question in questions]
        responses = panel.ask(
            questions,
            max_new_tokens=suite.max_new_tokens,
            batch_size=self.options.batch_size,
            compare=condition == "right",
            members=members,
        )
        for member, row in zip(members, responses, strict=True):
            for question, response in zip(questions, row, strict=True):
                _require_numbers(self.journals[member].out, question, response)
            self.journals[member].append(
                _to_answer(suite, condition, index, question, item_sha256, response)
                for index, question, item_sha256, response in zip(
                    window, questions, hashes, row, strict=True
                )
            )
        if self.progress is not None:
            num_expected = sum(journal.num_expected for journal in self.journals)
            self.progress(suite.name, num_expected - self.num_missing, num_expected)

    def _prepare(self, suite: Suite, condition: ImageCondition, index: int) -> Question:
        item = suite.make_item(index, self.options.seed)
        if condition == "blank":
            item = _with_blank_images(item)
        elif condition == "other":
            item = _with_other_images(item, suite, index, self.options.seed)
        return prepare_question(item, self.processor, max_num_tiles=self.options.max_num_tiles)


def _require_numbers(out: Path, question: Question, response: Response) -> None:
    for name in ("nll", "kl"):
        value = getattr(response, name)
        if value is not None and not math.isfinite(value):
            raise DataError(
                f"{out}: item {question.item.item_id}: {name} is {value}: the model computes NaN "
                "or Inf; see what nvvl verify says of it"
            )


def _to_answer(
    suite: Suite,
    condition: ImageCondition,
    index: int,
    question: Question,
    item_sha256: str,
    response: Response,
) -> Answer:
    truth, text = question.truth, response.text
    answered = suite.max_new_tokens > 0
    return Answer(
        suite=suite.name,
        index=index,
        condition=condition,
        item_id=question.item.item_id,
        item_sha256=item_sha256,
        question=question.item.messages[-2].content,
        truth=truth,
        answer=text,
        score=METRICS[suite.metric](text, truth) if answered else token_probability(response.nll),
        correct=exact_match(text, truth) == 1.0 if answered else response.is_true,
        cer=character_error_rate(text, truth) if answered else None,
        anls=anls(text, truth) if answered else None,
        nll=response.nll,
        kl=response.kl,
        top1=response.top1,
        num_tokens=len(question.answer_ids),
        num_visual_tokens=response.num_visual_tokens,
    )


def _with_blank_images(item: Item) -> Item:
    """Put grey images of the same sizes in place of an item's images."""
    return replace(item, images=tuple(Image.new("RGB", image.size, _GREY) for image in item.images))


def _with_other_images(item: Item, suite: Suite, index: int, seed: int) -> Item:
    """Put the images of the next item that has another answer in place of an item's images."""
    for step in range(1, _OTHER_ITEMS_TRIED + 1):
        other = suite.make_item(index + step, seed)
        if other.messages[-1] != item.messages[-1]:
            return replace(item, images=other.images)
    raise DataError(
        f"{item.item_id}: the next {_OTHER_ITEMS_TRIED} items have the same answer; "
        "run the image gate on another suite"
    )


def _require_range(name: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise DataError(f"{name}: required {bounds}, got {value}")


def _require_gate(suite: Suite, options: Options) -> None:
    """Refuse to put the gate's questions to a suite without images, before anything is asked."""
    if options.gate_items and not suite.has_images:
        raise DataError(
            f"{suite.name}: the image gate needs images, and this suite, the first, has none; put "
            "another suite first, or leave the gate out (--gate 0)"
        )


def _require_videos(suites: Sequence[Suite], candidates: Sequence[Candidate]) -> None:
    """Refuse to call answers pruned where there is nothing to prune."""
    rate = max(candidate.pruning_rate for candidate in candidates)
    if rate and not any(suite.has_videos for suite in suites):
        raise DataError(
            f"--pruning-rate {rate:g}: the suites {', '.join(suite.name for suite in suites)} have "
            "no videos to prune; ask the suite video too, or leave --pruning-rate out"
        )


def _require_same_inputs(folders: Sequence[Path]) -> Processor:
    """Return the processor of the first folder; all must turn an item into the same tensors."""
    first, *others = [Processor.from_folder(folder) for folder in folders]
    for folder, other in zip(folders[1:], others, strict=True):
        differences = [
            name
            for name, mine, its in (
                ("vocab_size", first.config.language.vocab_size, other.config.language.vocab_size),
                ("force_image_size", first.config.image_size, other.config.image_size),
                ("patch_size", first.config.vision.patch_size, other.config.vision.patch_size),
                ("norm_mean", first.config.norm_mean, other.config.norm_mean),
                ("norm_std", first.config.norm_std, other.config.norm_std),
                ("max_num_tiles", first.max_num_tiles, other.max_num_tiles),
                ("use_thumbnail", first.config.use_thumbnail, other.config.use_thumbnail),
                ("tokenizer.json", first.tokenizer.to_str(), other.tokenizer.to_str()),
            )
            if mine != its
        ]
        if differences:
            raise DataError(
                f"{folder}: {', '.join(differences)} differ from {folders[0]}; required "
                "checkpoints made from one BF16 model"
            )
    return first
