import random

import pytest
import torch

from nvvl.reports.metrics import (
    anls,
    answer_nll,
    character_accuracy,
    character_error_rate,
    edit_distance,
    exact_match,
    logit_divergence,
    relaxed_accuracy,
    token_probability,
)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Total 12", "Total 12", 1.0),
        ("Total 12\n", " Total 12", 1.0),
        ("total 12", "Total 12", 0.0),
        ("Total  12", "Total 12", 0.0),
        ("", "x", 0.0),
    ],
)
def test_exact_match_strips_only_the_ends(answer: str, truth: str, expected: float) -> None:
    assert exact_match(answer, truth) == expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("abcdef", "bcdefa", 2),
        ("aaaa", "a", 3),
        ("naïve", "naive", 1),
        ("ab", "ba", 2),
    ],
)
def test_edit_distance_of_known_pairs(first: str, second: str, expected: int) -> None:
    assert edit_distance(first, second) == expected
    assert edit_distance(second, first) == expected


def plain_edit_distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def test_character_error_rate_counts_edits_of_the_stripped_strings() -> None:
    generator = random.Random(0)
    for _ in range(300):
        truth = "".join(generator.choices("abc d\n", k=generator.randint(1, 40))).strip() or "a"
        answer = "".join(generator.choices("abc d\n", k=generator.randint(0, 60)))
        expected = plain_edit_distance(answer.strip(), truth) / len(truth)
        assert character_error_rate(answer, f" {truth}\n") == pytest.approx(expected)


def test_an_answer_that_rambles_has_an_error_rate_above_one_and_no_accuracy() -> None:
    assert character_error_rate("abcdef", "ab") == 2.0
    assert character_accuracy("abcdef", "ab") == 0.0
    assert character_accuracy("abcx", "abcd") == 0.75


def test_an_empty_truth_has_no_error_rate() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        character_error_rate("a", "  ")


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("Invoice", "invoice ", 1.0),
        ("invoce", "invoice", 1 - 1 / 7),
        ("abxx", "abcd", 0.0),  # distance 0.5 is not below the threshold
        ("abcx", "abcd", 0.75),
        ("", "", 1.0),
        ("", "abcd", 0.0),
    ],
)
def test_anls_forgives_half_of_the_characters(answer: str, truth: str, expected: float) -> None:
    assert anls(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("104", "100", 1.0),
        ("105", "100", 1.0),
        ("106", "100", 0.0),
        ("1,040", "1000", 1.0),
        ("-95", "-100", 1.0),
        ("95", "-100", 0.0),
        ("12%", "0.12", 1.0),
        ("0.01", "0", 0.0),
        ("0", "0", 1.0),
        ("Paris", "paris", 1.0),
        ("Pari", "paris", 0.0),
        ("5", "five", 0.0),
        ("nan", "NaN", 1.0),  # a word here, not a number
    ],
)
def test_relaxed_accuracy_allows_numbers_five_percent(
    answer: str, truth: str, expected: float
) -> None:
    assert relaxed_accuracy(answer, truth) == expected


def test_equal_logits_have_no_divergence_and_agree() -> None:
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    divergence, agrees = logit_divergence(logits, logits.clone())
    assert torch.equal(divergence, torch.zeros(600))
    assert agrees.all()


def test_divergence_is_the_forward_kl_in_nats() -> None:
    generator = torch.Generator().manual_seed(1)
    teacher = 3 * torch.randn(600, 50, generator=generator)
    student = teacher + torch.randn(600, 50, generator=generator)
    divergence, agrees = logit_divergence(teacher, student)
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    # float32 log-probabilities of about 10 have steps of 1e-6
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(agrees, p.argmax(-1) == q.argmax(-1))
    assert 0 < agrees.float().mean() < 1


def test_divergence_is_not_symmetric() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert logit_divergence(sure, unsure)[0] < logit_divergence(unsure, sure)[0]


def test_likelihood_is_that_of_the_targets() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(600, 50, generator=generator)
    targets = torch.randint(50, (600,), generator=generator)
    expected = -logits.double().log_softmax(-1)[torch.arange(600), targets]
    # float32 log-probabilities of about 10 have steps of 1e-6
    torch.testing.assert_close(answer_nll(logits, targets).double(), expected, rtol=0, atol=1e-5)


def test_probability_is_one_over_perplexity() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125])
    nll = answer_nll(
        torch.stack([probabilities, 1 - probabilities], -1).log(), torch.zeros(3).long()
    )
    assert token_probability(float(nll.mean())) == pytest.approx(0.25)
    assert token_probability(0.0) == 1.0
