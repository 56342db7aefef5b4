"""The callback with every kind of logger, each read back from what it wrote."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from attn_monitor import AttentionMapCallback, load_snapshots
from attn_monitor.trackers.events import Picture, Scalars, Text
from attn_monitor.trackers.mlflow import MLflow
from attn_monitor.train.lightning_run import run_folder
from tests.support import forked, wandb_runs
from tests.support.events import Events
from tests.support.helpers import Distillation, loader, trainer
from tests.support.servers import serving


def fit(folder: Path, logger: Any, **changes: Any) -> None:
    running = trainer(folder, AttentionMapCallback(num_images=2), logger=logger, max_steps=4, **changes)
    running.fit(Distillation(), loader(), loader(8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_wandb(offline: Path) -> None:
    """Pictures with captions, switchable masks, table, charts and time-lapse, all on the axis of the global step."""
    logger = WandbLogger(project="test", save_dir=offline, offline=True)
    fit(offline, logger)
    logger.experiment.finish()
    rows = wandb_runs.history(offline)
    step = "trainer/global_step"
    entropy = [(r[step], r["attn/teacher/layer1/entropy"]) for r in rows if "attn/teacher/layer1/entropy" in r]
    assert [s for s, _ in entropy] == [0, 1, 2, 3, 4]
    panels = [(r[step], r["attn_maps/image0"]) for r in rows if "attn_maps/image0" in r]
    assert [s for s, _ in panels] == [0, 1, 2, 3, 4]
    assert panels[0][1]["caption"] == "image0, step 0"
    media = next(offline.rglob("files")) / panels[0][1]["path"]
    with Image.open(media) as picture:
        assert (picture.format, picture.size) == ("JPEG", (panels[0][1]["width"], panels[0][1]["height"]))
    overlays = [r["attn_overlay/image0"] for r in rows if "attn_overlay/image0" in r]
    assert set(overlays[0]["masks"]) == {f"head {i}" for i in range(4)}
    counts = [sum(isinstance(v, dict) and "_type" in v for v in row.values()) for row in rows]
    assert 0 < max(counts) < 50
    last = next(row for row in reversed(rows) if "attn_table" in row)
    assert last[step] == 4
    assert last["attn_table"]["nrows"] == 2 * 2 * 4
    (sinks,) = (row["attn_sinks"] for row in rows if "attn_sinks" in row)
    assert sinks["nrows"] >= 2  # one for each role, where there is no sink
    assert any("attn_heads_chart/teacher/layer1" in key for key in last)
    assert any(r.get("attn_timelapse", {}).get("_type") == "video-file" for r in rows)
    (report,) = (r["attn_report"] for r in rows if "attn_report" in r)
    assert report["_type"] == "html-file"
    page = (next(offline.rglob("files")) / report["path"]).read_text()
    assert page == next(offline.rglob("report.html")).read_text(), "nothing was put into it"
    (archive,) = offline.rglob("attn_monitor")
    assert wandb_runs.summary(offline)["attn/health/verdict"] == str(load_snapshots(archive)[-1].verdict)
    steps = [r["_step"] for r in rows if "_step" in r]
    assert steps == sorted(steps)


class Finishes(pl.Callback):
    """Somebody ends the W&B run while training goes on."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.logger.experiment.finish()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_run_finished_in_mid_training(offline: Path) -> None:
    logger = WandbLogger(project="test", save_dir=offline, offline=True)
    watch = AttentionMapCallback(num_images=2)
    running = trainer(offline, watch, Finishes(), logger=logger, max_steps=4, log_every_n_steps=100)
    running.fit(Distillation(), loader())
    assert running.global_step == 4
    (archive,) = offline.rglob("attn_monitor")
    assert [s.step for s in load_snapshots(archive)] == [0, 1, 2, 3, 4]


def test_csv(tmp_path: Path) -> None:
    fit(tmp_path, CSVLogger(tmp_path, version=0))
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    values = [line.split(",")[columns.index("attn/teacher/layer1/entropy")] for line in lines[1:]]
    assert sum(v != "" for v in values) == 5


