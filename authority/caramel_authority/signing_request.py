# SPDX-License-Identifier: MIT OR Apache-2.0
"""Is what was posted a request that may be signed at all? Knows nothing of who may have a certificate.

Bytes in, a value out, or BadRequest with the reason. No file, no database, no clock.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from .errors import BadRequest
from .shown import is_hidden, shown
from .weak_keys import weakness

#: Characters of CN and OU (X.520, ub-common-name, ub-organizational-unit-name; RFC 5280, appendix A.1).
LONGEST_NAME = 64
#: Bytes. An RSA request of 4096 bits with a long subject has 1 900.
LONGEST = 2048
#: What an ID never has: what ends or begins a value in a distinguished name (RFC 4514, 2.4; OpenSSL's older form has
#: `/` between them, which is no trouble inside one), in a list of IDs, or in a pattern of host names.
NOT_IN_ID = frozenset(',+"\\<>;=#*')
#: One label of a host name (RFC 1123, 2.1).
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST_NAME = re.compile(rf"{LABEL}(\.{LABEL})*")
#: What a subject begins with, as far as the CA's subject has it, in this order.
PREFIX = (NameOID.COUNTRY_NAME, NameOID.STATE_OR_PROVINCE_NAME, NameOID.LOCALITY_NAME, NameOID.ORGANIZATION_NAME)

#: Labels of names that a zone, or those who send mail and look for services in it, need for themselves.
OWN_LABEL = re.compile(
    r"(ns|mx|dns|mail|smtp|imap|pop3?|www|ftp|gw)[0-9]*|localhost|localdomain|wpad|isatap|autoconfig|autodiscover|"
    r"mta-sts|hostmaster|postmaster|webmaster|admin|root"
)

Subject = Sequence[tuple[x509.ObjectIdentifier, str]]


@dataclass(frozen=True)
class SigningRequest:
    sha256: str
    pem: str
    client_id: str
    #: SHA-256 of the public key, by which one key under two names is seen.
    key_sha256: str

    @property
    def device(self) -> str:
        return device_of(self.client_id)

    @property
    def csr(self) -> x509.CertificateSigningRequest:
        return x509.load_pem_x509_csr(self.pem.encode())


def attributes(name: x509.Name) -> list[tuple[x509.ObjectIdentifier, str]]:
    return [(one.oid, one.value if isinstance(one.value, str) else "") for one in name]


def prefix_of(name: x509.Name) -> Subject:
    """What a request's subject has to begin with under a CA of this name."""
    own = dict(attributes(name))
    return [(oid, own[oid]) for oid in PREFIX if oid in own]


def key_sha256(key: object) -> str:
    assert isinstance(key, (rsa.RSAPublicKey, ec.EllipticCurvePublicKey))
    info = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(info).hexdigest()


def validate(body: bytes, sha256: str, prefixes: Sequence[Subject] | None) -> SigningRequest:
    """The request in these bytes, which were posted under this hash. Raises BadRequest.

    `prefixes` are those of the CA's names (one has to fit), None where the CA looks at nothing but the host name.
    """
    if hashlib.sha256(body).hexdigest() != sha256:
        raise BadRequest("hash mismatch")
    try:
        csr = x509.load_pem_x509_csr(body)
        exact = csr.public_bytes(serialization.Encoding.PEM) == body
        subject = attributes(csr.subject)
        extensions = csr.extensions
        key = csr.public_key()
        signed = csr.is_signature_valid
        digest = csr.signature_hash_algorithm
    except (
        ValueError,
        UnsupportedAlgorithm,
        x509.InvalidVersion,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ):
        raise BadRequest("not a certificate request in PEM") from None
    if not exact:
        raise BadRequest("PEM not as OpenSSL writes it")
    if not isinstance(digest, (hashes.SHA256, hashes.SHA384, hashes.SHA512)):
        raise BadRequest("bad signature: not made with SHA-2")
    if not signed:
        raise BadRequest("bad signature")
    _judge_key(key)
    client_id = _judge_subject(subject, prefixes)
    _judge_names(extensions, client_id)
    return SigningRequest(sha256, body.decode("ascii"), client_id, key_sha256(key))


