"""What long work on large files has in common: making things ahead in a thread, and hashes."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

_T = TypeVar("_T")


def ahead(items: Iterator[_T]) -> Generator[_T, None, None]:
    """The same items, made in a thread of their own, one ahead. Closing it ends the thread; its exceptions come through."""
    ready: queue.Queue[_Made[_T]] = queue.Queue(1)
    stopped = threading.Event()

    def put(made: _Made[_T]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(made, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(_Made([item])):
                    return
                del item
            put(_Made([]))
        except BaseException as error:
            put(_Made([], error))
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="accvideo-ahead", daemon=True)
    thread.start()
    try:
        while (made := ready.get()).items:
            yield made.items.pop()  # popped, so that the consumer alone holds it
        if made.error is not None:
            raise made.error
    finally:
        stopped.set()
        thread.join()


@dataclass
class _Made(Generic[_T]):
    """One item, or none at the end, with the exception that ended it."""

    items: list[_T]
    error: BaseException | None = None


def sha256_of(files: Iterable[Path], stopped: threading.Event | None = None) -> str:
    """sha256 of a file, or of several one after the other; "" if it was `stopped` on the way."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while piece := stream.read(1 << 22):
                if stopped is not None and stopped.is_set():
                    return ""
                digest.update(piece)
    return digest.hexdigest()
