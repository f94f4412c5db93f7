"""HunyuanVideo's VAE outside ComfyUI, through diffusers: latents to frames, in tiles, since a whole clip fits no GPU."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CheckpointError, MissingExtraError


class VideoVAE(Protocol):
    """What turns latents into frames."""

    def decode(self, latent: Tensor) -> NDArray[np.uint8]:
        """Model-space latent (C, T, H, W) -> frames (4T-3, 8H, 8W, 3) uint8."""


class HunyuanVAE:
    """`HunyuanVAE.load(folder).decode(latent)`."""

    def __init__(self, vae: Any, device: torch.device | str) -> None:
        self._vae, self._device = vae, device

    @classmethod
    def load(
        cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16, tiled: bool = True
    ) -> HunyuanVAE:
        """From a folder in diffusers' layout, or one whose `vae` is. Never loads from the network.

        device  where it decodes; it goes there only then, so that it can be loaded before what else must fit there
        tiled  decode tiles of 256 x 256 pixels and 16 frames, blended, instead of the whole clip at once
        Raises MissingExtraError without diffusers, CheckpointError for a folder or weights that are not whole.
        """
        diffusers, folder = _diffusers(), Path(folder)
        folder = folder / "vae" if (folder / "vae").is_dir() else folder
        try:
            vae, said = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(
                folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"cannot load HunyuanVideo's VAE from {str(folder)!r}: {reason}") from error
        if absent := sorted([*said["missing_keys"], *map(str, said["mismatched_keys"])]):
            raise CheckpointError(f"{str(folder)!r} lacks {len(absent)} of the VAE's tensors, {absent[0]} the first")
        if tiled:
            vae.enable_tiling()
        else:
            vae.use_framewise_decoding = False
        return cls(vae.eval(), device)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> NDArray[np.uint8]:
        """As `VideoVAE`; the VAE's own latents are model space / 0.476986."""
        self._vae.to(self._device)
        own = latent.to(self._device, torch.float32) / self._vae.config.scaling_factor
        frames = self._vae.decode(own[None].to(self._vae.dtype), return_dict=False)[0][0]
        pixels: NDArray[np.uint8] = ((frames.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
        return pixels


def _diffusers() -> ModuleType:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("HunyuanVideo's VAE needs", "diffusers", "text") from error
    return diffusers
