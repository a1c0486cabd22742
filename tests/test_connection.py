"""One run's connection: what servers and networks do to it, beyond what a well-behaved one does."""

from __future__ import annotations

import json
import os
import socket
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import world
from needs import fetches, needs, require
from world import Authority, Caramel, Device, Nginx, Scripted, answer, answers, hours, now

ID = "fffbeec0ffee"


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="connection.pem")


@pytest.fixture
def new(tmp_path: Path, authority: Authority) -> Device:
    return Device(tmp_path / "device", None, authority.certificate_file, ID)


@needs("nginx", "strace")
def test_a_server_that_closes_between_get_and_post(
    new: Device, tmp_path: Path, caramel: Caramel, authority: Authority
) -> None:
    """nginx with a keep-alive that is shorter than the making of a request."""
    new.client_id = "keepalive-1"
    lines = "keepalive_timeout 20ms;"
    with Nginx(tmp_path / "nginx", caramel, authority.server(), server_lines=lines) as front:
        new.server = front.address
        # What nginx closes while the client is busy: a processor that is slow to send.
        slow = ("strace", "-qq", "-f", "-o", "/dev/null", "-e", "inject=sendto,write:delay_enter=120000")
        run = new.run(before=slow)
        assert (run.status, "waits to be signed" in run.err) == (69, True), run.err
        assert new.run(before=slow).status == 69


@pytest.mark.parametrize("at", [1, 2])
def test_a_request_that_is_not_the_first_on_its_connection_is_made_again(new: Device, pem: Path, at: int) -> None:
    """RFC 9112, 9.3.1: a server may close a connection at any time after an answer; the next request finds out."""
    script: list[world.Answer] = [answers.UNKNOWN, answers.PENDING, answers.PENDING]
    script.insert(at, None)
    with Scripted(pem, script) as server:
        new.server = server.address
        run = new.run()
    assert (run.status, server.connections) == (69, 2), run.err
    assert [asked.method for asked in server.requests] == {
        1: ["GET", "POST", "POST", "GET"],
        2: ["GET", "POST", "GET", "GET"],
    }[at]


def test_a_server_that_closes_every_time_is_not_asked_for_ever(new: Device, pem: Path) -> None:
    with Scripted(pem, [answers.UNKNOWN, None, None, None]) as server:
        new.server = server.address
        assert new.run().status == 127
    assert len(server.requests) == 3


def test_making_a_key_costs_none_of_the_time_limit(new: Device, pem: Path, authority: Authority) -> None:
    """A slow processor needs half a minute for it; here a 4096-bit key and a limit of a second do."""
    new.has(authority.identity(ID, certified=False))
    code = (
        "import time, sys\n"
        "from caramel_embedded import certificates\n"
        "from caramel_embedded.__main__ import main\n"
        "make = certificates.make\n"
        "def slow(*a, **k):\n"
        "    time.sleep(3)\n"
        "    return make(*a, **k)\n"
        "certificates.make = slow\n"
        "main(sys.argv[1:])\n"
    )
    new.command = [str(Path(world.COMMAND).parent / "python"), "-I", "-c", code]
    with Scripted(pem, [answers.REJECTED, answers.PENDING, answers.PENDING]) as server:
        new.server = server.address
        run = new.run("--timeout", "2")
    assert (run.status, run.seconds > 3) == (69, True), run.err


@pytest.mark.parametrize("count", [1, 3])
def test_early_hints_are_passed_over(new: Device, pem: Path, authority: Authority, count: int) -> None:
    """RFC 8297: an interim answer of a CDN."""
    new.has(authority.identity(ID, certified=False))
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n" * count
    certificate = authority.sign(new.request, not_before=now() - hours(1))
    with Scripted(pem, [early + answers.certificate(certificate)]) as server:
        new.server = server.address
        run = new.run()
    assert (run.status, new.certificate is not None) == (0, True), run.err


def test_switching_protocols_is_no_interim_answer(new: Device, pem: Path, authority: Authority) -> None:
    new.has(authority.identity(ID, certified=False))
    with Scripted(pem, [answer(101)]) as server:
        new.server = server.address
        assert new.run("--timeout", "3").status == 127


