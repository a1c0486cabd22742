# SPDX-License-Identifier: MIT OR Apache-2.0
"""Signer `ca`: a CA of one's own, whose certificate is in one file and whose private key in another.

`ca.crt` holds the CA's certificate and, where it is an intermediate of somebody else's CA, those above it up to the
root. `ca.key` belongs to one user and has mode 0600. Everything signed here has a serial number that no other
certificate ever had, whichever key signs, and lives for less than a week unless the configuration says otherwise.

While one CA follows another (`rollover`), there are more files: `next.crt` and `next.key` of the CA that will sign,
`old.crt` and `old.key` of the one that did, and `cross.crt`, with which each of the two vouches for the other.
`request.key` is that of a request that is at somebody else's CA, until `ca-install`; nothing else takes its place.
`Certificates` is what everybody may read of that folder, `CertificateAuthority` is who holds the keys.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from sqlalchemy import Connection, Row, select

from . import store
from .configuration import Ca
from .errors import BadRequest, TryLater, WrongUsage
from .registry import Issued
from .shown import shown
from .signing_request import HOST_NAME, SigningRequest, Subject, prefix_of, validate
from .store import devices
from .whole_file import refuse_other_kinds, write_whole

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
Chain = tuple[x509.Certificate, ...]
USAGES = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
KEY_TYPES = ("ec-p256", "rsa-2048", "rsa-3072", "rsa-4096")
PEM = serialization.Encoding.PEM


def new_key(kind: str) -> Key:
    if kind == "ec-p256":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, int(kind.removeprefix("rsa-")))


def key_pem(key: Key) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def chain_pem(chain: Sequence[x509.Certificate]) -> bytes:
    return b"".join(one.public_bytes(PEM) for one in chain)


def utc(moment: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC)


def end_of(chain: Sequence[x509.Certificate]) -> int:
    """When the first of these ends: nothing that hangs on them is good for longer."""
    return min(int(one.not_valid_after_utc.timestamp()) for one in chain)


def check_dates(chain: Chain) -> None:
    """Raises TryLater where a CA with this chain can't sign today. A clock that has gone back behind the CA's begin
    would make certificates that are not handed out, at each question another one.
    """
    now, begin = store.now(), int(chain[0].not_valid_before_utc.timestamp())
    if end_of(chain) <= now:
        raise TryLater("the CA's certificate has ended; caramel-authority ca-status says what helps", 3600)
    if begin > now:
        raise TryLater("the CA's certificate begins later: is the clock right?", min(3600, begin - now))


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Issuer and subject alone don't say it: a CA's new certificate by its old key has one name twice (RFC 4210,
    4.4).
    """
    try:
        certificate.verify_directly_issued_by(certificate)
    except Exception:  # ValueError for another name, InvalidSignature for another key, TypeError for another kind
        return False
    return True


def describe(certificate: x509.Certificate) -> str:
    name, digest = certificate.subject.rfc4514_string(), certificate.fingerprint(hashes.SHA256()).hex()
    return f"{shown(name)} serial {certificate.serial_number:x} sha256 {digest}"


def _key_usage(**yes: bool) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    )
    return x509.KeyUsage(
        **{kind: yes.get(kind, False) for kind in (*every.split(), "encipher_only", "decipher_only")},
    )


def ca_extensions(key: Any) -> list[tuple[x509.ExtensionType, bool]]:
    return [
        (x509.BasicConstraints(True, 0), True),
        (_key_usage(key_cert_sign=True, crl_sign=True), True),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
    ]


@dataclass(frozen=True)
class Known:
    """The CA's certificates, each with those above it up to the root. `next` and `old` are empty unless one CA
    follows another.
    """

    chain: Chain
    next: Chain = ()
    old: Chain = ()
    cross: Chain = ()

    def above(self, chain: Chain, until: int) -> list[x509.Certificate]:
        """What stands between a certificate that this CA signs and the roots, for whoever knows either of them.

        What ends before the certificate does is left out: it would end the whole chain, and those who need it are at
        their own end.
        """
        between = [one for one in chain if not is_self_signed(one)]
        if self.old:
            between += [one for one in self.cross if one.public_key() == chain[0].public_key()]
        return [one for one in between if end_of([one]) >= until]


