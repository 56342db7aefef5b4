"""All layers at a glance: heat maps that show each head's own number, and a budget of curves for single heads."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMonitor, AttentionSnapshot, ProbeBatch
from attn_monitor.draw.colormap import colour_table
from attn_monitor.draw.layer_heat_map import CELL, HEAT_SCALES, LEAST_WIDTH, LEFT, layer_heat_map
from attn_monitor.trackers.head_budget import head_keys, layers_within
from attn_monitor.trackers.publisher import Publisher
from attn_monitor.trackers.tensorboard import TensorBoard
from attn_monitor.trackers.weights_and_biases import WeightsAndBiases
from tests.support.events import Events
from tests.support.helpers import tiny_vit

LAYERS, HEADS = 5, 4


@pytest.fixture(scope="module")
def snapshot() -> AttentionSnapshot:
    """A student and a teacher whose deeper layers are sharper, all layers watched."""
    torch.manual_seed(0)
    models = {role: tiny_vit(depth=LAYERS, qkv_bias=False) for role in ("student", "teacher")}
    with torch.no_grad():
        for model in models.values():
            for depth, block in enumerate(model.blocks):
                block.attn.qkv.weight.mul_(4 + 8 * depth)
    return AttentionMonitor(ProbeBatch(torch.randn(2, 3, 32, 32)), layers="all").snapshot(models, step=7)


@pytest.mark.parametrize(("name", "metric"), [("entropy", "entropy"), ("logits", "max_logit_cls")])
def test_colours_are_the_numbers(snapshot: AttentionSnapshot, name: str, metric: str) -> None:
    """Each cell's colour, looked up in the table of colours, is the metric of that head, the last layer on top."""
    picture = layer_heat_map(snapshot, HEAT_SCALES[name])
    assert picture is not None
    top = next(row for row in range(picture.shape[0]) if (picture[row, LEFT + 1 : LEFT + 8] == 0).all())
    table, read = colour_table("viridis").astype(int), []
    for number, role in enumerate(snapshot.roles):
        for layer in range(LAYERS - 1):  # of the last one every query's logits are shown
            for head in range(HEADS):
                row = top + (LAYERS - 1 - layer) * CELL + CELL // 2
                colour = picture[row, number * LEAST_WIDTH + LEFT + head * CELL + CELL // 2].astype(int)
                position = abs(table - colour).sum(-1).argmin() / 255
                expected = snapshot.metrics[role, layer, metric, head]
                shown = expected if name == "entropy" else (math.log10(expected) + 1) / 4  # from 0.1 to 1,000
                assert position == pytest.approx(min(1.0, max(0.0, shown)), abs=0.005)
                read.append(position)
    assert np.ptp(read) > 0.2


@pytest.mark.filterwarnings("ignore:.*attention health")
def test_logged_where_there_are_several_layers(tmp_path: Path, snapshot: AttentionSnapshot) -> None:
    probe = ProbeBatch(torch.randn(2, 3, 32, 32))
    publisher = Publisher([], probe, folder=tmp_path)
    publisher.publish(snapshot)
    publisher.close()
    pictures = [path for path in (tmp_path / "pictures").rglob("*.jpg") if path.match("*attn_overview?heads_*")]
    assert len(pictures) == len(HEAT_SCALES)
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.size[0] >= 2 * LEAST_WIDTH
    publisher = Publisher([], probe, folder=tmp_path / "one")
    publisher.publish(AttentionMonitor(probe).snapshot({"teacher": tiny_vit()}, step=8))
    publisher.close()
    assert not [path for path in (tmp_path / "one").rglob("*.jpg") if path.match("*attn_overview?heads_*")]


def test_budget_of_curves(tmp_path: Path, snapshot: AttentionSnapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers from the last back, said once; means have every layer."""
    costs = head_keys(snapshot)
    budget = costs[2] + costs[3] + costs[4] + 1
    monkeypatch.setattr(TensorBoard, "head_keys", budget)
    with SummaryWriter(str(tmp_path)) as writer, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        publisher = Publisher([writer], ProbeBatch(torch.randn(2, 3, 32, 32)), heads="curves")
        publisher.publish(snapshot)
        publisher.publish(snapshot)
        publisher.close()
    said = [str(w.message) for w in caught if "single heads" in str(w.message)]
    assert len(said) == 1
    assert f"single heads of 3 of the 5 watched layers, 2 to 4: all would be {costs.total():,} metrics" in said[0]
    tags = Events(tmp_path).tags["scalars"]
    of_heads = [tag for tag in tags if tag.startswith("attn_heads/")]
    assert {tag.split("/")[2] for tag in of_heads} == {"layer2", "layer3", "layer4"}
    assert len(of_heads) <= budget
    assert {tag.split("/")[2] for tag in tags if tag.startswith("attn/teacher")} == {f"layer{i}" for i in range(LAYERS)}


@pytest.mark.slow
def test_wandb_stays_under_the_number_it_advises() -> None:
    """Of a model as large as a ViT-L with all of its layers watched, and so of each of several callbacks."""
    models = {"student": tiny_vit(depth=24, embed_dim=64, num_heads=16)}
    monitor = AttentionMonitor(ProbeBatch(torch.randn(1, 3, 32, 32)), layers="all")
    snapshots = [monitor.snapshot(models, step=step) for step in (0, 1)]
    budget = WeightsAndBiases.head_keys
    assert budget is not None
    assert head_keys(snapshots[1]).total() > budget
    first, second = (layers_within(snapshot, budget) for snapshot in snapshots)
    assert first == second == tuple(range(24 - len(first), 24))  # drift, which comes later, changes nothing
    scalars = snapshots[1].scalars(heads=second)
    assert len(scalars) < 10_000 / 3
    assert len([tag for tag in scalars if tag.startswith("attn_heads/")]) <= budget
    assert layers_within(snapshots[0], 1) == (23,)  # one layer at least
