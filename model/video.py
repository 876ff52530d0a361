"""Videos: which frames the model sees, how they are named in the prompt, and EVS pruning.

A video is sampled at 2 frames a second, at most 128 of them; each frame is one image tile behind a
line that gives its time. Efficient Video Sampling (arXiv 2510.14624) then drops the image tokens
that look like the same place one frame earlier: nothing else moves, since the language model has
no position embedding, so pruning is a boolean mask over a prompt's tokens.

Reading video files is not done here; `Video` holds frames that are already decoded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from nvvl.errors import DataError

if TYPE_CHECKING:
    from nvvl.model.config import VLMConfig
    from nvvl.model.processor import ModelInputs

SAMPLING_FPS = 2
MAX_NUM_FRAMES = 128

# EVS dissimilarity of the first frame: above any cosine distance, so that it is always kept.
_FIRST_FRAME_DISSIMILARITY = 255.0


@dataclass(frozen=True)
class Video:
    """Sampled frames of one video.

    Attributes:
        frames: The frames to show, in order.
        fps: Frame rate of the video the frames were taken from, before sampling.
        frame_indices: Index of each frame in that video.
    """

    frames: Sequence[Image.Image]
    fps: float
    frame_indices: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_fps(self.fps)
        if len(self.frames) == 0:
            raise DataError("video: required at least one frame, got none")
        if len(self.frames) != len(self.frame_indices):
            raise DataError(
                f"video: {len(self.frames)} frames but {len(self.frame_indices)} frame indices"
            )
        if min(self.frame_indices) < 0:
            raise DataError(f"video: frame index {min(self.frame_indices)} is negative")


def sample_frames(num_frames: int, native_fps: float) -> tuple[int, ...]:
    """Choose the frames to show: 2 a second, at most 128, spread evenly from first to last.

    A video of more than 64 seconds gets all 128, so fewer than 2 a second. Index arithmetic is
    that of vLLM's video loader, to the rounding of ``linspace``.

    Args:
        num_frames: Frames in the video.
        native_fps: The video's frame rate.

    Returns:
        Indices of the chosen frames, increasing; at least one.

    Raises:
        DataError: if the video has no frames or the frame rate is not a positive number.
    """
    _check_fps(native_fps)
    if num_frames < 1:
        raise DataError(f"video: required at least one frame, got {num_frames}")
    wanted = math.floor(num_frames / native_fps * SAMPLING_FPS)
    count = max(1, min(wanted, MAX_NUM_FRAMES, num_frames))
    indices = np.linspace(0, num_frames - 1, count, dtype=int)
    return tuple(int(index) for index in indices)


def frame_labels(video: Video) -> list[str]:
    """Write the text before each frame, ``Frame 1 sampled at 0.00 seconds: `` and so on.

    The time is counted in whole milliseconds per frame of the source, as servers count it.
    """
    frame_ms = int(1000 / video.fps)
    return [
        f"Frame {number} sampled at {index * frame_ms / 1000:.2f} seconds: "
        for number, index in enumerate(video.frame_indices, start=1)
    ]


def prune_prompt(
    config: "VLMConfig", inputs: "ModelInputs", features: torch.Tensor, pruning_rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the video tokens of one prompt that EVS finds to repeat the frame before.

    The shorter prompt is ``inputs.input_ids[kept]``. Prompts are pruned before they are collated.

    Args:
        config: The model's.
        inputs: The prompt, T tokens.
        features: (image tokens of the prompt, hidden), any float dtype, in prompt order.
        pruning_rate: Share of each video's tokens to drop, at least 0 and less than 1; 0 drops
            none.

    Returns:
        ``kept``, (T,) bool on the device of ``input_ids``, and the rows of ``features`` that are
        left. Both are whole without videos.

    Raises:
        ValueError: if `pruning_rate` is out of range.
    """
    if inputs.video_mask is None or pruning_rate == 0:
        return torch.ones_like(inputs.input_ids, dtype=torch.bool), features
    is_image = inputs.input_ids == config.image_token_id
    side = config.tokens_per_side
    of_videos = features[inputs.video_mask[is_image].to(features.device)]
    frames = of_videos.unflatten(0, (-1, side, side))
    masks = [
        evs_retention_mask(video, pruning_rate) for video in frames.split(list(inputs.video_frames))
    ]
    kept = prune_video_tokens(inputs.video_mask, masks)
    return kept, features[kept[is_image].to(features.device)]


def evs_retention_mask(features: torch.Tensor, pruning_rate: float) -> torch.Tensor:
    """Choose the video tokens to keep: those least like the same place one frame earlier.

    The first frame is always kept whole. Ties go to the earlier token.

    Args:
        features: (frames, height, width, channels) image tokens after the projector. The
            similarity is taken in their dtype, as in serving.
        pruning_rate: Share of the tokens to drop, at least 0 and less than 1.

    Returns:
        (frames, height, width) bool, True where the token is kept;
        ``max(height * width, int(frames * height * width * (1 - pruning_rate)))`` are True.

    Raises:
        ValueError: if `pruning_rate` is out of range.
    """
    if not 0 <= pruning_rate < 1:
        raise ValueError(f"pruning_rate: required 0 <= rate < 1, got {pruning_rate}")
    frames, height, width, _ = features.shape
    similarity = functional.cosine_similarity(features[1:], features[:-1], dim=-1)
    first = similarity.new_full((1, height, width), _FIRST_FRAME_DISSIMILARITY)
    dissimilarity = torch.cat([first, 1 - similarity]).flatten()
    tokens_per_frame = height * width
    num_kept = max(tokens_per_frame, int(frames * tokens_per_frame * (1 - pruning_rate)))
    order = torch.argsort(dissimilarity, descending=True, stable=True)
    mask = torch.zeros_like(dissimilarity, dtype=torch.bool)
    mask[order[:num_kept]] = True
    return mask.reshape(frames, height, width)


def prune_video_tokens(
    video_mask: torch.Tensor, retention_masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Say which tokens of one prompt are left after EVS.

    Text, frame labels, image tags and the tokens of still images all stay. With the result
    ``kept``, the shorter prompt is ``input_ids[kept]``, and the rows of its image features are
    ``features[kept[input_ids == image_token_id]]``. Apply it to each item before collating.

    Args:
        video_mask: (T,) bool, True at the image tokens of video frames
            (`nvvl.model.processor.ModelInputs.video_mask`).
        retention_masks: One (frames, height, width) bool mask a video, in prompt order.

    Returns:
        (T,) bool, True where the token stays.

    Raises:
        DataError: if the masks do not have one entry for each video token.
    """
    retention = torch.cat([mask.flatten() for mask in retention_masks])
    num_video_tokens = int(video_mask.sum())
    if len(retention) != num_video_tokens:
        raise DataError(
            f"video: the prompt has {num_video_tokens} video tokens, but the retention masks "
            f"cover {len(retention)}"
        )
    kept = torch.ones_like(video_mask)
    kept[video_mask] = retention.to(kept.device)
    return kept


def _check_fps(fps: float) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise DataError(f"video: required a positive frame rate, got {fps}")
