"""Verdicts on captured trajectories: which of them a student should learn to end like, and which not.

JSON lines, one a sample: {"id": "...", "accepted": true, "weight": 1.3}. Who judges is free: people, a reward model, for the tiny
world its oracle (`accvideo tiny judge`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidValueError, SynVidError
from ..files import atomic_path
from ..json_lines import read_json_lines


@dataclass(frozen=True)
class Verdict:
    """accepted  whether the trajectory's video is what its prompt asks for
    weight    how much it counts beside others of the same verdict; 1 unless what is accepted, or rejected, would otherwise be
              other than the whole in what has nothing to do with it
    """

    accepted: bool
    weight: float = 1.0

    def __post_init__(self) -> None:
        if type(self.accepted) is not bool:
            raise InvalidValueError(f"accepted is {self.accepted!r}; say true or false")
        if type(self.weight) not in (int, float) or not 0 < self.weight < math.inf:
            raise InvalidValueError(f"weight is {self.weight!r}; it must be a finite number above 0")


def read_verdicts(path: str | os.PathLike[str]) -> dict[str, Verdict]:
    """{id: its verdict}, in the file's order. SynVidError, naming the line, for what is none, or a second one on a sample."""
    verdicts: dict[str, Verdict] = {}

    def read(told: Any) -> None:
        name, verdict = told["id"], Verdict(told["accepted"], told.get("weight", 1.0))
        if not isinstance(name, str) or name in verdicts:
            raise ValueError(f"id {name!r} is no text, or has a verdict already")
        verdicts[name] = verdict

    expected = 'a verdict looks like {"id": "...", "accepted": true}, and a "weight" if it has one'
    read_json_lines(path, read, "the verdicts", expected, SynVidError)
    return verdicts


def write_verdicts(path: str | os.PathLike[str], verdicts: Mapping[str, Verdict]) -> None:
    """All or nothing."""
    with atomic_path(Path(path)) as temporary:
        lines = (json.dumps({"id": name, **vars(verdict)}) + "\n" for name, verdict in verdicts.items())
        temporary.write_text("".join(lines), encoding="utf-8")


def digest(verdicts: Mapping[str, Verdict]) -> str:
    """sha256 over verdicts, in whatever order."""
    told = json.dumps(sorted((name, verdict.accepted, float(verdict.weight)) for name, verdict in verdicts.items()))
    return hashlib.sha256(told.encode()).hexdigest()
