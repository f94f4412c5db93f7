"""`accvideo distill`: a student from a SynVid dataset, alone or as one of many processes that torchrun starts.

Started again it goes on from the newest checkpoint in its folder.
"""

from __future__ import annotations

import difflib
import json as json_module
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from ..checkpoint import open_checkpoint
from ..distill.adapters import adapter_for
from ..distill.config import TrainConfig
from ..distill.memory import explained
from ..distill.on_policy import Continuation
from ..distill.parallel import World
from ..distill.report import Console, TensorBoard
from ..distill.source import Judged, SynVidSource, check_schedule, split
from ..distill.state import newest as newest_checkpoint
from ..distill.state import step_of
from ..distill.trainer import Observer, Show, Trainer
from ..distill.validation import labels_of, write_sheet
from ..errors import InvalidValueError
from .models import BUNDLED, find_network, load_vae

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class DistillArgs(TrainConfig):
    """Distil a student from a teacher's trajectories. Run it again with the same --out to go on where it stopped.

    On several GPUs: torchrun --nproc-per-node 8 -m -- accvideo_core distill ... (on several machines, with torchrun's
    --nnodes and --rdzv-endpoint). Fields can stand in a --config file, TOML or JSON, named as below with underscores; the
    command line overrides it."""

    config: Path | None = None
    """File with values for any of these."""
    dataset: str | None = None
    """The SynVid dataset, a folder or any fsspec address."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder of the run: config.json, checkpoints, sheets, TensorBoard, best.safetensors and student.safetensors."""
    teacher: str = BUNDLED
    """The teacher the dataset was captured with, in any layout `accvideo inspect` reads, or tiny for the bundled one."""
    student: str | None = None
    """Weights to begin with; default: the teacher's."""
    verdicts: Path | None = None
    """File of verdicts on the samples, JSON lines with "id" and "accepted": the heads are to call accepted trajectories real, and
    fake rejected ones as well as what the student makes."""
    held_out: int = 16
    """Samples set aside for validation; 0 for none. Of all processes together, and a multiple of them."""
    any_schedule: bool = False
    """Train at the dataset's key sigmas, though students of its family are sampled at others."""
    sequence: int = 1
    """Processes that share each sample's tokens, for videos too long for one GPU."""
    vae: str | None = None
    """VAE for contact sheets: a folder, tiny, or none, which shows latents as colours; default: tiny for its own family, else
    none."""
    tensorboard: bool = True
    """Whether to write scalars and contact sheets for TensorBoard."""
    log_every: int = 10
    """Iterations between lines on the console."""
    device: str = "auto"
    """cpu, cuda, mps, or auto; under torchrun each process takes its own GPU."""
    json: bool = False
    """Print what was made as JSON, and nothing else."""


