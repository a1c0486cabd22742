# SPDX-License-Identifier: MIT OR Apache-2.0
"""Signer `acme`, against the real Pebble, which validates every name at a real name server that takes updates."""

from __future__ import annotations

import base64
import contextlib
import datetime
import email.utils
import json
import re
import socketserver
import sqlite3
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional

import pytest
import world
from authority_world import (
    COMMAND,
    ZONE,
    Key,
    Knot,
    Pebble,
    Postgres,
    RegistrationAuthority,
    Reply,
    Server,
    ask,
    at,
    csr,
    ec_key,
    rsa_key,
    sha256,
)
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from needs import needs, require, slow
from world import until

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]

#: Status, headers, body.
Said = tuple[int, dict[str, str], bytes]
RULES = f'[rules]\nzone = "{ZONE}"\n'


def name(number: int = 0) -> str:
    return f"fffbeec0ff{number:02x}.{ZONE}"


def request_for(client_id: str, key: Any = None) -> bytes:
    """As a device makes it whose ID is a host name; a public CA's subject has nothing that devices follow."""
    return csr(client_id, key, subject=[("CN", client_id)], names=[x509.DNSName(client_id)])


def key_file(key: Key, password: bytes = b"") -> bytes:
    """This key in PEM, under a password if one is given."""
    sealed = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed)


@pytest.fixture(scope="module")
def knot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Knot]:
    require("knotd", "kdig", "knsupdate", "pebble")
    aliases = "_acme-challenge.fffbeec0ffa0 60 CNAME challenges\n"
    aliases += "_acme-challenge.fffbeec0ffa1 60 CNAME elsewhere.example.net.\n"
    with Knot(tmp_path_factory.mktemp("knot"), records=aliases) as started:
        yield started


@pytest.fixture(scope="module")
def pebble(tmp_path_factory: pytest.TempPathFactory, knot: Knot) -> Iterator[Pebble]:
    # What it refuses of nonces by chance has a test of its own; here what is sent is counted.
    with Pebble(
        tmp_path_factory.mktemp("pebble"), knot, PEBBLE_CHAIN_LENGTH="2", PEBBLE_WFE_NONCEREJECT="0"
    ) as started:
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


def later(authority: RegistrationAuthority, postgres: Optional[Postgres] = None) -> None:
    """Whatever waits for its time, or for the end of a dead worker's lease, waits no longer.

    Setting the clock forward would not do: updates of a zone are signed with the time (RFC 8945, 5.2.3).
    """
    for statement in (
        "UPDATE orders SET due = 0, leased = CASE WHEN leased > 0 THEN 1 ELSE 0 END",
        "DELETE FROM limits",
    ):
        if postgres:
            postgres.sql(statement, authority.database)
        else:
            sql(authority, statement)


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
        # The account is new, which whoever has lost its key wants to know.
        account = rf"the ACME CA has a new account for us: https://localhost:{pebble.port}/my-account/\w+\n"
        assert re.fullmatch(account, work(authority))
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
        assert work(authority) == ""
        assert server.get(sha256(requests[1])).status == 200
    assert accounts() == before
    (authority.folder / "account.key").unlink()
    assert "account.key is gone, and with it the account that made all orders so far" in work(authority)


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
        # Twice that, and twice again: never five times in an hour, which is one too many for Let's Encrypt.
        assert 880 < due - time.time() < 1510
        assert problem.startswith("the ACME CA: urn:ietf:params:acme:error:")
        assert problem[:40] in authority.command("list")
        assert 870 <= int(server.get(sha256(request)).headers["retry-after"]) <= 1510
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
    requests = [request_for(name(number)) for number in range(5)]
    with authority.serving() as server:
        for request in requests:
            server.enroll(request)
        # Not one question for each order.
        assert work(authority).count("the ACME CA: ConnectionError") == 1
        assert {server.get(sha256(request)).status for request in requests} == {202}
        assert authority.rows("SELECT max(due) < strftime('%s', 'now') + 100 FROM orders") == [(1,)]
        with pebble:
            later(authority)
            work(authority)
            assert {server.get(sha256(request)).status for request in requests} == {200}


