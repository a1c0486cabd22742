"""A TLS server that says word for word what the test wrote down."""

from __future__ import annotations

import itertools
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Optional, Union

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from world.answers import Answer, HttpRequest
from world.processes import PATIENCE, Service


class Scripted(Service):
    """A TLS server that answers what the test wrote down, bytes as they are, and remembers what it was
    asked.

    `answers` is called with each request, or holds what is said to the first, second, ... request over all
    connections; the last one is said again and again. With `client_ca`, clients are asked for a certificate
    (one that isn't good ends the handshake with an alert), with `demand` as well it is demanded.
    `instead_of_tls` gets the raw socket in place of a handshake: see `silence`, `reset`. `pause` is the
    time between any two bytes of an answer. An answer that says `Connection: close`, or has no length, ends
    the connection; so does a request of HTTP/1.0, or one that says so.
    """

    def __init__(
        self,
        certificate: Path,
        answers: Union[Callable[[HttpRequest], Answer], Sequence[Answer]],
        *,
        client_ca: Optional[Path] = None,
        demand: bool = False,
        newest_tls: Optional[ssl.TLSVersion] = None,
        instead_of_tls: Optional[Callable[[socket.socket, threading.Event], None]] = None,
        pause: float = 0,
        host: str = "127.0.0.1",
    ) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(str(certificate))
        if client_ca:
            self.context.load_verify_locations(str(client_ca))
            self.context.verify_mode = ssl.CERT_REQUIRED if demand else ssl.CERT_OPTIONAL
        if newest_tls:
            self.context.maximum_version = newest_tls
        self.answers = answers
        self.instead_of_tls = instead_of_tls
        self.pause = pause
        self.host = host
        self.port = 0
        #: Requests in the order they came, and how many TCP connections and completed TLS handshakes there
        #: were.
        self.requests: list[HttpRequest] = []
        self.connections = 0
        self.handshakes = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: Optional[socket.socket] = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def start(self) -> None:
        self._listener = socket.create_server((self.host, self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._over.clear()
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        self._over.set()
        if self._listener:
            # Closing alone doesn't wake a thread that waits in accept(2).
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._threads.clear()

    def _spawn(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        for number in itertools.count(1):
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._spawn(self._serve, connection, number)

    def _serve(self, raw: socket.socket, number: int) -> None:
        # A duplicate, because wrapping takes the first one away, and this one has to be able to end it.
        handle = raw.dup()
        with self._lock:
            self._open.add(handle)
        connection = raw
        try:
            if self.instead_of_tls:
                self.instead_of_tls(raw, self._over)
                return
            connection = self.context.wrap_socket(raw, server_side=True)
            self.handshakes += 1
            self._converse(connection, number)
            # A close_notify, so that the end of an answer without a length can be told from a cut line.
            connection.settimeout(2)
            connection = connection.unwrap()
        except (OSError, ValueError):
            pass  # the client went away or refused us: what it says about that is what counts
        finally:
            with self._lock:
                self._open.discard(handle)
            handle.close()
            connection.close()

    def _converse(self, connection: ssl.SSLSocket, number: int) -> None:
        stream = connection.makefile("rb")
        while not self._over.is_set():
            asked = self._read(stream, connection, number)
            if not asked:
                return
            with self._lock:
                turn = len(self.requests)
                self.requests.append(asked)
            says = self.answers(asked) if callable(self.answers) else self.answers[min(turn, len(self.answers) - 1)]
            if says is None or not self._say(connection, says) or asked.headers.get("connection") == "close":
                return

    @staticmethod
    def _read(stream: Any, connection: ssl.SSLSocket, number: int) -> Optional[HttpRequest]:
        first = stream.readline().decode("latin-1").split()
        if len(first) < 2:
            return None
        headers: dict[str, str] = {}
        size = 0
        for line in iter(stream.readline, b""):
            size += len(line)
            if not line.strip():
                break
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        if first[2:] == ["HTTP/1.0"]:
            headers.setdefault("connection", "close")
        body = stream.read(int(headers.get("content-length", "0")))
        return HttpRequest(
            connection=number,
            method=first[0],
            path=first[1],
            headers=headers,
            body=body,
            client_certificate=connection.getpeercert(binary_form=True),
            received=size + len(body),
            tls=connection.version() or "",
        )

    def _say(self, connection: ssl.SSLSocket, says: Union[bytes, Iterable[Union[bytes, float]]]) -> bool:
        """Sends an answer; true if the connection can take another request."""
        head = b""
        for piece in [says] if isinstance(says, bytes) else says:
            if isinstance(piece, (int, float)):
                if self._over.wait(piece):
                    return False
                continue
            head = (head + piece)[:65536]
            if not self.pause:
                connection.sendall(piece)
                continue
            for byte in piece:
                connection.sendall(bytes([byte]))
                if self._over.wait(self.pause):
                    return False
        head = head.partition(b"\r\n\r\n")[0].lower()
        return b"connection: close" not in head and (
            b"content-length:" in head
            or b"transfer-encoding:" in head
            or b" 304" in head[:20]
            or b" 204" in head[:20]
        )


def silence(connection: socket.socket, over: threading.Event) -> None:
    """For `Scripted.instead_of_tls`: takes everything, says nothing, never ends."""
    connection.settimeout(0.2)
    while not over.is_set():
        with suppress(socket.timeout):
            if not connection.recv(65536):
                over.wait(0.2)


def hang_up(connection: socket.socket, over: threading.Event) -> None:
    """For `Scripted.instead_of_tls`: ends the connection in an orderly way at once."""


def reset(connection: socket.socket, over: threading.Event) -> None:
    """For `Scripted.instead_of_tls`: ends the connection with a TCP reset as soon as the client has said
    something.
    """
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # A shutdown would be an orderly end; the duplicate that ends this at the world's end has to be gone,
    # too.
    connection.close()


def hello_requests(connection: socket.socket, over: threading.Event) -> None:
    """For `Scripted.instead_of_tls`: in the place of a ServerHello, HelloRequest messages for ever. Who sends them
    needs no certificate; a TLS library passes over each (RFC 5246, 7.4.1.1) and reads on.
    """
    connection.recv(65536)
    _for_ever(connection, over, itertools.repeat(b"\x16\x03\x03\0\x04\0\0\0\0" * 100_000))


def session_tickets(certificate: Path) -> Callable[[socket.socket, threading.Event], None]:
    """For `Scripted.instead_of_tls`: a handshake of TLS 1.3, and then NewSessionTicket messages for ever."""

    def flood(connection: socket.socket, over: threading.Event) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(certificate))
        context.num_tickets = 0
        # No library sends as many: these are made here, with the key that the server's own records would have.
        with tempfile.NamedTemporaryFile("r") as keys:
            context.keylog_filename = keys.name
            with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as tls:
                tls.do_handshake()
                secrets = keys.read().split()
                secret = bytes.fromhex(secrets[secrets.index("SERVER_TRAFFIC_SECRET_0") + 2])
                with socket.socket(fileno=tls.detach()) as raw:
                    _for_ever(raw, over, _ticket_records(secret))

    return flood


def _ticket_records(secret: bytes) -> Iterator[bytes]:
    """Records of TLS_AES_256_GCM_SHA384 (RFC 8446, 5.2, 7.3) with some 900 tickets each."""

    def expand(name: bytes, size: int) -> bytes:
        label = size.to_bytes(2, "big") + bytes([6 + len(name)]) + b"tls13 " + name + b"\0"
        return HKDFExpand(hashes.SHA384(), size, label).derive(secret)

    key, vector = AESGCM(expand(b"key", 32)), int.from_bytes(expand(b"iv", 12), "big")
    tickets = (b"\x04\0\0\x0e" + b"\0" * 9 + b"\0\x01x" + b"\0\0") * 900 + b"\x16"
    head = b"\x17\x03\x03" + (len(tickets) + 16).to_bytes(2, "big")
    for number in itertools.count():
        yield head + key.encrypt((vector ^ number).to_bytes(12, "big"), tickets, head)


def _for_ever(connection: socket.socket, over: threading.Event, pieces: Iterable[bytes]) -> None:
    connection.settimeout(0.2)
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            if over.is_set():
                return
            with suppress(socket.timeout):
                rest = rest[connection.send(rest) :]
