# SPDX-License-Identifier: MIT OR Apache-2.0
"""A copy of an SQLite database while it is in use, and a copy put in its place. PostgreSQL has its own: pg_dump."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from .configuration import url_of
from .errors import WrongUsage
from .whole_file import replacing


def path_of(database: str) -> Path:
    """Where the SQLite database is. Raises WrongUsage where it is none."""
    url = url_of(database)
    if url.get_backend_name() != "sqlite":
        raise WrongUsage("this is for SQLite; PostgreSQL's own are pg_dump and pg_restore, see the README")
    return Path(url.database or "").absolute()


def backup(database: str, target: Path) -> None:
    """Copies the database as it is at one instant. The file is there as a whole, for its owner only, or it isn't."""
    source = path_of(database)
    if not source.is_file():
        raise WrongUsage(f"{source}: there is no database")
    with _written(target) as new:
        _copy(source, new)


def restore(database: str, source: Path) -> None:
    """Puts a copy in the place of the database, which nobody may be using. Raises WrongUsage."""
    target = path_of(database)
    if not source.is_file():
        raise WrongUsage(f"{source}: there is no such file")
    _refuse_if_used(target)
    with _written(target) as new:
        if not target.exists():
            # As where `init` makes it: the signer's user has to write to it as well.
            new.chmod(target.parent.stat().st_mode & 0o660)
        _copy(source, new)
        for suffix in ("-wal", "-shm"):  # of the database that was there: they don't belong to this one
            target.with_name(target.name + suffix).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    try:
        with contextlib.closing(_open(source, "ro")) as old, contextlib.closing(_open(target, "rw")) as new:
            old.backup(new)
            new.execute("PRAGMA journal_mode = DELETE")  # so that the copy is this one file
            (said,) = new.execute("PRAGMA quick_check").fetchone()
            if said != "ok" or not new.execute("SELECT 1 FROM sqlite_master WHERE name = 'requests'").fetchone():
                raise WrongUsage(f"{source} is no sound database of an authority: {said}")
    except sqlite3.Error as error:
        raise WrongUsage(f"{source}: {error}") from None


def _refuse_if_used(path: Path) -> None:
    if not path.is_file():
        return
    try:
        with contextlib.closing(_open(path, "rw")) as db:
            # In WAL mode this lock is to be had only where nobody else has the database open (sqlite.org/wal.html).
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError:
        raise WrongUsage(f"{path} is in use: stop what serves and works first") from None
    except sqlite3.DatabaseError:
        pass  # damaged: that is why a copy is to take its place


def _open(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode={mode}", uri=True, isolation_level=None)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A new file, which gets this path, and what the file before it had of owner and mode, when the block ends."""
    with replacing(path) as new:
        if path.exists():
            before = path.stat()
            new.chmod(before.st_mode & 0o777)
            with contextlib.suppress(PermissionError):
                os.chown(new, before.st_uid, before.st_gid)
        yield new
