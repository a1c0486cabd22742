"""Whom to believe, and when: the trusted CA, the clock, and what both say of a certificate.

Responsible for every judgement about certificates: one rule for the server's and for our own. Chains and signatures
are OpenSSL's work, through `ssl`. Our own certificate is judged by showing it in a TLS handshake with ourselves in
memory: that runs the very check that the other machines will do, proves that key and certificate fit, and costs a
tenth of loading another library.
"""

from __future__ import annotations

import re
import ssl
import time

from .errors import Untrusted, UsageError
from .identity import REQUIRED, Identity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional, Union

    from .identity import Subject

# OpenSSL's X509_V_FLAG_*; `ssl` names the second one from Python 3.10 on, the first one not at all.
NO_CHECK_TIME = 0x200000
PARTIAL_CHAIN = 0x80000
# For TLS 1.2; those of 1.3 are not up to this. Forward secret and authenticated only (RFC 9325, 4.2), which also
# makes the greeting shorter.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
TLSEXT_PADDING = ssl.Options(0x10)  # OpenSSL's SSL_OP_TLSEXT_PADDING, part of SSL_OP_ALL, which `ssl` sets

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----[ \t]*\r?\n[A-Za-z0-9+/=\s]+?-----END CERTIFICATE-----")


class Facts:
    """What a certificate says: client ID, validity in seconds since 1970 (UTC), and the rest as `ssl` decodes it."""

    __slots__ = ("client_id", "decoded", "not_after", "not_before")

    def __init__(self, decoded: dict[str, Any]) -> None:
        self.decoded = decoded
        names = [value for rdn in decoded["subject"] for name, value in rdn if name == "commonName"]
        self.client_id = names[0] if len(names) == 1 else None
        self.not_before = ssl.cert_time_to_seconds(decoded["notBefore"])
        self.not_after = ssl.cert_time_to_seconds(decoded["notAfter"])


