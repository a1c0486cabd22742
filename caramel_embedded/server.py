"""The Caramel protocol over pinned TLS: one request, one response or one error, never longer than the time limit.

urllib3 does HTTP on the one connection: requests, bodies, lengths, chunks, early ends. `ssl` does TLS. Responsible
for getting a response, and for who may have given it. Leaves to ``enrollment`` what is asked next.
"""

from __future__ import annotations

import calendar
import email.utils
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import urllib3
from urllib3 import exceptions
from urllib3.util import SKIP_HEADER

from . import __version__, pem
from .errors import CaramelError, Refused, Unreachable, Untrusted, UsageError, printable
from .identity import Identity, utc
from .trust import NO_CHECK_TIME, PARTIAL_CHAIN, Trust

MAXIMUM_BODY = 65536  # bytes
MAXIMUM_WAIT = 86400  # seconds; a Retry-After of a broken server must not keep a device away for years
NOT_YET_VALID, HAS_EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_*, see X509_STORE_CTX_get_error(3)
# What TLS front ends say to a client certificate that they don't like: nginx 400, others 401 or 403.
CERTIFICATE_REFUSALS = (400, 401, 403)
END_OF_9999 = 253402300799  # the last second that an HTTP date can tell (RFC 9110, 5.6.7)
# For TLS 1.2; those of 1.3 are not up to this. Forward secret and authenticated only (RFC 9325, 4.2), which also
# makes the greeting shorter.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
TLSEXT_PADDING = ssl.Options(0x10)  # OpenSSL's SSL_OP_TLSEXT_PADDING, part of SSL_OP_ALL, which `ssl` sets


class ConnectionLost(Unreachable):
    """The other side ended the connection; a client certificate can be the reason."""


class Response(NamedTuple):
    """A response of whoever is behind the server's name.

    Attributes: status; body; last_modified: seconds since 1970, UTC, or None; retry_after: seconds or None; problem:
    an RFC 9457 document, empty where there is none; conditional: whether a 304 was asked for.
    """

    status: int
    body: bytes
    last_modified: Optional[float]
    retry_after: Optional[int]
    problem: dict[str, Any]
    conditional: bool

    @classmethod
    def read(cls, raw: urllib3.HTTPResponse, conditional: bool) -> Response:
        """Reads a response to its end. Raises `Refused`, OSError, what urllib3 raises."""
        content = b""
        for piece in raw.stream(16384, decode_content=False):
            content += piece
            if len(content) > MAXIMUM_BODY:
                raise Refused("the response is longer than %d bytes" % MAXIMUM_BODY)
        return cls(
            raw.status,
            content,
            seconds(raw.headers.get("Last-Modified")),
            _retry_after(raw.headers.get("Retry-After"), raw.headers.get("Date")),
            _problem(raw.headers.get("Content-Type"), content),
            conditional,
        )

    @property
    def from_caramel(self) -> bool:
        """Whether the application said it, in an RFC 9457 document that repeats the status, and no proxy's page."""
        return self.problem.get("status") == self.status

    @property
    def is_rejection(self) -> bool:
        """Whether these are Caramel's own words for a rejected request. Other programs say 403 in other ones."""
        return (
            self.status == 403
            and self.from_caramel
            and self.problem.keys() == {"status", "title", "detail"}
            and self.problem["title"] == "Forbidden"
        )

    @property
    def refuses_certificate(self) -> bool:
        """Whether it can be a TLS front end's word on a client certificate."""
        return self.status in CERTIFICATE_REFUSALS and not self.from_caramel

    def __str__(self) -> str:
        detail = printable(str(self.problem.get("detail") or self.problem.get("title") or ""))
        return "status %d%s" % (self.status, ", " + detail if detail else "")