@contextmanager
def black_hole(port: int) -> Iterator[None]:
    """An address that swallows every connection: a full queue that nobody takes from."""
    listener = socket.socket()
    listener.bind(("127.0.0.2", port))
    listener.listen(0)
    clients = []
    for _ in range(3):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(listener.getsockname())
        clients.append(client)
    try:
        yield
    finally:
        for client in clients:
            client.close()
        listener.close()


#: What the first address of a name does: what says that to a test, and to a person if the second fares no better.
FIRST: dict[str, tuple[dict[str, Any], str]] = {
    "closes": ({"instead_of_tls": world.hang_up}, "broke the connection off"),
    "resets": ({"instead_of_tls": world.reset}, "broke the connection off"),
    "is silent": ({"instead_of_tls": world.silence}, "no answer"),
    "has another CA": ({}, "can't show a certificate that the trusted CA vouches for"),
    "isn't there": ({}, "refused"),
}


@contextmanager
def two_addresses(
    pem: Path, other: Path, first: str, second: Sequence[world.Answer]
) -> Iterator[tuple[str, Scripted]]:
    """127.0.0.2 and 127.0.0.3 on the same port; its number, and the second server."""
    with Scripted(pem, second, host="127.0.0.3") as good:
        wrong = Scripted(other if "CA" in first else pem, [None], host="127.0.0.2", **FIRST[first][0])
        wrong.port = good.port
        with nullcontext() if "there" in first else wrong:
            yield str(good.port), good


def with_hosts(tmp_path: Path, lines: str) -> tuple[str, ...]:
    """What starts a run that has these lines for /etc/hosts."""
    require("mounts")
    (tmp_path / "hosts").write_text(lines)
    mounted = f'mount --bind {tmp_path}/hosts /etc/hosts && exec "$@"'
    return ("unshare", "-m", "sh", "-c", mounted, "sh")


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("state", ["pending", "certified"])
def test_the_next_address_is_tried_until_one_has_ended_a_handshake(
    new: Device, pem: Path, authority: Authority, tmp_path: Path, first: str, state: str
) -> None:
    """The common broken IPv6 takes TCP and then no TLS; what it costs is its share of the time."""
    new.has(authority.identity(ID, certified=state == "certified"))
    other = Authority(tmp_path / "other").server()
    before = with_hosts(tmp_path, "127.0.0.2 localhost\n127.0.0.3 localhost\n")
    with two_addresses(pem, other, first, [answers.PENDING]) as (port, server):
        new.server = f"localhost:{port}"
        run = new.run("--timeout", "4", before=before)
    assert (run.status, server.connections) == (69, 1), run.err
    assert run.seconds < 4


@pytest.mark.parametrize("first", FIRST)
def test_where_no_address_will_do_the_line_has_the_reason_of_each(
    new: Device, pem: Path, authority: Authority, tmp_path: Path, first: str
) -> None:
    new.has(authority.identity(ID, certified=False))
    other = Authority(tmp_path / "other").server()
    before = with_hosts(tmp_path, "127.0.0.2 localhost\n127.0.0.3 localhost\n")
    with two_addresses(pem, other, first, [None]) as (port, server):
        server.instead_of_tls = lambda connection, over: connection.sendall(b"no TLS here\r\n")
        new.server = f"localhost:{port}"
        run = new.run("--timeout", "3", before=before)
    assert (run.status, run.err.count("\n")) == (127, 1), run.err
    one, two = run.err.index("127.0.0.2"), run.err.index("127.0.0.3")
    assert FIRST[first][1] in run.err[one:two] and "WRONG_VERSION_NUMBER" in run.err[two:], run.err


@pytest.mark.parametrize("server", ["[::1]:9", "127.0.0.1:9", "localhost:9"])
def test_an_address_in_an_error_line_has_the_form_that_the_option_takes(new: Device, server: str) -> None:
    new.server = server
    run = new.run()
    assert (run.status, server in run.err) == (127, True), run.err
    assert f" {server}\n" in new.run("--status").out


