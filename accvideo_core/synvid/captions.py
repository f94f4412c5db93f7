"""`accvideo captions`: prompts from videos, the paper's first step: a vision model describes each in detail.

The output is a prompt file (.jsonl) that grows by a line for every video and says which are done, so a run that ended early
is started again and goes on. A video that was moved or copied is known by its content.
"""

from __future__ import annotations

import asyncio
import hashlib
import json as json_module
import os
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from ..errors import AccVideoError, InvalidValueError, PromptError
from ..files import Lines, check_writable
from .frames import as_jpeg, sample_frames
from .vision import Asking, EndpointError, VisionClient, VisionError

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".gif")
IN_A_ROW = 20  # videos that may fail one after another before the endpoint is given up
_ENDS = 1 << 20


@dataclass(frozen=True)
class CaptionsArgs:
    """Describe videos with a vision model (the paper used InternVL2.5-8B), into a prompt file for `accvideo encode`."""

    videos: tyro.conf.Positional[tuple[Path, ...]]
    """Videos, and folders that are searched for them with all that is below."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The prompt file to write, or to go on with, ending in .jsonl."""
    url: str = "http://127.0.0.1:8000/v1"
    """An OpenAI-compatible endpoint, e.g. of: vllm serve OpenGVLab/InternVL2_5-8B --limit-mm-per-prompt '{"image": 8}'"""
    model: str = ""
    """The model's name there; default the only one."""
    key_from: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if the endpoint wants one."""
    instruction: str = "Describe this video in detail."
    """What the model is asked."""
    frames: int = 8
    """Frames it is shown of each video, evenly spread."""
    side: int = 448
    """Longest side of a frame in pixels; InternVL2.5 sees tiles of 448."""
    min_words: int = 5
    """Fewer words are no description: the video gets no prompt."""
    max_words: int = 180
    """More words are left out, too: HunyuanVideo reads 256 tokens."""
    max_tokens: int = 512
    """Longest answer, in tokens; one that is cut off is not used."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 8
    """Videos at a time."""
    timeout: float = 120.0
    """Seconds an answer may take."""
    tries: int = 6
    """How often a video is tried: after a timeout, status 429 or 5xx, or an answer that is none."""
    wait: float = 1.0
    """Seconds before the second try; twice as long before each further one."""
    json: bool = False
    """Print what was done as JSON."""


class CaptionFile:
    """The prompt file, which is also the record of what is done: a line for every video, its prompt "" if it is left out."""

    def __init__(self, path: Path) -> None:
        """Raises PromptError for a file of another kind, OutputError where none can be written."""
        if path.suffix.lower() != ".jsonl":
            raise PromptError(f"{str(path)!r} must end in .jsonl: beside the prompt a line says which video it is of")
        self.path, self._lines = path, Lines(path)
        self.done: set[str] = set()
        if not path.exists():
            check_writable(path)
            return
        try:
            content = path.read_bytes()
        except OSError as error:
            raise PromptError(f"cannot read {str(path)!r}: {error.strerror or error}") from error
        self._lines = Lines(path, content)
        for number, line in enumerate(content[: self._lines.end].splitlines(), 1):
            try:
                self.done.add(str(json_module.loads(line)["key"]))
            except (ValueError, KeyError, TypeError) as error:
                raise PromptError(f"{str(path)!r}, line {number} was not written by this command; name another file") from error

    def add(self, key: str, **told: Any) -> None:
        """Add a video's line; when this returns it is on the disk. PromptError where another process has changed the file."""
        text = json_module.dumps({**told, "key": key}, ensure_ascii=False)
        line = text.encode("utf-8", "backslashreplace") + b"\n"  # of a path that is no UTF-8, what JSON has for such bytes
        if self._lines.is_changed():
            raise PromptError(
                f"another process has changed {str(self.path)!r}; let one at a time add to it, then start again, which goes on"
            )
        self._lines.add(line)
        self.done.add(key)


@dataclass
class Tally:
    """What a run did: videos described, left out by their length, done before, the same as another; sentences on the others."""

    described: int = 0
    left_out: int = 0
    done_before: int = 0
    copies: int = 0
    faults: tuple[str, ...] = ()


