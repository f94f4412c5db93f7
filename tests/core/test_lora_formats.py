"""Every key of a LoRA file is applied, ignored for a reason, or unmatched; nothing is guessed, and nothing bad passes quietly."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from accvideo_core.checkpoint.recognition import is_lora
from accvideo_core.checkpoint.wan import WanConfig, wan_shapes
from accvideo_core.dit import DiTConfig
from accvideo_core.errors import AccVideoWarning, LoraError
from accvideo_core.lora import describe, read_lora
from accvideo_core.lora.formats import split_key
from accvideo_core.lora.names import DIALECTS, find
from tests.lora_files import WAN_FORMATS, write
from tests.networks import random_weights

SMALL = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=24, pooled_dim=20)
QKV = "double_blocks.0.img_attn_qkv"
H = 128


def save(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "lora.safetensors"
    save_file(tensors, path, metadata)
    return path


def pair(
    module: str, out: int = 3 * H, width: int = H, rank: int = 4, a: str = "lora_down", b: str = "lora_up"
) -> dict[str, Tensor]:
    return {f"{module}.{a}.weight": torch.randn(rank, width), f"{module}.{b}.weight": torch.randn(out, rank)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("diffusion-pipe", "diffusion-pipe"),
        ("diffusion-pipe (old prefix)", "diffusion-pipe"),
        ("musubi / kohya", "musubi-kohya"),
        ("ComfyUI / KJ extraction", "comfyui"),
        ("diffusers", "diffusers-peft"),
        ("PEFT", "diffusers-peft"),
        ("OneTrainer", "onetrainer"),
        ("Tencent I2V", "tencent-i2v"),
    ],
)
def test_every_key_is_accounted_for_and_the_format_told(tmp_path: Path, name: str, expected: str) -> None:
    file = write(name, random_weights(SMALL))
    with read_lora(file.save(tmp_path / "lora.safetensors")) as lora:
        assert lora.format == expected and lora.family == "hunyuan-video"
        assert not lora.ignored and not lora.unmatched
        assert set(lora.modules) == set(file.changes)
        used = {s.key for module in lora.modules.values() for part in module.parts for s in part.tensors.values()}
        alphas = {key for key in file.tensors if key.endswith(".alpha")}
        assert used | alphas == set(file.tensors)


@pytest.mark.parametrize("name", WAN_FORMATS)
def test_wan(tmp_path: Path, name: str) -> None:
    config = WanConfig(H, 1, 1, 256, 64, 36, 16, image_dim=80)
    state = {key: torch.randn(shape) for key, shape in wan_shapes(config).items()}
    file = write(name, state)
    with read_lora(file.save(tmp_path / "lora.safetensors")) as lora:
        assert lora.family == "wan" and set(lora.modules) == set(file.changes) and not lora.unmatched


@pytest.mark.parametrize(("dialect", "config"), [(d, SMALL) for d in DIALECTS if d.family == "hunyuan-video"])
def test_no_two_modules_share_a_name_with_underscores(dialect: Any, config: DiTConfig) -> None:
    """kohya writes dots as underscores; were two names to meet, one would be taken for the other."""
    for layout in DIALECTS[dialect]:
        for name in random_weights(config):
            if name.endswith(".weight"):
                for stored in layout.stored(name):
                    module = stored.rpartition(".")[0]
                    dotted, flat = find(module, dialect), find("lora_unet_" + module.replace(".", "_"), dialect)
                    assert dotted is not None and flat is not None
                    assert replace(dotted[1], naming="") == replace(flat[1], naming="")
                    assert dotted[1].module == name.removesuffix(".weight")


@pytest.mark.parametrize("spelling", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "base_model.model.", "transformer."])
def test_spellings_of_factors(tmp_path: Path, prefix: str, spelling: tuple[str, str]) -> None:
    with read_lora(save(tmp_path, pair(prefix + QKV, a=spelling[0], b=spelling[1]))) as lora:
        assert list(lora.modules) == [f"{QKV}.weight"]


def test_peft_adapter_names_and_bare_factors(tmp_path: Path) -> None:
    tensors = {f"{QKV}.lora_A.default.weight": torch.randn(4, H), f"{QKV}.lora_B.default.weight": torch.randn(3 * H, 4)}
    tensors |= {"single_blocks.0.linear2.lora_A": torch.randn(4, 5 * H), "single_blocks.0.linear2.lora_B": torch.randn(H, 4)}
    with read_lora(save(tmp_path, tensors)) as lora:
        assert set(lora.modules) == {f"{QKV}.weight", "single_blocks.0.linear2.weight"}


def test_alpha_over_rank_and_one_without(tmp_path: Path) -> None:
    tensors = pair("lora_unet_double_blocks_0_img_attn_qkv", rank=8) | pair("lora_unet_double_blocks_0_img_mlp_fc2", H, 4 * H)
    tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] = torch.tensor(2.0)
    with read_lora(save(tmp_path, tensors)) as lora:
        scales = {name: module.parts[0].scale for name, module in lora.modules.items()}
        assert scales == {f"{QKV}.weight": 0.25, "double_blocks.0.img_mlp.fc2.weight": 1.0}


TO_OUT = "transformer_blocks.0.attn.to_out.0"


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "diffusion_model.", ""])
@pytest.mark.parametrize("pattern", [f"^{TO_OUT}", TO_OUT, r"to_out\.\d", r"^transformer_blocks\.0\.attn\.to_out\.0"])
def test_alpha_patterns_are_for_the_bare_name(tmp_path: Path, prefix: str, pattern: str) -> None:
    """PEFT never sees what a file puts before its names."""
    tensors = pair(f"{prefix}{TO_OUT}", H, rank=8, a="lora_A", b="lora_B")
    settings = {"transformer.r": 8, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {pattern: 2}}
    with read_lora(save(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)})) as lora:
        assert [part.scale for module in lora.modules.values() for part in module.parts] == [0.25]


def test_finetrainers_metadata_gives_alpha_where_nothing_else_does(tmp_path: Path) -> None:
    tensors = pair(f"transformer.{TO_OUT}", H, rank=8, a="lora_A", b="lora_B")
    metadata = {"lora_config": json.dumps({"r": 8, "lora_alpha": 2, "init_lora_weights": True, "target_modules": ["to_out"]})}

    def scale(more: dict[str, Tensor], said: dict[str, str]) -> float:
        with read_lora(save(tmp_path, tensors | more, metadata | said)) as lora:
            (module,) = lora.modules.values()
            return module.parts[0].scale

    assert scale({}, {}) == 0.25
    assert scale({}, {"lora_adapter_metadata": json.dumps({"lora_alpha": 4})}) == 0.5
    assert scale({}, {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 4})}) == 0.25
    assert scale({f"transformer.{TO_OUT}.alpha": torch.tensor(8.0)}, {}) == 1.0


def test_differences_in_the_wild(tmp_path: Path) -> None:
    """A bias alone, norms under either name, a whole weight, zeros for layers that have nothing to change."""
    stem = "diffusion_model.double_blocks.0."
    tensors = {
        f"{stem}img_attn.proj.diff_b": torch.randn(H),
        f"{stem}img_attn.norm.query_norm.diff": torch.zeros(H),
        f"{stem}txt_attn.norm.key_norm.w_norm": torch.randn(H),
        f"{stem}img_mlp.0.diff": torch.randn(4 * H, H),
        f"{stem}img_norm1.diff": torch.zeros(H),
        f"{stem}img_mod.lin.set_weight": torch.randn(6 * H, H),
        f"{stem}txt_attn.proj.alpha": torch.tensor(4.0),
    }
    state = random_weights(SMALL)
    with read_lora(save(tmp_path, tensors)) as lora:
        assert set(lora.modules) == {
            "double_blocks.0.img_attn_proj.bias",
            "double_blocks.0.img_attn_q_norm.weight",
            "double_blocks.0.txt_attn_k_norm.weight",
            "double_blocks.0.img_mlp.fc1.weight",
            "double_blocks.0.img_mod.linear.weight",
        }
        assert lora.ignored == {
            f"{stem}img_norm1.diff": "a difference of zero for a layer without parameters",
            f"{stem}txt_attn.proj.alpha": "an alpha without a LoRA",
        }
        name = "double_blocks.0.img_mod.linear.weight"
        replaced = state[name] + lora.modules[name].delta(state[name].shape, state[name])
        assert torch.allclose(replaced, tensors[f"{stem}img_mod.lin.set_weight"], atol=1e-6)
    tensors[f"{stem}img_norm1.diff"] = torch.ones(H)
    with pytest.raises(LoraError, match="img_norm1"):
        read_lora(save(tmp_path, tensors))


def test_what_is_for_other_parts_of_a_pipeline_is_ignored_with_the_reason(tmp_path: Path) -> None:
    tensors = pair("transformer." + QKV, a="lora_A", b="lora_B") | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    tensors |= pair("text_encoder.layers.0.self_attn.q_proj", a="lora_A", b="lora_B")
    with read_lora(save(tmp_path, tensors)) as lora:
        assert len(lora.ignored) == 4 and set(lora.ignored.values()) == {"of a text encoder"}
        assert list(lora.modules) == [f"{QKV}.weight"]


def test_unmatched_keys_are_an_error_unless_allowed(tmp_path: Path) -> None:
    tensors = pair("diffusion_model." + QKV) | pair("diffusion_model.vace_blocks.0.proj") | {"odd.thing": torch.zeros(1)}
    path = save(tmp_path, tensors)
    with pytest.raises(LoraError, match=r"3 of 5 keys.*vace_blocks.*allow unmatched"):
        read_lora(path)
    with read_lora(path, allow_unmatched=True) as lora:
        assert set(lora.unmatched) == {key for key in tensors if QKV not in key}
    report = describe(path)
    assert len(report["unmatched"]) == 3 and len(report["problems"]) == 1


@pytest.mark.parametrize("out", [3, 4])
def test_parts_of_a_fused_weight_alone(tmp_path: Path, out: int) -> None:
    """Only k, only the MLP: each lands on its own rows, the others stay."""
    name, rows, start, total = {
        3: ("single_transformer_blocks.0.attn.to_k", H, H, 7 * H),
        4: ("single_transformer_blocks.0.proj_mlp", 4 * H, 3 * H, 7 * H),
    }[out]
    tensors = pair("transformer." + name, rows, a="lora_A", b="lora_B")
    tensors |= pair("transformer.single_transformer_blocks.1.attn.to_out_x", a="lora_A", b="lora_B")
    with read_lora(save(tmp_path, tensors), allow_unmatched=True) as lora:
        module = lora.modules["single_blocks.0.linear1.weight"]
        assert [part.rows for part in module.parts] == [(start, rows)]
        delta = module.delta((total, H))
        down, up, scale = module.stacked(total)
        assert torch.equal(delta, scale * up @ down) and down.shape[0] == 4
        assert not bool(delta[:start].any()) and not bool(delta[start + rows :].any()) and bool(delta[start : start + rows].any())


def test_biases_of_split_modules_and_the_swapped_one(tmp_path: Path) -> None:
    tensors = {
        "transformer.single_transformer_blocks.0.proj_mlp.diff_b": torch.randn(4 * H),
        "transformer.norm_out.linear.diff_b": torch.arange(2 * H).float(),
        "transformer.transformer_blocks.0.attn.to_q.diff_b": torch.randn(H),
    }
    with read_lora(save(tmp_path, tensors)) as lora:
        assert lora.modules["single_blocks.0.linear1.bias"].parts[0].rows == (3 * H, 4 * H)
        swapped = lora.modules["final_layer.adaLN_modulation.1.bias"].delta((2 * H,))
        assert torch.equal(swapped, torch.cat([torch.arange(H, 2 * H), torch.arange(H)]).float())


def test_convolutions_with_a_core(tmp_path: Path) -> None:
    """LoCon and LoHa in Tucker form, as LyCORIS rebuilds them: the patch embedding is the network's only convolution."""
    a, b, mid = torch.randn(4, 16, 1, 1, 1), torch.randn(H, 4, 1, 1, 1), torch.randn(4, 4, 1, 2, 2)
    tensors = {"img_in.proj.lora_down.weight": a, "img_in.proj.lora_up.weight": b, "img_in.proj.lora_mid.weight": mid}
    tensors |= pair(QKV)
    with read_lora(save(tmp_path, tensors)) as lora:
        got = lora.modules["img_in.proj.weight"].delta((H, 16, 1, 2, 2))
        want = torch.einsum("mnthw,om,ni->oithw", mid, b[..., 0, 0, 0], a[..., 0, 0, 0])
        assert torch.allclose(got, want, atol=1e-4)
    cores = {f"img_in.proj.hada_t{i}": torch.randn(4, 4, 1, 2, 2) for i in (1, 2)}
    sides = {f"img_in.proj.hada_w{i}_a": torch.randn(4, H) for i in (1, 2)}
    sides |= {f"img_in.proj.hada_w{i}_b": torch.randn(4, 16) for i in (1, 2)}
    with read_lora(save(tmp_path, {**cores, **sides, **pair(QKV)})) as lora:
        got = lora.modules["img_in.proj.weight"].delta((H, 16, 1, 2, 2))
        first, second = (
            torch.einsum(
                "ij...,jr,ip->pr...",
                cores[f"img_in.proj.hada_t{i}"],
                sides[f"img_in.proj.hada_w{i}_b"],
                sides[f"img_in.proj.hada_w{i}_a"],
            )
            for i in (1, 2)
        )
        assert torch.allclose(got, first * second, atol=1e-3)


