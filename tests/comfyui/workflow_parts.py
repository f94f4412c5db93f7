"""What the descriptions of workflows share: model files and their links, the texts of notes, and groups of nodes.

Links to model files are given only where the file's name and place were confirmed: by ComfyUI's own templates, by the authors'
README, or by several public scripts that fetch it from there.
"""

from __future__ import annotations

from docs import memory
from tests.comfyui.workflow_files import Graph, Link, Node

HUB = "https://huggingface.co/"
KIJAI, COMFY_ORG = "Kijai/HunyuanVideo_comfy/resolve/main", "Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
KIJAI_WAN, COMFY_ORG_WAN = "Kijai/WanVideo_comfy/resolve/main", "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"


def model_file(directory: str, place: str, name: str) -> dict[str, str]:
    """As the front end reads a node's `models`: what it offers to download, and into which folder of models."""
    return {"name": name, "url": f"{HUB}{place}/{name}", "directory": directory}


STUDENT = model_file("diffusion_models", KIJAI, "accvideo-t2v-5-steps_fp8_e4m3fn.safetensors")
TEACHER = model_file("diffusion_models", f"{COMFY_ORG}/diffusion_models", "hunyuan_video_t2v_720p_bf16.safetensors")
LORA = model_file("loras", KIJAI, "hunyuan_video_accvid_5_steps_lora_rank16_fp8_e4m3fn.safetensors")
CLIP_L = model_file("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main", "clip_l.safetensors")
LLAMA = model_file("text_encoders", f"{COMFY_ORG}/text_encoders", "llava_llama3_fp8_scaled.safetensors")
VAE = model_file("vae", f"{COMFY_ORG}/vae", "hunyuan_video_vae_bf16.safetensors")
WAN_T2V = model_file("diffusion_models", KIJAI_WAN, "Wan2_1-AccVideo-T2V-14B_fp8_e4m3fn.safetensors")
WAN_I2V = model_file("diffusion_models", f"{COMFY_ORG_WAN}/diffusion_models", "wan2.1_i2v_480p_14B_fp8_e4m3fn.safetensors")
WAN_I2V_LORA = model_file("loras", KIJAI_WAN, "Wan21_AccVid_I2V_480P_14B_lora_rank32_fp16.safetensors")
UMT5 = model_file("text_encoders", f"{COMFY_ORG_WAN}/text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
WAN_VAE = model_file("vae", f"{COMFY_ORG_WAN}/vae", "wan_2.1_vae.safetensors")
CLIP_VISION = model_file("clip_vision", f"{COMFY_ORG_WAN}/clip_vision", "clip_vision_h.safetensors")
GGUF = "hunyuan_video_accvid_t2v-5-steps_Q4_K_S.gguf"  # the front end neither lists nor fetches .gguf, so it is no model link
STYLES = ("my_style_1.safetensors", "my_style_2.safetensors")
TINY_LORA = {"tuned": "AccVideo tiny student", "base": "AccVideo tiny teacher", "rank": 64, "name": "accvideo/tiny_student"}
SCENE = (
    "A red fox trots through fresh snow between birch trees at sunrise, its breath visible in the cold air, "
    "while the camera follows it slowly from the side."
)
PORTRAIT = "The subject turns slowly towards the camera and smiles while a light wind moves through the scene."


def memory_text(config: object, kept: str, video: tuple[int, int, int], tile: tuple[int, int] | None, family: str) -> str:
    """A sentence or two of the note; docs/memory.py computes the figures."""
    weights, free = memory.weight_bytes(config, kept) / 1e9, memory.sampling_bytes(config, video) / 1e9
    whole = next((card for card in (8, 12, 16, 24, 32, 48, 80) if (weights + free) * 1e9 <= card * memory.GIB), 80)
    ram = weights + memory.ENCODERS[family] / 1e9
    text = (
        f"**Memory (computed, not measured):** weights {weights:.1f} GB ({kept}); ComfyUI keeps {free:.1f} GB free to sample "
        f"{' x '.join(map(str, video))}. A card of {whole} GB holds both; a smaller one fetches the rest of the weights from RAM "
        f"at every step. RAM for weights and text encoders: {ram:.0f} GB."
    )
    if tile:
        text += (
            f" A tile of {tile[0]} pixels and {tile[1]} frames takes {memory.DECODING[tile]} GB to decode: smaller tiles, less."
        )
    return f"{text} Settings for your card: docs/workflows.md."


def files_text(*files: dict[str, str], extra: str = "") -> str:
    """Where files go. ComfyUI offers to download those with a link."""
    lines = [f"- `models/{file['directory']}/` [{file['name']}]({file['url']})" for file in files]
    return "\n".join(["**Files:**", *lines, *([extra] if extra else [])])


def add_note(g: Graph, title: str, *parts: str) -> None:
    g.note("Read me", "\n\n".join([f"## {title}", *parts]))


def groups_text(*lines: str) -> str:
    return "\n".join(["**Groups:**", *(f"- *{line.partition(': ')[0]}*: {line.partition(': ')[2]}" for line in lines)])


FIRST = "Models: loads the weights, the text encoders and the VAE."
WORDS = "Prompt and size: what to show; multiples of 16 pixels, 4n + 1 frames."
LAST = "Decode and save: the latent to frames, tile by tile, and to an MP4 that carries this workflow."


def hunyuan(g: Graph, **loader: str) -> tuple[Node, Node, Node]:
    """(model, text encoders, VAE) of HunyuanVideo."""
    file = loader.pop("file", STUDENT["name"])
    link = [it for it in (STUDENT, TEACHER) if it["name"] == file]
    title = "The student" if file == STUDENT["name"] else "The teacher"
    model = g.node("AccVideoStudentLoader", title, link, file=file, **loader)
    return model, *encoders(g)


def encoders(g: Graph) -> tuple[Node, Node]:
    names = {"clip_name1": CLIP_L["name"], "clip_name2": LLAMA["name"]}
    clip = g.node("DualCLIPLoader", "Its text encoders", [CLIP_L, LLAMA], **names)
    return clip, g.node("VAELoader", "Its VAE", [VAE], vae_name=VAE["name"])


def words(g: Graph, clip: Link, text: str = SCENE, size: tuple[int, int, int] = (960, 544, 93)) -> tuple[Node, Node]:
    """(prompt, empty latent)."""
    prompt = g.node("CLIPTextEncode", "Prompt", clip=clip, text=text)
    return prompt, g.node("EmptyHunyuanLatentVideo", "Size and length", width=size[0], height=size[1], length=size[2])


def sampler(g: Graph, model: Link, prompt: Link, latent: Link, title: str = "AccVideo Sampler", **values: object) -> Node:
    return g.node("AccVideoSampler", title, model=model, positive=prompt, latent=latent, **{"seed": 1} | values)


def save(g: Graph, samples: Link, vae: Link, name: str, fps: float = 24.0, tiled: bool = True) -> None:
    decoded = g.node("VAEDecodeTiled" if tiled else "VAEDecode", "Decode", samples=samples, vae=vae)
    video = g.node("CreateVideo", "Create Video", images=decoded.of("IMAGE"), fps=fps)
    g.node("SaveVideo", "Save Video", video=video.of("VIDEO"), filename_prefix=f"video/{name}")


def tiny_models(g: Graph, which: str = "student") -> Node:
    return g.node("AccVideoTinyModels", "AccVideo Tiny Models", which=which)


TINY_SIZE = (64, 64, 17)
NO_DOWNLOAD = "Runs at once on a CPU: the tiny models come with AccVideo, no file is needed. **Memory:** under 1 GB of RAM."


def compared(g: Graph, first: Node, second: Node, slow: Node, fast: Node, fps: float) -> None:
    both = g.node(
        "AccVideoCompare",
        "AccVideo Compare",
        first=first.of("IMAGE"),
        second=second.of("IMAGE"),
        first_seconds=slow.of("seconds"),
        second_seconds=fast.of("seconds"),
        fps=fps,
    )
    g.node("SaveVideo", "Save Video", video=both.of("video"), filename_prefix="video/AccVideo_compare")


def inspected(g: Graph, stored: Node, vae: Link) -> None:
    seen = g.node(
        "AccVideoSynVidInspect", "From noise to clean", vae=vae, dataset=stored.of("dataset"), sample=stored.of("sample")
    )
    g.node("PreviewImage", "Key by key", images=seen.of("sheet"))


def saved(g: Graph, decoded: Node, fps: float) -> None:
    video = g.node("CreateVideo", "Create Video", images=decoded.of("IMAGE"), fps=fps)
    g.node("SaveVideo", "Save Video", video=video.of("VIDEO"), filename_prefix="video/AccVideo_teacher")


def planned(g: Graph, clip: Link, **values: object) -> None:
    with g.group("Look at a prompt"):
        prompts = g.node("AccVideoPrompts", "A prompt of the file")
        g.node("PreviewAny", "The prompt", source=prompts.of("prompt"))
    with g.group("Write the plan"):
        plan = g.node("AccVideoPlanWriter", "Plan", clip=clip, **values)
        g.node("PreviewAny", "Report", source=plan.of("report"))


PLAN = (
    "Look at a prompt: one prompt of the file, by its index.",
    "Write the plan: every prompt encoded, with its seed, into a folder that `accvideo capture --plan` reads on machines that "
    "have no text encoder.",
)
