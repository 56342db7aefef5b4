"""Which queries count: patches and tokens of the model's own; not padding, landmarks, agents or what was not found."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from attn_monitor import AttentionMonitor, AttentionRecorder, ProbeBatch, record_attention
from attn_monitor.errors import AttentionError, QueryError
from attn_monitor.measure.sinks import find_sinks
from tests.support.oracle import attention_matrices
from tests.support.tiers import sweep
from tests.support.zoo import enliven, hugging_face, timm_vit

GRID, SIZE, DIM, HEADS = (4, 6), (32, 48), 32, 4
PATCHES = math.prod(GRID)
IMAGES = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def heads_of(qkv: Tensor) -> Tensor:
    """(3, B, H, T, D) of (B, T, 3·H·D)."""
    return qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """Attention in one of several ways, and a residual."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way, self.norm = way, nn.LayerNorm(DIM)
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.agents = nn.Parameter(torch.randn(1, HEADS, 1 if way == "one learned agent" else 3, DIM // HEADS))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = heads_of(self.qkv(self.norm(x)))
        if self.way == "plain":
            y = nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        elif self.way == "landmarks":  # Nyström's order, whose last product is no attention
            landmarks = torch.stack([q[:, :, :5].mean(2), q[:, :, 5:].mean(2)], 2)
            given = nnf.scaled_dot_product_attention(landmarks, k, v)
            y = (q @ landmarks.mT).sigmoid() @ given
        else:
            pooled = self.agents.expand(len(x), -1, -1, -1)
            if self.way == "pooled agents":
                pooled = nnf.adaptive_avg_pool1d(q.flatten(0, 1).mT, 3).mT.unflatten(0, q.shape[:2]).contiguous()
            elif self.way == "one pooled agent":
                pooled = q.mean(2, keepdim=True)
            given = nnf.scaled_dot_product_attention(pooled, k, v)
            y = given.mean(2, keepdim=True).expand_as(q)
            if self.way != "broadcast":
                y = nnf.scaled_dot_product_attention(q, pooled, given)
        return x + self.proj(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Patches, and tokens of the model's own before or behind them."""

    def __init__(self, *ways: str, cls: bool = True, registers: int = 0, padding: int = 0, text: int = 0) -> None:
        super().__init__()
        self.embed, self.padding = nn.Conv2d(3, DIM, 8, 8), padding
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM)) if cls else None
        self.registers = nn.Parameter(torch.randn(1, registers, DIM)) if registers else None
        self.words = nn.Embedding(20, DIM) if text else None
        self.text = text
        self.class_scale = nn.Parameter(torch.rand(DIM) + 0.5)  # a name like that of a class token
        self.blocks = nn.ModuleList(Block(way) for way in ways)
        self.head = nn.Linear(DIM, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) * self.class_scale
        own = [p.expand(len(x), -1, -1) for p in (self.cls_token, self.registers) if p is not None]
        x = torch.cat([*own, x], 1)
        if self.words is not None:
            x = torch.cat([x, self.words(torch.arange(self.text, device=x.device)).expand(len(x), -1, -1)], 1)
        tokens = x.shape[1]
        x, mask = nnf.pad(x, (0, 0, 0, self.padding)), None
        if self.padding:
            mask = (torch.arange(x.shape[1]) < tokens).expand(x.shape[1], -1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x[:, 0])


def made(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return enliven(model).eval()


def matrices(model: nn.Module, forward: Any = lambda m, x: m(x)) -> list[Tensor]:
    return attention_matrices(model, IMAGES, forward)


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ({"cls": False, "padding": 6}, range(PATCHES)),
        ({"padding": 6}, range(1 + PATCHES)),
        ({"registers": 2, "padding": 1}, range(3 + PATCHES)),
        ({"text": 5}, range(1 + PATCHES)),
        ({"registers": 2}, range(3 + PATCHES)),
        ({"cls": False, "registers": 4}, range(4 + PATCHES)),
    ],
    ids=["padding", "CLS and padding", "registers and padding", "text", "registers", "registers alone"],
)
def test_a_mean_is_over_patches_and_the_models_own_tokens(settings: dict[str, Any], counted: range) -> None:
    model = made(Model("plain", "plain", **settings))
    matrix = matrices(model)[1]
    mean = matrix[:, :, list(counted)].mean(2)
    (seen,) = record_attention(model, IMAGES, query="mean")
    start = (settings.get("cls", True) is True) + settings.get("registers", 0)
    expected = mean[..., start : start + PATCHES].unflatten(-1, GRID)
    torch.testing.assert_close(seen.maps.double(), expected, rtol=1e-3, atol=1e-5)


def test_statistics_do_not_count_padding() -> None:
    model = made(Model("plain", padding=6))
    (matrix,) = matrices(model)
    monitor = AttentionMonitor(ProbeBatch(IMAGES), metrics="all")
    attention = monitor.snapshot({"backbone": model}, step=0).layer("backbone")
    received = matrix[:, :, : 1 + PATCHES].mean((1, 2))
    order = [0, *range(1 + PATCHES, 7 + PATCHES), *range(1, 1 + PATCHES)]  # CLS, padding, patches
    torch.testing.assert_close(attention.received.double(), received[:, order], rtol=1e-3, atol=1e-5)
    assert attention.prefix_names == ("CLS", *(f"token {t}" for t in range(1 + PATCHES, 7 + PATCHES)))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["CLS"]),
        ({"registers": 2}, ["CLS", "register 1", "register 2"]),
        ({"cls": False, "registers": 4}, [f"register {i}" for i in (1, 2, 3, 4)]),
        ({"cls": False, "text": 3}, [f"token {PATCHES + i}" for i in range(3)]),
        ({"padding": 2}, ["CLS", "token 25", "token 26"]),
    ],
)
def test_only_what_was_found_has_a_name(settings: dict[str, Any], names: list[str]) -> None:
    model, query = made(Model("plain", **settings)), "cls" if settings.get("cls", True) else "mean"
    snapshot = AttentionMonitor(ProbeBatch(IMAGES), query=query).snapshot({"backbone": model}, step=0)
    attention = snapshot.layer("backbone")
    assert list(attention.prefix_names) == names
    masses = {key.metric.removeprefix("prefix_mass_") for key in snapshot.metrics if "prefix_mass_" in key.metric}
    found = {name.lower().replace(" ", "") for name in names if "token" not in name}
    assert masses == (found if len(names) > 1 else set())
    for sink in find_sinks(attention)[1] or []:
        assert sink.token in (*names, "patches")


