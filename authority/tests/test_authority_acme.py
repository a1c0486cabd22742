# SPDX-License-Identifier: MIT OR Apache-2.0
"""Signer `acme`, against the real Pebble, which validates every name at a real name server that takes updates."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional

import pytest
import world
from authority_world import (
    COMMAND,
    ZONE,
    Knot,
    Pebble,
    RegistrationAuthority,
    Reply,
    Server,
    ask,
    at,
    csr,
    rsa_key,
    sha256,
)
from cryptography import x509
from needs import needs, require, slow
from world import until

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]

RULES = f'[rules]\nzone = "{ZONE}"\n'


def name(number: int = 0) -> str:
    return f"fffbeec0ff{number:02x}.{ZONE}"


def request_for(client_id: str, key: Any = None) -> bytes:
    """As a device makes it whose ID is a host name; a public CA's subject has nothing that devices follow."""
    return csr(client_id, key, subject=[("CN", client_id)], names=[x509.DNSName(client_id)])


@pytest.fixture(scope="module")
def knot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Knot]:
    require("knotd", "kdig", "knsupdate", "pebble")
    with Knot(tmp_path_factory.mktemp("knot")) as started:
        yield started


@pytest.fixture(scope="module")
def pebble(tmp_path_factory: pytest.TempPathFactory, knot: Knot) -> Iterator[Pebble]:
    with Pebble(tmp_path_factory.mktemp("pebble"), knot, PEBBLE_CHAIN_LENGTH="2") as started:
        yield started


def made(
    folder: Path, pebble: Pebble, knot: Knot, *, dns: str = "", database: Optional[str] = None, **acme: Any
) -> RegistrationAuthority:
    folder.mkdir(exist_ok=True)
    settings = RULES + pebble.settings(folder, **acme) + (dns or knot.settings)
    return RegistrationAuthority(folder, settings, signer="acme", database=database)


@pytest.fixture
def authority(tmp_path: Path, pebble: Pebble, knot: Knot) -> RegistrationAuthority:
    return made(tmp_path / "authority", pebble, knot)


def work(authority: RegistrationAuthority, days: float = 0) -> str:
    """One worker, until there is nothing left to do."""
    return authority.command("work", "--once", before=at(days) if days else ())


def later(authority: RegistrationAuthority) -> None:
    """Whatever waits for its time, or for the end of a dead worker's lease, waits no longer.

    Setting the clock forward would not do: updates of a zone are signed with the time (RFC 8945, 5.2.3).
    """
    with contextlib.closing(sqlite3.connect(authority.state)) as database, database:
        database.execute("UPDATE orders SET due = 0, leased = min(leased, 1)")
        database.execute("UPDATE numbers SET value = 0 WHERE name = 'paused'")


def by_command(authority: RegistrationAuthority, knot: Knot) -> Path:
    """Changes the zone by a command of the maker's from now on: this one, which also works at another time."""
    script = authority.folder / "change-dns"
    script.write_text(f"""#!/bin/sh
# $1 set or delete, $2 name, $3 type, $4 value
echo "$1 $3" >>{authority.folder}/called
unset LD_PRELOAD FAKETIME FAKETIME_SHARED
{{
    echo "server 127.0.0.1 {knot.port}"
    echo "zone {ZONE}."
    echo "key hmac-sha256:authority:$(cat {knot.key_file})"
    echo "update delete $2 $3"
    [ "$1" = delete ] || echo "update add $2 60 $3 \\"$4\\""
    echo send
}} | knsupdate
""")
    script.chmod(0o755)
    config = authority.config.read_text().partition("[dns]")[0]
    authority.config.write_text(f'{config}[dns]\nzone = "{ZONE}"\ncommand = "{script}"\n')
    return script


def openssl_verifies(folder: Path, root: Path, reply: Reply) -> None:
    leaf = folder / "leaf.crt"
    leaf.write_bytes(reply.body)
    command = ["openssl", "verify", "-x509_strict", "-CAfile", root, "-untrusted", leaf, leaf]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=30)
    assert done.stdout == f"{leaf}: OK\n", done.stderr


# --- As it should be ---


