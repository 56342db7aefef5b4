"""What only a GPU can show: `make test-gpu`, or `pytest -m gpu`; skipped where there is none.

On the CPU, kernels are read under their names and with a float64 inside: `tests/hostile/test_gpu_kernels.py`.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_monitor import Watch, load_snapshots
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from tests.support.helpers import tiny_vit
from tests.support.zoo import enliven

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HEADS, WIDTH, PATCH, STEPS = 4, 128, 8, 6
Way = Callable[[Tensor, Tensor, Tensor], Tensor]
HALF = (torch.float16, torch.bfloat16)
UNITS = {torch.float32: 2e-2, torch.float16: 5e-2, torch.bfloat16: 0.3}  # of uniform attention; products run in TF32


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Attention(nn.Module):
    """Of any kernel that takes and gives (B, N, H, D); keeps q and k of the latest call."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.qkv, self.proj, self.way = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), way

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        out: Tensor = self.proj(self.way(q, k, v).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), Attention(way), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    def __init__(self, *ways: Way) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 24, WIDTH))
        self.blocks = nn.ModuleList(Block(way) for way in ways)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def of_backend(backend: SDPBackend) -> Way:
    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return way


def lengths(q: Tensor) -> Tensor:
    return torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * q.shape[1]


def packed(call: Callable[..., Tensor]) -> Way:
    def way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cu, count = lengths(q), q.shape[1]
        out = call(*(t.flatten(0, 1).contiguous() for t in (q, k, v)), cu, cu, count, count)
        return out.unflatten(0, q.shape[:2])

    return way


def flash_attn(name: str) -> Any:
    return getattr(pytest.importorskip("flash_attn"), name)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = pytest.importorskip("flash_attn_interface").flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # the first releases returned statistics too


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = pytest.importorskip("flash_attn.cute").flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def xformers(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out: Tensor = pytest.importorskip("xformers.ops").memory_efficient_attention(q, k, v, **options)
    return out


def xformers_block_diagonal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As DINOv2 runs its crops."""
    fmha = pytest.importorskip("xformers.ops.fmha")
    bias = fmha.BlockDiagonalMask.from_seqlens([q.shape[1]] * len(q))
    out = xformers(*(t.flatten(0, 1)[None].contiguous() for t in (q, k, v)), attn_bias=bias)
    return out[0].unflatten(0, q.shape[:2])


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return packed(pytest.importorskip("torch.nn.attention.varlen").varlen_attn)(q, k, v)


WAYS: dict[str, tuple[Way, tuple[torch.dtype, ...]]] = {
    "SDPA, math": (of_backend(SDPBackend.MATH), (torch.float32,)),
    "SDPA, efficient": (of_backend(SDPBackend.EFFICIENT_ATTENTION), (torch.float32, *HALF)),
    "SDPA, flash": (of_backend(SDPBackend.FLASH_ATTENTION), HALF),
    "SDPA, cuDNN": (of_backend(SDPBackend.CUDNN_ATTENTION), HALF),
    "torch varlen": (varlen, HALF),
    "flash-attn 2": (lambda q, k, v: flash_attn("flash_attn_func")(q, k, v), HALF),
    "flash-attn 2, qkv": (
        lambda q, k, v: flash_attn("flash_attn_qkvpacked_func")(torch.stack([q, k, v], 2)),
        HALF,
    ),
    "flash-attn 2, packed": (
        lambda q, k, v: packed(flash_attn("flash_attn_varlen_func"))(q, k, v),
        HALF,
    ),
    "flash-attn 2, softcap": (lambda q, k, v: flash_attn("flash_attn_func")(q, k, v, softcap=5.0), HALF),
    "flash-attn 3": (flash_attn_3, HALF),
    "flash-attn 4": (flash_attn_4, HALF),
    "xFormers": (xformers, (torch.float32, *HALF)),
    "xFormers, block-diagonal": (xformers_block_diagonal, (torch.float32, *HALF)),
}
CASES = [(name, dtype) for name, (_, dtypes) in WAYS.items() for dtype in dtypes]


def images(dtype: torch.dtype = torch.float32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)


def rows_in_float64(model: nn.Module, x: Tensor, layer: int, softcap: float = 0.0) -> Tensor:
    """(B, H, N) of CLS, from what enters the attention on the GPU."""
    entered: list[Tensor] = []
    with model.blocks[layer].attn.register_forward_pre_hook(lambda _, args: entered.append(args[0])), torch.no_grad():
        model(x)
    q, k, _ = model.blocks[layer].attn.qkv(entered[0]).detach().double().unflatten(-1, (3, HEADS, -1)).unbind(2)
    scores = torch.einsum("bhd,bkhd->bhk", q[:, 0], k) * q.shape[-1] ** -0.5
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    return scores.softmax(-1)


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=[f"{name}, {dtype}" for name, dtype in CASES])
def test_kernel_is_read(name: str, dtype: torch.dtype) -> None:
    """Alone and after SDPA, in the layer that it is."""
    way = WAYS[name][0]
    torch.manual_seed(3)
    model = enliven(ViT(sdpa, way)).eval().to("cuda", dtype)
    with torch.no_grad():
        try:
            model(images(dtype))
        except RuntimeError as error:
            pytest.skip(f"the kernel does not run on this device: {error}")
    truth = rows_in_float64(model, images(dtype), 1, 5.0 if "softcap" in name else 0.0)
    (seen,) = record_attention(model, images(dtype))
    assert seen.layer == 1
    assert seen.rows.device.type == "cuda"
    assert float((seen.rows.double() - truth).abs().max()) * truth.shape[-1] < UNITS[dtype]
    assert float(truth.max()) * truth.shape[-1] > 1.2, "a uniform row would show nothing"


def trained(precision: str, folder: Path | None = None, mode: str = "") -> dict[str, Tensor]:
    """Weights, losses and random states after a few steps of a plain loop; watched at every step if there is a folder.

    Args:
        precision: "float32", or a type for autocast, float16 with a GradScaler.
        folder: Where snapshots go.
        mode: That of `torch.compile`; "" leaves the model as it is.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    model = tiny_vit(drop_path_rate=0.2, proj_drop_rate=0.2).cuda()
    run = torch.compile(model, mode=mode) if mode else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "float16")
    probe = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    watch = None if folder is None else Watch(model, probe, folder=folder, every_n_train_steps=1, on_error="raise")
    losses = []
    for step in range(STEPS):
        if watch is not None:
            watch.step(step)
        with torch.autocast("cuda", getattr(torch, precision), enabled=precision != "float32"):
            loss = run(torch.randn(4, 3, 32, 32, device="cuda")).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach().float().clone())
    if watch is not None:
        watch.close(STEPS)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {**weights, "losses": torch.stack(losses), "host": torch.get_rng_state(), "gpu": torch.cuda.get_rng_state()}


