"""`accvideo inspect`: what a weight file is, and whether the network in it is whole, finite and alive.

No released 13 B checkpoint could be tried where this project was built, so this is a user's first run with one: names,
sizes, dtypes and schedule from the header alone; with --self-check every value, one tensor in memory at a time; with
--step one step of the network itself.
"""

from __future__ import annotations

import json as json_module
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from ..devices import pick_device
from ..dit import Conditioning, DiTConfig
from ..dit.attention import AUTO, check, usable
from ..errors import InvalidValueError
from ..schedule import PRESETS
from .layouts import some
from .quantised import FLOAT8, all_finite, count_not_finite
from .reader import Checkpoint, load_student, open_checkpoint

_STEP_LATENT = (1, 16, 3, 16, 16)  # 9 frames of 128 x 128
_STEP_TOKENS = 16
# At sigma 1 the velocity is noise minus the clean video's mean, so a working network's output follows the noise.
_ALIVE = 0.3


@dataclass(frozen=True)
class InspectArgs:
    """Say what a weight file is and what is wrong with it. Exit code 1 if anything is."""

    file: tyro.conf.Positional[Path]
    """The weights: safetensors, PyTorch's .pt, GGUF, an index of shards or a diffusers folder, in any naming; or a LoRA, or a
    SynVid dataset."""
    self_check: bool = False
    """Also read every value and look for NaN, infinities and tensors that are all zero (reads the whole file)."""
    step: bool = False
    """Also build the network and run one step from pure noise on a small latent without a prompt (needs memory for all of it)."""
    device: str = "cpu"
    """Where --step runs: cpu, cuda, mps. Attention kernels are listed for the GPU where there is one, or for the device named."""
    dtype: Literal["stored", "bf16", "fp16", "fp32"] = "stored"
    """What --step computes in."""
    attention: str = AUTO
    """The attention kernel of --step: auto, the fastest exact one, or a name of the list."""
    weights: str | None = None
    """Which network of a .pt file that holds several: module (the default), ema, ..."""
    json: bool = False
    """Print JSON instead of text."""


def run(args: InspectArgs) -> int:
    """Print the report on `args.file`; 0 if nothing is wrong, 1 otherwise. CheckpointError if it cannot be read at all."""
    device = _best_device() if args.device == "cpu" else pick_device(args.device)
    check(args.attention, pick_device(args.device) if args.step else device)
    with open_checkpoint(args.file, strict=False, weights=args.weights) as checkpoint:
        report = describe(checkpoint)
        head_dim = checkpoint.config.hidden_size // checkpoint.config.num_heads
        report["attention"] = {"device": str(device), "kernels": usable(device, head_dim=head_dim)}
        if args.self_check:
            report["values"], found = check_values(checkpoint)
            report["problems"] += found
        fits, ours = not checkpoint.differences, isinstance(checkpoint.config, DiTConfig)
    if args.step and not ours:
        report["problems"].append("--step was not run: Wan runs in ComfyUI alone")
    elif args.step and fits:
        report["step"], found = one_step(args)
        report["problems"] += found
    elif args.step:
        report["problems"].append("--step was not run: the tensors do not fit the network")
    if args.json:
        # NaN is no JSON; a statistic that is not finite is null and named among the problems.
        print(json_module.dumps(_finite(report), indent=2))
    else:
        print(_as_text(report))
    return 1 if report["problems"] else 0


