"""Whom to believe, and when: the trust anchors as text, and the best known time. No input or output but the clock's.

Leaves to ``server`` the TLS that follows from it, and to ``certificates`` what needs an X.509 library.
"""

from __future__ import annotations

import hashlib
import time
from typing import Optional

# OpenSSL's X509_V_FLAG_*; `ssl` names the second one from Python 3.10 on, the first one not at all.
NO_CHECK_TIME = 0x200000
PARTIAL_CHAIN = 0x80000


class Trust:
    """The trust anchors of the server and of the identity, and the best known time.

    The floor is the latest time that has certainly passed: the firmware's build, the CA's notBefore, the stored
    certificate's notBefore. The last one is the weakest: a CA's clock may have been ahead once. The best known time
    is the clock's or the floor, whichever is later.

    Attributes: ca_cert, identity_ca: PEM text; key_type: of new keys; certain: the floor without the stored
    certificate, seconds since 1970, UTC; stored: that certificate's beginning, in the same way.
    """

    def __init__(
        self, ca_cert: bytes, identity_ca: Optional[bytes] = None, build_time: float = 0.0, key_type: str = "rsa-2048"
    ) -> None:
        """`build_time`: when the firmware was built, seconds since 1970, UTC. `identity_ca`: by default `ca_cert`."""
        self.ca_cert = ca_cert
        self.identity_ca = identity_ca or ca_cert
        self.key_type = key_type
        self.certain = build_time
        self.stored = 0.0

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
    def floor(self) -> float:
        """The latest time that has certainly passed, seconds since 1970, UTC."""
        return max(self.certain, self.stored)

    @property
    def stored_is_ahead(self) -> bool:
        """Whether only the stored certificate says that the clock is behind: either of them may be wrong."""
        return self.certain <= time.time() < self.stored

    @property
    def clock_is_behind(self) -> bool:
        """Whether the clock is behind a time that has certainly passed."""
        return time.time() < self.floor

    def now(self) -> float:
        """The best known time, seconds since 1970, UTC."""
        return max(time.time(), self.floor)

    def learn(self, passed: float) -> None:
        """Takes note of a time that has certainly passed, seconds since 1970, UTC."""
        self.certain = max(self.certain, passed)
