"""Video files, decoded with PyAV where it is installed (the extra ``nvvl[video]``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from nvvl.errors import DataError, first_line
from nvvl.model.tiling import MAX_IMAGE_PIXELS
from nvvl.model.video import Video, sample_frames

if TYPE_CHECKING:
    from av.container import InputContainer

# Of all frames that are kept of a video, 4 bytes each: 128 frames of 3840 x 2160 are just below.
_MOST_PIXELS = 1 << 30


def read_video(path: Path) -> Video:
    """Decode the frames of a video file that the model is shown: 2 a second, at most 128.

    Frames are turned upright, as photographs are: a telephone held upright writes them lying down.
    The file is decoded twice, for the number of frames in a header is often missing or wrong, and
    frames are kept only once it is known that all that are shown can be.

    Raises:
        DataError: if PyAV is not installed, or the file is missing, has no video track, states no
            frame rate, cannot be decoded, or has frames too large to be kept.
    """
    try:
        import av
    except ImportError:
        raise DataError(
            f"{path}: video files need PyAV; install it with: pip install 'nvvl[video]'"
        ) from None
    if not path.is_file():
        raise DataError(f"{path}: no such video file")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            rate, num_frames, size = _survey(container)
        indices = sample_frames(num_frames, rate)
        _require_room(size, len(indices))
        wanted = frozenset(indices)
        with av.open(str(path), metadata_errors="replace") as container:
            frames = tuple(
                frame.to_image().rotate(frame.rotation, expand=True)
                for index, frame in enumerate(container.decode(video=0))
                if index in wanted
            )
        return Video(frames, rate, indices)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # FFmpeg's errors, and whatever PyAV raises on damaged files
        raise DataError(f"{path}: the video cannot be decoded ({first_line(error)})") from None


def _survey(container: "InputContainer") -> tuple[float, int, tuple[int, int]]:
    """Return frame rate, number of frames, and width and height of the largest frame."""
    if not container.streams.video:
        raise DataError("no video track in the file")
    rate = container.streams.video[0].average_rate
    num_frames, size = 0, (0, 0)
    for frame in container.decode(video=0):
        num_frames += 1
        size = max(size, (frame.width, frame.height), key=lambda sides: sides[0] * sides[1])
    if not rate or not num_frames:
        raise DataError(f"required frames and a frame rate, got {num_frames}, {rate}")
    return float(rate), num_frames, size


def _require_room(size: tuple[int, int], num_shown: int) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS or width * height * num_shown > _MOST_PIXELS:
        raise DataError(
            f"{num_shown} frames of {width} x {height} pixels are to be shown; required at most "
            f"{_MOST_PIXELS} pixels in all and {MAX_IMAGE_PIXELS} a frame; scale the video down "
            "first (ffmpeg -i IN -vf scale=1920:-2 OUT)"
        )
