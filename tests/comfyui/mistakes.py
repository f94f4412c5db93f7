"""What users do wrong in ComfyUI, and docs/mistakes.md, which says what each is answered with.

`python -m tests.comfyui.mistakes` makes them all and writes the page; test_mistakes.py holds every answer to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
import io
import json
import math
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from accvideo_core import cli
from accvideo_core.checkpoint import expected_shapes
from accvideo_core.comfy_client import ComfyClient, ComfyInterrupted
from accvideo_core.dit import DiTConfig
from accvideo_core.files import atomic_path
from accvideo_core.tiny import weights_folder, weights_path
from tests.checkpoint_files import tencent_fp8
from tests.comfyui.prompts import PROMPT, TEACHER, applying, capturing, extracting, merging, put_lora, stacked
from tests.comfyui.server import ROOT, Server, node, tiny_prompt
from tests.comfyui.setup_envs import find_checkouts, prepare, python_of

PAGE = ROOT / "docs" / "mistakes.md"
API = ROOT / "workflows" / "api"
OLDER = "<br>ComfyUI 0.3.64: "  # before what the older version says otherwise


@dataclass(frozen=True)
class Kit:
    """What a mistake is made with. `folder` is the test's own."""

    server: Server
    weights: Path
    folder: Path

    def refusal(self, prompt: dict[str, Any]) -> str:
        return self.server.refusal(prompt)

    def warning(self, prompt: dict[str, Any]) -> str:
        """What is warned of; the run itself ends well."""
        result = self.server.run(prompt)
        (texts,) = result.warnings.values()
        assert result.files, "it ran"
        return "; ".join(texts)

    def command(self, *arguments: str) -> str:
        """What `accvideo queue ARGUMENTS` says when it fails."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            assert cli.main(["queue", *arguments, "--server", self.server.url]) != 0
        return _error(said)

    def model(self, name: str, state: dict[str, torch.Tensor] | bytes) -> dict[str, Any]:
        """The tiny workflow on a file of that content in models/diffusion_models."""
        path = self.server.base / "models" / "diffusion_models" / name
        if isinstance(state, bytes):
            path.write_bytes(state)
        else:
            save_file(state, path)
        return loading(name)

    def state(self, part: str = "student") -> dict[str, torch.Tensor]:
        return load_file(weights_path(part, self.weights))


Make = Callable[[Kit], str]


def _error(said: io.StringIO) -> str:
    """The sentence after what a command showed of its progress."""
    return " ".join(said.getvalue().split()).partition("error: ")[2]


def loading(name: str, dtype: str = "default") -> dict[str, Any]:
    """The tiny workflow with a model of AccVideoStudentLoader."""
    return tiny_prompt(model=["loader", 0]) | {"loader": node("AccVideoStudentLoader", file=name, weight_dtype=dtype)}


def sampling(**sampler: Any) -> Make:
    """AccVideo Sampler with these inputs."""
    return lambda kit: kit.refusal(tiny_prompt(**sampler))


def sampling_warned(which: str = "student", **sampler: Any) -> Make:
    """AccVideo Sampler with these inputs on one of the tiny models, which it warns of and does."""

    def make(kit: Kit) -> str:
        prompt = tiny_prompt(seed=8_200, **sampler)
        prompt["1"]["inputs"]["which"] = which
        return kit.warning(prompt)

    return make


# ---- model files -----------------------------------------------------------------------------------------------------


def _broken_off(kit: Kit) -> str:
    save_file(kit.state(), kit.folder / "whole.safetensors")
    return kit.refusal(kit.model("cut.safetensors", (kit.folder / "whole.safetensors").read_bytes()[:100_000]))


def _incomplete(kit: Kit) -> str:
    state = kit.state()
    del state["double_blocks.0.img_mod.linear.bias"]
    return kit.refusal(kit.model("incomplete.safetensors", state))


def _fp8_without_map(kit: Kit) -> str:
    written = tencent_fp8(kit.folder, {name: tensor.float() for name, tensor in kit.state().items()})
    name = "tencent_fp8.pt"
    (kit.server.base / "models" / "diffusion_models" / name).write_bytes(written.path.read_bytes())
    return kit.refusal(loading(name))


def _lora_as_model(kit: Kit) -> str:
    lora = put_lora(kit.server, kit.weights, name="a_lora")
    return kit.refusal(kit.model("a_lora.safetensors", (kit.server.base / "models" / "loras" / lora).read_bytes()))


def _with_code(kit: Kit) -> str:
    torch.save({"module": kit.state(), "run": print}, kit.folder / "code.pt")
    return kit.refusal(kit.model("code.pt", (kit.folder / "code.pt").read_bytes()))


FILES: dict[str, Make] = {
    "A model that is not in the folder": lambda kit: kit.refusal(loading("student.safetensors")),
    "A download that broke off": _broken_off,
    "A git-lfs pointer instead of the file": lambda kit: kit.refusal(
        kit.model("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    ),
    "A web page saved under the model's name": lambda kit: kit.refusal(
        kit.model("page.safetensors", b"<!DOCTYPE html><html><body>Log in</body></html>")
    ),
    "An empty file": lambda kit: kit.refusal(kit.model("empty.safetensors", b"")),
    "A VAE where the model belongs": lambda kit: kit.refusal(kit.model("vae.safetensors", kit.state("vae"))),
    "A LoRA where the model belongs": _lora_as_model,
    "A file that lacks a tensor": _incomplete,
    "Tencent's fp8 weights without their map": _fp8_without_map,
    "A .pt file with code in it": _with_code,
    "A weight dtype of an older workflow": lambda kit: kit.refusal(
        kit.model("tiny.safetensors", kit.state()) | loading("tiny.safetensors", "int4")
    ),
}

# ---- connections -----------------------------------------------------------------------------------------------------


def _text_of_another_encoder(kit: Kit) -> str:
    state = kit.state()
    for name in ("txt_in.input_embedder.weight", "txt_in.c_embedder.linear_1.weight"):
        state[name] = state[name].repeat(1, 2).contiguous()
    return kit.refusal(kit.model("wide_text.safetensors", state))


def _latent_of_another_model(kit: Kit) -> str:
    """An encoded picture of Stable Diffusion has 4 channels and is not empty."""
    prompt = tiny_prompt(latent=["noisy", 0])
    prompt["3"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    prompt["noise"] = node("RandomNoise", noise_seed=1)
    prompt["sigmas"] = node("AccVideoSigmas", family="tiny")
    prompt["noisy"] = node("AddNoise", model=["1", 0], noise=["noise", 0], sigmas=["sigmas", 0], latent_image=["3", 0])
    return kit.refusal(prompt)


def _wrong_vae(kit: Kit) -> str:
    """A latent of Stable Diffusion, which the tiny VAE cannot decode."""
    prompt = {name: tiny_prompt()[name] for name in ("1", "5", "6", "7")}
    prompt["3"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    prompt["5"]["inputs"]["samples"] = ["3", 0]
    return kit.refusal(prompt)


def _no_flow(kit: Kit) -> str:
    """ModelSamplingDiscrete (eps) turns the model into one that AccVideo's schedule does not fit."""
    prompt = tiny_prompt(model=["eps", 0])
    prompt["eps"] = node("ModelSamplingDiscrete", model=["1", 0], sampling="eps", zsnr=False)
    return kit.refusal(prompt)


