"""Turn the answers of several runs into one comparison.

Every run was asked the same items (`nvvl.reports.comparable`), so each difference is taken item by
item. Numbers come with the interval that their item count allows: Wilson's for exact match, a
bootstrap over items for everything else. KL is averaged over the tokens of an answer first and
over items then, so long answers do not outweigh short ones. Perplexity is that of all tokens, as
language models are compared. Results of the lm-evaluation-harness stand beside all this, as
`nvvl.reports.tasks` compares them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nvvl
from nvvl.reports.comparable import describe_differing, load_runs, require_comparable
from nvvl.reports.compare import (
    Interval,
    bootstrap_intervals,
    bootstrap_ratio,
    mcnemar_test,
    paired_difference,
    recovery_percent,
    wilson_interval,
)
from nvvl.reports.curves import Depth, Sweep, load_curves
from nvvl.reports.harness_run import HarnessRun
from nvvl.reports.run import Answer, RunResult
from nvvl.reports.tasks import TaskComparison, compare_tasks

SIGNIFICANCE = 0.05
_FEWEST_GATE_ITEMS = 6  # 5 of 5 have p = 0.06


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A run against the baseline, on the same items.

    Attributes:
        score: difference of the suite's metric, positive where the run is better.
        num_gained: items that only the run gets exactly right.
        num_lost: items that only the baseline gets exactly right.
        p_value: McNemar's exact test on these two counts.
        recovery_percent: the run's score in percent of the baseline's; None if that is 0.
    """

    score: Interval
    num_gained: int
    num_lost: int
    p_value: float
    recovery_percent: float | None


@dataclass(frozen=True, kw_only=True)
class SuiteScore:
    """How one run did on one suite.

    Attributes:
        metric: the suite's own metric, as `nvvl.reports.metrics` names it.
        score: its mean.
        exact_match: share of answers equal to the truth.
        cer: mean character error rate; None where no answers are asked for.
        anls: mean normalized Levenshtein similarity; None as above.
        perplexity: of the true answers' tokens, given the prompt and the tokens before; infinite
            where a float cannot hold it.
        visual_tokens: mean number of image tokens of a prompt.
        kl: mean KL(teacher || model) in nats; None where it was not measured.
        top1: share of answer tokens with the teacher's most likely token, mean over items.
        difference: None for the baseline itself.
    """

    metric: str
    score: Interval
    exact_match: Interval
    cer: Interval | None
    anls: Interval | None
    perplexity: Interval
    visual_tokens: float
    kl: Interval | None
    top1: Interval | None
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class ImageGate:
    """Exact match with the right image, a grey one and another item's.

    Attributes:
        passed: the right image does better than both: each at p < 0.05 by McNemar's test, or, if
            the suite's metric is another than exact match, by a 95 % interval of it above zero.
            None of fewer items than that test could ever tell by.
    """

    suite: str
    right: Interval
    blank: Interval
    other: Interval
    p_blank: float
    p_other: float
    passed: bool | None


