"""Small networks written in every layout users have: by the original tool's own code where it can be installed, else by the
published rules, never by ours. Each writer returns the path to open and what must come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from accvideo_core.checkpoint import WanConfig, expected_shapes
from accvideo_core.checkpoint.layouts import to_diffusers
from accvideo_core.dit import DiTConfig

State = dict[str, Tensor]

HUNYUAN = DiTConfig(hidden_size=128, num_heads=1, depth_double=1, depth_single=2, text_dim=32)
WAN_T2V = WanConfig(256, 2, 2, 512, 4096, 16, 16)  # the text width that ComfyUI has built in
WAN_I2V = WanConfig(256, 2, 1, 512, 4096, 36, 16, image_dim=1280)
PREFIXES = ("", "model.diffusion_model.", "model.model.", "diffusion_model.", "model.", "net.")

# ComfyUI's own renaming of original names, in its order; ours must undo exactly this.
COMFYUI_RENAMES = (
    ("txt_in.t_embedder.mlp.0.", "txt_in.t_embedder.in_layer."),
    ("txt_in.t_embedder.mlp.2.", "txt_in.t_embedder.out_layer."),
    ("txt_in.c_embedder.linear_1.", "txt_in.c_embedder.in_layer."),
    ("txt_in.c_embedder.linear_2.", "txt_in.c_embedder.out_layer."),
    ("_mod.linear.", "_mod.lin."),
    ("_attn_qkv.", "_attn.qkv."),
    ("mlp.fc1.", "mlp.0."),
    ("mlp.fc2.", "mlp.2."),
    ("_attn_q_norm.weight", "_attn.norm.query_norm.weight"),
    ("_attn_k_norm.weight", "_attn.norm.key_norm.weight"),
    (".q_norm.weight", ".norm.query_norm.weight"),
    (".k_norm.weight", ".norm.key_norm.weight"),
    ("_attn_proj.", "_attn.proj."),
    (".modulation.linear.", ".modulation.lin."),
    ("_in.mlp.2.", "_in.out_layer."),
    ("_in.mlp.0.", "_in.in_layer."),
)


def to_comfyui(name: str, norm_leaf: str = "weight") -> str:
    for old, new in COMFYUI_RENAMES:
        name = name.replace(old, new)
    if name.endswith(("query_norm.weight", "key_norm.weight")):
        name = name.removesuffix("weight") + norm_leaf
    return name


def random_state(config: DiTConfig | WanConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Non-trivial values for every tensor, small enough for a stable network."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            is_scale = "norm" in name or name in ("img_emb.proj.0.weight", "img_emb.proj.4.weight")
            value = 1 + 0.2 * value if is_scale and name.endswith("weight") else 0.3 * value
        else:
            value = value * value[0].numel() ** -0.5
        state[name] = value.to(dtype)
    return state


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight")


def in_blocks(name: str) -> bool:
    """Tencent quantises the Linears of the two kinds of blocks and nothing else."""
    return name.startswith(("double_blocks.", "single_blocks."))


def fp8(values: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Published rule: scale = largest / 448 (57344 for e5m2), stored = values / scale."""
    scale = values.abs().max() / torch.finfo(dtype).max
    return (values / scale).to(dtype), scale


@dataclass(frozen=True)
class Written:
    """What to open, what comes back under original names, and what the file says it is."""

    path: Path
    state: State
    layout: str = "original"
    container: str = "safetensors"
    quantisation: str = ""


Writer = Callable[[Path, State], Written]


def pytorch(wrapper: str | None, legacy: bool = False) -> Writer:
    def write(folder: Path, state: State) -> Written:
        content = {wrapper: state} if wrapper else state
        torch.save(content, folder / "model.pt", _use_new_zipfile_serialization=not legacy)
        return Written(folder / "model.pt", state, container="pytorch pickle" if legacy else "pytorch zip")

    return write


def module_and_ema(folder: Path, state: State) -> Written:
    """Tencent's own loader takes `module`."""
    torch.save({"module": state, "ema": {name: t + 1 for name, t in state.items()}}, folder / "model.pt")
    return Written(folder / "model.pt", state, container="pytorch zip")


