"""Two videos side by side: one video under labels, and the pair for the slider that the front end shows."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..accvideo_core.errors import InvalidValueError
from ..accvideo_core.media import Pixels, side_by_side, write_mp4
from . import bridge

LEAST_WIDTH = 256  # smaller clips are enlarged by a whole factor, so that their labels have room


class AccVideoCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def label(which: str, default: str) -> io.String.Input:
            return io.String.Input(
                f"{which}_label", default=default, optional=True, tooltip=f"Written above the {which} video; empty for none."
            )

        def seconds(which: str) -> io.Float.Input:
            return io.Float.Input(
                f"{which}_seconds",
                default=0.0,
                min=0.0,
                max=1e9,
                step=0.01,
                optional=True,
                tooltip=f"What the {which} video took, for its label; link AccVideo Sampler's seconds. 0 leaves it out.",
            )

        return io.Schema(
            node_id="AccVideoCompare",
            display_name="AccVideo Compare",
            category="AccVideo",
            description=(
                "Puts two videos side by side under their labels, with the seconds each took and how many times faster the "
                "second was, and shows both in the node under a slider. Save the video with Save Video."
            ),
            inputs=[
                io.Image.Input("first", tooltip="Frames of the first video, for example the teacher's in 50 steps."),
                io.Image.Input("second", tooltip="Frames of the second video, for example the student's in 5 steps."),
                label("first", "teacher, 50 steps"),
                label("second", "student, 5 steps"),
                seconds("first"),
                seconds("second"),
                io.Float.Input(
                    "fps", default=24.0, min=0.01, max=240.0, optional=True, tooltip="Frames per second of both videos."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="frames", tooltip="Frames of both, side by side under the labels."),
                io.Video.Output(display_name="video", tooltip="The same as a video, for Save Video."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        first: torch.Tensor,
        second: torch.Tensor,
        first_label: str = "teacher, 50 steps",
        second_label: str = "student, 5 steps",
        first_seconds: float = 0.0,
        second_seconds: float = 0.0,
        fps: float = 24.0,
    ) -> io.NodeOutput:
        for which, frames in (("first", first), ("second", second)):
            if frames.ndim != 4 or frames.shape[-1] not in (3, 4) or not len(frames):
                shape = tuple(frames.shape)
                raise InvalidValueError(f"the {which} video has shape {shape}; connect frames (T, H, W, 3), as VAE Decode gives")
        clips = [to_pixels(first), to_pixels(second)]
        labels = [compare_label(first_label, first_seconds), compare_label(second_label, second_seconds, first_seconds)]
        joined = side_by_side(clips, labels, factor=max(1, LEAST_WIDTH // max(clip.shape[2] for clip in clips)))
        metadata = bridge.workflow_metadata(cls)
        told = []
        for role, pixels, label in zip(("first", "second", "both"), (*map(_even, clips), joined), (*labels, ""), strict=True):
            path, file = bridge.preview_file(".mp4")
            write_mp4(path, pixels, fps, metadata)
            told.append({**file, "role": role, "label": label})
        frames = torch.from_numpy(joined).float() / 255
        return io.NodeOutput(frames, bridge.native_video(path), ui={"accvideo_compare": told, "text": labels})


def compare_label(label: str, seconds: float, before: float = 0.0) -> str:
    """The label, the seconds it took if they are known, and how many times faster than `before` that is."""
    said = [label.strip()] if label.strip() else []
    if seconds > 0:
        said.append(f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s")
        if before > 0:
            said.append(f"{before / seconds:.1f} times faster" if before >= seconds else f"{seconds / before:.1f} times slower")
    return ", ".join(said)


def to_pixels(frames: torch.Tensor) -> Pixels:
    """IMAGE (T, H, W, 3 or more) -> (T, H, W, 3) uint8."""
    pixels: Pixels = (frames[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
    return pixels


def _even(clip: Pixels) -> Pixels:
    """The last row and column once more where H.264 would refuse an odd size."""
    return np.pad(clip, ((0, 0), (0, clip.shape[1] % 2), (0, clip.shape[2] % 2), (0, 0)), mode="edge")