def _best_device() -> torch.device:
    """A GPU, or the CPU where there is none or it is too full to be asked."""
    try:
        return pick_device("auto")
    except InvalidValueError:
        return torch.device("cpu")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the header alone tells; "problems" is a list of lines, empty for a file that fits its network."""
    preset = PRESETS[checkpoint.family]
    differences = checkpoint.differences
    problems = [f"the tensors do not fit the network: {differences}"] if differences else []
    return {
        "file": str(checkpoint.path),
        "bytes": checkpoint.nbytes_on_disk,
        "container": checkpoint.container,
        "quantisation": checkpoint.quantisation,
        "layout": checkpoint.layout,
        "prefix": checkpoint.prefix,
        "family": checkpoint.family,
        "config": asdict(checkpoint.config),
        "dtypes": dict(checkpoint.encodings),
        "tensors": len(checkpoint.keys()),
        "parameters": checkpoint.parameters,
        "metadata": dict(checkpoint.metadata),
        "notes": list(checkpoint.notes),
        "schedule": {
            "solver": preset.solver,
            "steps": preset.steps,
            "shift": preset.shift,
            "guidance": preset.guidance,
            "sigmas": [round(float(sigma), 6) for sigma in preset.sigmas()],
        },
        "missing": list(differences.missing),
        "unexpected": list(differences.unexpected),
        "misshapen": list(differences.misshapen),
        "problems": problems,
    }


def check_values(checkpoint: Checkpoint) -> tuple[dict[str, Any], list[str]]:
    """Read every tensor once: those with values that are not finite, and those that are zero throughout.

    A zero bias is possible and only listed; a zero weight means a layer that does nothing, and is a problem.
    """
    broken: list[str] = []
    dead: list[str] = []
    zero_biases: list[str] = []
    total = sum(checkpoint.nbytes(key) for key in checkpoint)
    with tqdm(total=total, unit="B", unit_scale=True, desc="self-check", leave=False) as progress:
        for key in checkpoint:
            tensor = checkpoint.read(key)
            if not all_finite(tensor):
                broken.append(f"{key} ({count_not_finite(tensor)} of {tensor.numel()} values)")
            elif not bool((tensor.to(torch.bfloat16) if tensor.dtype in FLOAT8 else tensor).any()):
                (zero_biases if key.endswith(".bias") else dead).append(key)
            progress.update(tensor.numel() * tensor.dtype.itemsize)
    problems = []
    if broken:
        problems.append(f"{len(broken)} tensors have NaN or infinite values: {some(broken)}")
    if dead:
        problems.append(f"{len(dead)} weights are zero throughout: {some(dead)}")
    found = {"tensors_read": len(checkpoint.keys()), "not_finite": broken, "zero_weights": dead, "zero_biases": zero_biases}
    return found, problems


@torch.inference_mode()
def one_step(args: InspectArgs) -> tuple[dict[str, Any], list[str]]:
    """Velocity at pure noise (seed 0) without a word, all zeros: its mean, standard deviation and likeness to the noise.

    The likeness is the correlation of velocity and noise: near 1 for a network that works, near 0 for one whose weights
    went to the wrong places.
    """
    dtype = {"stored": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    device = pick_device(args.device)
    network = load_student(args.file, device=device, dtype=dtype, weights=args.weights, mapped=True)
    generator = torch.Generator("cpu").manual_seed(0)
    c = network.config
    noise = torch.randn(_STEP_LATENT, generator=generator)
    conditioning = Conditioning(
        # As ComfyUI's ConditioningZeroOut: no encoder is needed, and random numbers are further from what one gives.
        text=torch.zeros(1, _STEP_TOKENS, c.text_dim),
        pooled=torch.zeros(1, c.pooled_dim),
        guidance=torch.full((1,), 6.0) if c.guidance_embed else None,
    )
    network.attention_kernel = args.attention
    velocity = network(noise.to(device), torch.ones(1, device=device), conditioning.to(device)).float().cpu()
    finite = bool(torch.isfinite(velocity).all())
    likeness = float(torch.corrcoef(torch.stack([velocity.flatten(), noise.flatten()]))[0, 1])
    stats = {
        "latent": list(_STEP_LATENT),
        "dtype": str(network.dtype).removeprefix("torch."),
        "attention": network.attention_ran,
        "mean": float(velocity.mean()),
        "std": float(velocity.std()),
        "finite": finite,
        "likeness_to_noise": likeness,
    }
    problems = []
    if not finite:
        problems.append("one step gives values that are NaN or infinite; try --dtype bf16 or fp32")
    elif not likeness >= _ALIVE:
        problems.append(
            f"one step does not follow the noise (correlation {likeness:.2f}, a working network is above {_ALIVE}): "
            "the weights are untrained, damaged or quantised with scales that are not in the file"
        )
    return stats, problems


def _as_text(report: dict[str, Any]) -> str:
    schedule = report["schedule"]
    guided = "" if schedule["guidance"] is None else f", guidance {schedule['guidance']:g}"
    lines = [
        f"file        {report['file']} ({report['bytes'] / 1e6:,.1f} MB)",
        f"container   {report['container']}" + (f", {report['quantisation']}" if report["quantisation"] else ""),
        f"layout      {report['layout']}" + (f", prefix {report['prefix']}" if report["prefix"] else ""),
        f"family      {report['family']}",
        f"network     {_network(report['config'])}",
        f"parameters  {report['parameters']:,} in {report['tensors']} tensors",
        "dtypes      " + ", ".join(f"{dtype} x {count}" for dtype, count in report["dtypes"].items()),
        f"schedule    {schedule['solver']}, {schedule['steps']} steps, shift {schedule['shift']:g}{guided}, sigmas "
        + " ".join(f"{sigma:.5g}" for sigma in schedule["sigmas"]),
    ]
    lines += [f"metadata    {key}: {_shortened(value)}" for key, value in report["metadata"].items()]
    lines += [f"note        {note}" for note in report["notes"]]
    kernels = report["attention"]["kernels"]
    runs = ", ".join(f"{name} ({told})" for name, told in kernels.items() if not told.startswith("no: "))
    lines.append(f"attention   on {report['attention']['device']}: {runs}")
    lines += [f"            not {name}: {told[4:]}" for name, told in kernels.items() if told.startswith("no: ")]
    if "values" in report:
        values = report["values"]
        lines.append(f"values      {values['tensors_read']} tensors read")
        if values["zero_biases"]:
            lines.append(f"note        {len(values['zero_biases'])} biases are zero throughout: {some(values['zero_biases'])}")
    if "step" in report:
        step = report["step"]
        lines.append(
            f"one step    mean {step['mean']:.4f}, std {step['std']:.4f}, finite {'yes' if step['finite'] else 'no'}, "
            f"correlation with the noise {step['likeness_to_noise']:.3f} ({step['dtype']}, attention by {step['attention']})"
        )
    lines += [f"PROBLEM     {problem}" for problem in report["problems"]] or ["ok          nothing wrong found"]
    return "\n".join(lines)


def _network(config: dict[str, Any]) -> str:
    sizes = f"width {config['hidden_size']}, {config['num_heads']} heads, "
    if "num_layers" in config:
        image = "" if config["image_dim"] is None else f", image tokens {config['image_dim']}"
        return f"{sizes}{config['num_layers']} blocks, text {config['text_dim']}, {config['in_channels']} channels in{image}"
    guidance = "guidance embedded" if config["guidance_embed"] else "no guidance embedding"
    blocks = f"{config['depth_double']} double + {config['depth_single']} single blocks"
    return f"{sizes}{blocks}, text {config['text_dim']}, pooled {config['pooled_dim']}, {guidance}"


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
