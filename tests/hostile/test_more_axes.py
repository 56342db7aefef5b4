"""Clips, volumes, spectrograms, signals: each weight at its place in a grid of one to three axes, against float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from attn_monitor import AttentionMonitor
from attn_monitor.capture.observe.forward import default_forward
from attn_monitor.capture.recorder import AttentionRecorder, record_attention
from attn_monitor.errors import (
    ArgumentError,
    ForwardError,
    InputTypeError,
    ProbeError,
    QueryError,
    UnsupportedAttentionError,
)
from attn_monitor.grid import GridGeometry
from attn_monitor.image_axes import likely_axes
from attn_monitor.probe.probe_batch import ProbeBatch
from tests.support.more_axes import AnyViT, BandsViT
from tests.support.oracle import attention_matrices
from tests.support.releases import TRANSFORMERS

LIMIT = 1e-3  # of uniform attention
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _libraries_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|vit_pytorch|einops|monai)\..*")
        yield


def videomae() -> nn.Module:
    config = transformers.VideoMAEConfig(image_size=32, patch_size=8, num_frames=6, tubelet_size=2, **WIDTH)
    return transformers.VideoMAEModel(config)


def vjepa2() -> nn.Module:
    if TRANSFORMERS < (5, 0) and not hasattr(transformers, "VJEPA2Model"):
        pytest.skip(f"transformers {transformers.__version__} has no VJEPA2Model")
    small = {"patch_size": 8, "crop_size": 32, "frames_per_clip": 6, "tubelet_size": 2, "mlp_ratio": 2.0}
    predictor = {"pred_hidden_size": 32, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
    return transformers.VJEPA2Model(transformers.VJEPA2Config(**small, **predictor, pred_num_mask_tokens=1, **WIDTH))


def vivit() -> nn.Module:
    return transformers.VivitModel(
        transformers.VivitConfig(image_size=32, num_frames=6, tubelet_size=[2, 8, 8], **WIDTH)
    )


def audio_transformer(length: int = 128, mels: int = 64) -> nn.Module:
    return transformers.ASTModel(transformers.ASTConfig(max_length=length, num_mel_bins=mels, **WIDTH))


def vit_3d() -> nn.Module:
    vit = pytest.importorskip("vit_pytorch.vit_3d").ViT
    return vit(
        image_size=32, image_patch_size=8, frames=6, frame_patch_size=2, num_classes=3, dim=32, depth=2, heads=2,
        mlp_dim=64, dim_head=16,
    )  # fmt: skip


CLIP, FRAMES_FIRST, VOLUME = (2, 3, 6, 32, 32), (2, 6, 3, 32, 32), (2, 1, 12, 16, 24)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], str, int]] = {
    # model, shape of images, grid, names of its axes, tokens before the patches
    "VideoMAE": (videomae, FRAMES_FIRST, (3, 4, 4), "thw", 0),
    "V-JEPA 2": (vjepa2, FRAMES_FIRST, (3, 4, 4), "thw", 0),
    "ViViT": (vivit, FRAMES_FIRST, (3, 4, 4), "thw", 1),
    "vit-pytorch's 3-D ViT": (vit_3d, CLIP, (3, 4, 4), "thw", 1),
    "convolved volume": (lambda: AnyViT(VOLUME[2:], (4, 8, 8), channels=1), VOLUME, (3, 2, 3), "dhw", 1),
    "volume of one token a slice": (lambda: AnyViT((8, 16, 16), (1, 16, 16)), (2, 3, 8, 16, 16), (8, 1, 1), "thw", 1),
    "cut volume": (lambda: AnyViT(VOLUME[2:], (4, 8, 8), channels=1, linear=True), VOLUME, (3, 2, 3), "dhw", 1),
    "signal": (lambda: AnyViT((64,), (4,)), (2, 3, 64), (16,), "t", 1),
    "cut strips": (lambda: AnyViT((100, 4), (4, 4), linear=True), (2, 3, 100, 4), (25, 1), "hw", 1),
    "cut oblongs": (lambda: AnyViT((32, 32), (8, 2), linear=True, cls=False), (2, 3, 32, 32), (4, 16), "hw", 0),
    "cut wide oblongs": (lambda: AnyViT((32, 32), (16, 1), linear=True), (2, 3, 32, 32), (2, 32), "hw", 1),
}


def sharp(model: nn.Module) -> nn.Module:
    """The model with weights that make attention no flat one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15, generator=generator)
    return model.eval()


