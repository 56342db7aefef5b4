"""Log a short run to one tracker, offline, and print as JSON what can be read back from what it wrote.

As a program, since the clients of some trackers change other packages when they are imported.
"""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from attn_monitor import AttentionMapCallback, AttentionMonitor, ProbeBatch, load_snapshots
from attn_monitor.measurements import HealthFlag
from attn_monitor.trackers.publisher import Publisher
from attn_monitor.train.reports import ignored_text
from tests.support.helpers import Distillation, loader, tiny_vit, trainer

CURVE = "attn/teacher/layer1/entropy"
PAGE = "<!doctype html><title>player</title>"
FLAG = HealthFlag("low_entropy", "teacher", 1, (0,), 1, 0.01, "nearly all attention on one patch")

Result = dict[str, Any]


def publish(folder: Path, *loggers: Any, name: str = "") -> Result:
    """Take two snapshots of two roles with all layers, raise a flag, and end the run; return what was logged."""
    models = {role: tiny_vit() for role in ("student", "teacher")}
    probe = ProbeBatch(torch.randn(2, 3, 32, 32), names=["a", "b"])
    monitor = AttentionMonitor(probe, layers="all")
    report = folder / "report.html"
    settings: dict[str, Any] = {"name": name, "heads": "curves", "write_report": lambda *_: (report, PAGE)}
    publisher = Publisher(loggers, probe, folder=folder / "archive", **settings)
    curve = []
    for step in range(2):
        snapshot = monitor.snapshot(models, step=step)
        curve.append((step, snapshot.scalars()[CURVE]))
        publisher.publish(snapshot)
        publisher.drain()
    publisher.alert([FLAG], 1)
    publisher.close()
    return {"logged": curve, "ignored": ignored_text(loggers), "said": FLAG.text, "report": PAGE}


def fit(folder: Path, logger: Any) -> Result:
    """Train for four steps with Lightning's logger of a tracker; return what was logged."""
    watch = AttentionMapCallback(num_images=2, every_n_train_steps=1, heads="curves", dirpath=folder / "archive")
    trainer(folder, watch, logger=logger, max_steps=4).fit(Distillation(), loader())
    snapshots = load_snapshots(folder / "archive")
    return {
        "logged": [(snapshot.step, snapshot.metrics[CURVE]) for snapshot in snapshots],
        "said": str(snapshots[-1].verdict),
        "report": (folder / "archive" / "report.html").read_text(),
    }


def pictures(files: Iterable[tuple[str, bytes]]) -> list[tuple[str, str | None]]:
    """Return names and formats of the files that are pictures."""
    return sorted((name, Image.open(io.BytesIO(content)).format) for name, content in files)


def comet(folder: Path) -> Result:
    import comet_ml

    run = comet_ml.OfflineExperiment(project_name="x", offline_directory=str(folder), log_env_details=False)
    logged = publish(folder, run)
    run.end()
    return {**logged, **read_comet(folder)}


def comet_in_trainer(folder: Path) -> Result:
    from lightning.pytorch.loggers import CometLogger

    os.environ["COMET_START_ONLINE"] = "0"  # ``online=False`` would disable the experiment, as Lightning 2.6 reads it
    logger = CometLogger(project="x", offline_directory=str(folder), log_env_details=False)
    logged = fit(folder, logger)
    logger.experiment.end()
    return {**logged, **read_comet(folder)}


def read_comet(folder: Path) -> Result:
    (archive,) = folder.glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        messages = [json.loads(line) for line in opened.read("messages.json").splitlines()]
        uploads = [m["payload"] for m in messages if m["type"] == "file_upload"]
        about = [u["additional_params"] or {} for u in uploads]
        names = [one.get("fileName", one.get("figName")) for one in about]
        contents = [opened.read(u["file_path"]) for u in uploads]
        files = [(u["upload_type"], name, content) for u, name, content in zip(uploads, names, contents, strict=True)]
    metrics = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    return {
        "curve": [(m["step"], m["metricValue"]) for m in metrics if m["metricName"] == CURVE],
        "loss": [m["step"] for m in metrics if m["metricName"] == "loss"],
        "pictures": pictures((n, content) for kind, n, content in files if kind == "visualization"),
        "names": [f"{kind} {name}" for kind, name, _ in files],
        "page": next(content.decode() for _, n, content in files if n == "attn_report.html"),
        "text": [content.decode() for kind, _, content in files if kind == "text-sample"],
    }


