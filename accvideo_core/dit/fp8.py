"""Linear layers of the blocks in fp8 (e4m3): lossy, only where asked for; on NVIDIA GPUs of compute capability 8.9 and newer at
up to twice the rate of bf16, everywhere at half its memory.

Weights have a scale for each output channel, inputs one for each token, found as they come (as DeepSeek-V3, arXiv 2412.19437,
does for tiles). Sums are in float32. Modulations, embedders and the final layer stay exact: they are little work, and everything
hangs on them. Where the hardware has no fp8 products the same numbers are multiplied in float32, which shows the error, not the
speed.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import InvalidValueError
from .model import HunyuanVideoDiT

Linears = Literal["exact", "fp8"]

LARGEST = 448.0  # of float8_e4m3fn
_SMALLEST = 2.0**-40  # scale of a row of zeros
_FIRST = (8, 9)  # compute capability
_EXACT = ("mod.linear", "modulation.linear")


class Fp8Linear(nn.Module):
    """A Linear whose weight and, as they come, inputs are rounded to fp8."""

    weight: Tensor  # (out, in) float8
    scale: Tensor  # (out, 1) float32

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        exact = layer.weight.detach().float()
        scale = (exact.abs().amax(1, keepdim=True) / LARGEST).clamp(min=_SMALLEST)
        self.register_buffer("weight", (exact / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        scale = (rows.abs().amax(1, keepdim=True).float() / LARGEST).clamp(min=_SMALLEST).to(x.dtype)
        rounded = (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        if multiplies_fp8(x.device) and x.dtype == torch.bfloat16:
            out = torch._scaled_mm(
                rounded, self.weight.t(), scale_a=scale.float(), scale_b=self.scale.t(), bias=self.bias, out_dtype=torch.bfloat16
            )
        else:
            bias = None if self.bias is None else self.bias.float()
            out = linear(rounded.float() * scale.float(), self.weight.float() * self.scale, bias).to(x.dtype)
        return out.unflatten(0, x.shape[:-1])


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the device has products of fp8 numbers with a scale for each row."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= _FIRST


def set_linears(network: nn.Module, linears: Linears) -> int:
    """Round the Linear layers of a network's blocks, in place, for good; how many that were. "exact" changes nothing.

    Raises InvalidValueError for another network than our own, and for a name that is none.
    """
    if linears not in get_args(Linears):
        raise InvalidValueError(f"linears is {linears!r}; choose {' or '.join(get_args(Linears))}")
    if linears == "exact":
        return 0
    if not isinstance(network, HunyuanVideoDiT):
        raise InvalidValueError(f"linears is {linears!r}, but {type(network).__name__} runs outside our own layers; choose exact")
    changed = 0
    for name in network.block_names():
        block = network.get_submodule(name)
        for path, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and not path.endswith(_EXACT):
                parent, _, own = path.rpartition(".")
                setattr(block.get_submodule(parent), own, Fp8Linear(layer))
                changed += 1
    return changed
