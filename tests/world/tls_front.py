"""A TLS front of Caramel that needs no other program."""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import Optional

from world.caramel import Caramel
from world.processes import PATIENCE, Service


class TlsFront(Service):
    """A TLS front made of nothing but Python, which passes bytes on to Caramel as they are.

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
        self.port = 0
        self.connections = 0
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._thread: Optional[threading.Thread] = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

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

        listening = asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.context)
        server = loop.run_until_complete(listening)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    def stop(self) -> None:
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            self._loop = self._thread = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            behind, to_behind = await asyncio.open_connection("127.0.0.1", self.caramel.port)
        except OSError:
            writer.close()
            return

        async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while True:
                    piece = await source.read(65536)
                    if not piece:
                        break
                    target.write(piece)
                    await target.drain()

        # TLS has no half-closed connections that are of use here: the first end is the end.
        both = [
            asyncio.ensure_future(pass_on(reader, to_behind)),
            asyncio.ensure_future(pass_on(behind, writer)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            for stream in (writer, to_behind):
                stream.close()
