"""Runs inside a ComfyUI checkout, under its own Python: what `nodes/bridge` finds there, and what comes of each row.

`python compatibility_worker.py CHECKOUT FOLDER` writes FOLDER/told.json; test_compatibility.py reads it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from worker import enter, pack


def main() -> None:
    folder = enter()
    import comfyui_version
    import torch

    nodes = pack().NODE_CLASS_MAPPINGS
    from accvideo_pack.accvideo_core.errors import AccVideoError
    from accvideo_pack.nodes import bridge

    told: dict[str, Any] = {"version": comfyui_version.__version__, "differences": bridge.DIFFERENCES}
    model = nodes["AccVideoTinyModels"].execute("student").args[0]
    coarse = {"samples": torch.zeros(1, 16, 5, 4, 4), "downscale_ratio_spacial": 16}
    told["coarse latent"] = list(bridge.prepare_latent(model, coarse).shape)
    if bridge.DIFFERENCES["nested latents"]:
        from comfy.nested_tensor import NestedTensor

        try:
            bridge.prepare_latent(model, {"samples": NestedTensor([torch.zeros(1, 16, 5, 8, 8), torch.zeros(1, 8, 100)])})
        except AccVideoError as error:
            told["nested latent"] = str(error)
    if bridge.DIFFERENCES["loading without dynamic memory"]:
        first, second = model.model, model.clone(disable_dynamic=True, force_deepcopy=True).model
        pairs = zip(first.diffusion_model.parameters(), second.diffusion_model.parameters(), strict=True)
        told["second copy"] = second is not first and all(torch.equal(a, b) for a, b in pairs)
    (folder / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
