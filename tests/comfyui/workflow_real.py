"""The workflows for the released models of HunyuanVideo and Wan, described."""

from __future__ import annotations

from docs import memory
from tests.comfyui.workflow_files import Graph
from tests.comfyui.workflow_parts import (
    CLIP_L,
    CLIP_VISION,
    FIRST,
    GGUF,
    HUB,
    KIJAI,
    LAST,
    LLAMA,
    LORA,
    PLAN,
    PORTRAIT,
    STUDENT,
    STYLES,
    TEACHER,
    UMT5,
    VAE,
    WAN_I2V,
    WAN_I2V_LORA,
    WAN_T2V,
    WAN_VAE,
    WORDS,
    add_note,
    compared,
    encoders,
    files_text,
    groups_text,
    hunyuan,
    inspected,
    memory_text,
    planned,
    sampler,
    save,
    saved,
    words,
)


def t2v(g: Graph, size: tuple[int, int, int] = (960, 544, 93), name: str = "AccVideo_t2v") -> None:
    with g.group("Models"):
        model, clip, vae = hunyuan(g)
    with g.group("Prompt and size"):
        prompt, latent = words(g, clip.of("CLIP"), size=size)
    with g.group("Sample: 5 steps"):
        sampled = sampler(g, model.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"))
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), vae.of("VAE"), name)
    add_note(
        g,
        f"HunyuanVideo in 5 steps: {size[0]} x {size[1]}, {size[2]} frames",
        "The AccVideo student was distilled for these 5 steps, with shift 7, guidance 6 and no CFG; more of them do not help.",
        groups_text(FIRST, WORDS, "Sample: noise to latent in 5 steps.", LAST),
        files_text(
            *(STUDENT, CLIP_L, LLAMA, VAE),
            extra="The student is a copy in fp8; the authors' own, `accvideo-t2v-5-steps/diffusion_pytorch_model.pt` of "
            f"[aejion/AccVideo]({HUB}aejion/AccVideo), loads here too (25.6 GB in bf16).",
        ),
        memory_text(memory.HUNYUAN, "fp8", size, (256, 64), "HunyuanVideo"),
    )


def t2v_720p(g: Graph) -> None:
    t2v(g, (1280, 720, 129), "AccVideo_t2v_720p")


def t2v_loras(g: Graph) -> None:
    with g.group("Models"):
        model, clip, vae = hunyuan(g)
    with g.group("LoRAs"):
        first = g.node("AccVideoLoraStack", "A style", lora=STYLES[0], strength=0.8)
        both = g.node("AccVideoLoraStack", "Another, double blocks only", lora=STYLES[1], strength=0.6, blocks="double, other")
        both.inputs["stack"] = first.of("stack")
        styled = g.node("AccVideoLoraApply", "Onto the student", model=model.of("model"), stack=both.of("stack"))
        g.node("PreviewAny", "What was applied", source=styled.of("report"))
    with g.group("Prompt and size"):
        prompt, latent = words(g, clip.of("CLIP"))
    with g.group("Sample: 5 steps"):
        sampled = sampler(g, styled.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"))
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), vae.of("VAE"), "AccVideo_t2v_loras")
    add_note(
        g,
        "The student with two style LoRAs",
        "HunyuanVideo LoRAs of any format work with the 5-step student: diffusion-pipe, musubi, ComfyUI, diffusers, OneTrainer.",
        groups_text(
            FIRST,
            "LoRAs: each with a strength and the blocks it applies to; the report names what was applied.",
            WORDS,
            "Sample: noise to latent in 5 steps.",
            LAST,
        ),
        files_text(
            *(STUDENT, CLIP_L, LLAMA, VAE),
            extra=f"- `models/loras/` two LoRAs of your own: choose them in place of `{STYLES[0]}` and `{STYLES[1]}`, which are "
            "names only and have no link.",
        ),
        memory_text(memory.HUNYUAN, "fp8", (960, 544, 93), (256, 64), "HunyuanVideo"),
    )


def teacher_lora(g: Graph) -> None:
    with g.group("Models"):
        model, clip, vae = hunyuan(g, file=TEACHER["name"], weight_dtype="fp8_e4m3fn")
    with g.group("LoRA"):
        stack = g.node("AccVideoLoraStack", "AccVideo's 5-step LoRA", [LORA], lora=LORA["name"])
        fast = g.node("AccVideoLoraApply", "Onto the teacher", model=model.of("model"), stack=stack.of("stack"))
        g.node("PreviewAny", "What was applied", source=fast.of("report"))
    with g.group("Prompt and size"):
        prompt, latent = words(g, clip.of("CLIP"))
    with g.group("Sample: 5 steps"):
        sampled = sampler(g, fast.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"))
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), vae.of("VAE"), "AccVideo_teacher_lora")
    add_note(
        g,
        "The HunyuanVideo teacher made a student by a LoRA",
        "If you have HunyuanVideo already, this LoRA is all that 5 steps take. It holds the student's difference in "
        "rank 16, so it comes near the student, not to it.",
        groups_text(
            FIRST,
            "LoRA: AccVideo's 5-step LoRA, and a report of it.",
            WORDS,
            "Sample: noise to latent in 5 steps.",
            LAST,
        ),
        files_text(TEACHER, LORA, CLIP_L, LLAMA, VAE),
        memory_text(memory.HUNYUAN, "fp8", (960, 544, 93), (256, 64), "HunyuanVideo"),
    )


