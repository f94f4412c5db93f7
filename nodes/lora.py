"""LoRAs in ComfyUI: files of any format stacked, applied to a model, merged into a checkpoint, or extracted from two."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..accvideo_core.errors import AccVideoError, InvalidValueError
from ..accvideo_core.lora import parse_blocks
from . import bridge
from .loaders import file_state
from .lora_apply import StackedLora, apply_stack

BLOCKS_TOOLTIP = (
    "Where it applies: all, or a list of places with a factor for the strength, such as double.0-9, single=0.5, other=0. "
    "Kinds are double and single (HunyuanVideo), blocks (Wan) and other, what lies outside the blocks. What is not named "
    "is left out."
)
Stack = io.Custom("ACCVIDEO_LORA_STACK")


def _sentence(check: Callable[[], Any]) -> bool | str:
    """For validate_inputs: True, or what is wrong in a sentence."""
    try:
        check()
    except AccVideoError as error:
        return str(error)
    return True


class AccVideoLoraStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoLoraStack",
            display_name="AccVideo LoRA Stack",
            category="AccVideo",
            description=(
                "Puts one LoRA, with its strength and the blocks it applies to, on a stack; chain several for several LoRAs. "
                "Every format of HunyuanVideo and Wan LoRAs is read: diffusion-pipe, musubi, ComfyUI, diffusers, OneTrainer..."
            ),
            inputs=[
                io.Combo.Input(
                    "lora",
                    options=bridge.lora_files(),
                    tooltip="LoRA file in ComfyUI's models/loras folder, of any known format.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="What its change is multiplied by: 1 as trained, 0 not at all, negative the other way.",
                ),
                io.String.Input("blocks", default="all", tooltip=BLOCKS_TOOLTIP),
                Stack.Input("stack", optional=True, tooltip="The stack to put it on; left open, this is the first."),
            ],
            outputs=[Stack.Output(display_name="stack", tooltip="For AccVideo LoRA Apply, Merge, or another Stack.")],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None = None, blocks: str | None = None) -> bool | str:
        """None stands for an input that is linked and not known yet."""
        checks = [lora is None or _sentence(lambda: bridge.lora_path(str(lora)))]
        checks.append(blocks is None or _sentence(lambda: parse_blocks(str(blocks))))
        return next((found for found in checks if found is not True), True)

    @classmethod
    def fingerprint_inputs(cls, lora: str | None = None, **_: Any) -> str:
        return "linked" if lora is None else f"{lora} {file_state(bridge.lora_path(lora))}"

    @classmethod
    def execute(cls, lora: str, strength: float, blocks: str, stack: tuple[StackedLora, ...] | None = None) -> io.NodeOutput:
        if not math.isfinite(strength):
            raise InvalidValueError(f"strength is {strength}; it must be a finite number")
        entry = StackedLora(lora, bridge.lora_path(lora), strength, parse_blocks(blocks))
        return io.NodeOutput((*(stack or ()), entry))


class AccVideoLoraApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoLoraApply",
            display_name="AccVideo LoRA Apply",
            category="AccVideo",
            description=(
                "Applies a stack of LoRAs to a model as native patches, so that offloading, fp8 and every other node work as "
                "usual. The report counts the modules applied and names what was not; a key that is not understood is an error."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanVideo or Wan model, the kind the LoRAs were made for."),
                Stack.Input("stack", tooltip="From AccVideo LoRA Stack."),
                io.Boolean.Input(
                    "allow_unmatched",
                    default=False,
                    optional=True,
                    tooltip="Leave out, and name in the report, what is not understood or does not fit, instead of stopping.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRAs as patches; the input is unchanged."),
                io.String.Output(display_name="report", tooltip="What was applied and what was not; show it with Preview Any."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, stack: tuple[StackedLora, ...], allow_unmatched: bool = False) -> io.NodeOutput:
        patched, report = apply_stack(model, stack, allow_unmatched)
        return io.NodeOutput(patched, report, ui={"text": [report]})
