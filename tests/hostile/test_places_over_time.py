"""Over a run: an order that is trained is noticed by the check of places, and ordinary training asks nothing again."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from attn_monitor import (
    AttentionMapCallback,
    AttentionMonitor,
    HealthLimits,
    ProbeBatch,
    ProbeOptions,
    Watch,
    load_snapshots,
)
from attn_monitor.capture import site_cache
from attn_monitor.capture.fingerprint import state_of
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.observe.observer import AttentionObserver
from attn_monitor.capture.recheck_places import places_hold
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.site_discovery import discover
from attn_monitor.errors import UnsupportedAttentionError
from attn_monitor.train.weak_hooks import add_hook
from tests.hostile.test_changed_orders import CELLS, MIRRORED, Ordered, expected, images, off_by, ordered
from tests.support.families import FAMILIES
from tests.support.helpers import Distillation, loader, tiny_vit, trainer


def learn(model: Ordered, order: Tensor) -> None:
    """What an optimizer does to a learned order: its scores are written in place."""
    with torch.no_grad():
        model.scores.copy_(order.argsort().float())


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Discoveries, and images that were run under an observer."""
    seen, begin = {"discoveries": 0, "images": 0}, AttentionObserver.__init__

    def discovered(*args: Any) -> Any:
        seen["discoveries"] += 1
        return discover(*args)

    def begun(self: AttentionObserver, images: Tensor, *args: Any, **settings: Any) -> None:
        seen["images"] += len(images)
        begin(self, images, *args, **settings)

    monkeypatch.setattr(site_cache, "discover", discovered)
    monkeypatch.setattr(AttentionObserver, "__init__", begun)
    return seen


def test_trained_order_is_noticed_at_growing_distances() -> None:
    model, order = ordered(), CELLS
    recorder, late = AttentionRecorder(model), []
    for look in range(10):
        if look in (1, 4):  # after 1 and 4 recordings there is a check, after a discovery they begin again
            order = MIRRORED if order is CELLS else CELLS
            learn(model, order)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            (attention,) = recorder(images())
        if off_by(attention.maps, expected(model, order)) > 1e-3:
            late.append(look)
        assert [("in the new order from now on" in str(w.message)) for w in told] == [True] * (look in (1, 5)), look
    assert late == [4]  # until the next check, as documented


def test_monitor_tells_since_when_maps_may_be_in_an_old_order() -> None:
    model = ordered()
    monitor = AttentionMonitor(ProbeBatch(images()))
    snapshots = []
    for number in range(6):
        if number == 3:  # a check is due before the second, third, fifth and ninth
            learn(model, MIRRORED)
        snapshots.append(monitor.snapshot({"teacher": model}, step=100 * number))
    right = [off_by(s.layers["teacher", 1].maps, expected(model, MIRRORED)) <= 1e-3 for s in snapshots[3:]]
    assert right == [False, True, True]
    (flag,) = [flag for flag in monitor.health.flags if flag.kind == "order"]
    assert (flag.role, flag.step) == ("teacher", 400)
    assert "than at step 200" in flag.text
    assert [any(f.kind == "order" for f in s.flags) for s in snapshots] == [False] * 4 + [True, False]


def test_check_sees_two_tokens_that_changed_places_and_is_never_wrong() -> None:
    model = ordered()
    recorder = AttentionRecorder(model)
    sites = recorder.sites(images())
    held = [places_hold(model, images(), default_forward, sites, number) for number in range(40)]
    assert all(held)
    exchanged = CELLS.clone()
    exchanged[[3, 17]] = exchanged[[17, 3]]
    learn(model, exchanged)
    seen = [not places_hold(model, images(), default_forward, sites, number) for number in range(40)]
    assert 0.6 < sum(seen) / 40 < 0.98  # 4 of 5


@pytest.mark.parametrize("broken", ["collapsed", "NaN"])
def test_features_that_say_nothing_are_no_other_order(broken: str) -> None:
    model = ordered()
    monitor = AttentionMonitor(ProbeBatch(images()))
    monitor.snapshot({"": model}, step=0)
    with torch.no_grad():
        model.patch_embed.proj.weight.fill_(0.0 if broken == "collapsed" else torch.nan)
    for step in range(1, 6):
        snapshot = monitor.snapshot({"": model}, step=step)
    assert snapshot.layers["", 1].grid == (4, 6)
    assert not any(flag.kind == "order" for flag in monitor.health.flags)