def _size(kit: Kit, **size: int) -> str:
    prompt = tiny_prompt()
    prompt["3"]["inputs"] |= size
    return kit.refusal(prompt)


def _frames(kit: Kit) -> str:
    prompt = tiny_prompt()
    prompt["few"] = node("ImageFromBatch", image=["5", 0], batch_index=0, length=16)
    prompt["again"] = node("VAEEncode", pixels=["few", 0], vae=["1", 2])
    prompt["save"] = node("SaveLatent", samples=["again", 0], filename_prefix="latents/few")
    return kit.refusal(prompt)


def _words(kit: Kit) -> str:
    prompt = tiny_prompt()
    prompt["2"]["inputs"]["text"] = "zeppelins over Friedrichshafen"
    return kit.refusal(prompt)


def _mask_as_video(kit: Kit) -> str:
    return kit.refusal(
        {
            "a": node("SolidMask", value=1.0, width=16, height=16),
            "b": node("EmptyImage", width=16, height=16, batch_size=1, color=0),
            "c": node("AccVideoCompare", first=["a", 0], second=["b", 0]),
        }
    )


LINKS: dict[str, Make] = {
    "Text of another encoder": _text_of_another_encoder,
    "A latent of another kind of model": _latent_of_another_model,
    "A VAE of another kind of model": _wrong_vae,
    "A model of another kind": _no_flow,
    "A CLIP where the model belongs": sampling(model=["1", 1]),
    "A mask where the video belongs": _mask_as_video,
    "A width that is no multiple of 16": lambda kit: _size(kit, width=72),
    "Frames that are not 4n+1": _frames,
    "A prompt without a word that the tiny models know": _words,
}

