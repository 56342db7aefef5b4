"""What can go wrong with attention, as types: one per reason for which a map is refused. And whose error it is.

While a model runs under the observer, an exception may be the model's or a mistake of this package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_WHOSE = "_attn_monitor_raised_by"


class AttentionError(RuntimeError):
    """Base of every refusal: no map is shown, and the message says why and what to do."""


class NoAttentionError(AttentionError):
    """The model ran, but no token attention was observed in it."""


class UnsupportedAttentionError(AttentionError):
    """Attention was observed, but it has no global row over the image's patches (windows, channels, pooling)."""


class QueryError(AttentionError):
    """The query asked for does not exist in this model, or more than one token could be meant."""


class LayerError(AttentionError):
    """The layer asked for does not exist in this model."""


class VerificationError(AttentionError):
    """The captured row times V is not what the model computed."""


class NonFiniteAttentionError(AttentionError):
    """The attention row holds NaN or infinity."""


class ForwardError(AttentionError):
    """The model refused the images, or gives a different answer each time it is asked."""


class HeadError(AttentionError):
    """The head asked for does not exist in this model."""


def raises_for(whose: str) -> Callable[[Function], Function]:
    """A decorator that writes on exceptions whose they are, "monitor" or "model"; what is written first holds."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not hasattr(error, _WHOSE):
                    setattr(error, _WHOSE, whose)
                raise

        return called  # type: ignore[return-value]

    return decorate


def of_monitor(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, is a mistake of this package."""
    if error is None:
        return False
    return getattr(error, _WHOSE, "") == "monitor" or of_monitor(error.__cause__ or error.__context__)
