"""A conversation with its images and videos, to the tensors the model takes.

Every ``<image>`` becomes ``<img>``, one ``<image>`` token for each feature of each tile, and
``</img>``; every ``<video>`` becomes one such line a frame, a single tile each, behind the frame's
time. The prompt is then tokenized as one string without added special tokens, as servers do.

Only at the start of an answer is the text cut and encoded in two. A tokenizer that reads
``<think></think>`` as plain text could otherwise join its last ``>`` with the answer's first
characters into a token that generation can never produce; cut there, a prompt's ids are always a
prefix of the ids of the same prompt with its answer.

Pixels and tokens stand in prompt order, images and videos mixed as the text mixes them.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer

from nvvl.errors import ConfigError, DataError, first_line
from nvvl.model.chat_template import read_bos
from nvvl.model.config import VLMConfig
from nvvl.model.prompt import CONTROL_TOKENS, END_OF_TURN, Message, Segment, render_segments
from nvvl.model.tiling import normalize, split_image
from nvvl.model.video import Video, frame_labels

__all__ = ["Batch", "Message", "ModelInputs", "Processor", "Video", "collate"]


@dataclass(eq=False)
class ModelInputs:
    """One conversation as tensors.

    Attributes:
        input_ids: (T,) int64.
        pixel_values: (n_tiles, 3, S, S) float32, normalized; n_tiles is 0 without images.
        answer_mask: (T,) bool, True at the tokens the model writes itself, the closing
            ``<SPECIAL_12>`` included. Assistant turns that are only history are False.
        tiles_per_image: Tiles of each image, thumbnail included.
        video_frames: Frames of each video, one tile each.
        video_mask: (T,) bool, True at the image tokens of video frames; None without videos.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    answer_mask: torch.Tensor
    tiles_per_image: tuple[int, ...] = ()
    video_frames: tuple[int, ...] = ()
    video_mask: torch.Tensor | None = None


@dataclass(eq=False)
class Batch:
    """Conversations padded on the left to one length.

    Attributes:
        input_ids: (B, T) int64.
        padding_mask: (B, T) bool, True at real tokens.
        pixel_values: (n, 3, S, S) float32, the tiles of all items in order.
        answer_mask: (B, T) bool.
    """

    input_ids: torch.Tensor
    padding_mask: torch.Tensor
    pixel_values: torch.Tensor
    answer_mask: torch.Tensor


@dataclass(frozen=True)
class _Media:
    """What the placeholders of one conversation stand for, in prompt order."""

    messages: tuple[Message, ...]
    tiles: tuple[torch.Tensor, ...]
    is_video: tuple[bool, ...]


