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


def failing(
    number: int, when: Callable[..., bool] = lambda *_: True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function fail with the error `number` when its arguments are such."""

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            if when(*arguments):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        return act

    return wrap


def broken(
    monkeypatch: pytest.MonkeyPatch, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    monkeypatch.setattr(os, name, wrap(getattr(os, name)))


def makes(_path: str, flags: int, *_: object) -> bool:
    return flags & os.O_CREAT != 0


def beside(path: str) -> list[str]:
    return sorted(os.listdir(os.path.dirname(path)))


def test_nothing_there_is_none(path: str) -> None:
    assert KeyFile.open(path) is None


def test_a_new_file_is_empty_locked_and_gone_where_nothing_was_stored(path: str) -> None:
    file = KeyFile.create(path, OURS)
    assert file.read() == b"" and file.permissions == OURS
    with pytest.raises(Locked):
        KeyFile.open(path)
    file.close()
    assert beside(path) == []


def test_a_new_file_where_somebody_has_removed_it_meanwhile(path: str) -> None:
    file = KeyFile.create(path, OURS)
    os.unlink(path)
    file.close()
    assert beside(path) == []


def test_a_file_system_without_owners(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "fchown", failing(errno.EPERM))
    with pytest.raises(StorageError, match=r"not permitted|only root can give it"):
        KeyFile.create(path, OURS._replace(owner=OURS.owner + 1))
    assert beside(path) == []
    # What changes nothing isn't asked for.
    KeyFile.create(path, OURS).close()


def test_a_file_that_can_not_be_made_leaves_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "fchmod", failing(errno.EIO))
    with pytest.raises(StorageError, match="can't make"):
        KeyFile.create(path, OURS._replace(mode=0o640))
    assert beside(path) == []


def test_a_folder_that_takes_no_new_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, "open", failing(errno.EROFS, makes))
    with pytest.raises(StorageError, match="Read-only"):
        KeyFile.create(path, OURS)


def test_two_make_the_file_and_the_other_was_first(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(name: str, flags: int, *arguments: Any, **options: Any) -> Any:
            if makes(name, flags):
                Path(path).write_bytes(b"theirs")
            return real(name, flags, *arguments, **options)

        return opened

    broken(monkeypatch, "open", meanwhile)
    file = KeyFile.create(path, OURS)
    assert file.read() == b"theirs"
    file.close()
    assert Path(path).read_bytes() == b"theirs", "it is not ours to remove"


def test_a_file_that_was_put_there_meanwhile_is_not_ours_to_remove(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(*_: Any) -> None:
        Path(path + ".theirs").write_bytes(b"theirs")
        os.replace(path + ".theirs", path)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(keyfile, "_hand_over", replaced)
    with pytest.raises(StorageError, match="can't make"):
        KeyFile.create(path, OURS)
    assert Path(path).read_bytes() == b"theirs"


def test_a_file_that_was_put_in_the_place_of_an_empty_one_is_not_ours_to_remove(path: str) -> None:
    file = KeyFile.create(path, OURS)
    Path(path + ".theirs").write_bytes(b"theirs")
    os.replace(path + ".theirs", path)
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

    broken(monkeypatch, "stat", failing(errno.ENOENT, later))
    with pytest.raises(Locked):
        KeyFile.open(path)


def test_a_lock_that_can_not_be_had_is_no_lock(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(path).write_bytes(b"")
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK)(fcntl.flock))
    with pytest.raises(StorageError, match="can't lock"):
        KeyFile.open(path)


def test_what_is_no_file_is_not_touched(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("", "fifo"):
        with pytest.raises(StorageError, match="no regular file"):
            KeyFile.open(str(tmp_path / name))


def test_a_loop_of_links(tmp_path: Path) -> None:
    os.symlink("b", tmp_path / "a")
    os.symlink("a", tmp_path / "b")
    with pytest.raises(StorageError, match=r"can't open .*Too many levels"):
        KeyFile.open(str(tmp_path / "a"))


def test_a_file_that_can_not_be_read() -> None:
    with open("/proc/self/mem", "rb") as file, pytest.raises(StorageError, match="can't read it: Input/output error"):
        keyfile.read(file.fileno(), "it")  # nothing is mapped at 0


@pytest.mark.parametrize("name", ["fchmod", "write", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_can_not_be_stored_leaves_the_old(
    path: str, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    Path(path).write_bytes(b"old")
    file = KeyFile.open(path)
    assert file is not None
    broken(monkeypatch, name, failing(number))
    with pytest.raises(StorageError, match="can't store"):
        file.replace(b"new", None, OURS._replace(mode=0o640))
    file.close()
    assert Path(path).read_bytes() == b"old" and beside(path) == ["identity.pem"]


def test_a_signal_while_it_is_stored_leaves_the_old(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(path).write_bytes(b"old")
    file = KeyFile.open(path)
    assert file is not None

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        file.replace(b"new", None, OURS)
    file.close()
    assert Path(path).read_bytes() == b"old" and beside(path) == ["identity.pem"]


def test_a_draft_that_can_not_be_made(path: str) -> None:
    Path(path).write_bytes(b"old")
    os.mkdir(os.path.join(os.path.dirname(path), ".identity.pem.new"))
    file = KeyFile.open(path)
    assert file is not None
    with pytest.raises(StorageError, match="can't store"):
        file.replace(b"new", None, OURS)
    file.close()


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
        broken(patched, "fsync", failing(errno.EINVAL, folder))
        file.replace(b"no such thing here", None, OURS)
    broken(monkeypatch, "fsync", failing(errno.EIO, folder))
    with pytest.raises(StorageError, match="flush the folder"):
        file.replace(b"new", None, OURS)
    file.close()
    assert Path(path).read_bytes() == b"new", "whole, old or new; here it has the name already"


def test_folders_are_made_and_one_that_somebody_else_makes_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(real: Callable[..., Any]) -> Callable[..., Any]:
        def mkdir(*arguments: Any, **options: Any) -> Any:
            real(*arguments, **options)
            return real(*arguments, **options)

        return mkdir

    broken(monkeypatch, "mkdir", meanwhile)
    KeyFile.create(str(tmp_path / "a" / "b" / "identity.pem"), OURS).close()
    assert (tmp_path / "a" / "b").is_dir()
    broken(monkeypatch, "mkdir", failing(errno.EACCES))
    with pytest.raises(StorageError, match=r"can't (make|open) the folder"):
        KeyFile.create(str(tmp_path / "c" / "identity.pem"), OURS)


def test_a_lock_that_wants_a_file_that_can_be_written(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: an exclusive flock on a descriptor that can't write is EBADF (flock(2))."""
    Path(path).write_bytes(b"old")

    def nfs(fd: int, operation: int) -> bool:
        return bool(operation & fcntl.LOCK_EX) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY

    monkeypatch.setattr(fcntl, "flock", failing(errno.EBADF, nfs)(fcntl.flock))
    file = KeyFile.open(path)
    assert file is not None and file.read() == b"old"
    file.close()


def test_what_is_flushed_and_when(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content before the name; then the folder, and the file once more, for FAT."""
    done: list[str] = []

    def noted(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            what = name
            if name == "fsync":
                what += " folder" if stat.S_ISDIR(os.fstat(arguments[0]).st_mode) else " file"
            done.append(what)
            return real(*arguments, **options)

        return act

    file = KeyFile.create(path, OURS)
    for name in ("fsync", "rename", "write"):
        monkeypatch.setattr(os, name, noted(getattr(os, name), name))
    file.replace(b"new", None, OURS)
    file.close()
    assert done == ["write", "fsync file", "rename", "fsync folder", "fsync file"]
