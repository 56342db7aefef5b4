"""Patch tokens as colours: an independent oracle, the same picture for turned features, and one meaning over a run."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from attn_monitor import AttentionMapCallback, AttentionMonitor, AttentionSnapshot, ProbeBatch, load_snapshots
from attn_monitor.attention import LayerAttention, PatchColors
from attn_monitor.draw import patch_colors as module
from attn_monitor.draw.history import MAX_SNAPSHOTS
from attn_monitor.draw.panels import panel
from attn_monitor.draw.patch_colors import FULL_COLOUR, LEAST_SCALE, PACE, patch_colors
from attn_monitor.draw.strips import filmstrip
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

LEVEL = 1 / 255


def unit(tokens: Tensor) -> Tensor:
    return tokens / tokens.norm(dim=-1, keepdim=True)


def colors_of(tokens: Tensor, before: PatchColors | None = None) -> PatchColors:
    return patch_colors(unit(tokens).half(), before)


def oracle(tokens: Tensor, before: PatchColors | None = None) -> np.ndarray:
    """By the singular value decomposition of all tokens, and SciPy's Procrustes rotation."""
    x = unit(tokens).half().double().numpy().reshape(-1, tokens.shape[-1])
    x = x - x.mean(0)
    left, lengths, _ = np.linalg.svd(x, full_matrices=False)
    scores = (left * lengths)[:, :8]
    if before is None:
        scores = scores[:, :3] * np.sign(scores[np.abs(scores).argmax(0), range(8)])[:3]
    else:
        past = before.rgb.double().numpy().reshape(-1, 3)
        wanted = np.pad(past - past.mean(0), ((0, 0), (0, 5)))  # five directions that nothing shows
        scores = scores @ orthogonal_procrustes(scores, wanted)[0][:, :3]
    scale = max(LEAST_SCALE, np.quantile(np.abs(scores), FULL_COLOUR))
    if before is not None:
        scale = before.scale * (scale / before.scale) ** PACE
    return np.clip(0.5 + scores / scale / 2, 0, 1).reshape(*tokens.shape[:2], 3)


@pytest.fixture
def tokens() -> Tensor:
    """Three images of 24 patches in 40 dimensions, of which some vary more than others, around a common mean."""
    return torch.randn(3, 24, 40) * torch.logspace(0, -1.5, 40) + 0.3 * torch.randn(40)


@pytest.mark.parametrize("dimensions", [40, 300])  # fewer and more than patches
def test_colors_by_another_way(dimensions: int) -> None:
    steps = torch.randn(2, 3, 24, dimensions) * torch.logspace(0, -1.5, dimensions)
    steps[1] += steps[0]
    first = colors_of(steps[0])
    np.testing.assert_allclose(first.rgb, oracle(steps[0]), atol=0.51 * LEVEL)
    second = colors_of(steps[1], first)
    np.testing.assert_allclose(second.rgb, oracle(steps[1], first), atol=0.51 * LEVEL)
    assert first.rgb.std() > 0.2


def test_turned_and_mirrored_features_are_the_same_picture(tokens: Tensor) -> None:
    turn = torch.linalg.qr(torch.randn(40, 40))[0]
    signs = torch.randint(0, 2, (40,)) * 2.0 - 1
    before = colors_of(torch.randn(3, 24, 40))
    for past in (None, before):
        plain = colors_of(tokens, past)
        for changed in (tokens @ turn, tokens * signs, tokens.flip(-1), 7 * tokens):
            assert (colors_of(changed, past).rgb - plain.rgb).abs().max() < 2 * LEVEL


def test_a_color_keeps_its_meaning(tokens: Tensor) -> None:
    """Axes swap places and signs along the way; the colours of most patches hardly change from step to step."""
    stretch = torch.ones(40)
    stretch[:3] = torch.tensor([0.6, 1.0, 1.7])  # the order of variances turns round
    first = last = colors_of(tokens)
    alone = [first.rgb]
    for step in range(1, 21):
        now = tokens * stretch ** (step / 20)
        last, before = colors_of(now * (-1) ** step, last), last
        assert (last.rgb - before.rgb).abs().mean() < 0.06
        alone.append(colors_of(now * (-1) ** step).rgb)
    assert max((b - a).abs().mean() for a, b in itertools.pairwise(alone)) > 0.15  # without the rotation
    kept = np.corrcoef(first.rgb.flatten(), last.rgb.flatten())[0, 1]
    assert kept > 0.4


