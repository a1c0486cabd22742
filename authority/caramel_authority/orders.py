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
from time import monotonic
from typing import Any

from cryptography import x509
from sqlalchemy import Connection, Row, delete, func, or_, select, update

from . import store
from .acme_ca import AcmeCa, CaAway, Doubtful, Limited, NotValidated, OrderLost, doubted
from .ca import PEM
from .configuration import Acme, Configuration
from .errors import TryLater, WrongUsage
from .registry import Issued, keep, newest_certificate
from .signing_request import SigningRequest, Subject, in_zone
from .store import AUTHORIZED, Store, certificates, devices, limits, log, now, orders, requests, zone_names
from .zone import Never, Refused, Zone

HOUR, DAY = 3600, 86400
#: Seconds from the first failure of an order to the next try; they double with each one, up to a day.
FIRST_PAUSE = 60
#: The same where the CA found no answer in the zone: Let's Encrypt takes five such failures of a name in an hour.
REFUSED_PAUSE = 1200
#: In `limits` beside the IDs of devices, which have no blanks: no order of this kind before `until`.
FIRST, ANY = "first orders", "all orders"
#: Nothing is put off for so long: what is stored as if it were, a clock that was ahead has written.
TOO_LONG = 2 * DAY


class OrderSigner:
    """The side that devices see; a Signer that has no key and talks to nobody."""

    def __init__(self, configuration: Configuration) -> None:
        self._zone = configuration.dns.zone
        self._first_per_hour = first_per_hour(configuration.acme)
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
        spread = 0
        if not order.renewal:
            ahead = select(func.count()).select_from(orders)
            # Renewals have a share of their own.
            ahead = ahead.where(orders.c.renewal == 0, orders.c.resource.is_(None), orders.c.due < order.due)
            spread = int(db.execute(ahead).scalar_one()) * HOUR // self._first_per_hour
        return int(max(30, order.due - now(), limited(db, ANY if order.renewal else FIRST) - now(), spread))

    def obtain(self, db: Connection, request: Row[Any]) -> None:
        """One order for a device: where another request of the same device has one, and nobody is at it, it is
        replaced.
        """
        good = select(certificates.c.id).where(certificates.c.sha256 == request.sha256)
        good = good.where(certificates.c.not_after > now()).limit(1)
        values = {
            "sha256": request.sha256,
            "due": max(now(), limited(db, request.client_id)),
            "renewal": int(db.execute(good).first() is not None),
            "attempts": 0,
        }
        if not store.insert_new(db, orders, client_id=request.client_id, leased=0, **values):
            db.execute(
                update(orders)
                .where(orders.c.client_id == request.client_id)
                .where(orders.c.sha256 != request.sha256, orders.c.leased <= now())
                .values(**values, resource=None, problem=None)
            )


def first_per_hour(settings: Acme) -> int:
    """How many first orders an hour may have; the rest is kept for renewals."""
    return settings.orders_per_hour - int(settings.orders_per_hour * settings.renewal_share)


def limited(db: Connection, name: str) -> int:
    """Until when the CA wants to hear nothing of this; 0 where it said no such thing."""
    names = (FIRST, ANY) if name == FIRST else (name,)
    until = db.execute(select(func.max(limits.c.until)).where(limits.c.name.in_(names))).scalar()
    return int(until or 0)


