import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from nvvl.calib_data.jsonl_files import jsonl_items
from nvvl.calib_data.video_files import read_video
from nvvl.errors import DataError


def write_video(path: Path, num_frames: int, fps: int) -> Path:
    """Write grey frames, each 8 levels brighter than the one before."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(num_frames):
            pixels = np.full((48, 64, 3), 16 + 8 * index, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_frames_are_sampled_twice_a_second(tmp_path: Path) -> None:
    video = read_video(write_video(tmp_path / "a.mp4", num_frames=20, fps=10))
    assert video.fps == 10.0
    # two seconds: four frames, spread from the first to the last
    assert video.frame_indices == (0, 6, 12, 19)
    assert [frame.size for frame in video.frames] == [(64, 48)] * 4
    levels = [frame.convert("L").getpixel((30, 20)) for frame in video.frames]
    # lossy coding moves a flat grey by a level or two
    assert levels == pytest.approx([16 + 8 * index for index in (0, 6, 12, 19)], abs=4)


def test_a_video_of_an_upright_telephone_is_turned(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.zeros((48, 64, 3), dtype=np.uint8)
        pixels[:, :32] = 255  # the left half is white
        frames = [av.VideoFrame.from_ndarray(pixels, format="rgb24")] * 4
        for packet in [*(p for frame in frames for p in stream.encode(frame)), *stream.encode()]:
            container.mux(packet)
    one = 1 << 16
    as_is = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    # ISO 14496-12: x' = -y, y' = x, a quarter turn clockwise with y downwards
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    data = path.read_bytes()
    header = data.index(b"tkhd")
    path.write_bytes(data[:header] + data[header:].replace(as_is, turned, 1))
    frame = np.asarray(read_video(path).frames[0].convert("L"))
    assert frame.shape == (64, 48)
    # lossy coding smears the edge
    assert frame[:24].min() > 200
    assert frame[40:].max() < 50


def test_jsonl_may_name_a_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", num_frames=10, fps=5)
    path = tmp_path / "items.jsonl"
    path.write_text('{"video": "a.mp4", "messages": [{"role": "user", "content": "What moves?"}]}')
    (item,) = (source.load() for source in jsonl_items(path))
    assert item.messages[0].content == "<video>\nWhat moves?"
    assert len(item.videos[0].frames) == 4


def test_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(b"no video at all" * 100)
    with pytest.raises(DataError, match=r"bad.mp4: the video cannot be decoded"):
        read_video(path)


def test_file_without_video_track_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(DataError, match=r"sound.wav: no video track"):
        read_video(path)


def test_metadata_that_is_no_utf_8_says_nothing(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=4, fps=2)
    data = bytearray(path.read_bytes())
    data[data.index(b"Lavf")] = 0xE9  # the name of the encoder, in Latin-1
    path.write_bytes(data)
    assert len(read_video(path).frames) == 4


def test_whatever_pyav_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("unknown pixel format\nof a frame")

    path = write_video(tmp_path / "a.mp4", num_frames=4, fps=2)
    monkeypatch.setattr("av.open", fail)
    with pytest.raises(DataError, match=r"a.mp4: the video cannot be decoded \(unknown pixel form"):
        read_video(path)


@pytest.mark.parametrize("limit", ["_MOST_PIXELS", "MAX_IMAGE_PIXELS"])
def test_frames_too_large_to_keep_are_refused_before_they_are_kept(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", num_frames=4, fps=2)
    most = {"_MOST_PIXELS": 4 * 64 * 48, "MAX_IMAGE_PIXELS": 64 * 48}[limit]
    monkeypatch.setattr(f"nvvl.calib_data.video_files.{limit}", most)
    assert len(read_video(path).frames) == 4
    monkeypatch.setattr(f"nvvl.calib_data.video_files.{limit}", most - 1)
    monkeypatch.delattr("av.VideoFrame.to_image", raising=False)
    message = r"a.mp4: 4 frames of 64 x 48 pixels .*; scale the video down first \(ffmpeg"
    with pytest.raises(DataError, match=message):
        read_video(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.mp4: no such video file"):
        read_video(tmp_path / "absent.mp4")


def test_without_pyav_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'nvvl\[video\]'"):
        read_video(tmp_path / "a.mp4")
