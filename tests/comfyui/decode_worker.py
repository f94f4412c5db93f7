"""Runs inside a ComfyUI checkout, under its own Python: what `nodes/bridge/decode` gives the tiny world's VAE.

`python decode_worker.py CHECKOUT FOLDER` writes FOLDER/told.json; test_decode.py reads it.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from worker import enter, pack


def main() -> None:
    folder = enter()
    import comfy.model_management
    import comfy.sd
    import comfy.taesd.taesd
    import torch

    pack()
    from accvideo_pack.accvideo_core.tiny import load_vae
    from accvideo_pack.nodes import bridge

    vae = bridge.native_vae(load_vae())
    original = vae.first_stage_model.decode
    latent = torch.randn(1, 16, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    told: dict[str, Any] = {}

    @contextlib.contextmanager
    def watched(before: Callable[[Any], None] = lambda tile: None) -> Iterator[list[list[int]]]:
        """The shapes the network is called with; `before` may raise."""
        shapes: list[list[int]] = []

        def decode(tile: torch.Tensor) -> torch.Tensor:
            shapes.append(list(tile.shape))
            before(tile)
            return original(tile)

        vae.first_stage_model.decode = decode
        try:
            yield shapes
        finally:
            vae.first_stage_model.decode = original

    def bytes_for(*tile: int) -> float:
        return vae.memory_used_decode((1, 16, *tile), vae.vae_dtype)

    with torch.inference_mode():  # as ComfyUI runs its nodes
        # Whole, alone and as a batch.
        for name, given in (("whole", latent), ("batch", torch.cat((latent, -latent)))):
            with watched() as shapes:
                images, plan = bridge.decode(vae, given)
            native = vae.decode(given).flatten(0, 1)
            told[name] = {"plan": str(plan), "shapes": shapes, "images": list(images.shape), "equal": torch.equal(images, native)}

        # In tiles: against ComfyUI's own, which takes the same tile as tile_x (height) and tile_y (width).
        with watched() as shapes:
            images, plan = bridge.decode(vae, latent, bytes_for(3, 40, 40))
        _, height, width = plan.tile
        with watched() as native_shapes:
            native = vae.decode_tiled(latent, tile_t=3, tile_x=height, tile_y=width, overlap=8, overlap_t=2).flatten(0, 1)
        told["tiles"] = {"plan": str(plan), "shapes": shapes, "native": native_shapes, "equal": torch.equal(images, native)}

        # Out of memory where the estimate said it would fit.
        def too_large(places: int) -> Callable[[torch.Tensor], None]:
            def check(tile: torch.Tensor) -> None:
                if math.prod(tile.shape[2:]) > places:
                    raise torch.cuda.OutOfMemoryError("no memory for this tile")

            return check

        with watched(too_large(3 * 40 * 24)) as shapes:
            images, plan = bridge.decode(vae, latent)
        told["out of memory"] = {"plan": str(plan), "shapes": shapes, "images": list(images.shape)}
        with watched(too_large(0)) as shapes:
            try:
                bridge.decode(vae, latent)
            except torch.cuda.OutOfMemoryError as error:
                told["never fits"] = {"error": str(error), "shapes": shapes}

        def broken(tile: torch.Tensor) -> None:
            raise RuntimeError("a broken file")

        with watched(broken) as shapes:
            try:
                bridge.decode(vae, latent)
            except RuntimeError as error:
                told["broken"] = {"error": str(error), "shapes": shapes}

        # Cancelled during the first tile.
        def cancel(tile: torch.Tensor) -> None:
            comfy.model_management.interrupt_current_processing(True)

        with watched(cancel) as shapes:
            try:
                bridge.decode(vae, latent, bytes_for(3, 24, 24))
            except comfy.model_management.InterruptProcessingException:
                told["cancelled"] = {"shapes": shapes}

        # What is not a video, and what is another model's.
        picture = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD(latent_channels=4).state_dict())
        images, plan = bridge.decode(picture, torch.zeros(1, 4, 8, 8))
        told["picture"] = {"plan": plan, "images": list(images.shape)}
        try:
            bridge.decode(vae, torch.zeros(1, 4, 3, 8, 8))
        except ValueError as error:
            told["other model"] = str(error)
        if bridge.DIFFERENCES["nested latents"]:
            from comfy.nested_tensor import NestedTensor

            images, plan = bridge.decode(vae, NestedTensor([latent, torch.zeros(1, 8, 100)]))
            told["nested"] = {"plan": str(plan), "images": list(images.shape)}
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
