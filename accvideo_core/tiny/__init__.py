"""The bundled world: moving shapes, and models of HunyuanVideo's architecture small enough to train on a laptop."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..checkpoint import load_student, open_checkpoint
from ..dit import HunyuanVideoDiT
from ..errors import CheckpointError
from .text import TinyTextEncoder
from .vae import LATENT_SCALE, TinyVAE

Which = Literal["student", "teacher"]
_BUNDLED = Path(__file__).parent / "weights"


def weights_folder() -> Path:
    """Where the bundled weights lie; ACCVIDEO_TINY_WEIGHTS names another folder."""
    return Path(os.environ.get("ACCVIDEO_TINY_WEIGHTS") or _BUNDLED)


def weights_path(name: str, folder: Path | None = None) -> Path:
    """File of `student`, `teacher`, `text_encoder` or `vae`; training also leaves what the teacher is made of, `base` and
    `guided`, in its folder."""
    return (folder or weights_folder()) / f"{name}.safetensors"


def part_hash(part: str, folder: Path | None = None) -> str:
    """sha256 of what something depends on: the file of `base`, `guided`, `teacher`, `text_encoder` or `vae`, or of `encoder` only
    those tensors of the VAE's file that make latents, so that a better decoder still fits. CheckpointError for one that cannot
    be read."""
    path = weights_path("vae" if part == "encoder" else part, folder)
    try:
        if part != "encoder":
            return hashlib.sha256(path.read_bytes()).hexdigest()
        digest = hashlib.sha256()
        with safe_open(path, framework="pt") as file:
            for name in TinyVAE.encoder:
                digest.update(file.get_tensor(name).float().numpy().tobytes())
        return digest.hexdigest()
    except (OSError, SafetensorError) as error:
        raise _missing(path, error) from error


def check_match(which: Which | Literal["base", "guided"], folder: Path | None = None) -> None:
    """CheckpointError unless the network was trained on the text encoder and the latents of the VAE that lie beside it.

    Training writes their sha256 into the network's metadata; a file without it is taken as it is.
    """
    path = weights_path(which, folder)
    try:
        with open_checkpoint(path) as checkpoint:
            made_from = checkpoint.metadata
    except CheckpointError as error:
        raise _missing(path, error) from error
    for part, name in (("encoder", "vae"), ("text_encoder", "text_encoder")):
        if part in made_from and made_from[part] != part_hash(part, folder):
            raise CheckpointError(
                f"{str(path)!r} was trained with another {part} than the one in {str(weights_path(name, folder))!r}; "
                f"reinstall accvideo, or train it again: accvideo tiny train {which}"
            )


def load_tiny(
    which: Which | Literal["base", "guided"] = "student",
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
    folder: Path | None = None,
) -> tuple[HunyuanVideoDiT, TinyTextEncoder, TinyVAE]:
    """(network, text encoder, VAE), ready to sample: evaluation mode, no gradients.

    dtype is the network's (default float32); text encoder and VAE are float32. Raises CheckpointError when a file is
    missing or damaged, or when the three were not made for each other.
    """
    check_match(which, folder)
    network = load_student(weights_path(which, folder), device=device, dtype=dtype or torch.float32)
    text, vae = load_text_encoder(folder), load_vae(folder)
    for module in (network, text, vae):
        module.to(device).eval().requires_grad_(False)
    return network, text, vae


def load_text_encoder(folder: Path | None = None) -> TinyTextEncoder:
    """The bundled text encoder, float32, on the CPU."""
    module = TinyTextEncoder()
    _fill(module, weights_path("text_encoder", folder))
    return module


def load_vae(folder: Path | None = None) -> TinyVAE:
    """The bundled VAE, float32, on the CPU."""
    module = TinyVAE()
    _fill(module, weights_path("vae", folder))
    return module


def _fill(module: nn.Module, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _missing(path, error) from error
    try:
        module.load_state_dict({name: t.float() for name, t in state.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{str(path)!r} does not fit this version of accvideo: {reason}; train it again") from error
    module.eval().requires_grad_(False)


def _missing(path: Path, error: Exception) -> CheckpointError:
    trained = f"train it: accvideo tiny train {'base' if path.stem == 'text_encoder' else path.stem}"
    cure = f"reinstall accvideo, or {trained}" if path.parent == _BUNDLED else f"{trained}, with that folder as --weights"
    return CheckpointError(f"cannot read the tiny world's weights {str(path)!r} ({error}); {cure}")


__all__ = [
    "LATENT_SCALE",
    "TinyTextEncoder",
    "TinyVAE",
    "check_match",
    "load_text_encoder",
    "load_tiny",
    "load_vae",
    "part_hash",
    "weights_folder",
    "weights_path",
]
