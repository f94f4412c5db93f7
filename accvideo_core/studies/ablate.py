"""`accvideo ablate`: what each part of the method is worth on the tiny world, at equal updates of the student.

Every arm and seed leaves a JSON of its own, so that the study can be stopped and goes on; the table and the figure are made of
what is there.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from ..checkpoint import load_student
from ..devices import pick_device, synchronize
from ..distill import state
from ..distill.adapters import Adapter, adapter_for
from ..distill.config import TrainConfig
from ..distill.parallel import World
from ..distill.source import SynVidSource
from ..distill.trainer import Trainer
from ..errors import CheckpointError, InvalidValueError
from ..files import atomic_path, check_writable
from ..synvid import SynVidDataset
from ..tiny import load_text_encoder, load_vae, part_hash, weights_path
from ..tiny.pipeline import PRESET, TinyPipeline
from ..tiny.training import check_made_from
from . import ablation_report, plots
from .arms import ARMS, Arm, ForwardSource, captured, forward_segments
from .exam import Row, read_plan, score_reads
from .fidelity import Made, fidelity, forced, kept, make, plain, plan_hash
from .plans import drawn_plan

RESULT = "result.json"
TOLD = Path("checkpoints") / "told.json"


@dataclass(frozen=True)
class AblateArgs:
    """Train and judge the arms of the ablation, or those that are still to be done. Started again it goes on."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("out/ablate")
    """Folder of the study: captured data, the table, the figure, and for each arm and seed a folder with its result.json and the
    clips it was judged by, frames.npz."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to do."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each arm that is trained."""
    minutes: float = 6.0
    """Of training that the full method takes for an arm and a seed here: the speed is measured once and gives --updates."""
    updates: int | None = None
    """Updates of the student in every arm, instead of --minutes."""
    batch: int = 16
    """Trajectories an update."""
    lr: float = 2e-4
    """Peak learning rate of the students."""
    head_lr: float = 5e-4
    """Peak learning rate of the heads."""
    trajectories: int = 512
    """Trajectories captured to learn from, and samples of either kind of forward diffusion."""
    plan: Path | None = None
    """Prompts and seeds to judge by, as for accvideo evaluate; default: drawn from the tiny world."""
    rows: int = 200
    """Of the plan, the first so many."""
    docs: Path | None = None
    """Also write ablation.md and images/ablation.png into this folder."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    json: bool = False
    """Print the results as JSON."""


@dataclass(frozen=True)
class Study:
    """What all arms share."""

    args: AblateArgs
    device: torch.device
    adapter: Adapter
    teacher: torch.nn.Module
    dataset: SynVidDataset
    rows: list[Row]
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Told:
    """What an arm's training has told: the seconds of every iteration, and the last scalars. It is kept beside the checkpoints,
    written before each, so that an arm that was stopped has the time of all its iterations in the end."""

    seconds: list[float]
    last: dict[str, float]


def run(args: AblateArgs) -> int:
    """Do what is missing, then write and print the table."""
    check(args)
    study = prepare(args)
    wanted: Made | None = None
    for name in args.arms:
        for seed in args.seeds if ARMS[name].config is not None else (0,):
            folder = args.out / name / f"seed-{seed}"
            if read_result(folder / RESULT, study.recipe) is None:
                wanted = wanted or teacher_made(study)
                do(study, name, seed, folder, wanted)
    results = all_results(args.out, study.recipe)
    table = ablation_report.write(args.out, results)
    if args.docs is not None:
        ablation_report.write(args.docs, results, "images")
    print(json.dumps(results, indent=1) if args.json else f"{table}\n{args.out / ablation_report.PICTURE}")
    return 0


def check(args: AblateArgs) -> None:
    """All that can be known before the work."""
    if not args.arms or not args.seeds:
        raise InvalidValueError(f"arms are {args.arms} and seeds {args.seeds}; name at least one of each")
    if unknown := [name for name in args.arms if name not in ARMS]:
        raise InvalidValueError(f"no arm named {', '.join(unknown)}; arms are {', '.join(ARMS)}")
    for name in ("batch", "trajectories", "updates"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InvalidValueError(f"{name} is {value}; it must be at least 1")
    if args.rows < 2 or not (args.minutes > 0 and math.isfinite(args.minutes)):
        raise InvalidValueError(f"rows is {args.rows} and minutes {args.minutes}; give at least 2 rows and more than 0 minutes")
    if args.batch > args.trajectories:
        raise InvalidValueError(f"a batch of {args.batch} from {args.trajectories} trajectories; choose a smaller batch")
    plots.new_figure(1, 1)
    for folder, images in ((args.out, ""), *([(args.docs, "images")] if args.docs else [])):
        for path in ablation_report.paths(folder, images):
            check_writable(path)


def prepare(args: AblateArgs) -> Study:
    """Capture the trajectories, and settle what the study is: its recipe is kept, and going on with another is an error."""
    rows = (read_plan(args.plan) if args.plan else drawn_plan(args.rows))[: args.rows]
    if len(rows) < 2:
        raise InvalidValueError(f"the plan {str(args.plan)!r} has {len(rows)} row; intervals need at least 2, better 200")
    device, adapter = pick_device(args.device), adapter_for("tiny")
    teacher = adapter.load(weights_path("teacher"), device, torch.float32).eval().requires_grad_(False)
    dataset = captured(args.out, adapter, teacher, args.trajectories, 0, device, args.json)
    recipe: dict[str, Any] = {name: getattr(args, name) for name in ("batch", "lr", "head_lr", "trajectories", "rows")}
    recipe |= {"plan": plan_hash(rows), "dataset": dataset.digest}
    recipe |= {part: part_hash(part) for part in ("vae", "text_encoder", "teacher")}
    path = args.out / "study.json"
    earlier = read_json(path, "delete it to begin the study anew") if path.exists() else None
    recipe["updates"] = args.updates or (earlier or {}).get("updates")
    study = Study(args, device, adapter, teacher, dataset, rows, recipe)
    if recipe["updates"] is None:
        recipe["updates"] = measured_updates(study)
    if earlier is not None:
        check_made_from(path, earlier, recipe, "choose another --out, or the settings it was begun with")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")
    return study


def config_of(args: AblateArgs, arm: Arm, updates: int, seed: int) -> TrainConfig:
    """The study's settings and those in which the arm differs. Warm-up, decay and the average's horizon follow the length."""
    iterations = arm.iterations(updates)
    return TrainConfig(
        iterations=iterations,
        batch=args.batch,
        seed=seed,
        lr=args.lr,
        head_lr=args.head_lr,
        head_channels=128,
        warmup=max(1, iterations // 10),
        decay="cosine",
        ema=max(0.0, 1 - 5 / iterations),
        save_every=max(1, iterations // 10),
        keep=1,
        **(arm.config or {}),
    )


def source_of(study: Study, arm: Arm, seed: int) -> SynVidSource:
    """What an arm learns from."""
    batch = study.args.batch
    if arm.data == "trajectories":
        return SynVidSource(study.dataset, batch, seed)
    path = study.args.out / f"{arm.data}.safetensors"
    noisy, clean = forward_segments(path, study.dataset, arm.data, study.adapter, study.teacher, 0, study.device, study.args.json)
    return ForwardSource(study.dataset, batch, seed, arm.data, noisy, clean)


def trainer_of(study: Study, arm: Arm, updates: int, seed: int, folder: Path | None, **others: Any) -> Trainer:
    """The run of an arm, from the teacher's weights."""
    config, world = config_of(study.args, arm, updates, seed), World(device=study.device)
    source, student = source_of(study, arm, seed), copy.deepcopy(study.teacher)
    return Trainer(config, study.adapter, student, study.teacher, source, world, folder, **others)


