"""Scores of one answer against the truth, and of one model's logits against another's.

Answer metrics take two strings and return a number in which higher is better and 1 is perfect
(`character_error_rate` apart, where 0 is perfect). Both sides are stripped of surrounding white
space and otherwise compared as they stand, unless a metric says more.

`exact_match`             equal or not.
`character_error_rate`    edit distance (Levenshtein: insertions, deletions and substitutions cost
                          1) over the length of the truth; above 1 for an answer that rambles.
`character_accuracy`      1 - character error rate, at least 0.
`anls`                    average normalized Levenshtein similarity of one item (Biten et al.,
                          arXiv 1905.13648, equation 2), the score of DocVQA.
`relaxed_accuracy`        numbers within 5 %, other answers equal without regard to case (Masry et
                          al., arXiv 2203.10244, section 5), the score of ChartQA.
`token_probability`       geometric mean of the probabilities of the true answer's tokens, so
                          1 / `token_probability` is the perplexity of the item; taken from
                          `answer_nll`, not from strings.
`logit_divergence`        KL and top-1 agreement of two models on the same tokens.
`answer_nll`              negative log-likelihood of tokens, in nats.

Edit distances are rapidfuzz's and character error rates jiwer's, which counts with it.
"""

import math
from collections.abc import Callable

import jiwer
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn import functional

from nvvl.reports.run import MetricName

# Scores that are read off the logits of the true answer; no answer is generated for them.
TOKEN_PROBABILITY: MetricName = "token_probability"

# Tokens whose log-probabilities are held in float32 at a time: 256 x 131,072 x 4 bytes = 134 MB.
_CHUNK_TOKENS = 256


def exact_match(answer: str, truth: str) -> float:
    """Return 1.0 if the stripped strings are equal, else 0.0."""
    return float(answer.strip() == truth.strip())


def edit_distance(first: str, second: str) -> int:
    """Count the insertions, deletions and substitutions that turn one string into the other."""
    return Levenshtein.distance(first, second)


def character_error_rate(answer: str, truth: str) -> float:
    """Return the edit distance of the stripped strings over the length of the truth.

    Raises:
        ValueError: if the truth is empty, for which no rate exists.
    """
    truth = truth.strip()
    if not truth:
        raise ValueError("character_error_rate: the truth must not be empty")
    return float(jiwer.cer(truth, answer.strip()))


def character_accuracy(answer: str, truth: str) -> float:
    """Return 1 - `character_error_rate`, at least 0."""
    return max(0.0, 1.0 - character_error_rate(answer, truth))


def anls(answer: str, truth: str, *, threshold: float = 0.5) -> float:
    """Return the normalized Levenshtein similarity, 0 where it is below ``threshold``.

    Letter case and surrounding white space do not count.
    """
    answer, truth = answer.strip().lower(), truth.strip().lower()
    longest = max(len(answer), len(truth))
    distance = edit_distance(answer, truth) / longest if longest else 0.0
    return 1.0 - distance if distance < threshold else 0.0


def relaxed_accuracy(answer: str, truth: str, *, tolerance: float = 0.05) -> float:
    """Return 1.0 for a number within ``tolerance`` of the truth, or for the same text."""
    answer, truth = answer.strip(), truth.strip()
    number, true_number = _parse_number(answer), _parse_number(truth)
    if number is not None and true_number is not None:
        return float(abs(number - true_number) <= tolerance * abs(true_number))
    return float(answer.lower() == truth.lower())


def token_probability(nll: float) -> float:
    """Return the geometric mean probability of tokens whose mean negative log-likelihood is given.

    Args:
        nll: mean over the tokens, in nats.
    """
    return math.exp(-nll)


METRICS: dict[MetricName, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "character_accuracy": character_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}


def logit_divergence(teacher_logits: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Compare two models' next-token distributions, token by token.

    Args:
        teacher_logits: (N, vocab), any float dtype.
        logits: (N, vocab) of the model under test, on the same tokens.

    Returns:
        KL(teacher || model) in nats (N,) float32, exactly 0 where the logits are equal, and
        whether both have the same most likely token (N,) bool.
    """
    divergences = []
    for teacher_chunk, chunk in zip(
        teacher_logits.split(_CHUNK_TOKENS), logits.split(_CHUNK_TOKENS), strict=True
    ):
        teacher_logprobs = torch.log_softmax(teacher_chunk.float(), dim=-1)
        logprobs = torch.log_softmax(chunk.float(), dim=-1)
        terms = teacher_logprobs.exp() * (teacher_logprobs - logprobs)
        divergences.append(terms.sum(-1))
    agrees = teacher_logits.argmax(-1) == logits.argmax(-1)
    return torch.cat(divergences), agrees


def answer_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token, in nats (N,) float32.

    Args:
        logits: (N, vocab), any float dtype.
        targets: (N,) int64, the token that each row of logits predicts.
    """
    chunks = zip(logits.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True)
    return torch.cat(
        [functional.cross_entropy(chunk.float(), ids, reduction="none") for chunk, ids in chunks]
    )


def _parse_number(text: str) -> float | None:
    """Read ``1,234.5`` or ``12%`` (a fraction, as ChartQA has it); None if it is no number."""
    digits = text.replace(",", "")
    try:
        number = float(digits[:-1]) / 100 if digits.endswith("%") else float(digits)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