def run(args: CaptionsArgs) -> int:
    """Describe what is not described yet and print how many that were; 1 if some could not be: they are tried again next time."""
    for name in ("frames", "side", "max_tokens", "workers", "tries", "min_words"):
        if getattr(args, name) < 1:
            raise InvalidValueError(f"{name} is {getattr(args, name)}; it must be at least 1")
    if not args.max_words >= args.min_words:
        raise InvalidValueError(f"max-words is {args.max_words}, less than min-words, {args.min_words}")
    if not (args.timeout > 0 and args.wait >= 0):
        raise InvalidValueError(f"timeout is {args.timeout} and wait {args.wait}; give seconds")
    videos, file = find_videos(args.videos), CaptionFile(args.out)
    asking = Asking(args.instruction, args.max_tokens, args.timeout, args.tries, args.wait)

    async def go() -> Tally:
        async with VisionClient(args.url, asking, args.model, os.environ.get(args.key_from, "")) as vision:
            return await describe_all(videos, file, args, vision.describe)

    tally = asyncio.run(go())
    for fault in tally.faults:
        print(f"not described: {fault}", file=sys.stderr)
    if args.json:
        print(json_module.dumps({"prompts": str(args.out), **tally.__dict__}))
    else:
        print(
            f"{args.out}: {tally.described} videos described, {tally.done_before} before, {tally.left_out} left out by length, "
            f"{tally.copies} copies of others, {len(tally.faults)} not described"
        )
    return 1 if tally.faults else 0


def find_videos(places: Iterable[Path]) -> list[Path]:
    """The files among `places`, and the videos in and below its folders, each once. InvalidValueError if there are none."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        elif place.is_file():
            found.append(place)
        else:
            raise InvalidValueError(f"there is no video or folder {str(place)!r}")
    if not found:
        raise InvalidValueError(
            f"no videos in {', '.join(map(repr, map(str, places)))}; their names end in {', '.join(SUFFIXES)}"
        )
    return list(dict.fromkeys(found))


def content_key(path: Path) -> str:
    """A short name of a video's content: a hash of its size, its first and its last megabyte."""
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(_ENDS, size - _ENDS))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()[:32]


async def describe_all(
    videos: Sequence[Path], file: CaptionFile, args: CaptionsArgs, describe: Callable[[list[bytes]], Awaitable[str]]
) -> Tally:
    """Describe the videos that `file` lacks, `args.workers` at a time, and add each to it as soon as it is known."""
    tally, before, begun, in_a_row = Tally(), frozenset(file.done), set[str](), 0
    queue = iter(videos)

    async def handle(video: Path) -> None:
        key = await asyncio.to_thread(content_key, video)
        if key in begun:
            tally.copies += 1
            return
        begun.add(key)
        if key in before:
            tally.done_before += 1
            return
        text = await describe(await asyncio.to_thread(_pictures, video, args.frames, args.side))
        words = len(text.split())
        if args.min_words <= words <= args.max_words:
            file.add(key, prompt=text, video=str(video))
            tally.described += 1
        else:
            file.add(key, prompt="", video=str(video), left_out=f"{words} words", caption=text)
            tally.left_out += 1

    async def work(bar: tqdm) -> None:
        nonlocal in_a_row
        for video in queue:
            try:
                await handle(video)
                in_a_row = 0
            except (VisionError, InvalidValueError, OSError) as error:
                if isinstance(error, AccVideoError) and isinstance(error, OSError):  # the output file's: no use going on
                    raise
                tally.faults += (f"{video}: {error}",)
                in_a_row += isinstance(error, VisionError)
                if in_a_row >= IN_A_ROW:
                    raise EndpointError(f"{in_a_row} videos in a row could not be described; the last: {error}") from error
            bar.update()

    with tqdm(total=len(videos), desc="captions", unit="video", smoothing=0, disable=args.json, leave=False) as bar:
        workers = [asyncio.create_task(work(bar)) for _ in range(min(args.workers, len(videos)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return tally


def _pictures(video: Path, count: int, side: int) -> list[bytes]:
    return [as_jpeg(image) for image in sample_frames(video, count, side)]
