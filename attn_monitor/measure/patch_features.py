"""Patch tokens as colours that keep their meaning over a run, and in few dimensions that keep their cosines.

Both are scores on leading principal axes of the probe's patch tokens at unit length, turned onto those of the snapshot
before: by the orthonormal matrix that brings the same patches closest (Procrustes; Schönemann 1966). Without it axes
swap and change sign from step to step. Nothing here is random, and turned or mirrored features give the same scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention
from attn_monitor.patch_colors import PatchColors

Layers = Mapping[tuple[str, int], LayerAttention]

AXES = 8  # leading ones, among which the three of the colours lie
DIMENSIONS = 32  # of stored features, at most
FULL_COLOUR = 0.9  # share of scores that no colour channel cuts off
LEAST_SCALE = 0.25  # of a token's length: smaller differences are not stretched into full colours
PACE = 0.25  # of the way that the scale goes towards what a snapshot by itself would have
NOTHING = 1e-6  # variance, as a share of all or of a token's length, that is rounding (tokens are float16)
COMPARED = 2048  # patches, evenly spaced, of which all pairs tell the error of the cosine


def with_colors(layers: Layers, before: Layers) -> dict[tuple[str, int], LayerAttention]:
    """Layers on the host with colours in place of their patch tokens; they are computed when they are asked for.

    ``before`` are those of the snapshot before. Where there are none, a student's are turned onto the teacher's.
    """
    colored: dict[tuple[str, int], LayerAttention] = {}
    for role, layer in sorted(layers, key=lambda key: key[0] == "student"):
        attention = layers[role, layer]
        if attention.patches is not None:
            past = _alike(before.get((role, layer)), attention) or _alike(colored.get(("teacher", layer)), attention)
            colors = PatchColors(partial(patch_colors, attention.patches, None if past is None else past.patch_colors))
            attention = replace(attention, patches=None, patch_colors=colors)
        colored[role, layer] = attention
    return {key: colored[key] for key in layers}


def with_features(layers: Layers, before: Layers) -> dict[tuple[str, int], LayerAttention]:
    """Layers with `patch_features` of their patch tokens, on the host; what they are turned onto is as for colours."""
    reduced: dict[tuple[str, int], LayerAttention] = {}
    for role, layer in sorted(layers, key=lambda key: key[0] == "student"):
        attention = layers[role, layer]
        if attention.patches is not None:
            past = _alike(before.get((role, layer)), attention) or _alike(reduced.get(("teacher", layer)), attention)
            features, error = patch_features(attention.patches, None if past is None else past.features)
            attention = replace(attention, features=features, features_error=error)
        reduced[role, layer] = attention
    return {key: reduced[key] for key in layers}


def _alike(other: LayerAttention | None, attention: LayerAttention) -> LayerAttention | None:
    fits = other is not None and len(other.rows) == len(attention.rows) and other.grid == attention.grid
    return other if fits else None


@torch.no_grad()
def patch_colors(patches: Tensor, before: PatchColors | None) -> tuple[Tensor, float]:
    """Colours (B, N, 3) of unit tokens (B, N, D), and their scale.

    At first they are the three leading scores around the mean of all patches, then those three directions among the
    eight leading ones that carry on the colours before: one step of subspace iteration. It draws them towards the
    three leading ones, and goes smoothly from one axis to another where these overtake each other.

    Grey is the mean, and all channels have one scale, so that distances between colours are those between features. It
    follows the spread of the scores slowly, and has a least value: when features collapse, colours fade to grey.
    """
    tokens, finite = _finite_rows(patches)
    scores = principal_scores(tokens[finite] - tokens[finite].mean(0), AXES)
    past = None if before is None else before.rgb.double().flatten(0, 1)[finite]
    known = slice(None) if past is None else past.any(1)  # what was NaN then was black, which is no colour
    scores = scores @ rotation_onto(scores[known], None if past is None else past[known] - past[known].mean(0), 3)
    scale = max(LEAST_SCALE, float(scores.abs().flatten().quantile(FULL_COLOUR)) if len(scores) else 0.0)
    if before is not None:
        scale = before.scale ** (1 - PACE) * scale**PACE
    levels = torch.zeros(len(tokens), 3, dtype=torch.float64)
    shown = (255 * (0.5 + 0.5 * scores / scale).clamp(0, 1)).round()
    levels[finite] = torch.where(shown.any(1, keepdim=True), shown, 1)  # black is for NaN alone
    return levels.div(255).float().unflatten(0, patches.shape[:2]), scale


@torch.no_grad()
def patch_features(patches: Tensor, before: Tensor | None) -> tuple[Tensor, tuple[float, float]]:
    """Unit tokens (B, N, D) in K ≤ 32 dimensions, (B, N, K) float32 of float16 values, NaN where a token held NaN.

    Also at unit length, so that a product of two is their cosine; and the error of these cosines against those of the
    tokens themselves, its root mean square and its maximum over pairs of patches.
    """
    tokens, finite = _finite_rows(patches)
    given = tokens[finite]
    scores = principal_scores(given, min(DIMENSIONS, given.shape[1]))
    scores = scores / torch.linalg.vector_norm(scores, dim=1, keepdim=True).clamp_min(1e-8)
    past = None if before is None else before.double().cpu().flatten(0, 1)[finite].nan_to_num()
    scores = (scores @ rotation_onto(scores, past, scores.shape[1])).half().double()
    few = slice(None, None, math.ceil(len(given) / COMPARED) or 1)
    error = (scores[few] @ scores[few].T - given[few] @ given[few].T).abs()
    features = torch.full((len(tokens), scores.shape[1]), torch.nan)
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
    wanted = torch.eye(scores.shape[1], count, dtype=scores.dtype)
    if before is not None and before.shape[1] == count:
        agreement = scores.T @ before
        wanted = agreement + wanted * max(1e-6 * float(torch.linalg.matrix_norm(agreement)), 1e-12)
    left, _, right = torch.linalg.svd(wanted, full_matrices=False)
    turned: Tensor = left @ right
    return turned


def _finite_rows(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B · N, D) in float64 on the host, and which of them are finite."""
    tokens = patches.cpu().double().flatten(0, 1)
    return tokens, tokens.isfinite().all(1)