# ---- numbers ---------------------------------------------------------------------------------------------------------


def _schedule(kit: Kit) -> str:
    prompt = {"s": node("AccVideoSigmas", family="nobody"), "show": node("PreviewAny", source=["s", 0])}
    return kit.refusal(prompt)


NUMBERS: dict[str, Make] = {
    "No steps": sampling(steps=0),
    "A negative shift": sampling(shift=-1.0),
    "A shift that is no number": sampling(shift=math.nan),
    "A guidance that is no number": sampling(guidance=math.nan),
    "A denoise that is no number": sampling(denoise=math.nan),
    "A denoise so small that its schedule would be endless": sampling(denoise=1e-5),
    "A family that is not known": sampling(family="hunyuan"),
    "AccVideo Sigmas for a family that is not known": _schedule,
    "cfg without a negative": sampling(cfg=2.0),
}

WARNINGS: dict[str, Make] = {
    "A student at 20 steps": sampling_warned(steps=20),
    "A student at 3 steps": sampling_warned(steps=3),
    "A student with cfg": sampling_warned(cfg=3.0, negative=["2", 0]),
    "A student at another shift": sampling_warned(shift=3.0),
    "The tiny models with another guidance": sampling_warned(guidance=8.0),
    "A teacher at a student's 5 steps": sampling_warned("teacher"),
}


def _accvideo_lora(kit: Kit) -> str:
    lora = put_lora(kit.server, kit.weights, name="hunyuan_video_accvid_5_steps_lora")
    prompt = applying(stacked(lora, 0.1))
    prompt["1"]["inputs"]["which"], prompt["4"]["inputs"]["steps"] = "teacher", 50
    return kit.warning(prompt)


def _named_student(kit: Kit) -> str:
    prompt = kit.model("hunyuan_video_accvid_5_steps.safetensors", kit.state())
    prompt["4"]["inputs"] |= {"steps": 8, "seed": 8_201}
    return kit.warning(prompt)


WARNINGS |= {
    "A released student, known by its file's name, at 8 steps": _named_student,
    "AccVideo's LoRA on a teacher at 50 steps": _accvideo_lora,
    "The family of another model": lambda kit: kit.warning(tiny_prompt(seed=8_202, family="wan-t2v-14b")),
}

# ---- LoRA ------------------------------------------------------------------------------------------------------------


def _lora_file(kit: Kit, name: str, module: str, rows: int = 64) -> dict[str, Any]:
    factors = {"lora_down.weight": torch.zeros(2, 64), "lora_up.weight": torch.zeros(rows, 2)}
    tensors = {f"{module}.{leaf}": tensor for leaf, tensor in factors.items()}
    save_file(tensors, kit.server.base / "models" / "loras" / f"{name}.safetensors")
    return applying(stacked(f"{name}.safetensors"))


def _stranger(kit: Kit) -> str:
    extra = {"lora_transformer_transformer_blocks_0_attn_to_z.lora_up.weight": torch.zeros(2, 2)}
    return kit.refusal(applying(stacked(put_lora(kit.server, kit.weights, name="strange", **extra))))


def _model_as_lora(kit: Kit) -> str:
    save_file(kit.state(), kit.server.base / "models" / "loras" / "a_model.safetensors")
    return kit.refusal(applying(stacked("a_model.safetensors")))


