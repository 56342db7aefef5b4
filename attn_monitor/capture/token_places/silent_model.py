"""Run a model with silenced attention on made-up images, a batch at a time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attn_monitor.capture.forward import Forward, run_forward
from attn_monitor.capture.observation import SiteKey
from attn_monitor.capture.token_places.silent_observer import SilentObserver
from attn_monitor.capture.token_places.token_parameters import ParameterUses, TokenParameter
from attn_monitor.capture.token_places.tokens import Call, SiteFormat, Tokens, concatenate


class SilentModel:
    """A model with silenced attention: called on images, it gives the tokens of each depth.

    ``formats`` are those of the sites whose tokens are read; ``paths`` those of modules whose inputs and outputs are.
    ``batch_size`` images run at once, on the ``device``; the others wait wherever they are.
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
    ) -> Tokens:
        """The tokens of (B, C, H, W) images; each batch runs in the random state of ``seed``.

        ``marks``, ``nudged``, ``by_head`` and ``exchanged`` as in `SilentObserver`, of all the images.
        """
        while True:
            parts = []
            for start in range(0, len(images), self.batch_size):
                batch = slice(start, start + self.batch_size)
                marks_of_batch = None if marks is None else {key: m[batch] for key, m in marks.items()}
                others = {call: tokens[batch] for call, tokens in (exchanged or {}).items()}
                parts.append(self._run(images[batch], seed, marks_of_batch, nudged, by_head, others))
                wrong = [site for site in self.formats.values() if site.decide()]
                if wrong:  # what was taken to be their queries is none: once more without
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
    ) -> Tokens:
        images = images.to(self.device)
        first = ParameterUses(self.model, len(images)) if self.token_parameters is None else None
        observer = SilentObserver(
            images, self.formats, marks=marks, nudged=nudged, uses=first, by_head=by_head, exchanged=exchanged
        )

        def seeded(model: nn.Module, x: Tensor) -> Any:
            _seed_everything(seed, x.device)
            return self.forward(model, x)

        with ExitStack() as stack:
            observer.watch_calls(stack, self._modules, self.paths)
            run_forward(self.model, images, seeded, observer, self._modules.items())
        if first is not None:
            self.token_parameters = first.tokens
        return observer.tokens


def _seed_everything(seed: int, device: torch.device) -> None:
    """Another random state, which the isolation around every forward undoes."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the state that models use
