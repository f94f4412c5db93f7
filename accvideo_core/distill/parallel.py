"""The processes that train together: who they are, how a network is sharded over them, what they add up.

Started by torchrun, one process a device; without it a world of one, which needs no process group. Parameters, gradients
and optimizer states are sharded over all processes, block by block (FSDP2, `fully_shard`). The processes form a mesh of
data x sequence: those of one sequence group see the same samples and share each one's tokens (`dit/sequence.py`). Every
gradient is the mean over all processes, of both kinds: the collectives inside the network are differentiated exactly, so
the mean over the copies of one loss is that loss.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..devices import pick_device
from ..errors import InvalidValueError

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    rank, size     this process's number and how many there are
    device         what it computes on
    mesh           (data, sequence) of all processes, None in a world of one
    shards         the same processes in one row: what parameters are sharded over
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    shards: DeviceMesh | None = None

    @classmethod
    def start(cls, sequence: int = 1, device: str | None = None, patience: timedelta | None = None) -> World:
        """Join the processes torchrun started (NCCL between CUDA devices, gloo between CPUs), or be a world of one.

        sequence  processes that share one sample's tokens; must divide their number
        device    "cpu", "cuda", ...; by default CUDA where there is one
        patience  how long they wait for one another where all meet; by default torch's half hour
        Raises InvalidValueError for a sequence that does not divide the world and for a half-set environment.
        """
        missing = [name for name in _TORCHRUN if name not in os.environ]
        if len({"RANK", "WORLD_SIZE"} & set(missing)) == 2:
            _check_split(1, sequence)
            return cls(device=pick_device(device or "auto"))
        if missing:
            raise InvalidValueError(f"the environment has no {', '.join(missing)}: start the processes with torchrun")
        size = int(os.environ["WORLD_SIZE"])
        _check_split(size, sequence)
        kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
        place = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else kind)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=patience)
        mesh = init_device_mesh(place.type, (size // sequence, sequence), mesh_dim_names=("data", "sequence"))
        shards = init_device_mesh(place.type, (size,), mesh_dim_names=("shards",))
        return cls(dist.get_rank(), size, place, mesh, shards)

    def close(self) -> None:
        """Leave the others; a world of one has nothing to leave."""
        if self.mesh is not None:
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Leaves the others, unless an error ends this process: they may be in a collective that nobody will join now, and NCCL
        would wait for it before the error could be told. When this process has ended, torchrun ends theirs."""
        if error is None:
            self.close()

    @property
    def data_size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size(0)

    @property
    def data_rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank("data")

    @property
    def sequence_size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size(1)

    @property
    def sequence_rank(self) -> int:
        return 0 if self.mesh is None else self.mesh.get_local_rank("sequence")

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes what is written once."""
        return self.rank == 0

    def shard(
        self,
        network: Any,
        blocks: Sequence[str] = (),
        master: torch.dtype | None = None,
        compute: torch.dtype | None = None,
    ) -> Any:
        """Spread a network over all processes, in place, each named block a unit that is gathered when it runs and freed after.

        blocks   module paths in the order they run; what is in none of them is gathered with the whole network
        master   dtype trainable parameters are kept and updated in, converted block by block; None leaves them as they are
        compute  dtype blocks run in, the network's `compute_dtype` from then on; gradients are added up in float32; None
                 computes in the masters' own
        Every process must hold the same weights. In a world of one the network is moved to the device and `master`;
        `compute` is then `precision`'s affair.
        """
        if self.shards is None:
            return _mastered(network.to(self.device), master)
        half = compute is not None and compute != torch.float32
        # Inputs keep their dtype: a timestep in bf16 would be another timestep. The networks cast what they multiply.
        policy = MixedPrecisionPolicy(compute, torch.float32 if half else None, cast_forward_inputs=False)
        kw: dict[str, Any] = {
            "mesh": self.shards,
            # What stayed gathered would be stale where weights change between two forward passes, as `Ema.swapped` does.
            "reshard_after_forward": True,
            "mp_policy": policy,
        }
        for name in blocks:
            fully_shard(_mastered(network.get_submodule(name), master), **kw)
        fully_shard(_mastered(network, master), **kw)
        network.compute_dtype = compute  # its weights have it only while it runs
        return network

    def split_sequence(self, network: Any) -> None:
        """Let the processes of a sequence group share each sample's tokens in this network.

        Raises InvalidValueError if the network cannot do that or its heads do not divide among them.
        """
        if self.mesh is None or self.sequence_size == 1:
            return
        if not hasattr(network, "sequence_group"):
            raise InvalidValueError(
                f"{type(network).__name__} cannot share a sample's tokens among processes; "
                f"set sequence to 1, not {self.sequence_size}"
            )
        heads = network.config.num_heads
        if heads % self.sequence_size:
            fitting = [n for n in range(1, self.size + 1) if heads % n == 0 and self.size % n == 0]
            raise InvalidValueError(
                f"{heads} attention heads do not divide among {self.sequence_size} processes; "
                f"set sequence to one of {', '.join(map(str, fitting))}"
            )
        network.sequence_group = self.mesh.get_group("sequence")

    def precision(self, compute: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        """Compute in this dtype: by autocast in a world of one; sharded networks do so by themselves (see `shard`)."""
        if self.mesh is not None or compute in (None, torch.float32):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, compute)

    def clip(self, parameters: Iterable[Tensor], norm: float) -> float:
        """Scale gradients down to this total L2 norm (inf: leave them) and return what it was, over all processes."""
        total = torch.nn.utils.clip_grad_norm_(parameters, norm)
        return float(total.full_tensor() if isinstance(total, DTensor) else total)

    def mean(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Mean of each scalar over all processes, in one message; every process must name the same ones."""
        numbers = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
        if self.mesh is not None and values:
            numbers = numbers.float().to(self.device) if self.device.type != "cpu" else numbers
            dist.all_reduce(numbers)
            numbers = numbers.double() / self.size
        return dict(zip(values, numbers.tolist(), strict=True))

    def agree(self, what: object) -> bool:
        """Whether all processes of this one's sequence group say the same; each of them must ask."""
        if self.mesh is None or self.sequence_size == 1:
            return True
        said: list[object] = [None] * self.sequence_size
        dist.all_gather_object(said, what, self.mesh.get_group("sequence"))
        return all(other == said[0] for other in said)

    def rows(self, total: int) -> range:
        """Which of `total` global samples are this process's: an equal run of them for each data rank.

        Raises InvalidValueError if they do not divide.
        """
        if total % self.data_size:
            raise InvalidValueError(f"a batch of {total} does not divide among {self.data_size} data-parallel processes")
        share = total // self.data_size
        return range(self.data_rank * share, (self.data_rank + 1) * share)

    def gather_rows(self, local: Tensor) -> Tensor:
        """All global samples (total, ...) in order, from each data rank's equal share (share, ...), on every process."""
        if self.mesh is None:
            return local
        parts = [torch.empty_like(local) for _ in range(self.data_size)]
        dist.all_gather(parts, local.contiguous(), self.mesh.get_group("data"))
        return torch.cat(parts)

    def full_state(self, network: nn.Module, trainable: bool = False) -> dict[str, Tensor]:
        """A copy of the network's whole state, or of what is trained of it, on the CPU of the main process; {} on the others.
        All must call it."""
        if self.mesh is None:
            frozen = {name for name, p in network.named_parameters() if trainable and not p.requires_grad}
            state = {name: tensor.detach() for name, tensor in network.state_dict().items() if name not in frozen}
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable)
            state = dict(get_model_state_dict(network, options=options))
        # What is on the CPU already may be the network's own memory, which `Ema.swapped` changes back.
        return {name: tensor.to("cpu", copy=self.device.type == "cpu") for name, tensor in state.items()}

    def barrier(self) -> None:
        """Wait for the others."""
        if self.mesh is not None:
            dist.barrier()


