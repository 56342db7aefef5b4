"""The metrics of a snapshot, each computed anew from the rows with NumPy and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from attn_monitor import AttentionMonitor, AttentionSnapshot, ProbeBatch
from tests.helpers import tiny_vit

IMAGES, HEADS, SIDE = 3, 4, 4


@pytest.fixture(scope="module")
def pair() -> tuple[AttentionSnapshot, AttentionSnapshot, torch.Tensor]:
    """Two snapshots of a student that changes in between and a teacher with two registers, and ground truth."""
    torch.manual_seed(0)
    student, teacher = (tiny_vit(reg_tokens=2, qkv_bias=False) for _ in range(2))
    masks = torch.zeros(IMAGES, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, :16], masks[0, 1, 16:, 16:] = True, True
    monitor = AttentionMonitor(ProbeBatch(torch.randn(IMAGES, 3, 32, 32), masks=masks))
    with torch.no_grad():
        for model in (student, teacher):
            model.blocks[1].attn.qkv.weight.mul_(20)
        before = monitor.snapshot({"student": student, "teacher": teacher}, step=0)
        student.blocks[1].attn.qkv.weight.mul_(1.2)
        return before, monitor.snapshot({"student": student, "teacher": teacher}, step=5), masks


def patches(snapshot: AttentionSnapshot, role: str) -> np.ndarray:
    """(B, H, N) in float64, summing to 1."""
    p = snapshot.rows(role).double().numpy()[..., 3:]
    return p / p.sum(-1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.array([[jensenshannon(p[b, h], q[b, h], base=2) ** 2 for h in range(HEADS)] for b in range(IMAGES)])


def check(snapshot: AttentionSnapshot, role: str, metric: str, expected: np.ndarray) -> None:
    """(B, H) values against the logged mean and against each head's mean over images."""
    got = snapshot.metrics
    assert got[f"attn/{role}/layer1/{metric}"] == pytest.approx(expected.mean(), abs=1e-5)
    for head in range(HEADS):
        assert got[f"attn_heads/{role}/layer1/{metric}/head{head}"] == pytest.approx(expected[:, head].mean(), abs=1e-5)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_metrics_of_one_role(pair: tuple[AttentionSnapshot, AttentionSnapshot, torch.Tensor], role: str) -> None:
    before, after, _ = pair
    p, rows = patches(after, role), after.rows(role).double().numpy()
    check(after, role, "entropy", entropy(p, axis=-1) / math.log(SIDE**2))
    check(after, role, "peak", p.max(-1) * SIDE**2)
    check(after, role, "prefix_mass", rows[..., :3].sum(-1))
    check(after, role, "prefix_mass_cls", rows[..., 0])
    check(after, role, "prefix_mass_register1", rows[..., 1])
    check(after, role, "prefix_mass_register2", rows[..., 2])
    check(after, role, "drift", divergence(p, patches(before, role)))
    assert "attn/student/layer1/drift" not in before.metrics
    pairs = [(a, b) for a in range(HEADS) for b in range(a + 1, HEADS)]
    heads = [np.mean([jensenshannon(image[a], image[b], base=2) ** 2 for a, b in pairs]) for image in p]
    assert after.metrics[f"attn/{role}/layer1/head_divergence"] == pytest.approx(np.mean(heads), abs=1e-5)


def test_student_against_teacher(pair: tuple[AttentionSnapshot, AttentionSnapshot, torch.Tensor]) -> None:
    _, after, _ = pair
    expected = divergence(patches(after, "student"), patches(after, "teacher"))
    assert expected.mean() > 0.05
    check(after, "student", "student_teacher_divergence", expected)
    assert not [tag for tag in after.metrics if "teacher/layer1/student_teacher" in tag]


def test_jaccard_best_head_and_fixed_head(pair: tuple[AttentionSnapshot, AttentionSnapshot, torch.Tensor]) -> None:
    """DINO's protocol takes the best head for each object; the honest figure is one head for all."""
    _, after, masks = pair
    objects = []
    for image, objects_of_image in enumerate(masks.numpy()):
        for truth in objects_of_image:
            if truth.any():
                overlaps = []
                for p in patches(after, "teacher")[image]:
                    kept, mass = np.zeros(SIDE**2, bool), 0.0
                    for index in np.argsort(-p):
                        if mass < 0.6:
                            kept[index], mass = True, mass + p[index]
                    shown = kept.reshape(SIDE, SIDE).repeat(8, 0).repeat(8, 1)
                    overlaps.append((shown & truth).sum() / (shown | truth).sum())
                objects.append(overlaps)
    table = np.array(objects)
    assert table.shape == (4, HEADS)
    got = after.metrics
    assert got["attn/teacher/layer1/jaccard_best_head"] == pytest.approx(table.max(1).mean(), abs=1e-5)
    assert got["attn/teacher/layer1/jaccard_fixed_head"] == pytest.approx(table.mean(0).max(), abs=1e-5)
    for head in range(HEADS):
        assert got[f"attn_heads/teacher/layer1/jaccard/head{head}"] == pytest.approx(table[:, head].mean(), abs=1e-5)
