"""Models that mask or shuffle patches at random, without CLS, or without attention: watched in full, or left alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from lightly.models.modules import MaskedCausalVisionTransformer
from torch import Tensor, nn

from attn_monitor import AttentionMapCallback, load_snapshots, record_attention
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.errors import ForwardError, NoAttentionError
from tests.support.helpers import loader, tiny_vit, trainer
from tests.support.oracle import attention_matrices
from tests.support.zoo import enliven, make_eager


class ShufflingEncoder(nn.Module):
    """solo-learn's MAE backbone, like the original one: what is kept is shuffled, even where nothing is left out."""

    def __init__(self, ratio: float = 0.0) -> None:
        super().__init__()
        vit = tiny_vit()
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.patch_embed.strict_img_size, self.patch_embed.flatten = True, True
        self.patch_embed.output_fmt = type(self.patch_embed.output_fmt)("NCHW")
        self.ratio = ratio

    def random_masking(self, x: Tensor, mask_ratio: float) -> Tensor:
        noise = torch.rand(*x.shape[:2], device=x.device)
        keep = torch.argsort(noise, dim=1)[:, : int(x.shape[1] * (1 - mask_ratio))]
        return torch.gather(x, 1, keep[..., None].expand(-1, -1, x.shape[2]))

    def forward(self, imgs: Tensor, mask_ratio: float = 0) -> Tensor:
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        x = self.random_masking(x, mask_ratio)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.norm(self.blocks(torch.cat((cls, x), 1)))

    def plain(self, imgs: Tensor) -> Tensor:
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.blocks(torch.cat((cls, x), 1))


class MaskingByDefault(ShufflingEncoder):
    """The original MAE's signature."""

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> Tensor:
        return super().forward(imgs, mask_ratio)


class FeaturesInFull(ShufflingEncoder):
    """A wrapper that masks by a number of its own; its features are those of all patches."""

    def forward(self, imgs: Tensor) -> Tensor:
        return super().forward(imgs, 0.5)

    def forward_features(self, imgs: Tensor) -> Tensor:
        return self.plain(imgs)


class RandomBeyondRepair(ShufflingEncoder):
    """Adds noise of its own to every token, in eval mode too."""

    def forward(self, imgs: Tensor) -> Tensor:
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]
        return self.blocks(x + torch.randn_like(x))


def hugging_face_mae() -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        decoder_hidden_size=32,
        decoder_intermediate_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
    )
    return ViTMAEForPreTraining(config)


class AsksForAMask(nn.Module):
    """iBOT's student and BEiT: a mask of the patches to replace must be given, as a grid or as a list."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.vit, self.flat = tiny_vit(), flat
        self.mask_token = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor, return_all_tokens: bool = False, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            raise AssertionError
        tokens, (cls, places) = self.vit.patch_embed(x), (self.vit.cls_token, self.vit.pos_embed)
        tokens = tokens.clone()
        (tokens.flatten(1, 2) if self.flat else tokens)[mask] = self.mask_token
        tokens = torch.cat((cls.expand(len(x), -1, -1), tokens.flatten(1, 2)), 1) + places
        return self.vit.blocks(tokens)


class Pretraining(pl.LightningModule):
    """Trains whatever it is given, on a loss of no use."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out = getattr(self.backbone, "forward_features", self.backbone)(batch)
        out = getattr(out, "loss", out)
        return out.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder: Path, model: nn.Module, **arguments: Any) -> list[str]:
    """Warnings of two steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, AttentionMapCallback(num_images=2, **arguments), max_steps=2).fit(Pretraining(model), loader())
    return [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]


def archive(folder: Path) -> Any:
    return load_snapshots(folder / "run" / "version_0" / "attn_monitor")


@pytest.mark.parametrize("made", [ShufflingEncoder, MaskingByDefault, FeaturesInFull])
def test_all_patches_of_a_model_that_masks_in_their_order(made: Callable[[], ShufflingEncoder]) -> None:
    model = enliven(made()).eval()
    images = torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match=f"{type(model).__name__}: it.* looked at"):
        (masked,) = record_attention(model, images)
    (plain,) = record_attention(model, images, forward=lambda m, x: m.plain(x))
    assert masked.grid == (4, 4)
    torch.testing.assert_close(masked.rows, plain.rows)
    (again,) = AttentionRecorder(model)(images)
    assert torch.equal(masked.rows, again.rows)


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_that_asserts_a_mask_gets_an_empty_one(flat: bool) -> None:
    model, images = enliven(AsksForAMask(flat)).eval(), torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="it asks for a mask of patches, and is looked at with an empty one"):
        (found,) = record_attention(model, images)
    expected = attention_matrices(model.vit, images, lambda m, x: m(x))[-1]
    torch.testing.assert_close(found.rows.double(), expected[:, :, 0], atol=1e-5, rtol=1e-4)


def test_what_no_way_to_call_a_model_mends_is_told_of_its_own_forward() -> None:
    with pytest.raises(ForwardError, match=r"failed on images .*: AssertionError\. Pass images"):
        record_attention(AsksForAMask(False), torch.randn(1, 3, 30, 30))


def test_hugging_face_vit_mae() -> None:
    """Equal to the model's own weights with its own `noise` argument and nothing masked; its settings stay."""
    model = enliven(hugging_face_mae()).eval()
    images = torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="it masks patches at random, and is looked at with all of them"):
        (found,) = record_attention(model.vit, images)
    assert model.config.mask_ratio == 0.75
    eager = copy.deepcopy(model.vit)
    eager.config.mask_ratio = 0.0
    make_eager(eager)
    rising = torch.arange(16.0).expand(2, -1)
    expected = eager(images, noise=rising, output_attentions=True).attentions[-1][:, :, 0]
    torch.testing.assert_close(found.rows, expected)


