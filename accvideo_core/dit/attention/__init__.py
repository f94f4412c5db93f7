"""Attention behind one function with named kernels. No mask over N x N is ever built: at 720p it would be 14 GB.

Keys that are padding sit at the end of the sequence, so a row's valid keys are a prefix and a length says it all.
`settle` turns what a user asks for into the kernel that runs: checked, tested on the device at first use, announced once.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InvalidValueError, KernelError
from .choice import Call, Kernel, Refusal, announce, declared_error, fault, log, machine, measured_error, refusal, why_not
from .kernels import KERNELS, exact_order, key_blocks

# From this many tokens, attending row by row over each row's valid keys beats a masked kernel (3x to 20x slower on GPUs).
ROW_BY_ROW_TOKENS = 2048
AUTO = "auto"
NAMES = (AUTO, *KERNELS)


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Sequence[int] | None = None, kernel: str = "sdpa", over: bool = False
) -> Tensor:
    """Softmax attention: q, k, v (B, heads, N, head_dim) -> (B, N, heads * head_dim).

    key_lengths  valid keys of each row (the first so many), or None when all are valid
    kernel       a name in NAMES
    over         q is nobody else's: a kernel that can may write the result over it
    Raises InvalidValueError for a name that is none and where the kernel does not take these tensors, KernelError where it
    fails its test on this device. Inside a compiled region the kernel must be settled already: nothing is checked.
    """
    lengths = None if key_lengths is None else tuple(key_lengths)
    if not torch.compiler.is_compiling():
        gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        elements = max(q.numel(), k.numel())
        call = Call(q.device, q.dtype, q.shape[3], q.shape[2], k.shape[2], elements, gradients=gradients)
        kernel = settle(kernel, call, lengths)
    chosen = KERNELS["sdpa" if kernel == AUTO else kernel]
    return _attend(chosen, q, k, v, lengths, over).transpose(1, 2).flatten(2)


def _attend(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None, over: bool) -> Tensor:
    if lengths is None:
        return kernel.run(q, k, v, None, None, None, **({"over": over} if kernel.overwrites else {}))
    if kernel.ragged:
        return kernel.run(q, k, v, None, None, lengths)
    if kernel.masks and k.shape[2] < ROW_BY_ROW_TOKENS:
        valid = torch.tensor(lengths, device=q.device)
        mask = torch.arange(k.shape[2], device=q.device)[None, :] < valid[:, None]
        return kernel.run(q, k, v, None, mask[:, None, None, :], None)
    rows = [kernel.run(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n], None, None, None) for i, n in enumerate(lengths)]
    return torch.cat(rows)


def settle(name: str, call: Call, key_lengths: tuple[int, ...] | None = None) -> str:
    """The kernel that will run for what a user asks for: the name itself, or what `auto` chooses, among exact ones alone.

    Raises InvalidValueError or KernelError where a named kernel must not take the call. Does nothing inside a compiled region.
    """
    if torch.compiler.is_compiling():
        return name
    return _settled(name, call, None if key_lengths is None else tuple(sorted(set(key_lengths))))


@functools.lru_cache(maxsize=4096)
def _settled(name: str, call: Call, key_lengths: tuple[int, ...] | None) -> str:
    check_name(name)
    if name != AUTO:
        if (reason := _why_not_all(KERNELS[name], call, key_lengths)) is not None:
            raise _error(reason)
        return _announced(name, call)
    *faster, last = exact_order(machine(call.device))
    # Short rows of several lengths: one masked call costs less than the launches of a call for each.
    for candidate in [] if key_lengths is not None and call.keys < ROW_BY_ROW_TOKENS else faster:
        if (reason := _why_not_all(KERNELS[candidate], call, key_lengths)) is None:
            return _announced(candidate, call)
        _pass_over(candidate, reason)
    if (reason := _why_not_all(KERNELS[last], call, key_lengths)) is not None:
        raise _error(reason)
    return _announced(last, call)


def _announced(name: str, call: Call) -> str:
    announce(name, KERNELS[name].quality, call.device, call.dtype, call.head_dim)
    return name


@functools.lru_cache(maxsize=256)
def _pass_over(name: str, reason: Refusal) -> None:
    """A kernel that is broken here is worth a warning; one that is made for other hardware, or not installed, is not."""
    level = logging.WARNING if reason.what == "self-test" else logging.DEBUG
    log.log(level, "AccVideo: attention auto passes over %s: %s", name, reason.sentence)


def _why_not_all(kernel: Kernel, call: Call, key_lengths: tuple[int, ...] | None) -> Refusal | None:
    """`why_not` of every call that is made for rows of these lengths."""
    keys = (call.keys,) if key_lengths is None or kernel.ragged or kernel.masks else key_lengths
    return next((reason for n in keys if (reason := why_not(kernel, call._replace(keys=n))) is not None), None)


def _error(reason: Refusal) -> InvalidValueError | KernelError:
    return KernelError(reason.sentence) if reason.what == "self-test" else InvalidValueError(reason.sentence)


def check_name(name: str) -> None:
    """InvalidValueError, listing the kernels, for a name that is none."""
    if name not in NAMES:
        raise InvalidValueError(f"unknown attention kernel {name!r}; known kernels: {', '.join(NAMES)}")


def check(name: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int = 128) -> None:
    """Before any long work: InvalidValueError for a kernel that no call on this device could use, KernelError for one that is
    broken there. Lengths are not known yet; without a dtype, neither is that, and nothing is run."""
    check_name(name)
    if name == AUTO:
        return
    kernel = KERNELS[name]
    call = _any_call(kernel, device, dtype, head_dim)
    if (reason := refusal(kernel, call) if dtype is None else why_not(kernel, call)) is not None:
        raise _error(reason)


def usable(device: torch.device, dtype: torch.dtype | None = None, head_dim: int = 128) -> dict[str, str]:
    """{kernel: "exact" or "lossy, ..." where it can be used on a device, "no: " and the reason where it cannot}, by what each
    declares; a dtype of None stands for any it takes. Nothing is run."""
    told = {}
    for name, kernel in KERNELS.items():
        reason = refusal(kernel, _any_call(kernel, device, dtype, head_dim))
        said = "" if reason is None else reason.sentence.removeprefix(f"attention kernel {name} ")
        told[name] = kernel.quality if reason is None else f"no: {said}"
    return told


def _any_call(kernel: Kernel, device: torch.device, dtype: torch.dtype | None, head_dim: int) -> Call:
    """With lengths that every kernel takes."""
    return Call(device, next(iter(kernel.errors)) if dtype is None else dtype, head_dim, 128, 128)


def forget() -> None:
    """Look and test anew at the next call: after a package was installed, or a driver changed."""
    for cached in (_settled, _pass_over, announce, fault, machine, key_blocks):
        cached.cache_clear()


__all__ = [
    "AUTO",
    "KERNELS",
    "NAMES",
    "ROW_BY_ROW_TOKENS",
    "Call",
    "Kernel",
    "Refusal",
    "attention",
    "check",
    "check_name",
    "declared_error",
    "forget",
    "machine",
    "measured_error",
    "refusal",
    "settle",
    "usable",
    "why_not",
]
