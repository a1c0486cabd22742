# SPDX-License-Identifier: MIT OR Apache-2.0
"""Who gets a certificate: what was decided about each request, by whom, and what a device is told.

A request is pending, authorized, rejected, or retired because another key of its device was authorized. Authorized
means that its client ID is on the list of devices as well. A device may be barred or suspended, whatever its requests
are.
The signer brings certificates for authorized requests, at once or later; it is asked when the device asks, and only
when there is none yet, a third of the life or less is left, or its serial number is no longer accepted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from sqlalchemy import Connection, Row, bindparam, delete, func, insert, or_, select, update

from . import store
from .configuration import Configuration
from .errors import BadRequest, TryLater, WrongUsage
from .refusals import REMEMBERED, Line, Refusals
from .sightings import Sightings
from .signing_request import SigningRequest, Subject, device_of, id_problem, in_zone, validate, zones_own
from .store import (
    AUTHORIZED,
    BARRED,
    PENDING,
    REJECTED,
    RETIRED,
    SUSPENDED,
    Store,
    bars,
    certificates,
    devices,
    keys,
    now,
    orders,
    requests,
    sightings,
    zone_names,
)

HOUR, DAY = 3600, 86400
USAGES = {ExtendedKeyUsageOID.CLIENT_AUTH: "client", ExtendedKeyUsageOID.SERVER_AUTH: "server"}
UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
#: Who decides again what an older database doesn't know.
RESTORE = "restore"
#: How many requests of one client ID may wait for a decision. A device makes a new key only when it has lost its own.
PENDING_OF_ONE = 20
#: How many devices one transaction is about, where there are many.
PIECE = 500
#: Digits of a hash that no client ID shares by accident.
NO_ACCIDENT = 12
#: Digits of a SHA-256.
WHOLE_HASH = 64

#: What every check asks, made once: to make a query takes as long as the database takes to answer it.
_OF_REQUEST = certificates.c.sha256 == bindparam("sha256")
_BEGUN = certificates.c.not_before <= bindparam("now")
FOUND = (
    select(requests, bars.c.kind.label("held"), sightings.c.at.label("seen"))
    .outerjoin(bars, bars.c.device == requests.c.device)
    .outerjoin(sightings, sightings.c.sha256 == requests.c.sha256)
    .where(requests.c.sha256 == bindparam("sha256"))
)
NEWEST = select(certificates).where(_OF_REQUEST, _BEGUN).order_by(certificates.c.id.desc()).limit(1)
BEGINS = select(func.max(certificates.c.not_before)).where(_OF_REQUEST, _BEGUN)


@dataclass(frozen=True)
class Issued:
    """A certificate as the signer made or got it: PEM, leaf first, and when it is time for the next one."""

    pem: str
    serial: int
    not_after: int
    renew_after: int
    ask_renewal_info: int | None = None


class Signer(Protocol):
    """What the registry asks of a CA, of its own or behind ACME."""

    @property
    def root(self) -> bytes:
        """The CA's root, in PEM."""

    @property
    def bundle(self) -> bytes:
        """The root and all that stands between it and a device's certificate, in PEM."""

    @property
    def prefixes(self) -> Sequence[Subject] | None:
        """What subjects begin with under this CA (one of these), None where it doesn't matter."""

    @property
    def end(self) -> int | None:
        """When everything ends that this CA signs now, None where it isn't known."""

    def look(self) -> None:
        """Raises TryLater or WrongUsage where it could sign nothing now."""

    def refuses(self, request: SigningRequest) -> str | None:
        """Why this CA would never sign the request, None where it would."""

    def remote(self, sha256: str) -> bool:
        """Has the process that can sign this request see to it, and is True; False where this process can. Outside of
        any transaction.
        """

    def obtain(self, db: Connection, request: Row[Any]) -> Issued | None:
        """In a transaction that writes and has the request's row: a certificate, or None where it takes a while."""

    def waits(self, db: Connection, request: Row[Any]) -> int | None:
        """For how many seconds there is no use in asking for this request, None where nothing is under way."""