def compare(g: Graph) -> None:
    with g.group("Models"):
        student, clip, vae = hunyuan(g)
        teacher = g.node("AccVideoStudentLoader", "The teacher", [TEACHER], file=TEACHER["name"], weight_dtype="fp8_e4m3fn")
    with g.group("Prompt and size"):
        prompt, latent = words(g, clip.of("CLIP"))
    with g.group("Sample: 5 and 50 steps"):
        shared = prompt.of("CONDITIONING"), latent.of("LATENT")
        fast = sampler(g, student.of("model"), *shared, "Student, 5 steps")
        slow = sampler(g, teacher.of("model"), *shared, "Teacher, 50 steps", steps=50)
    with g.group("Decode"):
        decoded = [g.node("VAEDecodeTiled", "Decode", samples=it.of("latent"), vae=vae.of("VAE")) for it in (fast, slow)]
    with g.group("Compare and save"):
        compared(g, decoded[1], decoded[0], slow, fast, 24.0)
    add_note(
        g,
        "Teacher in 50 steps against student in 5",
        "Both from the same prompt and noise, both in fp8. The teacher takes ten times as many calls of the network.",
        groups_text(
            FIRST,
            WORDS,
            "Sample: the same noise through both models.",
            "Decode: both latents to frames, tile by tile.",
            "Compare and save: one video under labels with the seconds each took, and a slider in the node.",
        ),
        files_text(STUDENT, TEACHER, CLIP_L, LLAMA, VAE),
        memory_text(memory.HUNYUAN, "fp8", (960, 544, 93), (256, 64), "HunyuanVideo"),
        "The models take turns on the card; RAM holds both: twice the weights.",
    )


def synvid(g: Graph) -> None:
    with g.group("Models"):
        model, clip, vae = hunyuan(g, file=TEACHER["name"])
        prompts = g.node("AccVideoPrompts", "The next prompt, with every run", control="increment")
    with g.group("Prompt and size"):
        prompt, latent = words(g, clip.of("CLIP"), text=prompts.of("prompt"))
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
        inspected(g, stored, vae.of("VAE"))
    with g.group("Save"):
        saved(g, decoded, 24.0)
    add_note(
        g,
        "Capture the teacher's denoising trajectories",
        "Each run takes the next prompt of the file and stores the 6 key points of a 50-step trajectory: what a student is "
        "distilled from. Queue it once per prompt, or use `accvideo queue` over HTTP.",
        groups_text(
            "Models: the teacher, its text encoders and VAE, and the prompt file.",
            WORDS,
            "Capture: 50 Euler steps, key points kept.",
            "Decode and store: an MP4 beside the latents of each sample.",
            "Look: the trajectory from noise to clean.",
            "Save: the video once more as an output.",
        ),
        files_text(
            *(TEACHER, CLIP_L, LLAMA, VAE),
            extra="- `input/prompts.txt` one prompt a line\n- written to `output/synvid/synvid_medium`: 31 MB a sample, and MP4s",
        ),
        memory_text(memory.HUNYUAN, "bf16", (960, 544, 93), (256, 64), "HunyuanVideo"),
    )


