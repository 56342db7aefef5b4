"""How people are told: by a warning that ends no run, or on standard error."""

from __future__ import annotations

import sys
import warnings


def warn(text: str, *, stacklevel: int | None = None) -> None:
    """Warn; where the user has turned warnings into exceptions, print instead, as training must go on.

    Without a ``stacklevel`` the warning has no place: no line of this package explains it, and none of the user's
    caused it.
    """
    try:
        if stacklevel is None:
            warnings.warn_explicit(text, UserWarning, "attn_monitor", 0, module="attn_monitor")
        else:
            warnings.warn(text, stacklevel=stacklevel + 1)
    except UserWarning as error:
        print_in_place_of(error)


def print_in_place_of(warning: UserWarning) -> None:
    """Print what a warning says."""
    inform(f"{type(warning).__name__}: {warning}")


def inform(text: str) -> None:
    """Tell how things go, where no framework's logging does: standard output is the loop's own."""
    print(text, file=sys.stderr, flush=True)
