"""What the tensors of a merged checkpoint are stored as: kept, cast, or quantised to fp8.

fp8 without scales has 3 bits of mantissa: rounding to nearest would swallow most of what a LoRA adds to a base that is fp8
already, so what changed is rounded up or down by chance, in proportion, which keeps every value in expectation. With a scale for
each weight the values use fp8's whole range and are rounded to nearest, as the tools that made such files do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.quantised import FLOAT8, MARKER, all_finite, cast, check_finite, quantise_fp8, scale_name
from ..errors import InvalidValueError, LoraError
from .adapters import LoraModule
from .arithmetic import add_differences

_FP8 = torch.float8_e4m3fn
Entry = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Storage:
    """What values are stored as. `scaled`: every Linear's weight as fp8 with a scale (ComfyUI's `scaled_fp8`).

    fp8 of either kind is for the weights of Linears; everything else keeps its dtype.
    """

    dtype: torch.dtype
    scaled: bool = False


DTYPES: dict[str, Storage | None] = {
    "keep": None,
    "bf16": Storage(torch.bfloat16),
    "fp16": Storage(torch.float16),
    "fp32": Storage(torch.float32),
    "fp8_e4m3fn": Storage(_FP8),
    "scaled_fp8": Storage(_FP8, scaled=True),
}


class Target:
    """How the tensors of one base are stored: `entries(key)` before, `encode(key, ..)` when its values are there."""

    def __init__(self, checkpoint: Checkpoint, storage: Storage | None, seed: int = 0) -> None:
        """storage None keeps every tensor's own; `seed` is of the chance in rounding to fp8. Raises InvalidValueError for a
        base whose quantisation cannot be kept."""
        self._checkpoint, self._seed = checkpoint, seed
        self._kinds: dict[str, Storage] = {key: self._kind(key, storage) for key in checkpoint}

    def _kind(self, key: str, storage: Storage | None) -> Storage:
        checkpoint, own = self._checkpoint, Storage(self._checkpoint.dtype(key))
        linear = len(checkpoint.shape(key)) == 2 and key.endswith(".weight")
        if storage is not None:
            return storage if linear or storage.dtype not in FLOAT8 else own
        if not checkpoint.is_quantised(key):
            return own
        if checkpoint.scaled_linear(key) is None or checkpoint.stored_dtype(key) != _FP8:
            raise InvalidValueError(
                f"{checkpoint.path} is quantised ({checkpoint.quantisation}) and what is merged cannot be stored so again; "
                "choose a dtype, for example bf16 or scaled_fp8"
            )
        return Storage(_FP8, scaled=True)

    def entries(self) -> dict[str, Entry]:
        """{name: (dtype, shape)} of the whole file."""
        found: dict[str, Entry] = {}
        for key, kind in self._kinds.items():
            found[key] = (kind.dtype, self._checkpoint.shape(key))
            if kind.scaled:
                found[scale_name(key)] = (torch.float32, ())
        if any(kind.scaled for kind in self._kinds.values()):
            found[MARKER] = (_FP8, (2,))
        return found

    def marker(self) -> list[tuple[str, torch.Tensor]]:
        """What says that a file has scales; of two values: multiply in full precision."""
        return [(MARKER, torch.zeros(2).to(_FP8))] if any(kind.scaled for kind in self._kinds.values()) else []

    def encode(
        self, key: str, weight: torch.Tensor, changes: Sequence[tuple[float, LoraModule]]
    ) -> list[tuple[str, torch.Tensor]]:
        """(name, tensor) of everything that one tensor of the base, with `changes` added, becomes; `weight` is used up.

        Raises LoraError or CheckpointError, naming the tensor, for values that are not finite or that the dtype cannot hold.
        """
        kind, checkpoint = self._kinds[key], self._checkpoint
        name = f"{checkpoint.path}: {key}"
        scaled = checkpoint.scaled_linear(key) if kind.scaled and not changes else None
        if scaled is not None and checkpoint.stored_dtype(key) == kind.dtype:
            return [(key, check_finite(checkpoint.read_stored(key), name)), (scale_name(key), scaled.scale.reshape(()))]
        if kind.dtype not in FLOAT8 and changes:
            values = add_differences(weight, changes, kind.dtype)
            if kind.dtype == torch.float16 and not all_finite(values):
                raise LoraError(f"{key} has values that fp16 cannot hold; choose bf16")
            return [(key, values)]
        sums = add_differences(weight, changes, torch.float32) if changes else weight
        if kind.scaled:
            values, scale = quantise_fp8(sums, kind.dtype, name)
            return [(key, values), (scale_name(key), scale)]
        values = cast(sums, kind.dtype, name)
        return [(key, round_by_chance(sums, kind.dtype, f"{self._seed}:{key}") if changes else values)]


def round_by_chance(values: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """fp32 values as fp8, each rounded up with the probability that keeps it in expectation; beyond the largest, the largest.

    Reproducible: the chance depends on `key` alone.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    generator = torch.Generator(values.device).manual_seed(seed)
    info = torch.finfo(dtype)
    # A value of exponent e lies between multiples of 2**e * eps; below the smallest normal number the step stays.
    exponent = torch.frexp(values).exponent.sub_(1).clamp_(min=round(torch.tensor(info.smallest_normal).log2().item()))
    step = torch.ldexp(torch.full_like(values, info.eps), exponent)
    chance = torch.rand(values.shape, generator=generator, device=values.device)
    rounded = (values / step).add_(chance).floor_().mul_(step)
    return rounded.clamp_(info.min, info.max).to(dtype)
