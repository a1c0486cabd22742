"""Keys, requests, certificates and chains: make, read, verify. Loaded only where something is new.

`cryptography` makes and reads; pyOpenSSL judges chains, and shows what chain a server sends. One rule for all:
what has ended counts for nothing, and nothing is refused for not having begun.
"""

from __future__ import annotations

import binascii
import calendar
import hashlib
import ssl
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from . import held, pem
from .errors import NotReady, UsageError, lacking, printable
from .identity import Identity, Issued, utc
from .settings import KEY_TYPES, is_client_id, same_name
from .trust import NO_CHECK_TIME, PARTIAL_CHAIN, Trust

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    from OpenSSL import SSL, crypto
except Exception as problem:  # not ImportError alone: a compiled module that doesn't fit raises what it likes
    raise NotReady(lacking(problem, "pyOpenSSL or cryptography")) from None

if TYPE_CHECKING:
    from .tls import Tcp

PrivateKey = Any  # an RSAPrivateKey, an EllipticCurvePrivateKey, or a HeldKey

MAXIMUM_KEY = 16384  # bytes of a key's block
MAXIMUM_CHAIN = 5  # certificates, the identity's own included
# Caramel signs nothing between: with 3072 bits it takes the request, and then fails to sign it for ever.
SIGNABLE_BITS = (2048, 4096)

# Caramel wants those of the first four that its CA has, in this order, whatever order the CA itself has. The names
# are OpenSSL's.
NAMES = {
    "countryName": NameOID.COUNTRY_NAME,
    "stateOrProvinceName": NameOID.STATE_OR_PROVINCE_NAME,
    "localityName": NameOID.LOCALITY_NAME,
    "organizationName": NameOID.ORGANIZATION_NAME,
    "organizationalUnitName": NameOID.ORGANIZATIONAL_UNIT_NAME,
}
REQUIRED = tuple(NAMES.values())[:4]
CHECK_SS_SIGNATURE = 0x4000  # OpenSSL's X509_V_FLAG_*: what names itself as its issuer has to have signed itself
MAXIMUM_REQUEST = 2048  # bytes that Caramel takes
PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER


class InvalidIdentity(Exception):
    """What is stored can't be kept; the text says why."""


class InvalidCertificate(Exception):
    """A certificate is not good for what it was to be used for; the text says why."""


class Anchors:
    """The trust anchors in a PEM text: certificates of CAs, one or more.

    OpenSSL alone reads them: `cryptography` refuses names in Latin-1 and key identifiers of half a form.

    Attributes: certificates; subjects: for each, what the subject of a request begins with; begins: a time that has
    certainly passed; ends: from when on none of them is good; both seconds since 1970, UTC.
    """

    def __init__(self, text: bytes) -> None:
        """Raises `UsageError` where `text` has no certificate or one that is no CA's."""
        found = pem.certificates(text)
        try:
            self.certificates = [crypto.load_certificate(crypto.FILETYPE_PEM, one) for one in found]
            described = list(map(_described, found))
            # Of several the oldest one's time has certainly passed; a new one may be handed out before it begins.
            self.begins = min(map(_begin_of, self.certificates), default=0.0)
            self.ends = max(map(_end_of, self.certificates), default=0.0)
        except (crypto.Error, ssl.SSLError, ValueError) as error:
            raise UsageError("a certificate of the CA can't be read: %s" % error) from None
        if not found:
            raise UsageError("the CA certificate holds no certificate in PEM form")
        if None in described:
            raise UsageError("a certificate that is no CA's is among those of the CA")
        self.subjects = [_begin_of_subject(one["subject"]) for one in described if one]


def anchors(trust: Trust, of_server: bool = False) -> Anchors:
    """The trust anchors of the identity, or of the server; both are read, and tell a time that has passed.

    Raises `UsageError`.
    """
    server, identity = Anchors(trust.ca_cert), Anchors(trust.identity_ca)
    trust.learn(max(server.begins, identity.begins))
    return server if of_server else identity


