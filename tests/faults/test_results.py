"""Where the results of attention go: models that return the tokens of several layers, and results put elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from attn_monitor.capture.recorder import record_attention
from tests.support import hostile_attention as at
from tests.support.hostile_judge import Hostile, judge
from tests.support.hostile_orders import fixed
from tests.support.hostile_parts import Net, Stem, blocks
from tests.support.oracle import attention_matrices
from tests.support.tiers import sweep
from tests.support.zoo import enliven


class Stages(Net):
    """Returns what ``form`` makes of the tokens of all layers, earliest first, each through the last norm."""

    def __init__(self, form: Callable[[list[Tensor]], Any], *steps: nn.Module, spec: str = "C*") -> None:
        super().__init__(Stem(spec), *(steps or blocks(count=4)))
        self.norm, self.form = nn.LayerNorm(32), form

    def forward(self, images: Tensor) -> Any:
        x, stages = self.stem(images), []
        for step in self.blocks:
            x = step(x)
            stages.append(self.norm(x))
        return self.form(stages)


FORMS: dict[str, Callable[[list[Tensor]], Any]] = {
    "list": lambda stages: stages,
    "tuple, latest first": lambda stages: tuple(stages[::-1]),
    "dict": lambda stages: {f"layer{i}": x for i, x in enumerate(stages)},
    "logits and all layers": lambda stages: (stages[-1][:, 0], stages),
    "patches of the first two": lambda stages: [x[:, 1:] for x in stages[:2]],
    "first layer alone": lambda stages: stages[0],
    "feature maps": lambda stages: [x[:, 1:].mT.unflatten(-1, (4, 6)) for x in stages],
    "one tensor of layers": lambda stages: torch.stack(stages),
}


@pytest.mark.parametrize("form", FORMS)
def test_models_that_return_the_tokens_of_several_layers_are_read(form: str) -> None:
    case = Hostile(form, "returns", lambda: Stages(FORMS[form]), must="all")
    faults = [f"{j.layer} {j.query}: {j.verdict} {j.reason}" for j in judge(case) if not j.fine]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("number", sweep([0, 1, 3], quick=1))
@pytest.mark.parametrize("form", ["list", "first layer alone", "logits and all layers"])
def test_results_that_go_to_other_tokens_are_refused_whatever_is_returned(form: str, number: int) -> None:
    def build() -> nn.Module:
        attends: list[Any] = [at.plain] * 4
        attends[number] = at.queries_in(fixed(), 1, back=False)
        return Stages(FORMS[form], *blocks(*attends))

    judgements = judge(Hostile(form, "returns", build))
    assert {j.verdict for j in judgements if j.layer.startswith(f"blocks.{number}")} == {"refused"}
    assert all(j.fine for j in judgements)


def dinov2(**settings: Any) -> Any:
    """A small configuration of Hugging Face's DINOv2."""
    return transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        apply_layernorm=True,
        **settings,
    )


def depth_anything() -> nn.Module:
    """Depth Anything, which reads four layers of DINOv2."""
    settings: dict[str, Any] = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 16, 16]}
    settings |= {"fusion_hidden_size": 16, "head_hidden_size": 8, "patch_size": 14}
    backbone = dinov2(out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    return transformers.DepthAnythingForDepthEstimation(
        transformers.DepthAnythingConfig(backbone_config=backbone, **settings)
    )


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "tokens of all layers": lambda: transformers.Dinov2Backbone(
        dinov2(out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    ),
    "tokens of two layers": lambda: transformers.Dinov2Backbone(
        dinov2(out_indices=[1, 3], reshape_hidden_states=False)
    ),
    "maps of all layers": lambda: transformers.Dinov2Backbone(dinov2(out_indices=[1, 2, 3, 4])),
    "Depth Anything": depth_anything,
    "all hidden states": lambda: transformers.Dinov2Model(dinov2(output_hidden_states=True)),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones_of_hugging_face_are_read_at_every_layer(backbone: str) -> None:
    torch.manual_seed(0)
    model = enliven(BACKBONES[backbone]()).eval()
    images = torch.randn(2, 3, 56, 84)
    matrices = attention_matrices(model, images, lambda m, x: m(x))
    layers = record_attention(model, images, layers="all")
    assert len(layers) == len(matrices) == 4
    for layer, matrix in zip(layers, matrices, strict=True):
        assert (layer.grid, layer.num_prefix, layer.places) == ((4, 6), 1, "exact")
        torch.testing.assert_close(layer.rows.double(), matrix[:, :, 0], atol=4e-5, rtol=0)
