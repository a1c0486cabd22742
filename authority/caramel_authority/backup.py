# SPDX-License-Identifier: MIT OR Apache-2.0
"""A copy of an SQLite database while it is in use, and a copy put in its place. PostgreSQL has its own: pg_dump."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from sqlalchemy.exc import DBAPIError

from .configuration import url_of
from .errors import WrongUsage
from .whole_file import refuse_other_kinds, replacing

#: What SQLite keeps beside a database.
BESIDE = ("-wal", "-shm", "-journal")
#: How each of its databases begins (sqlite.org/fileformat2.html).
MAGIC = b"SQLite format 3\0"
T = TypeVar("T")


def path_of(database: str) -> Path:
    """Where the SQLite database is. Raises WrongUsage where it is none."""
    url = url_of(database)
    if url.get_backend_name() != "sqlite":
        raise WrongUsage("this is for SQLite; PostgreSQL's own are pg_dump and pg_restore, see the README")
    return Path(url.database or "").absolute()


def backup(database: str, target: Path) -> None:
    """Copies the database as it is at one instant. The file is there as a whole, for its owner only, or it isn't.
    Raises WrongUsage.
    """
    source = path_of(database)
    if not source.is_file():
        raise WrongUsage(f"{source}: there is no database")
    real = source.resolve()
    if target.resolve() in [real.with_name(real.name + suffix) for suffix in ("", *BESIDE)] or _same(target, source):
        raise WrongUsage(f"{target} is the database itself")
    refuse_other_kinds(target)
    with contextlib.suppress(FileNotFoundError), target.open("rb") as file:
        # A mistyped path may be that of a key, or of `refusals`. An empty file is mktemp(1)'s.
        if file.read(len(MAGIC)) not in (MAGIC, b""):
            raise WrongUsage(f"{target} is there, and no copy of a database: remove it, or name another file")
    with _written(target, source) as new:
        _copy(source, new)


def restore(database: str, source: Path, prepare: Callable[[str], T]) -> T:
    """Puts a copy in the place of the database, which nobody may be using: when `prepare`, which is told its address,
    has made it fit for that. Raises WrongUsage, or what `prepare` does, and the database is the old one then.
    """
    target = path_of(database).resolve()
    if not source.is_file():
        raise WrongUsage(f"{source}: there is no such file")
    if _same(source, target):
        raise WrongUsage(f"{source} is the database itself")
    refuse_other_kinds(target)
    _refuse_if_used(target)
    with _written(target, source) as new:
        if not target.exists():
            # As where `init` makes it: the signer's user has to write to it as well.
            new.chmod(target.parent.stat().st_mode & 0o660)
        try:
            _copy(source, new)
            done = prepare(f"sqlite:///{new}")
            with contextlib.closing(_open(new, "rw")) as db:
                db.execute("PRAGMA journal_mode = DELETE")
        finally:
            _unlink_beside(new)
        _unlink_beside(target)  # of the database that was there: they don't belong to this one
    return done


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _unlink_beside(path: Path) -> None:
    for suffix in BESIDE:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    with contextlib.closing(_open(source, "ro")) as old, contextlib.closing(_open(target, "rw")) as new:
        old.backup(new)
        new.execute("PRAGMA journal_mode = DELETE")  # so that the copy is this one file
        (said,) = new.execute("PRAGMA quick_check").fetchone()
        if said != "ok" or not new.execute("SELECT 1 FROM sqlite_master WHERE name = 'requests'").fetchone():
            raise WrongUsage(f"no sound database of an authority: {said}")


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
def _written(path: Path, source: Path) -> Iterator[Path]:
    """A new file, which gets this path, and what the file before it had of owner and mode, when the block ends. What
    goes wrong with it is said of the source. Raises WrongUsage.
    """
    try:
        with replacing(path) as new:
            if path.exists():
                before = path.stat()
                new.chmod(before.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.chown(new, before.st_uid, before.st_gid)
            yield new
    except (OSError, WrongUsage, sqlite3.Error, DBAPIError) as error:
        said = str(error.orig if isinstance(error, DBAPIError) else error)
        if re.search("disk is full|No space left|quota", said):
            raise WrongUsage(f"nothing was changed: free some of the disk that has {path}") from None
        if isinstance(error, OSError):
            raise
        raise WrongUsage(f"{source}: {said}") from None
