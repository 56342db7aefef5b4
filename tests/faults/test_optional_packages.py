"""What works with PyTorch, NumPy and Pillow alone, and with each extra alone; what is missing is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from attn_monitor.commands.cli import main
from attn_monitor.extras import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MODEL = """
import torch
from torch import nn
from attn_monitor import Watch

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return x + self.attn(y, y, y, need_weights=False)[0]

class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(1, 1, 32))
        self.places, self.blocks = nn.Parameter(torch.randn(1, 17, 32)), nn.Sequential(Block(), Block())

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places)[:, 0]

images = torch.rand(8, 3, 32, 32)

def watched(folder, *loggers, steps=2):
    model = VisionTransformer()
    with Watch(model, images[:2], folder=folder, loggers=loggers, every_n_train_steps=1, on_error="raise") as watch:
        for step in range(steps):
            watch.step(step)
        watch.close(steps)
"""

CORE = """
import attn_monitor
for name in set(attn_monitor.__all__) - {"AttentionMapCallback"}:
    getattr(attn_monitor, name)
watched(FOLDER)
assert (FOLDER / "attn_monitor/report.html").exists()
from attn_monitor.offline import summarise_run
assert summarise_run(FOLDER).verdict

from attn_monitor import AttentionMonitor, DrawingOptions, ProbeBatch, load_snapshots, record_attention
from attn_monitor.draw.canvas import jpeg
from attn_monitor.draw.panels import panel
(last,) = record_attention(VisionTransformer().eval(), images)
assert last.maps.shape == (8, 4, 4, 4)
probe = ProbeBatch(images)
snapshot = AttentionMonitor(probe).snapshot({"backbone": VisionTransformer().eval()}, step=0)
for colormap in ("inferno", "viridis"):
    assert jpeg(panel(snapshot, 0, probe.pixels[0], options=DrawingOptions(colormap=colormap)))
assert load_snapshots(FOLDER / "attn_monitor")[0]._repr_png_()

def absent(what, extra, use):
    try:
        use()
    except attn_monitor.AttnMonitorError as error:
        package = next(name for name, brought_by in EXTRAS.items() if brought_by == extra)
        assert isinstance(error, ImportError)
        assert str(error) == f'{what} needs {package}, which is not installed. Run: pip install "attn_monitor[{extra}]"'
    else:
        raise AssertionError(f"{what} works without {extra}")

from attn_monitor.commands.support.loggers import opened
from attn_monitor.commands.cli import parser_of
from attn_monitor.commands.summary import summary
from attn_monitor.draw.animation_files import animation_file
from attn_monitor.extras import EXTRAS
absent("AttentionMapCallback", "lightning", lambda: attn_monitor.AttentionMapCallback)
absent("the command attn-monitor", "cli", lambda: parser_of(summary))
absent("plot()", "plot", lambda: load_snapshots(FOLDER / "attn_monitor")[0].plot())
absent("a video", "video", lambda: animation_file(FOLDER / "x.mp4").__enter__())
for name in ("tensorboard", "wandb"):
    absent(f"logger={name!r}", name, lambda: opened(name, FOLDER, "run").__enter__())
"""

ALONE = {
    "lightning": """
import lightning.pytorch as pl
from torch.utils.data import DataLoader
from lightning.pytorch.loggers import CSVLogger
from attn_monitor import AttentionMapCallback