def _stack(kit: Kit, **inputs: Any) -> str:
    entry = stacked(put_lora(kit.server, kit.weights))
    entry["inputs"] |= inputs
    return kit.refusal(applying(entry))


def _merge(kit: Kit, **inputs: Any) -> str:
    return kit.refusal(merging(stacked(put_lora(kit.server, kit.weights)), **inputs))


def _merge_again(kit: Kit) -> str:
    kit.server.run(merging(stacked(put_lora(kit.server, kit.weights)), name="test/kept"))
    return _merge(kit, name="test/kept", overwrite=False, dtype="fp32")


def _disk_full(kit: Kit) -> str:
    prompt = merging(stacked(put_lora(kit.server, kit.weights)), name=["full", 0])
    message = kit.refusal(prompt | {"full": node("AccVideoTestDiskFull", text="test/no_room")})
    folder = kit.server.base / "models" / "diffusion_models" / "test"
    assert not [path for path in folder.iterdir() if "no_room" in path.name or path.suffix == ".tmp"], "nothing is left behind"
    return message


def _other_shapes(kit: Kit) -> str:
    wide = DiTConfig(hidden_size=256, num_heads=2, depth_double=1, depth_single=1, text_dim=32)
    kit.model("wide.safetensors", {name: torch.zeros(shape) for name, shape in expected_shapes(wide).items()})
    return kit.refusal(extracting(tuned="wide.safetensors"))


LORAS: dict[str, Make] = {
    "A LoRA that is not in the folder": lambda kit: _stack(kit, lora="nowhere.safetensors"),
    "A LoRA of another family": lambda kit: kit.refusal(_lora_file(kit, "wan", "lora_unet_blocks_0_self_attn_q")),
    "A LoRA of a deeper model": lambda kit: kit.refusal(_lora_file(kit, "deep", "transformer.double_blocks.7.img_mlp.fc1")),
    "A LoRA of a wider model": lambda kit: kit.refusal(_lora_file(kit, "wider", "transformer.double_blocks.1.img_mlp.fc1")),
    "A key that nobody knows": _stranger,
    "A model where the LoRA belongs": _model_as_lora,
    "Blocks that make no sense": lambda kit: _stack(kit, blocks="double.3-1"),
    "Blocks that this model has not": lambda kit: _stack(kit, blocks="double.0, single.90"),
    "A strength out of range": lambda kit: _stack(kit, strength=1000.0),
    "A merged file outside of ComfyUI's folders": lambda kit: _merge(kit, name="../outside"),
    "A merged file that exists": _merge_again,
    "A full disk": _disk_full,
    "A LoRA extracted from a model and itself": lambda kit: kit.refusal(extracting(tuned=TEACHER)),
    "A LoRA extracted from models of other sizes": _other_shapes,
}

# ---- SynVid ----------------------------------------------------------------------------------------------------------


def _capture(kit: Kit, sampler: dict[str, Any] | None = None, **writer: Any) -> str:
    return kit.refusal(capturing("mistakes", sampler, **writer))


def _student_as_teacher(kit: Kit) -> str:
    prompt = capturing("mistakes")
    prompt["models"]["inputs"]["which"] = "student"
    return kit.refusal(prompt)


def _teacher_with_easycache(kit: Kit) -> str:
    settings = dict(reuse_threshold=0.2, start_percent=0.15, end_percent=0.95, verbose=False)
    prompt = capturing("mistakes", {"model": ["easy", 0]})
    return kit.refusal(prompt | {"easy": node("EasyCache", model=["models", 0], **settings)})


def _another_teacher(kit: Kit) -> str:
    kit.server.run(capturing("mistakes"))
    prompt = capturing("mistakes", {"model": ["apply", 0], "seed": 4})
    prompt["stack"] = stacked(put_lora(kit.server, kit.weights))
    prompt["apply"] = node("AccVideoLoraApply", model=["models", 0], stack=["stack", 0])
    return kit.refusal(prompt)


def _another_schedule(kit: Kit) -> str:
    kit.server.run(capturing("mistakes"))
    return _capture(kit, {"shift": 5.0})


