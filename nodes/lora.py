"""LoRAs in ComfyUI: files of any format stacked, applied to a model, merged into a checkpoint, or extracted from two."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..accvideo_core.checkpoint.layouts import some
from ..accvideo_core.errors import AccVideoError, InvalidValueError
from ..accvideo_core.lora import ExtractReport, LoraUse, MergeReport, extract_lora, merge_lora, parse_blocks
from ..accvideo_core.lora.extract import DTYPES as LORA_DTYPES
from ..accvideo_core.lora.storage import DTYPES as MERGE_DTYPES
from ..accvideo_core.lora.writing import KEY_FORMATS
from . import bridge
from .loaders import file_state
from .lora_apply import StackedLora, apply_stack

BLOCKS_TOOLTIP = (
    "Where it applies: all, or a list of places with a factor for the strength, such as double.0-9, single=0.5, other=0. "
    "Kinds are double and single (HunyuanVideo), blocks (Wan) and other, what lies outside the blocks. What is not named "
    "is left out."
)
Stack = io.Custom("ACCVIDEO_LORA_STACK")
FileName = io.Custom("COMBO")  # so that it can be linked to the file list of a loader or a stack
BUNDLED = {"AccVideo tiny student": "student", "AccVideo tiny teacher": "teacher"}


def checkpoint_path(choice: str) -> Path:
    """The file of a name in ComfyUI's list of diffusion models, or of one of the bundled models."""
    if choice in BUNDLED:
        from ..accvideo_core import tiny

        return tiny.weights_path(BUNDLED[choice])
    return bridge.diffusion_model_path(choice)


def _checkpoint_input(name: str, tooltip: str) -> io.Combo.Input:
    return io.Combo.Input(
        name,
        options=[*bridge.diffusion_model_files(), *BUNDLED],
        tooltip=f"{tooltip} A file in ComfyUI's models/diffusion_models, in any layout, or a bundled tiny model.",
    )


def _output_inputs(kind: str, example: str) -> list[io.Input]:
    return [
        io.String.Input("name", default=example, tooltip=f"Name of the new file in ComfyUI's models/{kind}; subfolder/name too."),
        io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of that name; otherwise that is an error."),
    ]


def _written_outputs(what: str) -> list[io.Output]:
    return [
        io.String.Output(display_name="path", tooltip=f"Where {what} lies."),
        io.String.Output(display_name="report", tooltip="What was done, in words; show it with Preview Any."),
        FileName.Output(
            display_name="file", tooltip=f"Name of {what}; link it to the file of an AccVideo node to use it at once."
        ),
    ]


def _choice(name: str, value: str, known: Iterable[str]) -> str:
    """ComfyUI 0.3.64 does not check a choice itself."""
    if value not in known:
        raise InvalidValueError(f"unknown {name} {value!r}; choose one of {', '.join(known)}")
    return value


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
        use = LoraUse(bridge.lora_path(lora), strength, parse_blocks(blocks))
        return io.NodeOutput((*(stack or ()), StackedLora(lora, use)))


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
                bridge.advanced(
                    io.Boolean.Input(
                        "allow_unmatched",
                        default=False,
                        optional=True,
                        tooltip="Leave out, and name in the report, what is not understood or does not fit, instead of stopping.",
                    )
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


class AccVideoLoraMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoLoraMerge",
            display_name="AccVideo LoRA Merge",
            category="AccVideo",
            description=(
                "Writes a checkpoint with a stack of LoRAs merged into it, tensor by tensor in little memory, summed in fp32. "
                "The file is whole or not there at all; what it was made of stands in its metadata."
            ),
            inputs=[
                _checkpoint_input("checkpoint", "The model to merge into; it is not changed."),
                Stack.Input("stack", tooltip="From AccVideo LoRA Stack."),
                io.Combo.Input(
                    "dtype",
                    options=list(MERGE_DTYPES),
                    default="keep",
                    tooltip="What the new file's values are stored as; keep leaves every tensor its own.",
                ),
                *_output_inputs("diffusion_models", "accvideo/merged"),
                bridge.advanced(
                    io.Boolean.Input(
                        "allow_unmatched",
                        default=False,
                        optional=True,
                        tooltip="Leave out, and name in the report, what belongs to no tensor of the model, instead of stopping.",
                    )
                ),
            ],
            outputs=_written_outputs("the merged checkpoint"),
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None, name: str | None = None) -> bool | str:
        checks = [checkpoint is None or _sentence(lambda: checkpoint_path(str(checkpoint)))]
        checks.append(name is None or _sentence(lambda: bridge.model_output("diffusion_models", str(name))))
        return next((found for found in checks if found is not True), True)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None = None, **_: Any) -> str:
        return "linked" if checkpoint is None else f"{checkpoint} {file_state(checkpoint_path(checkpoint))}"

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        stack: tuple[StackedLora, ...],
        dtype: str,
        name: str,
        overwrite: bool,
        allow_unmatched: bool = False,
    ) -> io.NodeOutput:
        kept = MERGE_DTYPES[_choice("dtype", dtype, MERGE_DTYPES)]
        path, listed = bridge.model_output("diffusion_models", name)
        with bridge.progress("merge") as progress:
            done = merge_lora(
                checkpoint_path(checkpoint),
                [entry.use for entry in stack],
                path,
                dtype=kept,
                overwrite=overwrite,
                allow_unmatched=allow_unmatched,
                progress=progress,
            )
        report = _merge_report(done)
        return io.NodeOutput(str(path), report, listed, ui={"text": [report]})


