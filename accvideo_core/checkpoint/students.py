"""Whether weights are a student's, as their file tells: tensor by tensor a student looks like its teacher."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

STUDENT = "accvideo_student"
"""The metadata key under which a student, or its LoRA, says what it was made for: JSON, {"steps": 5}."""

_NAMED = re.compile(r"accvid", re.IGNORECASE)  # AccVideo's releases and what others make of them: "..._accvid_5_steps_..."
_STEPS = re.compile(r"(?<!\d)(\d{1,3})[-_ ]?steps?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Student:
    """Weights distilled for so many steps; None where the file does not say how many."""

    steps: int | None


def student_metadata(steps: int) -> dict[str, str]:
    """Metadata that tells a student of so many steps."""
    return {STUDENT: json.dumps({"steps": steps})}


def find_student(name: str, metadata: Mapping[str, str]) -> Student | None:
    """What a file, a checkpoint or a LoRA, tells of the student it holds; None if nothing says that it is one.

    name      the file's name, with the folders it is listed under; not those the list itself lies in, which say nothing of it
    metadata  the file's own; one merged by us names its LoRAs there
    """
    try:
        if (steps := int(json.loads(metadata[STUDENT])["steps"])) > 0:
            return Student(steps)
    except (KeyError, ValueError, TypeError):
        pass
    parts = [part for part in name.replace("\\", "/").split("/") if part.lower() != "accvideo"]  # our own nodes' output folder
    for text in (*reversed(parts), metadata.get("accvideo_merge", "")):
        if _NAMED.search(text):
            found = _STEPS.search(text)
            return Student(int(found[1]) if found and int(found[1]) > 0 else None)
    return None