def images_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def off_by(rows: Tensor, expected: Tensor) -> float:
    """Largest difference in units of uniform attention."""
    assert rows.shape == expected.shape, (rows.shape, expected.shape)
    assert float(expected.amax()) * expected.shape[-1] > 1.2, "a flat reference agrees with anything"
    return float((rows.double() - expected).abs().amax()) * expected.shape[-1]


@pytest.mark.parametrize("name", MODELS)
def test_each_weight_is_at_its_place(name: str) -> None:
    """All of these models have their patches row by row behind the prefix, by their own code."""
    build, shape, grid, axes, prefix = MODELS[name]
    model, images = sharp(build()), images_of(shape)
    matrices = attention_matrices(model, images, default_forward)
    for query in ("mean", (1,) * len(grid) if min(grid) > 1 else (0,) * len(grid)):
        seen = record_attention(model, images, layers="all", query=query)
        for attention, matrix in zip(seen, matrices, strict=False):
            index = 0
            for line, lines in zip(query, grid, strict=False):
                index = index * lines + line if query != "mean" else 0
            row = matrix.mean(2) if query == "mean" else matrix[:, :, prefix + index]
            assert off_by(attention.rows, row) <= LIMIT
            assert (attention.grid, "".join(attention.grid.axes)) == (grid, axes)
            assert attention.maps.shape == (*row.shape[:2], *grid)
            assert attention.num_prefix == prefix
            assert attention.places == "exact"


@pytest.mark.parametrize("linear", [False, True])
def test_tokens_of_a_volume_in_another_order_are_put_back(linear: bool) -> None:
    order = torch.randperm(18, generator=torch.Generator().manual_seed(3))
    model = sharp(AnyViT(VOLUME[2:], (4, 8, 8), channels=1, linear=linear, order=order))
    images = images_of(VOLUME)
    (seen,) = record_attention(model, images)
    matrix = attention_matrices(model, images, default_forward)[-1]
    expected = torch.empty(2, 4, 18, dtype=torch.float64)
    expected[..., order] = matrix[:, :, 0, 1:]  # token n holds cell order[n]
    assert off_by(seen.maps.flatten(2), expected) <= LIMIT


@pytest.mark.parametrize("linear", [False, True])
def test_distance_over_three_axes(linear: bool) -> None:
    """Along each axis it is the mean over queries of the weighted distance of cells' middles, in pixels or slices."""
    model, images = sharp(AnyViT(VOLUME[2:], (4, 8, 8), channels=1, linear=linear)), images_of(VOLUME)
    (seen,) = AttentionRecorder(model, distance=True)(images)
    patches = attention_matrices(model, images, default_forward)[-1][:, :, 1:, 1:]
    patches = patches / patches.sum(-1, keepdim=True)
    middles = torch.cartesian_prod(2 + 4 * torch.arange(3.0), 4 + 8 * torch.arange(2.0), 4 + 8 * torch.arange(3.0))
    apart = (middles[:, None] - middles).abs().double()  # (N, N, axes)
    expected = torch.einsum("bhqk,qka->bha", patches, apart) / 18
    assert seen.distance is not None
    torch.testing.assert_close(seen.distance.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "mels"), [(128, 64), (150, 128)])
