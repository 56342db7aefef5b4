"""What each kind of logger gets: events of the kinds that it takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMonitor, ProbeBatch
from attn_monitor.background.failures import Failures
from attn_monitor.background.wait_budget import WaitBudget
from attn_monitor.draw.options import DrawingOptions
from attn_monitor.trackers.destination import Destination
from attn_monitor.trackers.events import KINDS, Event, Histogram, Layout, Lines, Once, Picture, Scalars, Table, Text
from attn_monitor.trackers.generic import CSV, Generic
from attn_monitor.trackers.mlflow import MLflow
from attn_monitor.trackers.publisher import Publisher
from attn_monitor.trackers.registry import tracker_for
from attn_monitor.trackers.snapshot_events import events_at_start
from attn_monitor.trackers.tensorboard import TensorBoard
from attn_monitor.trackers.tracker import Tracker
from attn_monitor.trackers.weights_and_biases import WeightsAndBiases
from attn_monitor.train.reports import ignored_text
from tests.support.events import Events
from tests.support.helpers import tiny_vit

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
PICTURE = Picture("attn_maps/a b", lambda: PIXELS, caption="a")
PROBE = ProbeBatch(torch.randn(2, 3, 32, 32), names=["a", "b"])


def log(tracker: Tracker, step: int, *events: Event[Any]) -> None:
    with tracker.batch(step) as log_one:
        for event in events:
            log_one(event)


def scalars(**values: float) -> Scalars:
    return Scalars("attn", lambda: {f"attn/{name}": value for name, value in values.items()})


def publish(logger: Any, steps: int = 2, **settings: Any) -> None:
    """A short run of two roles, with all layers watched."""
    models = {role: tiny_vit() for role in ("student", "teacher")}
    monitor = AttentionMonitor(PROBE, layers="all")
    publisher = Publisher([logger], PROBE, **settings)
    for step in range(steps):
        publisher.publish(monitor.snapshot(models, step=step))
        publisher.drain()
    publisher.close()


# Events


def test_content_is_made_once_until_it_is_forgotten() -> None:
    made: list[int] = []
    event = Text("attn_monitor/x", lambda: made.append(1) or "text")  # type: ignore[func-returns-value]
    named = event.named("early")
    assert not made, "nothing is drawn before a tracker asks"
    assert [event.content, named.content, event.content] == ["text"] * 3
    assert len(made) == 1
    named.forget()
    assert event.content == "text"
    assert len(made) == 2


def test_what_fails_is_tried_again_by_the_next_tracker() -> None:
    errors = [ValueError("x")]

    def draw() -> str:
        if errors:
            raise errors.pop()
        return "drawn"

    once = Once(draw)
    with pytest.raises(ValueError, match="x"):
        once()
    assert once() == "drawn"


def test_a_name_is_in_tags_and_titles() -> None:
    assert PICTURE.named("early").tag == "attn_maps-early/a b"
    assert PICTURE.named("early").title == ""
    assert scalars(x=0.5).named("early").content == {"attn-early/x": 0.5}
    lines = Lines("attn_heads_chart/x", lambda: ([0], [[0.5]]), "entropy per head").named("early")
    assert (lines.tag, lines.title) == ("attn_heads_chart-early/x", "entropy per head (early)")
    layout = Layout("attn_heads", lambda: {("entropy", "teacher"): "attn_heads/teacher/head.*"})
    assert layout.named("early").content == {("entropy (early)", "teacher"): "attn_heads-early/teacher/head.*"}


# Trackers


def test_plain_summary_writer(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        tracker = tracker_for(writer)
        assert isinstance(tracker, TensorBoard)
        monitor = AttentionMonitor(PROBE, metrics=["entropy", "drift"])
        snapshot = monitor.snapshot({"teacher": tiny_vit()}, step=0)
        start = events_at_start(snapshot, DrawingOptions(), "- settings: `x`", "", heads=True)
        log(tracker, 3, scalars(x=0.5), PICTURE, *start, Histogram("attn_histogram/x", lambda: np.empty(0)))
    events = Events(tmp_path)
    assert events.scalars("attn/x") == [(3, 0.5)]
    ((step, picture),) = events.images("attn_maps/a b")
    assert step == 3
    assert picture.shape == (24, 32, 3)
    assert np.abs(picture.astype(int).mean((0, 1)) - PIXELS.mean((0, 1))).max() < 5  # channels in order
    assert events.text("attn_monitor/how_to_read").endswith("- settings: `x`")
    assert events.charts() == {
        f"{metric} per head": [f"attn_heads/teacher/layer1/{metric}/head.*"] for metric in ("entropy", "drift")
    }


def test_loggers_of_both_namespaces_are_known(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from pytorch_lightning.loggers import TensorBoardLogger as OldTensorBoardLogger

    assert isinstance(tracker_for(TensorBoardLogger(tmp_path)), TensorBoard)
    assert isinstance(tracker_for(OldTensorBoardLogger(tmp_path)), TensorBoard)
    csv = tracker_for(CSVLogger(tmp_path))
    assert isinstance(csv, CSV)
    assert list(csv.methods) == [Scalars]
    with_images = tracker_for(type("Mine", (CSVLogger,), {"log_image": lambda self, key, images, step: None})(tmp_path))
    assert with_images.scalars_on_training_thread
    assert Picture in with_images.methods


def test_a_loggers_kind_is_its_class_and_package(offline: Path) -> None:
    """A class that is merely called Run is no W&B run, and one that is called CSVLogger none of Lightning's."""
    import wandb

    def log_metrics(self: Any, metrics: dict[str, float], step: int) -> None: ...

    for name in ("Run", "SummaryWriter", "CSVLogger", "MLFlowLogger"):
        stranger = type(name, (), {"log_metrics": log_metrics})()
        assert type(tracker_for(stranger)) is Generic
    with wandb.init(project="x") as run:
        assert type(tracker_for(run)) is WeightsAndBiases
        derived = type("MyRun", (type(run),), {})
        assert WeightsAndBiases.accepts(derived.__new__(derived))


