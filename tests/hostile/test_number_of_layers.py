"""Models whose number of layers depends on the images: an index from the end is refused, one from the front is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import UnsupportedAttentionError
from tests.support.hostile_parts import Block, Stem
from tests.support.oracle import attention_matrices
from tests.support.styles import DIM
from tests.support.zoo import enliven


class Adaptive(nn.Module):
    """As many layers as the images ask for: one block again and again, or the first of several."""

    def __init__(self, bright: int, dark: int, shared: bool) -> None:
        super().__init__()
        self.stem, self.head = Stem(), nn.Linear(DIM, 3)
        block = Block()
        self.blocks = nn.ModuleList([block] if shared else [Block() for _ in range(6)])
        self.bright, self.dark = bright, dark

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        left, right = images.chunk(2, dim=-1)
        for number in range(self.bright if left.mean() - right.mean() > 2 else self.dark):
            x = self.blocks[number % len(self.blocks)](x)
        return self.head(x[:, 0])


def model(bright: int, dark: int, shared: bool) -> nn.Module:
    """In evaluation mode; noise is dark, as its halves are alike."""
    torch.manual_seed(0)
    return enliven(Adaptive(bright, dark, shared)).eval()


BRIGHT = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
BRIGHT[..., :24] += 5


@pytest.mark.parametrize("shared", [True, False], ids=["loops", "blocks"])
@pytest.mark.parametrize(("layers", "verify"), [(-1, True), (-1, False), (-2, True), ("all", True)])
def test_where_more_layers_run_an_index_from_the_end_is_refused(layers: Any, verify: bool, shared: bool) -> None:
    with pytest.raises(UnsupportedAttentionError, match=r"ran more attention layers .* noise .* size \(3\)"):
        record_attention(model(5, 3, shared), BRIGHT, layers=layers, verify=verify)


@pytest.mark.parametrize(("bright", "dark"), [(2, 1), (4, 3)])
def test_one_layer_more_is_seen(bright: int, dark: int) -> None:
    with pytest.raises(UnsupportedAttentionError, match="ran more attention layers"):
        record_attention(model(bright, dark, shared=True), BRIGHT)


@pytest.mark.parametrize("shared", [True, False], ids=["loops", "blocks"])
@pytest.mark.parametrize("layers", [-1, "all"])
def test_where_fewer_layers_run_an_index_from_the_end_is_refused(layers: Any, shared: bool) -> None:
    with pytest.raises(
        UnsupportedAttentionError, match=r"ran fewer attention layers|did not run for an image that was given"
    ):
        record_attention(model(3, 5, shared), BRIGHT, layers=layers)


@pytest.mark.parametrize("shared", [True, False], ids=["loops", "blocks"])
def test_an_index_from_the_front_is_read(shared: bool) -> None:
    adaptive = model(5, 3, shared)
    (layer,) = record_attention(adaptive, BRIGHT, layers=1)
    matrix = attention_matrices(adaptive, BRIGHT, lambda m, x: m(x))[1]
    torch.testing.assert_close(layer.rows.double(), matrix[:, :, 0], atol=4e-5, rtol=0)


@pytest.mark.parametrize("layers", [-1, -2, "all"])
def test_the_number_is_looked_at_in_every_recording(layers: Any) -> None:
    adaptive = model(3, 3, shared=False)
    recorder = AttentionRecorder(adaptive, layers=layers)
    assert {layer.layer for layer in recorder(BRIGHT)} <= {0, 1, 2}
    adaptive.bright = 4  # type: ignore[assignment]  # as training may move what the number hangs on
    with pytest.raises(UnsupportedAttentionError, match="ran more attention layers"):
        recorder(BRIGHT)
    adaptive.bright = 2  # type: ignore[assignment]
    with pytest.raises(
        UnsupportedAttentionError, match=r"ran fewer attention layers|did not run for an image that was given"
    ):
        recorder(BRIGHT)
