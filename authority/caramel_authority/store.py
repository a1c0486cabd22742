# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tables, and how a transaction begins. SQLite on one machine, PostgreSQL where several serve.

A change of the tables is a step in `migrations` as well; `schema` takes it. `device` is a client ID as IDs are
compared (`signing_request.device_of`).

Everything that several processes could do at once is decided here, in transactions that write: on SQLite there is
only one at a time, on PostgreSQL those that are about the same thing lock the same row first. A process that is
killed leaves no transaction behind, neither half nor whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    DDL,
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError

from . import schema
from .errors import WrongUsage
from .shown import shown

metadata = MetaData()

#: What was decided about a request. Retired: another key of the same device was authorized after it.
PENDING, AUTHORIZED, REJECTED, RETIRED = "pending", "authorized", "rejected", "retired"
#: What was decided about a device, whatever it asks with and whatever the rules say.
BARRED, SUSPENDED = "barred", "suspended"

requests = Table(
    "requests",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("pem", Text, nullable=False),
    Column("client_id", String(64), nullable=False, index=True),
    Column("device", String(64), nullable=False, server_default=""),
    Column("key_sha256", String(64), nullable=False, index=True),
    Column("posted", BigInteger, nullable=False),
    Column("state", String(10), nullable=False, default=PENDING),
    Column("address", String(45)),
    # With the state in it, because SQLite would else look for a device among all that have that state.
    Index("ix_requests_device", "device", "state"),
    Index("ix_requests_state", "state", "posted"),
)
#: Whose a key is. Two processes that take it for two devices at once meet here.
keys = Table(
    "keys",
    metadata,
    Column("key_sha256", String(64), primary_key=True),
    Column("device", String(64), nullable=False),
)
#: When a request was last asked about, and from where. A table of its own: it is written often, and read whole.
sightings = Table(
    "sightings",
    metadata,
    Column("sha256", String(64), ForeignKey("requests.sha256"), primary_key=True),
    Column("at", BigInteger, nullable=False, index=True),
    Column("address", String(45)),
)
TO_PUBLISH = text("address IS NOT NULL AND (published IS NULL OR published <> address)")
#: Who may have a certificate: put there from the production line's list, by a rule, or by the administrator's
#: decision. `client_id` is the device; `sha256` the request that was admitted last, `address` where the device was
#: seen, `published` what DNS says of it. `again` is 1 where its next key is to be admitted as well. `expected` is the
#: SHA-256 of the only request or public key that a rule may admit.
devices = Table(
    "devices",
    metadata,
    Column("client_id", String(64), primary_key=True),
    Column("added", BigInteger, nullable=False),
    Column("sha256", String(64), index=True),
    Column("address", String(45)),
    Column("published", String(45)),
    Column("publish_after", BigInteger, nullable=False, server_default="0"),
    Column("publish_problem", Text),
    Column("again", Integer, nullable=False, server_default="0"),
    Column("expected", String(64)),
    Index(
        "ix_devices_to_publish",
        "publish_after",
        sqlite_where=TO_PUBLISH,
        postgresql_where=TO_PUBLISH,
    ),
)
#: The devices about which something was decided that outlives rules, lists and keys: `kind` is BARRED or SUSPENDED.
bars = Table(
    "bars",
    metadata,
    Column("device", String(64), primary_key=True),
    Column("kind", String(10), nullable=False),
    Column("since", BigInteger, nullable=False),
    Column("who", String(100), nullable=False),
)
#: `pem` is the leaf and its chain. `modified` is what Last-Modified says: no two certificates of a request share one.
#: `usages` are the extended key usages of the leaf, as the configuration writes them, with blanks between them.
certificates = Table(
    "certificates",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sha256", String(64), ForeignKey("requests.sha256"), nullable=False, index=True),
    Column("serial", String(40), nullable=False, unique=True),
    Column("pem", Text, nullable=False),
    Column("not_before", BigInteger, nullable=False, server_default="0"),
    Column("not_after", BigInteger, nullable=False, index=True),
    Column("renew_after", BigInteger, nullable=False),
    Column("modified", BigInteger, nullable=False),
    Column("ask_renewal_info", BigInteger, index=True),
    Column("usages", String(60)),
)
#: What the ACME CA owes: at most one order for a device. `resource` is the CA's order, once there is one; `leased`
#: until when some worker has it in hand; `due` from when on it may be tried; `renewal` is 1 where the device has a
#: certificate that is still good.
orders = Table(
    "orders",
    metadata,
    Column("client_id", String(64), primary_key=True),
    Column("sha256", String(64), ForeignKey("requests.sha256"), nullable=False, index=True),
    Column("due", BigInteger, nullable=False, index=True),
    Column("leased", BigInteger, nullable=False, default=0),
    Column("attempts", Integer, nullable=False, default=0),
    Column("resource", Text),
    Column("problem", Text),
    Column("renewal", Integer, nullable=False, server_default="0"),
)
#: Until when the ACME CA wants to be left alone about what `name` names: an account, a client ID, a domain.
limits = Table(
    "limits",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("until", BigInteger, nullable=False),
    Column("reason", Text),
)
#: Names that the devices' zone needs for itself, as a worker found them there: nobody's.
zone_names = Table(
    "zone_names",
    metadata,
    Column("name", String(255), primary_key=True),
    Column("seen", BigInteger, nullable=False),
)
#: The last line of the file `refusals` about each thing (`refusals`).
refused = Table(
    "refused",
    metadata,
    Column("about", String(80), primary_key=True),
    Column("at", BigInteger, nullable=False),
    Column("line", Text, nullable=False),
)
numbers = Table(
    "numbers",
    metadata,
    Column("name", String(20), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
#: Every decision, in the order in which they were made. `chain` is a hash over the entry and the one before it: on
#: SQLite, where whoever may write may write anything (`audit`).
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
    Column("chain", String(64)),
    Index("ix_log_action", "action", "at"),
    Index("ix_log_client_id", "client_id"),
)

#: `serial` was used last; nothing below `minimum` is accepted; `paused` is locked by who takes an order; `front` is
#: when the certificate of the TLS front ends.
NUMBERS = ("serial", "minimum", "paused", "front")

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
    """The database at this address (an SQLAlchemy URL). Raises WrongUsage where it isn't one of this version."""

    def __init__(self, url: str) -> None:
        self._connect(url, "rw")
        with self.reading() as db:
            schema.check(db)
        self.release()

    def release(self) -> None:
        """Connections are a process's own: whoever forks now shares none (SQLAlchemy, "Using Connection Pools")."""
        self._engine.dispose()

    @classmethod
    def init(cls, url: str) -> bool:
        """Makes the database; whether there was none. Raises WrongUsage."""
        store = cls.__new__(cls)
        store._connect(url, "rwc")
        with store.writing() as db:
            made = schema.init(db, metadata)
            if made and store.path:
                # Who may write to the folder may write to the database: on SQLite that is one right.
                store.path.chmod(store.path.parent.stat().st_mode & 0o660)
            for name in NUMBERS:
                insert_new(db, numbers, name=name, value=0)
        return made

    @classmethod
    def upgrade(cls, url: str) -> tuple[str, str]:
        """Brings a database of an older version up to this one; its version before and after. Raises WrongUsage."""
        store = cls.__new__(cls)
        store._connect(url, "rw")
        with store.writing() as db:
            before, after = versions = schema.upgrade(db)
            schema.check_tables(db, metadata)
            for name in NUMBERS:
                insert_new(db, numbers, name=name, value=0)
            if before != after:
                # The first entry of a chain takes long where there are many before it; nobody waits for that here.
                write_log(db, "upgrade", "upgraded", detail=f"{before} -> {after}")
        store.release()
        return versions

    def _connect(self, url: str, mode: str) -> None:
        try:
            parsed = make_url(url)
            #: Where an SQLite database is, None where it is none.
            self.path: Path | None = None
            if parsed.get_backend_name() == "sqlite":
                self.path = Path(parsed.database or "").absolute()
                # SQLite would make an empty database of a path that somebody mistyped (sqlite.org/uri.html, "mode").
                parsed = parsed.set(database=f"file:{quote(str(self.path))}", query={"mode": mode, "uri": "true"})
                if mode == "rw" and not self.path.is_file():
                    raise WrongUsage(f"{self.path}: there is no database; caramel-authority init makes one")
                if self.path.exists() and not self.path.is_file():
                    # Its mode would be changed, and for root a journal made beside it: of /dev/null, say.
                    raise WrongUsage(f"{self.path} is no regular file")
            # A statement that was prepared belongs to one connection of the server's, and a pooler in between
            # (PgBouncer) gives each transaction another one.
            more = {"prepare_threshold": None} if parsed.get_driver_name() == "psycopg" else {}
            self._engine = create_engine(parsed, pool_pre_ping=True, connect_args=more)
            # A connection is one process's: what was opened before a fork is left to the parent.
            os.register_at_fork(after_in_child=lambda: self._engine.dispose(close=False))
        except (ArgumentError, ModuleNotFoundError) as error:
            raise WrongUsage(f"database: {error}") from None
        if self.path:
            event.listen(self._engine, "connect", _open_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)

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


def _insert(db: Connection, table: Table) -> Any:
    """An INSERT that may say what happens to a row that is there. Both know that, each in a module of its own."""
    # The one that isn't used needn't be loaded: that of PostgreSQL is a tenth of what a command takes.
    if db.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def insert_new(db: Connection, table: Table, **values: Any) -> bool:
    """Puts a row there unless there is one with its key; whether it did."""
    statement = _insert(db, table).values(**values).on_conflict_do_nothing()
    return db.execute(statement.returning(*table.primary_key)).first() is not None


def lock_devices(db: Connection, names: Sequence[str]) -> None:
    """Nobody else decides about these devices until the transaction ends. On SQLite nobody else writes anyway."""
    if db.dialect.name == "postgresql":
        hashes = sorted(int.from_bytes(sha256(name.encode()).digest()[:8], "big", signed=True) for name in names)
        # In the same order whoever asks, so that two never wait for each other.
        db.execute(
            text("SELECT pg_advisory_xact_lock(one) FROM unnest(CAST(:all AS bigint[])) AS one"), {"all": hashes}
        )


def see(db: Connection, seen: dict[str, tuple[int, str | None]]) -> None:
    """Writes down when, and from where, these requests were asked about; those that are gone are left out."""
    there = set(db.execute(select(requests.c.sha256).where(requests.c.sha256.in_(seen))).scalars())
    rows = [{"sha256": one, "at": at, "address": address} for one, (at, address) in seen.items() if one in there]
    if rows:
        statement = _insert(db, sightings)
        new = {"at": statement.excluded.at, "address": statement.excluded.address}
        db.execute(statement.on_conflict_do_update(index_elements=[sightings.c.sha256], set_=new), rows)


def number(db: Connection, name: str, lock: bool = False) -> int:
    query = select(numbers.c.value).where(numbers.c.name == name)
    return int(db.execute(query.with_for_update() if lock else query).scalar_one())


def set_number(db: Connection, name: str, value: int) -> None:
    db.execute(update(numbers).where(numbers.c.name == name).values(value=value))


def refused_at(db: Connection, about: str) -> int:
    """When the last decision that is known here was made about this, 0 where there was none."""
    return int(db.execute(select(refused.c.at).where(refused.c.about == about)).scalar() or 0)


def set_refused(db: Connection, about: str, at: int, line: str) -> None:
    new = {"at": at, "line": line}
    statement = _insert(db, refused).values(about=about, **new)
    db.execute(statement.on_conflict_do_update(index_elements=[refused.c.about], set_=new))


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
        "who": shown(who)[:100],
        "action": action,
        "client_id": client_id,
        "sha256": sha256,
        "detail": shown(detail),
    }
    if db.dialect.name == "sqlite":
        last, chain = last_link(db)
        row["id"] = last + 1
        row["chain"] = link(chain, [row[column.name] for column in LINKED])
    db.execute(insert(log).values(**row))


#: What the hash of an entry is over, beside that of the one before it.
LINKED = (log.c.id, log.c.at, log.c.who, log.c.action, log.c.client_id, log.c.sha256, log.c.detail)


def link(before: str, entry: Sequence[Any]) -> str:
    """The hash of an entry of the log and, by that of the one before it, of all that was logged until then."""
    return hashlib.sha256(json.dumps([before, *entry]).encode()).hexdigest()


def last_link(db: Connection) -> tuple[int, str]:
    """The newest entry's number and hash. Entries that are older than the chain are hashed as if they were in it."""
    newest = db.execute(select(log.c.id, log.c.chain).order_by(log.c.id.desc()).limit(1)).first()
    if newest is None:
        return 0, ""
    if newest.chain:
        return newest.id, newest.chain
    chain = ""
    for entry in db.execute(select(*LINKED).order_by(log.c.id)):
        chain = link(chain, entry)
    return newest.id, chain


def logged_since(db: Connection, action: str, moment: int) -> int:
    query = select(func.count()).where(log.c.action == action, log.c.at > moment)
    return int(db.execute(query).scalar_one())