def test_an_audio_transformer_as_published(length: int, mels: int) -> None:
    """Patches of 16 × 16 with a stride of 10, which leave out the last samples; the model has frequency first."""
    model, images = sharp(audio_transformer(length, mels)), images_of((2, length, mels))
    (seen,) = record_attention(model, images)
    matrix = attention_matrices(model, images, default_forward)[-1]
    times, bands = (length - 16) // 10 + 1, (mels - 16) // 10 + 1
    expected = matrix[:, :, 0, 2:].unflatten(-1, (bands, times)).mT
    assert seen.grid == (times, bands)
    assert seen.grid.axes == ("t", "f")
    assert off_by(seen.maps.flatten(2), expected.flatten(2)) <= LIMIT
    assert seen.geometry == GridGeometry((3.0, 3.0), (10.0, 10.0))  # the middles of the patches: 8, 18, …
    assert seen.grid.seen((length, mels)) == [(0, 10 * times + 6), (0, 10 * bands + 6)]


def timesformer() -> nn.Module:
    config = transformers.TimesformerConfig(image_size=32, patch_size=8, num_frames=6, **WIDTH)
    return transformers.TimesformerModel(config)


def test_attention_in_frames_and_over_frames() -> None:
    """TimeSformer: layers 0, 2 run over time at each place, 1, 3 in each frame with a CLS token of its own."""
    model, images = sharp(timesformer()), images_of(FRAMES_FIRST)
    over_time, in_frames = attention_matrices(model, images, default_forward)[:2]
    over_time = over_time.unflatten(1, (16, 2))  # (B, places, H, T, T)
    in_frames = in_frames.unflatten(1, (6, 2))  # (B, T, H, 1 + N, 1 + N)

    (frames,) = record_attention(model, images, layers=1)
    own = in_frames[:, :, :, 0] / 6  # each CLS is one of six
    expected = torch.cat([own[..., :1].permute(0, 2, 3, 1).flatten(2), own[..., 1:].transpose(1, 2).flatten(2)], -1)
    assert off_by(frames.rows, expected) <= LIMIT
    assert frames.grid == (6, 4, 4)
    assert frames.prefix_names == tuple(f"CLS {n}" for n in range(6))
    assert frames.kind == "distribution"
    assert frames.verified_error < 1e-5

    (one,) = record_attention(model, images, layers=1, query=(2, 1, 3))
    expected = torch.zeros(2, 2, 6, 16, dtype=torch.float64)
    expected[:, :, 2] = in_frames[:, 2, :, 1 + 7, 1:]
    assert off_by(one.maps.flatten(3).flatten(2), expected.flatten(2)) <= LIMIT

    (time,) = record_attention(model, images, layers=0, query=(2, 1, 3))
    expected = torch.zeros(2, 2, 6, 16, dtype=torch.float64)
    expected[:, :, :, 7] = over_time[:, 7, :, 2]
    assert off_by(time.maps.flatten(3).flatten(2), expected.flatten(2)) <= LIMIT

    (mean,) = record_attention(model, images, layers=0, query="mean")
    expected = over_time.mean(3).permute(0, 2, 3, 1) / 16  # (B, H, T, places)
    assert off_by(mean.maps.flatten(3).flatten(2), expected.flatten(2)) <= LIMIT
    with pytest.raises(QueryError, match="all of them patches"):
        record_attention(model, images, layers=0)


def test_signals_and_spectrograms_by_their_sizes() -> None:
    """A signal has few channels, a spectrogram many bins, unless statistics are of one channel."""
    for shape, axes in (((2, 2, 900), "ct"), ((2, 900, 2), "tc"), ((2, 128, 64), "tf"), ((2, 64, 100), "ft")):
        assert "".join(likely_axes(shape).names) == axes
    few = images_of((2, 3, 64))
    assert ProbeBatch(few, mean=[0.0], std=[1.0]).image_axes.channel is None
    assert ProbeBatch(few, mean=[0.0] * 3, std=[1.0] * 3).image_axes.channel == 0
    assert ProbeBatch(images_of((2, 2, 64)), mean=[0.0] * 2, std=[1.0] * 2).image_axes.channel == 0
    with pytest.raises(ProbeError, match="Pass mean= and std="):
        ProbeBatch(images_of((2, 13, 8, 8)))