def test_an_address_that_swallows_everything_costs_its_time_once(
    new: Device, pem: Path, authority: Authority, tmp_path: Path
) -> None:
    """Not at each of the connections of a run: here three, with a server that closes each."""
    new.has(authority.identity(ID, certified=False))
    before = with_hosts(tmp_path, "127.0.0.2 localhost\n127.0.0.3 localhost\n")
    closing = [answer(404, b"{}", "Connection: close"), answer(202, b"{}", "Connection: close")]
    with Scripted(pem, closing, host="127.0.0.3") as server, black_hole(server.port):
        new.server = f"localhost:{server.port}"
        run = new.run("--timeout", "4", before=before)
    assert (run.status, server.connections) == (69, 3), run.err
    assert 2 <= run.seconds < 4


# --- Retry-After ---


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Retry-After: 120", 120),
        ("Retry-After: 99999999999", 86400),
        ("Retry-After: Tue, 24 Nov 2026 12:02:00 GMT", 120),
        ("Retry-After: 60\r\nRetry-After: 120", 120),
        ("Retry-After: 120\r\nRetry-After: 60", 120),
        ("Retry-After: 60\r\nRetry-After: Tue, 24 Nov 2026 12:02:00 GMT", 120),
        ("Retry-After: soon\r\nRetry-After: 120", 120),
        ("Retry-After: soon", None),
        ("Retry-After: -5", None),
    ],
)
def test_retry_after_is_told(new: Device, pem: Path, authority: Authority, header: str, seconds: object) -> None:
    new.has(authority.identity(ID, certified=False))
    says = answer(202, b"{}", header, "Date: Tue, 24 Nov 2026 12:00:00 GMT")
    with Scripted(pem, [says]) as server:
        new.server = server.address
        run = new.run("--json")
    told = json.loads(run.out)
    assert (run.status, told["status"], told["retry_after"]) == (69, 69, seconds)
    assert (f"the server asks to wait {seconds} s" in run.err) == (seconds is not None)
    assert told["message"] in run.err


def test_retry_after_of_a_server_in_trouble_is_told_too(new: Device, pem: Path, authority: Authority) -> None:
    new.has(authority.identity(ID, certified=False))
    with Scripted(pem, [answer(503, b"later", "Retry-After: 300")]) as server:
        new.server = server.address
        run = new.run("--json")
    assert (run.status, json.loads(run.out)["retry_after"], "wait 300 s" in run.err) == (127, 300, True)


# --- 403 in other words than Caramel's ---

SPRING = {"type": "about:blank", "title": "Forbidden", "status": 403, "detail": "Access Denied", "instance": "/x"}
ASPNET = {
    "type": "https://tools.ietf.org/html/rfc9110#section-15.5.4",
    "title": "Forbidden",
    "status": 403,
    "traceId": "0",
}
CDN = {"title": "Error 1020: Access denied", "status": 403, "detail": "Forbidden"}
TEXT = {"title": "Forbidden", "status": "403", "detail": None}


@pytest.mark.parametrize("document", [SPRING, ASPNET, CDN, TEXT, [], {"title": "Forbidden", "status": 403}])
def test_a_403_in_other_words_wipes_nothing(new: Device, pem: Path, authority: Authority, document: object) -> None:
    new.has(authority.identity(ID))
    before = new.snapshot()
    says = answer(403, json.dumps(document).encode(), "Content-Type: application/problem+json")
    with Scripted(pem, [says, says]) as server:
        new.server = server.address
        assert new.run().status == 127
    assert new.snapshot() == before


# --- A certificate that can't be loaded into TLS ---


