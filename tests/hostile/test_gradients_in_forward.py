"""Models that take gradients within their forward: those operations are no attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_monitor import record_attention
from tests.hostile.test_unseen_attention import IMAGES, Block, Core, ViT, check_layers, plain, scores, truth


def fused(block: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    block.truth = scores(q, k).softmax(-1)
    return F.scaled_dot_product_attention(q, k, v)


class Explained(ViT):
    """Grad-CAM of its own tokens, computed in each forward; ``truth`` is that of the tokens without it."""

    gradient: Tensor

    def run(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            given = x.detach().requires_grad_()
            out = super().run(given)
            (self.gradient,) = torch.autograd.grad(out[:, 0].square().sum(), given)
        return out.detach()


@pytest.mark.parametrize("core", [plain, fused])
def test_gradients_of_attention_are_no_attention(core: Core) -> None:
    check_layers(Explained(core, core, core), {0: 0, 1: 1, 2: 2})


class Adapted(ViT):
    """A step of gradient descent on the CLS token, then the forward proper."""

    def run(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            first = x[:, :1].detach().requires_grad_()
            out = super().run(torch.cat([first, x[:, 1:].detach()], 1))
            (gradient,) = torch.autograd.grad(out[:, 0].square().sum() / 64, first)
        return super().run(torch.cat([first.detach() - 0.1 * gradient, x[:, 1:].detach()], 1))


def test_layers_before_and_after_a_step_are_layers() -> None:
    model = Adapted(plain, plain)
    before, after = record_attention(model, IMAGES, layers=[1, 3])
    assert (before.layer, before.name, after.layer, after.name) == (1, "blocks.1", 3, "blocks.1#1")
    torch.testing.assert_close(after.maps.double(), truth(model, 1), atol=1e-5, rtol=1e-3)  # of the last call
    assert not torch.allclose(before.maps, after.maps)
