# SPDX-License-Identifier: MIT OR Apache-2.0
"""A TCP proxy on the loopback interface that makes the way long, and counts what goes over it.

It knows nothing of TLS or HTTP: it delays bytes, counts them, and sees who speaks when. Everything is counted
that the two ends hand to TCP, all of TLS included; the headers of TCP and IP are not, but for `packets`,
which is what the kernel says about the device's side of the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

#: The largest segment on the device's side: what is left of an Ethernet frame. Loopback alone would allow 64
#: KiB.
SEGMENT = 1448
#: Offsets of tcpi_segs_out and tcpi_segs_in in Linux' struct tcp_info (linux/tcp.h, since 4.2).
SEGMENTS = struct.Struct("136x2I")


@dataclass
class Traffic:
    """What went over the proxy since the last `reset`; bytes of TCP payload, times in seconds (monotonic)."""

    connections: int = 0
    up: int = 0
    down: int = 0
    #: One for each TCP handshake, and one each time the server speaks after the device: how often somebody
    #: waited.
    round_trips: int = 0
    #: TCP segments in both directions, empty ones included, without the last few of the connection's end.
    packets: int = 0
    last: float = 0.0
    #: What was said, in the order of each side; of all connections one after the other.
    said_up: bytearray = field(default_factory=bytearray)
    said_down: bytearray = field(default_factory=bytearray)


def medians(several: Sequence[Traffic]) -> dict[str, int]:
    """What is counted, of several runs that should be alike: TLS has fields of varying length."""
    counted = ("connections", "round_trips", "up", "down", "packets")
    return {name: int(statistics.median(getattr(one, name) for one in several)) for name in counted}


class DelayingProxy:
    """Passes connections to `target` (a port of the loopback interface), `round_trip` seconds apart from it.

    A TCP handshake over loopback takes no time, so the first bytes of a connection are held back for the
    round trip that it would have taken, and for half of one like all others. For a device that opens a
    connection and waits for it, this comes to the same.
    """

    def __init__(self, target: int, round_trip: float = 0.0) -> None:
        self.target = target
        self.round_trip = round_trip
        self.port = 0
        self.traffic = Traffic()
        self._open = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> DelayingProxy:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        if not ready.wait(30):
            raise RuntimeError("the proxy doesn't start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(30)

    @property
    def address(self) -> str:
        """The server as a device names it."""
        return f"localhost:{self.port}"

    def reset(self) -> None:
        """Counts from zero again."""
        self.wait()
        self.traffic = Traffic()

    def wait(self, seconds: float = 10.0) -> Traffic:
        """What was counted, when the last connection is over on both sides."""
        deadline = time.monotonic() + seconds
        while self._open and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.traffic

    def _run(self, ready: threading.Event) -> None:
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda loop, context: None)  # a client may end as it likes
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        self.port = listener.getsockname()[1]

        async def listen() -> None:
            await asyncio.start_server(self._serve, sock=listener)
            ready.set()

        self._loop.run_until_complete(listen())
        self._loop.run_forever()
        listener.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, device: asyncio.StreamReader, to_device: asyncio.StreamWriter) -> None:
        traffic, delay = self.traffic, self.round_trip / 2
        self._open += 1
        traffic.connections += 1
        traffic.round_trips += 1
        established = time.monotonic() + self.round_trip
        last_spoke = ["server"]
        raw = to_device.get_extra_info("socket")
        segments = 0
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            to_device.close()
            self._open -= 1
            return
        for writer in (to_device, to_server):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def count_segments() -> None:
            nonlocal segments
            with contextlib.suppress(OSError):  # closed already
                info = raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SEGMENTS.size)
                if len(info) == SEGMENTS.size:
                    segments = sum(SEGMENTS.unpack(info))

        async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, side: str) -> None:
            queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

            async def deliver() -> None:
                while True:
                    due, data = await queue.get()
                    pause = due - time.monotonic()
                    if pause > 0:
                        await asyncio.sleep(pause)
                    if not data:
                        if target.can_write_eof():
                            with contextlib.suppress(OSError):
                                target.write_eof()
                        return
                    target.write(data)
                    count_segments()

            delivery = asyncio.ensure_future(deliver())
            try:
                while True:
                    try:
                        data = await source.read(65536)
                    except OSError:
                        data = b""
                    now = time.monotonic()
                    if data:
                        traffic.last = now
                        if side == "device":
                            traffic.up += len(data)
                            traffic.said_up += data
                        else:
                            traffic.down += len(data)
                            traffic.said_down += data
                            traffic.round_trips += last_spoke[0] == "device"
                        last_spoke[0] = side
                    queue.put_nowait((max(now, established) + delay, data))
                    if not data:
                        break
                await delivery
            finally:
                delivery.cancel()

        ways = [
            asyncio.ensure_future(carry(device, to_server, "device")),
            asyncio.ensure_future(carry(server, to_device, "server")),
        ]
        try:
            # When the device has gone, nothing the server still says reaches anybody.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(ways, timeout=0.05 + self.round_trip)
        finally:
            count_segments()
            traffic.packets += segments
            for way in ways:
                way.cancel()
            for writer in (to_device, to_server):
                writer.close()
            self._open -= 1
