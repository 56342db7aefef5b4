"""Weights from every format that trainings write, saved by the libraries that own them; and files that are none."""

from __future__ import annotations

import argparse
import collections
import enum
import io
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from timm.layers import resample_abs_pos_embed
from torch import nn

from attn_monitor.errors import CheckpointError, ModelNameError
from attn_monitor.weights.models import load_model
from tests.support import forked
from tests.support.helpers import Distillation, loader, tiny_vit, trainer
from tests.support.releases import TORCH, since_torch

MODEL = "tests.support.helpers:tiny_vit"
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(**changes: Any) -> nn.Module:
    """A model whose every entry differs from a fresh one's."""
    model = tiny_vit(**changes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def assert_same(loaded: nn.Module, source: nn.Module) -> None:
    """Outputs are equal bit for bit."""
    with torch.inference_mode():
        assert torch.equal(loaded(IMAGES), source.eval()(IMAGES))


def below(prefix: str, model: nn.Module) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


OBJECTS = since_torch(2, 6, "objects beside tensors are left out")


def save_sharded(stored: dict[str, Any], folder: Path) -> None:
    """By one process, as PyTorch warns; 2.9 warns of itself too."""
    if TORCH < (2, 6):
        pytest.skip("folders of torch.distributed.checkpoint are read, from PyTorch 2.6 on")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled|TypedStorage is deprecated")
        dcp.save(stored, checkpoint_id=folder, no_dist=True)


def dino(folder: Path, student: nn.Module, teacher: nn.Module) -> Path:
    """As DINO's main_dino.py saves: two DataParallel models with heads, an optimizer, and the parsed arguments."""
    optimizer = torch.optim.AdamW(student.parameters())
    student(IMAGES).sum().backward()
    optimizer.step()
    args = argparse.Namespace(arch="vit_small", output_dir=Path("out"), lr=np.float64(1e-3), steps=np.arange(3))
    stored = {
        "student": below("module.backbone.", student) | {"module.head.last_layer.weight_g": torch.ones(4, 1)},
        "teacher": below("backbone.", teacher) | {"head.last_layer.weight_g": torch.ones(4, 1)},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": args,
        "dino_loss": {"center": torch.zeros(1, 4)},
    }
    torch.save(stored, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def lightning(folder: Path) -> tuple[Path, nn.Module]:
    module = Distillation()
    running = trainer(folder, max_steps=2, enable_checkpointing=True)
    running.fit(module, loader())
    running.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt", module.teacher_backbone


def plain(folder: Path) -> tuple[Path, nn.Module]:
    source = trained()
    torch.save(source.state_dict(), folder / "x.pt")
    return folder / "x.pt", source


def before_zip(folder: Path) -> tuple[Path, nn.Module]:
    source = trained()
    stored = {"model": source.state_dict(), "args": argparse.Namespace(lr=1, out=Path("x"))}
    torch.save(stored, folder / "x.pt", _use_new_zipfile_serialization=False)
    return folder / "x.pt", source


def compiled_and_wrapped(folder: Path) -> tuple[Path, nn.Module]:
    source = trained()
    names = {re.sub(r"(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", n): v for n, v in source.state_dict().items()}
    torch.save({"model": {f"_orig_mod.{n}": v for n, v in names.items()}}, folder / "x.pt")
    return folder / "x.pt", source


def dinov2(folder: Path) -> tuple[Path, nn.Module]:
    """As DINOv2's evaluation does: the teacher alone, with the mask token and blocks in chunks."""
    source = trained()
    chunks = {re.sub(r"blocks\.(\d+)\.", r"blocks.0.\1.", n): v for n, v in below("backbone.", source).items()}
    chunks |= {"backbone.mask_token": torch.zeros(1, 32), "dino_head.last_layer.weight_v": torch.zeros(4, 2)}
    torch.save({"teacher": chunks}, folder / "teacher_checkpoint.pth")
    return folder / "teacher_checkpoint.pth", source


def dinov2_fsdp(folder: Path) -> tuple[Path, nn.Module]:
    source = trained()
    model = below("student._fsdp_wrapped_module.backbone.", trained()) | below("teacher.backbone.", source)
    torch.save({"model": model, "iteration": 7}, folder / "model_0000007.rank_0.pth")
    return folder / "model_0000007.rank_0.pth", source


def safetensors(folder: Path) -> tuple[Path, nn.Module]:
    from safetensors.torch import save_file

    source = trained()
    save_file(source.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors", source


def safetensors_in_parts(folder: Path) -> tuple[Path, nn.Module]:
    from safetensors.torch import save_file

    source = trained()
    entries = list(source.state_dict().items())
    save_file(dict(entries[:9]), folder / "model-00001-of-00002.safetensors")
    save_file(dict(entries[9:]), folder / "model-00002-of-00002.safetensors")
    return folder, source


def distributed(folder: Path) -> tuple[Path, nn.Module]:
    """As DINOv3 saves: a folder with the whole training module, its optimizer, and objects."""
    source = trained()
    model = below("student.backbone.", trained()) | below("teacher.backbone.", source)
    stored = {"model": model, "optimizer": {"state": {"exp_avg": torch.ones(3)}}, "iteration": 7, "args": Path("x")}
    save_sharded(stored, folder / "7")
    return folder / "7", source


FORMATS = [lightning, plain, compiled_and_wrapped, dinov2, dinov2_fsdp, safetensors, safetensors_in_parts]


@pytest.mark.parametrize("save", [*FORMATS, pytest.param(before_zip, marks=OBJECTS), distributed])
def test_the_model_answers_as_the_one_that_was_saved(
    tmp_path: Path, save: Callable[[Path], tuple[Path, nn.Module]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, source = save(tmp_path)
    assert_same(load_model(MODEL, checkpoint=str(path)), source)
    said = capsys.readouterr()
    assert "loaded all 30 entries of the model" in said.err
    assert said.out == ""


@OBJECTS
@pytest.mark.parametrize("key", [None, "student", "teacher", "student.module.backbone."])
def test_dino_trainings_hold_two(tmp_path: Path, key: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"student": trained(), "teacher": trained()}
    path = dino(tmp_path, models["student"], models["teacher"])
    loaded = load_model(MODEL, checkpoint=str(path), key=key)
    assert_same(loaded, models["student" if key and "student" in key else "teacher"])
    said = capsys.readouterr().err
    other = "teacher.backbone." if key and "student" in key else "student.module.backbone."
    assert (f"{other!r} would fit too: choose by --key" in said) == (key is None)
    assert "objects in it that were left out: argparse.Namespace" in said


def test_keys_tell_what_is_inside_of_another(tmp_path: Path) -> None:
    """A role alone takes what it can; a whole prefix takes that."""
    one, other, plain = trained(), trained(), trained()
    stored = plain.state_dict() | below("student.", one) | below("copy.student.", other)
    torch.save(stored, tmp_path / "x.pt")
    for key, source in {"student": one, "student.": one, "copy.student": other, "copy": other, "": plain}.items():
        assert_same(load_model(MODEL, checkpoint=str(tmp_path / "x.pt"), key=key), source)


WORK = """
import os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from tests.integration.test_checkpoints import trained
rank, folder = int(sys.argv[1]), sys.argv[2]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[3], RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo")
torch.manual_seed(0)
model = trained()
if rank == 0:
    torch.save(model.state_dict(), folder + "/whole.pt")
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
dcp.save({"model": model.state_dict()}, checkpoint_id=folder + "/sharded")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_pieces_of_two_processes_are_put_together(tmp_path: Path, free_port: int) -> None:
    work = [
        forked.Popen([sys.executable, "-c", WORK, str(rank), str(tmp_path), str(free_port)], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    assert [(process.communicate(timeout=200), process.returncode)[1] for process in work] == [0, 0]
    assert len(list((tmp_path / "sharded").glob("*.distcp"))) == 2
    loaded = load_model(MODEL, checkpoint=str(tmp_path / "sharded"))
    assert_same(loaded, load_model(MODEL, checkpoint=str(tmp_path / "whole.pt")))


def test_transformers_saves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A classifier's folder gives the backbone, as a model or as a checkpoint of one."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    source = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    source.save_pretrained(tmp_path / "vit")
    with torch.inference_mode():
        expected = source.vit(IMAGES).last_hidden_state
        for checkpoint in (None, tmp_path / "vit" / "model.safetensors", tmp_path / "vit"):
            loaded = load_model(f"hf:{tmp_path / 'vit'}", checkpoint=None if checkpoint is None else str(checkpoint))
            assert torch.equal(loaded(IMAGES).last_hidden_state, expected)
    assert (
        "the file has no classifier, on which attention does not depend (pooler.dense.weight" in capfd.readouterr().err
    )


def test_a_folder_of_transformers_without_a_block(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {n: v for n, v in load_file(path).items() if not re.search(r"layers?\.1\.", n)}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"its weights: \d+ entries of the model are not in it, such as '.*1\."):
        load_model(f"hf:{tmp_path}")


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_into_timm(tmp_path: Path, registers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """With registers, DINOv2's position embeddings have a place for the class token, and timm's have none."""
    changes = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "dynamic_img_size": True}
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    source = timm.create_model(name, **changes).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.2)
    stored = source.state_dict()
    if registers:
        place = torch.randn(1, 1, 32)
        stored["pos_embed"] = torch.cat([place, stored["pos_embed"]], 1)
        stored["cls_token"] = stored["cls_token"] - place
        stored["register_tokens"] = stored.pop("reg_token")
    stored["mask_token"] = torch.zeros(1, 32)
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": {f"backbone.{n}": v for n, v in stored.items()}}, path)
    call = f"timm.models:create_model({name!r}, {', '.join(f'{n}={v}' for n, v in changes.items())})"
    loaded = load_model(call, checkpoint=str(path))
    with torch.inference_mode():  # place + (class - place) is rounded
        torch.testing.assert_close(loaded(IMAGES), source(IMAGES), rtol=0, atol=1e-5 if registers else 0)
    said = capsys.readouterr().err
    assert ("renamed by the rules of timm" in said) == bool(registers)
    assert "loaded all" in said


def test_dinov3_into_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DINOv3's own names, in the folder that its training writes."""
    changes = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 8, "dynamic_img_size": True}
    name = "vit_small_patch16_dinov3"
    source = timm.create_model(name, **changes).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.2)
    renamed = {
        re.sub(r"gamma_(\d)", r"ls\1.gamma", n.replace("reg_token", "storage_tokens")): v
        for n, v in source.state_dict().items()
    }
    renamed |= {"mask_token": torch.zeros(1, 64), "rope_embed.periods": torch.ones(4)}
    renamed |= {f"blocks.{i}.attn.qkv.bias": torch.full((192,), float(i)) for i in range(2)}
    stored = {"model": {f"{role}.backbone.{n}": v for role in ("student", "teacher") for n, v in renamed.items()}}
    stored["model"]["student.backbone.storage_tokens"] = torch.zeros(1, 4, 64)
    save_sharded(stored, tmp_path / "7")
    call = f"timm.models:create_model({name!r}, {', '.join(f'{n}={v}' for n, v in changes.items())})"
    loaded = load_model(call, checkpoint=str(tmp_path / "7"))
    with torch.inference_mode():
        assert torch.equal(loaded(IMAGES), source(IMAGES))
    said = capsys.readouterr()
    assert "from below 'model.teacher.backbone.'" in said.err
    assert "left out by them: rope_embed.periods, blocks.1.attn.qkv.bias\n" in said.err
    assert said.out == ""


@pytest.mark.parametrize(("old", "new"), [(32, 48), (64, 32)])
def test_position_embeddings_of_another_size(
    tmp_path: Path, old: int, new: int, capsys: pytest.CaptureFixture[str]
) -> None:
    source = trained(img_size=old)
    torch.save(source.state_dict(), tmp_path / "x.pt")
    loaded = load_model(f"{MODEL}(img_size={new})", checkpoint=str(tmp_path / "x.pt"))
    grid = (new // 8, new // 8)
    expected = resample_abs_pos_embed(source.pos_embed.data, grid, num_prefix_tokens=1)
    assert torch.equal(loaded.pos_embed, expected)
    assert torch.equal(loaded.pos_embed[:, 0], source.pos_embed[:, 0])
    assert f"interpolated: pos_embed from {old // 8} × {old // 8} to {new // 8} × {new // 8}" in capsys.readouterr().err


def test_a_model_of_another_shape_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = trained()
    torch.save(source.state_dict(), tmp_path / "x.pt")
    loaded = load_model(f"{MODEL}(img_size=[32, 64])", checkpoint=str(tmp_path / "x.pt"))
    assert torch.equal(loaded.pos_embed, resample_abs_pos_embed(source.pos_embed.data, (4, 8), num_prefix_tokens=1))
    assert "interpolated: pos_embed from 4 × 4 to 4 × 8 patches" in capsys.readouterr().err


def test_a_classifier_may_be_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or be for another number of classes; the rest may not."""
    source = trained(num_classes=10)
    torch.save(source.state_dict(), tmp_path / "ten.pt")
    torch.save(trained().state_dict(), tmp_path / "none.pt")
    for name in ("ten", "none"):
        load_model(f"{MODEL}(num_classes=5)", checkpoint=str(tmp_path / f"{name}.pt"))
        said = capsys.readouterr().err
        assert "loaded all 30 entries of the backbone" in said
        assert "the file has no classifier, on which attention does not depend (head.weight, head.bias" in said


@pytest.mark.parametrize("lost", ["blocks.1.attn.qkv.weight", "cls_token", "norm.bias", "patch_embed.proj.weight"])
def test_a_backbone_at_random_is_an_error_unless_asked_for(
    tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = trained().state_dict()
    del stored[lost]
    torch.save(stored, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"1 of 30 entries are missing .*'{lost}'.*--allow-missing"):
        load_model(MODEL, checkpoint=str(tmp_path / "x.pt"))
    load_model(MODEL, checkpoint=str(tmp_path / "x.pt"), allow_missing=True)
    assert f"LEFT AT RANDOM, as --allow-missing permits: {lost}" in capsys.readouterr().err


def test_checkpoints_of_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": tiny_vit(depth=1).state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"entries are missing.*blocks\.1"):
        load_model(MODEL, checkpoint=str(path))
    torch.save({"model": tiny_vit(depth=3).state_dict()}, path)
    load_model(MODEL, checkpoint=str(path))
    assert "12 entries below 'model.' have no place in the model (blocks.2)" in capsys.readouterr().err
    torch.save({"model": tiny_vit(embed_dim=64).state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"'cls_token', of shape \(1, 1, 64\) where \(1, 1, 32\) is needed"):
        load_model(MODEL, checkpoint=str(path))
    torch.save({"conv": torch.zeros(1)}, path)
    for allow in (False, True):
        with pytest.raises(CheckpointError, match=r"was looked for below every name \(it has 1 entries"):
            load_model(MODEL, checkpoint=str(path), allow_missing=allow)


def test_what_was_loaded_and_left_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pt"
    student = below("module.backbone.", trained())
    torch.save({"student": student, "teacher": below("backbone.", trained()) | {"head.weight": torch.ones(2)}}, path)
    load_model(MODEL, checkpoint=str(path))
    said = capsys.readouterr().err
    assert "loaded all 30 entries of the model from below 'teacher.backbone.'" in said
    assert "31 entries are left over (student.module, teacher.head)" in said
    with pytest.raises(CheckpointError, match=r"nothing of it lies below key='techer'.*'teacher\.backbone\.'"):
        load_model(MODEL, checkpoint=str(path), key="techer")
    with pytest.raises(ModelNameError, match="no checkpoint was given"):
        load_model(MODEL, key="teacher")


CHOICE = """
import sys
from attn_monitor.weights.models import load_model
print(load_model(sys.argv[1], checkpoint=sys.argv[2]).state_dict()["pos_embed"].sum().item())
"""


@pytest.mark.slow
def test_the_same_weights_whatever_the_hash_seed(tmp_path: Path) -> None:
    teacher = trained()
    path = dino(tmp_path, trained(), teacher)
    for seed in ("0", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        ran = subprocess.run(
            [sys.executable, "-c", CHOICE, MODEL, str(path)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert float(ran.stdout) == pytest.approx(teacher.pos_embed.sum().item(), rel=1e-5)


class Mode(enum.Enum):
    """Pickled as a call, like code."""

    FAST = 1


class Settings(dict[str, Any]):
    """What projects keep their configuration in."""


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path, how: str) -> None:
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[Any, ...]:
        if self.how == "system":
            return os.system, (f"touch {self.path}",)
        if self.how == "eval":
            return eval, (f"open({str(self.path)!r}, 'w')",)
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["system", "eval", "touch"])
@pytest.mark.parametrize("form", ["zip", "legacy", "metadata", "piece", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_not_run(tmp_path: Path, how: str, form: str) -> None:
    trace, source = tmp_path / "trace", trained()
    code = Code(trace, how)
    path = tmp_path / "x.pt"
    if form == "zip":
        torch.save({"model": source.state_dict(), "code": code}, path)
    elif form == "legacy":
        torch.save({"model": source.state_dict(), "code": code}, path, _use_new_zipfile_serialization=False)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"code": code}, protocol=2))
    else:
        path = tmp_path / "sharded"
        save_sharded({"model": source.state_dict()}, path)
        if form == "metadata":
            found = pickle.loads((path / ".metadata").read_bytes())
            found.planner_data = code
            (path / ".metadata").write_bytes(pickle.dumps(found))
        else:
            evil = io.BytesIO()
            torch.save({"code": code, "more": torch.zeros(100_000)}, evil)  # not less than what it stands for
            (path / "__0_0.distcp").write_bytes(evil.getvalue())
            found = pickle.loads((path / ".metadata").read_bytes())
            for place in found.storage_data.values():
                place.offset, place.length = 0, len(evil.getvalue())
            (path / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError) as caught:
        load_model(MODEL, checkpoint=str(path))
    line = str(caught.value)
    assert line.startswith(f"checkpoint {path}: ")
    assert "\n" not in line
    if form != "pickle" and TORCH >= (2, 6):  # a pickle has no parts that torch reads first
        named = {"system": r"(posix|os)\.system", "eval": r"builtins\.eval", "touch": r"builtins\.getattr|Path\.touch"}
        assert re.search(named[how], line), line
        assert "nothing was run" in line
    assert not trace.exists()
    if form == "zip" and how == "touch":
        load_model(MODEL, checkpoint=str(path), trust=True)
        assert trace.exists(), "the user said so"


@OBJECTS
def test_objects_beside_weights_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    source, path = trained(), tmp_path / "x.pt"
    beside = {
        "config": OmegaConf.create({"a": {"b": [1, "x"]}}),
        "settings": Settings(depth=Settings(x=1)),
        "values": [np.float32(1), np.arange(3), np.dtype("f4"), Path("x"), collections.defaultdict(dict, a={})],
        "args": argparse.Namespace(x=argparse.Namespace(y=1)),
    }
    torch.save({**beside, "model": source.state_dict()}, path)
    assert_same(load_model(MODEL, checkpoint=str(path)), source)
    assert "objects in it that were left out: omegaconf" in capsys.readouterr().err
    torch.save({"model": source.state_dict(), "mode": Mode.FAST}, path)
    with pytest.raises(CheckpointError, match=r"would call tests\.integration\.test_checkpoints\.Mode.*--trust"):
        load_model(MODEL, checkpoint=str(path))
    assert_same(load_model(MODEL, checkpoint=str(path), trust=True), source)


def test_a_whole_model_is_code(tmp_path: Path) -> None:
    source, path = trained(), tmp_path / "x.pt"
    torch.save(source, path)
    with pytest.raises(CheckpointError, match=r"x\.pt: .*--trust if you know who wrote the file"):
        load_model(MODEL, checkpoint=str(path))
    assert_same(load_model(MODEL, checkpoint=str(path), trust=True), source)


def bomb(path: Path) -> None:
    """A checkpoint of which one record is packed: 64 MB of zeros in 64 kB."""
    torch.save({"model": trained().state_dict(), "more": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in records.items():
            file.writestr(name, content, zipfile.ZIP_STORED)
        with file.open(f"{next(iter(records)).split('/')[0]}/data/999", "w") as record:
            for _ in range(64):
                record.write(bytes(1 << 20))


def overlapping(path: Path) -> None:
    """Records that claim the same bytes many times."""
    torch.save({str(i): torch.zeros(1000) + i for i in range(8)}, path)
    content = bytearray(path.read_bytes())
    for found in re.finditer(b"PK\x01\x02", content):
        size = struct.unpack_from("<I", content, found.start() + 24)[0]
        if size == 4000:
            struct.pack_into("<II", content, found.start() + 20, 40_000, 40_000)
    path.write_bytes(content)


def expanded(path: Path) -> None:
    """An entry whose four bytes claim to be 40 GB, in the shape of position embeddings."""
    stored = trained().state_dict()
    stored["pos_embed"] = torch.zeros(1).expand(1, 17_640_001, 32)
    torch.save(stored, path)


def truncated(path: Path) -> None:
    torch.save(trained().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def truncated_legacy(path: Path) -> None:
    torch.save(trained().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-2000])


def truncated_safetensors(path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save(trained().state_dict())[:-2000])


def swallowing_itself(path: Path) -> None:
    stored: dict[str, Any] = {}
    stored["again"] = stored
    torch.save(stored, path)


def multiplying(path: Path) -> None:
    """Dictionaries that hold the next one ten times: 10^40 paths."""
    stored: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(40):
        stored = {str(i): stored for i in range(10)}
    torch.save(stored, path)


HOSTILE = {
    bomb: "is packed (67,108,864 bytes from",
    overlapping: "claim",
    expanded: "pos_embed is (1, 17640001, 32), more than the bytes stored for it",
    truncated: "no readable file of weights, or damaged",
    truncated_legacy: "no readable file of weights, or damaged",
    truncated_safetensors: "no readable file of weights, or damaged",
    swallowing_itself: "was looked for below every name (it has 0 entries",
    multiplying: "was looked for below every name (it has 1 entries",
    lambda path: path.write_bytes(b""): "the file is empty",
    lambda path: path.write_bytes(b"some text"): "no readable file of weights",
    lambda path: path.write_bytes(b"PK\x03\x04"): "no readable file of weights",
    lambda path: path.write_bytes(b"\x80\x02."): "no readable file of weights",
    lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f{}"): "no readable file of weights",
    lambda path: path.write_bytes(pickle.dumps({"weights": [1]}, protocol=4)): "(UnpicklingError: Weights only load f",
    lambda path: path.mkdir(): "a folder without .metadata",
    lambda path: os.mkfifo(path): "not a file",
}


@pytest.mark.parametrize("make", HOSTILE)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_files_are_told_in_one_line(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "x.pt"
    make(path)
    with pytest.raises(CheckpointError) as caught:
        load_model(f"{MODEL}()", checkpoint=str(path))
    assert str(caught.value).startswith(f"checkpoint {path}: ")
    assert HOSTILE[make] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "torch's own advice is to run it"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.pt"]


def lead_out(found: Any, folder: Path) -> None:
    for place in found.storage_data.values():
        place.relative_path = "../x/__0_0.distcp"


def claim_more(found: Any, folder: Path) -> None:
    entry = found.state_dict_metadata["model.cls_token"]
    entry.size = torch.Size((1, 1, 32))
    entry.chunks[0].sizes = torch.Size((1, 1, 16))


def lose_a_file(found: Any, folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def wait_for_a_pipe(found: Any, folder: Path) -> None:
    lose_a_file(found, folder)
    os.mkfifo(folder / "__0_0.distcp")


def cut_a_file(found: Any, folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:3000])


def in_the_place_of(name: str, found: Any, folder: Path, content: bytes) -> None:
    """Put other bytes where a tensor is stored."""
    (folder / "__0_1.distcp").write_bytes(content)
    for index, place in found.storage_data.items():
        if index.fqn == name:
            place.relative_path, place.offset, place.length = "__0_1.distcp", 0, len(content)


def repeat_a_few_bytes(found: Any, folder: Path) -> None:
    """Four bytes claim to be 2 GB of position embeddings."""
    entry, shape = found.state_dict_metadata["model.pos_embed"], torch.Size((1, 17_640_001, 32))
    entry.size = entry.chunks[0].sizes = shape
    few = io.BytesIO()
    torch.save(torch.zeros(1).expand(shape), few)
    in_the_place_of("model.pos_embed", found, folder, few.getvalue())


def pack_a_piece(found: Any, folder: Path) -> None:
    stored, packed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1, 1, 32), stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    in_the_place_of("model.cls_token", found, folder, packed.getvalue())


SHARDED = {
    lead_out: "leads out of the folder, to ../x/__0_0.distcp",
    claim_more: "the pieces of model.cls_token do not add up to its shape (1, 1, 32)",
    lose_a_file: "__0_0.distcp is missing in it",
    wait_for_a_pipe: "__0_0.distcp is missing in it",
    cut_a_file: "bytes of tensors, more than the 3,000 in its files; copy them again",
    repeat_a_few_bytes: "bytes of tensors, more than the",
    pack_a_piece: "is packed (",
}


@pytest.mark.parametrize("change", SHARDED)
def test_hostile_folders_are_told_in_one_line(tmp_path: Path, change: Callable[[Any, Path], None]) -> None:
    folder = tmp_path / "x"
    save_sharded({"model": trained().state_dict()}, folder)
    found = pickle.loads((folder / ".metadata").read_bytes())
    change(found, folder)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    with pytest.raises(CheckpointError) as caught:
        load_model(MODEL, checkpoint=str(folder))
    assert SHARDED[change] in str(caught.value)
    (folder / ".metadata").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no readable file of weights, or damaged"):
        load_model(MODEL, checkpoint=str(folder))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint .*x\.pt: does not exist; expected a file or a folder of"):
        load_model(MODEL, checkpoint=str(tmp_path / "x.pt"))


def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = safetensors(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a file of safetensors.*pip install safetensors$"):
        load_model(MODEL, checkpoint=str(path))
