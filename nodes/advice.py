"""What a model was made for, as far as its file tells, and what to say when it is sampled otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..accvideo_core.schedule import Preset

ARCHITECTURES = {"hunyuan": "HunyuanVideo", "tiny": "HunyuanVideo", "wan": "WAN"}  # by the family's first word


@dataclass(frozen=True)
class MadeFor:
    """A student or a teacher, and its number of steps: None for its family's."""

    role: Literal["student", "teacher"]
    steps: int | None = None


def advice(
    made_for: MadeFor | None,
    preset: Preset,
    kind: str,
    steps: int,
    shift: float,
    guidance: float | None,
    cfg: float,
    denoise: float,
) -> list[dict[str, Any]]:
    """What to warn of, each as {about, text} and the numbers in the text; empty when all is as it was meant.

    kind  ComfyUI's name of the model's architecture
    """
    told: list[dict[str, Any]] = []
    family = preset.family

    def warn(about: str, text: str, **numbers: Any) -> None:
        told.append({"about": about, "text": text, **numbers})

    if not kind.startswith(ARCHITECTURES[family.split("-")[0]]):
        text = f"family {family} is chosen for a {kind} model, whose schedule and solver differ; choose the model's own family"
        warn("family", text, family=family, kind=kind)
    elif made_for is not None and made_for.role == "student":
        own = made_for.steps or preset.steps
        if denoise == 1 and steps != own:
            cost = "more take longer and are none it was trained on" if steps > own else "with fewer, shapes and motion suffer"
            text = f"this student was distilled for {own} steps and is sampled in {steps}: {cost}; set steps to {own}"
            warn("steps", text, own=own, steps=steps)
        if shift != preset.shift:
            text = f"this student was distilled along shift {preset.shift:g}, not {shift:g}; set shift to {preset.shift:g}"
            warn("shift", text, own=preset.shift, shift=shift)
        if cfg != 1:
            text = f"cfg is {cfg:g}, but this student needs none: it doubles the time and hardens the colours; set cfg to 1"
            warn("cfg", text, cfg=cfg)
    elif made_for is not None and denoise == 1 and 2 * steps < (own := made_for.steps or preset.teacher_steps):
        text = f"this is a teacher, made for {own} steps, and is sampled in {steps}; set steps to {own}, or load its student"
        warn("teacher", text, own=own, steps=steps)
    if family == "tiny" and guidance != preset.guidance:
        own = preset.guidance
        warn(
            "guidance",
            f"the tiny models know guidance {own:g} alone, not {guidance:g}; set it to {own:g}",
            own=own,
            guidance=guidance,
        )
    return told