def _prompts(kit: Kit, text: str | None, index: int = 0) -> str:
    name = "mistakes.txt" if text is not None else "nothing.txt"
    if text is not None:
        (kit.server.base / "input" / name).write_text(text, encoding="utf-8")
    prompt = {"prompts": node("AccVideoPrompts", file=name, index=index), "show": node("PreviewAny", source=["prompts", 0])}
    return kit.refusal(prompt)


def _sample(kit: Kit) -> str:
    kit.server.run(capturing("mistakes"))
    return kit.refusal({"i": node("AccVideoSynVidInspect", dataset="mistakes", sample="abc")})


SYNVID: dict[str, Make] = {
    "A student where the teacher belongs": _student_as_teacher,
    "A teacher with EasyCache on it": _teacher_with_easycache,
    "Another teacher's trajectories into the same dataset": _another_teacher,
    "Another schedule into the same dataset": _another_schedule,
    "Keys that do not divide the steps": lambda kit: _capture(kit, {"steps": 7}),
    "An empty prompt": lambda kit: _capture(kit, prompt="  "),
    "A dataset outside of ComfyUI's folders": lambda kit: _capture(kit, dataset="../other"),
    "Looking into a dataset that is not there": lambda kit: kit.refusal({"i": node("AccVideoSynVidInspect", dataset="nowhere")}),
    "A sample that is not there": _sample,
    "A prompt file that is not there": lambda kit: _prompts(kit, None),
    "A prompt file without a prompt": lambda kit: _prompts(kit, "\n\n"),
    "A prompt beyond the end of the file": lambda kit: _prompts(kit, f"{PROMPT}\n", 5),
}

# ---- running ---------------------------------------------------------------------------------------------------------


def _out_of_memory(kit: Kit) -> str:
    message = kit.refusal(tiny_prompt(model=["small", 0]) | {"small": node("AccVideoTestOutOfMemory", model=["1", 0])})
    assert kit.server.run(tiny_prompt(seed=8_203)).files, "the next prompt runs"
    return message


def _slow(kit: Kit, seed: int) -> dict[str, Any]:
    prompt = tiny_prompt(model=["slow", 0], seed=seed)
    return prompt | {"slow": node("AccVideoTestWatch", model=["1", 0], log=str(kit.folder / "calls"), seconds=1.0)}


def _interrupt(kit: Kit) -> str:
    async def go() -> str:
        async with ComfyClient(kit.server.url) as comfy:
            started = asyncio.Event()
            run = asyncio.create_task(comfy.run(_slow(kit, 8_204), on_progress=lambda step: step.node == "4" and started.set()))
            await started.wait()
            await comfy.interrupt()
            try:
                await run
            except ComfyInterrupted as error:
                return str(error)
        raise AssertionError("it was not interrupted")

    message = asyncio.run(go())
    assert kit.server.run(tiny_prompt(seed=8_205)).files, "the next prompt runs"
    return message


def _two_at_once(kit: Kit) -> str:
    async def go() -> str:
        async with ComfyClient(kit.server.url) as one, ComfyClient(kit.server.url) as other:
            results = await asyncio.gather(one.run(tiny_prompt(seed=8_206)), other.run(tiny_prompt(seed=8_207)))
        names = {file.filename for result in results for file in result.files}
        return f"both run, one after the other; {len(names)} videos are saved"

    return asyncio.run(go())


def _stopped_server(kit: Kit) -> str:
    """An address where nobody listens."""
    workflow = str(ROOT / "workflows" / "api" / "accvideo_tiny_t2v.json")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert cli.main(["queue", workflow, "--server", "http://127.0.0.1:9"]) != 0
    return _error(said)


def _no_models(kit: Kit) -> str:
    """ComfyUI names every file that is not there; which comes first differs from run to run."""
    missing = "AccVideoStudentLoader.file=not_downloaded.safetensors"  # the workflow's own may be there for another test
    said = kit.command(str(API / "accvideo_t2v_720p.json"), "--set", missing)
    return said[said.index("AccVideoStudentLoader") :].partition(" and refresh")[0] + " and refresh"


