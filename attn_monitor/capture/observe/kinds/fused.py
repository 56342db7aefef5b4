"""Read PyTorch's fused attention, which receives q, k and v: rows are recomputed from q and k in float32."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_monitor.capture.observe.attention_rows import Chunk, Query, chunks_of, widen
from attn_monitor.capture.observe.kinds.attention_product import AttentionProduct
from attn_monitor.capture.observe.kinds.kernel_arguments import KernelOptions
from attn_monitor.capture.observe.kinds.kind import AttentionCall, AttentionKind, Operation, read_rows, unreadable
from attn_monitor.capture.observe.memory import fetched_once
from attn_monitor.capture.observe.observation import Observation, RefusedObservation

_HIDES = 5e3  # no score makes up for such a bias; masks hold -1e4, -1e9, the smallest number or -inf


class FusedAttention(AttentionKind):
    """Recognise `F.scaled_dot_product_attention` by the operations of its backends."""

    @staticmethod
    def concerns(func: Any) -> bool:
        """Return whether the operation is one of the backends, on (B, H, N, D)."""
        return "_scaled_dot_product_" in str(func) and "backward" not in str(func)

    def run(self, operation: Operation) -> tuple[Any, FusedCall]:
        """Run the operation, whose arguments are read by their names in its schema."""
        named = operation.named
        out = operation.run()
        call = FusedCall(
            op=operation.name,
            q=named["query"],
            k=named["key"],
            v=named["value"],
            result=out if isinstance(out, Tensor) else out[0],  # some return statistics too
            options=KernelOptions(
                scale=named.get("scale"),
                causal=bool(named.get("is_causal")),
                bias=named.get("attn_mask", named.get("attn_bias")),
            ),
        )
        return out, split_sequences(call)


def split_sequences(call: FusedCall) -> FusedCall:
    """Give a batch dimension to sequences of one length that are packed into one, where a mask keeps them apart."""
    tokens, bias = call.q.shape[-2], call.options.bias
    packed = call.q.ndim == 4 and call.q.shape[0] == 1 and tokens == call.k.shape[-2]
    if bias is None or not packed or bias.shape[-2:] != (tokens, tokens):
        return call
    count = _sequences(bias)
    if count == 1:
        return call
    q, k, v, result = (t[0].unflatten(1, (count, -1)).transpose(0, 1) for t in (call.q, call.k, call.v, call.result))
    of_heads = bias.reshape(-1, tokens, tokens)  # (1 or H, T, T)
    apart = of_heads.unflatten(-1, (count, -1)).unflatten(1, (count, -1)).diagonal(dim1=1, dim2=3)
    options = replace(call.options, bias=apart.permute(3, 0, 1, 2))
    return replace(call, q=q, k=k, v=v, result=result, options=options)


@fetched_once
def _sequences(bias: Tensor) -> int:
    """Return how many sequences of one length a mask (…, T, T) keeps apart; 1 if it is no such mask."""
    visible = bias if bias.dtype == torch.bool else bias > -_HIDES
    visible = visible.flatten(0, -3).any(0) if visible.ndim > 2 else visible
    ends = ~visible.diagonal(1)  # neighbours that do not see each other are of two sequences
    sequence = F.pad(ends.cumsum(0), (1, 0))  # (T,), its number for each token
    in_parts = torch.arange(len(visible), device=bias.device) * (sequence[-1] + 1) // len(visible)
    other = (visible & (sequence[:, None] != sequence)).any() | (sequence != in_parts).any()
    count, differs = torch.stack([sequence[-1] + 1, other.long()]).tolist()
    return 1 if differs else int(count)


class CallingConvention(NamedTuple):
    """Describe how a third-party attention kernel takes its arguments and lays out its result."""

    packed_dim: int  # the dimension of length 3 that holds q, k and v; -1 where they are separate tensors
    tokens_first: bool  # (B, N, H, D), else (B, H, N, D)
    scale: int  # its number among the factors that it could be
    causal: bool
    heads_first_out: bool  # the result is (B, H, N, D), else (B, N, H, D)
    result: int  # its number among the tensors returned


@dataclass
class FusedCall(AttentionCall):
    """Hold the tensors of one fused attention, (B, H, N, D), and give access to its rows.

    Attributes:
        op: Name of the operation.
        q: Queries, (B, H, Q, D).
        k: Keys, (B, H, K, D), with fewer heads where queries are grouped.
        v: Values, likewise.
        result: What the operation returned, (B, H, Q, D), in the memory that the model reads.
        options: What it was given beside these; without a scale it is 1/√D.
        convention: That of a kernel whose layout had to be found.
    """

    op: str
    q: Tensor
    k: Tensor
    v: Tensor
    result: Tensor
    options: KernelOptions
    convention: CallingConvention | None = None
    _kept: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # scores of one query

    def read(self, query: Query, *, verify: bool) -> Observation:
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
        return read_rows(self, self.v, self.result if verify else None, query, shape)

    def product(self) -> AttentionProduct:
        """Return the operands and the result."""
        return AttentionProduct(self.result, self.q.shape[:-1], self.q, self.k, self.v)

    def row(self, query: int) -> Tensor:
        """Return one query's attention weights, (B, H, K)."""
        return self._weights(self._scores_of(query))[:, :, 0]

    def chunks(self, *, logits: bool = False) -> Iterator[Chunk]:
        """Yield the rows of all queries in chunks."""
        laid_out = replace(self, k=self._keys.contiguous())  # copy once instead of in every chunk's product
        for queries in chunks_of(self.q.shape[2]):
            scores = laid_out._scores(slice(queries.start, queries.stop))
            yield Chunk(queries, self._weights(scores), scores.amax(-1) if logits else None)

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
        q, k, given = widen(self.q[:, :, queries]), self._keys, self.options
        q = q * (given.scale if given.scale is not None else 1 / math.sqrt(q.shape[-1]))
        # For a single query compute k · q: q · kᵀ would copy and transpose the keys of several images.
        scores = (k @ q.mT).mT if q.shape[2] == 1 else q @ k.mT  # (B, H, queries, K)
        if given.softcap:
            scores = given.softcap * (scores / given.softcap).tanh()
        if given.bias is not None:
            bias = given.bias[..., queries, :] if given.bias.ndim > 1 and given.bias.shape[-2] > 1 else given.bias
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        if not given.causal and given.window == (-1, -1) and given.alibi is None:
            return scores
        distance = self._distances(queries)
        if given.alibi is not None:
            scores = scores - given.alibi.reshape(-1, scores.shape[1], 1, 1) * distance.abs()
        left, right = given.window
        hidden = distance > 0 if given.causal else distance != distance
        hidden = hidden | (distance < -left if left >= 0 else False) | (distance > right if right >= 0 else False)
        return scores.masked_fill(hidden, -math.inf)

    def _distances(self, queries: slice) -> Tensor:
        """Return how far each key is behind each query, (queries, K); the last query is at the last key in kernels."""
        keys = torch.arange(self.k.shape[2], device=self.q.device)
        index = torch.arange(self.q.shape[2], device=self.q.device)[queries]
        return keys - index[:, None] - (self.k.shape[2] - self.q.shape[2] if self.convention is not None else 0)

    def _weights(self, scores: Tensor) -> Tensor:
        """Return the softmax of scores (B, H, queries, K), in which sinks take part."""
        if self.options.sinks is None:
            return scores.softmax(-1)
        sinks = self.options.sinks.to(scores).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