class Certificates:
    """What everybody may know of the CA. What another process changed is read again."""

    FILES = ("ca.crt", "next.crt", "old.crt", "cross.crt")

    def __init__(self, settings: Ca) -> None:
        self.settings = settings
        self.folder = Path(settings.folder)
        self._read: tuple[object, Known] | None = None

    def known(self) -> Known:
        """Raises WrongUsage where there is no CA, or nothing that can be read."""
        # Each file is replaced as a whole. If one was while the others were being read, all are read once more.
        while True:
            stat = [_stat(self.folder / name) for name in self.FILES]
            if self._read is None or self._read[0] != stat:
                self._read = (stat, self._look())
                continue
            return self._read[1]

    def _look(self) -> Known:
        chain, following, old, cross = (self.chain_in(name) for name in self.FILES)
        if not chain:
            raise WrongUsage(f"{self.folder}/ca.crt: there is no CA yet; caramel-authority ca-create makes one")
        # A command that was killed leaves the same CA under two names; the next command takes the second away.
        own = chain[0].public_key()
        if following and following[0].public_key() == own:
            following = ()
        if old and old[0].public_key() == own:
            old = ()
        return Known(chain, following, old, cross)

    def chain_in(self, name: str) -> Chain:
        """The certificates in this file, none where there is no such file. Raises WrongUsage."""
        try:
            return tuple(x509.load_pem_x509_certificates((self.folder / name).read_bytes()))
        except FileNotFoundError:
            return ()
        except (OSError, ValueError) as error:
            raise WrongUsage(f"{self.folder / name}: {error}") from None

    # --- As a signer ---

    @property
    def root(self) -> bytes:
        """That of the front first: a program that reads one certificate only needs this one."""
        known = self.known()
        return chain_pem([chain[-1] for chain in (known.old, known.chain, known.next) if chain])

    @property
    def bundle(self) -> bytes:
        known = self.known()
        return chain_pem([*known.old, *known.chain, *known.next])

    @property
    def prefixes(self) -> Sequence[Subject] | None:
        known = self.known()
        found: list[Subject] = []
        for one in (*known.chain, *known.next, *known.old):
            if prefix_of(one.subject) not in found:
                found.append(prefix_of(one.subject))
        return found

    @property
    def end(self) -> int | None:
        return end_of(self.known().chain)

    def look(self) -> None:
        check_dates(self.known().chain)

    def refuses(self, request: SigningRequest) -> str | None:
        return None

    def waits(self, db: Connection, request: Row[Any]) -> int | None:
        return None

    def obtain(self, db: Connection, request: Row[Any]) -> Issued | None:
        raise TryLater("this process has no key to sign with")


