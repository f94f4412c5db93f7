"""The loaders in a real ComfyUI: what comes out is native, so native nodes load, patch, decode and encode with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from accvideo_core.tiny import load_tiny, weights_path
from accvideo_core.tiny.clips import keyed_generator, render, sample_scenes
from tests.checkpoint_files import WAN_I2V, WAN_T2V, random_state
from tests.comfyui.server import Server, node, relative_error, tiny_prompt


def export(server: Server, weights: Path, name: str, part: str = "student") -> str:
    """Put a tiny network into ComfyUI's diffusion_models folder and return its name there."""
    shutil.copy2(weights_path(part, weights), server.base / "models" / "diffusion_models" / name)
    return name


def with_loader(loader: dict, **sampler: object) -> dict:
    return tiny_prompt(model=["loader", 0], **sampler) | {"loader": loader}


def lora(weights: Path, rank: int = 4, alpha: float = 2.0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(a LoRA under ComfyUI's native names, the student with it merged at strength 0.5), on three kinds of module."""
    generator = torch.Generator().manual_seed(1)
    student = load_file(weights_path("student", weights))
    factors = {}
    for original, native in (
        ("double_blocks.0.img_attn_qkv", "double_blocks.0.img_attn.qkv"),
        ("double_blocks.1.txt_mlp.fc1", "double_blocks.1.txt_mlp.0"),
        ("single_blocks.2.linear1", "single_blocks.2.linear1"),
    ):
        weight = student[f"{original}.weight"]
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.3
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
        factors[f"diffusion_model.{native}.lora_up.weight"] = up
        factors[f"diffusion_model.{native}.lora_down.weight"] = down
        factors[f"diffusion_model.{native}.alpha"] = torch.tensor(alpha)
        student[f"{original}.weight"] = weight + 0.5 * (alpha / rank) * up @ down
    return factors, student


@pytest.mark.parametrize("loader", ["UNETLoader", "AccVideoStudentLoader"])
def test_an_exported_student_is_the_bundled_one(server: Server, weights: Path, loader: str) -> None:
    name = export(server, weights, "tiny_student.safetensors")
    inputs = (
        {"unet_name": name, "weight_dtype": "default"} if loader == "UNETLoader" else {"file": name, "weight_dtype": "default"}
    )
    (loaded,) = server.latents(with_loader(node(loader, **inputs)), ["4", 0])
    (bundled,) = server.latents(tiny_prompt(), ["4", 0])
    assert torch.equal(loaded, bundled)


def test_the_teacher_is_another_model(server: Server, weights: Path) -> None:
    prompt = tiny_prompt()
    (student,) = server.latents(prompt, ["4", 0])
    prompt["1"]["inputs"]["which"] = "teacher"
    (teacher,) = server.latents(prompt, ["4", 0])
    assert relative_error(teacher, student) > 0.01


@pytest.mark.parametrize(("dtype", "near"), [("bf16", 0.1), ("fp8_e4m3fn", 0.8)])
def test_weight_dtypes_round_the_weights(server: Server, weights: Path, dtype: str, near: float) -> None:
    name = export_precise(server, weights)
    (rounded,) = server.latents(with_loader(node("AccVideoStudentLoader", file=name, weight_dtype=dtype)), ["4", 0])
    (native,) = server.latents(
        with_loader(node("UNETLoader", unet_name=name, weight_dtype="fp8_e4m3fn"))
        if dtype == "fp8_e4m3fn"
        else with_loader(node("AccVideoStudentLoader", file=export_bf16(server, weights), weight_dtype="default")),
        ["4", 0],
    )
    (exact,) = server.latents(with_loader(node("AccVideoStudentLoader", file=name, weight_dtype="default")), ["4", 0])
    assert 1e-4 < relative_error(rounded, exact) < near
    assert relative_error(rounded, native) < 1e-5


def precise(weights: Path) -> dict[str, torch.Tensor]:
    """The student in float32 with weights that bf16 cannot hold (the bundled ones are bf16): each a little larger."""
    return {name: tensor.float() * 1.003 for name, tensor in load_file(weights_path("student", weights)).items()}


def export_precise(server: Server, weights: Path) -> str:
    save_file(precise(weights), server.base / "models" / "diffusion_models" / "tiny_precise.safetensors")
    return "tiny_precise.safetensors"


def export_bf16(server: Server, weights: Path) -> str:
    """The precise student rounded to bf16 but stored in float32: what a bf16 MODEL computes with."""
    state = {name: tensor.bfloat16().float() for name, tensor in precise(weights).items()}
    save_file(state, server.base / "models" / "diffusion_models" / "tiny_rounded.safetensors")
    return "tiny_rounded.safetensors"


def test_a_file_written_again_is_loaded_again(server: Server, weights: Path) -> None:
    prompt = with_loader(
        node("AccVideoStudentLoader", file=export(server, weights, "tiny_changing.safetensors"), weight_dtype="default")
    )
    (student,) = server.latents(prompt, ["4", 0])
    export(server, weights, "tiny_changing.safetensors", "teacher")
    (teacher,) = server.latents(prompt, ["4", 0])
    assert relative_error(teacher, student) > 0.01


def test_a_native_lora_node_patches_the_model(server: Server, weights: Path) -> None:
    factors, merged = lora(weights)
    save_file(factors, server.base / "models" / "loras" / "tiny_lora.safetensors")
    save_file(merged, server.base / "models" / "diffusion_models" / "tiny_merged.safetensors")
    prompt = tiny_prompt(model=["lora", 0])
    prompt["lora"] = node("LoraLoaderModelOnly", model=["1", 0], lora_name="tiny_lora.safetensors", strength_model=0.5)
    (patched,) = server.latents(prompt, ["4", 0])
    (expected,) = server.latents(
        with_loader(node("AccVideoStudentLoader", file="tiny_merged.safetensors", weight_dtype="default")), ["4", 0]
    )
    (plain,) = server.latents(tiny_prompt(), ["4", 0])
    assert relative_error(patched, expected) < 1e-5
    assert relative_error(patched, plain) > 1e-3


def wan_prompt(file: str, family: str, positive: list, latent: list) -> dict:
    """The loader's Wan by AccVideoSampler with nothing but its family (4), and by ComfyUI's own nodes, ten steps of UniPC along
    the schedule that the loaded model has (native)."""
    return tiny_prompt(
        model=["loader", 0], positive=positive, latent=latent, family=family, steps=None, shift=None, guidance=None, cfg=None
    ) | {
        "loader": node("AccVideoStudentLoader", file=file, weight_dtype="default"),
        "text": node("AccVideoTestText", width=4096),
        "noise": node("RandomNoise", noise_seed=1),
        "guider": node("BasicGuider", model=["loader", 0], conditioning=positive),
        "unipc": node("KSamplerSelect", sampler_name="uni_pc_bh2"),
        "sigmas": node("BasicScheduler", model=["loader", 0], scheduler="simple", steps=10, denoise=1.0),
        "native": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["unipc", 0],
            sigmas=["sigmas", 0],
            latent_image=latent,
        ),
    }


def test_a_wan_student_is_sampled_natively_with_its_familys_default(server: Server) -> None:
    folder = server.base / "models" / "diffusion_models"
    torch.save({"module": random_state(WAN_T2V)}, folder / "wan_t2v.pt")
    prompt = wan_prompt("wan_t2v.pt", "wan-t2v-14b", ["text", 0], ["3", 0])
    ours, native = server.latents(prompt, ["4", 0], ["native", 0])
    # ComfyUI reads the sigmas from a table of 1000 levels: equal to rounding, which ten steps of a multistep solver carry on.
    assert relative_error(ours, native) < 1e-4
    prompt["4"]["inputs"]["shift"] = 3.0
    (other,) = server.latents(prompt, ["4", 0])
    assert relative_error(other, native) > 1e-2, "the comparison sees the shift"


def test_a_wan_image_to_video_student_starts_from_its_image(server: Server) -> None:
    """Through ComfyUI's own WanImageToVideo: the image's latent and mask beside the noise, its features beside the text."""
    save_file(random_state(WAN_I2V), server.base / "models" / "diffusion_models" / "wan_i2v.safetensors")
    prompt = wan_prompt("wan_i2v.safetensors", "wan-i2v-14b-480p", ["i2v", 0], ["i2v", 2])
    prompt["image"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0xC02040)
    prompt["features"] = node("AccVideoTestImageFeatures")
    prompt["i2v"] = node(
        "WanImageToVideo",
        positive=["text", 0],
        negative=["text", 0],
        vae=["1", 2],
        width=64,
        height=64,
        length=9,
        batch_size=1,
        start_image=["image", 0],
        clip_vision_output=["features", 0],
    )
    ours, native = server.latents(prompt, ["4", 0], ["native", 0])
    assert ours.shape == (1, 16, 3, 8, 8) and relative_error(ours, native) < 1e-4
    prompt["image"]["inputs"]["color"] = 0x20C040
    (other,) = server.latents(prompt, ["4", 0])
    assert relative_error(other, ours) > 1e-3, "the image matters"


def pictures(server: Server, prompt: dict, decoder: dict) -> np.ndarray:
    """(T, H, W, 3) uint8 frames a decoder node makes, saved as PNG."""
    files = server.run(
        prompt | {"decode": decoder, "png": node("SaveImage", images=["decode", 0], filename_prefix="png/frame")}
    ).files
    return np.stack([np.asarray(Image.open(server.path(file)).convert("RGB")) for file in files if file.node == "png"])


def library_frames(weights: Path, latent: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        frames = load_tiny(folder=weights)[2].decode(latent)
    return ((frames[0].movedim(0, -1) + 1) / 2 * 255).numpy()


def test_vae_decode_is_the_librarys(server: Server, weights: Path) -> None:
    (latent,) = server.latents(tiny_prompt(), ["4", 0])
    shown = pictures(server, tiny_prompt(), node("VAEDecode", samples=["4", 0], vae=["1", 2]))
    assert shown.shape == (17, 64, 64, 3)
    assert np.abs(shown - library_frames(weights, latent)).max() <= 1.01  # SaveImage cuts to whole numbers


@pytest.mark.parametrize("temporal", [64, 16])
def test_tiled_decoding_is_decoding_with_blended_seams(server: Server, temporal: int) -> None:
    prompt = tiny_prompt()
    prompt["3"]["inputs"] |= {"width": 128, "height": 128, "length": 33}
    tiled = node(
        "VAEDecodeTiled", samples=["4", 0], vae=["1", 2], tile_size=64, overlap=32, temporal_size=temporal, temporal_overlap=8
    )
    seams = pictures(server, prompt, tiled).astype(float)
    whole = pictures(server, prompt, node("VAEDecode", samples=["4", 0], vae=["1", 2])).astype(float)
    assert seams.shape == whole.shape == (33, 128, 128, 3)
    assert np.abs(seams - whole).mean() < 0.25 * np.abs(whole - whole.mean()).mean()
    # The corner of the first tile is far from every seam; there the two agree.
    assert np.abs(seams[:1, :8, :8] - whole[:1, :8, :8]).max() <= 2


def test_vae_encode_is_the_librarys(server: Server, weights: Path) -> None:
    prompt = tiny_prompt()
    prompt["images"] = node("VAEDecode", samples=["4", 0], vae=["1", 2])
    prompt["again"] = node("VAEEncode", pixels=["images", 0], vae=["1", 2])
    prompt["save"] = node("SaveLatent", samples=["again", 0], filename_prefix="latents/again")
    files = {file.node: file for file in server.run(prompt).files}
    again = load_file(server.path(files["save"]))["latent_tensor"]
    (latent,) = server.latents(tiny_prompt(), ["4", 0])
    vae = load_tiny(folder=weights)[2]
    with torch.inference_mode():
        assert relative_error(again, vae.encode(vae.decode(latent))) < 1e-4


def test_one_frame_encodes_alone(server: Server, weights: Path) -> None:
    Image.fromarray((np.random.default_rng(0).random((64, 64, 3)) * 255).astype(np.uint8)).save(server.base / "input" / "one.png")
    prompt = {
        "1": tiny_prompt()["1"],
        "image": node("LoadImage", image="one.png"),
        "again": node("VAEEncode", pixels=["image", 0], vae=["1", 2]),
        "save": node("SaveLatent", samples=["again", 0], filename_prefix="latents/one"),
    }
    (file,) = (file for file in server.run(prompt).files if file.node == "save")
    pixels = torch.from_numpy(np.asarray(Image.open(server.base / "input" / "one.png")) / 255).float()
    with torch.inference_mode():
        expected = load_tiny(folder=weights)[2].encode(pixels.permute(2, 0, 1)[None, :, None] * 2 - 1)
    assert relative_error(load_file(server.path(file))["latent_tensor"], expected) < 1e-4


def test_previews_show_the_worlds_colours(server: Server) -> None:
    """Latents of this VAE under HunyuanVideo's own preview colours would be a blur of wrong hues."""
    clips = render(sample_scenes(4, keyed_generator("preview test")))[:, 0]
    shown = []
    for i, clip in enumerate(clips):
        Image.fromarray((clip.numpy() * 255).round().astype(np.uint8)).save(server.base / "input" / f"clip{i}.png")
        prompt = {
            "1": tiny_prompt()["1"],
            "image": node("LoadImage", image=f"clip{i}.png"),
            "latent": node("VAEEncode", pixels=["image", 0], vae=["1", 2]),
        }
        shown.append(pictures(server, prompt, node("AccVideoTestPreview", model=["1", 0], latent=["latent", 0]))[0])
    expected = clips.reshape(4, 8, 8, 8, 8, 3).mean((2, 4)).numpy()
    error = ((np.stack(shown) / 255 - expected) ** 2).mean()
    assert error < 0.4 * expected.var(axis=(0, 1, 2)).mean()


def test_unknown_words_are_named_in_the_console(server: Server) -> None:
    prompt = tiny_prompt(seed=41)
    for text in ("a red zeppelin", "a (red:1.4) ball"):
        prompt["2"]["inputs"]["text"] = text
        server.run(prompt)
    assert "does not know 'zeppelin' in 'a red zeppelin'" in server.console()
    assert "weights in 'a (red:1.4) ball' are ignored" in server.console()
