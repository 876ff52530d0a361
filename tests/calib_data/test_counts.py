from dataclasses import replace

import pytest
from PIL import Image

from nvvl.calib_data.counts import count_tokens, describe_processor
from nvvl.calib_data.documents import KINDS, make_document
from nvvl.calib_data.items import Item, document_item
from nvvl.errors import DataError
from nvvl.model.processor import Processor
from nvvl.model.prompt import Message, ends_with_question
from nvvl.model.video import Video

ASK = Message("user", "What is it?")


def picture(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), "red")


def compare(item: Item, processor: Processor) -> None:
    """The counts are those of what the processor makes of the same item."""
    counts = count_tokens(item, processor)
    inputs = processor(
        item.messages,
        images=item.images,
        videos=item.videos,
        add_generation_prompt=ends_with_question(item.messages),
    )
    is_image = inputs.input_ids == processor.config.image_token_id
    num_video = 0 if inputs.video_mask is None else int(inputs.video_mask.sum())
    assert counts.total == len(inputs.input_ids)
    assert counts.video == num_video
    assert counts.image == int(is_image.sum()) - num_video
    assert counts.answer == int(inputs.answer_mask.sum())
    assert counts.tiles == inputs.tiles_per_image


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_processor(kind: str, processor: Processor) -> None:
    compare(document_item(make_document(kind, 3, split="train"), kind), processor)


def test_several_pictures_and_videos_in_one_item(processor: Processor) -> None:
    item = Item(
        "mixed",
        (
            Message("system", "Be brief."),
            Message("user", "<video>\nand <image> and <image><video>"),
            Message("assistant", "Yes."),
            Message("user", "Sure?"),
        ),
        images=(picture(1, 1), picture(96, 32)),
        videos=(
            Video((picture(40, 30),) * 3, 10.0, (0, 5, 9)),
            Video((picture(32, 32),), 1.0, (0,)),
        ),
    )
    compare(item, processor)
    assert count_tokens(item, processor).video == 4 * processor.config.tokens_per_tile


def test_text_alone_has_no_image_tokens(processor: Processor) -> None:
    item = Item("text", (ASK, Message("assistant", "A cat.")))
    compare(item, processor)
    assert count_tokens(item, processor).tiles == ()


def test_a_mismatch_is_an_error(processor: Processor) -> None:
    item = Item("a", (Message("user", "<image>\nWhat?"),))
    with pytest.raises(DataError, match="1 <image> placeholders, but 0 images"):
        count_tokens(item, processor)
    with pytest.raises(DataError, match="0 <video> placeholders, but 1 videos"):
        count_tokens(
            Item("a", (ASK,), videos=(Video((picture(8, 8),), 1.0, (0,)),)),
            processor,
        )
    spelt = replace(item, messages=(ASK, Message("assistant", "<image>")), images=(picture(8, 8),))
    with pytest.raises(DataError, match="an assistant turn holds"):
        count_tokens(spelt, processor)


def test_description_changes_with_what_counts_depend_on(processor: Processor) -> None:
    fewer = Processor(processor.config, processor.tokenizer, max_num_tiles=1)
    assert describe_processor(processor) != describe_processor(fewer)
    assert describe_processor(processor) == describe_processor(
        Processor(processor.config, processor.tokenizer)
    )
