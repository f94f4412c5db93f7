"""Which teacher made a trajectory: a short hash of a network's weights as they are loaded, not of the file they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch

from .quantised import FLOAT8

_ELEMENTS = 8


def fingerprint(items: Iterable[tuple[str, torch.Tensor]]) -> str:
    """sha256, as 64 hex digits, over every tensor's original name, its shape and 8 elements of it rounded to bfloat16.

    items  (original name, tensor) in any order, on any device, each fetched once; the hash takes them in the order of their
           names. The elements are those at i * (n - 1) // 7 of the n in row-major order.
    A network in another dtype has another fingerprint where that dtype changes its values (fp8), and the same where bfloat16
    holds them exactly. It tells networks apart; it is no seal against somebody who wants two to look alike.
    """
    lines = {}
    for name, tensor in items:
        if name in lines:
            raise ValueError(f"{name} came twice")
        lines[name] = json.dumps([name, list(tensor.shape), _bits(tensor.detach())])
    return hashlib.sha256("\n".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def _bits(tensor: torch.Tensor) -> list[int]:
    if not tensor.numel():
        return []
    positions = [i * (tensor.numel() - 1) // (_ELEMENTS - 1) for i in range(_ELEMENTS)]
    # Indexed by coordinates: a tensor that does not lie in row-major order is not copied for 8 of its elements.
    at = torch.unravel_index(torch.tensor(positions, device=tensor.device), tensor.shape)
    stored = tensor.dtype
    raw = tensor.view(torch.uint8) if stored in FLOAT8 else tensor  # float8 cannot be indexed everywhere
    picked = (raw[at] if tensor.ndim else raw.expand(_ELEMENTS)).cpu()
    picked = picked.contiguous().view(stored) if stored in FLOAT8 else picked
    bits: list[int] = picked.to(torch.float32).to(torch.bfloat16).view(torch.int16).tolist()
    return bits
