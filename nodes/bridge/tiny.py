"""The tiny world's text encoder and VAE as a native CLIP and VAE, and the colours of its previews."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.taesd.taesd
import torch

from ...accvideo_core.errors import AccVideoWarning, InvalidValueError

log = logging.getLogger("accvideo")


class _Tokenizer:
    """What comfy.sd.CLIP asks of a tokenizer, on top of `TinyTextEncoder.tokenize`."""

    def __init__(self, embedding_directory: str | None = None, tokenizer_data: dict[str, Any] | None = None) -> None:
        self.tokenize = (tokenizer_data or {})["accvideo_tokenize"]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, list]:
        """One row of (token, weight) or, with return_word_ids, (token, weight, word). The encoder knows no emphasis."""
        parts = comfy.sd1_clip.token_weights(comfy.sd1_clip.escape_important(text), 1.0)
        if any(weight != 1.0 for _, weight in parts):
            log.warning("AccVideo: the tiny text encoder has no emphasis; the weights in %r are ignored", text)
        plain = comfy.sd1_clip.unescape_important("".join(part for part, _ in parts))
        with warnings.catch_warnings(record=True) as caught:  # Python shows a warning once; a user should see it each time
            warnings.simplefilter("always", AccVideoWarning)
            ids = self.tokenize(plain)
        for warning in caught:
            log.warning("AccVideo: %s", warning.message)
        return {"accvideo": [[(token, 1.0, word) if return_word_ids else (token, 1.0) for word, token in enumerate(ids)]]}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}


class _TextEncoder(torch.nn.Module):
    """What comfy.sd.CLIP asks of a text model, around a TinyTextEncoder. Always float32: it is small and exact."""

    disable_offload = True  # plain weights, not ComfyUI's casting layers: load whole

    def __init__(self, encoder: torch.nn.Module, dtype: Any = None, device: Any = None, model_options: Any = None) -> None:
        super().__init__()
        self.encoder = encoder.float().to(device)
        self.dtypes = {torch.float32}

    def reset_clip_options(self) -> None:
        pass

    def set_clip_options(self, options: dict[str, Any]) -> None:
        if options.get("layer") is not None:
            log.warning("AccVideo: the tiny text encoder has one layer; 'CLIP Set Last Layer' is ignored")

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, L, D) text and (1, P) pooled of one prompt."""
        device = next(self.parameters()).device
        ids = torch.tensor([[token[0] for token in row] for row in tokens["accvideo"]], dtype=torch.long, device=device)
        text, pooled = self.encoder(ids, None)
        target = comfy.model_management.intermediate_device()
        return text.to(target), pooled.to(target)

    def load_sd(self, state: dict[str, torch.Tensor]) -> Any:
        return self.load_state_dict(state, strict=False)


def native_clip(encoder: torch.nn.Module) -> comfy.sd.CLIP:
    """A native CLIP around a TinyTextEncoder (`tokenize(prompt)`, `forward(ids, mask) -> text, pooled`)."""
    target = comfy.supported_models_base.ClipTarget(_Tokenizer, _TextEncoder)
    target.params = {"encoder": encoder}
    return comfy.sd.CLIP(target, tokenizer_data={"accvideo_tokenize": encoder.tokenize})


def native_vae(module: torch.nn.Module) -> comfy.sd.VAE:
    """A native VAE around a video autoencoder of HunyuanVideo's geometry: 16 channels, 4 x 8 x 8, causal in time.

    comfy.sd.VAE builds itself from a state dict it knows; it gets that of a small image autoencoder, which sets every
    attribute this version has, and then everything that describes the model is replaced.
    """
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=16).state_dict())
    vae.latent_channels, vae.latent_dim, vae.output_channels = 16, 3, 3
    vae.upscale_ratio = (lambda frames: max(0, frames * 4 - 3), 8, 8)
    vae.downscale_ratio = (lambda frames: max(0, math.floor((frames + 3) / 4)), 8, 8)
    vae.upscale_index_formula = vae.downscale_index_formula = (4, 8, 8)
    vae.process_input = lambda image: image * 2.0 - 1.0
    # In place and returned: older versions use the result, newer ones only the tensor they passed.
    vae.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
    vae.working_dtypes, vae.vae_dtype = [torch.float32], torch.float32
    vae.disable_offload = True  # plain weights, not ComfyUI's casting layers: load whole
    # Peak of a convolution with 64 channels at full resolution, input and output alive, in float32.
    vae.memory_used_decode = lambda shape, dtype: 2 * 64 * 256 * math.prod(_video_latent(shape)[2:]) * 4
    vae.memory_used_encode = lambda shape, dtype: 2 * 64 * math.prod(shape[2:]) * 4
    vae.first_stage_model = module.float().eval()
    vae.patcher = comfy.model_patcher.ModelPatcher(module, load_device=vae.device, offload_device=vae.patcher.offload_device)
    vae.size = None
    return vae


def _video_latent(shape: Sequence[int]) -> Sequence[int]:
    """The shape of what a VAE is to decode; InvalidValueError for what is no latent of HunyuanVideo's. ComfyUI asks for the
    memory first."""
    if len(shape) != 5 or shape[1] != 16:
        raise InvalidValueError(
            f"the latent has shape {tuple(shape)}, but this VAE decodes (batch, 16, frames, height, width); connect the VAE that "
            "belongs to the latent's model"
        )
    return shape


def set_preview_colours(model: comfy.model_patcher.ModelPatcher, factors: torch.Tensor, bias: torch.Tensor) -> None:
    """Let ComfyUI preview this MODEL's latents with its own linear map: factors (16, 3), bias (3,), giving RGB in [-1, 1]."""
    # The latent format is an object of this model alone; a decoder for real HunyuanVideo latents would show noise here.
    latent_format = model.model.latent_format
    latent_format.latent_rgb_factors = factors.tolist()
    latent_format.latent_rgb_factors_bias = bias.tolist()
    latent_format.taesd_decoder_name = None
