"""Capture, drawing and a whole run without the packages that the package does not require."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = ("matplotlib", "torchvision", "timm", "transformers", "lightly", "wandb", "mlflow", "scipy", "skimage")

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attn(y, y, y, need_weights=False)[0]

class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(1, 1, 32))
        self.places, self.blocks = nn.Parameter(torch.randn(1, 17, 32)), nn.Sequential(Block(), Block())

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places)[:, 0]

images = torch.rand(8, 3, 32, 32)
"""

CAPTURE = """
from attn_monitor import AttentionMonitor, DrawingOptions, ProbeBatch, record_attention
from attn_monitor.draw.animations import gif, timelapse
from attn_monitor.draw.canvas import jpeg
from attn_monitor.draw.panels import panel
from attn_monitor.draw.strips import filmstrip
(last,) = record_attention(VisionTransformer().eval(), images)
assert last.maps.shape == (8, 4, 4, 4)
probe = ProbeBatch(images)
snapshot = AttentionMonitor(probe).snapshot({"backbone": VisionTransformer().eval()}, step=0)
for colormap in ("inferno", "viridis"):
    assert jpeg(panel(snapshot, 0, probe.pixels[0], options=DrawingOptions(colormap=colormap)))
assert filmstrip([snapshot], 0, probe.pixels[0]).any()
assert gif(timelapse([snapshot], probe.pixels))
"""

TRAINING = """
from torch.utils.data import DataLoader
from lightning.pytorch.loggers import CSVLogger
from attn_monitor import AttentionMapCallback

class Training(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = VisionTransformer()

    def training_step(self, batch, batch_idx):
        return self.backbone(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

def fit(folder, logger):
    watch = AttentionMapCallback(every_n_train_steps=1, num_images=2, on_error="raise")
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, default_root_dir=folder, logger=logger, callbacks=[watch], log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )
    trainer.fit(Training(), DataLoader(images, batch_size=2))
    assert len(list(folder.rglob("step-*.npz"))) == 3, list(folder.rglob("*"))

fit(FOLDER / "pictures", False)
assert len(list(FOLDER.rglob("*.jpg"))) == 5, list(FOLDER.rglob("*"))  # two of each image, and logits
fit(FOLDER / "numbers", CSVLogger(FOLDER / "numbers"))
assert "attn/backbone/layer1/entropy" in next(FOLDER.rglob("metrics.csv")).read_text()
"""


def run_without(packages: tuple[str, ...], code: str, *, first: str = "") -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which importing these packages fails, after what is done ``first``."""
    blocked = f"{first}\nimport sys\nfor name in {packages}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=False)


def test_capture_and_drawing_need_no_optional_package() -> None:
    done = run_without(OPTIONAL, MODEL + CAPTURE)
    assert done.returncode == 0, done.stderr


def test_a_run_needs_no_optional_package(tmp_path: Path) -> None:
    # Lightning's metrics import matplotlib where it is installed, whether it can be imported or not.
    first = f"from pathlib import Path\nimport lightning.pytorch as pl\nFOLDER = Path({str(tmp_path)!r})"
    done = run_without((*OPTIONAL, "tensorboard"), MODEL + TRAINING, first=first)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("model", "package"),
    [("torchvision:vit_b_16", "torchvision"), ("timm:vit_tiny_patch16_224", "timm"), ("hf:org/name", "transformers")],
)
def test_a_missing_library_of_models_is_told_with_what_to_install(model: str, package: str) -> None:
    code = "import os; os.environ['HF_HUB_OFFLINE'] = '1'\nfrom attn_monitor.commands.cli import main\n"
    done = run_without((package,), f"{code}sys.argv[1:] = ['check', {model!r}]\nmain()")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"attn-monitor: model {model!r}: ")
    assert done.stderr.rstrip().endswith(f"Run: pip install {package}")