@pytest.mark.parametrize("kind", ["ec", "rsa"])
def test_enrolled(authority: RegistrationAuthority, pebble: Pebble, knot: Knot, tmp_path: Path, kind: str) -> None:
    request = request_for(name(), rsa_key() if kind == "rsa" else None)
    with authority.serving() as server:
        waits = server.enroll(request)
        assert (waits.status, waits.headers["retry-after"]) == (202, "30")
        assert server.get(sha256(request)).headers["retry-after"] == "30"
        assert work(authority) == ""
        reply = server.get(sha256(request))
        assert reply.status == 200
        assert reply.certificate.public_key() == x509.load_pem_x509_csr(request).public_key()
        # Leaf first, then what stands between it and the root, and no root.
        assert len(reply.chain) == 3
        assert all(one.subject != one.issuer for one in reply.chain)
        openssl_verifies(tmp_path, pebble.roots, reply)
        assert server.get("/root.crt").body == pebble.roots.read_bytes()
        unchanged = server.get(sha256(request), If_Modified_Since=reply.headers["last-modified"])
        assert unchanged.status == 304
    assert knot.look_up(f"_acme-challenge.{name()}", "TXT") == []
    assert authority.rows("SELECT * FROM orders") == []
    assert (authority.folder / "account.key").stat().st_mode & 0o777 == 0o600
    actions = [row[2] for row in authority.log()]
    assert actions == ["authorized", "ordered", "signed"]


def test_nothing_is_ordered_for_whom_nobody_authorized(tmp_path: Path, pebble: Pebble, knot: Knot) -> None:
    folder = tmp_path / "authority"
    folder.mkdir()
    authority = RegistrationAuthority(folder, pebble.settings(folder) + knot.settings, signer="acme")
    request, rejected = request_for(name(1)), request_for(name(2))
    with authority.serving() as server:
        assert server.enroll(request).status == 202
        assert server.enroll(rejected).status == 202
        authority.command("authorize", name(2))
        assert server.get(sha256(rejected)).status == 202
        authority.command("reject", name(2))
        work(authority)
        assert [server.get(sha256(one)).status for one in (request, rejected)] == [202, 403]
    assert authority.log("ordered") == []


@pytest.mark.parametrize("wanted", [0, 1])
def test_the_chain_that_the_devices_can_follow(tmp_path: Path, knot: Knot, wanted: int) -> None:
    """A CA that offers two chains: the devices know one of the roots."""
    with Pebble(tmp_path / "pebble", knot, PEBBLE_ALTERNATE_ROOTS="1") as pebble:
        pebble.roots.write_bytes(pebble.get(f"/roots/{wanted}"))
        authority = made(tmp_path / "authority", pebble, knot)
        request = request_for(name())
        with authority.serving() as server:
            server.enroll(request)
            work(authority)
            openssl_verifies(tmp_path, pebble.roots, server.get(sha256(request)))


def test_a_chain_that_no_device_can_follow_is_kept_from_them(
    tmp_path: Path, authority: RegistrationAuthority, pebble: Pebble
) -> None:
    other = world.Authority(tmp_path / "other")
    config = authority.config.read_text().replace(str(pebble.roots), str(other.certificate_file))
    authority.config.write_text(config)
    request = request_for(name())
    with authority.serving() as server:
        server.enroll(request)
        assert "none of the CA's chains leads to the roots" in work(authority)
        assert server.get(sha256(request)).status == 202


def test_the_account_is_made_once(authority: RegistrationAuthority, pebble: Pebble) -> None:
    def accounts() -> int:
        return int(re.findall(r"There are now (\d+) accounts in memory", pebble.daemon.text())[-1])

    requests = [request_for(name(number)) for number in range(2)]
    with authority.serving() as server:
        server.enroll(requests[0])
        work(authority)
        before = accounts()
        server.enroll(requests[1])
        work(authority)
        assert server.get(sha256(requests[1])).status == 200
    assert accounts() == before


def test_nonces_that_the_ca_does_not_like(tmp_path: Path, knot: Knot) -> None:
    """Every third is refused: each request is said again, and no order fails."""
    with Pebble(tmp_path / "pebble", knot, PEBBLE_WFE_NONCEREJECT="33") as pebble:
        authority = made(tmp_path / "authority", pebble, knot)
        requests = [request_for(name(number)) for number in range(3)]
        with authority.serving() as server:
            for request in requests:
                server.enroll(request)
            work(authority)
            statuses = [server.get(sha256(request)).status for request in requests]
        assert "Configured to reject 33% of good nonces" in pebble.daemon.text()
        # Five refusals in a row are possible, one order in ten thousand or so has them.
        assert statuses == [200, 200, 200]


