# SPDX-License-Identifier: MIT OR Apache-2.0
"""What an administrator looks at: requests and the log, by one query each, so that 90 000 devices are one look.

Nothing is changed here. Moments are text, as a person and a program can read them: `2026-11-28T07:15:00Z`.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TextIO

from sqlalchemy import ColumnElement, Connection, Select, String, case, cast, func, literal, select

from .shown import shown
from .signing_request import device_of
from .store import AUTHORIZED, PENDING, REJECTED, bars, certificates, devices, log, now, orders, requests, sightings

#: Rows that are fetched at once.
MANY = 5000


@lru_cache(maxsize=65536)
def when(moment: int | None) -> str | None:
    return None if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


@dataclass(frozen=True)
class Asked:
    """Which requests are wanted; with nothing said, all. `silent` and `ends_within` are seconds."""

    state: str | None = None
    silent: int | None = None
    ends_within: int | None = None


def overview(db: Connection, asked: Asked) -> Iterator[dict[str, Any]]:
    """Every request that is wanted, in the order in which they were posted."""
    usable = certificates.c.not_before <= now()
    # In one go: PostgreSQL takes twice as long where it looks for that of each request by itself.
    newest = select(certificates.c.sha256, func.max(certificates.c.id).label("id")).where(usable)
    newest_of = newest.group_by(certificates.c.sha256).subquery()
    query = (
        select(
            requests.c.sha256,
            case((bars.c.kind.is_not(None), bars.c.kind), else_=requests.c.state).label("state"),
            requests.c.client_id,
            requests.c.posted,
            requests.c.address,
            sightings.c.at.label("seen"),
            sightings.c.address.label("seen_from"),
            certificates.c.not_after.label("until"),
            certificates.c.usages,
            orders.c.problem,
            devices.c.publish_problem,
        )
        .outerjoin(bars, bars.c.device == requests.c.device)
        .outerjoin(sightings, sightings.c.sha256 == requests.c.sha256)
        .outerjoin(newest_of, newest_of.c.sha256 == requests.c.sha256)
        .outerjoin(certificates, certificates.c.id == newest_of.c.id)
        .outerjoin(orders, orders.c.sha256 == requests.c.sha256)
        # The address is the device's: it stands with the request that was admitted last.
        .outerjoin(devices, devices.c.sha256 == requests.c.sha256)
        .order_by(requests.c.posted)
    )
    if asked.state:
        query = query.where(requests.c.state == asked.state)
    if asked.silent is not None:
        last = func.coalesce(sightings.c.at, requests.c.posted)
        query = query.where(requests.c.state == AUTHORIZED, last < now() - asked.silent)
    if asked.ends_within is not None:
        query = query.where(requests.c.state == AUTHORIZED, certificates.c.not_after < now() + asked.ends_within)
    yield from _rows(db, query, ("posted", "seen", "until"))


def queue(db: Connection) -> Iterator[dict[str, Any]]:
    """What waits for a decision, the oldest first: since when, from where, how many keys were seen for that ID, and
    whether one of them was rejected.
    """
    other = requests.alias()
    same = select(func.count(other.c.key_sha256.distinct())).where(other.c.device == requests.c.device)
    rejected = select(func.count()).where(other.c.device == requests.c.device, other.c.state == REJECTED)
    query = (
        select(
            requests.c.sha256,
            func.coalesce(bars.c.kind, requests.c.state).label("state"),
            requests.c.client_id,
            requests.c.posted,
            requests.c.address,
            sightings.c.at.label("seen"),
            sightings.c.address.label("seen_from"),
            same.scalar_subquery().label("keys"),
            rejected.scalar_subquery().label("rejected_before"),
        )
        .outerjoin(bars, bars.c.device == requests.c.device)
        .outerjoin(sightings, sightings.c.sha256 == requests.c.sha256)
        .where(requests.c.state == PENDING)
        .order_by(requests.c.posted)
    )
    yield from _rows(db, query, ("posted", "seen"))


def barred(db: Connection) -> Iterator[dict[str, Any]]:
    """The devices that are barred or suspended, whether they ever asked or not."""
    query = select(bars.c.kind.label("state"), bars.c.device, bars.c.since, bars.c.who).order_by(bars.c.device)
    yield from _rows(db, query, ("since",))


@dataclass(frozen=True)
class Lines:
    """Which lines of the log are wanted; with nothing said, all. `since` is a moment, `last` a number of lines."""

    client_id: str | None = None
    action: str | None = None
    since: int | None = None
    last: int | None = None


def log_text(db: Connection, wanted: Lines) -> Iterator[str]:
    """The log, many lines at a time: when, who, what, client ID, request, detail. The database writes each line:
    900 000 of them would take twice as long here.
    """
    columns = [_moment(db, log.c.at), log.c.who, log.c.action, func.coalesce(log.c.client_id, "-")]
    line = functools.reduce(lambda left, right: left + "  " + right, columns)
    line += "  " + func.coalesce(func.substr(log.c.sha256, 1, 16), "-")
    line += case((func.coalesce(log.c.detail, "") == "", ""), else_="  " + log.c.detail)
    for lines in _lines(db, line, "\n", wanted):
        yield lines + "\n"


def log_json(db: Connection, wanted: Lines) -> Iterator[str]:
    """The same as a list of objects, one a line."""
    columns = {one.name: one for one in (log.c.id, log.c.at, log.c.who, log.c.action, log.c.client_id, log.c.sha256)}
    values = {**columns, "at": _moment(db, log.c.at), "detail": log.c.detail}
    pairs = [one for name, value in values.items() for one in (literal(name, String), value)]
    made = func.json_object(*pairs) if db.dialect.name == "sqlite" else cast(func.json_build_object(*pairs), String)
    before = "["
    for lines in _lines(db, made, ",\n", wanted):
        yield before + "\n" + lines
        before = ","
    yield "\n]\n" if before == "," else "[]\n"


def _lines(db: Connection, line: ColumnElement[str], between: str, wanted: Lines) -> Iterator[str]:
    """Many lines at a time, put together by the database: to fetch each by itself takes half as long again."""
    query = select(line.label("line"), log.c.id)
    if wanted.client_id is not None:
        # Whatever ID the device was called by. No database compares IDs as devices do.
        called = db.execute(select(log.c.client_id).where(log.c.client_id.is_not(None)).distinct()).scalars()
        device = device_of(wanted.client_id)
        query = query.where(log.c.client_id.in_([one for one in called if device_of(one) == device]))
    if wanted.action is not None:
        query = query.where(log.c.action == wanted.action)
    if wanted.since is not None:
        query = query.where(log.c.at >= wanted.since)
    if wanted.last is not None:
        last = query.with_only_columns(log.c.id).order_by(log.c.id.desc()).limit(wanted.last).subquery()
        query = query.where(log.c.id >= select(func.min(last.c.id)).scalar_subquery())
    end = 0
    while end is not None:
        page = query.where(log.c.id > end).order_by(log.c.id).limit(MANY).subquery()
        # Both databases put together in the order in which the lines come.
        together = select(func.aggregate_strings(page.c.line, between), func.count(), func.max(page.c.id))
        lines, count, end = db.execute(together.select_from(page)).one()
        if count and lines.count("\n") >= count:
            # What was written before `write_log` took care of it may be more than a line.
            each = db.execute(select(page.c.line).order_by(page.c.id)).scalars()
            lines = between.join(map(shown, each))
        if count:
            yield lines


def _moment(db: Connection, column: ColumnElement[int]) -> ColumnElement[str]:
    if db.dialect.name == "sqlite":
        # In half of the time that strftime() takes.
        return func.replace(func.datetime(column, "unixepoch"), " ", "T", type_=String) + "Z"
    utc = func.timezone("UTC", func.to_timestamp(column))
    return func.to_char(utc, 'YYYY-MM-DD"T"HH24:MI:SS"Z"', type_=String)


def print_json(rows: Iterable[dict[str, Any]], file: TextIO) -> None:
    """A list of objects, written as it comes."""
    before = "["
    for row in rows:
        file.write(f"{before}\n{json.dumps(row, ensure_ascii=False)}")
        before = ","
    file.write("\n]\n" if before == "," else "[]\n")


def _rows(db: Connection, query: Select[Any], moments: Iterable[str]) -> Iterator[dict[str, Any]]:
    result = db.execute(query, execution_options={"yield_per": MANY})
    names = list(result.keys())
    for row in result:
        found = dict(zip(names, row, strict=True))
        for name in moments:
            found[name] = when(found[name])
        yield found
