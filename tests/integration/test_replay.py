"""`attn-monitor replay` and the animations that it writes, read back by Pillow and PyAV."""

from __future__ import annotations

import io
import tracemalloc
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from attn_monitor import ArchiveError, AttentionSnapshot, ProbeBatch
from attn_monitor.attention import LayerAttention
from attn_monitor.commands import replay as commands_replay
from attn_monitor.commands.replay import replay
from attn_monitor.draw import animation_files
from attn_monitor.draw.animation_files import FORMATS, GifAnimation, WebPAnimation, animation_file
from attn_monitor.record.archive import snapshot_path


def archive(folder: Path, steps: int, images: int = 2, grids: tuple[tuple[int, int], ...] = ((4, 4),)) -> Path:
    """A run of this many snapshots, whose grid changes from step to step if there are several."""
    probe = ProbeBatch(torch.randn(images, 3, 32, 32))
    probe.save(folder / "probe.npz")
    for step in range(steps):
        gh, gw = grids[step % len(grids)]
        rows = torch.randn(images, 3, gh * gw + 1).softmax(-1)
        layer = LayerAttention(1, "attn", rows, 1, (gh, gw), False, 0.0)
        snapshot = AttentionSnapshot(step, 0, probe.names, {("backbone", 1): layer})
        snapshot.save(snapshot_path(folder, step))
    return folder


def colours(count: int, size: tuple[int, int] = (40, 56)) -> list[np.ndarray[Any, Any]]:
    """Pictures of one colour each, with a corner that stays as it is."""
    pictures = []
    for index in range(count):
        picture = np.full((*size, 3), (200 - 30 * index, 30 * index, 90), np.uint8)
        picture[:16, :16] = 255
        pictures.append(picture)
    return pictures


def read(path: Path) -> tuple[list[np.ndarray[Any, Any]], list[float]]:
    """Pictures of an animation, and the seconds that each is shown."""
    if path.suffix == ".mp4":
        av = pytest.importorskip("av")
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
            return [f.to_ndarray(format="rgb24") for f in frames], [float(f.duration * f.time_base) for f in frames]
    with Image.open(path) as animation:
        frames = [(np.asarray(f.convert("RGB")), f.info["duration"] / 1000) for f in ImageSequence.Iterator(animation)]
    return [f for f, _ in frames], [s for _, s in frames]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("size", [(40, 56), (41, 57)])
def test_animations_hold_the_pictures_for_their_time(tmp_path: Path, ending: str, size: tuple[int, int]) -> None:
    if ending == ".mp4":
        pytest.importorskip("av")
    pictures, seconds = colours(6, size), [0.1, 0.1, 0.25, 0.5, 0.1, 1.0]
    with animation_file(tmp_path / f"x{ending}") as animation:
        for picture, shown in zip(pictures, seconds, strict=True):
            animation.add(picture, shown)
    found, durations = read(tmp_path / f"x{ending}")
    assert len(found) == 6
    for picture, wanted in zip(found, pictures, strict=True):
        picture = picture[: size[0], : size[1]]
        assert np.abs(picture.astype(int) - wanted).mean() < 6
    assert durations == pytest.approx(seconds, abs=0.011)
    assert [path.name for path in tmp_path.iterdir()] == [f"x{ending}"]


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), 60, 24])
@pytest.mark.parametrize("ending", FORMATS)
def test_a_second_stays_a_second(tmp_path: Path, ending: str, rate: Fraction | int) -> None:
    """Milliseconds and hundredths are rounded, and not all in one direction; a GIF plays at most 50 a second."""
    if ending == ".mp4":
        pytest.importorskip("av")
    with animation_file(tmp_path / f"x{ending}") as animation:
        for index in range(120):
            animation.add(np.full((16, 16, 3), 40 * index % 250, np.uint8), 1 / Fraction(rate))
    found, durations = read(tmp_path / f"x{ending}")
    assert sum(durations) == pytest.approx(120 / rate, abs=0.02)
    if ending == ".gif":
        assert min(durations) >= 0.02
    else:
        assert len(found) == 120


def test_what_stays_as_it_is_costs_nothing() -> None:
    """A photograph that does not change, next to a block that does."""
    photograph = np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)
    sizes = []
    for count in (1, 21):
        file = io.BytesIO()
        animation = WebPAnimation(file)
        for index in range(count):
            photograph[:16, :16] = 10 * index
            animation.add(photograph.copy(), 0.1)
        animation.close()
        sizes.append(len(file.getvalue()))
    assert sizes[1] - sizes[0] < 20 * 600
    assert sizes[0] > 10_000


def test_slow_changes_add_up_to_one_that_is_seen() -> None:
    file = io.BytesIO()
    animation = WebPAnimation(file)
    for level in range(100):
        animation.add(np.full((32, 32, 3), level, np.uint8), 0.1)
    animation.close()
    shown = 0.0
    with Image.open(file) as read_back:
        for frame in ImageSequence.Iterator(read_back):  # pictures that hardly differ are one
            assert abs(int(np.asarray(frame.convert("L"))[8, 8]) - shown / 100) <= 12
            shown += frame.info["duration"]
    assert shown == 10_000


