"""Prompt files: a prompt a line (.txt), a table with a `prompt` column (.csv), or an object a line (.jsonl).

A row of a table or an object may also name its `id` and its `seed`; whatever else it carries is left alone.
"""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ..errors import AccVideoWarning, PromptError
from .manifest import NAME


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the id and seed its file gives it, if any."""

    text: str
    id: str | None = None
    seed: int | None = None


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts of a file, in its order, without blank ones; the format goes by the suffix.

    A prompt that stands there again with the same id and seed is left out, with an AccVideoWarning that names the lines.
    Raises PromptError, naming file and line, for what cannot be read, an unusable id or seed, and a file without prompts.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise PromptError(f"{str(path)!r} is no prompt file; its name must end in {', '.join(FORMATS)}")
    found: dict[Prompt, int] = {}
    again: list[int] = []
    named: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for line, row in FORMATS[path.suffix.lower()](file):
                prompt = _check(row, f"{str(path)!r}, line {line}")
                if prompt is None:
                    continue
                if prompt in found:
                    again.append(line)
                    continue
                if prompt.id is not None and named.setdefault(prompt.id, line) != line:
                    raise PromptError(f"{str(path)!r} has the id {prompt.id!r} in line {named[prompt.id]} and in line {line}")
                found[prompt] = line
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"cannot read {str(path)!r} as a prompt file: {error}; give UTF-8 text") from error
    if again:
        lines = ", ".join(map(str, again[:10])) + (f" and {len(again) - 10} more" if len(again) > 10 else "")
        warnings.warn(
            f"{str(path)!r} repeats prompts in lines {lines}; left out. For several videos of a prompt ask for several seeds",
            AccVideoWarning,
            stacklevel=2,
        )
    if not found:
        raise PromptError(f"{str(path)!r} has no prompts; give one a line")
    return list(found)


def _check(row: Mapping[str, Any], where: str) -> Prompt | None:
    """None for a row without a prompt."""
    text, name, seed = row.get("prompt"), row.get("id"), row.get("seed")
    if text is not None and not isinstance(text, str):
        raise PromptError(f"{where}: the prompt must be text, not {text!r}")
    if not text or not text.strip():
        return None
    if halves := [letter for letter in text if "\ud800" <= letter <= "\udfff"]:
        raise PromptError(f"{where}: the prompt has half a letter, {halves[0]!r}, as of a text cut in two; write it whole")
    try:
        number = None if seed in (None, "") else int(str(seed))
    except ValueError:
        number = -1
    if number is not None and not 0 <= number < 2**64:
        raise PromptError(f"{where}: the seed {seed!r} must be a whole number from 0 to 2**64 - 1")
    if name not in (None, "") and not NAME.fullmatch(str(name)):
        raise PromptError(f"{where}: the id {name!r} must be 1 to 100 small letters, digits, dots, dashes or underscores")
    return Prompt(text.strip(), None if name in (None, "") else str(name), number)


def _read_txt(file: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(file, 1):
        yield line, {"prompt": text}


def _read_csv(file: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    if "prompt" not in (reader.fieldnames or ()):
        raise PromptError(f"{file.name!r} has no column named prompt in its first line, but {reader.fieldnames}")
    for row in reader:
        yield reader.line_num, row


def _read_jsonl(file: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise PromptError(f"{file.name!r}, line {line} is no JSON: {error}") from error
        if not isinstance(row, dict) or "prompt" not in row:
            raise PromptError(f'{file.name!r}, line {line} must be an object with a prompt: {{"prompt": "a red ball"}}')
        yield line, row


FORMATS = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
