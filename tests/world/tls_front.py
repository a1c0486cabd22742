"""What stands in front of Caramel and speaks TLS: what all such servers have in common, and one that needs no other
program."""

from __future__ import annotations

import asyncio
import re
import ssl
import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

from cryptography import x509

from world.answers import HttpRequest
from world.caramel import Caramel
from world.processes import PATIENCE, Service


class Front(Service):
    """A TLS server in front of Caramel that remembers what it was asked."""

    port = 0

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @abstractmethod
    def seen(self) -> list[HttpRequest]:
        """All requests so far. Nothing that was answered before this call is missing."""

    @contextmanager
    def watched(self) -> Iterator[list[HttpRequest]]:
        """A list that has, when the block is over, the requests made during it."""
        before, during = len(self.seen()), []  # type: int, list[HttpRequest]
        yield during
        during += self.seen()[before:]


class TlsFront(Front):
    """A TLS front made of nothing but Python, which passes requests and answers on as they are, byte for byte.

    `certificate` is a file with certificate and key. With `client_ca`, clients are asked for a certificate,
    and one that is not good ends the connection with an alert; with `demand` as well, so does none.
    """

    def __init__(
        self, caramel: Caramel, certificate: Path, *, client_ca: Optional[Path] = None, demand: bool = False
    ) -> None:
        self.caramel = caramel
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(str(certificate))
        if client_ca:
            self.context.load_verify_locations(str(client_ca))
            self.context.verify_mode = ssl.CERT_REQUIRED if demand else ssl.CERT_OPTIONAL
        self.connections = 0
        self._seen: list[HttpRequest] = []
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._thread: Optional[threading.Thread] = None

    def seen(self) -> list[HttpRequest]:
        return list(self._seen)

    def start(self) -> None:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        # Failed handshakes are the client's to report.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(target=self._run, args=(self._loop, ready), daemon=True)
        self._thread.start()
        if not ready.wait(PATIENCE):
            raise AssertionError("the TLS front doesn't start")

    def _run(self, loop: asyncio.AbstractEventLoop, ready: threading.Event) -> None:
        asyncio.set_event_loop(loop)

        listening = asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.context, backlog=256)
        server = loop.run_until_complete(listening)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        # What was closed or aborted says so to the loop one turn later.
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    def stop(self) -> None:
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            self._loop = self._thread = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            behind, to_behind = await asyncio.open_connection("127.0.0.1", self.caramel.port)
        except OSError:
            writer.close()
            return
        # The end of either connection is the end of both: TLS has no half-closed ones that are of use here.
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                while await self._exchange(number, reader, writer, behind, to_behind):
                    pass
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        finally:
            for stream in (writer, to_behind):
                stream.close()

    async def _exchange(
        self,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        behind: asyncio.StreamReader,
        to_behind: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; false where nothing can follow on this connection."""
        asked = await reader.readuntil(b"\r\n\r\n")
        length, _ = _framing(asked)
        asked += await reader.readexactly(length or 0)
        to_behind.write(asked)
        await to_behind.drain()
        method, path, _ = asked.partition(b"\r\n")[0].decode("latin-1").split(" ", 2)

        said = await behind.readuntil(b"\r\n\r\n")
        status = int(said.split(b" ", 2)[1])
        length, goes_on = _framing(said)
        if method != "HEAD" and status not in (204, 304):
            # Without a length the answer ends with the connection. (Caramel's answers have one.)
            said += await (behind.read() if length is None else behind.readexactly(length))
            goes_on = goes_on and length is not None
        client = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        head, _, body = asked.partition(b"\r\n\r\n")
        lines = [line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:]]
        self._seen.append(
            HttpRequest(
                connection=number,
                method=method,
                path=path,
                headers={name.strip().lower(): value.strip() for name, _, value in lines},
                body=body,
                client_certificate=client,
                status=status,
                verify="SUCCESS" if client else "NONE",
                subject=x509.load_der_x509_certificate(client).subject.rfc4514_string() if client else "",
                received=len(asked),
                sent=len(said),
                tls=writer.get_extra_info("ssl_object").version() or "",
            )
        )
        writer.write(said)
        await writer.drain()
        return goes_on


def _framing(head: bytes) -> tuple[Optional[int], bool]:
    """What a message's header lines say: the length of its body, and whether the connection goes on."""
    length = re.search(rb"^content-length: *([0-9]+)", head, re.IGNORECASE | re.MULTILINE)
    close = re.search(rb"^connection: *close", head, re.IGNORECASE | re.MULTILINE)
    return int(length[1]) if length else None, close is None