def tencent_fp8(folder: Path, state: State) -> Written:
    """hyvideo/modules/fp8_optimization.py: weight.to(dtype) * map[module].to(dtype), of the blocks' Linears."""
    stored, scales, expected = {}, {}, {}
    for name, tensor in state.items():
        stored[name] = tensor.bfloat16()
        expected[name] = stored[name]
        if is_linear(name, tensor) and in_blocks(name):
            stored[name], scale = fp8(tensor)
            scales[name.removesuffix(".weight")] = scale.reshape(1)
            expected[name] = stored[name].float() * scale
    torch.save({"module": stored}, folder / "model_fp8.pt")
    torch.save(scales, folder / "model_fp8_map.pt")
    return Written(folder / "model_fp8.pt", expected, container="pytorch zip", quantisation="tencent fp8 with map")


def plain_fp8(folder: Path, state: State) -> Written:
    cast = {name: t.to(torch.float8_e4m3fn) if is_linear(name, t) else t.bfloat16() for name, t in state.items()}
    save_file(cast, folder / "fp8.safetensors")
    return Written(folder / "fp8.safetensors", cast, quantisation="plain fp8")


def scaled_fp8(
    prefix: str = "", native: bool = True, inputs: bool = False, full_precision: bool = True, everywhere: bool = True
) -> Writer:
    """ComfyUI's older form (convert_old_quants and 0.3.64's scaled_fp8_ops read it)."""

    def write(folder: Path, state: State) -> Written:
        rename = to_comfyui if native else str
        stored = {f"{prefix}scaled_fp8": torch.zeros(2 if full_precision else 0).to(torch.float8_e4m3fn)}
        expected = {}
        for name, tensor in state.items():
            expected[name] = stored[prefix + rename(name)] = tensor.bfloat16()
            if is_linear(name, tensor) and (everywhere or in_blocks(name)):
                quantised, scale = fp8(tensor)
                stored[prefix + rename(name)], module = quantised, prefix + rename(name).removesuffix(".weight")
                stored[f"{module}.scale_weight"] = scale
                if inputs:
                    stored[f"{module}.scale_input"] = torch.tensor(0.5)
                expected[name] = quantised.float() * scale
        save_file(stored, folder / "scaled.safetensors")
        layout = "comfyui-native" if native else "original"
        return Written(folder / "scaled.safetensors", expected, layout, quantisation="comfyui scaled fp8")

    return write


def quantised_fp8(prefix: str = "", in_metadata: bool = False, dtype: torch.dtype = torch.float8_e4m3fn) -> Writer:
    """ComfyUI's newer form: `.weight_scale` with `.comfy_quant` bytes, or the file's `_quantization_metadata`."""

    def write(folder: Path, state: State) -> Written:
        stored: State = {}
        expected: State = {}
        layers = {}
        settings = {"format": str(dtype).removeprefix("torch."), "full_precision_matrix_mult": True}
        for name, tensor in state.items():
            native = prefix + to_comfyui(name)
            expected[name] = stored[native] = tensor.bfloat16()
            if is_linear(name, tensor) and in_blocks(name):
                stored[native], scale = fp8(tensor, dtype)
                module = native.removesuffix(".weight")
                stored[f"{module}.weight_scale"] = scale
                expected[name] = stored[native].float() * scale
                if in_metadata:
                    layers[module] = settings
                else:
                    stored[f"{module}.comfy_quant"] = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if in_metadata else None
        save_file(stored, folder / "quantised.safetensors", metadata)
        return Written(folder / "quantised.safetensors", expected, "comfyui-native", quantisation="comfyui quantised fp8")

    return write


