"""Distinguish the model's own exceptions from bugs of this package while a model runs under the observer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from attn_monitor.errors import chain_of

Function = TypeVar("Function", bound=Callable[..., Any])
_ORIGIN = "_attn_monitor_origin"


def errors_from(origin: Literal["model", "monitor"]) -> Callable[[Function], Function]:
    """Return a decorator that marks exceptions with their origin; in nested calls the innermost mark counts."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not hasattr(error, _ORIGIN):
                    setattr(error, _ORIGIN, origin)
                raise

        return marked  # type: ignore[return-value]

    return decorate


def is_monitor_error(error: BaseException | None) -> bool:
    """Return whether an error, or one in its chain of causes, is a bug of this package."""
    return any(getattr(each, _ORIGIN, "") == "monitor" for each in chain_of(error, contexts=True))