def test_real_models_without_cls_have_no_label_of_it() -> None:
    model = made(timm_vit("vit_medium_patch16_reg4_gap_256"))
    snapshot = AttentionMonitor(ProbeBatch(IMAGES), query="mean").snapshot({"backbone": model}, step=0)
    assert snapshot.layer("backbone").prefix_names == tuple(f"register {i}" for i in (1, 2, 3, 4))
    assert not [key for key in snapshot.metrics if key.metric == "prefix_mass_cls"]


def test_naflex_counts_its_patches_alone() -> None:
    def forward(mm: nn.Module, images: Tensor) -> Any:
        t = images.unflatten(2, (GRID[0], 8)).unflatten(4, (GRID[1], 8)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2)
        t = nnf.pad(t.flatten(2), (0, 0, 0, 6))
        mask = (torch.arange(30) < PATCHES).long().expand(len(images), -1)
        return mm(pixel_values=t, pixel_attention_mask=mask, spatial_shapes=torch.tensor([GRID] * len(images)))

    model = made(hugging_face("Siglip2VisionModel", "Siglip2VisionConfig", "sdpa", num_patches=16))
    matrix = matrices(model, forward)[1]
    (seen,) = record_attention(model, IMAGES, layers=1, query="mean", forward=forward)
    expected = matrix[:, :, :PATCHES].mean(2)[..., :PATCHES].unflatten(-1, GRID)
    torch.testing.assert_close(seen.maps.double(), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(QueryError, match="none was found to be the CLS token"):
        record_attention(model, IMAGES, layers=1, forward=forward)
    (head,) = record_attention(model, IMAGES, forward=forward)  # the probe of its head
    assert head.prefix_names == tuple(f"token {t}" for t in range(PATCHES, 30))


def test_a_padded_token_is_no_cls_token() -> None:
    with pytest.raises(QueryError, match="none was found to be the CLS token"):
        record_attention(made(Model("plain", cls=False, padding=1)), IMAGES)


@pytest.mark.parametrize(
    "way", ["landmarks", "pooled agents", "one pooled agent", "learned agents", "one learned agent", "broadcast"]
)
@pytest.mark.parametrize("query", sweep(["cls", "mean"], quick=1))
def test_queries_that_stand_for_others_are_not_shown(way: str, query: str) -> None:
    with pytest.raises(AttentionError):
        record_attention(made(Model(way)), IMAGES, query=query)
    beside = made(Model(way, "plain"))
    sites = AttentionRecorder(beside).sites(IMAGES)
    recorder = AttentionRecorder(beside, layers="all", query=query)
    assert [seen.layer for seen in recorder(IMAGES)] == [len(sites) - 1]
    assert record_attention(beside, IMAGES, query=query)[0].layer == len(sites) - 1


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * 2


def parametrized() -> nn.Module:
    model = Model("plain", registers=2)
    nn.utils.parametrize.register_parametrization(model, "cls_token", Scaled())
    return model


class Renamed(Model):
    """Its class token has a name that says nothing."""

    def __init__(self) -> None:
        super().__init__("plain", cls=False)
        self.summary = nn.Parameter(torch.randn(DIM))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        return self.head(self.blocks[0](torch.cat([self.summary[None, None].expand(len(x), -1, -1), x], 1))[:, 0])


class Labelled(Model):
    """The embedding of a class label as a token of its own, behind the class token."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.class_embedding = nn.Embedding(10, DIM)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        label = self.class_embedding(torch.full((len(x), 1), 3))
        return self.head(self.blocks[0](torch.cat([self.cls_token.expand(len(x), -1, -1), label, x], 1))[:, 0])


class Kept(Renamed):
    """A class token that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        kept = self.summary.detach().clone()
        del self.summary
        self.register_buffer("summary", kept)


@pytest.mark.parametrize("build", [parametrized, Renamed, Labelled, Kept], ids=lambda build: build.__name__)
def test_cls_is_found_by_asking(build: Any) -> None:
    model = made(build())
    (matrix,) = matrices(copy.deepcopy(model))
    (seen,) = record_attention(model, IMAGES)
    torch.testing.assert_close(seen.maps.flatten(-2).double(), matrix[:, :, 0, -PATCHES:], rtol=1e-3, atol=1e-5)
    assert seen.prefix_names[0] == "CLS"


def test_what_asking_costs() -> None:
    """A ViT is asked about its class token in two images, by nudging and by sparing it, and registers in one more."""
    asked = []
    for settings in ({"cls": False}, {}, {"registers": 2}):
        model, images = made(Model("plain", "plain", **settings)), []
        model.embed.register_forward_pre_hook(lambda _, args, images=images: images.append(len(args[0])))
        AttentionRecorder(model).sites(IMAGES)
        asked.append(sum(images))
    assert [n - asked[0] for n in asked] == [0, 2, 3]
