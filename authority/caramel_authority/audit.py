# SPDX-License-Identifier: MIT OR Apache-2.0
"""Whether the log is still what was written.

SQLite has no rights: who may add an entry may write anything into the file. There each entry has a hash over itself
and the one before it. The signer notes the newest one beside the key every few seconds, where the process that
answers can't write. So what was logged before that can't be changed or cut off without a trace, not by changing all
that follows either.
On PostgreSQL the user that serves has no right to change an entry, and that is what is looked at there.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from .errors import WrongUsage, say
from .store import LINKED, Store, last_link, link, log
from .whole_file import write_whole

#: Beside the key: number and hash of an entry.
NOTE = "log-entry"
#: Seconds between two looks. Only a newer entry is written, because that goes through to the disk.
BETWEEN = 5


def watch(database: Store, folder: Path) -> None:
    """Notes again and again, from outside of the database and in a thread of its own, which entry is the newest one:
    what was decided since the last certificate is as safe as what came before it.
    """

    def again() -> None:
        said = ""
        while True:
            try:
                problem = _note(database, folder / NOTE)
            except (DBAPIError, OSError, WrongUsage) as error:
                problem = str(error)
            if problem and problem != said:
                say(problem)
            said = problem
            time.sleep(BETWEEN)

    if database.path:
        threading.Thread(target=again, daemon=True).start()


def _note(database: Store, file: Path) -> str:
    """What is wrong, in words. What was noted is kept then, for `verify`."""
    noted = _noted(file)
    with database.reading() as db:
        for entry, hashed in noted.items():
            if db.execute(select(log.c.chain).where(log.c.id == entry)).scalar() != hashed:
                return f"the log was changed: entry {entry} is another one"
        last, chain = last_link(db)
    if noted != {last: chain}:
        write_whole(file, f"{last} {chain}\n".encode(), 0o644)
    return ""


def _noted(file: Path) -> dict[int, str]:
    try:
        number, hashed = file.read_text().split()
        return {int(number): hashed}
    except FileNotFoundError:
        return {}
    except ValueError:
        raise WrongUsage(f"{file} is damaged: remove it as root, and the signer notes the newest entry") from None


def verify(database: Store, folder: Path) -> str:
    """What was found to be in order, in words. Raises WrongUsage where anything was changed, or could be."""
    return _verify_chain(database, folder) if database.path else _verify_rights(database)


def _verify_chain(database: Store, folder: Path) -> str:
    noted = _noted(folder / NOTE)
    chain, last, begun = "", 0, False
    with database.reading() as db:
        for entry in db.execute(select(*LINKED, log.c.chain).order_by(log.c.id).execution_options(yield_per=1000)):
            chain = link(chain, entry[:-1])
            begun = begun or entry.chain is not None
            if entry.id != last + 1 or (begun and entry.chain != chain):
                raise WrongUsage(f"the log was changed: entry {entry.id} doesn't follow from those before it")
            last = entry.id
            if noted.pop(last, chain) != chain:
                raise WrongUsage(f"the log was changed: entry {last} is not the one that the signer has seen")
    if noted:
        raise WrongUsage(f"the log was changed: entry {next(iter(noted))}, which the signer has seen, isn't there")
    return f"{last} entries, each follows from those before it: {chain}"


def _verify_rights(database: Store) -> str:
    with database.reading() as db:
        user = db.execute(text("SELECT current_user")).scalar_one()
        owner = "SELECT pg_has_role(current_user, relowner, 'USAGE') FROM pg_class WHERE oid = 'log'::regclass"
        rights = ["the owner's"] if db.execute(text(owner)).scalar_one() else []
        for right in ("UPDATE", "DELETE", "TRUNCATE", "TRIGGER"):
            if db.execute(text(f"SELECT has_table_privilege('log', '{right}')")).scalar_one():
                rights.append(right)
        entries = db.execute(select(func.count()).select_from(log)).scalar_one()
    if rights:
        raise WrongUsage(f"{user} could change the log, by these rights: {', '.join(rights)} (deploy/postgresql.sql)")
    return f"{entries} entries; {user} has no right to change any"