def test_the_ca_that_is_not_the_one(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """The directory's certificate is checked."""
    other = world.Authority(tmp_path / "other")
    config = re.sub('directory_ca = ".*"', f'directory_ca = "{other.certificate_file}"', authority.config.read_text())
    authority.config.write_text(config)
    with authority.serving() as server:
        server.enroll(request_for(name()))
    assert "CERTIFICATE_VERIFY_FAILED" in work(authority)


def test_a_clock_that_was_ahead(tmp_path: Path, knot: Knot) -> None:
    """What was put off, leased and counted when it was thirty days later, stops nobody now."""
    with Pebble(tmp_path / "pebble", knot) as pebble:
        authority = made(tmp_path / "authority", pebble, knot, orders_per_hour=1, renewal_share=0.0)
    by_command(authority, knot)
    request = request_for(name())
    with authority.serving() as server:
        server.enroll(request)
        # It waits for a CA that is away, and so it is known that no order was made.
        assert "the ACME CA: ConnectionError" in work(authority, 30)
        sql(authority, "UPDATE orders SET leased = due + 600")
        sql(authority, "INSERT INTO limits SELECT 'first orders', due, 'too many' FROM orders")
        assert said_wait(server, request) > 29 * 86400
        with pebble:
            work(authority)
            assert server.get(sha256(request)).status == 200


# --- A command in place of updates ---


def test_a_command_of_the_makers(authority: RegistrationAuthority, knot: Knot) -> None:
    script = by_command(authority, knot)
    request, second = request_for(name()), request_for(name(1))
    with authority.serving() as server:
        server.enroll(request)
        assert "dns.command" not in work(authority)
        assert server.get(sha256(request)).status == 200
        assert (authority.folder / "called").read_text() == "set TXT\ndelete TXT\n"
        authority.config.write_text(authority.config.read_text() + "command_seconds = 1\n")
        server.enroll(second)
        for text, said in (("exit 1", "non-zero exit status 1"), ("exec sleep 3", "timed out after ")):
            script.write_text(f"#!/bin/sh\n{text}\n")
            assert re.search(f"dns.command: .*{said}", work(authority))
            later(authority)
        assert server.get(sha256(second)).status == 202
    assert len(authority.log("ordered")) == 2


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
    """In front of Pebble, for the answers that Pebble never gives.

    `window` is renewal information, which Pebble lacks; `chain` what becomes of a chain that is no alternate.
    """

    def __init__(self, pebble: Pebble) -> None:
        self.pebble = pebble
        self.window: Optional[tuple[str, str]] = None
        self.info_after = "7200"
        self.chain: Callable[[list[x509.Certificate]], list[x509.Certificate]] = list
        self.asked: list[str] = []
        #: What was said in requests for new orders.
        self.orders: list[dict[str, Any]] = []
        self._says: list[tuple[str, Said]] = []
        outer = self
        trust = ssl.create_default_context(cafile=str(pebble.https.certificate_file))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length) if length else None
                if self.path == "/order-plz" and body:
                    payload = json.loads(body)["payload"]
                    outer.orders.append(json.loads(base64.urlsafe_b64decode(payload + "==")))
                for one in outer._says:
                    if self.path.startswith(one[0]):
                        outer._says.remove(one)
                        self.say(*one[1])
                        return
                if self.path.startswith("/renewal-info/") and outer.window:
                    window = {"start": outer.window[0], "end": outer.window[1]}
                    content = json.dumps({"suggestedWindow": window}).encode()
                    self.say(200, {"Retry-After": outer.info_after}, content)
                    return
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
                    if answer.status == 200 and re.fullmatch(r"/certZ/\w+", self.path):
                        chain = outer.chain(x509.load_pem_x509_certificates(content))
                        content = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in chain)
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

    def says(self, path: str, status: int, content: Any, times: int = 1, **headers: str) -> None:
        """The next `times` that a path begins so, the answer is this one: JSON, or bytes as they are."""
        problem = status >= 400 and isinstance(content, dict)
        if problem and isinstance(content.get("type"), str):
            content = {**content, "type": "urn:ietf:params:acme:error:" + content["type"]}
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/problem+json" if problem else "application/json"
        said = {name.replace("_", "-"): value for name, value in headers.items()}
        self._says += [(path, (status, {"Content-Type": kind, "Replay-Nonce": "AAAA", **said}, body))] * times

    def silent(self) -> None:
        """Pebble answers everything again, and nothing was asked."""
        self._says, self.asked = [], []

    def __enter__(self) -> Proxy:
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def proxy(pebble: Pebble) -> Iterator[Proxy]:
    with Proxy(pebble) as started:
        yield started


@pytest.fixture
def proxied(tmp_path: Path, pebble: Pebble, knot: Knot, proxy: Proxy) -> RegistrationAuthority:
    """An authority that talks to Pebble through the proxy."""
    return made(tmp_path / "authority", pebble, knot, directory=f"https://localhost:{proxy.port}/dir")


def sql(authority: RegistrationAuthority, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(authority.state)) as database, database:
        database.execute(statement)


