"""Other ways of getting attention out of a ViT, each as its own users would set it up for speed.

All models have the same size and random weights; time does not depend on their values.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attn_monitor import AttentionRecorder

Run = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """A ViT and the images that it sees."""

    name: str
    width: int
    depth: int
    heads: int
    pixels: int
    batch: int
    patch: int = 16

    @property
    def tokens(self) -> int:
        """CLS and patches."""
        return (self.pixels // self.patch) ** 2 + 1

    @property
    def matrix_bytes(self) -> int:
        """Size of one layer's full attention matrices in float32."""
        return self.batch * self.heads * self.tokens**2 * 4

    def images(self) -> Tensor:
        """Noise, the same every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, 3, self.pixels, self.pixels, generator=generator)


@dataclass(frozen=True)
class Peer:
    """One way, on one model: ``run`` is its name among what ``build`` gives; ``floor`` that of the same model's plain
    forward in its fastest form.
    """

    run: str
    title: str
    package: str
    floor: str
    layers: str  # "last" or "all": what it gives
    build: Callable[[Size], dict[str, Run]]  # with the floor among them, and ours, where the model is another one
    matrices: float  # how many layers' full matrices it holds at once, copies included; 0 for the last one alone

    @property
    def missing(self) -> bool:
        """Whether its package is not installed."""
        return importlib.util.find_spec(self.package) is None


def no_grad(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Run:
    """A call without gradients, as every peer's users would make it."""

    def run() -> Any:
        with torch.no_grad():
            return function(*arguments, **keywords)

    return run


def recorder(model: nn.Module, images: Tensor, layers: Any, verify: bool | str = False) -> Run:
    """Ours, as nearly every snapshot is: the sites are known, and no check of the places is due.

    Places are checked after 1, 2, 4, 8, … recordings, which is seven times in a hundred snapshots; in a few rounds the
    checks would decide the median.
    """
    record = AttentionRecorder(model, layers=layers, verify=verify)
    record(images)
    record._discovery.known.recordings = 2**10  # type: ignore[union-attr]
    return lambda: record(images)


class EmptyMode(TorchDispatchMode):
    """Runs each operation, and does nothing else: the least that it costs to see them from Python."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def under_empty_mode(model: nn.Module, images: Tensor, paths: Sequence[str] = ("",)) -> Run:
    """A plain forward with an empty dispatch mode in these modules, entered and left by hooks as ours is."""
    mode = EmptyMode()

    def enter(*_: Any) -> None:
        mode.__enter__()

    def leave(*_: Any) -> None:
        mode.__exit__(None, None, None)

    def run() -> Any:
        with ExitStack() as stack:
            for module in map(model.get_submodule, paths):
                stack.enter_context(module.register_forward_pre_hook(enter))
                stack.enter_context(module.register_forward_hook(leave))
            with torch.no_grad():
                return model(images)

    return run


def timm_vit(size: Size) -> nn.Module:
    """timm's ViT with fused attention."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=size.pixels, patch_size=size.patch, embed_dim=size.width, depth=size.depth, num_heads=size.heads,
        num_classes=0,
    )  # fmt: skip
    return model.eval()


def ours(size: Size) -> dict[str, Run]:
    """Our own captures and their floor, on timm's model."""
    model, images = timm_vit(size), size.images()
    return {
        "plain": no_grad(model, images),
        "empty mode": under_empty_mode(model, images, [f"blocks.{i}.attn" for i in range(size.depth)]),
        "ours, last": recorder(model, images, -1),
        "ours, last by index": recorder(model, images, size.depth - 1),
        "ours, all": recorder(model, images, "all"),
        "ours, last, verified": recorder(model, images, -1, True),
        "ours, all, verified": recorder(model, images, "all", True),
    }


def _explicit(model: nn.Module, layers: range) -> nn.Module:
    """Fused attention switched off in these layers, where timm's extractor could not see it."""
    model = copy.deepcopy(model)
    for index in layers:
        model.get_submodule(f"blocks.{index}.attn").fused_attn = False  # type: ignore[assignment]
    return model


