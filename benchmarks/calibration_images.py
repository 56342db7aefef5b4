"""Images of `benchmarks.calibration_runs`, which packages hold, and random crops of them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn


@cache
def images_of(data: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 36, 36) in 0…1 of a data set, and their labels (n,)."""
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = torch.from_numpy(digits.images / 16.0), torch.from_numpy(digits.target)
    elif data == "faces":
        from skimage.data import lfw_subset

        images, labels = torch.from_numpy(lfw_subset()), (torch.arange(200) >= 100).long()
    else:
        return _windows()
    rgb = images.float()[:, None].expand(-1, 3, -1, -1)
    return nn.functional.interpolate(rgb, 36, mode="bicubic", antialias=True).clamp(0, 1), labels


def _windows() -> tuple[Tensor, Tensor]:
    """Cut windows out of photographs; a label is the photograph."""
    from skimage import data

    draw, found, labels = np.random.default_rng(0), [], []
    for label, photo in enumerate((data.astronaut, data.chelsea, data.coffee, data.rocket, data.immunohistochemistry)):
        image = torch.from_numpy(photo()).permute(2, 0, 1)[None].float() / 255
        image = nn.functional.interpolate(image, 96, mode="bilinear", antialias=True)
        for _ in range(120):
            top, left = draw.integers(0, 96 - 36, 2)
            found.append(image[0, :, top : top + 36, left : left + 36])
            labels.append(label)
    return torch.stack(found), torch.tensor(labels)


def crops(images: Tensor, size: int) -> Tensor:
    """Random crops of most of an image, flipped and with other brightness and contrast."""
    n = len(images)
    side = torch.empty(n).uniform_(0.7, 1.0).sqrt()
    shift = (torch.rand(n, 2) * 2 - 1) * (1 - side)[:, None]
    flip = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * flip, side, shift
    grid = nn.functional.affine_grid(theta, [n, 3, size, size], align_corners=False)
    found = nn.functional.grid_sample(images, grid, align_corners=False)
    contrast, brightness = torch.empty(2, n, 1, 1, 1).uniform_(-0.4, 0.4)
    return ((found - 0.5) * (1 + contrast) + brightness) / 0.25
