# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tables, and how a transaction begins. SQLite on one machine, PostgreSQL where several serve.

Everything that several processes could do at once is decided here, in transactions that write: on SQLite there is
only one at a time, on PostgreSQL those that are about the same thing lock the same row first. A process that is
killed leaves no transaction behind, neither half nor whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

metadata = MetaData()

PENDING, AUTHORIZED, REJECTED = "pending", "authorized", "rejected"

requests = Table(
    "requests",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("pem", Text, nullable=False),
    Column("client_id", String(64), nullable=False, index=True),
    Column("key_sha256", String(64), nullable=False, index=True),
    Column("posted", BigInteger, nullable=False),
    Column("state", String(10), nullable=False, default=PENDING),
    Column("address", String(45)),
)
#: Who may have a certificate: put there from the production line's list, by a rule, or by the administrator's
#: decision. `sha256` is the request that was admitted last, `address` where the device was seen, `published` what DNS
#: says of it.
devices = Table(
    "devices",
    metadata,
    Column("client_id", String(64), primary_key=True),
    Column("added", BigInteger, nullable=False),
    Column("sha256", String(64)),
    Column("address", String(45)),
    Column("published", String(45)),
)
#: `pem` is the leaf and its chain. `modified` is what Last-Modified says: no two certificates of a request share one.
certificates = Table(
    "certificates",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sha256", String(64), ForeignKey("requests.sha256"), nullable=False, index=True),
    Column("serial", String(40), nullable=False, unique=True),
    Column("pem", Text, nullable=False),
    Column("not_after", BigInteger, nullable=False),
    Column("renew_after", BigInteger, nullable=False),
    Column("modified", BigInteger, nullable=False),
    Column("ask_renewal_info", BigInteger, index=True),
)
#: What the ACME CA owes: at most one order for a device. `resource` is the CA's order, once there is one; `leased`
#: until when some worker has it in hand; `due` from when on it may be tried.
orders = Table(
    "orders",
    metadata,
    Column("client_id", String(64), primary_key=True),
    Column("sha256", String(64), ForeignKey("requests.sha256"), nullable=False),
    Column("due", BigInteger, nullable=False),
    Column("leased", BigInteger, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("resource", Text),
    Column("problem", Text),
)
numbers = Table(
    "numbers",
    metadata,
    Column("name", String(20), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
#: Every decision, in the order in which they were made.
log = Table(
    "log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("who", String(100), nullable=False),
    Column("action", String(20), nullable=False),
    Column("client_id", String(64)),
    Column("sha256", String(64)),
    Column("detail", Text),
)

#: `serial` was used last; nothing below `minimum` is accepted; no new order before `paused`.
NUMBERS = ("serial", "minimum", "paused")

for _what in ("UPDATE", "DELETE"):
    _never = DDL(  # type: ignore[no-untyped-call]
        f"CREATE TRIGGER log_no_{_what.lower()} BEFORE {_what} ON log "
        "BEGIN SELECT RAISE(ABORT, 'the log is never rewritten'); END"
    )
    event.listen(log, "after_create", _never.execute_if(dialect="sqlite"))
for _statement in (
    "CREATE FUNCTION log_never_rewritten() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'the log is never rewritten'; END $$",
    "CREATE TRIGGER log_never_rewritten BEFORE UPDATE OR DELETE OR TRUNCATE ON log "
    "FOR EACH STATEMENT EXECUTE FUNCTION log_never_rewritten()",
):
    _never = DDL(_statement)  # type: ignore[no-untyped-call]
    event.listen(log, "after_create", _never.execute_if(dialect="postgresql"))


def now() -> int:
    return int(time.time())


class Store:
    """The database at this address (an SQLAlchemy URL); its tables are made where they are missing."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url, pool_pre_ping=True)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _open_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        with self.writing() as db:
            if self._engine.dialect.name == "postgresql":
                # Several processes may start at once; the number is any that nobody else takes.
                db.execute(text("SELECT pg_advisory_xact_lock(8319204)"))
            metadata.create_all(db)
            for name in NUMBERS:
                insert_new(db, numbers, name=name, value=0)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads, and waits for nobody on SQLite."""
        with self._engine.connect() as db, db.begin():
            yield db

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: all of it is kept when the block ends, or nothing when it doesn't."""
        with self._engine.connect().execution_options(writes=True) as db, db.begin():
            yield db


def _open_sqlite(connection: Any, record: Any) -> None:
    # The driver would begin transactions by its own rules, and too late to keep a second writer from reading.
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 20000")
    connection.execute("PRAGMA journal_mode = WAL")
    # What a device was given must be there after a loss of power (sqlite.org/pragma.html#pragma_synchronous).
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(db: Connection) -> None:
    db.exec_driver_sql("BEGIN IMMEDIATE" if db.get_execution_options().get("writes") else "BEGIN")


def insert_new(db: Connection, table: Table, **values: Any) -> bool:
    """Puts a row there unless there is one with its key; whether it did."""
    dialect = postgresql if db.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(table).values(**values).on_conflict_do_nothing()
    return db.execute(statement.returning(*table.primary_key)).first() is not None


def number(db: Connection, name: str, lock: bool = False) -> int:
    query = select(numbers.c.value).where(numbers.c.name == name)
    return int(db.execute(query.with_for_update() if lock else query).scalar_one())


def set_number(db: Connection, name: str, value: int) -> None:
    db.execute(update(numbers).where(numbers.c.name == name).values(value=value))


def next_serial(db: Connection) -> int:
    """A serial number that was never used before, by whatever CA.

    It counts up, and never lags behind the clock in milliseconds: so a database that was restored from an old copy,
    or lost, doesn't hand out again what was handed out since. A transaction that is undone undoes its number too, and
    the certificate with it was never seen by anybody.
    """
    serial = max(number(db, "serial", lock=True) + 1, time.time_ns() // 1_000_000)
    set_number(db, "serial", serial)
    return serial


def write_log(
    db: Connection, who: str, action: str, client_id: str | None = None, sha256: str | None = None, detail: str = ""
) -> None:
    row = {
        "at": now(),
        "who": who[:100],
        "action": action,
        "client_id": client_id,
        "sha256": sha256,
        "detail": detail,
    }
    db.execute(insert(log).values(**row))


def logged_since(db: Connection, action: str, moment: int) -> int:
    query = select(func.count()).where(log.c.action == action, log.c.at > moment)
    return int(db.execute(query).scalar_one())
