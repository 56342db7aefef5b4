"""What a page shows of a run: images, and as many steps, with metrics and flags, as fit into the file."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from attn_monitor.errors import ArchiveError
from attn_monitor.player import blocks, slices
from attn_monitor.probe.probe_batch import ProbeBatch
from attn_monitor.record.archive import load_step, snapshot_paths, step_of
from attn_monitor.record.file_names import tag_safe_names
from attn_monitor.record.thinning import thin
from attn_monitor.snapshot import Snapshot
from attn_monitor.workers import safe_point

MAX_PHOTO = 512  # pixels of a photograph's longer side, half as many for more than MANY_PHOTOS images
MANY_PHOTOS = 16
FEATURE_STEPS = 8  # steps that keep their features where the file would be too large with all of them
Item = TypeVar("Item")

BASE64 = 4 / 3  # characters for a byte
MAX_STEPS = 500  # of a page: reading small snapshots takes time even where they fit
MAX_VALUES = 200_000  # of metrics; with more of them those of heads are left out


@dataclass
class Step:
    """One snapshot: ``facts`` for JSON, ``blocks`` by layer, and their layout."""

    facts: dict[str, Any]
    layout: blocks.Layout
    blocks: dict[int, bytes]
    bare: dict[int, bytes] | None = None  # blocks without features, where there are features

    @property
    def size(self) -> int:
        """Size of the blocks in bytes."""
        return sum(map(len, self.blocks.values()))

    def drop_features(self) -> None:
        """Remove features from the blocks."""
        if self.bare is not None:
            self.blocks, self.bare = self.bare, None
            self.layout = [{**entry, "features": 0} for entry in self.layout]


@dataclass
class Contents:
    """A run's images and steps; ``note`` says what was left out, ``broken`` which snapshots are unreadable and why."""

    name: str
    images: dict[str, Any]
    steps: list[Step]
    note: str = ""
    broken: list[str] = field(default_factory=list)
    found: dict[str, Any] | None = None  # for the list of runs, see `RunFacts` in web/types.d.ts

    def manifest(self) -> dict[str, Any]:
        """All but the blocks, in plain values. Each layout occurs once, and steps refer to it by its index."""
        layouts: list[blocks.Layout] = []
        steps = []
        every_head = sum(map(_values, self.steps)) <= MAX_VALUES
        for step in self.steps:
            if step.layout not in layouts:
                layouts.append(step.layout)
            facts = {**step.facts, "layout": layouts.index(step.layout)}
            if not every_head:
                facts["metrics"] = {key: values[:1] for key, values in facts["metrics"].items()}
            steps.append(facts)
        found = {} if self.found is None else {"found": self.found}
        return {"name": self.name, **self.images, "note": self.note, "layouts": layouts, "steps": steps, **found}


def step_facts(snapshot: Snapshot) -> dict[str, Any]:
    """Step, epoch, metrics, flags and verdict of a snapshot in plain values."""
    flags = [blocks.flag_of(flag) for flag in snapshot.flags]
    verdict = None if snapshot.verdict is None else snapshot.verdict.as_dict()
    facts = {"step": snapshot.step, "epoch": snapshot.epoch, "metrics": blocks.measured(snapshot), "flags": flags}
    return {**facts, "verdict": verdict}


def images_of(probe: ProbeBatch, pictures: slices.Pictures = slices.NO_SLICES) -> dict[str, Any]:
    """Photographs as data URLs, ground truth run-length encoded, and a hash that is the same for the same images."""
    photos, masks = slices.pixels_of(probe, pictures), slices.masks_of(probe, pictures)
    names = [f"{name}, {picture}" for name in probe.names for picture in pictures.names] or probe.names
    truths: list[Any] = [()] * len(photos) if masks is None else list(masks.numpy())
    longest = MAX_PHOTO if len(photos) <= MANY_PHOTOS else MAX_PHOTO // 2
    images = [
        {"name": name, "photo": _data_url(photo, longest), "truth": [_runs(mask) for mask in truth if mask.any()]}
        for name, photo, truth in zip(names, photos, truths, strict=True)
    ]
    height, width = photos.shape[1:3]
    same = hashlib.sha256(np.ascontiguousarray(photos).tobytes()).hexdigest()[:16]
    facts = {"images": images, "size": [height, width], "caption": probe.shown_caption, "probe": same}
    return {**facts, "pictures": list(pictures.names)}


@dataclass(frozen=True)
class Opened:
    """An archive of which nothing but its images is read yet."""

    paths: list[Path]
    probe: ProbeBatch
    images: dict[str, Any]

    @property
    def size(self) -> int:
        """Characters that the images take."""
        return sum(len(image["photo"]) + 8 * sum(map(len, image["truth"])) for image in self.images["images"])


def open_archive(folder: Path) -> Opened:
    """Read an archive's images. Raises FileNotFoundError where the folder has no archive."""
    paths = snapshot_paths(folder)
    if not paths or not (folder / "probe.npz").exists():
        raise FileNotFoundError(f"{folder}: no {'probe.npz' if paths else 'snapshots (step-*.npz)'} here")
    probe = ProbeBatch.load(folder / "probe.npz")
    return Opened(paths, probe, images_of(probe, pictures_in(paths, probe)))


