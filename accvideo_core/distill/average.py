"""The weights' running average, which is validated and exported instead of the weights of the last step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of parameters, laid out like them: where they are sharded, each process keeps its shard's.

    decay  0 keeps none: the average is the parameters. It is less at first, (1 + n) / (10 + n) after n updates, so that the
           teacher's weights, where it begins, are soon forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values: list[Tensor] = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters as they are after `updates` updates before this one."""
        if self.decay:
            decay = min(self.decay, (1 + updates) / (10 + updates))
            torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the averaged weights inside the block, and its own again after it, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=bool(self.decay)):
            own = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(own)
