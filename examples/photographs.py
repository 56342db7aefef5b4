"""The photographs that ship inside scikit-image and scikit-learn, and the probe images cut from them.

The object masks in the folder `masks` were drawn by hand for this project, on these very cuts, and are under its MIT
licence: 0 is background, 1 and up are objects. The retina fills its picture and has none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image, PngImagePlugin

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_MADE_BY = "examples/photographs.py"
_MASKS = Path(__file__).parent / "masks"


class _Source(NamedTuple):
    package: str
    path: str


class _Square(NamedTuple):
    """A square in a photograph: its centre and its side, as fractions of width, height and shorter edge."""

    x: float = 0.5
    y: float = 0.5
    side: float = 1.0


_SOURCES = {
    "astronaut": _Source("skimage", "data/astronaut.png"),
    "chelsea": _Source("skimage", "data/chelsea.png"),
    "china": _Source("sklearn", "datasets/images/china.jpg"),
    "coffee": _Source("skimage", "data/coffee.png"),
    "flower": _Source("sklearn", "datasets/images/flower.jpg"),
    "hubble": _Source("skimage", "data/hubble_deep_field.jpg"),
    "ihc": _Source("skimage", "data/ihc.png"),
    "motorcycle": _Source("skimage", "data/motorcycle_left.png"),
    "retina": _Source("skimage", "data/retina.jpg"),
    "rocket": _Source("skimage", "data/rocket.jpg"),
}

# The photographs with something to look at, each framed on it; first those that attention of a short training outlines.
_PROBES = {
    "flower": _Square(x=0.48),
    "coffee": _Square(x=0.48),
    "china": _Square(x=0.33),
    "astronaut": _Square(),
    "motorcycle": _Square(x=0.54),
    "rocket": _Square(),
    "chelsea": _Square(x=0.45),
    "retina": _Square(),
}


def photograph_files() -> dict[str, Path]:
    """The ten photographs by name, as files of the installed packages; nothing is downloaded."""
    files = {}
    for name, source in _SOURCES.items():
        # find_spec rather than import: sklearn alone takes a second to load.
        spec = find_spec(source.package)
        if spec is None or spec.origin is None:
            raise FileNotFoundError(f"{source.package}, which ships {name!r}, is not installed")
        files[name] = Path(spec.origin).parent / source.path
    return files


def photographs() -> dict[str, Image.Image]:
    """The ten photographs by name, in RGB."""
    return {name: read_rgb(file) for name, file in photograph_files().items()}


def image_files(folder: str | os.PathLike[str]) -> list[Path]:
    """All image files in a folder and its subfolders, sorted."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise FileNotFoundError(f"{folder} holds no images (looked for {kinds}, also in its subfolders)")
    return files


def read_rgb(file: Path) -> Image.Image:
    """One image file, in RGB."""
    with Image.open(file) as image:
        rgb: Image.Image = image.convert("RGB")
    return rgb


def probe_images(size: int) -> dict[str, Image.Image]:
    """Eight of the photographs, cut to a square around their subject and resized."""
    files = photograph_files()
    return {name: _cut(read_rgb(files[name]), square, size) for name, square in _PROBES.items()}


def probe_images_of(folder: str | os.PathLike[str], size: int, count: int = 8) -> dict[str, Image.Image]:
    """Evenly spaced images of a folder, cut to their central square and resized."""
    files = image_files(folder)
    count = min(count, len(files))
    chosen = [files[i * len(files) // count] for i in range(count)]
    return {f"{i}_{file.stem}": _cut(read_rgb(file), _Square(), size) for i, file in enumerate(chosen)}


def probe_masks(size: int) -> dict[str, Image.Image]:
    """The objects in each of the eight probe images, as a picture of labels: 0 is background, 1 and up are objects."""
    return {name: _read_labels(_MASKS / f"{name}.png", size) for name in _PROBES}


def numbered(images: Mapping[str, Image.Image], count: int) -> dict[str, Image.Image]:
    """The first images, with their place in their names, so that folders and dashboards keep the order."""
    return {f"{i}_{name}": images[name] for i, name in enumerate(list(images)[:count])}


def no_masks(images: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """Masks that say of each image that no object in it is known."""
    return {name: Image.new("L", image.size) for name, image in images.items()}


def write_pngs(folder: str | os.PathLike[str], images: Mapping[str, Image.Image]) -> Path:
    """Write images into a folder by name, in place of those that were written here before."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_former_images(folder)
    stamp = PngImagePlugin.PngInfo()
    stamp.add_text("Software", _MADE_BY)
    for name, image in images.items():
        image.save(folder / f"{name}.png", pnginfo=stamp)
    return folder


def _read_labels(file: Path, size: int) -> Image.Image:
    with Image.open(file) as labels:
        return labels.resize((size, size), Image.Resampling.NEAREST)


def _remove_former_images(folder: Path) -> None:
    # A probe of other data would be mixed into this one; files that were not written here stay.
    for file in folder.glob("*.png"):
        with Image.open(file) as image:
            ours = image.info.get("Software") == _MADE_BY
        if ours:
            file.unlink()


def _cut(image: Image.Image, square: _Square, size: int) -> Image.Image:
    side = square.side * min(image.size)
    left = min(max(square.x * image.width - side / 2, 0), image.width - side)
    top = min(max(square.y * image.height - side / 2, 0), image.height - side)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)