def said_wait(server: Server, request: bytes) -> int:
    return int(server.get(sha256(request)).headers["retry-after"])


def test_the_ca_wants_to_be_left_alone(proxied: RegistrationAuthority, proxy: Proxy) -> None:
    """A limit of the account: all first orders wait as long as the CA says; a renewal may be exempt from it."""
    first, second, has_one = (request_for(name(number)) for number in (1, 2, 3))
    with proxied.serving() as server:
        server.enroll(has_one)
        work(proxied)
        server.enroll(first)
        limit = {"type": "rateLimited", "detail": "too many new orders (300) from this account in the last 3h0m0s"}
        proxy.says("/order-plz", 429, limit, Retry_After="1800")
        assert "rateLimited" in work(proxied)
        server.enroll(second)
        asked = len(proxy.asked)
        work(proxied)
        assert len(proxy.asked) == asked
        for request in (first, second):
            assert 1700 <= said_wait(server, request) <= 1800
        old = server.get(sha256(has_one))
        sql(proxied, "UPDATE certificates SET renew_after = 0")
        server.get(sha256(has_one))
        work(proxied)
        assert server.get(sha256(has_one)).body != old.body
        later(proxied)
        work(proxied)
        assert [server.get(sha256(request)).status for request in (first, second)] == [200, 200]


@pytest.mark.parametrize(
    "detail",
    [f'too many failed authorizations (5) for "{name(1)}"', "already issued for this exact set of identifiers"],
)
def test_a_limit_for_one_name(proxied: RegistrationAuthority, proxy: Proxy, detail: str) -> None:
    """It is that device's only, also with another key; and the next trouble doesn't last as long."""
    limited, other, third = (request_for(name(number)) for number in (1, 2, 3))
    again = request_for(name(1))
    with proxied.serving() as server:
        for number, request in enumerate((limited, other, third)):
            server.enroll(request)
            sql(proxied, f"UPDATE orders SET due = due - {9 - number} WHERE sha256 = '{sha256(request)}'")
        proxy.says("/order-plz", 429, {"type": "rateLimited", "detail": detail}, Retry_After="122400")
        proxy.says("/order-plz", 500, {"type": "serverInternal", "detail": "sorry"})
        work(proxied)
        # Nobody waits for longer than a day, whatever the CA says.
        assert 86300 <= said_wait(server, limited) <= 86400
        assert 30 <= said_wait(server, other) <= 80
        assert server.get(sha256(third)).status == 200
        server.enroll(again)
        proxied.command("authorize", sha256(again))
        server.get(sha256(again))
        assert 86300 <= said_wait(server, again) <= 86400


def test_renewals_are_first_and_have_a_share_of_the_hour(tmp_path: Path, pebble: Pebble, knot: Knot) -> None:
    """Four orders an hour, one of them kept: strangers get the other three, and the device that has one its next."""
    authority = made(tmp_path / "authority", pebble, knot, orders_per_hour=4)
    has_one, *strangers = (request_for(name(number)) for number in range(7))
    with authority.serving() as server:
        server.enroll(has_one)
        work(authority)
        for request in strangers[:5]:
            server.enroll(request)
        sql(authority, "UPDATE orders SET due = due - 9")
        work(authority)
        statuses = [server.get(sha256(request)).status for request in strangers[:5]]
        assert sorted(statuses) == [200, 200, 202, 202, 202]
        sql(authority, "UPDATE certificates SET renew_after = 0")
        old = server.get(sha256(has_one))
        # The renewal that has waited longer is not in that queue.
        sql(authority, "UPDATE orders SET due = due - 9 WHERE renewal")
        server.enroll(strangers[5])
        # A place in the queue counts by what the hour has for first orders.
        assert said_wait(server, strangers[5]) == 3 * 3600 // 3
        work(authority)
        assert server.get(sha256(has_one)).body != old.body
    assert [row[-1] for row in authority.log("ordered")] == ["first", "first", "first", "renewal"]


NONE_OF_IT = b"<html>We'll be back soon</html>"


