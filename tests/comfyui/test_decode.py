"""AccVideo VAE Decode in a real ComfyUI: what VAE Decode gives where it fits, as few tiles as fit where it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from accvideo_core.comfy_client import ComfyError
from accvideo_core.tiles import plan_tiles
from tests.comfyui.server import Server, node, tiny_prompt

TOLD_BY = "decode_worker.py"
WHOLE = "3 x 40 x 64 latents in one piece"


def test_what_fits_is_decoded_whole_as_by_vae_decode(told: dict[str, Any]) -> None:
    assert told["whole"] == {"plan": WHOLE, "shapes": [[1, 16, 3, 40, 64]], "images": [9, 320, 512, 3], "equal": True}
    assert told["batch"]["images"] == [18, 320, 512, 3] and told["batch"]["plan"] == WHOLE and told["batch"]["equal"]


def test_tiles_are_the_plans_and_joined_as_comfyui_joins_its_own(told: dict[str, Any]) -> None:
    found = told["tiles"]
    assert found["plan"] == "2 tiles of 3 x 40 x 36 latents, 12.5 % computed twice"
    assert found["shapes"] == found["native"] == [[1, 16, 3, 40, 36]] * 2 and found["equal"]


def test_out_of_memory_is_answered_with_smaller_tiles(told: dict[str, Any]) -> None:
    shapes = [shape[2:] for shape in told["out of memory"]["shapes"]]
    assert shapes[0] == [3, 40, 64] and shapes[1] == [3, 40, 27]  # each failed at once
    assert all(shape[0] == 3 and shape[1] * shape[2] <= 40 * 24 for shape in shapes[2:]) and len(shapes) > 3
    assert told["out of memory"]["images"] == [9, 320, 512, 3]
    assert told["never fits"]["error"] == "no memory for this tile" and len(told["never fits"]["shapes"]) == 4


def test_other_errors_pass_at_once(told: dict[str, Any]) -> None:
    assert told["broken"] == {"error": "a broken file", "shapes": [[1, 16, 3, 40, 64]]}


def test_cancelled_between_tiles(told: dict[str, Any]) -> None:
    assert told["cancelled"]["shapes"] == [[1, 16, 3, 24, 24]]


def test_what_is_no_video_of_this_vae(told: dict[str, Any]) -> None:
    assert told["picture"] == {"plan": None, "images": [1, 64, 64, 3]}
    assert told["other model"].startswith("the latent has 4 channels, this VAE decodes 16; connect")
    assert told.get("nested", {"plan": WHOLE})["plan"] == WHOLE


def test_the_node_in_a_workflow(server: Server) -> None:
    """Beside VAE Decode in the shipped workflow: the same pictures."""
    prompt = tiny_prompt(seed=4711, steps=2)
    native = next(place for place, it in prompt.items() if it["class_type"] == "VAEDecode")
    prompt["ours"] = {"class_type": "AccVideoVAEDecode", "inputs": {**prompt[native]["inputs"], "memory": 0.0}}
    shown = {"of ours": "ours", "of native": native}
    prompt |= {name: node("SaveImage", images=[place, 0], filename_prefix=name) for name, place in shown.items()}
    result = server.run(prompt)
    assert result.texts["ours"] == ["5 x 8 x 8 latents in one piece"]
    ours, theirs = (
        [np.array(Image.open(server.path(file))) for file in result.files if file.filename.startswith(name)] for name in shown
    )
    assert len(ours) == 17 and np.array_equal(ours, theirs)


def test_the_node_cuts_what_it_is_given_less_memory_for(server: Server) -> None:
    latent = node("EmptyHunyuanLatentVideo", width=384, height=256, length=9, batch_size=1)
    models = node("AccVideoTinyModels", which="student")
    memory = 2 * 64 * 256 * 4 * (3 * 32 * 28) / 1e9  # of a tile, by the tiny VAE's estimate
    decode = node("AccVideoVAEDecode", samples=["latent", 0], vae=["models", 2], memory=memory)
    prompt = {"latent": latent, "models": models, "decode": decode, "show": node("PreviewImage", images=["decode", 0])}
    result = server.run(prompt)
    plan = plan_tiles((3, 32, 48), lambda tile: tile[0] * tile[1] * tile[2] <= 3 * 32 * 28)
    assert plan.tiles == 2 and result.texts["decode"] == [str(plan)] and len(result.files) == 9


def test_bad_memory(server: Server) -> None:
    prompt = tiny_prompt(seed=1, steps=1)
    (place,) = (place for place, it in prompt.items() if it["class_type"] == "VAEDecode")
    prompt[place] = {"class_type": "AccVideoVAEDecode", "inputs": {**prompt[place]["inputs"], "memory": -1.0}}
    with pytest.raises(ComfyError, match="memory"):
        server.run(prompt)