def rows_scaled_fp8(blocks: int) -> Writer:
    """musubi-tuner's finer scales: one for each row, or for each of `blocks` blocks of a row."""

    def write(folder: Path, state: State) -> Written:
        stored: State = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
        expected: State = {}
        for name, tensor in state.items():
            expected[name] = stored[name] = tensor.bfloat16()
            if is_linear(name, tensor) and in_blocks(name):
                parts = tensor.view(len(tensor), blocks, -1)
                scale = parts.abs().amax(2, keepdim=True) / 448
                stored[name] = (parts / scale).to(torch.float8_e4m3fn).view(tensor.shape)
                stored[name.removesuffix("weight") + "scale_weight"] = scale if blocks > 1 else scale[:, :, 0]
                expected[name] = (stored[name].float().view(parts.shape) * scale).view(tensor.shape)
        save_file(stored, folder / "rows.safetensors")
        return Written(folder / "rows.safetensors", expected, quantisation="comfyui scaled fp8")

    return write


def prefixed(prefix: str, native: str | None = None) -> Writer:
    def write(folder: Path, state: State) -> Written:
        rename = str if native is None else lambda name: to_comfyui(name, native)
        save_file({prefix + rename(name): tensor for name, tensor in state.items()}, folder / "file.bin")
        return Written(folder / "file.bin", state, "original" if native is None else "comfyui-native")

    return write


def diffusers_model(state: State) -> torch.nn.Module:
    """diffusers' own network with these weights. Its own conversion renames Wan's; HunyuanVideo's is for one width alone, so
    ours is used, which test_checkpoint_layouts.py holds against it."""
    import diffusers
    from diffusers.loaders import single_file_utils

    copy = {name: tensor.clone() for name, tensor in state.items()}
    if "patch_embedding.weight" in state:
        image = "img_emb.proj.1.weight" in state
        width = state["patch_embedding.weight"].shape[0]
        network: torch.nn.Module = diffusers.WanTransformer3DModel(
            num_attention_heads=width // 128,
            attention_head_dim=128,
            in_channels=state["patch_embedding.weight"].shape[1],
            out_channels=16,
            text_dim=state["text_embedding.0.weight"].shape[1],
            ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
            num_layers=sum(name.endswith(".ffn.0.bias") for name in state),
            image_dim=1280 if image else None,
            added_kv_proj_dim=width if image else None,
        )
        converted = single_file_utils.convert_wan_transformer_to_diffusers(copy)
    else:
        width, text = state["txt_in.input_embedder.weight"].shape
        network = diffusers.HunyuanVideoTransformer3DModel(
            num_attention_heads=width // 128,
            attention_head_dim=128,
            num_layers=sum(name.endswith(".img_mod.linear.bias") for name in state),
            num_single_layers=sum(name.endswith(".linear1.bias") for name in state),
            num_refiner_layers=2,
            text_embed_dim=text,
            pooled_projection_dim=768,
        )
        converted = to_diffusers(copy)
    network.load_state_dict(converted, strict=True)
    return network.to(next(iter(state.values())).dtype)


def diffusers_folder(shard: str | None = None, pipeline: bool = False) -> Writer:
    def write(folder: Path, state: State) -> Written:
        target = folder / "pipeline" / "transformer" if pipeline else folder / "transformer"
        diffusers_model(state).save_pretrained(target, **({"max_shard_size": shard} if shard else {}))
        if pipeline:
            (target.parent / "model_index.json").write_text('{"_class_name": "HunyuanVideoPipeline"}')
        count = len(list(target.glob("*.safetensors")))
        assert (count > 1) == (shard is not None)
        container = f"{count} shards of safetensors" if shard else "safetensors"
        return Written(target.parent if pipeline else target, state, "diffusers", container)

    return write


def diffusers_file(folder: Path, state: State) -> Written:
    """The network's tensors under diffusers' names in one file with a prefix, as `save_file(pipe.transformer.state_dict())`."""
    tensors = diffusers_model(state).state_dict()
    save_file({f"model.{name}": tensor.contiguous() for name, tensor in tensors.items()}, folder / "renamed.safetensors")
    return Written(folder / "renamed.safetensors", state, "diffusers")