@pytest.mark.parametrize(
    "path, status, content, headers",
    [
        ("/dir", 200, [1], {}),
        ("/nonce-plz", 503, NONE_OF_IT, {"Retry_After": "99999999999999"}),
        ("/sign-me-up", 200, {"hello": 1}, {}),
        ("/order-plz", 200, [{"status": 1}], {}),
        ("/order-plz", 403, {"type": 5, "detail": "\0\33[31m"}, {}),
        ("/order-plz", 400, {"type": "unheardOf", "detail": "really"}, {}),
        ("/authZ/", 404, {"type": "malformed", "detail": "not here yet"}, {}),
        ("/authZ/", 200, {"status": "expired", "identifier": {"type": "dns", "value": name()}}, {}),
        ("/chalZ/", 200, {"status": "pending"}, {}),
        ("/my-order/", 200, {"status": "half-done"}, {}),
        ("/my-order/", 404, NONE_OF_IT, {}),
        ("/finalize-order/", 403, {"type": "orderNotReady", "detail": "ask again"}, {}),
        ("/finalize-order/", 500, NONE_OF_IT, {"Retry_After": "Fri, 99 Foo 2099"}),
        ("/certZ/", 200, b"none", {}),
    ],
)  # fmt: skip
def test_whatever_the_ca_answers(
    proxied: RegistrationAuthority,
    pebble: Pebble,
    proxy: Proxy,
    path: str,
    status: int,
    content: Any,
    headers: Any,
) -> None:
    """No answer ends a worker. The order is asked about again, not made again, and there is a reason to read."""
    before = pebble.daemon.text().count("Added order")
    request = request_for(name())
    with proxied.serving() as server:
        server.enroll(request)
        proxy.says(path, status, content, **headers)
        said = work(proxied)
        assert re.search(rf"{name()}: the ACME CA: .*\w{{3}}", said)
        ((leased, problem, due),) = proxied.rows("SELECT leased, problem, due FROM orders")
        assert leased == 0 and problem in said and problem.isprintable()
        assert 30 <= due - time.time() <= 3600
        assert problem[:60] in proxied.command("list")
        later(proxied)
        work(proxied)
        assert server.get(sha256(request)).status == 200
    assert pebble.daemon.text().count("Added order") == before + 1


def test_dates_of_http_are_utc(proxied: RegistrationAuthority, proxy: Proxy) -> None:
    """And a CA that isn't ready yet is asked when it says, and not later than it can matter."""
    with proxied.serving() as server:
        server.enroll(request_for(name()))
        date = email.utils.formatdate(time.time() + 60, usegmt=True)
        for after in (date, "99999999999999"):
            proxy.silent()
            proxy.says("/my-order/", 200, {"status": "processing"}, 99, Retry_After=after)
            later(proxied)
            with proxied.working(before=["env", "TZ=Asia/Tokyo"]) as worker:
                until("the order is asked about", lambda: [one for one in proxy.asked if "/my-order/" in one])
                time.sleep(4)
                assert worker.alive, worker.text()
            assert len([one for one in proxy.asked if "/my-order/" in one]) == 1


def test_a_ca_that_has_lost_its_accounts(tmp_path: Path, knot: Knot) -> None:
    """Pebble forgets everything when it ends. The worker that goes on makes a new account, and says so."""
    pebble = Pebble(tmp_path / "pebble", knot)
    with pebble:
        authority = made(tmp_path / "authority", pebble, knot)
        first, second = request_for(name(1)), request_for(name(2))
        stack = contextlib.ExitStack()
        server = stack.enter_context(authority.serving())
        worker = stack.enter_context(authority.working())
        server.enroll(first)
        until("it is signed", lambda: server.get(sha256(first)).status == 200, 30)
    with stack, pebble:
        server.enroll(second)
        until("it is said", lambda: "has lost our account and its orders: it is registered again" in worker.text())
        later(authority)
        until("it is signed", lambda: server.get(sha256(second)).status == 200, 30)
        assert worker.text().count("has a new account for us") == 2


def test_an_order_at_a_ca_that_is_gone(proxied: RegistrationAuthority, proxy: Proxy) -> None:
    """It was made before the configuration had this CA. Another one is made, and the others don't wait for it."""
    gone = f"https://localhost:{world.free_port()}"
    stale, other = request_for(name(1)), request_for(name(2))
    with proxied.serving() as server:
        server.enroll(stale)
        place = {"uri": f"{gone}/order", "authorizations": [f"{gone}/authorization"], "finalize": f"{gone}/finalize"}
        sql(proxied, f"UPDATE orders SET due = due - 9, resource = '{json.dumps(place)}'")
        server.enroll(other)
        assert "the order is not where the CA's directory is" in work(proxied)
        assert [server.get(sha256(request)).status for request in (stale, other)] == [202, 200]
        later(proxied)
        work(proxied)
        assert server.get(sha256(stale)).status == 200


