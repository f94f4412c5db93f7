"""The shipped workflows, described; `make workflows` writes the files (see workflow_files.py).

Links to model files are given only where the file's name and place were confirmed: by ComfyUI's own templates, by the authors'
README, or by several public scripts that fetch it from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import tomllib
except ImportError:
    import tomli as tomllib

from accvideo_core.files import atomic_path
from docs import memory
from tests.comfyui.workflow_files import Graph, Link, Node, as_text

ROOT = Path(__file__).resolve().parents[2]
HUB = "https://huggingface.co/"
KIJAI, COMFY_ORG = "Kijai/HunyuanVideo_comfy/resolve/main", "Comfy-Org/HunyuanVideo_repackaged/resolve/main/split_files"
KIJAI_WAN, COMFY_ORG_WAN = "Kijai/WanVideo_comfy/resolve/main", "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"


def _file(directory: str, place: str, name: str) -> dict[str, str]:
    """As the front end reads a node's `models`: what it offers to download, and into which folder of models."""
    return {"name": name, "url": f"{HUB}{place}/{name}", "directory": directory}


STUDENT = _file("diffusion_models", KIJAI, "accvideo-t2v-5-steps_fp8_e4m3fn.safetensors")
TEACHER = _file("diffusion_models", f"{COMFY_ORG}/diffusion_models", "hunyuan_video_t2v_720p_bf16.safetensors")
LORA = _file("loras", KIJAI, "hunyuan_video_accvid_5_steps_lora_rank16_fp8_e4m3fn.safetensors")
CLIP_L = _file("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main", "clip_l.safetensors")
LLAMA = _file("text_encoders", f"{COMFY_ORG}/text_encoders", "llava_llama3_fp8_scaled.safetensors")
VAE = _file("vae", f"{COMFY_ORG}/vae", "hunyuan_video_vae_bf16.safetensors")
WAN_T2V = _file("diffusion_models", KIJAI_WAN, "Wan2_1-AccVideo-T2V-14B_fp8_e4m3fn.safetensors")
WAN_I2V = _file("diffusion_models", f"{COMFY_ORG_WAN}/diffusion_models", "wan2.1_i2v_480p_14B_fp8_e4m3fn.safetensors")
WAN_I2V_LORA = _file("loras", KIJAI_WAN, "Wan21_AccVid_I2V_480P_14B_lora_rank32_fp16.safetensors")
UMT5 = _file("text_encoders", f"{COMFY_ORG_WAN}/text_encoders", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
WAN_VAE = _file("vae", f"{COMFY_ORG_WAN}/vae", "wan_2.1_vae.safetensors")
CLIP_VISION = _file("clip_vision", f"{COMFY_ORG_WAN}/clip_vision", "clip_vision_h.safetensors")
GGUF = "hunyuan_video_accvid_t2v-5-steps_Q4_K_S.gguf"  # the front end neither lists nor fetches .gguf, so it is no model link
STYLES = ("my_style_1.safetensors", "my_style_2.safetensors")
TINY_LORA = {"tuned": "AccVideo tiny student", "base": "AccVideo tiny teacher", "rank": 64, "name": "accvideo/tiny_student"}
SCENE = (
    "A red fox trots through fresh snow between birch trees at sunrise, its breath visible in the cold air, "
    "while the camera follows it slowly from the side."
)
PORTRAIT = "The subject turns slowly towards the camera and smiles while a light wind moves through the scene."


def _memory(config: object, kept: str, video: tuple[int, int, int], tile: tuple[int, int] | None, family: str) -> str:
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


def _files(*files: dict[str, str], extra: str = "") -> str:
    """Where files go. ComfyUI offers to download those with a link."""
    lines = [f"- `models/{file['directory']}/` [{file['name']}]({file['url']})" for file in files]
    return "\n".join(["**Files:**", *lines, *([extra] if extra else [])])


def _note(g: Graph, title: str, *parts: str) -> None:
    g.note("Read me", "\n\n".join([f"## {title}", *parts]))


def _groups(*lines: str) -> str:
    return "\n".join(["**Groups:**", *(f"- *{line.partition(': ')[0]}*: {line.partition(': ')[2]}" for line in lines)])


FIRST = "Models: loads the weights, the text encoders and the VAE."
WORDS = "Prompt and size: what to show; multiples of 16 pixels, 4n + 1 frames."
LAST = "Decode and save: the latent to frames, tile by tile, and to an MP4 that carries this workflow."


def _hunyuan(g: Graph, **loader: str) -> tuple[Node, Node, Node]:
    """(model, text encoders, VAE) of HunyuanVideo."""
    file = loader.pop("file", STUDENT["name"])
    link = [it for it in (STUDENT, TEACHER) if it["name"] == file]
    title = "The student" if file == STUDENT["name"] else "The teacher"
    model = g.node("AccVideoStudentLoader", title, link, file=file, **loader)
    return model, *_encoders(g)


def _encoders(g: Graph) -> tuple[Node, Node]:
    names = {"clip_name1": CLIP_L["name"], "clip_name2": LLAMA["name"]}
    clip = g.node("DualCLIPLoader", "Its text encoders", [CLIP_L, LLAMA], **names)
    return clip, g.node("VAELoader", "Its VAE", [VAE], vae_name=VAE["name"])


def _words(g: Graph, clip: Link, text: str = SCENE, size: tuple[int, int, int] = (960, 544, 93)) -> tuple[Node, Node]:
    """(prompt, empty latent)."""
    prompt = g.node("CLIPTextEncode", "Prompt", clip=clip, text=text)
    return prompt, g.node("EmptyHunyuanLatentVideo", "Size and length", width=size[0], height=size[1], length=size[2])


def _sampler(g: Graph, model: Link, prompt: Link, latent: Link, title: str = "AccVideo Sampler", **values: object) -> Node:
    return g.node("AccVideoSampler", title, model=model, positive=prompt, latent=latent, **{"seed": 1} | values)


def _save(g: Graph, samples: Link, vae: Link, name: str, fps: float = 24.0, tiled: bool = True) -> None:
    decoded = g.node("VAEDecodeTiled" if tiled else "VAEDecode", "Decode", samples=samples, vae=vae)
    video = g.node("CreateVideo", "Create Video", images=decoded.of("IMAGE"), fps=fps)
    g.node("SaveVideo", "Save Video", video=video.of("VIDEO"), filename_prefix=f"video/{name}")


def _tiny(g: Graph, which: str = "student") -> Node:
    return g.node("AccVideoTinyModels", "AccVideo Tiny Models", which=which)


TINY_SIZE = (64, 64, 17)
NO_DOWNLOAD = "Runs at once on a CPU: the tiny models come with AccVideo, no file is needed. **Memory:** under 1 GB of RAM."


def t2v(g: Graph, size: tuple[int, int, int] = (960, 544, 93), name: str = "AccVideo_t2v") -> None:
    with g.group("Models"):
        model, clip, vae = _hunyuan(g)
    with g.group("Prompt and size"):
        prompt, latent = _words(g, clip.of("CLIP"), size=size)
    with g.group("Sample: 5 steps"):
        sampled = _sampler(g, model.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"))
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), vae.of("VAE"), name)
    _note(
        g,
        f"HunyuanVideo in 5 steps: {size[0]} x {size[1]}, {size[2]} frames",
        "The AccVideo student was distilled for these 5 steps, with shift 7, guidance 6 and no CFG; more of them do not help.",
        _groups(FIRST, WORDS, "Sample: noise to latent in 5 steps.", LAST),
        _files(
            *(STUDENT, CLIP_L, LLAMA, VAE),
            extra="The student is a copy in fp8; the authors' own, `accvideo-t2v-5-steps/diffusion_pytorch_model.pt` of "
            f"[aejion/AccVideo]({HUB}aejion/AccVideo), loads here too (25.6 GB in bf16).",
        ),
        _memory(memory.HUNYUAN, "fp8", size, (256, 64), "HunyuanVideo"),
    )


