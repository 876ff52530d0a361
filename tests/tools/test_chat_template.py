"""The chat template that servers read says what nvvl itself gives to the model."""

from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import nvvl.tools.embedded_model.publish as publish
from nvvl.model.prompt import Message, render_prompt
from nvvl.model.resolve import resolve_model

CONVERSATIONS = {
    "one question": [("user", "What is the total?")],
    "image": [("user", "<image>\nRead the line.")],
    "system": [("system", " You read documents. "), ("user", "Hi")],
    "switch in system": [("system", "/think"), ("user", "Hi")],
    "last switch wins": [("system", "/think"), ("user", "Hi /no_think")],
    "history": [("user", "a"), ("assistant", "<think>\nno\n</think> b "), ("user", "c /think")],
}


def render(messages: list[dict[str, object]], **options: object) -> str:
    text = (resolve_model("embedded") / "chat_template.jinja").read_text(encoding="utf-8")
    # as transformers and vLLM set it up
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text).render(
        messages=messages, add_generation_prompt=True, **options
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("reasoning", [False, True])
def test_template_renders_what_nvvl_renders(name: str, reasoning: bool) -> None:
    turns = CONVERSATIONS[name]
    rendered = render(
        [{"role": role, "content": content} for role, content in turns], enable_thinking=reasoning
    )
    messages = [Message(role, content) for role, content in turns]  # type: ignore[arg-type]
    assert rendered == render_prompt(messages, reasoning=reasoning)


def test_template_takes_the_parts_that_a_chat_client_sends() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}},
        {"type": "text", "text": "Read the line."},
    ]
    rendered = render([{"role": "user", "content": parts}])
    assert rendered == render_prompt([Message("user", "<image>\nRead the line.")])


def test_published_template_is_the_one_of_the_tools() -> None:
    source = Path(publish.__file__).with_name("chat_template.jinja")
    assert (resolve_model("embedded") / source.name).read_bytes() == source.read_bytes()
