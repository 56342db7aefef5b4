"""Every recipe of the documents, run for a few steps of a tiny model, on photographs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from attn_monitor import AttentionSnapshot, load_snapshots
from attn_monitor.environment import callback_from
from tests.support.documents import RECIPES, ROOT, blocks, lay_photographs, made_small, run
from tests.support.helpers import Distillation, loader

TINY: dict[str, Any] = {"MODEL": "test_vit", "BATCH": 2}
CROPS = {"global_crop_size": 96, "local_crop_size": 48}
STUDENT_AND_TEACHER = ("student", "teacher")
# What each is run with, the roles that it watches, and the steps of its snapshots.
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], list[int]]] = {
    "lightly-dino": ({**TINY, "CROPS": CROPS, "PROTOTYPES": 64, "STEPS": 2}, STUDENT_AND_TEACHER, [0, 1, 2]),
    "lightly-dinov2": ({**TINY, "CROPS": CROPS, "PROTOTYPES": 64, "STEPS": 2}, STUDENT_AND_TEACHER, [0, 1, 2]),
    "lightly-mae": ({**TINY, "SIZE": 96, "STEPS": 2}, ("backbone",), [0, 1, 2]),
    "timm": ({**TINY, "PRETRAINED": False, "STEPS": 2}, ("backbone",), [0, 1, 2]),
    "hugging-face": ({"MODEL": "tiny-dinov2", "BATCH": 2, "STEPS": 2}, ("backbone",), [0, 1, 2]),
    "torchvision": (
        {
            "SIZE": 64,
            "MODEL": {"patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64},
            "BATCH": 2,
            "STEPS": 3,
        },
        ("backbone",),
        [0, 1, 2, 3],
    ),
    "main-dino": (
        {**TINY, "SIZES": (96, 48), "PROTOTYPES": 64, "EPOCHS": 1},
        STUDENT_AND_TEACHER,
        [0, 1, 2],
    ),
    "stable-pretraining": (
        {**TINY, "SIZES": (96, 48), "PROTOTYPES": 64, "STEPS": 2},
        STUDENT_AND_TEACHER,
        [0, 1, 2],
    ),
    "monai": (
        {
            "SIZE": (32, 32, 32),
            "MODEL": {"patch_size": (8, 8, 8), "hidden_size": 48, "mlp_dim": 96, "num_layers": 2, "num_heads": 4},
            "STEPS": 3,
        },
        ("backbone",),
        [0, 1, 2, 3],
    ),
    "fabric": ({**TINY, "SIZE": 96, "DEVICES": 1, "EPOCHS": 1}, ("backbone",), [0, 1, 2]),
}
# Libraries that are too large for the extra "dev", or contradict it: their recipes are run where they are installed.
NEEDS = {"stable-pretraining": "stable_pretraining", "monai": "monai"}
ELSEWHERE = {  # recipes that have a test of their own, here or in the file that they name, or no program
    "lightning-cli": "test_lightning_cli",
    "slurm": "test_slurm",
    "lightly-train": "tests/integration/test_environment.py",
    "solo-learn": "test_solo_learn",
    "index": "",
}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run in, with photographs; libraries may warn of themselves, but not of us."""
    lay_photographs(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield tmp_path
    assert not [str(w.message) for w in seen if "attn_monitor" in f"{w.message} {w.filename}"]


def recipe(name: str) -> str:
    (block,) = blocks(ROOT / "docs" / "recipes" / f"{name}.md")
    return block.code


def snapshots_in(folder: Path) -> list[AttentionSnapshot]:
    (archive,) = {path.parent for path in folder.rglob("step-*.npz")}
    assert (archive / "report.html").is_file()
    return load_snapshots(archive)


def test_every_recipe_is_run() -> None:
    assert {page.stem for page in RECIPES} == {*CASES, *ELSEWHERE}
    for page in RECIPES:
        test = ELSEWHERE.get(page.stem, "")
        assert not test.endswith(".py") or test in page.read_text()
        assert len(page.read_text().splitlines()) < 120
    listed = re.findall(r"\]\(([\w-]+)\.md\)", (ROOT / "docs" / "recipes" / "index.md").read_text())
    assert {*listed, "index"} == {page.stem for page in RECIPES}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CASES} - {"main-dino"}))  # which is run twice below
