"""Models that city96's ComfyUI-GGUF loads, with our sampler and our LoRAs; skipped by name where no checkout of it is found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accvideo_core.lora import extract_lora
from accvideo_core.tiny import weights_path
from tests.checkpoint_files import gguf
from tests.comfyui.server import Server, gguf_pack, node, relative_error, tiny_prompt


@pytest.fixture(scope="module")
def models(server: Server, weights: Path) -> Server:
    """With both tiny networks as GGUF files and the LoRA between them."""
    if gguf_pack() is None:
        pytest.skip("no ComfyUI-GGUF: set COMFYUI_GGUF_PATH, or clone city96/ComfyUI-GGUF to ~/comfy/ComfyUI-GGUF")
    folder = server.base / "models" / "diffusion_models"
    for part in ("student", "teacher"):
        (folder / "gguf").mkdir(exist_ok=True)
        gguf("Q8_0")(folder / "gguf", load_file(weights_path(part, weights))).path.replace(folder / f"tiny_{part}.gguf")
    base, lora = weights_path("teacher", weights), server.base / "models" / "loras" / "tiny_steps.safetensors"
    extract_lora(weights_path("student", weights), base, lora, 64, overwrite=True)
    return server


def sampled(server: Server, loader: dict, lora: bool = False) -> torch.Tensor:
    prompt = tiny_prompt(model=["lora" if lora else "loader", 0]) | {"loader": loader}
    if lora:
        prompt["stack"] = node("AccVideoLoraStack", lora="tiny_steps.safetensors", strength=1.0, blocks="all")
        prompt["lora"] = node("AccVideoLoraApply", model=["loader", 0], stack=["stack", 0])
    (latent,) = server.latents(prompt, ["4", 0])
    return latent


def test_a_gguf_student_samples_as_the_student_it_was_made_from(models: Server) -> None:
    student = sampled(models, node("AccVideoTinyModels", which="student"))
    quantised = sampled(models, node("UnetLoaderGGUF", unet_name="tiny_student.gguf"))
    teacher = sampled(models, node("UnetLoaderGGUF", unet_name="tiny_teacher.gguf"))
    assert 0 < relative_error(quantised, student) < 0.25 * relative_error(teacher, student)


def test_a_lora_makes_a_gguf_teacher_the_student(models: Server) -> None:
    whole = sampled(models, node("AccVideoTinyModels", which="teacher"), lora=True)
    quantised = sampled(models, node("UnetLoaderGGUF", unet_name="tiny_teacher.gguf"), lora=True)
    plain = sampled(models, node("UnetLoaderGGUF", unet_name="tiny_teacher.gguf"))
    assert relative_error(quantised, whole) < 0.25 * relative_error(plain, whole)


def test_trajectories_of_a_gguf_teacher_are_captured_under_a_fingerprint_of_their_own(models: Server) -> None:
    said = []
    for loader in (node("UnetLoaderGGUF", unet_name="tiny_teacher.gguf"), node("AccVideoTinyModels", which="teacher")):
        inputs = tiny_prompt()["4"]["inputs"] | {"model": ["loader", 0], "steps": 5, "keys": 5, "negative_prompt": ""}
        prompt = {name: tiny_prompt()[name] for name in ("1", "2", "3")} | {"loader": loader}
        prompt["4"] = node("AccVideoTrajectorySampler", **{key: it for key, it in inputs.items() if key != "denoise"})
        stored = {"trajectory": ["4", 1], "prompt": "a red circle", "dataset": f"gguf_{len(said)}"}
        prompt["5"] = node("AccVideoSynVidWriter", **stored)
        prompt["6"] = node("AccVideoSynVidInspect", dataset=["5", 0])
        (report,) = models.run(prompt).texts["6"]
        said.append(report.split("teacher ")[1].split()[0])
    assert len(set(said)) == 2