def test_a_loggers_prefix_is_kept(tmp_path: Path) -> None:
    """As Lightning's own log_metrics puts it, since that is not what writes the metrics here."""
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, prefix="run", name="", version="")
    logger.log_metrics({"loss": 1.0}, step=1)
    log(tracker_for(logger), 3, scalars(x=0.5, y=math.nan))
    logger.finalize("success")
    events = Events(tmp_path)
    assert events.scalars("run-loss") == [(1, 1.0)]
    assert events.scalars("run-attn/x") == [(3, 0.5)]
    assert math.isnan(events.scalars("run-attn/y")[0][1])


def test_the_picture_folder_is_named_in_messages(tmp_path: Path) -> None:
    failures = Failures()
    (tmp_path / "archive" / "pictures").parent.mkdir()
    (tmp_path / "archive" / "pictures").touch()  # in the way
    publisher = Publisher([], PROBE, folder=tmp_path / "archive", failures=failures)
    publisher.publish(AttentionMonitor(PROBE).snapshot({"backbone": tiny_vit()}, step=0))
    publisher.close()
    assert told_by(failures)[0].startswith(
        "logging pictures to PictureFolder failed, training goes on. FileExistsError"
    )


# Loggers of one's own


class Recorder:
    """Remembers the calls of every method that it was made with."""

    def __init__(self, *methods: str, experiment: Any = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.experiment = experiment
        for method in methods:
            setattr(self, method, lambda *args, _method=method, **named: self.calls.append((_method, args, named)))

    def of(self, method: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, named) for name, args, named in self.calls if name == method]


def test_lightnings_methods() -> None:
    logger = Recorder("log_metrics", "log_image", "log_table")
    publish(logger, name="mine")
    assert [named["step"] for _, named in logger.of("log_metrics")] == [0, 1]
    assert "attn-mine/teacher/layer1/entropy" in logger.of("log_metrics")[1][0][0]
    panels = [named for _, named in logger.of("log_image") if named["key"] == "attn_maps-mine/a"]
    assert [named["step"] for named in panels] == [0, 1]
    assert panels[0]["images"][0].shape[2] == 3
    tables = {named["key"]: named for _, named in logger.of("log_table")}
    assert tables.keys() == {"attn_sinks-mine", "attn_table-mine"}
    heads = tables["attn_table-mine"]
    assert heads["step"] == 1
    assert len(heads["data"]) == 2 * 2 * 4  # roles, images, heads
    assert {len(row) for row in heads["data"]} == {len(heads["columns"])}


def test_a_writers_methods_on_it_or_its_experiment() -> None:
    methods = ("add_image", "add_histogram", "add_text")
    for writer in (Recorder(*methods), Recorder(*methods)):
        publish(writer if not writer.calls else Recorder("log_metrics", experiment=writer))
        tags = {name: {args[0] for args, _ in writer.of(name)} for name in methods}
        assert {"attn_maps/a", "attn_overview/heads_entropy"} <= tags["add_image"]
        assert "attn_histogram/student/layer0/entropy" in tags["add_histogram"]
        assert tags["add_text"] == {"attn_monitor/how_to_read", "attn_monitor/sinks", "attn/health/verdict"}
        assert {args[2] for args, _ in writer.of("add_image")} == {0, 1}
        assert all(named == {"dataformats": "HWC"} for _, named in writer.of("add_image"))


def test_one_method_for_all_events() -> None:
    """It gets every kind that no other method takes, each with content of the type that its class says."""
    logger = Recorder("log_metrics", "log_attention_event")
    publish(logger, write_report=lambda folder, before: (folder / "report.html", "page"))
    events = [(args[0], args[1]) for args, _ in logger.of("log_attention_event")]
    kinds = {type(event).__name__ for event, _ in events}
    assert kinds == {"Picture", "Masks", "Histogram", "Table", "Lines", "Layout", "Animation", "Text"}
    assert {step for _, step in events} == {0, 1}
    gif = next(event.content for event, _ in events if type(event).__name__ == "Animation")
    assert gif.startswith(b"GIF8")
    photo, masks = next(event.content for event, _ in events if type(event).__name__ == "Masks")
    assert {mask.shape for mask in masks.values()} == {photo.shape[:2]}
    assert tracker_for(logger).ignored == []