def _unknown_node(kit: Kit) -> str:
    workflow = kit.folder / "workflow.json"
    workflow.write_text(json.dumps(tiny_prompt() | {"8": node("NodeOfAnotherPack", images=["5", 0])}))
    return kit.command(str(workflow))


RUNNING: dict[str, Make] = {
    "Not enough memory (simulated)": _out_of_memory,
    "Interrupted while sampling": _interrupt,
    "Two prompts at once": _two_at_once,
    "`accvideo queue` without a ComfyUI": _stopped_server,
    "`accvideo queue` with a workflow of the editor": lambda kit: kit.command(str(ROOT / "workflows" / "accvideo_tiny_t2v.json")),
    "`accvideo queue --set` of an input that is not there": lambda kit: kit.command(
        str(API / "accvideo_tiny_t2v.json"), "--set", "sampler=euler"
    ),
    "`accvideo queue` with a node that is not installed": _unknown_node,
    "`accvideo queue` before the models are downloaded": _no_models,
}

MISTAKES: dict[str, dict[str, Make]] = {
    "Model files": FILES,
    "Connections and sizes": LINKS,
    "Numbers": NUMBERS,
    "Sampled otherwise than it was made for (a warning in the node; the run goes on)": WARNINGS,
    "LoRAs": LORAS,
    "Capturing trajectories": SYNVID,
    "Running": RUNNING,
}
"""By topic, what somebody did and how a test does it."""


def answer(make: Make, kit: Kit) -> str:
    """What a mistake is answered with, without what differs from run to run and from machine to machine."""
    said = make(kit)
    for path in (kit.server.base, kit.folder, kit.weights, ROOT):
        said = said.replace(str(path), "…")
    said = re.sub(r" \(node [^)]*\)", "", said)
    return re.sub(r"\b[0-9a-f]{64}\b", "…", said)


def page(answers: Mapping[str, list[str]]) -> str:
    """docs/mistakes.md from what each mistake is answered with by the versions, the newest last."""
    intro = (
        f"{len(answers)} mistakes, and what is said about each. Tests make every one of them in ComfyUI 0.3.64 and 0.33.0 and "
        "hold the answer to this page, which `make mistakes` writes from [a list](../tests/comfyui/mistakes.py). In ComfyUI the "
        "sentence stands at its node, over HTTP in the answer to `POST /prompt` or in the history, and `accvideo queue` prints "
        "it. … stands for a path or a hash of the machine."
    )
    lines = ["# What went wrong?", "", *textwrap.wrap(intro, 120, break_long_words=False, break_on_hyphens=False)]
    for topic, mistakes in MISTAKES.items():
        lines += ["", f"## {topic}", "", "| What was done | What is said |", "|---|---|"]
        for what in mistakes:
            oldest, newest = (html.escape(answers[what][i], quote=False).replace("|", "&#124;") for i in (0, -1))
            lines.append(f"| {what} | {newest}{'' if newest == oldest else OLDER + oldest} |")
    return "\n".join(lines) + "\n"


def read_page() -> dict[str, list[str]]:
    """The answers that docs/mistakes.md gives to each mistake."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {what: [html.unescape(one) for one in said.split(OLDER)] for what, said in rows if what != "What was done"}


def main() -> None:
    """Make every mistake in each ComfyUI, oldest first, and write the page."""
    answers: dict[str, list[str]] = {}
    for checkout in sorted(find_checkouts(), key=lambda path: path.name != "ComfyUI-0.3.64"):
        prepare(checkout)
        with tempfile.TemporaryDirectory() as base:
            server = Server(checkout, python_of(checkout), Path(base) / "base", weights_folder())
            try:
                server.wait_until_ready()
                for topic, mistakes in MISTAKES.items():
                    for what, make in mistakes.items():
                        with tempfile.TemporaryDirectory() as folder:
                            answers.setdefault(what, []).append(answer(make, Kit(server, weights_folder(), Path(folder))))
                        print(f"{checkout.name}, {topic}: {what}: {answers[what][-1]}", file=sys.stderr)
            finally:
                server.stop()
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page(answers), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
