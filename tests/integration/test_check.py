"""`attn-monitor check` on whole training modules and on models that can be read in parts only."""

from __future__ import annotations

import pytest
from torch import nn

from attn_monitor.commands.check import check
from tests.support.gpu_kernels import WAYS, sdpa, unseen
from tests.support.helpers import Distillation
from tests.support.styles import Packed, PlainViT
from tests.support.zoo import enliven, timm_model


def distillation() -> nn.Module:
    return Distillation()


def cait() -> nn.Module:
    return enliven(timm_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4))


def xcit() -> nn.Module:
    return enliven(timm_model("xcit_nano_12_p8_224", img_size=32, embed_dim=32, depth=1, num_heads=4))


def test_check_looks_at_every_role(capsys: pytest.CaptureFixture[str]) -> None:
    check("tests.integration.test_check:distillation", size=(32, 48))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    for lines, role in ((printed[:4], "student"), (printed[4:], "teacher")):
        assert f"{role} at {role}_backbone, VisionTransformer, images of 32 × 48, 2 attention layers" in lines[0]
        for index, line in enumerate(lines[1:3]):
            for word in (
                f"{index} blocks.{index}.attn",
                "flash_attention",
                "4 heads, grid 4 × 6 (places exact) + 1 prefix, error ",
            ):
                assert word in line
        assert "layer 1, query='cls': costs" in lines[3]
        assert 0.1 < float(lines[3].split("costs ")[1].split()[0]) < 20


def test_check_tells_mixed_layers_and_how_places_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    check("tests.integration.test_check:cait", size=32)
    printed = capsys.readouterr().out
    assert "4 heads, grid 4 × 4 (places exact) + 0 prefix, mixed after the softmax" in printed
    assert "4 heads, grid 4 × 4 (places exact) + 1 prefix, error" in printed


def test_check_goes_on_after_a_refused_layer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        check("tests.integration.test_check:xcit", size=(32, 48), query=[1, 2])
    printed = capsys.readouterr().out
    assert "blocks.0.attn" in printed
    assert "4 heads, refused: " in printed
    assert "cls_attn_blocks.1.attn" in printed
    assert "query=[1, 2] can be read nowhere" in printed


def kernels() -> nn.Module:
    ways = (sdpa, WAYS["flash-attn 2"], WAYS["function"], unseen)
    return enliven(PlainViT(*(Packed(way) for way in ways)))


def test_check_names_the_kernel_of_each_layer(capsys: pytest.CaptureFixture[str]) -> None:
    check("tests.integration.test_check:kernels", size=(32, 48))
    lines = capsys.readouterr().out.splitlines()[1:5]
    names = (
        "sdpa, flash_attention_for_cpu ",
        "flash_attn._flash_attn_forward ",
        "FlashAttention ",
        "an unseen kernel ",
    )
    for index, (line, name) in enumerate(zip(lines, names, strict=True)):
        assert f"{index} blocks.{index}.attn" in line
        assert name in line
    assert "refused: mixes tokens in a kernel that PyTorch's dispatcher does not see" in lines[3]
