from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from nvvl.calib_data.documents import make_document
from nvvl.calib_data.items import Item, document_item, item_hash
from nvvl.model.prompt import Message
from nvvl.model.video import Video

RED = Image.new("RGB", (4, 2), "red")
BLUE = Image.new("RGB", (4, 2), "blue")
ITEM = Item(
    item_id="a",
    messages=(Message("user", "<image>\n<video>\nWhat?"), Message("assistant", "That")),
    images=(RED,),
    videos=(Video((RED, BLUE), 2.0, (0, 1)),),
)


def test_hash_of_an_item_never_changes() -> None:
    # manifests of written checkpoints hold these hashes
    assert item_hash(ITEM) == "27b3dae60e4e6d5a308ee341747a2d567cce438d245b86caa96d54974d86729a"


def test_id_and_domain_are_not_hashed() -> None:
    assert item_hash(replace(ITEM, item_id="b", domain="user")) == item_hash(ITEM)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": (ITEM.messages[0], Message("assistant", "That "))},
        {"messages": (ITEM.messages[0], Message("system", "That"))},
        {"messages": (Message("user", "<image>\n<video>\nWhat?That"),)},
        {"images": (BLUE,)},
        {"images": (RED, RED)},
        {"images": (Image.new("RGB", (2, 4), "red"),)},
        {"videos": ()},
        {"videos": (Video((BLUE, RED), 2.0, (0, 1)),)},
        {"videos": (Video((RED, BLUE), 4.0, (0, 1)),)},
        {"videos": (Video((RED, BLUE), 2.0, (0, 2)),)},
    ],
)
def test_any_change_of_what_the_model_sees_changes_the_hash(change: dict[str, Any]) -> None:
    assert item_hash(replace(ITEM, **change)) != item_hash(ITEM)


@pytest.mark.parametrize("kind", ["card", "two_pages", "video"])
def test_document_becomes_a_conversation_about_its_media(kind: str) -> None:
    document = make_document(kind, 1, split="train")
    item = document_item(document, "x")
    text = "".join(message.content for message in item.messages)
    assert text.count("<image>") == len(item.images)
    assert text.count("<video>") == len(item.videos) == (kind == "video")
    pictures = item.videos[0].frames if item.videos else item.images
    assert pictures == document.images
    assert item.item_id == "x"
    assert item.domain == kind
    turns = zip(item.messages[::2], item.messages[1::2], strict=True)
    for (question, answer), turn in zip(turns, document.turns, strict=True):
        assert question.content.endswith(turn[0])
        assert (answer.role, answer.content) == ("assistant", turn[1])