def defaults(words: Sequence[str]) -> DistillArgs | None:
    """What the --config file among the command's words says, for the command line to override; None without one.
    Values are taken as the command line takes them, and refused as it refuses them."""
    path = _file_of(words)
    if path is None:
        return None
    try:
        content = path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows' editors put first
        found = json_module.loads(content) if path.suffix == ".json" else tomllib.loads(content)
        if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
            raise ValueError("it must hold names and values, no tables")
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"cannot read the configuration {str(path)!r} ({error}); give a TOML or JSON file") from error
    known = {item.name: item for item in fields(DistillArgs)}
    if unknown := sorted(set(found) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise InvalidValueError(
            f"{path}: there is nothing named {', '.join(unknown)} to choose" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return tyro.cli(
        DistillArgs,
        prog=f"accvideo distill ({path})",
        args=[word for name, value in found.items() for word in _words(known[name], value)],
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _file_of(words: Sequence[str]) -> Path | None:
    """`--config FILE` or `--config=FILE` among the words."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--config" and (value if equals else after):
            return Path(value if equals else after)
    return None


def _words(item: Field[Any], value: Any) -> list[str]:
    """A value of a configuration file as the command line has it."""
    name = item.name.replace("_", "-")
    if not isinstance(item.default, bool):
        return [] if value is None else [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    if not isinstance(value, bool):
        raise InvalidValueError(f"{item.name} is {value!r}; it must be true or false")
    return [] if value == item.default else [f"--{name}" if value else f"--no-{name}"]


def run(args: DistillArgs) -> int:
    """Train, and print where the student is."""
    if args.dataset is None or args.out is None:
        raise InvalidValueError("a run needs a dataset and a folder; give --dataset and --out, or name them in the --config file")
    if args.verdicts is not None and not args.adversarial_weight:
        raise InvalidValueError("verdicts are for the heads, and adversarial_weight is 0; set it, or leave the verdicts out")
    if args.verdicts is None and args.rejected_share != TrainConfig.rejected_share:
        raise InvalidValueError(
            f"rejected_share is {args.rejected_share}, and without --verdicts no trajectory is rejected; give them, too"
        )
    with World.start(args.sequence, None if args.device == "auto" else args.device) as world:
        trainer = build(args, args.dataset, args.out, world)
        trainer.run()
        if world.is_main:
            made = {"student": str(args.out / "student.safetensors"), "best": trainer.best, "iterations": args.iterations}
            print(json_module.dumps(made) if args.json else f"{made['student']}: the student after {args.iterations} iterations")
    return 0


def build(args: DistillArgs, dataset: str, out: Path, world: World) -> Trainer:
    """The run that the arguments describe. Raises before anything is written: SynVidError for a dataset that does not fit,
    CheckpointError for weights that do not."""
    config = TrainConfig(**{item.name: getattr(args, item.name) for item in fields(TrainConfig)})
    world.rows(config.batch)  # divides, or this raises
    if args.held_out % world.data_size:
        raise InvalidValueError(
            f"held_out is {args.held_out}, which does not divide among {world.data_size} data-parallel processes; choose a "
            f"multiple of {world.data_size}, or 0 for no validation"
        )
    training, aside = split(dataset, args.held_out, args.seed)
    header = training.header
    if not args.any_schedule:
        check_schedule(header)
    path, family = find_network(args.teacher, "teacher")
    adapter = adapter_for(family)
    going_on = None
    if config.on_policy_weight:
        going_on = Continuation.of(adapter, training.reader, config.on_policy_steps, config.on_policy_keys)
    with explained(config, world):
        dtype = None if world.device.type == "cuda" and config.precision != "float32" else torch.float32
        teacher = adapter.load(path, dtype=dtype)
        adapter.check_header(header, teacher, adapter.fingerprint(teacher))
        adapter.check_text(teacher, *training.reader.text(training.samples[0].text))
        student = adapter.load(args.student or path, dtype=dtype)
        source = SynVidSource(training, config.batch, config.seed, world.data_rank, world.data_size)
        judged, held_out = None, None
        if args.verdicts is not None:
            judged = Judged.of(args.verdicts, dataset, training, config.batch, config.seed, world.data_rank, world.data_size)
        if aside is not None:
            held_out = SynVidSource(aside, args.held_out, config.seed, world.data_rank, world.data_size)
        observers, show = _reporting(args, family, out, held_out, world)
        with open_checkpoint(path) as checkpoint:  # the tiny world's networks name the encoders they were made with
            made_from = {part: checkpoint.metadata[part] for part in ("encoder", "text_encoder") if part in checkpoint.metadata}
        told = {"family": family, "dataset": training.digest, "teacher": header.fingerprint, **made_from}
        if config.lora is not None:
            told["base"] = header.fingerprint if args.student is None else adapter.fingerprint(student)
        return Trainer(
            config, adapter, student, teacher, source, world, out, held_out, judged, going_on, observers, show, metadata=told
        )


def _reporting(
    args: DistillArgs, family: str, out: Path, held_out: SynVidSource | None, world: World
) -> tuple[list[Observer], Show | None]:
    """(observers, what shows validations) of the main process; the others have none."""
    if not world.is_main:
        return [], None
    observers: list[Observer] = [] if args.json else [Console(args.iterations, args.log_every)]
    newest = newest_checkpoint(out / "checkpoints")
    board = TensorBoard(out / "tensorboard", 0 if newest is None else step_of(newest)) if args.tensorboard else None
    if board is not None:
        observers.append(board)
    if held_out is None:
        return observers, None
    where = args.vae or (BUNDLED if family == "tiny" else "none")
    decode = None if where == "none" else load_vae(where, world.device).decode
    labels = labels_of(held_out.batch(0, 0).ids, held_out.prompts)

    def show(done: int, student: Tensor, teacher: Tensor) -> None:
        image = write_sheet(out / "sheets" / f"iteration-{done:06d}.png", student, teacher, labels, decode)
        if board is not None:
            board.image("held out", image, done)

    return observers, show
