"""Turns a run into the document: tables, targets, and what lies behind the figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import Spread
from benchmarks.results import Results
from benchmarks.scaling import HEADS, LAYERS, SIDE, WIDTH
from benchmarks.speed import Table
from benchmarks.targets import targets

_HOW = """All figures are ratios between things that were run in turns, in one process, on the same images and with the
same threads, round after round in alternating order; each is the median over the rounds, with the quartiles in
brackets. Models have random weights in float32, on the CPU. *Ours* is what every snapshot but the first does: the
sites are known, no check of the places is due, and row · V is compared with the model's output only where it says
"verified". *An empty dispatch mode* gives no attention: it is PyTorch's own way of seeing operations from Python, with
nothing done in it, in the same modules as ours for all layers.

Peers are set up as their users would do for speed. Each ratio is to the plain no-gradient forward of the peer's own
model in its fastest form (Hugging Face's with fused attention; vit-pytorch has explicit attention only); "over ours"
divides that ratio by ours on timm's model for as many layers (by the layer's index where the peer leaves the model
after it too), and "same model" is the peer's time over ours on the
very model that the peer ran on. Hugging Face and vit-pytorch give all layers or nothing, so they are compared with
both. timm's `AttentionExtract` sees no fused attention: *as documented* it is switched off in all blocks; *tuned by
hand* it is off in the last block alone, and the traced model is cut off after its softmax. The DINO-style function
was written for this benchmark; it runs timm's own modules."""

_TARGETS = """Up to 480 px nothing can be much faster or slower than the model itself, which every way has to run: the
matrices of a ViT-S/16 are 4 % of a forward's multiplications at 224 px. There the only target beside the fastest peer
is to be no more than 5 % slower; at 960 px all others are to take twice as long, but for vit-pytorch, whose model has
computed the matrices anyway and whose `Recorder` only copies them.

One image of 224 px has no targets: some milliseconds of Python for each snapshot and a millisecond for each layer,
more than half of it PyTorch's own dispatch mode (see its row), are a tenth and more of so short a forward, and the
same in a longer one; a probe has eight images or more. A snapshot in training cannot hold the loop up for less than one
forward of its probe, see below; 15 % are left to metrics and logging."""

_FLOOR = """The row of the last layer needs everything up to q and k of the last block, and nothing after. Named by its
index, the layer is the last thing that runs, and that block's attention, projection and MLP are left out: counting
multiplications, {floors}. Counted from the end, as by default, the forward runs to its end, since nothing else shows
that no later layer runs on these images: it cannot take less than one forward. What is above it:

- Once per snapshot, whatever the images: what the model keeps is compared with what was known, saved and put back, in
  Python, some milliseconds for the three hundred modules of a ViT. That weighs most for small models and one image.
- Python at each operation of a watched module (a dozen to twenty for each layer) and its hooks. It does not grow with
  the images either.
- One row of attention: a product of q's row with k for each head, O(tokens).
- With verification, one product with V for each layer.

Where a peer comes close, it leaves out the same part of the model: a graph traced for one layer and cut off there
does no more work than ours but for the softmax over all queries of the last layer, which is one layer of twelve. An
explicit model (vit-pytorch, DINO's own code) has already paid for the matrix when it is read. The difference is then
what a peer copies and stacks, and the last block."""

_PICTURES = """Matplotlib draws one figure of the same cells for each image, as notebooks do, at {figure_kb:.0f} kB of
PNG for all. Ours are {panel_kb:.0f} kB of panels and {strip_kb:.0f} kB of film strips for each snapshot of
{images} images, two roles and twelve heads, in {panels_ms:.0f} ms and {strips_ms:.0f} ms, encoding included and
behind the training loop. Colours are looked up in a table, heads are drawn all at once, and text is the largest part
of what remains. JPEG is encoded by Pillow: torchvision's encoder took half as long again for these pictures when it was
tried, and halves the resolution of colour, which blurs outlines and text."""

_PLAYER = """A run of {steps} snapshots, {images} images, two roles and twelve heads is a file of {file:.1f} MB, the
embed edition {embed:.1f} MB. In a headless Chromium without a graphics card the first picture is there {first} ms after
the file is opened, and {speed} steps a second are drawn, with all heads of both roles and the curves; 60 is the most
that a browser draws."""

