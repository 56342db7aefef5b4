"""The colours of images that were given without a word: by which statistics they were normalised."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2
from transformers import ViTImageProcessor

from attn_monitor import ProbeBatch, ProbeOptions
from attn_monitor.probe.normalisation import Statistics, declared_statistics, infer_statistics
from attn_monitor.train.probe_search import probe_from_images

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
OWN = ((0.31, 0.42, 0.53), (0.11, 0.22, 0.33))


@pytest.fixture(scope="module")
def pixels(photographs: Path) -> Tensor:
    """Four photographs as whole numbers of 0 to 255, (4, 3, 96, 96)."""
    return torch.from_numpy(ProbeBatch.from_folder(photographs, size=96).pixels).permute(0, 3, 1, 2)


def error(probe: ProbeBatch, pixels: Tensor) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(probe.pixels.astype(float) - pixels.permute(0, 2, 3, 1).numpy()).mean())


def normalised(pixels: Tensor, mean: Any, std: Any) -> Tensor:
    return v2.Normalize(mean, std)(pixels.float() / 255)


@pytest.mark.parametrize("statistics", [IMAGENET, HALF, CLIP, CIFAR, ((0,) * 3, (1,) * 3), ((0,) * 3, (1 / 255,) * 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_right_statistics_leave_whole_values(pixels: Tensor, statistics: Any, dtype: torch.dtype) -> None:
    assert error(probe_from_images(normalised(pixels, *statistics).to(dtype)), pixels) < 0.1


def test_what_a_hugging_face_processor_made(pixels: Tensor) -> None:
    processor = ViTImageProcessor(size={"height": 96, "width": 96})
    images = processor(list(pixels), return_tensors="pt")["pixel_values"]
    assert error(probe_from_images(images), pixels) < 0.1


class Pictures(Dataset[Tensor]):
    """A data set with a transform, as torchvision has them."""

    def __init__(self, pixels: Tensor, transform: Any) -> None:
        self.samples, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.samples[index])


def test_the_normalize_of_the_transforms(pixels: Tensor) -> None:
    """Colours that were jittered as floats are no whole values: then the data set's own transform tells."""
    steps = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.ColorJitter(0.1), v2.Normalize(*OWN)])
    data = Subset(Pictures(pixels, steps), [0, 1, 2, 3])
    batch = next(iter(DataLoader(data, batch_size=4)))
    shown = probe_from_images(batch, declared=declared_statistics(data))
    assert shown.mean == OWN[0]
    assert "Normalize" in shown.source
    assert "unknown normalisation" in probe_from_images(batch).source


def test_statistics_hidden_in_a_collate_function(pixels: Tensor) -> None:
    processor = ViTImageProcessor(image_mean=list(OWN[0]), image_std=list(OWN[1]))

    def collate(processor: ViTImageProcessor, images: list[Tensor]) -> Tensor:
        return torch.stack(images)

    for function in (functools.partial(collate, processor), lambda images: collate(processor, images)):
        assert [(s.mean, s.std) for s in declared_statistics([pixels, function])] == [OWN]


def test_a_declared_normalize_is_not_believed_against_the_values(pixels: Tensor) -> None:
    """Noise of a mean and std, or a transform that did not run."""
    declared = [Statistics((3.0,) * 3, (9.0,) * 3, "noise")]
    assert infer_statistics(normalised(pixels, *CLIP), declared).source == "CLIP's statistics"


def test_per_image_standardisation_keeps_its_contrast(pixels: Tensor) -> None:
    """Nothing tells its mean and std: the picture is not clipped, and not flat."""
    images = pixels.float()
    images = (images - images.mean((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True)
    probe = probe_from_images(images)
    assert "percentiles" in probe.source
    assert ((probe.pixels == 0) | (probe.pixels == 255)).mean() < 0.02
    assert probe.pixels.std() > 40


def test_noise_one_channel_and_many(pixels: Tensor) -> None:
    assert probe_from_images(torch.randn(3, 1, 8, 8)).pixels.shape == (3, 8, 8, 3)
    assert probe_from_images(torch.randn(3, 6, 8, 8)).pixels.shape == (3, 8, 8, 3)
    assert probe_from_images(torch.rand(3, 3, 8, 8)).source == "no normalisation (mean 0, 0, 0; std 1, 1, 1)"
    assert probe_from_images(torch.full((1, 3, 8, 8), torch.nan)).pixels.max() == 0


def test_a_tensor_without_a_word_and_with_one(pixels: Tensor, photographs: Path) -> None:
    assert error(ProbeOptions(normalised(pixels, *CLIP)).load(), pixels) < 0.1
    assert error(ProbeOptions(normalised(pixels, *OWN), mean=OWN[0], std=OWN[1]).load(), pixels) < 0.1
    folder = ProbeOptions(photographs, image_size=96, mean=CLIP[0], std=CLIP[1]).load()
    torch.testing.assert_close(folder.images, normalised(pixels, *CLIP))


def test_where_the_numbers_are_from_is_kept(tmp_path: Path, pixels: Tensor) -> None:
    probe = probe_from_images(normalised(pixels, *CLIP), caption="training crop")
    probe.save(tmp_path / "probe.npz")
    for again in (ProbeBatch.load(tmp_path / "probe.npz"), ProbeBatch.from_state_dict(probe.state_dict())):
        assert (again.caption, again.source) == (probe.caption, probe.source)
        assert again.source.startswith("CLIP's statistics (mean 0.4815")
