"""Runs inside a ComfyUI checkout, under its own Python: a small network with LoRA files on it, by ComfyUI's loader or ours.

`python lora_worker.py CHECKOUT FOLDER` reads FOLDER/jobs.json, a list of {weights, inputs, output, loras, loader}: `loras` is
a list of {file, strength, blocks}, `loader` "native" (ComfyUI's own LoRA loader) or "ours" (the pack's nodes). Each output
holds the network's weights as patched (`weight.<native name>`), the velocity it gives on `inputs` (none: only the weights),
and in its metadata the report of ours.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_jobs(checkout: Path, python: Path, folder: Path, jobs: list[dict[str, Any]]) -> str:
    """Do `jobs` in one process of a checkout's own Python, and return what it said. Called from outside of ComfyUI."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(python), __file__, str(checkout), str(folder)]
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"ComfyUI in {checkout} failed:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def pack() -> Any:
    """This repository, imported as ComfyUI imports a custom node."""
    spec = importlib.util.spec_from_file_location("accvideo_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["accvideo_pack"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    checkout, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention", "--base-directory", str(folder)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import folder_paths
    import torch
    from safetensors.torch import load_file, save_file

    folder_paths.add_model_folder_path("loras", str(folder))
    nodes = pack().NODE_CLASS_MAPPINGS

    def apply(model: Any, job: dict[str, Any]) -> tuple[Any, str]:
        if job["loader"] == "native":
            for lora in job["loras"]:
                tensors = comfy.utils.load_torch_file(str(folder / lora["file"]), safe_load=True)
                model, _ = comfy.sd.load_lora_for_models(model, None, tensors, lora["strength"], 0)
            return model, ""
        stack = None
        for lora in job["loras"]:
            inputs = {"lora": lora["file"], "strength": lora["strength"], "blocks": lora.get("blocks", "all")}
            (stack,) = nodes["AccVideoLoraStack"].execute(**inputs, stack=stack).result
        return nodes["AccVideoLoraApply"].execute(model=model, stack=stack).result

    for job in json.loads((folder / "jobs.json").read_text()):
        state = load_file(folder / job["weights"])
        model = comfy.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})
        if model is None:
            raise SystemExit(f"ComfyUI does not recognise {job['weights']}")
        with torch.inference_mode():
            model, report = apply(model, job)
            comfy.model_management.load_models_gpu([model])
            network = model.model.diffusion_model
            out = {f"weight.{name}": tensor.float().contiguous().clone() for name, tensor in network.state_dict().items()}
            if job["inputs"]:
                inputs = load_file(folder / job["inputs"])
                options = {"y": inputs["pooled"], "guidance": inputs["guidance"]} if "pooled" in inputs else {}
                velocity = network(inputs["latent"], (inputs["sigma"] * 1000).float(), context=inputs["text"], **options)
                out["velocity"] = velocity.float().contiguous().clone()
        save_file(out, folder / job["output"], {"report": report})
        comfy.model_management.unload_all_models()


if __name__ == "__main__":
    main()
