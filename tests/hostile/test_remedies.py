"""The remedies that refusals name are tried: another layer, another query, images of other channels."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import record_attention
from attn_monitor.errors import ForwardError, UnsupportedAttentionError
from tests.hostile.test_more_axes import LIMIT, images_of, off_by, sharp
from tests.support.more_axes import AnyViT
from tests.support.oracle import attention_matrices
from tests.support.styles import Block, Packed


def over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention between channels, which has no map."""
    q, k, v = (x.permute(0, 2, 3, 1) for x in (q, k, v))  # (B, H, D, N)
    return ((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2)


def arguments_in(text: str) -> dict[str, object]:
    """The arguments that a refusal names for the last layer that can be read."""
    found = re.search(r"the last one by layers=(\d+)(?:, query='(\w+)')? \(", text)
    assert found is not None, text
    return {"layers": int(found[1])} | ({"query": found[2]} if found[2] else {})


def test_frames_that_meet_only_through_their_class_tokens() -> None:
    """ViViT with pool="cls": a layer over time has one token for each frame, which depends on other attention alone."""
    vivit = pytest.importorskip("vit_pytorch.vivit").ViViT
    model = sharp(
        vivit(
            image_size=32, image_patch_size=8, frames=6, frame_patch_size=2, num_classes=3, dim=32, spatial_depth=2,
            temporal_depth=2, heads=2, mlp_dim=64, dim_head=16, pool="cls", use_flash_attn=False,
        )
    )  # fmt: skip
    images = images_of((2, 3, 6, 32, 32))
    with pytest.raises(UnsupportedAttentionError, match="depends on the image through other attention alone") as caught:
        record_attention(model, images)
    chosen = arguments_in(str(caught.value))
    (seen,) = record_attention(model, images, **chosen)  # type: ignore[arg-type]
    assert seen.layer == 1
    assert seen.grid == (3, 4, 4)
    in_frames = attention_matrices(model, images, default_forward)[1].unflatten(1, (3, 2))[:, :, :, 0] / 3
    maps = in_frames[..., 1:].transpose(1, 2).flatten(2)
    assert off_by(seen.maps.flatten(2), maps) <= LIMIT


@pytest.mark.parametrize("cls", [True, False])
def test_another_layer_and_query(cls: bool) -> None:
    model = AnyViT((16, 24), (8, 8), cls=cls)
    model.blocks.append(Block(Packed(over_channels)))
    images = images_of((2, 3, 16, 24))
    with pytest.raises(UnsupportedAttentionError, match=r"Layers that can be read: \[0, 1\]") as caught:
        record_attention(sharp(model), images)
    chosen = arguments_in(str(caught.value))
    assert chosen == {"layers": 1} | ({} if cls else {"query": "mean"})
    (seen,) = record_attention(model, images, **chosen)  # type: ignore[arg-type]
    matrix = attention_matrices(model, images, default_forward)[1]
    assert off_by(seen.rows, matrix[:, :, 0] if cls else matrix.mean(2)) <= LIMIT


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("takes", "given"), [(3, 13), (3, 1), (1, 3), (4, 3)])
def test_another_number_of_channels(linear: bool, takes: int, given: int) -> None:
    model, images = sharp(AnyViT((16, 24), (8, 8), channels=takes, linear=linear)), images_of((2, given, 16, 24))
    text = rf"It does run on {takes} channels?, and these images have {given}: pass "
    with pytest.raises(ForwardError, match=text) as caught:
        record_attention(model, images)
    assert "of a size" not in str(caught.value)
    way = re.search(r"images(\.expand\([^)]*\)|\[:, \[[^]]*\]\])", str(caught.value))
    assert (way is None) == (1 < given < takes)
    if way is not None:
        (seen,) = record_attention(model, eval(way[0], {"images": images}))
        assert seen.grid == (2, 3)


def test_a_size_that_does_not_fit_keeps_its_remedy() -> None:
    with pytest.raises(ForwardError, match="Pass images of a size that the model takes"):
        record_attention(sharp(AnyViT((16, 24), (8, 8))), torch.randn(2, 3, 16, 16))