def _described(certificate: bytes) -> Optional[dict[str, Any]]:
    """What OpenSSL says of a CA's certificate, PEM (X509_check_ca(3)); None for one that is no CA's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=certificate.decode("ascii"))
    return next(iter(context.get_ca_certs()), None)


def _begin_of_subject(subject: Iterable[Iterable[tuple[str, str]]]) -> list[tuple[x509.ObjectIdentifier, str]]:
    """Those of C, ST, L and O that a CA has, in that order, then its OU."""
    own = {name: value for parts in subject for name, value in parts}
    return [(oid, own[name]) for name, oid in NAMES.items() if name in own]


# --- Make ---


def make(
    client_id: str,
    anchors: Anchors,
    trust: Trust,
    hardware: tuple[str, ...],
    command: Optional[Sequence[str]] = None,
    limit: float = 0.0,
) -> Identity:
    """A new key and a request for it. Takes seconds on a slow processor.

    `command`: makes a key that a chip holds, see ``held``, within `limit` seconds. Raises `UsageError` where the CA's
    subject can't be used for a request, `NotReady` where the command or the chip fails.
    """
    bits = KEY_TYPES[trust.key_type]
    key: PrivateKey
    if command is not None:
        key = _held_key(held.make(command, client_id, trust.key_type, limit))
        if _kind_and_size(key) != (("RSA", bits) if bits else ("EC", 256)):
            problem = "made a key of another type: %s, %d bits" % _kind_and_size(key)
            raise NotReady("the key command %s %s" % (command[0], problem))
    else:
        key = rsa.generate_private_key(65537, bits) if bits else ec.generate_private_key(ec.SECP256R1())
    request = _request(key, client_id, anchors)
    if len(request) > MAXIMUM_REQUEST:
        raise UsageError(
            "the request is %d bytes long, and Caramel takes %d: the CA's subject is too long for the key type %s, "
            "choose another one, rsa-2048 say" % (len(request), MAXIMUM_REQUEST, trust.key_type)
        )
    return Identity(_private_pem(key), request, client_id, trust.digest, hardware)


class HeldKey:
    """A key that a chip holds, as `cryptography` knows keys: what it asks of one to sign a request.

    The block itself goes to no function of `cryptography`: 43.0 panics, which is no `Exception`.
    """

    def __init__(self, block: bytes, public: Any) -> None:
        """`public`: its public half."""
        self.block = block
        self._public = public

    def public_key(self) -> Any:
        """Its public half."""
        return self._public

    def sign(self, data: bytes, *_: object) -> bytes:
        """A signature with SHA-256. Raises `KeyUnusable`."""
        return held.sign(self.block, data)


class _HeldRSAKey(HeldKey):
    pass


class _HeldCurveKey(HeldKey):
    pass


# No subclasses, which would have to have all that a key can do.
rsa.RSAPrivateKey.register(_HeldRSAKey)
ec.EllipticCurvePrivateKey.register(_HeldCurveKey)


def _held_key(block: bytes, public: Any = None) -> HeldKey:
    """`public`: its public half, for which the chip is asked if it isn't given. Raises `KeyUnusable`."""
    public = public or serialization.load_pem_public_key(held.public_key(block))
    return (_HeldRSAKey if isinstance(public, rsa.RSAPublicKey) else _HeldCurveKey)(block, public)


def _private_pem(key: PrivateKey) -> bytes:
    if isinstance(key, HeldKey):
        return key.block
    text: bytes = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return text


def _request(key: PrivateKey, client_id: str, anchors: Anchors) -> bytes:
    try:
        names = [
            x509.NameAttribute(oid, value) for oid, value in [*anchors.subjects[0], (NameOID.COMMON_NAME, client_id)]
        ]
    except ValueError as error:
        raise UsageError("the CA certificate's subject can't be used for a request: %s" % error) from None
    builder = x509.CertificateSigningRequestBuilder(subject_name=x509.Name(names))
    if "." in client_id:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(client_id)]), critical=False)
    # RSASSA-PKCS1-v1_5 has no random part: the same key and subject make the same request, with the same hash,
    # so that a damaged request can be made again without the server's administrator having to sign another one.
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


# --- Read ---