def test_an_axis_that_is_overtaken_does_not_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth axis becomes the third: the colours go over in several snapshots, and not in one."""
    patches = torch.linalg.qr(torch.randn(72, 40))[0]
    patches, axes = torch.linalg.qr(patches - patches.mean(0))[0], torch.linalg.qr(torch.randn(40, 40))[0]
    steps = []
    for step in range(24):
        lengths = torch.full((40,), 0.3)
        lengths[:5] = torch.tensor([5.0, 4.0, 3.4 - min(step, 12) / 10, 2.2 + min(step, 12) / 10, 1.0])
        steps.append((patches * lengths @ axes.T + 0.02 * torch.randn(72, 40) + 4 * axes[:, 39]).unflatten(0, (3, 24)))

    def largest_change() -> tuple[float, float]:
        shown = [colors_of(steps[0])]
        for tokens in steps[1:]:
            shown.append(colors_of(tokens, shown[-1]))
        changes = [float((b.rgb - a.rgb).abs().mean()) for a, b in itertools.pairwise(shown)]
        return max(changes), float((shown[-1].rgb - shown[0].rgb).abs().mean())

    (smooth, total), _ = largest_change(), monkeypatch.setattr(module, "AXES", 3)
    jump, total_of_three = largest_change()
    assert smooth < 0.5 * jump
    assert total == pytest.approx(total_of_three, rel=0.1)  # and ends at the same three


def test_the_scale_is_robust_and_slow(tokens: Tensor) -> None:
    """One stray patch changes little; features that suddenly spread out or collapse change the scale by a part."""
    plain, stray = colors_of(tokens), tokens.clone()
    stray[1, 3] = 50 * torch.randn(40)
    assert colors_of(stray, plain).scale == pytest.approx(plain.scale, rel=0.1)
    alike = tokens.mean((0, 1)) * 20 + tokens
    collapsed = colors_of(alike, plain)
    assert 0.6 * plain.scale < collapsed.scale < plain.scale
    assert collapsed.rgb.std() < 0.2 * plain.rgb.std()
    for _ in range(50):
        collapsed = colors_of(alike, collapsed)
    assert collapsed.rgb.std() < 0.5 * plain.rgb.std()  # fade for good: rounding is never blown up into a picture
    assert collapsed.scale == pytest.approx(LEAST_SCALE, rel=1e-3)


def test_features_without_three_dimensions() -> None:
    constant = colors_of(torch.ones(2, 9, 16))
    assert torch.equal(constant.rgb, torch.full((2, 9, 3), 128 / 255))
    line = torch.zeros(2, 9, 2)
    line[..., 0], line[..., 1] = torch.linspace(-1, 1, 18).view(2, 9), 1.0
    for tokens in (line, torch.cat([line, torch.zeros(2, 9, 14)], -1)):
        rgb = colors_of(tokens).rgb
        assert rgb[..., 0].std() > 0.3
        assert rgb[..., 2].std() == 0
    torch.testing.assert_close(colors_of(torch.randn(1, 1, 8)).rgb, constant.rgb[:1, :1])
    after = colors_of(torch.randn(2, 9, 16), constant)  # no colours to turn onto
    assert after.rgb.std() > 0.2


def test_tokens_that_are_nan(tokens: Tensor) -> None:
    broken = tokens.clone()
    broken[0, 5, 2], broken[2, 7] = torch.nan, torch.inf
    rest = torch.ones(3, 24, dtype=torch.bool)
    rest[0, 5] = rest[2, 7] = False
    before = colors_of(tokens)
    now = colors_of(broken, before)
    assert now.rgb[~rest].eq(0).all()
    assert (now.rgb - before.rgb)[rest].abs().max() < 0.25
    gone = colors_of(torch.full((3, 24, 40), torch.nan), now)
    assert gone.rgb.eq(0).all()
    assert colors_of(tokens, gone).rgb.isfinite().all()


def test_black_is_no_color_to_turn_onto(tokens: Tensor) -> None:
    """Two of three images held NaN: the third decides, nearly as all three would."""
    before, turn = colors_of(tokens), torch.linalg.qr(torch.randn(40, 40))[0]
    black = before.rgb.clone()
    black[:2] = 0
    part = PatchColors(black, before.scale)
    expected = colors_of(tokens @ turn, before).rgb
    assert (colors_of(tokens @ turn, part).rgb - expected).abs().mean() < 0.07


def test_colors_come_back_after_a_snapshot_of_nan() -> None:
    model, probe = tiny_vit(), ProbeBatch(torch.randn(4, 3, 32, 32))
    found = []
    for broken in (False, True):
        looking, monitor = copy.deepcopy(model), AttentionMonitor(probe)
        monitor.colored(monitor.snapshot({"backbone": looking}, step=0))
        if broken:
            bias = looking.patch_embed.proj.bias.detach().clone()
            looking.patch_embed.proj.bias.data.fill_(torch.nan)
            black = monitor.colored(monitor.snapshot({"backbone": looking}, step=1))
            assert not black.layer("backbone").colors.any()
            looking.patch_embed.proj.bias.data.copy_(bias)
        looking.blocks[0].mlp.fc2.weight.data.mul_(40)
        found.append(monitor.colored(monitor.snapshot({"backbone": looking}, step=2)).layer("backbone").colors)
    assert torch.equal(*found)


@pytest.mark.parametrize("layers", [-1, "all"])
def test_colors_are_of_the_patches_that_enter_the_block(layers: Any) -> None:
    """CLS and registers are left out, on a grid that is no square; of all layers those of the last are kept."""
    model, images, entering = tiny_vit(reg_tokens=2), torch.randn(3, 3, 32, 48), list[Tensor]()
    model.blocks[-1].register_forward_pre_hook(lambda _, args: entering.append(args[0].detach().clone()))
    monitor = AttentionMonitor(ProbeBatch(images), layers=layers)
    snapshot = monitor.colored(monitor.snapshot({"backbone": model}, step=0))
    last = snapshot.layer("backbone")
    assert last.grid == (4, 6)
    assert last.patches is None
    np.testing.assert_allclose(last.colors, oracle(entering[-1][:, 3:]), atol=1.5 * LEVEL)
    assert [a.colors is None for a in snapshot.layers.values()] == [True, False][-len(snapshot.layers) :]


def test_probe_in_pieces_and_teacher_like_student() -> None:
    """Pieces are one probe; a student's first colours are the teacher's where they mean the same."""
    images, student = torch.randn(4, 3, 32, 32), tiny_vit()
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        teacher.blocks[0].attn.qkv.weight.mul_(1.05)
    whole, pieces = AttentionMonitor(ProbeBatch(images)), AttentionMonitor(ProbeBatch(images))
    pieces.roles.images_at_a_time = 3
    a, b = (m.colored(m.snapshot({"student": student, "teacher": teacher}, step=0)) for m in (whole, pieces))
    assert (a.layer("student").colors - b.layer("student").colors).abs().max() < 2 * LEVEL
    assert (a.layer("student").colors - a.layer("teacher").colors).abs().mean() < 0.05


@pytest.mark.filterwarnings("ignore:AttentionMapCallback. .*(failed|works again|has ended)")
def test_colors_that_cannot_be_computed_cost_one_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are black in the archive, and neither training nor its checkpoints fail, nor does training compute any."""
    failing, states = list[Tensor](), list[dict[str, Any]]()

    def colors(patches: Tensor, before: PatchColors | None) -> PatchColors:
        threads.add(threading.current_thread())
        failing[:] = failing or [patches]
        if patches is failing[0]:
            raise torch.linalg.LinAlgError("eigh did not converge")
        return patch_colors(patches, before)

    class Checkpoints(Distillation):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(watch.state_dict())

    threads = set[threading.Thread]()
    monkeypatch.setattr(module, "patch_colors", colors)
    watch = AttentionMapCallback(torch.randn(2, 3, 32, 32), every_n_train_steps=2)
    with pytest.warns(UserWarning, match="eigh did not converge"):
        trainer(tmp_path, watch, max_steps=8).fit(Checkpoints(), loader())
    archived = load_snapshots(next(tmp_path.rglob("attn_monitor")))
    shown = {s.step: all(bool(a.colors.any()) for a in s.layers.values()) for s in archived}
    assert shown == {0: False, 2: True, 4: True, 6: True, 8: True}
    assert all("monitor" in state for state in states)
    assert threading.main_thread() not in threads


