"""Our transformer is ComfyUI's native HunyuanVideo on equal random weights, in every ComfyUI version found.

ComfyUI pools text without a mask, so the text is unpadded here; padding is held against diffusers in tests/core.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accvideo_core.dit import Conditioning, DiTConfig, layers, model
from tests.comfyui.server import no_comfyui
from tests.comfyui.setup_envs import find_checkouts, prepare
from tests.networks import (
    CONFIGS,
    LIMIT,
    MUTATIONS,
    SHAPES,
    THREE_HEADS,
    error,
    ours,
    random_inputs,
    random_weights,
)

WORKER = Path(__file__).with_name("parity_worker.py")
CHECKOUTS = find_checkouts()
# ComfyUI fixes the pooled width at 768 and the refiner at two blocks.
NATIVE = {name: c for name, c in CONFIGS.items() if c.refiner_depth == 2} | {
    "two heads": DiTConfig(hidden_size=256, num_heads=2, depth_double=1, depth_single=2, text_dim=32)
}
TWO = NATIVE["two heads"]


def rounded(config: DiTConfig):
    """Weights and inputs that bf16 holds exactly, with a guidance it does too (4000; 6000 it does not)."""
    state = {name: t.bfloat16().float() for name, t in random_weights(config).items()}
    latent, sigma, c = random_inputs(config, (1, 1, 6, 10), guidance=4.0)
    return state, (
        latent.bfloat16().float(),
        sigma,
        Conditioning(c.text.bfloat16().float(), c.pooled.bfloat16().float(), c.guidance),
    )


def cases():
    """{name: (config, weights, inputs, dtype)}"""
    out = {}
    for config_name, config in NATIVE.items():
        for shape_name, shape in SHAPES.items():
            inputs = random_inputs(config, shape)
            out[f"{config_name}, {shape_name}"] = (config, random_weights(config), inputs, torch.float32)
    for config_name, config in {"two heads": TWO, "three heads": THREE_HEADS}.items():
        state, inputs = rounded(config)
        out[f"{config_name}, rounded"] = (config, state, inputs, torch.float32)
        out[f"{config_name}, bfloat16"] = (config, state, inputs, torch.bfloat16)
    state, _ = rounded(TWO)
    out["guidance 6, bfloat16"] = (TWO, state, random_inputs(TWO, SHAPES["odd"]), torch.bfloat16)
    return out


CASES = cases()
EXACT = [name for name, (*_, dtype) in CASES.items() if dtype == torch.float32]


@pytest.fixture(scope="module", params=CHECKOUTS or [None], ids=lambda path: path.name if path else "no ComfyUI")
def native(request, tmp_path_factory) -> dict[str, torch.Tensor]:
    """{case: velocity} from one run of the native model in one checkout."""
    if request.param is None:
        no_comfyui()
    python, folder = prepare(request.param), tmp_path_factory.mktemp("parity")
    listed = []
    for i, (_, state, (latent, sigma, c), dtype) in enumerate(CASES.values()):
        tensors = {"latent": latent, "sigma": sigma, "text": c.text, "pooled": c.pooled}
        save_file(tensors | ({} if c.guidance is None else {"guidance": c.guidance}), folder / f"inputs{i}")
        save_file(state, folder / f"weights{i}")
        name = str(dtype).removeprefix("torch.")
        listed.append({"weights": f"weights{i}", "inputs": f"inputs{i}", "dtype": name, "output": f"output{i}"})
    (folder / "cases.json").write_text(json.dumps(listed))
    command = [str(python), str(WORKER), str(request.param), str(folder)]
    done = subprocess.run(command, cwd=request.param, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: load_file(folder / f"output{i}")["velocity"] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", EXACT)
def test_float32(native, case):
    config, state, inputs, _ = CASES[case]
    assert error(ours(config, state, inputs), native[case]) <= LIMIT


@pytest.mark.parametrize("name", ["two heads", "three heads"])
def test_bfloat16_is_as_exact_as_the_peer(native, name):
    config, state, inputs, _ = CASES[f"{name}, bfloat16"]
    exact = native[f"{name}, rounded"]
    assert error(ours(config, state, inputs, torch.bfloat16), exact) <= 1.5 * error(native[f"{name}, bfloat16"], exact)


def test_guidance_in_bfloat16_is_6016_there_too(native):
    config, state, inputs, dtype = CASES["guidance 6, bfloat16"]
    latent, sigma, c = inputs
    plain = ours(config, state, inputs)
    near = ours(config, state, (latent, sigma, Conditioning(c.text, c.pooled, torch.full((1,), 6.016))))
    theirs = native["guidance 6, bfloat16"]
    assert error(theirs, near) < 0.3 * error(plain, near)
    assert error(ours(config, state, inputs, dtype), theirs) < 0.3 * error(plain, near)


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_swapped_rows_turn_it_red(native, mutate):
    config, state, inputs, _ = CASES["two heads, odd"]
    assert error(ours(config, mutate(state), inputs), native["two heads, odd"]) > 100 * LIMIT


def test_a_flipped_rope_pair_turns_it_red(native, monkeypatch):
    config, state, inputs, _ = CASES["two heads, odd"]

    def flipped(*args):
        turns = layers.rope_table(*args)
        turns[:, 40, 1] *= -1  # one pair of 64 turns the other way
        return turns

    monkeypatch.setattr(model, "rope_table", flipped)
    assert error(ours(config, state, inputs), native["two heads, odd"]) > 100 * LIMIT
