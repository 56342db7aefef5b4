"""Snapshots in notebooks: a picture of themselves, and a matplotlib figure."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from attn_monitor import ProbeBatch
from attn_monitor.draw import notebook
from tests.support.runs import write_run


def test_a_snapshot_shows_itself(tmp_path: Path) -> None:
    (snapshot,) = write_run(tmp_path, [0], sharpness=[5])
    with Image.open(io.BytesIO(snapshot._repr_png_())) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_a_layer_shows_itself_and_both_say_what_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles name role and layer, and how many of the images are shown; in a list a layer is one line of text."""
    titles: list[str] = []
    monkeypatch.setattr(notebook, "draw_text_within", lambda picture, at, text, *rest: titles.append(text))
    probe = ProbeBatch(torch.randn(6, 3, 32, 32))
    (snapshot,) = write_run(tmp_path, [0], sharpness=[5], probe=probe)
    snapshot._repr_png_()
    assert titles[0] == "teacher of student and teacher · layer 1 (blocks.1.attn) · step 0 · 4 of 6 images"
    del titles[:]
    layer = snapshot.layer("student")
    with Image.open(io.BytesIO(layer._repr_png_())) as picture:
        assert picture.height > 4 * 100, "four images"
    assert titles[0] == "VisionTransformer · layer 1 (blocks.1.attn) · query cls · 4 of 6 images"
    assert "\n" not in repr(layer)
    assert repr(layer).startswith("LayerAttention(layer=1, name='blocks.1.attn', rows=6 x 4 x 17, grid=4 x 4, ")


def test_a_figure_holds_the_maps(tmp_path: Path) -> None:
    matplotlib.use("agg")
    (snapshot,) = write_run(tmp_path, [0], sharpness=[5])
    figure = snapshot.plot(1, role="student")
    images = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(images) == 5
    maps = snapshot.maps("student")[1] * 16
    assert np.allclose(images[0].get_array(), maps.mean(0).numpy(), atol=1e-5)
    assert np.allclose(images[3].get_array(), maps[2].numpy(), atol=1e-5)
    assert any("student" in text.get_text() for text in figure.texts)
    figure.savefig(tmp_path / "figure.png")
    with pytest.raises(KeyError, match="role 'other' is not in this snapshot"):
        snapshot.plot(role="other")


@pytest.mark.slow
def test_without_matplotlib_it_says_what_to_install(tmp_path: Path) -> None:
    write_run(tmp_path, [0], sharpness=[5])
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from attn_monitor import AttentionSnapshot\n"
        f"snapshot = AttentionSnapshot.load({str(tmp_path / 'step-000000000.npz')!r})\n"
        "assert snapshot._repr_png_()\n"
        "snapshot.plot()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stderr.splitlines()[-1].endswith('Run: pip install "attn_monitor[plot]"')
