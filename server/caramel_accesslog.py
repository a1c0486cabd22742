# SPDX-License-Identifier: MIT OR Apache-2.0
"""Rotation of Caramel's `accesslog`: the rows that are older than a number of days go, a few at a time.

Caramel writes a row for each check and takes none out. This runs beside the server, which goes on answering: each
batch is a transaction of its own, and after it the database belongs to the server for at least as long as the batch
took. That matters for SQLite, where one writer keeps all others out. Whoever ends this program loses nothing.

There is no index on the time, only on the number of a row, and rows are numbered in the order of their time. So the
smallest numbers are looked at first, and it ends at the first batch that has nothing to delete: the rest of the table
is never read. A row without a time, or from a day that is still to come, was written while the server's clock was
wrong. It is deleted as well, because it may be long until it is old.

SQLite keeps the room and writes the next rows into it: the file stops growing, and doesn't shrink.
"""

from __future__ import annotations

import argparse
import configparser
import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, NoReturn

import sqlalchemy as sa  # type: ignore[import-not-found,unused-ignore]

#: Rows that are looked at in one transaction. SQLite takes 32 766 values in a statement.
BATCH = 1000
#: The least time, in seconds, that the server has for itself between two batches.
PAUSE = 0.05

LOG = sa.table("accesslog", sa.column("id", sa.Integer), sa.column("when", sa.DateTime))


def delete_before(
    engine: Any,
    limit: datetime.datetime,
    *,
    batch: int = BATCH,
    pause: float = PAUSE,
    now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None),
) -> int:
    """Delete the rows from before `limit` (UTC, without a zone, as Caramel writes it) and return their number.

    `engine` is SQLAlchemy's; `pause` is in seconds. Raises `sqlalchemy.exc.SQLAlchemyError`; the batches before that
    are done.
    """
    deleted, last = 0, None
    while True:
        began = time.monotonic()
        with engine.begin() as connection:
            look = sa.select(LOG.c.id, LOG.c.when).order_by(LOG.c.id).limit(batch)
            rows = connection.execute(look if last is None else look.where(LOG.c.id > last)).fetchall()
            # A day, because clocks of several servers differ.
            future = now() + datetime.timedelta(days=1)
            old = [number for number, when in rows if when is None or when < limit or when > future]
            if old:
                connection.execute(sa.delete(LOG).where(LOG.c.id.in_(old)))
        deleted += len(old)
        if not old or len(rows) < batch:
            return deleted
        last = rows[-1][0]
        time.sleep(max(pause, time.monotonic() - began))


def settings(ini: Path) -> dict[str, str]:
    """The settings of Caramel in its INI file; CARAMEL_DBURL of the environment wins, as it does in Caramel.

    Raises OSError, and `configparser.Error` or KeyError where the file isn't such a one.
    """
    parser = configparser.ConfigParser(defaults={"here": str(ini.resolve().parent)}, strict=False)
    with open(ini, encoding="utf-8") as file:
        parser.read_file(file)
    found = dict(parser["app:main"])
    found["sqlalchemy.url"] = os.environ.get("CARAMEL_DBURL") or found["sqlalchemy.url"]
    return found


def main() -> None:
    """The command `caramel-accesslog`."""
    parser = argparse.ArgumentParser(description="Delete old rows of a Caramel server's accesslog, while it runs.")
    parser.add_argument("ini", type=Path, help="Caramel's INI file, for the address of its database")
    parser.add_argument("--days", type=int, default=30, help="how many days of it stay (30)")
    arguments = parser.parse_args()
    if arguments.days < 0:
        parser.error("--days: a number from 0")
    limit = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None) - datetime.timedelta(arguments.days)
    try:
        engine = sa.engine_from_config(settings(arguments.ini), "sqlalchemy.")
        number = delete_before(engine, limit)
    except KeyError as error:
        fail(f"{arguments.ini}: there is no {error}")
    except (OSError, ImportError, configparser.Error, sa.exc.SQLAlchemyError) as error:
        fail(str(error).splitlines()[0])
    print(f"accesslog: {number} rows deleted that were older than {arguments.days} days")


def fail(why: str) -> NoReturn:
    """Say why on standard error, and end with 1."""
    sys.exit(f"caramel-accesslog: {why}")
