"""Several processes share the tokens of one sample (DeepSpeed-Ulysses, arXiv 2309.14509): outside attention each has a run of
the image tokens and all heads, inside it all tokens and a share of the heads; two all-to-alls a block lead from one to the
other. Text tokens, a few hundred, stand in every process.

The collectives are differentiated as what they are, so the gradient a process finds is that of the sum of all processes'
losses. Where each computes the same loss, the mean of the gradients over the processes is the loss's gradient.
Shapes: B batch, N image tokens, n of them in a process, L text length, D width, h heads, d head dimension, P processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor, all_to_all_single, reduce_scatter_tensor, wait_tensor
from torch.nn.functional import pad

from ..errors import InvalidValueError


@dataclass(frozen=True)
class Split:
    """This process's share of a sequence: `tokens` image tokens cut into `size` runs of equal length, the last one filled up
    with zeros, whose outputs are dropped before anything could see them. `group` is a process group's name, to the compiler a
    constant."""

    group: Any
    size: int
    rank: int
    tokens: int

    @classmethod
    def over(cls, group: dist.ProcessGroup, tokens: int, heads: int) -> Split:
        """Among the processes of a group. Raises InvalidValueError if the heads do not divide among them."""
        size = dist.get_world_size(group)
        if heads % size:
            raise InvalidValueError(f"{heads} attention heads do not divide among {size} processes; choose a divisor of {heads}")
        return cls(group.group_name, size, dist.get_rank(group), tokens)

    @property
    def share(self) -> int:
        """n, image tokens of a process, filling included."""
        return -(-self.tokens // self.size)

    def cut(self, x: Tensor) -> Tensor:
        """This process's image tokens: (B, N, D) -> (B, n, D)."""
        start = min(self.rank * self.share, self.tokens)
        part = x[:, start : start + self.share]
        return pad(part, (0, 0, 0, self.share - part.shape[1])).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """All image tokens in every process: (B, n, D) -> (B, N, D)."""
        runs: Tensor = _Gather.apply(x[None], self.group)
        return runs.transpose(0, 1).flatten(1, 2)[:, : self.tokens]

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Own tokens of all heads, three (B, h, n + L, d), image first -> all tokens of own heads, (B, h/P, N + L, d)."""
        x = torch.stack((q, k, v)).unflatten(2, (self.size, -1))  # (3, B, P, h/P, n + L, d)
        image, text = x[..., : self.share, :], x[:, :, self.rank, :, self.share :]
        image = self._exchange(image.movedim(2, 0)).movedim(0, 3)  # (3, B, h/P, P, n, d)
        image = image.flatten(3, 4)[..., : self.tokens, :]
        q, k, v = torch.cat((image, text), 3).unbind(0)
        return q, k, v

    def to_tokens(self, x: Tensor) -> Tensor:
        """All tokens of own heads (B, N + L, h/P * d), image first -> own tokens of all heads (B, n + L, h * d)."""
        image, text = x[:, : self.tokens], x[:, self.tokens :]
        image = pad(image, (0, 0, 0, self.size * self.share - self.tokens)).unflatten(1, (self.size, -1))
        text = text[:, None].expand(-1, self.size, -1, -1)
        received = self._exchange(torch.cat((image, text), 2).movedim(1, 0))  # (P, B, n + L, h/P * d)
        return received.permute(1, 2, 0, 3).flatten(2)

    def _exchange(self, x: Tensor) -> Tensor:
        """The i-th of P parts (P, ...) goes to process i; what comes from process i is the i-th."""
        received: Tensor = _Exchange.apply(x, self.group)
        return received


class _Exchange(torch.autograd.Function):
    """All-to-all over the first dimension. Gradients go back the way the tensors came; they arrive in any layout, which
    torch's own differentiable collectives do not take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return wait_tensor(all_to_all_single(x.contiguous(), None, None, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return wait_tensor(all_to_all_single(gradient.contiguous(), None, None, ctx.group)), None


class _Gather(torch.autograd.Function):
    """All-gather over the first dimension; of the gradients each process gets the sum of what all found for its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return wait_tensor(all_gather_tensor(x.contiguous(), 0, group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return wait_tensor(reduce_scatter_tensor(gradient.contiguous(), "sum", 0, ctx.group)), None
