"""`accvideo sample`: the videos of a plan as latents, on one GPU or many, for ComfyUI to decode.

torchrun's processes divide the plan; with `--sequence` groups of them share each video's tokens (`dit/sequence.py`), and with
`--shard` all of them the network's weights. However many there are, and whatever the batch, a video depends on its own seed and
prompt alone. A plan is sampled as often as is needed until all of its latents are there, and no latent is made twice.
"""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .. import __version__
from ..devices import synchronize
from ..distill.adapters import Adapter, adapter_for
from ..distill.parallel import World
from ..dit.attention import AUTO, KERNELS, check
from ..dit.fp8 import Linears, set_linears
from ..errors import InvalidValueError
from ..files import atomic_path, check_writable
from ..sampling import euler_flow, make_noise
from ..schedule import get_preset
from ..synvid.capture import PATIENCE, batches, pad_texts
from ..synvid.plan import Plan, PlanItem
from ..tiny import LATENT_SCALE
from .models import BUNDLED, Precision, find_network, load_network

EXACT = "exact"  # what a latent says of its attention unless a lossy kernel computed it


@dataclass(frozen=True)
class SampleArgs:
    """Sample the videos of a plan (accvideo encode) into latents, which ComfyUI's LoadLatent reads from its input folder.

    On several GPUs: torchrun --nproc-per-node 8 -m -- accvideo_core sample ... --sequence 4"""

    plan: tyro.conf.Positional[Path]
    """The plan's folder (accvideo encode)."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write <id>.latent into. Those that are there already are kept."""
    student: str = BUNDLED
    """The student's weights in any layout `accvideo inspect` reads, or tiny for the bundled student."""
    teacher: bool = False
    """Use the bundled teacher instead of the student, or take the file for a teacher: 50 steps by default."""
    steps: int | None = None
    """Sampling steps; default 5, for a teacher 50."""
    shift: float | None = None
    """Time shift of the schedule; default 7."""
    guidance: float | None = None
    """Embedded guidance; default 6."""
    batch: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 1
    """Videos at a time, in each process or group of them."""
    sequence: int = 1
    """Processes that share each video's tokens, so that one is done sooner; must divide the processes and the heads."""
    shard: bool = False
    """Spread the weights over all processes, for a network too large for one GPU: slower, each block is gathered at each step."""
    compile: bool = False
    """Compile the blocks: faster from the second step on, after minutes for the first."""
    device: str = "auto"
    """cpu, cuda, mps, or auto; under torchrun each process takes its own GPU."""
    dtype: Precision = "auto"
    """Precision of the network; auto is bfloat16, of the tiny world and on a CPU float32."""
    attention: str = AUTO
    """The attention kernel: auto, the fastest exact one here, or a name that `accvideo inspect` lists."""
    linears: Linears = "exact"
    """Linear layers of the blocks: exact, or fp8, which is lossy, halves the weights' memory and, on GPUs with fp8, is faster."""
    json: bool = False
    """Print what was done as JSON."""


def run(args: SampleArgs) -> int:
    """Sample this process's share; the first process prints what all made. 1 if videos had to be left out."""
    if args.batch < 1:
        raise InvalidValueError(f"batch is {args.batch}; it must be at least 1")
    if args.shard and args.linears != "exact":
        raise InvalidValueError(f"linears is {args.linears!r}, whose weights are not sharded; leave out --shard, or choose exact")
    plan = Plan(args.plan)
    file, family = find_network(args.student, "teacher" if args.teacher else "student")
    preset, adapter = get_preset(family), adapter_for(family)
    if preset.solver != "euler":
        raise InvalidValueError(f"{args.student} is of the family {family}, sampled with {preset.solver}; sample it in ComfyUI")
    steps = (preset.teacher_steps if args.teacher else preset.steps) if args.steps is None else args.steps
    sigmas = preset.sigmas(steps, args.shift)
    with World.start(args.sequence, None if args.device == "auto" else args.device, PATIENCE) as world:
        check(args.attention, world.device)
        check_writable(args.out / "0.latent")
        precision: Precision = "float32" if args.dtype == "auto" and family == "tiny" else args.dtype
        network = load_network(adapter, file, torch.device("cpu") if args.shard else world.device, precision, args.attention)
        guidance = adapter.guidance(network, args.guidance)
        recipe = {
            "model": file.name,
            "fingerprint": adapter.fingerprint(network),
            "steps": steps,
            "shift": preset.shift if args.shift is None else args.shift,
            "guidance": guidance,
            "linears": args.linears,
            "attention": args.attention if args.attention != AUTO and KERNELS[args.attention].lossy else EXACT,
        }
        items = _missing(plan, args.out, recipe, world)
        if items:
            adapter.check_text(network, *plan.text(items[0].text))
        _spread(network, adapter, args, world)
        start, faults, made = time.perf_counter(), list[str](), 0
        with tqdm(total=len(items), desc="sampling", unit="video", disable=args.json or not world.is_main, leave=False) as bar:
            for group, wanted in _shares(list(batches(items, args.batch)), world, args.shard):
                latents = _sample(adapter, network, plan, group, sigmas, guidance, world.device)
                if wanted:
                    found = _write(args.out, group, latents, recipe, world.sequence_rank == 0)
                    faults, made = faults + found, made + len(group) - len(found)
                bar.update(len(group) * world.data_size)
        synchronize(world.device)
        made, faults = _together(made, faults, world)
        return _report(args, plan, made, faults, time.perf_counter() - start) if world.is_main else int(bool(faults))