def t2v_720p(g: Graph) -> None:
    t2v(g, (1280, 720, 129), "AccVideo_t2v_720p")


def t2v_loras(g: Graph) -> None:
    with g.group("Models"):
        model, clip, vae = _hunyuan(g)
    with g.group("LoRAs"):
        first = g.node("AccVideoLoraStack", "A style", lora=STYLES[0], strength=0.8)
        both = g.node("AccVideoLoraStack", "Another, double blocks only", lora=STYLES[1], strength=0.6, blocks="double, other")
        both.inputs["stack"] = first.of("stack")
        styled = g.node("AccVideoLoraApply", "Onto the student", model=model.of("model"), stack=both.of("stack"))
        g.node("PreviewAny", "What was applied", source=styled.of("report"))
    with g.group("Prompt and size"):
        prompt, latent = _words(g, clip.of("CLIP"))
    with g.group("Sample: 5 steps"):
        sampled = _sampler(g, styled.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"))
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), vae.of("VAE"), "AccVideo_t2v_loras")
    _note(
        g,
        "The student with two style LoRAs",
        "HunyuanVideo LoRAs of any format work with the 5-step student: diffusion-pipe, musubi, ComfyUI, diffusers, OneTrainer.",
        _groups(
            FIRST,
            "LoRAs: each with a strength and the blocks it applies to; the report names what was applied.",
            WORDS,
            "Sample: noise to latent in 5 steps.",
            LAST,
        ),
        _files(
            *(STUDENT, CLIP_L, LLAMA, VAE),
            extra=f"- `models/loras/` two LoRAs of your own: choose them in place of `{STYLES[0]}` and `{STYLES[1]}`, which are "
            "names only and have no link.",
        ),
        _memory(memory.HUNYUAN, "fp8", (960, 544, 93), (256, 64), "HunyuanVideo"),
    )