class Processor:
    """Turns conversations into model inputs, and ids back into text.

    Attributes:
        config: The model's config.
        tokenizer: The model's tokenizer; truncation and padding stored in it are switched off.
        max_num_tiles: Most tiles an image is cut into, without the thumbnail.
        bos: What every prompt begins with; empty for most models of the family.
    """

    def __init__(
        self,
        config: VLMConfig,
        tokenizer: Tokenizer,
        *,
        max_num_tiles: int | None = None,
        bos: str = "",
    ) -> None:
        """Check that the tokenizer belongs to the model.

        Args:
            config: The model's config.
            tokenizer: The model's tokenizer.
            max_num_tiles: The config's value if None.
            bos: What every prompt begins with.

        Raises:
            ConfigError: if the tokenizer lacks a special token, gives one another id than the
                config, or has an id that the model has no embedding for.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_tokenizer(config, tokenizer)
        self.config = config
        self.tokenizer = tokenizer
        self.bos = bos
        self.max_num_tiles = config.max_num_tiles if max_num_tiles is None else max_num_tiles
        self._placeholder = re.compile(
            f"({re.escape(config.image_token)}|{re.escape(config.video_token)})"
        )

    @classmethod
    def from_folder(cls, folder: Path, *, max_num_tiles: int | None = None) -> "Processor":
        """Read ``config.json`` and ``tokenizer.json`` of a checkpoint folder.

        Raises:
            ConfigError: if either file is missing or unusable.
        """
        config = VLMConfig.from_folder(folder)
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{path}: not found; copy it from the source checkpoint")
        with _using_tokenizer(f"{path}: not a tokenizer file"):
            tokenizer = Tokenizer.from_file(str(path))
        try:
            bos = read_bos(Path(folder))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{Path(folder) / 'tokenizer_config.json'}: cannot be read ({error!r:.60}); "
                "chat_template is a text or a list of texts by name; copy the file from the source "
                "checkpoint"
            ) from None
        if bos and tokenizer.token_to_id(bos) is None:
            raise ConfigError(f"{path}: lacks {bos!r}, with which the chat template begins")
        return cls(config, tokenizer, max_num_tiles=max_num_tiles, bos=bos)

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        images: Sequence[Image.Image] = (),
        videos: Sequence[Video] = (),
        add_generation_prompt: bool = False,
        reasoning: bool = False,
        keep_thinking: bool = False,
        max_num_tiles: int | None = None,
    ) -> ModelInputs:
        """Turn one conversation into model inputs.

        Args:
            messages: The turns, with a placeholder for each image and video.
            images: Pillow images of any mode, in the order of their placeholders.
            videos: Sampled videos, in the order of their placeholders.
            add_generation_prompt: End with the opening of an assistant turn.
            reasoning: Whether the model reasons before it answers.
            keep_thinking: Make every assistant turn an answer; see `nvvl.model.prompt`.
            max_num_tiles: Overrides the attribute for this call.

        Raises:
            DataError: if placeholders and images or videos do not match, an image cannot be used,
                or the turns cannot be rendered.
        """
        limit = self.max_num_tiles if max_num_tiles is None else max_num_tiles
        self.check_placeholders(messages, images, videos)
        tiles_of_images = [self._image_tiles(image, limit) for image in images]
        tiles_of_videos = [self._video_tiles(video) for video in videos]
        media = self._expand(messages, tiles_of_images, videos, tiles_of_videos)
        segments = self.render(
            media.messages,
            add_generation_prompt=add_generation_prompt,
            reasoning=reasoning,
            keep_thinking=keep_thinking,
        )
        input_ids, answer_mask = self._encode(segments)
        return ModelInputs(
            input_ids=input_ids,
            pixel_values=self._pixel_values(media.tiles),
            answer_mask=answer_mask,
            tiles_per_image=tuple(len(tiles) for tiles in tiles_of_images),
            video_frames=tuple(len(tiles) for tiles in tiles_of_videos),
            video_mask=self._video_mask(input_ids, media),
        )

    def has_answer(
        self, messages: Sequence[Message], images: Sequence[Image.Image], videos: Sequence[Video]
    ) -> bool:
        """Say whether a conversation has an answer, and refuse what shows without its pixels.

        Raises:
            DataError: as the call itself, but for pictures that cannot be used.
        """
        self.check_placeholders(messages, images, videos)
        segments = self.render(messages, add_generation_prompt=False)
        return any(segment.is_answer and segment.text for segment in segments)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        reasoning: bool = False,
        keep_thinking: bool = False,
    ) -> list[Segment]:
        """Render a conversation as the model's template does; see `render_segments`."""
        segments = render_segments(
            messages,
            add_generation_prompt=add_generation_prompt,
            reasoning=reasoning,
            keep_thinking=keep_thinking,
        )
        return [Segment(self.bos, False), *segments] if self.bos else segments

    def decode(self, ids: Sequence[int]) -> str:
        r"""Turn ids into text without special tokens.

        A finished answer ends with the ``\n`` that precedes ``<SPECIAL_12>`` in the template.
        """
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def tokenize(self, text: str) -> list[int]:
        """Turn text into ids, without special tokens that it does not spell.

        Raises:
            ConfigError: if the tokenizer cannot.
        """
        return _tokenize(self.tokenizer, text)

    def check_placeholders(
        self, messages: Sequence[Message], images: Sequence[Image.Image], videos: Sequence[Video]
    ) -> None:
        """Compare placeholders with what was given, before any pixel is touched.

        Raises:
            DataError: if they do not match, or an answer holds one.
        """
        for token, kind, given in (
            (self.config.image_token, "images", len(images)),
            (self.config.video_token, "videos", len(videos)),
        ):
            if any(token in turn.content for turn in messages if turn.role == "assistant"):
                raise DataError(f"messages: an assistant turn holds the placeholder {token}")
            found = sum(turn.content.count(token) for turn in messages)
            if found != given:
                raise DataError(
                    f"messages: {found} {token} placeholders, but {given} {kind} were given"
                )

    def _expand(
        self,
        messages: Sequence[Message],
        tiles_of_images: Sequence[torch.Tensor],
        videos: Sequence[Video],
        tiles_of_videos: Sequence[torch.Tensor],
    ) -> _Media:
        """Replace each placeholder by its tokens, and order the tiles as the text has them."""
        next_image = iter(tiles_of_images)
        next_video = iter(zip(videos, tiles_of_videos, strict=True))
        expanded: list[Message] = []
        tiles: list[torch.Tensor] = []
        is_video: list[bool] = []
        for message in messages:
            pieces = self._placeholder.split(message.content)
            for index in range(1, len(pieces), 2):  # split puts the placeholders at odd places
                if pieces[index] == self.config.image_token:
                    tiles.append(next(next_image))
                    is_video.append(False)
                    pieces[index] = self._tile_text(len(tiles[-1]))
                else:
                    video, frames = next(next_video)
                    tiles.append(frames)
                    is_video.append(True)
                    pieces[index] = self._video_text(video)
            expanded.append(replace(message, content="".join(pieces)))
        return _Media(tuple(expanded), tuple(tiles), tuple(is_video))

    def _tile_text(self, num_tiles: int) -> str:
        tokens = self.config.image_token * (self.config.tokens_per_tile * num_tiles)
        return f"{self.config.image_start_token}{tokens}{self.config.image_end_token}"

    def _video_text(self, video: Video) -> str:
        return "\n".join(label + self._tile_text(1) for label in frame_labels(video))

    def _image_tiles(self, image: Image.Image, max_num_tiles: int) -> torch.Tensor:
        return split_image(
            image,
            tile_size=self.config.image_size,
            max_num_tiles=max_num_tiles,
            use_thumbnail=self.config.use_thumbnail,
        )

    def _video_tiles(self, video: Video) -> torch.Tensor:
        size = self.config.image_size
        tiles = torch.empty(len(video.frames), 3, size, size)
        for place, frame in enumerate(video.frames):
            tiles[place] = self._image_tiles(frame, 1)[0]
        return tiles

    def _pixel_values(self, tiles: Sequence[torch.Tensor]) -> torch.Tensor:
        size = self.config.image_size
        pixels = torch.empty(sum(map(len, tiles)), 3, size, size)
        for place, tile in enumerate(chain.from_iterable(tiles)):  # a video has all its tiles once
            pixels[place] = normalize(tile, mean=self.config.norm_mean, std=self.config.norm_std)
        return pixels

    def _encode(self, segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize: (T,) int64 ids and (T,) bool answer mask."""
        ids: list[int] = []
        is_answer: list[bool] = []
        for segment in segments:
            piece = self.tokenize(segment.text)
            ids.extend(piece)
            is_answer.extend([segment.is_answer] * len(piece))
        return torch.tensor(ids), torch.tensor(is_answer)

    def _video_mask(self, input_ids: torch.Tensor, media: _Media) -> torch.Tensor | None:
        """Mark the tokens of video frames, once every feature has its token."""
        is_image_token = input_ids == self.config.image_token_id
        sizes = [len(tiles) * self.config.tokens_per_tile for tiles in media.tiles]
        num_tokens = int(is_image_token.sum())
        if num_tokens != sum(sizes):
            raise DataError(
                f"messages: the prompt has {num_tokens} {self.config.image_token} tokens, but the "
                f"images have {sum(sizes)} features; remove what the text spells itself"
            )
        if not any(media.is_video):
            return None
        video_mask = torch.zeros_like(is_image_token)
        flags = torch.tensor(media.is_video).repeat_interleave(torch.tensor(sizes))
        video_mask[is_image_token] = flags
        return video_mask


def collate(items: Sequence[ModelInputs], pad_token_id: int) -> Batch:
    """Pad items on the left to the longest one and stack them.

    Args:
        items: At least one item, all of one tile size.
        pad_token_id: Id written where `Batch.padding_mask` is False.

    Returns:
        The batch, items in the given order.
    """
    length = max(len(item.input_ids) for item in items)
    shape = (len(items), length)
    batch = Batch(
        input_ids=torch.full(shape, pad_token_id, dtype=torch.int64),
        padding_mask=torch.zeros(shape, dtype=torch.bool),
        pixel_values=torch.cat([item.pixel_values for item in items]),
        answer_mask=torch.zeros(shape, dtype=torch.bool),
    )
    for row, item in enumerate(items):
        start = length - len(item.input_ids)
        batch.input_ids[row, start:] = item.input_ids
        batch.padding_mask[row, start:] = True
        batch.answer_mask[row, start:] = item.answer_mask
    return batch


def _check_tokenizer(config: VLMConfig, tokenizer: Tokenizer) -> None:
    tokens = (*CONTROL_TOKENS, config.image_start_token, config.image_token, config.image_end_token)
    broken = [
        token for token in tokens if _tokenize(tokenizer, token) != [tokenizer.token_to_id(token)]
    ]
    if broken:
        raise ConfigError(f"tokenizer.json: {', '.join(broken)} must each be one special token")
    for token, key, allowed in (
        (config.image_token, "img_context_token_id", (config.image_token_id,)),
        (END_OF_TURN, "llm_config.eos_token_id", config.language.eos_token_ids),
    ):
        if tokenizer.token_to_id(token) not in allowed:
            raise ConfigError(
                f"tokenizer.json: {token} has id {tokenizer.token_to_id(token)}, but config.json "
                f"has {key} {', '.join(map(str, allowed))}"
            )
    last, token_id = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if token_id >= config.language.vocab_size:
        raise ConfigError(
            f"tokenizer.json: {last!r:.60} has id {token_id}, but llm_config.vocab_size is "
            f"{config.language.vocab_size}"
        )


def _tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    with _using_tokenizer(f"tokenizer.json: cannot encode {text!r:.60}"):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@contextmanager
def _using_tokenizer(said: str) -> Iterator[None]:
    """Turn whatever the library raises, a panic too, into an error that begins as given."""
    try:
        yield
    except BaseException as error:  # a panic is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = first_line(Exception(str(error)))
        raise ConfigError(f"{said} ({reason}); copy the file from the source checkpoint") from None