def test_masking_is_as_it_was_after_a_look() -> None:
    """The random state too: what training draws next is what it would have drawn."""
    model, images = hugging_face_mae().train(), torch.randn(1, 3, 32, 32)
    torch.manual_seed(5)
    expected = model(torch.ones(1, 3, 32, 32)).mask
    torch.manual_seed(5)
    AttentionRecorder(model.vit)(images)
    got = model(torch.ones(1, 3, 32, 32)).mask
    assert torch.equal(got, expected)
    assert got.sum() == 12


@pytest.mark.parametrize("made", [hugging_face_mae, MaskingByDefault])
def test_a_masked_autoencoder_is_watched_without_any_argument(tmp_path: Path, made: Callable[[], nn.Module]) -> None:
    assert fit(tmp_path, made()) == []
    assert [s.maps("backbone").shape for s in archive(tmp_path)] == [(2, 4, 4, 4)] * 3


def test_a_model_without_cls_shows_what_patches_receive(tmp_path: Path) -> None:
    """Lightly's AIM, which is trained by its features; its forward fails with timm 1.0.31."""
    aim = MaskedCausalVisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=0,
        class_token=False,
        global_pool="avg",
    )
    assert fit(tmp_path, aim) == []
    images = torch.randn(2, 3, 32, 32)
    recorder = AttentionRecorder(aim, or_mean=True)
    (found,) = recorder(images)
    (mean,) = record_attention(aim, images, query="mean", forward=lambda m, x: m.forward_features(x))
    assert torch.equal(found.rows, mean.rows)
    assert "no CLS token" in " ".join(recorder.notes)
    assert len(archive(tmp_path)) == 3


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (RandomBeyondRepair, "the forward is random even in eval mode"),
        (lambda: torchvision.models.resnet18(num_classes=2), "holds no attention: it is a convolutional network"),
    ],
)
def test_training_goes_on_where_nothing_can_be_watched(
    tmp_path: Path, made: Callable[[], nn.Module], text: str
) -> None:
    (said,) = fit(tmp_path, made())
    assert "attention is not watched in this run" in said
    assert text in said
    assert "targets=" not in said
    assert not list(tmp_path.rglob("*.npz"))


def test_what_the_user_chose_and_cannot_be_ends_the_run_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ForwardError):
        fit(tmp_path, RandomBeyondRepair(), targets={"backbone": "backbone"})
    with pytest.raises(ForwardError):
        fit(tmp_path, RandomBeyondRepair(), on_error="raise")
    with pytest.raises(NoAttentionError):
        fit(tmp_path, torchvision.models.resnet18(num_classes=2), on_error="raise")
