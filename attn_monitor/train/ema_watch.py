"""Sample student and teacher around a few training steps after snapshots, for `measure.ema_checks` to judge.

In those steps a hook on the teacher's first layer and one on optimizers copy a few hundred values on their device; they
are fetched once, after the step. About eleven of the first steps are watched, and one after the second, fourth, eighth,
… snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from attn_monitor.background.failures import Failures
from attn_monitor.capture.observe.isolation import all_modules, is_isolated
from attn_monitor.capture.role_names import paths_of_both_roles
from attn_monitor.measure.ema_checks import EmaChecker
from attn_monitor.measure.ema_steps import At, Moment, OptimizerStep, WatchedStep
from attn_monitor.measure.health import HealthLimits
from attn_monitor.measurements import HealthFlag
from attn_monitor.train.weak_hooks import add_hook, compiles
from attn_monitor.train.weight_samples import Pair, WeightSamples, random_modules, student_and_teacher

FIRST, AGAIN, LATER = 8, 3, 1  # steps to watch: after the first snapshot, once later, after some snapshots
BATCHES = 16  # to wait for each of these steps, as gradients may be accumulated
MOMENTS = 16  # samples per batch; a batch with more is dropped
WIRING = "looking at how student and teacher are wired"  # the part's name in `Failures`


class EmaWatch:
    """Watch how a teacher follows its student in one run, on rank zero.

    Call `begin` at a snapshot, `batch_ended` at the end of each batch, and `between_steps` before the next one while it
    `wants` that. After a failure, nothing is watched until the next snapshot.

    Args:
        limits: when a health flag is raised.
        failures: records failures.
        found: takes flags, and the step, as soon as they are found.
    """

    def __init__(
        self, limits: HealthLimits, failures: Failures, found: Callable[[Sequence[HealthFlag], int], None]
    ) -> None:
        self._limits, self._failures, self._found = limits, failures, found
        self._batch: _Batch | None = None
        self.stop()

    def begin(self, models: Mapping[str, nn.Module], root: nn.Module | None, step: int) -> None:
        """Begin to watch some of the next steps, and report what needs no watching.

        Args:
            models: the models by role; without one student and one teacher nothing is watched.
            root: the module around all models, if there is one.
            step: optimizer steps done.
        """

        def begin() -> None:
            if self._models != models:
                self._watch(models, root)
            if self._shared:
                self._found([HealthFlag("shared_weights", "teacher", None, (), step, None, self._shared)], step)
            elif self._samples is not None:
                self._plan(self._samples, step)
                self._begin_batch(step)

        self._try(begin)

    def wants(self, step: int) -> bool:
        """Whether `between_steps` has anything to do."""
        return self._batch is not None or step >= self._again_at

    def between_steps(self, step: int) -> None:
        """End the watched batch, and watch the next one if more are needed."""
        self.end(step)
        self._try(lambda: self._begin_batch(step))

    def end(self, step: int) -> None:
        """End the watched batch, if there is one, and report what was found."""

        def end() -> None:
            batch = self._drop_batch()
            if batch is not None and self._checker is not None:
                self._tries -= 1
                seen = batch.seen(step)
                if seen is not None and len(seen.moments[0].teacher) == len(self._checker.sampled.precision):
                    self._left -= 1
                    self._found(self._checker.look(seen), step)

        self._try(end)

    def batch_ended(self) -> None:
        """Sample at the end of the batch, between two places where loops update an EMA."""
        if self._batch is not None:
            self._try(partial(self._batch.moment, "batch end"))

    def stop(self) -> None:
        """Remove all hooks, and forget the models."""
        self._drop_batch()
        self._models, self._random = dict[str, nn.Module](), dict[str, nn.Module]()
        self._samples: WeightSamples | None = None
        self._checker: EmaChecker | None = None
        self._layer: nn.Module | None = None
        self._shared = ""
        self._left = self._tries = self._snapshots = 0
        self._again_at = math.inf  # step at which to watch again

    def _watch(self, models: Mapping[str, nn.Module], root: nn.Module | None) -> None:
        self.stop()
        pair = student_and_teacher(models)
        self._samples = None if pair is None or pair[0] is pair[1] else WeightSamples.of(*pair)
        self._shared = _shared(models, root, pair, self._samples)
        self._layer = _first_layer(self._samples, root)
        self._models = dict(models)

    def _plan(self, samples: WeightSamples, step: int) -> None:
        """Decide at a snapshot how many of the next steps to watch."""
        if self._checker is None:
            self._checker = EmaChecker(samples.described(samples.parameters()), self._limits.stall_steps)
            self._random = random_modules(samples.teacher)
            self._again_at, self._left = step + self._limits.stall_steps, FIRST
        self._snapshots += 1
        if self._snapshots & (self._snapshots - 1) == 0:  # a power of two
            self._left = max(self._left, LATER)
            self._tries = BATCHES * self._left

    def _begin_batch(self, step: int) -> None:
        if step >= self._again_at:
            self._again_at, self._left, self._tries = math.inf, max(self._left, AGAIN), BATCHES * AGAIN
        if self._samples is not None and not self._samples.are_there():
            self._samples = None  # the models have changed, and these names do not fit them
        if self._left > 0 and self._tries > 0 and self._samples is not None and self._checker is not None:
            # Not in the first batch, which shows whether training compiles: the hook would cause a recompilation.
            layer = self._layer if self._checker.begun and not compiles(()) else None
            self._batch = _Batch(self._samples, layer, self._random, self._checker.student_moved, step)

    def _drop_batch(self) -> _Batch | None:
        """Remove the hooks of the watched batch, and return it."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.remove()
        return batch

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._failures.failed(WIRING, error)
            self.stop()