def measured_updates(study: Study, iterations: int = 2) -> int:
    """Updates of the student that the full method does in --minutes here, a whole number of iterations."""
    full = ARMS["full"]
    trainer = trainer_of(study, full, iterations * full.updates, 0, None)
    trainer.iteration(0)
    synchronize(study.device)
    start = time.perf_counter()
    for iteration in range(1, iterations + 1):
        trainer.iteration(iteration)
    synchronize(study.device)
    seconds = (time.perf_counter() - start) / iterations
    return full.updates * max(1, round(60 * study.args.minutes / seconds))


def do(study: Study, name: str, seed: int, folder: Path, wanted: Made) -> None:
    """Train an arm, judge it, keep its result."""
    arm, args, updates = ARMS[name], study.args, study.recipe["updates"]
    network, told = study.teacher, Told([], {})
    if arm.config is not None:
        told, path, config = read_told(folder), folder / TOLD, config_of(args, arm, updates, seed)
        with tqdm(total=arm.iterations(updates), desc=f"{name}, seed {seed}", disable=args.json, leave=False) as bar:

            def observe(done: int, scalars: Mapping[str, float]) -> None:
                bar.update(done - bar.n)
                told.seconds[done - 1 :] = [float(scalars["speed/seconds"])]  # iterations after a checkpoint are done again
                told.last.update({key: float(value) for key, value in scalars.items()})
                if done % config.save_every == 0 or done == config.iterations:  # the checkpoint is next
                    with atomic_path(path) as temporary:
                        temporary.write_text(json.dumps(asdict(told)) + "\n", encoding="utf-8")

            trainer_of(study, arm, updates, seed, folder, observers=[observe]).run()
        network = load_student(folder / "student.safetensors", study.device, torch.float32).eval().requires_grad_(False)
    sigmas, batch = PRESET.sigmas(arm.steps), 50
    pipeline = pipeline_of(study, network, "teacher" if arm.config is None else "student")
    made = make(pipeline, study.rows, sigmas, batch, args.json)
    compared = fidelity(made, wanted, forced(pipeline, study.rows, wanted.first, sigmas, batch), study.rows)
    result = {
        "arm": name,
        "seed": seed,
        "recipe": study.recipe,
        "config": None if arm.config is None else asdict(config_of(args, arm, updates, seed)),
        "seconds": math.fsum(told.seconds),
        "last": told.last,
        "score": score_reads(made.reads, study.rows),
        "to_teacher": plain(compared),
    }
    with atomic_path(folder / "frames.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, frames=made.frames)
    with atomic_path(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # it is done, and they are large


def read_told(folder: Path) -> Told:
    """Of an arm that goes on, or nothing yet. CheckpointError if it is damaged, or lacks what a checkpoint has done."""
    path, cure = folder / TOLD, f"delete {str(folder)!r} to do that arm again"
    told, newest = Told([], {}), state.newest(path.parent)
    if path.exists():
        found = read_json(path, cure)
        told = Told(found.get("seconds", []), found.get("last", {}))
    if newest is not None and len(told.seconds) < state.step_of(newest):
        raise CheckpointError(f"{str(path)!r} lacks the times of iterations before {newest.name}; {cure}")
    return told


def pipeline_of(study: Study, network: Any, which: Any) -> TinyPipeline:
    return TinyPipeline(network, load_text_encoder().to(study.device), load_vae().to(study.device), which)


def teacher_made(study: Study) -> Made:
    """What the teacher makes of the plan in its own steps; kept, because it takes as long as many arms' judging."""
    recipe = {key: str(study.recipe[key]) for key in ("plan", "teacher", "vae")}

    def work() -> Made:
        pipeline = pipeline_of(study, study.teacher, "teacher")
        return make(pipeline, study.rows, PRESET.sigmas(PRESET.teacher_steps), 50, study.args.json)

    return kept(study.args.out / "teacher.safetensors", recipe, work)


def read_result(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """An arm's result, or None if it is to be done. InvalidValueError for one of another study, CheckpointError for a damaged."""
    cure = "delete it to do that arm again"
    if not path.exists():
        return None
    found = read_json(path, cure)
    check_made_from(path, found.get("recipe", {}), dict(recipe), cure)
    return found


def read_json(path: Path, cure: str) -> dict[str, Any]:
    """A file's object; CheckpointError, with the cure, if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {str(path)!r} ({error}); {cure}") from error
    return found


def all_results(folder: Path, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of every arm and seed that is done, in the arms' order."""
    found: list[dict[str, Any]] = []
    for name in ARMS:
        paths: Sequence[Path] = sorted((folder / name).glob(f"seed-*/{RESULT}"), key=lambda p: int(p.parent.name[5:]))
        found += [result for path in paths if (result := read_result(path, recipe)) is not None]
    return found