@pytest.mark.parametrize(
    "lacks", [pytest.param("memfd_create", marks=needs("strace")), pytest.param("/proc", marks=needs("mounts"))]
)
def test_a_system_without_files_in_memory_does_without_client_certificate(
    new: Device, pem: Path, authority: Authority, lacks: str
) -> None:
    new.has(authority.identity(ID))
    before: tuple[str, ...] = ("strace", "-qq", "-f", "-o", "/dev/null", "-e", "inject=memfd_create:error=ENOSYS")
    if lacks == "/proc":
        before = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    with Scripted(pem, [answers.PENDING], client_ca=authority.certificate_file) as server:
        new.server = server.address
        run = new.run("-v", before=before)
    assert (run.status, run.err.count("can't be shown")) == (69, 1), run.err
    assert server.requests[0].client_certificate is None


@needs("mounts")
def test_a_first_boot_without_proc(new: Device, pem: Path) -> None:
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        new.server = server.address
        run = new.run(before=("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"))
    assert run.status == 69, run.err


@pytest.mark.parametrize(
    "header", ["Last-Modified: Fri, 31 Dec 9999 23:59:59 GMT", "Last-Modified: Sat, 01 Jan 12000 00:00:00 GMT"]
)
def test_a_date_at_the_end_of_time(new: Device, pem: Path, authority: Authority, header: str) -> None:
    new.has(authority.identity(ID, certified=False))
    certificate = authority.sign(new.request, not_before=now() - hours(1))
    with Scripted(pem, [answers.certificate(certificate, header)]) as server:
        new.server = server.address
        assert new.run().status == 0
        run = new.run()
    assert (run.status, "internal error" in run.err) == (0, False), run.err


def test_a_file_time_past_the_year_9999(new: Device, pem: Path, authority: Authority, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # an ext4 has no such times
        far_away(new, pem, authority, Path(folder))


def far_away(new: Device, pem: Path, authority: Authority, folder: Path) -> None:
    new.key_file = folder / "identity.pem"
    new.has(authority.identity(ID))
    os.utime(new.key_file, (300_000_000_000, 300_000_000_000))
    assert new.key_file.stat().st_mtime == 300_000_000_000
    with Scripted(pem, [answers.certificate(new.block("CERTIFICATE") or b"")]) as server:
        new.server = server.address
        run = new.run()
    assert run.status == 0, run.err
    assert server.requests[0].if_modified_since == ""


# --- OpenSSL 3.5 and its post-quantum share ---


@pytest.fixture
def modern(new: Device) -> Device:
    """A device with Debian 13's OpenSSL."""
    require("trixie")
    tree = world.in_tree(world.trixie())
    command = world.installation("trixie", "/usr/bin/python3", system=True, before=tree)
    new.command = [*tree, command]
    return new


@pytest.mark.parametrize(("groups", "one_packet"), [(None, True), ("small", True), ("default", False)])
@fetches
def test_a_greeting_fits_one_packet_unless_the_default_is_asked_for(
    modern: Device, pem: Path, authority: Authority, groups: str, one_packet: bool
) -> None:
    sizes: list[int] = []
    modern.has(authority.identity(ID, certified=False))
    options = ["--groups", groups] if groups else []
    record = lambda connection, over: sizes.append(len(connection.recv(65536)))  # noqa: E731
    with Scripted(pem, [None], instead_of_tls=record) as server:
        modern.server = server.address
        assert modern.run(*options).status == 127
    assert len(sizes) == 1 and (sizes[0] < 350 if one_packet else sizes[0] > 1200), sizes


@needs("nginx")
@fetches
def test_a_server_with_x25519_alone_is_told_from_other_failures(
    modern: Device, pem: Path, caramel: Caramel, tmp_path: Path
) -> None:
    with Nginx(tmp_path / "nginx", caramel, pem, server_lines="ssl_ecdh_curve X25519;") as front:
        modern.server = front.address
        run = modern.run()
        assert (run.status, "CARAMEL_GROUPS=default" in run.err) == (127, True), run.err
        assert modern.run("--groups", "default").status == 69
    # The same alert, for another reason.
    with Scripted(pem, [None], newest_tls=ssl.TLSVersion.TLSv1_2) as server:
        server.context.set_ciphers("AES128-SHA256")
        modern.server = server.address
        run = modern.run()
    assert (run.status, "HANDSHAKE_FAILURE" in run.err, "GROUPS" in run.err) == (127, True, False), run.err
