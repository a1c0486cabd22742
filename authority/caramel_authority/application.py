# SPDX-License-Identifier: MIT OR Apache-2.0
"""HTTP: the Caramel protocol as a WSGI application, and nothing that decides.

Errors are `application/problem+json` with exactly `status`, `title` and `detail`: devices tell by that a rejection
from the page of some proxy.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Collection, Iterable
from http import HTTPStatus
from typing import Any

from sqlalchemy.exc import DBAPIError
from werkzeug.http import http_date, parse_date
from werkzeug.wrappers import Request, Response

from .assembly import assemble
from .configuration import Configuration
from .errors import BadRequest, TryLater, WrongUsage, say
from .registry import Registry, RequestStatus
from .signing_request import LONGEST
from .store import REJECTED

HASH = re.compile("/([0-9a-f]{64})")
OCTETS = "application/octet-stream"


def problem(status: int, detail: str | None = None, **headers: Any) -> Response:
    body = {"status": status, "title": HTTPStatus(status).phrase, "detail": detail}
    response = Response(json.dumps(body), status, content_type="application/problem+json")
    for name, value in headers.items():
        response.headers[name.replace("_", "-")] = str(value)
    return response


class Application:
    def __init__(
        self,
        registry: Registry,
        front: Collection[str] = (),
        answered: Callable[[str, int], None] = lambda method, status: None,
    ) -> None:
        """`front` are the addresses whose own questions are answered: not what they pass on for somebody.
        `answered` is told the method and the status of each answer.
        """
        self._registry = registry
        self._front = {address_of(one) or one for one in front}
        self._answered = answered

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        try:
            response = self._respond(request)
        except BadRequest as error:
            response = problem(400, str(error))
        except TryLater as error:
            response = problem(503, str(error), Retry_After=error.seconds)
        except (DBAPIError, WrongUsage) as error:
            # For the administrator, who reads the log; no device can do anything about it but ask again.
            say(f"{request.method} {request.path}: {error}")
            response = problem(503, "the registration authority is not able to answer now", Retry_After=60)
        self._answered(request.method, response.status_code)
        return response(environ, start_response)

    def _respond(self, request: Request) -> Response:
        asks = request.method in ("GET", "HEAD")
        signer = self._registry.signer
        if request.path == "/root.crt" and asks:
            return Response(signer.root, content_type=OCTETS)
        if request.path == "/bundle.crt" and asks:
            return Response(signer.bundle, content_type=OCTETS)
        if request.path in ("/accepted", "/health") and asks:
            asks_from = address_of(request.remote_addr) or request.remote_addr
            if asks_from not in self._front or "X-Forwarded-For" in request.headers:
                return problem(404)
            return self._accepted(request) if request.path == "/accepted" else self._health()
        match = HASH.fullmatch(request.path)
        if not match:
            return problem(404)
        if request.method == "POST":
            return self._take(request, match[1])
        return self._tell(request, match[1]) if asks else problem(405, Allow="GET, HEAD, POST")

    def _take(self, request: Request, sha256: str) -> Response:
        length = request.content_length
        if length is None or "Transfer-Encoding" in request.headers:
            return problem(411)
        if length > LONGEST:
            return problem(413)
        address = address_of(request.remote_addr)
        return self._wait(request, sha256, self._registry.post(request.get_data(), sha256, address))

    def _tell(self, request: Request, sha256: str) -> Response:
        status = self._registry.status(sha256, address_of(request.remote_addr))
        if status is None:
            return problem(404)
        if status.state == REJECTED:
            return problem(403)
        if status.pem is None:
            return self._wait(request, sha256, status)
        headers = {}
        if status.modified is not None:
            headers["Last-Modified"] = http_date(status.modified)
            if status.modified == _asked_since(request):
                return Response(status=304)
        return Response(status.pem, content_type=OCTETS, headers=headers)

    @staticmethod
    def _wait(request: Request, sha256: str, status: RequestStatus) -> Response:
        body = json.dumps({"sha256": sha256, "url": request.base_url})
        return Response(body, 202, {"Retry-After": str(status.retry_after)}, content_type="application/json")

    def _accepted(self, request: Request) -> Response:
        """For nginx's auth_request: is the certificate with the number in X-Client-Serial (hexadecimal) still
        accepted?
        """
        serial = request.headers.get("X-Client-Serial", "")
        known = re.fullmatch("[0-9A-Fa-f]{1,40}", serial) and self._registry.is_accepted(int(serial, 16))
        return Response(status=204) if known else problem(403)

    def _health(self) -> Response:
        """For a front that balances: can this process answer devices? Errors are 503, as they are to devices."""
        self._registry.look()
        return Response(status=204)


def address_of(text: str | None) -> str | None:
    """The IP address in its usual form; None where it is none, or of one link only. What a front passes on is what
    its client says, if nobody told it better.
    """
    try:
        address = ipaddress.ip_address(text or "")
    except ValueError:
        return None
    if getattr(address, "scope_id", None):
        return None
    # What a socket for both families says of a client with IPv4 (RFC 4291, 2.5.5.2).
    return str(getattr(address, "ipv4_mapped", None) or address)


def _asked_since(request: Request) -> int | None:
    """The date that the device has of its certificate. It is compared for equality: any other date gets the whole.

    A tag wins over a date (RFC 9110, 13.1.3), and none is ever ours.
    """
    if "If-None-Match" in request.headers:
        return None
    date = parse_date(request.headers.get("If-Modified-Since"))
    return int(date.timestamp()) if date else None


def build(configuration: Configuration) -> Application:
    """The application that this configuration describes. Raises WrongUsage where it can't work."""
    registry, _ = assemble(configuration).answering()
    return Application(registry, configuration.front)


def from_environment() -> Application:
    """For a WSGI server that wants a factory; the configuration is what $CARAMEL_AUTHORITY_CONFIG names."""
    return build(Configuration.read())
