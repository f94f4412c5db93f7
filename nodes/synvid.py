"""SynVid in ComfyUI: a teacher's trajectory from any HunyuanVideo or Wan MODEL, into a dataset, and a look at it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..accvideo_core.comfy_client import SYNVID_MISSING
from ..accvideo_core.errors import AccVideoWarning, InvalidValueError
from ..accvideo_core.media import write_mp4, write_png
from ..accvideo_core.sampling import make_noise
from ..accvideo_core.schedule import PRESETS, get_preset
from ..accvideo_core.synvid import Header, Sample, SynVidReader, SynVidStore, Trajectory
from ..accvideo_core.synvid.capture import KeyLatents
from ..accvideo_core.synvid.header import DTYPES
from ..accvideo_core.synvid.reader import HEADER
from ..accvideo_core.synvid.sheet import KeyFigures, key_figures, project, trajectory_sheet
from . import bridge
from .advice import ARCHITECTURES, MadeFor
from .sampling import check_family, family_input
from .video import to_pixels

log = logging.getLogger("accvideo")
TrajectoryType = io.Custom("ACCVIDEO_TRAJECTORY")
WRITER = f"comfyui-{os.getpid()}-{secrets.token_hex(4)}"  # this process's manifest, in every dataset it writes
KEYS = 5


class AccVideoTrajectorySampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        teachers = "; ".join(f"{p.family}: {p.teacher_steps} steps, shift {p.shift:g}" for p in PRESETS.values())
        return io.Schema(
            node_id="AccVideoTrajectorySampler",
            display_name="AccVideo Trajectory Sampler",
            category="AccVideo",
            description=(
                "Samples a teacher in many Euler steps and keeps the key latents on the way from noise to clean: one trajectory "
                "for each row of the latent, ready for AccVideo SynVid Writer. Any HunyuanVideo or Wan model works."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The teacher: a HunyuanVideo or Wan model, not a few-step student."),
                io.Conditioning.Input("positive", tooltip="One prompt, from a CLIP Text Encode with the model's own CLIP."),
                io.Latent.Input("latent", tooltip="Size, length and batch; its content is not used: all starts from pure noise."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Seed of the first row's noise; each further row takes the next number, and none hangs on the batch.",
                ),
                family_input(),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="What to avoid; only with cfg other than 1, which Wan teachers need."
                ),
                io.Int.Input(
                    "steps", default=50, min=1, max=1000, optional=True, tooltip=f"Euler steps of the teacher. {teachers}."
                ),
                bridge.advanced(
                    io.Int.Input(
                        "keys",
                        default=KEYS,
                        min=1,
                        max=1000,
                        optional=True,
                        tooltip="Segments that the key latents divide the way into; it must divide the steps. As many as "
                        "steps: all.",
                    )
                ),
                bridge.advanced(
                    io.Float.Input(
                        "shift",
                        default=7.0,
                        min=0.01,
                        max=100.0,
                        step=0.01,
                        optional=True,
                        tooltip=f"Time shift of the schedule: higher spends more steps at high noise. {teachers}.",
                    )
                ),
                io.Float.Input(
                    "guidance",
                    default=6.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Embedded guidance of HunyuanVideo; it replaces a value set upstream. Wan has none and ignores it.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="Classifier-free guidance, which doubles the time: 1 is off; Wan teachers need 5 and a negative.",
                ),
                io.String.Input(
                    "negative_prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="The text of the negative as it was encoded; with cfg it is recorded in the dataset's header.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The clean end; decode it with the model's VAE."),
                TrajectoryType.Output(display_name="trajectory", tooltip="Key latents and all that a dataset records of them."),
            ],
        )

    @classmethod
    def validate_inputs(cls, family: str | None = None) -> bool | str:
        return check_family(family)

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: list,
        latent: dict[str, Any],
        seed: int,
        family: str,
        negative: list | None = None,
        steps: int | None = None,
        keys: int | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        cfg: float | None = None,
        negative_prompt: str = "",
    ) -> io.NodeOutput:
        preset = get_preset(family)
        cfg = preset.teacher_cfg if cfg is None else cfg
        steps = preset.teacher_steps if steps is None else steps
        keys = (preset.keys or KEYS) if keys is None else keys
        shift = preset.shift if shift is None else shift
        if preset.guidance is not None:
            guidance = preset.guidance if guidance is None else guidance
        if cfg != 1 and negative is None:
            raise InvalidValueError(f"cfg is {cfg:g} but no negative is connected; connect one, or set cfg to 1")
        if not bridge.model_kind(model).startswith(ARCHITECTURES[family.split("-")[0]]):
            kind = bridge.model_kind(model)
            raise InvalidValueError(f"family {family} is chosen for a {kind} model; choose the family that the dataset is of")
        if isinstance(known := bridge.noted(model), MadeFor) and known.role == "student":
            raise InvalidValueError("this model is a few-step student; a dataset is captured from its teacher, so load that")
        if latent.get("noise_mask") is not None:
            raise InvalidValueError("the latent has a noise mask, but a trajectory starts from pure noise; remove the mask")
        header = Header.of(
            family,
            bridge.teacher_fingerprint(model),
            steps,
            keys,
            shift,
            None if preset.guidance is None else guidance,
            cfg=cfg,
            negative=negative_prompt if cfg != 1 else None,
        )
        text, pooled = bridge.plain_text(positive, "positive")
        if cfg != 1:
            bridge.plain_text(negative, "negative")  # of which the dataset holds the prompt alone
        for name, conditioning in (("positive", positive), ("negative", negative)):
            if conditioning is not None:
                bridge.check_conditioning(model, conditioning, name)
        if header.guidance is not None:
            positive = bridge.with_guidance(positive, header.guidance)
            negative = None if negative is None else bridge.with_guidance(negative, header.guidance)
        samples = bridge.prepare_latent(model, latent)
        seeds = tuple(range(seed, seed + len(samples)))
        noise = make_noise(samples.shape, seeds)
        watch = KeyLatents(steps, keys)
        solver = bridge.solver("euler", steps, watch)
        model = bridge.with_shift(model, shift)
        sigmas = torch.tensor(header.sigmas)
        clean, seconds = bridge.sample(model, positive, negative, cfg, latent, samples, seed, sigmas, solver, noise)
        trajectory = Trajectory(tuple(watch.latents()), noise, header, text, pooled, seeds, seconds)
        return io.NodeOutput(clean, trajectory)


class AccVideoSynVidWriter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoSynVidWriter",
            display_name="AccVideo SynVid Writer",
            category="AccVideo",
            description=(
                "Puts trajectories into a SynVid dataset, crash-safe, beside other writers at the same time if you like. What is "
                "in the dataset already (same prompt, seed and size) is not written again; another teacher is refused."
            ),
            inputs=[
                TrajectoryType.Input("trajectory", tooltip="From AccVideo Trajectory Sampler."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="The text that was encoded; link both to one AccVideo Prompts.",
                ),
                io.String.Input(
                    "dataset",
                    default="my_dataset",
                    tooltip="Its name in ComfyUI's output folder, below synvid/, or in a folder that extra_model_paths.yaml "
                    "lists as synvid; made if it is not there.",
                ),
                io.Image.Input("frames", optional=True, tooltip="The decoded latent, to keep as an MP4 beside the trajectory."),
                io.Float.Input(
                    "fps",
                    default=24.0,
                    min=0.01,
                    max=240.0,
                    optional=True,
                    tooltip="Frames per second of that MP4.",
                ),
                bridge.advanced(
                    io.Combo.Input(
                        "dtype",
                        options=list(DTYPES),
                        default="float16",
                        optional=True,
                        tooltip="How latents are stored; float16 keeps velocities within 1 %, at half the bytes.",
                    )
                ),
                bridge.advanced(
                    io.Boolean.Input(
                        "store_noise",
                        default=False,
                        optional=True,
                        tooltip="Keep the noise too; otherwise it is made again from its seed, and checked by its hash.",
                    )
                ),
            ],
            outputs=[
                io.String.Output(display_name="dataset", tooltip="The dataset's folder."),
                io.String.Output(display_name="report", tooltip="What was written, and how much there is now."),
                io.String.Output(display_name="sample", tooltip="The id of the first sample, for AccVideo SynVid Inspect."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prompt: str | None = None, dataset: str | None = None) -> bool | str:
        """Before hours of sampling, what can be known by then."""
        try:
            return _check_prompt(prompt) and (dataset is None or bool(bridge.synvid_path(dataset)))
        except InvalidValueError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # never the same: only the dataset itself knows whether there is something to write

    @classmethod
    def execute(
        cls,
        trajectory: Trajectory,
        prompt: str,
        dataset: str,
        frames: torch.Tensor | None = None,
        fps: float = 24.0,
        dtype: str = "float16",
        store_noise: bool = False,
    ) -> io.NodeOutput:
        _check_prompt(prompt)
        path = bridge.synvid_path(dataset)
        header = replace(trajectory.header, dtype=dtype, store_noise=store_noise)
        store = SynVidStore(path, header, WRITER)
        ids = trajectory.ids([prompt])
        missing = set(store.missing(ids))
        rows = [row for row, name in enumerate(ids) if name in missing]
        if rows:
            if frames is not None:
                clips = _clips(frames, len(ids))
                for row in rows:
                    write_mp4(store.video_path(ids[row]), clips[row], fps)
            _only(replace(trajectory, header=header), rows).save(store, [prompt], frames is not None)
        samples = store.samples()
        report = f"{path}: {len(rows)} trajectories written, {len(ids) - len(rows)} were there already; it has {len(samples)} now"
        told = {
            "samples": len(samples),
            "bytes": stored_bytes(samples.values(), header),
            "thumbnail": _thumbnail(trajectory, frames),
        }
        return io.NodeOutput(str(path), report, ids[0], ui={"text": [report], "accvideo_dataset": [told]})


class AccVideoSynVidInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AccVideoSynVidInspect",
            display_name="AccVideo SynVid Inspect",
            category="AccVideo",
            description=(
                "Shows a trajectory of a SynVid dataset key by key, from noise to clean, decoded by a VAE or as a projection of "
                "its latents, with a plot of its norm and speed; and reports what the dataset holds."
            ),
            inputs=[
                io.String.Input("dataset", default="my_dataset", tooltip="As in AccVideo SynVid Writer, or linked from it."),
                io.String.Input("sample", default="", optional=True, tooltip="A sample's id; empty for the first there is."),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE, to see pictures; without it colours are latents."),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="Rows of stills from noise to clean, then the plot."),
                io.String.Output(display_name="report", tooltip="What the dataset holds, and the figures of this trajectory."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # the dataset grows under the same name

    @classmethod
    def execute(cls, dataset: str, sample: str = "", vae: Any = None) -> io.NodeOutput:
        path = bridge.synvid_path(dataset)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AccVideoWarning)
            reader = SynVidReader(path)
            samples = reader.samples()
        faults = [str(warning.message) for warning in caught]
        if not samples:
            raise InvalidValueError(f"the dataset {path} has no trajectories yet; capture some first")
        chosen = reader.sample(sample.strip() or next(iter(samples)))
        header = reader.header
        keys = reader.read_keys(chosen, range(header.segments + 1))

        def decode(latent: torch.Tensor) -> np.ndarray:
            return to_pixels(bridge.decode_latent(vae, latent, header.family))

        sheet = trajectory_sheet(keys, header.key_sigmas, None if vae is None else decode, title=chosen.prompt)
        prompts = {it.prompt for it in samples.values()}
        lines = [
            f"{path}: {len(samples)} trajectories of {len(prompts)} prompts, family {header.family}, "
            f"{len(header.sigmas) - 1} steps, {header.segments} keys, shift {header.shift}, guidance {header.guidance}, "
            f"cfg {header.cfg:g}, {header.dtype}, teacher {header.fingerprint[:12]}",
            f"sample {chosen.id}: {chosen.prompt!r}, seed {chosen.seed}, latent {'x'.join(map(str, chosen.shape))}, "
            f"{chosen.seconds:.1f} s",
            *(_figures(it) for it in key_figures(keys, header.key_sigmas)),
            *faults,
        ]
        report = "\n".join(lines)
        return io.NodeOutput(torch.from_numpy(sheet.copy()).float()[None] / 255, report, ui={"text": [report]})


def stored_bytes(samples: Iterable[Sample], header: Header) -> int:
    """What the latents of these samples take on disk, but for the files' own headers."""
    kept = header.segments + header.store_noise
    return sum(math.prod(sample.shape) for sample in samples) * kept * DTYPES[header.dtype].itemsize


