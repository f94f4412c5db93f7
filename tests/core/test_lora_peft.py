"""LoRAs trained, saved and merged by PEFT on diffusers' HunyuanVideo merge to the same weights here, and ours load there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accvideo_core.checkpoint.layouts import to_diffusers
from accvideo_core.dit import DiTConfig
from accvideo_core.lora import extract_lora, merge_lora, read_lora
from tests.lora_files import write
from tests.networks import random_inputs, random_weights

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SMALL = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=24, pooled_dim=20)


def network(state: dict[str, Tensor]) -> nn.Module:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    model = diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=SMALL.num_heads,
        attention_head_dim=SMALL.head_dim,
        num_layers=SMALL.depth_double,
        num_single_layers=SMALL.depth_single,
        num_refiner_layers=SMALL.refiner_depth,
        text_embed_dim=SMALL.text_dim,
        pooled_projection_dim=SMALL.pooled_dim,
    )
    model.load_state_dict({name: value.clone() for name, value in to_diffusers(state).items()})
    return model


def forward(model: nn.Module) -> Tensor:
    latent, sigma, c = random_inputs(SMALL, (1, 1, 4, 4))
    mask = torch.ones(c.text.shape[:2], dtype=torch.bool)
    return model(latent, sigma * 1000, c.text, mask, c.pooled, c.guidance * 1000, return_dict=False)[0]


def targets(model: nn.Module) -> list[str]:
    """Every Linear and convolution of the network."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv3d)]


def train(model: nn.Module, steps: int = 2) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert parameters
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        forward(model).square().mean().backward()
        optimizer.step()


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha 8, rank 4": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"proj_out": 6, "to_q": 3},
        "alpha_pattern": {"proj_out": 2, "attn.to_k": 12, "transformer_blocks.0.ff.net.2": 1},
    },
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "biases": {"r": 4, "lora_alpha": 8, "lora_bias": True},
}


def config(name: str, model: nn.Module) -> Any:
    return peft.LoraConfig(target_modules=targets(model), **CONFIGS[name])


def assert_same(merged: Path, theirs: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    ours = to_diffusers(load_file(merged))
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, value in theirs.items():
        difference = float((value.double() - before[name].double()).norm())
        changed += difference > 0
        assert float((ours[name].double() - value.double()).norm()) <= 2e-6 * float(value.double().norm()), name
        assert float((ours[name].double() - value.double()).norm()) <= max(1e-3 * difference, 1e-12), name
    assert changed >= 40


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lora_of_pefts_own_folder(tmp_path: Path, name: str) -> None:
    """get_peft_model, train, save_pretrained, merge_and_unload."""
    torch.manual_seed(0)
    state = random_weights(SMALL)
    save_file(state, tmp_path / "base.safetensors")
    model = network(state)
    wrapped = peft.get_peft_model(model, config(name, model))
    train(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    theirs = wrapped.merge_and_unload().state_dict()
    merge_lora(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "out.safetensors")
    assert_same(tmp_path / "out.safetensors", theirs, to_diffusers(state))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "biases"])
def test_a_lora_of_diffusers_pipeline(tmp_path: Path, name: str) -> None:
    """add_adapter, train, HunyuanVideoPipeline.save_lora_weights with its metadata, fuse_lora."""
    torch.manual_seed(1)
    state = random_weights(SMALL)
    save_file(state, tmp_path / "base.safetensors")
    model = network(state)
    model.add_adapter(config(name, model))
    train(model)
    settings = {key: list(v) if isinstance(v, set) else v for key, v in model.peft_config["default"].to_dict().items()}
    diffusers.HunyuanVideoPipeline.save_lora_weights(
        tmp_path, peft.get_peft_model_state_dict(model), transformer_lora_adapter_metadata=settings
    )
    model.fuse_lora()
    plain = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items() if "lora_" not in name}
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    merge_lora(tmp_path / "base.safetensors", [lora], tmp_path / "out.safetensors")
    assert_same(tmp_path / "out.safetensors", plain, to_diffusers(state))


def test_pefts_split_pairs_stack_exactly_and_share_their_rank_where_they_can(tmp_path: Path) -> None:
    """Trained apart, q, k and v need three ranks; split from one fused pair they share it."""
    torch.manual_seed(2)
    model = network(random_weights(SMALL))
    wrapped = peft.get_peft_model(model, config("alpha 8, rank 4", model))
    train(wrapped, 1)
    wrapped.save_pretrained(tmp_path / "adapter")
    with read_lora(tmp_path / "adapter") as lora:
        for tensor, parts in (("double_blocks.0.img_attn_qkv.weight", 3), ("single_blocks.1.linear1.weight", 4)):
            module = lora.modules[tensor]
            rows = 3 * 128 if parts == 3 else 7 * 128
            down, up, scale = module.stacked(rows)
            assert len(module.parts) == parts and down.shape == (4 * parts, 128) and scale == 2.0
            assert torch.allclose(scale * up.double() @ down.double(), module.delta((rows, 128)).double(), atol=1e-6)
            shared = down[:4]
            split = {f"transformer_blocks.0.attn.to_{x}.lora_A.weight": shared.clone() for x in "qkv"}
            split |= {f"transformer_blocks.0.attn.to_{x}.lora_B.weight": torch.randn(128, 4) for x in "qkv"}
            save_file(split, tmp_path / "split.safetensors")
    with read_lora(tmp_path / "split.safetensors") as lora:
        module = lora.modules["double_blocks.0.img_attn_qkv.weight"]
        down, up, scale = module.stacked(3 * 128)
        assert down.shape == (4, 128) and torch.equal(scale * up @ down, module.delta((3 * 128, 128)))


