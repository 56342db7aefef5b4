"""The metrics of a snapshot, each computed anew from the rows with NumPy and SciPy, and their selection by name."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import transformers
import vit_pytorch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from attn_monitor import (
    AttentionMapCallback,
    AttentionMonitor,
    AttentionRecorder,
    AttentionSnapshot,
    MetricOptions,
    ProbeBatch,
)
from attn_monitor.measure.metrics import METRICS, select_metrics
from tests.support.helpers import tiny_vit
from tests.support.oracle import attention_matrices
from tests.support.zoo import enliven, timm_model

IMAGES, HEADS, SIDE = 3, 4, 4


@pytest.fixture(scope="module")
def pair() -> tuple[AttentionSnapshot, AttentionSnapshot, torch.Tensor]:
    """Two snapshots of a student that changes in between and a teacher with two registers, and ground truth."""
    torch.manual_seed(0)
    student, teacher = (tiny_vit(reg_tokens=2, qkv_bias=False) for _ in range(2))
    masks = torch.zeros(IMAGES, 2, 32, 32, dtype=torch.bool)
    masks[:, 0, :16], masks[0, 1, 16:, 16:] = True, True
    monitor = AttentionMonitor(ProbeBatch(torch.randn(IMAGES, 3, 32, 32), masks=masks), metrics="all")
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
    got = snapshot.scalars()
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
    assert "attn/student/layer1/drift" not in before.scalars()
    pairs = [(a, b) for a in range(HEADS) for b in range(a + 1, HEADS)]
    heads = [np.mean([jensenshannon(image[a], image[b], base=2) ** 2 for a, b in pairs]) for image in p]
    assert after.metrics[f"attn/{role}/layer1/head_divergence"] == pytest.approx(np.mean(heads), abs=1e-5)


def test_student_against_teacher(pair: tuple[AttentionSnapshot, AttentionSnapshot, torch.Tensor]) -> None:
    _, after, _ = pair
    expected = divergence(patches(after, "student"), patches(after, "teacher"))
    assert expected.mean() > 0.05
    check(after, "student", "student_teacher_divergence", expected)
    assert not [tag for tag in after.scalars() if "teacher/layer1/student_teacher" in tag]


def mass_mask(p: np.ndarray) -> np.ndarray:
    """One head's patches from the largest down until they hold 60 %."""
    kept, mass = np.zeros(SIDE**2, bool), 0.0
    for index in np.argsort(-p):
        if mass < 0.6:
            kept[index], mass = True, mass + p[index]
    return kept


def test_mask_area_and_agreement(pair: tuple[AttentionSnapshot, AttentionSnapshot, torch.Tensor]) -> None:
    _, after, _ = pair
    masks = {r: np.array([[mass_mask(h) for h in i] for i in patches(after, r)]) for r in after.roles}
    check(after, "teacher", "mask_area", masks["teacher"].mean(-1))
    both, either = masks["student"] & masks["teacher"], masks["student"] | masks["teacher"]
    check(after, "student", "mask_agreement", both.sum(-1) / either.sum(-1))
    assert 0 < (both.sum(-1) / either.sum(-1)).mean() < 1


def test_jaccard_best_head_and_fixed_head(pair: tuple[AttentionSnapshot, AttentionSnapshot, torch.Tensor]) -> None:
    """DINO's protocol takes the best head for each object; the honest figure is one head for all."""
    _, after, masks = pair
    objects = []
    for image, objects_of_image in enumerate(masks.numpy()):
        for truth in objects_of_image:
            if truth.any():
                overlaps = []
                for p in patches(after, "teacher")[image]:
                    shown = mass_mask(p).reshape(SIDE, SIDE).repeat(8, 0).repeat(8, 1)
                    overlaps.append((shown & truth).sum() / (shown | truth).sum())
                objects.append(overlaps)
    table = np.array(objects)
    assert table.shape == (4, HEADS)
    got = after.scalars()
    assert got["attn/teacher/layer1/jaccard_best_head"] == pytest.approx(table.max(1).mean(), abs=1e-5)
    assert got["attn/teacher/layer1/jaccard_fixed_head"] == pytest.approx(table.mean(0).max(), abs=1e-5)
    for head in range(HEADS):
        assert got[f"attn_heads/teacher/layer1/jaccard/head{head}"] == pytest.approx(table[:, head].mean(), abs=1e-5)


