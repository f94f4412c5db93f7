"""Sampling through a native CFGGuider: cfg, hooks, noise masks, previews, progress and interrupts are ComfyUI's own, only the
update rule is ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import node_helpers
import torch
from tqdm.auto import tqdm

from ...accvideo_core.devices import synchronize
from ...accvideo_core.errors import InvalidValueError
from ...accvideo_core.sampling import Observer, Step, euler_flow
from .models import text_width
from .versions import call


def _sample_euler_flow(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    observers: tuple[Observer, ...] = (),
) -> torch.Tensor:
    """`euler_flow` as a ComfyUI sampler function. The callback drives progress and preview, and raises on an interrupt."""
    extra_args = extra_args or {}

    def velocity(latent: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        denoised = model(latent, sigma, **extra_args)
        return (latent - denoised) / sigma.view(-1, *[1] * (latent.ndim - 1))

    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def report(step: Step) -> None:
            if callback is not None:
                callback(
                    {"i": step.index, "x": step.latent, "denoised": step.denoised, "sigma": step.sigma, "sigma_hat": step.sigma}
                )
            bar.update()

        return euler_flow(velocity, x, sigmas, observers=[*observers, report])


class _Timed(comfy.samplers.Sampler):
    """A SAMPLER that knows how many seconds its last run took, without the loading before it."""

    def __init__(self, sampler: comfy.samplers.Sampler) -> None:
        self.sampler, self.seconds = sampler, 0.0

    def sample(self, *args: Any, **keywords: Any) -> torch.Tensor:
        begin = time.perf_counter()
        result = self.sampler.sample(*args, **keywords)
        synchronize(result.device)
        self.seconds = time.perf_counter() - begin
        return result


def solver(name: str, steps: int, *observers: Observer) -> comfy.samplers.Sampler:
    """The native SAMPLER for a preset's solver in so many steps; Euler steps are shown to observers. Wan's authors run a UniPC;
    ComfyUI's own ("bh2") is near it, not equal. In one step it would hand back the noise; a UniPC's first is an Euler step."""
    if name == "euler" or (name == "uni_pc" and steps == 1):
        return comfy.samplers.KSAMPLER(_sample_euler_flow, extra_options={"observers": observers})
    if name == "uni_pc" and not observers:
        return comfy.samplers.sampler_object("uni_pc_bh2")
    raise InvalidValueError(f"unknown solver {name!r}; known: euler, uni_pc, and to observers euler alone")


def with_guidance(conditioning: list, guidance: float) -> list:
    """The conditioning with its embedded guidance set (as the native FluxGuidance node does), in plain scale."""
    return node_helpers.conditioning_set_values(conditioning, {"guidance": guidance})


def check_conditioning(model: comfy.model_patcher.ModelPatcher, conditioning: list, name: str) -> None:
    """InvalidValueError for text of another encoder, which would fail deep in the network with a matrix shape."""
    width = text_width(model.model.diffusion_model)
    for text, _ in conditioning:
        if width is not None and text.shape[-1] != width:
            raise InvalidValueError(
                f"the {name} conditioning is {text.shape[-1]} wide but this model reads text of width {width}; "
                "encode the prompt with the CLIP that belongs to the model"
            )


def prepare_latent(model: comfy.model_patcher.ModelPatcher, latent: dict[str, Any]) -> torch.Tensor:
    """The samples of a LATENT as this model takes them, (B, C, T, H, W); InvalidValueError when it cannot take them."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise InvalidValueError("the latent holds several streams (video with audio); connect a plain video latent")
    samples = call(
        comfy.sample.fix_empty_latent_channels,
        model,
        samples,
        downscale_ratio_spacial=latent.get("downscale_ratio_spacial"),
        downscale_ratio_temporal=latent.get("downscale_ratio_temporal"),
    )
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 5 or samples.shape[1] != channels:
        raise InvalidValueError(
            f"the latent has shape {tuple(samples.shape)} but this model reads (batch, {channels}, frames, height, width); "
            "make it with EmptyHunyuanLatentVideo or this model's VAE"
        )
    patch = tuple(getattr(model.model.diffusion_model, "patch_size", (1, 2, 2)))[-2:]
    for name, size, step in zip(("height", "width"), samples.shape[3:], patch, strict=True):
        if size % step:
            below = (size - size % step) * 8
            raise InvalidValueError(
                f"the latent's {name} is {size} ({size * 8} pixels), which this model cannot cut into patches of {step}; "
                f"use a {name} that is a multiple of {8 * step} pixels, {below} or {below + 8 * step}"
            )
    return samples


def sample(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    negative: list | None,
    cfg: float,
    latent: dict[str, Any],
    samples: torch.Tensor,
    seed: int,
    sigmas: torch.Tensor,
    sampler: comfy.samplers.Sampler,
    noise: torch.Tensor | None = None,
) -> tuple[dict[str, Any], float]:
    """A new LATENT: `samples` (from `prepare_latent`) noised to sigmas[0] and sampled to sigmas[-1]; and the seconds it took,
    without loading the model.

    Noise (unless it is given), batch_index and noise_mask are handled as by the native KSampler; without a negative the
    guider knows only the positive, as the native BasicGuider.
    """
    result = {name: value for name, value in latent.items() if not name.startswith("downscale_ratio_")}
    if len(sigmas) < 2:
        return result | {"samples": samples}, 0.0
    sampler = _Timed(sampler)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": positive} if negative is None else {"positive": positive, "negative": negative})
    guider.set_cfg(cfg)
    try:
        sampled = guider.sample(
            comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")) if noise is None else noise,
            samples,
            sampler,
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
    except torch.cuda.OutOfMemoryError as error:  # still of that type: ComfyUI then gives all memory back
        shape = "x".join(map(str, samples.shape))
        raise torch.cuda.OutOfMemoryError(
            f"out of memory while sampling a latent of {shape}; make the video shorter or smaller, or take the weights as fp8 or "
            "GGUF (docs/workflows.md says what fits which card)."
        ) from error
    return result | {"samples": sampled.to(comfy.model_management.intermediate_device())}, sampler.seconds
