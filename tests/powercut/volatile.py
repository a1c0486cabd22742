"""A disk whose write cache is lost when the power goes: an NBD server that keeps what was not flushed apart.

A QEMU that is killed loses the guest's memory, and nothing that it has handed to the host, whatever its ``cache=``
says. So the disk stands behind this server, which knows what the guest has flushed. At a cut, some of the sectors
that were written since then reach the disk and the others don't, as a real drive may do it: it promises whole
sectors of 512 bytes, and no order before a flush.

The protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, fixed newstyle, simple replies.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
from pathlib import Path
from typing import BinaryIO, NamedTuple, Optional, cast

SECTOR = 512

_OPTION = struct.Struct(">QII")  # magic number, option, length
_OPTION_REPLY = struct.Struct(">QIII")  # magic number, option, kind, length
_REQUEST = struct.Struct(">IHHQQI")  # magic number, flags, kind, handle, offset, length
_REPLY = struct.Struct(">IIQ")  # magic number, error, handle
_EXPORT_NAME, _ABORT, _GO = 1, 2, 7
_ACK, _INFO, _UNSUPPORTED = 1, 3, 0x80000001
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3
_FLAGS = 1 | 4  # has flags, takes flushes

#: What of the unflushed sectors survives a cut.
CUTS = ("all", "none", "half", "most", "prefix")


class PowerLost(Exception):
    """The power went before this request."""


class Written(NamedTuple):
    """One write request that no flush has followed yet."""

    sector: int
    data: bytes


class Disk:
    """The disk's content, and what of it the next cut may take away. Times and sizes: see `connect` and `cut`."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self._unflushed: list[Written] = []
        self._durable: dict[int, bytes] = {}  # what the sectors that were written since the last flush had before
        self._changed = threading.Condition()
        self.requests = 0
        self._last: Optional[int] = None

    # --- What the guest does

    def _request(self) -> None:
        """Another one has come. Raises `PowerLost` where it comes too late."""
        if self._last is not None and self.requests >= self._last:
            raise PowerLost
        self.requests += 1
        self._changed.notify_all()

    def write(self, offset: int, data: bytes) -> None:
        with self._changed:
            self._request()
            for at in range(offset, offset + len(data), SECTOR):
                self._durable.setdefault(at // SECTOR, bytes(self.data[at : at + SECTOR]))
            self.data[offset : offset + len(data)] = data
            self._unflushed.append(Written(offset // SECTOR, data))

    def flush(self) -> None:
        with self._changed:
            self._request()
            self._unflushed.clear()
            self._durable.clear()

    # --- What the harness does

    def watch(self, last: Optional[int] = None) -> None:
        """Counts writes and flushes from now on; after the `last` one the power is gone, and none is answered."""
        with self._changed:
            self.requests, self._last = 0, last

    def wait(self, requests: int, seconds: float) -> bool:
        """Whether so many writes and flushes have come, waited for at most so long."""
        with self._changed:
            return self._changed.wait_for(lambda: self.requests >= requests, seconds)

    def cut(self, chance: random.Random, how: str) -> int:
        """The power goes: what was not flushed is kept or lost as `how` says (one of `CUTS`); how many sectors are
        lost.
        """
        pieces = [piece for write in self._unflushed for piece in _sectors(write)]
        if how == "prefix":
            kept = pieces[: chance.randint(0, len(pieces))]
        else:
            likely = {"all": 1.0, "none": 0.0, "half": 0.5, "most": 0.9}[how]
            kept = [piece for piece in pieces if chance.random() < likely]
        for sector, content in self._durable.items():
            self.data[sector * SECTOR : (sector + 1) * SECTOR] = content
        for piece in kept:
            self.data[piece.sector * SECTOR : (piece.sector + 1) * SECTOR] = piece.data
        self._unflushed.clear()
        self._durable.clear()
        self.watch()
        return len(pieces) - len(kept)


def _sectors(write: Written) -> list[Written]:
    return [
        Written(write.sector + at // SECTOR, write.data[at : at + SECTOR]) for at in range(0, len(write.data), SECTOR)
    ]


class Server:
    """Serves one disk on a Unix socket, to one machine after the other, until `close`."""

    def __init__(self, path: Path, disk: Disk) -> None:
        self.disk = disk
        self.path = path
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen(1)
        self._idle = threading.Event()
        self._idle.set()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def settle(self, seconds: float = 10) -> None:
        """Waits until all that a killed machine had sent has arrived. Raises TimeoutError."""
        if not self._idle.wait(seconds):
            raise TimeoutError("the disk's connection is still open")

    def expect(self) -> None:
        """To be called before a machine is started, so that `settle` waits for its end."""
        self._idle.clear()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            try:
                with connection, connection.makefile("rwb") as both:
                    stream = cast(BinaryIO, both)
                    if _agree(stream, len(self.disk.data)):
                        try:
                            _obey(stream, self.disk)
                        except PowerLost:
                            while stream.read(1 << 16):
                                pass
            except (OSError, EOFError):
                pass  # the power is off
            finally:
                self._idle.set()


def _take(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return bytes(data)


def _agree(stream: BinaryIO, size: int) -> bool:
    """The handshake; whether requests follow."""
    send, flush = stream.write, stream.flush
    send(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 1 | 2))  # fixed newstyle, no zeroes
    flush()
    _take(stream, 4)
    while True:
        _, option, length = _OPTION.unpack(_take(stream, _OPTION.size))
        _take(stream, length)
        if option == _EXPORT_NAME:
            send(struct.pack(">QH", size, _FLAGS))
            flush()
            return True
        if option == _GO:
            export = struct.pack(">HQH", 0, size, _FLAGS)
            send(_OPTION_REPLY.pack(0x3E889045565A9, option, _INFO, len(export)) + export)
            send(_OPTION_REPLY.pack(0x3E889045565A9, option, _ACK, 0))
            flush()
            return True
        send(_OPTION_REPLY.pack(0x3E889045565A9, option, _ACK if option == _ABORT else _UNSUPPORTED, 0))
        flush()
        if option == _ABORT:
            return False


def _obey(stream: BinaryIO, disk: Disk) -> None:
    """Carries out requests until there are no more."""
    send, flush = stream.write, stream.flush
    while True:
        _, _, kind, handle, offset, length = _REQUEST.unpack(_take(stream, _REQUEST.size))
        content = b""
        error = 0
        if kind == _READ:
            content = bytes(disk.data[offset : offset + length])
        elif kind == _WRITE:
            disk.write(offset, _take(stream, length))
        elif kind == _FLUSH:
            disk.flush()
        elif kind == _DISCONNECT:
            return
        else:
            error = 22  # EINVAL
        send(_REPLY.pack(0x67446698, error, handle) + content)
        flush()
