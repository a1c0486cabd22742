# SPDX-License-Identifier: MIT OR Apache-2.0
"""The real server: what a check costs it, and a small fleet that comes back to it.

Caramel and nginx are real, and so is `until-enrolled`, once for each device. What it starts is the program in one of
`REAL` devices. In the others it is a script around curl(1), which makes the same request with a certificate of its
own over one connection, tries once more without the certificate where the program would, and costs a tenth of the
processor time: all devices share this machine with the server.
"""

from __future__ import annotations

import concurrent.futures
import os
import random
import selectors
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Callable, Optional

import world
from world import Authority, Caramel, Device, Nginx

HERE = Path(__file__).resolve().parent
UNTIL_ENROLLED = world.ROOT / "packaging/libexec/until-enrolled"
#: One device of so many runs the program itself.
REAL = 20
#: Identities that the devices share; the server doesn't look who comes how often.
IDENTITIES = 8

#: What until-enrolled starts. Each run says when it begins and how it ends; so few bytes are written whole (pipe(7)).
RUN = """#!/bin/sh
case "$*" in *--status*) exit 0 ;; esac
echo "$DEVICE begins" 1<>"{pipe}"
{check}
echo "$DEVICE $status" 1<>"{pipe}"
exit "$status"
"""
PROGRAM = """{program} --config /dev/null --server {address} --ca-cert {ca} --client-id "$CLIENT" \\
    --key-file "{folder}/$DEVICE.pem" "$@" 2>/dev/null
status=$?"""
CURL = """ask() {{
    curl --silent --noproxy '*' --max-time 60 --cacert {ca} --header Accept: --output /dev/null \\
        --user-agent "caramel-embedded/0 ($CLIENT)" --write-out '%{{http_code}} %header{{retry-after}}' "$@" \\
        "https://{address}/$HASH"
}}
said=$(ask --cert "$IDENTITY" --key "$IDENTITY" --header "If-Modified-Since: $SINCE") ||
    case $? in 35 | 52 | 55 | 56) said=$(ask) ;; esac
case ${{said%% *}} in 200 | 304) status=0 ;; *) status=127 ;; esac
after=${{said#* }}
printf '{{"status": %s, "retry_after": %s}}\\n' "$status" "${{after:-null}}\""""


class Held(Caramel):
    """A Caramel server that takes at least `hold` seconds for each request, one after the other."""

    hold = 0.1

    def _write_ini(self) -> None:
        super()._write_ini()
        # A file of its own: Caramel's other programs don't find the filter, and don't need it.
        served = self.ini.with_name("held.ini")
        ini = self.ini.read_text().replace("use = egg:caramel\n", "use = egg:caramel\nfilter-with = hold\n", 1)
        served.write_text(
            f"{ini}\n[filter:hold]\npaste.filter_app_factory = morning_hold:make_filter\nseconds = {self.hold}\n"
        )
        self._server.command[1] = str(served)
        self._server.env["PYTHONPATH"] = str(HERE)

    @property
    def process(self) -> int:
        assert self._server.process
        return self._server.process.pid


class Crowded(Nginx):
    """An nginx with `room` connections; `rate`: checks a second that it lets through, the others get Retry-After."""

    room = 1024
    rate: Optional[float] = None
    burst = 0
    retry_after = 60

    def _configuration(self) -> str:
        text = super()._configuration().replace("worker_connections 1024", f"worker_connections {self.room}")
        if self.rate is not None:
            zone = f"limit_req_zone $server_name zone=checks:1m rate={round(60 * self.rate)}r/m;\n    log_format"
            text = text.replace("log_format", zone, 1)
            limit = (
                f"limit_req zone=checks burst={self.burst} nodelay; limit_req_status 503; error_page 503 @later;\n"
                f"        location @later {{ add_header Retry-After {self.retry_after} always; return 503; }}\n"
                "        location / {"
            )
            text = text.replace("location / {", limit, 1)
        return text

    @property
    def process(self) -> int:
        assert self._daemon and self._daemon.process
        return self._daemon.process.pid


def processor_time(process: int) -> float:
    """Seconds that a process and its threads have had of a core."""
    total = 0
    for task in Path(f"/proc/{process}/task").iterdir():
        with suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


