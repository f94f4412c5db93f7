"""Worlds of several processes on the CPU, joined by gloo, for tests."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import start_processes

from accvideo_core.distill.parallel import World

Job = Callable[["Ranks", Path], None]


class Ranks:
    """One of `size` processes; with some or all of the others it forms one world after another."""

    def __init__(self, rank: int, ports: Sequence[int]) -> None:
        self.rank, self._ports = rank, iter(ports)

    @contextmanager
    def environment(self, size: int) -> Iterator[bool]:
        """What torchrun tells the first `size` processes; False, and nothing told, in the others. All must call it."""
        port = next(self._ports)
        named = {"RANK": self.rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in named.items() if self.rank < size else ():
                patch.setenv(name, str(value))
            yield self.rank < size

    @contextmanager
    def world(self, size: int, sequence: int = 1) -> Iterator[World | None]:
        """The world of the first `size` processes, as torchrun would start it; None in the others. All must call it."""
        with self.environment(size) as inside:
            world = World.start(sequence, "cpu") if inside else None
        try:
            yield world
        finally:
            if world is not None:
                world.close()


def in_processes(size: int, job: Job, folder: Path, worlds: int) -> None:
    """Run `job(ranks, folder)`, a function of a module, in that many processes; it may form so many worlds. Raises what one
    of them raised."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload([job.__module__])  # imported once instead of in each
    start_processes(_enter, (job, folder, _free_ports(worlds)), size, start_method=method)


def _enter(rank: int, job: Job, folder: Path, ports: Sequence[int]) -> None:
    torch.set_num_threads(1)
    job(Ranks(rank, ports), folder)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]
