"""Whose error it is: while a model runs under the observer, it may be the model's or a mistake of this package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
_WHOSE = "_attn_monitor_raised_by"


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
