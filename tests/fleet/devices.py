"""The devices of the load: keys, requests and certificates, made here in bulk.

A server signs one request after the other, when somebody tells it to. For a load it only has to find what it would
have stored. So each device's certificate is signed here with the server's own CA key, has the fields that Caramel
gives it and a serial number of Caramel's kind (a time-based UUID, by which our filter tells the date), and goes into
the database as a row. RSA keys take long to make; they are kept for the next time.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from email.utils import formatdate
from multiprocessing import get_context
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
#: So many are made by this process itself.
FEW = 20
PEM = serialization.Encoding.PEM
_KEY = re.compile(rb"-----BEGIN PRIVATE KEY-----\n.*?-----END PRIVATE KEY-----\n", re.S)


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


def keys(count: int, kept: Path, progress: Callable[[str], None] = lambda _: None) -> list[bytes]:
    """So many keys in PEM; those of `kept` first, and then new ones, which are added to it."""
    found = _KEY.findall(kept.read_bytes()) if kept.exists() else []
    if count <= FEW:
        return (found + [_rsa(number) for number in range(count - len(found))])[:count]
    if len(found) < count:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with open(kept, "ab") as store, _pool() as pool:
            kept.chmod(0o600)
            for number, key in enumerate(pool.map(_rsa, range(count - len(found)), chunksize=20), len(found) + 1):
                store.write(key)
                found.append(key)
                if number % 200 == 0:
                    progress(f"{number} of {count} RSA keys, made once and kept")
    return found[:count]


def _pool() -> ProcessPoolExecutor:
    # Not forked: whoever calls may have threads.
    return ProcessPoolExecutor(2, get_context("spawn"))


def _rsa(_: int) -> bytes:
    return world.private_pem(world.new_key())


def make(authority: Authority, keys_: Sequence[bytes]) -> list[Device]:
    """A device for each of the keys, signed by this authority."""
    jobs = [(authority.folder, number, key) for number, key in enumerate(keys_)]
    if len(jobs) <= FEW:
        return _make(jobs)
    with _pool() as pool:
        return [device for several in pool.map(_make, _slices(jobs, 100)) for device in several]


def _slices(jobs: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _make(jobs: Sequence[tuple[Path, int, bytes]]) -> list[Device]:
    authority = Authority.open(jobs[0][0])
    return [_signed(authority, f"f1ee7{number:07x}", key) for _, number, key in jobs]


def _signed(authority: Authority, client_id: str, key_pem: bytes) -> Device:
    key: Any = serialization.load_pem_private_key(key_pem, None, unsafe_skip_rsa_key_validation=True)
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
    return Device(
        client_id,
        key_pem,
        request,
        certificate.public_bytes(PEM),
        serial,
        signed,
        int(end.timestamp()),
    )


def _serial(moment: int) -> int:
    """A serial number as Caramel takes one within this second."""
    ticks = (moment + GREGORIAN_TO_UNIX) * 10_000_000 + uuid.uuid4().int % 10_000_000
    node = uuid.uuid4().node
    return uuid.UUID(fields=(ticks & 0xFFFFFFFF, ticks >> 32 & 0xFFFF, ticks >> 48, 0x80, 1, node), version=1).int
