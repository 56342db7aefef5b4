"""What runs on a GPU in place of the CPU's operations: each kernel is read, or its layer is refused by name."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import AttentionError, NoAttentionError, UnsupportedAttentionError
from tests.support.gpu_kernels import WAYS, Way, matrices_of, sdpa, unseen
from tests.support.styles import Packed, PlainViT
from tests.support.tiers import sweep
from tests.support.zoo import enliven

SIZE = (32, 48)


def vit(*ways: Way) -> PlainViT:
    torch.manual_seed(3)
    return enliven(PlainViT(*(Packed(way) for way in ways))).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def error(rows: Tensor, truth: Tensor) -> float:
    """In units of uniform attention."""
    return float((rows.double() - truth).abs().amax()) * truth.shape[-1]


@pytest.mark.parametrize("way", WAYS)
def test_kernel_is_read(way: str) -> None:
    model = vit(WAYS[way], WAYS[way])
    for count in (2, 1):
        truth = matrices_of(model, images(count))[-1]
        (cls,) = record_attention(model, images(count))
        assert cls.layer == 1
        assert error(cls.rows, truth[:, :, 0]) < 1e-3
        assert float(truth[:, :, 0].amax()) * truth.shape[-1] > 1.2, "a uniform row would show nothing"
    for row, col in ((1, 2), (3, 5)):  # the last one sees a window on its left alone
        (patch,) = record_attention(model, images(), query=(row, col))
        assert error(patch.rows, matrices_of(model, images())[-1][:, :, 1 + 6 * row + col]) < 1e-3


def test_recording_again_needs_no_examination() -> None:
    """The kernel itself runs once in each recording."""
    calls = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(1)
        return WAYS["flash-attn 2"](q, k, v)

    recorder = AttentionRecorder(vit(counted, counted), follow=False)
    recorder(images())
    calls.clear()
    recorder(images())
    assert len(calls) == 2


@pytest.mark.parametrize("number", sweep(range(24), quick=8))
def test_no_layer_is_silently_another(number: int) -> None:
    """Each block one of the kinds, some of them not seen at all: -1 is the last block, or an error that names it."""
    chance = random.Random(number)
    names = [chance.choice([*WAYS, "unseen"]) for _ in range(4)]
    model = vit(*(unseen if name == "unseen" else WAYS[name] for name in names))
    truth = matrices_of(model, images())
    assert len(truth) == 4
    for layer in (-1, 0, 1, 2, 3):
        name, seen = names[layer], recorded(model, layer)
        if isinstance(seen, LayerAttention):
            assert name != "unseen"
            assert seen.layer == layer % 4
            assert error(seen.rows, truth[layer][:, :, 0]) < 1e-3, names
            continue
        assert f"layer {layer % 4} (blocks.{layer % 4}.attn" in seen
        if name == "unseen":
            assert "kernel that PyTorch's dispatcher does not see" in seen
            assert "F.scaled_dot_product_attention" in seen
        else:  # its tokens have no place any more
            assert "unseen" in names[: layer % 4], seen
            assert "tokens are mixed before, by layer" in seen


def recorded(model: PlainViT, layer: int) -> LayerAttention | str:
    """The layer, or the reason why it is refused."""
    try:
        return record_attention(model, images(), layers=layer)[0]
    except AttentionError as refused:
        return str(refused)


def test_only_unseen_kernels_are_named() -> None:
    with pytest.raises(NoAttentionError, match=r"blocks\.0\.attn to blocks\.2\.attn, 3 modules, mix tokens") as refused:
        record_attention(vit(unseen, unseen, unseen), images())
    assert "kernel that PyTorch's dispatcher does not see" in str(refused.value)
    assert "convol" not in str(refused.value)


def test_sequences_of_several_lengths_are_refused_by_their_lengths() -> None:
    def uneven(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = [t.flatten(0, 1).contiguous() for t in (q, k, v)]
        cu = torch.tensor([0, 10, len(one[0])], dtype=torch.int32)
        call = torch.ops.flash_attn._flash_attn_varlen_forward
        out: Tensor = call(*one, cu, cu, 40, 40, 0.0, 0.4, False)[0]
        return out.unflatten(0, q.shape[:2])

    with pytest.raises(UnsupportedAttentionError, match="packed sequences of 10 to"):
        record_attention(vit(sdpa, uneven), images())


def test_what_is_not_read_is_named() -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        used = torch.full((len(q),), k.shape[1], dtype=torch.int32)
        lengths = (None, None, used, q.shape[1], k.shape[1])
        out: Tensor = torch.ops.xformers_flash.flash_fwd(q, k, v, *lengths, 0.0, 0.4, False, -1, -1, False, None)[0]
        return out

    with pytest.raises(UnsupportedAttentionError, match="a length of keys for each image, which is not read"):
        record_attention(vit(sdpa, padded), images())