def teacher_lora(g: Graph) -> None:
    with g.group("Models"):
        model, clip, vae = _hunyuan(g, file=TEACHER["name"], weight_dtype="fp8_e4m3fn")
    with g.group("LoRA"):
        stack = g.node("AccVideoLoraStack", "AccVideo's 5-step LoRA", [LORA], lora=LORA["name"])
        fast = g.node("AccVideoLoraApply", "Onto the teacher", model=model.of("model"), stack=stack.of("stack"))
        g.node("PreviewAny", "What was applied", source=fast.of("report"))
    with g.group("Prompt and size"):
        prompt, latent = _words(g, clip.of("CLIP"))
    with g.group("Sample: 5 steps"):
        sampled = _sampler(g, fast.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"))
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), vae.of("VAE"), "AccVideo_teacher_lora")
    _note(
        g,
        "The HunyuanVideo teacher made a student by a LoRA",
        "If you have HunyuanVideo already, this LoRA is all that 5 steps take. It holds the student's difference in "
        "rank 16, so it comes near the student, not to it.",
        _groups(
            FIRST,
            "LoRA: AccVideo's 5-step LoRA, and a report of it.",
            WORDS,
            "Sample: noise to latent in 5 steps.",
            LAST,
        ),
        _files(TEACHER, LORA, CLIP_L, LLAMA, VAE),
        _memory(memory.HUNYUAN, "fp8", (960, 544, 93), (256, 64), "HunyuanVideo"),
    )


def compare(g: Graph) -> None:
    with g.group("Models"):
        student, clip, vae = _hunyuan(g)
        teacher = g.node("AccVideoStudentLoader", "The teacher", [TEACHER], file=TEACHER["name"], weight_dtype="fp8_e4m3fn")
    with g.group("Prompt and size"):
        prompt, latent = _words(g, clip.of("CLIP"))
    with g.group("Sample: 5 and 50 steps"):
        shared = prompt.of("CONDITIONING"), latent.of("LATENT")
        fast = _sampler(g, student.of("model"), *shared, "Student, 5 steps")
        slow = _sampler(g, teacher.of("model"), *shared, "Teacher, 50 steps", steps=50)
    with g.group("Decode"):
        decoded = [g.node("VAEDecodeTiled", "Decode", samples=it.of("latent"), vae=vae.of("VAE")) for it in (fast, slow)]
    with g.group("Compare and save"):
        _compare(g, decoded[1], decoded[0], slow, fast, 24.0)
    _note(
        g,
        "Teacher in 50 steps against student in 5",
        "Both from the same prompt and noise, both in fp8. The teacher takes ten times as many calls of the network.",
        _groups(
            FIRST,
            WORDS,
            "Sample: the same noise through both models.",
            "Decode: both latents to frames, tile by tile.",
            "Compare and save: one video under labels with the seconds each took, and a slider in the node.",
        ),
        _files(STUDENT, TEACHER, CLIP_L, LLAMA, VAE),
        _memory(memory.HUNYUAN, "fp8", (960, 544, 93), (256, 64), "HunyuanVideo"),
        "The models take turns on the card; RAM holds both: twice the weights.",
    )


def _compare(g: Graph, first: Node, second: Node, slow: Node, fast: Node, fps: float) -> None:
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


