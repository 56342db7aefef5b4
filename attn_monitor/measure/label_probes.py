"""What features are worth where there are labels: a kNN classifier and a closed-form linear probe.

Both are read in float64, draw nothing at random, and equal scikit-learn's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

NEIGHBOURS, TEMPERATURE = 20, 0.07  # DINO's; the lower the temperature, the more the nearest count
PENALTY = 1.0  # weight of the squared norm in the ridge, on features of unit variance
CHUNK = 1024  # rows that are compared with all others at a time


@torch.no_grad()
def knn_predictions(train: Tensor, labels: Tensor, test: Tensor, *, k: int = NEIGHBOURS) -> Tensor:
    """Predict classes by the nearest neighbours in cosine, weighted by exp(cosine / ``TEMPERATURE``).

    Source: the kNN evaluation of DINO, Caron et al. 2021, arXiv 2104.14294, App. E, after Wu et al. 2018.

    Args:
        train: Features with labels, (n, D).
        labels: Their classes, (n,) from 0 on.
        test: Features to classify, (m, D).
        k: Number of neighbours, or all of fewer.

    Returns:
        Classes, (m,); the first of several that are as likely.

    Example:
        >>> train, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> knn_predictions(train, labels, torch.tensor([[0.1, 1.0]]), k=2).tolist()
        [1]
    """
    known, count = normalize(train.double()), int(labels.max()) + 1
    found = []
    for rows in normalize(test.double()).split(CHUNK):
        nearest = (rows @ known.T).topk(min(k, len(known)))
        votes = torch.zeros(len(rows), count, dtype=known.dtype, device=known.device)
        found.append(votes.scatter_add_(1, labels[nearest.indices], (nearest.values / TEMPERATURE).exp()).argmax(1))
    return torch.cat(found)


@torch.no_grad()
def ridge_predictions(train: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Predict classes by a linear probe that is solved in closed form: ridge regression onto ±1 for each class.

    Features are scaled to mean 0 and variance 1 over ``train``; the intercept is free.

    Args:
        train: Features with labels, (n, D).
        labels: Their classes, (n,) from 0 on.
        test: Features to classify, (m, D).

    Returns:
        Classes, (m,).

    Example:
        >>> train, labels = torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1])
        >>> ridge_predictions(train, labels, torch.tensor([[1.5], [3.0]])).tolist()
        [0, 1]
    """
    x, mean = train.double(), train.double().mean(0)
    deviation = x.std(0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    x, new = (x - mean) / scale, (test.double() - mean) / scale
    classes = torch.arange(int(labels.max()) + 1, device=labels.device)
    y = 2.0 * (labels[:, None] == classes).to(x.dtype) - 1
    middle = y.mean(0)
    small = PENALTY * torch.eye(min(x.shape), dtype=x.dtype, device=x.device)
    if x.shape[1] <= len(x):
        weights = torch.linalg.solve(x.T @ x + small, x.T @ (y - middle))
    else:
        weights = x.T @ torch.linalg.solve(x @ x.T + small, y - middle)
    classes_found: Tensor = (new @ weights + middle).argmax(1)
    return classes_found


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Return the share of predictions that are right, 0 to 1."""
    return float((predictions == labels).double().mean())
