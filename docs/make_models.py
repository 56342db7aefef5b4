"""Write docs/models.md from the models that the tests run on: `python docs/make_models.py`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402 - the repository's root must be importable first

from attn_monitor.capture.observe.forward import default_forward  # noqa: E402
from attn_monitor.capture.recorder import AttentionRecorder, record_attention  # noqa: E402
from attn_monitor.errors import AttentionError  # noqa: E402
from tests.hostile import test_gpu_kernels, test_more_axes, test_refusals  # noqa: E402
from tests.hostile.test_zoo import difference  # noqa: E402
from tests.support.gpu_kernels import WAYS, matrices_of, sdpa  # noqa: E402
from tests.support.oracle import attention_matrices  # noqa: E402
from tests.support.zoo import CASES, Case, enliven  # noqa: E402

PACKAGES = ("torch", "timm", "transformers", "torchvision", "vit-pytorch", "open_clip_torch", "lightly")
INTRODUCTION = """\
# Models that the capture is tested on

Written by `docs/make_models.py` from `tests/support/zoo.py` and `tests/hostile/test_refusals.py`; do not edit it.

Small models with random weights and sharp attention, run on {versions}.

* **layers**: how many attention layers ran, and of these how many can be read with the query of the test.
* **grid, prefix**: patches as rows × columns, and tokens beside them. *Exact*: every key changes with its own patch of
  the image and with no other. *Centres*: fields overlap, and keys are ordered by the centre of what they hold.
* **row·V**: largest relative difference between the captured row times V and the operation's own output. *Mixed*: what
  meets V is no plain softmax.
* **reference**: largest difference to the attention matrix in float64, found by other means, in units of uniform
  attention (weight × keys). The tests allow 1e-3. The largest in this table is **{largest:.1e}**.
"""


KERNELS = """\
## Pyramids at several sizes

Layers that can be read at 64, 128 and 224 pixels, small members with weights as they start. For the first point two
draws of weights were run (224 pixels once for the pyramids), for the others one. Maps equal float64: in
`tests/hostile/test_sizes_of_pyramids.py` the first point's, in `test_families.py` those of Twins-SVT and MViT v2 at 64;
of DaViT those at 224 alone were compared.

* PVT v2: 4 of 4, and Twins-PCPVT: 4 of 4, at each size, with the mean over finer queries, and each query by its row and
  column but for one stage of Twins at 64. ViTPose with its padding of 2: 2 of 2, exact. Twins-PCPVT's third stage was
  refused for one draw of weights and noise at 128, as if two keys shared their cells.
* Twins-SVT: layers over the whole image at 64 and 128; those in windows only where one window holds the whole stage
  (4 × 4 and 2 × 2 at 64, 4 × 4 at 128). Queries of its first two stages have a mean, and no row and column.
* DaViT: layers over channels have no map; those in windows of 7 × 7 only where one window holds the stage: the last two
  stages at 64, the last at 128 and 224.
* MViT v2: 1 or 2 of 5. Its first layer hardly sees the outermost pixels; in the others keys are pooled from convolved
  tokens by strided convolutions, and their order is not known.

## Kernels that run on GPUs

Each kernel under its own name and schema on the CPU, with a float64 inside, in the last block after one with SDPA; the
real ones, which `pytest -m gpu` runs, need a GPU. *Function* is a `torch.autograd.Function`, behind which PyTorch's
dispatcher sees nothing.

Right without a kernel's name being known: any operation, or function, with four dimensions of q, k and v (or three, and
cumulative lengths), in either layout, with `causal`, a scale, a bias, a window, a softcap, ALiBi slopes, sinks and
grouped queries. Refused in words: sequences of several lengths, paged keys, lengths of keys for each image, and kernels
called by Python alone (pybind, Triton without a function), which are a layer of their own, "an unseen kernel" in
`attn-monitor check`.
"""


AXES = """\
## Clips, volumes, spectrograms, signals, bands

