"""A real ComfyUI on the CPU, in a folder of its own, with the pack installed; and the tiny models it is given."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from accvideo_core.comfy_client import ComfyClient, ComfyError, Result

ROOT = Path(__file__).resolve().parents[2]
PACK = ("__init__.py", "pyproject.toml", "nodes", "accvideo_core", "web", "locales", "workflows")
PARTS = ("student", "teacher", "text_encoder", "vae")


def gguf_pack() -> Path | None:
    """A checkout of city96's ComfyUI-GGUF: COMFYUI_GGUF_PATH, or ComfyUI-GGUF beside the ComfyUI checkouts in ~/comfy."""
    path = Path(os.environ.get("COMFYUI_GGUF_PATH") or Path.home() / "comfy" / "ComfyUI-GGUF").expanduser()
    return path if (path / "nodes.py").is_file() else None


def no_comfyui() -> NoReturn:
    """Skip, or fail where ACCVIDEO_REQUIRE_COMFYUI=1 says that a ComfyUI must be there."""
    message = "no ComfyUI: set COMFYUI_PATH, or clone it to ~/comfy/ComfyUI"
    (pytest.fail if os.environ.get("ACCVIDEO_REQUIRE_COMFYUI") == "1" else pytest.skip)(message)


class Server:
    """One running ComfyUI. `base` is its base directory: models, input, output and custom nodes lie there."""

    def __init__(self, checkout: Path, python: Path, base: Path, weights: Path) -> None:
        self.checkout, self.base = checkout, base
        self.url = f"http://127.0.0.1:{_free_port()}"
        (base / "custom_nodes" / "accvideo").mkdir(parents=True)
        for name in PACK:
            if (ROOT / name).is_dir():
                shutil.copytree(
                    ROOT / name, base / "custom_nodes" / "accvideo" / name, ignore=shutil.ignore_patterns("__pycache__")
                )
            else:
                shutil.copy2(ROOT / name, base / "custom_nodes" / "accvideo" / name)
        shutil.copytree(ROOT / "tests" / "comfyui" / "pack", base / "custom_nodes" / "accvideo_test")
        if (other := gguf_pack()) is not None:
            ignored = shutil.ignore_patterns(".git", "__pycache__")
            shutil.copytree(other, base / "custom_nodes" / "ComfyUI-GGUF", ignore=ignored, dirs_exist_ok=True)
        for name in ("models/diffusion_models", "models/loras", "input", "output", "user"):
            (base / name).mkdir(parents=True, exist_ok=True)
        self.log = base / "console.log"
        self._python, self._weights = python, weights
        self.start()

    def start(self) -> None:
        """Start it, also again after `stop`; `wait_until_ready` follows."""
        base = self.base
        command = [str(self._python), "main.py", "--cpu", "--port", self.url.rsplit(":", 1)[1], "--base-directory", str(base)]
        command += ["--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}", "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--preview-method", "latent2rgb"]
        self.process = subprocess.Popen(
            command,
            cwd=self.checkout,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"ACCVIDEO_TINY_WEIGHTS": str(self._weights), "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def wait_until_ready(self, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI in {self.checkout} ended at its start:\n{self.console()[-4000:]}")
            try:
                urllib.request.urlopen(f"{self.url}/system_stats", timeout=5).close()
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError(f"ComfyUI in {self.checkout} did not answer in {seconds} s:\n{self.console()[-4000:]}")

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """As a power cut would: nothing is told, nothing is finished."""
        self.process.kill()
        self.process.wait()

    def console(self) -> str:
        return self.log.read_text(errors="replace")

    def run(self, prompt: dict[str, Any], **callbacks: Any) -> Result:
        """Run a prompt to its end (see ComfyClient.run)."""

        async def go() -> Result:
            async with ComfyClient(self.url) as comfy:
                return await comfy.run(prompt, **callbacks)

        return asyncio.run(go())

    def refusal(self, prompt: dict[str, Any]) -> str:
        """The sentence with which a prompt is refused or fails."""
        with pytest.raises(ComfyError) as caught:
            self.run(prompt)
        message = str(caught.value)
        assert "\n" not in message and "Traceback" not in message
        return message

    def ask(self, question: Callable[[ComfyClient], Any]) -> Any:
        """The answer to one request: `server.ask(lambda comfy: comfy.node_types())`."""

        async def go() -> Any:
            async with ComfyClient(self.url) as comfy:
                return await question(comfy)

        return asyncio.run(go())

    def path(self, file: Any) -> Path:
        """Where an output file of a run lies."""
        return self.base / file.folder / file.subfolder / file.filename

    def latents(self, prompt: dict[str, Any], *sources: list[Any], **callbacks: Any) -> list[torch.Tensor]:
        """Run the part of a prompt that the LATENT sockets `sources` ([node, slot]) need and return those latents."""
        prompt = {node: content for node, content in prompt.items() if content["class_type"] not in OUTPUTS}
        names = [f"save{i}" for i in range(len(sources))]
        for name, source in zip(names, sources, strict=True):
            prompt[name] = node("SaveLatent", samples=list(source), filename_prefix=f"latents/{name}")
        files = {file.node: file for file in self.run(prompt, **callbacks).files}
        return [load_file(self.path(files[name]))["latent_tensor"].clone() for name in names]


