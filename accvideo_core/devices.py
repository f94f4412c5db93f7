"""Which device to compute on, and what it is good at."""

from __future__ import annotations

import torch

from .errors import InvalidValueError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU. InvalidValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" has a device but no values
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidValueError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); use cpu or auto") from error


def synchronize(device: torch.device) -> None:
    """Wait until all queued work is done, so that a clock read afterwards means something; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies it faster than float32 (CUDA, CPUs with AMX or AVX512-BF16), else None."""
    fast = device.type == "cuda" or (device.type == "cpu" and multiplies_bf16() is not None)
    return torch.bfloat16 if fast else None


def autocast_now(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on the device, None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def multiplies_bf16() -> str | None:
    """By what the CPU multiplies bfloat16: "amx", "avx512", or None."""
    checks = {"amx": "_is_amx_tile_supported", "avx512": "_is_avx512_bf16_supported"}  # not public names: they may go
    return next((by for by, name in checks.items() if getattr(torch.cpu, name, bool)()), None)