def _thumbnail(trajectory: Trajectory, frames: torch.Tensor | None) -> dict[str, str]:
    """The middle of the first clip, of its latent where no frames are connected, as a file of ComfyUI's temporary folder."""
    if frames is None:
        clean = trajectory.keys[0][0].float()
        clip = project(clean)(clean)
    else:
        clip = to_pixels(frames[: len(frames) // len(trajectory.seeds)])
    path, file = bridge.preview_file(".png")
    write_png(path, clip[len(clip) // 2])
    return file


def _check_prompt(prompt: str | None) -> bool:
    """True also where it is linked and not known yet."""
    if prompt is not None and not prompt.strip():
        raise InvalidValueError("the prompt is empty; link the text that was encoded, or the dataset could not be trained on")
    return True


def _figures(it: KeyFigures) -> str:
    way = "" if it.step is None else f", step {it.step:.4f}, velocity {it.velocity:.4f}"
    return f"  key {it.key}: sigma {it.sigma:.4f}, rms {it.norm:.4f}{way}"


def _only(trajectory: Trajectory, rows: Sequence[int]) -> Trajectory:
    """These rows of a batch."""
    index = list(rows)
    one_text = len(trajectory.text) == 1
    return replace(
        trajectory,
        keys=tuple(key[index] for key in trajectory.keys),
        noise=trajectory.noise[index],
        text=trajectory.text if one_text else trajectory.text[index],
        pooled=trajectory.pooled if one_text or trajectory.pooled is None else trajectory.pooled[index],
        seeds=tuple(trajectory.seeds[row] for row in index),
        seconds=trajectory.seconds * len(index) / len(trajectory.seeds),
    )


def _clips(frames: torch.Tensor, count: int) -> np.ndarray:
    """(count, T, H, W, 3) uint8 from an IMAGE of all clips' frames one after another."""
    if len(frames) % count:
        raise InvalidValueError(f"{len(frames)} frames for {count} trajectories; connect the whole decoded latent")
    return to_pixels(frames).reshape(count, -1, *frames.shape[1:])


async def _missing(body: dict[str, Any]) -> dict[str, Any]:
    """Which of `ids` a dataset lacks, for `accvideo queue`; all of them where there is none yet."""
    path, ids = bridge.synvid_path(str(body["dataset"])), [str(name) for name in body["ids"]]

    def look() -> list[str]:
        return SynVidStore(path).missing(ids) if (path / HEADER).exists() else list(dict.fromkeys(ids))

    return {"dataset": str(path), "missing": await asyncio.to_thread(look)}


bridge.add_route(SYNVID_MISSING, _missing)
