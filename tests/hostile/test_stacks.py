"""Beside an encoder, a decoder in the same module is a second stack: "last" and "all" are the encoder's."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from attn_monitor import Watch, attention_rollout, record_attention
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.stacks import ObservedLayer, second_stacks
from attn_monitor.commands.check import check
from attn_monitor.errors import LayerError
from tests.hostile.test_masking import hugging_face_mae
from tests.support.helpers import tiny_vit
from tests.support.oracle import attention_matrices
from tests.support.zoo import enliven

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class MaskedAutoencoderViT(nn.Module):
    """The official MAE: encoder and decoder in one module, one after the other in its forward."""

    def __init__(self, depth: int = 3, decoder_depth: int = 2, width: int = 32) -> None:
        super().__init__()
        vit, decoder = tiny_vit(depth=depth), tiny_vit(depth=decoder_depth, embed_dim=width)
        self.patch_embed, self.cls_token, self.pos_embed = vit.patch_embed, vit.cls_token, vit.pos_embed
        self.patch_embed.strict_img_size, self.patch_embed.flatten = True, True
        self.patch_embed.output_fmt = type(self.patch_embed.output_fmt)("NCHW")
        self.blocks, self.norm = nn.ModuleList(vit.blocks), vit.norm
        self.decoder_embed, self.mask_token = nn.Linear(32, width), nn.Parameter(torch.randn(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, 17, width), requires_grad=False)
        self.decoder_blocks, self.decoder_norm = nn.ModuleList(decoder.blocks), nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, 8 * 8 * 3)

    def random_masking(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
        count, length, width = x.shape
        shuffle = torch.argsort(torch.rand(count, length, device=x.device), dim=1)
        keep = shuffle[:, : int(length * (1 - mask_ratio))]
        return torch.gather(x, 1, keep[..., None].expand(-1, -1, width)), torch.argsort(shuffle, dim=1)

    def forward_encoder(self, x: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(x) + self.pos_embed[:, 1:]
        x, restore = self.random_masking(x, mask_ratio)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat((cls, x), 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), restore

    def forward_decoder(self, x: Tensor, restore: Tensor) -> Tensor:
        x = self.decoder_embed(x)
        masks = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat((x[:, 1:], masks), 1)
        patches = torch.gather(patches, 1, restore[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat((x[:, :1], patches), 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, imgs: Tensor, mask_ratio: float = 0.75) -> Tensor:
        return self.forward_decoder(*self.forward_encoder(imgs, mask_ratio))


class Unnamed(MaskedAutoencoderViT):
    """The same under names that say nothing, with a decoder of the encoder's width."""

    def __init__(self) -> None:
        super().__init__()
        self.more = self.decoder_blocks
        del self.decoder_blocks

    @property
    def decoder_blocks(self) -> nn.Module:
        return self.more

    @decoder_blocks.setter
    def decoder_blocks(self, blocks: nn.Module) -> None:
        self.add_module("decoder_blocks", blocks)


