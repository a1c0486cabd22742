# SPDX-License-Identifier: MIT OR Apache-2.0
"""Several processes at once, on SQLite and on PostgreSQL; and processes that are killed at any instant.

A signature is made once whoever asks, a serial number is used once, and what a device was told is there afterwards.
"""

from __future__ import annotations

import contextlib
import getpass
import http.client
import itertools
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Union

import pytest
import world
from authority_world import BIN, COMMAND, Knot, Postgres, RegistrationAuthority, Server, ask, at, csr, ec_key, sha256
from cryptography import x509
from needs import needs, require, slow
from world import Daemon, until

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]

PROCESSES = 3


@pytest.fixture(params=["sqlite", "postgresql"])
def authority(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RegistrationAuthority]:
    with contextlib.ExitStack() as stack:
        postgresql = request.param == "postgresql"
        own = stack.enter_context(request.getfixturevalue("postgres").database()) if postgresql else None
        made = RegistrationAuthority(tmp_path / "authority", database=own)
        made.create_ca()
        yield made


def ids(request: pytest.FixtureRequest, count: int) -> list[str]:
    return [f"{sha256(request.node.nodeid.encode())[:12]}-{number:03}" for number in range(count)]


@contextlib.contextmanager
def several(authority: RegistrationAuthority, before: Sequence[str] = ()) -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(authority.serving(before=before)) for _ in range(PROCESSES)]


def signed(authority: RegistrationAuthority, of: Sequence[str]) -> list[tuple[str, str]]:
    """Client ID and serial number of every signature in the log."""
    return [(row[3], row[5].split()[1]) for row in authority.log("signed") if row[3] in of]


def test_one_device_asks_everywhere_at_once(authority: RegistrationAuthority, request: pytest.FixtureRequest) -> None:
    mine = ids(request, 8)
    authority.command("allow", *mine)
    requests = [csr(one) for one in mine]
    with several(authority) as servers, ThreadPoolExecutor(24) as pool:
        for body in requests:
            together = threading.Barrier(12)

            def post(server: Server, body: bytes = body, together: threading.Barrier = together) -> int:
                together.wait(20)
                return server.post(body).status

            def get(server: Server, body: bytes = body, together: threading.Barrier = together) -> bytes:
                together.wait(20)
                reply = server.get(sha256(body))
                assert reply.status == 200
                return reply.body

            statuses = list(pool.map(post, servers * 4))
            assert sorted(statuses) == [202] + 11 * [400]
            together.reset()
            assert len(set(pool.map(get, servers * 4))) == 1
    made = signed(authority, mine)
    assert sorted(client_id for client_id, _ in made) == mine
    assert len({serial for _, serial in made}) == len(mine)


def test_a_renewal_is_made_once(authority: RegistrationAuthority, request: pytest.FixtureRequest) -> None:
    (client_id,) = ids(request, 1)
    authority.command("allow", client_id)
    body = csr(client_id)
    with authority.serving() as server:
        server.enroll(body)
    with several(authority, at(5)) as servers, ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda server: server.get(sha256(body)).body, servers * 8))
    assert len(set(replies)) == 1
    assert len(signed(authority, [client_id])) == 2


def test_many_devices_everywhere(authority: RegistrationAuthority, request: pytest.FixtureRequest) -> None:
    mine = ids(request, 60)
    authority.command("allow", "--file", "-", given="\n".join(mine))
    with several(authority) as servers, ThreadPoolExecutor(8) as pool:

        def enroll(number: int) -> int:
            body = csr(mine[number])
            assert servers[number % 3].post(body).status == 202
            reply = servers[(number + 1) % 3].get(sha256(body))
            assert reply.status == 200
            return reply.certificate.serial_number

        serials = list(pool.map(enroll, range(len(mine))))
    assert len(set(serials)) == len(mine)
    assert sorted(client_id for client_id, _ in signed(authority, mine)) == mine


