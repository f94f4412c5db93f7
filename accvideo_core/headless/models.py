"""The models that a command's options name: "tiny" for the bundled ones, else files and folders of the released ones."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import tiny
from ..checkpoint import open_checkpoint
from ..distill.adapters import Adapter
from ..dit import HunyuanVideoDiT
from ..dit.attention import AUTO
from ..errors import InvalidValueError
from ..synvid.text_encoders import HunyuanText, TextEncoder, WanText, kind_of
from ..synvid.video_vae import HunyuanVAE, VideoVAE
from ..tiny.clips import FPS, FRAMES, SIZE
from ..tiny.vae import LATENT_SCALE, to_pixels

BUNDLED = "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Precision = Literal["auto", "float32", "bfloat16", "float16"]


class Size(NamedTuple):
    """What a family's videos usually are: frames (4n+1), height and width in pixels (multiples of 16), frames a second."""

    frames: int
    height: int
    width: int
    fps: int


SIZES = {
    "tiny": Size(FRAMES, SIZE, SIZE, FPS),
    "hunyuan-t2v": Size(93, 544, 960, 24),
    "wan-t2v-14b": Size(81, 480, 832, 16),
}


class TinyText:
    """The bundled text encoder as a `TextEncoder`."""

    def __init__(self, device: torch.device) -> None:
        self._encoder = tiny.load_text_encoder().to(device)

    @torch.no_grad()
    def encode(self, prompt: str) -> tuple[Tensor, Tensor]:
        text, pooled, _ = self._encoder.encode([prompt])
        return text[0].cpu(), pooled[0].cpu()


class BundledVAE:
    """The bundled VAE as a `VideoVAE`."""

    def __init__(self, device: torch.device) -> None:
        self._vae, self._device = tiny.load_vae().to(device), device

    @torch.no_grad()
    def decode(self, latent: Tensor) -> NDArray[np.uint8]:
        return to_pixels(self._vae.decode(latent[None].to(self._device, torch.float32) / LATENT_SCALE))[0]


def text_family(where: str) -> str:
    """The family that a text encoder belongs to: the bundled one, or the released ones in a folder."""
    if where == BUNDLED:
        return "tiny"
    return "wan-t2v-14b" if kind_of(Path(where) / "text_encoder") == "umt5" else "hunyuan-t2v"


def load_text(where: str, device: torch.device, dtype: Precision = "auto") -> TextEncoder:
    """The text encoder(s): the bundled one (always float32), or HunyuanVideo's or Wan's in a folder ("auto" as the official
    code: float16, Wan's bfloat16, on a CPU float32)."""
    family = text_family(where)
    if family == "tiny":
        return TinyText(device)
    if family == "wan-t2v-14b":
        return WanText.load(where, device, _dtype(dtype, device, torch.bfloat16))
    return HunyuanText.load(where, device, _dtype(dtype, device, torch.float16))


def load_vae(where: str, device: torch.device, dtype: Precision = "auto", tiled: bool = True) -> VideoVAE:
    """The VAE: the bundled one (always float32), or HunyuanVideo's in a folder ("auto" as the official code: float16, on a
    CPU float32)."""
    return BundledVAE(device) if where == BUNDLED else HunyuanVAE.load(where, device, _dtype(dtype, device, torch.float16), tiled)


def find_network(where: str, which: tiny.Which) -> tuple[Path, str]:
    """(file, family) of the bundled student or teacher, or of a file in any layout. CheckpointError if it cannot be read."""
    if where == BUNDLED:
        tiny.check_match(which)
    path = tiny.weights_path(which) if where == BUNDLED else Path(where)
    with open_checkpoint(path) as checkpoint:
        return path, checkpoint.family


def load_network(
    adapter: Adapter, path: Path, device: torch.device, dtype: Precision = "auto", attention: str | None = None
) -> nn.Module:
    """The network in a file, without gradients ("auto": bfloat16, on a CPU float32), and the attention kernel that its blocks
    are to use; None leaves it as it is. InvalidValueError for one in a network that is not our own."""
    network = adapter.load(path, device, _dtype(dtype, device, torch.bfloat16)).requires_grad_(False)
    if isinstance(network, HunyuanVideoDiT):
        network.attention_kernel = network.attention_kernel if attention is None else attention
    elif attention not in (None, AUTO):
        raise InvalidValueError(
            f"attention is {attention!r}, but a {adapter.family} network runs in diffusers with attention of its own; choose auto"
        )
    return network


def _dtype(name: Precision, device: torch.device, usual: torch.dtype) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else usual
    return DTYPES[name]
