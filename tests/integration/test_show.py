"""`attn-monitor show`: single pictures, whole matrices, outlier patches, sizes and devices."""

from __future__ import annotations

import itertools
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from attn_monitor import DrawingOptions
from attn_monitor import functional as F
from attn_monitor.attention import LayerAttention
from attn_monitor.attention_snapshot import AttentionSnapshot
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import record_attention
from attn_monitor.commands import cli
from attn_monitor.commands.check import check
from attn_monitor.commands.show import show as run_show
from attn_monitor.commands.support.devices import DeviceError, choose_device, fitting_size, move_to, with_memory_for
from attn_monitor.commands.support.matrices import save_matrices
from attn_monitor.commands.support.outliers import find_outliers
from attn_monitor.draw.canvas import BACKGROUND, MASK, TEXT
from attn_monitor.draw.hatching import hatch
from attn_monitor.errors import HeadError, NonFiniteAttentionError, ProbeError
from attn_monitor.measure.outliers import outliers_by_attention, outliers_by_norm, without_patches
from attn_monitor.probe.probe_batch import ProbeBatch
from tests.integration.test_capture import Watch, vit
from tests.support.helpers import tiny_vit
from tests.support.oracle import attention_matrices
from tests.support.zoo import enliven

PLANTED = (5, 14)  # patches of the 4 × 6 grid of images of 32 × 48


@torch.no_grad()
def lively() -> nn.Module:
    torch.manual_seed(0)
    return enliven(tiny_vit()).eval()