def gather(
    folder: Path, name: str, room: float, *, opened: Opened | None = None, keep: Collection[int] = ()
) -> Contents:
    """The steps of an archive that fit into ``room`` bytes of base64, evenly spaced, and steps to ``keep`` anyway.

    The room is for images too, unless they are already ``opened``.

    Raises FileNotFoundError where the folder has no archive, and `ArchiveError` where no snapshot can be shown.
    """
    if opened is None:
        opened = open_archive(folder)
        room -= opened.size
    paths, pictures = opened.paths, len(opened.images["pictures"])
    contents = Contents(name, opened.images, [])
    size = _step_size(paths, pictures)
    few = min(MAX_STEPS, max(2, int(room / size)) if size else len(paths))
    chosen = _thinned(paths, [step_of(path) for path in paths], few, keep)
    broken = contents.broken
    contents.steps = list(_readable(chosen, opened.probe, broken, pictures))
    if not contents.steps:
        raise ArchiveError(f"{folder}: no snapshot can be shown: {'; '.join(broken)}")
    notes = _fit(contents, room, keep)
    if len(contents.steps) + len(broken) < len(paths):
        notes.insert(0, f"{len(contents.steps)} of {len(paths)} snapshots, evenly spaced, so that the file stays small")
    contents.note = ". ".join([*notes, *(f"Left out: {reason}" for reason in broken)])
    return contents


def pictures_in(paths: Sequence[Path], probe: ProbeBatch) -> slices.Pictures:
    """Return the pictures of each image, by the first snapshot that is readable."""
    for path in paths:
        try:
            return slices.pictures_of(load_step(path), probe)
        except (ArchiveError, OSError):
            continue
    return slices.NO_SLICES


def _step_size(paths: Sequence[Path], pictures: int) -> float:
    """Size of a step in base64: the smallest of the first, the middle and the last one, as far as they are readable."""
    sizes = []
    for path in {paths[0], paths[len(paths) // 2], paths[-1]}:
        try:
            found = blocks.blocks(slices.in_slices(load_step(path), pictures), features=False)
        except (ArchiveError, OSError):
            continue
        sizes.append(sum(map(len, found.values())) * BASE64)
    return min(sizes, default=0.0)


def _readable(paths: Sequence[Path], probe: ProbeBatch, broken: list[str], pictures: int) -> Iterator[Step]:
    """Each as a `Step`; reasons why others cannot be shown are added to ``broken``."""
    for path in paths:
        safe_point()
        try:
            snapshot = slices.in_slices(load_step(path), pictures)
            if tag_safe_names(snapshot.names) != probe.names:
                raise ArchiveError(f"{path.name} shows {', '.join(snapshot.names)}, which are not the probe's images")
        except (ArchiveError, OSError) as error:
            broken.append(str(error).replace(f"{path.parent}{os.sep}", ""))  # pages are passed on
            continue
        bare = blocks.blocks(snapshot, features=False)
        full = blocks.blocks(snapshot) if blocks.has_features(snapshot) else None
        yield Step(step_facts(snapshot), blocks.layout_of(snapshot), full or bare, None if full is None else bare)


def _thinned(items: Sequence[Item], numbers: Sequence[int], count: int, keep: Collection[int]) -> list[Item]:
    """Choose about ``count`` items, evenly spaced by their numbers, and all whose number is kept."""
    chosen = {*thin(numbers, count), *(i for i, number in enumerate(numbers) if number in keep)}
    return [items[i] for i in sorted(chosen)]


def _fit(contents: Contents, room: float, keep: Collection[int]) -> list[str]:
    """Drop features, then steps, until the rest fits into ``room`` characters; return notes on what was dropped."""
    notes = []

    def characters() -> float:
        return sum(step.size * BASE64 + _json_size(step) for step in contents.steps)

    for count in (FEATURE_STEPS, 2, 0):
        if characters() > room and any(step.bare for step in contents.steps):
            numbers = [step.facts["step"] for step in contents.steps]
            kept = set(thin(numbers, count)) if count else set()
            for number, step in enumerate(contents.steps):
                if number not in kept:
                    step.drop_features()
            notes = [f"Features of patches at {count} steps only" if count else "Features of patches are left out"]
    while characters() > room and len(contents.steps) > 2 + len(keep):
        fewer = min(len(contents.steps) - 1, int(len(contents.steps) * room / characters())) - len(keep)
        numbers = [step.facts["step"] for step in contents.steps]
        contents.steps = _thinned(contents.steps, numbers, max(2, fewer), keep)
    return notes


def _values(step: Step) -> int:
    return sum(map(len, step.facts["metrics"].values()))


def _json_size(step: Step) -> int:
    return 8 * _values(step) + sum(map(len, step.facts["metrics"])) + sum(len(str(f)) for f in step.facts["flags"])


def _data_url(photo: np.ndarray[Any, Any], longest: int) -> str:
    image, buffer = Image.fromarray(photo), io.BytesIO()
    image.thumbnail((longest, longest))
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _runs(mask: np.ndarray[Any, Any]) -> list[int]:
    """Lengths of the runs of equal pixels, row by row, the first of them outside: [3, 2, …]."""
    flat = np.concatenate([[False], mask.ravel()])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(length) for length in np.diff(changes, prepend=0, append=mask.size)]