def gguf(kind: str, orig_shape: bool = False) -> Writer:
    """gguf's own writer; matrices in `kind` where their rows divide into its blocks, the rest in float32, as converters do.

    orig_shape  4-D and larger tensors are written flat, with their shape beside them; else as they are
    """

    def write(folder: Path, state: State) -> Written:
        import gguf as package

        quantisation = package.GGMLQuantizationType[kind]
        block, width = package.GGML_QUANT_SIZES[quantisation]
        writer = package.GGUFWriter(None, "wan" if "patch_embedding.weight" in state else "hyvid")
        rng = np.random.default_rng(0)
        expected = {}
        for name, tensor in state.items():
            values = tensor.float().numpy()
            expected[name] = tensor.float()
            if tensor.ndim == 2 and tensor.shape[1] % block == 0:
                try:
                    stored = package.quants.quantize(values, quantisation)
                except NotImplementedError:  # K-quants have no writer in Python: blocks of any bytes, scales kept finite
                    stored = rng.integers(0, 60, (len(values), tensor.shape[1] // block * width), np.uint8)
                writer.add_tensor(name, stored, raw_dtype=quantisation)
                expected[name] = torch.from_numpy(package.quants.dequantize(stored, quantisation).copy()).reshape(tensor.shape)
                if kind in ("F16", "BF16"):
                    expected[name] = tensor.half() if kind == "F16" else tensor.bfloat16()
            elif tensor.ndim > 4 and orig_shape:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
                writer.add_tensor(name, values.reshape(len(values), -1), raw_dtype=package.GGMLQuantizationType.F32)
            else:
                writer.add_tensor(name, values, raw_dtype=package.GGMLQuantizationType.F32)
        writer.write_header_to_file(path=folder / "model.gguf")
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        quantised = "" if kind in ("F32", "F16", "BF16") else "gguf"
        return Written(folder / "model.gguf", expected, container="gguf", quantisation=quantised)

    return write


HUNYUAN_WRITERS: Mapping[str, Writer] = {
    "pt bare": pytorch(None),
    "pt module": pytorch("module"),
    "pt ema": pytorch("ema"),
    "pt model": pytorch("model"),
    "pt state_dict": pytorch("state_dict"),
    "pt module and ema": module_and_ema,
    "pt legacy": pytorch("module", legacy=True),
    "tencent fp8": tencent_fp8,
    "plain fp8": plain_fp8,
    "scaled fp8 native": scaled_fp8(),
    "scaled fp8 original": scaled_fp8(native=False),
    "scaled fp8 prefixed": scaled_fp8("model.diffusion_model.", inputs=True, full_precision=False),
    "scaled fp8 blocks only": scaled_fp8("model.model.", everywhere=False),
    "scaled fp8 by rows": rows_scaled_fp8(1),
    "scaled fp8 by blocks": rows_scaled_fp8(4),
    "quantised fp8": quantised_fp8(),
    "quantised fp8 prefixed": quantised_fp8("model.diffusion_model."),
    "quantised fp8 in metadata": quantised_fp8(in_metadata=True),
    "quantised fp8 e5m2": quantised_fp8(dtype=torch.float8_e5m2),
    # Every naming with every prefix is for test_checkpoint.py.
    "original ''": prefixed(""),
    "original 'net.'": prefixed("net."),
    "native 'model.'": prefixed("model.", "weight"),
    "native older scale": prefixed("", "scale"),
    "diffusers folder": diffusers_folder(),
    "diffusers shards": diffusers_folder("1MB"),
    "diffusers pipeline": diffusers_folder(pipeline=True),
    "diffusers file": diffusers_file,
    **{f"gguf {kind}": gguf(kind) for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1")},
    "gguf orig_shape": gguf("Q4_1", orig_shape=True),
}
WAN_WRITERS: Mapping[str, Writer] = {
    "original": prefixed(""),
    "original prefixed": prefixed("model.diffusion_model."),
    "pt bare": pytorch(None),
    "scaled fp8": scaled_fp8(native=False),
    "plain fp8": plain_fp8,
    "diffusers folder": diffusers_folder(),
    "diffusers shards": diffusers_folder("1MB"),
    "gguf Q8_0": gguf("Q8_0"),
    "gguf Q4_K": gguf("Q4_K"),
    "gguf Q6_K": gguf("Q6_K"),
}