TINY_SIZE = {"width": 64, "height": 64, "length": 17}
# What has no small form in ComfyUI and is therefore taken from the tiny models, by their slot, ...
FROM_TINY = {"DualCLIPLoader": 1, "VAELoader": 2}
# ... or from random conditioning: the node it stands for, and what else is given up with it.
STAND_INS = {"CLIPVisionEncode": ("AccVideoTestImageFeatures", {}), "CLIPTextEncode": ("AccVideoTestText", {"width": 4096})}
ENCODERS = ("CLIPLoader", "CLIPVisionLoader")  # of Wan


def on_tiny_models(prompt: dict[str, Any], teacher_steps: int = 50) -> dict[str, Any]:
    """A prompt for the released models as it runs on the files of `model_files.install`, at their size.

    HunyuanVideo's text encoders and VAE become the tiny ones, which also take Wan's VAE's place; what Wan's text and image
    encoders would say becomes random numbers.
    """
    kinds = {name: content["class_type"] for name, content in prompt.items()}
    tiny = {"tiny": node("AccVideoTinyModels", which="teacher")}
    for name, content in prompt.items():
        kind, inputs = content["class_type"], {}
        if kind in (*FROM_TINY, *ENCODERS):
            continue
        links = {key: value for key, value in content["inputs"].items() if isinstance(value, list)}
        if kind in STAND_INS and any(kinds[link[0]] in ENCODERS for link in links.values()):
            kind, inputs = STAND_INS[kind]
        else:
            for key, value in content["inputs"].items():
                found = FROM_TINY.get(kinds.get(value[0], "")) if key in links else None
                inputs[key] = value if found is None else ["tiny", found]
            inputs |= TINY_SIZE if {"width", "height", "length"} <= set(inputs) else {}
            inputs |= {"steps": teacher_steps} if inputs.get("steps") == 50 else {}
        tiny[name] = node(kind, **inputs)
    return tiny


OUTPUTS = ("SaveVideo", "CreateVideo", "VAEDecode", "AccVideoCompare")


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def load_prompt(path: Path) -> dict[str, Any]:
    """A workflow in API format."""
    return json.loads(path.read_text(encoding="utf-8"))


def tiny_prompt(**sampler: Any) -> dict[str, Any]:
    """The shipped API workflow, with inputs of its AccVideoSampler (node 4) replaced; None removes one."""
    prompt = load_prompt(ROOT / "workflows" / "api" / "accvideo_tiny_t2v.json")
    for name, value in sampler.items():
        prompt["4"]["inputs"][name] = value
        if value is None:
            del prompt["4"]["inputs"][name]
    return prompt


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||."""
    assert value.shape == reference.shape
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