@dataclass
class Site:
    """A server and identities that it has signed."""

    folder: Path
    authority: Authority
    caramel: Held
    nginx: Crowded
    identities: Sequence[Device]

    def context(self, device: Device) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.authority.certificate_file))
        context.load_cert_chain(str(device.key_file))
        return context

    def ask(self, context: ssl.SSLContext, sha256: str, timeout: float = 60) -> int:
        """One check of nothing but Python; the status, or 0 where there was no answer."""
        try:
            with (
                socket.create_connection(("127.0.0.1", self.nginx.port), timeout) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as tls,
            ):
                tls.sendall(f"GET /{sha256} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                return int(tls.recv(65536)[9:12] or b"0")
        except (OSError, ValueError):
            return 0

    def closed_loop(self, seconds: float, at_a_time: int = 6) -> dict[str, float]:
        """Checks, each as soon as another is over: how many a second, and nginx's and Caramel's time for one."""
        device = self.identities[0]
        sha256 = device.request_hash()
        began = time.monotonic()

        def ask(_: int) -> int:
            context, count = self.context(device), 0
            while time.monotonic() < began + seconds:
                count += self.ask(context, sha256) == 200
            return count

        before = [processor_time(process) for process in (self.nginx.process, self.caramel.process)]
        with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
            count = sum(pool.map(ask, range(at_a_time)))
        took = time.monotonic() - began
        after = [processor_time(process) for process in (self.nginx.process, self.caramel.process)]
        front, back = ((b - a) / count for a, b in zip(before, after))
        return {"rate": count / took, "front": front, "back": back, "checks": count}

    def turned_away(self, tries: int = 300) -> float:
        """nginx's time for a connection that it has no room for."""
        context, sha256 = self.context(self.identities[0]), self.identities[0].request_hash()
        room, self.nginx.room = self.nginx.room, 24
        self.nginx.restart()
        os.kill(self.caramel.process, signal.SIGSTOP)  # keeps those that are in for as long as it takes
        held = []
        try:
            for _ in range(self.nginx.room):
                # With a request: nginx takes the place of a connection that says nothing for another one.
                with suppress(OSError):
                    plain = socket.create_connection(("127.0.0.1", self.nginx.port), 5)
                    held.append(context.wrap_socket(plain, server_hostname="localhost"))
                    held[-1].sendall(f"GET /{sha256} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            before, reset = processor_time(self.nginx.process), 0
            for _ in range(tries):
                try:
                    with socket.create_connection(("127.0.0.1", self.nginx.port), 5) as plain:
                        context.wrap_socket(plain, server_hostname="localhost").close()
                except OSError:
                    reset += 1
            assert reset == tries, f"{reset} of {tries} were turned away"
            return (processor_time(self.nginx.process) - before) / tries
        finally:
            for tls in held:
                tls.close()
            os.kill(self.caramel.process, signal.SIGCONT)
            self.nginx.room = room
            self.nginx.restart()

    def works_for_who_has_left(self, count: int = 40) -> int:
        """Of `count` checks whose devices left before Caramel began, how many it has done all the same."""
        context, sha256 = self.context(self.identities[0]), self.identities[0].request_hash()
        assert self.ask(context, sha256) == 200  # nobody waits any more
        before = self.logged()
        os.kill(self.caramel.process, signal.SIGSTOP)
        try:
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                assert set(pool.map(lambda _: self.ask(context, sha256, 2), range(count))) == {0}
        finally:
            os.kill(self.caramel.process, signal.SIGCONT)
        assert self.ask(context, sha256) == 200  # in line behind them
        return self.logged() - before - 1

    def logged(self) -> int:
        """How many checks Caramel has written down."""
        connection = sqlite3.connect(str(self.caramel.database), timeout=60)
        try:
            return int(connection.execute("SELECT COUNT(*) FROM accesslog").fetchone()[0])
        finally:
            connection.close()


def site(folder: Path, hold: float, room: int = 1024) -> Site:
    """Makes one, not started: see `opened`."""
    authority = Authority(folder / "ca")
    caramel = Held(folder / "caramel", authority)
    caramel.hold = hold
    nginx = Crowded(folder / "nginx", caramel, authority.server(), session_tickets=True)
    nginx.room = room
    return Site(folder, authority, caramel, nginx, [])


def enroll(site: Site, count: int = IDENTITIES) -> None:
    """Identities by the program itself, signed by caramel_autosign."""
    devices = []
    with site.caramel.autosign():
        for number in range(count):
            device = Device(
                site.folder / f"identity-{number}",
                site.nginx.address,
                site.authority.certificate_file,
                str(uuid.UUID(int=number + 1, version=4)),
                command=(world.PLAIN,),
            )
            device.run()
            devices.append(device)
        for device in devices:
            world.until(f"{device.client_id} is signed", lambda device=device: device.run().status == 0, 30, 0.5)  # type: ignore[misc]
    site.identities = devices


@dataclass(frozen=True)
class Event:
    """A run of a device begins (`status` None) or has ended; `at`: seconds since the first device could boot."""

    at: float
    device: int
    status: Optional[int]


@dataclass(frozen=True)
class Storm:
    """What a small fleet did."""

    devices: int
    programs: int
    events: Sequence[Event]
    seconds: float
    left: int

    @property
    def first(self) -> list[float]:
        """When each device was served."""
        return sorted(event.at for event in self.events if event.status == 0)

    @property
    def failures(self) -> float:
        """The share of runs that ended with 127."""
        ended = [event for event in self.events if event.status is not None]
        return sum(event.status != 0 for event in ended) / max(1, len(ended))


def storm(
    site: Site,
    devices: int,
    boots_within: float,
    limit: float,
    say: Callable[[str], None] = lambda line: None,
    seed: int = 1,
) -> Storm:
    """Starts `until-enrolled` for each device at its boot, and waits for their end, for `limit` seconds at most."""
    folder = site.folder / "storm"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    names = {"address": site.nginx.address, "ca": site.authority.certificate_file, "folder": folder}
    for name, check in (("program", PROGRAM), ("curl", CURL)):
        path = folder / name
        path.write_text(RUN.format(pipe=pipe, check=check.format(program=world.PLAIN, **names)))
        path.chmod(0o755)
    chance = random.Random(seed)
    script = folder / UNTIL_ENROLLED.name  # a copy, which nobody changes meanwhile; and what it reads
    shutil.copy(UNTIL_ENROLLED, script)
    shutil.copy(UNTIL_ENROLLED.with_name("chance"), folder)
    boots = sorted((chance.uniform(0, boots_within), number) for number in range(devices))
    programs = 0
    running: dict[int, subprocess.Popen[bytes]] = {}
    ending: list[subprocess.Popen[bytes]] = []
    events: list[Event] = []
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    rest, began = b"", time.monotonic()
    said = -1.0
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(reader, selectors.EVENT_READ)
            while boots or running or ending:
                now = time.monotonic() - began
                if now > limit:
                    break
                for _ in range(5):  # no more, because those that run want to be heard
                    if not boots or boots[0][0] > now:
                        break
                    number = boots.pop(0)[1]
                    identity = site.identities[number % len(site.identities)]
                    real = number % REAL == 0
                    if real:
                        programs += 1
                        shutil.copy2(identity.key_file, folder / f"{number}.pem")
                    running[number] = subprocess.Popen(
                        ["/bin/sh", str(script)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env=world.environment(
                            CARAMEL_EMBEDDED=str(folder / ("program" if real else "curl")),
                            DEVICE=str(number),
                            CLIENT=str(identity.client_id),
                            IDENTITY=str(identity.key_file),
                            HASH=identity.request_hash(),
                            SINCE=formatdate(identity.key_file.stat().st_mtime, usegmt=True),
                        ),
                        start_new_session=True,
                        preexec_fn=world.die_with_parent,
                    )
                selector.select(0.02 if boots else 0.2)
                with suppress(BlockingIOError):
                    rest += os.read(reader, 1 << 16)
                now = time.monotonic() - began
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    number_, _, word = line.decode().partition(" ")
                    events.append(Event(now, int(number_), None if word == "begins" else int(word)))
                    if word == "0":
                        ending.append(running.pop(int(number_)))
                ending = [process for process in ending if process.poll() is None]
                if now - said > 5:
                    said = now
                    served = sum(event.status == 0 for event in events)
                    say(f"{now:4.0f} s: {devices - len(boots)} have booted, {served} are served")
    finally:
        os.close(reader)
        for process in [*running.values(), *ending]:
            world.end(process, 0.1)
    return Storm(devices, programs, events, time.monotonic() - began, len(running) + len(boots))