def synvid(g: Graph) -> None:
    with g.group("Models"):
        model, clip, vae = _hunyuan(g, file=TEACHER["name"])
        prompts = g.node("AccVideoPrompts", "The next prompt, with every run", control="increment")
    with g.group("Prompt and size"):
        prompt, latent = _words(g, clip.of("CLIP"), text=prompts.of("prompt"))
    with g.group("Capture: 50 steps"):
        sampled = g.node(
            "AccVideoTrajectorySampler",
            "Teacher, 50 steps",
            model=model.of("model"),
            positive=prompt.of("CONDITIONING"),
            latent=latent.of("LATENT"),
            seed=prompts.of("seed"),
        )
    with g.group("Decode and store"):
        decoded = g.node("VAEDecodeTiled", "Decode", samples=sampled.of("latent"), vae=vae.of("VAE"))
        stored = g.node(
            "AccVideoSynVidWriter",
            "Into the dataset",
            trajectory=sampled.of("trajectory"),
            frames=decoded.of("IMAGE"),
            prompt=prompts.of("prompt"),
            dataset="synvid_medium",
        )
    with g.group("Look"):
        _inspect(g, stored, vae.of("VAE"))
    with g.group("Save"):
        _video(g, decoded, 24.0)
    _note(
        g,
        "Capture the teacher's denoising trajectories",
        "Each run takes the next prompt of the file and stores the 6 key points of a 50-step trajectory: what a student is "
        "distilled from. Queue it once per prompt, or use `accvideo queue` over HTTP.",
        _groups(
            "Models: the teacher, its text encoders and VAE, and the prompt file.",
            WORDS,
            "Capture: 50 Euler steps, key points kept.",
            "Decode and store: an MP4 beside the latents of each sample.",
            "Look: the trajectory from noise to clean.",
            "Save: the video once more as an output.",
        ),
        _files(
            *(TEACHER, CLIP_L, LLAMA, VAE),
            extra="- `input/prompts.txt` one prompt a line\n- written to `output/synvid/synvid_medium`: 31 MB a sample, and MP4s",
        ),
        _memory(memory.HUNYUAN, "bf16", (960, 544, 93), (256, 64), "HunyuanVideo"),
    )


def _inspect(g: Graph, stored: Node, vae: Link) -> None:
    seen = g.node(
        "AccVideoSynVidInspect", "From noise to clean", vae=vae, dataset=stored.of("dataset"), sample=stored.of("sample")
    )
    g.node("PreviewImage", "Key by key", images=seen.of("sheet"))


def _video(g: Graph, decoded: Node, fps: float) -> None:
    video = g.node("CreateVideo", "Create Video", images=decoded.of("IMAGE"), fps=fps)
    g.node("SaveVideo", "Save Video", video=video.of("VIDEO"), filename_prefix="video/AccVideo_teacher")


def _plan(g: Graph, clip: Link, **values: object) -> None:
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


def plan(g: Graph) -> None:
    with g.group("Models"):
        names = {"clip_name1": CLIP_L["name"], "clip_name2": LLAMA["name"]}
        clip = g.node("DualCLIPLoader", "The teacher's text encoders", [CLIP_L, LLAMA], **names)
    _plan(g, clip.of("CLIP"), name="synvid_medium")
    _note(
        g,
        "A capture plan from a prompt file",
        "Text encoders run once, here; the teacher then captures on as many GPUs as there are.",
        _groups("Models: the text encoders alone.", *PLAN),
        _files(CLIP_L, LLAMA, extra="- `input/prompts.txt` one prompt a line\n- written to `output/synvid/synvid_medium`"),
        f"**Memory (computed, not measured):** the text encoders' {memory.ENCODERS['HunyuanVideo'] / 1e9:.1f} GB, on the card "
        "or, with device cpu, in RAM.",
    )


def merge(g: Graph) -> None:
    with g.group("LoRA"):
        stack = g.node("AccVideoLoraStack", "AccVideo's 5-step LoRA", [LORA], lora=LORA["name"])
    with g.group("Merge"):
        merged = g.node(
            "AccVideoLoraMerge",
            "Into the teacher",
            [TEACHER],
            stack=stack.of("stack"),
            checkpoint=TEACHER["name"],
            name="accvideo/teacher_with_lora",
        )
        g.node("PreviewAny", "Report", source=merged.of("report"))
    _note(
        g,
        "A LoRA merged into a checkpoint",
        "Writes a new file; load it with *AccVideo Student Loader*, as in the other workflows. Chain stacks for several LoRAs.",
        _groups("LoRA: what to merge, with strength and blocks.", "Merge: tensor by tensor, summed in fp32, and a report."),
        _files(
            TEACHER, LORA, extra="- written to `models/diffusion_models/accvideo/teacher_with_lora.safetensors`, 25.6 GB of disk"
        ),
        "**Memory (computed, not measured):** no card; RAM for a few tensors at a time, the largest of 264 MB in fp32. "
        "On a file of this size the merge was measured at 1.0 GB (docs/benchmarks.md).",
    )


