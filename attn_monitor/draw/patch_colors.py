"""Patch tokens as colours that keep their meaning over a run.

Colours are scores on leading principal axes, as `measure.patch_features` computes them, rotated onto the colours of the
snapshot before. The decomposition takes longer than a forward on a GPU, so it runs on a thread that draws.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attn_monitor.attention import LayerAttention, PatchColors
from attn_monitor.measure.patch_features import Layers, continued, finite_rows, principal_scores, rotation_onto

AXES = 8  # leading ones, among which the three of the colours lie
FULL_COLOUR = 0.9  # share of scores that no colour channel cuts off
LEAST_SCALE = 0.25  # of a token's length: smaller differences are not stretched into full colours
PACE = 0.25  # of the way that the scale goes towards what a snapshot by itself would have


def with_colors(layers: Layers, before: Layers) -> dict[tuple[str, int], LayerAttention]:
    """Return layers with colours in place of their patch tokens.

    Args:
        layers: layers on the CPU.
        before: layers with colours, to continue. Where there are none, a student's colours continue the teacher's.
    """
    colored: dict[tuple[str, int], LayerAttention] = {}
    for role, layer in sorted(layers, key=lambda key: key[0] == "student"):
        attention = layers[role, layer]
        if attention.patches is not None:
            past = continued(role, attention, before, colored)
            colors = patch_colors(attention.patches, None if past is None else past.patch_colors)
            attention = replace(attention, patches=None, patch_colors=colors)
        colored[role, layer] = attention
    return {key: colored[key] for key in layers}


@torch.no_grad()
def patch_colors(patches: Tensor, before: PatchColors | None) -> PatchColors:
    """Compute the colours of unit tokens (B, N, D).

    At first they are the three leading scores around the mean of all patches, then those three directions among the
    eight leading ones that carry on the colours before: one step of subspace iteration. It draws them towards the
    three leading ones, and goes smoothly from one axis to another where these overtake each other.

    Grey is the mean, and all channels have one scale, so that distances between colours are those between features. It
    follows the spread of the scores slowly, and has a least value: when features collapse, colours fade to grey.
    """
    tokens, finite = finite_rows(patches)
    scores = principal_scores(tokens[finite] - tokens[finite].mean(0), AXES)
    past = None if before is None else before.rgb.double().flatten(0, 1)[finite]
    known = slice(None) if past is None else past.any(1)  # what was NaN then was black, which is no colour
    scores = scores @ rotation_onto(scores[known], None if past is None else past[known] - past[known].mean(0), 3)
    scale = max(LEAST_SCALE, float(scores.abs().flatten().quantile(FULL_COLOUR)) if len(scores) else 0.0)
    if before is not None:
        scale = before.scale ** (1 - PACE) * scale**PACE
    levels = torch.zeros(len(tokens), 3, dtype=torch.float64, device="cpu")
    shown = (255 * (0.5 + 0.5 * scores / scale).clamp(0, 1)).round()
    levels[finite] = torch.where(shown.any(1, keepdim=True), shown, 1)  # black is for NaN alone
    return PatchColors(levels.div(255).float().unflatten(0, patches.shape[:2]), scale)