def test_two_keys_for_one_place_on_the_list(authority: RegistrationAuthority, request: pytest.FixtureRequest) -> None:
    """A rule admits an ID once, also when two come for it in the same moment."""
    mine = ids(request, 10)
    authority.command("allow", *mine)
    with several(authority) as servers, ThreadPoolExecutor(6) as pool:
        for client_id in mine:
            bodies = [csr(client_id) for _ in servers]
            list(pool.map(lambda pair: pair[0].post(pair[1]), zip(servers, bodies, strict=True)))
            statuses = [servers[0].get(sha256(body)).status for body in bodies]
            assert sorted(statuses) == [200, 202, 202]


def test_one_key_for_two_ids_at_once(authority: RegistrationAuthority, request: pytest.FixtureRequest) -> None:
    mine = ids(request, 40)
    with several(authority) as servers, ThreadPoolExecutor(2) as pool:
        for pair in zip(mine[::2], mine[1::2], strict=True):
            key, together = ec_key(), threading.Barrier(2)
            bodies = [csr(client_id, key) for client_id in pair]

            def post(which: int, bodies: list[bytes] = bodies, together: threading.Barrier = together) -> int:
                together.wait(20)
                return servers[which].post(bodies[which]).status

            assert sorted(pool.map(post, (0, 1))) == [202, 400]


def test_off_the_list_while_the_device_comes(
    authority: RegistrationAuthority, request: pytest.FixtureRequest
) -> None:
    """Whichever is first: authorized and on the list, or neither."""
    mine = ids(request, 12)
    authority.command("allow", *mine)
    with authority.serving() as server, ThreadPoolExecutor(4) as pool:
        off = pool.submit(authority.command, "disallow", *mine)
        bodies = [csr(client_id) for client_id in mine]
        for body in itertools.cycle(bodies):
            if off.done():
                break
            server.post(body)
        off.result()
        assert {server.get(sha256(body)).status for body in bodies} <= {202, 403}


def test_suspended_and_copied_while_processes_are_killed(tmp_path: Path) -> None:
    """Devices ask, an administrator suspends, resumes and bars, copies are made, and a process is killed again and
    again: whoever is resumed goes on with what it had, and who is barred is out.
    """
    authority = RegistrationAuthority(tmp_path / "authority")
    authority.create_ca()
    names = [f"device-{number}" for number in range(12)]
    authority.command("allow", *names)
    requests = {name: csr(name) for name in names}
    with authority.serving() as one, authority.serving() as two:
        had = {name: one.enroll(request).body for name, request in requests.items()}
        with ThreadPoolExecutor(1) as pool:

            def decide() -> None:
                for name in names[:4]:
                    authority.command("suspend", name)
                    authority.command("backup", str(tmp_path / "copy.db"))
                    authority.command("resume", name)
                authority.command("bar", *names[4:6])

            deciding = pool.submit(decide)
            for victim in itertools.cycle((one, two)):
                if deciding.done():
                    break
                victim.kill()
                victim.start()
            deciding.result()
        for name, request in requests.items():
            reply = two.get(sha256(request))
            assert reply.status == (403 if name in names[4:6] else 200)
            assert reply.status == 403 or reply.body == had[name]
    assert len(signed(authority, names)) == len(names)
    authority.command("restore", str(tmp_path / "copy.db"))
    with authority.serving() as server:
        assert {server.get(sha256(requests[name])).status for name in names[4:6]} == {403}
        assert server.get(sha256(requests["device-0"])).status == 200


def test_postgresql_comes_up_late(tmp_path: Path) -> None:
    """After a power cut, say. What serves waits for it, and a command says what is missing."""
    require("postgresql")
    database = Postgres(tmp_path / "postgres")
    authority = RegistrationAuthority(tmp_path / "authority", database=database.url)
    with database:
        authority.create_ca()
    assert "the database: connection" in authority.command("list", status=1)
    port = world.free_port()
    serve: list[Union[str, Path]] = [COMMAND, "--config", authority.config, "serve", "--listen", f"127.0.0.1:{port}"]
    with Daemon(serve, tmp_path / "server.log") as server:
        until("it waits", lambda: "waiting for the database" in server.text())
        with database:
            until("it answers", lambda: answers(port))
            assert ask(port, "GET", f"/{64 * 'a'}").status == 404


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return ask(port, "GET", "/root.crt").status == 200
    return False


def test_several_start_at_once_on_a_new_database(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path)
    with several(authority) as servers:
        assert {server.get(64 * "a").status for server in servers} == {404}


# --- Killed ---


