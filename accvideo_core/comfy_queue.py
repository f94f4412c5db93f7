"""`accvideo queue`: a workflow on a running ComfyUI, once (comfy_run), or for thousands of prompts to capture, a few in its
queue at a time.

What counts is what the dataset holds, which our nodes there are asked: it is not queued again, and after a restart of ComfyUI,
or of this command, only what it lacks is.
"""

from __future__ import annotations

import asyncio
import json as json_module
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from .comfy_client import (
    SYNVID_MISSING,
    ComfyClient,
    ComfyError,
    ComfyForgot,
    ComfyRefused,
    ComfyUnreachable,
    Progress,
    address_of,
)
from .comfy_run import run_once, run_vbench
from .comfy_workflow import WRITER, Nodes, read_workflow, with_settings
from .errors import InvalidValueError
from .files import atomic_path, check_writable
from .synvid import sample_id
from .synvid.prompts import read_prompts
from .synvid.wanted import wanted_samples

SAMPLER = "AccVideoTrajectorySampler"
LATENT = "EmptyHunyuanLatentVideo"  # its width, height, length and batch_size say the shape; Wan 2.1 uses it, too
IN_A_ROW = 10  # samples that may fail one after another before the whole is given up
TRIES = 5  # how often a sample is queued again after ComfyUI forgot it
PAUSE = 1.0  # seconds between looks at a server that is down
ASKED = 5000  # ids in one question


@dataclass(frozen=True)
class QueueArgs:
    """Run a workflow on a ComfyUI: once, and bring its video here; or with --prompts a capture workflow once for every prompt.
    Start a capture again at any time: what is captured is not queued again."""

    workflow: tyro.conf.Positional[Path]
    """A workflow in API format ("Export (API)" in ComfyUI). To capture it has an AccVideo SynVid Writer, its prompt linked to
    what the text encoder is linked to, or written as in the text encoder."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """An input of the workflow: prompt="a red ball", seed=7, or NODE.INPUT=VALUE with the node's id, title or class."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where what the workflow saved is brought to: a file, or a folder, in which files of different subfolders on the server keep
    them. Without it the server keeps it."""
    vbench: Path | None = None
    """Make the videos VBench scores: 5 of every prompt of this file (.txt, .csv, .jsonl, or its VBench_full_info.json), under
    the names it expects, into the folder -o."""
    prompts: Path | None = None
    """Capture: the prompts, .txt, .csv or .jsonl, as for accvideo encode; ids in it are not used."""
    server: str = "http://127.0.0.1:8188"
    """Where ComfyUI listens; it must have AccVideo."""
    seeds: int = 1
    """Trajectories of each prompt, each from its own noise; a prompt that names its seed has that one alone."""
    seed: int = 0
    """Another number gives every prompt other noise."""
    ahead: int = 2
    """How many are in ComfyUI's queue at a time, the running one included."""
    patience: float = 1800.0
    """Seconds to wait for a ComfyUI that has gone, before giving up."""
    report: Path | None = None
    """A JSON file to write what happened to."""
    json: bool = False
    """Print that JSON, too."""


@dataclass(frozen=True)
class Template:
    """A capture workflow with places for a prompt and a seed.

    places   (node, input) that the prompt goes to
    sampler  the node whose `seed` is set
    dataset  as the writer names it
    shape    (C, T, H, W) of a latent, rows how many there are in a batch
    """

    nodes: Mapping[str, Mapping[str, Any]]
    places: tuple[tuple[str, str], ...]
    sampler: str
    dataset: str
    shape: tuple[int, int, int, int]
    rows: int

    @classmethod
    def of(cls, nodes: Nodes, path: Path) -> Template:
        """Of the workflow read from `path`; InvalidValueError, naming the file and the node, for what is no capture workflow."""
        writer = _only_node(nodes, WRITER, path)
        sampler = _only_node(nodes, SAMPLER, path)
        prompt, dataset = nodes[writer]["inputs"].get("prompt"), nodes[writer]["inputs"].get("dataset")
        if not isinstance(dataset, str):
            raise InvalidValueError(f"{WRITER} (node {writer}): write the dataset's name into it, do not link it")
        places = tuple((n, i) for n, node in nodes.items() for i, value in node["inputs"].items() if prompt and value == prompt)
        if len(places) < 2:
            raise InvalidValueError(
                f"{WRITER} (node {writer}): its prompt is not what a text encoder is given; link both to one AccVideo Prompts"
            )
        shape, rows = _latent_shape(nodes, sampler)
        return cls(nodes, places, sampler, dataset, shape, rows)

    def filled(self, prompt: str, seed: int) -> dict[str, Any]:
        """The workflow with a prompt and a seed in their places."""
        nodes: dict[str, Any] = deepcopy(dict(self.nodes))
        for node, name in self.places:
            nodes[node]["inputs"][name] = prompt
        nodes[self.sampler]["inputs"]["seed"] = seed
        return nodes

    def ids(self, prompt: str, seed: int) -> tuple[str, ...]:
        """Of the samples that the writer will write, one for each row of the batch."""
        return tuple(sample_id(prompt, seed + row, self.shape) for row in range(self.rows))


