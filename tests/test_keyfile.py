"""The key file by itself: what each fault of the machine makes of it, without a process around it.

The same with real faults is in test_faults.py and test_torture.py, where strace makes system calls fail.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any, Callable

import pytest

from caramel_embedded import Locked, StorageError, keyfile
from caramel_embedded.keyfile import KeyFile
from caramel_embedded.settings import Permissions

OURS = Permissions(os.geteuid(), os.getegid(), 0o600)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "identity.pem")


def failing(real: Callable[..., Any], error: Any, when: Callable[..., bool] = lambda *_: True) -> Callable[..., Any]:
    """The function, which raises `error`, an exception or its number, when its arguments are such."""

    def act(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(error, os.strerror(error)) if isinstance(error, int) else error
        return real(*arguments, **options)

    return act


def broken(
    monkeypatch: pytest.MonkeyPatch, name: str, error: Any, when: Callable[..., bool] = lambda *_: True
) -> None:
    monkeypatch.setattr(os, name, failing(getattr(os, name), error, when))


def makes(_path: str, flags: int, *_: object) -> bool:
    return flags & os.O_CREAT != 0


def beside(path: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(path)))


def put_theirs(path: str) -> None:
    """Somebody else gives the name to a file of theirs."""
    Path(path + ".theirs").write_bytes(b"theirs")
    os.replace(path + ".theirs", path)


def opened(path: str, content: bytes = b"old") -> KeyFile:
    Path(path).write_bytes(content)
    file = KeyFile.open(path)
    assert file is not None
    return file


def test_nothing_there_is_none(path: str) -> None:
    assert KeyFile.open(path) is None


def test_a_new_file_is_empty_locked_and_gone_where_nothing_was_stored(path: str) -> None:
    file = KeyFile.create(path, OURS)
    assert file.read() == b"" and file.permissions == OURS
    with pytest.raises(Locked):
        KeyFile.open(path)
    file.close()
    assert beside(path) == []
    file = KeyFile.create(path, OURS)
    os.unlink(path)  # by somebody else, meanwhile
    file.close()
    assert beside(path) == []


@pytest.mark.parametrize(
    ("name", "error", "wanted", "says"),
    [
        ("fchown", errno.EPERM, OURS._replace(owner=OURS.owner + 1), r"not permitted|only root can give it"),
        ("fchmod", errno.EIO, OURS._replace(mode=0o640), "can't make"),
        ("open", errno.EROFS, OURS, "Read-only"),
    ],
)
def test_a_file_that_can_not_be_made_leaves_nothing(
    path: str, monkeypatch: pytest.MonkeyPatch, name: str, error: int, wanted: Permissions, says: str
) -> None:
    broken(monkeypatch, name, error, makes if name == "open" else lambda *_: True)
    with pytest.raises(StorageError, match=says):
        KeyFile.create(path, wanted)
    assert beside(path) == []
    if name == "fchown":  # a file system without owners: what changes nothing isn't asked for
        KeyFile.create(path, OURS).close()


def test_two_make_the_file_and_the_other_was_first(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(name: str, flags: int, *_: object) -> bool:
        if makes(name, flags):
            put_theirs(path)
        return False

    broken(monkeypatch, "open", 0, meanwhile)
    file = KeyFile.create(path, OURS)
    assert file.read() == b"theirs"
    file.close()
    assert Path(path).read_bytes() == b"theirs", "it is not ours to remove"


@pytest.mark.parametrize("fails", [True, False])
def test_a_file_that_was_put_there_meanwhile_is_not_ours_to_remove(
    path: str, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def replaced(*_: Any) -> None:
        put_theirs(path)
        raise OSError(errno.EIO, "broken")

    if fails:
        monkeypatch.setattr(keyfile, "_hand_over", replaced)
        with pytest.raises(StorageError, match="can't make"):
            KeyFile.create(path, OURS)
    else:
        file = KeyFile.create(path, OURS)
        put_theirs(path)
        file.close()
    assert Path(path).read_bytes() == b"theirs"


def test_who_waits_for_what_was_replaced_waits_until_the_end(path: str) -> None:
    """flock(1) without -n has opened what was there when it began to wait."""
    file = KeyFile.create(path, OURS)
    with open(path, "rb") as before:
        file.replace(b"new", None, OURS)
        with pytest.raises(BlockingIOError):
            fcntl.flock(before, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.close()
        fcntl.flock(before, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_that_is_replaced_again_and_again_counts_as_locked(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(path).write_bytes(b"")
    monkeypatch.setattr(keyfile.Folder, "leads_to", lambda folder, name, fd: False)
    with pytest.raises(Locked, match="is replacing"):
        KeyFile.open(path)
    os.unlink(path)
    monkeypatch.setattr(keyfile, "_create_locked", lambda *_: None)
    with pytest.raises(Locked, match="is making"):
        KeyFile.create(path, OURS)


def test_a_file_that_vanishes_while_it_is_locked_is_looked_for_again(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(path).write_bytes(b"")
    looks = []

    def later(name: object) -> bool:
        looks.append(name)
        return name == "identity.pem" and looks.count(name) > 1  # the look after the lock

    broken(monkeypatch, "stat", errno.ENOENT, later)
    with pytest.raises(Locked):
        KeyFile.open(path)


def test_a_lock_that_can_not_be_had_is_no_lock(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(path).write_bytes(b"")
    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, errno.ENOLCK))
    with pytest.raises(StorageError, match="can't lock"):
        KeyFile.open(path)


def test_a_file_that_can_not_be_read() -> None:
    with open("/proc/self/mem", "rb") as file, pytest.raises(StorageError, match="can't read it: Input/output error"):
        keyfile.read(file.fileno(), "it")  # nothing is mapped at 0


@pytest.mark.parametrize("name", ["fchmod", "write", "fsync", "rename"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, KeyboardInterrupt])
def test_what_can_not_be_stored_leaves_the_old(
    path: str, monkeypatch: pytest.MonkeyPatch, name: str, error: Any
) -> None:
    """A signal is raised as KeyboardInterrupt."""
    file = opened(path)
    broken(monkeypatch, name, error)
    signal = error is KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt if signal else StorageError, match=None if signal else "can't store"):
        file.replace(b"new", None, OURS._replace(mode=0o640))
    file.close()
    assert Path(path).read_bytes() == b"old" and beside(path) == ["identity.pem"]


def test_a_draft_that_can_not_be_made(path: str) -> None:
    os.mkdir(os.path.join(os.path.dirname(path), ".identity.pem.new"))
    file = opened(path)
    with pytest.raises(StorageError, match="can't store"):
        file.replace(b"new", None, OURS)
    file.close()
    assert Path(path).read_bytes() == b"old"


def test_a_time_that_the_system_can_not_count_to_costs_nothing(path: str) -> None:
    file = KeyFile.create(path, OURS)
    file.replace(b"new", 2.0**80, OURS)
    file.touch(2.0**80)
    file.touch(7)
    assert file.modified == 7
    file.close()
    assert Path(path).read_bytes() == b"new"


def test_a_folder_that_can_not_be_flushed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(fd: int) -> bool:
        return stat.S_ISDIR(os.fstat(fd).st_mode)

    file = KeyFile.create(path, OURS)
    with monkeypatch.context() as patched:
        broken(patched, "fsync", errno.EINVAL, folder)
        file.replace(b"no such thing here", None, OURS)
    broken(monkeypatch, "fsync", errno.EIO, folder)
    with pytest.raises(StorageError, match="flush the folder"):
        file.replace(b"new", None, OURS)
    file.close()
    assert Path(path).read_bytes() == b"new", "whole, old or new; here it has the name already"


def test_folders_are_made_and_one_that_somebody_else_makes_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def meanwhile(*arguments: Any, **options: Any) -> None:
        mkdir(*arguments, **options)
        mkdir(*arguments, **options)

    monkeypatch.setattr(os, "mkdir", meanwhile)
    KeyFile.create(str(tmp_path / "a" / "b" / "identity.pem"), OURS).close()
    assert (tmp_path / "a" / "b").is_dir()
    broken(monkeypatch, "mkdir", errno.EACCES)
    with pytest.raises(StorageError, match=r"can't (make|open) the folder"):
        KeyFile.create(str(tmp_path / "c" / "identity.pem"), OURS)


def test_a_lock_that_wants_a_file_that_can_be_written(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: an exclusive flock on a descriptor that can't write is EBADF (flock(2))."""

    def nfs(fd: int, operation: int) -> bool:
        return bool(operation & fcntl.LOCK_EX) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY

    monkeypatch.setattr(fcntl, "flock", failing(fcntl.flock, errno.EBADF, nfs))
    file = opened(path)
    assert file.read() == b"old"
    file.close()
