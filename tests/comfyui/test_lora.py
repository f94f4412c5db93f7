"""LoRAs of every format in ComfyUI: applied by our nodes they are the merged checkpoint; by ComfyUI's loader most are not.

A small network with random weights, in every ComfyUI version found, on its own `LoraLoader` and on ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accvideo_core.dit import DiTConfig
from accvideo_core.lora import LoraUse, merge_lora, parse_blocks
from tests.comfyui.server import no_comfyui
from tests.comfyui.setup_envs import find_checkouts, prepare
from tests.comfyui.test_sampling import small_wan
from tests.comfyui.worker import run_jobs, told_of
from tests.lora_files import FORMATS, WAN_FORMATS, LoraFile, from_native, write
from tests.networks import error, random_weights

CHECKOUTS = find_checkouts()
CONFIG = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=32)
STRENGTH = 0.7
LIMIT = 1e-5  # relative L2 in fp32; what is promised is 1e-3
STATES: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "hunyuan-video": lambda _: random_weights(CONFIG),
    "wan": lambda folder: random_wan(folder),
}
CASES = [("hunyuan-video", name) for name in FORMATS] + [("wan", name) for name in WAN_FORMATS]
IDS = [f"{family}: {name}" for family, name in CASES]
# Modules of each file that ComfyUI's own loader applies as they are meant, of those in the file; what it applies of kohya's
# DoRA it applies with another norm. 0.3.64 also loses the qk-norms of an extraction, whose weight it calls `scale`.
NATIVE = {
    ("hunyuan-video", "diffusion-pipe"): (31, 39),
    ("hunyuan-video", "diffusion-pipe (old prefix)"): (31, 39),
    ("hunyuan-video", "musubi / kohya"): (19, 39),
    ("hunyuan-video", "ComfyUI / KJ extraction"): (52, 52),
    ("hunyuan-video", "KJ extraction, fp8"): (39, 39),
    ("hunyuan-video", "diffusers"): (0, 53),
    ("hunyuan-video", "PEFT"): (0, 53),
    ("hunyuan-video", "OneTrainer"): (0, 53),
    ("hunyuan-video", "OneTrainer DoRA"): (0, 53),
    ("hunyuan-video", "Tencent I2V"): (0, 39),
    ("hunyuan-video", "kohya DoRA"): (0, 39),
    ("hunyuan-video", "kohya LoHa"): (19, 39),
    ("hunyuan-video", "kohya LoKr"): (19, 39),
    ("wan", "diffusion-pipe"): (16, 16),
    ("wan", "musubi / kohya"): (16, 16),
    ("wan", "kohya, two underscores"): (16, 16),
    ("wan", "ComfyUI / KJ extraction"): (22, 24),
    ("wan", "diffusers"): (0, 16),
}


def random_wan(folder: Path) -> dict[str, Tensor]:
    """The small Wan of the sampling tests, with norms and modulations that are not trivial."""
    small_wan(folder / "wan.safetensors")
    generator = torch.Generator().manual_seed(3)
    state = load_file(folder / "wan.safetensors")
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) if t.ndim != 2 else t for n, t in state.items()}


class Runs:
    """What one ComfyUI made of the same networks: `weights` under original names, `denoised`, `report` by output name."""

    def __init__(
        self, outputs: dict[str, Path], states: dict[str, dict[str, Tensor]], files: dict[tuple[str, str], LoraFile]
    ) -> None:
        self.outputs, self.states, self.files = outputs, states, files

    def denoised(self, output: str) -> Tensor:
        return load_file(self.outputs[output])["denoised"]

    def weights(self, output: str, family: str) -> dict[str, Tensor]:
        stored = load_file(self.outputs[output])
        native = {name.removeprefix("weight."): tensor for name, tensor in stored.items()}
        return from_native(native, self.states[family])

    def report(self, output: str) -> str:
        return told_of(self.outputs[output])["report"]


STACKED = (
    ("musubi / kohya", 0.8, "double=0.5,single.1"),
    ("kohya DoRA", -0.6, "all"),
    ("OneTrainer DoRA", 0.5, "single,other"),
)


@pytest.fixture(scope="module", params=CHECKOUTS or [None], ids=lambda path: path.name if path else "no ComfyUI")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Everything, from one process of one checkout."""
    if request.param is None:
        no_comfyui()
    folder = tmp_path_factory.mktemp("lora")
    states = {family: make(folder) for family, make in STATES.items()}
    files: dict[tuple[str, str], LoraFile] = {}
    outputs: dict[str, Path] = {}
    jobs = []

    def job(output: str, file: str, applied_by: str = "native", *loras: dict) -> None:
        outputs[output] = folder / f"output{len(outputs)}"
        # Of what the native loader makes only the weights are looked at, of the merged files only what they give.
        gives = {"native": ["weights"], "merged": ["denoised"]}.get(output.split()[0], ["denoised", "weights"])
        kept = {"dtype": "float32", "loader": "native", "gives": gives}
        jobs.append({"output": outputs[output].name, "file": file, "applied_by": applied_by, "loras": loras, **kept})

    for family, state in states.items():
        save_file(state, folder / f"{family}.safetensors")
        job(f"base {family}", f"{family}.safetensors")
    for i, case in enumerate(CASES):
        family, name = case
        files[case] = write(name, states[family], seed=i)
        lora = files[case].save(folder / f"lora{i}.safetensors")
        merge_lora(folder / f"{family}.safetensors", [LoraUse(lora, STRENGTH)], folder / f"merged{i}.safetensors")
        job(f"native {case}", f"{family}.safetensors", "native", {"file": lora.name, "strength": 1.0})
        job(f"ours {case}", f"{family}.safetensors", "ours", {"file": lora.name, "strength": STRENGTH})
        job(f"merged {case}", f"merged{i}.safetensors")
    stack = [(f"lora{CASES.index(('hunyuan-video', name))}.safetensors", strength, blocks) for name, strength, blocks in STACKED]
    uses = [LoraUse(folder / lora, strength, parse_blocks(blocks)) for lora, strength, blocks in stack]
    merge_lora(folder / "hunyuan-video.safetensors", uses, folder / "merged.safetensors")
    loras = [{"file": lora, "strength": strength, "blocks": blocks} for lora, strength, blocks in stack]
    job("ours stack", "hunyuan-video.safetensors", "ours", *loras)
    job("merged stack", "merged.safetensors")
    run_jobs(request.param, prepare(request.param), folder, jobs)
    return Runs(outputs, states, files)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_applied_in_comfyui_is_the_merged_checkpoint(runs: Runs, case: tuple[str, str]) -> None:
    applied, merged = runs.denoised(f"ours {case}"), runs.denoised(f"merged {case}")
    assert error(applied, merged) <= LIMIT
    assert error(applied, runs.denoised(f"base {case[0]}")) > 1000 * LIMIT, "a LoRA that changes nothing proves nothing"


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_weight_is_what_the_format_says(runs: Runs, case: tuple[str, str]) -> None:
    """Held against float64, and the files' own writers, not against our reader."""
    base = runs.states[case[0]]
    applied, expected = runs.weights(f"ours {case}", case[0]), runs.files[case].merged(base, STRENGTH)
    for name, weight in base.items():
        assert error(applied[name], expected[name]) <= LIMIT, name
        assert torch.equal(applied[name], weight) == (name not in runs.files[case].changes), name


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_native_loader_loses_what_ours_applies(runs: Runs, case: tuple[str, str]) -> None:
    """The table of docs/formats.md, on this small network and every module of it."""
    family, _ = case
    base, file = runs.states[family], runs.files[case]
    _, native = file.score(base, runs.weights(f"native {case}", family))
    lost_norms = 0
    if any(name.endswith("norm.query_norm.scale") for name in load_file(runs.outputs[f"base {family}"]).keys()):  # noqa: SIM118
        lost_norms = sum("query_norm.diff" in key or "key_norm.diff" in key for key in file.tensors)
    expected, total = NATIVE[case]
    assert (native, len(file.modules)) == (expected - lost_norms, total)
    assert f": {total} of {total} modules applied, strength {STRENGTH:g}\n" in runs.report(f"ours {case}") + "\n"


def test_a_stack_adds_up_from_the_base_by_strength_and_blocks(runs: Runs) -> None:
    """Also where DoRA makes a difference depend on the weight: each sees the weight without the others, as in a merge."""
    assert error(runs.denoised("ours stack"), runs.denoised("merged stack")) <= LIMIT
    base = runs.states["hunyuan-video"]
    applied = runs.weights("ours stack", "hunyuan-video")
    expected = {name: tensor.double() for name, tensor in base.items()}
    for name, strength, blocks in STACKED:
        places = parse_blocks(blocks)
        one = runs.files["hunyuan-video", name].merged(base, lambda t, s=strength, b=places: s * b.factor(t))
        expected = {tensor: value + one[tensor] - base[tensor].double() for tensor, value in expected.items()}
    for name in base:
        assert error(applied[name], expected[name]) <= LIMIT, name
    report = runs.report("ours stack").splitlines()
    assert report[0].endswith(": 13 of 39 modules applied, strength 0.8 on blocks double=0.5,single.1")
    assert "left out by strength 0 or blocks: 26 modules" in report[1]