@dataclass(frozen=True)
class Job:
    """A run of the workflow and the samples it captures."""

    prompt: str
    seed: int
    ids: tuple[str, ...]


@dataclass
class Report:
    """samples: asked for in all, of them captured `before` and `captured` now; `failed` has a reason for each that was not;
    `restarts`: times the server was gone and came back."""

    server: str
    dataset: str = ""
    samples: int = 0
    before: int = 0
    captured: int = 0
    restarts: int = 0
    seconds: float = 0.0
    failed: list[dict[str, Any]] = field(default_factory=list)


def run(args: QueueArgs) -> int:
    """Run it once, make VBench's videos, or capture; 0, or 1 if something could not be captured."""
    if args.ahead < 1 or not args.patience >= 0:
        raise InvalidValueError(f"ahead is {args.ahead} and patience {args.patience}; they must be at least 1 and 0")
    if args.prompts is not None and (args.out is not None or args.vbench is not None):
        raise InvalidValueError("--prompts captures into the workflow's dataset; leave out --out and --vbench")
    nodes = with_settings(read_workflow(args.workflow), args.set)
    if args.vbench is not None:
        return run_vbench(nodes, args.server, args.out, args.vbench, args.seed, args.ahead, args.json)
    if args.prompts is None:
        return run_once(nodes, args.server, args.out, args.json)
    return capture(args, args.prompts, Template.of(nodes, args.workflow))


def capture(args: QueueArgs, path: Path, template: Template) -> int:
    """Capture what the dataset lacks of a file of prompts and print how much that was; the report is written in any case."""
    prompts = [replace(prompt, id=None) for prompt in read_prompts(path)]
    wanted = wanted_samples(prompts, template.shape, args.seeds, args.seed)
    jobs = [Job(it.prompt, it.seed, template.ids(it.prompt, it.seed)) for it in wanted]
    if args.report is not None:
        check_writable(args.report)
    report, begin = Report(address_of(args.server)), time.monotonic()
    try:
        asyncio.run(_Run(args, template, report).all(jobs))
    finally:
        report.seconds = round(time.monotonic() - begin, 3)
        text = json_module.dumps(asdict(report), indent=1, ensure_ascii=False)
        if args.report is not None:
            with atomic_path(args.report) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
    for fault in report.failed:
        print(f"failed: {fault['prompt']!r}, seed {fault['seed']}: {fault['reason']}", file=sys.stderr)
    if args.json:
        print(text)
    else:
        print(
            f"{report.dataset}: {report.captured} samples captured, {report.before} before, {len(report.failed)} failed, "
            f"{report.restarts} restarts, {report.seconds:.0f} s"
        )
    return 1 if report.failed else 0