def extract(g: Graph) -> None:
    with g.group("Extract"):
        found = g.node(
            "AccVideoLoraExtract",
            "Student minus teacher",
            [STUDENT, TEACHER],
            tuned=STUDENT["name"],
            base=TEACHER["name"],
            name="accvideo/student_rank32",
        )
        g.node("PreviewAny", "Report", source=found.of("report"))
    _note(
        g,
        "A LoRA from the difference of two checkpoints",
        "The LoRA that turns the teacher into the student; the report says module by module what it misses. From the fp8 copy of "
        "the student it also holds that copy's rounding: use the authors' bf16 file for a LoRA worth keeping.",
        _groups("Extract: the best factors of every matrix's difference, the rest whole."),
        _files(
            *(STUDENT, TEACHER),
            extra=f"- better than the fp8 student: `accvideo-t2v-5-steps/diffusion_pytorch_model.pt` of "
            f"[aejion/AccVideo]({HUB}aejion/AccVideo)\n- written to `models/loras/accvideo/student_rank32.safetensors`",
        ),
        "**Memory (computed, not measured):** no card; RAM for a few matrices at a time, the largest of 264 MB in fp32.",
    )


def gguf(g: Graph) -> None:
    size = (640, 368, 61)
    with g.group("Models"):
        model = g.node("UnetLoaderGGUF", "The student, GGUF", unet_name=GGUF)
        clip, vae = _encoders(g)
    with g.group("Prompt and size"):
        prompt, latent = _words(g, clip.of("CLIP"), size=size)
    with g.group("Sample: 5 steps"):
        sampled = _sampler(g, model.of("MODEL"), prompt.of("CONDITIONING"), latent.of("LATENT"))
    with g.group("Decode and save"):
        decoded = {"samples": sampled.of("latent"), "vae": vae.of("VAE"), "temporal_size": 32}
        frames = g.node("VAEDecodeTiled", "Decode", **decoded)
        video = g.node("CreateVideo", "Create Video", images=frames.of("IMAGE"))
        g.node("SaveVideo", "Save Video", video=video.of("VIDEO"), filename_prefix="video/AccVideo_gguf")
    _note(
        g,
        "A GGUF student, for cards of 8 to 12 GB",
        "Needs the node pack ComfyUI-GGUF; ComfyUI offers to install it. *AccVideo Student Loader* reads GGUF files too, but "
        "restores them to bf16: use this loader where memory is short. LoRAs go between loader and sampler as in the others.",
        _groups(FIRST, WORDS, "Sample: noise to latent in 5 steps.", LAST),
        _files(
            *(CLIP_L, LLAMA, VAE),
            extra=f"- `models/diffusion_models/` [{GGUF}]({HUB}{KIJAI}/{GGUF}); ComfyUI cannot fetch GGUF files itself, so "
            "download it by hand. Q8_0 of the same folder is better and larger (13.6 GB).",
        ),
        _memory(memory.HUNYUAN, "GGUF Q4_K_S", size, (256, 32), "HunyuanVideo"),
        "On 12 GB, 960 x 544 with 61 frames.",
    )


def wan_t2v(g: Graph) -> None:
    size = (832, 480, 81)
    with g.group("Models"):
        model = g.node("AccVideoStudentLoader", "The student", [WAN_T2V], file=WAN_T2V["name"])
        clip = g.node("CLIPLoader", "Its text encoder", [UMT5], clip_name=UMT5["name"])
        vae = g.node("VAELoader", "Its VAE", [WAN_VAE], vae_name=WAN_VAE["name"])
    with g.group("Prompt and size"):
        prompt, latent = _words(g, clip.of("CLIP"), size=size)
    with g.group("Sample: 10 steps"):
        settings = {"family": "wan-t2v-14b", "steps": 10, "shift": 5.0}
        sampled = _sampler(g, model.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), **settings)
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), vae.of("VAE"), "AccVideo_wan_t2v", 16.0)
    _note(
        g,
        "Wan 2.1 T2V-14B in 10 steps",
        "The AccVideo student of Wan 2.1: 10 steps of UniPC, shift 5, no CFG, so a negative prompt has no effect. Guidance is "
        "not used: Wan has no embedded guidance.",
        _groups(FIRST, WORDS, "Sample: noise to latent in 10 steps.", LAST),
        _files(
            *(WAN_T2V, UMT5, WAN_VAE),
            extra=f"The student is a copy in fp8; the authors' own is in [aejion/AccVideo-WanX-T2V-14B]({HUB}aejion/"
            "AccVideo-WanX-T2V-14B), whose file names could not be confirmed, so there is no direct link.",
        ),
        _memory(memory.WAN_T2V, "fp8", size, None, "Wan"),
    )


