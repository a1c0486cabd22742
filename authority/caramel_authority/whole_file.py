# SPDX-License-Identifier: MIT OR Apache-2.0
"""Files that have the old content or the new one at any instant, and after a loss of power as well."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import WrongUsage

NEW = ".new"


def refuse_other_kinds(path: Path) -> None:
    """Nothing is put in the place of a device (for root, rename(2) would do it), a link, a socket or a folder. Raises
    WrongUsage.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise WrongUsage(f"{path} is no regular file")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside the path, of mode 0600 (mkstemp(3)), which takes its place when the block ends, and is gone
    when the block fails. What others left who were killed is removed; whoever is still at work has a lock on theirs.
    Raises WrongUsage where something else than a regular file is there.
    """
    refuse_other_kinds(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{NEW}"):
        with contextlib.suppress(OSError), left.open("rb") as old:
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for one in path.parent.glob(f"{glob.escape(left.name)}*"):  # SQLite has some beside its own
                one.unlink()
    handle, name = _locked(path)
    try:
        yield Path(name)
        os.fsync(handle)
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # what is to be freed or mended: write(2) has no name of its file
        raise
    finally:
        os.close(handle)
    flush(path.parent)


def _locked(path: Path) -> tuple[int, str]:
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=NEW, dir=path.parent)
        with contextlib.suppress(OSError):  # where there are no locks, nobody can remove it either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):  # nobody took it for one that was left, before it was locked
            return handle, name
        os.close(handle)


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """Puts this content there, with this mode: it never had more rights than that."""
    with replacing(path) as new:
        new.write_bytes(content)
        new.chmod(mode)


def flush(folder: Path) -> None:
    """What got another name in this folder has it after a loss of power (fsync(2))."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
