"""The only package that uses ComfyUI's internals; every difference between its versions is dealt with in `versions`.

A model becomes a native MODEL through ComfyUI's own loader, so it offloads, casts and takes patches like any other; the tiny
world's text encoder and VAE become a native CLIP and VAE; sampling runs through a native CFGGuider. Nodes take everything from
here.
"""

from .attention import attention_here, attention_ran, with_attention
from .decode import decode
from .files import (
    diffusion_model_files,
    diffusion_model_path,
    input_files,
    input_path,
    lora_files,
    lora_path,
    model_output,
    preview_file,
    read_tensors,
    synvid_path,
)
from .models import Weights, load_model, model_kind, note, noted, tensor_shapes, with_shift
from .patches import Patch, computed_patch, difference_patch, low_rank_patch, with_patches
from .sampling import check_conditioning, prepare_latent, sample, solver, with_guidance
from .server import add_route, progress, progress_bar, workflow_metadata
from .synvid import decode_latent, encode_prompt, native_video, plain_text, teacher_fingerprint
from .tiny import native_clip, native_vae, set_preview_colours
from .versions import DIFFERENCES, HOLDS_QUANTISED, advanced

__all__ = [
    "DIFFERENCES",
    "HOLDS_QUANTISED",
    "Patch",
    "Weights",
    "add_route",
    "advanced",
    "attention_here",
    "attention_ran",
    "check_conditioning",
    "computed_patch",
    "decode",
    "decode_latent",
    "difference_patch",
    "diffusion_model_files",
    "diffusion_model_path",
    "encode_prompt",
    "input_files",
    "input_path",
    "load_model",
    "lora_files",
    "lora_path",
    "low_rank_patch",
    "model_kind",
    "model_output",
    "native_clip",
    "native_vae",
    "native_video",
    "note",
    "noted",
    "plain_text",
    "prepare_latent",
    "preview_file",
    "progress",
    "progress_bar",
    "read_tensors",
    "sample",
    "set_preview_colours",
    "solver",
    "synvid_path",
    "teacher_fingerprint",
    "tensor_shapes",
    "with_attention",
    "with_guidance",
    "with_patches",
    "with_shift",
    "workflow_metadata",
]