def test_each_frame_has_no_curve_for_its_cls_token() -> None:
    probe = ProbeBatch(images_of(FRAMES_FIRST), mean=[0.0] * 3, std=[1.0] * 3, axes="tchw")
    snapshot = AttentionMonitor(probe, layers=[1]).snapshot({"backbone": sharp(timesformer())}, step=0)
    assert {k.metric for k in snapshot.metrics if k.metric.startswith("prefix_mass")} == {"prefix_mass"}


def test_statistics_over_all_sequences() -> None:
    model, images = sharp(timesformer()), images_of(FRAMES_FIRST)
    recorder = AttentionRecorder(model, layers=[1], distance=True, logits=True, sinks=True, every_query="all")
    (seen,) = recorder(images)
    in_frames = attention_matrices(model, images, default_forward)[1].unflatten(1, (6, 2))
    received = in_frames.mean((2, 3)) / 6  # over heads and a frame's queries, of all frames
    expected = torch.cat([received[..., 0], received[..., 1:].flatten(1)], -1)
    assert seen.received is not None
    assert seen.distance is not None
    assert seen.max_logit is not None
    torch.testing.assert_close(seen.received.double(), expected, rtol=1e-4, atol=1e-6)
    middles = torch.cartesian_prod(*[4 + 8 * torch.arange(4.0)] * 2)
    apart = (middles[:, None] - middles).abs().double()
    patches = in_frames[..., 1:, 1:]
    patches = patches / patches.sum(-1, keepdim=True)
    distance = torch.einsum("bthqk,qka->bha", patches, apart) / 6 / 16
    assert bool((seen.distance[..., 0] == 0).all())  # no frame attends to another
    torch.testing.assert_close(seen.distance[..., 1:].double(), distance, rtol=1e-4, atol=1e-4)


class FramesFirst(AnyViT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2))


@pytest.mark.parametrize(("kind", "axes"), [(AnyViT, "cthw"), (FramesFirst, "tchw")])
def test_channels_are_found_in_the_model(kind: type[AnyViT], axes: str) -> None:
    """Of two dimensions of one size, the convolution's input tells which holds the channels."""
    model, given = sharp(kind((3, 16, 16), (1, 8, 8))), images_of((2, 3, 3, 16, 16))
    for named in (axes, None):
        (seen,) = record_attention(model, given, axes=named)
        assert (seen.grid, seen.grid.axes) == ((3, 2, 2), ("t", "h", "w"))
        assert off_by(seen.rows, attention_matrices(model, given, default_forward)[-1][:, :, 0]) <= LIMIT


def test_axes_can_be_named() -> None:
    model = sharp(AnyViT(VOLUME[2:], (4, 8, 8), channels=1))
    (seen,) = record_attention(model, images_of(VOLUME), axes="ctxy")
    assert seen.grid.axes == ("t", "x", "y")
    for axes in ("cdh", "cddw", "c1hw", 5):
        with pytest.raises(ArgumentError, match="expected one letter for each of the 4 dimensions"):
            record_attention(model, images_of(VOLUME), axes=axes)  # type: ignore[arg-type]