def test_a_resumed_run_keeps_its_colors(tmp_path: Path) -> None:
    """From a checkpoint before or after the colours were computed, and from an archive, to the bit."""
    probe, model = ProbeBatch(torch.randn(3, 3, 32, 32)), tiny_vit()
    models, monitors = {"backbone": model}, [AttentionMonitor(probe) for _ in range(5)]
    first = monitors[0].snapshot(models, step=0)
    monitors[1].load_state_dict(pickle.loads(pickle.dumps(monitors[0].state_dict())))
    monitors[2] = copy.deepcopy(monitors[0])
    first = monitors[0].colored(first)
    first.save(tmp_path / "step.npz")
    monitors[3].load_state_dict(pickle.loads(pickle.dumps(monitors[0].state_dict())))
    monitors[4].remember(AttentionSnapshot.load(tmp_path / "step.npz"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    live, *resumed = (m.colored(m.snapshot(models, step=1)).layer("backbone") for m in monitors)
    assert (live.colors - first.layer("backbone").colors).abs().mean() > LEVEL
    for attention in resumed:
        assert torch.equal(attention.colors, live.colors)
        assert attention.patch_colors.scale == live.patch_colors.scale
    assert torch.equal(monitors[1].history[0].layer("backbone").colors, first.layer("backbone").colors)
    assert torch.equal(copy.deepcopy(live).colors, live.colors)


def test_nobody_draws_for_long() -> None:
    """Tokens that wait for their colours are those of the history, and colours then continue each other."""
    monitor, model = AttentionMonitor(ProbeBatch(torch.randn(2, 3, 32, 32))), tiny_vit()
    tokens = [
        weakref.ref(monitor.snapshot({"backbone": model}, step=step).layer("backbone").patches) for step in range(60)
    ]
    gc.collect()
    assert sum(reference() is not None for reference in tokens) <= MAX_SNAPSHOTS + 1
    shown = [entry.colored().layer("backbone") for entry in monitor.history.entries]
    assert all((b.colors - a.colors).abs().mean() < 0.05 for a, b in itertools.pairwise(shown))
    gc.collect()
    assert monitor.previous is not None
    assert [r() for r in tokens if r() is not None] == [monitor.previous.layer("backbone").patches]


def test_colors_of_a_training(tmp_path: Path) -> None:
    """A run's archive has them for both roles, as bytes that NumPy reads; pictures show them, and older files none."""
    callback = AttentionMapCallback(torch.randn(2, 3, 32, 32), every_n_train_steps=2)
    trainer(tmp_path, callback, max_steps=4).fit(Distillation(), loader())
    *_, last = (archived := load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor"))
    assert [s.step for s in archived] == [0, 2, 4]
    with np.load(next((tmp_path / "run").rglob("step-*4.npz")), allow_pickle=False) as file:
        for role in ("student", "teacher"):
            assert file[f"colors/{role}/1"].dtype == np.uint8
            np.testing.assert_array_equal(file[f"colors/{role}/1"], last.layer(role).colors.numpy() * 255)
    photo = np.zeros((32, 32, 3), np.uint8)
    without = AttentionSnapshot(9, 0, last.names, {k: _colorless(a) for k, a in last.layers.items()})
    assert without.layer("student").colors is None
    panels = [panel(s, 0, photo, header="") for s in (last, without)]
    assert panels[0].shape != panels[1].shape or (panels[0] != panels[1]).any()
    strips = [filmstrip([*archived[:2], s], 0, photo) for s in (last, without)]
    assert strips[0].shape[0] - strips[1].shape[0] == 2 * (64 + 8)  # a row for each role


def _colorless(attention: LayerAttention) -> LayerAttention:
    return replace(attention, patch_colors=None)