@pytest.mark.parametrize("whole", [False, True], ids=["factors", "whole matrices"])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_pefts_loha_and_lokr_are_scaled_by_alpha_over_r(tmp_path: Path, kind: str, whole: bool) -> None:
    """By `alpha` and the patterns of the settings; PEFT's LoKr keeps that scale where its tensors show no rank."""
    torch.manual_seed(3)
    state = random_weights(SMALL)
    model = network(state)
    first, second = "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_add_out"
    r = 64 if whole else 3
    patterns = {"rank_pattern": {"to_add_out": r + 1}, "alpha_pattern": {f"^{first}": 5}}
    kinds = {"LoHa": peft.LoHaConfig, "LoKr": peft.LoKrConfig}
    settings = kinds[kind](r=r, alpha=2, target_modules=[first, second], init_weights=False, **patterns)
    wrapped = peft.get_peft_model(model, settings)
    wrapped.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert (kind == "LoKr" and whole) == any(key.endswith("lokr_w2") for key in stored)
    with read_lora(tmp_path / "adapter") as lora:
        for name, tensor, scale in ((first, "img_attn_proj", 5 / r), (second, "txt_attn_proj", 2 / (r + 1))):
            module = lora.modules[f"double_blocks.0.{tensor}.weight"]
            assert module.parts[0].scale == pytest.approx(scale)
            want = model.get_submodule(name).get_delta_weight("default").detach()
            assert torch.allclose(module.delta((128, 128)), want, rtol=1e-5, atol=1e-6)


def test_ranks_that_differ_reach_their_own_modules_alone(tmp_path: Path) -> None:
    """`proj_out` is a module of its own and the end of the single blocks' names too, as PEFT's patterns read them."""
    state = random_weights(SMALL)
    generator = torch.Generator().manual_seed(4)
    ranks = {"final_layer.linear.weight": 2, "double_blocks.0.img_attn_proj.weight": 3}
    ranks |= {f"single_blocks.{i}.linear{j}.weight": 8 for i in (0, 1) for j in (1, 2)}
    tuned = {name: value.clone() for name, value in state.items()}
    for name, rank in ranks.items():
        rows, columns = state[name].shape
        tuned[name] += 0.02 * torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    save_file(state, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora.safetensors"
    settings: dict[str, Any] = {"energy": 0.999999, "key_format": "peft", "dtype": torch.float32}
    extract_lora(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", out, 64, **settings)
    with read_lora(out) as lora:
        assert len({part.rank for module in lora.modules.values() for part in module.parts}) > 2
        assert {part.scale for module in lora.modules.values() for part in module.parts} == {1.0}
    merge_lora(tmp_path / "base.safetensors", [out], tmp_path / "merged.safetensors")
    for name, value in load_file(tmp_path / "merged.safetensors").items():
        assert float((value - tuned[name]).norm()) <= 1e-3 * float(tuned[name].norm()), name
    model = network(state)
    loader = diffusers.HunyuanVideoPipeline
    loaded, metadata = loader.lora_state_dict(str(out), return_lora_metadata=True)
    with torch.no_grad():
        before, want = forward(model), forward(network(tuned))
        loader.load_lora_into_transformer(loaded, model, metadata=metadata)
        got = forward(model)
    assert float((got - want).norm()) <= 1e-2 * float((want - before).norm())


@pytest.mark.parametrize("biases", [False, True])
def test_diffusers_loads_what_we_extract_and_gives_the_tuned_model(tmp_path: Path, biases: bool) -> None:
    """The PEFT key format: diffusers' own loader, fused rows split, the final layer's halves swapped, biases beside pairs."""
    state = random_weights(SMALL)
    file = write("diffusers", state)
    tuned = {name: value.float() for name, value in file.merged(state).items()}
    if biases:
        tuned = {
            name: value + 0.1 if name.endswith(("mod.linear.bias", "linear1.bias")) else value for name, value in tuned.items()
        }
    save_file(state, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora.safetensors"
    report = extract_lora(
        tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", out, 16, key_format="peft", dtype=torch.float32
    )
    assert report.residual < 1e-4 and not report.left_out
    model = network(state)
    with torch.no_grad():
        before, want = forward(model), forward(network(tuned))
        tensors = load_file(out)
        loader = diffusers.HunyuanVideoPipeline
        loaded, metadata = loader.lora_state_dict(str(out), return_lora_metadata=True)
        assert loaded.keys() == tensors.keys()
        loader.load_lora_into_transformer(loaded, model, metadata=metadata)
        got = forward(model)
    assert float((got - want).norm()) <= 1e-3 * float((want - before).norm())
