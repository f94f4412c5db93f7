"""Runs inside a ComfyUI checkout, under its own Python: files of any layout as native models, by our loader or ComfyUI's.

`python load_worker.py CHECKOUT FOLDER` reads FOLDER/load_jobs.json, a list of {file, dtype, loader, output}; `loader` is "ours"
or "native". Each output holds what the model makes of one fixed noise, `weight.<name>` of a few parameters, and in its metadata
the class, shift, parameter dtypes, the peak of memory while loading (bytes above the start), or the error.
"""

from __future__ import annotations

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
    (folder / "load_jobs.json").write_text(json.dumps(jobs))
    command = [str(python), __file__, str(checkout), str(folder)]
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"ComfyUI in {checkout} failed:\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


class PeakMemory:
    """The most memory this process holds (resident, mapped files too) above its start, sampled every 2 ms."""

    def __enter__(self) -> PeakMemory:
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


def main() -> None:
    checkout, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.insert(0, str(checkout))
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention", "--base-directory", str(folder)]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management
    import comfy.sd
    import torch
    from safetensors.torch import save_file

    spec = importlib.util.spec_from_file_location("accvideo_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["accvideo_pack"] = pack
    spec.loader.exec_module(pack)
    from accvideo_pack.accvideo_core.errors import AccVideoError
    from accvideo_pack.nodes import loaders

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
        comfy.model_management.load_models_gpu([model])
        with torch.inference_mode():
            return model.model.apply_model(noise, torch.tensor([0.9]), **inputs).float()

    for job in json.loads((folder / "load_jobs.json").read_text()):
        dtype = getattr(torch, job["dtype"]) if job.get("dtype") else None
        path, told = folder / job["file"], {}
        tensors = {"none": torch.zeros(1)}
        try:
            with PeakMemory() as memory:
                if job.get("loader", "ours") == "ours":
                    model, told["family"] = loaders.load_student(path, dtype)
                else:
                    model = comfy.sd.load_diffusion_model(str(path), {} if dtype is None else {"dtype": dtype})
            parameters = dict(model.model.diffusion_model.named_parameters())
            kinds = Counter(str(getattr(p, "_qdata", p).dtype).removeprefix("torch.") for p in parameters.values())
            told |= {
                "peak": memory.peak - memory.start,
                "kind": type(model.model).__name__,
                "shift": model.get_model_object("model_sampling").shift,
                "dtypes": dict(kinds),
            }
            if not job.get("only_load"):
                tensors["denoised"] = denoised(model)
            del model, parameters
        except AccVideoError as error:
            told["error"] = f"{type(error).__name__}: {error}"
        save_file(tensors, folder / job["output"], {"told": json.dumps(told)})


if __name__ == "__main__":
    main()
