"""The bundled world: moving shapes, and models of HunyuanVideo's architecture small enough to train on a laptop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..dit import HunyuanVideoDiT
from ..errors import CheckpointError
from .text import TinyTextEncoder
from .vae import LATENT_SCALE, TinyVAE

Which = Literal["student", "teacher"]


def weights_folder() -> Path:
    """Where the bundled weights lie; ACCVIDEO_TINY_WEIGHTS names another folder."""
    return Path(os.environ.get("ACCVIDEO_TINY_WEIGHTS") or Path(__file__).parent / "weights")


def weights_path(name: str, folder: Path | None = None) -> Path:
    """File of `student`, `teacher`, `text_encoder` or `vae`."""
    return (folder or weights_folder()) / f"{name}.safetensors"


def load_tiny(
    which: Which = "student", device: Any = "cpu", dtype: torch.dtype | None = None, folder: Path | None = None
) -> tuple[HunyuanVideoDiT, TinyTextEncoder, TinyVAE]:
    """(network, text encoder, VAE), ready to sample: evaluation mode, no gradients.

    dtype is the network's (default float32); text encoder and VAE are float32. Raises CheckpointError when a file is
    missing or damaged.
    """
    from ..checkpoint import load_student

    network = load_student(weights_path(which, folder), device=device, dtype=dtype or torch.float32)
    text, vae = load_text_encoder(folder), load_vae(folder)
    for module in (network, text, vae):
        module.to(device).eval().requires_grad_(False)
    return network, text, vae


def load_text_encoder(folder: Path | None = None) -> TinyTextEncoder:
    """The bundled text encoder, float32, on the CPU."""
    return _load(TinyTextEncoder(), weights_path("text_encoder", folder))


def load_vae(folder: Path | None = None) -> TinyVAE:
    """The bundled VAE, float32, on the CPU."""
    return _load(TinyVAE(), weights_path("vae", folder))


def _load(module: Any, path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read the bundled weights {str(path)!r} ({error}); reinstall accvideo or train them: accvideo tiny train"
        ) from error
    try:
        nn.Module.load_state_dict(module, {name: t.float() for name, t in state.items()})
    except RuntimeError as error:
        raise CheckpointError(
            f"{str(path)!r} does not fit this version of accvideo: {str(error).splitlines()[-1].strip()}; train it again"
        ) from error
    return module.eval().requires_grad_(False)


__all__ = [
    "LATENT_SCALE",
    "TinyTextEncoder",
    "TinyVAE",
    "load_text_encoder",
    "load_tiny",
    "load_vae",
    "weights_folder",
    "weights_path",
]