class Trust:
    """The trusted CA's certificates and the clock.

    The floor is the latest time that has certainly passed. A clock at or past it is believed; one behind it is known
    to be wrong: then nothing is refused for not being valid *yet*, and what ended before the floor is.
    """

    def __init__(self, ca_cert: bytes, build_time: float = 0.0, clock: Optional[float] = None) -> None:
        """`ca_cert`: PEM text with one or more CA certificates. `build_time`: when the firmware was built, `clock`:
        the time now, both in seconds since 1970, UTC. Raises `UsageError`."""
        self._authorities = []
        for pem in _PEM.findall(ca_cert):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            try:
                context.load_verify_locations(cadata=pem.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise UsageError("a certificate of the CA can't be read: %s" % error) from None
            # Lists CA certificates only. Any other would be trusted as itself, and that is not what a CA is for.
            decoded = context.get_ca_certs()
            if not decoded:
                raise UsageError("a certificate that is no CA's is among those of the CA")
            self._authorities.append((pem.decode("ascii"), Facts(decoded[0])))
        if not self._authorities:
            raise UsageError("the CA certificate holds no certificate in PEM form")
        # Of several roots the oldest one's time has certainly passed; a new one may be handed out before it begins.
        self.floor = max(build_time, min(facts.not_before for _, facts in self._authorities))
        self.clock = time.time() if clock is None else clock

    @property
    def subjects(self) -> list[Subject]:
        """For each CA, in the order of the file, what the subject of a request has to begin with.

        Those of C, ST, L and O that the CA has, in that order, then its OU.
        """
        found: list[Subject] = []
        for _, facts in self._authorities:
            own = {name: value for rdn in facts.decoded["subject"] for name, value in rdn}
            wanted = [(name, own[name]) for name in (*REQUIRED, "organizationalUnitName") if name in own]
            if wanted not in found:
                found.append(wanted)
        return found

    @property
    def clock_is_wrong(self) -> bool:
        """Whether the clock is behind a time that has certainly passed."""
        return self.clock < self.floor

    @property
    def now(self) -> float:
        """The best that is known of the time: the clock's, or the floor where the clock is wrong."""
        return max(self.clock, self.floor)

    def why_not_in_date(self, facts: Facts) -> Optional[str]:
        """Why a certificate is not in date, None where it is. Dates are inclusive (RFC 5280, 4.1.2.5)."""
        if self.now > facts.not_after:
            return "ended at " + utc(facts.not_after)
        if not self.clock_is_wrong and self.clock < int(facts.not_before):
            return "is not valid before %s, and it is %s by this device's clock" % (
                utc(facts.not_before),
                utc(self.clock),
            )
        return None

    def judge(self, identity: Identity, client_id: str) -> Union[Facts, str]:
        """What the identity's certificate says; or, in words, why it is not usable apart from its dates."""
        try:
            facts = Facts(self._show(identity))
        except ssl.SSLCertVerificationError as error:
            return "is not by the trusted CA (%s)" % error.verify_message
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                return "is another key's"
            return "can't be used (%s)" % (error.reason or "no certificate")
        except (ValueError, KeyError):
            return "can't be read"
        if facts.client_id != client_id:
            return "is another device's, %r" % facts.client_id
        return facts

    def learn(self, facts: Facts) -> None:
        """Takes a genuine certificate's notBefore for what it is: a time that has certainly passed."""
        self.floor = max(self.floor, facts.not_before)

    def _show(self, identity: Identity) -> dict[str, Any]:
        """Our certificate as seen by a TLS server that trusts the CA. Looks at no dates. Raises ssl.SSLError."""
        ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ours.check_hostname, ours.verify_mode = False, ssl.CERT_NONE  # the other side is ourselves
        theirs.verify_mode = ssl.CERT_REQUIRED
        theirs.num_tickets = 0
        self._trust_in(theirs, NO_CHECK_TIME)
        identity.load_into(ours)
        identity.load_into(theirs)
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        client, server = ours.wrap_bio(back, there), theirs.wrap_bio(there, back, server_side=True)
        for _ in range(3):  # client hello; server's flight; client's flight, which the server then judges
            for side in (client, server):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    pass
        decoded = server.getpeercert()
        assert decoded is not None  # CERT_REQUIRED: without one do_handshake() would have raised
        return dict(decoded)

    def _trust_in(self, context: ssl.SSLContext, flags: int = 0) -> None:
        context.verify_flags |= ssl.VerifyFlags(PARTIAL_CHAIN | flags)
        # Where OpenSSL doesn't look at dates, those of the CA are for us; where it does, this changes nothing.
        for pem, facts in self._authorities:
            if facts.not_after >= self.now:
                context.load_verify_locations(cadata=pem)

    def context(self, identity: Optional[Identity]) -> ssl.SSLContext:
        """A TLS client's context that believes the trusted CA and nobody else.

        `identity`: the one to show, if any. The dates of the server's certificate are checked by OpenSSL where the
        clock is believed; where it is wrong, that is left to the caller, with `why_not_in_date`. Raises `Untrusted`
        where the CA itself has ended, `NotReady`.
        """
        if all(facts.not_after < self.now for _, facts in self._authorities):
            raise Untrusted("the CA certificate has ended, it is %s by what this device knows" % utc(self.now))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name; loads no system CA
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Up to 255 bytes of zeros in every greeting, for the sake of load balancers of 2013 (RFC 7685).
        context.options &= ~TLSEXT_PADDING
        context.set_ciphers(CIPHERS)
        self._trust_in(context, NO_CHECK_TIME if self.clock_is_wrong else 0)
        if identity is not None:
            identity.load_into(context)
        return context


def utc(seconds: float) -> str:
    """Seconds since 1970 as a person reads them: ``2026-01-31 12:00:00 UTC``."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "%d seconds after 1970" % seconds
