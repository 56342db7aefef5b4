"""Where names tell nothing, a backbone is found by running it, and a teacher by what it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, Watch, load_snapshots
from attn_monitor.capture.backbones import check_paths, find_backbones
from attn_monitor.capture.role_names import name_roles, teacher_is_missed
from attn_monitor.errors import NoAttentionError
from attn_monitor.weights.loading import load_checkpoint
from attn_monitor.weights.run_checkpoints import read_checkpoint, roles_in
from tests.integration.test_backbone import module
from tests.support.helpers import Distillation, loader, tiny_vit, trainer
from tests.support.oracle import attention_matrices

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Pre-norm, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_1, self.layer_norm_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 4)
        self.linear = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.layer_norm_1(x)
        x = x + self.attn(inputs, inputs, inputs)[0]
        return x + self.linear(self.layer_norm_2(x))


class Nameless(nn.Module):
    """Attention that no name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm(x.transpose(0, 1))).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2)).transpose(0, 1)


class FromScratch(nn.Module):
    """The ViT of Lightning's tutorial: patches are made by reshaping, and embedded by a linear layer."""

    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.input_layer = nn.Linear(8 * 8 * 3, 32)
        self.transformer = nn.Sequential(*(block() for _ in range(2)))
        self.mlp_head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)
        x = self.input_layer(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embedding
        return self.mlp_head(self.transformer(x.transpose(0, 1))[0])


class Words(nn.Module):
    """A language model."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.transformer = nn.Embedding(9, 32), nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(self.words(x))


class Supervised(pl.LightningModule):
    """Its forward is of no use."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text, self.model = Words(), model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.01)


@pytest.mark.parametrize("block", [Block, Nameless])
def test_a_backbone_is_found_by_what_runs(block: type[nn.Module]) -> None:
    made = Supervised(FromScratch(block))
    check_paths(made, None)
    with pytest.raises(NoAttentionError, match="no vision transformer was found"):
        find_backbones(made)
    assert find_backbones(made, IMAGES) == {"backbone": "model"}
    both = module(student=FromScratch(block), teacher=FromScratch(block))
    assert find_backbones(both, IMAGES) == {"student": "student", "teacher": "teacher"}
    assert find_backbones(nn.Sequential(FromScratch(block), nn.Linear(8, 2)), IMAGES) == {"backbone": "0"}


def test_what_attends_to_no_image_is_none() -> None:
    with pytest.raises(NoAttentionError, match="no vision transformer was found"):
        find_backbones(module(text=Words()), IMAGES)
    with pytest.raises(NoAttentionError, match="convolutional network"):
        check_paths(module(net=nn.Conv2d(3, 8, 3)), None)


@pytest.mark.parametrize("probe", [None, IMAGES], ids=["adopted", "given"])
def test_the_tutorials_vit_is_watched_without_an_argument(tmp_path: Path, probe: Tensor | None) -> None:
    made = Supervised(FromScratch())
    watch = AttentionMapCallback(probe, every_n_train_steps=1)
    trainer(tmp_path, watch, max_steps=2).fit(made, loader())
    assert watch.monitor is not None
    images, last = watch.monitor.probe.images, watch.monitor.previous
    expected = attention_matrices(made.model, images, lambda m, x: m(x))[-1][:, :, 0]
    assert last is not None
    torch.testing.assert_close(last.rows("backbone").double(), expected, atol=1e-6, rtol=1e-5)
    assert last.maps("backbone").shape[-2:] == (4, 4)
    snapshots = load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor")
    assert [s.step for s in snapshots] == [0, 1, 2]


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(False)


def pair(first: str, second: str, **others: nn.Module) -> nn.Module:
    trained = tiny_vit(depth=1)
    return module(**{second: frozen(trained), first: trained, **others})


@pytest.mark.parametrize(
    ("made", "roles"),
    [
        (
            lambda: pair("visual_encoder", "visual_encoder_m"),
            {"student": "visual_encoder", "teacher": "visual_encoder_m"},
        ),
        (lambda: pair("left", "right"), {"student": "left", "teacher": "right"}),
        (
            lambda: pair("left", "right", other=tiny_vit(depth=2)),
            {"student": "left", "teacher": "right", "other": "other"},
        ),
        (lambda: pair("student", "slow"), {"student": "student", "teacher": "slow"}),
        (
            lambda: module(student=tiny_vit(depth=1), large=frozen(tiny_vit(depth=2))),
            {"student": "student", "teacher": "large"},
        ),
        (
            lambda: module(student=tiny_vit(depth=1), remapper=tiny_vit(depth=2, embed_dim=64)),
            {"student": "student", "remapper": "remapper"},
        ),
        (lambda: module(left=frozen(tiny_vit()), right=frozen(tiny_vit())), {"left": "left", "right": "right"}),
    ],
)
def test_a_teacher_is_found_by_what_it_is(made: Any, roles: dict[str, str]) -> None:
    assert find_backbones(made()) == roles


def test_names_in_a_checkpoint() -> None:
    names = ["model.visual_encoder", "model.visual_encoder_m"]
    assert name_roles(names) == {"student": names[0], "teacher": names[1]}
    assert name_roles(["vit_s", "vit_m"]) == {"vit_s": "vit_s", "vit_m": "vit_m"}


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_a_role_chooses_among_the_names_in_a_checkpoint(tmp_path: Path, key: str) -> None:
    models = {"student": tiny_vit(), "teacher": tiny_vit()}
    places = {"student": "visual_encoder", "teacher": "visual_encoder_m"}
    weights = {f"{places[role]}.{n}": v for role, model in models.items() for n, v in model.state_dict().items()}
    torch.save({"model": weights}, tmp_path / "step=3.pth")
    model = tiny_vit()
    load_checkpoint(model, str(tmp_path / "step=3.pth"), key=key)
    for name, value in models[key].state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    checkpoint = read_checkpoint(tmp_path / "step=3.pth")
    assert roles_in(checkpoint, model.state_dict(), key) == {key: f"model.{places[key]}"}


@pytest.mark.parametrize(
    ("made", "missed"),
    [
        (lambda: module(student=tiny_vit(depth=1)), True),
        (lambda: module(backbone=tiny_vit(depth=1), teacher_head=nn.Linear(2, 2)), True),
        (lambda: module(backbone=tiny_vit(depth=1), ema=nn.Linear(2, 2)), True),
        (lambda: module(backbone=tiny_vit(depth=1), norm=nn.BatchNorm1d(2)), False),
        (lambda: module(student=tiny_vit(depth=1), teacher=tiny_vit(depth=1)), False),
    ],
)
def test_a_teacher_is_missed_where_something_hints_at_one(made: Any, missed: bool) -> None:
    model = made()
    assert teacher_is_missed(model, find_backbones(model)) is missed


class Hidden(Distillation):
    """Its teacher is in a list, where PyTorch does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.teachers = self.student_backbone, [self.teacher_backbone]
        del self.student_backbone, self.teacher_backbone
        self.teacher_temperature = 0.04


def test_the_start_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(Hidden(), IMAGES, folder=tmp_path)
    watch.step(0)
    watch.close()
    assert "; no teacher was found; name it by Watch({'student': …, 'teacher': …})\n" in capsys.readouterr().err
    watch = Watch(tiny_vit(), IMAGES, folder=tmp_path / "alone")
    watch.step(0)
    watch.close()
    assert "no teacher" not in capsys.readouterr().err
