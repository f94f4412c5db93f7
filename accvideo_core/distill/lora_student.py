"""A student of which only low-rank factors are trained: every chosen Linear W becomes W + B A, A and B alone with gradients.

With the base in bf16 and nothing else kept of it, a 13 B student trains on one 80 GB GPU. B begins at zero, so that the
student begins as its base. What is exported is a LoRA file as `accvideo_core.lora` and ComfyUI read it; its scale is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..checkpoint import write_safetensors
from ..errors import InvalidValueError
from ..lora.names import HUNYUAN_VIDEO, WAN
from ..lora.writing import KEY_FORMATS, Change
from .adapters import Adapter
from .rollout import keyed_seed

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


class LoraLinear(nn.Linear):
    """x W^T + bias + (x A^T) B^T, with A (rank, in) and B (out, rank) in float32; takes over a Linear's own tensors, frozen and
    under their names. In autocast and in mixed precision all of it is computed in the lower one."""

    def __init__(self, base: nn.Linear, rank: int, seed: int) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight.requires_grad_(False), base.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        bound = 1 / math.sqrt(base.in_features)
        generator = torch.Generator().manual_seed(seed)
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
            self.lora_B.weight.zero_()

    def forward(self, input: Tensor) -> Tensor:
        low = self.lora_B(self.lora_A(input.to(self.lora_A.weight.dtype)))
        out = linear(input, self.weight, self.bias)
        return out + low.to(out.dtype)


def add_lora(network: nn.Module, targets: Iterable[str], rank: int, seed: int = 0) -> nn.Module:
    """Make a LoRA student of a network, in place: its own tensors are frozen, the Linears at these module paths adapted.

    Before the network is sharded; reproducible from the seed. Raises InvalidValueError for a rank below 1, for a path at
    which there is no Linear and for no path at all.
    """
    if rank < 1:
        raise InvalidValueError(f"a LoRA of rank {rank} is impossible; choose 1 or more, 32 or 64 for most")
    network.requires_grad_(False)
    adapted = 0
    for adapted, path in enumerate(targets, 1):  # noqa: B007
        above, _, name = path.rpartition(".")
        parent = network.get_submodule(above)
        base = getattr(parent, name, None)
        if not isinstance(base, nn.Linear) or isinstance(base, LoraLinear):
            raise InvalidValueError(f"there is no Linear at {path!r} to adapt; a LoRA is added to Linears, once")
        setattr(parent, name, LoraLinear(base, rank, keyed_seed(seed, path, 0, 0)))
    if not adapted:
        raise InvalidValueError("a LoRA student needs modules to adapt; none were named")
    return network


def share_base(student: nn.Module, teacher: nn.Module) -> int:
    """Let a frozen teacher use the student's own frozen tensors where they are the same, bit for bit, and return how many
    bytes that saves. For one process; before the networks are moved. A sharded network cannot share."""
    own, saved = dict(student.named_parameters()), 0
    for path, module in teacher.named_modules():
        for name, theirs in list(module.named_parameters(recurse=False)):
            ours = own.get(f"{path}.{name}" if path else name)
            if ours is None or ours.requires_grad or ours.dtype != theirs.dtype or ours.device != theirs.device:
                continue
            if ours is not theirs and torch.equal(ours, theirs):
                setattr(module, name, ours)
                saved += theirs.numel() * theirs.element_size()
    return saved


def lora_pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{module path: (A, B)} of a LoRA student's state dict."""
    return {
        name.removesuffix(_DOWN): (state[name], state[name.removesuffix(_DOWN) + _UP]) for name in state if name.endswith(_DOWN)
    }


def export_lora(
    adapter: Adapter, state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the LoRA of a student's state dict (`World.full_state`), float32, under ComfyUI's names, all or nothing.

    Raises InvalidValueError for a state without a LoRA, OutputError where the disk refuses.
    """
    pairs = {f"{module}.weight": pair for module, pair in lora_pairs(state).items()}
    if not pairs:
        raise InvalidValueError("there is no LoRA in this student; it was trained in full")
    downs = dict(adapter.original({name: down for name, (down, _) in pairs.items()}))
    ups = dict(adapter.original({name: up for name, (_, up) in pairs.items()}))
    changes = {name: Change(name, pair=(downs[name].contiguous(), ups[name].contiguous())) for name in downs}
    family = WAN if adapter.family.startswith(WAN) else HUNYUAN_VIDEO
    tensors, told = KEY_FORMATS["comfyui"].write(changes, family)
    write_safetensors(path, tensors, {"format": "pt", **told, **(metadata or {})})
