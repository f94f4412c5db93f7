"""Tensors of a dataset as bytes: hashes and checks of them, and what must never be stored."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import SynVidError
from ..sampling import make_noise


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor in row-major order; no copy of one that lies so."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_hash(*tensors: Tensor) -> str:
    """sha256 over dtype, shape and values of each."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def noise_hash(noise: Tensor) -> str:
    """sha256 of one sample's noise (C, T, H, W) float32."""
    return hashlib.sha256(raw(noise.float())).hexdigest()


def seeded_noise(shape: Sequence[int], seed: int) -> Tensor:
    """One sample's noise (C, T, H, W) float32 from its seed."""
    return make_noise((1, *shape), [seed])[0]


def bit_sum(tensor: Tensor) -> str:
    """The sum of a tensor's bits, taken as 64-bit little-endian words (the last filled up with zeros), modulo 2**64, as 16 hex
    digits. Changed bits and zeroed pages show in it at the speed of memory, where a cryptographic hash would cost more than
    the disk's time."""
    data = raw(tensor)
    whole = len(data) // 8 * 8
    total = int(np.frombuffer(data[:whole], "<u8").sum(dtype=np.uint64)) + int.from_bytes(data[whole:], "little")
    return f"{total % 2**64:016x}"


def stored_key(key: Tensor, dtype: torch.dtype, ids: Sequence[str], what: str) -> Tensor:
    """A key latent (B, ...) cast for storage, on the CPU; SynVidError names the sample with NaN, infinities, values beyond the
    dtype, or one value everywhere, which no denoised latent has."""
    cast = key.detach().to(dtype)
    for row, name in enumerate(ids):
        if not cast[row].isfinite().all():
            largest = float(key[row].abs().max())
            fault = f"reaches {largest:.4g}, beyond {dtype}" if math.isfinite(largest) else "holds NaN or infinities"
            raise SynVidError(f"{what} of sample {name} {fault}; it is not stored: look at the teacher's dtype and attention")
        if cast[row].min() == cast[row].max():
            raise SynVidError(f"{what} of sample {name} is {float(cast[row].flatten()[0]):.4g} everywhere; it is not stored")
    return cast.cpu().contiguous()
