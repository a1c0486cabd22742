"""A certificate authority, and certificates of any kind."""

from __future__ import annotations

import datetime
import hashlib
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from world.processes import environment
from world.programs import CARAMEL

PrivateKey = Union[rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey]
Subject = Sequence[tuple[str, str]]
Moment = datetime.datetime

#: A CA's subject as `caramel_ca` writes it, with values that are not ASCII.
SUBJECT: Subject = (
    ("C", "SE"),
    ("ST", "Östergötland"),
    ("L", "Linköping"),
    ("O", "Example AB"),
    ("OU", "Caramel"),
    ("CN", "Caramel Signing Certificate"),
)

ATTRIBUTES: dict[str, ObjectIdentifier] = {
    "C": NameOID.COUNTRY_NAME,
    "ST": NameOID.STATE_OR_PROVINCE_NAME,
    "L": NameOID.LOCALITY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "CN": NameOID.COMMON_NAME,
}

CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH
CODE_SIGNING = ExtendedKeyUsageOID.CODE_SIGNING


def now() -> Moment:
    """This moment, in whole seconds, which is what certificates count in."""
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)


def hours(count: float) -> datetime.timedelta:
    return datetime.timedelta(hours=count)


def new_key(size: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, size)


def private_pem(key: PrivateKey) -> bytes:
    """PKCS #8, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def name_of(subject: Subject) -> x509.Name:
    return x509.Name([x509.NameAttribute(ATTRIBUTES[short], value) for short, value in subject])


def signing_request(key: PrivateKey, subject: Subject) -> bytes:
    """A certificate request in PEM, under its usual label, with the bytes that OpenSSL would write."""
    request = x509.CertificateSigningRequestBuilder().subject_name(name_of(subject)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def key_file_content(key: PrivateKey, request: bytes, certificate: bytes = b"") -> bytes:
    """The combined file in the order that the interface promises, from PEM parts."""
    return private_pem(key) + certificate + request.replace(b" CERTIFICATE REQUEST", b" NEW CERTIFICATE REQUEST")


_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----\n[^-]*-----END CERTIFICATE-----\n")


def sealed(
    content: bytes,
    ca: bytes,
    client_id: str,
    *,
    identity_ca: Optional[bytes] = None,
    key_kind: bytes = b"RSA",
    hardware: Sequence[str] = (),
    kinds: str = "",
) -> bytes:
    """The combined file with the line of text that it gets once it was judged good under these CA texts.

    `content` is the file without the line, as from `key_file_content`. `key_kind` is what new keys are: RSA or EC.
    `hardware`: fingerprints; `kinds`: a letter for each, which 2.0.0 didn't write.
    """
    fields = [f"id={client_id}"]
    found = _CERTIFICATE.search(content)
    if found:
        certificate = x509.load_pem_x509_certificate(found[0])
        for name, moment in (("from", certificate.not_valid_before_utc), ("until", certificate.not_valid_after_utc)):
            fields.append(f"{name}={moment:%Y-%m-%dT%H:%M:%SZ}")
    if hardware:
        fields.append("hw=" + ",".join(hardware))
    if kinds:
        fields.append("kinds=" + kinds)
    head = "# caramel-embedded/1 " + " ".join(fields)
    under = b"".join(hashlib.sha256(text).digest() for text in (ca, identity_ca or ca, key_kind))
    seal = hashlib.sha256(b"\n".join((head.encode(), under, content))).hexdigest()
    return f"{head} seal={seal}\n".encode() + content


def unsealed(content: bytes) -> bytes:
    """The combined file without its line of text, where it has one."""
    return content.partition(b"\n")[2] if content.startswith(b"# caramel-embedded/") else content


class Authority:
    """A certificate authority: its key and certificate in a folder, and certificates of any kind signed by
    it.

    `subject` is a list of pairs such as `("C", "SE")`, in any order. `path_length`: how many authorities may
    stand between it and a certificate; None: any number.
    """

    def __init__(
        self,
        folder: Path,
        subject: Subject = SUBJECT,
        *,
        key_size: int = 2048,
        not_before: Optional[Moment] = None,
        not_after: Optional[Moment] = None,
        key: Optional[PrivateKey] = None,
        path_length: Optional[int] = 0,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key: Any = key or new_key(key_size)
        name = name_of(subject)
        serial = x509.random_serial_number()
        identifier = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        # The same extensions as caramel_ca writes.
        self.certificate = (
            x509.CertificateBuilder(name, name, self.key.public_key(), serial)
            .not_valid_before(not_before or now() - hours(24))
            .not_valid_after(not_after or now() + hours(24 * 365 * 20))
            .add_extension(x509.BasicConstraints(True, path_length), True)
            .add_extension(_key_usage(key_cert_sign=True), True)
            .add_extension(identifier, False)
            .add_extension(x509.AuthorityKeyIdentifier(identifier.digest, [x509.DirectoryName(name)], serial), False)
            .sign(self.key, hashes.SHA512())
        )
        self.certificate_file.write_bytes(self.pem)
        self.private_key_file.write_bytes(private_pem(self.key))
        self.private_key_file.chmod(0o600)

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """The authority whose `ca.crt` and `ca.key` are already in the folder."""
        self = cls.__new__(cls)
        self.folder = Path(folder)
        self.certificate = x509.load_pem_x509_certificate(self.certificate_file.read_bytes())
        self.key = serialization.load_pem_private_key(self.private_key_file.read_bytes(), None)
        return self

    @classmethod
    def by_caramel(
        cls, folder: Path, answers: Sequence[str] = ("SE", "Östergötland", "Linköping", "Example AB", "")
    ) -> Authority:
        """An authority made by Caramel's own program; `answers` are to its questions: C, ST, L, O, OU.
        Takes seconds (4096 bits).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ini = folder / "ca.ini"
        ini.write_text(f"[app:main]\nuse = egg:caramel\nca.cert = {folder}/ca.crt\nca.key = {folder}/ca.key\n")
        subprocess.run(
            [str(CARAMEL / "caramel_ca"), str(ini)],
            input="".join(f"{answer}\n" for answer in answers).encode(),
            env=environment(),
            check=True,
            timeout=120,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        (folder / "ca.key").chmod(0o600)
        return cls.open(folder)

    def intermediate(
        self, name: str, *, not_before: Optional[Moment] = None, not_after: Optional[Moment] = None
    ) -> tuple[Authority, bytes]:
        """An authority below this one, to sign with, and its certificate by this one."""
        below = Authority.__new__(Authority)
        below.folder = self.folder
        below.key = ec.generate_private_key(ec.SECP256R1())
        subject = name_of([("O", "Example AB"), ("CN", name)])
        text = self.issue(
            below.key.public_key(), subject, ca=True, usage=(), not_before=not_before, not_after=not_after
        )
        below.certificate = x509.load_pem_x509_certificate(text)
        return below, text

    @property
    def certificate_file(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def private_key_file(self) -> Path:
        return self.folder / "ca.key"

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def subject_for(self, client_id: str) -> Subject:
        """The subject of a device's request that Caramel accepts under this authority."""
        ours = {attribute.oid: str(attribute.value) for attribute in self.certificate.subject}
        return [
            (short, ours[ATTRIBUTES[short]]) for short in ("C", "ST", "L", "O", "OU") if ATTRIBUTES[short] in ours
        ] + [("CN", client_id)]

    def issue(
        self,
        public_key: Any,
        subject: Union[Subject, x509.Name],
        *,
        names: Iterable[str] = (),
        not_before: Optional[Moment] = None,
        not_after: Optional[Moment] = None,
        usage: Sequence[ObjectIdentifier] = (CLIENT_AUTH, SERVER_AUTH),
        ca: bool = False,
        issuer: Optional[x509.Name] = None,
        serial: Optional[int] = None,
    ) -> bytes:
        """A certificate in PEM as Caramel would sign it, or with any of its fields otherwise. Valid for 48
        h from now by default.
        """
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject if isinstance(subject, x509.Name) else name_of(subject))
            .issuer_name(issuer or self.certificate.subject)
            .public_key(public_key)
            .serial_number(serial or x509.random_serial_number())
            .not_valid_before(not_before or min(now(), (not_after or now()) - hours(48)))
            .not_valid_after(not_after or max(now(), not_before or now()) + hours(48))
            .add_extension(x509.BasicConstraints(ca, None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
        )
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usage), True)
        alternatives: list[x509.GeneralName] = [
            x509.DirectoryName(name_of(self.subject_for(name))) if name.startswith("CN=") else x509.DNSName(name)
            for name in names
        ]
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def server(
        self,
        names: Sequence[str] = ("localhost",),
        *,
        not_before: Optional[Moment] = None,
        not_after: Optional[Moment] = None,
        usage: Sequence[ObjectIdentifier] = (CLIENT_AUTH, SERVER_AUTH),
        file: str = "server.pem",
        key: Optional[PrivateKey] = None,
    ) -> Path:
        """A server's certificate and key, in one file in this authority's folder."""
        key = key or new_key()
        certificate = self.issue(
            key.public_key(),
            self.subject_for(names[0]),
            names=names,
            not_before=not_before,
            not_after=not_after,
            usage=usage,
        )
        path = self.folder / file
        path.write_bytes(certificate + private_pem(key))
        path.chmod(0o600)
        return path

    def sign(self, request: bytes, **fields: Any) -> bytes:
        """A device's certificate in PEM for its request in PEM; `fields` as for `issue`, among them another
        `subject`.
        """
        csr = x509.load_pem_x509_csr(request)
        subject = fields.pop("subject", csr.subject)
        common = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        fields.setdefault("names", [str(common[0].value)] if common else [])
        return self.issue(fields.pop("public_key", csr.public_key()), subject, **fields)

    def identity(
        self,
        client_id: str,
        *,
        key: Optional[PrivateKey] = None,
        certified: bool = True,
        line: Optional[bool] = None,
        **fields: Any,
    ) -> bytes:
        """What a key file holds for a device that this authority knows: key, certificate (with `fields` as
        for `issue`), request; before them the line that says that they were judged good, where they are.

        With `line` false it is as 1.0.0 wrote it, and somebody has to look at it.
        """
        good = fields.keys() <= {"not_before", "not_after"}
        key = key or new_key()
        request = signing_request(key, self.subject_for(client_id))
        content = key_file_content(key, request, self.sign(request, **fields) if certified else b"")
        return sealed(content, self.pem, client_id) if (good if line is None else line) else content


def _key_usage(**yes: bool) -> x509.KeyUsage:
    kinds = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign "
        "crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{kind: yes.get(kind, False) for kind in kinds.split()})
