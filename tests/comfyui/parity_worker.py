"""Runs inside a ComfyUI checkout, under its own Python: native HunyuanVideo on weights and inputs read from files.

`python parity_worker.py CHECKOUT FOLDER` reads FOLDER/cases.json, a list of {weights, inputs, dtype, output}; weights are
in original names and go through ComfyUI's own loader, as a user's file does. Uses nothing of AccVideo.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from worker import enter


def main() -> None:
    folder = enter("--use-pytorch-cross-attention")
    import comfy.model_management
    import comfy.sd
    import torch
    from safetensors.torch import load_file, save_file

    for case in json.loads((folder / "cases.json").read_text()):
        dtype = getattr(torch, case["dtype"])
        patcher = comfy.sd.load_diffusion_model_state_dict(load_file(folder / case["weights"]), model_options={"dtype": dtype})
        if patcher is None:
            raise SystemExit(f"ComfyUI does not recognise {case['weights']}")
        comfy.model_management.load_models_gpu([patcher])
        network = patcher.model.diffusion_model
        inputs = load_file(folder / case["inputs"])
        guidance = inputs.get("guidance")
        # dtypes as ComfyUI's own sampling hands them over: everything in the model's, the timestep in float32
        with torch.no_grad():
            velocity = network(
                inputs["latent"].to(dtype),
                (inputs["sigma"] * 1000).float(),
                context=inputs["text"].to(dtype),
                y=inputs["pooled"].to(dtype),
                guidance=None if guidance is None else guidance.to(dtype),
            )
        save_file({"velocity": velocity.float().contiguous().clone()}, folder / case["output"])


if __name__ == "__main__":
    main()