def check_mlflow(client: Any, run_id: str, archive: Path) -> None:
    tags = client.get_run(run_id).data.tags
    assert tags["attn/health/verdict"] == str(load_snapshots(archive)[-1].verdict)
    history = client.get_metric_history(run_id, "attn/teacher/layer1/entropy")
    assert [m.step for m in history] == [0, 1, 2, 3, 4]
    images = [f.path for f in client.list_artifacts(run_id, "images")]
    assert sum("attn_maps" in path and "+step+4+" in path and path.endswith(".png") for path in images) == 2
    assert {"attn_timelapse.gif", "attn_report.html"} <= {f.path for f in client.list_artifacts(run_id)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    fit(tmp_path, logger)
    (archive,) = tmp_path.rglob("attn_monitor")
    check_mlflow(logger.experiment, logger.run_id, archive)
    assert archive.parent == tmp_path / "mlruns" / logger.experiment_id / logger.run_id / "artifacts"


@pytest.mark.filterwarnings("ignore")
def test_names_that_mlflow_forbids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes ASCII alone: a photo of any other name is logged too, under a name of its own."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    photos = ("фото", "кофе", "猫 1", "a (1)", "plain", "ж" * 40)
    with MLflow(logger).batch(0) as log:
        for photo in photos:
            log(Picture(f"attn_filmstrip-é+1/{photo}", lambda: np.zeros((8, 8, 3), np.uint8)))
        log(Text("attn-é+1/health/verdict", lambda: "healthy", sums_up=True))
        log(Scalars("attn", lambda: {"attn-é/loss": 1.0, "attn-ü/loss": 2.0}))
    run = logger.experiment.get_run(logger.run_id).data
    assert "healthy" in run.tags.values()
    assert sorted(run.metrics.values()) == [1.0, 2.0], "names that Lightning would cut to the same"
    files = [Path(f.path).name for f in logger.experiment.list_artifacts(logger.run_id, "images")]
    assert len({name.partition("+step")[0] for name in files if name.endswith(".png")}) == len(photos)


@pytest.fixture
def mlflow_server(tmp_path: Path, free_port: int) -> Iterator[str]:
    address = f"http://127.0.0.1:{free_port}"
    options = ["--host", "127.0.0.1", "--port", str(free_port), "--workers", "1"]
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/store.db",
        "--artifacts-destination",
        str(tmp_path / "artifacts"),
    ]
    with serving([sys.executable, "-m", "mlflow", "server", *options, *store], f"{address}/health", tmp_path):
        yield address


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_server(tmp_path: Path, mlflow_server: str) -> None:
    logger = MLFlowLogger("test", tracking_uri=mlflow_server)
    fit(tmp_path, logger)
    (archive,) = tmp_path.rglob("attn_monitor")
    check_mlflow(logger.experiment, logger.run_id, archive)
    assert archive.parent == tmp_path / logger.experiment_id / logger.run_id  # the artifacts are the server's


class Foreign(Logger):
    """A third party's logger that takes metrics only."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "foreign"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, metrics))


class ForeignWithImages(Foreign):
    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, int]] = []

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        assert images[0].shape[2] == 3
        self.images.append((key, step))


class AddsImages(Foreign):
    """A third party's logger around something like a SummaryWriter."""

    class Writer:
        def __init__(self) -> None:
            self.images: list[tuple[str, int]] = []

        def add_image(self, tag: str, image: Any, global_step: int | None = None, dataformats: str = "CHW") -> None:
            assert image.shape[dataformats.index("C")] == 3
            assert global_step is not None
            self.images.append((tag, global_step))

    def __init__(self) -> None:
        super().__init__()
        self.experiment = self.Writer()


class CSVWithImages(CSVLogger):
    """stable-pretraining's RegistryLogger has this shape."""

    images: list[str]

    def log_image(self, key: str, images: list[Any], step: int) -> None:
        self.images = [*getattr(self, "images", []), key]


def test_loggers_that_take_images_by_another_name_get_them(tmp_path: Path) -> None:
    writer, registry = AddsImages(), CSVWithImages(tmp_path)
    fit(tmp_path, [writer, registry])
    assert [step for tag, step in writer.experiment.images if tag == "attn_maps/image1"] == [0, 1, 2, 3, 4]
    assert registry.images.count("attn_maps/image1") == 5


def test_several_loggers_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, rich = Foreign(), ForeignWithImages()
    loggers = [TensorBoardLogger(tmp_path, name="run", version=0), CSVLogger(tmp_path), plain, rich]
    with caplog.at_level("INFO"):
        fit(tmp_path, loggers)
    assert "Foreign gets no picture, masks, histogram, table" in caplog.text
    assert "ForeignWithImages gets no masks" in caplog.text
    assert len(Events(tmp_path / "run" / "version_0").images("attn_maps/image0")) == 5
    for logger in (plain, rich):
        assert [s for s, m in logger.metrics if "attn/student/layer1/entropy" in m] == [0, 1, 2, 3, 4]
    assert [s for k, s in rich.images if k == "attn_maps/image1"] == [0, 1, 2, 3, 4]