def test_renewal(tmp_path: Path, knot: Knot) -> None:
    """While the new certificate is being made, the device has the old one. A life is 24 s here."""
    with Pebble(tmp_path / "pebble", knot, validity=24) as pebble:
        authority = made(tmp_path / "authority", pebble, knot)
        request = request_for(name())
        with authority.serving() as server:
            server.enroll(request)
            work(authority)
            first = server.get(sha256(request))
            date = first.headers["last-modified"]
            left = first.certificate.not_valid_after_utc - world.now()
            time.sleep(max(0, left.total_seconds() - 10))
            assert server.get(sha256(request), If_Modified_Since=date).status == 304
            until("a third is left", lambda: server.get(sha256(request)) and authority.rows("SELECT 1 FROM orders"))
            assert server.get(sha256(request)).body == first.body
            work(authority)
            second = server.get(sha256(request), If_Modified_Since=date)
            assert second.status == 200
            assert second.certificate.not_valid_after_utc > first.certificate.not_valid_after_utc
    assert len(authority.log("ordered")) == 2


# --- What is not taken ---


@pytest.mark.parametrize(
    "client_id",
    ["fffbeec0ffee", ZONE, f"a.b.{ZONE}", f"_acme-challenge.{ZONE}", f"FFFB.{ZONE}", "a.example.com", f"-a.{ZONE}"],
)
def test_a_name_outside_of_the_zone(authority: RegistrationAuthority, client_id: str) -> None:
    request = csr(client_id, subject=[("CN", client_id)])
    with authority.serving() as server:
        reply = server.post(request)
        assert reply.status == 400
        assert reply.json["detail"].startswith("Bad subject: the CN")
        assert server.get(sha256(request)).status == 404


# --- What goes wrong ---


def test_validation_is_real(authority: RegistrationAuthority, knot: Knot) -> None:
    """A zone that shows nothing: the CA refuses, the device waits, the next try is a new order, later and later."""
    settings = authority.config.read_text()
    nothing = f'[dns]\nzone = "{ZONE}"\ncommand = "/bin/true"\n'
    authority.config.write_text(settings.partition("[dns]")[0] + nothing)
    request = request_for(name())
    with authority.serving() as server:
        server.enroll(request)
        assert re.search("unauthorized|dns", work(authority))
        (due, attempts, resource, problem) = authority.rows("SELECT due, attempts, resource, problem FROM orders")[0]
        assert (attempts, resource) == (1, None)
        assert 30 < due - time.time() < 90
        assert problem.startswith("urn:ietf:params:acme:error:")
        assert problem[:40] in authority.command("list")
        assert 30 <= int(server.get(sha256(request)).headers["retry-after"]) <= 90
        assert work(authority) == ""  # not yet due
        later(authority)
        work(authority)
        (again, attempts) = authority.rows("SELECT due, attempts FROM orders")[0]
        assert attempts == 2 and again > due
        authority.config.write_text(settings)
        later(authority)
        work(authority)
        assert server.get(sha256(request)).status == 200


def test_the_name_server_is_away(authority: RegistrationAuthority, knot: Knot) -> None:
    """The order stays, and is finished when the server is back: no second one is made."""
    request = request_for(name())
    with authority.serving() as server:
        server.enroll(request)
        knot.stop()
        try:
            assert "DNS server 127.0.0.1: " in work(authority)
            assert server.get(sha256(request)).status == 202
        finally:
            knot.start()
        later(authority)
        work(authority)
        assert server.get(sha256(request)).status == 200
    assert len(authority.log("ordered")) == 1