def test_external_account_binding(tmp_path: Path, knot: Knot) -> None:
    """A CA whose accounts belong to customers."""
    key = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W"
    more = {"externalAccountBindingRequired": True, "externalAccountMACKeys": {"kid-1": key}}
    (tmp_path / "eab.key").write_text(key + "\n")
    with Pebble(tmp_path / "pebble", knot, more=more) as pebble:
        request = request_for(name())
        authority = made(tmp_path / "authority", pebble, knot)
        with authority.serving() as server:
            server.enroll(request)
            assert "externalAccountRequired" in work(authority)
            binding = f'eab_key_id = "kid-1"\neab_key_file = "{tmp_path}/eab.key"\n[dns]'
            authority.config.write_text(authority.config.read_text().replace("[dns]", binding))
            later(authority)
            work(authority)
            assert server.get(sha256(request)).status == 200


def test_a_certificate_that_is_not_for_clients(proxied: RegistrationAuthority, proxy: Proxy, tmp_path: Path) -> None:
    """As public CAs make them now. It is kept from the device until the configuration wants it, and then not made
    again.
    """
    public = world.Authority(tmp_path / "public")
    request = request_for(name())
    server_only = public.sign(request, usage=[world.SERVER_AUTH])
    proxy.chain = lambda _: x509.load_pem_x509_certificates(server_only)
    config = re.sub('roots = ".*"', f'roots = "{public.certificate_file}"', proxied.config.read_text())
    proxied.config.write_text(config)
    with proxied.serving() as server:
        server.enroll(request)
        assert "not for clients, which acme.usages asks for" in work(proxied)
        assert server.get(sha256(request)).status == 202
        assert "not for clients" in proxied.command("list")
        proxied.config.write_text(config.replace("[acme]", '[acme]\nusages = ["server"]'))
        later(proxied)
        work(proxied)
        assert server.get(sha256(request)).certificate == x509.load_pem_x509_certificate(server_only)
    assert len(proxy.orders) == 1


def test_a_root_that_an_older_one_has_signed(
    proxied: RegistrationAuthority, proxy: Proxy, pebble: Pebble, tmp_path: Path
) -> None:
    """The CA's only chain ends with the new root as the older one has signed it; the devices have it as its own."""
    older = world.Authority(tmp_path / "older")
    root = x509.load_pem_x509_certificate(pebble.roots.read_bytes())
    cross = older.issue(root.public_key(), root.subject, ca=True, usage=())
    proxy.chain = lambda chain: [*chain, x509.load_pem_x509_certificate(cross)]
    request = request_for(name())
    with proxied.serving() as server:
        server.enroll(request)
        work(proxied)
        reply = server.get(sha256(request))
        assert len(reply.chain) == 3
        openssl_verifies(tmp_path, pebble.roots, reply)


def test_a_chain_that_has_ended(tmp_path: Path, knot: Knot) -> None:
    """Its signatures are good, and no device follows it: the CA's other chain is taken."""
    with Pebble(tmp_path / "pebble", knot, PEBBLE_ALTERNATE_ROOTS="1") as pebble, Proxy(pebble) as proxy:
        old = world.Authority(tmp_path / "old")
        yesterday = world.now() - world.hours(24)

        def ended(chain: list[x509.Certificate]) -> list[x509.Certificate]:
            key, subject = chain[1].public_key(), chain[1].subject
            other = old.issue(key, subject, ca=True, usage=(), not_after=yesterday)
            return [chain[0], x509.load_pem_x509_certificate(other)]

        proxy.chain = ended
        pebble.roots.write_bytes(old.certificate_file.read_bytes() + pebble.get("/roots/1"))
        authority = made(tmp_path / "authority", pebble, knot, directory=f"https://localhost:{proxy.port}/dir")
        request = request_for(name())
        with authority.serving() as server:
            server.enroll(request)
            work(authority)
            openssl_verifies(tmp_path, pebble.roots, server.get(sha256(request)))


