"""Read from a model's error which image sizes it may take, where it refused the size that it was given."""

from __future__ import annotations

import math
import re

_MOST = 6  # sizes to try
_PREFIXES = range(9)  # CLS and registers among a number of tokens


def sizes_in(text: str, size: int) -> list[int]:
    """Return the square image sizes that an error about images of another size suggests, at most six.

    A size is suggested as such ("doesn't match model (96)"), or by the numbers of tokens that did not fit ("The size of
    tensor a (197) must match the size of tensor b (37)"). Whether the model takes one of them is for the caller to try.

    Args:
        text: The error's text.
        size: Side of the images that the model was given, in pixels.

    Example:
        >>> sizes_in("Input height (224) doesn't match model (96).", 224)
        [96]
        >>> sizes_in("The size of tensor a (197) must match the size of tensor b (37) at dimension 1", 224)[0]
        96
    """
    numbers = list(dict.fromkeys(int(n) for n in re.findall(r"\d+", text) if len(n) < 6))
    tokens = [
        found
        for given in numbers
        for wanted in numbers
        for prefix in _PREFIXES
        if given != wanted and (found := _size_of_tokens(given - prefix, wanted - prefix, size))
    ]
    plain = [n for n in numbers if 16 <= n <= 2048 and n != size]
    named = size in numbers  # then other numbers are sizes, and not numbers of tokens
    return list(dict.fromkeys([*plain, *tokens] if named else [*tokens, *plain]))[:_MOST]


def _size_of_tokens(given: int, wanted: int, size: int) -> int | None:
    """Return the side of an image with ``wanted`` patches, where one of ``size`` has ``given``; None without one."""
    side, other = (math.isqrt(n) if n > 0 and math.isqrt(n) ** 2 == n else 0 for n in (given, wanted))
    if not side or not other or size % side:
        return None
    return size // side * other
