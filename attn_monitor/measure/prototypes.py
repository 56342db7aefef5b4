"""Numbers on the prototypes of a projection head: which of them are used, how surely, and how many are copies.

A head such as DINO's compares an image with K prototypes. Outputs are (n, K); probabilities are their softmax at the
temperatures that DINO, iBOT, DINOv2 and DINOv3 share.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.07  # after its warm-up; its centre is subtracted first
ALIKE = 0.975  # cosine from which on two prototypes count as one, arXiv 2410.14060
COMPARED = 2048  # prototypes, evenly spaced, that are compared with one another


class Assignments(NamedTuple):
    """Sums over some images of how a head assigns them to its prototypes, on the device of its outputs.

    Args:
        images: their number, ().
        probabilities: sum of the probabilities, (K,).
        entropies: sum of their entropies in nats, ().
        wins: how often each prototype is the most probable, (K,).
    """

    images: Tensor
    probabilities: Tensor
    entropies: Tensor
    wins: Tensor


def assign(outputs: Tensor, valid: Tensor, temperature: float, centre: Tensor | None = None) -> Assignments:
    """Sum the assignments of some images, without synchronising with their device.

    Args:
        outputs: A head's outputs, (n, K).
        valid: Which rows count, bool (n,).
        temperature: Of the softmax, above 0.
        centre: Subtracted from each row first, (K,); None for none.

    Example:
        >>> found = assign(torch.eye(3), torch.tensor([True, True, False]), temperature=0.01)
        >>> found.images.item(), found.wins.tolist()
        (2.0, [1.0, 1.0, 0.0])
    """
    outputs = outputs.detach().float()
    logits = (outputs if centre is None else outputs - centre.detach().float()) / temperature
    probabilities, weight = logits.softmax(-1), valid.float()
    counted = torch.where(valid[:, None], probabilities, 0)
    entropies = torch.where(valid, torch.special.entr(probabilities).sum(-1), 0)
    best = torch.arange(logits.shape[-1], device=logits.device) == logits.argmax(-1, keepdim=True)
    return Assignments(weight.sum(), counted.sum(0), entropies.sum(), (best & valid[:, None]).float().sum(0))


def total(parts: list[Assignments]) -> Assignments:
    """Add up the assignments of several batches."""
    return Assignments(*(torch.stack(values).sum(0) for values in zip(*parts, strict=True)))


def measure_assignments(found: Assignments) -> dict[str, float]:
    """Compute the metrics of a head's assignments.

    Returns:
        ``prototypes``, their number K; ``assignment_entropy_mean``, the entropy of the mean assignment, and
        ``assignment_entropy_each``, the mean entropy of an image's, over ln K (0 … 1); ``prototypes_used``, the share
        of prototypes that win at least once over what chance gives, 1 - (1 - 1/K)^S. Empty without images.

    Example:
        >>> uniform = assign(torch.zeros(8, 4), torch.ones(8, dtype=torch.bool), temperature=0.1)
        >>> f"{measure_assignments(uniform)['assignment_entropy_each']:.6f}"
        '1.000000'
    """
    number, probabilities, entropies, wins = (part.detach().cpu().double() for part in found)
    images = float(number)
    k = len(wins)
    if images < 1 or k < 2:
        return {}
    mean = probabilities / images
    chance = 1 - (1 - 1 / k) ** images
    return {
        "prototypes": float(k),
        "assignment_entropy_mean": float(torch.special.entr(mean).sum()) / math.log(k),
        "assignment_entropy_each": float(entropies) / images / math.log(k),
        "prototypes_used": float((wins > 0).double().mean()) / chance,
    }


def prototypes_alike(weight: Tensor) -> float:
    """Return the share of prototypes that have at least one near copy, 0 … 1.

    Args:
        weight: Of the last layer, a row for each prototype, (K, d). At most `COMPARED` evenly spaced rows are compared.
    """
    rows = evenly_spaced(weight, COMPARED).detach().cpu().float()
    if len(rows) < 2 or not bool(rows.isfinite().all()):
        return math.nan
    unit = torch.nn.functional.normalize(rows, dim=1)
    return float(((unit @ unit.T).fill_diagonal_(-1).amax(1) > ALIKE).double().mean())


def evenly_spaced(rows: Tensor, count: int) -> Tensor:
    """Return at most ``count`` evenly spaced rows, as a view."""
    return rows[:: -(-len(rows) // count)] if len(rows) else rows
