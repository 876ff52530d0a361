from itertools import pairwise

import pytest
import torch
from PIL import Image
from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import compute_retention_mask

from nvvl.errors import DataError
from nvvl.model.video import (
    Video,
    evs_retention_mask,
    frame_labels,
    prune_video_tokens,
    sample_frames,
)

FRAME = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("num_frames", "fps", "indices"),
    [
        (1, 30.0, (0,)),
        (5, 30.0, (0,)),  # a sixth of a second still shows one frame
        (30, 30.0, (0, 29)),
        (60, 30.0, (0, 19, 39, 59)),
        (8, 2.0, (0, 1, 2, 3, 4, 5, 6, 7)),
        (4, 1.0, (0, 1, 2, 3)),  # slower than 2 a second: every frame once
    ],
)
def test_two_frames_a_second(num_frames: int, fps: float, indices: tuple[int, ...]) -> None:
    assert sample_frames(num_frames, fps) == indices


@pytest.mark.parametrize(
    ("seconds", "count"), [(63, 126), (64, 128), (65, 128), (600, 128), (36_000, 128)]
)
def test_at_most_128_frames_from_first_to_last(seconds: int, count: int) -> None:
    indices = sample_frames(seconds * 25, 25.0)
    assert len(set(indices)) == count
    assert (indices[0], indices[-1]) == (0, seconds * 25 - 1)
    gaps = [b - a for a, b in pairwise(indices)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_frame_rate_is_refused(fps: float) -> None:
    with pytest.raises(DataError, match="positive frame rate"):
        sample_frames(10, fps)
    with pytest.raises(DataError, match="positive frame rate"):
        Video(frames=[FRAME], fps=fps, frame_indices=(0,))


def test_video_without_frames_is_refused() -> None:
    with pytest.raises(DataError, match="at least one frame"):
        sample_frames(0, 30.0)
    with pytest.raises(DataError, match="at least one frame"):
        Video(frames=[], fps=1.0, frame_indices=())


def test_video_parts_must_agree() -> None:
    with pytest.raises(DataError, match="1 frames but 2 frame indices"):
        Video(frames=[FRAME], fps=1.0, frame_indices=(0, 1))
    with pytest.raises(DataError, match="frame index -1 is negative"):
        Video(frames=[FRAME], fps=1.0, frame_indices=(-1,))


def test_labels_count_whole_milliseconds_per_frame() -> None:
    # 1000 / 29.97 = 33.37 ms is cut to 33, so frame 300 is at 9.90 s, not 10.01 s
    video = Video(frames=[FRAME] * 3, fps=29.97, frame_indices=(0, 15, 300))
    assert frame_labels(video) == [
        "Frame 1 sampled at 0.00 seconds: ",
        "Frame 2 sampled at 0.49 seconds: ",
        "Frame 3 sampled at 9.90 seconds: ",
    ]


# Angles in degrees of 2-channel features, 3 frames of 1 x 2 tokens: the change of angle from one
# frame to the next decides. Changes are 10, 90 (second frame) and 40, 0 (third frame).
ANGLES = [[0, 0], [10, 90], [50, 90]]


@pytest.mark.parametrize(
    ("rate", "kept"),
    [
        (0.0, [[1, 1], [1, 1], [1, 1]]),
        (0.1, [[1, 1], [1, 1], [1, 0]]),  # int(5.4) = 5
        (0.3, [[1, 1], [0, 1], [1, 0]]),  # int(4.2) = 4
        (0.5, [[1, 1], [0, 1], [0, 0]]),
        (0.75, [[1, 1], [0, 0], [0, 0]]),  # int(1.5) = 1, but never less than a frame
        (0.99, [[1, 1], [0, 0], [0, 0]]),
    ],
)
def test_evs_keeps_what_changes_most(rate: float, kept: list[list[int]]) -> None:
    angles = torch.deg2rad(torch.tensor(ANGLES, dtype=torch.float64))
    features = torch.stack([angles.cos(), angles.sin()], dim=-1).reshape(3, 1, 2, 2)
    mask = evs_retention_mask(features, rate)
    assert mask.dtype == torch.bool
    assert mask.reshape(3, 2).int().tolist() == kept


def test_evs_ties_go_to_the_earlier_token() -> None:
    # the second frame turns every token by 90 degrees, the third repeats it
    features = torch.tensor([[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4, [[0.0, 1.0]] * 4])
    mask = evs_retention_mask(features.reshape(3, 2, 2, 2), 0.5)
    assert mask.flatten().int().tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.75, 0.9])
def test_evs_agrees_with_transformers(dtype: torch.dtype, rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(9, 4, 4, 24, generator=generator)
    features = (features[:1] + 0.3 * features).to(dtype)  # frames alike, as in a video
    theirs = compute_retention_mask(
        video_embeds=features.reshape(-1, 24),
        thw=torch.tensor([9, 4, 4]),
        spatial_merge_size=1,
        q=rate,
    )
    assert torch.equal(evs_retention_mask(features, rate).flatten(), theirs)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_evs_refuses_rates_outside_its_range(rate: float) -> None:
    with pytest.raises(ValueError, match="0 <= rate < 1"):
        evs_retention_mask(torch.zeros(1, 1, 1, 1), rate)


def test_pruning_keeps_text_and_still_images() -> None:
    text, still, video = 0, 1, 2
    kinds = torch.tensor([text, still, still, text, video, video, text, video, video, text, video])
    masks = [torch.tensor([[[True, True]], [[False, True]]]), torch.tensor([[[False]]])]
    kept = prune_video_tokens(kinds == video, masks)
    assert kept.int().tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0]


def test_pruning_masks_must_cover_the_video_tokens() -> None:
    with pytest.raises(DataError, match="2 video tokens, but the retention masks cover 4"):
        prune_video_tokens(
            torch.tensor([True, True, False]), [torch.ones(1, 2, 2, dtype=torch.bool)]
        )
