"""Key, certificate and certificate request as one value: make, parse, judge, dump.

``look`` is what almost every run does: it knows the form that this program itself writes and reads just enough of it
to say "as I would have written it". Whatever is different in any way goes to ``examine``, which takes the time to
load ``cryptography`` and decides what can be kept. ``look`` never decides anything: it only saves that time.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re

from .errors import NotReady, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Sequence
    from typing import Any, Optional

    Subject = Sequence[tuple[str, str]]

KEY_BITS = 2048
# Caramel signs nothing between: with 3072 bits it takes the request, and then fails to sign it for ever.
SIGNABLE_BITS = (2048, 4096)

KEY = b"PRIVATE KEY"  # PKCS #8, RFC 5958
CERTIFICATE = b"CERTIFICATE"
REQUEST = b"CERTIFICATE REQUEST"  # PKCS #10, RFC 2986
# In the file the request bears the older label of RFC 7468, section 7: GnuTLS takes any block that begins with
# "-----BEGIN CERTIFICATE" for a certificate, and then refuses the whole file.
FILED_REQUEST = b"NEW CERTIFICATE REQUEST"

_BLOCK = re.compile(
    rb"-----BEGIN ([A-Z0-9 ]+)-----\n((?:[A-Za-z0-9+/]{64}\n)*[A-Za-z0-9+/]{1,64}={0,2}\n)-----END \1-----\n"
)

# X.520 attribute types by the names that `ssl` gives them, and the last byte of their OID, 2.5.4.x.
ATTRIBUTES = {
    "countryName": 6,
    "stateOrProvinceName": 8,
    "localityName": 7,
    "organizationName": 10,
    "organizationalUnitName": 11,
    "commonName": 3,
}
# Caramel wants those of the first four that its CA has, in this order, whatever order the CA itself has.
REQUIRED = ("countryName", "stateOrProvinceName", "localityName", "organizationName")


class Identity:
    """What a device is: a private key, the request for a certificate, and the certificate once there is one.

    An immutable value; every part is PEM. ``bytes(identity)`` is the combined form in which it is kept.
    """

    __slots__ = ("certificate", "key", "modified", "request")

    def __init__(
        self,
        key: bytes,
        request: bytes,
        certificate: Optional[bytes] = None,
        modified: Optional[float] = None,
    ) -> None:
        """`request` under its usual label. `modified`: the certificate's time by the server's Last-Modified, else
        its notBefore, in seconds since 1970, UTC; None without certificate."""
        self.key = key
        self.request = request
        self.certificate = certificate
        self.modified = modified

    def __bytes__(self) -> bytes:
        return self.key + (self.certificate or b"") + self.request.replace(REQUEST, FILED_REQUEST)

    def __repr__(self) -> str:  # never the key
        return "<Identity %s>" % self.request_hash

    @property
    def request_hash(self) -> str:
        """Under what the server keeps the request: SHA-256 over its PEM bytes, 64 lower-case hex digits."""
        return hashlib.sha256(self.request).hexdigest()

    def with_certificate(self, certificate: Optional[bytes], modified: Optional[float] = None) -> Identity:
        """The same key and request with another certificate, or with none."""
        return Identity(self.key, self.request, certificate, modified)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Makes `context` show this identity in TLS, as a client or a server, without a file on any disk.

        `ssl` wants a path: it gets that of a file in memory, see memfd_create(2). Raises ssl.SSLError where key and
        certificate don't fit or there is no certificate, `NotReady` where the system has no such files.
        """
        if not hasattr(os, "memfd_create"):
            raise NotReady("this system has no files in memory, memfd_create(2): Linux 3.17 or newer does")
        fd = os.memfd_create("identity")
        try:
            with open(fd, "wb", buffering=0, closefd=False) as file:
                file.write(self.key + (self.certificate or b""))
            # Without a password to give, an encrypted key would make OpenSSL ask on the terminal, and wait.
            context.load_cert_chain("/proc/self/fd/%d" % fd, password=str)
        finally:
            os.close(fd)

    def file(self) -> Any:
        """The combined form as a binary file object in memory, for an interface that wants a file."""
        import io

        return io.BytesIO(bytes(self))


