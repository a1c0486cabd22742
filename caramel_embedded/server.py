"""The Caramel protocol over pinned TLS: one request, one response or one error, never longer than the time limit.

urllib3 does HTTP on the one connection: requests, bodies, lengths, chunks, early ends. ``tls`` does TLS. Responsible
for getting a response, and for who may have given it. Leaves to ``enrollment`` what is asked next.
"""

from __future__ import annotations

import calendar
import datetime
import email.utils
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any, NamedTuple, Optional

import urllib3
from urllib3 import exceptions
from urllib3.util import SKIP_HEADER

from . import __version__, pem
from .errors import CaramelError, Refused, Unreachable, Untrusted, printable
from .identity import Identity, utc
from .settings import host_and_port
from .tls import POST_QUANTUM, Limits, Tcp, Tls, client_context, directly, show
from .trust import Trust

MAXIMUM_BODY = 65536  # bytes
MAXIMUM_WAIT = 86400  # seconds; a Retry-After of a broken server must not keep a device away for years
NOT_YET_VALID, HAS_EXPIRED = 9, 10  # OpenSSL's X509_V_ERR_*, see X509_STORE_CTX_get_error(3)
MISMATCHES = (62, 64)  # of a host name, of an address
STRANGERS = (2, 7, 18, 19, 20, 21)  # nothing trusted has signed the chain
# What TLS front ends say to a client certificate that they don't like: nginx 400, others 401 or 403.
CERTIFICATE_REFUSALS = (400, 401, 403)
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
END_OF_9999 = 253402300799  # the last second that an HTTP date can tell (RFC 9110, 5.6.7)


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
            _retry_after(raw.headers.getlist("Retry-After"), raw.headers.get("Date")),
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
        self,
        address: tuple[str, int],
        trust: Trust,
        client_id: str,
        timeout: float,
        say: Callable[[str], None],
        groups: str = "small",
    ) -> None:
        """`timeout`: seconds for everything that waits on the network, name look-up included, from `connect` on.

        `groups`: the key exchanges to offer, as in the settings.
        """
        self.address = address
        self.name = host_and_port(address)
        self.trust = trust
        self.say = say
        self._limits = Limits(timeout)
        self._small = groups == "small"
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
        self._limits.start()
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
            # Not `formatdate`, which asks the C library: it ends in 2038 where `time_t` has 32 bits.
            moment = EPOCH + datetime.timedelta(seconds=int(since))
            headers["If-Modified-Since"] = email.utils.format_datetime(moment, usegmt=True)
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
        except CaramelError:
            self.close()
            raise
        except (exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            self.close()
            kind, words = in_our_terms(error)
            raise kind("%s %s" % (self.name, words)) from None

    def close(self) -> None:
        """Ends the connection; may be called at any time."""
        self._connection.close()

    def pause(self) -> AbstractContextManager[None]:
        """What is done inside, the making of a key say, costs none of the time limit."""
        return self._limits.pause()

    # --- TLS ---

    @property
    def certificate_end(self) -> float:
        """When the certificate that the server has shown ends, seconds since 1970, UTC."""
        return ssl.cert_time_to_seconds(self._not_after)

    def tls(self) -> Tls:
        """A TLS connection, authenticated, to the first of the server's addresses with which a handshake ends well.

        Each has its share of the time: an address that takes TCP and then no TLS (the common broken IPv6), or another
        server's, must not cost the ones after it their chance. Raises `Unreachable`, `Untrusted`, `UsageError`.
        """
        self._addresses = self._addresses or look_up(*self.address, self._limits)
        problems: dict[str, tuple[type[CaramelError], str]] = {}
        for which, address in enumerate(self._addresses):
            try:
                with self._limits.share(len(self._addresses) - which):
                    tls = self._authenticated(address)
            except (OSError, Untrusted) as error:
                problems[address[4][0]] = in_our_terms(error)
                continue
            # The next connection goes where this one went: an address that swallows everything costs its time once.
            self._addresses.insert(0, self._addresses.pop(which))
            self._not_after = str(tls.peer["notAfter"])
            self.say("connected to %s, %s" % (self.name, tls.version))
            return tls
        raise _none_of(self.name, problems)

    def _authenticated(self, address: Any) -> Tls:
        """OpenSSL looks at every date where the clock is believed. What fails there for being early is looked at
        without: then an end counts by the best known time, and a beginning not at all."""
        if not self.trust.clock_is_behind:
            try:
                return self._with_groups(address, dates=True)
            except ssl.SSLCertVerificationError as error:
                if error.verify_code != NOT_YET_VALID:
                    raise
            self.say("a certificate of the server has not begun by this device's clock: looking at ends only")
        tls = self._with_groups(address, dates=False)
        try:
            self._verify_ends(address, tls)
        except BaseException:
            tls.close()
            raise
        return tls

    def _with_groups(self, address: Any, dates: bool) -> Tls:
        """A handshake with P-256 alone, if that is asked for. A server that doesn't know that one group, which all
        have to (RFC 8446, 9.1), is told from other failures: with all that OpenSSL has, the handshake ends well."""
        small = self._small and POST_QUANTUM
        try:
            return self._handshake(address, dates, small)
        except ssl.SSLError as error:
            if not small or not str(getattr(error, "reason", "")).endswith("ALERT_HANDSHAKE_FAILURE"):
                raise
            try:
                self._handshake(address, dates, small=False).close()
            except OSError:
                raise error from None
        raise OSError(None, "it takes no key exchange with P-256: --groups default (CARAMEL_GROUPS=default) helps")

    def _handshake(self, address: Any, dates: bool, small: bool) -> Tls:
        context, call = client_context(self.trust, dates, small), directly
        if self._identity is not None:
            call = directly if self._identity.holder == "software" else self._limits.by_chip
            reason = show(self._identity, context, call)
            if reason:
                self.say("the client certificate can't be shown, %s: going on without" % reason)
                self._identity, self.shows_certificate = None, False
        tcp = Tcp(address, self._limits)
        try:
            return Tls(tcp, context, self.address[0], call)
        except BaseException as error:
            tcp.close()
            if isinstance(error, ssl.SSLCertVerificationError):
                if error.verify_code == HAS_EXPIRED:
                    _look_at_clock(context)
                elif error.verify_code != NOT_YET_VALID:
                    reason = in_our_terms(error)[1].rstrip(".")
                    raise Untrusted(reason + self._shown(address, error.verify_code)) from None
            raise

    def _shown(self, address: Any, code: int) -> str:
        """What a server shows that is not believed, for a person; empty where it can't be told.

        Seen in one more handshake, within the limits, in which our own certificate isn't shown and nothing is sent.
        """
        try:
            from . import certificates  # costs as much as all else

            if code in STRANGERS:
                sent = certificates.chain_sent(Tcp(address, self._limits), self.address[0])
                return "; it shows %s, and trusted is %s" % (
                    certificates.label([ssl.DER_cert_to_PEM_cert(one).encode() for one in sent]),
                    " or ".join(certificates.label([one]) for one in pem.certificates(self.trust.ca_cert)),
                )
            if code not in MISMATCHES:
                return ""
            with closing(Tcp(address, self._limits)) as tcp:
                context = client_context(self.trust, dates=False)
                context.check_hostname = False
                peer = Tls(tcp, context, self.address[0], directly).peer
            # Names of other kinds can be tuples of tuples.
            names = [value for kind, value in peer.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
            listed = printable(", ".join(names)) or "none"
            return "; the trusted CA does vouch for the server, for other names: %s" % listed
        except (OSError, ValueError, ImportError, CaramelError):
            return ""

    def _verify_ends(self, address: Any, tls: Tls) -> None:
        """Looks at the ends of the server's certificates, which OpenSSL didn't. Raises `Untrusted`, OSError."""
        from . import certificates  # costs as much as all else: only where the clock is behind

        anchors = certificates.anchors(self.trust, of_server=True)
        try:
            try:
                certificates.verify_server([tls.der], anchors, self.trust.now())
            except certificates.InvalidCertificate:
                # It has intermediates, then. The handshake has looked at them, but not at their ends.
                sent = certificates.chain_sent(Tcp(address, self._limits), self.address[0])
                certificates.verify_server([tls.der, *sent[1:]], anchors, self.trust.now())
        except certificates.InvalidCertificate as reason:
            raise Untrusted("shows a certificate that %s" % reason) from None


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


def in_our_terms(error: BaseException) -> tuple[type[CaramelError], str]:
    """The kind of error that it is to a caller, and what has to be said of the server."""
    while isinstance(error, exceptions.HTTPError) and not isinstance(error, http.client.IncompleteRead):
        # What really happened, where urllib3 has put it into an error of its own, or into several.
        if error.__context__ is None:
            break
        error = error.__context__
    if isinstance(error, Untrusted):
        return Untrusted, str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        clock = ""
        if error.verify_code == HAS_EXPIRED:
            clock = ", and it is %s by this device's clock" % utc(time.time())
        said = "can't show a certificate that the trusted CA vouches for: %s%s" % (error.verify_message, clock)
        return Untrusted, said
    if isinstance(error, (TimeoutError, socket.timeout, exceptions.TimeoutError)):
        return Unreachable, "gave no answer within the time limit"
    if isinstance(error, (ConnectionError, ssl.SSLError)):
        reason = getattr(error, "reason", None) or error.strerror or error
        return ConnectionLost, "broke the connection off: %s" % printable(str(reason))
    if isinstance(error, OSError):
        return Unreachable, "can't be reached: %s" % (error.strerror or error)
    if isinstance(error, http.client.IncompleteRead):
        return Unreachable, "broke the connection off in the middle of the response"
    return Refused, "gave a response that is not HTTP: %s" % printable(repr(error))


def _look_at_clock(context: ssl.SSLContext) -> None:
    """Raises `Untrusted` if the trusted CA itself has ended by this device's clock, which no other date can mend."""
    end = max(ssl.cert_time_to_seconds(str(anchor["notAfter"])) for anchor in context.get_ca_certs())
    if end < time.time():
        raise Untrusted(
            "can't be believed, because the trusted CA ended at %s, and it is %s by this device's clock: "
            "the clock is far ahead, or the device needs another CA" % (utc(end), utc(time.time()))
        )


def _none_of(name: str, problems: dict[str, tuple[type[CaramelError], str]]) -> CaramelError:
    """The error of a server none of whose addresses will do; each has its own reason."""
    kinds = {kind for kind, _ in problems.values()}
    # The first one can mean that the client certificate isn't wanted, the second one that somebody is in between.
    kind = next((kind for kind in (ConnectionLost, Untrusted) if kind in kinds), Unreachable)
    if len({words for _, words in problems.values()}) == 1:
        problems = {name: next(iter(problems.values()))}
        name = ""
    each = "; ".join("%s %s" % (address, words) for address, (_, words) in problems.items())
    return kind("%s: %s" % (name, each) if name else each)


def look_up(host: str, port: int, limits: Limits) -> list[Any]:
    """The addresses of `host`. Raises OSError; TimeoutError where the resolver is too slow.

    getaddrinfo(3) has no time limit and can't be interrupted.
    """
    name = host.encode("ascii")  # as bytes: for a text Python loads its codec for international names
    try:
        return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        pass  # a name, then

    def resolve() -> Any:
        try:
            return socket.getaddrinfo(name, port, type=socket.SOCK_STREAM) or "the name has no address"
        except Exception as error:  # whatever it is, it is said in the run's own line
            return getattr(error, "strerror", None) or str(error)

    found = limits.bounded(resolve)
    if isinstance(found, str):
        raise OSError(None, "name look-up failed: " + found)
    return list(found)


def seconds(date: Optional[str]) -> Optional[float]:
    """Seconds since 1970 of an HTTP date; None where it is none, or none that a file's time can be."""
    try:
        parsed = email.utils.parsedate_tz(date) if date else None
        moment = None if parsed is None else calendar.timegm(parsed[:9]) - (parsed[9] or 0)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return moment if moment is not None and 0 <= moment <= END_OF_9999 else None


def _retry_after(values: list[str], date: Optional[str]) -> Optional[int]:
    """Seconds of a Retry-After header (RFC 9110, 10.2.3), which may also be a date; at most a day.

    The larger one where a server and a proxy each have said one.
    """
    waits = [wait for value in values if (wait := _wait(value.strip(), date)) is not None]
    return max(waits, default=None)


def _wait(value: str, date: Optional[str]) -> Optional[int]:
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
