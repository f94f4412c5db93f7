"""The progress bar of work on large files, for the commands and the nodes that do it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def byte_progress(what: str, leave: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (bytes done, bytes in all) that moves a bar on the console; `leave` keeps it there at the end."""
    with tqdm(desc=what, unit="B", unit_scale=True, leave=leave) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