def _spread(network: nn.Module, adapter: Adapter, args: SampleArgs, world: World) -> None:
    """Round, divide the tokens and the weights, and compile, as asked."""
    set_linears(network, args.linears)
    world.split_sequence(network)
    if args.compile:
        for name in adapter.block_names(network):
            network.get_submodule(name).compile()
    if args.shard:
        world.shard(network, adapter.block_names(network))


def _missing(plan: Plan, out: Path, recipe: dict[str, Any], world: World) -> list[PlanItem]:
    """What the folder lacks of the plan, the same in every process whoever comes late: the first one looks and tells the others.

    InvalidValueError if it holds a latent of this plan that was made otherwise.
    """
    items = list(plan.items.values())
    wanted = torch.zeros(len(items), dtype=torch.bool)
    if world.is_main:
        wanted = torch.tensor([not _is_there(out, item, recipe) for item in items], dtype=torch.bool)
    if world.mesh is not None:
        dist.broadcast(wanted, 0)
    return [item for item, lacks in zip(items, wanted.tolist(), strict=True) if lacks]


def _is_there(out: Path, item: PlanItem, recipe: dict[str, Any]) -> bool:
    path = out / f"{item.id}.latent"
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            found = {"attention": EXACT, **json_module.loads((file.metadata() or {})["accvideo"])}  # which earlier ones left out
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InvalidValueError(f"{path} is no latent of this command's ({error}); choose another folder") from error
    now = {**recipe, "prompt": item.prompt, "seed": item.seed, "shape": list(item.shape)}
    if changed := [name for name, value in now.items() if found.get(name) != value]:
        told = ", ".join(f"{name} {found.get(name)!r} there, {now[name]!r} now" for name in changed)
        raise InvalidValueError(f"{path} was made otherwise: {told}; choose another folder, or the same settings to go on")
    return True


def _shares(groups: list[list[PlanItem]], world: World, together: bool) -> Iterator[tuple[list[PlanItem], bool]]:
    """(a batch, whether its result is wanted) for this process. Where every pass is made `together`, as with sharded weights,
    who has no batch left goes through another's once more."""
    rounds = range(0, len(groups), world.data_size)
    for start in rounds:
        index = start + world.data_rank
        if index < len(groups):
            yield groups[index], True
        elif together:
            yield groups[0], False


@torch.no_grad()
def _sample(
    adapter: Adapter,
    network: nn.Module,
    plan: Plan,
    items: Sequence[PlanItem],
    sigmas: Tensor,
    guidance: float | None,
    device: torch.device,
) -> Tensor:
    """(B, C, T, H, W) float32 in model space."""
    told = adapter.conditioning(pad_texts([plan.text(item.text) for item in items]), guidance).to(device)
    noise = make_noise((len(items), *items[0].shape), [item.seed for item in items])
    return euler_flow(lambda x, sigma: adapter.velocity(network, x, sigma, told), noise.to(device), sigmas)


def _write(out: Path, items: Sequence[PlanItem], latents: Tensor, recipe: dict[str, Any], writes: bool) -> list[str]:
    """The latents as ComfyUI's SaveLatent writes them, in the VAE's own space; what is wrong with those left out."""
    faults = []
    for item, latent in zip(items, latents.cpu(), strict=True):
        if not latent.isfinite().all():
            faults.append(f"{item.id} has values that are not finite; choose another --dtype")
        elif writes:
            told = {**recipe, "prompt": item.prompt, "seed": item.seed, "shape": list(item.shape), "accvideo": __version__}
            tensors = {"latent_tensor": latent[None] / LATENT_SCALE, "latent_format_version_0": torch.tensor([])}
            with atomic_path(out / f"{item.id}.latent") as temporary:
                save_file(tensors, temporary, metadata={"accvideo": json_module.dumps(told)})
    return faults


def _together(made: int, faults: list[str], world: World) -> tuple[int, list[str]]:
    """What all processes made and left out, each video counted once; waits for all."""
    if world.mesh is None:
        return made, faults
    own = (made, faults) if world.sequence_rank == 0 else (0, [])
    gathered: list[Any] = [None] * world.size
    dist.all_gather_object(gathered, own)
    return sum(count for count, _ in gathered), [fault for _, found in gathered for fault in found]


def _report(args: SampleArgs, plan: Plan, made: int, faults: list[str], seconds: float) -> int:
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    there = len(plan.items) - len(faults)
    if args.json:
        told = {"folder": str(args.out), "latents": there, "new": made, "left_out": faults, "seconds": round(seconds, 3)}
        print(json_module.dumps(told))
    else:
        print(f"{args.out}: {there} latents, {made} of them new in {seconds:.1f} s, {len(faults)} left out")
    return 1 if faults else 0