class Foreign(Exception):
    """What is stored can't be kept; the text says why."""


def _blocks(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Label, whole text and base64 body of each PEM block in `data` that stands as OpenSSL writes it."""
    return [(match[1], match[0], match[2]) for match in _BLOCK.finditer(data)]


def sole_block(data: bytes, label: bytes) -> Optional[bytes]:
    """The one PEM block with `label` that `data` consists of, as OpenSSL writes it; None if it is anything else."""
    data = data.replace(b"\r\n", b"\n").strip() + b"\n"
    match = _BLOCK.fullmatch(data)
    if match is None or match[1] != label:
        return None
    try:
        (_,) = _elements(_der(match[2]))  # nothing may follow within the block
    except (ValueError, IndexError):
        return None
    return data


def certificate_in(data: bytes) -> Optional[bytes]:
    """The certificate in the combined form `data`, as PEM; None where there is none."""
    return next((block for label, block, _ in _blocks(data) if label == CERTIFICATE), None)


def look(data: bytes, client_id: str, subjects: Sequence[Subject]) -> Optional[Identity]:
    """The identity in `data`, if it is in every way as this program writes it for `client_id`, else None.

    `subjects`: what the subject of a request may begin with, one for each trusted CA. The certificate is not
    judged here.
    """
    blocks = _blocks(data)
    if b"".join(block for _, block, _ in blocks) != data:
        return None
    labels = [label for label, _, _ in blocks]
    if labels not in ([KEY, FILED_REQUEST], [KEY, CERTIFICATE, FILED_REQUEST]):
        return None
    try:
        modulus = _key_modulus(_der(blocks[0][2]))
        subject, requested = _request_facts(_der(blocks[-1][2]))
    except (ValueError, IndexError):
        return None
    if modulus != requested or len(modulus) * 8 not in SIGNABLE_BITS or not modulus[0] & 0x80:
        return None
    if subject[-1] != (ATTRIBUTES["commonName"], client_id.encode()):
        return None
    if not any(subject[: len(wanted)] == wanted for wanted in map(_encoded, subjects)):
        return None
    certificate = blocks[1][1] if len(blocks) == 3 else None
    return Identity(blocks[0][1], blocks[-1][1].replace(FILED_REQUEST, REQUEST), certificate)


def _encoded(subject: Subject) -> list[tuple[int, bytes]]:
    return [(ATTRIBUTES[name], value.encode()) for name, value in subject if name in REQUIRED]


def _der(body: bytes) -> bytes:
    return base64.b64decode(body.replace(b"\n", b""), validate=True)


def _elements(der: bytes) -> Iterator[tuple[int, int, int]]:
    """Tag, start and end of the content of each element in `der` (X.690, 8.1). Raises ValueError, IndexError."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & 0x80:
            size = length & 0x7F
            if not 0 < size <= 3:
                raise ValueError("not DER")
            length, at = int.from_bytes(der[at : at + size], "big"), at + size
        if at + length > len(der):
            raise ValueError("cut short")
        yield tag, at, at + length
        at += length


def _content(der: bytes, *tags: int) -> list[bytes]:
    """The contents of the elements in `der`, whose tags must begin with `tags`. Raises ValueError, IndexError."""
    found = [(tag, der[start:end]) for tag, start, end in _elements(der)]
    if tuple(tag for tag, _ in found[: len(tags)]) != tags:
        raise ValueError("another structure")
    return [content for _, content in found]


_INTEGER, _BITS, _OCTETS, _OID, _SEQUENCE, _SET = 0x02, 0x03, 0x04, 0x06, 0x30, 0x31
_RSA = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01"  # 1.2.840.113549.1.1.1, RFC 8017


def _rsa_only(algorithm: bytes) -> None:
    if _content(algorithm, _OID)[0] != _RSA:
        raise ValueError("not RSA")


def _key_modulus(der: bytes) -> bytes:
    """The modulus in a PrivateKeyInfo (RFC 5958) that holds an RSAPrivateKey (RFC 8017, A.1.2)."""
    (info,) = _content(der, _SEQUENCE)
    _, algorithm, key = _content(info, _INTEGER, _SEQUENCE, _OCTETS)[:3]
    _rsa_only(algorithm)
    (numbers,) = _content(key, _SEQUENCE)
    return _content(numbers, _INTEGER, _INTEGER, _INTEGER, _INTEGER)[1].lstrip(b"\0")


def _request_facts(der: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Subject and modulus of a CertificationRequest (RFC 2986, 4)."""
    (request,) = _content(der, _SEQUENCE)
    info = _content(request, _SEQUENCE, _SEQUENCE, _BITS)[0]
    _, name, public_key = _content(info, _INTEGER, _SEQUENCE, _SEQUENCE)[:3]
    subject = []
    for rdn in _content(name):
        (pair,) = _content(rdn, _SEQUENCE)
        oid, value = _content(pair, _OID)
        if oid[:2] != b"\x55\x04" or len(oid) != 3:
            raise ValueError("an attribute that this program doesn't write")
        subject.append((oid[2], value))
    algorithm, bits = _content(public_key, _SEQUENCE, _BITS)
    _rsa_only(algorithm)
    (numbers,) = _content(bits[1:], _SEQUENCE)
    return subject, _content(numbers, _INTEGER, _INTEGER)[0].lstrip(b"\0")


# From here on ``cryptography`` is needed.


def make(client_id: str, subject: Subject) -> Identity:
    """A new key and a request for it. `subject`: what the request's subject begins with.

    Takes seconds on a slow processor. Raises `NotReady` without entropy, `UsageError` for an impossible subject.
    """
    require_entropy()
    rsa = _import("cryptography.hazmat.primitives.asymmetric.rsa")
    serialization = _import("cryptography.hazmat.primitives.serialization")
    key = rsa.generate_private_key(public_exponent=65537, key_size=KEY_BITS)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(pem, _request(key, client_id, subject))


def _request(key: Any, client_id: str, subject: Subject) -> bytes:
    x509 = _import("cryptography.x509")
    serialization = _import("cryptography.hazmat.primitives.serialization")
    hashes = _import("cryptography.hazmat.primitives.hashes")
    try:
        names = [
            x509.NameAttribute(x509.ObjectIdentifier("2.5.4.%d" % ATTRIBUTES[name]), value)
            for name, value in [*subject, ("commonName", client_id)]
        ]
    except ValueError as error:
        raise UsageError("the CA certificate's subject can't be used for a request: %s" % error) from None
    builder = x509.CertificateSigningRequestBuilder(subject_name=x509.Name(names))
    # RSASSA-PKCS1-v1_5 has no random part: the same key and subject make the same request, with the same hash,
    # so that a damaged request can be made again without the server's administrator having to sign another one.
    request: bytes = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    return request


def examine(data: bytes, client_id: str, subjects: Sequence[Subject]) -> Identity:
    """What can be kept of `data`, in the form in which this program writes it.

    The key has to be whole and one that Caramel signs; a request that is damaged or missing is made again with
    the same key. Raises `Foreign` with the reason where nothing can be kept.
    """
    key = _sound_key(_rough_block(data, KEY) or _rough_block(data, b"RSA PRIVATE KEY"))
    serialization = _import("cryptography.hazmat.primitives.serialization")
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    filed = _rough_block(data, FILED_REQUEST) or _rough_block(data, REQUEST)
    request = _kept_request(filed and filed.replace(FILED_REQUEST, REQUEST), key, client_id, subjects)
    if request is None:
        request = _request(key, client_id, subjects[0])
    certificate = _rough_block(data, CERTIFICATE)
    return Identity(pem, request, certificate and sole_block(certificate, CERTIFICATE))


def not_after(certificate: bytes) -> float:
    """When `certificate`, PEM, ends: seconds since 1970, UTC."""
    import calendar

    x509 = _import("cryptography.x509")
    loaded = x509.load_pem_x509_certificate(certificate)
    # cryptography 42 has another name for it, and warns of the old one
    end = loaded.not_valid_after_utc if hasattr(loaded, "not_valid_after_utc") else loaded.not_valid_after
    return calendar.timegm(end.utctimetuple())


def key_bits(identity: Identity) -> int:
    """The size of the key in bits."""
    _, _, body = _blocks(identity.key)[0]
    return len(_key_modulus(_der(body))) * 8


def _rough_block(data: bytes, label: bytes) -> Optional[bytes]:
    """The first block with `label`, whatever its form. Takes time in proportion to the length, whatever `data` is."""
    closing = b"-----END %s-----" % label
    start = data.find(b"-----BEGIN %s-----" % label)
    end = data.find(closing, start)
    return data[start : end + len(closing)] + b"\n" if 0 <= start < end else None


def require_sound_key(identity: Identity) -> None:
    """Raises `Foreign` where the key is damaged in a way that ``look`` can't see."""
    _sound_key(identity.key)


def _sound_key(pem: Optional[bytes]) -> Any:
    if pem is None:
        raise Foreign("there is no private key in the file")
    rsa = _import("cryptography.hazmat.primitives.asymmetric.rsa")
    serialization = _import("cryptography.hazmat.primitives.serialization")
    unsupported = _import("cryptography.exceptions").UnsupportedAlgorithm
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, unsupported):  # its text may quote what it read
        raise Foreign("the private key can't be read") from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise Foreign("the private key is not an RSA key: Caramel can't sign it")
    if key.key_size not in SIGNABLE_BITS:
        raise Foreign("the private key has %d bits: Caramel can't sign it" % key.key_size)
    return key


def _kept_request(pem: Optional[bytes], key: Any, client_id: str, subjects: Sequence[Subject]) -> Optional[bytes]:
    """The request in `pem`; None where it is missing or damaged. Raises `Foreign`."""
    x509 = _import("cryptography.x509")
    serialization = _import("cryptography.hazmat.primitives.serialization")
    if pem is None:
        return None
    try:
        request = x509.load_pem_x509_csr(pem)
        subject = [(attribute.oid.dotted_string, attribute.value) for attribute in request.subject]
        written: bytes = request.public_bytes(serialization.Encoding.PEM)
        whole = (
            request.is_signature_valid and request.public_key().public_numbers() == key.public_key().public_numbers()
        )
    except Exception:  # cryptography has no common base for what a damaged request can raise
        return None
    if not whole:
        return None
    names = [value for oid, value in subject if oid == "2.5.4.3"]
    if names != [client_id]:
        raise Foreign("the request in the file is for another client ID, %s" % ", ".join(map(repr, names)))
    for wanted in subjects:
        prefix = [("2.5.4.%d" % ATTRIBUTES[name], value) for name, value in wanted if name in REQUIRED]
        if subject[: len(prefix)] == prefix:
            return written
    raise Foreign("the trusted CA would refuse the subject of the request in the file")


def require_entropy() -> None:
    """Raises `NotReady` where the kernel's random numbers aren't ready yet, see getrandom(2).

    Keys made before that have been found to share primes across the world (Heninger and others, "Mining Your Ps
    and Qs", 2012). Never waits.
    """
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        raise NotReady("the kernel has no entropy yet: nothing was done") from None


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except Exception as error:
        # Not ImportError alone: a compiled module that doesn't fit the interpreter raises what it likes.
        raise NotReady("this device lacks the Python module cryptography, or it is broken: %s" % error) from None
