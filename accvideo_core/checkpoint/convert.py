"""`accvideo convert`: a checkpoint in any layout written in another, tensor by tensor.

Values are restored to what the format means and rounded once to the dtype asked for; where layout and dtype allow it, they are
the stored bytes. Scaled fp8 is written in ComfyUI's older form, which all its versions read: every Linear's weight with a scale
of its own, because ComfyUI 0.3 casts every Linear of such a file to fp8, and with products in full precision.
"""

from __future__ import annotations

import itertools
import json as json_module
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from ..errors import InvalidValueError, OutputError
from ..files import atomic_path, check_output, output_error, sync_folder
from ..progress import byte_progress
from .config import NetworkConfig
from .containers import input_files
from .layouts import COMFYUI_NATIVE, HUNYUAN_DIFFUSERS, ORIGINAL, Layout, some
from .quantised import MARKER, QUANTISATION_METADATA, cast, check_finite, quantise_fp8, scale_name
from .reader import Checkpoint, open_checkpoint
from .safetensors_file import check_suffix, stream_safetensors
from .wan import WAN_DIFFUSERS, WAN_ORIGINAL, WanConfig

LayoutName = Literal["original", "comfyui", "diffusers"]
DtypeName = Literal["stored", "bf16", "fp16", "fp32", "fp8_e4m3fn", "scaled_fp8"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LAYOUTS: dict[tuple[str, bool], Layout] = {  # (layout, whether it is Wan's)
    ("original", False): ORIGINAL,
    ("comfyui", False): COMFYUI_NATIVE,
    ("diffusers", False): HUNYUAN_DIFFUSERS,
    ("original", True): WAN_ORIGINAL,
    ("comfyui", True): WAN_ORIGINAL,
    ("diffusers", True): WAN_DIFFUSERS,
}
_WEIGHTS = "diffusion_pytorch_model"  # as diffusers names its files
_IN_FOLDER = re.compile(rf"config\.json|{_WEIGHTS}(-\d{{5,}}-of-\d{{5,}})?\.safetensors|{_WEIGHTS}\.safetensors\.index\.json")
Entry = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class ConvertReport:
    """path written, bytes of tensors in it, number of files and tensors, notes on what a user should know."""

    path: Path
    bytes: int
    files: int
    tensors: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Target:
    """What one original tensor becomes: `mode` one of cast, fp8, scale, keep; `dtype` of its values."""

    mode: Literal["cast", "fp8", "scale", "keep"]
    dtype: torch.dtype


def convert(
    source: str | Path,
    out: str | Path,
    layout: LayoutName = "original",
    dtype: DtypeName = "stored",
    weights: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Write the checkpoint `source` to `out`: one safetensors file, or for diffusers a folder; all or nothing.

    dtype        stored: nothing is rounded. fp8_e4m3fn: Linear weights cast without scales, the rest as stored. scaled_fp8:
                 Linear weights with a scale each, the rest as stored
    weights      as for `open_checkpoint`
    overwrite    replace an `out` that exists: never one that is an input or holds one, and a folder only if nothing else is in it
                 than what is written here
    shard_bytes  largest file of a diffusers folder
    progress     called with (bytes read, bytes in all)
    Raises InvalidValueError for what no format has, CheckpointError for the source and for values the dtype cannot hold,
    OutputError for the output.
    """
    source, out = Path(source), Path(out)
    if layout == "diffusers" and dtype == "scaled_fp8":
        raise InvalidValueError("diffusers has no scaled fp8; choose --dtype fp8_e4m3fn or bf16, or --layout comfyui")
    with open_checkpoint(source, weights=weights) as checkpoint:
        naming = _LAYOUTS[layout, isinstance(checkpoint.config, WanConfig)]
        targets = {key: _target(checkpoint, key, layout, dtype) for key in checkpoint}
        entries = {name: entry for key in checkpoint for name, entry in _entries(checkpoint, key, naming, targets[key]).items()}
        if any(target.mode in ("scale", "keep") for target in targets.values()):
            entries[MARKER] = (torch.float8_e4m3fn, (2,))
        size = sum(math.prod(shape) * kind.itemsize for kind, shape in entries.values())
        inputs = input_files(source)
        check_output(out, inputs, overwrite, size)
        if out.exists() and out.is_dir() != (layout == "diffusers"):
            raise OutputError(
                f"{str(out)!r} is {'a folder' if out.is_dir() else 'a file'}, the output is not; choose another name"
            )
        if layout == "diffusers":
            _check_folder(out, inputs)
        else:
            check_suffix(out)
        metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("format", QUANTISATION_METADATA)}
        tensors = _tensors(checkpoint, naming, targets, progress)
        if layout == "diffusers":
            files = _write_folder(out, checkpoint.config, entries, tensors, metadata, shard_bytes, overwrite)
        else:
            stream_safetensors(out, entries, tensors, metadata | {"format": "pt"})
            files = 1
        return ConvertReport(out, size, files, len(entries), tuple(checkpoint.notes))


def _target(checkpoint: Checkpoint, key: str, layout: LayoutName, dtype: DtypeName) -> _Target:
    linear = len(checkpoint.shape(key)) == 2 and key.endswith(".weight")
    own = checkpoint.dtype(key)
    if dtype in _DTYPES:
        return _Target("cast", _DTYPES[dtype])
    if dtype == "stored":
        if not checkpoint.is_quantised(key):
            return _Target("cast", own)
        kept = checkpoint.scaled_linear(key) is not None and checkpoint.stored_dtype(key) == torch.float8_e4m3fn
        if not kept or layout == "diffusers":
            raise InvalidValueError(
                f"{checkpoint.path} is quantised ({checkpoint.quantisation}) and cannot be kept so in the {layout} layout; "
                "choose a --dtype, for example bf16"
            )
        return _Target("keep", torch.float8_e4m3fn)
    if not linear:
        # What is small is not worth rounding; what was cast to fp8 without a scale stays as it is.
        return _Target("cast", own)
    return _Target("fp8" if dtype == "fp8_e4m3fn" else "scale", torch.float8_e4m3fn)


def _entries(checkpoint: Checkpoint, key: str, naming: Layout, target: _Target) -> dict[str, Entry]:
    """{stored name: (dtype, shape)} of everything one original tensor becomes."""
    shape, names = checkpoint.shape(key), naming.stored(key)
    out: dict[str, Entry] = {
        name: (target.dtype, (rows, *shape[1:]) if len(names) > 1 else shape)
        for name, rows in zip(names, _rows(checkpoint.config, shape, len(names)), strict=True)
    }
    if target.mode in ("scale", "keep"):
        out[scale_name(names[0])] = (torch.float32, ())
    return out


def _rows(config: NetworkConfig, shape: tuple[int, ...], parts: int) -> list[int]:
    """Rows of each part: as many as the network is wide, and the last the rest."""
    if parts == 1:
        return [shape[0] if shape else 1]
    return [config.hidden_size] * (parts - 1) + [shape[0] - config.hidden_size * (parts - 1)]


def _tensors(
    checkpoint: Checkpoint, naming: Layout, targets: Mapping[str, _Target], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    done, total = 0, sum(checkpoint.nbytes(key) for key in checkpoint)
    if any(target.mode in ("scale", "keep") for target in targets.values()):
        yield MARKER, torch.zeros(2).to(torch.float8_e4m3fn)
    for key in checkpoint:
        target, names = targets[key], naming.stored(key)
        if target.mode in ("scale", "keep"):
            values, scale = _with_scale(checkpoint, key, target)
            yield scale_name(names[0]), scale
        else:
            values = cast(checkpoint.read(key), target.dtype, f"{checkpoint.path}: {key}")
        if naming.is_swapped(key):
            values = torch.cat(values.chunk(2)[::-1])
        rows = _rows(checkpoint.config, tuple(values.shape), len(names))
        yield from zip(names, values.split(rows) if len(names) > 1 else (values,), strict=True)
        done += checkpoint.nbytes(key)
        if progress is not None:
            progress(done, total)


def _with_scale(checkpoint: Checkpoint, key: str, target: _Target) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp8 values, scale); a weight that has one scale already keeps both."""
    scaled, name = checkpoint.scaled_linear(key), f"{checkpoint.path}: {key}"
    if scaled is not None and checkpoint.stored_dtype(key) == target.dtype:
        return check_finite(checkpoint.read_stored(key), name), scaled.scale.reshape(())
    return quantise_fp8(checkpoint.read(key), target.dtype, name)


def _write_folder(
    out: Path,
    config: NetworkConfig,
    entries: Mapping[str, Entry],
    tensors: Iterator[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
    shard_bytes: int,
    overwrite: bool,
) -> int:
    """A diffusers folder: written beside `out` under another name, then renamed. Returns the number of weight files."""
    shards = list(_shards(entries, shard_bytes))
    files = [f"{_WEIGHTS}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{_WEIGHTS}.safetensors"]
    temporary = out.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
        for file, names in zip(files, shards, strict=True):
            inside = {name: entries[name] for name in names}
            # The tensors come in the order of `entries`, so a shard's come together.
            stream_safetensors(temporary / file, inside, itertools.islice(tensors, len(names)), {**metadata, "format": "pt"})
        if len(files) > 1:
            total = sum(math.prod(shape) * kind.itemsize for kind, shape in entries.values())
            homes = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
            _write_json(temporary / f"{_WEIGHTS}.safetensors.index.json", index)
        _write_json(temporary / "config.json", diffusers_config(config))
        _move_folder(temporary, out, overwrite)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {str(out)!r}: {error.strerror or error}; choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(files)


def _shards(entries: Mapping[str, Entry], shard_bytes: int) -> Iterator[tuple[str, ...]]:
    """Stored names in groups of at most `shard_bytes` (or one larger tensor), in the order the tensors come."""
    if shard_bytes < 1:
        raise InvalidValueError(f"shards of {shard_bytes} bytes; give at least 1")
    group: list[str] = []
    size = 0
    for name, (dtype, shape) in entries.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if group and size + nbytes > shard_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(name)
        size += nbytes
    yield tuple(group)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json_module.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def _check_folder(out: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputError, before any work, unless the folder `out` may be replaced as a whole: no input lies in it, and nothing
    else than what is written here."""
    if out.name in ("", ".."):
        raise OutputError(f"the output {str(out)!r} has no name of its own; give the folder's name")
    if not out.exists():
        return
    for path in inputs:
        # Where it is a link: neither that nor what it leads to.
        above = {folder for place in (path.parent.resolve() / path.name, path.resolve()) for folder in place.parents}
        if any(os.path.samefile(folder, out) for folder in above):
            raise OutputError(
                f"the input {str(path)!r} lies in the output {str(out)!r}, which is replaced as a whole; choose another folder"
            )
    _check_only_ours(out, out)


def _check_only_ours(folder: Path, out: Path) -> None:
    """OutputError if a folder, which is that of `out`, holds what `_write_folder` does not write."""
    try:
        others = sorted(path.name for path in folder.iterdir() if not (_IN_FOLDER.fullmatch(path.name) and path.is_file()))
    except OSError as error:
        raise output_error(out, error) from error
    if others:
        raise OutputError(
            f"{str(out)!r} also holds {some(others)}, which would be lost: a diffusers folder is replaced as a whole; move that "
            "elsewhere, or choose another folder"
        )


def _move_folder(new: Path, out: Path, overwrite: bool) -> None:
    """Give a whole folder its name. One that has it is moved aside and looked at again, since something may have come into it
    meanwhile; it goes when the new one's name is on the disk."""
    old = out.with_name(f".{secrets.token_hex(8)}.tmp") if overwrite and out.exists() else None
    if old is not None:
        os.replace(out, old)
    try:
        if old is not None:
            _check_only_ours(old, out)
        os.replace(new, out)
    except BaseException:
        if old is not None:
            os.replace(old, out)
        raise
    sync_folder(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def diffusers_config(config: NetworkConfig) -> dict[str, Any]:
    """`config.json` as diffusers writes it for this network."""
    heads = {"num_attention_heads": config.num_heads, "attention_head_dim": config.hidden_size // config.num_heads}
    channels = {"in_channels": config.in_channels, "out_channels": config.out_channels}
    if isinstance(config, WanConfig):
        return {
            "_class_name": "WanTransformer3DModel",
            **heads,
            **channels,
            "num_layers": config.num_layers,
            "ffn_dim": config.ffn_dim,
            "text_dim": config.text_dim,
            "freq_dim": config.freq_dim,
            "patch_size": list(config.patch_size),
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "image_dim": config.image_dim,
            "added_kv_proj_dim": None if config.image_dim is None else config.hidden_size,
            "rope_max_seq_len": 1024,
        }
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        **heads,
        **channels,
        "num_layers": config.depth_double,
        "num_single_layers": config.depth_single,
        "num_refiner_layers": config.refiner_depth,
        "mlp_ratio": config.mlp_ratio,
        "patch_size": config.patch_size[1],
        "patch_size_t": config.patch_size[0],
        "qk_norm": "rms_norm",
        "guidance_embeds": config.guidance_embed,
        "text_embed_dim": config.text_dim,
        "pooled_projection_dim": config.pooled_dim,
        "rope_theta": config.rope_theta,
        "rope_axes_dim": list(config.rope_dims),
    }


@dataclass(frozen=True)
class ConvertArgs:
    """Write a checkpoint in another layout or dtype, tensor by tensor."""

    file: tyro.conf.Positional[Path]
    """The weights, in any layout `accvideo inspect` reads."""
    out: tyro.conf.Positional[Path]
    """What to write: a safetensors file; for diffusers a folder."""
    layout: LayoutName = "original"
    """original: Tencent's (Wan's own) names, which ComfyUI reads too. comfyui: ComfyUI's names. diffusers: a folder for it."""
    dtype: DtypeName = "stored"
    """stored: nothing is rounded. fp8_e4m3fn: Linear weights cast without scales. scaled_fp8: Linear weights, a scale each."""
    weights: str | None = None
    """Which network of a .pt file that holds several: module (the default), ema, ..."""
    overwrite: bool = False
    """Replace an output that exists; a folder only if it holds nothing else than a network as diffusers has it."""
    shard_gb: float = 5.0
    """Largest file of a diffusers folder, in GB of 10^9 bytes."""
    json: bool = False
    """Print JSON instead of text."""


def run(args: ConvertArgs) -> int:
    """Convert and print what was written; 0. Errors as `convert` raises them."""
    if not (math.isfinite(args.shard_gb) and args.shard_gb * 1e9 >= 1):
        raise InvalidValueError(f"--shard-gb {args.shard_gb:g} is no size of a file; choose a number of GB above 0, 5 for most")
    with byte_progress("converting") as progress:
        report = convert(
            args.file, args.out, args.layout, args.dtype, args.weights, args.overwrite, int(args.shard_gb * 1e9), progress
        )
    if args.json:
        values = {"path": str(report.path), "bytes": report.bytes, "files": report.files, "tensors": report.tensors}
        print(json_module.dumps(values | {"notes": list(report.notes)}))
    else:
        for note in report.notes:
            print(f"note: {note}")
        print(f"{report.path}: {report.tensors} tensors, {report.bytes / 1e6:,.1f} MB in {report.files} file(s)")
    return 0
