"""A workflow run once on a ComfyUI, or once for each of VBench's prompts, and its files brought here."""

from __future__ import annotations

import asyncio
import json
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .comfy_client import ComfyClient, ComfyError, OutputFile, Progress, Result
from .comfy_workflow import Nodes, find_inputs, with_settings
from .errors import AccVideoWarning, InvalidValueError
from .files import check_writable
from .synvid.prompts import read_prompts

VBENCH_SAMPLES = 5  # videos of each prompt that VBench's scorer looks for: "<prompt>-0.mp4" to "<prompt>-4.mp4"
LONGEST_NAME = 255  # bytes of a file name on the usual file systems


def run_once(nodes: Nodes, server: str, out: Path | None, json_wanted: bool) -> int:
    """Run a workflow and bring what it saved to `out`, a file or a folder (see `places`); without one, say where it lies on the
    server."""
    single = out is not None and out.suffix != "" and not out.is_dir()
    if out is not None:
        check_writable(out if single else out / "probe")

    async def go() -> tuple[Result, list[str]]:
        async with ComfyClient(server) as comfy:
            result = await _run(comfy, nodes, quiet=json_wanted)
            files = _saved(result)
            if single and len(files) != 1:
                names = ", ".join(file.filename for file in files) or "none"
                raise ComfyError(f"the workflow saved {len(files)} files ({names}); give -o a folder, or leave it out")
            if out is None:
                return result, ["/".join(filter(None, (it.folder, it.subfolder, it.filename))) for it in files]
            paths = [out] if single else places(files, out)
            for file, path in zip(files, paths, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                await comfy.download(file, path)
            return result, [str(path) for path in paths]

    result, made = asyncio.run(go())
    if json_wanted:
        print(json.dumps(asdict(result) | {"made": made}, ensure_ascii=False, indent=1))
    else:
        for node, texts in result.warnings.items():
            for text in texts:
                warnings.warn(f"node {node}: {text}", AccVideoWarning, stacklevel=2)
        print("\n".join([*(text for texts in result.texts.values() for text in texts if text), *made]))
        print(f"{result.seconds:.1f} s")
    return 0


def run_vbench(nodes: Nodes, server: str, out: Path | None, prompts: Path, seed: int, ahead: int, json_wanted: bool) -> int:
    """A video of every prompt and sample under the name VBench's scorer expects; those that are there already are left."""
    if out is None:
        raise InvalidValueError("--vbench needs a folder for the videos; give it with -o")
    for name in ("prompt", "seed"):
        find_inputs(nodes, name)
    jobs = [
        (prompt, seed + index, out / vbench_name(prompt, index))
        for prompt in read_vbench_prompts(prompts)
        for index in range(VBENCH_SAMPLES)
    ]
    check_writable(out / "probe")
    out.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not job[2].is_file()]
    waiting = list(reversed(todo))

    async def work(bar: tqdm) -> None:
        async with ComfyClient(server) as comfy:
            while waiting:
                prompt, number, path = waiting.pop()
                filled = with_settings(nodes, [f"prompt={prompt}", f"seed={number}"])
                videos = [file for file in _saved(await _run(comfy, filled, quiet=True)) if file.filename.endswith(".mp4")]
                if len(videos) != 1:
                    raise ComfyError(f"the workflow saved {len(videos)} MP4 files; VBench takes one a run, so save one video")
                await comfy.download(videos[0], path)
                bar.update()

    async def go() -> None:
        with tqdm(total=len(todo), desc="videos", unit="video", disable=json_wanted, leave=False) as bar:
            workers = [asyncio.create_task(work(bar)) for _ in range(min(ahead, len(todo)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    asyncio.run(go())
    told = {"folder": str(out), "videos": len(jobs), "made": len(todo), "before": len(jobs) - len(todo)}
    print(json.dumps(told) if json_wanted else f"{out}: {len(todo)} videos made, {len(jobs) - len(todo)} were there already")
    return 0


def read_vbench_prompts(path: Path) -> list[str]:
    """Prompts of a file as for `accvideo encode`, or of VBench's own VBench_full_info.json, each once."""
    if path.suffix.lower() != ".json":
        return list(dict.fromkeys(prompt.text for prompt in read_prompts(path)))
    try:
        found = [str(entry["prompt_en"]).strip() for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidValueError(
            f"{str(path)!r} is no VBench_full_info.json, a list of objects with prompt_en: {error!r}"
        ) from error
    return list(dict.fromkeys(prompt for prompt in found if prompt))


def vbench_name(prompt: str, index: int) -> str:
    """The file name VBench's scorer looks for; InvalidValueError for a prompt that cannot be one."""
    name = f"{prompt}-{index}.mp4"
    if set(prompt) & set("/\\\0\n\r") or len(name.encode()) > LONGEST_NAME:
        raise InvalidValueError(f"{prompt!r} cannot be a file name, which VBench needs; leave out slashes, or shorten it")
    return name


def places(files: Sequence[OutputFile], out: Path) -> list[Path]:
    """A path in the folder `out` for each file: its name, below the subfolders it has on the server less those that all share.
    ComfyError for a name that would lead out of `out`."""
    ways = []
    for file in files:
        name = f"{file.folder}/{file.subfolder}/{file.filename}"
        way = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")]
        if any(not part.strip(". ") or "\0" in part or Path(part).drive for part in way):
            raise ComfyError(f"ComfyUI names a file {name!r}, which leads out of {str(out)!r}; give -o a file, or leave it out")
        ways.append(way)
    shared = 0
    while ways and all(way[shared : shared + 1] == ways[0][shared : shared + 1] and len(way) > shared + 1 for way in ways):
        shared += 1
    return [out.joinpath(*way[shared:]) for way in ways]


async def _run(comfy: ComfyClient, nodes: Nodes, quiet: bool) -> Result:
    """Run it, with a bar of its steps; whoever stops waiting takes it out of ComfyUI's queue, or stops it there if it runs."""
    queued: list[str] = []
    with tqdm(desc="running", unit="step", disable=quiet, leave=False) as bar:

        def show(progress: Progress) -> None:
            bar.total = progress.total
            bar.n = progress.value
            bar.refresh()

        try:
            return await comfy.run(nodes, show, on_queued=queued.append)
        except asyncio.CancelledError:
            for prompt_id in queued:
                with suppress(ComfyError):
                    await comfy.remove(prompt_id)  # first, so that it cannot start after it was found not to run
                    await comfy.interrupt(prompt_id)
            raise


def _saved(result: Result) -> Sequence[OutputFile]:
    """What the workflow saved; where it saved nothing, what it showed."""
    kept: dict[tuple[Any, ...], OutputFile] = {(it.folder, it.subfolder, it.filename): it for it in result.files}
    return [it for it in kept.values() if it.folder == "output"] or list(kept.values())
