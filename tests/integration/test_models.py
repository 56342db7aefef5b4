"""Models by name: from libraries, torch.hub, and the user's own factories."""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

from attn_monitor.errors import CheckpointError, ModelNameError
from attn_monitor.weights.models import load_model
from tests.support.helpers import tiny_vit

HUBCONF = """
dependencies = ["torch"]
from torch import nn
from tests.support.helpers import tiny_vit

def with_weights(pretrained=True, **changes):
    model = tiny_vit(**changes)
    nn.init.constant_(model.pos_embed, float(pretrained))
    return model

def without(depth):
    return tiny_vit(depth=depth)

def broken(pretrained=False):
    raise TypeError("made of something else")
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository: mine"
    folder.mkdir()
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


def message_of(name: str, **options: bool) -> str:
    with pytest.raises(ModelNameError) as caught:
        load_model(name, **options)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    return str(caught.value)


def test_a_local_repository_of_torch_hub(repository: Path) -> None:
    for weights in (True, False):
        model = load_model(f"hub:{repository}:with_weights", weights=weights)
        assert bool(model.pos_embed.all()) == weights
        assert not model.training
    changed = load_model(f"hub:{repository}:with_weights(pretrained=True, depth=1, img_size=[32, 64])")
    assert len(changed.blocks) == 1
    assert changed.pos_embed.shape == (1, 33, 32)
    assert changed.pos_embed.all()
    assert len(load_model(f"hub:{repository}:without(3)").blocks) == 3


def test_mistakes_with_torch_hub(repository: Path) -> None:
    assert "TypeError: made of something else (hubconf.py, line 15)" in message_of(f"hub:{repository}:broken")
    assert "Cannot find callable absent in hubconf" in message_of(f"hub:{repository}:absent")
    assert "expected hub:REPO:NAME" in message_of("hub:facebookresearch/dino")
    (repository / "hubconf.py").write_text("dependencies = ['no_such_package']\ndef build(): pass")
    assert "no_such_package" in message_of(f"hub:{repository}:build")
    (repository / "hubconf.py").unlink()
    assert "hubconf.py" in message_of(f"hub:{repository}:build")


@pytest.mark.parametrize("branch", ["", ":main"])
def test_torch_hub_without_network(
    tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch, branch: str, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port}")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first use, for later tests too
    started = time.monotonic()
    assert "or give a folder that holds hubconf.py: hub:FOLDER:NAME" in message_of(f"hub:org/name{branch}:vit")
    assert time.monotonic() - started < 20
    assert capfd.readouterr().out == ""


def test_factories_take_literals() -> None:
    model = load_model(
        "tests.support.helpers:tiny_vit(depth=1, img_size=(32, 64), class_token=False, global_pool='avg')"
    )
    assert len(model.blocks) == 1
    assert model.pos_embed.shape == (1, 32, 32)
    assert isinstance(load_model("torch.nn:Linear(3, 4)"), nn.Linear)
    assert isinstance(load_model("torch:nn.modules.Linear(3, out_features=4)"), nn.Linear)


@pytest.mark.parametrize(
    "arguments",
    [
        "depth=__import__('pathlib').Path({path!r}).touch()",
        "**{{'depth': 1}}",
        "*[1]",
        "depth=open({path!r}, 'w')",
        "depth=[x for x in (1,)][0]",
        "depth=1",  # followed by what closes it twice
    ],
)
def test_arguments_are_never_evaluated(tmp_path: Path, arguments: str) -> None:
    path = tmp_path / "trace"
    closing = "))" if arguments == "depth=1" else ")"
    call = f"tiny_vit({arguments.format(path=str(path))}{closing}"
    assert "expected NAME or NAME(arguments)" in message_of(f"tests.support.helpers:{call}")
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tests.support.helpers:tiny_vitt", "has no 'tiny_vitt'; did you mean tiny_vit"),
        (
            "tests.support.helpers:tiny_vit(width=3)",
            r"TypeError: .*unexpected keyword argument 'width' \(helpers\.py, line \d+",
        ),
        ("tests.support.helpers:Path", "gave a PosixPath, expected a torch.nn.Module"),
        ("tests.support.helpers:nn", "TypeError: 'module' object is not callable"),
        ("tests.no_such:tiny_vit", "No module named 'tests.no_such'. Install that package, or check the name"),
        ("tests.support.helpers:", "expected timm:NAME, hf:NAME_OR_DIR"),
        ("tests.support.helpers:tiny_vit()()", "expected NAME or NAME"),
        (":vit", "expected timm:NAME"),
        ("hub:", "expected timm:NAME"),
        ("../x:y", "Install that package, or check the name|relative import"),
        ("timm:vit_tiny_patch16_225", "timm knows no"),
    ],
)
def test_mistakes_with_names(name: str, text: str) -> None:
    assert re.search(text, message_of(name))


def test_factories_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m` would find them; the command is a script elsewhere."""
    (tmp_path / "my_vits.py").write_text(
        "from tests.support.helpers import tiny_vit as build\n1 / 1\ndef wrong(): return 1 / 0"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    assert len(load_model("my_vits:build").blocks) == 2
    assert "ZeroDivisionError: division by zero (my_vits.py, line 3)" in message_of("my_vits:wrong")
    (tmp_path / "no_python.py").write_text("this is no Python")
    assert "SyntaxError" in message_of("no_python:build")


def test_torchvision_takes_its_checkpoints_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = (
        "torchvision.models:VisionTransformer(image_size={}, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, "
    )
    name += "mlp_dim=64, num_classes={})"
    source = load_model(name.format(32, 10))
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(load_model(name.format(32, 10), checkpoint=str(tmp_path / "x.pth"))(images), source(images))
    load_model(name.format(64, 5), checkpoint=str(tmp_path / "x.pth"))
    said = capsys.readouterr().err
    assert "interpolated: encoder.pos_embedding from 4 × 4 to 8 × 8 patches" in said
    assert "the file has no classifier, on which attention does not depend (heads.head.weight, heads.head.bias" in said


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("code", "[Ww]eights.only|Unable to load weights"),
        ("truncated", "header|incomplete|SafetensorError"),
        ("config", "JSON|json"),
        ("remote code", "custom code|trust_remote_code"),
        ("empty", "config.json|model_type|no file named"),
        ("nowhere", "nowhere is no folder"),
    ],
)
def test_damaged_folders_of_transformers(tmp_path: Path, damage: str, text: str) -> None:
    from transformers import ViTConfig, ViTModel

    folder, trace = tmp_path / "vit", tmp_path / "trace"
    folder.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "code":
        weights.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Touch(trace)}, protocol=2))
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-2000])
    elif damage == "config":
        config.write_text("{")
    elif damage == "remote code":
        (folder / "modeling.py").write_text(f"open({str(trace)!r}, 'w')")
        named = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
        config.write_text(json.dumps({"model_type": "mine", "auto_map": named}))
    elif damage == "empty":
        for path in folder.iterdir():
            path.unlink()
    else:
        folder = tmp_path / "nowhere"
    assert re.search(text, message_of(f"hf:{folder}"))
    assert not trace.exists()


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_into_a_model_of_torch_hub(repository: Path, tmp_path: Path) -> None:
    source = tiny_vit(depth=1).eval()
    torch.save(source.state_dict(), tmp_path / "x.pth")
    images = torch.randn(2, 3, 32, 32)
    loaded = load_model(f"hub:{repository}:without(1)", checkpoint=str(tmp_path / "x.pth"))
    with torch.inference_mode():
        assert torch.equal(loaded(images), source(images))
    with pytest.raises(CheckpointError, match=r"blocks\.1"):
        load_model(f"hub:{repository}:without(2)", checkpoint=str(tmp_path / "x.pth"))
