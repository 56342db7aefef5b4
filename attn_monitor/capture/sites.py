"""The attention sites of a model, as found on noise images: each can be read, or is refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attn_monitor.capture.attention_rows import CallingConvention, Folding
from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.token_places.layout import TokenLayout
from attn_monitor.capture.token_places.site_places import SitePlaces
from attn_monitor.errors import AttentionError


def site_name(key: SiteKey) -> str:
    """Module path, with `#n` when the module runs attention more than once in a forward."""
    path, count = key
    return f"{path or '(root)'}#{count}" if count else path or "(root)"


@dataclass(frozen=True, kw_only=True)
class _Site:
    """One place in the model where attention runs."""

    index: int  # in order of execution
    key: SiteKey
    op: str
    heads: int
    queries: int
    keys: int
    mixed: bool  # what meets V is not a softmax as it was computed
    error: float | None  # relative difference between row·V and the model's own output
    folding: Folding | None  # of batch and heads, where the operation has them in one dimension
    scope: str  # path of the module in which all of it ran
    convention: CallingConvention | None  # of an operation from outside PyTorch
    places: SitePlaces
    overlooked: bool = False  # it mixes tokens, and no attention was seen in it
    stack: str = ""  # path of a second stack of blocks that it is in, such as an MAE's decoder; "" in the encoder

    @property
    def name(self) -> str:
        """See `site_name`."""
        return site_name(self.key)


@dataclass(frozen=True, kw_only=True)
class ReadableSite(_Site):
    """A site whose keys have known places."""

    layout: TokenLayout
    refusal: ClassVar[None] = None


@dataclass(frozen=True, kw_only=True)
class RefusedSite(_Site):
    """A site of which no map is shown."""

    refusal: AttentionError
    layout: ClassVar[None] = None


Site = ReadableSite | RefusedSite


def prefix_names(site: ReadableSite) -> tuple[str, ...]:
    """See `LayerAttention.prefix_names`."""
    names, registers = [], 0
    for token in site.layout.prefix:
        name = site.places.prefix_names.get(token, f"token {token}")
        registers += name == "register"
        names.append(f"register {registers}" if name == "register" else name)
    return tuple(names)