def test_distance_by_the_full_matrix() -> None:
    """Against the model's own softmax over every pair of tokens, in float64."""
    torch.manual_seed(0)
    model, images = tiny_vit(reg_tokens=1, qkv_bias=False), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.mul_(20)
        matrix = attention_matrices(model, images, lambda m, x: m(x))[-1].numpy()[:, :, 2:, 2:]  # (B, H, N, N)
    places = np.array([(row * 8.0, col * 8.0) for row in range(4) for col in range(6)])
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    expected = (matrix / matrix.sum(-1, keepdims=True) * apart).sum(-1).mean(-1)
    snapshot = AttentionMonitor(ProbeBatch(images), metrics="distance").snapshot({"backbone": model}, step=0)
    np.testing.assert_allclose(snapshot.layer("backbone").distance, expected, rtol=1e-4)
    assert 5 < snapshot.metrics["attn/backbone/layer1/distance"] < 40
    assert set(snapshot.scalars()) == {
        "attn/backbone/layer1/distance",
        *(f"attn_heads/backbone/layer1/distance/head{h}" for h in range(HEADS)),
        "attn/health_flags",
    }


def test_tokens_that_enter_the_block() -> None:
    """An artefact token is found by its norm, and the cosine is that of the block's own input."""
    torch.manual_seed(0)
    model, images = tiny_vit(reg_tokens=2), torch.randn(2, 3, 32, 32)
    inputs = []
    with torch.no_grad():
        model.blocks[0].register_forward_hook(lambda _, __, out: _with_artefact(out))
        model.blocks[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].double().numpy()))
        snapshot = AttentionMonitor(ProbeBatch(images), layers="all").snapshot({"backbone": model}, step=0)
    x = inputs[-1]
    norms = np.linalg.norm(x[:, 3:], axis=-1)
    spread = np.median(np.abs(norms - np.median(norms, 1, keepdims=True)), 1, keepdims=True)
    beyond = norms > np.median(norms, 1, keepdims=True) + 6 * 1.4826 * spread
    assert beyond[:, 5].all()
    got = snapshot.scalars()
    assert got["attn/backbone/layer1/outlier_fraction"] == pytest.approx(beyond.mean())
    assert got["attn/backbone/layer0/outlier_fraction"] == 0
    cosines = (x[:, 3:] @ x[:, 0, :, None])[..., 0] / norms / np.linalg.norm(x[:, :1], axis=-1)
    assert got["attn/backbone/layer1/cls_patch_cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
    np.testing.assert_allclose(snapshot.layer("backbone").norms[:, 3:], norms, rtol=1e-5)
    assert not [tag for tag in got if tag.startswith("attn_heads") and "outlier" in tag]


def _with_artefact(tokens: torch.Tensor) -> torch.Tensor:
    tokens = tokens.clone()
    tokens[:, 3 + 5] *= 30
    return tokens


@pytest.mark.parametrize(
    "library",
    ["timm", "torchvision", "vit-pytorch", "hugging face", "sequence first", "attention in a list of its own"],
)
def test_blocks_of_every_library(library: str) -> None:
    """Norms are those of the layer's own input: known here, as the block is asked in its own library's names."""
    model, block, size = _model_and_block(library)
    inputs = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    (last,) = AttentionRecorder(model, tokens=True)(torch.randn(2, 3, size, size))
    x = inputs[-1].detach().transpose(0, 1) if library == "sequence first" else inputs[-1].detach()
    torch.testing.assert_close(last.norms, x.norm(dim=-1))
    assert last.cosine is not None


def _model_and_block(library: str) -> tuple[torch.nn.Module, torch.nn.Module, int]:
    if library == "timm":
        timm_model = tiny_vit()
        return timm_model, timm_model.blocks[1], 32
    if library == "attention in a list of its own":
        nested = tiny_vit()
        for each in nested.blocks:  # what enters the inner list is normalised already, and no block's input
            each.norm1, each.attn = torch.nn.Identity(), Listed(each.norm1, each.attn)
        return nested, nested.blocks[1], 32
    if library == "torchvision":
        tv = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64)
        return tv, tv.encoder.layers[1], 32
    if library == "vit-pytorch":
        vp = vit_pytorch.ViT(image_size=32, patch_size=8, num_classes=2, dim=32, depth=2, heads=4, mlp_dim=64)
        return vp, vp.transformer.layers[1][0], 32
    if library == "hugging face":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        hf = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes))
        return hf, hf.encoder.layer[1] if hasattr(hf, "encoder") else hf.layers[1], 32
    sequence_first = SequenceFirst()
    return sequence_first, sequence_first.layers[1], 32


