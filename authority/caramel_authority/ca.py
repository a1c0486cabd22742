# SPDX-License-Identifier: MIT OR Apache-2.0
"""Signer `ca`: a CA of one's own, whose certificate is in one file and whose private key in another.

`ca.crt` holds the CA's certificate and, where it is an intermediate of somebody else's CA, those above it up to the
root. `ca.key` belongs to one user and has mode 0600. Everything signed here has a serial number that no other
certificate ever had, whichever key signs, and lives for less than a week unless the configuration says otherwise.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import tempfile
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
from .errors import TryLater, WrongUsage
from .registry import Issued
from .signing_request import HOST_NAME, SigningRequest, Subject, prefix_of
from .store import devices

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
USAGES = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
KEY_TYPES = ("ec-p256", "rsa-2048", "rsa-3072", "rsa-4096")
PEM = serialization.Encoding.PEM


def new_key(kind: str) -> Key:
    if kind == "ec-p256":
        return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(65537, int(kind.removeprefix("rsa-")))


def key_pem(key: Key) -> bytes:
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def write_whole(path: Path, content: bytes, mode: int) -> None:
    """The path has the old content or the new one at any instant, and this mode from the first byte on (mkstemp's
    0600).
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(handle, mode)
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def name_from(text: str) -> x509.Name:
    """A name from `C=SE,O=Example AB,CN=Example CA`, in that order. Raises WrongUsage."""
    try:
        # RFC 4514 writes names the other way round.
        return x509.Name(reversed(list(x509.Name.from_rfc4514_string(text))))
    except ValueError as error:
        raise WrongUsage(f"{text!r} is no name like C=SE,O=Example,CN=Example CA: {error}") from None


def utc(moment: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(moment, datetime.UTC)


def _key_usage(**yes: bool) -> x509.KeyUsage:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    )
    return x509.KeyUsage(
        **{kind: yes.get(kind, False) for kind in (*every.split(), "encipher_only", "decipher_only")},
    )


def _ca_extensions(key: Any) -> list[tuple[x509.ExtensionType, bool]]:
    return [
        (x509.BasicConstraints(True, 0), True),
        (_key_usage(key_cert_sign=True, crl_sign=True), True),
        (x509.SubjectKeyIdentifier.from_public_key(key), False),
    ]


@dataclass(frozen=True)
class Loaded:
    key: Key
    chain: list[x509.Certificate]

    @property
    def certificate(self) -> x509.Certificate:
        return self.chain[0]