class Training(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = VisionTransformer()

    def training_step(self, batch, batch_idx):
        return self.backbone(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

def fit(folder, logger):
    watch = AttentionMapCallback(every_n_train_steps=1, num_images=2, on_error="raise")
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, default_root_dir=folder, logger=logger, callbacks=[watch], log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )
    trainer.fit(Training(), DataLoader(images, batch_size=2))
    assert len(list(folder.rglob("step-*.npz"))) == 3

fit(FOLDER / "pictures", False)
assert len(list((FOLDER / "pictures").rglob("*.jpg"))) == 5  # two of each image, and logits
fit(FOLDER / "numbers", CSVLogger(FOLDER / "numbers"))
assert "attn/backbone/layer1/entropy" in next(FOLDER.rglob("metrics.csv")).read_text()
""",
    "tensorboard": """
from torch.utils.tensorboard import SummaryWriter
import attn_monitor_tensorboard
with SummaryWriter(str(FOLDER / "events")) as writer:
    watched(FOLDER, writer)
assert next((FOLDER / "events").iterdir()).stat().st_size > 10_000
""",
    "cli": """
from attn_monitor.commands.cli import main
main(["summary", str(RUN)])
""",
    "plot": """
from attn_monitor import load_snapshots
assert load_snapshots(RUN / "attn_monitor")[0].plot().axes
""",
    "video": """
from attn_monitor.commands.replay import replay
replay(str(RUN), out=str(FOLDER), format="mp4")
assert list(FOLDER.rglob("*.mp4"))
""",
    "formats": """
import nibabel, numpy as np, tifffile
from attn_monitor import ProbeBatch
nibabel.save(nibabel.Nifti1Image(np.ones((8, 8, 8), np.int16), np.eye(4)), FOLDER / "head.nii")
assert ProbeBatch.from_folder(FOLDER, size=8, channels=1)
(FOLDER / "bands").mkdir()
tifffile.imwrite(FOLDER / "bands/x.tif", np.ones((5, 8, 8), np.uint16))
assert ProbeBatch.from_folder(FOLDER / "bands", size=8, channels=5)
""",
}
CLIENTS = {"wandb", "mlflow", "comet", "clearml", "aim", "swanlab", "trackio"}
"""Extras that bring what a tracker's own run object comes from, and nothing else."""

CHILD = """
import os, sys, traceback
from pathlib import Path
sys.path[:0] = [{root!r}, {packages!r} + "/core"]
exec({model!r})
RUN = Path({folder!r}) / "run-core"
for extra, code in {cases!r}.items():
    if os.fork() == 0:  # as PyTorch takes seconds to import; nothing has run so far, which forks would not survive
        sys.path.append(f"{packages}/{{extra}}")
        FOLDER = RUN.with_name(f"run-{{extra}}")
        FOLDER.mkdir(parents=True)
        try:
            exec(code)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.wait()[1] == 0, extra
"""


def brought_by(requirement: Requirement, seen: dict[str, set[str]]) -> Iterator[str]:
    """Yield the distributions that a requirement brings; of this package, those of its extras."""
    name, extras = requirement.name, requirement.extras or {""}
    if extras <= seen.setdefault(name, set()):
        return
    seen[name] |= extras
    try:
        texts = distribution(name).requires or []
    except PackageNotFoundError:  # for another system
        return
    yield name
    for one in map(Requirement, texts):
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
            yield from brought_by(one, seen)


def link(requirements: Sequence[str], folder: Path) -> None:
    """Link the packages of requirements, and of what these require, into a folder."""
    folder.mkdir(parents=True)
    seen: dict[str, set[str]] = {}
    for name in [name for text in requirements for name in brought_by(Requirement(text), seen)]:
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(found.locate_file(top)))


@pytest.mark.slow
def test_the_core_and_each_extra_alone(tmp_path: Path) -> None:
    """In an interpreter with the packages that pyproject.toml names, and what these require, and no others."""
    packages = tmp_path / "packages"
    for name in ("wandb", "tensorboard"):  # runs that are kept there: Python imports such a folder as an empty package
        (tmp_path / name).mkdir()
    link(PROJECT["dependencies"], packages / "core")
    for extra in ALONE:
        link(PROJECT["optional-dependencies"][extra], packages / extra)
    cases = {"core": CORE, **ALONE}
    code = CHILD.format(root=str(ROOT), packages=str(packages), folder=str(tmp_path), model=MODEL, cases=cases)
    alone = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", code]  # -S leaves this environment's packages out
    done = subprocess.run(command, capture_output=True, text=True, env=alone, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "entropy" in done.stdout, "the summary"
    assert "failed" not in done.stderr, done.stderr


def test_every_extra_is_tried_and_every_package_names_one() -> None:
    brings = PROJECT["optional-dependencies"]
    assert brings.keys() - {"all", "examples", "docs", "dev"} == ALONE.keys() | CLIENTS
    for package, extra in EXTRAS.items():
        assert package in {Requirement(text).name for text in brings[extra]}
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == {"torch", "numpy", "pillow"}


def run_without(packages: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which importing these packages fails."""
    blocked = f"import sys\nfor name in {packages}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=False)


def test_the_program_names_the_extra_and_helps_without_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit, match=r"^attn-monitor: .* needs jsonargparse, .*attn_monitor\[cli\]"):
        main(["summary", "."])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "attn-monitor COMMAND --help describes a command" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "package"),
    [("torchvision:vit_b_16", "torchvision"), ("timm:vit_tiny_patch16_224", "timm"), ("hf:org/name", "transformers")],
)
def test_a_missing_library_of_models_is_told_with_what_to_install(
    model: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [package, *(n for n in sys.modules if n.startswith(f"{package}."))]:  # whatever a test has imported
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=rf"^attn-monitor: model '{model}': [^\n]*Run: pip install {package}$"):
        main(["check", model])