def test_renewal_information(proxied: RegistrationAuthority, proxy: Proxy) -> None:
    """The CA wants a certificate renewed long before a third of its life is left: at the next question it is.

    And says in the order which certificate the new one replaces, which CAs don't count; unless the CA doesn't like
    that.
    """

    def moment(days: float) -> str:
        return f"{world.now() + datetime.timedelta(days=days):%FT%TZ}"

    def known() -> tuple[float, float]:
        """In days from now: when it is renewed, when the CA is asked again."""
        ((renew, ask_again),) = proxied.rows(
            "SELECT renew_after, ask_renewal_info FROM certificates ORDER BY id DESC LIMIT 1"
        )
        return (renew - time.time()) / 86400, (ask_again - time.time()) / 86400

    proxy.window = (moment(20), moment(21))
    request = request_for(name())
    with proxied.serving() as server:
        server.enroll(request)
        work(proxied)
        first = server.get(sha256(request))
        (path,) = [path for path in proxy.asked if path.startswith("/renewal-info/")]
        assert len(path.removeprefix("/renewal-info/").split(".")) == 2
        assert 19.9 <= known()[0] <= 21 and known()[1] == pytest.approx(7200 / 86400, abs=0.001)
        for window, after, renew, ask_again in (
            ((moment(70), moment(80)), "0", 60, 60 / 86400),  # a third is left on the 60th day
            ((moment(200), moment(201)), "99999999999999", 60, 1),  # after its end
            ((moment(30), moment(29)), "7200", 60, 1 / 24),  # makes no sense
            ((moment(-2000), moment(-1999)), "7200", 60, 1 / 24),  # nor does this
        ):
            proxy.window, proxy.info_after = window, after
            sql(proxied, "UPDATE certificates SET ask_renewal_info = 0, renew_after = not_before + 60 * 86400")
            work(proxied)
            assert known() == pytest.approx((renew, ask_again), abs=0.001), window
        assert proxied.rows("SELECT count(*) FROM orders") == [(0,)]
        # Something has happened at the CA.
        proxy.window = (moment(-0.03), moment(-0.02))
        sql(proxied, "UPDATE certificates SET ask_renewal_info = 0")
        work(proxied)
        assert server.get(sha256(request)).body == first.body
        proxy.says("/order-plz", 409, {"type": "alreadyReplaced", "detail": "it has been"})
        work(proxied)
        assert server.get(sha256(request)).body != first.body
        assert [one.get("replaces") for one in proxy.orders] == [None, path.removeprefix("/renewal-info/"), None]


# --- The zone ---


def test_a_name_server_by_its_name_and_an_alias(tmp_path: Path, pebble: Pebble, knot: Knot) -> None:
    """The challenge's name leads elsewhere in the zone; or out of it, which the CA is not bothered with."""
    settings = knot.settings.replace('server = "127.0.0.1"', 'server = "localhost"\nkey_algorithm = "HMAC-SHA256."')
    authority = made(tmp_path / "authority", pebble, knot, dns=settings)
    inside, outside = request_for(name(0xA0)), request_for(name(0xA1))
    with authority.serving() as server:
        for request in (inside, outside):
            server.enroll(request)
        said = work(authority)
        assert f"_acme-challenge.{name(0xA1)} is an alias of elsewhere.example.net., which is outside" in said
        assert [server.get(sha256(request)).status for request in (inside, outside)] == [200, 202]
    assert knot.look_up(f"challenges.{ZONE}", "TXT") == []
    assert "incorrect" not in said and authority.rows("SELECT attempts, resource IS NULL FROM orders") == [(1, 0)]


@pytest.mark.parametrize("found", ["records", "settings"])
def test_a_name_server_that_lags(tmp_path: Path, found: str) -> None:
    """A CA that looks at the zone's second name server, which has the answer some seconds later."""
    require("root") if found == "records" else None
    at, port = ("127.53.53.53", 53) if found == "records" else ("127.0.0.1", 0)
    records = f"@ 60 NS ns2\nns2 60 A {at}\n" if found == "records" else ""
    with (
        Knot(tmp_path / "first", records=records) as first,
        Knot(tmp_path / "second", primary=first, at=at, port=port) as second,
        Pebble(tmp_path / "pebble", second) as pebble,
    ):
        named = f'name_servers = ["127.0.0.1@{second.port}"]\n' if found == "settings" else ""
        authority = made(tmp_path / "authority", pebble, first, dns=first.settings + named)
        request = request_for(name())
        with authority.serving() as server:
            server.enroll(request)
            work(authority)
            assert server.get(sha256(request)).status == 200
    assert authority.rows("SELECT name FROM zone_names ORDER BY name") == (
        [(f"ns.{ZONE}",), (f"ns2.{ZONE}",)] if found == "records" else [(f"ns.{ZONE}",)]
    )


def test_a_name_server_that_has_no_answer(tmp_path: Path, pebble: Pebble, knot: Knot) -> None:
    """What the zone needs for itself stays known while its name server doesn't serve the zone."""
    own = f"primary.{ZONE}"
    with Knot(tmp_path / "serves", records="@ 60 NS primary\nprimary 60 A 127.0.0.1\n") as serves:
        authority = made(tmp_path / "authority", pebble, serves)
        authority.init()
        work(authority)
        port = serves.port
    with Knot(tmp_path / "other", zone="other.example.com", port=port):
        assert "the zone's own names: DNS server 127.0.0.1 says REFUSED" in work(authority)
        with authority.serving() as server:
            assert "needs for itself" in server.post(request_for(own)).json["detail"]


