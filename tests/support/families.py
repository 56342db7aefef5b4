"""Families of vision transformers from outside with places of their own kind: pyramids, several class tokens, language.

Small members with random weights; where a family's builder fixes the sizes, its class is called instead. Images are
64 px wide or a little more, so that the last stage still has a grid.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.forward import default_forward
from tests.support.zoo import enliven, hugging_face, vit_pytorch


@dataclass(frozen=True)
class Family:
    """A model. ``placed``: at least so many layers have places. ``lively``: weights are redrawn, else as they come."""

    name: str
    build: Callable[[], nn.Module]
    placed: int
    size: tuple[int, int] = (64, 64)
    lively: bool = True
    class_parameter: str = ""
    forward: Callable[[nn.Module, Tensor], Any] = default_forward
    count: int = 2

    def model(self) -> nn.Module:
        """The model in eval mode, the same every time."""
        torch.manual_seed(0)
        model = self.build()
        return (enliven(model) if self.lively else model).eval()

    def images(self, count: int | None = None) -> Tensor:
        """Noise images that are the same every time."""
        return torch.randn(count or self.count, 3, *self.size, generator=torch.Generator().manual_seed(1))


def _timm(module: str, name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(f"timm.models.{module}"), name)(**settings)
        return model

    return build


def _registered(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **settings)
        return model

    return build


def _mvit() -> nn.Module:
    from timm.models import mvitv2

    cfg = mvitv2.MultiScaleVitCfg(depths=(1, 1, 2, 1), embed_dim=16)
    return mvitv2.MultiScaleVit(cfg, img_size=(64, 64), num_classes=0)  # type: ignore[no-any-return]


def _vitamin() -> nn.Module:
    from timm.models import vitamin

    stem = vitamin.VitCfg(
        embed_dim=(16, 32, 48), depths=(1, 1, 1), stem_width=16, head_type="1d",
        conv_cfg=vitamin.VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    )  # fmt: skip
    return _registered("vitamin_small_224", img_size=64, embed_dim=48, depth=2, num_heads=4, embed_cfg=stem)()


def _caformer() -> nn.Module:
    from timm.models import metaformer as mf

    mixers = [mf.SepConv, mf.SepConv, mf.Attention, mf.Attention]
    norms = [mf.LayerNorm2dNoBias] * 2 + [mf.LayerNormNoBias] * 2
    return mf.MetaFormer(  # type: ignore[no-any-return]
        depths=(1, 1, 2, 1), dims=(16, 32, 64, 64), token_mixers=mixers, norm_layers=norms, num_classes=0
    )


def _x_clip() -> nn.Module:
    import transformers

    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8, "num_frames": 1}
    shape |= {"mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_hidden_layers": 1}
    model: nn.Module = transformers.XCLIPVisionModel(transformers.XCLIPVisionConfig(**shape, mit_num_attention_heads=4))
    return model


_LLAVA_PATCHES = 16


def _llava() -> nn.Module:
    import transformers as hf

    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = hf.CLIPVisionConfig(**shape, intermediate_size=64, image_size=32, patch_size=8)
    text = hf.LlamaConfig(**shape, intermediate_size=64, vocab_size=40, max_position_embeddings=64)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, image_seq_length=16)
    model: nn.Module = hf.LlavaForConditionalGeneration(config)
    return model


def _read_caption(model: nn.Module, images: Tensor) -> Any:
    """As many text tokens as patches, before and behind the image."""
    words = list(range(1, _LLAVA_PATCHES // 2 + 1))
    line = torch.tensor([*words, *[39] * _LLAVA_PATCHES, *words], device=images.device)
    return model(input_ids=line.expand(len(images), -1), pixel_values=images)


_DIMS = {"embed_dims": (16, 32, 64, 64)}

FAMILIES = [
    Family(
        "PiT",
        _timm(
            "pit", "PoolingVisionTransformer",
            img_size=64, base_dims=[16, 16, 16], depth=(1, 2, 1), heads=(2, 4, 8), num_classes=0,
        ),
        4,
        class_parameter="cls_token",
    ),
    Family(
        "CrossViT",
        _registered("crossvit_tiny_240", img_size=96, img_scale=(1.0, 1.0), patch_size=(12, 16), embed_dim=(32, 64),
                    num_heads=(2, 2)),
        21,
        size=(96, 96),
        class_parameter="cls_token_0 cls_token_1",
    ),
    Family(
        "VOLO",
        _timm(
            "volo", "VOLO",
            layers=(1, 1, 1, 1), img_size=64, embed_dims=(32, 64, 64, 64), num_heads=(2, 4, 4, 4),
            mlp_ratio=2.0, num_classes=5, stem_hidden_dim=16,
        ),
        5,
        class_parameter="cls_token",
    ),
    Family("CoAtNet", _registered("test_coatnet", img_size=96), 3, size=(96, 96), lively=False),
    Family("CoAtNet pico", _registered("coatnet_pico_rw_224", img_size=64), 7, lively=False),
    Family("Hiera", _registered("hiera_tiny_224", img_size=(64, 96), embed_dim=16, stages=(1, 1, 2, 1)), 2,
           size=(64, 96)),
    Family(
        "PVT v2",
        _timm("pvt_v2", "PyramidVisionTransformerV2", depths=(1, 1, 1, 1), **_DIMS, num_classes=0),
        4,
        size=(64, 96),
    ),
    Family("Twins-SVT", _registered("twins_svt_small", img_size=64, **_DIMS, num_heads=(2, 4, 4, 4),
                                    depths=(2, 2, 2, 2)), 6),
    Family("Twins-PCPVT", _registered("twins_pcpvt_small", img_size=64, **_DIMS, num_heads=(2, 4, 4, 4),
                                      depths=(1, 1, 1, 1)), 4),
    Family("Visformer", _registered("visformer_tiny", img_size=64, embed_dim=64, depth=(1, 2, 2), num_heads=4), 4),
    Family(
        "LeViT",
        _timm("levit", "Levit", embed_dim=(32, 64, 64), key_dim=8, num_heads=(2, 2, 2), depth=(1, 2, 1), num_classes=0),
        2,
        size=(224, 224),
    ),
    Family("Swin", _registered("swin_tiny_patch4_window7_224", img_size=64, embed_dim=32, depths=(1, 1, 2),
                               num_heads=(2, 2, 4), window_size=4), 2),
    Family("MViT v2", _mvit, 1, lively=False),
    Family("ViTamin", _vitamin, 2),
    Family(
        "GC-ViT",
        _timm("gcvit", "GlobalContextVit", img_size=64, embed_dim=16, depths=(1, 1, 2, 2), num_heads=(2, 2, 4, 4),
              num_classes=0),
        4,
        lively=False,
    ),
    Family("CAFormer", _caformer, 3, lively=False),
    Family("MaxViT", _registered("maxvit_rmlp_pico_rw_256", img_size=64), 4, lively=False),
    Family(
        "EfficientFormer",
        _timm("efficientformer", "EfficientFormer", depths=(1, 1, 1, 2), embed_dims=(16, 32, 64, 64), num_vit=1,
              num_classes=0),
        1,
        size=(224, 224),
    ),
    Family(
        "EfficientFormer v2",
        _timm("efficientformer_v2", "EfficientFormerV2", depths=(1, 1, 2, 2), embed_dims=(16, 32, 48, 64), num_vit=1,
              img_size=128, num_classes=0),
        1,
        size=(128, 128),
    ),
    Family("XCiT", _registered("xcit_nano_12_p8_224", img_size=64, embed_dim=32, depth=2, num_heads=4), 2,
           class_parameter="cls_token"),
    Family("Pixio", functools.partial(hugging_face, "PixioModel", "PixioConfig", "sdpa", mlp_ratio=2, n_cls_tokens=4),
           2, size=(32, 32)),
    Family("JumboViT", functools.partial(vit_pytorch, "jumbo_vit", "JumboViT", jumbo_cls_k=2, num_jumbo_cls=2), 2,
           size=(32, 32)),
    Family("X-CLIP vision tower", _x_clip, 2, size=(32, 32), class_parameter="class_embedding"),
    Family("LLaVA", _llava, 3, size=(32, 32), class_parameter="class_embedding", forward=_read_caption),
]  # fmt: skip
