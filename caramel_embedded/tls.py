"""TLS to one address: whom to believe, what to show, and never more seconds or bytes than a run may take.

OpenSSL doesn't wait here. It gets what has come in from memory, and leaves there what is to go out (`ssl.MemoryBIO`):
inside of one of its calls no time limit and no signal handler of Python's counts, and whoever answers, without any
certificate, could keep it there for as long as he sends (HelloRequest messages in the place of a ServerHello; tickets
and key updates later). Knows nothing of HTTP. Leaves to ``certificates`` what needs an X.509 library.
"""

from __future__ import annotations

import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Optional, TypeVar, cast

from . import pem
from .errors import KeyUnusable, Refused, UsageError
from .identity import Identity
from .trust import NO_CHECK_TIME, PARTIAL_CHAIN, Trust

_T = TypeVar("_T")
MAXIMUM_BYTES = 262144  # from the network, in one run: far more than all that a Caramel server can have to say
RECORD = 16384  # bytes; RFC 8446, 5.1
# For TLS 1.2; those of 1.3 are not up to this. Forward secret and authenticated only (RFC 9325, 4.2), which also
# makes the greeting shorter.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
# OpenSSL 3.5 sends a share of X25519MLKEM768 with each greeting, 1.2 kB, and gets 1.1 kB back.
POST_QUANTUM = ssl.OPENSSL_VERSION_INFO >= (3, 5)
TLSEXT_PADDING = ssl.Options(0x10)  # OpenSSL's SSL_OP_TLSEXT_PADDING, part of SSL_OP_ALL, which `ssl` sets


class Limits:
    """What one run may take of the network, over all of its connections: so many seconds, so many bytes."""

    def __init__(self, timeout: float) -> None:
        """`timeout`: seconds from `start` on."""
        self._timeout = timeout
        self._deadline: Optional[float] = None
        self._bytes = 0

    def start(self) -> None:
        """From now on the time counts; not what went before, the making of a key say. Once only."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._timeout

    def remaining(self) -> float:
        """Seconds until the time limit. Raises TimeoutError when it has passed."""
        assert self._deadline is not None, "start() comes first"
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside, the making of a key say, costs none of the time."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._deadline is not None:
                self._deadline += time.monotonic() - began

    @contextmanager
    def share(self, count: int) -> Iterator[None]:
        """What is done inside has one of `count` equal shares of the time that remains. Raises TimeoutError."""
        whole = self._deadline
        self._deadline = time.monotonic() + self.remaining() / count
        try:
            yield
        finally:
            self._deadline = whole

    def bounded(self, act: Callable[..., _T], *arguments: Any) -> _T:
        """What `act` returns. Raises what it raises, and TimeoutError.

        For what waits inside of a library, where no time limit counts and no signal handler runs: it gets a thread of
        its own, which ends with the process.
        """
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome[:] = [act(*arguments), None]
            except BaseException as error:
                outcome[:] = [None, error]

        thread = threading.Thread(target=work, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # too little memory, or too many threads
            raise OSError(None, "the system has no room for a thread") from None
        thread.join(self.remaining())
        if not outcome:
            raise TimeoutError
        result, error = outcome
        if error is not None:
            raise error
        return cast(_T, result)

    def by_chip(self, act: Callable[..., _T], *arguments: Any) -> _T:
        """`bounded`, for what a chip that holds a key takes part in: it may hang. Raises `KeyUnusable` then."""
        try:
            return self.bounded(act, *arguments)
        except TimeoutError:
            raise KeyUnusable("the chip that holds the key gave no answer within the time limit") from None

    def count(self, received: int) -> None:
        """Takes note of so many bytes that have come in. Raises `Refused` where they are too many."""
        self._bytes += received
        if self._bytes > MAXIMUM_BYTES:
            raise Refused("more than %d bytes came from the network" % MAXIMUM_BYTES)


def directly(act: Callable[..., _T], *arguments: Any) -> _T:
    """What `act` returns."""
    return act(*arguments)


class Tcp:
    """A TCP connection whose every wait ends in time, and whose every byte that comes in is counted."""

    def __init__(self, address: tuple[Any, ...], limits: Limits) -> None:
        """`address`: as getaddrinfo(3) tells it. Raises OSError; never a ConnectionError, since nobody has seen our
        certificate yet."""
        family, kind, protocol, _, where = address
        self._limits = limits
        self._socket = socket.socket(family, kind, protocol)
        try:
            self._socket.settimeout(limits.remaining())
            self._socket.connect(where)
            # One write a request: without this a second small one waits for the other side's delayed ACK.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except ConnectionError as error:
            self.close()
            raise OSError(None, error.strerror) from None
        except BaseException:
            self.close()
            raise

    def receive(self) -> bytes:
        """What comes next; nothing at the end of the connection. Raises `Refused`, OSError."""
        self._socket.settimeout(self._limits.remaining())
        data = self._socket.recv(RECORD)
        self._limits.count(len(data))
        return data

    def send(self, data: bytes) -> None:
        """Raises OSError."""
        self._socket.settimeout(self._limits.remaining())
        self._socket.sendall(data)

    def close(self) -> None:
        """May be called at any time."""
        self._socket.close()


class Tls:
    """A TLS connection, in as much of a socket's form as `http.client` wants.

    Attributes: peer: the server's certificate as `ssl` tells it; der: the same in DER; version: "TLSv1.3", ...
    """

    def __init__(self, tcp: Tcp, context: ssl.SSLContext, host: str, call: Callable[..., Any]) -> None:
        """`call`: calls OpenSSL. Raises `Refused`, OSError, of which ssl.SSLError is one; leaves `tcp` open then."""
        self._tcp = tcp
        self._call = call
        self._files, self._closing = 0, False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        # The name as bytes: for a text `ssl` loads Python's codec for international names.
        name = host.encode("ascii")
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        self._drive(self._session.do_handshake)
        self.peer: dict[str, Any] = self._session.getpeercert() or {}
        self.der = self._session.getpeercert(binary_form=True) or b""
        self.version = self._session.version()

    def sendall(self, data: bytes) -> None:
        """Sends all of it. Raises OSError."""
        while data:
            data = data[self._drive(self._session.write, data) :]

    def makefile(self, *_: Any) -> io.BufferedReader:
        """What comes in, as a file."""
        self._files += 1
        return io.BufferedReader(_Incoming(self))

    def release(self) -> None:
        """A file of `makefile` is closed."""
        self._files -= 1
        if self._closing:
            self.close()

    def receive_into(self, buffer: Any) -> int:
        """Reads some bytes; none at the end of the connection. Raises `Refused`, OSError."""
        try:
            return int(self._drive(self._session.read, len(buffer), buffer))
        except ssl.SSLEOFError:  # as `ssl.SSLSocket` has it: whether something is missing, HTTP knows
            return 0

    def settimeout(self, _: Any) -> None:
        """Each wait has the time that the run has."""

    def close(self) -> None:
        """Ends the connection, as soon as nobody reads from it any more: `http.client` closes its socket before the
        body is read, where that goes on to the end of the connection. May be called at any time."""
        self._closing = True
        if not self._files:
            self._tcp.close()

    def _drive(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """What `act` returns, as soon as it has all that it needs from the other side."""
        while True:
            try:
                result = self._call(act, *arguments)
                self._flush()
                return result
            except ssl.SSLWantReadError:
                self._flush()
            except ssl.SSLError:
                with suppress(OSError):
                    self._flush()  # the other side's log says why, too: an alert
                raise
            data = self._tcp.receive()
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._tcp.send(self._outgoing.read())


class _Incoming(io.RawIOBase):
    """What comes in on a connection."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._tls.receive_into(buffer)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._tls.release()


