"""Models whose parameters are spread over processes: FSDP2, FSDP1; tensor parallelism and ZeRO 3, which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attn_monitor import AttentionMonitor, ProbeBatch, load_snapshots
from tests.faults.test_harmless import assert_equal
from tests.integration.test_distributed import assert_same_attention
from tests.support.helpers import Distillation
from tests.support.processes import launch
from tests.support.releases import since_lightning, since_torch
from tests.support.sharded_work import WAYS

pytestmark = pytest.mark.slow
in_trainer = since_lightning(2, 4, "ModelParallelStrategy shards by FSDP2")
on_cpus = since_torch(2, 6, "FSDP2 needs no CUDA, and torch.distributed.fsdp holds it")
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    return launch("tests.support.sharded_work:harmless", tmp_path_factory.mktemp("sharded"), processes=2)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    return launch("tests.support.sharded_work:by_hand", tmp_path_factory.mktemp("by_hand"), processes=2)


@in_trainer
@pytest.mark.parametrize("way", WAYS)
def test_sharded_training_is_bit_identical(trained: list[Seen], way: str) -> None:
    seen = [rank[way] for rank in trained]
    for process in seen:
        assert_equal(process["alone"], process["watched"])
        assert process["looks"] == 4
        assert process["whole"] == set()  # no parameter is left gathered
    assert_same_attention(seen)
    assert seen[0]["attention"]["step"] == 4


@in_trainer
@pytest.mark.parametrize("way", WAYS)
def test_the_whole_is_that_of_an_unsharded_model(trained: list[Seen], way: str) -> None:
    seen = trained[0][way]
    module, weights = Distillation(), seen["watched"]["weights"]
    for role in ("student", "teacher"):
        prefix = f"{role}.0." if f"{role}.0.cls_token" in weights else f"{role}_backbone."
        backbone = getattr(module, f"{role}_backbone")
        backbone.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        alone = AttentionMonitor(ProbeBatch(seen["attention"]["probe"])).snapshot({role: backbone}, step=0)
        rows, tolerance = seen["attention"]["rows"][role], 5e-3 if "mixed" in way else 1e-5
        torch.testing.assert_close(rows, alone.rows(role), atol=tolerance, rtol=10 * tolerance)


@on_cpus
def test_parts_of_a_unit_are_run_through_it(by_hand: list[Seen]) -> None:
    for rank in by_hand:
        for together, alone in rank["rows"]:
            torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@on_cpus
def test_a_unit_that_is_not_entered_is_named(by_hand: list[Seen]) -> None:
    for rank in by_hand:
        kind, text = rank["outside"]
        assert kind == "UnsupportedAttentionError"
        assert "forward=forward_within(the outermost FSDP module)" in text


@on_cpus
def test_a_failed_forward_does_not_harm_training(by_hand: list[Seen]) -> None:
    for rank in by_hand:
        kind, text = rank["fails"]
        assert (kind, "deliberate" in text, "(process 0 of 2)" in text) == ("ForwardError", True, True)
        assert rank["left whole"] == []
        watched, alone = rank["losses"]
        assert watched == alone
        assert rank["again"]
        assert not rank["stuck"]


@on_cpus
def test_a_role_that_fails_leaves_the_other_whole(by_hand: list[Seen]) -> None:
    for rank in by_hand:
        seen = rank["one of two"]
        assert seen["roles"] == ("teacher",)
        torch.testing.assert_close(*seen["rows"], atol=1e-6, rtol=1e-5)
        assert seen["whole"] == []


@on_cpus
def test_heads_split_over_processes_are_refused(by_hand: list[Seen]) -> None:
    for rank in by_hand:
        kind, text = rank["split"]
        assert kind == "UnsupportedAttentionError"
        assert "its parameter 'blocks.0.attn.qkv.weight' is split over devices" in text
        assert "tensor parallelism" in text


# Loops of one's own with `Watch`, in processes as torchrun starts them


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    folder = tmp_path_factory.mktemp("loops")
    return folder, launch("tests.support.spread_work:loops", folder, processes=2)


def assert_same_weights(seen: list[Seen], way: str) -> None:
    for rank in seen:
        alone, watched = rank[way]
        assert all(map(torch.equal, alone["weights"], watched["weights"]))


@pytest.mark.parametrize("way", ["DDP", "optimizer states spread"])
def test_watch_under_torchrun(loops: tuple[Path, list[Seen]], way: str) -> None:
    """DDP, and optimizer states in parts (ZeRO stage 1, as stage 2, leaves parameters whole)."""
    folder, seen = loops
    assert_same_weights(seen, way)
    assert [rank[way][1]["warnings"] for rank in seen] == [[], []]
    assert [s.step for s in load_snapshots(folder / way / "attn_monitor")] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("tensor parallelism", "'blocks.0.attn.qkv.weight' is split over devices"),
        ("partitioned", "is partitioned by DeepSpeed's ZeRO stage 3"),
    ],
)
def test_watch_refuses_parts_and_training_goes_on(loops: tuple[Path, list[Seen]], way: str, reason: str) -> None:
    """At once: in the first process alone, a forward that gathers parameters would wait for the others for ever."""
    folder, seen = loops
    assert_same_weights(seen, way)
    (text,) = seen[0][way][1]["warnings"]
    assert text.startswith("attn_monitor: attention is not watched in this run. ")
    assert reason in text
    assert seen[1][way][1]["warnings"] == []
    assert not list((folder / way).rglob("*.npz"))
