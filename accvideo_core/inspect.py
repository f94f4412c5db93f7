"""`accvideo inspect`: a weight file of any kind, or a SynVid dataset, handed to the wing that knows it."""

from __future__ import annotations

import json as json_module
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoint import holds_lora
from .checkpoint.inspect import InspectArgs as CheckpointArgs
from .checkpoint.inspect import run as inspect_checkpoint
from .errors import InvalidValueError, SynVidError
from .files import check_writable


@dataclass(frozen=True)
class InspectArgs(CheckpointArgs):
    """Say what a weight file or a dataset is and what is wrong with it. Exit code 1 if anything is."""

    verify: bool = False
    """Of a SynVid dataset: hash everything again (reads all of it)."""
    withdraw: bool = False
    """With --verify: take damaged latent files back, so that their samples are captured again."""
    sheet: Path | None = None
    """Of a SynVid dataset: write a contact sheet of one trajectory, noise to clean, with a plot of its norm and steps (PNG)."""
    sample: str | None = None
    """The sample --sheet shows, by id; default the first that is whole."""


def run(args: InspectArgs) -> int:
    """Print the report on `args.file`; 0 if nothing is wrong, 1 otherwise. Errors as reading the file raises them."""
    if (args.file / "synvid.json").is_file():
        return _inspect_dataset(args)
    if args.verify or args.withdraw or args.sheet or args.sample:
        raise InvalidValueError(f"{args.file} is no SynVid dataset; --verify, --withdraw, --sheet and --sample are for those")
    if not holds_lora(args.file, args.weights):
        return inspect_checkpoint(args)
    from .lora import describe

    if args.step or args.weights:
        raise InvalidValueError(f"{args.file} is a LoRA; --step and --weights are for whole networks, leave them out")
    return _print(describe(args.file, args.self_check), args.json)


def _inspect_dataset(args: InspectArgs) -> int:
    from .progress import byte_progress
    from .synvid import SynVidReader, SynVidStore
    from .synvid.inspect import describe

    if args.step or args.self_check or args.weights:
        raise InvalidValueError(f"{args.file} is a SynVid dataset; --self-check, --step and --weights are for networks")
    if args.withdraw and not args.verify:
        raise InvalidValueError("--withdraw takes back what --verify finds damaged; give both")
    if args.sheet is not None:
        check_writable(args.sheet)
    if args.sample is not None:
        SynVidReader(args.file).sample(args.sample)
    if args.verify:
        with byte_progress("verifying") as progress:
            report = describe(args.file, True, progress)
    else:
        report = describe(args.file)
    damaged, unsound = report.pop("damaged files"), report.pop("damaged samples")
    if args.sheet is not None:  # before a withdrawal, which may leave nothing to show
        try:
            report["sheet"] = _write_sheet(args, unsound)
        except SynVidError as error:
            report["problems"].append(f"no sheet: {error}")
    if args.withdraw:
        store = SynVidStore(args.file)
        for file in damaged:
            store.withdraw(file)
        report["withdrawn"] = damaged
    return _print(report, args.json)


def _write_sheet(args: InspectArgs, unsound: Collection[str]) -> dict[str, Any]:
    """Decoded by the tiny world's VAE where the latents are its own, else the latents themselves."""
    from .media import write_png
    from .synvid import SynVidReader
    from .synvid.sheet import Decode, key_figures, trajectory_sheet

    assert args.sheet is not None
    reader = SynVidReader(args.file)
    samples = reader.samples()
    if not samples:
        raise InvalidValueError(f"{args.file} holds no samples yet, so there is no trajectory to show")
    sample = reader.sample(args.sample or next((name for name in samples if name not in unsound), next(iter(samples))))
    keys = reader.read_keys(sample, range(reader.header.segments + 1))
    decode: Decode | None = None
    if reader.header.family == "tiny":
        from .tiny import LATENT_SCALE, load_vae
        from .tiny.vae import to_pixels

        vae = load_vae()

        def decode(latent: Any) -> Any:
            return to_pixels(vae.decode(latent[None] / LATENT_SCALE))[0]

    sigmas = reader.header.key_sigmas
    write_png(args.sheet, trajectory_sheet(keys, sigmas, decode, f"{sample.prompt} (seed {sample.seed})"))
    shown = "decoded" if decode else "latents, their three main directions as colours"
    figures = [asdict(figure) for figure in key_figures(keys, sigmas)]
    return {"file": str(args.sheet), "sample": sample.id, "shows": shown, "keys": figures}


def _print(report: dict[str, Any], json: bool) -> int:
    print(json_module.dumps(report, indent=2) if json else _as_text(report))
    return 1 if report["problems"] else 0


def _as_text(report: dict[str, Any]) -> str:
    lines = []
    for name, value in report.items():
        if name == "problems" or value in ({}, []):
            continue
        shown = ", ".join(f"{key}: {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        lines.append(f"{name:<15} {shown if len(shown) <= 400 else f'{shown[:400]}... ({len(value)} in all)'}")
    lines += [f"PROBLEM         {problem}" for problem in report["problems"]] or ["ok              nothing wrong found"]
    return "\n".join(lines)
