"""Prompt files in ComfyUI: a prompt a run, or all of them encoded into a plan for `accvideo capture` on other machines."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..accvideo_core.errors import AccVideoError, AccVideoWarning, InvalidValueError
from ..accvideo_core.synvid.plan import Plan
from ..accvideo_core.synvid.prompts import FORMATS, Prompt, read_prompts
from ..accvideo_core.synvid.wanted import lacking, own_seed, put_into, wanted_samples
from . import bridge
from .loaders import file_state

log = logging.getLogger("accvideo")


def prompts_of(name: str) -> list[Prompt]:
    """The prompts of a file in ComfyUI's input folder; what it repeats is said in the console."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AccVideoWarning)
        prompts = read_prompts(bridge.input_path(name))
    for warning in caught:
        log.warning("AccVideo: %s", warning.message)
    return prompts


def _file_input() -> io.Combo.Input:
    return io.Combo.Input(
        "file",
        options=bridge.input_files(FORMATS),
        tooltip="A prompt file in ComfyUI's input folder: .txt with one a line, .csv with a column prompt, or .jsonl of objects "
        "with a prompt; the last two may name a seed.",
    )


def _check_file(file: str | None) -> bool | str:
    try:
        return file is None or bool(bridge.input_path(file))
    except AccVideoError as error:
        return str(error)


def _file_state(file: str | None) -> str:
    return "linked" if file is None else f"{file} {file_state(bridge.input_path(file))}"


class AccVideoPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoPrompts",
            display_name="AccVideo Prompts",
            category="AccVideo",
            description=(
                "A prompt of a file, by its place. With the index set to increment, a workflow that is queued again and again "
                "goes through the file; after the last prompt it stops with a sentence."
            ),
            inputs=[
                _file_input(),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=True,
                    tooltip="Place in the file, from 0; set it to increment to take the next with every run.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompt", tooltip="For the text encoder, and for AccVideo SynVid Writer."),
                io.Int.Output(display_name="count", tooltip="How many prompts the file has."),
                io.Int.Output(
                    display_name="seed",
                    tooltip="The seed that the file gives, else one that hangs on the prompt alone, as in accvideo encode.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return _check_file(file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, index: int | None = None) -> str:
        return f"{_file_state(file)} {index}"

    @classmethod
    def execute(cls, file: str, index: int) -> io.NodeOutput:
        prompts = prompts_of(file)
        if not 0 <= index < len(prompts):
            raise InvalidValueError(
                f"index is {index}, but {file} has {len(prompts)} prompts, 0 to {len(prompts) - 1}; all are done if it counted "
                "up, else choose one of these"
            )
        return io.NodeOutput(prompts[index].text, len(prompts), own_seed(prompts[index]))


class AccVideoPlanWriter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoPlanWriter",
            display_name="AccVideo Plan Writer",
            category="AccVideo",
            description=(
                "Encodes every prompt of a file with a native CLIP into a plan folder, so that `accvideo capture` can capture "
                "them on machines that have no text encoder. Run it again to add prompts: what is in the plan stays."
            ),
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the teacher."),
                _file_input(),
                io.Int.Input("width", default=960, min=16, max=16384, step=16, tooltip="Of the videos in pixels: 16n."),
                io.Int.Input("height", default=544, min=16, max=16384, step=16, tooltip="Of the videos in pixels: 16n."),
                io.Int.Input("length", default=93, min=1, max=16384, step=4, tooltip="Of the videos in frames: 4n+1."),
                io.Int.Input(
                    "seeds", default=1, min=1, max=1000, tooltip="Trajectories of each prompt, each from noise of its own."
                ),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Another number gives every prompt other noise."),
                io.String.Input(
                    "name", default="my_plan", tooltip="Of the plan, in ComfyUI's output folder below synvid/; made if missing."
                ),
            ],
            outputs=[
                io.String.Output(display_name="plan", tooltip="The plan's folder, for accvideo capture --plan."),
                io.String.Output(display_name="report", tooltip="How many samples the plan has, and what was left out."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return _check_file(file)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # only the plan itself knows what it lacks

    @classmethod
    def execute(
        cls, clip: Any, file: str, width: int, height: int, length: int, seeds: int, seed: int, name: str
    ) -> io.NodeOutput:
        from ..accvideo_core.tiny.pipeline import latent_shape

        shape = latent_shape(length, height, width)
        path = Path(bridge.synvid_path(name))
        samples = wanted_samples(prompts_of(file), shape, seeds, seed)
        plan = Plan(path, create=True)
        todo, before = lacking(plan, samples, shape), len(plan.items)
        show, faults = bridge.progress_bar(max(len(todo), 1)), []
        encoded: dict[str, tuple[Any, Any]] = {}
        for done, sample in enumerate(todo):
            show(done)
            try:
                if sample.prompt not in encoded:  # copies of a prompt follow one another
                    text, pooled = bridge.plain_text(bridge.encode_prompt(clip, sample.prompt), "encoded")
                    encoded = {sample.prompt: (text[0], None if pooled is None else pooled[0])}
            except AccVideoError as error:
                faults.append(f"left out: {error}")
                continue
            put_into(plan, sample, shape, *encoded[sample.prompt])
        sizes = "x".join(map(str, shape))
        added = len(plan.items) - before
        report = "\n".join([f"{path}: {len(plan.items)} samples, {added} of them new, latents {sizes}", *faults])
        return io.NodeOutput(str(path), report, ui={"text": [report]})
