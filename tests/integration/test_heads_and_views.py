"""Which head belongs to which backbone, and which rows are of one image, in the ways that training loops differ."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_monitor.background.failures import Failures
from attn_monitor.measure.global_features import measure_features
from attn_monitor.measurements import Metrics
from attn_monitor.train.head_features import find_heads
from attn_monitor.train.training_watch import TrainingWatch
from tests.support.helpers import tiny_vit

K, STEPS = 96, 6
Call = Callable[[nn.Module, Tensor], Tensor]


class Head(nn.Module):
    """DINO's: an MLP, a bottleneck, prototypes."""

    def __init__(self, k: int = K) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
        self.last = nn.Linear(16, k, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(nn.functional.normalize(self.mlp(x), dim=-1))
        return out


def plain(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x)
    return out


def repeated(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(module, x, use_reentrant=False)
    return out


def repeated_as_a_whole(module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = checkpoint(module, x.requires_grad_(x.is_leaf), use_reentrant=True)
    return out


def as_a_function(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, Head)
    return nn.functional.normalize(module.mlp(x), dim=-1) @ module.last.weight.T


def of_unit_length(module: nn.Module, x: Tensor) -> Tensor:
    return plain(module, nn.functional.normalize(x, dim=-1))


def watched(head: Head, backbone_by: Call = plain, head_by: Call = plain, *, stacked: bool = False) -> Metrics:
    """Train a few steps, and return what was measured."""
    torch.manual_seed(0)
    student, teacher, theirs = tiny_vit(), tiny_vit(), copy.deepcopy(head)
    watch = TrainingWatch(Failures(), lambda text: None)
    watch.watch_models({"student": student, "teacher": teacher}, [student, teacher, head, theirs], {})
    for step in range(STEPS):
        views = torch.randn(8, 2, 3, 32, 32)
        watch.begin(step, None, views if stacked else list(views.unbind(1)))
        x = views.transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            theirs(teacher(x))
        head_by(head, backbone_by(student, x)).square().mean().backward()
        watch.end(None)
    return watch.values(STEPS)


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast:FutureWarning")  # checkpoint's own, in PyTorch 2.4
@pytest.mark.parametrize(
    ("backbone_by", "head_by"),
    [(repeated_as_a_whole, plain), (repeated, plain), (plain, repeated), (repeated, repeated)],
)
def test_forwards_that_checkpointing_repeats_count_once(backbone_by: Call, head_by: Call) -> None:
    head = Head()
    found, expected = watched(head, backbone_by, head_by), watched(head)
    assert expected["attn/student/feature_samples"] == 16 * (STEPS - 1)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_hidden_layer_is_no_head() -> None:
    """Neither of a head that is called as a function, nor of one with few prototypes."""
    head = Head()
    found = watched(head, head_by=as_a_function)
    assert found.get("attn/teacher/prototypes") is not None
    assert found.get("attn/student/prototypes") is None
    assert watched(Head(k=16)).get("attn/student/prototypes") is None


def test_heads_beside_one_another_are_found() -> None:
    both = nn.ModuleDict({"dino": Head(), "ibot": Head()})
    assert {head.module for head in find_heads([both], [])} >= set(both.values())
    linear = nn.ModuleList([nn.Linear(32, K), nn.Linear(32, K)])
    assert {head.module for head in find_heads([nn.Sequential(linear)], [])} == set(linear)


def test_a_head_may_receive_features_of_unit_length() -> None:
    found = watched(Head(), head_by=of_unit_length)
    assert found["attn/student/prototypes"] == K
    assert found["attn/student/assignment_entropy_each"] > 0


def test_views_may_be_stacked_in_one_tensor() -> None:
    head = Head()
    assert watched(head, stacked=True) == pytest.approx(watched(head))
    assert watched(head, stacked=True).get("attn/student/alignment") is not None


def test_views_are_not_different_images() -> None:
    z = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    found = measure_features(torch.cat([z, z]), (z, z))
    unit = nn.functional.normalize(z.double(), dim=1)
    cosines = (unit @ unit.T)[~torch.eye(20, dtype=torch.bool)]
    assert found["mean_cosine"] == pytest.approx(float(cosines.mean()), abs=1e-12)