class _Batch:
    """Samples of one batch."""

    def __init__(
        self,
        samples: WeightSamples,
        layer: nn.Module | None,
        random: Mapping[str, nn.Module],
        student_moved: bool,
        step: int,
    ) -> None:
        self._samples, self._layer, self._random, self._begun = samples, layer, random, step
        self._pair: Pair = samples.parameters()  # held, as FSDP replaces them while modules run
        self._moments: list[tuple[At, Tensor, Tensor]] = []
        self._optimizers: list[tuple[OptimizerStep, Tensor | None]] = []
        self._with_gradient = not student_moved
        self._noisy: tuple[str, ...] = ()
        self.error: Exception | None = None  # of a hook
        self.moment("start")
        self._handles = [add_hook(register_optimizer_step_post_hook, self._after_step)]
        if layer is not None:
            self._handles.append(add_hook(layer.register_forward_pre_hook, self._before_forward))

    def moment(self, at: At) -> None:
        """Sample the weights, at most `MOMENTS` times."""
        if len(self._moments) < MOMENTS:
            self._moments.append((at, *self._pair.sample()))

    def seen(self, step: int) -> WatchedStep | None:
        """Return the samples of the finished batch; None if no optimizer stepped, or there were too many samples.

        An error in a hook is raised here.
        """
        if self.error is not None:
            raise self.error
        self.moment("end")
        if not self._optimizers or len(self._moments) >= MOMENTS:
            return None
        moments, *values = zip(*self._moments, strict=True)
        students, teachers = (torch.stack(samples).cpu().double() for samples in values)
        student, teacher = (values.cpu().double() for values in self._samples.sample_of_buffers())
        return WatchedStep(
            self._begun,
            step,
            tuple(map(Moment, moments, students, teachers)),
            tuple(_with_gradient(o, gradient) for o, gradient in self._optimizers),
            None if self._layer is None else "forward" in moments,
            self._noisy,
            any(p.requires_grad for p in self._pair.teacher),
            any(p.requires_grad for p in self._pair.student),
            (student, teacher),
        )

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _before_forward(self, module: nn.Module, *_: Any) -> None:
        """Sample as the teacher begins to run; the last time before the step counts."""
        if module is not self._layer or is_isolated() or any(o.holds_student for o, _ in self._optimizers):
            return
        self._moments = [moment for moment in self._moments if moment[0] != "forward"]
        self.moment("forward")
        self._noisy = tuple(name for name, m in self._random.items() if m.training)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if len(self._moments) >= MOMENTS:  # the batch is dropped
            return
        students, teachers = ({id(p) for p in tensors} for tensors in self._pair)
        ids = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
        ours = [group for group, held in zip(optimizer.param_groups, ids, strict=True) if held & students]
        rates = [_number(group.get("lr")) for group in ours or optimizer.param_groups]
        lr = math.nan if any(map(math.isnan, rates)) else max(rates, default=0.0)
        step = OptimizerStep(bool(ours), any(held & teachers for held in ids), lr, not self._with_gradient)
        self._optimizers.append((step, self._gradient() if ours and self._with_gradient else None))
        self.moment("step" if ours else "other step")

    def _gradient(self) -> Tensor | None:
        gradients = [p.grad for p in self._pair.student if p.grad is not None]
        return Pair(gradients, []).sample()[0] if gradients else None


def _with_gradient(step: OptimizerStep, gradient: Tensor | None) -> OptimizerStep:
    has = step.has_gradient or (gradient is not None and bool(gradient.any()))
    return OptimizerStep(step.holds_student, step.holds_teacher, step.lr, has)


def _number(lr: Any) -> float:
    """Return a learning rate as a float; NaN if reading it would synchronise with a device."""
    return math.nan if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr or 0)


def _shared(
    models: Mapping[str, nn.Module],
    root: nn.Module | None,
    pair: tuple[nn.Module, nn.Module] | None,
    samples: WeightSamples | None,
) -> str:
    """Describe how a trained student and its teacher share weights; empty if they do not."""
    if pair is not None and pair[0] is pair[1]:
        return _same("") if _is_trained(pair[0]) else ""
    if pair is None and root is not None:
        for model in models.values():
            paths = paths_of_both_roles(root, model)
            if paths and _is_trained(model):
                return _same(f" ({', '.join(paths)})")
    if samples is not None:
        shared, count = samples.sharing_memory()
        if shared > count / 2:
            return (
                f"{shared} of its {count} parameters are in the same memory as the student's, so that each step moves "
                "both, as after `p.data = q.data`, copy.copy or load_state_dict(assign=True). Make it with "
                "copy.deepcopy, or with load_state_dict"
            )
    return ""


def _same(where: str) -> str:
    return f"it is the student itself{where} and no average of it. Make it with copy.deepcopy"


def _is_trained(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def _first_layer(samples: WeightSamples | None, root: nn.Module | None) -> nn.Module | None:
    """Find the first layer of the teacher alone, which runs whenever it does; None if anything is compiled."""
    if samples is None:
        return None
    around = [] if root is None else all_modules(root)
    modules = [*around, *all_modules(samples.student), *all_modules(samples.teacher)]
    if compiles(modules):
        return None
    shared = set(samples.student.modules())
    layers = (m for m in samples.teacher.modules() if not m._modules and any(True for _ in m.parameters()))
    return next((m for m in layers if m not in shared), None)