def test_killed_at_random_moments(authority: RegistrationAuthority, request: pytest.FixtureRequest) -> None:
    """Two processes serve and are killed again and again while devices enroll, some of them are
    suspended and barred, and one CA follows another; each device gets one certificate.
    """
    mine = ids(request, 40)
    authority.command("allow", "--file", "-", given="\n".join(mine))
    over = threading.Event()
    dice = random.Random(1)
    kills = 0
    barred = f"{mine[0]}-barred"
    deeds = [["ca-next"], ["suspend", *mine[-9:]], ["bar", barred], ["ca-next", "--switch"], ["resume", *mine[-9:]]]
    with authority.serving() as one, authority.serving() as two:

        def administrator() -> None:
            for deed in [*deeds, ["ca-next", "--finish"]]:
                authority.command(*deed)

        def device(number: int) -> int:
            body = csr(mine[number])
            server = (one, two)[number % 2]
            while True:
                # As the program does it: ask, post where nobody knows the request, ask again.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    reply = ask(server.port, "GET", f"/{sha256(body)}")
                    if reply.status == 200:
                        return reply.certificate.serial_number
                    assert reply.status in (404, 202)
                    if reply.status == 404:
                        assert ask(server.port, "POST", f"/{sha256(body)}", body).status == 202
                time.sleep(0.02)
                assert not over.is_set()

        with ThreadPoolExecutor(6) as pool, ThreadPoolExecutor(1) as others:
            work = [pool.submit(device, number) for number in range(len(mine))]
            decided = others.submit(administrator)
            end = time.monotonic() + 300
            while not (decided.done() and all(one.done() for one in work)) and time.monotonic() < end:
                time.sleep(dice.uniform(0.02, 0.25))
                victim = dice.choice((one, two))
                victim.kill()
                victim.start()
                kills += 1
            if not all(one.done() for one in work):
                over.set()
            serials = [one.result() for one in work]
            decided.result()
            refused = one.post(csr(barred))
            assert refused.status == 400 and b"barred" in refused.body
    assert kills > 3
    assert len(set(serials)) == len(mine)
    assert sorted(client_id for client_id, _ in signed(authority, mine)) == mine


@contextlib.contextmanager
def two_machines(authority: RegistrationAuthority) -> Iterator[tuple[list[Server], list[Daemon]]]:
    """Two processes that serve, each with a signer of its own behind a socket, on one database and one CA."""
    servers: list[Server] = []
    signers: list[Daemon] = []
    with contextlib.ExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="signers-", dir="/tmp")))
        for number in range(2):  # a socket's path has 108 bytes at most (unix(7))
            settings = f'[ca]\nfolder = "{authority.ca.parent}"\nsigner_socket = "{sockets}/{number}"\n'
            machine = RegistrationAuthority(
                authority.folder / f"machine-{number}", settings, database=authority.database
            )
            machine._made = True
            command: list[Union[str, Path]] = [COMMAND, "--config", machine.config, "signer"]
            signers.append(stack.enter_context(Daemon(command, machine.folder / "signer.log")))
            servers.append(stack.enter_context(machine.serving()))
        yield servers, signers


def copy_of(authority: RegistrationAuthority, file: Path) -> None:
    """A copy while it serves, in the page's way for each of the two databases."""
    if authority.database.startswith("sqlite"):
        authority.command("backup", str(file))
    else:
        address = authority.database.replace("+psycopg", "")
        dump = [str(Postgres.program("pg_dump")), "--format=custom", "-d", address, "-f", str(file)]
        subprocess.run(dump, check=True, timeout=60, cwd="/")