def wan_i2v(g: Graph) -> None:
    size = (832, 480, 81)
    with g.group("Models"):
        model = g.node("AccVideoStudentLoader", "Wan 2.1 I2V-480P", [WAN_I2V], file=WAN_I2V["name"])
        stack = g.node("AccVideoLoraStack", "AccVideo's 10-step LoRA", [WAN_I2V_LORA], lora=WAN_I2V_LORA["name"])
        fast = g.node("AccVideoLoraApply", "Made a student", model=model.of("model"), stack=stack.of("stack"))
        clip = g.node("CLIPLoader", "Its text encoder", [UMT5], clip_name=UMT5["name"])
        vae = g.node("VAELoader", "Its VAE", [WAN_VAE], vae_name=WAN_VAE["name"])
    with g.group("Picture"):
        vision = g.node("CLIPVisionLoader", "Its image encoder", [CLIP_VISION], clip_name=CLIP_VISION["name"])
        picture = g.node("LoadImage", "The first frame")
        seen = g.node("CLIPVisionEncode", "What it shows", clip_vision=vision.of("CLIP_VISION"), image=picture.of("IMAGE"))
    with g.group("Prompt and size"):
        prompt = g.node("CLIPTextEncode", "Prompt", clip=clip.of("CLIP"), text=PORTRAIT)
        started = g.node(
            "WanImageToVideo",
            "Size and length",
            positive=prompt.of("CONDITIONING"),
            negative=prompt.of("CONDITIONING"),
            vae=vae.of("VAE"),
            clip_vision_output=seen.of("CLIP_VISION_OUTPUT"),
            start_image=picture.of("IMAGE"),
        )
    with g.group("Sample: 10 steps"):
        settings = {"family": "wan-i2v-14b-480p", "steps": 10, "shift": 3.0}
        sampled = _sampler(g, fast.of("model"), started.of("positive"), started.of("latent"), **settings)
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), vae.of("VAE"), "AccVideo_wan_i2v", 16.0)
    _note(
        g,
        "Wan 2.1 I2V-480P in 10 steps: a picture moves",
        "Wan's image-to-video model with AccVideo's LoRA is its 10-step student: UniPC, shift 3, no CFG. The negative input is "
        "linked to the prompt because the node asks for one; without CFG it has no effect.",
        _groups(
            "Models: the model, the LoRA on it, the text encoder and the VAE.",
            "Picture: the first frame, which WanImageToVideo crops to the size, and what CLIP sees in it.",
            WORDS,
            "Sample: noise to latent in 10 steps.",
            LAST,
        ),
        _files(
            *(WAN_I2V, WAN_I2V_LORA, UMT5, WAN_VAE, CLIP_VISION),
            extra=f"- `input/` a picture of yours, in place of ComfyUI's example.png\n\nThe authors' whole student is in "
            f"[aejion/AccVideo-WanX-I2V-480P-14B]({HUB}aejion/AccVideo-WanX-I2V-480P-14B), whose file names could not be "
            "confirmed: with it in the loader, link the loader straight to the sampler.",
        ),
        _memory(memory.WAN_I2V, "fp8", size, None, "Wan"),
    )


def tiny_t2v(g: Graph) -> None:
    with g.group("Models"):
        tiny = _tiny(g)
    with g.group("Prompt and size"):
        prompt, latent = _words(g, tiny.of("clip"), "a red circle moving right on a black background", TINY_SIZE)
    with g.group("Sample: 5 steps"):
        sampled = _sampler(g, tiny.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), family="tiny")
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), tiny.of("vae"), "AccVideo", 8.0, tiled=False)
    _note(
        g,
        "A video in 5 steps, in seconds, without a download",
        f"{NO_DOWNLOAD} They know moving shapes: a colour, a shape, a motion and a background.",
        _groups(
            "Models: the tiny student with its text encoder and VAE.",
            "Prompt and size: what to show; 17 frames of 64 x 64.",
            "Sample: noise to latent in 5 steps.",
            "Decode and save: an MP4 that carries this workflow.",
        ),
    )


def tiny_compare(g: Graph) -> None:
    with g.group("Models"):
        student = g.node("AccVideoTinyModels", "Student")
        teacher = g.node("AccVideoTinyModels", "Teacher", which="teacher")
    with g.group("Prompt and size"):
        prompt, latent = _words(g, student.of("clip"), "a golden triangle moving right on a teal background", TINY_SIZE)
    with g.group("Sample: 5 and 50 steps"):
        shared = prompt.of("CONDITIONING"), latent.of("LATENT")
        fast = _sampler(g, student.of("model"), *shared, "Student, 5 steps", family="tiny")
        slow = _sampler(g, teacher.of("model"), *shared, "Teacher, 50 steps", family="tiny", steps=50)
    with g.group("Decode"):
        decoded = [g.node("VAEDecode", "VAE Decode", samples=it.of("latent"), vae=student.of("vae")) for it in (fast, slow)]
    with g.group("Compare and save"):
        _compare(g, decoded[1], decoded[0], slow, fast, 8.0)
    _note(
        g,
        "Teacher in 50 steps against student in 5",
        NO_DOWNLOAD,
        _groups(
            "Models: the tiny teacher and the student distilled from it.",
            "Prompt and size: shared by both.",
            "Sample: the same noise through both.",
            "Decode: both latents to frames.",
            "Compare and save: one video under labels with the seconds each took, and a slider in the node.",
        ),
    )


