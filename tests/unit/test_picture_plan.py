"""Which snapshots get pictures: a bound for a run, those of the run so far ever more rarely, the last ones always."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMapCallback, AttentionMonitor, ProbeBatch
from attn_monitor.draw import canvas
from attn_monitor.errors import ArgumentError
from attn_monitor.trackers.events import Event, Histogram, Masks, Picture
from attn_monitor.trackers.picture_plan import PicturePlan
from attn_monitor.trackers.publisher import Publisher
from tests.support.events import Events
from tests.support.helpers import tiny_vit


def nothing() -> Any:
    raise AssertionError("planning draws nothing")


MAPS, STRIPS = Picture("attn_maps/a", nothing), Picture("attn_filmstrip/a", nothing, so_far=True)
EVENTS: list[Event[Any]] = [MAPS, STRIPS, Masks("attn_overlay/a", nothing), Histogram("attn_histogram/a", nothing)]


def logged(plan: PicturePlan, steps: range, what: Event[Any]) -> list[int]:
    """The steps at which an event is logged, the end of the run included."""
    found = [step for step in steps if what in plan.take(EVENTS, step)]
    return found + [steps[-1]] * (what in plan.rest())


@pytest.mark.parametrize("count", [1, 2, 50, 99, 100, 101, 199, 1_000, 12_345])
@pytest.mark.parametrize("keep", [1, 7, 100])
def test_a_known_number_is_a_bound(count: int, keep: int) -> None:
    """Evenly spread, with the first; the last comes on top. What is no picture is always logged."""
    steps = range(0, 10 * count, 10)
    found = logged(PicturePlan(keep, count), steps, MAPS)
    assert len(found) <= keep + 1
    assert (found[0], found[-1]) == (0, steps[-1])
    assert len({b - a for a, b in pairwise(found[:-1])}) <= 1
    assert len(found) >= min(count, keep) // 2
    assert logged(PicturePlan(keep, count), steps, EVENTS[2]) == found
    assert logged(PicturePlan(keep, count), steps, EVENTS[3]) == [*steps]


def test_without_a_known_number_the_distance_doubles() -> None:
    found = logged(PicturePlan(100), range(1_000), MAPS)
    assert found[:100] == [*range(100)]
    assert found[100:200] == [*range(100, 300, 2)]
    assert found[200:300] == [*range(300, 700, 4)]
    assert found[-1] == 999
    assert logged(PicturePlan(None), range(1_000), MAPS) == [*range(1_000)]


def test_pictures_of_the_run_so_far_grow_apart() -> None:
    assert logged(PicturePlan(), range(51), STRIPS) == [0, 1, 2, 3, 5, 8, 12, 18, 27, 41, 50]
    assert len(logged(PicturePlan(), range(0, 1_000_000, 1_000), STRIPS)) < 25


def test_what_was_held_back_is_that_of_the_last_snapshot(tmp_path: Path) -> None:
    """Read back from event files: pictures of steps 0 and 4, and of the last one as it ends."""
    probe = ProbeBatch(torch.randn(2, 3, 32, 32))
    monitor, models = AttentionMonitor(probe), {"student": tiny_vit(), "teacher": tiny_vit()}
    with SummaryWriter(str(tmp_path)) as writer:
        publisher = Publisher([writer], probe, keep_pictures=2, expected=8)
        for step in range(8):
            publisher.publish(monitor.snapshot(models, step=step))
        publisher.close()
    events = Events(tmp_path)
    assert [step for step, _ in events.images("attn_maps/image0")] == [0, 4, 7]
    assert [step for step, _ in events.images("attn_filmstrip/image1")] == [0, 1, 2, 3, 5, 7]
    assert [step for step, _ in events.scalars("attn/teacher/layer1/entropy")] == [*range(8)]


def test_all_layers_of_a_vit_tiny_in_a_dashboard(tmp_path: Path) -> None:
    """No single heads; what sorts first is the number of flags, and a chart has all layers."""
    model = tiny_vit(depth=12, embed_dim=48, num_heads=3)
    probe = ProbeBatch(torch.randn(2, 3, 32, 32))
    monitor = AttentionMonitor(probe, layers="all")
    with SummaryWriter(str(tmp_path)) as writer:
        publisher = Publisher([writer], probe)
        for step in range(2):
            publisher.publish(monitor.snapshot({"student": model}, step=step))
        publisher.close()
    events = Events(tmp_path)
    tags = sorted(events.tags["scalars"])
    assert {tag.split("/")[0] for tag in tags} == {"attn"}
    assert tags[0] == "attn/health_flags"
    assert len(tags) <= 160
    assert events.charts()["entropy per layer"] == ["attn/student/layer[0-9]+/entropy$"]


def test_pictures_are_encoded_as_small_as_a_browser_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).repeat_interleave(4, 0).numpy()
    smallest = canvas.encoded(picture)
    assert smallest[:4] + smallest[8:12] == b"RIFFWEBP"
    assert len(smallest) < len(canvas.jpeg(picture))
    monkeypatch.setattr(canvas.features, "check", lambda name: False)
    assert canvas.encoded(picture) == canvas.jpeg(picture)


@pytest.mark.parametrize("arguments", [{"keep_pictures": 0}, {"keep_pictures": True}, {"heads": "all"}, {"heads": 3}])
def test_wrong_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(arguments))}="):
        AttentionMapCallback(**arguments)