def examine(
    data: bytes, client_id: str, anchors: Anchors, trust: Trust, hardware: tuple[str, ...], modified: Optional[float]
) -> tuple[Identity, list[str]]:
    """What can be kept of `data`, in the form in which this program writes it; and what is wrong with the rest.

    The key has to be whole and one that can be signed; a request that is damaged or missing is made again with the
    same key. `hardware`: what the identity is to remember. `modified`: the certificate's time, seconds since 1970,
    UTC; None: its notBefore. Raises `InvalidIdentity` with the reason where nothing can be kept.
    """
    stored = _request_in(data)
    key = _signable_key(data, trust.elliptic, stored)
    wrong = []
    request = _kept_request(stored, key, client_id)
    if request is None:
        wrong.append("the stored request is missing or damaged: made again with the same key")
        request = _request(key, client_id, anchors)
    # A host name in another case is the same one: the stored form stays.
    identity = Identity(_private_pem(key), request, client_id_in(request) or client_id, trust.digest, hardware)
    if b"-----BEGIN CERTIFICATE-----" in data:
        try:
            identity = identity.with_issued(accept(data, identity, anchors, trust, modified))
        except InvalidCertificate as reason:
            wrong.append("the stored certificate %s" % reason)
    return identity, wrong


def client_id_in(data: bytes) -> Optional[str]:
    """The client ID that the request in `data` is for, if its signature is good; None where there is none."""
    try:
        loaded = x509.load_pem_x509_csr(_request_in(data) or b"")
        (name,) = [str(one.value) for one in loaded.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        return name if loaded.is_signature_valid and is_client_id(name) else None
    except Exception:  # damaged in whatever way
        return None


def _request_in(data: bytes) -> Optional[bytes]:
    """The request in `data` under its usual label, whatever its form; None where there is none."""
    filed = pem.first(data, pem.FILED_REQUEST, pem.REQUEST)
    return filed and filed.replace(pem.FILED_REQUEST, pem.REQUEST)


def _signable_key(data: bytes, elliptic: bool, request: Optional[bytes]) -> PrivateKey:
    """The key in `data`; the public half of one that a chip holds is in `request`, or the chip has to tell it."""
    block = pem.first(data, pem.KEY, b"RSA PRIVATE KEY", b"EC PRIVATE KEY")
    chips = pem.first(data, *pem.HELD_KEYS)
    if block is None and chips is None:
        raise InvalidIdentity("there is no private key in the file")
    key: PrivateKey
    too_long = InvalidIdentity("the private key is longer than any that can be signed")
    if max(map(len, filter(None, (block, chips)))) > MAXIMUM_KEY:
        raise too_long
    if block is not None:
        try:
            # Whoever looks at numbers of thousands of bits, whether they are prime, does so for minutes.
            if _longest_number(block) > 513:
                raise too_long
            key = serialization.load_pem_private_key(block, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):  # its text may quote what it read
            raise InvalidIdentity("the private key can't be read") from None
    else:
        chips = (chips or b"").replace(b"\r\n", b"\n")
        if not held.is_whole(chips):
            raise InvalidIdentity("the private key can't be read")
        key = _held_key(chips, _key_of_request(request))
    public = key.public_key()
    if isinstance(public, rsa.RSAPublicKey):
        if public.key_size in SIGNABLE_BITS:
            return key
        raise InvalidIdentity("the private key has %d bits: Caramel can't sign it" % public.key_size)
    if isinstance(public, ec.EllipticCurvePublicKey) and isinstance(public.curve, ec.SECP256R1):
        if elliptic:
            return key
        raise InvalidIdentity("the private key is not an RSA key, and the key type is RSA")
    raise InvalidIdentity("the private key is not an RSA key, nor one on the curve P-256")


def _longest_number(block: bytes) -> int:
    """The bytes of the longest INTEGER in a private key, PEM, as far as it is DER. Raises ValueError."""
    lines = block.splitlines()[1:-1]
    data = binascii.a2b_base64(b"".join(line for line in lines if b":" not in line) + b"===")
    at = longest = 0
    while at + 2 <= len(data) and b"ENCRYPTED" not in block:
        tag, size = data[at], data[at + 1]
        at += 2
        if size > 0x80:
            at, size = at + size - 0x80, int.from_bytes(data[at : at + size - 0x80], "big")
        if tag == 2:
            longest = max(longest, min(size, len(data) - at))
        if tag not in (4, 0x30):  # these have others inside
            at += size
    return longest


def _key_of_request(block: Optional[bytes]) -> Any:
    """The public key that a request is for, if its signature is good; else None."""
    try:
        request = x509.load_pem_x509_csr(block or b"")
        return request.public_key() if request.is_signature_valid else None
    except Exception:  # damaged in whatever way
        return None


def _kept_request(block: Optional[bytes], key: PrivateKey, client_id: str) -> Optional[bytes]:
    """The request in `block`; None where it is missing or damaged. Raises `InvalidIdentity`."""
    if block is None:
        return None
    try:
        request = x509.load_pem_x509_csr(block)
        subject = [(attribute.oid, str(attribute.value)) for attribute in request.subject]
        if not request.is_signature_valid or _public(request) != _public(key):
            return None
        written = request.public_bytes(PEM)
    except Exception:  # cryptography has no common base for what a damaged request can raise
        return None
    names = [value for oid, value in subject if oid == NameOID.COMMON_NAME]
    if len(names) != 1 or not same_name(names[0], client_id):
        raise InvalidIdentity("the request in the file is for another client ID, %s" % ", ".join(map(repr, names)))
    return written


def has_subject(block: bytes, anchors: Anchors) -> bool:
    """Whether the subject of a request, PEM, is one that a CA among the anchors doesn't refuse."""
    subject = [(attribute.oid, str(attribute.value)) for attribute in x509.load_pem_x509_csr(block).subject]
    wanted = [[pair for pair in begin if pair[0] in REQUIRED] for begin in anchors.subjects]
    return any(subject[: len(begin)] == begin for begin in wanted)


# --- Verify ---


def accept(
    text: bytes,
    identity: Identity,
    anchors: Anchors,
    trust: Trust,
    modified: Optional[float] = None,
    now: Optional[float] = None,
) -> Issued:
    """The certificate in `text`, PEM, followed by its chain, if it is good for `identity` apart from its end.

    `modified`: its time by the server's Last-Modified, seconds since 1970, UTC; None: its notBefore. `now`: at what
    time, in the same way; None: the best known. Of the chain remain the CAs, without roots. Raises
    `InvalidCertificate` with the reason.
    """
    try:
        blocks = pem.certificates(text)
        certificate = x509.load_pem_x509_certificate(blocks[0])
        if _public(certificate) != _public(_loaded_key(identity)):
            raise InvalidCertificate("is another key's")
        if not any(same_name(name, identity.client_id) for name in _names(certificate)):
            raise InvalidCertificate("is another device's, %s" % ", ".join(map(repr, _names(certificate))))
        clients, servers = _uses(certificate)
        leaf, begin = certificate.public_bytes(PEM), _begin(certificate)
    except InvalidCertificate:
        raise
    except Exception:  # cryptography has no common base for what a damaged certificate can raise
        raise InvalidCertificate("can't be read") from None
    if not clients and not servers:
        raise InvalidCertificate("is neither for clients nor for servers")
    intermediates = [one for one in _readable(blocks[1:MAXIMUM_CHAIN], crypto.FILETYPE_PEM) if _is_below_a_root(one)]
    end = verify(certificate, intermediates, anchors, trust.now() if now is None else now)
    chain = b"".join(crypto.dump_certificate(crypto.FILETYPE_PEM, one) for one in intermediates)
    return Issued.of(leaf, chain, begin, end, not clients, modified)


def _readable(certificates: Iterable[bytes], form: int) -> list[crypto.X509]:
    """Those of a chain that can be read: what others a server may send is of no use to anybody."""
    found = []
    for one in certificates:
        try:
            found.append(crypto.load_certificate(form, one))
        except crypto.Error:
            pass  # if it was needed, no chain leads over it
    return found


def _is_below_a_root(certificate: crypto.X509) -> bool:
    """Whether a certificate is a CA's and no root: a root has signed itself. Not each one that names itself as its
    issuer has: by "new with old" a CA's old key vouches for its new one (RFC 5280, 3.2; RFC 4210, 4.4)."""
    if _described(crypto.dump_certificate(crypto.FILETYPE_PEM, certificate)) is None:
        return False
    store = crypto.X509Store()
    store.set_flags(NO_CHECK_TIME | CHECK_SS_SIGNATURE)
    store.add_cert(certificate)
    try:
        crypto.X509StoreContext(store, certificate).verify_certificate()
    except crypto.X509StoreContextError:
        return True
    return False


def verify(
    certificate: x509.Certificate, intermediates: Iterable[crypto.X509], anchors: Anchors, now: float
) -> float:
    """The earliest end in the chain from `certificate` to a trust anchor, seconds since 1970, UTC.

    Its own dates don't count for whether there is one; of the others only those count that haven't ended at `now`.
    OpenSSL looks at no dates: it would refuse what hasn't begun. Raises `InvalidCertificate` where no chain leads to
    an anchor.
    """
    alive = [anchor for anchor in anchors.certificates if _end_of(anchor) >= now]
    if not alive:
        raise InvalidCertificate(
            "can't be judged: the CA certificate has ended, it is %s by what this device knows" % utc(now)
        )
    untrusted = [one for one in intermediates if _end_of(one) >= now]
    leaf, ends, problem = crypto.X509.from_cryptography(certificate), [], ""
    # Each by itself: of two with one name and no key identifiers OpenSSL takes the first, whoever has signed.
    for anchor in alive:
        store = crypto.X509Store()
        store.set_flags(NO_CHECK_TIME | PARTIAL_CHAIN)
        store.add_cert(anchor)
        try:
            chain = crypto.X509StoreContext(store, leaf, untrusted).get_verified_chain()
            ends.append(min(map(_end_of, chain)))
        except (crypto.X509StoreContextError, crypto.Error) as error:
            problem = problem or str(error)
    if not ends:
        raise InvalidCertificate("is not by the trusted CA (%s)" % problem)
    return max(ends)


def verify_server(sent: Sequence[bytes], anchors: Anchors, now: float) -> None:
    """Raises `InvalidCertificate` where the chain that a server sent, DER, leads to no anchor or has ended `now`."""
    certificate = x509.load_der_x509_certificate(sent[0])
    if _end(certificate) < now:
        raise InvalidCertificate("ended at %s" % utc(_end(certificate)))
    verify(certificate, _readable(sent[1:], crypto.FILETYPE_ASN1), anchors, now)


def chain_sent(tcp: Tcp, host: str) -> list[bytes]:
    """The certificates, DER, that the TLS server at the other end sends, unverified. Closes `tcp`. Raises OSError.

    `ssl` tells only the first of them before Python 3.13.
    """
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    tls = SSL.Connection(context, None)
    if not host.replace(".", "").isdigit() and ":" not in host:
        tls.set_tlsext_host_name(host.encode("ascii"))
    tls.set_connect_state()
    try:
        while True:
            try:
                tls.do_handshake()
                wants = False
            except SSL.WantReadError:
                wants = True
            except SSL.Error as error:
                # A server that demands a client certificate ends the handshake, but has sent its own by then.
                if not tls.get_peer_cert_chain():
                    raise ConnectionError(None, "no TLS: %s" % error) from None
                wants = False
            if not wants:
                chain = tls.get_peer_cert_chain() or ()
                return [crypto.dump_certificate(crypto.FILETYPE_ASN1, one) for one in chain]
            with suppress(SSL.WantReadError):
                tcp.send(tls.bio_read(65536))
            data = tcp.receive()
            if data:
                tls.bio_write(data)
            else:
                tls.bio_shutdown()
    finally:
        tcp.close()


def _loaded_key(identity: Identity) -> Any:
    if identity.holder != "software":
        return _held_key(identity.key, _key_of_request(identity.request))
    return serialization.load_pem_private_key(identity.key, password=None)


def _public(holder: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    encoded: bytes = holder.public_key().public_bytes(DER, form)
    return encoded


def _names(certificate: x509.Certificate) -> list[str]:
    """The common name, or where there is none the DNS names."""
    names = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names:
        return names if len(names) == 1 else []
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return alternative.get_values_for_type(x509.DNSName)


def _uses(certificate: x509.Certificate) -> tuple[bool, bool]:
    """Whether a certificate is for TLS clients, and whether for servers (RFC 5280, 4.2.1.3 and 4.2.1.12).

    As OpenSSL sees it, which doesn't take anyExtendedKeyUsage for either.
    """
    try:
        extended = set(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        extended = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        signs, encrypts = usage.digital_signature or usage.key_agreement, usage.key_encipherment
    except x509.ExtensionNotFound:
        signs = encrypts = True
    clients = signs and ExtendedKeyUsageOID.CLIENT_AUTH in extended
    return clients, (signs or encrypts) and ExtendedKeyUsageOID.SERVER_AUTH in extended


def _begin_of(certificate: crypto.X509) -> float:
    """notBefore in seconds since 1970, UTC."""
    return _moment(certificate.get_notBefore())


def _end_of(certificate: crypto.X509) -> float:
    """notAfter in seconds since 1970, UTC."""
    return _moment(certificate.get_notAfter())


def _moment(text: Optional[bytes]) -> float:
    """Seconds since 1970 of a GeneralizedTime, YYYYMMDDhhmmssZ."""
    digits = (text or b"").decode("ascii")
    return calendar.timegm((int(digits[:4]), *(int(digits[at : at + 2]) for at in range(4, 14, 2))))


def _begin(certificate: x509.Certificate) -> float:
    """notBefore in seconds since 1970, UTC."""
    return _seconds(certificate, "not_valid_before")


def _end(certificate: x509.Certificate) -> float:
    """notAfter in seconds since 1970, UTC."""
    return _seconds(certificate, "not_valid_after")


def _seconds(certificate: x509.Certificate, name: str) -> float:
    # cryptography 42 has other names for them, and warns of the old ones.
    moment = getattr(certificate, name + "_utc", None) or getattr(certificate, name)
    return calendar.timegm(moment.utctimetuple())


# --- Tell ---


class Description(NamedTuple):
    """What a certificate says of itself, for a person: names as in RFC 4514, times in seconds since 1970, UTC."""

    subject: str
    issuer: str
    serial_number: str
    not_before: float
    not_after: float


def describe(certificate: bytes) -> Optional[Description]:
    """What the certificate says, trusted or not; None where it can't be read."""
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
        digits = "%X" % loaded.serial_number
        return Description(
            _name(loaded, "subject"),
            _name(loaded, "issuer"),
            digits.zfill(len(digits) + len(digits) % 2),
            _begin(loaded),
            _end(loaded),
        )
    except Exception:  # damaged in whatever way
        return None


def label(chain: Sequence[bytes]) -> str:
    """A few words by which a person tells a chain, PEM, from others: who it is for, and by whom.

    If the last certificate is a root, the beginning of its fingerprint too, as ``openssl x509 -fingerprint -sha256``
    prints it.
    """
    first, last = describe(chain[0]), describe(chain[-1])
    if not first or not last:
        return "something that can't be read"
    is_root = last.subject == last.issuer
    # Short enough each that a long one doesn't push out the other.
    who = printable(first.subject, 160)
    if not is_root or len(chain) > 1:
        who += " by " + printable(last.issuer, 160)
    if is_root:
        fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(chain[-1].decode("ascii"))).hexdigest().upper()
        who += " (SHA-256 %s...)" % ":".join(fingerprint[at : at + 2] for at in range(0, 16, 2))
    return who


def key_size(identity: Identity) -> tuple[str, int]:
    """The kind of an identity's key, RSA or EC, and its size in bits."""
    return _kind_and_size(_loaded_key(identity))


def _kind_and_size(key: Any) -> tuple[str, int]:
    public = key.public_key()
    return ("RSA" if isinstance(public, rsa.RSAPublicKey) else "EC"), public.key_size


def _name(certificate: x509.Certificate, which: str) -> str:
    try:
        name = getattr(certificate, which)
    except ValueError:
        return "in a form that can't be read"  # Latin-1 in T61String, say
    short = dict(zip((*NAMES.values(), NameOID.COMMON_NAME), ("C", "ST", "L", "O", "OU", "CN")))
    text = ", ".join("%s=%s" % (short.get(a.oid, a.oid.dotted_string), str(a.value)) for a in name)
    return printable(text, len(text))
