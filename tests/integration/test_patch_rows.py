"""What patches themselves attend to: values against float64, which patches are kept, and refusals in words."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.commands import cli
from attn_monitor.commands.support import patch_rows
from attn_monitor.commands.support.patch_rows import rows_of_patches
from attn_monitor.offline import attention_player
from tests.support.helpers import tiny_vit
from tests.support.oracle import attention_matrices


def rows_of(model: nn.Module, images: Tensor, room: int = 10**9, layers: Any = "all") -> Any:
    snapshot = AttentionMonitor(ProbeBatch(images), layers=layers).snapshot({"backbone": model}, step=0)
    recorded = {layer: snapshot.layer("backbone", layer) for layer in snapshot.layers_of("backbone")}
    return rows_of_patches(model, images, recorded, "cls", room)


def test_rows_are_those_of_float64_attention() -> None:
    torch.manual_seed(0)
    model, images = tiny_vit(reg_tokens=2), torch.randn(2, 3, 32, 32)
    for block in model.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=0.4)
    truth = attention_matrices(model, images, default_forward)
    rows, notes = rows_of(model, images)
    assert notes == []
    assert list(rows) == [0, 1]
    for layer, found in rows.items():
        assert found.patches == list(range(16))
        of_patches = truth[layer][:, :, 3:]  # after CLS and registers
        assert of_patches.std() > 0.02, "no two patches attend alike"
        np.testing.assert_allclose(found.rows.float(), of_patches, rtol=2e-3, atol=1e-4)


def test_patches_are_spread_where_not_all_fit() -> None:
    torch.manual_seed(0)
    model, images = tiny_vit(img_size=48), torch.randn(2, 3, 48, 48)  # 6 x 6 patches and CLS, 4 heads
    truth = attention_matrices(model, images, default_forward)[1]
    one = 2 * 2 * 4 * 37  # bytes of a patch
    rows, notes = rows_of(model, images, 9 * one, layers=-1)
    assert rows[1].patches == [0, 2, 4, 12, 14, 16, 24, 26, 28]
    assert notes == ["Layer 1: attention of 9 of 36 patches, evenly spaced"]
    np.testing.assert_allclose(
        rows[1].rows.float(), truth[:, :, [1 + p for p in rows[1].patches]], rtol=2e-3, atol=1e-4
    )
    (few, _) = rows_of(model, images, 1, layers=-1)
    assert few[1].patches == [14]


class Pooled(nn.Module):
    """Attention of a learnt query alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.query = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16))
        self.kv = nn.Linear(16, 32)

    def forward(self, images: Tensor) -> Tensor:
        k, v = self.kv(self.patches(images).flatten(2).mT).chunk(2, -1)
        q = self.query.expand(len(images), -1, -1)
        return nn.functional.scaled_dot_product_attention(*(x[:, None] for x in (q, k, v))).flatten(1)


def test_patches_that_are_no_queries_are_refused_in_words() -> None:
    rows, notes = rows_of(Pooled().eval(), torch.randn(1, 3, 32, 32), layers=-1)
    assert rows == {}
    assert notes == ["Layer 0: patches are no queries here, so none has attention of its own"]


def test_the_page_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    player = attention_player(model, images)
    assert len(repr(player)) < 100, "notebooks keep it beside the frame"
    page = player.page
    manifest = json.loads(page.partition('id="manifest">')[2].partition("</script>")[0])
    (run,) = manifest["runs"]
    (layer,) = run["layouts"][0]
    assert (layer["queries"], layer["features"]) == (list(range(16)), 32)
    start, length = run["steps"][0]["blocks"]["1"]
    packed = page.partition('id="blocks">')[2][start : start + length]
    data = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
    of_rows, of_features, of_queries = 2 * 4 * 17, 2 * 16 * 32, 2 * 4 * 16 * 17
    halves = np.ascontiguousarray(data[: 2 * (of_rows + of_features + of_queries)].reshape(2, -1).T).view(np.float16)
    truth = attention_matrices(model, images, default_forward)[1][:, :, 1:]
    np.testing.assert_allclose(halves[of_rows + of_features :, 0].reshape(truth.shape), truth, rtol=2e-3, atol=1e-4)
    monkeypatch.setattr(patch_rows, "ROOM", 3000)
    assert "attention of 4 of 16 patches" in attention_player(model, images).page


def test_show_writes_the_page(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "tests.support.helpers:tiny_vit()"
    cli.main(["show", model, str(photographs / "coffee.png"), "--size", "32", "--out", str(tmp_path), "--player"])
    assert str(tmp_path / "player.html") in capsys.readouterr().out
    assert '"queries":[0,1,2' in (tmp_path / "player.html").read_text()
