"""Read PyTorch's fused attention, which receives q, k and v: rows are recomputed from q and k in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attn_monitor.capture.attention_rows import CallingConvention, Chunk, Query, chunks_of, widen
from attn_monitor.capture.kinds.attention_product import AttentionProduct
from attn_monitor.capture.kinds.kind import AttentionCall, AttentionKind, Operation, read_rows, unreadable
from attn_monitor.capture.observation import Observation, RefusedObservation


class FusedAttention(AttentionKind):
    """Recognise `F.scaled_dot_product_attention` by the operations of its backends."""

    @staticmethod
    def concerns(func: Any) -> bool:
        """Return whether the operation is one of the backends, on (B, H, N, D)."""
        return "_scaled_dot_product_" in str(func)

    def run(self, operation: Operation) -> tuple[Any, FusedCall]:
        """Run the operation, whose arguments are read by their names in its schema."""
        given = zip(_argument_names(operation.func), operation.args, strict=False)
        named = {**dict(given), **operation.kwargs}
        out = operation.run()
        call = FusedCall(
            op=str(operation.func),
            q=named["query"],
            k=named["key"],
            v=named["value"],
            result=out if isinstance(out, Tensor) else out[0],  # some return statistics too
            bias=named.get("attn_mask", named.get("attn_bias")),
            causal=bool(named.get("is_causal")),
            scale=named.get("scale"),
        )
        return out, call


@functools.lru_cache(maxsize=256)
def _argument_names(func: Any) -> tuple[str, ...]:
    schema = getattr(func, "_schema", None)
    return tuple(a.name for a in schema.arguments) if schema is not None else ()


@dataclass
class FusedCall(AttentionCall):
    """Hold the tensors of one fused attention, (B, H, N, D), and give access to its rows.

    Attributes:
        op: Name of the operation.
        q: Queries, (B, H, Q, D).
        k: Keys, (B, H, K, D), with fewer heads where queries are grouped.
        v: Values, likewise.
        result: What the operation returned.
        bias: Added to the scores, or False where a key is masked.
        causal: Whether each query sees only the keys up to its own index.
        scale: Factor of q·k; None for 1/√D.
        heads_first: Whether the result is (B, H, N, D), else (B, N, H, D).
        convention: That of a third-party operation.
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    result: Tensor
    bias: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    heads_first: bool = True
    convention: CallingConvention | None = None
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # scores of one query

    def read(self, query: Query, *, verify: bool, convention: CallingConvention | None = None) -> Observation:
        """Read rows and compare them with the result, see `AttentionCall.read`."""
        if self.q.ndim != 4:
            reason = f"its q has {self.q.ndim} dimensions, not (batch, heads, tokens, channels)"
            queries, keys = self.q.shape[-2], self.k.shape[-2]
            return RefusedObservation(op=self.op, batch=1, heads=1, queries=queries, keys=keys, reason=reason)
        batch, heads, queries, _ = self.q.shape
        shape: dict[str, Any] = {
            "op": self.op,
            "batch": batch,
            "heads": heads,
            "queries": queries,
            "keys": self.k.shape[2],
        }
        reason = unreadable(query, queries, self.q, self.k, self.v)
        if reason:
            return RefusedObservation(**shape, reason=reason)
        return read_rows(self, self.v, self._output() if verify else None, query, shape)

    def product(self, convention: CallingConvention | None = None) -> AttentionProduct:
        """Return the operands and the result."""
        return AttentionProduct(self.result, self.q.shape[:-1], self.q, self.k, self.v, self.heads_first)

    def row(self, query: int) -> Tensor:
        """Return one query's attention weights, (B, H, K)."""
        return self._scores_of(query).softmax(-1)[:, :, 0]

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of all queries in chunks."""
        laid_out = replace(self, k=self._keys.contiguous())  # copy once instead of in every chunk's product
        for queries in chunks_of(self.q.shape[2]):
            scores = laid_out._scores(slice(queries.start, queries.stop))
            yield Chunk(queries, scores.softmax(-1), scores.amax(-1) if logits else None)

    def largest_logit(self, query: int) -> Tensor:
        """Return one query's largest logit, (B, H)."""
        return self._scores_of(query).amax((-2, -1))

    def _scores_of(self, query: int) -> Tensor:
        """Return one query's scores, (B, H, 1, K), cached because its row and its largest logit both need them."""
        if query not in self._kept:
            self._kept = {query: self._scores(slice(query, query + 1))}
        return self._kept[query]

    @functools.cached_property
    def _keys(self) -> Tensor:
        k, heads = widen(self.k), self.q.shape[1]
        return k.repeat_interleave(heads // k.shape[1], 1) if k.shape[1] != heads else k  # grouped queries

    def _scores(self, queries: slice) -> Tensor:
        """Compute the softmax inputs of some queries, (B, H, queries, K)."""
        q, k = widen(self.q[:, :, queries]), self._keys
        scale = self.scale if self.scale is not None else 1 / math.sqrt(q.shape[-1])
        q = q * scale
        # For a single query compute k · q: q · kᵀ would copy and transpose the keys of several images.
        scores = (k @ q.mT).mT if q.shape[2] == 1 else q @ k.mT  # (B, H, queries, K)
        if self.bias is not None:
            bias = self.bias[..., queries, :] if self.bias.ndim > 1 and self.bias.shape[-2] > 1 else self.bias
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        if self.causal:
            index = torch.arange(self.q.shape[2], device=q.device)[queries]
            scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > index[:, None], -math.inf)
        return scores

    def _output(self) -> Tensor:
        """View the operation's own result as (B, H, Q, D)."""
        batch, heads, length, _ = self.q.shape
        if self.heads_first:
            return self.result.reshape(batch, heads, length, -1)
        return self.result.reshape(batch, length, heads, -1).transpose(1, 2)