def client_context(trust: Trust, dates: bool, small: bool = False) -> ssl.SSLContext:
    """A TLS client's context that believes the trust anchors of the server and nobody else.

    `dates`: whether OpenSSL looks at them; where it doesn't, whoever connects has to. `small`: P-256 is the only key
    exchange. Raises `UsageError`.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and name; loads no system CA
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Up to 255 bytes of zeros in every greeting, for the sake of load balancers of 2013 (RFC 7685).
    context.options &= ~TLSEXT_PADDING
    context.set_ciphers(CIPHERS)
    if small:
        if hasattr(context, "set_groups"):  # Python 3.15
            context.set_groups("P-256")
        else:
            context.set_ecdh_curve("prime256v1")
    context.verify_flags |= ssl.VerifyFlags(PARTIAL_CHAIN | (0 if dates else NO_CHECK_TIME))
    # Apache asks for a client certificate when it has read the path (RFC 8446, 4.6.2); 4 bytes of the greeting.
    context.post_handshake_auth = True
    try:
        context.load_verify_locations(cadata=b"\n".join(pem.certificates(trust.ca_cert)).decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise UsageError("a certificate of the CA can't be read: %s" % error) from None
    return context


def show(identity: Identity, context: ssl.SSLContext, call: Callable[..., Any] = directly) -> Optional[str]:
    """Makes `context` show the identity; why that can't be done, None where it was. `call`: calls OpenSSL."""
    try:
        call(identity.load_into, context)
    except OSError as error:  # ssl.SSLError is one
        return str(getattr(error, "reason", None) or error.strerror or error)
    return None