class Alternating(Ordered):
    """Turns around at every call, by a state that nobody can put back."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def reorder(self, x: Tensor) -> Tensor:
        return super().reorder(x if next(self.calls) % 2 else x[:, MIRRORED])


@pytest.mark.filterwarnings("ignore:Alternating changes Alternating.calls when it runs")
def test_order_that_is_another_one_at_every_call_is_refused() -> None:
    torch.manual_seed(0)
    model = Alternating().eval()
    monitor = AttentionMonitor(ProbeBatch(images()))
    with pytest.raises(UnsupportedAttentionError, match="no map can be drawn"):
        monitor.snapshot({"": model}, step=0)


class Supervised(pl.LightningModule):
    """One backbone whose weights stand still, and whose order is loaded at a step."""

    def __init__(self, load_at: int | None = None, *, learned: bool = False) -> None:
        super().__init__()
        self.backbone, self.load_at, self.learned = ordered().train(), load_at, learned
        self.head = nn.Linear(32, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.global_step == self.load_at and self.learned:
            learn(self.backbone, MIRRORED)
        elif self.global_step == self.load_at:
            self.backbone.load_state_dict({**self.backbone.state_dict(), "order": MIRRORED})
        return self.head(self.backbone(batch)[:, 0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=1e-3)


def wide(count: int = 32) -> Any:
    """Batches of 32 × 48 noise."""
    return torch.utils.data.DataLoader(torch.randn(count, 3, 32, 48), batch_size=2)  # type: ignore[arg-type]


def drawn(folder: Path, model: Ordered, order: Tensor) -> str:
    """Which archived snapshots are drawn as float64 has it, "R", and which in the mirrored order, "M".

    The weights stand still, and position embeddings are added before patches are put in order: so the truth is one
    picture for all steps, whatever the order is.
    """
    right, found = expected(model, order), ""
    pictures = {"R": right, "M": right[..., MIRRORED]}
    for snapshot in load_snapshots(folder):
        maps = snapshot.layers["backbone", 1].maps
        found += "".join(name for name, wanted in pictures.items() if off_by(maps, wanted) < 0.1) or "?"
    return found


def watching(**settings: Any) -> AttentionMapCallback:
    return AttentionMapCallback(
        ProbeOptions(images(), mean=[0.0] * 3, std=[1.0] * 3),
        every_n_train_steps=1,
        health=HealthLimits(peak=1.0),
        **settings,
    )


def test_order_that_is_loaded_within_a_run(tmp_path: Path) -> None:
    module = Supervised(load_at=3)
    trainer(tmp_path, watching(), max_steps=6).fit(module, wide())
    assert drawn(tmp_path / "run/version_0/attn_monitor", module.backbone, MIRRORED) == "RRRRRRR"


@pytest.mark.parametrize("steps", [6, 5])
def test_learned_order_is_told_at_the_end_at_the_latest(tmp_path: Path, steps: int) -> None:
    module, watch = Supervised(load_at=4, learned=True), watching()
    with pytest.warns(UserWarning, match=r"backbone: its tokens hold other parts of the image than at step 4,"):
        trainer(tmp_path, watch, max_steps=steps).fit(module, wide())
    # Checked before steps 1, 2 and 4, and before the last one: at step 5 of 6 it is not noticed yet.
    found = drawn(tmp_path / "run/version_0/attn_monitor", module.backbone, MIRRORED)
    assert found == ("RRRRRMR" if steps == 6 else "RRRRRR")


def test_learned_order_is_told_where_the_last_snapshot_was_taken_before(tmp_path: Path) -> None:
    model = ordered()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        watch = Watch({"backbone": model}, ProbeBatch(images()), folder=tmp_path, every_n_train_steps=1)
        for step in range(4):
            watch.step(step)
        learn(model, MIRRORED)
        watch.close(3)
    about = [str(w.message) for w in told if "hold other parts" in str(w.message)]
    assert ["than at step 2, and its attention" in text for text in about] == [True]


def test_learned_order_is_told_at_the_end_where_a_state_comes_back() -> None:
    """The sites of the first state are known already, and their order is an old one."""
    model = ordered()
    monitor = AttentionMonitor(ProbeBatch(images()))
    for step, mode in enumerate(("a", "b")):
        model.mode = mode  # type: ignore[assignment]  # changes nothing
        monitor.snapshot({"": model}, step=step)
    model.mode = "a"  # type: ignore[assignment]
    learn(model, MIRRORED)
    assert [flag.kind for flag in monitor.confirm({"": model}, step=2)] == ["order"]


def test_hooks_of_this_package_are_no_change_of_the_model() -> None:
    class Seen:
        def ran(self, *args: Any) -> None:
            pass

    model, seen = ordered(), Seen()
    before = state_of(model, default_forward)
    handle = add_hook(model.register_forward_hook, seen.ran, with_kwargs=True)
    assert state_of(model, default_forward) == before
    model.register_forward_hook(lambda *args: None)
    assert state_of(model, default_forward) != before
    handle.remove()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resumed_run_has_the_order_of_its_checkpoint(tmp_path: Path) -> None:
    module = Supervised(load_at=2)
    first = trainer(tmp_path / "a", watching(), max_steps=4)
    first.fit(module, wide())
    checkpoint = tmp_path / "a.ckpt"
    first.save_checkpoint(checkpoint)
    again, watch = Supervised(), watching()
    trainer(tmp_path / "b", watch, max_steps=3).fit(again, wide())  # in its own order, by the same callback
    trainer(tmp_path / "c", watch, max_steps=7).fit(again, wide(), ckpt_path=checkpoint)
    assert drawn(tmp_path / "b/run/version_0/attn_monitor", again.backbone, MIRRORED) == "RRRR"
    assert set(drawn(tmp_path / "c/run/version_0/attn_monitor", again.backbone, MIRRORED)) == {"R"}


@pytest.mark.slow
def test_ordinary_training_of_student_and_teacher_asks_nothing_again(tmp_path: Path, counts: dict[str, int]) -> None:
    images_run = []
    for steps in (2, 6):
        watch = AttentionMapCallback(
            ProbeOptions(torch.randn(8, 3, 32, 32), mean=[0.0] * 3, std=[1.0] * 3), every_n_train_steps=1, dirpath=False
        )
        counts.update(discoveries=0, images=0)
        trainer(tmp_path / str(steps), watch, max_steps=steps).fit(Distillation(), loader(64))
        assert counts["discoveries"] == 2  # one for each of student and teacher
        images_run.append(counts["images"])
    # Four more snapshots of 8 images; both runs check after 1 recording and at the end, the longer after 2 and 4 too.
    assert images_run[1] - images_run[0] == 2 * (4 * 8 + 2 * 3)


class Counting(nn.Module):
    """A backbone with everything that training moves, and that moves no token."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.norm = tiny_vit(), nn.BatchNorm1d(32)
        self.register_buffer("centre", torch.zeros(32))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("queue", torch.zeros(16, dtype=torch.long))
        self.calls, self.losses, self.latest = 0, list[float](), dict[str, Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.vit(x))
        if self.training:
            self.steps += 1
            self.queue[self.steps % 16] = self.steps
            self.centre.lerp_(out.detach().mean(0), 0.1)
            self.calls, self.latest = self.calls + 1, {"out": out.detach()}
            self.losses.append(float(out.detach().mean()))
        return out


