"""Patch tokens in few dimensions that keep their cosines.

They are scores on leading principal axes of the probe's patch tokens at unit length, rotated onto those of the snapshot
before by the orthonormal matrix that brings the same patches closest (Procrustes; Schönemann 1966). Without it axes
swap and change sign from step to step. Nothing here is random, and rotated or mirrored features give the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention

Layers = Mapping[tuple[str, int], LayerAttention]

DIMENSIONS = 32  # of stored features, at most
NOTHING = 1e-6  # variance, as a share of all or of a token's length, that is rounding (tokens are float16)
COMPARED = 2048  # patches, evenly spaced, of which all pairs tell the error of the cosine


def with_features(layers: Layers, before: Layers) -> dict[tuple[str, int], LayerAttention]:
    """Return layers with `patch_features` of their patch tokens, on the CPU, rotated onto those of `continued`."""
    reduced: dict[tuple[str, int], LayerAttention] = {}
    for role, layer in sorted(layers, key=lambda key: key[0] == "student"):
        attention = layers[role, layer]
        if attention.patches is not None:
            past = continued(role, attention, before, reduced)
            features, error = patch_features(attention.patches, None if past is None else past.features)
            attention = replace(attention, features=features, features_error=error)
        reduced[role, layer] = attention
    return {key: reduced[key] for key in layers}


def continued(role: str, attention: LayerAttention, before: Layers, now: Layers) -> LayerAttention | None:
    """Return the layer whose axes a layer keeps: its own in the snapshot before, else the teacher's in this one.

    Args:
        role: role of the layer.
        attention: the layer.
        before: layers of the snapshot before.
        now: layers of this snapshot that are done, the teacher's first.
    """
    known = (before.get((role, attention.layer)), now.get(("teacher", attention.layer)))
    alike = (a for a in known if a is not None and len(a.rows) == len(attention.rows) and a.grid == attention.grid)
    return next(alike, None)


@torch.no_grad()
def patch_features(patches: Tensor, before: Tensor | None) -> tuple[Tensor, tuple[float, float]]:
    """Unit tokens (B, N, D) in K ≤ 32 dimensions, (B, N, K) float32 of float16 values, NaN where a token held NaN.

    Also at unit length, so that a product of two is their cosine; and the error of these cosines against those of the
    tokens themselves, its root mean square and its maximum over pairs of patches.
    """
    tokens, finite = finite_rows(patches)
    given = tokens[finite]
    scores = principal_scores(given, min(DIMENSIONS, given.shape[1]))
    scores = scores / torch.linalg.vector_norm(scores, dim=1, keepdim=True).clamp_min(1e-8)
    past = None if before is None else before.double().cpu().flatten(0, 1)[finite].nan_to_num()
    scores = (scores @ rotation_onto(scores, past, scores.shape[1])).half().double()
    few = slice(None, None, math.ceil(len(given) / COMPARED) or 1)
    error = (scores[few] @ scores[few].T - given[few] @ given[few].T).abs()
    features = torch.full((len(tokens), scores.shape[1]), torch.nan, device="cpu")
    features[finite] = scores.float()
    rms, largest = (float(error.square().mean().sqrt()), float(error.max())) if len(given) else (math.nan, math.nan)
    return features.unflatten(0, patches.shape[:2]), (rms, largest)


def principal_scores(tokens: Tensor, count: int) -> Tensor:
    """Scores of (n, D) float64 tokens on their leading principal axes, (n, count), by falling variance.

    As they come: tokens are centred before, or not. What has no variance has zeros. Signs are such that in each column
    the entry farthest from 0 is positive. Exact, by the smaller of the two products of the tokens with themselves.
    """
    scores, few = tokens.new_zeros(len(tokens), count), min(count, *tokens.shape)
    if few == 0:
        return scores
    wide = tokens.shape[1] > len(tokens)
    variances, axes = torch.linalg.eigh(tokens @ tokens.T if wide else tokens.T @ tokens)
    variances, axes = variances.flip(0)[:few].clamp_min(0), axes.flip(1)[:, :few]
    found = axes * variances.sqrt() if wide else tokens @ axes
    there = variances > NOTHING * max(float(variances.sum()), float(len(tokens)))
    peaks = found.gather(0, found.abs().argmax(0, keepdim=True))
    scores[:, :few] = torch.where(there, found * peaks.sign(), 0)
    return scores


def rotation_onto(scores: Tensor, before: Tensor | None, count: int) -> Tensor:
    """Orthonormal columns (k, count) that turn scores (n, k) as near as they can to those before, (n, count).

    What those before do not decide, all of it where there are none, is left to the leading axes.
    """
    wanted = torch.eye(scores.shape[1], count, dtype=scores.dtype, device="cpu")
    if before is not None and before.shape[1] == count:
        agreement = scores.T @ before
        wanted = agreement + wanted * max(1e-6 * float(torch.linalg.matrix_norm(agreement)), 1e-12)
    left, _, right = torch.linalg.svd(wanted, full_matrices=False)
    turned: Tensor = left @ right
    return turned


def finite_rows(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B · N, D) in float64 on the host, and which of them are finite."""
    tokens = patches.cpu().double().flatten(0, 1)
    return tokens, tokens.isfinite().all(1)
