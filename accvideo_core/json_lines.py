"""Files of JSON lines, read so that what is wrong is named with its line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import AccVideoError

Item = TypeVar("Item")


def read_json_lines(
    path: str | os.PathLike[str],
    read: Callable[[Any], Item],
    names: str,
    expected: str,
    fault: type[AccVideoError] = AccVideoError,
) -> list[Item]:
    """What `read` makes of the value of every line that is not blank, in the file's order.

    names     what the file is called in errors: "the plan"
    expected  what a line should look like
    Raises `fault`, naming the file, or the line for which `read` raised ValueError, KeyError, TypeError or AttributeError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # splitlines would end a line at a text's U+2028 too
    except (OSError, UnicodeDecodeError) as error:
        raise fault(f"cannot read {names} {str(path)!r} ({error}); give a file of JSON lines") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise fault(f"{path!s}, line {number}: {error}; {expected}") from error
    return found