def tiny_synvid(g: Graph) -> None:
    text = "a red circle moving right on a black background"
    with g.group("Models"):
        tiny = _tiny(g, "teacher")
    with g.group("Prompt and size"):
        words = g.node("PrimitiveStringMultiline", "The prompt, for encoder and dataset", value=text)
        prompt, latent = _words(g, tiny.of("clip"), words.of("STRING"), TINY_SIZE)
    with g.group("Capture: 50 steps"):
        sampled = g.node(
            "AccVideoTrajectorySampler",
            "Teacher, 50 steps",
            control="increment",
            model=tiny.of("model"),
            positive=prompt.of("CONDITIONING"),
            latent=latent.of("LATENT"),
            seed=1,
            family="tiny",
        )
    with g.group("Decode and store"):
        decoded = g.node("VAEDecode", "Decode", samples=sampled.of("latent"), vae=tiny.of("vae"))
        stored = g.node(
            "AccVideoSynVidWriter",
            "Into the dataset",
            trajectory=sampled.of("trajectory"),
            frames=decoded.of("IMAGE"),
            prompt=words.of("STRING"),
            dataset="tiny_world",
            fps=8.0,
        )
    with g.group("Look"):
        _inspect(g, stored, tiny.of("vae"))
    with g.group("Save"):
        _video(g, decoded, 8.0)
    _note(
        g,
        "Capture a denoising trajectory",
        f"{NO_DOWNLOAD} Each run takes another seed and adds a sample to `output/synvid/tiny_world`.",
        _groups(
            "Models: the tiny teacher with its text encoder and VAE.",
            "Prompt and size: the text, encoded and stored.",
            "Capture: 50 Euler steps, the 6 key points kept.",
            "Decode and store: an MP4 beside the latents of each sample.",
            "Look: the trajectory from noise to clean.",
            "Save: the video once more as an output.",
        ),
    )


def tiny_plan(g: Graph) -> None:
    with g.group("Models"):
        tiny = _tiny(g, "teacher")
    _plan(g, tiny.of("clip"), width=64, height=64, length=17, name="tiny_plan")
    _note(
        g,
        "A capture plan from a prompt file",
        f"{NO_DOWNLOAD} It needs a prompt file: `input/prompts.txt`, with one prompt a line.",
        _groups("Models: the tiny text encoder.", *PLAN),
    )


def _tiny_lora(g: Graph) -> Node:
    return g.node("AccVideoLoraExtract", "1. A LoRA for the tiny world", **TINY_LORA, overwrite=True)


def lora(g: Graph) -> None:
    with g.group("LoRAs"):
        made = _tiny_lora(g)
        first = g.node("AccVideoLoraStack", "2. A LoRA, only double blocks", lora=made.of("file"), blocks="double, other")
        places = {"strength": 0.9, "blocks": "single.0-2, single.3-5=0.8"}
        title = "3. A LoRA, single blocks, strength by block"
        both = g.node("AccVideoLoraStack", title, lora=made.of("file"), stack=first.of("stack"), **places)
    with g.group("Model"):
        tiny = _tiny(g, "teacher")
        styled = g.node("AccVideoLoraApply", "AccVideo LoRA Apply", model=tiny.of("model"), stack=both.of("stack"))
        g.node("PreviewAny", "Report", source=styled.of("report"))
    with g.group("Prompt and size"):
        prompt, latent = _words(g, tiny.of("clip"), "a blue square moving down on a grey background", TINY_SIZE)
    with g.group("Sample: 5 steps"):
        sampled = _sampler(g, styled.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), family="tiny")
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), tiny.of("vae"), "AccVideo_lora", 8.0, tiled=False)
    _note(
        g,
        "LoRAs, with a strength for each and for each range of blocks",
        f"{NO_DOWNLOAD} *1* makes a LoRA, *2* and *3* apply it to different blocks at different strengths; the report says what "
        "was applied.",
        _groups(
            "LoRAs: a stack of them.",
            "Model: the stack on the tiny teacher.",
            "Prompt and size: 17 frames of 64 x 64.",
            "Sample: noise to latent in 5 steps.",
            "Decode and save: an MP4 that carries this workflow.",
        ),
        "**With your own LoRAs** (any HunyuanVideo or Wan format, in `models/loras`): take accvideo_t2v_loras, and write `all` "
        "or places such as `double.0-9, single=0.5` into *blocks*.",
    )


