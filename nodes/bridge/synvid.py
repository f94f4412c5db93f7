"""What a SynVid dataset is told of a MODEL and a CONDITIONING, and its latents as frames."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.model_patcher
import comfy.sd
import torch
from comfy_api.latest import InputImpl

from ...accvideo_core.checkpoint.fingerprint import fingerprint
from ...accvideo_core.checkpoint.layouts import COMFYUI_NATIVE
from ...accvideo_core.errors import InvalidValueError
from .alterations import alterations
from .attention import override_of
from .models import model_kind

log = logging.getLogger("accvideo")


def teacher_fingerprint(model: comfy.model_patcher.ModelPatcher) -> str:
    """`checkpoint.fingerprint` of a MODEL's weights, the same as of the file it was loaded from, in the same dtype. One with
    patches (LoRA, ...) has another, which hangs on them too.

    Raises InvalidValueError for a model with what changes its output and no fingerprint sees (EasyCache, functions after cfg).
    """
    if found := alterations(model):
        raise InvalidValueError(
            f"the model carries {', '.join(found)}: this changes what it makes, which the dataset's fingerprint of the teacher "
            "does not see; connect the teacher without the nodes that put that on it"
        )
    if (kernel := getattr(override_of(model), "kernel", None)) is not None and kernel.lossy:
        log.warning("AccVideo: the model attends by %s (%s), which its fingerprint does not see", kernel.name, kernel.quality)
    return fingerprint(_teacher_tensors(model))


def _teacher_tensors(model: comfy.model_patcher.ModelPatcher) -> Iterator[tuple[str, torch.Tensor]]:
    is_hunyuan = model_kind(model).startswith("HunyuanVideo")
    scales = {}
    tensors = dict(model.model.diffusion_model.named_parameters())
    for name in [name for name in tensors if name.endswith((".scale_weight", ".scale_input"))]:  # 0.3.64's scaled fp8
        scales[name.replace("scale_weight", "weight")] = tensors.pop(name)
    for name, tensor in tensors.items():
        key = f"diffusion_model.{name}"
        tensor = model.backup[key].weight if key in model.backup else model.object_patches_backup.get(key, tensor)
        if name in scales:
            tensor = tensor.to(scales[name].dtype) * scales[name].to(tensor.device)
        elif hasattr(tensor, "_qdata"):
            tensor = tensor.dequantize()
        elif hasattr(tensor, "tensor_shape"):  # ComfyUI-GGUF's: the bytes of its blocks, for want of their values
            tensor = tensor.as_subclass(torch.Tensor)
        yield (COMFYUI_NATIVE.original(name) or name) if is_hunyuan else name, tensor
    for key, patches in model.patches.items():
        for i, (strength, patch, kept, rows, _) in enumerate(patches):
            for j, tensor in enumerate(_tensors_in(getattr(patch, "weights", patch))):
                yield f"{key} patch {i}.{j} {strength:g} {kept:g} {rows}", tensor
    for key, value in model.object_patches.items():
        if isinstance(value, torch.Tensor):
            yield f"{key} replaced", value


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors_in(part)


_PLAIN = {"pooled_output", "guidance", "attention_mask"}


def encode_prompt(clip: comfy.sd.CLIP, prompt: str) -> list:
    """CONDITIONING of a prompt, as the native CLIPTextEncode makes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def plain_text(conditioning: list, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(text (1, L, D) at its valid length, pooled (1, P) or None) of a CONDITIONING, on the CPU.

    Raises InvalidValueError for one that is more than a prompt: several texts, areas, pictures, hooks, time ranges.
    """
    texts = conditioning[0][0].shape[0] if len(conditioning) == 1 else 0
    if texts != 1:
        held = f"is a batch of {texts} texts" if texts else f"has {len(conditioning)} parts"
        raise InvalidValueError(f"the {name} conditioning {held}; a trajectory has one prompt, so connect a CLIP Text Encode")
    text, extra = conditioning[0]
    if beside := sorted(key for key, value in extra.items() if key not in _PLAIN and value is not None):
        raise InvalidValueError(
            f"the {name} conditioning carries {', '.join(beside)}, which a SynVid dataset does not hold; connect plain text"
        )
    if (mask := extra.get("attention_mask")) is not None:
        valid = mask.reshape(-1).bool()
        if not valid[: int(valid.sum())].all():
            raise InvalidValueError(f"the {name} conditioning has padding between its words; connect a CLIP Text Encode")
        text = text[:, : int(valid.sum())]
    pooled = extra.get("pooled_output")
    return text.detach().cpu().clone(), None if pooled is None else pooled.detach().cpu().clone()


_LATENT_FORMATS = {"wan": comfy.latent_formats.Wan21}  # by the family's first word; all others are HunyuanVideo's


def decode_latent(vae: comfy.sd.VAE, latent: torch.Tensor, family: str) -> torch.Tensor:
    """Frames (T', H', W', 3) in [0, 1] of one model-space latent (C, T, H, W) by a native VAE; InvalidValueError if it is
    another model's."""
    if vae.latent_channels != latent.shape[0]:
        raise InvalidValueError(
            f"the VAE has latents of {vae.latent_channels} channels, the dataset's have {latent.shape[0]}; connect the VAE of "
            f"the {family} model"
        )
    formats = _LATENT_FORMATS.get(family.split("-")[0], comfy.latent_formats.HunyuanVideo)
    frames = vae.decode(formats().process_out(latent[None].float()))
    return frames.reshape(-1, *frames.shape[-3:])


def native_video(path: Path) -> Any:
    """A video file as a native VIDEO."""
    return InputImpl.VideoFromFile(str(path))
