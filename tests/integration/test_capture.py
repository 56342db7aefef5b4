"""The contract of `record_attention`: what is asked for is what comes back, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attn_monitor import record_attention
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.errors import LayerError
from tests.support import styles
from tests.support.oracle import attention_matrices
from tests.support.releases import since_torch
from tests.support.zoo import enliven, timm_model, timm_vit

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))


def vit(**changes: Any) -> nn.Module:
    return enliven(timm_vit("vit_tiny_patch16_224", **changes)).eval()


class Watch(TorchDispatchMode):
    """Sees every operation, the capture's own included: the largest result, and how often the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor._base is None:  # views take no memory
                self.largest = max(self.largest, tensor.numel())
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
        return out


def test_one_layer_with_all_its_facts() -> None:
    (attention,) = record_attention(vit(depth=3), IMAGES)
    assert (attention.layer, attention.name) == (2, "blocks.2.attn")
    assert (attention.num_prefix, attention.grid, attention.mixed) == (1, (4, 6), False)
    assert attention.rows.shape == (2, 4, 25)
    assert attention.rows.dtype == torch.float32
    assert torch.allclose(attention.rows.sum(-1), torch.ones(2, 4))
    assert attention.maps.shape == (2, 4, 4, 6)
    assert torch.equal(attention.maps.flatten(-2), attention.rows[..., 1:]), "not renormalised"
    assert 0 <= attention.verified_error < 1e-5
    assert not attention.rows.requires_grad
    assert attention.distance is None


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (-1, [2]),
        (0, [0]),
        ([2, 0], [0, 2]),
        ([-1, 2], [2]),
        ("all", [0, 1, 2]),
        ("blocks.1.attn", [1]),
        ("blocks.1", [1]),
        (["blocks.1", 0], [0, 1]),
        ("blocks", [0, 1, 2]),
    ],
)
def test_layers(layers: Any, expected: list[int]) -> None:
    assert [a.layer for a in record_attention(vit(depth=3), IMAGES, layers=layers)] == expected


def test_a_module_name_is_not_a_prefix_of_another() -> None:
    model = vit(depth=11)
    assert [a.layer for a in record_attention(model, IMAGES, layers="blocks.1")] == [1]
    with pytest.raises(LayerError, match=r"blocks.99"):
        record_attention(model, IMAGES, layers="blocks.99")


@pytest.mark.parametrize("query", ["CLS", -1, True, (), (1, 2, 3, 4), 1.5, None])
def test_queries_that_do_not_exist(query: Any) -> None:
    with pytest.raises(ValueError, match=r'query=.*expected "cls", "mean"'):
        record_attention(vit(), IMAGES, query=query)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
def test_single_tokens_and_patches(fused: bool) -> None:
    model = vit(fused=fused, reg_tokens=2)
    matrix = attention_matrices(model, IMAGES, default_forward)[-1]
    for token in (0, 1, 2, 3, 14, 26):
        (attention,) = record_attention(model, IMAGES, query=token)
        assert float((attention.rows - matrix[:, :, token]).abs().amax()) * 27 <= 1e-3
    for row, col in ((0, 0), (3, 5), (2, 1)):
        (attention,) = record_attention(model, IMAGES, query=(row, col))
        assert float((attention.rows - matrix[:, :, 3 + 6 * row + col]).abs().amax()) * 27 <= 1e-3


def test_tokens_in_an_order_of_their_own() -> None:
    """Patches in column-major order with CLS at the end: the map is still the image's."""

    class Unusual(styles.PlainViT):
        def forward(self, images: Tensor) -> Tensor:
            embed = self.patch_embed
            patches = embed.proj(images).transpose(2, 3).flatten(2).transpose(1, 2) + embed.pos_embed
            x = torch.cat([patches, embed.cls_token.expand(len(images), -1, -1)], 1)
            for block in self.blocks:
                x = block(x)
            return x[:, -1]

    model = enliven(Unusual(styles.MemEffAttention(), styles.MemEffAttention())).eval()
    matrix = attention_matrices(model, IMAGES, default_forward)[-1]
    (attention,) = record_attention(model, IMAGES)
    expected = matrix[:, :, -1, :-1].unflatten(-1, (6, 4)).transpose(-1, -2)
    assert float((attention.maps - expected).abs().amax()) * 25 <= 1e-3
    (attention,) = record_attention(model, IMAGES, query=(1, 4))
    expected = matrix[:, :, 4 * 4 + 1, :-1].unflatten(-1, (6, 4)).transpose(-1, -2)
    assert float((attention.maps - expected).abs().amax()) * 25 <= 1e-3
    assert torch.allclose(attention.rows[..., 0].double(), matrix[:, :, 17, -1], atol=1e-5), "CLS first"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
