"""Where a dataset lies, to read from: a folder, or any address fsspec knows (s3://..., hf://..., memory://...).

A part of a local file is read with plain reads announced to the system, not through a memory map: mapped files were measured at
0.55 to 0.7 of the rate from a cold disk (benchmarks/synvid_read.py), and one that shrinks is a crash there and an error here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import SynVidError


def open_folder(address: str | os.PathLike[str]) -> Folder | RemoteFolder:
    """A folder to read, by path or fsspec address. SynVidError for an address that cannot be used."""
    return RemoteFolder(address) if isinstance(address, str) and "://" in address else Folder(Path(address))


class Folder:
    """A local folder; names in it are relative and have '/' in them on every system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        """The whole file; OSError as the system raises it."""
        return (self.path / name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")

    def read_parts(self, name: str, parts: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each (begin, view) with the file's bytes from there. EOFError if it ends before."""
        with open(self.path / name, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                for begin, view in parts:  # all of them at once: the disk reads the next while this one is copied
                    os.posix_fadvise(file.fileno(), begin, len(view), os.POSIX_FADV_WILLNEED)
            for begin, view in parts:
                file.seek(begin)
                done = 0
                while done < len(view):
                    if not (count := file.readinto(view[done:])):
                        raise EOFError(f"it ends {len(view) - done} bytes too early")
                    done += count

    def sizes(self, under: str) -> dict[str, int]:
        """{name: bytes} of the files in and below a folder; empty if there is none."""
        found = {}
        for folder, _, files in os.walk(self.path / under):
            for file in files:
                path = Path(folder, file)
                try:
                    found[path.relative_to(self.path).as_posix()] = path.stat().st_size
                except FileNotFoundError:  # a temporary file that has just got its name
                    continue
        return found


class RemoteFolder:
    """The same, at an fsspec address."""

    def __init__(self, address: str) -> None:
        import fsspec  # torch brings it

        self.address = address.rstrip("/")
        try:
            self._files, root = fsspec.core.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise SynVidError(f"the address {address!r} cannot be used: {error}") from error
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self.address

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes:
        with _as_os_error():
            return bytes(self._files.cat_file(self._at(name)))

    def open(self, name: str) -> Any:
        with _as_os_error():
            return self._files.open(self._at(name), "rb")

    def read_parts(self, name: str, parts: Sequence[tuple[int, memoryview]]) -> None:
        begins = [begin for begin, _ in parts]
        ends = [begin + len(view) for begin, view in parts]
        with _as_os_error():
            contents = self._files.cat_ranges([self._at(name)] * len(parts), begins, ends, on_error="raise")
        for content, (_, view) in zip(contents, parts, strict=True):
            if len(content) != len(view):
                raise EOFError(f"it ends {len(view) - len(content)} bytes too early")
            view[:] = content

    def sizes(self, under: str) -> dict[str, int]:
        with _as_os_error():
            try:
                found = self._files.find(self._at(under), detail=True)
            except FileNotFoundError:
                return {}
            start = len(self._root) + 1
            return {name[start:]: self._size(name, entry) for name, entry in found.items()}

    def _size(self, name: str, entry: dict[str, Any]) -> int:
        """As the listing says it, or where that does not (http), the file itself."""
        size = entry.get("size")
        if size is None and (size := self._files.info(name).get("size")) is None:
            raise OSError(f"the server does not say how large {name} is, which is needed to tell whether it is whole")
        return int(size)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Each kind of storage fails with errors of its own library; all mean that a file could not be read."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
