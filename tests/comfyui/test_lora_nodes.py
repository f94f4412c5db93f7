"""The LoRA nodes over HTTP, on the tiny models: reports, refusals, merge and extract as a user runs them, cancel."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from accvideo_core.checkpoint import expected_shapes
from accvideo_core.checkpoint.convert import convert
from accvideo_core.comfy_client import ComfyClient, ComfyInterrupted, Progress
from accvideo_core.dit import DiTConfig
from accvideo_core.tiny import weights_path
from tests.comfyui.prompts import applying, extracting, merging, put_lora, stacked
from tests.comfyui.server import Server, node, relative_error, tiny_prompt
from tests.lora_files import write


def test_the_report_counts_what_was_applied_and_names_what_was_not(server: Server, weights: Path) -> None:
    text_encoder = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}
    lora = put_lora(server, weights, **text_encoder)
    prompt = applying(stacked(lora, 0.5, "double.0, single=0.3")) | {"show": node("PreviewAny", source=["apply", 1])}
    texts = server.run(prompt).texts
    assert texts["apply"] == texts["show"]
    (report,) = texts["apply"]
    # OneTrainer splits q, k and v: 14 modules a double block, 6 a single one; the tiny network has 3 and 6 of them.
    assert report.startswith(f"{lora} (onetrainer): 50 of 78 modules applied, strength 0.5 on blocks double.0, single=0.3\n")
    assert "left out by strength 0 or blocks: 28 modules (transformer_transformer_blocks_1" in report.replace("lora_", "")
    assert "ignored, of a text encoder: 1 keys (lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha)" in report


def test_a_key_that_is_not_understood_is_an_error_unless_allowed(server: Server, weights: Path) -> None:
    stranger = "lora_transformer_transformer_blocks_0_attn_to_z.lora_up.weight"
    lora = put_lora(server, weights, name="strange", **{stranger: torch.zeros(2, 2)})
    assert stranger in (message := server.refusal(applying(stacked(lora))))
    assert "AccVideoLoraApply (node apply)" in message and "allow unmatched keys to leave them out" in message
    (report,) = server.run(applying(stacked(lora), allow_unmatched=True)).texts["apply"]
    assert f"NOT APPLIED: 1 keys that are not understood ({stranger})" in report


def test_a_tensor_of_another_shape_can_be_left_out(server: Server, weights: Path) -> None:
    """By blocks, as when merging, or by allowing what does not fit."""
    img_in = {"lora_transformer_x_embedder_proj.lora_down.weight": torch.ones(2, 33 * 4)}
    img_in["lora_transformer_x_embedder_proj.lora_up.weight"] = torch.ones(128, 2)
    lora = put_lora(server, weights, name="image-to-video", **img_in)
    message = server.refusal(applying(stacked(lora)))
    assert "1 of 49 tensors do not fit this model (img_in.proj.weight: " in message and "choose a LoRA of this model" in message
    (report,) = server.run(applying(stacked(lora, 1.0, "double, single"))).texts["apply"]
    assert "78 of 79 modules applied" in report and "NOT APPLIED" not in report
    assert "left out by strength 0 or blocks: 1 modules (lora_transformer_x_embedder_proj)" in report
    (report,) = server.run(applying(stacked(lora), allow_unmatched=True)).texts["apply"]
    assert "NOT APPLIED: 1 modules that do not fit this model (lora_transformer_x_embedder_proj)" in report


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"lora": "../../secret.safetensors"}, "secret.safetensors"),
        ({"blocks": "doubles"}, "'doubles' is no place; write for example double.0-9"),
        ({"blocks": "blocks.0"}, "this model has nothing at blocks.0"),
        ({"strength": float("nan")}, "is nan; choose a number"),
    ],
)
def test_a_stack_that_cannot_be(server: Server, weights: Path, inputs: dict[str, Any], sentence: str) -> None:
    entry = stacked(put_lora(server, weights))
    entry["inputs"] |= inputs
    assert sentence in server.refusal(applying(entry))


def test_the_model_that_came_in_is_unchanged(server: Server, weights: Path) -> None:
    (before,) = server.latents(tiny_prompt(seed=7), ["4", 0])
    prompt = applying(stacked(put_lora(server, weights)))
    (applied,) = server.latents(prompt, ["4", 0])
    (after,) = server.latents(tiny_prompt(seed=7), ["4", 0])
    assert torch.equal(before, after)
    (none,) = server.latents(applying(stacked(put_lora(server, weights), 0.0)), ["4", 0])
    (plain,) = server.latents(tiny_prompt(), ["4", 0])
    assert torch.equal(none, plain) and relative_error(applied, plain) > 0.01


def test_a_lora_written_again_is_applied_again(server: Server, weights: Path) -> None:
    prompt = applying(stacked(put_lora(server, weights, name="changing")))
    (first,) = server.latents(prompt, ["4", 0])
    put_lora(server, weights, "kohya LoHa", name="changing")
    (second,) = server.latents(prompt, ["4", 0])
    assert relative_error(second, first) > 0.01


def test_a_lora_of_pytorchs_own_is_applied_as_any(server: Server, weights: Path) -> None:
    folder, lora = server.base / "models" / "loras", put_lora(server, weights, name="as-safetensors")
    torch.save(load_file(folder / lora), folder / "as-pickle.pt")
    images = [server.latents(applying(stacked(name)), ["4", 0])[0] for name in (lora, "as-pickle.pt")]
    assert torch.equal(*images)


def test_native_lora_nodes_work_beside_ours(server: Server, weights: Path) -> None:
    """ComfyUI's loader on top of our patches: the two add up."""
    whole = put_lora(server, weights, "KJ extraction, fp8", name="native")
    (ours,) = server.latents(applying(stacked(whole, 0.25), stacked(whole, 0.5)), ["4", 0])
    prompt = applying(stacked(whole, 0.25))
    prompt["native"] = node("LoraLoaderModelOnly", model=["apply", 0], lora_name=whole, strength_model=0.5)
    prompt["4"]["inputs"]["model"] = ["native", 0]
    (both,) = server.latents(prompt, ["4", 0])
    assert relative_error(both, ours) < 1e-4