def test_mean_attention_distance(fused: bool) -> None:
    """Against the paper's rule written straight: each query's keys weighted by how far their centres are."""
    gh, gw = 10, 9  # more patches than are taken at a time
    model, images = vit(fused=fused, reg_tokens=1, img_size=(8 * gh, 8 * gw)), torch.randn(2, 3, 8 * gh, 8 * gw)
    seen = AttentionRecorder(model, layers="all", distance=True)(images)
    for attention, matrix in zip(seen, attention_matrices(model, images, default_forward), strict=True):
        p = matrix[:, :, 2:, 2:] / matrix[:, :, 2:, 2:].sum(-1, keepdim=True)
        expected = torch.zeros(2, 4, dtype=torch.float64)
        for i in range(gh * gw):
            for j in range(gh * gw):
                apart = math.hypot(8 * (i // gw - j // gw), 8 * (i % gw - j % gw))
                expected += p[:, :, i, j] * apart / (gh * gw)
        assert attention.distance is not None
        assert attention.distance.shape == (2, 4)
        assert torch.allclose(attention.distance.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"query": "mean"}, {"distance": True}], ids=["cls", "mean", "distance"])
def test_memory_is_linear_in_tokens(arguments: dict[str, Any]) -> None:
    model, images = vit(img_size=256, depth=1), torch.randn(1, 3, 256, 256)
    recorder = AttentionRecorder(model, verify=True, **arguments)
    for _ in range(3):  # before the second and the third, places are checked
        recorder(images)
    with Watch() as watch:
        recorder(images)
    tokens, heads = 32 * 32 + 1, 4
    assert tokens * heads < watch.largest < tokens * tokens * heads / 8


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
def test_an_unverified_recording_never_makes_the_host_wait(fused: bool) -> None:
    recorder = AttentionRecorder(vit(fused=fused), layers="all", query="mean", verify="first")
    for _ in range(3):  # before the second and the third, places are checked
        recorder(IMAGES)
    with Watch() as watch:
        seen = recorder(IMAGES)
    assert watch.waits == 0
    assert all(math.isnan(a.verified_error) for a in seen)


def test_the_forward_is_left_after_the_last_wanted_layer() -> None:
    model, ran = vit(depth=4), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    recorder = AttentionRecorder(model, layers=[0, 1])
    for _ in range(5):  # twice all is asked again, as the hooks' list is another, and twice places are checked
        recorder(IMAGES)
    ran.clear()
    recorder(IMAGES)
    assert "blocks.0.attn" in ran
    assert not [n for n in ran if n.startswith(("blocks.2", "blocks.3")) or n in ("norm", "head")]


def test_verification_happens_always_or_first_and_after_changes() -> None:
    model = vit(dynamic_img_size=True)
    recorder, always, never = (AttentionRecorder(model, verify=v) for v in ("first", True, False))

    def checked(r: AttentionRecorder, images: Tensor) -> bool:
        return not math.isnan(r(images)[0].verified_error)

    assert [checked(recorder, IMAGES) for _ in range(2)] == [True, False]
    assert [checked(recorder, IMAGES.mT) for _ in range(2)] == [True, False]
    model.blocks[0].attn = timm_vit("vit_tiny_patch16_224").blocks[0].attn
    assert checked(recorder, IMAGES.mT)
    assert [checked(always, IMAGES) for _ in range(2)] == [True, True]
    assert [checked(never, IMAGES) for _ in range(2)] == [False, False]
    with pytest.raises(ValueError, match="verify='sometimes'"):
        AttentionRecorder(model, verify="sometimes")


def test_rows_that_are_not_finite_can_be_kept() -> None:
    model = vit()
    recorder = AttentionRecorder(model, nonfinite="keep")
    recorder(IMAGES)
    nn.init.constant_(model.blocks[1].attn.qkv.bias, float("nan"))
    assert recorder(IMAGES)[0].rows.isnan().all()


@pytest.mark.slow
@since_torch(2, 6, "torch.distributed.fsdp holds FSDP2")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
def test_sharded_model_runs_to_its_end(tmp_path: Path) -> None:
    """FSDP2 gathers weights before each block and frees them after: leaving half-way would leave them gathered."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = vit()
    expected = attention_matrices(model, IMAGES, default_forward)[-1][:, :, 0]
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh, ended = init_device_mesh("cpu", (1,)), []
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.norm.register_forward_hook(lambda *_: ended.append(True))
        recorder = AttentionRecorder(model, layers=0)
        for _ in range(2):
            ended.clear()
            recorder(IMAGES)
            assert ended
        (attention,) = record_attention(model, IMAGES)
        assert float((attention.rows - expected).abs().amax()) * 25 <= 1e-3
        model(IMAGES).sum().backward()
        assert all(type(p.grad).__name__ == "DTensor" for p in model.parameters() if p.grad is not None)
    finally:
        dist.destroy_process_group()


def test_talking_heads_keep_their_mark_in_every_recording() -> None:
    model = enliven(timm_model("cait_xxs24_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=4)).eval()
    recorder = AttentionRecorder(model, layers=0, query="mean", verify=False)
    for _ in range(2):
        (attention,) = recorder(IMAGES[..., :32])
        assert attention.mixed
        assert attention.kind == "signed"
        assert not torch.allclose(attention.rows.sum(-1), torch.ones(2, 4), atol=0.1)
