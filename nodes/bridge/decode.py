"""Decoding a video latent by a native VAE in the tiles that `tiles.plan_tiles` found to fit."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from ...accvideo_core.errors import InvalidValueError
from ...accvideo_core.tiles import Extent, TilePlan, plan_tiles
from .versions import call

log = logging.getLogger("accvideo")
ATTEMPTS = 4  # plans, each of half the memory of the one before


def decode(vae: comfy.sd.VAE, samples: torch.Tensor, memory: float | None = None) -> tuple[torch.Tensor, TilePlan | None]:
    """Frames (N, H, W, 3) in [0, 1] of a LATENT's samples, the batch one behind the other; and the plan, None where the VAE
    cannot be cut along time, height and width, so that ComfyUI decodes as it does.

    memory  bytes to plan for, by the VAE's own estimate; None for what the device has free when other models have made room.
    Out of memory all the same, the next plan has half; after the last the error passes. InvalidValueError for a latent of
    another VAE.
    """
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()[0]  # the video of a video with audio, as VAE Decode takes it
    if not _can_be_cut(vae) or samples.ndim != 5:
        return _frames(vae.decode(samples)), None
    if samples.shape[1] != vae.latent_channels:
        raise InvalidValueError(
            f"the latent has {samples.shape[1]} channels, this VAE decodes {vae.latent_channels}; connect the VAE that belongs "
            "to the latent's model"
        )
    frames, height, width = samples.shape[2:]
    shape = frames, height, width

    def estimate(tile: Extent) -> float:
        """Bytes for decoding one tile, by the VAE's own rule."""
        return float(vae.memory_used_decode((1, samples.shape[1], *tile), vae.vae_dtype))

    def plan_for(budget: float, largest: int | None = None) -> TilePlan:
        return plan_tiles(shape, lambda tile: estimate(tile) <= budget, largest=largest)

    whole = estimate(shape)
    comfy.model_management.load_models_gpu(
        [vae.patcher], memory_required=whole if memory is None else min(memory, whole), force_full_load=vae.disable_offload
    )
    budget = _free(vae) if memory is None else memory
    plan = plan_for(budget)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _frames(_decode(vae, samples, plan)), plan
        except Exception as error:
            volume = math.prod(plan.tile)
            budget = min(budget, estimate(plan.tile)) / 2
            again = plan_for(budget, largest=volume)
            if not _out_of_memory(error) or attempt == ATTEMPTS or math.prod(again.tile) >= volume:
                raise
            log.warning("AccVideo: out of memory while decoding %s; the next try is %s", plan, again)
            plan = again
        comfy.model_management.soft_empty_cache()  # when the error, and the tensors its frames hold, are gone
    raise AssertionError("the last attempt returns or raises")


def _can_be_cut(vae: comfy.sd.VAE) -> bool:
    """Whether it is a video VAE that ComfyUI itself decodes in tiles of frames, height and width."""
    if getattr(vae, "handles_tiling", False) or vae.extra_1d_channel is not None:
        return False
    return vae.latent_dim == 3 and isinstance(vae.upscale_index_formula, tuple) and len(vae.upscale_index_formula) == 3


def _free(vae: comfy.sd.VAE) -> float:
    """Bytes that are free on the VAE's device; newer versions count what they can take back from models at once."""
    counted = getattr(vae.patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return float(counted(vae.device))


def _decode(vae: comfy.sd.VAE, samples: torch.Tensor, plan: TilePlan) -> torch.Tensor:
    """(B, 3, T', H', W') in [0, 1], with progress and interrupts after each tile. As VAE.decode_tiled_3d of both versions, which
    has one overlap for height and width and cannot be interrupted."""
    bar = comfy.utils.ProgressBar(plan.tiles * len(samples))
    dtype = vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32

    def decode_tile(tile: torch.Tensor) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        decoded = vae.first_stage_model.decode(tile.to(device=vae.device, dtype=vae.vae_dtype))
        bar.update(1)
        return decoded.to(dtype)

    device = getattr(comfy.model_management, "cuda_device_context", lambda _: contextlib.nullcontext())
    with device(vae.device):
        decoded = call(
            comfy.utils.tiled_scale_multidim,
            samples,
            decode_tile,
            tile=plan.tile,
            overlap=plan.overlap,
            upscale_amount=vae.upscale_ratio,
            out_channels=vae.output_channels,
            index_formulas=vae.upscale_index_formula,
            output_device=vae.output_device,
        )
        result: torch.Tensor = vae.process_output(decoded)
    return result.movedim(1, -1)


def _frames(images: torch.Tensor) -> torch.Tensor:
    return images.reshape(-1, *images.shape[-3:])


def _out_of_memory(error: Exception) -> bool:
    known: Any = getattr(comfy.model_management, "is_oom", None)
    return bool(known(error)) if known is not None else isinstance(error, torch.cuda.OutOfMemoryError)