@dataclass(frozen=True)
class RequestStatus:
    """What a device is told of its request. With `pem` there is a certificate, without it has to wait or give up."""

    state: str
    pem: str | None = None
    #: When the certificate was made, None where that must not be said yet.
    modified: int | None = None
    retry_after: int = 0


@dataclass(frozen=True)
class Allowed:
    """What `allow` did: how many IDs are new on the list, have another hash now, or may come again; and whom no list
    helps, because they are barred or suspended.
    """

    new: int = 0
    changed: int = 0
    held: tuple[str, ...] = ()


class Registry:
    def __init__(self, store: Store, configuration: Configuration, signer: Signer) -> None:
        self.store = store
        self.signer = signer
        self.refusals = Refusals(configuration)
        self.sightings = Sightings(store, lambda: self.purge(configuration.pending_days, "rule:pending_days"))
        self._configuration = configuration
        self._rules = configuration.rules
        self._retry_after = configuration.retry_after
        self._addresses = configuration.dns.addresses

    # --- For devices ---

    def post(self, body: bytes, sha256: str, address: str | None) -> RequestStatus:
        """Takes a request, and decides about it where a rule does. Raises BadRequest or TryLater, and then nothing is
        stored.
        """
        request = validate(body, sha256, self.signer.prefixes)
        refused = self.signer.refuses(request)
        if refused:
            raise BadRequest(refused)
        with self.store.writing() as db:
            store.lock_devices(db, [request.device])
            held = bar_of(db, request.device)
            if held == BARRED:
                raise BadRequest("Bad subject: this client ID is barred")
            if self._is_zones_own(db, request.client_id):
                raise BadRequest("Bad subject: the CN is a name that the zone needs for itself")
            store.insert_new(db, keys, key_sha256=request.key_sha256, device=request.device)
            owner = select(keys.c.device).where(keys.c.key_sha256 == request.key_sha256)
            if db.execute(owner).scalar_one() != request.device:
                # Devices that make keys without entropy make the same ones (Heninger et al., 2012).
                raise BadRequest("Bad key: another device has it")
            row = {name: getattr(request, name) for name in ("sha256", "pem", "client_id", "device", "key_sha256")}
            if not store.insert_new(db, requests, **row, posted=now(), state=PENDING, address=address):
                raise BadRequest("duplicate request")
            rule = None if held else self._rule_for(db, request)
            if rule:
                self._decide(db, sha256, AUTHORIZED, f"rule:{rule}")
            else:
                self._refuse_too_many(db, request.device)
        return RequestStatus(AUTHORIZED if rule else PENDING, retry_after=self._retry_after)

    def status(self, sha256: str, address: str | None) -> RequestStatus | None:
        """What the device with this request is told now; None where nobody knows the request."""
        with self.store.reading() as db:
            found = self._find(db, sha256)
            if found is None:
                return None
            request, newest = found
            good = request.state == AUTHORIZED and request.held is None
            waits = self.signer.waits(db, request) if good else None
            due = good and waits is None and self._is_due(db, newest)
        if due:
            if not self.signer.remote(sha256):
                self.renew(sha256)
            with self.store.reading() as db:
                newest = newest_certificate(db, sha256)
                waits = _soon(db, sha256) or self.signer.waits(db, request)
        self.sightings.note(sha256, address, request.seen)
        if address and address != request.address and self._addresses == "check":
            self._seen_at(request, address)
        if not good:
            refused = request.held == BARRED or request.state == REJECTED
            return RequestStatus(REJECTED if refused else PENDING, retry_after=self._retry_after)
        if newest is None or newest.not_after < now():
            return RequestStatus(AUTHORIZED, retry_after=waits or self._retry_after)
        # A date in the future must not be said (RFC 9110, 8.8.2.1).
        return RequestStatus(AUTHORIZED, newest.pem, newest.modified if newest.modified <= now() else None)

    def is_accepted(self, serial: int) -> bool:
        """Whether whoever showed the certificate with this number is still to be let in."""
        query = (
            select(requests.c.state, bars.c.kind)
            .join(certificates, certificates.c.sha256 == requests.c.sha256)
            .outerjoin(bars, bars.c.device == requests.c.device)
            .where(certificates.c.serial == f"{serial:x}")
        )
        with self.store.reading() as db:
            if serial < store.number(db, "minimum"):
                return False
            return db.execute(query).first() == (AUTHORIZED, None)

    def look(self) -> None:
        """Whether devices can be answered now. Raises what they would be told, or the log."""
        with self.store.reading() as db:
            store.number(db, "serial")
        self.signer.look()

    def renew(self, sha256: str) -> None:
        """Has the signer make, or begin to get, a certificate where one is due."""
        with self.store.writing() as db:
            # Somebody else may have been faster: what counts is what is there now that the row is ours.
            db.execute(select(requests.c.sha256).where(requests.c.sha256 == sha256).with_for_update())
            found = self._find(db, sha256)
            if found is None:
                return
            request, newest = found
            good = request.state == AUTHORIZED and request.held is None
            if good and _soon(db, sha256) is None and self._is_due(db, newest):
                issued = self.signer.obtain(db, request)
                if issued:
                    keep(db, request, issued)

    @staticmethod
    def _find(db: Connection, sha256: str) -> tuple[Row[Any], Row[Any] | None] | None:
        """The request, with `held` (what was decided about its device) and `seen`; its certificate."""
        request = db.execute(FOUND, {"sha256": sha256}).first()
        return (request, newest_certificate(db, sha256)) if request else None

    def _is_due(self, db: Connection, newest: Row[Any] | None) -> bool:
        if newest is None or now() >= newest.not_after or int(newest.serial, 16) < store.number(db, "minimum"):
            return True
        # Where a certificate ends with the CA, another one would be no better, whoever asks and however often.
        return bool(now() >= newest.renew_after and newest.not_after != self.signer.end)

    def _seen_at(self, request: Row[Any], address: str) -> None:
        with self.store.writing() as db:
            db.execute(update(requests).where(requests.c.sha256 == request.sha256).values(address=address))
            if request.state == AUTHORIZED:
                db.execute(update(devices).where(devices.c.sha256 == request.sha256).values(address=address))

    def _is_zones_own(self, db: Connection, client_id: str) -> bool:
        zones = {self._rules.zone, self._configuration.dns.zone} - {""}
        found = select(zone_names).where(zone_names.c.name == device_of(client_id))
        return any(zones_own(client_id, zone) for zone in zones) or bool(zones and db.execute(found).first())

    def _refuse_too_many(self, db: Connection, device: str) -> None:
        """What strangers post is kept until somebody decides: so much of it, and no more."""
        pending = select(func.count()).where(requests.c.state == PENDING)
        most = self._configuration.pending_limit
        if db.execute(pending).scalar_one() > most:
            raise TryLater(f"{most} requests wait for a decision: no more are taken", self._retry_after)
        if db.execute(pending.where(requests.c.device == device)).scalar_one() > PENDING_OF_ONE:
            raise TryLater(f"{PENDING_OF_ONE} requests of this client ID wait for a decision", self._retry_after)

    # --- Who decides ---

    def _rule_for(self, db: Connection, request: SigningRequest | Row[Any]) -> str | None:
        """The rule that admits this request now, None where that is for a person to say.

        A rule admits an ID once: whoever comes with a second key for it may be somebody else, unless the rules, or
        somebody for this device, said `again`. No rule admits a key that was rejected or retired; and where it is
        known which request or key the device has, rules admit no other.
        """
        listed = db.execute(select(devices).where(devices.c.client_id == request.device)).first()
        states = _states_of_key(db, request.key_sha256)
        if _was_refused(states):
            return None
        expected = listed.expected if listed else None
        if expected and expected not in (request.sha256, request.key_sha256):
            return None
        # What is said about the next key is not for another request with the present one.
        if listed and listed.again and AUTHORIZED not in states:
            return "again"
        if listed and listed.sha256 and not self._rules.again and not expected:
            return None
        if self._rules.uuids and UUID.fullmatch(request.client_id):
            return "uuids"
        if self._rules.zone and in_zone(request.client_id, self._rules.zone):
            return "zone"
        return "listed" if listed and self._rules.listed else None

    def _decide(self, db: Connection, sha256: str, state: str, who: str) -> None:
        """Writes a decision down, and what follows from it. The transaction has locked the device."""
        before, key = db.execute(
            select(requests.c.state, requests.c.key_sha256).where(requests.c.sha256 == sha256)
        ).one()
        present = AUTHORIZED in _states_of_key(db, key)
        values = update(requests).where(requests.c.sha256 == sha256).values(state=state).returning(requests)
        request = db.execute(values).one()
        again = False
        if state == AUTHORIZED:
            store.insert_new(db, devices, client_id=request.device, added=now())
            mine = devices.c.client_id == request.device
            admitted = update(devices).where(mine).values(sha256=sha256)
            if not present:
                again = bool(db.execute(select(devices.c.again).where(mine)).scalar())
                admitted = admitted.values(again=0)
            if request.address and self._addresses != "off":
                admitted = admitted.values(address=request.address)
            db.execute(admitted)
        else:
            db.execute(delete(orders).where(orders.c.sha256 == sha256))
        store.write_log(db, who, state, request.client_id, sha256)
        # That a second key was admitted isn't to happen again in an older database, with a third one.
        if who != RESTORE and (again or {state, before} & {REJECTED, RETIRED}):
            self.refusals.write(db, state, **{name: getattr(request, name) for name in REMEMBERED})
        if state == AUTHORIZED:
            # A device has one key. The one before is on a flash that was erased, or in other hands.
            others = select(requests.c.sha256).where(
                requests.c.device == request.device, requests.c.state == AUTHORIZED, requests.c.sha256 != sha256
            )
            for one in db.execute(others).scalars().all():
                self._decide(db, one, RETIRED, who)

    def _decide_about_waiting(self, db: Connection, device: str) -> None:
        """Lets the rules look again at what is pending of a device, after they have changed for it."""
        waiting = db.execute(select(requests).where(requests.c.device == device, requests.c.state == PENDING)).all()
        ruled = [(request, rule) for request in waiting if (rule := self._rule_for(db, request))]
        if len(ruled) == 1 and bar_of(db, device) is None:
            request, rule = ruled[0]
            self._decide(db, request.sha256, AUTHORIZED, f"rule:{rule}")

    # --- For the administrator ---

    def decide(self, which: str, state: str, who: str) -> list[Row[Any]]:
        """Authorizes or rejects the request with this hash (or its beginning), or the one of this client ID that is
        meant: it is to be the only one that could be. The request as it is now, then those that were retired.

        Raises WrongUsage where it isn't clear which one is meant; one that was rejected or retired, or whose key was,
        is by its hash only.
        """
        with self.store.writing() as db:
            request = self._meant(db, which, state)
            store.lock_devices(db, [request.device])
            mine = select(requests).where(requests.c.device == request.device)
            before = {one.sha256: one.state for one in db.execute(mine)}
            if before.get(request.sha256) != request.state:
                raise TryLater(f"{which}: somebody else has just decided about it")
            if state == AUTHORIZED and bar_of(db, request.device) == BARRED:
                raise WrongUsage(f"{request.client_id} is barred; unbar it first")
            if state == AUTHORIZED and self._is_zones_own(db, request.client_id):
                raise WrongUsage(f"{request.client_id} is a name that the zone needs for itself")
            if request.state != state:
                self._decide(db, request.sha256, state, who)
            after = {one.sha256: one for one in db.execute(mine)}
            retired = [one for one in after.values() if one.state == RETIRED != before[one.sha256]]
            return [after[request.sha256], *retired]

    @staticmethod
    def _meant(db: Connection, which: str, state: str) -> Row[Any]:
        mine = select(requests).where(requests.c.device == device_of(which))
        of_id = db.execute(mine.order_by(requests.c.posted, requests.c.sha256)).all()
        of_hash: Sequence[Row[Any]] = []
        if re.fullmatch("[0-9a-f]{8,64}", which):
            of_hash = db.execute(select(requests).where(requests.c.sha256.startswith(which))).all()
        if len(which) == WHOLE_HASH and of_hash:
            # Nobody says a whole hash and means an ID, and anybody may choose it as theirs.
            of_id = []
        if of_id and of_hash and len(which) >= NO_ACCIDENT:
            # Somebody chose the beginning of another's hash as an ID.
            raise WrongUsage(f"{which} is an ID, and the beginning of another request's hash: {_named(of_hash)}")
        by_hash = bool(of_hash and not of_id)
        if by_hash:
            meant = list(of_hash)
        elif state == REJECTED:
            # What can be used, or could be. A retired key is no use to anybody, and keeps its state.
            usable = [one for one in of_id if one.state in (AUTHORIZED, PENDING)]
            meant = usable or [one for one in of_id if one.state == REJECTED][-1:] or list(of_id)
        else:
            meant = [one for one in of_id if one.state == PENDING] or [one for one in of_id if one.state == state]
        if len(meant) != 1:
            found = meant or of_id
            raise WrongUsage(f"{which}: which one? {_named(found)}" if found else f"{which}: no such request")
        if state == AUTHORIZED and not by_hash and _was_refused(_states_of_key(db, meant[0].key_sha256)):
            raise WrongUsage(f"{which}: its key was refused before: which one? {_named(meant)}")
        return meant[0]

    def bar(self, client_id: str, who: str) -> int:
        """Nothing of this device is admitted any more, whatever it asks with; what it has is rejected. How many
        requests that were. Raises WrongUsage.
        """
        with self._holding(client_id, who, "barred") as (db, device):
            _hold(db, device, BARRED, who)
            return self._reject_all(db, device, who)

    def unbar(self, client_id: str, who: str) -> None:
        """The device may ask again; what was rejected stays rejected. Raises WrongUsage."""
        with self._holding(client_id, who, "unbarred") as (db, device):
            _release(db, device, BARRED, client_id)

    def suspend(self, client_id: str, who: str) -> None:
        """The device waits, nothing it has is accepted, and nothing is wiped. Raises WrongUsage."""
        with self._holding(client_id, who, "suspended") as (db, device):
            if bar_of(db, device) == BARRED:
                raise WrongUsage(f"{client_id} is barred, which is more")
            _hold(db, device, SUSPENDED, who)

    def resume(self, client_id: str, who: str) -> None:
        """The device has again what it had; what it posted meanwhile is decided about now. Raises WrongUsage."""
        with self._holding(client_id, who, "resumed") as (db, device):
            _release(db, device, SUSPENDED, client_id)
            self._decide_about_waiting(db, device)

    @contextmanager
    def _holding(self, client_id: str, who: str, action: str) -> Iterator[tuple[Connection, str]]:
        device = _checked(client_id)
        with self.store.writing() as db:
            store.lock_devices(db, [device])
            store.write_log(db, who, action, client_id)
            yield db, device
            # Nothing that can fail comes after it: what is written there was decided.
            self.refusals.write(db, action, device=device, client_id=client_id)

    def allow(self, entries: Iterable[tuple[str, str | None]], who: str, again: bool = False) -> Allowed:
        """Puts IDs on the list of devices, with the SHA-256 of the request or public key that each has, where that is
        known. Those already there stay as they are, but for a new hash. With `again`, the next key of each is
        admitted as well, once. A single request that is pending for one of them is authorized.

        It is done in pieces, so that devices are served meanwhile; whoever is interrupted can do it again. Raises
        WrongUsage before anything was done.
        """
        wanted: dict[str, tuple[str, str | None]] = {}
        for client_id, expected in entries:
            if wanted.setdefault(_checked(client_id), (client_id, expected))[1] != expected:
                raise WrongUsage(f"{client_id} stands there twice, and not with the same SHA-256")
        done = Allowed()
        names = sorted(wanted)
        for start in range(0, len(names), PIECE):
            if start:
                _let_others()
            piece = names[start : start + PIECE]
            with self.store.writing() as db:
                store.lock_devices(db, piece)
                done = self._allow_piece(db, {device: wanted[device] for device in piece}, who, again, done)
        return done

    def _allow_piece(
        self, db: Connection, piece: dict[str, tuple[str, str | None]], who: str, again: bool, done: Allowed
    ) -> Allowed:
        there = select(devices.c.client_id, devices.c.expected).where(devices.c.client_id.in_(piece))
        before: dict[str, str | None] = {one.client_id: one.expected for one in db.execute(there)}
        new = [device for device in piece if device not in before]
        if new:
            rows = [
                {"client_id": device, "added": now(), "expected": piece[device][1], "again": int(again)}
                for device in new
            ]
            db.execute(insert(devices), rows)
        changed = []
        for device in before:
            # Whose key is to be another one has no longer the one that the production line knew.
            expected = piece[device][1] or (None if again else before[device])
            if again or expected != before[device]:
                changed.append(device)
                mine = update(devices).where(devices.c.client_id == device)
                db.execute(mine.values(expected=expected, **({"again": 1} if again else {})))
        for device in [*new, *changed]:
            client_id, expected = piece[device]
            action = "allowed-again" if again else "allowed"
            store.write_log(db, who, action, client_id, detail=f"sha256 {expected}" if expected else "")
        touched = [*new, *changed]
        waiting = select(requests.c.device).where(requests.c.device.in_(touched), requests.c.state == PENDING)
        for device in db.execute(waiting.distinct()).scalars().all():
            self._decide_about_waiting(db, device)
        held = db.execute(select(bars.c.device).where(bars.c.device.in_(piece))).scalars().all()
        return Allowed(
            done.new + len(new),
            done.changed + len(changed),
            (*done.held, *(piece[device][0] for device in held)),
        )

    def disallow(self, client_id: str, who: str) -> str | None:
        """Takes an ID off the list of devices and rejects all of its requests. Raises WrongUsage.

        The rule that would admit it again, None where none would.
        """
        with self._holding(client_id, who, "disallowed") as (db, device):
            gone = db.execute(delete(devices).where(devices.c.client_id == device)).rowcount
            if not self._reject_all(db, device, who) and not gone:
                raise WrongUsage(f"{client_id}: no such device")
        if self._rules.uuids and UUID.fullmatch(client_id):
            return "uuids"
        return "zone" if self._rules.zone and in_zone(client_id, self._rules.zone) else None

    def _reject_all(self, db: Connection, device: str, who: str) -> int:
        mine = select(requests.c.sha256).where(requests.c.device == device, requests.c.state != REJECTED)
        rejected = db.execute(mine).scalars().all()
        for sha256 in rejected:
            self._decide(db, sha256, REJECTED, who)
        return len(rejected)

    def purge(self, days: int, who: str) -> int:
        """Forgets requests that nobody decided about and that nobody has asked about for so many days; how many. A
        device that is still there posts its request again.
        """
        before = now() - days * DAY
        old = (
            select(requests.c.sha256)
            .outerjoin(sightings, sightings.c.sha256 == requests.c.sha256)
            .where(requests.c.state == PENDING, requests.c.posted < before)
            .where(or_(sightings.c.at.is_(None), sightings.c.at < before))
            .limit(PIECE)
        )
        total = 0
        while True:
            with self.store.writing() as db:
                gone = db.execute(old).scalars().all()
                db.execute(delete(sightings).where(sightings.c.sha256.in_(gone)))
                left = delete(requests).where(requests.c.sha256.in_(gone), requests.c.state == PENDING)
                freed = db.execute(left.returning(requests.c.key_sha256)).scalars().all()
                used = select(requests.c.key_sha256).where(requests.c.key_sha256.in_(freed))
                db.execute(delete(keys).where(keys.c.key_sha256.in_(freed), keys.c.key_sha256.not_in(used)))
                total += len(freed)
                if len(gone) < PIECE:
                    if total:
                        store.write_log(db, who, "purged", detail=f"{total} requests")
                    return total
            _let_others()

    def raise_minimum(self, who: str) -> int:
        """From now on no certificate that was signed before is accepted; every device gets a new one when it asks."""
        with self.store.writing() as db:
            minimum = store.next_serial(db)
            store.set_number(db, "minimum", minimum)
            store.write_log(db, who, "minimum", detail=f"{minimum:x}")
            self.refusals.write(db, "minimum", value=minimum)
            return minimum

    def catch_up(self, forget: bool = False) -> int:
        """What everybody does first who decides, answers, signs or works: the database is told what only the file
        `refusals` knows, because it comes from an older copy, and the file what only the database knows. How many
        decisions were new to the database. Raises WrongUsage where a line can't be read, and where the file is gone
        and nobody said `forget`.
        """
        there = self.refusals.read()
        refused = store.refused
        with self.store.reading() as db:
            known: dict[str, int] = {row.about: row.at for row in db.execute(select(refused.c.about, refused.c.at))}
        if there is None:
            if known and not forget:
                raise self.refusals.gone()
            self.refusals.make()
            there = {}
        newer = [line for about, line in there.items() if line.at > known.get(about, 0)]
        count = self._refuse_again(newer) if newer else 0
        missing = {about for about, at in known.items() if about not in there or at > there[about].at}
        if missing:
            with self.store.reading() as db:
                rows = db.execute(select(refused).order_by(refused.c.at)).all()
            self.refusals.append(row.line for row in rows if row.about in missing)
        return count

    def _refuse_again(self, lines: list[Line]) -> int:
        # What has to do with the numbers comes last, as in every other transaction. So does what was authorized: by
        # then the database knows all that may speak against it.
        lines.sort(key=lambda line: (line.action == "minimum", line.action == AUTHORIZED, line.at))
        with self.store.writing() as db:
            # All at once, as whoever locks several: two never wait for each other.
            store.lock_devices(db, sorted({line.said["device"] for line in lines if "device" in line.said}))
            # Somebody else may have been at the same.
            new = [line for line in lines if line.at > store.refused_at(db, line.about)]
            for line in new:
                self._refuse_line(db, line.action, line.said)
                store.set_refused(db, line.about, line.at, line.text)
            if new:
                store.write_log(db, RESTORE, "restored", detail=f"{len(new)} decisions of {self.refusals.path}")
        return len(new)

    def _refuse_line(self, db: Connection, action: str, said: dict[str, Any]) -> None:
        if action == "minimum":
            # The next number has to be above it, whatever the clock says.
            store.set_number(db, "serial", max(said["value"], store.number(db, "serial", lock=True)))
            store.set_number(db, "minimum", max(said["value"], store.number(db, "minimum")))
            return
        device = said["device"]
        on_list = devices.c.client_id == device
        if action in (BARRED, SUSPENDED):
            _hold(db, device, action, RESTORE)
        elif action in ("unbarred", "resumed"):
            db.execute(delete(bars).where(bars.c.device == device))
        elif action == "disallowed":
            db.execute(delete(devices).where(on_list))
        elif store.insert_new(db, keys, key_sha256=said["key_sha256"], device=device) or (
            db.execute(select(keys.c.device).where(keys.c.key_sha256 == said["key_sha256"])).scalar() == device
        ):
            row = {name: said[name] for name in REMEMBERED}
            if store.insert_new(db, requests, **row, state=PENDING):
                # Whoever came first after the copy was made has used up what was said about the next key.
                db.execute(update(devices).where(on_list).values(again=0))
            mine = select(requests.c.sha256).where(requests.c.device == device, requests.c.state == AUTHORIZED)
            if action == AUTHORIZED and db.execute(mine.where(requests.c.sha256 != said["sha256"])).first():
                action = RETIRED  # the one that was authorized after it
            self._decide(db, said["sha256"], action, RESTORE)
            # Its place on the list was taken when it was decided.
            db.execute(update(devices).where(on_list, devices.c.sha256.is_(None)).values(sha256=said["sha256"]))


