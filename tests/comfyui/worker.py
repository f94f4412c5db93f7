"""Runs inside a ComfyUI checkout, under its own Python: weight files as native models, LoRAs on them, by our nodes or ComfyUI's.

`python worker.py CHECKOUT FOLDER` does FOLDER/jobs.json, a list of

    file, dtype, loader       the weights, the dtype they are kept in (None: ComfyUI chooses), "ours" (the default) or "native"
    loras, applied_by         [{file, strength, blocks}] and "ours" or "native"; none by default
    gives                     of "denoised" (what the model makes of one fixed noise; the default) and "weights" (as patched)
    without                   a package that is not there
    output                    where the tensors go: `denoised`, `weight.<native name>`

and in the output's metadata: class, family, shift, parameter dtypes, the report of our LoRA nodes, the peak of memory while
loading (bytes above the start), or the error.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_jobs(checkout: Path, python: Path, folder: Path, jobs: list[dict[str, Any]]) -> str:
    """Do `jobs` in one process of a checkout's own Python, and return what it said. Called from outside of ComfyUI."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [str(python), __file__, str(checkout), str(folder)]
    # With a fixed threshold every large tensor goes back to the system when it is freed: no peak hides another.
    variables = {"PYTHONDONTWRITEBYTECODE": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=os.environ | variables)
    if done.returncode:
        raise RuntimeError(f"ComfyUI in {checkout} failed:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def told_of(output: Path) -> dict[str, Any]:
    """What a job said of itself. Called from outside of ComfyUI."""
    from safetensors import safe_open

    with safe_open(output, "pt") as file:
        return json.loads(file.metadata()["told"])


class PeakMemory:
    """The most memory this process holds (resident, mapped files too) above its start, sampled every 2 ms."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def enter(*flags: str) -> Path:
    """Make this process one of the checkout's, `python SCRIPT CHECKOUT FOLDER`, on the CPU and with those flags; gives FOLDER."""
    checkout, folder = sys.argv[1:3]
    sys.path.insert(0, checkout)
    sys.argv = [sys.argv[0], "--cpu", *flags, "--base-directory", folder]
    import comfy.options

    comfy.options.enable_args_parsing()
    return Path(folder)


def pack() -> Any:
    """This repository, imported as ComfyUI imports a custom node."""
    spec = importlib.util.spec_from_file_location("accvideo_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["accvideo_pack"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    folder = enter("--use-pytorch-cross-attention")
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import folder_paths
    import torch
    from safetensors.torch import save_file

    folder_paths.add_model_folder_path("loras", str(folder))
    nodes = pack().NODE_CLASS_MAPPINGS
    from accvideo_pack.accvideo_core.errors import AccVideoError
    from accvideo_pack.nodes import loaders

    def load(job: dict[str, Any], told: dict[str, Any]) -> Any:
        path, dtype = folder / job["file"], getattr(torch, job["dtype"]) if job.get("dtype") else None
        with PeakMemory() as memory:
            if job.get("loader", "ours") == "ours":
                model, told["family"] = loaders.load_student(path, dtype)
            else:
                model = comfy.sd.load_diffusion_model(str(path), {} if dtype is None else {"dtype": dtype})
        parameters = model.model.diffusion_model.parameters()
        told["dtypes"] = Counter(str(getattr(p, "_qdata", p).dtype).removeprefix("torch.") for p in parameters)
        told |= {"peak": memory.peak - memory.start, "kind": type(model.model).__name__}
        told["shift"] = model.get_model_object("model_sampling").shift
        return model

    def apply(model: Any, job: dict[str, Any], told: dict[str, Any]) -> Any:
        if job.get("applied_by") == "native":
            for lora in job["loras"]:
                tensors = comfy.utils.load_torch_file(str(folder / lora["file"]), safe_load=True)
                model, _ = comfy.sd.load_lora_for_models(model, None, tensors, lora["strength"], 0)
            return model
        stack = None
        for lora in job["loras"]:
            inputs = {"lora": lora["file"], "strength": lora["strength"], "blocks": lora.get("blocks", "all")}
            (stack,) = nodes["AccVideoLoraStack"].execute(**inputs, stack=stack).result
        model, told["report"] = nodes["AccVideoLoraApply"].execute(model=model, stack=stack).result
        return model

    def denoised(model: Any) -> torch.Tensor:
        network, generator = model.model.diffusion_model, torch.Generator().manual_seed(0)
        wan = hasattr(network, "text_embedding")
        channels = network.patch_embedding.in_channels if wan else 16
        width = (network.text_embedding[0] if wan else network.txt_in.input_embedder).in_features
        inputs = {"c_crossattn": torch.randn(1, 7, width, generator=generator)}
        if not wan:
            inputs |= {"y": torch.randn(1, 768, generator=generator), "guidance": torch.tensor([6.0])}
        if channels > 16:
            inputs["c_concat"] = torch.randn(1, channels - 16, 2, 8, 8, generator=generator)
            inputs["clip_fea"] = torch.randn(1, 5, 1280, generator=generator)
        noise = torch.randn(1, 16, 2, 8, 8, generator=generator)
        return model.model.apply_model(noise, torch.tensor([0.9]), **inputs).float()

    for job in json.loads((folder / "jobs.json").read_text()):
        gives, told, tensors = job.get("gives", ["denoised"]), {}, {"none": torch.zeros(1)}
        missing = {job["without"]: None} if "without" in job else {}
        kept = {name: sys.modules[name] for name in missing if name in sys.modules}
        sys.modules.update(missing)
        try:
            with torch.inference_mode():
                model = load(job, told)
                model = apply(model, job, told) if job.get("loras") else model
                if gives:
                    comfy.model_management.load_models_gpu([model])
                if "weights" in gives:
                    network = model.model.diffusion_model.state_dict()
                    tensors |= {f"weight.{name}": t.float().contiguous().clone() for name, t in network.items()}
                if "denoised" in gives:
                    tensors["denoised"] = denoised(model)
            del model
        except AccVideoError as error:
            told["error"] = f"{type(error).__name__}: {error}"
        for name in missing:
            del sys.modules[name]
        sys.modules.update(kept)
        save_file(tensors, folder / job["output"], {"told": json.dumps(told)})
        comfy.model_management.unload_all_models()


if __name__ == "__main__":
    main()