class Listed(torch.nn.Module):
    """Norm and attention in a list."""

    def __init__(self, *steps: torch.nn.Module) -> None:
        super().__init__()
        self.steps = torch.nn.ModuleList(steps)

    def forward(self, x: torch.Tensor, **settings: object) -> torch.Tensor:
        return self.steps[1](self.steps[0](x), **settings)


class SequenceFirst(torch.nn.Module):
    """PyTorch's own layers in their default layout, (T, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(3, 32, 8, 8)
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, 32))
        self.layers = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(32, 4, 64) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images).flatten(2).permute(2, 0, 1)
        x = torch.cat([self.cls_token.expand(1, len(images), 32), x])
        for layer in self.layers:
            x = layer(x)
        return x[0]


def test_selection_by_name() -> None:
    probe = ProbeBatch(torch.randn(1, 3, 32, 32))
    snapshot = AttentionMonitor(probe, metrics=["peak", "entropy"]).snapshot({"backbone": tiny_vit()}, step=0)
    assert {t.split("/")[3] for t in snapshot.scalars() if t.startswith("attn/backbone")} == {"entropy", "peak"}
    assert snapshot.layer("backbone").norms is None  # nothing asked for it
    assert "distance" not in select_metrics(None)
    assert set(select_metrics("all")) == set(METRICS) == {*select_metrics(None), "distance"}
    with pytest.raises(ValueError, match=r"metrics: received 'entropie', expected None.*did you mean 'entropy'\?"):
        AttentionMonitor(probe, metrics=["entropie"])
    with pytest.raises(ValueError, match="did you mean 'jaccard'"):
        AttentionMapCallback(metrics=["jacard"])


def test_archived_with_the_rows(tmp_path: Path) -> None:
    probe = ProbeBatch(torch.randn(2, 3, 32, 32))
    snapshot = AttentionMonitor(probe, metrics="all").snapshot({"backbone": tiny_vit()}, step=0)
    snapshot.save(tmp_path / "s.npz")
    loaded, saved = AttentionSnapshot.load(tmp_path / "s.npz").layer("backbone"), snapshot.layer("backbone")
    for name in ("norms", "cosine", "distance"):
        torch.testing.assert_close(getattr(loaded, name), getattr(saved, name), rtol=0, atol=0)
    with np.load(tmp_path / "s.npz", allow_pickle=False) as plain:
        assert plain["norms/backbone/1"].shape == (2, 17)


def test_metrics_of_halved_probes_are_the_same() -> None:
    """When memory runs out, the probe is run in parts: every value must come out in the order of the images."""
    torch.manual_seed(0)
    model, probe = tiny_vit(), ProbeBatch(torch.randn(3, 3, 32, 32))
    whole, parts = (AttentionMonitor(probe, metrics=MetricOptions("all", verify=False)) for _ in range(2))
    parts.roles.images_at_a_time = 2
    one, other = (m.snapshot({"backbone": model}, step=0) for m in (whole, parts))
    assert one.metrics.keys() == other.metrics.keys()
    for tag, value in one.metrics.items():
        assert other.metrics[tag] == pytest.approx(value, abs=1e-5), tag
    torch.testing.assert_close(one.layer("backbone").norms, other.layer("backbone").norms)


def test_of_signed_weights_only_what_needs_no_distribution() -> None:
    """Talking heads of CaiT: rows with negative entries have no entropy, no mask and no divergence."""
    model = enliven(timm_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4)).eval()
    probe = ProbeBatch(torch.randn(2, 3, 32, 32))
    snapshot = AttentionMonitor(probe, layers="all", query="mean").snapshot({"backbone": model}, step=0)
    assert next(iter(snapshot.layers.values())).kind == "signed"
    names = {tag.rsplit("/", 1)[1] for tag in snapshot.scalars() if tag.startswith("attn/backbone/layer0/")}
    assert "entropy" not in names
    assert names <= {"prefix_mass", "outlier_fraction", "cls_patch_cosine"}
    assert "attn/backbone/layer1/entropy" in snapshot.scalars()
    assert all(np.isfinite(v) for v in snapshot.metrics.values())