def clearml(folder: Path) -> Result:
    from clearml import Task

    Task.set_offline(True)
    task = Task.init("x", "y", auto_connect_frameworks={"tensorboard": True, "detect_repository": False})
    logged = publish(folder, task)
    with SummaryWriter(str(folder / "board")) as writer:
        publish(folder / "second", writer, name="board")
    task.flush(wait_for_uploads=True)
    where = Path(task.get_offline_mode_folder())
    task.close()
    events = [event for line in (where / "metrics.jsonl").read_text().splitlines() for event in json.loads(line)]
    files = [path for path in where.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png", ".gif")]
    (page,) = where.rglob("attn_report*.html")
    title, series = "attn/entropy", "teacher/layer1"
    return {
        **logged,
        "curve": [(e["iter"], e["value"]) for e in events if (e["metric"], e["variant"]) == (title, series)],
        "pictures": pictures((f"{p.parent.parent.name}/{p.parent.name}", p.read_bytes()) for p in files),
        "names": sorted({f"{e['type']} {e['metric']}/{e['variant']}" for e in events}),
        "page": page.read_text(),
        "text": (where / "log.jsonl").read_text(),
    }


def aim(folder: Path) -> Result:
    import aim

    run = aim.Run(repo=str(folder), system_tracking_interval=None, capture_terminal_logs=False)
    logged = publish(folder, run)
    name = run.hash
    run.close()
    return {**logged, **read_aim(folder, name, "a", "attn/health/flags")}


def aim_in_trainer(folder: Path) -> Result:
    from aim.pytorch_lightning import AimLogger

    logger = AimLogger(repo=str(folder), system_tracking_interval=None, capture_terminal_logs=False)
    logged = fit(folder, logger)
    name = logger.version
    logger.finalize()
    return {**logged, **read_aim(folder, name, "image0", "attn/health/verdict")}


def read_aim(folder: Path, name: str, image: str, text: str) -> Result:
    import aim
    from aim.sdk.run import Context

    found, plain = aim.Run(name, repo=str(folder)), Context({})  # a run opened to be read alone misses the latest
    steps, (values, *_) = found.get_metric(CURVE, plain).data.items_list()
    losses, messages = found.get_metric("loss", plain), found.get_log_records()
    shown = found.collect_sequence_info(("images", "texts", "distributions"))
    pictures = found.get_image_sequence(f"attn_maps/{image}", plain).values.sparse_list()[1]
    return {
        "curve": list(zip(steps, values, strict=True)),
        "loss": losses and list(losses.data.items_list()[0]),
        "pictures": [(f"attn_maps/{image}", picture.format, picture.caption) for picture in pictures],
        "names": [f"{kind} {one['name']}" for kind, sequences in shown.items() for one in sequences],
        "text": [one.data for one in found.get_text_sequence(text, plain).values.sparse_list()[1]],
        "alerts": [str(record.message) for record in messages.values.sparse_list()[1]] if messages else [],
    }


def swanlab(folder: Path) -> Result:
    import swanlab

    run = swanlab.init(project="x", mode="offline", log_dir=str(folder / "swanlog"))
    logged = publish(folder, run)
    where = Path(run.dir)
    swanlab.finish()
    return {**logged, **read_swanlab(where)}


def swanlab_in_trainer(folder: Path) -> Result:
    import swanlab
    from swanlab.integration.pytorch_lightning import SwanLabLogger

    logger = SwanLabLogger(project="x", mode="offline", log_dir=str(folder / "swanlog"), save_dir=folder)
    logged = fit(folder, logger)
    where = Path(logger.experiment.dir)
    swanlab.finish()
    return {**logged, **read_swanlab(where)}


def read_swanlab(where: Path) -> Result:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    reader = DataStoreReader()
    reader.open(next(where.glob("*.swanlab")))
    records = list(map(Record.FromString, reader))
    reader.close()
    scalars, shown = ([getattr(r, kind) for r in records if r.HasField(kind)] for kind in ("scalar", "media"))
    media = where / "media"
    (page,) = media.glob("html/*.html")
    files = {path.name: path.read_bytes() for path in media.glob("image/*")}
    return {
        "curve": [(scalar.step, scalar.value.number) for scalar in scalars if scalar.key == CURVE],
        "loss": [scalar.step for scalar in scalars if scalar.key == "loss"],
        "pictures": pictures(
            (one.key, files[item.filename]) for one in shown for item in one.value.items if item.filename in files
        ),
        "names": sorted({one.key for one in (*scalars, *shown)}),
        "charts": [json.loads(path.read_text()) for path in media.glob("echarts/*.json")],
        "page": page.read_text(),
        "text": [path.read_text() for path in media.glob("text/*.txt")],
    }


def trackio(folder: Path) -> Result:
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run = trackio.init(project="x", name="y")
    logged = publish(folder, run)
    trackio.finish()
    rows = SQLiteStorage.get_logs("x", "y")
    shown = [(tag, value) for row in rows for tag, value in row.items() if isinstance(value, dict)]
    media = folder / "trackio" / "media"
    paths = [(tag, value["file_path"]) for tag, value in shown if "file_path" in value]
    return {
        **logged,
        "curve": [(row["step"], row[CURVE]) for row in rows if CURVE in row],
        "pictures": pictures((tag, (media / p).read_bytes()) for tag, p in paths if not p.endswith(".html")),
        "names": [f"{value['_type']} {tag}" for tag, value in shown],
        "page": next((media / path).read_text() for tag, path in paths if tag == "attn_report"),
        "text": [value["_value"] for _, value in shown if value["_type"] == "trackio.markdown"],
        "alerts": SQLiteStorage.get_alerts("x", "y"),
    }


TRACKERS: dict[str, Callable[[Path], Result]] = {
    read.__name__: read
    for read in (comet, clearml, aim, swanlab, trackio, comet_in_trainer, aim_in_trainer, swanlab_in_trainer)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    os.environ["HOME"] = str(folder)  # where clients keep their settings and caches
    result = TRACKERS[sys.argv[1]](folder)
    (folder / "result.json").write_text(json.dumps(result, default=str))