class _Run:
    """The work of one command: `ahead` workers, each with one prompt in ComfyUI's queue."""

    def __init__(self, args: QueueArgs, template: Template, report: Report) -> None:
        self._args, self._template, self._report = args, template, report
        self._jobs: deque[Job] = deque()
        self._down, self._in_a_row = asyncio.Lock(), 0

    async def all(self, jobs: Sequence[Job]) -> None:
        async with ComfyClient(self._args.server) as comfy:
            known = await comfy.node_types()
            kinds = {str(node["class_type"]) for node in self._template.nodes.values()}
            if absent := sorted(kinds - set(known)):
                ours = any(kind.startswith("AccVideo") for kind in absent)
                cure = "install AccVideo into its custom_nodes" if ours else "install the packs they are of"
                raise ComfyError(f"ComfyUI at {self._report.server} has no node {', '.join(absent)}; {cure} and restart it")
            ids = list(dict.fromkeys(name for job in jobs for name in job.ids))
            missing = await self._missing(comfy, ids)
        self._report.samples, self._report.before = len(ids), len(ids) - len(missing)
        self._jobs.extend(job for job in jobs if missing & set(job.ids))
        with tqdm(total=len(missing), desc="capturing", unit="sample", smoothing=0, disable=self._args.json, leave=False) as bar:
            workers = [asyncio.create_task(self._work(bar)) for _ in range(min(self._args.ahead, len(self._jobs)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, bar: tqdm) -> None:
        async with ComfyClient(self._args.server) as comfy:
            while self._jobs:
                job = self._jobs.popleft()
                try:
                    captured = await self._capture(comfy, job, bar)
                    self._in_a_row = 0
                except (ComfyRefused, ComfyUnreachable):
                    raise
                except ComfyError as error:
                    reason = str(error)
                    self._report.failed.append({"prompt": job.prompt, "seed": job.seed, "ids": job.ids, "reason": reason})
                    self._in_a_row += 1
                    if self._in_a_row >= IN_A_ROW:
                        raise ComfyError(f"{self._in_a_row} samples in a row failed; the last: {reason}") from error
                    continue
                self._report.captured += captured
                bar.update(captured)

    async def _capture(self, comfy: ComfyClient, job: Job, bar: tqdm) -> int:
        """Run the workflow until the dataset has the job's samples; returns how many of them it lacked before. ComfyError where
        it fails for a reason of its own."""
        queued: list[str] = []
        lacking = 0

        def show(progress: Progress) -> None:
            if progress.node == self._template.sampler:
                bar.set_postfix_str(f"step {progress.value} of {progress.total}")

        try:
            for _ in range(TRIES):
                missing = await self._patiently(comfy, lambda: self._missing(comfy, job.ids))
                lacking = max(lacking, len(missing))
                if not missing:
                    return lacking
                queued.clear()
                try:
                    await comfy.run(self._template.filled(job.prompt, job.seed), show, on_queued=queued.append)
                except ComfyForgot:
                    continue
                except ComfyUnreachable:
                    await self._until_back(comfy)
                    if queued:
                        with suppress(ComfyForgot):  # if it was only the connection, the run goes on
                            await self._patiently(comfy, lambda: comfy.rejoin(queued[0], show))
                    continue
                if await self._patiently(comfy, lambda: self._missing(comfy, job.ids)):
                    raise ComfyError("the workflow ran, but the dataset lacks the sample; does its writer run?")
                return lacking
            raise ComfyError(f"ComfyUI forgot it {TRIES} times; somebody removes it from the queue")
        except asyncio.CancelledError:
            if queued:
                with suppress(ComfyError):
                    await comfy.remove(queued[0])
            raise

    async def _missing(self, comfy: ComfyClient, ids: Sequence[str]) -> set[str]:
        """Which of them the dataset lacks."""
        missing: set[str] = set()
        for first in range(0, len(ids), ASKED):
            body = {"dataset": self._template.dataset, "ids": list(ids[first : first + ASKED])}
            answer = await comfy.post(SYNVID_MISSING, body)
            self._report.dataset = str(answer["dataset"])
            missing.update(answer["missing"])
        return missing

    async def _patiently(self, comfy: ComfyClient, ask: Any) -> Any:
        """What `ask` gives, once the server answers."""
        while True:
            try:
                return await ask()
            except ComfyUnreachable:
                await self._until_back(comfy)

    async def _until_back(self, comfy: ComfyClient) -> None:
        """Wait for a server that has gone; only one worker looks, the others wait for it."""
        deadline, gone = time.monotonic() + self._args.patience, False
        async with self._down:
            while True:
                try:
                    await comfy.post(SYNVID_MISSING, {"dataset": self._template.dataset, "ids": []})
                    self._report.restarts += gone
                    return
                except ComfyUnreachable:
                    gone = True
                    if time.monotonic() > deadline:
                        raise
                await asyncio.sleep(PAUSE)


def _only_node(nodes: Mapping[str, Mapping[str, Any]], kind: str, path: Path) -> str:
    found = [name for name, node in nodes.items() if node["class_type"] == kind]
    if len(found) != 1:
        raise InvalidValueError(f"the workflow {str(path)!r} has {len(found)} nodes {kind}; it must have one")
    return found[0]


def _latent_shape(nodes: Mapping[str, Mapping[str, Any]], sampler: str) -> tuple[tuple[int, int, int, int], int]:
    """((C, T, H, W), rows) of what the sampler samples."""
    link = nodes[sampler]["inputs"].get("latent")
    source = nodes.get(str(link[0])) if isinstance(link, list) else None
    kind = source["class_type"] if source else None
    size = [source["inputs"].get(name) for name in ("length", "height", "width", "batch_size")] if source else []
    if kind != LATENT or not all(type(n) is int and n > 0 for n in size):
        raise InvalidValueError(
            f"{SAMPLER} (node {sampler}): its latent comes from {kind}, so its size is not known; use "
            f"{LATENT} with width, height, length and batch_size written into it"
        )
    length, height, width, rows = size
    return (16, (length - 1) // 4 + 1, height // 8, width // 8), rows
