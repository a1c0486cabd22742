"""The Caramel protocol over pinned TLS: one request, one response, never longer than the time limit.

urllib3 does HTTP: connections, bodies, lengths, chunks, early ends. Responsible for getting a response, and for who
may have given it. Leaves to others what the response means for the identity.
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
from typing import Any, NamedTuple, Optional, TypeVar

import urllib3
from urllib3 import exceptions
from urllib3.util import SKIP_HEADER

from . import __version__
from .errors import Refused, Unreachable, Untrusted, printable
from .identity import Identity, utc
from .trust import Trust, show

MAXIMUM_BODY = 65536  # bytes
MAXIMUM_WAIT = 86400  # seconds; a Retry-After of a broken server must not keep a device away for years
NOT_YET_VALID, HAS_EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_*, see X509_STORE_CTX_get_error(3)
# What TLS front ends say to a client certificate that they don't like: nginx 400, others 401 or 403.
CERTIFICATE_REFUSALS = (400, 401, 403)
_T = TypeVar("_T")
END_OF_9999 = 253402300799  # the last second that an HTTP date can tell (RFC 9110, 5.6.7)


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
    def read(cls, raw: Any, conditional: bool) -> Response:
        """Reads a response of urllib3 to its end. Raises `Refused`, OSError, what urllib3 raises."""
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
        self._not_after = ""  # of the server's own certificate, as `ssl` tells it
        self._timeout = timeout
        self._deadline: Optional[float] = None
        self._addresses: list[Any] = []
        # A client ID has no character that would have to be quoted in a comment (RFC 9110, 5.6.5). Nobody compresses
        # for a client that says nothing of it, which saves a line on a link that costs by the byte.
        agent = "caramel-embedded/%s (%s)" % (__version__, client_id)
        self._headers = {"User-Agent": agent, "Accept-Encoding": SKIP_HEADER}
        self._shown: Optional[Identity] = None
        self._pool: Any = None
        self._requests = 0  # on the connection that is open
        self._dates = True  # whether OpenSSL looks at them

    def reach(self) -> None:
        """Makes sure that the server is there, and can be trusted. Raises `Unreachable`, `Untrusted`."""
        self._open(None)
        self._persistently(lambda: self._pool.connect())

    def get(self, request_hash: str, since: Optional[float], shown: Optional[Identity]) -> Response:
        """Asks for the certificate of the request. `since`: what it has to be newer than, seconds since 1970, UTC.

        `shown`: the identity to show as client certificate if the server wants one. Where the server refuses it, asks
        once more without it, and without `since`: the other side doesn't seem to think much of what we have.
        Raises `Unreachable`, `Untrusted`, `Refused`.
        """
        headers = {}
        if since is not None and 0 <= since <= END_OF_9999:
            headers["If-Modified-Since"] = email.utils.formatdate(since, usegmt=True)
        if self._pool is None:
            self._open(shown)
        try:
            response = self._ask("GET", request_hash, None, headers)
        except _Dropped:
            if self._shown is None:
                raise
            self.say("the server dropped the connection: once more without client certificate")
        else:
            refused = response.status in CERTIFICATE_REFUSALS and not response.from_caramel
            if self._shown is None or not refused:
                return response
            self.say("the server refused the request: once more without client certificate")
        self._open(None)
        return self._ask("GET", request_hash, None, {})

    def post(self, request_hash: str, request: bytes) -> Response:
        """Sends the request for a certificate. Raises `Unreachable`, `Untrusted`, `Refused`."""
        return self._ask("POST", request_hash, request, {})

    @property
    def certificate_end(self) -> float:
        """When the certificate that the server has shown ends, seconds since 1970, UTC."""
        return ssl.cert_time_to_seconds(self._not_after)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside, the making of a key say, costs none of the time limit."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._deadline is not None:
                self._deadline += time.monotonic() - began

    def close(self) -> None:
        """Ends the conversation; may be called at any time."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def left(self) -> float:
        """Seconds until the time limit. Raises TimeoutError when it has passed."""
        assert self._deadline is not None, "connect() comes first"
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def tcp(self) -> socket.socket:
        """A TCP connection to the first of the server's addresses that takes one. Raises OSError."""
        if not self._addresses:
            self._addresses = look_up(*self.address, self.left)
        connected, which = connect_to_one(self._addresses, self.left)
        # The next connection goes where this one went: an address that swallows everything costs its time once.
        self._addresses.insert(0, self._addresses.pop(which))
        return connected

    def _open(self, shown: Optional[Identity]) -> None:
        """Makes ready for a new connection, which the next request opens."""
        self.close()
        if self._deadline is None:
            # Only now: what went before, the making of a key say, has not waited on the network.
            self._deadline = time.monotonic() + self._timeout
        self._dates = self._dates and not self.trust.clock_is_behind
        context = self.trust.context(self._dates)
        context.sslsocket_class = _Socket
        self._shown = shown
        if shown is not None:
            reason = show(shown, context)
            if reason:
                self.say("the client certificate can't be shown, %s: going on without" % reason)
                self._shown = None
        # What urllib3 would do by itself and must not: wait for ever or its own time (each wait of ours is bounded by
        # the time limit instead), and trust the system's CAs (Debian's build gives `ca_certs` another default).
        # Retries, redirects and decoding are turned off in `_ask`; a pool by itself knows no proxies.
        self._pool = _Pool(
            *self.address, maxsize=1, timeout=None, retries=False, ssl_context=context, ca_certs=None, server=self
        )
        self._requests = 0

    def certify(self, tls: ssl.SSLSocket) -> None:
        """Looks at the dates of the server's certificates where OpenSSL didn't. Raises `Untrusted`, OSError."""
        told = tls.getpeercert()
        assert told, "CERT_REQUIRED"
        self._not_after = str(told["notAfter"])
        self.say("connected to %s:%d, %s" % (*self.address, tls.version()))
        if self._dates:
            return
        from . import certificates  # costs as much as all else: only where the clock is behind

        anchors = certificates.anchors(self.trust, of_server=True)
        own = tls.getpeercert(binary_form=True) or b""
        try:
            try:
                certificates.verify_server([own], anchors, self.trust.now())
            except certificates.Unusable:
                # It has intermediates, then. The handshake has looked at them, but not at their ends.
                with self.tcp() as connected:
                    sent = certificates.chain_sent(connected, self.address[0], self.left)
                certificates.verify_server([own, *sent[1:]], anchors, self.trust.now())
        except certificates.Unusable as reason:
            raise Untrusted("the certificate of %s:%d %s" % (*self.address, reason)) from None

    def _ask(self, method: str, path: str, body: Optional[bytes], headers: dict[str, str]) -> Response:
        response = self._persistently(lambda: self._asked_once(method, path, body, headers))
        self.say("%s: %s, %d bytes" % (method, response, len(response.body)))
        return response

    def _persistently(self, act: Callable[[], _T]) -> _T:
        """Does something on the connection; on a new one where that can help, and that is once for each reason."""
        while True:
            try:
                return self._guarded(act)
            except _Early as early:
                if not self._dates:
                    raise
                self.say("%s: looking at ends only" % early)
                self._dates = False
            except _Dropped as dropped:
                # A server may close a connection that it has answered on at any time (RFC 9112, 9.3.1 and 9.5).
                if self._requests < 2:
                    raise
                self.say("%s: once more on a new connection" % dropped)
            self._open(self._shown)

    def _asked_once(self, method: str, path: str, body: Optional[bytes], headers: dict[str, str]) -> Response:
        self._requests += 1
        raw = self._pool.urlopen(
            method,
            "/" + path,
            body=body,
            headers={**self._headers, **headers},
            retries=False,
            redirect=False,
            preload_content=False,
            decode_content=False,
            enforce_content_length=True,  # the default only since urllib3 2
        )
        response = Response.read(raw, "If-Modified-Since" in headers)
        raw.release_conn()
        return response

    def _guarded(self, act: Callable[[], _T]) -> _T:
        """Does something on the connection, and says in our own terms what went wrong."""
        name = "%s:%d" % self.address
        try:
            return act()
        except (exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            problem = _cause(error)
        if isinstance(problem, ssl.SSLCertVerificationError):
            if problem.verify_code == NOT_YET_VALID:
                raise _Early("the certificate of %s has not begun by this device's clock" % name)
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
            raise _Dropped("%s broke the connection off: %s" % (name, printable(str(reason))))
        if isinstance(problem, OSError):
            raise Unreachable("%s can't be reached: %s" % (name, problem.strerror or problem))
        if isinstance(problem, http.client.IncompleteRead):
            raise Unreachable("the connection broke in the middle of the response")
        raise Refused("the response from %s is not HTTP: %s" % (name, printable(repr(problem))))


class _Dropped(Unreachable):
    """The other side ended the connection; a client certificate can be the reason."""


class _Early(Untrusted):
    """OpenSSL refuses a certificate only because its time hasn't begun by this device's clock."""


class _Socket(ssl.SSLSocket):
    """A TLS socket whose every wait ends at the run's time limit, and not a number of seconds after the last byte."""

    server: Optional[Server] = None

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        if self.server is not None:
            self.settimeout(self.server.left())
        return super().recv_into(*arguments, **options)

    def sendall(self, *arguments: Any, **options: Any) -> None:
        if self.server is not None:
            self.settimeout(self.server.left())
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
    """urllib3's connection, to the pinned server and within the time limit."""

    response_class = _HttpResponse

    def __init__(self, *arguments: Any, server: Server, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._server = server

    def _new_conn(self) -> socket.socket:
        plain = self._server.tcp()
        # One write a request: without this a second small one waits for the other side's delayed ACK.
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.settimeout(self._server.left())
        return plain

    def connect(self) -> None:
        super().connect()
        tls = self.sock
        assert isinstance(tls, _Socket)
        tls.server = self._server
        try:
            self._server.certify(tls)
        except BaseException:
            self.close()
            raise


class _Pool(urllib3.HTTPSConnectionPool):
    """A pool of the one connection, which can be opened before there is anything to ask."""

    ConnectionCls = _Connection

    def connect(self) -> None:
        connection = self._get_conn()
        try:
            connection.connect()
        finally:
            self._put_conn(connection)


def _cause(error: BaseException) -> BaseException:
    """What really happened, where urllib3 has put it into an error of its own, or into several."""
    while isinstance(error, exceptions.HTTPError) and not isinstance(error, http.client.IncompleteRead):
        inner = [argument for argument in error.args if isinstance(argument, Exception)]
        if not inner:
            break
        error = inner[-1]
    return error


def look_up(host: str, port: int, left: Callable[[], float]) -> list[Any]:
    """The addresses of `host`. Raises OSError; TimeoutError where the resolver is too slow.

    `left`: tells the seconds until the time limit. getaddrinfo(3) has no time limit and can't be interrupted: it gets
    a thread of its own, which ends with us.
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
    thread.join(left())
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise OSError(None, "name look-up failed: %s" % (getattr(found[0], "strerror", None) or found[0]))
    return list(found[0])


def connect_to_one(addresses: list[Any], left: Callable[[], float]) -> tuple[socket.socket, int]:
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
            plain.settimeout(left() / (len(addresses) - count))
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