def test_a_key_that_the_name_server_does_not_know(
    authority: RegistrationAuthority, knot: Knot, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0Cg==\n")
    authority.config.write_text(authority.config.read_text().replace(str(knot.key_file), str(tmp_path / "key")))
    request = request_for(name())
    with authority.serving() as server:
        server.enroll(request)
        assert "didn't like the signature" in work(authority)
        assert server.get(sha256(request)).status == 202


def test_the_ca_is_away(tmp_path: Path, knot: Knot) -> None:
    with Pebble(tmp_path / "pebble", knot) as pebble:
        authority = made(tmp_path / "authority", pebble, knot)
    request = request_for(name())
    with authority.serving() as server:
        server.enroll(request)
        assert "the ACME CA: " in work(authority)
        assert server.get(sha256(request)).status == 202
        with pebble:
            config = authority.config.read_text()
            assert str(pebble.roots) in config
            later(authority)
            work(authority)
            assert server.get(sha256(request)).status == 200


def test_the_ca_that_is_not_the_one(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """The directory's certificate is checked."""
    other = world.Authority(tmp_path / "other")
    config = re.sub('directory_ca = ".*"', f'directory_ca = "{other.certificate_file}"', authority.config.read_text())
    authority.config.write_text(config)
    with authority.serving() as server:
        server.enroll(request_for(name()))
    assert "CERTIFICATE_VERIFY_FAILED" in work(authority)


# --- A command in place of updates ---


def test_a_command_of_the_makers(authority: RegistrationAuthority, knot: Knot) -> None:
    script = by_command(authority, knot)
    request, second = request_for(name()), request_for(name(1))
    with authority.serving() as server:
        server.enroll(request)
        assert work(authority) == ""
        assert server.get(sha256(request)).status == 200
        assert (authority.folder / "called").read_text() == "set TXT\ndelete TXT\n"
        script.write_text("#!/bin/sh\nexit 1\n")
        server.enroll(second)
        assert "dns.command: " in work(authority)
        assert server.get(sha256(second)).status == 202


# --- Limits ---


def test_a_limit_per_hour(tmp_path: Path, pebble: Pebble, knot: Knot) -> None:
    """The first rollout is spread, and a device is told how long that takes."""
    authority = made(tmp_path / "authority", pebble, knot, orders_per_hour=2)
    by_command(authority, knot)
    requests = [request_for(name(number)) for number in range(6)]
    with authority.serving() as server:
        for number, request in enumerate(requests):
            server.enroll(request)
            # `due` is in whole seconds, and makes the order.
            with_due = f"UPDATE orders SET due = due - {20 - number} WHERE client_id = '{name(number)}'"
            with contextlib.closing(sqlite3.connect(authority.state)) as database, database:
                database.execute(with_due)
        said = [int(server.get(sha256(request)).headers["retry-after"]) for request in requests]
        assert said == [30, 1800, 3600, 5400, 7200, 9000]
        for hour, there in ((0, 2), (0, 2), (1.02, 4), (2.04, 6)):
            work(authority, hour / 24)
            assert [server.get(sha256(request)).status for request in requests] == there * [200] + (6 - there) * [202]


class Proxy:
    """In front of Pebble, for what Pebble lacks: refusals for want of a rate limit, and renewal information."""

    def __init__(self, pebble: Pebble) -> None:
        self.pebble = pebble
        self.limited = False
        self.window: Optional[tuple[str, str]] = None
        self.asked: list[str] = []
        outer = self
        trust = ssl.create_default_context(cafile=str(pebble.https.certificate_file))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if self.path.startswith("/renewal-info/") and outer.window:
                    window = {"start": outer.window[0], "end": outer.window[1]}
                    self.say(200, {"Retry-After": "7200"}, json.dumps({"suggestedWindow": window}).encode())
                    return
                if self.path == "/order-plz" and outer.limited:
                    problem = {"type": "urn:ietf:params:acme:error:rateLimited", "detail": "too many", "status": 429}
                    headers = {"Retry-After": "1800", "Content-Type": "application/problem+json"}
                    self.say(429, {**headers, "Replay-Nonce": "AAAA"}, json.dumps(problem).encode())
                    return
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length) if length else None
                address = f"https://localhost:{pebble.port}{self.path}"
                forward = urllib.request.Request(address, body, dict(self.headers), method=self.command)
                try:
                    answer = urllib.request.urlopen(forward, context=trust, timeout=20)
                except urllib.error.HTTPError as error:
                    answer = error
                with answer:
                    content = answer.read()
                    if self.path == "/dir" and outer.window:
                        content = json.dumps(
                            {**json.loads(content), "renewalInfo": f"https://localhost:{outer.port}/renewal-info"}
                        ).encode()
                    kept = {"Replay-Nonce", "Location", "Link", "Content-Type", "Retry-After"}
                    self.say(answer.status, {k: v for k, v in answer.headers.items() if k in kept}, content)

            do_POST = do_HEAD = do_GET  # noqa: N815

            def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for header, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(header, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pebble.folder / "https" / "server.pem")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]

    def __enter__(self) -> Proxy:
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