def _judge_key(key: object) -> None:
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size not in (2048, 3072, 4096):
            raise BadRequest(f"Bad key: RSA of {key.key_size} bits; 2048, 3072 or 4096 are taken")
        if key.public_numbers().e < 65537:
            raise BadRequest("Bad key: RSA with a public exponent below 65537")
        weak = weakness(key.public_numbers().n)
        if weak:
            raise BadRequest(f"Bad key: RSA, {weak}")
    elif not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise BadRequest("Bad key: neither RSA nor P-256")


def _judge_subject(subject: Subject, prefixes: Sequence[Subject] | None) -> str:
    """The client ID. The subject is the CA's C, ST, L and O, an OU or none, and the CN."""
    names = [value for oid, value in subject if oid == NameOID.COMMON_NAME]
    if len(names) != 1 or subject[-1][0] != NameOID.COMMON_NAME:
        raise BadRequest("Bad subject: it has to end with the only CN")
    wrong = id_problem(names[0])
    if wrong:
        raise BadRequest(f"Bad subject: the CN is no client ID: {wrong}")
    before = list(subject[:-1])
    if before and before[-1][0] == NameOID.ORGANIZATIONAL_UNIT_NAME:
        unit = before.pop()[1]
        if len(unit) > LONGEST_NAME or any(map(is_hidden, unit)):
            raise BadRequest(
                f"Bad subject: the OU has at most {LONGEST_NAME} characters, and none that can't be seen"
            )
    if prefixes is not None and before not in [list(prefix) for prefix in prefixes]:
        wanted = " or ".join(_text(prefix) for prefix in prefixes)
        raise BadRequest(f"Bad subject: {_text(before)} before OU and CN, where {wanted} is expected")
    return names[0]


def _judge_names(extensions: x509.Extensions, client_id: str) -> None:
    """A request may ask for one alternative name, its CN: whatever else it asked for would be somebody else's."""
    for extension in extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names = [(type(name), str(name.value).lower()) for name in extension.value]
            if names != [(x509.DNSName, client_id.lower())]:
                raise BadRequest("Bad subjectAltName: it may hold the CN as its only DNS name")
        elif isinstance(extension.value, x509.BasicConstraints) and extension.value.ca:
            raise BadRequest("Bad extension: asks to be a CA")


def device_of(client_id: str) -> str:
    """What IDs of the same device share: as host names, they differ neither by case nor by a final dot."""
    return unicodedata.normalize("NFC", client_id.casefold()).rstrip(".")


def id_problem(client_id: str) -> str | None:
    """Why this is no client ID, None where it is one: text that a person can read back, and that no list, log or
    distinguished name takes for something else.
    """
    if not 1 <= len(client_id) <= LONGEST_NAME or not 1 <= len(device_of(client_id)) <= LONGEST_NAME:
        return f"it has 1 to {LONGEST_NAME} characters"
    if client_id != unicodedata.normalize("NFC", client_id):
        return "it has composed characters in another form than NFC"
    for one in client_id:
        if one in NOT_IN_ID or is_hidden(one):
            return f"it has no '{shown(one)}'"
    if unicodedata.category(client_id[0])[0] == "M":
        return "it begins with no mark, which would stand on what is before it"
    if client_id != client_id.strip() or "  " in client_id:
        return "it has no blank at its ends, nor two in a row"
    return None


def zones_own(client_id: str, zone: str) -> bool:
    """Whether the ID is a name that the zone needs for itself."""
    name, own = device_of(client_id), zone.strip(".").lower()
    label, _, rest = name.partition(".")
    return bool(own) and (name == own or (rest == own and bool(OWN_LABEL.fullmatch(label) or label.startswith("_"))))


def in_zone(client_id: str, zone: str) -> bool:
    """Whether the ID is a name of exactly one label under the zone."""
    label, dot, rest = client_id.partition(".")
    return bool(dot) and rest.lower() == zone.strip(".").lower() and bool(re.fullmatch(LABEL, label))


def _text(subject: Subject) -> str:
    return (
        x509.Name([x509.NameAttribute(oid, value, _validate=False) for oid, value in subject]).rfc4514_string()
        or "nothing"
    )
