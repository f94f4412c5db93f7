"""Decoding with the whole of a card's memory: as few tiles as fit, cut across the picture and not in time."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..accvideo_core.errors import InvalidValueError
from . import bridge


class AccVideoVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoVAEDecode",
            display_name="AccVideo VAE Decode",
            category="AccVideo",
            description=(
                "VAE Decode that looks at the memory first: whole if the video fits, else in the tiles that compute least twice, "
                "cut across the picture and not in time, where a cut is seen as flicker. Tiles move the progress bar, and Cancel "
                "works between them."
            ),
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode. One that is no video is decoded as by VAE Decode."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the latent's model."),
                bridge.advanced(
                    io.Float.Input(
                        "memory",
                        default=0.0,
                        min=0.0,
                        max=1e6,
                        step=0.1,
                        optional=True,
                        tooltip="Gigabytes to plan for, by ComfyUI's estimate. 0 takes what the device has free once other "
                        "models have made room.",
                    )
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The frames, videos of a batch one behind the other."),
                io.String.Output(display_name="plan", tooltip="How it was cut, and how much was computed twice."),
            ],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, memory: float = 0.0) -> io.NodeOutput:
        if not (math.isfinite(memory) and memory >= 0):
            raise InvalidValueError(f"memory is {memory}; it must be gigabytes of at least 0, where 0 stands for what is free")
        images, plan = bridge.decode(vae, samples["samples"], memory * 1e9 or None)
        told = "as VAE Decode does: this VAE's latents are not cut" if plan is None else str(plan)
        return io.NodeOutput(images, told, ui={"text": [told]})