@pytest.mark.parametrize("loader", ["UNETLoader", "AccVideoStudentLoader"])
@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "scaled_fp8"])
def test_an_fp8_model_takes_loras(server: Server, weights: Path, dtype: str, loader: str) -> None:
    """Also where the LoRA changes a part of a weight's rows, as OneTrainer's split q, k and v do."""
    path = server.base / "models" / "diffusion_models" / f"tiny_{dtype}.safetensors"
    convert(weights_path("student", weights), path, "comfyui", dtype, overwrite=True)
    name = {"UNETLoader": "unet_name", "AccVideoStudentLoader": "file"}[loader]
    load = node(loader, **{name: path.name, "weight_dtype": "default"})
    entry = stacked(put_lora(server, weights), strength=3.0)  # well above what fp8 rounds away
    (exact,) = server.latents(applying(entry), ["4", 0])
    prompt = applying(entry) | {"load": load}
    prompt["apply"]["inputs"]["model"] = ["load", 0]
    (rounded,) = server.latents(prompt, ["4", 0])
    (plain,) = server.latents(tiny_prompt(model=["load", 0]) | {"load": load}, ["4", 0])
    assert relative_error(rounded, exact) < 0.5 * relative_error(plain, exact)


def test_a_merged_checkpoint_is_the_applied_lora(server: Server, weights: Path) -> None:
    """The merge's file output linked to the loader's list; in fp32, because the bundled weights are bf16."""
    entry = stacked(put_lora(server, weights), 0.5, "double, single.0-2=0.5")
    prompt = tiny_prompt(model=["load", 0]) | merging(entry, dtype="fp32", name="test/linked")
    prompt["load"] = node("AccVideoStudentLoader", file=["merge", 2], weight_dtype="default")
    (merged,) = server.latents(prompt, ["4", 0])
    (applied,) = server.latents(applying(entry), ["4", 0])
    (plain,) = server.latents(tiny_prompt(), ["4", 0])
    assert relative_error(merged, applied) < 1e-4
    assert relative_error(merged, plain) > 0.01
    assert (server.base / "models" / "diffusion_models" / "test" / "linked.safetensors").is_file()


def test_the_extracted_lora_turns_the_teacher_into_the_student(server: Server) -> None:
    """At full rank, through the nodes alone: extract, link the file to a stack, apply to the teacher."""
    prompt = extracting() | applying(stacked(["extract", 2]))
    prompt["1"]["inputs"]["which"] = "teacher"
    (made,) = server.latents(prompt, ["4", 0])
    (student,) = server.latents(tiny_prompt(), ["4", 0])
    teacher = tiny_prompt()
    teacher["1"]["inputs"]["which"] = "teacher"
    (plain,) = server.latents(teacher, ["4", 0])
    assert relative_error(made, student) < 1e-3 < 0.1 * relative_error(plain, student)


