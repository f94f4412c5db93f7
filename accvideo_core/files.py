"""Writing files so that nobody ever meets half of one: temporary file in the same folder, fsync, replace, fsync of the folder.

Every file this project writes goes through `atomic_path`; work that takes long calls `check_writable` before it starts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import AccVideoError, OutputError

_SPARE = 64 * 2**20  # left free on the disk
_CURES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some of your quota or choose another disk",
    errno.EACCES: "choose a folder you may write to, and close any program that has the file open",
    errno.EPERM: "choose a folder you may write to, and close any program that has the file open",
    errno.EROFS: "this disk is read-only; choose another",
    errno.ENOTDIR: "part of the path is a file, not a folder; choose another path",
    errno.EEXIST: "part of the path is a file, not a folder; choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], replace: bool = True) -> Iterator[Path]:
    """Write `path` all or not at all: `with atomic_path("a.safetensors") as temporary: save(tensors, temporary)`.

    Yields a path, not yet existing, in the same folder (made if missing) and ending in `.tmp`, so a writer that goes by
    the suffix must be told its format. When the block ends well the file is flushed to the disk and moved to `path`,
    replacing what was there; when it raises, the temporary file is removed and what was there is untouched. The writer
    must have closed its file by then (Windows moves no open file). Without `replace` a `path` that is there by then stays,
    and FileExistsError says so: of several processes that write it at once, exactly one does.

    Raises OutputError, naming path, reason and cure, for every OSError of the writing itself: one that names another file
    (an input read inside the block) passes as it is.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp") if path.name else path
    try:
        _prepare(path)
        mode = _usual_mode(temporary)
        yield temporary
        temporary.chmod(mode)  # some writers (safetensors) make files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _move_to_new(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        taken = not replace and isinstance(error, FileExistsError) and path.is_file()
        if taken or isinstance(error, AccVideoError) or not _is_about(error, temporary, path):
            raise
        raise output_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise the OutputError that `atomic_path(path)` would, now, before hours of work; leaves no file and changes none.

    A missing folder is made. What cannot be known ahead (a disk that fills up) is found at the end all the same.
    """
    path = Path(path)
    probe = path.with_name(f".{secrets.token_hex(8)}.tmp") if path.name else path
    try:
        _prepare(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        if isinstance(error, AccVideoError):
            raise
        raise output_error(path, error) from error


def check_output(out: Path, inputs: Iterable[Path], overwrite: bool, size: int = 0) -> None:
    """Raise OutputError, before any work, unless `out` can be written: not one of the inputs, not there already (or to be
    overwritten), in a folder one may write to, on a disk with `size` bytes and some to spare."""
    for path in inputs:
        if out.exists() and path.exists() and os.path.samefile(out, path):
            raise OutputError(f"the output {str(out)!r} is one of the inputs; choose another name")
    if out.exists() and not overwrite:
        raise OutputError(f"{str(out)!r} exists; choose another name, or say that it may be overwritten")
    if not out.is_dir():
        check_writable(out)
    free = shutil.disk_usage(out.parent).free
    if free < size + _SPARE:
        raise OutputError(
            f"{str(out)!r} will have {size / 1e9:.2f} GB but only {free / 1e9:.2f} GB are free there; free some space or choose "
            "another disk"
        )


def _usual_mode(unused: Path) -> int:
    """Permissions that this user's new files have in that folder."""
    unused.touch(exist_ok=False)
    mode = stat.S_IMODE(unused.stat().st_mode)
    unused.unlink()
    return mode


def _prepare(path: Path) -> None:
    """Make the folder; refuse a target that is a folder or a device: replacing /dev/null would break the machine."""
    if not path.name or path.is_dir():
        raise OutputError(f"cannot write {str(path)!r}: it is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise OutputError(f"cannot write {str(path)!r}: it is a device or a pipe; name a plain file")


def _is_about(error: OSError, *paths: Path) -> bool:
    """Whether an OSError concerns one of these paths or their folder; one without a file name comes from the open file."""
    if error.filename is None:
        return True
    return Path(os.fsdecode(error.filename)) in {p for path in paths for p in (path, *path.parents)}


def output_error(path: Path, error: OSError) -> OutputError:
    """What the system said about writing `path`, with the cure."""
    reason = error.strerror or str(error) or type(error).__name__
    cure = _CURES.get(error.errno or 0, "choose another place to write to")
    return OutputError(f"cannot write {str(path)!r}: {reason[:1].lower()}{reason[1:]}; {cure}")


def _move_to_new(temporary: Path, path: Path) -> None:
    """Move a file to a name that must be free, whole: FileExistsError if it is not."""
    if os.name == "nt":
        os.rename(temporary, path)  # replaces nothing there
        return
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # No hard links here (FAT, some network disks): the name is taken at once, and filled right after.
        with open(temporary, "rb") as source, open(path, "xb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system can (Windows cannot, some network disks do not)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, and make their names survive a power cut. Raises OutputError as `atomic_path`."""
    try:
        above = [folder, *folder.parents]
        missing = above[: next(i for i, parent in enumerate(above) if parent.is_dir())]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync_folder(made.parent)
    except OSError as error:
        raise output_error(folder, error) from error


def append_at(path: Path, end: int, line: bytes) -> int:
    """Write a line at byte `end` of a file that only grows, and flush it to the disk; returns where the next one begins.

    What lies beyond `end` goes: it is what a writer was writing when it died. `end` is that of the last whole line. The file,
    not its folder, is made if missing. On failure what was there up to `end` is untouched. Raises OutputError as `atomic_path`.
    """
    try:
        new = not path.exists()
        with open(path, "xb" if new else "r+b", buffering=0) as file:
            file.seek(end)
            file.truncate()
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        if new:
            sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from error
    return end + len(line)


class Lines:
    """A file of lines that one process at a time adds to, whose `content` was read; by default it is still to be made.

    end  of its last whole line: what follows was being written when its writer died, and `add` writes over it
    """

    def __init__(self, path: Path, content: bytes = b"") -> None:
        self.path, self.end, self._size = path, content.rfind(b"\n") + 1, len(content)

    def is_changed(self) -> bool:
        """Whether another process has changed the file since."""
        return (self.path.stat().st_size if self.path.exists() else 0) != self._size

    def add(self, line: bytes) -> None:
        """Write a line as `append_at` does."""
        self.end = self._size = append_at(self.path, self.end, line)