def _let_others() -> None:
    """Between two of many transactions. SQLite's other writers look every 0.1 s whether it is their turn."""
    time.sleep(0.12)


def _checked(client_id: str) -> str:
    """The device of this ID. Raises WrongUsage where it is no ID."""
    wrong = id_problem(client_id)
    if wrong:
        raise WrongUsage(f"{client_id[:100]!r} is no client ID: {wrong}")
    return device_of(client_id)


def _named(found: Sequence[Row[Any]]) -> str:
    return ", ".join(f"{request.sha256[:16]} ({request.state})" for request in found)


def _states_of_key(db: Connection, key_sha256: str) -> set[str]:
    """What was decided about the requests with this key."""
    query = select(requests.c.state).where(requests.c.key_sha256 == key_sha256)
    return set(db.execute(query.distinct()).scalars())


def _was_refused(states: set[str]) -> bool:
    """Whether a key with requests in these states was rejected, or retired and never authorized again: it may be in
    other hands. The key that a device has may have retired requests too, those before its newest one.
    """
    return REJECTED in states or (RETIRED in states and AUTHORIZED not in states)


def bar_of(db: Connection, device: str) -> str | None:
    """BARRED or SUSPENDED, None for all others."""
    return db.execute(select(bars.c.kind).where(bars.c.device == device)).scalar()


