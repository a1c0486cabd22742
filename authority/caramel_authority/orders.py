# SPDX-License-Identifier: MIT OR Apache-2.0
"""Signer `acme`: what the CA owes is a queue in the database, and workers carry it out.

A device's question puts an order into the queue and never waits for the CA. A worker takes a lease on an order, does
the next steps, and writes down what it got; if it dies, the lease ends and another one goes on from there. The CA's
order is written down before anything is finalized, so there is one certificate for it whoever asks for it, and
however often.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from sqlalchemy import Connection, Row, func, or_, select, update

from . import store
from .acme_ca import AcmeCa, OrderLost
from .ca import PEM
from .configuration import Configuration
from .errors import TryLater, WrongUsage
from .registry import Issued, keep
from .signing_request import SigningRequest, Subject, in_zone
from .store import AUTHORIZED, Store, certificates, devices, now, orders, requests
from .zone import Zone

HOUR, DAY = 3600, 86400
#: Seconds from the first failure of an order to the next try; they double with each one, up to a day.
FIRST_PAUSE = 60


class OrderSigner:
    """The side that devices see; a Signer that has no key and talks to nobody."""

    def __init__(self, configuration: Configuration) -> None:
        self._zone = configuration.dns.zone
        self._per_hour = configuration.acme.orders_per_hour
        try:
            roots = x509.load_pem_x509_certificates(Path(configuration.acme.roots).read_bytes())
        except (OSError, ValueError) as error:
            raise WrongUsage(f"acme.roots: {error}") from None
        self.root = roots[0].public_bytes(PEM)
        self.bundle = b"".join(one.public_bytes(PEM) for one in roots)
        #: Public CAs look at the names only.
        self.prefixes: Sequence[Subject] | None = None

    @property
    def end(self) -> int | None:
        return None

    def look(self) -> None:
        pass  # an ACME CA that is away delays certificates; no device can do anything about it

    def remote(self, sha256: str) -> bool:
        return False

    def refuses(self, request: SigningRequest) -> str | None:
        if not in_zone(request.client_id, self._zone):
            return f"Bad subject: the CN is no name right below {self._zone}"
        if request.client_id != request.client_id.lower():
            return "Bad subject: the CN has upper-case letters, which public CAs don't certify"
        return None

    def waits(self, db: Connection, request: Row[Any]) -> int | None:
        order = db.execute(select(orders).where(orders.c.client_id == request.client_id)).first()
        if order is None or (order.sha256 != request.sha256 and order.leased <= now()):
            return None
        if order.resource:
            return int(max(30, order.due - now()))
        ahead = select(func.count()).select_from(orders).where(orders.c.resource.is_(None), orders.c.due < order.due)
        spread = int(db.execute(ahead).scalar_one()) * HOUR // self._per_hour
        return int(max(30, order.due - now(), store.number(db, "paused") - now(), spread))

    def obtain(self, db: Connection, request: Row[Any]) -> None:
        """One order for a device: where another request of the same device has one, and nobody is at it, it is
        replaced.
        """
        if not store.insert_new(
            db, orders, client_id=request.client_id, sha256=request.sha256, due=now(), leased=0, attempts=0
        ):
            db.execute(
                update(orders)
                .where(orders.c.client_id == request.client_id)
                .where(orders.c.sha256 != request.sha256, orders.c.leased <= now())
                .values(sha256=request.sha256, due=now(), attempts=0, resource=None, problem=None)
            )


class Worker:
    """What takes time: orders, renewal information, addresses in DNS. As many as you like may run, on any machine."""

    def __init__(self, database: Store, configuration: Configuration, acme: AcmeCa | None, zone: Zone | None) -> None:
        self._store = database
        self._per_hour = configuration.acme.orders_per_hour
        self._lease = configuration.acme.lease_seconds
        self._acme = acme
        self._zone = zone
        self._no_addresses_before = 0

    def work_once(self) -> bool:
        """Does one thing of each kind that is due; whether there was any."""
        done = False
        if self._acme:
            order = self._take_order()
            if order:
                self._carry_out(self._acme, *order)
            done = bool(order) or self._ask_renewal_info(self._acme)
        if self._zone:
            done = self._publish_address(self._zone) or done
        return done

    # --- Orders ---

    def _take_order(self) -> tuple[int, Row[Any], Row[Any]] | None:
        """Takes a lease on the order that is due for longest, one that was begun before one that was not.

        Until when it was leased before (0: to nobody), the order, its request.
        """
        with self._store.writing() as db:
            # This row makes one worker after the other count: otherwise each would find room for one order more.
            paused = store.number(db, "paused", lock=True)
            ready = select(orders).where(orders.c.due <= now(), orders.c.leased <= now())
            order = db.execute(ready.where(orders.c.resource.is_not(None)).order_by(orders.c.due).limit(1)).first()
            if order is None:
                if paused > now() or store.logged_since(db, "ordered", now() - HOUR) >= self._per_hour:
                    return None
                order = db.execute(ready.order_by(orders.c.due).limit(1)).first()
            if order is None:
                return None
            request = db.execute(select(requests).where(requests.c.sha256 == order.sha256)).one()
            if order.resource is None:
                # Counted before the CA is asked: a worker that dies in between makes the limit no larger.
                store.write_log(db, "signer", "ordered", request.client_id, request.sha256)
            mine = update(orders).where(orders.c.client_id == order.client_id).values(leased=now() + self._lease)
            return order.leased, db.execute(mine.returning(orders)).one(), request

    def _carry_out(self, acme: AcmeCa, before: int, order: Row[Any], request: Row[Any]) -> None:
        try:
            resource = order.resource
            if resource is None:
                # Only a worker that died leaves a lease behind: its order may be there, and nobody knows its name.
                died = before and acme.find_order(request.client_id, self._lease / 4)
                resource = died or acme.new_order(request.pem)
                if not self._still_mine(order, resource=resource):
                    return
            # The lease is longer than all that this can take.
            issued = acme.collect(resource, request.pem, self._lease / 2)
        except OrderLost as error:
            self._fail(order, str(error), resource=None)
        except TryLater as error:
            self._fail(order, str(error), wait=error.seconds)
        else:
            self._finish(order, request, issued)

    def _finish(self, order: Row[Any], request: Row[Any], issued: Issued) -> None:
        with self._store.writing() as db:
            locked = select(requests.c.state).where(requests.c.sha256 == request.sha256).with_for_update()
            state = db.execute(locked).scalar_one()
            gone = db.execute(orders.delete().where(_held(order))).rowcount
            if gone and state == AUTHORIZED:
                old = update(certificates).where(certificates.c.sha256 == request.sha256)
                db.execute(old.values(ask_renewal_info=None))
                keep(db, request, issued)

    def _fail(self, order: Row[Any], problem: str, wait: int = 0, **changed: Any) -> None:
        print(f"{order.client_id}: {problem}", file=sys.stderr, flush=True)
        pause = min(FIRST_PAUSE * 2**order.attempts, DAY)
        due = now() + max(wait, int(pause * random.uniform(0.75, 1.25)))
        with self._store.writing() as db:
            if wait > FIRST_PAUSE and store.number(db, "paused", lock=True) < now() + wait:
                # It is the CA that wants to be left alone, not this order that is wrong.
                store.set_number(db, "paused", now() + wait)
            db.execute(
                update(orders)
                .where(_held(order))
                .values(due=due, leased=0, attempts=order.attempts + 1, problem=problem[:500], **changed)
            )

    def _still_mine(self, order: Row[Any], **changed: Any) -> bool:
        with self._store.writing() as db:
            return db.execute(update(orders).where(_held(order)).values(**changed)).rowcount == 1

    # --- Renewal information ---

    def _ask_renewal_info(self, acme: AcmeCa) -> bool:
        with self._store.writing() as db:
            due = select(certificates).where(certificates.c.ask_renewal_info <= now())
            row = db.execute(due.order_by(certificates.c.ask_renewal_info).limit(1).with_for_update()).first()
            if row is None:
                return False
            # Whoever dies now, or gets no answer, has it asked again in an hour.
            mine = update(certificates).where(certificates.c.id == row.id)
            db.execute(mine.values(ask_renewal_info=now() + HOUR if row.not_after > now() else None))
        try:
            moment, ask = acme.renewal(row.pem)
        except (TryLater, OrderLost) as error:
            print(f"renewal information: {error}", file=sys.stderr, flush=True)
            return True
        with self._store.writing() as db:
            db.execute(mine.values(ask_renewal_info=ask, renew_after=moment or row.renew_after))
        return True

    # --- Addresses ---

    def _publish_address(self, zone: Zone) -> bool:
        if self._no_addresses_before > now():
            return False
        changed = or_(devices.c.published.is_(None), devices.c.published != devices.c.address)
        with self._store.reading() as db:
            device = db.execute(select(devices).where(devices.c.address.is_not(None), changed).limit(1)).first()
        if device is None:
            return False
        try:
            zone.set_address(device.client_id, device.address)
        except TryLater as error:
            print(f"{device.client_id}: {error}", file=sys.stderr, flush=True)
            self._no_addresses_before = now() + FIRST_PAUSE
            return False
        with self._store.writing() as db:
            mine = update(devices).where(devices.c.client_id == device.client_id)
            db.execute(mine.values(published=device.address))
        return True


def _held(order: Row[Any]) -> Any:
    """The order as this worker took it: nobody else has taken it since, and it is for the same request."""
    return (
        (orders.c.client_id == order.client_id)
        & (orders.c.leased == order.leased)
        & (orders.c.sha256 == order.sha256)
    )
