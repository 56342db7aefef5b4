"""Show messages by warnings that never end a run, or on standard error."""

from __future__ import annotations

import sys
import warnings


def warn(text: str, *, stacklevel: int | None = None) -> None:
    """Warn; if the user has turned warnings into exceptions, print instead, as training must go on.

    Args:
        text: the message.
        stacklevel: as in `warnings.warn`; None gives no line, as no line of the user's caused the warning.
    """
    try:
        if stacklevel is None:
            warnings.warn_explicit(text, UserWarning, "attn_monitor", 0, module="attn_monitor")
        else:
            warnings.warn(text, stacklevel=stacklevel + 1)
    except UserWarning as error:
        print_in_place_of(error)


def print_in_place_of(warning: UserWarning) -> None:
    """Print a warning's class and text."""
    inform(f"{type(warning).__name__}: {warning}")


def inform(text: str) -> None:
    """Print a message on standard error, as standard output belongs to the training loop."""
    print(text, file=sys.stderr, flush=True)
