"""Few-step sampling: the whole of it in one node, or its schedule alone for ComfyUI's own custom samplers."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from comfy_api.latest import io

from ..accvideo_core.errors import InvalidValueError
from ..accvideo_core.schedule import PRESETS, Preset, get_preset
from . import bridge
from .advice import advice

log = logging.getLogger("accvideo")
MAX_STEPS = 100_000  # of the whole schedule that a denoise below 1 takes the end of
FAMILY_TOOLTIP = "Which kind of student this is; it decides the solver, and steps, shift and guidance where they are left out."


def family_input() -> io.Combo.Input:
    return io.Combo.Input("family", options=list(PRESETS), default="hunyuan-t2v", tooltip=FAMILY_TOOLTIP)


def _schedule_inputs() -> list[io.Input]:
    preset = get_preset("hunyuan-t2v")
    values = "; ".join(f"{p.family}: {p.steps} steps, shift {p.shift:g}" for p in PRESETS.values())
    return [
        io.Int.Input(
            "steps",
            default=preset.steps,
            min=1,
            max=1000,
            optional=True,
            tooltip=f"Sampling steps, calls of the network. {values}.",
        ),
        io.Float.Input(
            "shift",
            default=preset.shift,
            min=0.01,
            max=100.0,
            step=0.01,
            optional=True,
            tooltip=f"Time shift of the schedule: higher spends more steps at high noise. {values}.",
        ),
    ]


def check_family(family: str | None) -> bool | str:
    """For validate_inputs: True, or a sentence. None stands for an input that is linked and not known yet."""
    try:
        return family is None or bool(get_preset(family))
    except InvalidValueError as error:
        return str(error)


def partial_sigmas(preset: Preset, steps: int | None, shift: float | None, denoise: float) -> torch.Tensor:
    """The last `steps` steps of a schedule of steps / denoise steps (ComfyUI's meaning of denoise); empty for denoise 0.

    Raises InvalidValueError for a denoise outside 0 to 1, steps below 1 or a shift that is not positive and finite.
    """
    full = preset.sigmas(steps, shift)
    if not 0 <= denoise <= 1:
        raise InvalidValueError(f"denoise is {denoise}; it must be from 0 (keep the latent) to 1 (start from pure noise)")
    if denoise == 0:
        return full[:0]
    count = len(full) - 1
    whole = int(count / denoise)
    if whole > MAX_STEPS:
        raise InvalidValueError(
            f"denoise {denoise:g} in {count} steps is the end of a schedule of {whole} steps; raise denoise to at least "
            f"{count / MAX_STEPS:g}, or set it to 0 to keep the latent"
        )
    return preset.sigmas(whole, shift)[-(count + 1) :]


class AccVideoSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoSampler",
            display_name="AccVideo Sampler",
            category="AccVideo",
            description=(
                "Samples a video in the few steps its student was distilled for: noise, shifted schedule, embedded guidance and "
                "solver in one node. With a latent and denoise below 1 it changes a video; masks and batches work as in KSampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanVideo or Wan student (or teacher, with its number of steps)."),
                io.Conditioning.Input("positive", tooltip="What to show, from a CLIP Text Encode with the model's own CLIP."),
                io.Latent.Input("latent", tooltip="Size and length of the video; with denoise below 1 also what to start from."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the noise; the same seed gives the same video.",
                ),
                family_input(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid. Only used with cfg above 1; students do not need it."
                ),
                *_schedule_inputs(),
                io.Float.Input(
                    "guidance",
                    default=6.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Embedded guidance of HunyuanVideo, 6 for the released models; it replaces a value set upstream. "
                    "Wan has none and ignores it.",
                ),
                bridge.advanced(
                    io.Float.Input(
                        "cfg",
                        default=1.0,
                        min=0.0,
                        max=100.0,
                        step=0.1,
                        optional=True,
                        tooltip="Classifier-free guidance, which doubles the time. 1 switches it off; other values need a "
                        "negative.",
                    )
                ),
                bridge.advanced(
                    io.Float.Input(
                        "denoise",
                        default=1.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        optional=True,
                        tooltip="How much of the latent to replace: 1 starts from pure noise, lower values keep more of it.",
                    )
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The sampled latent; decode it with the model's VAE."),
                io.Float.Output(display_name="seconds", tooltip="What sampling took, without loading the model."),
            ],
        )

    @classmethod
    def validate_inputs(cls, family: str | None = None) -> bool | str:
        return check_family(family)

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        latent: dict[str, Any],
        seed: int,
        family: str,
        negative: list | None = None,
        steps: int | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        cfg: float = 1.0,
        denoise: float = 1.0,
    ) -> io.NodeOutput:
        preset = get_preset(family)
        sigmas = partial_sigmas(preset, steps, shift, denoise)
        guidance = preset.guidance if guidance is None else guidance
        for name, value in (("guidance", guidance), ("cfg", cfg)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InvalidValueError(f"{name} is {value}; it must be a finite number of at least 0")
        if negative is None and cfg != 1.0:
            raise InvalidValueError(f"cfg is {cfg:g} but no negative is connected; connect one, or set cfg to 1")
        shift = preset.shift if shift is None else shift
        count = preset.steps if steps is None else steps
        warnings = advice(bridge.noted(model), preset, bridge.model_kind(model), count, shift, guidance, cfg, denoise)
        for warning in warnings:
            log.warning("AccVideo: %s", warning["text"])
        model = bridge.with_shift(model, shift)
        samples = bridge.prepare_latent(model, latent)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            if conditioning is not None:
                bridge.check_conditioning(model, conditioning, name)
        if preset.guidance is not None:
            positive = bridge.with_guidance(positive, guidance)
            negative = None if negative is None else bridge.with_guidance(negative, guidance)
        solver = bridge.solver(preset.solver, len(sigmas) - 1)
        bridge.attention_ran(model, again=True)
        result, seconds = bridge.sample(model, positive, negative, cfg, latent, samples, seed, sigmas, solver)
        told = {
            "steps": max(0, len(sigmas) - 1),
            "calls": max(0, len(sigmas) - 1) * (1 if cfg == 1 else 2),
            "seconds": seconds,
            "teacher_steps": preset.teacher_steps,
            "teacher_calls": preset.teacher_steps * (1 if preset.teacher_cfg == 1 else 2),
            "warnings": warnings,
            "attention": bridge.attention_ran(model),
        }
        return io.NodeOutput(result, seconds, ui={"accvideo_sampling": [told]})


class AccVideoSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoSigmas",
            display_name="AccVideo Sigmas",
            category="AccVideo",
            description=(
                "The schedule AccVideo Sampler uses, for SamplerCustomAdvanced and other custom samplers: linspace(1, 0) "
                "shifted, the key points of the teacher's trajectory. Set the guidance yourself with FluxGuidance."
            ),
            inputs=[family_input(), *_schedule_inputs()],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="steps + 1 noise levels from 1 to 0.")],
        )

    @classmethod
    def validate_inputs(cls, family: str | None = None) -> bool | str:
        return check_family(family)

    @classmethod
    def execute(cls, family: str, steps: int | None = None, shift: float | None = None) -> io.NodeOutput:
        return io.NodeOutput(get_preset(family).sigmas(steps, shift))