class CertificateAuthority:
    """The CA in the folder that the configuration names; a Signer. What another process renewed is read again."""

    def __init__(self, settings: Ca) -> None:
        self._settings = settings
        self.folder = Path(settings.folder)
        self.certificate_file = self.folder / "ca.crt"
        self.key_file = self.folder / "ca.key"
        self._read: tuple[object, Loaded] | None = None

    def load(self) -> Loaded:
        """Key and certificates. Raises WrongUsage where they can't be used."""
        try:
            stat = [(one.st_ino, one.st_mtime_ns) for one in map(os.stat, (self.certificate_file, self.key_file))]
            if self._read and self._read[0] == stat:
                return self._read[1]
            if os.stat(self.key_file).st_mode & 0o077:
                raise WrongUsage(f"{self.key_file}: others than its owner have rights to it")
            chain = x509.load_pem_x509_certificates(self.certificate_file.read_bytes())
            key = serialization.load_pem_private_key(self.key_file.read_bytes(), None)
        except FileNotFoundError as error:
            raise WrongUsage(f"{error.filename}: there is no CA yet; caramel-authority ca-create makes one") from None
        except (OSError, ValueError) as error:
            raise WrongUsage(f"{self.folder}: {error}") from None
        if key.public_key() != chain[0].public_key():
            raise WrongUsage(f"{self.folder}: key and certificate don't belong together")
        loaded = Loaded(cast(Key, key), chain)
        self._read = (stat, loaded)
        return loaded

    # --- As a signer ---

    @property
    def root(self) -> bytes:
        return self.load().chain[-1].public_bytes(PEM)

    @property
    def bundle(self) -> bytes:
        return b"".join(one.public_bytes(PEM) for one in self.load().chain)

    @property
    def prefixes(self) -> Sequence[Subject] | None:
        return [prefix_of(one.subject) for one in self.load().chain]

    def refuses(self, request: SigningRequest) -> str | None:
        return None

    def waits(self, db: Connection, request: Row[Any]) -> int | None:
        return None

    def obtain(self, db: Connection, request: Row[Any]) -> Issued:
        """Signs the request, of a device that is on the list."""
        if not db.execute(select(devices).where(devices.c.client_id == request.device)).first():
            raise TryLater(f"{request.client_id} is authorized, and not on the list of devices")
        csr = x509.load_pem_x509_csr(request.pem.encode())
        names = [request.client_id] if HOST_NAME.fullmatch(request.client_id) else []
        return self.issue(db, csr.public_key(), csr.subject, names, self._settings.usages, self._settings.life_hours)

    def issue(
        self, db: Connection, key: Any, subject: x509.Name, names: Sequence[str], usages: Sequence[str], hours: int
    ) -> Issued:
        """A certificate that begins a little in the past, because clocks differ, and never outlives the CA."""
        ca = self.load()
        now = store.now()
        not_before = max(now - self._settings.backdate_seconds, int(ca.certificate.not_valid_before_utc.timestamp()))
        not_after = not_before + hours * 3600
        not_after = min([not_after, *(int(one.not_valid_after_utc.timestamp()) for one in ca.chain)])
        if not_after <= now:
            raise TryLater("the CA's certificate has ended; caramel-authority ca-renew makes a new one", 3600)
        serial = store.next_serial(db)
        builder = (
            x509.CertificateBuilder(ca.certificate.subject, subject, key, serial)
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
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), False)
        leaf = builder.sign(ca.key, hashes.SHA256())
        chain = [leaf, *(one for one in ca.chain if one.subject != one.issuer)]
        pem = b"".join(one.public_bytes(PEM) for one in chain).decode()
        return Issued(pem, serial, not_after, not_after - (not_after - not_before) // 3)

    # --- The CA itself ---

    def create(self, db: Connection, subject: str, key_type: str, days: int, who: str, replace: bool = False) -> None:
        """A new key and a certificate signed with it. The CA before it is kept beside it. Raises WrongUsage."""
        key = self._new_key(key_type, replace)
        self._put_self_signed(db, key, name_from(subject), days)
        store.write_log(db, who, "ca-created", detail=self._fingerprint())

    def renew(self, db: Connection, days: int, who: str) -> None:
        """The same key and name, a later end: whoever trusts the old certificate trusts what this one signs."""
        ca = self.load()
        if ca.certificate.subject != ca.certificate.issuer:
            raise WrongUsage("this CA is another one's intermediate: use ca-request and ca-install")
        self._put_self_signed(db, ca.key, ca.certificate.subject, days)
        store.write_log(db, who, "ca-renewed", detail=self._fingerprint())

    def request(self, subject: str, key_type: str, replace: bool = False) -> bytes:
        """A request for somebody else's CA to sign; the key is new, or the one that is there for renewing it."""
        if self.certificate_file.exists() and not replace:
            key: Key = self.load().key
        else:
            key = self._new_key(key_type, replace)
        builder = x509.CertificateSigningRequestBuilder(name_from(subject))
        for extension, critical in _ca_extensions(key.public_key()):
            builder = builder.add_extension(extension, critical)
        return builder.sign(key, hashes.SHA256()).public_bytes(PEM)

    def install(self, db: Connection, pem: bytes, who: str) -> None:
        """What somebody else's CA made of the request: our certificate, then those above it, then the root."""
        try:
            chain = x509.load_pem_x509_certificates(pem)
            for lower, upper in zip(chain, [*chain[1:], chain[-1]], strict=True):
                lower.verify_directly_issued_by(upper)
                if not upper.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                    raise ValueError("not of a CA")
            key = serialization.load_pem_private_key(self.key_file.read_bytes(), None)
        except FileNotFoundError:
            raise WrongUsage("there is no key yet: ca-request makes it") from None
        except Exception as error:  # cryptography's InvalidSignature is no ValueError
            raise WrongUsage(f"no chain from our certificate to its root: {error or 'a bad signature'}") from None
        if key.public_key() != chain[0].public_key():
            raise WrongUsage("the first certificate is not for our key")
        write_whole(self.certificate_file, b"".join(one.public_bytes(PEM) for one in chain), 0o644)
        store.write_log(db, who, "ca-installed", detail=self._fingerprint())

    def server_certificate(self, db: Connection, names: Sequence[str], path: Path, days: int, who: str) -> bool:
        """Key and certificate for the TLS front, in one file, made anew only where a third of its life or less is
        left.

        Whether it was.
        """
        for name in names:
            if not HOST_NAME.fullmatch(name):
                raise WrongUsage(f"{name!r} is no host name")
        with contextlib.suppress(FileNotFoundError, ValueError):
            old = x509.load_pem_x509_certificate(
                re.sub(rb"(?s)-----BEGIN PRIVATE.*?\n-----END.*?\n", b"", path.read_bytes())
            )
            begin, end = old.not_valid_before_utc, old.not_valid_after_utc
            held = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            same = held.get_values_for_type(x509.DNSName) == list(names)
            by_us = old.issuer == self.load().certificate.subject
            if same and by_us and utc(store.now()) < end - (end - begin) / 3:
                return False
        key = new_key("ec-p256")
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0][:64])])
        issued = self.issue(db, key.public_key(), subject, names, ["server"], days * 24)
        write_whole(path, key_pem(key) + issued.pem.encode(), 0o600)
        store.write_log(db, who, "server-certificate", detail=f"{' '.join(names)} serial {issued.serial:x}")
        return True

    def _new_key(self, key_type: str, replace: bool) -> Key:
        """A new key file. One without a certificate beside it has signed nothing, and is overwritten."""
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self.certificate_file.exists():
            if not replace:
                raise WrongUsage(f"{self.certificate_file} exists: --replace puts another CA in its place")
            serial = f"{self.load().certificate.serial_number:x}"
            # The certificate goes first: without it the key beside it is nobody's.
            os.replace(self.certificate_file, self.folder / f"ca.{serial}.crt")
            os.replace(self.key_file, self.folder / f"ca.{serial}.key")
        key = new_key(key_type)
        write_whole(self.key_file, key_pem(key), 0o600)
        return key

    def _put_self_signed(self, db: Connection, key: Key, name: x509.Name, days: int) -> None:
        now = store.now()
        builder = (
            x509.CertificateBuilder(name, name, key.public_key(), store.next_serial(db))
            .not_valid_before(utc(now - self._settings.backdate_seconds))
            .not_valid_after(utc(now + days * 86400))
        )
        for extension, critical in _ca_extensions(key.public_key()):
            builder = builder.add_extension(extension, critical)
        write_whole(self.certificate_file, builder.sign(key, hashes.SHA256()).public_bytes(PEM), 0o644)

    def _fingerprint(self) -> str:
        certificate = self.load().certificate
        name, digest = certificate.subject.rfc4514_string(), certificate.fingerprint(hashes.SHA256()).hex()
        return f"{name} serial {certificate.serial_number:x} sha256 {digest}"
