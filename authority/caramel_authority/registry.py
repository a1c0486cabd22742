# SPDX-License-Identifier: MIT OR Apache-2.0
"""Who gets a certificate: what was decided about each request, by whom, and what a device is told.

A request is pending, authorized or rejected. Authorized means that its client ID is on the list of devices as well.
The signer brings certificates for authorized requests, at once or later; it is asked when the device asks, and only
when there is none yet, a third of the life or less is left, or its serial number is no longer accepted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from . import store
from .configuration import Rules
from .errors import BadRequest, WrongUsage
from .signing_request import CLIENT_ID, SigningRequest, Subject, device_of, in_zone, validate
from .store import AUTHORIZED, PENDING, REJECTED, Store, certificates, devices, keys, now, orders, requests

USAGES = {ExtendedKeyUsageOID.CLIENT_AUTH: "client", ExtendedKeyUsageOID.SERVER_AUTH: "server"}
UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


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


class Registry:
    def __init__(self, store: Store, rules: Rules, signer: Signer, retry_after: int, addresses: str = "off") -> None:
        self.store = store
        self.signer = signer
        self._rules = rules
        self._retry_after = retry_after
        self._addresses = addresses

    # --- For devices ---

    def post(self, body: bytes, sha256: str, address: str | None) -> RequestStatus:
        """Takes a request, and decides about it where a rule does. Raises BadRequest, and then nothing is stored."""
        request = validate(body, sha256, self.signer.prefixes)
        refused = self.signer.refuses(request)
        if refused:
            raise BadRequest(refused)
        with self.store.writing() as db:
            store.insert_new(db, keys, key_sha256=request.key_sha256, device=request.device)
            owner = select(keys.c.device).where(keys.c.key_sha256 == request.key_sha256)
            if db.execute(owner).scalar_one() != request.device:
                # Devices that make keys without entropy make the same ones (Heninger et al., 2012).
                raise BadRequest("Bad key: another device has it")
            row = {name: getattr(request, name) for name in ("sha256", "pem", "client_id", "device", "key_sha256")}
            if not store.insert_new(db, requests, **row, posted=now(), state=PENDING, address=address):
                raise BadRequest("duplicate request")
            rule = self._rule_for(request.client_id)
            if rule and self._admit_by_rule(db, request.client_id, sha256):
                self._decide(db, sha256, AUTHORIZED, f"rule:{rule}")
            state = db.execute(select(requests.c.state).where(requests.c.sha256 == sha256)).scalar_one()
        return RequestStatus(state, retry_after=self._retry_after)

    def status(self, sha256: str, address: str | None) -> RequestStatus | None:
        """What the device with this request is told now; None where nobody knows the request."""
        with self.store.reading() as db:
            request, newest = self._find(db, sha256)
            if request is None:
                return None
            waits = self.signer.waits(db, request) if request.state == AUTHORIZED else None
            due = request.state == AUTHORIZED and waits is None and self._is_due(db, newest)
        if due:
            newest, waits = self.renew(sha256)
        if address and address != request.address and self._addresses == "check":
            self._seen_at(request, address)
        if request.state != AUTHORIZED:
            return RequestStatus(request.state, retry_after=self._retry_after)
        if newest is None or newest.not_after < now():
            return RequestStatus(AUTHORIZED, retry_after=waits or self._retry_after)
        # A date in the future must not be said (RFC 9110, 8.8.2.1).
        return RequestStatus(AUTHORIZED, newest.pem, newest.modified if newest.modified <= now() else None)

    def is_accepted(self, serial: int) -> bool:
        """Whether whoever showed the certificate with this number is still to be let in."""
        with self.store.reading() as db:
            if serial < store.number(db, "minimum"):
                return False
            query = select(requests.c.state).join(certificates).where(certificates.c.serial == f"{serial:x}")
            return bool(db.execute(query).scalar() == AUTHORIZED)

    def look(self) -> None:
        """Whether devices can be answered now. Raises what they would be told, or the log."""
        with self.store.reading() as db:
            store.number(db, "serial")
        self.signer.look()

    def renew(self, sha256: str) -> tuple[Row[Any] | None, int | None]:
        """The newest certificate, new where it had to be; else for how long there is no use in asking."""
        if self.signer.remote(sha256):
            with self.store.reading() as db:
                return newest_certificate(db, sha256), None
        with self.store.writing() as db:
            # Somebody else may have been faster: what counts is what is there now that the row is ours.
            request, newest = self._find(db, sha256, lock=True)
            if request is not None and request.state == AUTHORIZED and self._is_due(db, newest):
                issued = self.signer.obtain(db, request)
                if issued:
                    keep(db, request, issued)
            request, newest = self._find(db, sha256)
            return newest, self.signer.waits(db, request) if request is not None else None

    @staticmethod
    def _find(db: Connection, sha256: str, lock: bool = False) -> tuple[Row[Any] | None, Row[Any] | None]:
        query = select(requests).where(requests.c.sha256 == sha256)
        request = db.execute(query.with_for_update() if lock else query).first()
        newest = newest_certificate(db, sha256) if request else None
        return request, newest

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

    # --- Who decides ---

    def _rule_for(self, client_id: str) -> str | None:
        """The rule that admits this ID without a person, None where there is none. `listed` is looked up later."""
        if self._rules.uuids and UUID.fullmatch(client_id):
            return "uuids"
        if self._rules.zone and in_zone(client_id, self._rules.zone):
            return "zone"
        return "listed" if self._rules.listed else None

    def _admit_by_rule(self, db: Connection, client_id: str, sha256: str) -> bool:
        """Whether a rule admits this request. A rule admits an ID once: whoever comes with a second key for it may be
        somebody else, and that is for a person to say, unless the rules say `again`.
        """
        if self._rule_for(client_id) != "listed":
            store.insert_new(db, devices, client_id=device_of(client_id), added=now())
        free = devices.c.client_id == device_of(client_id)
        if not self._rules.again:
            free &= devices.c.sha256.is_(None)
        return db.execute(update(devices).where(free).values(sha256=sha256)).rowcount == 1

    def _decide(self, db: Connection, sha256: str, state: str, who: str) -> None:
        """Writes a decision down, and what follows from it."""
        values = update(requests).where(requests.c.sha256 == sha256).values(state=state).returning(requests)
        request = db.execute(values).one()
        if state == AUTHORIZED:
            store.insert_new(db, devices, client_id=request.device, added=now())
            admitted = update(devices).where(devices.c.client_id == request.device).values(sha256=sha256)
            if request.address and self._addresses != "off":
                admitted = admitted.values(address=request.address)
            db.execute(admitted)
        else:
            db.execute(delete(orders).where(orders.c.sha256 == sha256))
        store.write_log(db, who, state, request.client_id, sha256)

    # --- For the administrator ---

    def decide(self, which: str, state: str, who: str) -> Row[Any]:
        """Authorizes or rejects the request with this hash (or its beginning), or the last one of this client ID.

        Raises WrongUsage where it isn't clear which one is meant.
        """
        with self.store.writing() as db:
            if re.fullmatch("[0-9a-f]{8,64}", which):
                found = db.execute(select(requests).where(requests.c.sha256.startswith(which))).all()
            else:
                found = []
            if not found:
                mine = select(requests).where(requests.c.client_id == which)
                found = db.execute(mine.where(requests.c.state == PENDING)).all() or db.execute(mine).all()
            found = [request for request in found if request.state != state] or found
            if len(found) != 1:
                hashes = ", ".join(f"{request.sha256[:16]} ({request.state})" for request in found)
                raise WrongUsage(f"{which}: which one? {hashes}" if found else f"{which}: no such request")
            if found[0].state != state:
                self._decide(db, found[0].sha256, state, who)
            return found[0]

    def allow(self, client_ids: Iterable[str], who: str) -> int:
        """Puts IDs on the list of devices; those already there stay as they are. How many are new.

        A single request that is pending for one of them is authorized. Raises WrongUsage, and then none is on the
        list.
        """
        new = 0
        with self.store.writing() as db:
            for client_id in client_ids:
                if not CLIENT_ID.fullmatch(client_id):
                    raise WrongUsage(f"{client_id!r} is no client ID: it has 1 to 64 of A-Z a-z 0-9 . _ : -")
                device = device_of(client_id)
                if not store.insert_new(db, devices, client_id=device, added=now()):
                    continue
                new += 1
                store.write_log(db, who, "allowed", client_id)
                wait = select(requests.c.sha256).where(requests.c.device == device, requests.c.state == PENDING)
                waiting = db.execute(wait).scalars().all()
                if self._rules.listed and len(waiting) == 1:
                    self._decide(db, waiting[0], AUTHORIZED, "rule:listed")
        return new

    def disallow(self, client_id: str, who: str) -> None:
        """Takes an ID off the list of devices and rejects all of its requests. Raises WrongUsage."""
        with self.store.writing() as db:
            known = or_(requests.c.state == PENDING, requests.c.state == AUTHORIZED)
            mine = select(requests.c.sha256).where(requests.c.device == device_of(client_id), known)
            rejected = db.execute(mine).scalars().all()
            gone = db.execute(delete(devices).where(devices.c.client_id == device_of(client_id))).rowcount
            if not gone and not rejected:
                raise WrongUsage(f"{client_id}: no such device")
            store.write_log(db, who, "disallowed", client_id)
            for sha256 in rejected:
                self._decide(db, sha256, REJECTED, who)

    def raise_minimum(self, who: str) -> int:
        """From now on no certificate that was signed before is accepted; every device gets a new one when it asks."""
        with self.store.writing() as db:
            minimum = store.next_serial(db)
            store.set_number(db, "minimum", minimum)
            store.write_log(db, who, "minimum", detail=f"{minimum:x}")
            return minimum


def newest_certificate(db: Connection, sha256: str) -> Row[Any] | None:
    return db.execute(
        select(certificates).where(certificates.c.sha256 == sha256).order_by(certificates.c.id.desc()).limit(1)
    ).first()


def keep(db: Connection, request: Row[Any], issued: Issued) -> None:
    """Stores a certificate of a request whose row the transaction has; from now on the device gets this one."""
    before = newest_certificate(db, request.sha256)
    # Whatever the clock says, later than that of the one before: a 304 must never hide a new certificate.
    modified = max(now(), before.modified + 1 if before else 0)
    ended = (certificates.c.sha256 == request.sha256) & (certificates.c.not_after < now())
    db.execute(delete(certificates).where(ended))
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