def test_images_in_containers() -> None:
    model, images = sharp(AnyViT((16, 16), (8, 8))), images_of((2, 3, 16, 16))
    (expected,) = record_attention(model, images)
    held = transformers.BatchFeature({"pixel_values": images, "labels": torch.zeros(2, dtype=torch.long)})
    for given in (list(images), [images], (images[0], images[1]), {"pixel_values": images}, held):
        (seen,) = record_attention(model, given)  # type: ignore[arg-type]
        torch.testing.assert_close(seen.rows, expected.rows)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (dict.fromkeys("ab", torch.zeros(2, 3, 8, 8)), r'a: \(2, 3, 8, 8\) .*, b: .*batch\["pixel_values"\]'),
        ({"a": 1}, r'batch\["pixel_values"\], and the rest by forward='),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], r"several shapes \(\(3, 8, 8\), \(3, 8, 9\)\)"),
        (torch.zeros(8, 8), r"received \(8, 8\) .*\(batch, channels, height, width\).*images\[None\]"),
        (torch.zeros(1, 1, 1, 1, 8, 8), r"received \(1, 1, 1, 1, 8, 8\) .*forward=lambda"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"images\.float\(\)"),
        (torch.zeros(3, 8, 8), r"received \(3, 8, 8\) .*images\[None\]"),
    ],
)  # fmt: skip
def test_other_inputs_are_refused_with_a_remedy(images: Any, text: str) -> None:
    with pytest.raises(InputTypeError, match=text):
        record_attention(AnyViT((8, 8), (4, 4)), images)


@pytest.mark.parametrize(
    ("build", "shape", "way"),
    [
        (videomae, (2, 3, 6, 32, 32), "images.transpose(1, 2)"),
        (videomae, (6, 3, 32, 32), "images[None]"),
        (audio_transformer, (2, 1, 128, 64), "images[:, 0]"),
        (lambda: AnyViT((8, 8), (4, 4)), (3, 8, 8), "images[None]"),
        (lambda: AnyViT((8, 8), (4, 4), channels=1), (2, 8, 8), "images[:, None]"),
        (lambda: AnyViT((4, 8, 8), (2, 4, 4), channels=1), (2, 4, 8, 8), "images[:, None]"),
        (lambda: AnyViT((8, 8), (4, 4)), (2, 8, 8, 3), "images.movedim(-1, 1)"),
        (lambda: AnyViT((8, 8), (4, 4)), (2, 4, 3, 8, 8), "forward=lambda model, images: model(images.flatten(0, 1))"),
        (videomae, (2, 4, 3, 32, 32), ""),  # too short
    ],
)
def test_the_way_that_is_named_is_one_that_runs(build: Any, shape: tuple[int, ...], way: str) -> None:
    model, images = sharp(build()), images_of(shape)
    with pytest.raises((ForwardError, InputTypeError)) as caught:
        record_attention(model, images, query="mean")
    text = str(caught.value)
    assert str(shape[1:]).lstrip("(") in text  # as it was passed, or how many of these at a time
    assert ("It does run on" in text) == bool(way)
    assert way in text
    if way.startswith("images"):
        record_attention(model, eval(way, {"images": images}), query="mean")
    elif way:
        record_attention(model, images, query="mean", forward=eval(way.removeprefix("forward=")))


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (
            (torch.zeros(2, 3, 8, 8), torch.zeros(2)),
            r"a tuple of \(2, 3, 8, 8\) torch.float32, .*Pass images\[0\] alone",
        ),
        (np.zeros((2, 3, 8, 8)), r"a NumPy array \(2, 3, 8, 8\).*torch\.from_numpy\(images\)\.float\(\)"),
        ([np.zeros((3, 8, 8))], r"torch\.tensor\(numpy\.stack\(images\)\)"),
        ([Image.new("RGB", (8, 8))], r"to_tensor\(image\)"),
        ({"pixel_values": [np.zeros((3, 8, 8))]}, r'pixel_values: a list of .*return_tensors="pt"'),
        ([], "an empty list"),
    ],
)
def test_what_is_no_tensor_is_named_with_what_makes_one(images: Any, text: str) -> None:
    with pytest.raises(InputTypeError, match=text):
        record_attention(AnyViT((8, 8), (4, 4)), images)


def test_more_than_32_channels() -> None:
    model, images = sharp(AnyViT((16, 16), (8, 8), channels=200)), images_of((2, 200, 16, 16))
    (seen,) = record_attention(model, images)
    assert off_by(seen.rows, attention_matrices(model, images, default_forward)[-1][:, :, 0]) <= LIMIT


