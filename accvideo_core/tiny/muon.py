"""Muon: momentum, made orthogonal, as the step of a hidden layer (https://kellerjordan.github.io/posts/muon/).

torch.optim.Muon runs its iteration in bfloat16, matrix by matrix: ten times the cost of the network itself on a CPU without
bfloat16 arithmetic. This one runs in float32, on all matrices of a shape at once, and divides them among the processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

from .share import Share

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """(B, m, n) -> the same with singular values between about 0.7 and 1.2: Newton-Schulz with Muon's quintic."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonal steps scaled by 0.2 sqrt(max(m, n)) so that AdamW's learning rate and decay fit
    (arXiv 2502.16982). Parameters of two dimensions or more, a convolution's as (out, the rest), each with a gradient at every
    step."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        share: Share | None = None,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.share = share or Share()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step(group, parameters)
        return None

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        steps = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        matrices = self.share.divided(orthogonalize, steps.flatten(2))
        scale = group["lr"] * 0.2 * math.sqrt(max(matrices.shape[1:]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(matrices.view_as(steps).unbind()), alpha=-scale)