class CertificateAuthority(Certificates):
    """The CA in the folder that the configuration names, with its keys; a Signer."""

    KEYS = ("ca.key", "next.key", "old.key", "request.key")

    def __init__(self, settings: Ca) -> None:
        super().__init__(settings)
        self._keys: dict[str, tuple[object, Key]] = {}

    def key_of(self, certificate: x509.Certificate) -> Key:
        """The private key of one of the CA's certificates. Raises WrongUsage where it can't be used.

        A command that is killed may leave it under another name than the certificate's: whichever fits is it.
        """
        for key in map(self.key_in, self.KEYS):
            if key and key.public_key() == certificate.public_key():
                return key
        raise WrongUsage(f"{self.folder}: there is no key of {describe(certificate)}")

    def key_in(self, name: str) -> Key | None:
        path = self.folder / name
        try:
            stat = _stat(path)
            if stat is None:
                return None
            if os.stat(path).st_mode & 0o077:
                raise WrongUsage(f"{path}: others than its owner have rights to it")
            if name not in self._keys or self._keys[name][0] != stat:
                read = cast(Key, serialization.load_pem_private_key(path.read_bytes(), None))
                self._keys[name] = (stat, read)
        except (OSError, ValueError, TypeError) as error:
            raise WrongUsage(f"{path}: {error}") from None
        return self._keys[name][1]

    def remote(self, sha256: str) -> bool:
        return False

    def obtain(self, db: Connection, request: Row[Any]) -> Issued:
        """Signs the request, of a device that is on the list. Nothing but the request itself says what is signed."""
        try:
            # Its subject was judged by the CA that was there when it was posted.
            read = validate(request.pem.encode(), request.sha256, None)
        except BadRequest as error:
            raise TryLater(f"{request.sha256}: {error}") from None
        if read.client_id != request.client_id:
            raise TryLater(f"{request.sha256} is no request of {request.client_id}")
        if not db.execute(select(devices).where(devices.c.client_id == read.device)).first():
            raise TryLater(f"{read.client_id} is authorized, and not on the list of devices")
        names = [read.client_id] if HOST_NAME.fullmatch(read.client_id) else []
        csr, hours = read.csr, self.settings.life_hours
        return self.issue(db, self.known().chain, csr.public_key(), csr.subject, names, self.settings.usages, hours)

    def issue(
        self,
        db: Connection,
        chain: Chain,
        key: Any,
        subject: x509.Name,
        names: Sequence[str],
        usages: Sequence[str],
        hours: int,
    ) -> Issued:
        """A certificate by the CA with this chain. It begins a little in the past, because clocks differ, and never
        outlives the CA.
        """
        ca, ca_key = chain[0], self.key_of(chain[0])
        check_dates(chain)
        not_before = max(store.now() - self.settings.backdate_seconds, int(ca.not_valid_before_utc.timestamp()))
        not_after = min(not_before + hours * 3600, end_of(chain))
        serial = store.next_serial(db)
        builder = (
            x509.CertificateBuilder(ca.subject, subject, key, serial)
            .not_valid_before(utc(not_before))
            .not_valid_after(utc(not_after))
            .add_extension(x509.BasicConstraints(False, None), True)
            # RSA keys encipher in TLS 1.2's key exchange without forward secrecy (RFC 5246, 7.4.7.1); EC keys never
            # do.
            .add_extension(
                _key_usage(digital_signature=True, key_encipherment=isinstance(key, rsa.RSAPublicKey)), True
            )
            .add_extension(x509.ExtendedKeyUsage([USAGES[usage] for usage in usages]), False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), False)
        leaf = builder.sign(ca_key, hashes.SHA256())
        pem = chain_pem([leaf, *self.known().above(chain, not_after)]).decode()
        return Issued(pem, serial, not_after, not_after - (not_after - not_before) // 3)

    def server_certificate(self, db: Connection, names: Sequence[str], path: Path, days: int, who: str) -> bool:
        """Key and certificate for the TLS front, in one file, made anew only where a third of its life or less is
        left; by the old CA as long as there is one, because the front is what every device has to believe. Who knows
        only an old one that ends within a day is lost anyway, and all others still need a front.

        Whether it was.
        """
        for name in names:
            if not HOST_NAME.fullmatch(name):
                raise WrongUsage(f"{name!r} is no host name")
        refuse_other_kinds(path)
        known = self.known()
        chain = known.old if known.old and end_of(known.old) > store.now() + 86400 else known.chain
        with contextlib.suppress(FileNotFoundError, ValueError, x509.ExtensionNotFound):
            there = path.read_bytes()
            # A mistyped path may be that of a CA's key, or of anything else that there is no second one of.
            if there and not (b" PRIVATE KEY-----" in there and b"-----BEGIN CERTIFICATE-----" in there):
                raise WrongUsage(f"{path} is no key with its certificate: remove it, or name another file")
            pem = re.sub(rb"(?s)-----BEGIN PRIVATE.*?\n-----END.*?\n", b"", there)
            old, *between = x509.load_pem_x509_certificates(pem)
            begin, end = old.not_valid_before_utc, old.not_valid_after_utc
            held = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            same = held.get_values_for_type(x509.DNSName) == list(names)
            same = same and between == known.above(chain, int(end.timestamp()))
            # Where it ends with the CA, another one would be no better.
            last = utc(end_of(chain)) <= end
            good = utc(store.now()) < (end if last else end - (end - begin) / 3)
            if same and good and _is_by(chain[0], old):
                return False
        key = new_key("ec-p256")
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0][:64])])
        issued = self.issue(db, chain, key.public_key(), subject, names, ["server"], days * 24)
        write_whole(path, key_pem(key) + issued.pem.encode(), 0o600)
        store.set_number(db, "front", issued.not_after)
        store.write_log(db, who, "server-certificate", detail=f"{' '.join(names)} serial {issued.serial:x}")
        return True


def _is_by(ca: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:  # as in is_self_signed
        return False
    return True


def _stat(path: Path) -> object:
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WrongUsage(f"{path}: {error}") from None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
