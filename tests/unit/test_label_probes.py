"""kNN and the ridge probe against scikit-learn, and how labelled images are read and split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from attn_monitor import EvaluationOptions, ProbeBatch
from attn_monitor.errors import ArgumentError, ProbeError
from attn_monitor.measure.label_probes import accuracy, knn_predictions, ridge_predictions
from attn_monitor.probe.labelled import batches, held_out

DIGITS = load_digits()
X, Y = torch.from_numpy(DIGITS.data), torch.from_numpy(DIGITS.target)
X += 0.01 * torch.randn(X.shape, generator=torch.Generator().manual_seed(0))  # no two are as near
SPLITS = [(400, slice(400, 900), 64), (30, slice(400, 600), 64), (500, slice(500, 700), 3)]


@pytest.mark.parametrize(("count", "test", "channels"), SPLITS)
def test_knn_is_that_of_scikit_learn(count: int, test: slice, channels: int) -> None:
    x = X[:, 10 : 10 + channels] if channels < 64 else X
    reference = KNeighborsClassifier(
        min(20, count), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(x[:count].double(), Y[:count])
    found = knn_predictions(x[:count], Y[:count], x[test])
    assert np.array_equal(found.numpy(), reference.predict(x[test].double().numpy()))


@pytest.mark.parametrize(("count", "test", "channels"), SPLITS)
def test_ridge_is_that_of_scikit_learn(count: int, test: slice, channels: int) -> None:
    x = X[:, 10 : 10 + channels] if channels < 64 else X
    reference = make_pipeline(StandardScaler(), RidgeClassifier(1.0)).fit(x[:count].double().numpy(), Y[:count])
    found = ridge_predictions(x[:count], Y[:count], x[test])
    assert np.array_equal(found.numpy(), reference.predict(x[test].double().numpy()))
    two = Y[:count] < 5
    reference = make_pipeline(StandardScaler(), RidgeClassifier(1.0)).fit(x[:count].double().numpy(), two)
    found = ridge_predictions(x[:count], two.long(), x[test])
    assert np.array_equal(found.numpy(), reference.predict(x[test].double().numpy()))
    assert accuracy(found, (Y[test] < 5).long()) > 0.5


def test_every_fourth_of_each_class_is_held_out() -> None:
    labels = Y[:200].tolist()
    chosen = np.array(held_out(labels))
    for kind in range(10):
        of_class = np.flatnonzero(Y[:200].numpy() == kind)
        assert np.array_equal(np.flatnonzero(chosen & (Y[:200].numpy() == kind)), of_class[3::4])


class Pairs:
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def test_a_folder_tensors_and_a_data_set_are_read_alike(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2])
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (tmp_path / "ABC"[label]).mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(tmp_path / "ABC"[label] / f"{number}.png")
    probe = ProbeBatch(torch.randn(2, 3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(probe.mean)[:, None, None]) / torch.tensor(probe.std)[
        :, None, None
    ]
    for source in (tmp_path, (images, labels), Pairs(images, labels)):
        EvaluationOptions(source)
        found = list(batches(source, probe, 100, 4))
        assert [len(part) for part, _ in found] == [4, 4, 1]
        torch.testing.assert_close(torch.cat([part for part, _ in found]), images)
        assert [label for _, part in found for label in part] == labels.tolist()
        few = [label for _, part in batches(source, probe, 3, 4) for label in part]
        assert few == [0, 0, 2]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (torch.zeros(2, 3, 8, 8), "received a Tensor; expected a folder with a folder of images for each class"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(3).long()), r"images \(2, 3, 8, 8\) torch.float32 and labels \(3,\)"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), "and n whole numbers"),
        ("no/such/folder", "no/such/folder holds 0 folders with images"),
    ],
)
def test_wrong_data_is_refused_at_once(source: object, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        EvaluationOptions(source)


@pytest.mark.parametrize(("value", "told"), [({"every": 0}, "every=0"), ({"tolerance": 2}, "tolerance=2")])
def test_wrong_values_are_refused_at_once(value: dict[str, int], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        EvaluationOptions((torch.zeros(2, 3, 8, 8), torch.zeros(2).long()), **value)


def test_samples_of_another_kind_are_named() -> None:
    class Alone(Pairs):
        def __getitem__(self, index: int) -> Tensor:
            return self.images[index]

    with pytest.raises(ProbeError, match=r"sample 0 is a Tensor, expected \(image, label\)"):
        list(batches(Alone(torch.zeros(2, 3, 8, 8), torch.zeros(2)), ProbeBatch(torch.randn(1, 3, 8, 8)), 9, 9))