def test_the_ca_wants_to_be_left_alone(tmp_path: Path, pebble: Pebble, knot: Knot) -> None:
    """All new orders wait as long as the CA says, not only the one that it refused."""
    with Proxy(pebble) as proxy:
        authority = made(tmp_path / "authority", pebble, knot, directory=f"https://localhost:{proxy.port}/dir")
        first, second = request_for(name(1)), request_for(name(2))
        with authority.serving() as server:
            server.enroll(first)
            proxy.limited = True
            assert "rateLimited" in work(authority)
            server.enroll(second)
            proxy.limited = False
            asked = len(proxy.asked)
            work(authority)
            assert len(proxy.asked) == asked
            for request in (first, second):
                assert 1790 <= int(server.get(sha256(request)).headers["retry-after"]) <= 1800
            later(authority)
            work(authority)
            assert [server.get(sha256(request)).status for request in (first, second)] == [200, 200]


def test_renewal_information(tmp_path: Path, pebble: Pebble, knot: Knot) -> None:
    """The CA wants a certificate renewed long before a third of its life is left: at the next question it is."""
    with Proxy(pebble) as proxy:
        proxy.window = ("2060-01-01T00:00:00Z", "2060-01-02T00:00:00Z")
        authority = made(tmp_path / "authority", pebble, knot, directory=f"https://localhost:{proxy.port}/dir")
        request = request_for(name())
        with authority.serving() as server:
            server.enroll(request)
            work(authority)
            first = server.get(sha256(request))
            (path,) = [path for path in proxy.asked if path.startswith("/renewal-info/")]
            assert len(path.removeprefix("/renewal-info/").split(".")) == 2
            (renew, ask_again) = authority.rows("SELECT renew_after, ask_renewal_info FROM certificates")[0]
            assert 2840140800 <= renew <= 2840140800 + 86400
            assert abs(ask_again - time.time() - 7200) < 60
            work(authority)
            assert authority.rows("SELECT count(*) FROM orders") == [(0,)]
            # Something has happened at the CA.
            proxy.window = ("2020-01-01T00:00:00Z", "2020-01-02T00:00:00Z")
            work(authority, 0.1)
            assert len([path for path in proxy.asked if path.startswith("/renewal-info/")]) == 2
            assert server.get(sha256(request)).body == first.body
            work(authority)
            assert server.get(sha256(request)).body != first.body


# --- Several workers, and killed ones ---


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_several_workers(tmp_path: Path, knot: Knot, request: pytest.FixtureRequest, kind: str) -> None:
    database = request.getfixturevalue("postgres").url if kind == "postgresql" else None
    requests = [request_for(name(number)) for number in range(8)]
    with Pebble(tmp_path / "pebble", knot) as pebble:
        authority = made(tmp_path / "authority", pebble, knot, database=database)
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(authority.serving()) for _ in range(2)]
            for _ in range(3):
                stack.enter_context(authority.working())
            for number, body in enumerate(requests):
                servers[number % 2].enroll(body)
                servers[1 - number % 2].get(sha256(body))

            def signed() -> bool:
                return all(servers[0].get(sha256(body)).status == 200 for body in requests)

            until("all are signed", signed, 60, 0.2)
        assert len(made_by(pebble)) == len(set(made_by(pebble))) == 8
        assert pebble.daemon.text().count("Added order") == 8
    assert len([row for row in authority.log("ordered") if row[3].endswith(ZONE)]) >= 8


def made_by(pebble: Pebble) -> list[str]:
    """The orders for which Pebble made a certificate, one entry a certificate."""
    return re.findall(r"Issued certificate serial \S+ for order (\S+)", pebble.daemon.text())


SENDS = "write,sendto,fdatasync"


