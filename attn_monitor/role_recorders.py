"""`RoleRecorders`: run the recorder of each role on the probe, in chunks that fit memory, alike in all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from attn_monitor import distributed
from attn_monitor.attention import LayerAttention
from attn_monitor.capture.recorder import AttentionRecorder
from attn_monitor.capture.site_cache import Doubt
from attn_monitor.errors import with_role
from attn_monitor.measurements import HealthFlag

Result = TypeVar("Result")


@dataclass
class RoleRecorders:
    """Record attention of models by role.

    Attributes:
        options: keyword arguments of every `AttentionRecorder`.
        images_at_a_time: how many images run together: the whole probe, or fewer after memory ran out.
        alone: whether a role that fails is left out while others work. Otherwise the first error is raised.
        distributed: whether the processes of the group share the probe.
        failed: errors of the latest call by role.
        reordered: health flags "order", for the next snapshot.
    """

    options: Mapping[str, Any]
    images_at_a_time: int
    alone: bool = False
    distributed: bool = False
    failed: dict[str, Exception] = field(default_factory=dict)
    reordered: list[HealthFlag] = field(default_factory=list)
    _recorders: dict[str, AttentionRecorder] = field(default_factory=dict)
    _confirmed: dict[str, int] = field(default_factory=dict)  # the last step at which a role's order was checked

    def check(self, models: Mapping[str, nn.Module], images: Tensor) -> None:
        """Find the wanted layers in each model; `AttentionError` if one is unreadable."""

        def look(role: str, model: nn.Module) -> None:
            self._in_chunks(role, lambda: self.of(role, model).check(images[: self.images_at_a_time]))

        self._of_each(models, look)

    def confirm(self, models: Mapping[str, nn.Module], images: Tensor, step: int) -> None:
        """Check in any case which patch each token is, at the end of a run."""
        self._of_each(models, lambda role, model: self._follow(role, model, images, step, last=True))

    def record(
        self, models: Mapping[str, nn.Module], images: Tensor, step: int, *, last: bool
    ) -> dict[tuple[str, int], LayerAttention]:
        """Record the whole probe by (role, layer), on the models' device; ``last`` is as in `confirm`."""
        part = distributed.share(len(images)) if self.is_shared else None
        own = images if part is None else images[list(part.indices)]

        def look(role: str, model: nn.Module) -> list[LayerAttention]:
            self._follow(role, model, images, step, last)
            return self._in_chunks(role, lambda: self._record(role, model, own, images), len(own))

        recorded = self._of_each(models, look)
        captured = {(role, attention.layer): attention for role, layers in recorded.items() for attention in layers}
        return captured if part is None else distributed.merge(captured, part)

    def of(self, role: str, model: nn.Module) -> AttentionRecorder:
        """Return the role's recorder, a new one if the model is another."""
        known = self._recorders.get(role)
        if known is None or known.model is not getattr(model, "_orig_mod", model):
            known = self._recorders[role] = AttentionRecorder(model, **self.options)
        return known

    def items(self) -> list[tuple[str, AttentionRecorder]]:
        """Return the recorders by role."""
        return list(self._recorders.items())

    def let_go(self) -> None:
        """Release the models; their layers are found again when they are next needed."""
        self._recorders.clear()
        self._confirmed.clear()
        self.failed = {}  # their tracebacks hold models

    @property
    def is_shared(self) -> bool:
        """Whether processes share the probe at present."""
        return self.distributed and distributed.is_distributed()

    def _of_each(self, models: Mapping[str, nn.Module], look: Callable[[str, nn.Module], Result]) -> dict[str, Result]:
        """Call ``look`` for each role; for one that fails, the next call finds the layers again, in all processes."""
        found: dict[str, Result] = {}
        self.failed = {}
        for role, model in models.items():
            try:
                found[role] = look(role, model)
            except Exception as error:
                self._recorders.pop(role, None)
                self.failed[role] = error
                if not self.alone:
                    break
        if self.failed and not (found and self.alone):
            role, first = next(iter(self.failed.items()))
            raise with_role(role, first) if len(models) > 1 else first
        return found

    def _record(self, role: str, model: nn.Module, own: Tensor, images: Tensor) -> list[LayerAttention]:
        recorder = self.of(role, model)
        if self.is_shared:
            recorder.check(images[: self.images_at_a_time])  # all processes must run as many forwards
        parts = zip(*(recorder(chunk) for chunk in own.split(self.images_at_a_time)), strict=True)
        return [LayerAttention.cat(layer) for layer in parts]

    def _follow(self, role: str, model: nn.Module, images: Tensor, step: int, last: bool) -> None:
        """Check what may have changed since the latest snapshot; all processes run the same checks."""
        recorder = self.of(role, model)

        def some() -> Tensor:
            return images[: self.images_at_a_time]

        def worst(ask: Callable[[], int]) -> Doubt:
            answer = self._in_chunks(role, ask)
            return Doubt(distributed.max_over_processes(answer) if self.is_shared else answer)

        first = doubt = worst(lambda: recorder.doubt(some(), last=last))
        if doubt == Doubt.DUE:
            doubt = worst(lambda: recorder.check_places(some()))
        moved = doubt >= Doubt.CHANGED and bool(worst(lambda: recorder.ask_again(some(), doubt)))
        if last and doubt == Doubt.CHANGED and not moved:  # sites may be those of an earlier time in the same state
            doubt = worst(lambda: recorder.check_places(some()))
            moved = doubt == Doubt.MOVED and bool(worst(lambda: recorder.ask_again(some(), doubt)))
        if moved:
            self.reordered.append(_reordered(role, self._confirmed.get(role, step), step))
        if first or role not in self._confirmed:
            self._confirmed[role] = step

    def _in_chunks(self, role: str, action: Callable[[], Result], images: int | None = None) -> Result:
        """Call ``action``, again with half the images at a time whenever memory runs out."""
        while True:
            try:
                return self._with_one_outcome(role, action)
            except Exception as error:
                chunk = min(self.images_at_a_time, images or self.images_at_a_time)
                if not distributed.is_out_of_memory(error) or chunk == 1:
                    raise
                self.images_at_a_time = (chunk + 1) // 2

    def _with_one_outcome(self, role: str, action: Callable[[], Result]) -> Result:
        """Call ``action`` so that a failure in one process is one in all."""
        if not self.is_shared:
            return action()
        try:
            return distributed.run_in_all(action)
        except Exception:
            self._recorders.pop(role, None)  # so that all processes find the layers again, as sharded models need
            raise


def _reordered(role: str, since: int, step: int) -> HealthFlag:
    text = (
        f"its tokens hold other parts of the image than at step {since:,}, and its attention is read in the new order "
        f"from here on. Maps of steps after {since:,} may be drawn in the old order: draw them again from checkpoints "
        "(attn-monitor backfill)"
    )
    return HealthFlag("order", role, None, (), step, None, text)