def student_from_lora(g: Graph) -> None:
    with g.group("LoRA"):
        made = _tiny_lora(g)
        stack = g.node("AccVideoLoraStack", "2. The LoRA", lora=made.of("file"))
    with g.group("Model"):
        tiny = _tiny(g, "teacher")
        fast = g.node("AccVideoLoraApply", "AccVideo LoRA Apply", model=tiny.of("model"), stack=stack.of("stack"))
        g.node("PreviewAny", "Report", source=fast.of("report"))
    with g.group("Prompt and size"):
        prompt, latent = _words(g, tiny.of("clip"), "a red circle moving right on a black background", TINY_SIZE)
    with g.group("Sample: 5 steps"):
        sampled = _sampler(g, fast.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), family="tiny")
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), tiny.of("vae"), "AccVideo_student_from_lora", 8.0, tiled=False)
    _note(
        g,
        "A student from a LoRA",
        f"{NO_DOWNLOAD} The 5-step LoRA on the teacher is a 5-step student: *1* takes the LoRA from the difference of tiny "
        "student and tiny teacher.",
        _groups(
            "LoRA: made from two checkpoints.",
            "Model: the LoRA on the tiny teacher.",
            "Prompt and size: 17 frames of 64 x 64.",
            "Sample: noise to latent in 5 steps.",
            "Decode and save: an MP4 that carries this workflow.",
        ),
        "**For HunyuanVideo:** take accvideo_teacher_lora, with AccVideo's own LoRA.",
    )


def lora_merge(g: Graph) -> None:
    with g.group("LoRA"):
        made = _tiny_lora(g)
        stack = g.node("AccVideoLoraStack", "2. The LoRA", lora=made.of("file"))
    with g.group("Merge"):
        merged = g.node(
            "AccVideoLoraMerge",
            "3. Merge",
            stack=stack.of("stack"),
            checkpoint="AccVideo tiny teacher",
            name="accvideo/tiny_merged",
            overwrite=True,
        )
        g.node("PreviewAny", "Report", source=merged.of("report"))
        model = g.node("AccVideoStudentLoader", "4. The merged model", file=merged.of("file"))
        tiny = _tiny(g, "teacher")
    with g.group("Prompt and size"):
        prompt, latent = _words(g, tiny.of("clip"), "a yellow triangle moving up on a teal background", TINY_SIZE)
    with g.group("Sample: 5 steps"):
        sampled = _sampler(g, model.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), family="tiny")
    with g.group("Decode and save"):
        _save(g, sampled.of("latent"), tiny.of("vae"), "AccVideo_lora_merge", 8.0, tiled=False)
    _note(
        g,
        "Extract a LoRA, and merge it into a checkpoint",
        f"{NO_DOWNLOAD} *1* makes a LoRA, *3* writes `models/diffusion_models/accvideo/tiny_merged.safetensors`, *4* loads it.",
        _groups(
            "LoRA: extracted from the difference of two checkpoints.",
            "Merge: a new checkpoint, and it as a model.",
            "Prompt and size: 17 frames of 64 x 64.",
            "Sample: noise to latent in 5 steps.",
            "Decode and save: an MP4 that carries this workflow.",
        ),
        "**With your own files:** take accvideo_merge and accvideo_extract.",
    )


WORKFLOWS: dict[str, Callable[[Graph], None]] = {
    "accvideo_t2v": t2v,
    "accvideo_t2v_720p": t2v_720p,
    "accvideo_t2v_loras": t2v_loras,
    "accvideo_teacher_lora": teacher_lora,
    "accvideo_compare": compare,
    "accvideo_synvid": synvid,
    "accvideo_plan": plan,
    "accvideo_merge": merge,
    "accvideo_extract": extract,
    "accvideo_gguf": gguf,
    "accvideo_wan_t2v": wan_t2v,
    "accvideo_wan_i2v": wan_i2v,
    "accvideo_tiny_t2v": tiny_t2v,
    "accvideo_tiny_compare": tiny_compare,
    "accvideo_tiny_synvid": tiny_synvid,
    "accvideo_tiny_plan": tiny_plan,
    "accvideo_lora": lora,
    "accvideo_student_from_lora": student_from_lora,
    "accvideo_lora_merge": lora_merge,
}


def version() -> str:
    """Of this pack, as nodes carry it."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def texts() -> Iterator[tuple[str, str]]:
    """(file below workflows/, what is in it) of every workflow, UI and API."""
    for name, describe in WORKFLOWS.items():
        graph = Graph(name, version())
        describe(graph)
        yield f"{name}.json", as_text(graph.ui())
        yield f"api/{name}.json", json.dumps(graph.api(), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    for name, text in texts():
        with atomic_path(ROOT / "workflows" / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{len(WORKFLOWS)} workflows in {ROOT / 'workflows'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