@slow
def test_killed_at_every_step(tmp_path: Path, knot: Knot) -> None:
    """The worker dies at its first system call that sends something or makes it durable, at the second, and so on.

    Another one goes on when the lease has ended. The CA has one order and one certificate for each device all the
    same.
    """
    require("strace")
    with Pebble(tmp_path / "pebble", knot, PEBBLE_WFE_NONCEREJECT="0") as pebble:
        authority = made(tmp_path / "authority", pebble, knot)
        with authority.serving() as server:
            number, killed = 0, True
            while killed:
                number += 1
                assert number < 90
                request = request_for(name(number))
                server.enroll(request)
                inject = f"--inject={SENDS}:signal=SIGKILL:when={number}"
                trace = ["strace", "-qq", "-o", "/dev/null", "-e", f"trace={SENDS}", inject]
                done = subprocess.run(
                    [*trace, str(COMMAND), "--config", str(authority.config), "work", "--once"],
                    capture_output=True, timeout=60, env=world.environment(),
                )  # fmt: skip
                killed = done.returncode != 0
                assert done.returncode in (0, -9, 137), done.stderr
                later(authority)
                work(authority)
                assert server.get(sha256(request)).status == 200, number
                assert knot.look_up(f"_acme-challenge.{name(number)}", "TXT") == []
        assert number > 15
        assert len(made_by(pebble)) == len(set(made_by(pebble))) == number
        assert pebble.daemon.text().count("Added order") == number
    assert authority.rows("SELECT count(*), count(distinct sha256) FROM certificates") == [(number, number)]


# --- The device's address ---


def posted_from(server: Server, request: bytes, address: str, method: str = "POST") -> int:
    body = request if method == "POST" else None
    return ask(server.port, method, f"/{sha256(request)}", body, X_Forwarded_For=address).status


def test_the_devices_address(authority: RegistrationAuthority, knot: Knot) -> None:
    authority.config.write_text(authority.config.read_text() + 'addresses = "post"\n')
    with authority.serving(options=["--behind-proxy"]) as server:
        for number, (address, kind, other) in enumerate(
            [("192.0.2.7", "A", "AAAA"), ("2001:db8::7", "AAAA", "A"), ("192.0.2.8", "A", "AAAA")]
        ):
            request = request_for(name(40))
            posted_from(server, request, address)
            if number:  # a second key for the ID: for the administrator
                assert work(authority) == ""
                assert knot.look_up(name(40), kind) == []
                authority.command("authorize", sha256(request))
            work(authority)
            assert knot.look_up(name(40), kind) == [address]
            assert knot.look_up(name(40), other) == []
            assert posted_from(server, request, "192.0.2.99", "GET") in (200, 202)
            work(authority)
            assert knot.look_up(name(40), kind) == [address]


def test_the_address_at_every_check(authority: RegistrationAuthority, knot: Knot) -> None:
    authority.config.write_text(authority.config.read_text() + 'addresses = "check"\n')
    request = request_for(name(41))
    with authority.serving(options=["--behind-proxy"]) as server:
        posted_from(server, request, "192.0.2.7")
        for address in ("192.0.2.7", "192.0.2.8"):
            posted_from(server, request, address, "GET")
            work(authority)
            assert knot.look_up(name(41), "A") == [address]


def test_addresses_are_nobodys_business_by_default(authority: RegistrationAuthority, knot: Knot) -> None:
    request = request_for(name(42))
    with authority.serving(options=["--behind-proxy"]) as server:
        posted_from(server, request, "192.0.2.7")
        posted_from(server, request, "192.0.2.7", "GET")
        work(authority)
    assert knot.look_up(name(42), "A") == []


# --- The configuration ---


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("terms_agreed = true", "", "acme.terms_agreed has to be true"),
        ('roots = ".*"', "", "acme.roots names the CA's roots"),
        ('roots = ".*"', 'roots = "/nowhere"', "acme.roots: "),
        ('directory = ".*"', 'directory = "http://localhost/dir"', "acme.directory is an https address"),
        ('key_file = ".*"', "", "dns.server needs a key"),
        (f'zone = "{ZONE}"\nserver', "server", "the signer acme needs dns.zone"),
        ("orders_per_hour = 1000", "orders_per_hour = 0", "acme.orders_per_hour is positive"),
    ],
)
def test_a_wrong_configuration_is_said(authority: RegistrationAuthority, old: str, new: str, said: str) -> None:
    config = authority.config.read_text()
    changed = re.sub(old, new, config)
    assert changed != config
    authority.config.write_text(changed)
    assert said in authority.command("list", status=1)


def test_own_ca_commands_say_that_there_is_none(authority: RegistrationAuthority) -> None:
    assert 'the signer is not "ca"' in authority.command("ca-renew", status=1)