# --- Several workers, and killed ones ---


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_several_workers(tmp_path: Path, knot: Knot, request: pytest.FixtureRequest, kind: str) -> None:
    requests = [request_for(name(number)) for number in range(8)]
    with contextlib.ExitStack() as own, Pebble(tmp_path / "pebble", knot) as pebble:
        postgresql = kind == "postgresql"
        database = own.enter_context(request.getfixturevalue("postgres").database()) if postgresql else None
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


@slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_decisions_while_servers_and_workers_are_killed(
    tmp_path: Path, knot: Knot, request: pytest.FixtureRequest, kind: str
) -> None:
    """With each thing that an administrator does, devices come, and both workers and a server are killed while orders
    are under way. The CA has one order and one certificate for each key, and every device has its own in the end.
    """
    first, *others = (name(0x60 + number) for number in range(8))
    out = others[0]
    deeds = [["suspend", first], ["bar", out], ["resume", first], ["unbar", out], ["allow", "--again", out]]
    with contextlib.ExitStack() as stack:
        postgres = request.getfixturevalue("postgres") if kind == "postgresql" else None
        database = stack.enter_context(postgres.database()) if postgres else None
        pebble = stack.enter_context(Pebble(tmp_path / "pebble", knot, PEBBLE_WFE_NONCEREJECT="0"))
        authority = made(tmp_path / "authority", pebble, knot, database=database)
        if not postgres:
            deeds.insert(1, ["backup", str(tmp_path / "copy.db")])
        servers = [stack.enter_context(authority.serving()) for _ in range(2)]
        keys = {one: request_for(one) for one in (first, out)}
        for body in keys.values():
            servers[0].enroll(body)
        work(authority)
        had = servers[0].get(sha256(keys[first])).body

        def all_have_one() -> bool:
            """Each asks once, as the program does: a new key after 403, a request where none is known."""
            statuses = []
            for number, one in enumerate(keys):
                server = servers[number % 2]
                statuses.append(server.get(sha256(keys[one])).status)
                if statuses[-1] == 403:
                    assert one == out
                    keys[one] = request_for(one)
                elif statuses[-1] == 404:
                    server.post(keys[one])
            return set(statuses) == {200}

        def orders() -> int:
            return pebble.daemon.text().count("Added order")

        for turn, deed in enumerate(deeds):
            before = orders()
            keys[others[turn + 1]] = request_for(others[turn + 1])
            with ThreadPoolExecutor(1) as pool, authority.working() as one, authority.working() as two:
                deciding = pool.submit(authority.command, *deed)
                until("an order is under way", lambda before=before: all_have_one() or orders() > before, 90)  # type: ignore[misc]
                for worker in (one, two):
                    assert worker.process
                    worker.process.kill()
                servers[turn % 2].kill()
                servers[turn % 2].start()
                deciding.result()
            later(authority, postgres)
        with authority.working(), authority.working():
            until("every device has a certificate", all_have_one, 90)
        assert servers[0].get(sha256(keys[first])).body == had
        certified = [row[4] for row in authority.log("signed")]
        assert len(set(certified)) == len(certified) == len(keys) + 1  # the key that was barred had one too
        assert orders() == len(made_by(pebble)) == len(set(made_by(pebble))) == len(certified)
        if not postgres:
            assert "each follows from those before it" in authority.command("log", "--verify")


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


