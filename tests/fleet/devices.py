"""The devices of the load: keys, requests and certificates, made here in bulk.

A server signs one request after the other, when somebody tells it to. For a load it only has to find what it would
have stored. So each device's certificate is signed here with the server's own CA key, has the fields that Caramel
gives it and a serial number of Caramel's kind (a time-based UUID, by which our filter tells the date), and goes into
the database as a row. All have one key, which is the same work for a server and takes no minutes to make.
"""

from __future__ import annotations

import datetime
import hashlib
import uuid
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import world
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from world import Authority

#: Hours that a certificate lives, as Caramel's own setting for those that are signed by hand.
LIFE = 48
#: Seconds for which the certificates are already there: long enough for the filter to give them a date.
AGE = 3600
#: Seconds from the start of RFC 9562's calendar (15 October 1582) to that of Unix.
GREGORIAN_TO_UNIX = 12_219_292_800


@dataclass(frozen=True)
class Device:
    """A device and its certificate; times are seconds since 1970, UTC."""

    client_id: str
    key: bytes
    request: bytes
    certificate: bytes
    serial: int
    not_before: int
    not_after: int

    @property
    def sha256(self) -> str:
        """By which the server knows the request."""
        return hashlib.sha256(self.request).hexdigest()

    @property
    def modified(self) -> int:
        """What our filter in front of Caramel says as Last-Modified: see server/caramel_conditional.py."""
        return self.not_before + 2

    def write(self, folder: Path) -> Path:
        """Key and certificate in one file."""
        path = folder / f"{self.client_id}.pem"
        path.write_bytes(self.key + self.certificate)
        path.chmod(0o600)
        return path

    def line(self, folder: Path, since: int) -> list[str]:
        """What `locustfile.py` wants to know."""
        return [self.client_id, self.sha256, formatdate(since, usegmt=True), str(self.write(folder))]


def make(authority: Authority, count: int) -> list[Device]:
    """So many devices, signed by this authority."""
    key = world.new_key()
    return [_signed(authority, f"f1ee7{number:07x}", key) for number in range(count)]


def _signed(authority: Authority, client_id: str, key: Any) -> Device:
    request = world.signing_request(key, authority.subject_for(client_id))
    signed = int(world.now().timestamp()) - AGE
    serial = _serial(signed)
    begin = datetime.datetime.fromtimestamp(signed, datetime.timezone.utc)
    end = begin + world.hours(LIFE)
    ca, public = authority.certificate, key.public_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(ca.public_key()).digest
    certificate = (
        x509.CertificateBuilder(ca.subject, x509.load_pem_x509_csr(request).subject, public, serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(False, None), True)
        .add_extension(x509.ExtendedKeyUsage([world.CLIENT_AUTH, world.SERVER_AUTH]), True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(client_id)]), False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
        .add_extension(
            x509.AuthorityKeyIdentifier(identifier, [x509.DirectoryName(ca.issuer)], ca.serial_number), False
        )
        .sign(authority.key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return Device(client_id, world.private_pem(key), request, pem, serial, signed, int(end.timestamp()))


def _serial(moment: int) -> int:
    """A serial number as Caramel takes one within this second."""
    ticks = (moment + GREGORIAN_TO_UNIX) * 10_000_000 + uuid.uuid4().int % 10_000_000
    node = uuid.uuid4().node
    return uuid.UUID(fields=(ticks & 0xFFFFFFFF, ticks >> 32 & 0xFFFF, ticks >> 48, 0x80, 1, node), version=1).int
