"""Linux namespaces: a thread, and the programs it starts, with mounts and a network of their own.

Linux has namespaces for each thread; what a thread mounts in one of its own is seen by nobody else and is gone when
the thread ends, however that comes. Needs root.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, TypeVar

_T = TypeVar("_T")
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_REMOUNT, _MS_RDONLY = 4096, 16384, 1 << 18, 32, 1


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = [text.encode() for text in (source, target, kind)]
    _checked(_LIBC.mount(*arguments, ctypes.c_ulong(flags), data.encode()), f"mount on {target}")


def isolated(act: Callable[[], _T], network: bool = False) -> _T:
    """Calls `act` with mounts of its own, with `network` also with a network of its own; what it returned."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            _checked(_LIBC.unshare(_CLONE_NEWNS | (_CLONE_NEWNET if network else 0)), "unshare")
            _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
            if network:
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=20)
            outcome.append((act(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    value: _T = result
    return value


def memory_disk(target: Path, size: int, inodes: int = 0) -> None:
    """A file system in memory on the folder `target`, with `size` bytes and, if said, so many inodes."""
    _mount("none", str(target), "tmpfs", 0, f"size={size},mode=755" + (f",nr_inodes={inodes}" if inodes else ""))


def small_disk(target: Path, image: Path) -> None:
    """A real small file system, ext4 in the file `image`, on the folder `target`."""
    with open(image, "wb") as file:
        file.truncate(1 << 20)
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    for command in (
        ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)],
        ["mount", "-o", "loop", str(image), str(target)],
    ):
        subprocess.run(command, check=True, timeout=60, env={"PATH": search}, stdin=subprocess.DEVNULL)
    (target / "lost+found").rmdir()


def cover(target: Path, by: Path) -> None:
    """The file or folder `by` in the place of `target`."""
    _mount(str(by), str(target), "", _MS_BIND | _MS_REC)


def read_only(target: Path) -> None:
    """Makes what is mounted on `target`, or `target` itself, read-only."""
    cover(target, target)
    _mount("none", str(target), "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY)
