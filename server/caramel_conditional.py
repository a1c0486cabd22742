# SPDX-License-Identifier: MIT OR Apache-2.0
"""Conditional requests for a Caramel server: `Last-Modified`, and 304 where nothing is newer.

A WSGI filter that stands in front of the unchanged server, switched on in its INI file (see README.md). It
looks at one thing, a 200 answer to `GET /{sha256}`, and touches nothing else: a request that nobody has
signed (202), a rejected one (403), a POST and the CA's own certificate pass through. It keeps no state and
opens no file; the server still sees, and logs, every check.

A date has whole seconds, and a 304 that hides a renewed certificate costs a device its identity, while a 200
too many costs 2 kB. So every doubt is a 200, and the date is compared *for equality*, as nginx does by
default (`if_modified_since exact`): a key file from a backup, a newer certificate that the administrator took
back, a date made up by a device's own wrong clock: all get the certificate.

The date says when the certificate was **signed**. `notBefore` doesn't: a backdated certificate has that of
the CA, each time the same. Caramel's serial numbers are time-based UUIDs (RFC 9562, version 1), which do. A
serial number that is no such UUID gets no date, and so never a 304.

`Last-Modified` is two seconds after that instant, rounded down, and is said only when the certificate is
`settle` seconds old. From the first follows that it is later than `notBefore` of this certificate and of
every one signed before it (the server takes the two times one after the other, so they may lie in adjacent
seconds): a device that has no date from us sends the `notBefore` of what it holds, and that must never be
taken for ours. From the second follows that no other certificate with the same date can still turn up: until
then two that were signed in the same second could be told apart by nobody (RFC 9110, 8.8.2.2), and a device
gets no date that it could send back. RFC 9110, 8.8.2.1, also wants a date that has passed.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Mapping
from email.utils import formatdate, mktime_tz, parsedate_tz
from typing import Any, Callable, Optional

from cryptography import x509

Headers = list[tuple[str, str]]

#: Where Caramel keeps the certificate of the request with this SHA-256, below wherever it is mounted.
CERTIFICATE_PATH = re.compile("/[0-9a-f]{64}")
#: Seconds from the start of RFC 9562's calendar (15 October 1582) to that of Unix.
GREGORIAN_TO_UNIX = 12_219_292_800
#: What a 304 must not repeat of the 200 that it stands for (RFC 9110, 15.4.5): the description of its body.
OF_THE_BODY = ("content-", "last-modified")


def last_modified(pem: bytes) -> Optional[int]:
    """The date of a certificate in seconds since 1970, later than its `notBefore`; None where it has none."""
    try:
        signed = uuid.UUID(int=x509.load_pem_x509_certificate(pem).serial_number)
    except ValueError:  # no certificate, or a serial number of more than 128 bits
        return None
    if signed.version != 1:
        return None
    return signed.time // 10_000_000 - GREGORIAN_TO_UNIX + 2


def asked_since(environ: Mapping[str, Any]) -> Optional[int]:
    """The date in the request, in seconds since 1970; None where there is none to go by.

    `If-None-Match` wins over a date, whatever it holds (RFC 9110, 13.1.3); no tag of ours can be in it.
    """
    if "HTTP_IF_NONE_MATCH" in environ:
        return None
    try:
        parsed = parsedate_tz(environ.get("HTTP_IF_MODIFIED_SINCE", ""))
        return None if parsed is None else int(mktime_tz(parsed))
    except (ValueError, OverflowError, IndexError, TypeError):  # looks like a date, and is none
        return None


class Conditional:
    """The filter: a WSGI application around another one."""

    def __init__(self, app: Callable[..., Iterable[bytes]], settle: float = 60.0) -> None:
        """Put it in front of `app`; no certificate younger than `settle` seconds gets a date.

        `settle` has to cover the time between signing and the end of the database's transaction, and the
        distance between the clocks of whatever machines sign.
        """
        self.app = app
        self.settle = settle

    def __call__(self, environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request (PEP 3333)."""
        method = environ["REQUEST_METHOD"]
        if method not in ("GET", "HEAD") or not CERTIFICATE_PATH.fullmatch(environ.get("PATH_INFO", "")):
            return self.app(environ, start_response)
        said: list[Any] = []
        body: list[bytes] = []

        def hold_back(status: str, headers: Headers, exc_info: Any = None) -> Callable[[bytes], None]:
            said[:] = [status, headers]
            return body.append

        # HEAD must say what GET would, and the date is in the body.
        parts = self.app({**environ, "REQUEST_METHOD": "GET"}, hold_back)
        try:
            body.extend(parts)
        finally:
            getattr(parts, "close", lambda: None)()
        status, headers = said
        pem = b"".join(body)
        known = any(name.lower() == "last-modified" for name, _ in headers)  # a later Caramel may know better
        date = last_modified(pem) if status.startswith("200 ") and not known else None
        if date is not None and date + self.settle <= time.time():
            if date == asked_since(environ):
                start_response("304 Not Modified", [h for h in headers if not h[0].lower().startswith(OF_THE_BODY)])
                return []
            headers = [*headers, ("Last-Modified", formatdate(date, usegmt=True))]
        start_response(status, headers)
        return [] if method == "HEAD" else [pem]


def make_filter(
    app: Callable[..., Iterable[bytes]], global_conf: Mapping[str, str], settle: str = "60"
) -> Conditional:
    """What the INI file names as `paste.filter_app_factory`; `settle` in seconds."""
    return Conditional(app, float(settle))
