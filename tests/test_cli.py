"""The commands, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attn_monitor import AttentionMapCallback, AttentionSnapshot, cli, drawing
from attn_monitor.models import ModelNameError, load_model
from tests.helpers import Distillation, loader, tiny_vit, trainer

MODEL = "tests.helpers:tiny_vit"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "attn_monitor.cli", *arguments], capture_output=True, text=True)


def test_check_prints_what_it_found() -> None:
    ran = command("check", MODEL, "--size", "[32, 64]")
    assert ran.returncode == 0, ran.stderr
    assert "2 attention layers" in ran.stdout
    assert "blocks.1.attn" in ran.stdout
    assert "grid 4 × 8 (proven) + 1 prefix" in ran.stdout
    assert "of a forward pass" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("check", "torchvision:resnet18"), "no attention was observed in ResNet"),
        (("check", "vit"), "expected timm:NAME"),
        (("show", MODEL, "nowhere", "--size", "32"), "nowhere: does not exist"),
        (("replay", "nowhere"), "no snapshots"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], text: str) -> None:
    ran = command(*arguments)
    assert ran.returncode == 1
    assert ran.stderr.startswith("attn-monitor: ")
    assert text in ran.stderr
    assert "Traceback" not in ran.stderr


def test_show_draws_a_folder(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.show(MODEL, str(photographs), out=str(tmp_path), size=(32, 48), layers="all", weights=False)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {f"{n}-layer{i}.png" for n in ("astronaut", "chelsea", "coffee", "rocket") for i in (0, 1)} | {
        "attention.npz"
    }
    assert AttentionSnapshot.load(tmp_path / "attention.npz").maps("backbone").shape == (4, 4, 4, 6)
    assert np.asarray(Image.open(tmp_path / "coffee-layer1.png")).std() > 10
    metrics = AttentionSnapshot.load(tmp_path / "attention.npz").metrics
    assert f"backbone, layer 0: entropy {metrics['attn/backbone/layer0/entropy']:.3g}" in capsys.readouterr().out


def test_show_against_ground_truth(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The masks' outline is drawn and the Jaccard index printed, for a single image too."""
    (tmp_path / "masks").mkdir()
    mask = np.zeros((300, 451), np.uint8)
    mask[60:240, 100:350] = 1
    Image.fromarray(mask).save(tmp_path / "masks" / "chelsea.png")
    image, out = str(photographs / "chelsea.png"), tmp_path / "out"
    cli.show(MODEL, image, out=str(out), size=64, weights=False, masks=str(tmp_path / "masks"), metrics=["jaccard"])
    printed = capsys.readouterr().out
    assert "jaccard_best_head 0." in printed
    assert "entropy" not in printed
    drawn = np.asarray(Image.open(out / "chelsea-layer1.png")).astype(int)
    assert (np.abs(drawn - drawing.TRUTH).sum(-1) < 30).sum() > 200


def test_show_one_image_from_a_training_checkpoint(tmp_path: Path, photographs: Path) -> None:
    """The teacher's weights are found inside a Lightning checkpoint, whatever their prefix."""
    module = Distillation()
    running = trainer(tmp_path, max_steps=2, enable_checkpointing=True)
    running.fit(module, loader())
    running.save_checkpoint(tmp_path / "x.ckpt")
    loaded = load_model(MODEL, checkpoint=str(tmp_path / "x.ckpt"))
    for name, value in module.teacher_backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    image = photographs / "coffee.png"
    cli.show(MODEL, str(image), out=str(tmp_path / "o"), size=32, checkpoint=str(tmp_path / "x.ckpt"))
    assert (tmp_path / "o" / "coffee-layer1.png").exists()


CHOICE = """
import sys, torch
from attn_monitor.models import load_model
print(load_model(sys.argv[1], checkpoint=sys.argv[2], key=sys.argv[3] or None).state_dict()["pos_embed"].sum().item())
"""


def both(folder: Path) -> tuple[Path, dict[str, float]]:
    """A checkpoint as DINO writes them: student, teacher and a head, and what tells the two apart."""
    student, teacher = tiny_vit(), tiny_vit()
    sums = {}
    for role, model in (("student", student), ("teacher", teacher)):
        torch.nn.init.normal_(model.pos_embed)
        sums[role] = model.pos_embed.sum().item()
    entries = {
        "student": {f"module.backbone.{k}": v for k, v in student.state_dict().items()},
        "teacher": {f"backbone.{k}": v for k, v in teacher.state_dict().items()} | {"head.weight": torch.zeros(2)},
    }
    torch.save(entries, folder / "dino.pth")
    return folder / "dino.pth", sums


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "role"), [("", "teacher"), ("student", "student"), ("student.module.backbone.", "student")]
)
def test_the_same_weights_whatever_the_hash_seed(tmp_path: Path, key: str, role: str) -> None:
    path, sums = both(tmp_path)
    for seed in ("0", "3"):
        command = [sys.executable, "-c", CHOICE, MODEL, str(path), key]
        ran = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        assert float(ran.stdout) == pytest.approx(sums[role], rel=1e-5)


def test_what_was_loaded_and_left_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = both(tmp_path)
    count = len(tiny_vit().state_dict())
    load_model(MODEL, checkpoint=str(path))
    said = capsys.readouterr()
    assert said.out == ""
    assert f"loaded all {count} entries of the model from below 'teacher.backbone.'" in said.err
    assert f"{count + 1} entries are left over (student.module, teacher.head)" in said.err
    assert "'student.module.backbone.' would fit too: choose by --key" in said.err
    with pytest.raises(ModelNameError, match=r"nothing of it lies below key='techer'.*'teacher\.backbone\.'"):
        load_model(MODEL, checkpoint=str(path), key="techer")
    with pytest.raises(ModelNameError, match="no checkpoint was given"):
        load_model(MODEL, key="teacher")


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    torch.save({"model": tiny_vit(depth=1).state_dict()}, tmp_path / "x.pt")
    with pytest.raises(ModelNameError, match=r"entries are missing.*blocks\.1"):
        load_model(MODEL, checkpoint=str(tmp_path / "x.pt"))


def test_replay_redraws_a_run(tmp_path: Path) -> None:
    trainer(tmp_path, AttentionMapCallback(), max_steps=3).fit(Distillation(), loader())
    cli.replay(str(tmp_path / "run" / "version_0" / "attn_monitor"), out=str(tmp_path / "o"))
    with Image.open(tmp_path / "o" / "image0.gif") as animation:
        assert animation.n_frames == 4
    assert (tmp_path / "o" / "image3-filmstrip.png").exists()
    assert (tmp_path / "o" / "image0-panel.png").exists()