def test_a_logger_that_raises_does_not_keep_the_others_back(tmp_path: Path) -> None:
    class Broken(ForeignWithImages):
        def log_image(self, key: str, images: list[Any], step: int) -> None:
            raise ConnectionError("no route to host")

    with pytest.warns(UserWarning, match="AttentionMapCallback") as caught:
        fit(tmp_path, [Broken(), TensorBoardLogger(tmp_path, name="run", version=0)])
    told = [str(w.message) for w in caught if "AttentionMapCallback" in str(w.message)]
    assert "logging pictures to Broken failed, training goes on. ConnectionError: no route to host" in told[0]
    assert told[1].endswith("logging pictures to Broken: steps 0, 1, 2, 3, 4")
    assert len(Events(tmp_path / "run" / "version_0").images("attn_maps/image0")) == 5


@pytest.mark.slow
def test_pytorch_lightning_namespace(tmp_path: Path) -> None:
    """The same class in a `pytorch_lightning.Trainer` with that namespace's logger."""
    code = """
import sys, warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl, torch
from pytorch_lightning.loggers import TensorBoardLogger
from attn_monitor import AttentionMapCallback, load_snapshots
from tests.support.helpers import loader, tiny_vit

class Supervised(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = tiny_vit()
    def training_step(self, batch, index):
        return self.vit(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

pl.Trainer(max_steps=3, accelerator="cpu", logger=TensorBoardLogger(sys.argv[1], name="run", version=0),
           callbacks=[AttentionMapCallback(every_n_train_steps=1)], enable_progress_bar=False,
           enable_checkpointing=False, enable_model_summary=False).fit(Supervised(), loader())
"""
    forked.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, env=dict(os.environ))
    assert len(Events(tmp_path / "run" / "version_0").images("attn_maps/image0")) == 4


@pytest.mark.slow
def test_works_where_wandb_and_mlflow_are_not_installed(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib, warnings
sys.modules["wandb"] = sys.modules["mlflow"] = None  # importing them raises ImportError
warnings.simplefilter("ignore")
from attn_monitor import AttentionMapCallback, load_snapshots
from tests.support.helpers import Distillation, loader, trainer
from tests.support.servers import serving
watch = AttentionMapCallback(on_error="raise", every_n_train_steps=1)
trainer(pathlib.Path({str(tmp_path)!r}), watch, max_steps=2).fit(Distillation(), loader())
"""
    forked.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert len(Events(tmp_path / "run" / "version_0").images("attn_maps/image0")) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_each_run_of_a_wandb_sweep_has_its_archive_in_its_own_folder(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All runs start in one working directory; none is given another's archive, and no number is counted up."""
    monkeypatch.chdir(offline)
    for _ in range(3):
        logger = WandbLogger(project="test", offline=True)
        fit(offline, logger)
        run = logger.experiment
        archive = Path(run.dir).parent / "attn_monitor"
        assert [s.step for s in load_snapshots(archive)] == [0, 1, 2, 3, 4]
        run.finish()
    assert len(list(offline.rglob("attn_monitor*"))) == 3


@pytest.mark.filterwarnings("ignore")
def test_a_disabled_wandb_run_has_no_folder_of_its_own(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.chdir(offline)
    logger = WandbLogger(experiment=wandb.init(mode="disabled"), save_dir=offline / "saved")
    folder = run_folder(trainer(offline, logger=logger))
    assert folder.is_relative_to(offline / "saved")
    assert folder != offline / "saved"


def test_the_archive_lies_beside_the_first_logger_that_keeps_its_run_locally(tmp_path: Path) -> None:
    """Lightning's base class gives every logger a `log_dir`, which is None for those without one."""
    assert run_folder(trainer(tmp_path, logger=Foreign())) == tmp_path / "foreign" / "version_0"
    board = TensorBoardLogger(tmp_path, name="run", version=0)
    assert run_folder(trainer(tmp_path, logger=[Foreign(), board])) == tmp_path / "run" / "version_0"
    assert run_folder(trainer(tmp_path, logger=False)) == tmp_path


def test_a_remote_folder_is_no_path_on_this_machine(tmp_path: Path) -> None:
    """fsspec's addresses, which Lightning takes, would be folders named ``memory:`` in the working directory."""
    remote = CSVLogger("memory://bucket", name="run", version=0)
    local = TensorBoardLogger(tmp_path, name="run", version=0)
    assert run_folder(trainer(tmp_path, logger=[remote, local])) == tmp_path / "run" / "version_0"
    assert run_folder(trainer(tmp_path, logger=remote)) == tmp_path / "run" / "version_0"
    for logger, folder in ((remote, Path("run/version_0").absolute()), (False, Path.cwd())):
        assert run_folder(pl.Trainer(logger=logger, default_root_dir="memory://bucket")) == folder