def test_alerts_and_pages_reach_it_too(tmp_path: Path) -> None:
    logger, model = Recorder("log_metrics", "log_attention_event"), tiny_vit()
    monitor = AttentionMonitor(PROBE)
    publisher = Publisher(
        [logger],
        PROBE,
        folder=tmp_path / "archive",
        failures=Failures(),
        write_report=lambda folder, before: (folder / "report.html", "page"),
    )
    publisher.publish(monitor.snapshot({"backbone": model}, step=0))
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.fill_(math.nan)
    publisher.publish(monitor.snapshot({"backbone": model}, step=1))
    publisher.close()
    contents = {type(args[0]).__name__: args[0].content for args, _ in logger.of("log_attention_event")}
    assert "NaN" in contents["Alert"]
    assert contents["Page"] == "page"


def test_what_a_logger_does_not_get_is_named() -> None:
    assert ignored_text([Recorder("log_metrics", "log_attention_event")]) == ""
    text = ignored_text([Recorder("log_metrics", "log_table")])
    assert text.startswith("Recorder gets no picture, masks, histogram, lines, layout, animation, page, text, alert")
    assert "docs/trackers.md" in text


def test_methods_with_other_arguments_do_not_count() -> None:
    """They are named with what the logger does not get, and are not called in vain with each snapshot."""

    class Odd(Recorder):
        def log_image(self, name: str, image: Any, step: int) -> None: ...  # mlflow's has other arguments, too

        def add_text(self, tag: str, text: str, step: int | None = None) -> None: ...

        def log_attention_event(self, event: Any) -> None: ...

    odd = tracker_for(Odd("log_metrics", "log_table", "add_image"))
    assert odd.methods.keys() == {Scalars, Table, Picture, Text}
    assert odd.methods[Picture].args == (odd.logger.add_image,), "the one that takes pictures"
    assert tracker_for(Odd("log_metrics")).methods.keys() == {Scalars, Text}


def test_a_property_that_raises_is_no_method() -> None:
    def broken(self: Any) -> None:
        raise RuntimeError("not connected")

    tracker = tracker_for(type("C", (), {"experiment": property(broken)})())
    assert type(tracker) is Generic
    assert len(tracker.ignored) == len(KINDS)


# Failures


class Fussy(Generic):
    """Takes pictures and texts, and refuses those of some tags."""

    def __init__(self, *refused: str) -> None:
        super().__init__(None)
        self.refused, self.logged = set(refused), list[str]()
        self.methods = dict.fromkeys((Picture, Text), self._log)

    def _log(self, event: Event[Any], step: int) -> None:
        if event.tag in self.refused:
            raise OSError(f"not {event.tag}")
        self.logged.append(event.tag)


def pictures(*tags: str) -> list[Event[Any]]:
    return [Picture(tag, lambda: PIXELS) for tag in tags]


def destination(tracker: Tracker) -> tuple[Destination, Failures]:
    failures = Failures()
    return Destination(tracker, "Fussy", failures, WaitBudget(20), 0), failures


def told_by(failures: Failures) -> list[str]:
    told: list[str] = []
    failures.report(told.append)
    return told


def test_one_of_many_is_one_of_many() -> None:
    tracker = Fussy("b")
    place, failures = destination(tracker)
    place.put("pictures", pictures("a", "b", "c"), 3, 3)
    place.queue.drain(WaitBudget(20))
    assert tracker.logged == ["a", "c"]
    assert told_by(failures) == ["logging some pictures to Fussy failed, training goes on. b: OSError: not b"]
    tracker.refused.clear()
    place.put("pictures", pictures("b"), 4, 4)
    place.queue.close()
    assert told_by(failures) == ["logging some pictures to Fussy works again; missing: step 3"]


def test_where_all_fail_the_tracker_fails() -> None:
    place, failures = destination(Fussy("a", "b"))
    place.put("pictures", pictures("a", "b"), 3, 3)
    place.queue.close()
    assert told_by(failures) == ["logging pictures to Fussy failed, training goes on. OSError: not a"]


def test_the_description_of_a_run_is_logged_until_it_succeeds() -> None:
    tracker = Fussy("text")
    place, _ = destination(tracker)
    place.first = [Text("text", lambda: "how to read"), Text("other", lambda: "other")]
    for step in range(3):
        place.put("pictures", pictures("a"), step, step)
        place.queue.drain(WaitBudget(20))
        if step == 1:
            tracker.refused.clear()
    place.queue.close()
    assert tracker.logged == ["other", "a", "a", "text", "a"]
    assert place.first == []


def test_every_tracker_takes_known_kinds_alone(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

    for tracker in (
        TensorBoard(None),
        WeightsAndBiases(WandbLogger.__new__(WandbLogger)),
        MLflow(MLFlowLogger.__new__(MLFlowLogger)),
    ):
        assert set(tracker.methods) <= set(KINDS)
        assert {Scalars, Picture} <= set(tracker.methods)
