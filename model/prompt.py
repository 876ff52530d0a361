r"""The chat template of the Nemotron Nano V2 VL family, written out.

    <SPECIAL_10>System\n{text}\n
    <SPECIAL_11>User\n{text}\n
    <SPECIAL_11>Assistant\n{opening}{answer}\n<SPECIAL_12>\n

(line breaks above are for the eye; the real ones are the ``\n``). The system turn always stands,
empty or not. ``opening`` is ``<think>\n`` when the model shall reason and ``<think></think>`` when
it shall not. ``/think`` and ``/no_think`` in a system or user turn override the caller's choice;
the last turn that has one decides, ``/think`` before ``/no_think`` within a turn, and both are
removed from the text wherever they stand, as the released template does.

**What is an answer.** The turn that is generated, or learned, is the one behind an opening. So the
last assistant turn of a finished conversation is rendered as the generation prompt, then
``{answer}\n<SPECIAL_12>`` as the answer, then ``\n``: a student trained on it meets at each answer
token just the text it will meet when it generates. Earlier assistant turns are history: no opening,
reasoning cut up to ``</think>``, and they are not answers. ``keep_thinking=True`` instead writes
every assistant turn like the last one, which makes all of them answers: for training on several
questions about one image, and for asking a model that was trained so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nvvl.errors import DataError

END_OF_TURN = "<SPECIAL_12>"
CONTROL_TOKENS = ("<SPECIAL_10>", "<SPECIAL_11>", END_OF_TURN)

_ASSISTANT = "<SPECIAL_11>Assistant\n"
_THINK_END = "</think>"

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        content: The text; ``<image>`` and ``<video>`` in it stand for the images and videos given
            beside the conversation, in order.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant"):
            raise DataError(f"message: role must be system, user or assistant, got {self.role!r}")
        if not is_text(self.content):
            raise DataError(f"message: required text, got half a character in {self.content!r:.60}")


def is_text(string: str) -> bool:
    """Tell whether a string can be written as UTF-8; half of an escaped pair in JSON cannot."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered prompt.

    Attributes:
        is_answer: Whether the model writes this text itself.
    """

    text: str
    is_answer: bool


def ends_with_question(messages: Sequence[Message]) -> bool:
    """Tell whether it is the model's turn."""
    return bool(messages) and messages[-1].role != "assistant"


def render_prompt(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    reasoning: bool = False,
    keep_thinking: bool = False,
) -> str:
    """Render a conversation as one string; see `render_segments`."""
    segments = render_segments(
        messages,
        add_generation_prompt=add_generation_prompt,
        reasoning=reasoning,
        keep_thinking=keep_thinking,
    )
    return "".join(segment.text for segment in segments)


def render_segments(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    reasoning: bool,
    keep_thinking: bool = False,
) -> list[Segment]:
    """Render a conversation as pieces of prompt and answer, in turn.

    Args:
        messages: The turns; a system turn only in first place.
        add_generation_prompt: End with the opening of an assistant turn, for the model to go on.
        reasoning: Whether the model reasons before it answers, unless a turn says otherwise.
        keep_thinking: Write every assistant turn with its opening, as an answer.

    Returns:
        The pieces, neighbours of different kind, none empty.

    Raises:
        DataError: if the order of turns is impossible, a text holds a control token, or reasoning
            is asked for and an answer has none.
    """
    _check_order(messages, add_generation_prompt)
    reasoning = resolve_reasoning(messages, reasoning)
    opening = _ASSISTANT + ("<think>\n" if reasoning else "<think></think>")
    target = None if add_generation_prompt else len(messages) - 1
    segments: list[Segment] = []
    if messages[0].role != "system":
        segments.append(Segment("<SPECIAL_10>System\n\n", False))
    for index, message in enumerate(messages):
        if message.role == "system":
            text = _strip_switches(message.content)
            segments.append(Segment(f"<SPECIAL_10>System\n{text}\n", False))
        elif message.role == "user":
            text = _strip_switches(message.content)
            segments.append(Segment(f"<SPECIAL_11>User\n{text}\n", False))
        elif keep_thinking or index == target:
            answer = _target_answer(message.content, reasoning)
            segments.append(Segment(opening, False))
            segments.append(Segment(f"{answer}\n{END_OF_TURN}", True))
            segments.append(Segment("\n", False))
        else:
            text = _drop_reasoning(message.content)
            segments.append(Segment(f"{_ASSISTANT}{text}\n{END_OF_TURN}\n", False))
    if add_generation_prompt:
        segments.append(Segment(opening, False))
    return _merge(segments)


def _check_order(messages: Sequence[Message], add_generation_prompt: bool) -> None:
    if not messages:
        raise DataError("messages: required at least one turn, got none")
    if any(message.role == "system" for message in messages[1:]):
        raise DataError("messages: a system turn may only come first")
    if add_generation_prompt and messages[-1].role == "assistant":
        raise DataError(
            "messages: to generate, the conversation must end with a user turn, not an answer"
        )


def resolve_reasoning(messages: Sequence[Message], reasoning: bool) -> bool:
    """Return whether the model reasons, as the caller chose or ``/think`` and ``/no_think`` say."""
    for message in messages:
        if message.role == "assistant":
            continue
        content = message.content.replace(_THINK_END, "")  # a tag is no switch
        if "/think" in content:  # "/no_think" does not contain it
            reasoning = True
        elif "/no_think" in content:
            reasoning = False
    return reasoning


def _strip_switches(content: str) -> str:
    parts = (
        part.replace("/think", "").replace("/no_think", "") for part in content.split(_THINK_END)
    )
    return _checked(_THINK_END.join(parts).strip())


def _drop_reasoning(content: str) -> str:
    return _checked(content.rpartition(_THINK_END)[2].strip())


def _target_answer(content: str, reasoning: bool) -> str:
    """Give the text that follows the opening in a turn the model is to write."""
    if not reasoning:
        return _drop_reasoning(content)
    if _THINK_END not in content:
        raise DataError(
            f"messages: reasoning is on, but an answer has no {_THINK_END}: {content[:40]!r}; give "
            "its reasoning as <think>...</think>, or turn reasoning off"
        )
    return _checked(content.strip().removeprefix("<think>").strip())


def _checked(text: str) -> str:
    """Refuse text that would forge a turn: the tokenizer reads control tokens anywhere."""
    for token in CONTROL_TOKENS:
        if token in text:
            raise DataError(f"messages: the text holds the control token {token}; remove it")
    return text


def _merge(segments: Sequence[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].is_answer == segment.is_answer:
            segment = Segment(merged.pop().text + segment.text, segment.is_answer)
        merged.append(segment)
    return merged