def _mastered(network: nn.Module, master: torch.dtype | None) -> nn.Module:
    for parameter in network.parameters():
        if master is not None and parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(master)
    return network


def _check_split(size: int, sequence: int) -> None:
    if sequence < 1 or size % sequence:
        raise InvalidValueError(
            f"{size} process{'es' if size > 1 else ''} cannot form groups of {sequence}; "
            f"set sequence to a divisor of {size} or start another number of processes"
        )


class Ema:
    """Exponential moving average of a network's trainable parameters, float32, sharded as they are.

    update() after each optimizer step: average += (1 - decay) * (parameter - average).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: p.detach().clone().float() for name, p in network.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move towards the network's parameters."""
        parameters = dict(network.named_parameters())
        for name, average in self.averages.items():
            local(average).lerp_(local(parameters[name]).float(), 1.0 - self.decay)

    @contextlib.contextmanager
    def swapped(self, network: nn.Module) -> Iterator[None]:
        """Inside the block the network holds the averages; after it, bit for bit its own parameters again."""
        parameters = dict(network.named_parameters())
        own = {name: local(parameters[name]).detach().clone() for name in self.averages}
        try:
            for name, average in self.averages.items():
                local(parameters[name]).detach().copy_(local(average))
            yield
        finally:
            for name, tensor in own.items():
                local(parameters[name]).detach().copy_(tensor)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, average in self.averages.items():
            if average is not state[name]:  # a checkpoint is read in place
                local(average).copy_(local(state[name]))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is. Shares memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
