"""Video files, decoded with PyAV where it is installed (the extra ``nvvl[video]``)."""

from pathlib import Path

from nvvl.errors import DataError
from nvvl.model.video import Video, sample_frames


def read_video(path: Path) -> Video:
    """Decode the frames of a video file that the model is shown: 2 a second, at most 128.

    Frames are turned upright, as photographs are: a telephone held upright writes them lying down.
    The file is decoded twice, for the number of frames in a header is often missing or wrong.

    Raises:
        DataError: if PyAV is not installed, or the file is missing, has no video track, states no
            frame rate, or cannot be decoded.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise DataError(
            f"{path}: video files need PyAV; install it with: pip install 'nvvl[video]'"
        ) from None
    if not path.is_file():
        raise DataError(f"{path}: no such video file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video track in the file")
            rate = container.streams.video[0].average_rate
            num_frames = sum(1 for _ in container.decode(video=0))
        if not rate or not num_frames:
            raise DataError(f"{path}: required frames and a frame rate, got {num_frames}, {rate}")
        indices = sample_frames(num_frames, float(rate))
        wanted = frozenset(indices)
        with av.open(str(path)) as container:
            frames = tuple(
                frame.to_image().rotate(frame.rotation, expand=True)
                for index, frame in enumerate(container.decode(video=0))
                if index in wanted
            )
    except FFmpegError as error:
        raise DataError(f"{path}: the video cannot be decoded ({error})") from None
    return Video(frames, float(rate), indices)
