"""Run a model with ablated attention on synthetic images, a batch at a time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_monitor.capture.observe.forward import Forward, run_forward
from attn_monitor.capture.observe.observation import SiteKey
from attn_monitor.capture.observe.random_projections import SIZE
from attn_monitor.capture.token_places.ablating_observer import AblatingObserver
from attn_monitor.capture.token_places.token_parameters import ParameterUses, TokenParameter
from attn_monitor.capture.token_places.tokens import Call, SiteFormat, Tokens, concatenate


class AblatedModel:
    """Wrap a model so that a call on images returns sketches of the tokens at every depth, with attention ablated.

    Args:
        model: The model to run.
        forward: Calls the model on images.
        formats: Layout of the tensors at each site to read.
        paths: Modules to read the inputs and outputs of.
        device: The device of the model, to which each batch is moved.
        batch_size: How many images run at once.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        formats: Mapping[SiteKey, SiteFormat],
        paths: set[str],
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.model, self.forward, self.formats, self.paths = model, forward, formats, paths
        self.device, self.batch_size = device, batch_size
        self.token_parameters: Sequence[TokenParameter] | None = None  # known after the first call
        self._modules = dict(model.named_modules())

    def __call__(
        self,
        images: Tensor,
        seed: int,
        *,
        marks: Mapping[SiteKey, Tensor] | None = None,
        nudged: Sequence[TokenParameter] = (),
        by_head: int = 0,
        exchanged: Mapping[Call, Tensor] | None = None,
        first_alone: bool = False,
        sketch_size: int = SIZE,
    ) -> Tokens:
        """Run the model on images and return the tokens.

        Args:
            images: (B, C, *size), on any device.
            seed: Seed of the global random state before each batch, which is restored afterwards.
            marks: As in `AblatingObserver`, for all B images.
            nudged: As in `AblatingObserver`.
            by_head: As in `AblatingObserver`.
            exchanged: As in `AblatingObserver`, for all B images.
            first_alone: Whether the first image runs in a batch of its own, so that its tokens differ from those of the
                others where they depend on the images beside it.
            sketch_size: As in `AblatingObserver`.
        """
        starts = [*range(0, len(images), self.batch_size)]
        if first_alone and self.batch_size > 1:
            starts = [0, *range(1, len(images), self.batch_size)]
        while True:
            parts = []
            for start, end in pairwise([*starts, len(images)]):
                batch = slice(start, end)
                marks_of_batch = None if marks is None else {key: m[batch] for key, m in marks.items()}
                others = {call: tokens[batch] for call, tokens in (exchanged or {}).items()}
                parts.append(self._run(images[batch], seed, marks_of_batch, nudged, by_head, others, sketch_size))
                wrong = [site for site in self.formats.values() if site.decide()]
                if wrong:  # repeat without what was wrongly taken for queries
                    break
            else:
                return concatenate(parts)

    def _run(
        self,
        images: Tensor,
        seed: int,
        marks: Mapping[SiteKey, Tensor] | None,
        nudged: Sequence[TokenParameter],
        by_head: int,
        exchanged: Mapping[Call, Tensor],
        sketch_size: int,
    ) -> Tokens:
        images = images.to(self.device)
        alone = len(images) == 1 < self.batch_size  # an embedding of all positions is used like a token then
        first = ParameterUses(self.model, len(images)) if self.token_parameters is None and not alone else None
        observer = AblatingObserver(
            images,
            self.formats,
            marks=marks,
            nudged=nudged,
            uses=first,
            by_head=by_head,
            exchanged=exchanged,
            sketch_size=sketch_size,
        )

        def seeded(model: nn.Module, x: Tensor) -> Any:
            seed_everything(seed, x.device)
            return self.forward(model, x)

        with ExitStack() as stack:
            observer.watch_calls(stack, self._modules, self.paths)
            run_forward(self.model, images, seeded, observer, self._modules.items())
        if first is not None:
            self.token_parameters = first.tokens
        return observer.tokens


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed all random generators; the isolation around every forward restores their state."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the state that models use
