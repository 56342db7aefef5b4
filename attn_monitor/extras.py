"""Say in one sentence which extra of this package brings a package that is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from attn_monitor.errors import MissingPackageError

EXTRAS = {
    "lightning": "lightning",
    "jsonargparse": "cli",
    "tensorboard": "tensorboard",
    "matplotlib": "plot",
    "av": "video",
    "tifffile": "formats",
    "nibabel": "formats",
    "pydicom": "formats",
    "wandb": "wandb",
}
"""Packages that are imported by this one, and the extra in pyproject.toml for each."""


def remedy(package: str) -> str:
    """Return what installs a package: the extra that brings it, or its own name where there is none."""
    return f'Run: pip install "attn_monitor[{EXTRAS[package]}]"' if package in EXTRAS else f"Run: pip install {package}"


@contextmanager
def needs(package: str, what: str) -> Iterator[None]:
    """Import an optional package in a ``with`` block.

    Args:
        package: the name by which it is imported.
        what: what needs it, the subject of the error's sentence.

    A folder of the package's name in the working directory, as ``./wandb`` that W&B writes to, is imported by Python as
    a package without contents. It does not count as installed.

    Raises:
        MissingPackageError: The package is not installed. Other missing modules, such as one of its own, are Python's.
    """
    try:
        yield
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        if not missing and not _is_folder_alone(package):
            raise
        raise _missing(package, what) from error
    if _is_folder_alone(package):
        raise _missing(package, what)


def _missing(package: str, what: str) -> MissingPackageError:
    return MissingPackageError(f"{what} needs {package}, which is not installed. {remedy(package)}", name=package)


def _is_folder_alone(package: str) -> bool:
    module = sys.modules.get(package)
    return module is not None and getattr(module, "__file__", None) is None
