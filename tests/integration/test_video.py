"""`attn-monitor video`: real clips in and out, made by panning over a photograph."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attn_monitor import functional as F
from attn_monitor import record_attention
from attn_monitor.attention import LayerAttention
from attn_monitor.commands.support.devices import DeviceError, patch_size
from attn_monitor.commands.support.frames import read_frames
from attn_monitor.commands.video import attention_video, model_size, recorded_batches, video
from attn_monitor.draw.animation_files import animation_file
from attn_monitor.draw.canvas import MISSING
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.draw.video_frames import FrameDrawing
from attn_monitor.probe.normalisation import IMAGENET_MEAN, IMAGENET_STD
from tests.faults.test_optional_packages import run_without
from tests.integration.test_cli import MODEL, mistake
from tests.integration.test_replay import read
from tests.integration.test_show import fragile, full, lively
from tests.support.helpers import tiny_vit
from tests.support.tiers import sweep

SMALL = {"size": 32, "weights": False, "batch": 4}


@pytest.fixture(scope="session")
def pan(photographs: Path) -> list[np.ndarray[Any, Any]]:
    """A view of 64 × 99 pixels that moves over a photograph, 20 frames."""
    with Image.open(photographs / "coffee.png") as photograph:
        pixels = np.asarray(photograph.convert("RGB").resize((200, 133)))
    return [np.ascontiguousarray(pixels[i : i + 64, 4 * i : 4 * i + 99]) for i in range(20)]


@pytest.fixture(scope="session")
def clip(pan: list[np.ndarray[Any, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Matroska file, which can be read from its beginning: 64 × 98 pixels at 12.5 frames a second."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clip") / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(25, 2), options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 98, 64, "yuv420p", 2_000_000
        for frame in pan:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame[:, :98].copy(), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def folder_of(pan: list[np.ndarray[Any, Any]], folder: Path) -> Path:
    """Frames as files whose names sort wrongly as texts: 1.png, 10.png, 2.png."""
    folder.mkdir()
    for number, frame in enumerate(pan, 1):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder


def test_maps_are_those_of_record_attention(pan: list[np.ndarray[Any, Any]]) -> None:
    model = tiny_vit().eval()
    frames = pan[:7]
    batches = list(recorded_batches(model, iter(frames), layers="all", query="cls", size=None, batch=3))
    assert [len(photos) for photos, _ in batches] == [3, 3, 1]
    cropped = np.stack([frame[:, 1:97] for frame in frames])  # 99 pixels are twelve patches of 8, and three
    np.testing.assert_array_equal(np.stack([photo for photos, _ in batches for photo in photos]), cropped)
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    images = torch.from_numpy((cropped.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    for index, expected in enumerate(record_attention(model, images, layers="all")):
        maps = torch.cat([recorded[index].maps for _, recorded in batches])
        assert maps.shape == (7, 4, 8, 12)
        torch.testing.assert_close(maps, expected.maps, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ending", sweep([".mp4", ".webp", ".gif"], quick=2))
def test_from_file_to_file(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    out = tmp_path / "new" / f"x{ending}"
    video(MODEL, str(clip), out=str(out), **SMALL)
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{out}\n", "")
    assert list(out.parent.iterdir()) == [out]
    found, durations = read(out)
    assert durations == pytest.approx([0.08] * 20, abs=1e-6)
    assert found[0].std() > 20
    assert np.abs(found[0].astype(int) - found[-1]).mean() > 3


def test_times_of_frames_are_kept(pan: list[np.ndarray[Any, Any]], tmp_path: Path) -> None:
    """A telephone's, that come when they like."""
    pytest.importorskip("av")
    times = [0.04 + 0.02 * (index % 3) for index in range(20)]
    with animation_file(tmp_path / "x.mp4") as animation:
        for frame, seconds in zip(pan, times, strict=True):
            animation.add(frame, seconds)
    video(MODEL, str(tmp_path / "x.mp4"), out=str(tmp_path / "y.mp4"), **SMALL)
    assert read(tmp_path / "y.mp4")[1] == pytest.approx(times, abs=1e-4)


def test_folders_are_played_in_their_natural_order(pan: list[np.ndarray[Any, Any]], tmp_path: Path) -> None:
    folder = folder_of(pan, tmp_path / "frames")
    (folder / "notes.txt").write_text("no frame")
    frames = list(read_frames(folder, fps=10))
    np.testing.assert_array_equal(np.stack([f.pixels for f in frames]), np.stack(pan))
    assert {f.seconds for f in frames} == {Fraction(1, 10)}
    video(MODEL, str(folder), out=str(tmp_path / "x.webp"), fps=10, **SMALL)
    assert read(tmp_path / "x.webp")[1] == pytest.approx([0.1] * 20)


