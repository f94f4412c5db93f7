"""Which attention kernel a call may use: what each declares, checked up front, and a test of it on the device at first use.

A kernel is refused with a sentence, never replaced in silence; only `auto` passes on to the next, and says so where a kernel is
broken. Shapes: B batch, h heads, N tokens, d head dimension.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

log = logging.getLogger("accvideo")

# (queries, keys) of the self-test: one, fewer than a block, whole blocks, ragged blocks, and ragged where many average out.
TRIALS = ((1, 1), (65, 65), (128, 128), (100, 320), (33, 16_424))


class Machine(NamedTuple):
    """What a device is to a kernel: `kind` is cpu, cuda (NVIDIA alone), rocm, mps, ...; the compute capability is NVIDIA's."""

    kind: str
    name: str
    capability: tuple[int, int] | None = None


@functools.lru_cache(maxsize=64)
def machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return Machine(device.type, device.type)
    if torch.version.hip:
        return Machine("rocm", torch.cuda.get_device_name(device))
    return Machine("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


class Call(NamedTuple):
    """What is known of a call before it is made. `elements` are those of the largest of q, k and v; `masked`: with a mask of
    any form beside q, k and v; `gradients`: a backward pass will follow."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int
    elements: int = 0
    masked: bool = False
    gradients: bool = False


class Refusal(NamedTuple):
    """Why a kernel does not take a call: `what` it is about, in a word or two, and the sentence."""

    what: str
    sentence: str


@dataclass(frozen=True, eq=False)
class Kernel:
    """One way to compute softmax(q k^T scale) v, and what it declares of itself.

    run            (q, k, v (B, h, N, d), scale, mask, lengths) -> (B, h, N, d). `mask` (only where `masks`) is boolean or
                   additive and broadcasts to (B, h, N, N); `lengths` (only where `ragged`) are the rows' valid keys
    errors         {dtype it takes: largest ||out - exact|| / ||exact||}, exact in float32 from the same q, k and v of unit
                   Gaussians; float32 on a GPU, which may multiply in TF32, is held to GPU_FLOAT32
    lossy          the error comes of a coarser arithmetic than the dtype's own, so it is never chosen unasked
    kinds          of `Machine`, None for every one
    capabilities   compute capabilities it is made for, () for all; `capability_from` the least
    head_dims      d it takes
    least          queries and keys it takes, at the least
    key_multiple   what the number of keys must be a multiple of, unless there are at least `ragged_from` (None: always)
    differentiable has a backward pass
    overwrites     run has a further argument, `over`: q is nobody else's, and what is attended may be written over it
    package        what to install, None for what PyTorch has; `find` imports it, ImportError with a sentence if it cannot
    further        what else it refuses
    """

    name: str
    run: Callable[..., Tensor]
    errors: Mapping[torch.dtype, float]
    lossy: bool = False
    kinds: Collection[str] | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    capability_from: tuple[int, int] | None = None
    head_dims: range = field(default_factory=lambda: range(1, 1 << 16))
    least: int = 1
    key_multiple: int = 1
    ragged_from: int | None = None
    masks: bool = False
    ragged: bool = False
    differentiable: bool = True
    overwrites: bool = False
    package: str | None = None
    find: Callable[[], Any] | None = None
    further: Callable[[Call, Machine], Refusal | None] | None = None

    @property
    def quality(self) -> str:
        """ "exact", or "lossy" with the largest of its declared errors."""
        return f"lossy, error up to {100 * max(self.errors.values()):g} %" if self.lossy else "exact"


GPU_FLOAT32 = 2e-3


def declared_error(kernel: Kernel, dtype: torch.dtype, kind: str) -> float:
    """What a kernel's error may be on a kind of machine."""
    return max(kernel.errors[dtype], GPU_FLOAT32) if dtype == torch.float32 and kind != "cpu" else kernel.errors[dtype]


def refusal(kernel: Kernel, call: Call) -> Refusal | None:
    """Why the kernel cannot take the call by what it declares; nothing is computed. None if it can."""
    found = machine(call.device)
    return (
        _wrong_machine(kernel, found)
        or _wrong_tensors(kernel, call)
        or (None if kernel.further is None else kernel.further(call, found))
        or _missing(kernel)
    )


def _wrong_machine(kernel: Kernel, found: Machine) -> Refusal | None:
    name = kernel.name
    if kernel.kinds is not None and found.kind not in kernel.kinds:
        where = {"cuda": "NVIDIA GPUs", "rocm": "AMD GPUs", "cpu": "CPUs", "mps": "Apple GPUs"}
        runs = " and ".join(where[kind] for kind in where if kind in kernel.kinds)
        return Refusal("device", f"attention kernel {name} runs on {runs}, not on {found.kind}; choose auto or sdpa")
    if found.capability is None:
        return None
    wanted = ", ".join(f"{major}.{minor}" for major, minor in kernel.capabilities)
    if kernel.capabilities and found.capability not in kernel.capabilities:
        return _too_old(name, found, wanted)
    if kernel.capability_from is not None and found.capability < kernel.capability_from:
        return _too_old(name, found, "{}.{} or newer".format(*kernel.capability_from))
    return None


def _too_old(name: str, found: Machine, wanted: str) -> Refusal:
    assert found.capability is not None
    has = "{}.{}".format(*found.capability)
    return Refusal(
        "compute capability", f"attention kernel {name} needs compute capability {wanted}, {found.name} has {has}; choose auto"
    )


def _wrong_tensors(kernel: Kernel, call: Call) -> Refusal | None:
    name = kernel.name
    if call.dtype not in kernel.errors:
        takes = " or ".join(_short(dtype) for dtype in kernel.errors)
        cure = "load the network in bfloat16, or choose sdpa"
        return Refusal("dtype", f"attention kernel {name} takes {takes}, not {_short(call.dtype)}; {cure}")
    if call.head_dim not in kernel.head_dims:
        dims = kernel.head_dims
        takes = ", ".join(map(str, dims)) if len(dims) <= 4 else f"multiples of {dims.step} up to {dims[-1]}"
        return Refusal(
            "head dimension", f"attention kernel {name} takes head dimensions {takes}, not {call.head_dim}; choose auto"
        )
    if call.masked and not kernel.masks:
        return Refusal("mask", f"attention kernel {name} takes no mask; leave the mask out, or choose sdpa")
    if call.gradients and not kernel.differentiable:
        return Refusal(
            "gradients", f"attention kernel {name} has no backward pass; use it under torch.no_grad(), or choose sdpa to train"
        )
    if call.queries < 1 or call.keys < 1:
        return Refusal("lengths", f"attention over {call.queries} queries and {call.keys} keys is nothing; give at least one")
    if min(call.queries, call.keys) < kernel.least:
        said = f"attention kernel {name} takes at least {kernel.least} queries and keys, not {call.queries} and {call.keys}"
        return Refusal("lengths", f"{said}; choose auto")
    if call.keys % kernel.key_multiple and (kernel.ragged_from is None or call.keys < kernel.ragged_from):
        return ragged(kernel, call.keys, kernel.key_multiple)
    return None


def ragged(kernel: Kernel, keys: int, multiple: int) -> Refusal:
    """The refusal of a number of keys that is no multiple."""
    more = "" if kernel.ragged_from is None else f" or at least {kernel.ragged_from}"
    return Refusal(
        "lengths",
        f"attention kernel {kernel.name} takes a multiple of {multiple} keys{more}, not {keys} (it does not mask the rest of a "
        "block); choose auto",
    )


def _missing(kernel: Kernel) -> Refusal | None:
    try:
        if kernel.find is not None:
            kernel.find()
    except ImportError as error:
        return Refusal("package", str(error))
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=256)
def fault(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What the self-test found wrong with a kernel on a device, None for nothing. Tested once, with the lengths it takes.

    Held against `sdpa` on the CPU in float32, which is therefore not tested itself.
    """
    found = machine(device)
    if found.kind == "meta" or (found.kind == "cpu" and kernel.name == "sdpa"):
        return None
    allowed = declared_error(kernel, dtype, found.kind)
    for queries, keys in TRIALS:
        if refusal(kernel, Call(device, dtype, head_dim, queries, keys)) is not None:
            continue
        try:
            measured = measured_error(kernel, device, dtype, head_dim, queries, keys)
        except torch.OutOfMemoryError:
            raise  # says nothing of the kernel
        except Exception as error:
            said = (str(error).strip() or "no message").splitlines()[0][:200]
            return f"it fails for {queries} queries and {keys} keys ({type(error).__name__}: {said})"
        if isinstance(measured, str):
            return measured
        if not measured <= allowed:
            return f"its error for {queries} queries and {keys} keys is {measured:.2g}, above the {allowed:.2g} it declares"
    return None


@torch.inference_mode()
def measured_error(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, queries: int, keys: int, seed: int = 0
) -> float | str:
    """||out - exact|| / ||exact|| on unit Gaussians of 2 rows and 2 heads, laid out as a network's; or a sentence if it changes
    what it is given."""
    generator = torch.Generator("cpu").manual_seed(seed)
    qkv = torch.randn(2, max(queries, keys), 3, 2, head_dim, generator=generator).to(dtype)
    q, k, v = _split(qkv.float(), queries, keys)
    exact = scaled_dot_product_attention(q, k, v)
    given = qkv.to(device)
    if given is qkv:
        given = qkv.clone()
    with torch.autocast(device.type, enabled=False):
        out = kernel.run(*_split(given, queries, keys), None, None, None)
    if out.shape != exact.shape or out.dtype != dtype:
        return f"it returns {_short(out.dtype)} {tuple(out.shape)} where {_short(dtype)} {tuple(exact.shape)} is due"
    if not torch.equal(given.cpu(), qkv):
        return "it changes the tensors it is given"
    return float((out.cpu().float() - exact).norm() / exact.norm())


def _split(qkv: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def why_not(kernel: Kernel, call: Call) -> Refusal | None:
    """Why the kernel must not take the call: by what it declares, or because its self-test failed. None if it may."""
    if (declared := refusal(kernel, call)) is not None:
        return declared
    if call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # a test cannot be captured; whoever captures has run the same before
    if (wrong := fault(kernel, call.device, call.dtype, call.head_dim)) is None:
        return None
    where = f"{machine(call.device).name} in {_short(call.dtype)}"
    cure = "update PyTorch, or compute on the CPU" if kernel.name == "sdpa" else "choose auto or sdpa"
    return Refusal("self-test", f"attention kernel {kernel.name} failed its test on {where}: {wrong}; {cure}")


@functools.lru_cache(maxsize=256)
def announce(name: str, quality: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Say once what runs."""
    log.info("AccVideo: attention by %s (%s) on %s, %s, head dimension %d", name, quality, device, _short(dtype), head_dim)
