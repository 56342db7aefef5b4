"""A folder's images have the size that the model takes, where none is given and it refuses 224 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torchvision
from skimage import data
from torch import nn
from vit_pytorch import ViT

from attn_monitor import AttentionMapCallback, AttentionSnapshot
from attn_monitor.commands.cli import main
from attn_monitor.errors import ForwardError
from attn_monitor.probe.sizes import sizes_in
from tests.support.helpers import tiny_vit, trainer

MODULE = """
from timm.models import VisionTransformer

def small():
    return VisionTransformer(img_size=96, patch_size=16, embed_dim=32, depth=2, num_heads=2)
"""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: tiny_vit(img_size=96, patch_size=16, dynamic_img_size=False),
    "torchvision": lambda: torchvision.models.VisionTransformer(96, 16, 2, 2, 32, 32, num_classes=2),
    "vit_pytorch": lambda: ViT(image_size=96, patch_size=16, num_classes=2, dim=32, depth=2, heads=2, mlp_dim=32),
}


class Supervised(pl.LightningModule):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.backbone(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee"):
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    return folder


def batches(size: int) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4, 3, size, size)), batch_size=2)


@pytest.mark.parametrize("library", MODELS)
def test_the_callback_takes_the_size_from_the_models_refusal(library: str, photos: Path, tmp_path: Path) -> None:
    callback = AttentionMapCallback(str(photos))
    trainer(tmp_path, callback, max_steps=2).fit(Supervised(MODELS[library]()), batches(96))
    assert callback.monitor is not None
    assert callback.monitor.probe.images.shape == (2, 3, 96, 96)
    assert AttentionSnapshot.load(next(tmp_path.rglob("step-*.npz"))).layer("backbone").grid == (6, 6)


def test_where_no_size_is_named_the_argument_is(photos: Path, tmp_path: Path) -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = MODELS["timm"]()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] != 96:
                raise ValueError("no")
            out: torch.Tensor = self.vit(x)
            return out

    callback = AttentionMapCallback(str(photos), targets={"backbone": "backbone"})
    with pytest.raises(ForwardError, match="image_size="):
        trainer(tmp_path, callback, max_steps=2).fit(Supervised(Silent()), batches(96))


def test_commands_take_it_too(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sized_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    main(["check", "sized_models:small"])
    said = capsys.readouterr()
    assert "images of 96 × 96, 2 attention layers" in said.out
    assert "run on images of 96 (see --size)" in said.err
    main(["show", "sized_models:small", str(photos), "--weights", "false", "--out", str(tmp_path / "out")])
    assert list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("text", "size", "first"),
    [
        ("Wrong image height! Expected 96 but got 224!", 224, [96]),
        ("Input image size (224*224) doesn't match model (96*96).", 224, [96]),
        ("The size of tensor a (261) must match the size of tensor b (1374) at non-singleton dimension 1", 224, [518]),
        ("mask is missing", 224, []),
    ],
)
def test_sizes_in_errors(text: str, size: int, first: list[int]) -> None:
    assert sizes_in(text, size)[: len(first) or None] == first