_LONG_RUN = """`attn-monitor report` draws {steps:,} snapshots of {layers} layers of two roles, {archive:.0f} MB, in
{seconds:.0f} s with at most {peak:.2f} GB of memory, PyTorch's own included; the page is {page:.1f} MB."""

_TRAINING = """A student and its moving average (ViT-Ti/16, 224 px) for {steps} steps on random images with
{snapshots} snapshots of a probe of eight, and metrics to TensorBoard. Each snapshot, metrics and their logging
included, holds the loop up for {blocked} plain forwards of the probe through both models; {idle} while nothing is
drawn in the background, which competes for the same cores on a machine without an accelerator. The callback says that
it took {told:.1%} of the wall time, waiting for the last pictures included; Lightning's profiler, around all its
hooks, {measured:.1%}. The fit took {longer:.1%} longer than without the callback, on as many cores, drawing
included; snapshots are far more frequent here than in a real run."""

_GROWTH = """Own cost is the processor time, on one thread, with the capture of all layers less that without, on a model
of nothing but attention whose kernel is left out of both runs: beside attention over 14,400 tokens, which grows with
their square, it would drown in the noise. {heads} heads, {width} channels; {layers} layers, {patches} patches and one
image unless varied."""


def write_report(results: Results, folder: Path) -> None:
    """`benchmarks.md` and `benchmarks.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(_sections(results)) + "\n"
    (folder / "benchmarks.md").write_text(text, encoding="utf-8")
    stored = {**results.stored(), "targets": [{**asdict(t), "reached": t.reached} for t in targets(results)]}
    (folder / "benchmarks.json").write_text(json.dumps(stored, indent=1, default=str) + "\n", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _sections(results: Results) -> Iterator[str]:
    yield "# What it costs"
    yield f"Written by `make bench`. {_machine(results)}"
    if results.quick:
        yield "**A `--quick` run on tiny models: these figures say nothing.**"
    yield _HOW
    yield "## Targets"
    yield _targets(results)
    yield _TARGETS
    yield "## Next to a plain forward, and to the peers"
    for measured in results.speed:
        yield from _speed(measured)
    if results.left_out:
        yield "Left out: " + "; ".join(f"{what} ({why})" for what, why in results.left_out.items()) + "."
    yield "## What remains, and why"
    yield _FLOOR.format(floors=", ".join(dict.fromkeys(_floor(t) for t in results.speed)))
    yield from _rest(results)


def _machine(results: Results) -> str:
    m = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in m["packages"].items())
    before, after = results.loads
    return (
        f"On {m['processor']}, {m['cores']} cores ({m['threads']} threads), {m['memory_gb']} GB, {m['system']}, Python "
        f"{m['python']}, {versions}; {results.minutes:.0f} minutes, system load {before:.1f} at the start and "
        f"{after:.1f} at the end (the run itself is {m['threads']})."
    )


def _targets(results: Results) -> str:
    rows = [[t.what, t.text, _figure(t.measured), "reached" if t.reached else "**missed**"] for t in targets(results)]
    return table(["what", "target", "measured", ""], rows)


def _figure(spread: Spread) -> str:
    """Two decimals for ratios, three figures for what is small, none for what is large."""
    values = [spread.median, spread.low, spread.high]
    digits = 0 if spread.median >= 100 else 2 if spread.median >= 0.1 else 4
    median, low, high = (f"{v:,.{digits}f}" for v in values)
    return median if spread.low == spread.high else f"{median} ({low} to {high})"


def _speed(measured: Table) -> Iterator[str]:
    yield f"### {measured.title}\n\nOne plain forward takes {measured.plain_ms:.0f} ms; {measured.rounds} rounds."
    rows = [
        [
            row.way,
            row.layers,
            _figure(row.ratio),
            *(" / ".join(f"{s.median:.2f}" for s in d.values()) for d in (row.speedup, row.speedup_same_model)),
        ]
        for row in measured.rows
    ]
    yield table(["", "layers", "in plain forwards", "over ours (last / all)", "same model (last / all)"], rows)
    if measured.skipped:
        yield "Skipped: " + "; ".join(f"{what} ({why})" for what, why in measured.skipped.items()) + "."


def _floor(measured: Table) -> str:
    """The share of multiplications up to q and k of the last block."""
    size = measured.size
    dense, attention = 24 * size.tokens * size.width**2, 4 * size.tokens**2 * size.width
    stem = 2 * (size.tokens - 1) * 3 * size.patch**2 * size.width
    needed = (size.depth - 1) * (dense + attention) + dense / 4 + stem  # a quarter: q, k and v come from one product
    return f"{needed / (size.depth * (dense + attention) + stem):.3f} at {size.pixels} px ({size.name})"


def _rest(results: Results) -> Iterator[str]:
    if (m := results.memory) is not None:
        yield "## Memory"
        yield (
            f"Peaks from PyTorch's allocator, with {m.tokens:,} tokens and twelve layers, one image: a plain forward "
            f"takes {m.plain / 1e6:.1f} MB, the capture of all layers {m.ours / 1e6:.1f} MB ({m.extra:+.1%}), verified "
            f"{m.verified / 1e6:.1f} MB. The full matrices would take {m.matrices / 1e6:,.0f} MB, {m.saving:,.0f} "
            "times what the capture adds."
        )
    if (p := results.pictures) is not None:
        yield "## Pictures"
        yield _PICTURES.format(
            images=p.images, panels_ms=p.panels_ms, strips_ms=p.strips_ms, panel_kb=p.panel_bytes / 1e3,
            strip_kb=p.strip_bytes / 1e3, figure_kb=p.matplotlib_bytes / 1e3,
        )  # fmt: skip
    if (v := results.player) is not None:
        yield "## The player"
        yield _PLAYER.format(
            images=v.images, steps=v.steps, file=v.file_bytes / 1e6, embed=v.embed_bytes / 1e6,
            first=_figure(v.first_picture_ms), speed=_figure(v.steps_per_second),
        )  # fmt: skip
    if (r := results.long_run) is not None:
        yield _LONG_RUN.format(
            steps=r.steps, layers=r.layers, archive=r.archive_bytes / 1e6, seconds=r.seconds, peak=r.peak_bytes / 1e9,
            page=r.report_bytes / 1e6,
        )  # fmt: skip
    if (t := results.training) is not None:
        yield "## In a training"
        yield _TRAINING.format(**asdict(t) | {"blocked": _figure(t.blocked), "idle": _figure(t.idle)})
    if results.metrics is not None:
        yield (
            "The default metrics of an all-layers snapshot with two roles, drift and divergence included, take "
            f"{_figure(results.metrics)} of the two plain forwards of its probe of eight (ViT-S/16, 224 px)."
        )
    if results.watched_step is not None:
        yield (
            "In the at most 16 steps before a snapshot in which global features and prototypes are read, hooks "
            f"take {_figure(results.watched_step)} of the step: forwards of student and teacher (ViT-S/16, 224 px, "
            "batch of eight, 4,096 prototypes) and a backward pass."
        )
    if results.dense is not None:
        yield (
            f"Dense quality takes {_figure(results.dense)} of the processor time of a plain forward of its probe, for "
            "each role (ViT-S/16, 224 px, eight images), on the thread that writes, behind training."
        )
    if results.growth:
        yield "## Growth"
        yield _GROWTH.format(heads=HEADS, width=WIDTH, layers=LAYERS, patches=SIDE**2)
        rows = [
            [
                g.of,
                ", ".join(f"{s:,}" for s in g.sizes),
                ", ".join(f"{c:.2f}" for c in g.milliseconds),
                f"{g.fixed:.2f} + {g.slope:.2g} per unit",
                f"{g.r_squared:.3f}",
            ]
            for g in results.growth
        ]
        yield table(["of", "sizes", "own cost, ms", "line, ms", "R²"], rows)
    if (a := results.asking) is not None:
        yield "## Asking for places"
        yield (
            f"{a.model} is asked {a.images} images once, in {a.forwards} forwards, which with the recording takes "
            f"{_figure(a.first)} plain forwards of one image; as many images under an empty dispatch mode take "
            f"{_figure(a.least)}. `record_attention` takes {_figure(a.again)} from its second call on."
        )
    if results.suite:
        yield "## The tests"
        yield "The last time that they ran here: " + "; ".join(map(str, results.suite)) + "."
    if (s := results.startup) is not None:
        yield "## Start"
        yield (
            f"`import attn_monitor` adds {_figure(s.milliseconds)} ms to `import lightning.pytorch`, and loads "
            f"{', '.join(s.unwanted) or 'none of wandb, matplotlib, timm, transformers, mlflow, scipy and pandas'}."
        )
