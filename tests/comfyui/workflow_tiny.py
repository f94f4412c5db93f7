"""The workflows that run on the bundled tiny models, described."""

from __future__ import annotations

from tests.comfyui.workflow_files import Graph, Node
from tests.comfyui.workflow_parts import (
    NO_DOWNLOAD,
    PLAN,
    TINY_LORA,
    TINY_SIZE,
    add_note,
    compared,
    groups_text,
    inspected,
    planned,
    sampler,
    save,
    saved,
    tiny_models,
    words,
)


def tiny_t2v(g: Graph) -> None:
    with g.group("Models"):
        tiny = tiny_models(g)
    with g.group("Prompt and size"):
        prompt, latent = words(g, tiny.of("clip"), "a red circle moving right on a black background", TINY_SIZE)
    with g.group("Sample: 5 steps"):
        sampled = sampler(g, tiny.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), family="tiny")
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), tiny.of("vae"), "AccVideo", 8.0, tiled=False)
    add_note(
        g,
        "A video in 5 steps, in seconds, without a download",
        f"{NO_DOWNLOAD} They know moving shapes: a colour, a shape, a motion and a background.",
        groups_text(
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
        prompt, latent = words(g, student.of("clip"), "a golden triangle moving right on a teal background", TINY_SIZE)
    with g.group("Sample: 5 and 50 steps"):
        shared = prompt.of("CONDITIONING"), latent.of("LATENT")
        fast = sampler(g, student.of("model"), *shared, "Student, 5 steps", family="tiny")
        slow = sampler(g, teacher.of("model"), *shared, "Teacher, 50 steps", family="tiny", steps=50)
    with g.group("Decode"):
        decoded = [g.node("VAEDecode", "VAE Decode", samples=it.of("latent"), vae=student.of("vae")) for it in (fast, slow)]
    with g.group("Compare and save"):
        compared(g, decoded[1], decoded[0], slow, fast, 8.0)
    add_note(
        g,
        "Teacher in 50 steps against student in 5",
        NO_DOWNLOAD,
        groups_text(
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
        tiny = tiny_models(g, "teacher")
    with g.group("Prompt and size"):
        typed = g.node("PrimitiveStringMultiline", "The prompt, for encoder and dataset", value=text)
        prompt, latent = words(g, tiny.of("clip"), typed.of("STRING"), TINY_SIZE)
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
            prompt=typed.of("STRING"),
            dataset="tiny_world",
            fps=8.0,
        )
    with g.group("Look"):
        inspected(g, stored, tiny.of("vae"))
    with g.group("Save"):
        saved(g, decoded, 8.0)
    add_note(
        g,
        "Capture a denoising trajectory",
        f"{NO_DOWNLOAD} Each run takes another seed and adds a sample to `output/synvid/tiny_world`.",
        groups_text(
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
        tiny = tiny_models(g, "teacher")
    planned(g, tiny.of("clip"), width=64, height=64, length=17, name="tiny_plan")
    add_note(
        g,
        "A capture plan from a prompt file",
        f"{NO_DOWNLOAD} It needs a prompt file: `input/prompts.txt`, with one prompt a line.",
        groups_text("Models: the tiny text encoder.", *PLAN),
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
        tiny = tiny_models(g, "teacher")
        styled = g.node("AccVideoLoraApply", "AccVideo LoRA Apply", model=tiny.of("model"), stack=both.of("stack"))
        g.node("PreviewAny", "Report", source=styled.of("report"))
    with g.group("Prompt and size"):
        prompt, latent = words(g, tiny.of("clip"), "a blue square moving down on a grey background", TINY_SIZE)
    with g.group("Sample: 5 steps"):
        sampled = sampler(g, styled.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), family="tiny")
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), tiny.of("vae"), "AccVideo_lora", 8.0, tiled=False)
    add_note(
        g,
        "LoRAs, with a strength for each and for each range of blocks",
        f"{NO_DOWNLOAD} *1* makes a LoRA, *2* and *3* apply it to different blocks at different strengths; the report says what "
        "was applied.",
        groups_text(
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
        tiny = tiny_models(g, "teacher")
        fast = g.node("AccVideoLoraApply", "AccVideo LoRA Apply", model=tiny.of("model"), stack=stack.of("stack"))
        g.node("PreviewAny", "Report", source=fast.of("report"))
    with g.group("Prompt and size"):
        prompt, latent = words(g, tiny.of("clip"), "a red circle moving right on a black background", TINY_SIZE)
    with g.group("Sample: 5 steps"):
        sampled = sampler(g, fast.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), family="tiny")
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), tiny.of("vae"), "AccVideo_student_from_lora", 8.0, tiled=False)
    add_note(
        g,
        "A student from a LoRA",
        f"{NO_DOWNLOAD} The 5-step LoRA on the teacher is a 5-step student: *1* takes the LoRA from the difference of tiny "
        "student and tiny teacher.",
        groups_text(
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
        tiny = tiny_models(g, "teacher")
    with g.group("Prompt and size"):
        prompt, latent = words(g, tiny.of("clip"), "a yellow triangle moving up on a teal background", TINY_SIZE)
    with g.group("Sample: 5 steps"):
        sampled = sampler(g, model.of("model"), prompt.of("CONDITIONING"), latent.of("LATENT"), family="tiny")
    with g.group("Decode and save"):
        save(g, sampled.of("latent"), tiny.of("vae"), "AccVideo_lora_merge", 8.0, tiled=False)
    add_note(
        g,
        "Extract a LoRA, and merge it into a checkpoint",
        f"{NO_DOWNLOAD} *1* makes a LoRA, *3* writes `models/diffusion_models/accvideo/tiny_merged.safetensors`, *4* loads it.",
        groups_text(
            "LoRA: extracted from the difference of two checkpoints.",
            "Merge: a new checkpoint, and it as a model.",
            "Prompt and size: 17 frames of 64 x 64.",
            "Sample: noise to latent in 5 steps.",
            "Decode and save: an MP4 that carries this workflow.",
        ),
        "**With your own files:** take accvideo_merge and accvideo_extract.",
    )