def test_recipe(name: str, photos: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{name} is not installed")
    constants, roles, steps = CASES[name]
    if name == "hugging-face":
        tiny_dinov2(photos / "tiny-dinov2")
    if name == "monai":
        lay_volumes(photos / "volumes")
    if name == "stable-pretraining":
        sys.modules["stable_pretraining"].set(cache_dir=str(photos / "runs"))
    run(made_small(recipe(name), **constants), f"recipe_{name.replace('-', '_')}")
    snapshots = snapshots_in(photos)
    assert [s.step for s in snapshots] == steps
    assert {s.roles for s in snapshots} == {roles}
    for snapshot in snapshots:
        for role in roles:
            assert torch.isfinite(torch.as_tensor(snapshot.maps(role))).all()


@pytest.mark.slow
def test_main_dino_goes_on_from_its_checkpoint(photos: Path) -> None:
    constants, roles, steps = CASES["main-dino"]
    for epochs in (1, 2):
        run(made_small(recipe("main-dino"), **{**constants, "EPOCHS": epochs}), "recipe_main_dino")
        if epochs == 1:
            assert [s.step for s in snapshots_in(photos)] == steps
    snapshots = snapshots_in(photos)
    assert [s.step for s in snapshots] == [0, 1, 2, 3, 4]
    assert snapshots[-1].roles == roles


@pytest.mark.slow
def test_lightning_cli(photos: Path) -> None:
    """The program of the page with the YAML of the page."""
    from lightning.pytorch.cli import LightningCLI

    program = run(recipe("lightning-cli"), "recipe_cli")
    (settings,) = blocks(ROOT / "docs" / "recipes" / "lightning-cli.md", "yaml")
    config = yaml.safe_load(settings.code)
    config["trainer"] |= {"max_steps": 2, "accelerator": "cpu"}
    config["trainer"]["callbacks"][0]["init_args"]["every_n_train_steps"] = 1
    (photos / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["--model.model=test_vit", "--model.size=96", "--data.size=96", "--data.batch_size=2"]
    words += ["--trainer.callbacks.threshold=0.5"]
    LightningCLI(program.Classifier, program.Photos, args=["fit", "--config", "config.yaml", *words])
    snapshots = snapshots_in(photos)
    assert [s.step for s in snapshots] == [0, 1, 2]
    assert len(snapshots[0].layers_of("backbone")) == 6


@pytest.mark.slow
def test_slurm(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued job goes on in the folder of its number."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for steps in (2, 4):
        data: DataLoader[Any] = loader(count=8, batch_size=4)
        run(made_small(recipe("slurm"), STEPS=steps), "recipe_slurm", module=Distillation(), loader=data)
    assert [s.step for s in snapshots_in(photos / "runs" / "17")] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_solo_learn(photos: Path) -> None:
    """The command of the page, on a CPU."""
    solo = pytest.importorskip("solo", reason="solo-learn is not installed")
    (block,) = blocks(ROOT / "docs" / "recipes" / "solo-learn.md", "bash")
    _, switch, *words = shlex.split(f"env {block.code}".replace("\\\n", ""))
    assert switch == "ATTN_MONITOR=1"
    program = Path(solo.__file__).parent.parent / words[1]
    small = ["optimizer.batch_size=2", "data.num_workers=0", "method_kwargs.num_prototypes=64", "max_epochs=1"]
    on_cpu = ["accelerator=cpu", "strategy=auto", 'devices="1"', "sync_batchnorm=false", "precision=32"]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", program, *words[2:], *small, *on_cpu],
        env={**os.environ, "ATTN_MONITOR": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert {s.roles for s in snapshots_in(photos / "lightning_logs")} == {STUDENT_AND_TEACHER}


def test_lightly_trains_settings_are_understood(photos: Path) -> None:
    """The YAML of the page, and the variable beside it."""
    text = (ROOT / "docs" / "recipes" / "lightly-train.md").read_text()
    (settings,) = re.findall(r"<<END\n(.+?)END\n", text, re.S)
    (photos / "attention.yaml").write_text(settings)
    made = callback_from({"ATTN_MONITOR_CONFIG": "attention.yaml", "ATTN_MONITOR_EVERY_N_TRAIN_STEPS": "500"})
    assert (made.options.layers, made.options.drawing.scale) == ("all", "minmax")
    assert "ATTN_MONITOR_EVERY_N_TRAIN_STEPS=500" in text


def lay_volumes(folder: Path) -> None:
    """Two classes of two volumes of noise each."""
    nibabel = pytest.importorskip("nibabel")
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for seed in range(2):
            voxels = np.random.default_rng(seed).normal(size=(40, 36, 32)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / kind / f"{seed}.nii.gz")


def tiny_dinov2(folder: Path) -> None:
    """A model and its image processor as the Hub stores them."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2ForImageClassification(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    BitImageProcessor(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder)
