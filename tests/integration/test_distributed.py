"""Several processes: one picture of the whole, training as before, and nobody left waiting for another."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_monitor import AttentionMonitor, ProbeBatch, load_snapshots, record_attention
from attn_monitor.errors import ForwardError
from tests.faults.test_harmless import assert_equal
from tests.support.distributed_work import IMAGES, WAYS
from tests.support.helpers import Distillation, tiny_vit
from tests.support.processes import ROOT, free_port, launch

pytestmark = pytest.mark.slow
WORK = "tests.support.distributed_work"
Seen = dict[str, Any]


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    folder = tmp_path_factory.mktemp("agreement")
    return folder, launch(f"{WORK}:agreement", folder, processes=2)


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[Seen]:
    return launch(f"{WORK}:in_three", tmp_path_factory.mktemp("three"), processes=3)


def assert_same_attention(seen: list[Seen]) -> None:
    """Every process holds the same snapshot, to the bit."""
    first = seen[0]["attention"]
    for other in (s["attention"] for s in seen[1:]):
        assert other.keys() == first.keys()
        for key in ("step", "names", "history", "chunk", "metrics"):
            assert str(other[key]) == str(first[key]), key
        assert torch.equal(other["probe"], first["probe"])
        assert all(torch.equal(rows, first["rows"][role]) for role, rows in other["rows"].items())


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(f"{WORK}:harmless", folder, processes=2)


@pytest.mark.parametrize("way", WAYS)
def test_training_is_bit_identical(in_two: tuple[Path, list[Seen]], way: str) -> None:
    folder, ranks = in_two
    assert_harmless([rank[way] for rank in ranks])
    (archived,) = (folder / way).rglob("attn_monitor")  # of process 0 alone
    assert len(load_snapshots(archived)) >= 4


def test_training_in_three_processes_is_bit_identical(shares: list[Seen]) -> None:
    assert_harmless([rank["trained"]["plain"] for rank in shares])


def assert_harmless(seen: list[Seen]) -> None:
    for process in seen:
        assert_equal(process["alone"], process["watched"])
    assert_same_attention(seen)


def test_checkpoint_and_early_stopping_agree(agreement: tuple[Path, list[Seen]]) -> None:
    folder, ranks = agreement
    seen = [rank["monitored"] for rank in ranks]
    assert_same_attention(seen)
    assert {s["stopped"] for s in seen} == {12}  # the first validation can only set the mark
    assert seen[0]["best"] == seen[1]["best"]
    assert seen[0]["values"] == seen[1]["values"]
    values = [s.metrics["attn/teacher/layer1/entropy"] for s in load_snapshots(archive(folder / "monitored"))]
    assert seen[0]["best"] in [pytest.approx(v) for v in values]


def archive(folder: Path) -> Path:
    return folder / "run" / "version_0" / "attn_monitor"


def test_the_whole_is_what_one_process_sees(agreement: tuple[Path, list[Seen]]) -> None:
    """The rows that two processes put together are those of the finished model in this process."""
    seen = agreement[1][0]["monitored"]
    module = Distillation()
    module.load_state_dict(seen["weights"])
    models = {"student": module.student_backbone, "teacher": module.teacher_backbone}
    alone = AttentionMonitor(ProbeBatch(seen["attention"]["probe"])).snapshot(models, step=0)
    for role, rows in seen["attention"]["rows"].items():
        torch.testing.assert_close(rows, alone.rows(role), atol=1e-6, rtol=1e-5)
    for tag, value in alone.scalars().items():
        assert seen["attention"]["metrics"][tag] == pytest.approx(value, rel=1e-4, abs=1e-6), tag


def test_the_images_of_process_0_are_adopted(agreement: tuple[Path, list[Seen]]) -> None:
    """Evenly spaced ones of all validation data, of which each process is dealt a part only."""
    for rank in agreement[1]:
        probe = rank["monitored"]["attention"]["probe"]
        torch.testing.assert_close(probe, IMAGES[: len(probe)])
        assert len(probe) == 8


def test_resuming_where_only_process_0_sees_the_archive(agreement: tuple[Path, list[Seen]]) -> None:
    seen = [rank["resumed"] for rank in agreement[1]]
    assert_same_attention(seen)
    assert seen[0]["attention"]["history"] == [0, 1, 2, 3, 4, 5]
    assert [name[-5:-4] for name in seen[0]["archives"]] == list("012345")
    assert seen[1]["archives"] == []


def test_a_failure_in_one_process_is_everyones(agreement: tuple[Path, list[Seen]]) -> None:
    seen = [rank["fails"] for rank in agreement[1]]
    assert_same_attention(seen)
    assert [s["steps"] for s in seen] == [8, 8]
    assert seen[0]["attention"]["step"] == 2
    first, last = seen[0]["warnings"]
    assert "taking a snapshot failed, training goes on. ForwardError" in first
    assert "deliberate" in first
    assert "(process 1 of 2)" in first
    assert last.endswith("this was not done:\n  taking a snapshot: steps 3, 4, 5, 6, 7, 8")
    assert seen[1]["warnings"] == []  # one warning in all


def test_a_role_that_fails_in_one_process_is_left_out_in_all(agreement: tuple[Path, list[Seen]]) -> None:
    """Of each snapshot, and training and the other role go on together."""
    folder, ranks = agreement
    seen = [rank["teacher fails"] for rank in ranks]
    assert_same_attention(seen)
    assert [s["steps"] for s in seen] == [8, 8]
    roles = {s.step: s.roles for s in load_snapshots(archive(folder / "teacher"))}
    assert roles == {step: ("student", "teacher") if step < 3 else ("student",) for step in range(9)}
    first, last = seen[0]["warnings"]
    assert "taking a snapshot of teacher failed, training goes on. ForwardError" in first
    assert "(process 1 of 2)" in first
    assert last.endswith("this was not done:\n  taking a snapshot of teacher: steps 3, 4, 5, 6, 7, 8")
    assert seen[1]["warnings"] == []


def test_memory_that_one_process_lacks_makes_all_take_smaller_steps(agreement: tuple[Path, list[Seen]]) -> None:
    seen = [rank["memory"] for rank in agreement[1]]
    assert_same_attention(seen)
    assert [s["attention"]["step"] for s in seen] == [8, 8]
    assert [s["attention"]["chunk"] for s in seen] == [1, 1]
    assert seen[0]["warnings"] == []


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("no folder", "ProbeError", "does not exist"),
        ("no layer", "LayerError", "7"),
    ],
)
def test_what_cannot_be_watched_ends_all(agreement: tuple[Path, list[Seen]], case: str, error: str, text: str) -> None:
    for rank in agreement[1]:
        assert rank[case]["error"] == error
        assert text in rank[case]["text"]
        assert rank[case]["steps"] == 0


def test_images_that_enter_the_model_are_watched_where_a_batch_holds_none(agreement: tuple[Path, list[Seen]]) -> None:
    seen = [rank["no images"] for rank in agreement[1]]
    assert [s["error"] for s in seen] == [None, None]
    assert_same_attention(seen)


def test_only_the_images_of_process_0_count(agreement: tuple[Path, list[Seen]]) -> None:
    seen = [rank["other's images"] for rank in agreement[1]]
    assert [s["error"] for s in seen] == [None, None]
    assert_same_attention(seen)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_uneven_shares_give_the_whole(shares: list[Seen], count: int) -> None:
    """Three processes and one to seven images: every tensor and metric is that of one process alone."""
    for rank in shares:
        together, alone = (rank["parts"][count][how] for how in ("together", "alone"))
        assert list(together["layers"]) == list(alone["layers"])
        for key, attention in together["layers"].items():
            for name, value in vars(alone["layers"][key]).items():
                mine = getattr(attention, name)
                if name == "patches" and rank is not shares[0]:  # process 0 draws
                    assert mine is None
                elif isinstance(value, torch.Tensor):
                    assert value.shape[0] == count
                    torch.testing.assert_close(mine, value, atol=1e-3 if name == "patches" else 1e-5, rtol=1e-4)
                elif name == "verified_error":
                    assert 0 <= mine < 1e-4
                else:
                    assert mine == value, name
        assert together["metrics"].keys() == alone["metrics"].keys()
        for tag, value in alone["metrics"].items():
            assert math.isclose(together["metrics"][tag], value, rel_tol=1e-3, abs_tol=1e-5), tag
        assert together["metrics"] == shares[0]["parts"][count]["together"]["metrics"]


def test_the_worst_failure_is_raised_by_all(shares: list[Seen]) -> None:
    kinds = {rank["two fail"][0] for rank in shares}
    assert kinds == {"ForwardError"}
    assert all("KeyError: 'deliberate'" in text and "(process 2 of 3)" in text for _, text in by(shares, "two fail"))
    assert {kind for kind, _ in by(shares, "memory")} == {"OutOfMemoryError"}


def by(shares: list[Seen], case: str) -> list[tuple[str, str]]:
    return [rank[case] for rank in shares]


def test_other_layers_in_one_process_are_refused(shares: list[Seen]) -> None:
    for kind, text in by(shares, "other layers"):
        assert kind == "UnsupportedAttentionError"
        assert "the 3 processes captured different layers" in text


def test_synchronised_batch_norm_is_left_alone(shares: list[Seen]) -> None:
    seen = shares[0]["batch norm"]
    assert_equal({"": seen["before"]}, {"": seen["after"]})
    assert seen["training"]


def test_uneven_data_under_join(shares: list[Seen]) -> None:
    assert [rank["joined"] for rank in shares] == [2, 3, 4]


def test_process_0_dies_while_it_writes(tmp_path: Path) -> None:
    """The others end with it, and every file with its final name is whole."""
    launch(f"{WORK}:dies", tmp_path, processes=2, succeed=False)
    assert [s.step for s in load_snapshots(archive(tmp_path))] == [0, 1, 2]
    assert len(list(archive(tmp_path).glob(".writing-*"))) == 1


def test_lightning_starts_the_processes(tmp_path: Path) -> None:
    """By running the script again, and by `multiprocessing`, at the same time to save time."""
    started = {name: start_with_lightning(name, tmp_path / name) for name in ("ddp", "ddp_spawn")}
    for name, process in started.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert [s.step for s in load_snapshots(archive(tmp_path / name))] == [0, 1, 2, 3]


def start_with_lightning(strategy: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.start_with_lightning", strategy, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port())}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_parameters_partitioned_by_deepspeed_are_refused() -> None:
    """ZeRO stage 3 leaves empty parameters that carry its marks; stages 1 and 2 leave them as they are."""
    model = tiny_vit().eval()
    record_attention(model, IMAGES[:1])
    weight = model.blocks[0].attn.qkv.weight
    weight.ds_id, weight.ds_status = 0, "NOT_AVAILABLE"
    weight.data = torch.empty(0)
    with pytest.raises(ForwardError, match=r"'blocks.0.attn.qkv.weight' is partitioned by DeepSpeed.*stage 1 or 2"):
        record_attention(model, IMAGES[:1])
