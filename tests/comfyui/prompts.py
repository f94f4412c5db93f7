"""Prompts that more than one test builds on: a stack of LoRAs applied, merged and extracted, and a captured trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from accvideo_core.tiny import weights_path
from tests.comfyui.server import Server, node, tiny_prompt
from tests.lora_files import BLOCKS, write

TEACHER, STUDENT = "AccVideo tiny teacher", "AccVideo tiny student"
PROMPT = "a red circle moving right on a black background"
CAPTURE_STEPS = 5


def put_lora(server: Server, weights: Path, format: str = "OneTrainer", name: str = "style", **extra: torch.Tensor) -> str:
    """A LoRA for the bundled student in ComfyUI's loras folder; `extra` are further keys."""
    file = write(format, {n: t.float() for n, t in load_file(weights_path("student", weights)).items()}, trained=BLOCKS)
    file.tensors |= extra
    file.save(server.base / "models" / "loras" / f"{name}.safetensors")
    return f"{name}.safetensors"


def stacked(lora: Any, strength: float = 1.0, blocks: str = "all", **inputs: Any) -> dict[str, Any]:
    return node("AccVideoLoraStack", lora=lora, strength=strength, blocks=blocks, **inputs)


def applying(*stack: dict[str, Any], **apply: Any) -> dict[str, Any]:
    """The shipped prompt, on the student, with a chain of stack nodes s0, s1, ... applied by node `apply`."""
    chain = {f"s{i}": entry for i, entry in enumerate(stack)}
    for i in range(1, len(stack)):
        chain[f"s{i}"]["inputs"]["stack"] = [f"s{i - 1}", 0]
    last = f"s{len(stack) - 1}"
    return (
        tiny_prompt(model=["apply", 0]) | chain | {"apply": node("AccVideoLoraApply", model=["1", 0], stack=[last, 0], **apply)}
    )


def merging(stack: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    given = {"checkpoint": STUDENT, "dtype": "keep", "name": "test/merged", "overwrite": True}
    return {"s0": stack, "merge": node("AccVideoLoraMerge", **given | inputs, stack=["s0", 0])}


def extracting(**inputs: Any) -> dict[str, Any]:
    given = {"tuned": STUDENT, "base": TEACHER, "rank": 128, "energy": 0.0, "key_format": "comfyui", "dtype": "fp32"}
    return {"extract": node("AccVideoLoraExtract", **given | {"name": "test/extracted", "overwrite": True} | inputs)}


def capturing(name: str, sampler: dict[str, Any] | None = None, **writer: Any) -> dict[str, Any]:
    """A prompt that captures PROMPT with the tiny teacher into a dataset; inputs of sampler and writer replaced or added."""
    settings = dict(model=["models", 0], positive=["text", 0], latent=["size", 0], seed=3, family="tiny", steps=CAPTURE_STEPS)
    return {
        "models": node("AccVideoTinyModels", which="teacher"),
        "text": node("CLIPTextEncode", clip=["models", 1], text=PROMPT),
        "size": node("EmptyHunyuanLatentVideo", width=64, height=64, length=17, batch_size=1),
        "sampler": node("AccVideoTrajectorySampler", **settings | (sampler or {})),
        "writer": node("AccVideoSynVidWriter", **dict(trajectory=["sampler", 1], prompt=PROMPT, dataset=name) | writer),
    }
