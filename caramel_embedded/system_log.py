"""The system's log, without ever waiting for it.

syslog(3) of the C library waits as long as the daemon behind ``/dev/log`` doesn't read, and a run that logs a step
holds the key file's lock. Here a message goes out at once or not at all.
"""

from __future__ import annotations

import errno
import os
import socket
import time

SOCKET = "/dev/log"
ERROR, WARNING, NOTICE, INFO, DEBUG = range(3, 8)  # RFC 5424, 6.2.1
_DAEMON = 3  # the facility
_MAXIMUM = 1024  # bytes; RFC 3164, 4.1


def send(priority: int, name: str, text: str) -> bool:
    """Whether the daemon took the message; False where there is none, or where it is too busy."""
    head = "<%d>%s %s[%d]: " % (_DAEMON << 3 | priority, time.strftime("%b %e %H:%M:%S"), name, os.getpid())
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