class Server:
    """One run's conversation with a Caramel server, over one connection where that is possible."""

    def __init__(
        self, address: tuple[str, int], trust: Trust, client_id: str, timeout: float, say: Callable[[str], None]
    ) -> None:
        """`timeout`: seconds for everything that waits on the network, name look-up included, from `connect` on."""
        self.address = address
        self.trust = trust
        self.say = say
        self._timeout = timeout
        self._deadline: Optional[float] = None
        self._addresses: list[Any] = []
        # A client ID has no character that would have to be quoted in a comment (RFC 9110, 5.6.5). Nobody compresses
        # for a client that says nothing of it, which saves a line on a link that costs by the byte.
        agent = "caramel-embedded/%s (%s)" % (__version__, client_id)
        self._headers = {"User-Agent": agent, "Accept-Encoding": SKIP_HEADER}
        self._connection = _Connection(self)
        self._not_after = ""  # of the server's own certificate, as `ssl` tells it
        self._identity: Optional[Identity] = None
        #: Whether the connection shows a client certificate to a server that asks for one.
        self.shows_certificate = False

    # --- Ask ---

    def connect(self, identity: Optional[Identity]) -> None:
        """Makes ready for a new connection, which the next request opens; it shows `identity` to who asks for it."""
        self.close()
        if self._deadline is None:
            # Only now: what went before, the making of a key say, has not waited on the network.
            self._deadline = time.monotonic() + self._timeout
        self._identity = identity
        self.shows_certificate = identity is not None

    def reach(self) -> None:
        """Makes sure that the server is there, and can be trusted. Raises `Unreachable`, `Untrusted`."""
        with self._in_our_terms():
            self._connection.connect()

    def get(self, request_hash: str, since: Optional[float] = None) -> Response:
        """Asks for the certificate of the request. `since`: what it has to be newer than, seconds since 1970, UTC.

        Raises `Unreachable` (`ConnectionLost` where a client certificate can be the reason), `Untrusted`, `Refused`.
        """
        headers = {}
        if since is not None and 0 <= since <= END_OF_9999:
            headers["If-Modified-Since"] = email.utils.formatdate(since, usegmt=True)
        return self._ask("GET", request_hash, None, headers)

    def post(self, request_hash: str, request: bytes) -> Response:
        """Sends the request for a certificate. Raises what `get` raises."""
        return self._ask("POST", request_hash, request, {})

    def _ask(self, method: str, path: str, body: Optional[bytes], headers: dict[str, str]) -> Response:
        kept = self._connection.sock is not None
        try:
            response = self._asked_once(method, path, body, headers)
        except ConnectionLost as lost:
            # A server may close a connection that it has answered on at any time (RFC 9112, 9.3.1 and 9.5).
            if not kept:
                raise
            self.say("%s: once more on a new connection" % lost)
            response = self._asked_once(method, path, body, headers)
        self.say("%s: %s, %d bytes" % (method, response, len(response.body)))
        return response

    def _asked_once(self, method: str, path: str, body: Optional[bytes], headers: dict[str, str]) -> Response:
        with self._in_our_terms():
            self._connection.request(method, "/" + path, body=body, headers={**self._headers, **headers})
            return Response.read(self._connection.response(), "If-Modified-Since" in headers)

    @contextmanager
    def _in_our_terms(self) -> Iterator[None]:
        """Says in our own terms what goes wrong inside, and closes the connection then."""
        try:
            yield
            return
        except CaramelError:
            self.close()
            raise
        except (exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            self.close()
            problem = _cause(error)
        name = "%s:%d" % self.address
        if isinstance(problem, ssl.SSLCertVerificationError):
            clock = ""
            if problem.verify_code == HAS_EXPIRED:
                clock = ", and it is %s by this device's clock" % utc(time.time())
            raise Untrusted(
                "%s can't show a certificate that the trusted CA vouches for: %s%s"
                % (name, problem.verify_message, clock)
            )
        if isinstance(problem, (TimeoutError, socket.timeout, exceptions.TimeoutError)):
            raise Unreachable("no answer from %s within the time limit" % name)
        if isinstance(problem, (ConnectionError, ssl.SSLError)):
            reason = getattr(problem, "reason", None) or problem.strerror or problem
            raise ConnectionLost("%s broke the connection off: %s" % (name, printable(str(reason))))
        if isinstance(problem, OSError):
            raise Unreachable("%s can't be reached: %s" % (name, problem.strerror or problem))
        if isinstance(problem, http.client.IncompleteRead):
            raise Unreachable("the connection broke in the middle of the response")
        raise Refused("the response from %s is not HTTP: %s" % (name, printable(repr(problem))))

    def close(self) -> None:
        """Ends the connection; may be called at any time."""
        self._connection.close()

    # --- Wait ---

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside, the making of a key say, costs none of the time limit."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._deadline is not None:
                self._deadline += time.monotonic() - began

    def remaining(self) -> float:
        """Seconds until the time limit. Raises TimeoutError when it has passed."""
        assert self._deadline is not None, "connect() comes first"
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    # --- TLS ---

    @property
    def certificate_end(self) -> float:
        """When the certificate that the server has shown ends, seconds since 1970, UTC."""
        return ssl.cert_time_to_seconds(self._not_after)

    def tls(self) -> ssl.SSLSocket:
        """A TLS connection to the server, authenticated. Raises `Untrusted`, `UsageError`, OSError.

        OpenSSL looks at every date where the clock is believed. What fails there for being early is looked at
        without: then an end counts by the best known time, and a beginning not at all.
        """
        if not self.trust.clock_is_behind:
            try:
                return self._handshake(dates=True)
            except ssl.SSLCertVerificationError as error:
                if error.verify_code != NOT_YET_VALID:
                    raise
            self.say("a certificate of the server has not begun by this device's clock: looking at ends only")
        tls = self._handshake(dates=False)
        try:
            self._verify_ends(tls)
        except BaseException:
            tls.close()
            raise
        return tls

    def _handshake(self, dates: bool) -> ssl.SSLSocket:
        plain = self._tcp()
        try:
            # One write a request: without this a second small one waits for the other side's delayed ACK.
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.settimeout(self.remaining())
            context = client_context(self.trust, dates)
            if self._identity is not None:
                reason = show(self._identity, context)
                if reason:
                    self.say("the client certificate can't be shown, %s: going on without" % reason)
                    self._identity, self.shows_certificate = None, False
            # The name as bytes: for a text `ssl` loads Python's codec for international names.
            tls = context.wrap_socket(plain, server_hostname=self.address[0].encode("ascii"))
        except BaseException:
            plain.close()
            raise
        assert isinstance(tls, _Socket)
        tls.remaining = self.remaining
        peer = tls.getpeercert()
        assert peer, "CERT_REQUIRED"
        self._not_after = str(peer["notAfter"])
        self.say("connected to %s:%d, %s" % (*self.address, tls.version()))
        return tls

    def _verify_ends(self, tls: ssl.SSLSocket) -> None:
        """Looks at the ends of the server's certificates, which OpenSSL didn't. Raises `Untrusted`, OSError."""
        from . import certificates  # costs as much as all else: only where the clock is behind

        anchors = certificates.anchors(self.trust, of_server=True)
        own = tls.getpeercert(binary_form=True) or b""
        try:
            try:
                certificates.verify_server([own], anchors, self.trust.now())
            except certificates.InvalidCertificate:
                # It has intermediates, then. The handshake has looked at them, but not at their ends.
                with self._tcp() as connected:
                    sent = certificates.chain_sent(connected, self.address[0], self.remaining)
                certificates.verify_server([own, *sent[1:]], anchors, self.trust.now())
        except certificates.InvalidCertificate as reason:
            raise Untrusted("the certificate of %s:%d %s" % (*self.address, reason)) from None

    def _tcp(self) -> socket.socket:
        """A TCP connection to the first of the server's addresses that takes one. Raises OSError."""
        if not self._addresses:
            self._addresses = look_up(*self.address, self.remaining)
        connected, which = connect_to_one(self._addresses, self.remaining)
        # The next connection goes where this one went: an address that swallows everything costs its time once.
        self._addresses.insert(0, self._addresses.pop(which))
        return connected


def client_context(trust: Trust, dates: bool) -> ssl.SSLContext:
    """A TLS client's context that believes the trust anchors of the server and nobody else.

    `dates`: whether OpenSSL looks at them; where it doesn't, whoever connects has to. Raises `UsageError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name; loads no system CA
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Up to 255 bytes of zeros in every greeting, for the sake of load balancers of 2013 (RFC 7685).
    context.options &= ~TLSEXT_PADDING
    context.set_ciphers(CIPHERS)
    context.verify_flags |= ssl.VerifyFlags(PARTIAL_CHAIN | (0 if dates else NO_CHECK_TIME))
    context.sslsocket_class = _Socket
    try:
        context.load_verify_locations(cadata=b"\n".join(pem.certificates(trust.ca_cert)).decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise UsageError("a certificate of the CA can't be read: %s" % error) from None
    return context


def show(identity: Identity, context: ssl.SSLContext) -> Optional[str]:
    """Makes `context` show the identity; why that can't be done, None where it was."""
    try:
        identity.load_into(context)
    except OSError as error:  # ssl.SSLError is one
        return str(getattr(error, "reason", None) or error.strerror or error)
    return None


class _Socket(ssl.SSLSocket):
    """A TLS socket whose every wait ends at the run's time limit, and not a number of seconds after the last byte."""

    remaining: Optional[Callable[[], float]] = None

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        if self.remaining is not None:
            self.settimeout(self.remaining())
        return super().recv_into(*arguments, **options)

    def sendall(self, *arguments: Any, **options: Any) -> None:
        if self.remaining is not None:
            self.settimeout(self.remaining())
        super().sendall(*arguments, **options)


class _HttpResponse(http.client.HTTPResponse):
    """A response that passes over what a server says in advance: 103 Early Hints and the like (RFC 9110, 15.2)."""

    fp: Any = None  # where a signal comes before http.client has set it, its end would say so on standard error

    def begin(self) -> None:
        super().begin()
        while 102 <= self.status < 200:
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()


class _Connection(urllib3.connection.HTTPSConnection):
    """urllib3's connection over the TLS that `Server` makes, with no proxy, no redirect, and nobody else's CAs."""

    response_class = _HttpResponse

    def __init__(self, server: Server) -> None:
        super().__init__(*server.address)
        self._server = server

    def connect(self) -> None:
        """Opens it; `request` does, too. Raises what `Server.tls` raises."""
        self.sock = self._server.tls()

    def response(self) -> urllib3.HTTPResponse:
        """The response, whose body has not been read: urllib3's 1.26 returns that of `http.client`."""
        raw = http.client.HTTPConnection.getresponse(self)  # in both series
        return urllib3.HTTPResponse(
            body=raw,
            headers=raw.headers.items(),  # type: ignore[arg-type]  # one that comes twice included
            status=raw.status,
            preload_content=False,
            decode_content=False,
            original_response=raw,
            enforce_content_length=True,  # the default only since urllib3 2
        )


def _cause(error: BaseException) -> BaseException:
    """What really happened, where urllib3 has put it into an error of its own, or into several."""
    while isinstance(error, exceptions.HTTPError) and not isinstance(error, http.client.IncompleteRead):
        if error.__context__ is None:
            break
        error = error.__context__
    return error


def look_up(host: str, port: int, remaining: Callable[[], float]) -> list[Any]:
    """The addresses of `host`. Raises OSError; TimeoutError where the resolver is too slow.

    `remaining`: tells the seconds until the time limit. getaddrinfo(3) has no time limit and can't be interrupted: it
    gets a thread of its own, which ends with us.
    """
    name = host.encode("ascii")  # as bytes: for a text Python loads its codec for international names
    try:
        return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name, then
    found: list[Any] = []

    def resolve() -> None:
        try:
            found.append(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM))
        except Exception as error:  # whatever it is, it is said in the run's own line
            found.append(error)

    thread = threading.Thread(target=resolve, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # too little memory, or too many threads
        raise OSError(None, "the system has no room for the name look-up") from None
    thread.join(remaining())
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise OSError(None, "name look-up failed: %s" % (getattr(found[0], "strerror", None) or found[0]))
    return list(found[0])


def connect_to_one(addresses: list[Any], remaining: Callable[[], float]) -> tuple[socket.socket, int]:
    """A TCP connection to the first of `addresses` that takes one, and which it is. Raises OSError.

    Each has its share of the time: a route that swallows everything must not cost the ones after it their chance.
    """
    problem = OSError(None, "the name has no address")
    for count, (family, kind, protocol, _, address) in enumerate(addresses):
        try:
            plain = socket.socket(family, kind, protocol)
        except OSError as error:
            problem = error
            continue
        try:
            plain.settimeout(remaining() / (len(addresses) - count))
            plain.connect(address)
            return plain, count
        except OSError as error:
            plain.close()
            # Not a ConnectionError: nobody has seen our certificate yet.
            late = isinstance(error, (socket.timeout, TimeoutError))
            problem = error if late else OSError(None, error.strerror or str(error))
        except BaseException:
            plain.close()
            raise
    raise problem


def seconds(date: Optional[str]) -> Optional[float]:
    """Seconds since 1970 of an HTTP date; None where it is none, or none that a file's time can be."""
    try:
        parsed = email.utils.parsedate_tz(date) if date else None
        moment = None if parsed is None else calendar.timegm(parsed[:9]) - (parsed[9] or 0)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return moment if moment is not None and 0 <= moment <= END_OF_9999 else None


def _retry_after(value: Optional[str], date: Optional[str]) -> Optional[int]:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3), which may also be a date; at most a day."""
    value = (value or "").strip()
    if value.isascii() and value.isdigit():
        return min(int(value[:9]), MAXIMUM_WAIT)
    until, now = seconds(value), seconds(date)
    if until is None or now is None:  # by the server's clock, or not at all: ours may be wrong
        return None
    return int(min(max(0.0, until - now), MAXIMUM_WAIT))


def _problem(content_type: Optional[str], body: bytes) -> dict[str, Any]:
    if (content_type or "").partition(";")[0].strip().lower() != "application/problem+json":
        return {}
    try:
        problem = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return problem if isinstance(problem, dict) else {}