def planted() -> nn.Module:
    """A ViT that makes two of its patches large before its last block, as trained ones make artefacts."""
    model, large = lively(), 60 * torch.randn(32, generator=torch.Generator().manual_seed(2))

    def enlarge(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        tokens = args[0].clone()
        tokens[:, [1 + patch for patch in PLANTED]] += large
        return (tokens,)

    model.blocks[1].register_forward_pre_hook(enlarge)
    return model


class Attracting(nn.Module):
    """One attention layer in no list of blocks, so that its tokens' norms are unknown; two keys attract all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 32))
        self.qkv, self.attracts = nn.Linear(32, 96), nn.Parameter(torch.randn(4, 1, 8))

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.cat([self.cls.expand(len(images), -1, -1), self.patches(images).flatten(2).mT], 1)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        at = torch.zeros(tokens.shape[1], 1)
        at[[1 + patch for patch in PLANTED if patch < len(at) - 1]] = 1.5
        out = nn.functional.scaled_dot_product_attention(q + self.attracts, k + at * self.attracts, v)
        return out.transpose(1, 2).flatten(2)


@torch.no_grad()
def attracting() -> nn.Module:
    torch.manual_seed(0)
    return Attracting().eval()


def show(out: Path, images: Path, model: str = "lively", **settings: Any) -> set[str]:
    """The files that the command writes."""
    run_show(
        f"tests.integration.test_show:{model}",
        str(images),
        out=str(out),
        **{"size": (32, 48), "weights": False, **settings},
    )
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def masks_as_dino(attentions: Tensor, threshold: float) -> Tensor:
    """The rule of DINO's visualize_attention.py for (heads, patches), written anew from its description."""
    masks = torch.zeros(attentions.shape, dtype=torch.bool)
    for head, weights in enumerate((attentions / attentions.sum(1, keepdim=True)).tolist()):
        below = 0.0
        for patch in sorted(range(len(weights)), key=weights.__getitem__):
            below += weights[patch]
            masks[head, patch] = below > 1 - threshold
    return masks


SINGLE = {"heatmap.png", "overlay.png", "mask_th0.6_mean.png"} | {
    f"{kind}{head}.png" for kind in ("attn-head", "mask_th0.6_head") for head in range(4)
}


def test_single_pictures_of_one_image(tmp_path: Path, photographs: Path) -> None:
    files = show(tmp_path, photographs / "coffee.png", separate=True)
    assert files == SINGLE | {"img.png", "coffee-layer1.png", "attention.npz", "probe.npz"}
    assert {pixels(tmp_path / name).shape for name in SINGLE | {"img.png"}} == {(32, 48, 3)}


def test_single_pictures_of_several_images_and_layers(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = show(tmp_path, photographs, separate=True, layers="all", num_images=2, drawing=DrawingOptions(heads="mean"))
    mean = {name for name in SINGLE if "head" not in name}
    assert files == {"attention.npz", "probe.npz"} | {
        path
        for name in ("astronaut", "rocket")
        for path in (
            *(f"{name}-layer{layer}.png" for layer in (0, 1)),
            f"{name}/img.png",
            *(f"{name}/layer{layer}/{picture}" for layer in (0, 1) for picture in mean),
        )
    }
    printed = capsys.readouterr().out.splitlines()
    assert {line for line in printed if line.startswith(str(tmp_path))} == {str(tmp_path / file) for file in files}


@pytest.mark.parametrize("threshold", [0.6, 0.25])
def test_masks_and_maps_are_those_of_dino(tmp_path: Path, photographs: Path, threshold: float) -> None:
    """Its look is `--scale minmax --colormap viridis`, its pictures are made by matplotlib."""
    from matplotlib import colormaps

    coffee = photographs / "coffee.png"
    show(tmp_path, coffee, separate=True, drawing=DrawingOptions(threshold, scale="minmax", colormap="viridis"))
    probe = ProbeBatch.from_folder(coffee, size=(32, 48))
    (attention,) = record_attention(lively(), probe.images)
    photo = pixels(tmp_path / "img.png")
    assert (photo == probe.pixels[0]).all()
    masks = masks_as_dino(attention.maps[0].flatten(1), threshold).view(4, 4, 6).numpy()
    for head, (weights, mask) in enumerate(zip(attention.maps[0].numpy(), masks, strict=True)):
        drawn = pixels(tmp_path / f"mask_th{threshold}_head{head}.png")[4::8, 4::8]  # centres of patches
        assert (drawn == np.where(mask[..., None], photo[4::8, 4::8], photo[4::8, 4::8] // 4)).all()
        level = (weights - weights.min()) / (weights.max() - weights.min())
        expected = colormaps["viridis"](level.repeat(8, 0).repeat(8, 1))[..., :3] * 255
        assert np.abs(pixels(tmp_path / f"attn-head{head}.png") - expected).max() <= 4
    assert 0 < masks.mean() < threshold


def test_patches_that_are_no_whole_pixels() -> None:
    from attn_monitor.draw.single import PixelPictures

    photo, weights = np.full((30, 31, 3), 200, np.uint8), np.eye(4, 6, dtype=np.float32)
    drawing = PixelPictures(photo, (4, 6), DrawingOptions())
    for picture in (drawing.heat_map(weights), drawing.heat_map_over(weights)):
        assert picture.shape == (30, 31, 3)
        assert picture[2, 2].sum() > picture[2, 29].sum()
    assert (drawing.masked(weights > 0)[28, 1] == 50).all()
    assert (drawing.masked(weights > 0)[3, 2] == 200).all()


@pytest.mark.parametrize(("heads", "drawn"), [("all", {0, 1, 2, 3}), ("mean", set()), (2, {2}), ([0, 3], {0, 3})])
def test_heads(tmp_path: Path, photographs: Path, heads: Any, drawn: set[int]) -> None:
    files = show(tmp_path, photographs / "coffee.png", drawing=DrawingOptions(heads=heads), separate=True)
    assert {file for file in files if "attn-head" in file} == {f"attn-head{head}.png" for head in drawn}
    assert pixels(tmp_path / "heatmap.png").std() > 1
    panel = tmp_path / "coffee-layer1.png"
    show(tmp_path / "all", photographs / "coffee.png")
    assert (panel.read_bytes() == (tmp_path / "all" / "coffee-layer1.png").read_bytes()) == (len(drawn) == 4)


@pytest.mark.parametrize(
    ("heads", "text"), [("median", 'expected "all", "mean"'), ([-1], "different numbers from 0"), (4, "heads 0 to 3")]
)
def test_heads_that_are_not_there(tmp_path: Path, photographs: Path, heads: Any, text: str) -> None:
    with pytest.raises((ValueError, HeadError), match=text):
        show(tmp_path, photographs / "coffee.png", drawing=DrawingOptions(heads=heads))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
def test_matrices_against_float64_and_values(tmp_path: Path, fused: bool) -> None:
    """More tokens than pass at a time; each row times V is what the model's projection gets."""
    model, images = vit(fused=fused, img_size=(80, 72), depth=2), torch.randn(2, 3, 80, 72)
    paths = save_matrices(model, images, tmp_path, layers="all", names=["a", "b"])
    assert [path.name for path in paths] == [f"{name}-layer{layer}.npy" for name in "ab" for layer in (0, 1)]
    truth = attention_matrices(model, images, default_forward)
    entering: dict[str, Tensor] = {}
    attention: Any = model.blocks[1].attn  # type: ignore[index,union-attr]
    attention.qkv.register_forward_hook(lambda m, args, out: entering.update(qkv=out))
    attention.proj.register_forward_pre_hook(lambda m, args: entering.update(out=args[0]))
    with torch.no_grad():
        model(images)
    heads = attention.num_heads
    values = entering["qkv"].unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2)
    for (image, name), layer in itertools.product(enumerate("ab"), (0, 1)):
        matrix = np.load(tmp_path / f"{name}-layer{layer}.npy", allow_pickle=False)
        assert (matrix.shape, matrix.dtype) == ((heads, 91, 91), np.float32)
        assert np.abs(matrix - truth[layer][image].numpy()).max() * 91 < 1e-3
    out = (torch.from_numpy(matrix) @ values[1]).transpose(0, 1).flatten(1)
    assert torch.allclose(out, entering["out"][1], atol=1e-5)
    (row,) = record_attention(model, images)
    assert np.allclose(matrix[:, 0], row.rows[1].numpy(), atol=1e-6)


class Shuffled(nn.Module):
    """Attention over patches in column order, before CLS: rows and columns of the file stand in the usual order."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.qkv = nn.Linear(8, 24)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).mT.flatten(2).mT
        tokens = torch.cat([patches, self.cls.expand(len(images), -1, -1)], 1)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(*(x[:, None] for x in (q, k, v)))


def test_matrices_stand_in_the_order_of_patches(tmp_path: Path) -> None:
    model, images = Shuffled().eval(), torch.randn(1, 3, 16, 24)
    (path,) = save_matrices(model, images, tmp_path)
    (truth,) = attention_matrices(model, images, default_forward)
    order = [6, *(column * 2 + row for row in range(2) for column in range(3))]
    assert np.allclose(np.load(path), truth[0][:, order][:, :, order], atol=1e-5)


def test_matrices_take_memory_linear_in_tokens(tmp_path: Path) -> None:
    """1025 tokens, whose matrix has four million entries of four heads; nothing of a quarter of one head is made."""
    model, images = vit(img_size=128, patch_size=4, depth=1), torch.randn(1, 3, 128, 128)
    record_attention(model, images)  # what is discovered stays known
    tracemalloc.start()
    try:
        with Watch() as watch:
            (path,) = save_matrices(model, images, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]  # NumPy's arrays among it
    finally:
        tracemalloc.stop()
    heads = np.load(path, mmap_mode="r").shape[0]
    assert path.stat().st_size == 128 + heads * 1025**2 * 4
    assert watch.largest <= max(heads * 64 * 1025, 12 * 1025 * 192)
    assert peak < 4 * 1025**2


def test_matrices_that_are_not_what_the_model_computed_are_not_kept(tmp_path: Path) -> None:
    model, images = lively(), torch.randn(1, 3, 32, 32)
    record_attention(model, images)  # its layers are known, so that the file has been written when the error is seen
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight.fill_(torch.nan)  # type: ignore[index,union-attr]
    with pytest.raises(NonFiniteAttentionError):
        save_matrices(model, images, tmp_path)
    assert not list(tmp_path.iterdir())


def test_raw_writes_matrices_beside_the_pictures(tmp_path: Path, photographs: Path) -> None:
    files = show(tmp_path, photographs / "coffee.png", raw=True, layers="all", query=(1, 2))
    assert {"coffee-layer0.npy", "coffee-layer1.npy"} < files
    assert np.load(tmp_path / "coffee-layer1.npy").shape == (4, 25, 25)


def test_outliers_by_norm(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coffee = photographs / "coffee.png"
    show(tmp_path / "kept", coffee, "planted", separate=True)
    capsys.readouterr()
    show(tmp_path / "dropped", coffee, "planted", separate=True, drop_artifacts=True, raw=True)
    printed = capsys.readouterr().out
    for row, column in ((0, 5), (2, 2)):
        assert f"coffee, layer 1: patch ({row}, {column}): token norm " in printed
    assert printed.count("times the median") == 2
    assert "attention.npz, matrices and metrics hold the model's own numbers" in printed
    kept, dropped = (AttentionSnapshot.load(tmp_path / name / "attention.npz") for name in ("kept", "dropped"))
    assert torch.equal(kept.rows("backbone"), dropped.rows("backbone"))
    assert kept.metrics == dropped.metrics
    before, after = (pixels(tmp_path / name / "heatmap.png").copy() for name in ("kept", "dropped"))
    for row, column in ((0, 5), (2, 2)):
        colours = {tuple(colour) for colour in after[8 * row :, 8 * column :][:8, :8].reshape(-1, 3)}
        assert colours == {BACKGROUND, TEXT}
        assert len({tuple(colour) for colour in before[8 * row :, 8 * column :][:8, :8].reshape(-1, 3)}) == 1
        before[8 * row :, 8 * column :][:8, :8] = after[8 * row :, 8 * column :][:8, :8] = 0
    assert (after >= before)[..., 0].all(), "the rest is scaled up: more red the more attention"
    assert (after > before).mean() > 0.1


def test_outliers_by_attention_where_norms_are_unknown(
    capsys: pytest.CaptureFixture[str], photographs: Path, tmp_path: Path
) -> None:
    model, images = attracting(), ProbeBatch.from_folder(photographs, size=(32, 48)).images
    assert all(a.norms is None for a in record_attention(model, images))
    found = find_outliers(model, images, [0], "cls")[0]
    assert found.quantity == "attention received"
    for image in found.patches:
        assert image.flatten().nonzero().flatten().tolist() == list(PLANTED)
    show(tmp_path, photographs / "coffee.png", "attracting", drop_artifacts=True)
    assert "coffee, layer 0: patch (2, 2): attention received " in capsys.readouterr().out


def layer_of(rows: Tensor, norms: Tensor | None = None) -> LayerAttention:
    return LayerAttention(0, "attn", rows, 0, (10, 10), False, 0.0, norms=norms)


def test_which_patches_are_outliers() -> None:
    """Far by the image's own spread and by a factor of two: neither alone makes an outlier."""
    narrow, wide = 10 + 0.1 * torch.randn(100), torch.linspace(1, 20, 100)
    far, near, largest, one_head = narrow.clone(), narrow.clone(), wide.clone(), torch.full((4, 100), 0.01)
    far[42], near[42], largest[42], one_head[0, 42] = 21, 19, 25, 0.2
    found = outliers_by_norm(layer_of(torch.rand(3, 1, 100), torch.stack([far, near, largest])))
    assert found is not None
    assert found.patches.nonzero().tolist() == [[0, 4, 2]]
    (reason,) = found.reasons(0)
    assert reason == "patch (4, 2): token norm 2.1 times the median"
    received = layer_of(torch.stack([one_head, one_head.clamp_max(0.015)]) * torch.exp(0.1 * torch.randn(100)))
    assert outliers_by_attention(received).patches.nonzero().tolist() == [[0, 4, 2]], "the mean over heads"


def test_ordinary_patches_are_no_outliers(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(tmp_path, photographs, drop_artifacts=True, layers="all")
    printed = capsys.readouterr().out
    assert [line.strip() for line in printed.splitlines() if "none, by" in line] == [
        "layer 0: none, by their token norm",
        "layer 1: none, by their token norm",
    ]


def test_attention_without_patches_is_a_softmax_without_them() -> None:
    scores = torch.randn(2, 3, 7)
    (attention,) = record_attention(lively(), torch.randn(2, 3, 16, 24))
    attention = attention.with_tensors({"rows": scores.softmax(-1)})
    patches = torch.zeros(2, 2, 3, dtype=torch.bool)
    patches[0, 0, 1] = patches[1, 1, 2] = True
    scores[0, :, 2] = scores[1, :, 6] = -torch.inf
    assert torch.allclose(without_patches(attention, patches).rows, scores.softmax(-1))
    assert outliers_by_norm(attention) is None
    nan = attention.with_tensors({"rows": torch.full_like(attention.rows, torch.nan)})
    assert not outliers_by_attention(nan).patches.any()
    assert (F.normalise(without_patches(nan, patches).rows).isnan() | (without_patches(nan, patches).rows == 0)).all()


def test_hatching_covers_patches_and_nothing_else() -> None:
    pictures = np.full((2, 16, 24, 3), 77, np.uint8)
    patches = np.array([[True, False, False], [False, False, True]])
    hatch(pictures, patches.repeat(8, 0).repeat(8, 1), 8)
    assert ((pictures == 77).all(-1).sum((1, 2)) == 4 * 64).all()
    assert {tuple(c) for c in pictures[:, :8, :8].reshape(-1, 3)} == {BACKGROUND, TEXT}


def test_size_is_cropped_to_whole_patches(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show(tmp_path, photographs / "coffee.png", size=(39, 48), separate=True)
    assert pixels(tmp_path / "img.png").shape == (32, 48, 3)
    assert "size 39 × 48 is cropped to 32 × 48, a multiple of the patch (8 × 8)" in capsys.readouterr().err
    assert fitting_size(nn.Linear(3, 3), 39) == (39, 39)
    assert fitting_size(nn.Conv2d(3, 8, 7, 2), 39) == (39, 39)
    with pytest.raises(ValueError, match=r"size=9: expected at least one patch, 16 × 16 pixels"):
        fitting_size(nn.Conv2d(3, 8, 16, 16), 9)
    assert capsys.readouterr().err == ""
    check("tests.integration.test_show:lively", size=39)
    assert "images of 32 × 32" in capsys.readouterr().out


def fragile() -> nn.Module:
    """Has room for three images of a probe's four."""
    model = lively()

    def fill(_: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model.register_forward_pre_hook(fill)
    return model


def full() -> nn.Module:
    def fill(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    model = lively()
    model.register_forward_pre_hook(fill)
    return model


def test_fewer_images_at_a_time(tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path / "a", photographs, "fragile")
    assert "memory ran out with all 4 images: took 2 at a time" in capsys.readouterr().err
    show(tmp_path / "b", photographs)
    assert "memory" not in capsys.readouterr().err
    a, b = (AttentionSnapshot.load(tmp_path / name / "attention.npz").rows("backbone") for name in "ab")
    assert torch.allclose(a, b, atol=1e-3)
    with pytest.raises(DeviceError, match="memory ran out on the CPU"):
        show(tmp_path / "c", photographs, "full")


class Elsewhere(nn.Module):
    """Stands for a model on a small GPU: its weight is on another device, where nothing has room."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, device="meta"))

    def to(self, device: Any) -> Elsewhere:  # type: ignore[override]
        if torch.device(device).type != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.weight = nn.Parameter(torch.ones(3))
        return self

    def forward(self) -> float:
        if self.weight.is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return float(self.weight.detach().sum())


def test_on_the_cpu_when_memory_runs_out(capsys: pytest.CaptureFixture[str]) -> None:
    model = Elsewhere()
    assert with_memory_for(model, model) == 3
    assert capsys.readouterr().err.startswith("memory ran out on meta, even with one image at a time: going on, on")
    move_to(torch.device("cuda"), model)
    assert capsys.readouterr().err == "the model has no room on cuda: going on, on the CPU\n"
    with pytest.raises(ZeroDivisionError):
        with_memory_for(lambda: 1 / 0, model)


def test_devices() -> None:
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:99", "hpu"):
        with pytest.raises(DeviceError, match=rf"device='{name}': .*Expected one such as cpu or cuda:0"):
            choose_device(name)


def test_names_that_lead_elsewhere(tmp_path: Path, photographs: Path) -> None:
    """Images called `..` and `.`: nothing is written outside the folder, nor over each other."""
    for name in ("...png", "..png", "._.png", "a.png"):
        shutil.copy(photographs / "coffee.png", tmp_path / name)
    (tmp_path / "images").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "images" / path.name)
    out = tmp_path / "work" / "out"
    files = show(out, tmp_path / "images", separate=True, raw=True)
    assert len([file for file in files if file.endswith("img.png")]) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"images", "work"}
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["out"]
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_wrong_sizes_and_numbers_are_not_the_images_fault(tmp_path: Path, photographs: Path) -> None:
    for size in (-64, 0, (32, -1)):
        with pytest.raises(ValueError, match=rf"^size={re.escape(str(size))}: expected pixels of at least"):
            show(tmp_path, photographs / "coffee.png", size=size)
    with pytest.raises(ValueError, match=r"^num_images=0: expected at least 1"):
        show(tmp_path, photographs / "coffee.png", num_images=0)


def test_what_an_earlier_call_has_left_is_told(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = photographs / "coffee.png"
    show(tmp_path, image, separate=True, drawing=DrawingOptions(0.6))
    (tmp_path / "notes.txt").write_text("of another kind")
    show(tmp_path, image, separate=True, drawing=DrawingOptions(0.6))
    assert capsys.readouterr().err == ""
    show(tmp_path, image, separate=True, drawing=DrawingOptions(0.7))
    assert f"{tmp_path} also holds 5 files that are not of this call, such as mask_th0.6_" in capsys.readouterr().err


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(ValueError, match=r"cannot read x\.png"):
        show(tmp_path / "out", tmp_path / "x.png")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    with pytest.raises(OSError, match="is a file"):
        show(tmp_path / "file", tmp_path / "x.png", separate=True, raw=True)


def test_an_unreadable_image_among_others_is_left_out_and_named(tmp_path: Path, photographs: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(photographs, folder)
    (folder / "aaa.png").write_text("no image")
    with pytest.raises(ProbeError, match=r"^1 image is left out that cannot be read: aaa\.png \("):
        show(tmp_path / "out", folder)
    shown = ProbeBatch.load(tmp_path / "out" / "probe.npz")
    assert shown.names == tuple(sorted(path.stem for path in photographs.iterdir()))


def test_as_a_user_types_it(
    tmp_path: Path, photographs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dashes, switches without a value, and the beginnings of names."""
    model = "tests.integration.test_show:planted"
    words = f"attn-monitor show {model} {photographs}/coffee.png --out {tmp_path}/o --weights false"
    wanted = "--separate --raw --drop-artifacts --head mean --layer all --size [32,48] --colormap viridis --device cpu"
    monkeypatch.setattr("sys.argv", [*words.split(), *wanted.split()])
    cli.main()
    printed = capsys.readouterr()
    assert f"{tmp_path}/o/layer1/overlay.png\n" in printed.out
    assert f"{tmp_path}/o/coffee-layer0.npy\n" in printed.out
    assert "patch (0, 5): token norm" in printed.out
    assert printed.err == ""


def test_outlines_of_masks(tmp_path: Path, photographs: Path) -> None:
    show(tmp_path, photographs / "coffee.png", separate=True)
    assert (pixels(tmp_path / "mask_th0.6_mean.png") == MASK).all(-1).any()