def _hold(db: Connection, device: str, kind: str, who: str) -> None:
    db.execute(delete(bars).where(bars.c.device == device))
    db.execute(insert(bars).values(device=device, kind=kind, since=now(), who=who[:100]))


def _release(db: Connection, device: str, kind: str, client_id: str) -> None:
    if not db.execute(delete(bars).where(bars.c.device == device, bars.c.kind == kind)).rowcount:
        raise WrongUsage(f"{client_id} is not {kind}")


def newest_certificate(db: Connection, sha256: str) -> Row[Any] | None:
    """What the device is to have. One that begins in the future was made by a clock that was ahead, and is no use."""
    return db.execute(NEWEST, {"sha256": sha256, "now": now()}).first()


def _soon(db: Connection, sha256: str) -> int | None:
    """In how many seconds the newest certificate begins, where that is soon: an ACME CA's clock may be ahead."""
    begin = db.execute(BEGINS, {"sha256": sha256, "now": now() + HOUR}).scalar()
    return begin - now() if begin and begin > now() else None


def keep(db: Connection, request: Row[Any], issued: Issued) -> None:
    """Stores a certificate of a request whose row the transaction has; from now on the device gets this one."""
    mine = certificates.c.sha256 == request.sha256
    dates = db.execute(select(certificates.c.modified).where(mine)).scalars().all()
    # Whatever the clock says or said, a date of no other one: a 304 must never hide a new certificate.
    modified = now()
    while modified in dates:
        modified += 1
    if dates:
        db.execute(delete(certificates).where(mine, certificates.c.not_after < now()))
    leaf = x509.load_pem_x509_certificate(issued.pem.encode())
    extended = [one.value for one in leaf.extensions if isinstance(one.value, x509.ExtendedKeyUsage)]
    values = {
        **vars(issued),
        "serial": f"{issued.serial:x}",
        "not_before": int(leaf.not_valid_before_utc.timestamp()),
        "usages": " ".join(sorted(USAGES[one] for value in extended for one in value if one in USAGES)),
    }
    db.execute(insert(certificates).values(sha256=request.sha256, modified=modified, **values))
    store.write_log(db, "signer", "signed", request.client_id, request.sha256, f"serial {issued.serial:x}")