def test_telephones_tell_how_to_turn_the_picture(pan: list[np.ndarray[Any, Any]], tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write it")
        stream.set_display_rotation(90)
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:16, :16] = 255
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    (frame,) = read_frames(tmp_path / "x.mp4")
    assert frame.pixels.shape == (64, 48, 3)
    bright = frame.pixels.mean(-1) > 128
    assert bright[-16:, :16].all()  # turned by 90° against the clock, as FFmpeg says it
    assert not bright[:16].any()


def test_the_threshold_is_applied() -> None:
    """What the mask leaves out is hidden, what it keeps is not, whichever share is asked for."""
    rows = torch.randn(1, 2, 17).mul(2).softmax(-1)
    attention = LayerAttention(1, "attn", rows, 1, (4, 4), False, 0.0)
    photo = np.full((32, 32, 3), 200, np.uint8)
    for threshold in (0.3, 0.9):
        options = DrawingOptions(threshold, cell=64)
        drawn = {
            outside: FrameDrawing(options, outside).draw(photo, [attention], 0)
            for outside in ("attention", "photo", "black")
        }
        kept = F.mass_mask(attention.maps[0, 1].flatten(), threshold).unflatten(0, (4, 4)).numpy()
        assert 0 < kept.mean() < 1
        # The middle of each patch of the last of four cells, where no outline is.
        left, top = 8 + 3 * 72, 8 + 24
        for row in range(4):
            for column in range(4):
                pixel = top + 16 * row + 8, left + 16 * column + 8
                black, attention_colour = drawn["black"][pixel], drawn["attention"][pixel]
                assert (black == (attention_colour if kept[row, column] else 0)).all()
                assert kept[row, column] or (drawn["photo"][pixel] == int(0.62 * 200)).all()


@pytest.mark.parametrize("outside", ["attention", "photo", "black"])
def test_maps_that_are_missing_are_seen_to_be_so(outside: str) -> None:
    rows = torch.full((1, 1, 17), torch.nan)
    attention = LayerAttention(1, "attn", rows, 1, (4, 4), False, 0.0)
    photo = np.full((32, 32, 3), 200, np.uint8)
    drawn = FrameDrawing(DrawingOptions(cell=64), outside).draw(photo, [attention], 0)
    assert (drawn == MISSING).all(-1).sum() == 2 * 64 * 64


@pytest.mark.parametrize("outside", ["photo", "black"])
def test_uniform_maps_have_no_mask_outside_of_which_anything_is_hidden(outside: str) -> None:
    attention = LayerAttention(1, "attn", torch.full((1, 1, 17), 1 / 17), 1, (4, 4), False, 0.0)
    photo = np.full((32, 32, 3), 200, np.uint8)
    drawn = [FrameDrawing(DrawingOptions(cell=64), how).draw(photo, [attention], 0) for how in (outside, "attention")]
    np.testing.assert_array_equal(*drawn)


def test_wrong_arguments(pan: list[np.ndarray[Any, Any]], tmp_path: Path) -> None:
    folder = str(folder_of(pan[:2], tmp_path / "frames"))
    out = str(tmp_path / "x.webp")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"out": str(tmp_path / "x.avi")}, r"x\.avi: expected a name that ends in \.webp, \.mp4, \.gif"),
        ({"outside": "white"}, "outside='white': expected one of attention, photo, black"),
        ({"drawing": DrawingOptions(heads=[0, 4])}, r"heads=\[4\]: expected heads from 0 to 3"),
        ({"device": "toaster"}, "device='toaster': "),
        ({"batch": 0}, "batch=0: expected at least 1 frame"),
        ({"fps": 0}, r"fps=0: expected frames per second"),
        ({"size": -64}, r"size=-64: expected pixels of at least 1, one number, \[height, width\]"),
        ({"size": 4}, r"size=4: frames of 64 × 99 become 4 × 6 pixels, expected at least one patch of 8 × 8"),
    ]
    for arguments, text in wrong:
        with pytest.raises(ValueError, match=text):
            video(MODEL, folder, **{"out": out, **SMALL, **arguments})
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]


def test_sizes() -> None:
    assert model_size((1080, 1920), 224, (16, 16)) == ((224, 398), (224, 384))
    assert model_size((1920, 1080), 224, (14, 14)) == ((398, 224), (392, 224))
    assert model_size((100, 99), None, (16, 16)) == ((100, 99), (96, 96))
    assert model_size((100, 200), (50, 60), (16, 16)) == ((50, 100), (50, 60))
    assert patch_size(tiny_vit()) == (8, 8)
    assert patch_size(nn.Conv2d(3, 8, (4, 2), (4, 2))) == (4, 2)
    assert patch_size(nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, (4, 2), (4, 2)))) is None


