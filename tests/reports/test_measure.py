from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from nvvl.calib_data.items import Item
from nvvl.errors import DataError
from nvvl.model.generate import generate
from nvvl.model.load import load_model
from nvvl.model.processor import Message, Processor, collate
from nvvl.model.vlm import NemotronNanoVL
from nvvl.reports.measure import Panel, Response
from nvvl.reports.question import Question, prepare_question

ANSWERS = ("7", "the thin inner line", "12.50 USD")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> NemotronNanoVL:
    return load_model(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> NemotronNanoVL:
    folder = make_checkpoint(tmp_path_factory.mktemp("teacher") / "checkpoint", seed=1)
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.from_folder(tiny_checkpoint)


def make_item(answer: str, *, index: int = 0, role: str = "assistant") -> Item:
    question = "<image>\n" + "Which line is it? " * (index + 1)
    return Item(
        item_id=f"item-{index}",
        messages=(Message("user", question), Message(role, answer)),  # type: ignore[arg-type]
        images=(Image.new("RGB", (32, 32), (40 * index, 90, 200)),),
    )


@pytest.fixture(scope="module")
def questions(processor: Processor) -> list[Question]:
    items = [make_item(answer, index=index) for index, answer in enumerate(ANSWERS)]
    return [prepare_question(item, processor) for item in items]


def with_answer(question: Question, ids: Sequence[int]) -> Question:
    """Put other answer tokens behind the prompt of a question."""
    tokens, mask = torch.tensor(ids), torch.ones(len(ids), dtype=torch.bool)
    answered = replace(
        question.prompt,
        input_ids=torch.cat([question.prompt.input_ids, tokens]),
        answer_mask=torch.cat([question.prompt.answer_mask, mask]),
    )
    return replace(question, answered=answered)


def ask(
    model: NemotronNanoVL,
    questions: Sequence[Question],
    *,
    processor: Processor,
    max_new_tokens: int,
    teacher: NemotronNanoVL | None = None,
) -> list[Response]:
    panel = Panel([model], processor, teacher=teacher)
    (responses,) = panel.ask(questions, max_new_tokens=max_new_tokens, batch_size=2)
    return responses


def decode_plainly(model: NemotronNanoVL, question: Question, num_tokens: int) -> list[int]:
    """Decode greedily, the whole sequence again for each token."""
    ids = question.prompt.input_ids
    for _ in range(num_tokens):
        logits = model(ids[None], pixel_values=question.prompt.pixel_values).logits
        ids = torch.cat([ids, logits[0, -1:].argmax(-1)])
    return ids[len(question.prompt.input_ids) :].tolist()


def test_a_question_splits_into_prompt_and_answer(
    processor: Processor, questions: list[Question]
) -> None:
    for question, answer in zip(questions, ANSWERS, strict=True):
        prompt_ids = question.prompt.input_ids
        assert question.truth == answer
        assert torch.equal(question.answered.input_ids[: len(prompt_ids)], prompt_ids)
        assert processor.decode(question.answer_ids.tolist()).strip() == answer
        assert question.answer_ids[-1] == 12
        assert question.answered.answer_mask[-len(question.answer_ids) :].all()
        assert not question.prompt.answer_mask.any()


def test_the_prompt_is_what_generation_is_given(
    processor: Processor, questions: list[Question]
) -> None:
    for question in questions:
        item = question.item
        expected = processor(item.messages[:-1], images=item.images, add_generation_prompt=True)
        assert torch.equal(question.prompt.input_ids, expected.input_ids)
        assert torch.equal(question.prompt.pixel_values, expected.pixel_values)


def test_an_item_without_a_true_answer_is_refused(processor: Processor) -> None:
    with pytest.raises(DataError, match="item-0: the last message must be the assistant's"):
        prepare_question(make_item("7", role="user"), processor)


def test_wrong_truths_do_not_change_the_answers(
    model: NemotronNanoVL, processor: Processor, questions: list[Question]
) -> None:
    generated = []
    for question in questions:
        batch = collate([question.prompt], 0)
        generated += generate(model, batch, eos_token_id=12, max_new_tokens=6)
    responses = ask(model, questions, processor=processor, max_new_tokens=6)
    assert [r.text for r in responses] == [processor.decode(ids).strip() for ids in generated]


def test_the_greedy_answer_as_truth_needs_no_generation(
    model: NemotronNanoVL,
    processor: Processor,
    questions: list[Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    greedy = [decode_plainly(model, question, 5) for question in questions]
    monkeypatch.delattr("nvvl.reports.measure.generate")
    own = [with_answer(question, ids) for question, ids in zip(questions, greedy, strict=True)]
    responses = ask(model, own, processor=processor, max_new_tokens=5)
    assert [r.text for r in responses] == [processor.decode(ids).strip() for ids in greedy]


def test_right_and_wrong_answers_keep_their_places(
    model: NemotronNanoVL, processor: Processor, questions: list[Question]
) -> None:
    greedy = [decode_plainly(model, question, 5) for question in questions]
    mixed = [questions[0], with_answer(questions[1], greedy[1]), questions[2]]
    responses = ask(model, mixed, processor=processor, max_new_tokens=5)
    assert [r.text for r in responses] == [processor.decode(ids).strip() for ids in greedy]


def test_an_answer_is_never_longer_than_allowed(
    model: NemotronNanoVL, processor: Processor, questions: list[Question]
) -> None:
    ids = decode_plainly(model, questions[0], 5)
    (response,) = ask(
        model, [with_answer(questions[0], ids)], processor=processor, max_new_tokens=2
    )
    assert response.text == processor.decode(ids[:2]).strip()


def plain_divergence(
    model: NemotronNanoVL, teacher: NemotronNanoVL, question: Question
) -> tuple[Tensor, Tensor]:
    """Compute KL and agreement of one item, unpadded, in float64."""
    inputs = question.answered
    logprobs = []
    for network in (teacher, model):
        logits = network(inputs.input_ids[None], pixel_values=inputs.pixel_values).logits[0]
        logprobs.append(logits.double().log_softmax(-1)[:-1][inputs.answer_mask[1:]])
    p, q = logprobs
    return (p.exp() * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).double().mean()


def test_divergence_is_taken_at_the_answer_tokens_of_each_item(
    model: NemotronNanoVL,
    teacher: NemotronNanoVL,
    processor: Processor,
    questions: list[Question],
) -> None:
    responses = ask(model, questions, processor=processor, max_new_tokens=2, teacher=teacher)
    for question, response in zip(questions, responses, strict=True):
        with torch.inference_mode():
            kl, top1 = plain_divergence(model, teacher, question)
        # float32 forward, padded against unpadded
        assert response.kl == pytest.approx(kl.item(), rel=1e-3)
        assert response.top1 == pytest.approx(top1.item())
        assert response.kl is not None
        assert response.kl > 0.01


def test_a_model_does_not_diverge_from_itself(
    model: NemotronNanoVL, processor: Processor, questions: list[Question]
) -> None:
    for response in ask(model, questions, processor=processor, max_new_tokens=2, teacher=model):
        assert (response.kl, response.top1) == (0.0, 1.0)


def test_without_a_teacher_nothing_is_compared(
    model: NemotronNanoVL, processor: Processor, questions: list[Question]
) -> None:
    for response in ask(model, questions, processor=processor, max_new_tokens=2):
        assert (response.kl, response.top1) == (None, None)


def test_models_side_by_side_answer_as_they_do_alone(
    model: NemotronNanoVL,
    teacher: NemotronNanoVL,
    processor: Processor,
    questions: list[Question],
) -> None:
    panel = Panel([model, teacher], processor, teacher=teacher)
    together = panel.ask(questions, max_new_tokens=3, batch_size=2)
    for network, responses in zip((model, teacher), together, strict=True):
        assert responses == ask(
            network, questions, processor=processor, max_new_tokens=3, teacher=teacher
        )
    assert [r.kl for r in together[1]] == [0.0, 0.0, 0.0]
    assert panel.ask(questions, max_new_tokens=3, batch_size=2, members=[1]) == together[1:]


def test_equal_towers_encode_once_and_different_ones_each(
    model: NemotronNanoVL,
    teacher: NemotronNanoVL,
    tiny_checkpoint: Path,
    processor: Processor,
    questions: list[Question],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twin = load_model(tiny_checkpoint, dtype=torch.float32)
    encoded: list[NemotronNanoVL] = []

    def encode(self: NemotronNanoVL, pixel_values: Tensor) -> Tensor:
        encoded.append(self)
        return self.project(self.vision_model.radio_model.model(pixel_values))

    monkeypatch.setattr(NemotronNanoVL, "encode_images", encode)
    monkeypatch.setattr("nvvl.reports.measure.generate", lambda *_, **__: [[5]] * 3)
    panel = Panel([model, teacher, twin], processor)
    panel.ask(questions, max_new_tokens=3, batch_size=3)
    assert encoded == [model, teacher]