def plan(g: Graph) -> None:
    with g.group("Models"):
        names = {"clip_name1": CLIP_L["name"], "clip_name2": LLAMA["name"]}
        clip = g.node("DualCLIPLoader", "The teacher's text encoders", [CLIP_L, LLAMA], **names)
    planned(g, clip.of("CLIP"), name="synvid_medium")
    add_note(
        g,
        "A capture plan from a prompt file",
        "Text encoders run once, here; the teacher then captures on as many GPUs as there are.",
        groups_text("Models: the text encoders alone.", *PLAN),
        files_text(CLIP_L, LLAMA, extra="- `input/prompts.txt` one prompt a line\n- written to `output/synvid/synvid_medium`"),
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
    add_note(
        g,
        "A LoRA merged into a checkpoint",
        "Writes a new file; load it with *AccVideo Student Loader*, as in the other workflows. Chain stacks for several LoRAs.",
        groups_text("LoRA: what to merge, with strength and blocks.", "Merge: tensor by tensor, summed in fp32, and a report."),
        files_text(
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
    add_note(
        g,
        "A LoRA from the difference of two checkpoints",
        "The LoRA that turns the teacher into the student; the report says module by module what it misses. From the fp8 copy of "
        "the student it also holds that copy's rounding: use the authors' bf16 file for a LoRA worth keeping.",
        groups_text("Extract: the best factors of every matrix's difference, the rest whole."),
        files_text(
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
        clip, vae = encoders(g)
    with g.group("Prompt and size"):
        prompt, latent = words(g, clip.of("CLIP"), size=size)
    with g.group("Sample: 5 steps"):
        sampled = sampler(g, model.of("MODEL"), prompt.of("CONDITIONING"), latent.of("LATENT"))
    with g.group("Decode and save"):
        decoded = {"samples": sampled.of("latent"), "vae": vae.of("VAE"), "temporal_size": 32}
        frames = g.node("VAEDecodeTiled", "Decode", **decoded)
        video = g.node("CreateVideo", "Create Video", images=frames.of("IMAGE"))
        g.node("SaveVideo", "Save Video", video=video.of("VIDEO"), filename_prefix="video/AccVideo_gguf")
    add_note(
        g,
        "A GGUF student, for cards of 8 to 12 GB",
        "Needs the node pack ComfyUI-GGUF; ComfyUI offers to install it. *AccVideo Student Loader* reads GGUF files too, but "
        "restores them to bf16: use this loader where memory is short. LoRAs go between loader and sampler as in the others.",
        groups_text(FIRST, WORDS, "Sample: noise to latent in 5 steps.", LAST),
        files_text(
            *(CLIP_L, LLAMA, VAE),
            extra=f"- `models/diffusion_models/` [{GGUF}]({HUB}{KIJAI}/{GGUF}); ComfyUI cannot fetch GGUF files itself, so "
            "download it by hand. Q8_0 of the same folder is better and larger (13.6 GB).",
        ),
        memory_text(memory.HUNYUAN, "GGUF Q4_K_S", size, (256, 32), "HunyuanVideo"),
        "On 12 GB, 960 x 544 with 61 frames.",
    )


def wan_t2v(g: Graph) -> None:
    size = (832, 480, 81)
    with g.group("Models"):
        model = g.node("AccVideoStudentLoader", "The student", [WAN_T2V], file=WAN_T2V["name"])
        clip = g.node("CLIPLoader", "Its text encoder", [UMT5], clip_name=UMT5["name"])
        vae = g.node("VAELoader", "Its VAE", [WAN_VAE], vae_name=WAN_VAE["name"])
    with g.group("Prompt and size"):
        prompt, latent = words(g, clip.of("CLIP"), size=size)
    with g.group("Sample: 10 steps"):
        settings = {"family": "wan-t2v-14b", "steps": 10, "shift": 5.0}
        sampled = sampler(g, model.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), **settings)
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), vae.of("VAE"), "AccVideo_wan_t2v", 16.0)
    add_note(
        g,
        "Wan 2.1 T2V-14B in 10 steps",
        "The AccVideo student of Wan 2.1: 10 steps of UniPC, shift 5, no CFG, so a negative prompt has no effect. Guidance is "
        "not used: Wan has no embedded guidance.",
        groups_text(FIRST, WORDS, "Sample: noise to latent in 10 steps.", LAST),
        files_text(
            *(WAN_T2V, UMT5, WAN_VAE),
            extra=f"The student is a copy in fp8; the authors' own is in [aejion/AccVideo-WanX-T2V-14B]({HUB}aejion/"
            "AccVideo-WanX-T2V-14B), whose file names could not be confirmed, so there is no direct link.",
        ),
        memory_text(memory.WAN_T2V, "fp8", size, None, "Wan"),
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
        sampled = sampler(g, fast.of("model"), started.of("positive"), started.of("latent"), **settings)
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), vae.of("VAE"), "AccVideo_wan_i2v", 16.0)
    add_note(
        g,
        "Wan 2.1 I2V-480P in 10 steps: a picture moves",
        "Wan's image-to-video model with AccVideo's LoRA is its 10-step student: UniPC, shift 3, no CFG. The negative input is "
        "linked to the prompt because the node asks for one; without CFG it has no effect.",
        groups_text(
            "Models: the model, the LoRA on it, the text encoder and the VAE.",
            "Picture: the first frame, which WanImageToVideo crops to the size, and what CLIP sees in it.",
            WORDS,
            "Sample: noise to latent in 10 steps.",
            LAST,
        ),
        files_text(
            *(WAN_I2V, WAN_I2V_LORA, UMT5, WAN_VAE, CLIP_VISION),
            extra=f"- `input/` a picture of yours, in place of ComfyUI's example.png\n\nThe authors' whole student is in "
            f"[aejion/AccVideo-WanX-I2V-480P-14B]({HUB}aejion/AccVideo-WanX-I2V-480P-14B), whose file names could not be "
            "confirmed: with it in the loader, link the loader straight to the sampler.",
        ),
        memory_text(memory.WAN_I2V, "fp8", size, None, "Wan"),
    )