def _extract(size: Size, layers: range) -> Run:
    from timm.utils import AttentionExtract

    names = [f"blocks.{i}.attn.softmax" for i in layers]
    return no_grad(AttentionExtract(_explicit(timm_vit(size), layers), names=names), size.images())


def _timm_last(size: Size) -> dict[str, Run]:
    """Traced, cut off after the softmax of the last block, and only that block's fused attention switched off."""
    return {"timm, last": _extract(size, range(size.depth - 1, size.depth))}


def _timm_all(size: Size) -> dict[str, Run]:
    """Traced, with fused attention switched off everywhere."""
    return {"timm, all": _extract(size, range(size.depth))}


class DinoStyle(nn.Module):
    """`get_last_selfattention` as in DINO's code: every block computes attention explicitly, and the last gives it.

    Takes the modules of timm's ViT, so that the weights and the rest of the arithmetic are the same.
    """

    def __init__(self, vit: Any) -> None:
        super().__init__()
        self.vit = vit

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """(B, H, T, T) of the last block, after which nothing is run."""
        x = self.vit.patch_embed(images)
        x = torch.cat([self.vit.cls_token.expand(len(x), -1, -1), x], 1) + self.vit.pos_embed
        *earlier, last = self.vit.blocks
        for block in earlier:
            x = x + self._attend(block.attn, block.norm1(x))[0]
            x = x + block.mlp(block.norm2(x))
        return self._attend(last.attn, last.norm1(x))[1]

    def _attend(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, width = x.shape
        q, k, v = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * attn.scale).softmax(-1)
        return attn.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width)), weights


def _dino(size: Size) -> dict[str, Run]:
    model = DinoStyle(timm_vit(size)).eval()
    return {"DINO": no_grad(model.get_last_selfattention, size.images())}


def _hugging_face(size: Size) -> dict[str, Run]:
    from transformers import ViTConfig, ViTModel

    settings: dict[str, Any] = {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": 4 * size.width,
        "image_size": size.pixels,
        "patch_size": size.patch,
    }
    images = size.images()
    eager, fused = (
        ViTModel(ViTConfig(**settings, attn_implementation=kind), add_pooling_layer=False).eval()
        for kind in ("eager", "sdpa")
    )
    return {
        "Hugging Face, plain": no_grad(fused, images),
        "Hugging Face": no_grad(eager, images, output_attentions=True),
        "ours on Hugging Face, last": recorder(fused, images, -1),
        "ours on Hugging Face, all": recorder(fused, images, "all"),
    }


def _vit_pytorch(size: Size) -> dict[str, Run]:
    from vit_pytorch import ViT
    from vit_pytorch.recorder import Recorder

    model = ViT(
        image_size=size.pixels, patch_size=size.patch, num_classes=1, dim=size.width, depth=size.depth,
        heads=size.heads, mlp_dim=4 * size.width, dim_head=size.width // size.heads,
    ).eval()  # fmt: skip
    images = size.images()
    return {
        "vit-pytorch, plain": no_grad(copy.deepcopy(model), images),  # the recorder's hooks stay on its model
        "vit-pytorch": no_grad(Recorder(copy.deepcopy(model)), images),
        "ours on vit-pytorch, last": recorder(model, images, -1),
        "ours on vit-pytorch, all": recorder(model, images, "all"),
    }


def peers() -> Iterator[Peer]:
    """Every peer. Those that give all layers or nothing are compared with both of ours."""
    yield Peer("timm, last", "timm `AttentionExtract`, tuned by hand", "timm", "plain", "last", _timm_last, 0)
    yield Peer("DINO", "DINO-style `get_last_selfattention`", "timm", "plain", "last", _dino, 0)
    yield Peer("timm, all", "timm `AttentionExtract`, as documented", "timm", "plain", "all", _timm_all, 1)
    yield Peer(
        "Hugging Face", "Hugging Face `output_attentions`", "transformers", "Hugging Face, plain", "all",
        _hugging_face, 1,
    )  # fmt: skip
    yield Peer(
        "vit-pytorch", "vit-pytorch `Recorder`", "vit_pytorch", "vit-pytorch, plain", "all", _vit_pytorch, 2
    )  # fmt: skip
