"""Compare what a server made of checkpoints with nvvl's reference, and judge it.

    python -m nvvl.tools.interop.judge OUT

Reads ``OUT/reference.json`` and ``OUT/vllm-FORMAT.json``, prints a table, writes ``OUT/vllm.json``.
Exit 1 if a checkpoint disagrees.

Log-probabilities are what is judged first: answers hide much, since a server that dropped a tensor
may still answer many questions right. Two correct programs round differently, and a model carries
that further the coarser its format: the limit for a format is therefore taken from how far nvvl's
own bfloat16 and float32 runs of the same checkpoint lie apart.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nvvl.reports.compare import Interval, wilson_interval

KINDS = ("text", "image")
# Two independent roundings lie sqrt(2) times as far apart as each from the exact value; the rest is
# for the places where a server rounds and nvvl does not (fused layers, other kernels).
ROUNDING_FACTOR = 1.6


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far log-probabilities lie apart, in nats, mean over the tokens that are not image tokens.

    Attributes:
        kind: of prompt, text or image.
        num_tokens: compared.
        server: mean |server - nvvl|, both in bfloat16.
        rounding: mean |nvvl in bfloat16 - nvvl in float32|.
    """

    kind: str
    num_tokens: int
    server: float
    rounding: float

    @property
    def agrees(self) -> bool:
        """Whether the server is as near as rounding lets it be; NaN is not."""
        return self.server <= ROUNDING_FACTOR * self.rounding


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Exact match of both on one suite, with 95 % intervals, and how many answers are the same."""

    suite: str
    nvvl: Interval
    server: Interval
    num_same: int

    @property
    def agrees(self) -> bool:
        """Whether each rate lies within the other's interval."""
        return (
            self.nvvl.low <= self.server.estimate <= self.nvvl.high
            and self.server.low <= self.nvvl.estimate <= self.server.high
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one checkpoint came to.

    Attributes:
        checkpoint: the name of its format.
        versions: of the server's packages.
        never_filled: parameters of the server that no tensor of the folder reached.
        other_tokens: prompts that the server turned into other token ids.
    """

    checkpoint: str
    versions: Mapping[str, str]
    never_filled: tuple[str, ...]
    other_tokens: tuple[str, ...]
    distances: tuple[Distance, ...]
    answers: tuple[Answers, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing is amiss."""
        parts: Iterable[Distance | Answers] = (*self.distances, *self.answers)
        return not self.never_filled and not self.other_tokens and all(p.agrees for p in parts)


def judge(reference: Mapping[str, Any], checkpoint: str, served: Mapping[str, Any]) -> Verdict:
    """Compare one checkpoint.

    Args:
        reference: What `nvvl.tools.interop.reference` wrote.
        checkpoint: Its name there.
        served: What ``vllm_cpu.py`` wrote for it.
    """
    expected = reference["results"][checkpoint]
    prompts = [*reference["scored"], *reference["asked"]]
    other_tokens = tuple(
        prompt["id"]
        for prompt in prompts
        if served["prompt_ids"][prompt["id"]] != prompt["input_ids"]
    )
    same_tokens = [prompt for prompt in reference["scored"] if prompt["id"] not in other_tokens]
    return Verdict(
        checkpoint=checkpoint,
        versions=served["versions"],
        never_filled=tuple(served["never_filled"]),
        other_tokens=other_tokens,
        distances=tuple(
            _distance(
                kind,
                [prompt for prompt in same_tokens if prompt["kind"] == kind],
                expected,
                served["logprobs"],
                reference["image_token_id"],
            )
            for kind in KINDS
        ),
        answers=tuple(
            _answers(suite, reference["asked"], expected["answers"], served["answers"])
            for suite in dict.fromkeys(prompt["suite"] for prompt in reference["asked"])
        ),
    )


def _distance(
    kind: str,
    prompts: Sequence[Mapping[str, Any]],
    expected: Mapping[str, Any],
    served: Mapping[str, Sequence[float]],
    image_token_id: int,
) -> Distance:
    server: list[float] = []
    rounding: list[float] = []
    for prompt in prompts:
        name = prompt["id"]
        rows = zip(
            prompt["input_ids"][1:],
            expected["logprobs"][name],
            expected["float32_logprobs"][name],
            served[name],
            strict=True,
        )
        for token, ours, exact, theirs in rows:
            if token != image_token_id:
                server.append(abs(theirs - ours))
                rounding.append(abs(ours - exact))
    if not server:
        return Distance(kind=kind, num_tokens=0, server=float("nan"), rounding=float("nan"))
    return Distance(
        kind=kind, num_tokens=len(server), server=fmean(server), rounding=fmean(rounding)
    )


def _answers(
    suite: str,
    prompts: Sequence[Mapping[str, Any]],
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
) -> Answers:
    asked = [prompt for prompt in prompts if prompt["suite"] == suite]
    return Answers(
        suite=suite,
        nvvl=wilson_interval(sum(ours[p["id"]] == p["truth"] for p in asked), len(asked)),
        server=wilson_interval(sum(theirs[p["id"]] == p["truth"] for p in asked), len(asked)),
        num_same=sum(ours[p["id"]] == theirs[p["id"]] for p in asked),
    )


def format_table(verdicts: Sequence[Verdict]) -> str:
    """Write verdicts as lines of text, one fact a line."""
    lines = []
    for verdict in verdicts:
        versions = ", ".join(f"{name} {number}" for name, number in verdict.versions.items())
        lines.append(
            f"{verdict.checkpoint}: {'agrees' if verdict.agrees else 'DISAGREES'} ({versions})"
        )
        for distance in verdict.distances:
            lines.append(
                f"  {_mark(distance.agrees)} log-probabilities, {distance.kind} prompts: "
                f"mean difference {distance.server:.4f} nats over {distance.num_tokens} tokens "
                f"(nvvl bf16 against float32: {distance.rounding:.4f}; limit "
                f"{ROUNDING_FACTOR * distance.rounding:.4f})"
            )
        for answers in verdict.answers:
            lines.append(
                f"  {_mark(answers.agrees)} exact match, {answers.suite}: server "
                f"{_percent(answers.server)}, nvvl {_percent(answers.nvvl)}, "
                f"{answers.num_same} of {answers.nvvl.n} answers the same"
            )
        for label, names in (
            ("parameters never filled", verdict.never_filled),
            ("prompts with other token ids", verdict.other_tokens),
        ):
            lines.append(f"  {_mark(not names)} {label}: {', '.join(names) or 'none'}")
    return "\n".join(lines)


def _mark(agrees: bool) -> str:
    return "ok  " if agrees else "FAIL"


def _percent(interval: Interval) -> str:
    return f"{interval.estimate:.1%} [{interval.low:.1%}, {interval.high:.1%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge what a server made of checkpoints.")
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    reference = json.loads((out / "reference.json").read_text(encoding="utf-8"))
    verdicts = [
        judge(reference, name, json.loads((out / f"vllm-{name}.json").read_text(encoding="utf-8")))
        for name in reference["checkpoints"]
    ]
    report = {
        "nvvl": reference["nvvl"],
        "torch": reference["torch"],
        "checkpoints": [{**asdict(verdict), "agrees": verdict.agrees} for verdict in verdicts],
    }
    (out / "vllm.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(format_table(verdicts))
    sys.exit(0 if all(verdict.agrees for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
