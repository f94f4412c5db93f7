"""A training's work divided among the processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InvalidValueError


@dataclass(frozen=True)
class Share:
    """Which part of the work this process does, of those that torchrun started; alone it does all of it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls, device: torch.device) -> Share:
        """Joins the other processes of torchrun, if there are any."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def rows(self, batch: int) -> slice:
        """This process's rows of a batch."""
        if batch % self.size:
            raise InvalidValueError(f"a batch of {batch} does not divide among {self.size} processes; choose a multiple of it")
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def divided(self, work: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """work(rows), for work that treats each row alone and keeps its shape: every process does some of the rows."""
        if self.size == 1:
            return work(rows)
        result = torch.zeros_like(rows)
        if len(mine := rows[self.rank :: self.size]):
            result[self.rank :: self.size] = work(mine)
        dist.all_reduce(result)
        return result

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    @torch.no_grad()
    def average(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its mean over the processes; gives back the mean loss."""
        loss = loss.detach().float().clone()
        if self.size == 1:
            return loss
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.view(1)])
        dist.all_reduce(flat)
        flat /= self.size
        for parameter, mean in zip(parameters, flat.split([p.numel() for p in parameters] + [1]), strict=False):
            parameter.grad = mean.view_as(parameter)
        return flat[-1]
