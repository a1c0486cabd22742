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
from typing import Any, Callable, TypeVar, Union

_T = TypeVar("_T")
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000


def _run(*command: Union[str, Path]) -> None:
    """A program in the namespaces of the thread that calls this."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    subprocess.run(command, check=True, timeout=60, env={"PATH": path}, stdin=subprocess.DEVNULL)


def isolated(act: Callable[[], _T], network: bool = False) -> _T:
    """Calls `act` with mounts of its own, with `network` also with a network of its own; what it returned."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            if _LIBC.unshare(_CLONE_NEWNS | (_CLONE_NEWNET if network else 0)):
                raise OSError(ctypes.get_errno(), "unshare")
            _run("mount", "--make-rprivate", "/")
            if network:
                _run("ip", "link", "set", "lo", "up")
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
    options = f"size={size},mode=755" + (f",nr_inodes={inodes}" if inodes else "")
    _run("mount", "-t", "tmpfs", "-o", options, "none", target)


def small_disk(target: Path, image: Path) -> None:
    """A real small file system, ext4 in the file `image`, on the folder `target`."""
    with open(image, "wb") as file:
        file.truncate(1 << 20)
    _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image)
    _run("mount", "-o", "loop", image, target)
    (target / "lost+found").rmdir()


def cover(target: Path, by: Path) -> None:
    """The file or folder `by` in the place of `target`."""
    _run("mount", "--rbind", by, target)


def read_only(target: Path) -> None:
    """Makes what is mounted on `target`, or `target` itself, read-only."""
    cover(target, target)
    _run("mount", "-o", "remount,bind,ro", target)
