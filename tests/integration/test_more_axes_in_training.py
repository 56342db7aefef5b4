"""Clip, volume and spectrogram models in a real run: data found, snapshots written, pictures drawn, the report made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attn_monitor import AttentionMapCallback, AttentionMonitor, AttentionSnapshot
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.player.contents import gather
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.train.batch_images import find_images
from tests.support.events import Events
from tests.support.helpers import trainer
from tests.support.more_axes import AnyViT
from tests.support.oracle import attention_matrices

KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, tuple[int, ...], str]] = {
    # size, patch, channels, grid, names of the axes
    "clip": ((4, 32, 32), (2, 8, 8), 3, (2, 4, 4), "thw"),
    "volume": ((12, 16, 24), (4, 8, 8), 1, (3, 2, 3), "dhw"),
    "signal": ((64,), (4,), 2, (16,), "t"),
    "bands": ((24, 32), (8, 8), 13, (3, 4), "hw"),
    "spectrogram": ((64, 32), (8, 8), 0, (8, 4), "tf"),  # (B, T, F), without channels
}


class Spectrograms(AnyViT):
    """A ViT on (B, T, F), as audio transformers are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None])


class Classifier(pl.LightningModule):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(32, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.backbone(images)[:, 0]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run(kind: str, tmp_path: Path) -> None:
    size, patch, channels, grid, axes = KINDS[kind]
    torch.manual_seed(0)
    images = torch.rand(16, *([channels] if channels else []), *size)
    data = DataLoader(TensorDataset(images, torch.arange(16) % 2), batch_size=8)
    kind_of_model = AnyViT if channels else Spectrograms
    module = Classifier(kind_of_model(size, patch, channels=max(channels, 1)))
    callback = AttentionMapCallback(every_n_train_steps=2, on_error="raise", metrics="all")
    trainer(tmp_path, callback, max_steps=4).fit(module, data)

    folder = tmp_path / "run" / "version_0" / "attn_monitor"
    assert (folder / "report.html").exists()
    probe = ProbeBatch.load(folder / "probe.npz")
    assert probe.channels_first.shape[2:] == size
    last = AttentionSnapshot.load(folder / "step-000000004.npz")
    attention = last.layer("backbone")
    assert attention.grid == grid
    assert "".join(attention.grid.axes) == axes
    matrix = attention_matrices(module.backbone, probe.images, default_forward)[-1]
    assert float((attention.rows - matrix[:, :, 0]).abs().max()) < 2e-3  # stored in float16
    events = Events(tmp_path / "run" / "version_0")
    assert [step for step, _ in events.images("attn_maps/image0")] == [0, 2, 4]
    assert len(events.scalars("attn/backbone/layer1/entropy")) == 3
    for name in ("distance",) if kind in ("signal", "bands") else (f"distance_{axis}" for axis in axes):
        assert len(events.scalars(f"attn/backbone/layer1/{name}")) == 3
    assert attention.distance is not None
    assert attention.distance.shape[2:] == {"signal": (), "bands": (), "spectrogram": (2,)}.get(kind, (3,))
    assert len(events.scalars("attn/backbone/rankme")) >= 1
    shown = gather(folder, "run", 4_000_000).manifest()
    assert [step["step"] for step in shown["steps"]] == [0, 2, 4]
    assert bool(shown["pictures"]) == (len(size) == 3)
    assert shown["layouts"][0][0]["grid"][-1] == grid[-1]


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"video": torch.zeros(2, 3, 4, 8, 8), "label": torch.zeros(2)}, (2, 3, 4, 8, 8)),
        ([torch.zeros(2, 13, 8, 8), torch.zeros(2, 48, 16, 16)], (2, 13, 8, 8)),  # features have more channels
        ([torch.zeros(2, 200, 8, 8), torch.zeros(2, 5, 7)], (2, 200, 8, 8)),
        ({"input_values": torch.zeros(2, 128, 64), "labels": torch.zeros(2)}, (2, 128, 64)),
        ({"embedding": torch.zeros(2, 9), "labels": torch.zeros(2)}, None),
    ],
)
def test_images_of_a_batch(batch: Any, found: tuple[int, ...] | None) -> None:
    images = find_images(batch)
    assert (None if images is None else tuple(images.shape)) == found


def test_a_monitor_takes_the_axes_of_the_images_that_it_restores() -> None:
    size, patch, channels, _, _ = KINDS["volume"]
    images, model = torch.randn(2, channels, *size), AnyViT(size, patch, channels=channels)
    named = {"mean": (0.0,), "std": (1.0,)}
    stored = AttentionMonitor(ProbeBatch(images, axes="cdhw", **named)).state_dict()
    restored = AttentionMonitor(ProbeBatch(images, axes="cthw", **named))
    assert restored.snapshot({"backbone": model}, step=0).layer("backbone").grid.axes == ("t", "h", "w")
    restored.let_go()
    restored.load_state_dict(stored)
    assert restored.snapshot({"backbone": model}, step=1).layer("backbone").grid.axes == ("d", "h", "w")
