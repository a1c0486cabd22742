# SPDX-License-Identifier: MIT OR Apache-2.0
"""The process that has the CA's key, and how the process that has the network asks it.

Whoever asks sends the SHA-256 of a request, in hexadecimal. What is signed stands in the database and nowhere else:
the signer reads that request's row, judges it as if it had just been posted, signs where it was authorized and a
certificate is due, and stores what it signed. It answers with JSON: `{}`, or `later` (seconds) and `why`.

It listens at a socket in the file system, where the users of the folder's group may connect. Where none is
configured, the process that answers starts one as its child, and no other process can reach it (`Child`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

from sqlalchemy.exc import DBAPIError

from .ca import Certificates
from .configuration import Ca
from .errors import TryLater, WrongUsage, say

#: How many are asked for at once; as many as the process that answers has threads.
THREADS = 8
#: Seconds that whoever asks may take to do so, and that the answer may take: longer than SQLite waits for its lock.
SLOWEST, LONGEST = 10, 40

#: Where to ask: a connection to the signer, or OSError.
Connect = Callable[[], socket.socket]
#: Who asks: the next connection, None when nobody will ever ask again.
Accept = Callable[[], socket.socket | None]


class RemoteCa(Certificates):
    """The CA as the process that answers devices knows it: it reads certificates, and asks for signatures."""

    def __init__(self, settings: Ca, connect: Connect) -> None:
        super().__init__(settings)
        self._connect = connect

    def remote(self, sha256: str) -> bool:
        """Has this request seen to. Raises TryLater."""
        self.ask(sha256)
        return True

    def look(self) -> None:
        super().look()
        self.ask("")

    def ask(self, sha256: str) -> None:
        """Raises TryLater. With no hash at all, it only sees whether somebody is there."""
        try:
            with self._connect() as connection:
                connection.settimeout(LONGEST)
                connection.sendall(f"{sha256}\n".encode())
                connection.shutdown(socket.SHUT_WR)
                answer = json.loads(b"".join(iter(lambda: connection.recv(4096), b"")))
        except (OSError, ValueError) as error:
            raise TryLater(f"the signer doesn't answer: {error}") from None
        if answer:
            raise TryLater(f"the signer: {answer['why']}", answer["later"])


def at(path: str) -> Connect:
    """Where the signer listens at this socket."""

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(SLOWEST)
            connection.connect(path)
        except BaseException:
            connection.close()
            raise
        return connection

    return connect


class Child:
    """A signer that is a child of this process, which has a private line to it: it sends one end of a new pair of
    sockets for each question (unix(7), SCM_RIGHTS). When this process has ended, the child does.
    """

    def __init__(self, run: Callable[[Accept], None]) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = os.fork()
        if not self.process:
            self._become(theirs, run)
        theirs.close()

    def _become(self, line: socket.socket, run: Callable[[Accept], None]) -> NoReturn:
        status = 1
        try:
            self._ours.close()
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's is for the parent to act on
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

            def accept() -> socket.socket | None:
                _, descriptors, _, _ = socket.recv_fds(line, 1, 1)
                return socket.socket(fileno=descriptors[0]) if descriptors else None

            run(accept)
            status = 0
        except BaseException as error:
            say(f"the signer: {error!r}")
        finally:
            os._exit(status)

    def connect(self) -> socket.socket:
        mine, its = socket.socketpair()
        try:
            with its:
                socket.send_fds(self._ours, [b"?"], [its.fileno()])
        except BaseException:
            mine.close()
            raise
        return mine


def listen(path: str) -> socket.socket:
    """The socket at this path, for its owner and group. Raises WrongUsage where another signer has it."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise WrongUsage(f"{path} exists, and is no socket")
        with contextlib.suppress(OSError):  # it was left by one that was killed
            at(path)().close()
            raise WrongUsage(f"{path}: another signer listens there")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    new = f"{path}.{os.getpid()}"
    try:
        listener.bind(new)
        listener.listen(64)
        # Who finds it there can connect.
        os.rename(new, path)
    except OSError as error:
        raise WrongUsage(f"{path}: {error}") from None
    finally:
        os.umask(before)
    return listener


def run(sign: Callable[[str], object], accept: Accept) -> None:
    """Answers until nobody can ask any more. `sign` sees to the request with this hash."""
    with ThreadPoolExecutor(THREADS) as pool:
        while connection := accept():
            pool.submit(_answer, connection, sign)


def _answer(connection: socket.socket, sign: Callable[[str], object]) -> None:
    with contextlib.suppress(OSError), connection:
        connection.settimeout(SLOWEST)
        asked = b""
        while not asked.endswith(b"\n") and len(asked) <= 64:
            piece = connection.recv(65 - len(asked))
            if not piece:
                return
            asked += piece
        answer: dict[str, object] = {}
        try:
            if re.fullmatch(rb"[0-9a-f]{64}\n", asked):
                sign(asked.decode().strip())
            elif asked != b"\n":
                answer = {"later": 60, "why": "no hash of a request"}
        except TryLater as error:
            answer = {"later": error.seconds, "why": str(error)}
        except Exception as error:
            # For the administrator, who reads the log; who asked can only ask again.
            known = isinstance(error, (WrongUsage, DBAPIError))
            say(f"{asked.decode().strip()}: {error if known else repr(error)}")
            answer = {"later": 60, "why": "it is not able to sign now"}
        connection.sendall(json.dumps(answer).encode())
