"""Several attention products in one module: each softmax meets its own V, and mixtures of one V are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_monitor import record_attention
from attn_monitor.errors import QueryError, UnsupportedAttentionError
from tests.support import styles
from tests.support.zoo import timm_vit

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


class Functional(nn.Module):
    """A ViT without submodules for its attention: ``attend(q, k, v)`` gives the result and the true matrix."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.embed, self.head = attend, styles.Tokens(), nn.Linear(32, 3)
        self.qkv = nn.Linear(32, 96)
        self.qkv.weight.data.mul_(3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        out, _ = self.attend(q, k, v)
        return self.head((x + out.transpose(1, 2).flatten(2)).mean(1))

    @torch.no_grad()
    def truth(self) -> Tensor:
        q, k, v = self.qkv(self.embed(IMAGES)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v)[1]


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1)


def chunks_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts = [weights(some, k) for some in q.split(5, 2)]
    return torch.cat([a @ v for a in parts], 2), torch.cat(parts, 2)


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts = [weights(q[:, i], k[:, i]) for i in (0, 1)]
    return torch.stack([a @ v[:, i] for i, a in enumerate(parts)], 1), torch.stack(parts, 1)


def difference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    one, other = weights(q, k), weights(k, q)
    return one @ v - 0.4 * (other @ v), one - 0.4 * other


def unused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    one, other = weights(q, k), weights(k, q)
    other @ v
    return one @ v, one


def overwritten(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    every, again = weights(q, k), weights(2 * q[:, :, :1], k)
    return torch.cat([again @ v, (every @ v)[:, :, 1:]], 2), torch.cat([again, every[:, :, 1:]], 2)


def padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return F.scaled_dot_product_attention(F.pad(q, (0, 0, 0, 7)), k, v)[:, :, :25], weights(q, k)


def test_chunks_whose_softmaxes_all_come_first() -> None:
    model = Functional(chunks_first).eval()
    (cls,) = record_attention(model, IMAGES, layers="all")
    assert torch.allclose(cls.maps.flatten(2), model.truth()[:, :, 0, 1:], atol=1e-6)
    (patch,) = record_attention(model, IMAGES, query=(0, 2))
    assert torch.allclose(patch.maps.flatten(2), model.truth()[:, :, 3, 1:], atol=1e-6)
    with pytest.raises(QueryError, match="none of which is known to be patch"):
        record_attention(model, IMAGES, query=(3, 4))
    with pytest.raises(QueryError, match="some of the queries"):
        record_attention(model, IMAGES, layers=0, query="mean")


def heads_fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    parts = [F.scaled_dot_product_attention(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]) for i in (0, 1)]
    return torch.cat(parts, 1), weights(q, k)


@pytest.mark.parametrize("attend", [heads_first, heads_fused])
def test_heads_in_a_loop_are_no_layers(attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    for layer in (0, -1):
        with pytest.raises(UnsupportedAttentionError, match=r"2 attentions run side by side in one call of the model"):
            record_attention(Functional(attend).eval(), IMAGES, layers=layer)


class TwoLayers(Functional):
    """Two attentions in one call of a module, of which the second reads what the first gave: layers."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            x = x + (weights(q, k) @ v).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


def test_layers_in_one_call_of_a_module_are_read() -> None:
    model = TwoLayers(chunks_first).eval()
    first, last = record_attention(model, IMAGES, layers="all")
    assert torch.allclose(first.maps.flatten(2), model.truth()[:, :, 0, 1:], atol=1e-6)
    assert last.layer == 1


@pytest.mark.parametrize("attend", [difference, unused, overwritten])
def test_two_products_of_one_v_are_refused(attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    for layer in (0, 1):
        with pytest.raises(UnsupportedAttentionError, match="some of the same queries"):
            record_attention(Functional(attend).eval(), IMAGES, layers=layer)


def test_queries_beyond_the_tokens_are_not_in_a_mean() -> None:
    model = Functional(padded).eval()
    (cls,) = record_attention(model, IMAGES)
    assert torch.allclose(cls.maps.flatten(2), model.truth()[:, :, 0, 1:], atol=1e-6)
    (mean,) = record_attention(model, IMAGES, query="mean")
    assert torch.allclose(mean.rows, model.truth().mean(2), atol=1e-6)


def test_blocks_that_attend_side_by_side() -> None:
    class SideBySide(styles.PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            x = self.patch_embed(images)
            for one, other in ((0, 1), (2, 3)):
                x = x + self.blocks[one].attn(x) + self.blocks[other].attn(x)
            return self.norm(x)[:, 0]

    model = SideBySide(*(styles.MemEffAttention() for _ in range(4))).eval()
    assert [a.layer for a in record_attention(model, IMAGES, layers="all")] == [0, 1, 2, 3]


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:FutureWarning", "ignore::DeprecationWarning:torch.jit"
)
def test_scripted_parts_and_inference_mode() -> None:
    model = timm_vit("vit_tiny_patch16_224").eval()
    (plain,) = record_attention(model, IMAGES)
    with torch.inference_mode():
        (inside,) = record_attention(model, IMAGES)
    assert torch.equal(plain.rows, inside.rows)
    model.blocks[0].mlp = torch.jit.script(model.blocks[0].mlp)
    (scripted,) = record_attention(model, IMAGES)
    assert torch.allclose(plain.rows, scripted.rows, atol=1e-6)


@pytest.mark.parametrize("layers", [[], None, ()])
def test_no_layers_at_all(layers: object) -> None:
    with pytest.raises(ValueError, match="layers="):
        record_attention(timm_vit("vit_tiny_patch16_224").eval(), IMAGES, layers=layers)  # type: ignore[arg-type]
