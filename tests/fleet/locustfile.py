# SPDX-License-Identifier: MIT OR Apache-2.0
"""The users of the load: devices that check, with the requests of the program and each with a certificate of its own.

Locust starts this in every worker; `load.py` starts Locust. What goes over the wire is what the program sends, on one
connection a check (`tests/test_fleet_load.py` holds the two against each other). What isn't seen there is left out: a
device's TLS context is made once and not for each check, because the load shares its processors with the servers that
are measured.

`FLEET_LOAD` names a JSON file: `port`; `ca`, a path; `agent`, what the User-Agent begins with; `devices`, for each
the client ID, the request's hash, the If-Modified-Since, and the path of key and certificate; `end`, the path of a
file: once that is there, no check begins any more. `FLEET_SHARE` is "which/of how many" workers. `FLEET_SAMPLES` is
the file for what was seen: a line a check, with the second at which it began (CLOCK_MONOTONIC), how long it took, and
the status, 0 where none came.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import ssl
import time
from pathlib import Path
from typing import Any, Optional

import gevent
from locust import User, events, runners, task

LOAD: dict[str, Any] = json.loads(Path(os.environ["FLEET_LOAD"]).read_text())
#: Seconds between two reports of a worker.
REPORTS = runners.WORKER_REPORT_INTERVAL = 1.0
#: Seconds that a device waits for its server: the default of --timeout.
PATIENCE = 60.0
# As in caramel_embedded/trust.py, whose names for these they are.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
TLSEXT_PADDING = ssl.Options(0x10)
PARTIAL_CHAIN = ssl.VerifyFlags(0x80000)


class NotAnswered(Exception):
    """The server said something else than that the certificate is there, or nothing."""


class Device:
    """One device: its TLS context, and the request that it sends with each check."""

    def __init__(self, ca: str, client_id: str, sha256: str, since: str, identity: str) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.options &= ~TLSEXT_PADDING
        self.context.set_ciphers(CIPHERS)
        self.context.post_handshake_auth = True
        self.context.verify_flags |= PARTIAL_CHAIN
        self.context.load_verify_locations(cadata=ca)
        self.context.load_cert_chain(identity)
        lines = (
            f"GET /{sha256} HTTP/1.1",
            f"Host: localhost:{LOAD['port']}",
            f"User-Agent: {LOAD['agent']} ({client_id})",
            f"If-Modified-Since: {since}",
        )
        self.request = "".join(f"{line}\r\n" for line in (*lines, "")).encode()

    def check(self) -> tuple[int, int]:
        """One check: the answer's status, and how many bytes its body has. Raises OSError and NotAnswered."""
        with socket.create_connection(("127.0.0.1", LOAD["port"]), PATIENCE) as plain:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.context.wrap_socket(plain, server_hostname="localhost") as tls:
                tls.sendall(self.request)
                return read(tls)


def read(tls: ssl.SSLSocket) -> tuple[int, int]:
    """Status and length of the body of the response, which is read to its end."""
    content = b""
    while b"\r\n\r\n" not in content:
        piece = tls.recv(16384)
        if not piece:
            raise NotAnswered("the connection ended before the response's head did")
        content += piece
    head, _, body = content.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    expected = 0 if status == 304 else int(lengths[0].partition(b":")[2])
    received = len(body)
    while received < expected:
        piece = tls.recv(16384)
        if not piece:
            raise NotAnswered(f"{received} of {expected} bytes came")
        received += len(piece)
    return status, received


def share() -> list[Device]:
    """This worker's devices; none in the master, which has no users."""
    if "FLEET_SHARE" not in os.environ:
        return []
    which, of = map(int, os.environ["FLEET_SHARE"].split("/"))
    ca = Path(LOAD["ca"]).read_text()
    return [Device(ca, *fields) for fields in LOAD["devices"][which::of]]


devices = itertools.cycle(share())
samples = open(os.environ.get("FLEET_SAMPLES", os.devnull), "a")  # noqa: SIM115 - to the end of the process


class Check(User):
    """One device after the other, without a pause: as many checks are under way as there are users."""

    @task
    def check(self) -> None:
        device = next(devices)
        began, status, length = time.monotonic(), 0, 0
        problem: Optional[Exception] = None
        try:
            status, length = device.check()
            if status not in (200, 304):
                problem = NotAnswered(f"status {status}")
        except (OSError, NotAnswered, ValueError, IndexError) as error:
            problem = error
        took = time.monotonic() - began
        samples.write(f"{began:.6f} {took:.6f} {status}\n")
        self.environment.events.request.fire(
            request_type="GET",
            name="check",
            response_time=1000 * took,
            response_length=length,
            exception=problem,
            context={},
        )


@events.init.add_listener
def look_for_the_end(environment: Any, **_: Any) -> None:
    if isinstance(environment.runner, runners.MasterRunner):
        gevent.spawn(end_when_told, environment.runner)


def end_when_told(master: runners.MasterRunner) -> None:
    """Ends the run so that every check is counted: workers report now and then, and by itself no master waits for the
    last time.
    """
    while not Path(LOAD["end"]).exists():
        gevent.sleep(0.1)
    master.stop()
    gevent.sleep(2 * REPORTS)
    master.quit()


@events.quitting.add_listener
def keep(**_: Any) -> None:
    samples.flush()