def _merge_report(done: MergeReport) -> str:
    lines = [f"{done.path}: {done.changed} of {done.tensors} tensors changed, {done.bytes / 1e9:,.2f} GB"]
    lines += [
        f"{use.path.name}: {count} tensors, strength {use.strength:g}, blocks {use.blocks.text}" for use, count in done.applied
    ]
    reasons: dict[str, list[str]] = {}
    for name, why in done.left_out.items():
        reasons.setdefault(why, []).append(name)
    lines += [f"  left out, {why}: {len(names)} ({some(names)})" for why, names in reasons.items()]
    return "\n".join(lines)


class AccVideoLoraExtract(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoLoraExtract",
            display_name="AccVideo LoRA Extract",
            category="AccVideo",
            description=(
                "Writes the LoRA that turns one checkpoint into another: the best factors of every matrix's difference, the rest "
                "whole. The report says, module by module, what the LoRA misses."
            ),
            inputs=[
                _checkpoint_input("tuned", "The model the LoRA shall lead to, such as a student."),
                _checkpoint_input("base", "The model it starts from, such as the student's teacher."),
                io.Int.Input(
                    "rank", default=32, min=1, max=4096, tooltip="Rank of every pair of factors, or the most with energy."
                ),
                bridge.advanced(
                    io.Float.Input(
                        "energy",
                        default=0.0,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="0: every module gets rank. Above: as many as hold this share of its change, 0.98 for most.",
                    )
                ),
                bridge.advanced(
                    io.Combo.Input(
                        "key_format",
                        options=list(KEY_FORMATS),
                        default="comfyui",
                        tooltip="Whose names it has: comfyui loads everywhere in ComfyUI, kohya in musubi-tuner, peft in "
                        "diffusers.",
                    )
                ),
                io.Combo.Input(
                    "dtype", options=list(LORA_DTYPES), default="fp16", tooltip="What the LoRA's values are stored as."
                ),
                *_output_inputs("loras", "accvideo/extracted"),
                bridge.advanced(
                    io.Boolean.Input(
                        "lossy",
                        default=False,
                        optional=True,
                        tooltip="Leave out, and name in the report, what the key format has no place for, instead of stopping.",
                    )
                ),
            ],
            outputs=_written_outputs("the LoRA"),
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, tuned: str | None = None, base: str | None = None, name: str | None = None) -> bool | str:
        """The numbers are checked by ComfyUI, because they are not named here."""
        checks = [choice is None or _sentence(lambda c=choice: checkpoint_path(str(c))) for choice in (tuned, base)]
        checks.append(name is None or _sentence(lambda: bridge.model_output("loras", str(name))))
        return next((found for found in checks if found is not True), True)

    @classmethod
    def fingerprint_inputs(cls, tuned: str | None = None, base: str | None = None, **_: Any) -> str:
        return " ".join("linked" if c is None else f"{c} {file_state(checkpoint_path(c))}" for c in (tuned, base))

    @classmethod
    def execute(
        cls,
        tuned: str,
        base: str,
        rank: int,
        energy: float,
        key_format: str,
        dtype: str,
        name: str,
        overwrite: bool,
        lossy: bool = False,
    ) -> io.NodeOutput:
        stored = LORA_DTYPES[_choice("dtype", dtype, LORA_DTYPES)]
        path, listed = bridge.model_output("loras", name)
        with bridge.progress("extract") as progress:
            done = extract_lora(
                checkpoint_path(tuned),
                checkpoint_path(base),
                path,
                rank,
                energy=energy or None,
                key_format=_choice("key format", key_format, KEY_FORMATS),
                dtype=stored,
                lossy=lossy,
                overwrite=overwrite,
                progress=progress,
            )
        report = _extract_report(done)
        return io.NodeOutput(str(path), report, listed, ui={"text": [report]})


def _extract_report(done: ExtractReport) -> str:
    ranks = [module.rank for module in done.modules if module.rank is not None]
    spread = (
        f"rank {min(ranks)} to {max(ranks)}" if ranks and min(ranks) < max(ranks) else f"rank {ranks[0]}" if ranks else "none"
    )
    lines = [
        f"{done.path}: {len(ranks)} pairs of factors ({spread}) and {len(done.modules) - len(ranks)} whole differences, "
        f"{done.bytes / 1e6:,.1f} MB",
        f"misses {done.residual:.2%} of the difference (relative Frobenius norm); {done.unchanged} tensors are equal",
    ]
    if done.left_out:
        lines.append(f"  LEFT OUT, no place in this key format: {len(done.left_out)} ({some(done.left_out)})")
    worst = sorted(done.modules, key=lambda module: module.residual, reverse=True)
    lines.append("misses most, each of its own difference:")
    lines += [f"  {module.residual:7.2%}  {module.tensor}" for module in worst[:10]]
    return "\n".join(lines)
