"""What is found where the identity is kept, judged: what can be kept, and why something can't.

A sealed identity was judged before; anything else is looked at as a whole, by ``certificates``.
"""

from __future__ import annotations

import os
from typing import Optional

from . import pem
from .errors import NotReady, UsageError
from .identity import Identity, utc
from .settings import same_name
from .trust import Trust


class Stored:
    """What was found where the identity is kept, judged.

    Attributes: data; client_id; trust; hardware; identity: None where there is none that can be kept; notes: for a
    person, each reason why something can't be kept.
    """

    def __init__(
        self,
        data: bytes,
        client_id: str,
        trust: Trust,
        hardware: tuple[str, ...] = (),
        modified: Optional[float] = None,
    ) -> None:
        """`hardware`: what a new identity is to remember, see `Hardware.fingerprints`. `modified`: the certificate's
        time, seconds since 1970, UTC; None: its notBefore. Raises `UsageError`, `NotReady`."""
        require_entropy()  # OpenSSL would wait for it
        self.data = data
        self.client_id = client_id
        self.trust = trust
        self.hardware = hardware
        self.notes: list[str] = []
        self.identity = _with_earliest_end(Identity.sealed(data, trust.digest, modified))
        if self.identity is None:
            self.identity = self._examined(modified)
        elif not same_name(self.identity.client_id, client_id):
            other = self.identity.client_id
            self.notes.append(
                "the request in the file is for another client ID, %r: starting over with a new key" % other
            )
            self.identity = None
        if self.identity is not None:
            self.client_id = self.identity.client_id  # of a host name the stored form
        issued = self.identity and self.identity.issued
        if issued:
            trust.stored = issued.not_before
            if not usable(self.identity, trust):
                self.notes.append("the stored certificate ended at " + utc(issued.not_after))

    def _examined(self, modified: Optional[float]) -> Optional[Identity]:
        from . import certificates  # costs as much as all else: only where something is new

        anchors = certificates.anchors(self.trust)  # a bad one shows before anything is made
        if not self.data:
            return None
        if self.data in (self.trust.ca_cert, self.trust.identity_ca) or pem.only_certificates(self.data):
            raise UsageError("what is stored is somebody's certificates, and no identity: left as it is")
        try:
            identity, wrong = certificates.examine(
                self.data, self.client_id, anchors, self.trust, self.hardware, modified
            )
        except certificates.InvalidIdentity as reason:
            self.notes.append("%s: starting over with a new key" % reason)
            return None
        self.notes += wrong
        return identity


def _with_earliest_end(identity: Optional[Identity]) -> Optional[Identity]:
    """A sealed identity whose `until` is the earliest end in its chain: 2.0.0 wrote that of the certificate."""
    if identity is None or identity.issued is None or not identity.issued.chain:
        return identity
    import ssl  # few have a chain

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=identity.issued.chain.decode("ascii"))
    except (ssl.SSLError, ValueError):
        return None  # to be looked at
    ends = [ssl.cert_time_to_seconds(str(one["notAfter"])) for one in context.get_ca_certs()]
    end = min([identity.issued.not_after, *ends])
    return identity.with_issued(identity.issued._replace(not_after=end))


def usable(identity: Optional[Identity], trust: Trust) -> bool:
    """Whether the identity has a certificate that hasn't ended by the best known time."""
    return identity is not None and identity.issued is not None and identity.issued.not_after >= trust.now()


def require_entropy() -> None:
    """Raises `NotReady` where the kernel's random numbers aren't ready yet, see getrandom(2). Never waits.

    Keys made before that have been found to share primes across the world (Heninger and others, "Mining Your Ps
    and Qs", 2012).
    """
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        raise NotReady("the kernel has no entropy yet: nothing was done") from None
