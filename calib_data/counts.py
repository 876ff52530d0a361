"""How many tokens an item has, by modality, without touching its pixels.

The prompt is rendered and tokenized as the model's processor does it; of each image only its size
is looked at, which decides the number of tiles. So a set of large pages is counted in seconds, and
the numbers are the processor's own (a test compares the two). What does not add up is an error,
never a truncation.
"""

import hashlib
from dataclasses import dataclass, replace

from nvvl.calib_data.items import Item
from nvvl.errors import DataError
from nvvl.model.processor import Processor
from nvvl.model.prompt import Message, ends_with_question
from nvvl.model.tiling import count_tiles
from nvvl.model.video import frame_labels


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of one item.

    Attributes:
        text: Tokens that are no image tokens, tags and frame labels included.
        image: Image tokens of images.
        video: Image tokens of video frames.
        answer: Those of the text tokens that the model writes itself.
        tiles: Tiles of each image, thumbnail included.
    """

    text: int
    image: int
    video: int
    answer: int
    tiles: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens of the whole prompt."""
        return self.text + self.image + self.video


def count_tokens(item: Item, processor: Processor) -> TokenCounts:
    """Count the tokens of an item.

    Raises:
        DataError: if placeholders and media do not match, the text spells an image token itself,
            or the turns cannot be rendered.
    """
    config = processor.config
    processor.check_placeholders(item.messages, item.images, item.videos)
    tiles = tuple(
        count_tiles(
            image.width,
            image.height,
            tile_size=config.image_size,
            max_num_tiles=processor.max_num_tiles,
            use_thumbnail=config.use_thumbnail,
        )
        for image in item.images
    )
    num_frames = sum(len(video.frames) for video in item.videos)
    ids: list[int] = []
    num_answer = 0
    turns = _stand_ins(item, processor)
    segments = processor.render(turns, add_generation_prompt=ends_with_question(turns))
    for segment in segments:
        piece = processor.tokenize(segment.text)
        ids += piece
        num_answer += len(piece) if segment.is_answer else 0
    # one token stands for each image and frame so far
    num_found = ids.count(config.image_token_id)
    if num_found != len(tiles) + num_frames:
        raise DataError(
            f"messages: the prompt has {num_found} places for images and frames, required "
            f"{len(tiles)} images and {num_frames} frames; remove what the text spells itself"
        )
    return TokenCounts(
        text=len(ids) - num_found,
        image=sum(tiles) * config.tokens_per_tile,
        video=num_frames * config.tokens_per_tile,
        answer=num_answer,
        tiles=tiles,
    )


def describe_processor(processor: Processor) -> dict[str, object]:
    """Return what token counts depend on: equal descriptions give equal counts."""
    config = processor.config
    return {
        "tokenizer_sha256": hashlib.sha256(processor.tokenizer.to_str().encode()).hexdigest(),
        "image_size": config.image_size,
        "tokens_per_tile": config.tokens_per_tile,
        "max_num_tiles": processor.max_num_tiles,
        "use_thumbnail": config.use_thumbnail,
    }


def _stand_ins(item: Item, processor: Processor) -> list[Message]:
    """Write one image token for each image, and the lines of each video with one a frame."""
    config = processor.config
    one = f"{config.image_start_token}{config.image_token}{config.image_end_token}"
    videos = iter(item.videos)
    messages = []
    for message in item.messages:
        pieces = message.content.replace(config.image_token, one).split(config.video_token)
        content = pieces[0]
        for piece in pieces[1:]:
            lines = (f"{label}{one}" for label in frame_labels(next(videos)))
            content += "\n".join(lines) + piece
        messages.append(replace(message, content=content))
    return messages