@dataclass(frozen=True, kw_only=True)
class RunScore:
    """One row of the comparison.

    Attributes:
        out: folder of the answers; where there are none, of the harness's results.
        verified: whether `nvvl verify` passed; None if it was not run, as for the source.
        suites: empty for a model that only the harness asked.
        kl: over all suites; None where it was not measured.
        top1: over all suites.
    """

    label: str
    format: str
    model: str
    out: str
    model_sha256: str
    dtype: str
    weights_bytes: int
    folder_bytes: int
    verified: bool | None
    suites: Mapping[str, SuiteScore]
    kl: Interval | None
    top1: Interval | None
    gate: ImageGate | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The comparison of several runs with the first.

    Attributes:
        baseline: label of the run that the others are compared with.
        seed: of the suites' items; None where no run has answers to suites.
        num_items: of each suite; None as above.
        sweeps: accuracy against speed while a setting changes, of any models.
        depths: noise along the layers, of any models.
        tasks: results of the lm-evaluation-harness.
        differing: settings that move answers and are not those of the first run, in words.
    """

    nvvl_version: str
    baseline: str
    seed: int | None
    num_items: int | None
    runs: tuple[RunScore, ...]
    sweeps: tuple[Sweep, ...] = ()
    depths: tuple[Depth, ...] = ()
    tasks: tuple[TaskComparison, ...] = ()
    differing: tuple[str, ...] = ()


def collect(
    runs: Sequence[RunResult | HarnessRun | Path],
    *,
    verified: Mapping[str, bool] | None = None,
    curves: Sequence[Path] = (),
) -> Report:
    """Compare runs with the first of them.

    Args:
        runs: finished runs, or their folders; the first is the baseline. Answers to suites and
            results of the harness that have one label are one row.
        verified: by run label, whether `nvvl verify` passed.
        curves: folders of ``nvvl sweep``.

    Raises:
        DataError: if there is no run, two of a kind have one label, a run is unfinished, the runs
            were asked different items, or a folder of curves holds none.
    """
    loaded = load_runs(runs)
    require_comparable(loaded)
    baseline = loaded[0].label
    evaluated = [run for run in loaded if isinstance(run, RunResult)]
    # Answers to suites say more of a model than the harness's results, so they make the row.
    rows = {run.label: run for run in loaded} | {run.label: run for run in evaluated}
    verdicts = verified or {}
    found = [load_curves(folder) for folder in curves]
    return Report(
        nvvl_version=nvvl.__version__,
        baseline=baseline,
        seed=evaluated[0].settings.seed if evaluated else None,
        num_items=evaluated[0].settings.num_items if evaluated else None,
        runs=tuple(_score_run(run, evaluated, verdicts.get(label)) for label, run in rows.items()),
        sweeps=tuple(sweep for sweeps, _ in found for sweep in sweeps),
        depths=tuple(depth for _, depths in found for depth in depths),
        tasks=compare_tasks([run for run in loaded if isinstance(run, HarnessRun)], baseline),
        differing=tuple(describe_differing(evaluated)),
    )


def _score_run(
    run: RunResult | HarnessRun, evaluated: Sequence[RunResult], verified: bool | None
) -> RunScore:
    score = RunScore(
        label=run.label,
        format=run.format,
        model=str(run.model),
        out=str(run.out),
        model_sha256=run.settings.model_sha256,
        dtype=run.settings.dtype,
        weights_bytes=run.weights_bytes,
        folder_bytes=run.folder_bytes,
        verified=verified,
        suites={},
        kl=None,
        top1=None,
        gate=None,
    )
    if isinstance(run, HarnessRun):
        return score
    baseline = evaluated[0]
    kl, top1 = _divergence([a for a in run.answers if a.condition == "right"])
    return replace(
        score,
        suites={
            suite: _score_suite(
                metric, run.select(suite), None if run is baseline else baseline.select(suite)
            )
            for suite, metric in zip(run.settings.suites, run.settings.metrics, strict=True)
        },
        kl=kl,
        top1=top1,
        gate=_judge_gate(run),
    )


def _score_suite(
    metric: str, answers: Sequence[Answer], baseline: Sequence[Answer] | None
) -> SuiteScore:
    exact_match = _exact_match(answers)
    (score,) = bootstrap_intervals([(a.score,) for a in answers])
    texts = [(a.cer, a.anls) for a in answers if a.cer is not None and a.anls is not None]
    cer, anls = bootstrap_intervals(texts) if texts else (None, None)
    kl, top1 = _divergence(answers)
    return SuiteScore(
        metric=metric,
        score=exact_match if metric == "exact_match" else score,
        exact_match=exact_match,
        cer=cer,
        anls=anls,
        perplexity=_perplexity(answers),
        visual_tokens=sum(a.num_visual_tokens for a in answers) / len(answers),
        kl=kl,
        top1=top1,
        difference=None if baseline is None else _compare(answers, baseline),
    )


def _compare(answers: Sequence[Answer], baseline: Sequence[Answer]) -> Difference:
    score = paired_difference([a.score for a in baseline], [a.score for a in answers])
    num_gained, num_lost = _count_changes(baseline, answers)
    baseline_score = sum(a.score for a in baseline) / len(baseline)
    return Difference(
        score=score,
        num_gained=num_gained,
        num_lost=num_lost,
        p_value=mcnemar_test(num_gained, num_lost),
        recovery_percent=recovery_percent(baseline_score + score.estimate, baseline_score),
    )


def _judge_gate(run: RunResult) -> ImageGate | None:
    suite = run.settings.gate_suite
    if suite is None:
        return None
    blank, other = run.select(suite, "blank"), run.select(suite, "other")
    right = run.select(suite)[: len(blank)]
    metrics = dict(zip(run.settings.suites, run.settings.metrics, strict=True))
    p_values, passed = [], True
    for answers in (blank, other):
        num_gained, num_lost = _count_changes(answers, right)
        p_values.append(mcnemar_test(num_gained, num_lost))
        if metrics[suite] == "exact_match":
            looks = num_gained > num_lost and p_values[-1] < SIGNIFICANCE
        else:  # of a page of text hardly an answer is exact
            gained = paired_difference([a.score for a in answers], [a.score for a in right])
            looks = gained.low > 0
        passed = passed and looks
    return ImageGate(
        suite=suite,
        right=_exact_match(right),
        blank=_exact_match(blank),
        other=_exact_match(other),
        p_blank=p_values[0],
        p_other=p_values[1],
        passed=passed if len(right) >= _FEWEST_GATE_ITEMS else None,
    )


def _count_changes(before: Sequence[Answer], after: Sequence[Answer]) -> tuple[int, int]:
    """Count the items that became right and those that became wrong."""
    pairs = [(a.correct, b.correct) for a, b in zip(before, after, strict=True)]
    return pairs.count((False, True)), pairs.count((True, False))


def _exact_match(answers: Sequence[Answer]) -> Interval:
    return wilson_interval(sum(a.correct for a in answers), len(answers))


def _perplexity(answers: Sequence[Answer]) -> Interval:
    """Return exp of the mean over all tokens; items are resampled with their tokens together.

    What is more than a float can hold is infinite.
    """
    weights = [float(a.num_tokens) for a in answers]
    mean = bootstrap_ratio([a.nll * a.num_tokens for a in answers], weights)
    estimate, low, high = map(_exp, (mean.estimate, mean.low, mean.high))
    return Interval(estimate, low, high, mean.n)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _divergence(answers: Sequence[Answer]) -> tuple[Interval | None, Interval | None]:
    """Return mean KL and top-1 agreement; None if the run had no teacher."""
    measured = [(a.kl, a.top1) for a in answers if a.kl is not None and a.top1 is not None]
    if len(measured) < len(answers):
        return None, None
    kl, top1 = bootstrap_intervals(measured)
    return kl, top1