@pytest.mark.parametrize(
    ("precision", "mode"),
    [("float32", ""), ("bfloat16", ""), ("float16", ""), ("float32", "default"), ("bfloat16", "reduce-overhead")],
)
def test_training_is_bit_identical(tmp_path: Path, precision: str, mode: str) -> None:
    """The mode "reduce-overhead" replays CUDA graphs."""
    plain = trained(precision, mode=mode)
    again = trained(precision, mode=mode)
    if not all(torch.equal(plain[name], again[name]) for name in plain):
        pytest.skip("two runs without the monitor differ on this device")
    watched = trained(precision, tmp_path, mode)
    assert [name for name in plain if not torch.equal(plain[name], watched[name])] == []
    assert len(load_snapshots(tmp_path / "attn_monitor")) == STEPS + 1


def test_monitor_stays_out_of_a_graph_that_is_captured(tmp_path: Path) -> None:
    """A whole step captured by hand, with the monitor between its replays."""
    torch.manual_seed(0)
    model, x = tiny_vit().cuda(), torch.randn(4, 3, 32, 32, device="cuda")
    watch = Watch(model, x[:2].cpu(), folder=tmp_path, every_n_train_steps=1, on_error="raise")
    watch.step(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(x).square().mean()
        loss.backward()
    seen = []
    for step in range(1, 4):
        graph.replay()
        seen.append(float(loss))
        watch.step(step)
    watch.close(4)
    assert seen[0] == seen[1] == seen[2]
    assert len(load_snapshots(tmp_path / "attn_monitor")) == 5


@pytest.mark.parametrize("layers", [-1, "all"])
def test_peak_memory(layers: Any) -> None:
    """A recording takes what a forward takes, and no matrix: 12 layers of 6 × 3601² numbers would be 3.7 GB."""
    model = timm.create_model("vit_small_patch16_224", img_size=960, num_classes=0).cuda().eval()
    x = torch.randn(1, 3, 960, 960, device="cuda")
    recorder = AttentionRecorder(model, layers=layers)
    recorder(x)

    def peak(function: Callable[[], Any]) -> int:
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    with torch.no_grad():
        plain = peak(lambda: model(x))
    recorded = peak(lambda: recorder(x))
    print(f"layers={layers}: forward {plain / 2**20:.0f} MB, recording {recorded / 2**20:.0f} MB")
    assert recorded < 1.5 * plain + 64 * 2**20


def test_recording_waits_for_the_device_once() -> None:
    """`torch.cuda.set_sync_debug_mode` counts what a CPU cannot."""
    recorder = AttentionRecorder(enliven(ViT(sdpa, sdpa)).eval().cuda(), layers="all", follow=False)
    recorder(images())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recorder(images())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) <= 1, waits


def test_model_on_the_default_device() -> None:
    """After ``torch.set_default_device("cuda")``, what is made on the host stays there."""
    torch.manual_seed(3)
    model = enliven(ViT(sdpa, sdpa)).eval().cuda()
    (expected,) = record_attention(model, images())
    other = copy.deepcopy(model)
    with torch.device("cuda"):
        (seen,) = record_attention(other, images())
    assert torch.equal(seen.rows, expected.rows)