def test_all_that_is_decided_while_servers_and_signers_are_killed(
    authority: RegistrationAuthority, request: pytest.FixtureRequest
) -> None:
    """Two servers and two signers are killed at random while devices come and come back, and an administrator
    suspends, resumes, bars, unbars, copies, and lets one CA follow another. Each key has one certificate, no
    serial number is used twice, and in the end every device has one.
    """
    mine = ids(request, 24)
    back, out = mine[:3], mine[3:6]
    authority.command("allow", *mine)
    dice, over, everybody = random.Random(2), threading.Event(), threading.Event()
    copies = [authority.folder / f"copy-{number}" for number in range(2)]
    held: dict[str, bytes] = {}
    with two_machines(authority) as (servers, signers):

        def administrator() -> None:
            assert everybody.wait(120)
            authority.command("suspend", *back)
            copy_of(authority, copies[0])
            authority.command("ca-next")
            authority.command("bar", *out)
            authority.command("ca-next", "--switch")
            authority.command("resume", *back)
            copy_of(authority, copies[1])
            authority.command("unbar", *out)
            authority.command("allow", "--again", *out)
            authority.command("ca-next", "--finish")

        def device(number: int) -> None:
            """It asks until all is over, as the program does: a new key after 403, a request where none is known."""
            name = mine[number]
            held[name] = csr(name)
            first = True
            while not over.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    server = servers[dice.randrange(2)]
                    status = ask(server.port, "GET", f"/{sha256(held[name])}").status
                    assert status in (200, 202, 403, 404, 503), status
                    if status == 200 and first:
                        first = False
                        arrived.append(name)
                        if len(arrived) == len(mine):
                            everybody.set()
                    if status == 403:
                        assert name in out
                        held[name] = csr(name)
                    elif status == 404:
                        ask(server.port, "POST", f"/{sha256(held[name])}", held[name])
                time.sleep(0.3)

        arrived: list[str] = []
        all_of_them: list[Union[Server, Daemon]] = [*servers, *signers]
        kills = 0
        with ThreadPoolExecutor(len(mine)) as pool, ThreadPoolExecutor(1) as others:
            asking = [pool.submit(device, number) for number in range(len(mine))]
            deciding = others.submit(administrator)
            try:
                while not deciding.done() and not any(one.done() for one in asking):
                    time.sleep(dice.uniform(0.1, 0.6))
                    victim = dice.choice(all_of_them)
                    if isinstance(victim, Server):
                        victim.kill()
                    else:
                        assert victim.process
                        victim.process.kill()
                        victim.stop()
                    victim.start()
                    kills += 1
                deciding.result(120)
                until(
                    "every device has a certificate",
                    lambda: all(now(servers[0], body) == 200 for body in held.values()),
                )
            finally:
                over.set()
                everybody.set()
            for one in asking:
                one.result()
        root = x509.load_pem_x509_certificates(servers[0].get("/root.crt").body)
        assert len(root) == 1
        for name in out:  # signed by the CA that followed, at last
            servers[1].get(sha256(held[name])).certificate.verify_directly_issued_by(root[0])
    assert kills > 5
    entries = [row for row in authority.log("signed") if row[3] in mine]
    assert len({row[5].split()[1] for row in entries}) == len({row[4] for row in entries}) == len(entries)
    assert sorted({row[3] for row in entries}) == mine
    if authority.database.startswith("sqlite"):
        assert "each follows from those before it" in authority.command("log", "--verify")
        restored = RegistrationAuthority(authority.folder / "restored")
        for copy in copies:
            restored.command("restore", str(copy), "--forget")
            assert "each follows from those before it" in restored.command("log", "--verify")


def now(server: Server, body: bytes) -> int:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return server.get(sha256(body)).status
    return 0


WRITES = "pwrite64,write,fdatasync,fsync,ftruncate,unlink,sendto"


@slow
def test_killed_at_every_write(tmp_path: Path) -> None:
    """SQLite: the process dies at its first system call that writes, at the second, and so on, until one enrollment
    needs no more of them. Afterwards the device has one certificate, and no serial number was used twice.
    """
    require("strace")
    prepared = RegistrationAuthority(tmp_path / "prepared")
    prepared.create_ca()
    prepared.command("allow", "device")
    serials: list[int] = []
    number, died = 0, True
    while died:
        number += 1
        assert number < 100
        authority = RegistrationAuthority(shutil.copytree(prepared.folder, tmp_path / f"{number}"))
        body = csr("device")
        with authority.serving() as server:
            server.get(64 * "a")  # whatever is written at the start is written
            assert server.daemon and server.daemon.process
            inject = f"--inject={WRITES}:signal=SIGKILL:when={number}"
            trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={WRITES}", inject]
            with Daemon([*trace, "-p", str(server.daemon.process.pid)], tmp_path / "strace.log"):
                attached(server.daemon.process.pid)
                try:
                    server.post(body)
                    server.get(sha256(body))
                    died = False
                except (OSError, http.client.HTTPException):
                    died = True
                    server.daemon.process.wait(10)
        with authority.serving() as server:
            if server.get(sha256(body)).status == 404:
                assert server.post(body).status == 202
            reply = server.get(sha256(body))
            assert reply.status == 200
            serials.append(reply.certificate.serial_number)
            assert server.get(sha256(body)).body == reply.body
        assert len(authority.rows("SELECT * FROM certificates")) == 1
        assert authority.rows("SELECT count(*) FROM log WHERE action = 'signed'") == [(1,)]
        assert authority.rows("PRAGMA integrity_check") == [("ok",)]
        (value,) = authority.rows("SELECT value FROM numbers WHERE name = 'serial'")[0]
        assert value >= reply.certificate.serial_number
    assert number > 6
    assert len(set(serials)) == len(serials)