def all_patches_in_order(model: nn.Module, images: Tensor) -> Tensor:
    """An oracle of the same forward without the shuffle."""
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    x = torch.cat(((model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x), 1)
    for block in model.blocks:
        x = block(x)
    return model.forward_decoder(model.norm(x), torch.arange(16).expand(len(x), -1))


def record(model: nn.Module, **arguments: object) -> list[tuple[int, str]]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*looked at with all of them")
        return [(a.layer, a.name) for a in record_attention(model, IMAGES, **arguments)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "made",
    [
        MaskedAutoencoderViT,
        lambda: MaskedAutoencoderViT(decoder_depth=1, width=64),
        lambda: MaskedAutoencoderViT(depth=2, decoder_depth=4),
        Unnamed,
    ],
    ids=["official", "one block", "deeper decoder", "unnamed"],
)
def test_the_last_layer_is_the_encoders(made: type[MaskedAutoencoderViT]) -> None:
    model = enliven(made()).eval()
    with pytest.warns(UserWarning, match="it masks patches at random, and is looked at with all of them"):
        (last,) = record_attention(model, IMAGES)
    depth = len(model.blocks)
    assert (last.layer, last.name) == (depth - 1, f"blocks.{depth - 1}.attn")
    expected = attention_matrices(model, IMAGES, all_patches_in_order)
    torch.testing.assert_close(last.rows.double(), expected[depth - 1][:, :, 0], atol=1e-5, rtol=1e-4)
    assert [layer for layer, _ in record(model, layers="all")] == list(range(depth))
    assert record(model, layers=[-depth, depth])[0][0] == 0


def test_a_decoder_is_asked_for_by_its_path_or_by_indices() -> None:
    model = enliven(MaskedAutoencoderViT()).eval()
    by_path = record(model, layers="decoder_blocks")
    assert by_path == [(3, "decoder_blocks.0.attn"), (4, "decoder_blocks.1.attn")]
    assert record(model, layers=[3, 4]) == by_path
    assert record(model, layers=[-1, "decoder_blocks.1.attn"]) == [(2, "blocks.2.attn"), by_path[1]]
    with pytest.raises(LayerError, match=r"expected -3 to 4; this model has 5 layers, 3 of them the encoder's"):
        record(model, layers=-4)


@pytest.mark.slow
def test_the_second_stack_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "decoder_blocks (layers 3 to 4) is a second stack, which is watched by layers='decoder_blocks'"
    recorder = AttentionRecorder(MaskedAutoencoderViT())
    recorder.check(IMAGES)
    assert text in recorder.notes
    assert str(recorder.summary()).startswith("MaskedAutoencoderViT, layer 2 (of layers 0 to 2),")
    chosen = AttentionRecorder(recorder.model, layers="decoder_blocks")
    chosen.check(IMAGES)
    assert text not in chosen.notes
    assert str(chosen.summary()).startswith("MaskedAutoencoderViT, layers 3, 4 (of layers 0 to 4),")
    watch = Watch(recorder.model, IMAGES, folder=tmp_path)
    snapshot = watch.step(0)
    watch.close()
    assert snapshot is not None
    assert list(snapshot.layers) == [("backbone", 2)]
    assert text in capsys.readouterr().err
    check("tests.hostile.test_stacks:MaskedAutoencoderViT", size=32)
    assert text in capsys.readouterr().out


def test_the_whole_of_hugging_faces_mae() -> None:
    model = enliven(hugging_face_mae()).eval()
    assert record(model) == record(model, layers=1)
    assert record(model)[0][1].startswith("vit.")
    assert [layer for layer, _ in record(model, layers="all")] == [0, 1]


def test_rollout_is_the_encoders() -> None:
    model = enliven(MaskedAutoencoderViT()).eval()
    maps = attention_rollout(model, IMAGES)
    row = torch.eye(17, dtype=torch.float64)[:1].expand(2, 1, 17)
    for matrix in reversed(attention_matrices(model, IMAGES, all_patches_in_order)[:3]):
        row = row @ (0.5 * torch.eye(17, dtype=torch.float64) + 0.5 * matrix.mean(1))
    torch.testing.assert_close(maps.double(), row[:, 0, 1:].unflatten(-1, (4, 4)), atol=1e-5, rtol=1e-4)


def lists(**lengths: int) -> dict[str, nn.Module]:
    made = nn.ModuleDict({n: nn.ModuleList(nn.Identity() for _ in range(length)) for n, length in lengths.items()})
    return dict(made.named_modules())


@pytest.mark.parametrize(
    ("stages", "second"),
    [
        ({"block1": (3, 3136), "block2": (4, 784), "block3": (18, 196), "block4": (3, 49)}, set()),  # a pyramid
        ({"blocks": (24, 196), "blocks_token_only": (2, 1)}, set()),  # class attention
        ({"blocks": (12, 197), "more": (8, 196)}, {"more"}),  # without CLS
        ({"down": (2, 784), "middle": (6, 196), "up": (2, 784)}, {"up"}),
        ({"stem": (2, 196), "blocks": (8, 197)}, set()),
        ({"stage2": (4, 196), "stage3": (4, 49)}, set()),
        ({"enc_blocks": (6, 197), "dec_blocks": (8, 197)}, {"dec_blocks"}),
        ({"decoder": (2, 7)}, set()),  # a model of its own
    ],
)
def test_which_lists_are_second_stacks(stages: dict[str, tuple[int, int]], second: set[str]) -> None:
    ran = [ObservedLayer(f"{name}.{i}", queries) for name, (count, queries) in stages.items() for i in range(count)]
    found = second_stacks(ran, lists(**{name: count for name, (count, _) in stages.items()}))
    assert found == [path.partition(".")[0] if path.partition(".")[0] in second else "" for path, _ in ran]


def test_lists_that_take_turns_are_one_stack() -> None:
    ran = [ObservedLayer(f"{name}.{i}", 197) for i in range(4) for name in ("frame_blocks", "global_blocks")]
    assert second_stacks(ran, lists(frame_blocks=4, global_blocks=4)) == [""] * 8