The same for images of one to three axes, in the order of dimensions that the model takes, with the last axis of a grid
running fastest. Two families are read in another way: in TimeSformer (and vit-pytorch's ViViT) attention runs within
frames or over time, and the reference is put together from these; in the audio transformer patches overlap, and its
places are centres.

MONAI's ViT with `spatial_dims=3` is read where MONAI is installed (1.6: patches by a convolution or cut out, learned
and sine positions, with and without CLS; 2 × 4 × 3, exact), and a model of its shape everywhere
(`tests/hostile/test_monai.py`). Groups of channels with tokens of their own, equal or not, are an axis c (ChannelViT,
SatMAE's bands 0, 1, 2, 6; 3, 4, 5, 7; 8, 9). Refused in words: transformers over time whose tokens hold a frame through
the CLS token of other attention alone (the second half of vit-pytorch's ViViT with `pool="cls"`; the message names the
layers within frames, which can be read), groups that share a channel, and equal frames of one still image.
"""


def more_axes(name: str) -> str:
    """One line of the table of images with other axes."""
    build, shape, _, axes, prefix = test_more_axes.MODELS[name]
    model, images = test_more_axes.sharp(build()), test_more_axes.images_of(shape)
    seen = record_attention(model, images, layers="all", query="mean")
    pairs = zip(seen, attention_matrices(model, images, default_forward), strict=False)
    largest = max(test_more_axes.off_by(a.rows, matrix.mean(2)) for a, matrix in pairs)
    places = f"{seen[-1].grid} + {prefix}, {seen[-1].places}"
    return f"| {name} | {shape} | {', '.join(axes)} | {places} | {largest:.0e} |"


def kernel(name: str) -> str:
    """One line of the table of kernels."""
    model = test_gpu_kernels.vit(sdpa, WAYS[name])
    site = AttentionRecorder(model, layers="all").sites(test_gpu_kernels.images())[-1]
    (seen,) = record_attention(model, test_gpu_kernels.images())
    truth = matrices_of(model, test_gpu_kernels.images())[-1][:, :, 0]
    largest = test_gpu_kernels.error(seen.rows, truth)
    op = site.op.removesuffix(".default").removeprefix("tests.support.gpu_kernels.")
    return f"| {name} | `{op}` | {seen.verified_error:.0e} | {largest:.0e} |"


def row(case: Case) -> tuple[str, float]:
    """One line of the table, and its largest difference to the reference."""
    model, images = case.model(), case.images()
    forward = case.forward or default_forward
    recorder = AttentionRecorder(model, layers="all", query=case.query, forward=case.forward)
    sites = recorder.sites(images)
    seen = recorder(images)
    matrices = attention_matrices(model, images, forward, case.method)
    largest = max(difference(a, matrices[a.layer], case.query) for a in seen)
    kinds = {"fused" if "scaled_dot_product" in sites[a.layer].op else "explicit" for a in seen}
    layouts = {a.places for a in seen}
    mixed = sum(a.mixed for a in seen)
    checked = f"{max(a.verified_error for a in seen):.0e}"
    checked += "" if mixed == 0 else ", mixed" if mixed == len(seen) else ", some mixed"
    grid = f"{case.grid[0]} × {case.grid[1]} + {case.prefix}, {' and '.join(sorted(layouts))}"
    cells = [
        case.library,
        case.name,
        f"{len(sites)}, {len(seen)} read",
        " and ".join(sorted(kinds)),
        grid,
        str(case.query),
        checked,
        f"{largest:.0e}",
    ]
    return "| " + " | ".join(cells) + " |", largest


def refusal(name: str) -> str:
    """One line of the second table: the message as a user gets it."""
    build, size, arguments, _, _ = test_refusals.CASES[name]
    torch.manual_seed(0)
    model = build().eval() if name == "NaN" else enliven(build()).eval()
    try:
        record_attention(model, torch.randn(3, 3, *size), **arguments)
    except AttentionError as error:
        return f"| {name} | {type(error).__name__} | {str(error).replace('|', '/')} |"
    raise SystemExit(f"{name} was not refused")


def main() -> None:
    """Run every model and write the tables."""
    warnings.simplefilter("ignore")  # libraries' own deprecations
    rows = [row(case) for case in CASES]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    versions += f" and Python {platform.python_version()} on a CPU"
    lines = [
        INTRODUCTION.format(versions=versions, largest=max(r[1] for r in rows)),
        "| library | model | layers | attention | grid + prefix | query | row·V | reference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(r[0] for r in rows),
        "",
        AXES,
        "| model | images | axes | grid + prefix | reference |",
        "| --- | --- | --- | --- | --- |",
        *(more_axes(name) for name in test_more_axes.MODELS),
        "",
        KERNELS,
        "| kernel | operation | row·V | reference |",
        "| --- | --- | --- | --- |",
        *(kernel(name) for name in WAYS),
        "",
        "## What is refused, and how",
        "",
        "| case | error | message |",
        "| --- | --- | --- |",
        *(refusal(name) for name in test_refusals.CASES),
        "",
    ]
    (ROOT / "docs" / "models.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
