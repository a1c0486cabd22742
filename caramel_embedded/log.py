"""Where a run's words go: standard error or the system's log, without ever waiting for either; standard output.

syslog(3) of the C library waits as long as the daemon behind ``/dev/log`` doesn't read, and a run that logs a step
holds the key file's lock. Here a message goes out at once or not at all.
"""

from __future__ import annotations

import os
import select
import time
from typing import Optional

from .errors import printable

NAME = "caramel-embedded"
SOCKET = "/dev/log"
ERROR, WARNING, NOTICE, INFO, DEBUG = range(3, 8)  # RFC 5424, 6.2.1
_DAEMON = 3  # the facility
PATIENCE = 3.0  # seconds, for who reads what was asked for
_MAXIMUM = 1024  # bytes; RFC 3164, 4.1


class Log:
    """One line for how a run ended, and with `verbose` one for each step.

    Attributes: verbose, quiet, syslog, json: as the options; client_id: what each line begins with, once it is known.
    """

    def __init__(self) -> None:
        self.verbose = False
        self.quiet = False
        self.syslog = False
        self.json = False
        self.client_id: Optional[str] = None

    def step(self, text: str) -> None:
        """A step on the way, for somebody who looks for a fault."""
        if self.verbose:
            self._write(DEBUG, text)

    def result(self, priority: int, text: str) -> None:
        """How a run ended."""
        if not self.quiet or priority <= WARNING:
            self._write(priority, text)

    def _write(self, priority: int, text: str) -> None:
        text = printable(text, len(text))
        if self.client_id:
            text = "%s: %s" % (self.client_id, text)
        if not (self.syslog and send(priority, text)):
            write(2, "%s: %s\n" % (NAME, text))


def write(fd: int, text: str) -> None:
    """Writes `text` if that is possible at once; what can't be written must neither stop nor delay a run."""
    data = text.encode("utf-8", "backslashreplace")
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        # Up to PIPE_BUF (4096) bytes a pipe that is ready takes without waiting, pipe(7).
        if poll.poll(0):
            os.write(fd, data[:4095] + b"\n" if len(data) > 4096 else data)
    except OSError:
        pass


def write_patiently(fd: int, data: bytes) -> None:
    """Writes all of it, if somebody reads it within some seconds. Raises OSError."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    deadline = time.monotonic() + PATIENCE
    while data:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise OSError(None, "nobody reads the standard output")
        # So many a pipe that is ready takes without waiting, pipe(7).
        data = data[os.write(fd, data[: select.PIPE_BUF]) :]


def send(priority: int, text: str) -> bool:
    """Whether the system's log took the message; False if there is none, or if it is too busy."""
    import errno  # most runs log to standard error
    import socket

    head = "<%d>%s %s[%d]: " % (_DAEMON << 3 | priority, time.strftime("%b %e %H:%M:%S"), NAME, os.getpid())
    data = (head + text).encode("utf-8", "backslashreplace")[:_MAXIMUM]
    # Some daemons listen with a stream; a message ends with NUL there.
    for kind, end in ((socket.SOCK_DGRAM, b""), (socket.SOCK_STREAM, b"\0")):
        with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK) as log:
            try:
                log.connect(SOCKET)
                log.send(data + end)
            except OSError as error:
                if error.errno == errno.EPROTOTYPE:
                    continue
                return False
            return True
    return False
