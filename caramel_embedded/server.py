"""The Caramel protocol over pinned TLS: one question, one answer, never longer than the time limit.

Responsible for getting an answer and saying what kind of an answer it is. Leaves to others what the answer means for
the identity. HTTP is the standard library's ``http.client``: it follows no redirects, reads no proxy settings and
repeats nothing by itself.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time

from . import __version__
from .errors import Refused, Unreachable, Untrusted
from .trust import Facts, utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Callable, Optional

    from .identity import Identity
    from .trust import Trust

MAXIMUM_BODY = 65536  # bytes
NOT_YET_VALID, HAS_EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_*, see X509_STORE_CTX_get_error(3)
# What TLS front ends say to a client certificate that they don't like: nginx 400, others 401 or 403.
CERTIFICATE_REFUSALS = (400, 401, 403)


class Answer:
    """An answer of whoever is behind the server's name.

    Attributes: status; body (bytes); last_modified (seconds since 1970, UTC, or None); from_caramel: whether the
    application itself said it, and not a proxy in front of it; detail: its own words; conditional: whether a 304
    was asked for.
    """

    __slots__ = ("body", "conditional", "detail", "from_caramel", "last_modified", "status")

    def __init__(self, response: http.client.HTTPResponse, conditional: bool = False) -> None:
        """Reads `response` to its end. Raises `Refused`, OSError, http.client.HTTPException."""
        self.status = response.status
        self.conditional = conditional
        if response.getheader("Content-Encoding", "identity").lower() != "identity":
            raise Refused("the answer is compressed, though that was not asked for")
        lengths = set(response.headers.get_all("Content-Length", ()))
        if len(lengths) > 1 or not all(text.isascii() and text.isdigit() for text in lengths):
            raise Refused("the answer's length is not clear")
        self.body = b""
        while len(self.body) <= MAXIMUM_BODY:
            piece = response.read(MAXIMUM_BODY + 1 - len(self.body))
            if not piece:
                break
            self.body += piece
        if len(self.body) > MAXIMUM_BODY:
            raise Refused("the answer is longer than %d bytes" % MAXIMUM_BODY)
        # read(n) of http.client doesn't mind an end that comes too early. (A 204 or 304 has no body to miss.)
        if response.length and not response.chunked:
            raise Unreachable("the connection broke in the middle of the answer")
        self.last_modified = _seconds(response.getheader("Last-Modified"))
        self.from_caramel, self.detail = False, ""
        # Caramel's own errors are RFC 9457 documents that repeat the status. A page by a proxy is not.
        if response.headers.get_content_type() == "application/problem+json":
            import json

            try:
                problem = json.loads(self.body)
                self.from_caramel = problem["status"] == self.status
                self.detail = _printable(str(problem.get("detail") or problem.get("title") or ""))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                pass

    def __str__(self) -> str:
        return "status %d%s" % (self.status, ", " + self.detail if self.detail else "")


class Server:
    """One run's conversation with a Caramel server, over one connection where that is possible."""

    def __init__(
        self,
        address: tuple[str, int],
        trust: Trust,
        client_id: str,
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        """`timeout`: seconds for everything that waits on the network, name look-up included, from `connect` on."""
        self._address = address
        self._trust = trust
        self._timeout = timeout
        self._deadline: Optional[float] = None
        self._say = say
        # A client ID has no character that would have to be quoted in a comment (RFC 9110, 5.6.5).
        self._headers = {"User-Agent": "caramel-embedded/%s (%s)" % (__version__, client_id)}
        self._shown: Optional[Identity] = None
        self._connection: Optional[_Connection] = None

    def connect(self, shown: Optional[Identity]) -> None:
        """Opens a connection, with the identity `shown` as client certificate if the server wants one.

        Where the server drops the connection, opens one without it. Raises `Unreachable`, `Untrusted`.
        """
        try:
            self._open(shown)
        except _Dropped:
            if shown is None:
                raise
            self._say("the server dropped the connection: once more without client certificate")
            self._open(None)

    def _open(self, shown: Optional[Identity]) -> None:
        self.close()
        if self._deadline is None:
            # Only now: what went before, the making of a key say, has not waited on the network.
            self._deadline = time.monotonic() + self._timeout
        self._shown = shown
        self._connection = _Connection(self._address, self._trust, shown, self._deadline, self._say)
        self._guarded(self._connection.connect)

    def get(self, request_hash: str, since: Optional[float] = None) -> Answer:
        """Asks for the certificate of the request. `since`: what it has to be newer than, seconds since 1970, UTC.

        Where the server refuses the client certificate, asks once more without one, and without `since`: the other
        side has shown that it doesn't think much of what we have. Raises `Unreachable`, `Untrusted`, `Refused`.
        """
        headers = {}
        if since is not None and self._shown is not None:
            headers["If-Modified-Since"] = _http_date(since)
        try:
            answer = self._ask("GET", request_hash, None, headers)
        except _Dropped:
            if self._shown is None:
                raise
            self._say("the server dropped the connection: once more without client certificate")
        else:
            if self._shown is None or answer.from_caramel or answer.status not in CERTIFICATE_REFUSALS:
                return answer
            self._say("the server refused the request: once more without client certificate")
        self._open(None)
        return self._ask("GET", request_hash, None, {})

    def post(self, request_hash: str, request: bytes) -> Answer:
        """Sends the request for a certificate. Raises `Unreachable`, `Untrusted`, `Refused`."""
        return self._ask("POST", request_hash, request, {})

    def close(self) -> None:
        """Ends the conversation; may be called at any time."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, method: str, path: str, body: Optional[bytes], headers: dict[str, str]) -> Answer:
        connection = self._connection
        assert connection is not None, "connect() comes first"

        def ask() -> Answer:
            # Nobody compresses for a client that says nothing of it: saves a line on a link that costs by the byte.
            connection.putrequest(method, "/" + path, skip_accept_encoding=True)
            for name, value in {**self._headers, **headers}.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            return Answer(connection.getresponse(), "If-Modified-Since" in headers)

        answer: Answer = self._guarded(ask)
        self._say("%s: %s, %d bytes" % (method, answer, len(answer.body)))
        return answer

    def _guarded(self, act: Callable[[], Any]) -> Any:
        """Does something on the connection, and says in our own terms what went wrong."""
        name = "%s:%d" % self._address
        try:
            return act()
        except ssl.SSLCertVerificationError as error:
            clock = ""
            if error.verify_code in (NOT_YET_VALID, HAS_EXPIRED):
                clock = ", and it is %s by this device's clock" % utc(self._trust.clock)
            raise Untrusted(
                "%s can't show a certificate that the trusted CA vouches for: %s%s"
                % (name, error.verify_message, clock)
            ) from None
        except (socket.timeout, TimeoutError):
            raise Unreachable("no answer from %s within the time limit" % name) from None
        except (ConnectionError, ssl.SSLError) as error:
            reason = getattr(error, "reason", None) or error.strerror or error
            raise _Dropped("%s broke the connection off: %s" % (name, _printable(str(reason)))) from None
        except OSError as error:
            raise Unreachable("%s can't be reached: %s" % (name, error.strerror or error)) from None
        except (http.client.HTTPException, ValueError) as error:
            raise Refused("the answer from %s is not HTTP: %s" % (name, _printable(repr(error)))) from None


class _Dropped(Unreachable):
    """The other side ended the connection; a client certificate can be the reason."""


class _Socket(ssl.SSLSocket):
    """A TLS socket whose every wait ends at a point in time, and not a number of seconds after the last byte."""

    deadline = 0.0

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(*arguments, **options)

    def sendall(self, *arguments: Any, **options: Any) -> None:
        self.settimeout(_left(self.deadline))
        super().sendall(*arguments, **options)


class _Connection(http.client.HTTPConnection):
    """An HTTP connection that opens itself, again if need be, to the pinned server and within the time limit."""

    default_port = 443

    def __init__(
        self,
        address: tuple[str, int],
        trust: Trust,
        shown: Optional[Identity],
        deadline: float,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(*address)
        self._address = address
        self._trust = trust
        self._deadline = deadline
        self._say = say
        self._context = trust.context(shown)
        self._context.sslsocket_class = _Socket

    def connect(self) -> None:
        """Raises OSError, `Untrusted`."""
        host, port = self._address
        plain = _connected(_look_up(host, port, self._deadline), self._deadline)
        try:
            # One write a request: without this a second small one waits for the other side's delayed ACK.
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.settimeout(_left(self._deadline))
            secured = self._context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
        assert isinstance(secured, _Socket)
        secured.deadline = self._deadline
        self.sock = secured
        decoded = secured.getpeercert()
        assert decoded, "CERT_REQUIRED"
        reason = self._trust.why_not_in_date(Facts(dict(decoded)))
        if reason:
            self.close()
            raise Untrusted("the certificate of %s:%d %s" % (host, port, reason))
        self._say("connected to %s:%d, %s" % (host, port, secured.version()))


def _left(deadline: float) -> float:
    """Seconds until `deadline` on the monotonic clock. Raises TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _look_up(host: str, port: int, deadline: float) -> list[Any]:
    """The addresses of `host`. Raises OSError; TimeoutError where the resolver is too slow.

    getaddrinfo(3) has no time limit and can't be interrupted: it gets a thread of its own, which ends with us.
    """
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        pass  # a name, then
    found: list[Any] = []

    def resolve() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # UnicodeError too: what is no name in DNS
            found.append(error)

    thread = threading.Thread(target=resolve, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # too little memory, or too many threads
        raise OSError(None, "the system has no room for the name look-up") from None
    thread.join(_left(deadline))
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise OSError(None, "name look-up failed: %s" % (getattr(found[0], "strerror", None) or found[0]))
    addresses: list[Any] = found[0]
    return addresses


def _connected(addresses: list[Any], deadline: float) -> socket.socket:
    """A TCP connection to the first of `addresses` that takes one. Raises OSError.

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
            plain.settimeout(_left(deadline) / (len(addresses) - count))
            plain.connect(address)
            return plain
        except OSError as error:
            plain.close()
            # Not a ConnectionError: nobody has seen our certificate yet.
            late = isinstance(error, (socket.timeout, TimeoutError))
            problem = error if late else OSError(None, error.strerror or str(error))
        except BaseException:
            plain.close()
            raise
    raise problem


def _http_date(seconds: float) -> str:
    """Seconds since 1970 in the form of RFC 9110, 5.6.7."""
    import email.utils

    return email.utils.formatdate(seconds, usegmt=True)


def _seconds(date: Optional[str]) -> Optional[float]:
    """Seconds since 1970 of an HTTP date; None where it is none."""
    import calendar
    import email.utils

    try:
        parsed = email.utils.parsedate_tz(date) if date else None
        return None if parsed is None else calendar.timegm(parsed[:9]) - (parsed[9] or 0)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def _printable(text: str) -> str:
    """Somebody else's words, fit for one line of a log."""
    return "".join(c if c.isprintable() else "?" for c in text)[:200]
