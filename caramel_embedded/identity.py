"""The stored identity as a value: its line of text, its seal, its PEM blocks. What every run needs, without X.509.

The seal says that this very content was judged good under these very trust anchors. Where it holds, nothing is judged
again; where it doesn't, ``certificates`` looks at everything. It protects against accidents, a bit that flash has
lost say, and not against somebody who may write the file.
"""

from __future__ import annotations

import calendar
import datetime
import hashlib
import io
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Optional

from . import pem
from .settings import is_client_id

if TYPE_CHECKING:
    import ssl

_MAGIC = "# caramel-embedded/1 "
# Beside `from` and `until`; the name of the extended key usage (RFC 5280, 4.2.1.12).
_SERVERS_ONLY = "serverAuth"


class Issued(NamedTuple):
    """A certificate that was found good for an identity, apart from its end.

    Attributes: pem: the certificate itself; chain: the intermediate certificates, PEM, b"" where there are none;
    not_before, not_after: seconds since 1970, UTC; servers_only: whether it is for servers and not for clients;
    modified: its time by the server's Last-Modified, seconds since 1970, UTC; its notBefore as long as the server has
    told none; guessed: whether that is so.
    """

    pem: bytes
    chain: bytes
    not_before: float
    not_after: float
    servers_only: bool
    modified: float
    guessed: bool

    @classmethod
    def of(
        cls,
        pem: bytes,
        chain: bytes,
        not_before: float,
        not_after: float,
        servers_only: bool,
        last_modified: Optional[float],
    ) -> Issued:
        """One whose time the server has told, or None. It may also be its notBefore read back from a file."""
        modified = not_before if last_modified is None else last_modified
        return cls(pem, chain, not_before, not_after, servers_only, modified, modified == not_before)

    @property
    def text(self) -> bytes:
        """The certificate and its chain, PEM, as they are sent and stored."""
        return self.pem + self.chain