@pytest.mark.parametrize("ending", [".webp", ".gif"])
def test_what_is_held_in_memory_has_a_limit(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation_files, "MOST_BYTES", 3 * colours(1)[0].nbytes)

    def write(count: int) -> None:
        with animation_file(tmp_path / f"x{ending}") as animation:
            for picture in colours(count):
                animation.add(picture, 0.1)

    with pytest.raises(ValueError, match=r"memory\. Write an \.mp4"):
        write(4)
    assert list(tmp_path.iterdir()) == []
    write(3)
    assert len(read(tmp_path / f"x{ending}")[0]) == 3


@pytest.mark.parametrize("ending", FORMATS)
def test_an_animation_that_fails_leaves_nothing(tmp_path: Path, ending: str) -> None:
    if ending == ".mp4":
        pytest.importorskip("av")
    (tmp_path / f"x{ending}").write_text("of before")

    def draw() -> None:
        with animation_file(tmp_path / f"x{ending}") as animation:
            animation.add(colours(1)[0], 1)
            raise RuntimeError("drawing")

    with pytest.raises(RuntimeError, match="drawing"):
        draw()
    assert [path.name for path in tmp_path.iterdir()] == [f"x{ending}"]
    assert (tmp_path / f"x{ending}").read_text() == "of before"


def test_gifs_of_pictures_that_do_not_change() -> None:
    file = io.BytesIO()
    animation = GifAnimation(file)
    for _ in range(3):
        animation.add(colours(1)[0], 0.2)
    animation.close()
    with Image.open(file) as read_back:
        total = sum(frame.info["duration"] for frame in ImageSequence.Iterator(read_back))
    assert total == 600


@pytest.mark.parametrize("format", ["webp", "mp4", "gif"])
def test_replay_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: Any) -> None:
    if format == "mp4":
        pytest.importorskip("av")
    replay(str(archive(tmp_path / "run", 3)), out=str(tmp_path / "out"), format=format)
    said = capsys.readouterr()
    paths = [Path(line) for line in said.out.splitlines()[:6]]
    assert {p.name for p in paths} == {
        f"image{i}{e}" for i in (0, 1) for e in ("-panel.png", "-filmstrip.png", f".{format}")
    }
    assert sorted(paths) == sorted((tmp_path / "out").iterdir())
    assert said.err == "", "no progress bar where there is no terminal"
    found, durations = read(tmp_path / "out" / f"image0.{format}")
    assert len(found) == 3
    assert durations == pytest.approx([0.4, 0.4, 1.6], abs=0.02)
    assert np.abs(found[0].astype(int) - found[1]).max() > 50


def test_broken_snapshots_are_left_out_and_named(tmp_path: Path) -> None:
    folder = archive(tmp_path / "run", 4)
    for step in (1, 3):
        snapshot_path(folder, step).write_bytes(b"damaged")
    with pytest.raises(ArchiveError, match=r"without .*step-000000001\.npz: the file .*step-000000003\.npz: the file"):
        replay(str(folder), out=str(tmp_path / "out"))
    found, _ = read(tmp_path / "out" / "image1.webp")
    assert len(found) == 2
    assert (tmp_path / "out" / "image1-filmstrip.png").exists()


def test_nothing_is_left_where_no_snapshot_can_be_read(tmp_path: Path) -> None:
    folder = archive(tmp_path / "run", 2)
    for step in range(2):
        snapshot_path(folder, step).write_bytes(b"damaged")
    with pytest.raises(ArchiveError, match="no snapshot can be read"):
        replay(str(folder), out=str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_snapshots_of_two_runs_leave_no_animation(tmp_path: Path) -> None:
    folder, other = archive(tmp_path / "run", 3), archive(tmp_path / "other", 2, images=1)
    snapshot_path(other, 1).replace(snapshot_path(folder, 1))
    with pytest.raises(ArchiveError, match="these are files of two runs"):
        replay(str(folder), out=str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_grid_that_changes_in_a_run(tmp_path: Path) -> None:
    replay(str(archive(tmp_path / "run", 4, grids=((4, 4), (9, 3)))), out=str(tmp_path / "out"))
    found, _ = read(tmp_path / "out" / "image0.webp")
    assert len({picture.shape for picture in found}) == 1


def test_memory_does_not_grow_with_the_number_of_snapshots(tmp_path: Path) -> None:
    pytest.importorskip("av")
    peaks = []
    for steps in (12, 12, 48):  # the first fills caches
        folder = archive(tmp_path / f"{len(peaks)}", steps, images=1)
        tracemalloc.start()
        replay(str(folder), out=str(tmp_path / "out"), format="mp4")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_panel = 400 * 400 * 3
    assert peaks[2] - peaks[1] < 12 * one_panel, "36 more, but for what drawing and encoding hold at the same time"


def test_what_is_held_in_memory_shows_some_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evenly spaced, the last one that can be read included."""
    monkeypatch.setattr(commands_replay, "HELD", 3)
    monkeypatch.setattr(commands_replay, "STRIP_COLUMNS", 2)
    folder = archive(tmp_path / "run", 9, images=1)
    replay(str(folder), out=str(tmp_path / "out"))
    assert len(read(tmp_path / "out" / "image0.webp")[0]) == 3
    assert "animations show 3 of 9 snapshots, evenly spaced; --format mp4 shows all" in capsys.readouterr().err
    snapshot_path(folder, 8).write_bytes(b"damaged")
    with pytest.raises(ArchiveError, match=r"pictures are without .*step-000000008"):
        replay(str(folder), out=str(tmp_path / "out"))
    assert len(read(tmp_path / "out" / "image0.webp")[0]) == 3
    assert "metrics at step 7" in capsys.readouterr().out