class Worker:
    """What takes time: orders, renewal information, addresses in DNS. As many as you like may run, on any machine."""

    def __init__(self, database: Store, configuration: Configuration, acme: AcmeCa | None, zone: Zone | None) -> None:
        self._store = database
        self._per_hour = configuration.acme.orders_per_hour
        self._first_per_hour = first_per_hour(configuration.acme)
        self._lease = configuration.acme.lease_seconds
        self._acme = acme
        self._zone = zone
        #: Not before: the CA, its renewal information, addresses, a look at the zone's own names, one at moments that
        #: can't be. By a clock that nobody sets.
        self._ca_after = self._info_after = self._addresses_after = self._zone_after = self._moments_after = 0.0
        self._ca_failures = self._refusals = 0

    def work_once(self) -> bool:
        """Does one thing of each kind that is due; whether there was any."""
        done = False
        self._mend_moments()
        if self._acme and self._ca_after <= monotonic():
            order = self._take_order()
            if order:
                self._carry_out(self._acme, *order)
            done = bool(order) or self._ask_renewal_info(self._acme)
        if self._zone:
            self._note_own_names(self._zone)
            done = self._publish_address(self._zone) or done
        return done

    def _mend_moments(self) -> None:
        """Whatever a clock that was ahead has put off, is due."""
        if self._moments_after > monotonic():
            return
        self._moments_after = monotonic() + HOUR
        too_long = now() + max(TOO_LONG, self._lease)
        with self._store.writing() as db:
            # A lease that is over belonged to somebody, whose order may be at the CA.
            for column, over in (
                (orders.c.due, now()),
                (orders.c.leased, 1),
                (limits.c.until, now()),
                (certificates.c.ask_renewal_info, now()),
                (devices.c.publish_after, now()),
            ):
                db.execute(update(column.table).where(column > too_long).values({column: over}))

    # --- Orders ---

    def _take_order(self) -> tuple[int, Row[Any], Row[Any], str | None] | None:
        """Takes a lease on an order that is due: renewals before first ones, what was begun before what was not.

        Until when it was leased before (0: to nobody), the order, its request, and the certificate that the device
        has.
        """
        with self._store.writing() as db:
            # This row makes one worker after the other count: otherwise each would find room for one order more.
            store.number(db, "paused", lock=True)
            order = self._next(db)
            if order is None:
                return None
            request = db.execute(select(requests).where(requests.c.sha256 == order.sha256)).one()
            old = newest_certificate(db, order.sha256)
            if order.resource is None:
                # Counted before the CA is asked: a worker that dies in between makes the limit no larger.
                kind = "renewal" if order.renewal else "first"
                store.write_log(db, "signer", "ordered", request.client_id, request.sha256, kind)
            mine = update(orders).where(orders.c.client_id == order.client_id).values(leased=now() + self._lease)
            return order.leased, db.execute(mine.returning(orders)).one(), request, old.pem if old else None

    def _next(self, db: Connection) -> Row[Any] | None:
        ordered = select(func.count()).where(log.c.action == "ordered", log.c.at.between(now() - HOUR, now()))
        room = db.execute(ordered).scalar_one() < self._per_hour
        for renewal, kind in ((1, ANY), (0, FIRST)):
            ready = select(orders).where(orders.c.due <= now(), orders.c.leased <= now(), orders.c.renewal == renewal)
            ready = ready.order_by(orders.c.due).limit(1)
            order = db.execute(ready.where(orders.c.resource.is_not(None))).first()
            if order is None and room and not renewal:
                room = db.execute(ordered.where(log.c.detail == "first")).scalar_one() < self._first_per_hour
            if order is None and room and limited(db, kind) <= now():
                order = db.execute(ready).first()
            if order is not None:
                return order
        return None

    def _carry_out(self, acme: AcmeCa, before: int, order: Row[Any], request: Row[Any], old: str | None) -> None:
        resource = order.resource
        try:
            if resource is None:
                # Only a worker that died leaves a lease behind: its order may be there, and nobody knows its name.
                died = before and acme.find_order(request.client_id, self._lease / 8)
                resource = died or acme.new_order(request.client_id, old)
                if not self._still_mine(order, resource=resource):
                    return
            # The lease is longer than all that this can take.
            issued = acme.collect(resource, request.client_id, request.pem, self._lease / 2)
        except CaAway as error:
            # It says nothing about this order, which is never put off for long.
            self._away(error)
            self._fail(order, str(error), int(self._ca_after - monotonic()), longest=HOUR)
            return
        except NotValidated as error:
            self._fail(order, str(error), first=REFUSED_PAUSE, resource=None)
        except OrderLost as error:
            self._fail(order, str(error), resource=None)
        except Doubtful as error:
            self._fail(order, str(error), error.seconds, resource=doubted(resource))
        except Limited as error:
            self._limit(request.client_id if error.one_name else ANY if order.renewal else FIRST, error)
            self._fail(order, str(error), error.seconds)
        except TryLater as error:
            self._fail(order, str(error), error.seconds)
        else:
            self._finish(order, request, issued)
        self._ca_failures = 0

    def _away(self, error: TryLater) -> None:
        """The CA is left alone for a while that gets longer."""
        self._ca_after = monotonic() + max(error.seconds, min(FIRST_PAUSE * 2**self._ca_failures, HOUR // 4))
        self._ca_failures += 1

    def _limit(self, name: str, error: TryLater) -> None:
        with self._store.writing() as db:
            db.execute(delete(limits).where(or_(limits.c.until <= now(), limits.c.name == name)))
            store.insert_new(db, limits, name=name, until=now() + error.seconds, reason=str(error)[:500])

    def _finish(self, order: Row[Any], request: Row[Any], issued: Issued) -> None:
        with self._store.writing() as db:
            locked = select(requests.c.state).where(requests.c.sha256 == request.sha256).with_for_update()
            state = db.execute(locked).scalar_one()
            gone = db.execute(orders.delete().where(_held(order))).rowcount
            if gone and state == AUTHORIZED:
                old = update(certificates).where(certificates.c.sha256 == request.sha256)
                db.execute(old.values(ask_renewal_info=None))
                keep(db, request, issued)

    def _fail(
        self,
        order: Row[Any],
        problem: str,
        wait: int = 0,
        first: int = FIRST_PAUSE,
        longest: int = DAY,
        **changed: Any,
    ) -> None:
        # What the CA says is shown on terminals, and no database takes all of it.
        problem = "".join(letter if letter.isprintable() else " " for letter in problem)
        print(f"{order.client_id}: {problem}", file=sys.stderr, flush=True)
        pause = min(first * 2**order.attempts, longest)
        due = now() + max(wait, int(pause * random.uniform(0.75, 1.25)))
        self._still_mine(order, due=due, leased=0, attempts=order.attempts + 1, problem=problem[:500], **changed)

    def _still_mine(self, order: Row[Any], **changed: Any) -> bool:
        with self._store.writing() as db:
            return db.execute(update(orders).where(_held(order)).values(**changed)).rowcount == 1

    # --- Renewal information ---

    def _ask_renewal_info(self, acme: AcmeCa) -> bool:
        if self._info_after > monotonic():
            return False
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
            if isinstance(error, CaAway):
                self._away(error)
            elif isinstance(error, Limited):
                self._info_after = monotonic() + error.seconds
            return True
        self._ca_failures = 0
        with self._store.writing() as db:
            db.execute(mine.values(ask_renewal_info=ask, renew_after=moment or row.renew_after))
        return True

    # --- The zone ---

    def _publish_address(self, zone: Zone) -> bool:
        if self._addresses_after > monotonic():
            return False
        changed = or_(devices.c.published.is_(None), devices.c.published != devices.c.address)
        ready = select(devices).where(devices.c.address.is_not(None), changed, devices.c.publish_after <= now())
        with self._store.reading() as db:
            device = db.execute(ready.order_by(devices.c.publish_after).limit(1)).first()
        if device is None:
            return False
        done: dict[str, Any] = {"published": device.address, "publish_problem": None}
        try:
            zone.set_address(device.client_id, device.address)
            self._refusals = 0
        except Never as error:
            # Until it comes from another address, nothing will change.
            done["publish_problem"] = str(error)
        except TryLater as error:
            done = {"publish_after": now() + HOUR // 4, "publish_problem": str(error)}
            self._refusals += 1
            if not isinstance(error, Refused) or self._refusals > 3:
                self._addresses_after = monotonic() + FIRST_PAUSE
                done["publish_after"] = now() + FIRST_PAUSE
        if done["publish_problem"]:
            print(f"{device.client_id}: {done['publish_problem']}", file=sys.stderr, flush=True)
        with self._store.writing() as db:
            mine = update(devices).where(devices.c.client_id == device.client_id)
            db.execute(mine.where(devices.c.address == device.address).values(**done))
        return True

    def _note_own_names(self, zone: Zone) -> None:
        """Writes down the names that the zone needs for itself: no device gets one of them."""
        if self._zone_after > monotonic():
            return
        self._zone_after = monotonic() + HOUR
        try:
            names = zone.own_names()
        except TryLater as error:
            print(f"the zone's own names: {error}", file=sys.stderr, flush=True)
            self._zone_after = monotonic() + FIRST_PAUSE
            return
        with self._store.writing() as db:
            db.execute(delete(zone_names))
            for name in names:
                store.insert_new(db, zone_names, name=name[:255], seen=now())


def _held(order: Row[Any]) -> Any:
    """The order as this worker took it: nobody else has taken it since, and it is for the same request."""
    return (
        (orders.c.client_id == order.client_id)
        & (orders.c.leased == order.leased)
        & (orders.c.sha256 == order.sha256)
    )
