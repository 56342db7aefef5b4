"""Stored features: their cosines and the stated error, one set of axes over a run, and Gram drift."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attn_monitor import AttentionMapCallback, AttentionMonitor, MetricOptions, ProbeBatch, Watch, load_snapshots
from attn_monitor import functional as F
from attn_monitor.measure.patch_features import patch_features
from tests.support.helpers import Distillation, loader, tiny_vit, trainer


def unit(tokens: Tensor) -> Tensor:
    return tokens / tokens.norm(dim=-1, keepdim=True)


def cosines(features: Any) -> np.ndarray:
    """Between all patches of the probe."""
    x = np.asarray(features, dtype=np.float64).reshape(-1, features.shape[-1])
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def gram_loss(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """DINOv3's, of each image: the squared Frobenius norm of the difference of the Gram matrices."""
    grams = [np.einsum("bnk,bmk->bnm", x, x) for x in (features, reference)]
    return ((grams[0] - grams[1]) ** 2).sum((1, 2))


@pytest.fixture
def tokens() -> Tensor:
    return unit(torch.randn(2, 3, 24, 60) * torch.logspace(0, -1.5, 60) + 0.2 * torch.randn(60))


def test_cosines_and_their_error(tokens: Tensor) -> None:
    """The best that 32 dimensions can do, by another way; the error is told as it is."""
    features, error = patch_features(tokens[0].half(), None)
    assert features.shape == (3, 24, 32)
    assert torch.equal(features, features.half().float())
    x = tokens[0].half().double().numpy().reshape(72, 60)
    left, lengths, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(cosines(features), cosines(left[:, :32] * lengths[:32]), atol=2e-3)
    off = np.asarray(features, dtype=np.float64).reshape(72, -1)
    apart = np.abs(off @ off.T - x @ x.T)
    assert error == pytest.approx(((apart**2).mean() ** 0.5, apart.max()), rel=1e-6)
    assert 1e-3 < error[0] < 0.03
    few, exact = patch_features(unit(tokens[0, ..., :8]).half(), None)
    assert few.shape == (3, 24, 8)
    assert exact[0] <= exact[1] < 2e-3  # float16 alone


def test_axes_stay_from_snapshot_to_snapshot(tokens: Tensor) -> None:
    """A space that is turned as a whole gives the same features, so that a patch can be followed over steps."""
    first, _ = patch_features(tokens[0].half(), None)
    turn = torch.linalg.qr(torch.randn(60, 60))[0]
    turned, _ = patch_features((tokens[0] @ turn).half(), first)
    assert (turned * first).sum(-1).min() > 0.999
    mixed = unit(tokens[0] + 0.2 * tokens[1])
    later, _ = patch_features((mixed @ turn).half(), first)
    true = (mixed * tokens[0]).sum(-1)
    assert ((later * first).sum(-1) - true).abs().mean() < 0.02


def test_tokens_that_are_nan_or_all_alike(tokens: Tensor) -> None:
    broken = tokens[0].half()
    broken[1, 4] = torch.nan
    features, error = patch_features(broken, None)
    assert features[1, 4].isnan().all()
    assert features.isnan().any(-1).sum() == 1
    assert np.isfinite(error).all()
    after, _ = patch_features(tokens[0].half(), features)
    assert after.isfinite().all()
    alike, _ = patch_features(torch.ones(2, 9, 40).div(40**0.5).half(), None)
    np.testing.assert_allclose(cosines(alike), 1, atol=2e-3)
    nothing, error = patch_features(torch.full((1, 4, 40), torch.nan).half(), None)
    assert nothing.isnan().all()
    assert np.isnan(error).all()


def test_gram_drift_is_the_root_of_the_gram_loss(tokens: Tensor) -> None:
    now, then = (t.numpy().astype(np.float64) for t in tokens)
    expected = (gram_loss(now, then) / (24 * 23)) ** 0.5
    np.testing.assert_allclose(F.gram_drift(tokens[0], tokens[1]), expected, rtol=1e-5)
    turn = torch.linalg.qr(torch.randn(60, 60))[0]
    assert F.gram_drift(tokens[0] @ turn, tokens[0]).max() < 1e-5
    assert F.gram_drift(tokens[0][:, :1], tokens[1][:, :1]).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    assert F.gram_drift(tokens[0] * torch.nan, tokens[1]).isnan().all()
    reduced = [patch_features(t.half(), None)[0] for t in tokens]
    np.testing.assert_allclose(F.gram_drift(*reduced), expected, rtol=0.05)


def test_a_run_stores_features_and_logs_gram_drift(tmp_path: Path) -> None:
    """From the chosen step on, of the numbers that are in the files; a resumed monitor has the same reference."""
    callback = AttentionMapCallback(
        torch.randn(2, 3, 32, 32), every_n_train_steps=2, features=True, metrics=MetricOptions(gram_step=1)
    )
    trainer(tmp_path, callback).fit(Distillation(), loader())
    archived = {s.step: s for s in load_snapshots(tmp_path / "run" / "version_0" / "attn_monitor")}
    with np.load(next((tmp_path / "run").rglob("step-*8.npz")), allow_pickle=False) as file:
        assert file["features/teacher/1"].dtype == np.float16
        assert file["features/teacher/1"].shape == (2, 16, 32)
    for role in ("student", "teacher"):
        key = (role, 1, "gram_drift", None)
        assert [key in archived[step].metrics for step in (0, 2, 4, 6, 8)] == [False, False, True, True, True]
        stored = {step: s.layer(role).features.double().numpy() for step, s in archived.items()}
        drift = (gram_loss(stored[8], stored[2]) / (16 * 15)) ** 0.5
        assert archived[8].metrics[key] == pytest.approx(drift.mean(), rel=1e-3)
        assert archived[8].metrics[key] > 0.005
        assert 0 < archived[8].layer(role).features_error[0] <= archived[8].layer(role).features_error[1] < 0.1
    again = AttentionMonitor(ProbeBatch(torch.randn(2, 3, 32, 32)), features=True)
    again.load_state_dict(pickle.loads(pickle.dumps(callback.monitor.state_dict())))
    assert again.past.reference.step == 2
    assert torch.equal(again.past.reference.layer("teacher").features, archived[2].layer("teacher").features)
    again.remember(archived[2])  # resumed from before it
    assert again.past.reference is again.previous
    again.forget()
    broken = replace(archived[4].layer("teacher"), features=archived[4].layer("teacher").features * torch.nan)
    again.remember(replace(archived[4], layers={("teacher", 1): broken}))
    assert again.past.reference is None  # against NaN there would be no curve


def test_features_on_request_alone(tmp_path: Path) -> None:
    probe = ProbeBatch(torch.randn(2, 3, 32, 32))
    snapshot = AttentionMonitor(probe).snapshot({"backbone": tiny_vit()}, step=0)
    assert snapshot.layer("backbone").features is None
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"features": 32}, "features=32: expected True or False"),
        ({"metrics": MetricOptions(gram_step=5)}, "gram_step=5: features is False"),
    ]
    for arguments, text in wrong:
        with pytest.raises(ValueError, match=text):
            AttentionMonitor(probe, **arguments)
        with pytest.raises(ValueError, match=text):
            AttentionMapCallback(**arguments)
        with pytest.raises(ValueError, match=text):
            Watch(tiny_vit(), folder=tmp_path, **arguments)
