"""Attention behind one function with named kernels. No mask over N x N is ever built: at 720p it would be 14 GB.

Keys that are padding sit at the end of the sequence, so a row's valid keys are a prefix and a length says it all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import InvalidValueError

# From this many tokens, attending row by row over each row's valid keys beats a masked kernel (3x to 20x slower on GPUs).
ROW_BY_ROW_TOKENS = 2048

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=key_mask)


KERNELS: dict[str, Kernel] = {"sdpa": _sdpa}


def attention(q: Tensor, k: Tensor, v: Tensor, key_lengths: Sequence[int] | None = None, kernel: str = "sdpa") -> Tensor:
    """Softmax attention: q, k, v (B, heads, N, head_dim) -> (B, N, heads * head_dim).

    key_lengths  valid keys of each row (the first so many), or None when all are valid
    kernel       a name in KERNELS; InvalidValueError lists them otherwise
    """
    if kernel not in KERNELS:
        raise InvalidValueError(f"unknown attention kernel {kernel!r}; known kernels: {', '.join(KERNELS)}")
    run = KERNELS[kernel]
    if key_lengths is None:
        out = run(q, k, v, None)
    elif k.shape[2] >= ROW_BY_ROW_TOKENS:
        rows = [run(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n], None) for i, n in enumerate(key_lengths)]
        out = torch.cat(rows)
    else:
        lengths = torch.tensor(key_lengths, device=q.device)
        mask = torch.arange(k.shape[2], device=q.device)[None, :] < lengths[:, None]
        out = run(q, k, v, mask[:, None, None, :])
    return out.transpose(1, 2).flatten(2)