def attached(process: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        status = [Path(f"/proc/{process}/task/{task.name}/status").read_text() for task in
                  Path(f"/proc/{process}/task").iterdir()]  # fmt: skip
        if all(re.search(r"TracerPid:\s*[1-9]", text) for text in status):
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- PostgreSQL behind others, and servers that fork ---


@needs("pgbouncer")
def test_behind_pgbouncer(postgres: Postgres, tmp_path: Path) -> None:
    """Each transaction has another connection of the server's: nothing is left behind in one."""
    port = world.free_port()
    (tmp_path / "users").write_text('"authority" ""\n')
    (tmp_path / "pgbouncer.ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={postgres.port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
        f"listen_port = {port}\nunix_socket_dir =\nauth_type = trust\nauth_file = {tmp_path}/users\n"
        "pool_mode = transaction\ndefault_pool_size = 3\n"
    )
    for path in (tmp_path, *tmp_path.parents):  # pytest's folders belong to one user only, and it refuses to be root
        if path.owner() == getpass.getuser() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o711)
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    with (
        postgres.database() as own,
        Daemon([*user, str(Knot.program("pgbouncer")), str(tmp_path / "pgbouncer.ini")], tmp_path / "pgbouncer.log"),
    ):
        url = f"postgresql+psycopg://authority@127.0.0.1:{port}/{own.rpartition('/')[2]}"
        world.until("PgBouncer answers", lambda: listens(port))
        authority = RegistrationAuthority(tmp_path / "authority", database=url)
        authority.create_ca()
        names = [f"bouncer-{number:02}" for number in range(12)]
        authority.command("allow", *names)
        with authority.serving() as one, authority.serving() as two, ThreadPoolExecutor(8) as pool:

            def life(name: str) -> list[int]:
                body = csr(name)
                return [one.post(body).status, *(server.get(sha256(body)).status for server in (one, two) * 8)]

            assert list(pool.map(life, names)) == [[202] + 16 * [200]] * len(names)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["each", "preload"])
def test_gunicorn(authority: RegistrationAuthority, request: pytest.FixtureRequest, preload: list[str]) -> None:
    """A server that forks after it has read the database shares no connection with what it forks."""
    mine = ids(request, 12)
    authority.command("allow", *mine)
    port = world.free_port()
    factory = "caramel_authority.application:from_environment()"
    command = [str(BIN / "gunicorn"), *preload, "-w", "3", "-b", f"127.0.0.1:{port}", "--threads", "4", factory]
    env = world.environment(CARAMEL_AUTHORITY_CONFIG=str(authority.config))
    with (
        Daemon(
            [*command, "caramel_authority.application:from_environment()"], authority.folder / "gunicorn.log", env
        ),
        ThreadPoolExecutor(8) as pool,
    ):
        world.until("gunicorn answers", lambda: listens(port))

        def life(name: str) -> list[int]:
            body = csr(name)
            said = [ask(port, "POST", f"/{sha256(body)}", body)]
            said += [ask(port, "GET", f"/{sha256(body)}") for _ in range(12)]
            return [reply.status for reply in said]

        assert list(pool.map(life, mine)) == [[202] + 12 * [200]] * len(mine)
    assert sorted(client_id for client_id, _ in signed(authority, mine)) == mine
