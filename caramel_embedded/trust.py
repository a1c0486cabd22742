"""Whom to believe, and when: the trust anchors, the clock, and the TLS client that follows from both.

Leaves to ``certificates`` what needs an X.509 library: where the clock is right and the server's certificate in date,
OpenSSL below `ssl` does all that a run needs.
"""

from __future__ import annotations

import hashlib
import re
import ssl
import time
from typing import Any, Optional

from .errors import UsageError
from .identity import Identity

# OpenSSL's X509_V_FLAG_*; `ssl` names the second one from Python 3.10 on, the first one not at all.
NO_CHECK_TIME = 0x200000
PARTIAL_CHAIN = 0x80000
# For TLS 1.2; those of 1.3 are not up to this. Forward secret and authenticated only (RFC 9325, 4.2), which also
# makes the greeting shorter.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
TLSEXT_PADDING = ssl.Options(0x10)  # OpenSSL's SSL_OP_TLSEXT_PADDING, part of SSL_OP_ALL, which `ssl` sets

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----[ \t]*\r?\n[A-Za-z0-9+/=\s]+?-----END CERTIFICATE-----")


class Trust:
    """The trust anchors of the server and of the identity, and the best known time.

    The floor is the latest time that has certainly passed: the firmware's build, the CA's notBefore, the stored
    certificate's notBefore. The best known time is the clock's or the floor, whichever is later.

    Attributes: ca_cert, identity_ca: PEM text; key_type: of new keys; floor: seconds since 1970, UTC.
    """

    def __init__(
        self, ca_cert: bytes, identity_ca: Optional[bytes] = None, build_time: float = 0.0, key_type: str = "rsa-2048"
    ) -> None:
        """`build_time`: when the firmware was built, seconds since 1970, UTC. `identity_ca`: by default `ca_cert`."""
        self.ca_cert = ca_cert
        self.identity_ca = identity_ca or ca_cert
        self.key_type = key_type
        self.floor = build_time

    @property
    def elliptic(self) -> bool:
        """Whether keys on elliptic curves are kept."""
        return self.key_type.startswith("ec-")

    @property
    def digest(self) -> bytes:
        """What a seal is made under: everything that decides whether an identity is good, apart from the time."""
        parts = (self.ca_cert, self.identity_ca, b"EC" if self.elliptic else b"RSA")
        return b"".join(hashlib.sha256(part).digest() for part in parts)

    @property
    def clock_is_behind(self) -> bool:
        """Whether the clock is behind a time that has certainly passed."""
        return time.time() < self.floor

    def now(self) -> float:
        """The best known time, seconds since 1970, UTC."""
        return max(time.time(), self.floor)

    def learn(self, passed: float) -> None:
        """Takes note of a time that has certainly passed, seconds since 1970, UTC."""
        self.floor = max(self.floor, passed)

    def context(self, dates: bool) -> ssl.SSLContext:
        """A TLS client's context that believes the trust anchors of the server and nobody else.

        `dates`: whether OpenSSL looks at them; where it doesn't, whoever connects has to. Raises `UsageError`.
        """
        context = _Context(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name; loads no system CA
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Up to 255 bytes of zeros in every greeting, for the sake of load balancers of 2013 (RFC 7685).
        context.options &= ~TLSEXT_PADDING
        context.set_ciphers(CIPHERS)
        context.verify_flags |= ssl.VerifyFlags(PARTIAL_CHAIN | (0 if dates else NO_CHECK_TIME))
        pem = b"\n".join(pem_certificates(self.ca_cert))
        try:
            context.load_verify_locations(cadata=pem.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise UsageError("a certificate of the CA can't be read: %s" % error) from None
        return context


class _Context(ssl.SSLContext):
    """A context that nobody can widen or lengthen: urllib3 would, or has builds that do."""

    def load_default_certs(self, *_: Any, **__: Any) -> None:
        """Trusts nobody more: Debian's urllib3 wants the system's CAs."""

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """Gives the server's name as bytes: for a text `ssl` loads Python's codec for international names."""
        if options.get("server_hostname"):
            options["server_hostname"] = options["server_hostname"].encode("ascii")
        return super().wrap_socket(*arguments, **options)

    def set_alpn_protocols(self, *_: Any) -> None:
        """Offers nothing: a server that speaks HTTP/1.1 needs no 15 bytes more to say so."""


def pem_certificates(text: bytes) -> list[bytes]:
    """The PEM certificates in `text`, which may have any line ends and other text around them."""
    return _PEM.findall(text)


def show(identity: Identity, context: ssl.SSLContext) -> Optional[str]:
    """Makes `context` show the identity; why that can't be done, None where it was."""
    try:
        identity.load_into(context)
    except OSError as error:  # ssl.SSLError is one
        return str(getattr(error, "reason", None) or error.strerror or error)
    return None