def test_reports_of_merge_and_extract(server: Server, weights: Path) -> None:
    (report,) = server.run(merging(stacked(put_lora(server, weights), 0.5))).texts["merge"]
    path = server.base / "models" / "diffusion_models" / "test" / "merged.safetensors"
    assert report.startswith(f"{path}: 48 of ") and "style.safetensors: 48 tensors, strength 0.5, blocks all" in report
    result = server.run(extracting(rank=4, name="test/small"))
    (report,) = result.texts["extract"]
    path = server.base / "models" / "loras" / "test" / "small.safetensors"
    assert report.startswith(f"{path}: ") and "misses " in report and result.files == ()
    assert path.is_file()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside", "", "C:/outside", "a//b", "..\\outside"])
def test_nothing_is_written_outside_of_comfyuis_folders(server: Server, weights: Path, name: str) -> None:
    for prompt in (merging(stacked(put_lora(server, weights)), name=name), extracting(name=name)):
        message = server.refusal(prompt)
        assert repr(name) in message and ("inside it" in message or "write one like my_file" in message)


def test_a_file_is_replaced_only_when_told(server: Server, weights: Path) -> None:
    stack = stacked(put_lora(server, weights))
    server.run(merging(stack, name="test/kept"))
    path = server.base / "models" / "diffusion_models" / "test" / "kept.safetensors"
    before = path.stat().st_mtime_ns
    assert "kept.safetensors" in server.refusal(merging(stack, name="test/kept", overwrite=False, dtype="fp32"))
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("inputs", "sentence"), [({"dtype": "fp7"}, "fp7"), ({"checkpoint": "nothing.safetensors"}, "nothing.safetensors")]
)
def test_a_merge_that_cannot_be(server: Server, weights: Path, inputs: dict[str, Any], sentence: str) -> None:
    assert sentence in server.refusal(merging(stacked(put_lora(server, weights)), **inputs))


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"rank": 0}, "Value 0 smaller than min of 1: rank"),
        ({"energy": float("nan")}, "energy nan is no share"),
        ({"key_format": "flux"}, "flux"),
    ],
)
def test_an_extraction_that_cannot_be(server: Server, inputs: dict[str, Any], sentence: str) -> None:
    assert sentence in server.refusal(extracting(**inputs))


@pytest.fixture(scope="module")
def large(server: Server, weights: Path) -> str:
    """0.6 GB of zeros in the shapes of a network, which take seconds to go through, and a LoRA for it."""
    config = DiTConfig(hidden_size=1024, num_heads=8, depth_double=4, depth_single=9, text_dim=64)
    state = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in expected_shapes(config).items()}
    for name in ("large.safetensors", "large2.safetensors"):
        save_file(state, server.base / "models" / "diffusion_models" / name)
    small = {name: tensor.float() for name, tensor in state.items() if "blocks.0" in name or name == "img_in.proj.weight"}
    write("musubi / kohya", small, trained="blocks").save(server.base / "models" / "loras" / "for_large.safetensors")
    return "large.safetensors"


@pytest.mark.parametrize("what", ["merge", "extract"])
def test_cancel_stops_it_and_leaves_nothing_behind(server: Server, large: str, what: str) -> None:
    if what == "merge":
        prompt = merging(stacked("for_large.safetensors"), checkpoint=large, name="cancelled/file")
        folder = server.base / "models" / "diffusion_models" / "cancelled"
    else:
        prompt = extracting(tuned=large, base="large2.safetensors", name="cancelled/file")
        folder = server.base / "models" / "loras" / "cancelled"
    seen: list[Progress] = []

    async def cancel_at_the_first_progress() -> None:
        async with ComfyClient(server.url) as comfy:
            started = asyncio.Event()
            tell = lambda progress: (seen.append(progress), started.set())  # noqa: E731
            run = asyncio.create_task(comfy.run(prompt, on_progress=tell))
            await started.wait()
            await comfy.interrupt()
            with pytest.raises(ComfyInterrupted, match=f"node {what}"):
                await run

    asyncio.run(cancel_at_the_first_progress())
    assert seen[0].node == what and 0 < seen[-1].value < seen[-1].total
    assert not folder.exists() or not list(folder.iterdir())
    (plain,) = server.latents(tiny_prompt(seed=11), ["4", 0])
    assert bool(torch.isfinite(plain).all()), "the next prompt runs"