class Identity(NamedTuple):
    """What a device is: a private key, the request for a certificate, and the certificate once there is one.

    ``bytes(identity)`` is the combined form in which it is kept.

    Attributes: key: PEM; request: PEM, under its usual label; client_id; trusted: what it was judged under, see
    `Trust.digest`; hardware: fingerprints of the IDs that the hardware had, each behind the letter of its kind (2.0.0
    wrote none), see ``hardware``; issued: the certificate and what is known of it, or None.
    """

    key: bytes
    request: bytes
    client_id: str
    trusted: bytes
    hardware: tuple[str, ...] = ()
    issued: Optional[Issued] = None

    @classmethod
    def sealed(cls, data: bytes, trusted: bytes, modified: Optional[float] = None) -> Optional[Identity]:
        """The identity in `data` if it is just what is written for one under `trusted`, its seal included; else None.

        `modified`: the certificate's time, seconds since 1970, UTC; None: its notBefore.
        """
        try:
            identity = cls._parsed(_fields(data), data.partition(b"\n")[2], trusted, modified)
            return identity if bytes(identity) == data and is_client_id(identity.client_id) else None
        except (ValueError, LookupError, OverflowError):
            return None

    @classmethod
    def _parsed(cls, fields: Mapping[str, str], body: bytes, trusted: bytes, modified: Optional[float]) -> Identity:
        key, *certificates, request = [block for _, block in pem.blocks(body)]
        issued = None
        if "until" in fields:
            issued = Issued.of(
                certificates[0],
                b"".join(certificates[1:]),
                _seconds(fields["from"]),
                _seconds(fields["until"]),
                fields.get("use") == _SERVERS_ONLY,
                modified,
            )
        request = request.replace(pem.FILED_REQUEST, pem.REQUEST)
        return cls(key, request, fields["id"], trusted, _hardware(fields), issued)

    def __bytes__(self) -> bytes:
        issued = self.issued
        body = self.key + (issued.text if issued else b"") + self.request.replace(pem.REQUEST, pem.FILED_REQUEST)
        fields = ["id=" + self.client_id]
        if issued:
            fields += ["from=" + _iso(issued.not_before), "until=" + _iso(issued.not_after)]
            if issued.servers_only:
                fields.append("use=" + _SERVERS_ONLY)
        if self.hardware:
            fields.append("hw=" + ",".join(one[-8:] for one in self.hardware))
            kinds = [one[:-8] or "-" for one in self.hardware]
            if set(kinds) != {"-"}:
                fields.append("kinds=" + "".join(kinds))
        head = (_MAGIC + " ".join(fields)).encode("ascii")
        seal = hashlib.sha256(b"\n".join((head, self.trusted, body))).hexdigest().encode("ascii")
        return b"%s seal=%s\n%s" % (head, seal, body)

    def __repr__(self) -> str:
        # Never the key.
        return "<Identity %s>" % self.request_hash

    @property
    def certificate(self) -> Optional[bytes]:
        """The certificate, PEM; None where there is none."""
        return self.issued.pem if self.issued else None

    @property
    def chain(self) -> bytes:
        """The intermediate certificates between it and the CA, PEM; b"" where there are none."""
        return self.issued.chain if self.issued else b""

    @property
    def modified(self) -> Optional[float]:
        """The certificate's time by the server's Last-Modified, else its notBefore: seconds since 1970, UTC."""
        return self.issued.modified if self.issued else None

    @property
    def holder(self) -> str:
        """What holds the private key: ``software`` (the key file itself), ``tpm`` or ``pkcs11``."""
        if self.key.startswith(b"-----BEGIN %s-" % pem.KEY_IN_TPM):
            return "tpm"
        return "pkcs11" if self.key.startswith(b"-----BEGIN %s-" % pem.KEY_IN_TOKEN) else "software"

    @property
    def for_servers_only(self) -> bool:
        """Whether the certificate is for servers and not for clients, as public CAs make them."""
        return self.issued is not None and self.issued.servers_only

    @property
    def request_hash(self) -> str:
        """Under what the server keeps the request: SHA-256 over its PEM bytes, 64 lower-case hex digits."""
        return hashlib.sha256(self.request).hexdigest()

    def with_issued(self, issued: Optional[Issued]) -> Identity:
        """The same key and request with another certificate, or with none."""
        return self._replace(issued=issued)

    def remembering(self, hardware: tuple[str, ...]) -> Identity:
        """The same with the kinds of what it remembers, as far as `hardware` knows them: 2.0.0 wrote none."""
        kinds = {one[-8:]: one for one in hardware}
        return self._replace(hardware=tuple(kinds.get(one, one) for one in self.hardware))

    def load_into(self, context: ssl.SSLContext) -> None:
        """Makes `context` show this identity in TLS, as a client or a server, without a file on any disk.

        `ssl` wants a path: it gets that of a file in memory, see memfd_create(2). Raises ssl.SSLError where key and
        certificate don't fit or there is no certificate, OSError where the system has no such files or no /proc.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError(None, "this system has no files in memory, memfd_create(2)")
        fd = os.memfd_create("identity")
        try:
            with open(fd, "wb", buffering=0, closefd=False) as file:
                file.write(self.key + (self.issued.text if self.issued else b""))
            # Without a password to give, an encrypted key would make OpenSSL ask on the terminal, and wait.
            context.load_cert_chain("/proc/self/fd/%d" % fd, password=str)
        finally:
            os.close(fd)

    def file(self) -> BinaryIO:
        """The combined form as a binary file object in memory, for an interface that wants a file."""
        return io.BytesIO(bytes(self))


def remembered(data: bytes) -> tuple[str, ...]:
    """What the line of text in `data` remembers of the hardware, sealed or not; see `Identity.hardware`."""
    return _hardware(_fields(data))


def _fields(data: bytes) -> Mapping[str, str]:
    """The fields of the line of text that `data` begins with; empty where it has no such line."""
    line = data.partition(b"\n")[0].decode("ascii", "replace")
    if not line.startswith(_MAGIC):
        return {}
    pairs = (field.partition("=") for field in line[len(_MAGIC) :].split(" "))
    return {name: value for name, _, value in pairs}


def _hardware(fields: Mapping[str, str]) -> tuple[str, ...]:
    fingerprints = [one for one in fields.get("hw", "").split(",") if len(one) == 8]
    kinds = fields.get("kinds", "").ljust(len(fingerprints), "-")
    return tuple(kind.strip("-") + one for kind, one in zip(kinds, fingerprints))


def utc(seconds: float) -> str:
    """Seconds since 1970 as a person reads them: ``2026-01-31 12:00:00 UTC``."""
    try:
        return "%s UTC" % _moment(seconds)
    except OverflowError:
        return "%d seconds after 1970" % seconds


def _iso(seconds: float) -> str:
    return _moment(seconds).isoformat() + "Z"


def _moment(seconds: float) -> datetime.datetime:
    """Counted without the C library: gmtime(3) ends in 2038 where `time_t` has 32 bits. Raises OverflowError."""
    return datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=math.floor(seconds))


def _seconds(text: str) -> float:
    return calendar.timegm(datetime.datetime.fromisoformat(text.rstrip("Z")).timetuple())