def test_frames_of_other_sizes_are_cut_to_the_first(pan: list[np.ndarray[Any, Any]]) -> None:
    frames = [pan[0], pan[1][:40], pan[2][:, :50]]
    pictures = list(attention_video(tiny_vit().eval(), frames, size=32))
    assert len({picture.shape for picture in pictures}) == 1


def test_a_video_that_ends_in_mid_frame(clip: Path, tmp_path: Path) -> None:
    content = clip.read_bytes()
    (tmp_path / "half.mkv").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.mkv: it .*of 1\.6 seconds could be read\. What could be read is in"):
        video(MODEL, str(tmp_path / "half.mkv"), out=str(tmp_path / "x.gif"), **SMALL)
    found, durations = read(tmp_path / "x.gif")
    assert 5 <= len(found) <= 11
    assert sum(durations) < 1


@pytest.mark.parametrize("kind", ["index lost", "text", "empty", "playlist", "sound"])
def test_files_that_are_no_videos(clip: Path, tmp_path: Path, kind: str) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "x.mp4"
    if kind == "index lost":
        video(MODEL, str(clip), out=str(path), **SMALL)
        path.write_bytes(path.read_bytes()[:-3000])
    elif kind == "playlist":  # must not be followed: it may name other files, and servers
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n")
    elif kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 4410), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
    else:
        path.write_bytes(b"text" * (kind == "text"))
    with pytest.raises(ValueError, match=r"x\.mp4: (is no video that can be read|has no video stream)"):
        video(MODEL, str(path), out=str(tmp_path / "y.webp"), **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


def test_frames_that_cannot_be_read(pan: list[np.ndarray[Any, Any]], tmp_path: Path) -> None:
    folder = folder_of(pan[:4], tmp_path / "frames")
    (folder / "2.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot read .*2\.png .*What could be read is in"):
        video(MODEL, str(folder), out=str(tmp_path / "x.webp"), **SMALL)
    assert len(read(tmp_path / "x.webp")[0]) == 3
    for path in folder.iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot read"):
        video(MODEL, str(folder), out=str(tmp_path / "y.webp"), **SMALL)
    assert not (tmp_path / "y.webp").exists()


@pytest.mark.slow
def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("no video")
    assert "nowhere.mp4: does not exist" in mistake("video", MODEL, "nowhere.mp4", "--out", str(tmp_path / "x.gif"))


@pytest.mark.slow
def test_without_pyav_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"")
    main = "from attn_monitor.commands.cli import main\nmain()"
    for arguments in ([str(tmp_path / "x.mp4"), "--out", "x.gif"], [str(tmp_path), "--out", "x.mp4"]):
        done = run_without(("av",), f"sys.argv[1:] = ['video', {MODEL!r}, *{arguments}]\n{main}")
        assert done.returncode == 1
        assert done.stderr.endswith(
            'a video needs av, which is not installed. Run: pip install "attn_monitor[video]"\n'
        )


@pytest.mark.slow
def test_frames_are_held_a_batch_at_a_time(pan: list[np.ndarray[Any, Any]]) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def frames() -> Iterator[np.ndarray[Any, Any]]:
        nonlocal most
        for frame in pan * 2:
            copy = frame.copy()
            alive.append(weakref.ref(copy))
            yield copy
            del copy
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))

    assert sum(1 for _ in attention_video(tiny_vit().eval(), frames(), size=None, batch=4)) == 40
    assert most <= 2 * 4


def test_fewer_frames_at_a_time_when_memory_runs_out(
    pan: list[np.ndarray[Any, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    choice: dict[str, Any] = {"layers": -1, "query": "cls", "size": None, "batch": 4}
    few, all_ = (
        torch.cat([recorded[0].maps for _, recorded in recorded_batches(model, pan[:7], **choice)])
        for model in (fragile(), lively())
    )
    assert capsys.readouterr().err == "memory ran out with 4 frames: going on with 2 at a time\n"
    torch.testing.assert_close(few, all_, rtol=1e-4, atol=1e-6)
    with pytest.raises(DeviceError, match="memory ran out on the CPU"):
        list(attention_video(full(), pan[:7], size=None))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(pan: list[np.ndarray[Any, Any]], tmp_path: Path) -> None:
    """From folder to MP4; the second time is measured, as the first fills caches."""
    pytest.importorskip("av")
    peaks = []
    for count in (1, 1, 3):
        folder = folder_of(pan * count, tmp_path / f"{len(peaks)}")
        tracemalloc.start()
        video(MODEL, str(folder), out=str(tmp_path / f"{len(peaks)}.mp4"), **SMALL)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_picture = read(tmp_path / "0.mp4")[0][0].nbytes
    assert peaks[2] - peaks[1] < one_picture