def test_what_training_counts_is_asked_about_twice_at_most(counts: dict[str, int]) -> None:
    model = Counting()
    monitor = AttentionMonitor(ProbeBatch(torch.randn(8, 3, 32, 32)))
    for step in range(12):
        monitor.snapshot({"student": model}, step=step)
        model.train()(torch.randn(4, 3, 32, 32))
    assert counts["discoveries"] == 3  # the first, and twice until all are known to move nothing


def test_batch_norm_is_asked_about_once(counts: dict[str, int]) -> None:
    model = nn.Sequential(tiny_vit(), nn.BatchNorm1d(32))
    monitor = AttentionMonitor(ProbeBatch(torch.randn(8, 3, 32, 32)))
    for step in range(8):
        monitor.snapshot({"student": model}, step=step)
        model.train()(torch.randn(4, 3, 32, 32))
    assert counts["discoveries"] == 2


def test_a_plain_counter_is_asked_about_once(counts: dict[str, int]) -> None:
    model: Any = tiny_vit()
    monitor = AttentionMonitor(ProbeBatch(torch.randn(8, 3, 32, 32)))
    for step in range(6):
        model.calls = step
        monitor.snapshot({"student": model}, step=step)
    assert counts["discoveries"] == 2


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("LeViT", "XCiT", "ViTamin", "Twins-SVT", "MaxViT")]


@pytest.mark.parametrize("name", ["Hiera", "PVT v2", *SLOW])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_checks_of_centres_give_no_false_alarm_and_see_another_order(name: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    model, shown = family.model(), family.images(3)
    sites = discover(model, shown, family.forward)
    assert any(s.layout is not None and s.layout.evidence == "centres" for s in sites)
    assert all(places_hold(model, shown, family.forward, sites, number) for number in range(6))
    turned = [places_hold(model, shown, lambda m, x: family.forward(m, x.flip(-1)), sites, n) for n in range(6)]
    assert not any(turned)
