"""The files that the workflows for released models name, each of its own layout but tiny: the tiny world's networks, random Wan
networks, LoRAs of both, and for encoders and VAEs, which have no small form in ComfyUI, the tensors they are recognised by."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from accvideo_core.lora import extract_lora
from accvideo_core.tiny import weights_path
from tests import lora_files
from tests.checkpoint_files import WAN_I2V, WAN_T2V, State, gguf, plain_fp8, random_state
from tests.comfyui import workflow_parts as names

STUBS = {
    ("text_encoders", names.CLIP_L["name"]): "text_model.encoder.layers.1.mlp.fc1.weight",
    ("text_encoders", names.LLAMA["name"]): "model.layers.0.self_attn.k_proj.weight",
    ("text_encoders", names.UMT5["name"]): "encoder.block.23.layer.1.DenseReluDense.wi_1.weight",
    ("vae", names.VAE["name"]): "decoder.conv_in.conv.weight",
    ("vae", names.WAN_VAE["name"]): "decoder.middle.0.residual.0.gamma",
    ("clip_vision", names.CLIP_VISION["name"]): "vision_model.encoder.layers.30.layer_norm1.weight",
}
PROMPTS = ("a blue square moving down on a grey background", "a red circle moving right on a black background")


def install(base: Path, weights: Path, fp8: bool = True) -> None:
    """Put them, a prompt file and a picture into the folders of a ComfyUI whose base directory this is.

    weights  folder of the tiny models
    fp8      round what is named fp8 as its layout does; else keep the tiny student as it is, for pictures
    """
    models = base / "models"
    for folder in ("diffusion_models", "loras", "text_encoders", "vae", "clip_vision"):
        (models / folder).mkdir(parents=True, exist_ok=True)
    for (folder, name), tensor in STUBS.items():
        save_file({tensor: torch.zeros(4, 4)}, models / folder / name)
    paths = {part: weights_path(part, weights) for part in ("student", "teacher")}
    student, teacher = (load_file(path) for path in paths.values())
    networks = models / "diffusion_models"
    save_file(teacher, networks / names.TEACHER["name"])
    _rounded(student, networks / names.STUDENT["name"], fp8)
    _rounded(random_state(WAN_T2V), networks / names.WAN_T2V["name"])
    _rounded(random_state(WAN_I2V), networks / names.WAN_I2V["name"])
    with TemporaryDirectory(dir=networks) as folder:
        gguf("Q8_0")(Path(folder), student).path.replace(networks / names.GGUF)
    loras = models / "loras"
    extract_lora(paths["student"], paths["teacher"], loras / names.LORA["name"], 64, overwrite=True)
    for style, kind in zip(names.STYLES, ("musubi / kohya", "diffusion-pipe"), strict=True):
        _faint_lora(kind, teacher, loras / style)
    _faint_lora("ComfyUI / KJ extraction", random_state(WAN_I2V), loras / names.WAN_I2V_LORA["name"])
    (base / "input" / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    Image.new("RGB", (96, 64), (192, 32, 64)).save(base / "input" / "example.png")


def _rounded(state: State, path: Path, fp8: bool = True) -> None:
    with TemporaryDirectory(dir=path.parent) as folder:
        if fp8:
            plain_fp8(Path(folder), state).path.replace(path)
        else:
            save_file(state, path)


def _faint_lora(kind: str, state: State, path: Path) -> None:
    """A LoRA that changes the network by 2 %, so that pictures stay pictures."""
    lora = lora_files.write(kind, state)
    for key, tensor in lora.tensors.items():
        if key.endswith(("lora_up.weight", "lora_B.weight", ".diff", ".diff_b", ".diff_m")):
            lora.tensors[key] = 0.1 * tensor
    lora.save(path)
