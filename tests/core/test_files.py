"""A file is whole or not there, and an error names the path and the cure."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from accvideo_core import files
from accvideo_core.errors import OutputError
from accvideo_core.files import atomic_path, check_writable

needs_permissions = pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root and Windows may write anywhere")


def test_writes_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.bin"
    for content in (b"first", b"second"):
        with atomic_path(target) as temporary:
            assert temporary.parent == target.parent and not temporary.exists()
            temporary.write_bytes(content)
            assert not target.exists() or target.read_bytes() == b"first"
        assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("failure", [ValueError("mine"), KeyboardInterrupt()])
def test_a_failed_block_keeps_the_old_file_and_its_own_error(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(failure)), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise failure
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_mode_is_that_of_any_file_the_user_makes(tmp_path: Path) -> None:
    plain, target = tmp_path / "plain", tmp_path / "target"
    plain.write_bytes(b"")
    with atomic_path(target) as temporary:
        temporary.touch(mode=0o600)  # as safetensors does; a weight folder is often shared
    assert target.stat().st_mode == plain.stat().st_mode


def test_a_full_disk_is_an_output_error_with_a_cure(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"a\.bin.*no space left.*free some space"),
        atomic_path(tmp_path / "a.bin") as temporary,
    ):
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_input_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes((tmp_path / "input.bin").read_bytes())
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a\.bin"), atomic_path(tmp_path / "a.bin"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_everything_is_flushed_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    with atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"x")
    assert order == (["fsync", "replace"] if os.name == "nt" else ["fsync", "replace", "fsync"])


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_while_closing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, failing, fail)
    with pytest.raises(OutputError, match="input/output error"), atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def _write(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"x")


@pytest.mark.parametrize("attempt", [_write, check_writable])
def test_impossible_targets(tmp_path: Path, attempt) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for path, words in [
        (tmp_path, "it is a folder; name a file in it"),
        (tmp_path / "file" / "a.bin", "part of the path is a file"),
        (tmp_path / "file" / "b" / "a.bin", "part of the path is a file"),
        (Path(os.devnull), "device"),
        (Path("/"), "it is a folder"),
        (Path(""), "it is a folder"),
    ]:
        with pytest.raises(OutputError, match=words) as caught:
            attempt(path)
        assert repr(str(path)) in str(caught.value)
        assert caught.value.exit_code == 1
    if os.name != "nt":
        with pytest.raises(OutputError, match="choose a shorter name"):
            attempt(tmp_path / ("n" * 300))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("attempt", [_write, check_writable])
def test_a_refused_write_names_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OutputError, match=r"a\.bin.*permission denied; choose a folder you may write to"):
        attempt(tmp_path / "a.bin")


@needs_permissions
@pytest.mark.parametrize("attempt", [_write, check_writable])
def test_a_folder_without_permission(tmp_path: Path, attempt) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="permission denied; choose a folder you may write to"):
        attempt(locked / "a.bin")


def test_check_writable_leaves_the_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.bin"
    check_writable(target)
    assert list(tmp_path.rglob("*")) == [target.parent]
    target.write_bytes(b"old")
    check_writable(target)
    assert target.read_bytes() == b"old"