def test_a_clip_of_another_length_is_found_again() -> None:
    model = sharp(AnyViT((4, 16, 16), (2, 8, 8)))
    recorder = AttentionRecorder(model)
    assert recorder(images_of((2, 3, 4, 16, 16)))[0].grid == (2, 2, 2)
    model.positions = nn.Parameter(torch.randn(1, 1 + 12, 32))
    assert recorder(images_of((2, 3, 6, 16, 16)))[0].grid == (3, 2, 2)


@pytest.mark.parametrize("shape", [CLIP, FRAMES_FIRST, VOLUME, (2, 128, 64), (2, 3, 64), (1, 2, 5, 8, 8)])
def test_a_probe_of_more_axes_is_stored_bit_by_bit(shape: tuple[int, ...], tmp_path: Any) -> None:
    channels = 1 if len(shape) == 3 else min(shape[1], shape[2])
    given = ProbeBatch(images_of(shape), mean=[0.5] * channels, std=[2.0] * channels)
    assert given.pixels.shape[0] == shape[0]
    assert given.pixels.shape[-1] == 3
    given.save(tmp_path / "probe.npz")
    for read in (ProbeBatch.load(tmp_path / "probe.npz"), ProbeBatch.from_state_dict(given.state_dict())):
        assert read.has_same_images_as(given)
        assert read.image_axes == given.image_axes


SATMAE = (0, 1, 2, 6), (3, 4, 5, 7), (8, 9)  # of ten bands


@pytest.mark.parametrize(
    "groups",
    [None, ((0, 1, 2), (3, 4, 5)), ((0, 1), (2, 3), (4, 5)), SATMAE, ((3, 4), (0, 1, 2, 5)), ((0, 1, 2, 3, 4), (5,))],
)
def test_channels_are_an_axis_where_they_have_tokens_of_their_own(groups: Any) -> None:
    """Groups need not be equal, nor in the order of their first channels, in which the axis has them."""
    channels, count = (6, 6) if groups is None else (sum(map(len, groups)), len(groups))
    model, images = sharp(BandsViT(groups, channels)), images_of((2, channels, 16, 24))
    recorder = AttentionRecorder(model)
    (seen,) = recorder(images)
    assert seen.grid == (count, 2, 3)
    assert seen.grid.axes == ("c", "h", "w")
    matrix = attention_matrices(model, images, default_forward)[-1][:, :, 0]
    of_group = matrix[..., 1:].unflatten(-1, (count, 6))[
        :, :, sorted(range(count), key=lambda n: groups[n] if groups else n)
    ]
    assert off_by(seen.rows, torch.cat([matrix[..., :1], of_group.flatten(2)], -1)) <= LIMIT
    assert recorder(images[:1])[0].grid == (count, 2, 3)
    held = "0; 1; 2" if groups is None else "; ".join(", ".join(map(str, group)) for group in sorted(groups))
    assert f"for channels {held}" in "".join(recorder.notes)
    plane = seen.in_plane()
    assert plane.grid == (2, 3)
    torch.testing.assert_close(plane.maps, seen.maps.sum(2))


def still(model: nn.Module, images: Tensor) -> Any:
    return model(images[:, None].expand(-1, 6, -1, -1, -1))


@pytest.mark.parametrize(
    ("build", "shape", "forward", "count"),
    [
        (lambda: BandsViT(((0, 1, 2, 3), (3, 4, 5))), (2, 6, 16, 24), None, 2),  # groups that share a channel
        (videomae, (2, 3, 32, 32), still, 3),  # equal frames
    ],
)
def test_several_tokens_at_each_place_are_said_to_be_that(build: Any, shape: Any, forward: Any, count: int) -> None:
    with pytest.raises(UnsupportedAttentionError, match=f"each patch of the image is held by {count} of its keys"):
        record_attention(sharp(build()), images_of(shape), forward=forward)
