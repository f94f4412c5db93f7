"""A plan: what to capture, in a folder of its own, so that text encoders and teacher need never share a machine.

`plan.jsonl` has a line for every sample, its prompt's encoding lies in `text/` as in a dataset. Lines are only ever added;
what is captured already is known from the dataset, so a plan may grow and be captured again and again. `negatives.json` has
the negative prompts, which a teacher with classifier-free guidance needs, and the hash of each one's encoding.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import Tensor

from ..errors import SynVidError
from ..files import Lines, atomic_path, check_writable
from .folder import Folder
from .manifest import HASH, Origin, SampleInfo, check_info
from .store import sample_id
from .texts import names_there, put_text, read_text

FILE = "plan.jsonl"
NEGATIVES = "negatives.json"


@dataclass(frozen=True)
class PlanItem:
    """A sample to capture.

    id      its name, in plan and dataset
    prompt  as written
    text    hash of its encoding in `text/`
    seed    of its noise
    shape   (C, T, H, W) of its latent
    """

    id: str
    prompt: str
    text: str
    seed: int
    shape: tuple[int, int, int, int]

    @property
    def origin(self) -> Origin:
        """What it is a sample of."""
        return self.prompt, self.seed, self.shape


def prompt_seed(prompt: str, run: int = 0, copy: int = 0) -> int:
    """The seed of a prompt's noise, below 2**53, which every JSON reader holds exactly. It hangs on the prompt, the run's own
    seed and the number of the copy alone, so adding or sorting prompts changes no other's noise."""
    key = json.dumps([prompt, int(run), int(copy)]).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % 2**53


class Plan:
    """A plan folder, to read, and for one process at a time to add to.

    items      {id: PlanItem} in the plan's order
    negatives  {negative prompt: hash of its encoding}
    create     make an empty plan where there is none, instead of raising SynVidError
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = False) -> None:
        self.path = Path(path)
        self.items: dict[str, PlanItem] = {}
        self.negatives: dict[str, str] = {}
        file = self.path / FILE
        self._lines = Lines(file)
        if not file.exists():
            if not create:
                raise SynVidError(f"{self.path} holds no plan ({FILE} is missing); make one: accvideo encode prompts.txt -o PLAN")
            check_writable(file)
            return
        try:
            content = file.read_bytes()
        except OSError as error:
            raise SynVidError(f"cannot read {file}: {error.strerror or error}") from error
        self._lines = Lines(file, content)
        for number, line in enumerate(content[: self._lines.end].splitlines(), 1):
            self._take(_from_line(line, f"{file}, line {number}"))
        if (self.path / NEGATIVES).exists():
            self.negatives = _read_negatives(self.path / NEGATIVES)

    def add(
        self, prompt: str, text: Tensor, pooled: Tensor | None, seed: int, shape: Sequence[int], name: str | None = None
    ) -> PlanItem:
        """Add a sample; when this returns it is on the disk.

        text, pooled  (L, D) at its valid length and (P,), or None for a model without it
        name          its id; by default `sample_id`'s
        Raises SynVidError for an id the plan has already, values that cannot be stored, or where another process has added to
        the plan since; OutputError where the disk refuses.
        """
        channels, frames, height, width = (int(n) for n in shape)
        name = sample_id(prompt, seed, shape) if name is None else name
        if name in self.items:
            raise SynVidError(f"{self.path} has a sample {name!r} already; give each its own id or seed")
        item = PlanItem(name, prompt, put_text(self.path, text, pooled), int(seed), (channels, frames, height, width))
        _check(item)
        line = json.dumps(asdict(item), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        if self._lines.is_changed():
            raise SynVidError(
                f"another process is adding to {self.path / FILE}; let one at a time, then start this one again, which goes on"
            )
        self._lines.add(line)
        self._take(item)
        return item

    def add_negative(self, prompt: str, text: Tensor, pooled: Tensor | None) -> None:
        """Keep a negative prompt and its encoding, as of `add`; one that is there already is written anew."""
        negatives = self.negatives | {prompt: put_text(self.path, text, pooled)}
        with atomic_path(self.path / NEGATIVES) as temporary:
            temporary.write_text(json.dumps(negatives, indent=1) + "\n", encoding="utf-8", newline="\n")
        self.negatives = negatives

    def restore(self, item: PlanItem, text: Tensor, pooled: Tensor | None) -> None:
        """Put an item's encoding, lost from the folder, there again. SynVidError if it is not what the plan was made with."""
        if put_text(self.path, text, pooled) != item.text:
            raise SynVidError(
                f"the encoding of sample {item.id} is lost from {self.path}, and its prompt is encoded otherwise now; encode it "
                "as then (device, dtype, text encoder), or make a new plan"
            )

    def lost(self) -> set[str]:
        """The ids whose encoding is gone from the folder."""
        there = names_there(Folder(self.path))
        return {name for name, item in self.items.items() if item.text not in there}

    def text(self, name: str) -> tuple[Tensor, Tensor | None]:
        """(text (L, D), pooled (P,) or None) by hash. SynVidError if it is missing or damaged."""
        return read_text(Folder(self.path), name)

    def _take(self, item: PlanItem) -> None:
        if self.items.setdefault(item.id, item) is not item:
            raise SynVidError(f"{self.path / FILE} has the id {item.id!r} twice; remove one of the lines")


def _from_line(line: bytes, where: str) -> PlanItem:
    try:
        found = json.loads(line)
        if set(found) != {field.name for field in fields(PlanItem)}:
            raise ValueError(f"it has the fields {', '.join(found)}")
        item = PlanItem(**{**found, "shape": tuple(found["shape"])})
        _check(item)
    except (ValueError, TypeError, KeyError) as error:
        raise SynVidError(f"{where} is no sample of a plan: {error}") from error
    return item


def _read_negatives(file: Path) -> dict[str, str]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(name, str) and HASH.fullmatch(name) for name in found.values()):
            raise ValueError("it must be an object of prompts and hashes")
    except (OSError, ValueError, RecursionError) as error:
        raise SynVidError(f"cannot read {file} ({error}); delete it and encode the negative prompt again") from error
    return found


def _check(item: PlanItem) -> None:
    check_info(SampleInfo(item.id, item.prompt, item.text, item.seed, 0.0))
    if len(item.shape) != 4 or not all(type(n) is int and n > 0 for n in item.shape):
        raise SynVidError(f"sample {item.id} with shape {item.shape}; a latent is (C, T, H, W)")
