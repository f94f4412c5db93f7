"""Loaders: a student's weight file, or the bundled tiny world, as ComfyUI's native MODEL, CLIP and VAE."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from comfy_api.latest import io

from ..accvideo_core.dit.attention import AUTO, NAMES, check_name
from ..accvideo_core.errors import CheckpointError, InvalidValueError
from ..accvideo_core.schedule import get_preset
from . import bridge
from .advice import MadeFor
from .weights import StudentWeights

log = logging.getLogger("accvideo")
WEIGHT_DTYPES: dict[str, torch.dtype | None] = {"default": None, "bf16": torch.bfloat16, "fp8_e4m3fn": torch.float8_e4m3fn}


def load_student(path: Path, dtype: torch.dtype | None = None, name: str | None = None) -> tuple[object, str]:
    """(native MODEL with its family's shift, family) of any weight file `accvideo_core.checkpoint` reads, listed as `name`."""
    weights = StudentWeights(path, dtype, name)
    for note in weights.notes:
        log.info("AccVideo: %s: %s", path.name, note)
    model = bridge.load_model(weights, weights.storage_dtype)
    model = bridge.with_shift(model, get_preset(weights.family).shift)
    if weights.student is not None:
        bridge.note(model, MadeFor("student", weights.student.steps))
    return model, weights.family


def file_state(path: Path) -> str:
    """Changes when a file is written again: under the same name it is then another model, not the one ComfyUI cached."""
    parts = [path, path.with_name(path.stem + "_map.pt")]  # Tencent's scales
    if path.suffix == ".json":  # an index: its shards lie beside it
        parts += sorted(path.parent.glob("*"))
    states = [part.stat() for part in parts if part.is_file()]
    return " ".join(f"{state.st_mtime_ns} {state.st_size}" for state in states) or "missing"


def preview_colours(vae: torch.nn.Module, clips: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """(16, 3) factors and (3,) bias: the linear map from a tiny VAE's model-space latents to colours in [-1, 1].

    Fitted by least squares to the start of a few clips of the tiny world, each latent against the mean colour of its 8 x 8
    pixels in the last of its frames. Takes a fraction of a second, and so fits whatever weights are at hand.
    """
    from ..accvideo_core.tiny import LATENT_SCALE
    from ..accvideo_core.tiny.clips import keyed_generator, render, sample_scenes

    frames = render(sample_scenes(clips, keyed_generator("preview")))[:, :5].movedim(-1, 1) * 2 - 1
    latents = (vae.encode(frames) * LATENT_SCALE).movedim(1, -1).flatten(0, -2)
    colours = torch.nn.functional.avg_pool3d(frames[:, :, ::4], (1, 8, 8)).movedim(1, -1).flatten(0, -2)
    inputs = torch.cat([latents, latents.new_ones(len(latents), 1)], 1)
    solution = torch.linalg.lstsq(inputs.double(), colours.double()).solution.float()
    return solution[:-1], solution[-1]


class AccVideoStudentLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoStudentLoader",
            display_name="AccVideo Student Loader",
            category="AccVideo",
            description=(
                "Loads a HunyuanVideo or Wan 2.1 transformer (an AccVideo student or its teacher) as a native model, checked "
                "tensor by tensor, with the shift of its family. LoRA, offloading and every sampler work with it."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=bridge.diffusion_model_files(),
                    tooltip="Weight file in ComfyUI's models/diffusion_models folder: safetensors, .pt, GGUF or an index of "
                    "shards, in original, ComfyUI's or diffusers' names.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="How weights are kept in memory. default: ComfyUI chooses for your device, scaled fp8 stays as it "
                    "is; bf16: 25.6 GB for the 13 B model; fp8_e4m3fn: 12.8 GB, slightly different results.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(NAMES),
                    default=AUTO,
                    optional=True,
                    tooltip="The attention kernel of this model. auto: ComfyUI's own choice; sdpa, flash2, flash3, flex: exact; "
                    "sage1, sage2: faster and lossy. One that cannot run here is refused with the reason.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Native MODEL with its family's shift already set.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        try:
            return file is None or bool(bridge.diffusion_model_path(file))
        except CheckpointError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, file: str | None, weight_dtype: str | None, attention: str | None = AUTO) -> str:
        """None stands for an input that is linked; its node is asked itself."""
        return f"{file} {weight_dtype} {attention} {'linked' if file is None else file_state(bridge.diffusion_model_path(file))}"

    @classmethod
    def execute(cls, file: str, weight_dtype: str, attention: str = AUTO) -> io.NodeOutput:
        if weight_dtype not in WEIGHT_DTYPES:
            raise InvalidValueError(f"unknown weight dtype {weight_dtype!r}; choose one of {', '.join(WEIGHT_DTYPES)}")
        check_name(attention)
        model, _ = load_student(bridge.diffusion_model_path(file), WEIGHT_DTYPES[weight_dtype], file)
        model = bridge.with_attention(model, attention)
        return io.NodeOutput(model, ui={"text": [bridge.attention_here(model, attention)]})


class AccVideoTinyModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoTinyModels",
            display_name="AccVideo Tiny Models",
            category="AccVideo",
            description=(
                "The bundled tiny world: a 4 M-parameter HunyuanVideo with its own text encoder and VAE, which draws moving "
                "shapes (17 frames of 64 x 64 at 8 fps) in seconds on a CPU. Try prompts like 'a red circle moving left on a "
                "black background'."
            ),
            inputs=[
                io.Combo.Input(
                    "which",
                    options=["student", "teacher"],
                    default="student",
                    tooltip="student: made for 5 steps. teacher: the model it was distilled from, made for 50 steps.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Native MODEL; use it with AccVideo Sampler, family tiny."),
                io.Clip.Output(display_name="clip", tooltip="Native CLIP that knows the tiny world's words."),
                io.Vae.Output(display_name="vae", tooltip="Native VAE, 4 x 8 x 8 compression like HunyuanVideo's."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, which: str) -> str:
        from ..accvideo_core import tiny

        return " ".join(file_state(tiny.weights_path(part)) for part in (which, "text_encoder", "vae"))

    @classmethod
    def execute(cls, which: str) -> io.NodeOutput:
        from ..accvideo_core import tiny  # not at ComfyUI's start: most sessions never use it

        tiny.check_match(which)
        model, _ = load_student(tiny.weights_path(which))
        encoder, vae = tiny.load_text_encoder(), tiny.load_vae()
        bridge.set_preview_colours(model, *preview_colours(vae))
        bridge.note(model, MadeFor(which))
        return io.NodeOutput(model, bridge.native_clip(encoder), bridge.native_vae(vae))
