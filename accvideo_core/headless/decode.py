"""`accvideo decode`: the stored latents of a dataset as MP4."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from ..devices import pick_device
from ..errors import InvalidValueError, SynVidError
from ..files import check_writable
from ..media import frame_rate, read_metadata, write_mp4
from ..synvid import Sample, SynVidStore
from .models import BUNDLED, SIZES, Precision, load_vae


@dataclass(frozen=True)
class DecodeArgs:
    """Decode the latents of a SynVid dataset. Videos that are there already are kept, so it can be interrupted; where one shows
    something else (another key, another dataset's sample of that id), it is refused."""

    dataset: tyro.conf.Positional[Path]
    """The dataset's folder."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write <id>.mp4 into."""
    vae: str = BUNDLED
    """tiny for the bundled one, or the folder of HunyuanVideo's in diffusers' layout."""
    samples: tuple[str, ...] = ()
    """Ids of the samples to decode; default all."""
    count: int | None = None
    """Only the first so many samples."""
    key: int = 0
    """Which key latent: 0 is the clean end, the highest the noise."""
    whole: bool = False
    """Decode each clip at once instead of in tiles: needs much more memory, has no seams."""
    fps: float | None = None
    """Frames a second; default 24, of the tiny world 8."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    dtype: Precision = "auto"
    """Precision of HunyuanVideo's VAE; auto is float16, on a CPU float32."""
    json: bool = False
    """Print what was done as JSON."""


def run(args: DecodeArgs) -> int:
    """Write the videos and print how many; 1 if a sample was damaged, and the others are written."""
    if args.count is not None and args.count < 1:
        raise InvalidValueError(f"count is {args.count}; it must be at least 1")
    store = SynVidStore(args.dataset)
    bundled, tiny = args.vae == BUNDLED, store.header.family == "tiny"
    if bundled != tiny:
        raise InvalidValueError(f"{args.dataset} is of {store.header.family}; give --vae {'tiny' if tiny else 'FOLDER'}")
    samples = store.samples()
    if unknown := [name for name in args.samples if name not in samples]:
        raise InvalidValueError(f"{args.dataset} has no samples {', '.join(unknown)}; accvideo inspect lists what it has")
    if not 0 <= args.key <= (last := store.header.segments):
        raise InvalidValueError(f"key is {args.key}; keys of {args.dataset} go from 0, clean, to {last}, noise")
    fps, faults = SIZES[store.header.family].fps if args.fps is None else args.fps, []
    frame_rate(fps)  # can be stored, or this raises
    told = {"key": args.key, "fps": fps, "teacher": store.header.teacher, "fingerprint": store.header.fingerprint}
    chosen = [samples[name] for name in dict.fromkeys(args.samples or samples)][: args.count]
    with tqdm(chosen, desc="looking", unit="video", disable=args.json, leave=False) as bar:  # milliseconds each that is there
        wanted = [sample for sample in bar if not _is_there(args.out / f"{sample.id}.mp4", told | _of(sample))]
    check_writable(args.out / "video.mp4")
    vae = load_vae(args.vae, pick_device(args.device), args.dtype, not args.whole) if wanted else None
    for sample in tqdm(wanted, desc="decoding", unit="video", disable=args.json, leave=False):
        assert vae is not None
        try:
            latent = store.read(sample, args.key)
        except SynVidError as error:
            faults.append(str(error))
            continue
        metadata = {"accvideo": json_module.dumps(_of(sample) | told)}
        write_mp4(args.out / f"{sample.id}.mp4", vae.decode(latent), fps, metadata)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    made = len(wanted) - len(faults)
    if args.json:
        print(json_module.dumps({"folder": str(args.out), "videos": len(chosen) - len(faults), "new": made, "left_out": faults}))
    else:
        print(f"{args.out}: {len(chosen) - len(faults)} videos, {made} of them new, {len(faults)} left out")
    return 1 if faults else 0


def _of(sample: Sample) -> dict[str, Any]:
    return {"prompt": sample.prompt, "seed": sample.seed}


def _is_there(path: Path, told: dict[str, Any]) -> bool:
    """Whether the video is; InvalidValueError if it tells of itself other than it would now."""
    if not path.exists():
        return False
    try:
        found = dict(json_module.loads(read_metadata(path)["accvideo"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValueError(f"{path} is no video of this command's ({error}); choose another folder") from error
    if changed := [name for name, value in told.items() if found.get(name, value) != value]:  # earlier versions told less
        differs = ", ".join(f"{name} {found[name]!r} there, {told[name]!r} now" for name in changed)
        raise InvalidValueError(f"{path} was made otherwise: {differs}; choose another folder")
    return True