def test_no_device_blocks_the_others(tmp_path: Path, knot: Knot) -> None:
    """Names outside of the zone, and what is no address, get no record; it is said once, and listed. IPv4 is IPv4."""
    authority = RegistrationAuthority(tmp_path / "authority", knot.settings + 'addresses = "post"\n')
    authority.create_ca()
    addresses = {f"aa{ZONE}": "192.0.2.1", name(43): "unix:", name(44): "fe80::1%eth0", name(45): "::ffff:192.0.2.9"}
    authority.command("allow", *addresses)
    with authority.serving() as server:
        server.post(csr(f"aa{ZONE}"))
        for device, address in addresses.items():
            sql(authority, f"UPDATE devices SET address = '{address}' WHERE client_id = '{device}'")
        said = work(authority)
    assert f"aa{ZONE} is not in the zone {ZONE}" in said
    assert authority.command("list").endswith(f"  aa{ZONE} is not in the zone {ZONE}\n")
    assert json.loads(authority.command("list", "--json"))[0]["publish_problem"] in said
    assert "'unix:' is no address" in said and "has a meaning on one link only" in said
    assert (knot.look_up(name(45), "A"), knot.look_up(name(45), "AAAA")) == (["192.0.2.9"], [])
    assert work(authority) == ""


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
        ("orders_per_hour = 1000", 'usages = ["clients"]', 'acme.usages are "client" and "server"'),
        ("orders_per_hour = 1000", "renewal_share = 1.0", "acme.renewal_share is at least 0.0 and less than 1.0"),
        ("orders_per_hour = 1000", 'eab_key_id = "kid"', "acme.eab_key_id and acme.eab_key_file belong together"),
        ("orders_per_hour = 1000", "lease_seconds = 100", "acme.lease_seconds is 120 or more"),
        ('server = ".*"', 'server = "127.0.0.1:53"', "dns.server is an address or a host name"),
        ('server = ".*"', 'command = "/x"\ncommand_seconds = 200', "acme.lease_seconds is 1200 or more"),
        ("key_name", 'key_algorithm = "sha256"\nkey_name', "dns.key_algorithm is one of hmac-sha1, "),
        ("key_name", 'name_servers = ["ns2"]\nkey_name', "dns.name_servers are addresses"),
        (f'zone = "{ZONE}"\nserver', f'zone = ".{ZONE}/"\nserver', "dns.zone is a host name"),
    ],
)
def test_a_wrong_configuration_is_said(authority: RegistrationAuthority, old: str, new: str, said: str) -> None:
    config = authority.config.read_text()
    changed = re.sub(old, new, config)
    assert changed != config
    authority.init()
    authority.config.write_text(changed)
    assert said in authority.command("serve", "--listen", "unix:/nowhere/at/all", status=1)


@pytest.mark.parametrize(
    "setting, content, said",
    [
        ("account_key", key_file(ec_key(), b"password"), "acme.account_key: "),
        ("account_key", key_file(rsa_key()), "acme.account_key: .* has no P-256 key"),
        ("eab_key_file", b"\n", "acme.eab_key_file: .* is empty"),
        ("key_file", b"\n", "dns.key_file: .* is empty"),
    ],
)
def test_a_key_that_is_of_no_use_is_said(
    authority: RegistrationAuthority, tmp_path: Path, setting: str, content: bytes, said: str
) -> None:
    """When the worker starts, and in one line: not at the first order, and not as the CA's fault."""
    (tmp_path / "key").write_bytes(content)
    authority.init()
    config = re.sub(rf"(?m)^{setting} = .*\n", "", authority.config.read_text())
    new = f'{setting} = "{tmp_path}/key"\n' + ('eab_key_id = "kid"\n' if setting == "eab_key_file" else "")
    table = "[dns]\n" if setting == "key_file" else "[acme]\n"
    authority.config.write_text(config.replace(table, table + new))
    assert re.fullmatch(f"caramel-authority: {said}.*\n", authority.command("work", "--once", status=1))


def test_own_ca_commands_say_that_there_is_none(authority: RegistrationAuthority) -> None:
    authority.init()
    assert 'the signer is not "ca"' in authority.command("ca-renew", status=1)
    assert "serial numbers don't count up" in authority.command("minimum-serial", "--now", status=1)


#: What a CA, or a proxy before it, may do instead of an answer: what it sends, and again and again.
NEVER_WHOLE = {
    "no end of a header": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
    "no end of the body": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b" "),
    "no end of its chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
    "too much": (b"HTTP/1.1 200 OK\r\n\r\n", b"a" * 65536),
}
#: Asks as the worker does, with less patience.
ASKS = """
import sys, requests
from caramel_authority import acme_ca
acme_ca.PATIENCE = 2
session = requests.Session()
session.mount("http://", acme_ca.Whole())
for time in range(2):
    try:
        session.get(sys.argv[1], timeout=10)
    except requests.RequestException as error:
        print(error)
"""


@pytest.mark.parametrize("what", NEVER_WHOLE)
def test_an_answer_comes_whole_or_not_at_all(what: str) -> None:
    """Each byte comes in time, and the answer never."""
    begin, again = NEVER_WHOLE[what]

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(begin)
                while True:
                    self.request.sendall(again)
                    if what != "too much":
                        time.sleep(0.1)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        python = COMMAND.with_name("python")
        done = subprocess.run([python, "-I", "-c", ASKS, address], capture_output=True, text=True, timeout=60)
        server.shutdown()
    expected = "an answer of more than 1048576 bytes" if what == "too much" else "no whole answer within 2 s"
    said = done.stdout.splitlines()
    assert len(said) == 2 and all(expected in line for line in said), done