def test_lokr_with_both_matrices_whole_has_no_scale(tmp_path: Path) -> None:
    tensors = {f"{QKV}.lokr_w1": torch.randn(3, 2), f"{QKV}.lokr_w2": torch.randn(H, H // 2), f"{QKV}.alpha": torch.tensor(1e10)}
    with read_lora(save(tmp_path, tensors)) as lora:
        module = lora.modules[f"{QKV}.weight"]
        assert torch.allclose(module.delta((3 * H, H)), torch.kron(tensors[f"{QKV}.lokr_w1"], tensors[f"{QKV}.lokr_w2"]))


@pytest.mark.parametrize("kind", ["zip", "pickle", "wrapped", "PEFT folder"])
def test_a_lora_in_pytorchs_own_files_is_the_one_in_safetensors(tmp_path: Path, kind: str) -> None:
    file = write("PEFT" if kind == "PEFT folder" else "kohya DoRA", random_weights(SMALL))
    path = tmp_path / ("adapter_model.bin" if kind == "PEFT folder" else "lora.pt")
    content = {"state_dict": file.tensors} if kind == "wrapped" else file.tensors
    torch.save(content, path, _use_new_zipfile_serialization=kind != "pickle")
    scale = 1.0
    if kind == "PEFT folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 10}))
        path, scale = tmp_path, 2.5
    state = random_weights(SMALL)
    with read_lora(path) as lora, read_lora(file.save(tmp_path / "other.safetensors")) as other:
        assert lora.modules.keys() == other.modules.keys() and lora.format == other.format
        for name, module in lora.modules.items():
            shape, weight = state[name].shape, state[name]
            assert torch.allclose(module.delta(shape, weight), scale * other.modules[name].delta(shape, weight), atol=1e-6)


def test_every_suffix_but_a_lone_alpha_shows_that_a_file_is_a_lora() -> None:
    """`inspect` and the checkpoint reader go by it: an extraction may hold differences alone."""
    leaves = [
        "lora_down.weight",
        "lora_A.default.weight",
        "lora_B",
        "lora.up.weight",
        "lora_linear_layer.down.weight",
        "dora_scale",
    ]
    leaves += [
        "lora_magnitude_vector",
        "hada_w1_a",
        "hada_t2",
        "lokr_w2",
        "lokr_t2",
        "diff",
        "diff_b",
        "diff_m",
        "w_norm",
        "b_norm",
    ]
    for key in [*(f"{QKV}.{leaf}" for leaf in [*leaves, "set_weight", "lora_mid.weight"]), f"{QKV}_lora.up.weight"]:
        assert split_key(key) is not None and is_lora([key]), key
    assert not is_lora(random_weights(SMALL)) and not is_lora(wan_shapes(WanConfig.i2v_14b()))


# ---- what must not pass --------------------------------------------------------------------------------------------


def test_a_lora_that_says_it_is_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, pair("lora_unet_double_blocks_0_img_attn_qkv"), {"modelspec.architecture": "flux-1-dev/lora"})
    with pytest.raises(LoraError, match="flux-1-dev"):
        read_lora(path)
    path = save(tmp_path, pair("lora_unet_double_blocks_0_img_attn_qkv"), {"modelspec.architecture": "hunyuan-video/lora"})
    read_lora(path).close()


def test_a_lora_that_looks_like_fluxs_is_named(tmp_path: Path) -> None:
    """Flux has 19 and 38 blocks under the same names and sizes."""
    tensors: dict[str, Tensor] = {}
    for kind, count, tail, out in (("double", 19, "img_attn_qkv", 3 * H), ("single", 38, "linear1", 7 * H)):
        for i in range(count):
            tensors |= pair(f"lora_unet_{kind}_blocks_{i}_{tail}", out, rank=1)
    with pytest.warns(AccVideoWarning, match="Flux"):
        read_lora(save(tmp_path, tensors)).close()
    assert any("Flux" in problem for problem in describe(tmp_path / "lora.safetensors")["problems"])


BAD: dict[str, tuple[dict[str, Tensor], dict[str, str], str]] = {
    "nothing": ({"x": torch.zeros(0)}, {}, "no key"),
    "another model": (pair("lora_unet_down_blocks_0_attn_to_q"), {}, "no key"),
    "a checkpoint": (dict(random_weights(SMALL)), {}, "no LoRA"),
    "half a pair": ({f"{QKV}.lora_A.weight": torch.zeros(4, H)}, {}, "not all the tensors"),
    "ranks that differ": (pair(QKV) | {f"{QKV}.lora_up.weight": torch.zeros(3 * H, 5)}, {}, "fit each other"),
    "vectors": ({f"{QKV}.lora_A.weight": torch.zeros(4), f"{QKV}.lora_B.weight": torch.zeros(4)}, {}, "fit each other"),
    "rank 0": ({f"{QKV}.lora_A.weight": torch.zeros(0, H), f"{QKV}.lora_B.weight": torch.zeros(3 * H, 0)}, {}, "rank 0"),
    "alpha NaN": (pair(QKV) | {f"{QKV}.alpha": torch.tensor(float("nan"))}, {}, "NaN"),
    "alpha a vector": (pair(QKV) | {f"{QKV}.alpha": torch.ones(4)}, {}, "one number"),
    "twice": (pair(f"diffusion_model.{QKV}") | pair(f"transformer.{QKV}"), {}, "both change"),
    "twice in one": (pair(QKV) | pair(QKV, a="lora_A", b="lora_B"), {}, "twice"),
    "metadata": (pair(QKV), {"lora_adapter_metadata": "{"}, "damaged"),
    "metadata of lists": (pair(QKV), {"lora_adapter_metadata": "[1]"}, "damaged"),
    "alpha pattern": (
        pair(QKV),
        {"lora_adapter_metadata": json.dumps({"lora_alpha": 1, "alpha_pattern": {"(": 1}})},
        "damaged",
    ),
    "finetrainers' metadata": (pair(QKV), {"lora_config": "{"}, "lora_config is damaged"),
    "a LoKr's settings": (
        {f"{QKV}.lokr_w1": torch.zeros(3, 2), f"{QKV}.lokr_w2": torch.zeros(H, H // 2)},
        {"lora_adapter_metadata": json.dumps({"peft_type": "LOKR", "alpha": 1})},
        "alpha without 'r'",
    ),
    "alpha infinite": (pair(QKV), {"lora_adapter_metadata": json.dumps({"lora_alpha": 1e999})}, "no scale"),
    "loha cut": ({f"{QKV}.hada_w1_a": torch.zeros(H, 4)}, {}, "not all"),
    "lokr of vectors": ({f"{QKV}.lokr_w1": torch.zeros(3), f"{QKV}.lokr_w2": torch.zeros(H, H)}, {}, "fit each"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_refused_in_words(tmp_path: Path, name: str) -> None:
    tensors, metadata, words = BAD[name]
    path = save(tmp_path, {key: value.contiguous() for key, value in tensors.items()}, metadata)
    with pytest.raises(LoraError, match=words) as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


CONTENT = {
    "empty": b"",
    "text": b"<html>not found</html>",
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "a zip": b"PK\x03\x04" + b"\0" * 60,
    "gguf": b"GGUF" + b"\3\0\0\0" + b"\0" * 40,
    "header beyond the file": struct.pack("<Q", 10_000) + b"{}",
    "a header of gigabytes": struct.pack("<Q", 2**40) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b'{"a":1}}',
    "deep JSON": struct.pack("<Q", 100_000) + b"[" * 100_000,
}
_LARGE = json.dumps({f"{QKV}.lora_A.weight": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
CONTENT["a tensor of terabytes"] = struct.pack("<Q", len(_LARGE)) + _LARGE


@pytest.mark.parametrize("name", CONTENT)
def test_files_that_are_no_loras(tmp_path: Path, name: str) -> None:
    path = tmp_path / "lora.safetensors"
    path.write_bytes(CONTENT[name])
    with pytest.raises(LoraError) as caught:
        read_lora(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folders_and_truncation(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="no file"):
        read_lora(tmp_path / "nothing.safetensors")
    with pytest.raises(LoraError, match="adapter_model"):
        read_lora(tmp_path)
    whole = save(tmp_path, pair(QKV)).read_bytes()
    for cut in (1, 4, 9, 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(LoraError):
            read_lora(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("shape", [(64, 1), (1, 64), (H + 1,)], ids=str)
def test_magnitudes_that_fit_no_weight_are_told_from_the_header(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = save(tmp_path, pair(QKV) | {f"{QKV}.dora_scale": torch.ones(shape)})
    for call in (read_lora, describe):
        with pytest.raises(LoraError, match=r"dora_scale .* fits no weight of 384 rows and 128 columns"):
            call(path)


def test_nan_is_found_when_the_values_are_read(tmp_path: Path) -> None:
    tensors = pair(QKV)
    tensors[f"{QKV}.lora_up.weight"][7, 2] = float("inf")
    with read_lora(save(tmp_path, tensors)) as lora, pytest.raises(LoraError, match="NaN or infinite"):
        lora.modules[f"{QKV}.weight"].delta((3 * H, H))


def test_a_wrong_shape_is_named_with_both_sizes(tmp_path: Path) -> None:
    with read_lora(save(tmp_path, pair(QKV))) as lora, pytest.raises(LoraError, match=r"384 x 128.*768 x 256"):
        lora.modules[f"{QKV}.weight"].delta((768, 256))


def test_describe_says_what_a_file_is(tmp_path: Path) -> None:
    path = write("OneTrainer DoRA", random_weights(SMALL)).save(tmp_path / "lora.safetensors")
    report = describe(path)
    assert report["kind"] == "lora" and report["format"] == "onetrainer" and not report["problems"]
    assert report["ranks"] == {"4": report["forms"]["low-rank with DoRA"]} and report["scales"].keys() == {"0.5"}
    assert report["blocks"]["double_blocks"] == 1 and report["blocks"]["single_blocks"] == 2
    json.dumps(report)
