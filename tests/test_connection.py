"""One run's connection: what servers and networks do to it, beyond what a well-behaved one does."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Optional

import pytest
import world
from needs import fetches, needs, require
from talking import FIRST_TIME, Talking
from world import Answer, Authority, Caramel, Device, Nginx, Run, Scripted, answer, answers


@needs("nginx", "strace")
def test_a_server_that_closes_between_get_and_post(
    device: Device, tmp_path: Path, caramel: Caramel, authority: Authority
) -> None:
    """nginx with a keep-alive that is shorter than the making of a request."""
    lines = "keepalive_timeout 20ms;"
    with Nginx(tmp_path / "nginx", caramel, authority.server(), server_lines=lines) as front:
        device.server = front.address
        # What nginx closes while the client is busy: a processor that is slow to send.
        slow = ("strace", "-qq", "-f", "-o", "/dev/null", "-e", "inject=sendto,write:delay_enter=120000")
        run = device.run(before=slow)
        assert (run.status, "waits to be signed" in run.err) == (69, True), run.err
        assert device.run(before=slow).status == 69


@pytest.mark.parametrize(("at", "methods"), [(1, "GET POST POST GET"), (2, "GET POST GET GET")])
def test_a_request_that_is_not_the_first_on_its_connection_is_made_again(new: Talking, at: int, methods: str) -> None:
    """RFC 9112, 9.3.1: a server may close a connection at any time after an answer; the next request finds out."""
    script: list[Answer] = list(FIRST_TIME)
    script.insert(at, None)
    run = new.hears(*script)
    assert (run.status, new.connections, new.methods) == (69, 2, methods.split()), run.err


def test_a_server_that_closes_every_time_is_not_asked_for_ever(new: Talking) -> None:
    assert new.hears(answers.UNKNOWN, None, None).status == 127


def test_making_a_key_costs_none_of_the_time_limit(pending: Talking) -> None:
    """A slow processor needs half a minute for it; here it takes longer than the limit."""
    pending.changed(
        "import time\nfrom caramel_embedded import certificates\nmake = certificates.make\n"
        "certificates.make = lambda *a, **k: (time.sleep(3), make(*a, **k))[1]"
    )
    run = pending.hears(answers.REJECTED, answers.PENDING, answers.PENDING, options=["--timeout", "2"])
    assert (run.status, run.seconds > 3) == (69, True), run.err


@pytest.mark.parametrize("count", [1, 3])
def test_early_hints_are_passed_over(pending: Talking, count: int) -> None:
    """RFC 8297: an interim answer of a CDN."""
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n" * count
    run = pending.hears(early + answers.certificate(pending.signed()))
    assert (run.status, pending.certificate is not None) == (0, True), run.err


def test_switching_protocols_is_no_interim_answer(pending: Talking) -> None:
    pending.keeps(answer(101), options=["--timeout", "3"])


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
def two_addresses(device: Talking, tmp_path: Path, first: str, second: Sequence[Answer]) -> Iterator[Scripted]:
    """127.0.0.2 and 127.0.0.3 on the same port; the second server."""
    pem = device.authority.server(file="addresses.pem")
    with Scripted(pem, second, host="127.0.0.3") as good:
        other = Authority(tmp_path / "other").server() if "CA" in first else pem
        wrong = Scripted(other, [None], host="127.0.0.2", **FIRST[first][0])
        wrong.port = good.port
        device.server = f"localhost:{good.port}"
        with nullcontext() if "there" in first else wrong:
            yield good


def on_two_addresses(device: Talking, timeout: str) -> Run:
    """A run on a machine whose /etc/hosts has two addresses for the server's name."""
    require("mounts")
    hosts = device.folder.with_name("hosts")
    hosts.write_text("127.0.0.2 localhost\n127.0.0.3 localhost\n")
    mounted = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    return device.run("--timeout", timeout, before=("unshare", "-m", "sh", "-c", mounted, "sh"))


@pytest.mark.parametrize("first", FIRST)
def test_the_next_address_is_tried_until_one_has_ended_a_handshake(
    enrolled: Talking, tmp_path: Path, first: str
) -> None:
    """The common broken IPv6 takes TCP and then no TLS; what it costs is its share of the time."""
    with two_addresses(enrolled, tmp_path, first, [answers.PENDING]) as server:
        run = on_two_addresses(enrolled, "4")
    assert (run.status, server.connections) == (69, 1), run.err
    assert run.seconds < 4


@pytest.mark.parametrize("first", FIRST)
def test_where_no_address_will_do_the_line_has_the_reason_of_each(
    pending: Talking, tmp_path: Path, first: str
) -> None:
    with two_addresses(pending, tmp_path, first, [None]) as server:
        server.instead_of_tls = lambda connection, over: connection.sendall(b"no TLS here\r\n")
        run = on_two_addresses(pending, "3")
    assert (run.status, run.err.count("\n")) == (127, 1), run.err
    one, two = run.err.index("127.0.0.2"), run.err.index("127.0.0.3")
    assert FIRST[first][1] in run.err[one:two] and "WRONG_VERSION_NUMBER" in run.err[two:], run.err


@pytest.mark.parametrize("server", ["[::1]:9", "127.0.0.1:9", "localhost:9"])
def test_an_address_in_an_error_line_has_the_form_that_the_option_takes(new: Talking, server: str) -> None:
    new.server = server
    run = new.run()
    assert (run.status, server in run.err) == (127, True), run.err
    assert f" {server}\n" in new.run("--status").out


def test_an_address_that_swallows_everything_costs_its_time_once(pending: Talking, authority: Authority) -> None:
    """Not at each of the connections of a run: here three, with a server that closes each."""
    closing = [answer(404, b"{}", "Connection: close"), answer(202, b"{}", "Connection: close")]
    with Scripted(authority.server(), closing, host="127.0.0.3") as server, black_hole(server.port):
        pending.server = f"localhost:{server.port}"
        run = on_two_addresses(pending, "4")
    assert (run.status, server.connections) == (69, 3), run.err
    assert 2 <= run.seconds < 4


# --- Retry-After ---


RETRY_AFTER: dict[str, Optional[int]] = {
    "Retry-After: 120": 120,
    "Retry-After: 99999999999": 86400,
    "Retry-After: Tue, 24 Nov 2026 12:02:00 GMT": 120,
    "Retry-After: 60\r\nRetry-After: 120": 120,
    "Retry-After: 120\r\nRetry-After: 60": 120,
    "Retry-After: 60\r\nRetry-After: Tue, 24 Nov 2026 12:02:00 GMT": 120,
    "Retry-After: soon\r\nRetry-After: 120": 120,
    "Retry-After: soon": None,
    "Retry-After: -5": None,
}


@pytest.mark.parametrize(
    ("status", "header"), [*((202, header) for header in RETRY_AFTER), (503, "Retry-After: 120")]
)
def test_retry_after_is_told(pending: Talking, status: int, header: str) -> None:
    """Also that of a server in trouble."""
    run = pending.hears(answer(status, b"{}", header, "Date: Tue, 24 Nov 2026 12:00:00 GMT"), options=["--json"])
    told, seconds = json.loads(run.out), RETRY_AFTER[header]
    expected = 69 if status == 202 else 127
    assert (run.status, told["status"], told["retry_after"]) == (expected, expected, seconds)
    assert (f"the server asks to wait {seconds} s" in run.err) == (seconds is not None)
    assert told["message"] in run.err


# --- 403 in other words than Caramel's ---

RFC = "https://tools.ietf.org/html/rfc9110#section-15.5.4"
WORDS: dict[str, object] = {
    "Spring": {
        "type": "about:blank",
        "title": "Forbidden",
        "status": 403,
        "detail": "Access Denied",
        "instance": "/x",
    },
    "ASP.NET": {"type": RFC, "title": "Forbidden", "status": 403, "traceId": "0"},
    "CDN": {"title": "Error 1020: Access denied", "status": 403, "detail": "Forbidden"},
    "text": {"title": "Forbidden", "status": "403", "detail": None},
    "list": [],
    "no detail": {"title": "Forbidden", "status": 403},
}


@pytest.mark.parametrize("document", WORDS)
def test_a_403_in_other_words_wipes_nothing(certified: Talking, document: str) -> None:
    says = answer(403, json.dumps(WORDS[document]).encode(), "Content-Type: application/problem+json")
    certified.keeps(says, says)


# --- A certificate that can't be loaded into TLS ---

WITHOUT_PROC = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
LACKS = {
    "memfd_create": ("strace", "-qq", "-f", "-o", "/dev/null", "-e", "inject=memfd_create:error=ENOSYS"),
    "/proc": WITHOUT_PROC,
}


@needs("strace", "mounts")
@pytest.mark.parametrize("lacks", LACKS)
def test_a_system_without_files_in_memory_does_without_client_certificate(certified: Talking, lacks: str) -> None:
    run = certified.hears(answers.PENDING, options=["-v"], before=LACKS[lacks])
    assert (run.status, run.err.count("can't be shown")) == (69, 1), run.err
    assert certified.asked[0].client_certificate is None


@needs("mounts")
def test_a_first_boot_without_proc(new: Talking) -> None:
    new.enrolls(before=WITHOUT_PROC)


# --- OpenSSL 3.5 and its post-quantum share ---


@pytest.fixture
def modern(pending: Talking) -> Talking:
    """A device with Debian 13's OpenSSL."""
    require("trixie")
    tree = world.in_tree(world.trixie())
    command = world.installation("trixie", "/usr/bin/python3", system=True, before=tree)
    pending.command = [*tree, command]
    return pending


@pytest.mark.parametrize(("groups", "one_packet"), [([], True), (["small"], True), (["default"], False)])
@fetches
def test_a_greeting_fits_one_packet_unless_the_default_is_asked_for(
    modern: Talking, groups: list[str], one_packet: bool
) -> None:
    sizes: list[int] = []
    record = lambda connection, over: sizes.append(len(connection.recv(65536)))  # noqa: E731
    modern.keeps(None, options=["--groups", *groups] if groups else [], server={"instead_of_tls": record})
    assert len(sizes) == 1 and (sizes[0] < 350 if one_packet else sizes[0] > 1200), sizes


@needs("nginx")
@fetches
def test_a_server_with_x25519_alone_is_told_from_other_failures(
    modern: Talking, authority: Authority, caramel: Caramel, tmp_path: Path
) -> None:
    with Nginx(tmp_path / "nginx", caramel, authority.server(), server_lines="ssl_ecdh_curve X25519;") as front:
        modern.server = front.address
        run = modern.run()
        assert (run.status, "CARAMEL_GROUPS=default" in run.err) == (127, True), run.err
        assert modern.run("--groups", "default").status == 69
    # The same alert, for another reason.
    with Scripted(authority.server(), [None], newest_tls=ssl.TLSVersion.TLSv1_2) as server:
        server.context.set_ciphers("AES128-SHA256")
        modern.server = server.address
        run = modern.run()
    assert (run.status, "HANDSHAKE_FAILURE" in run.err, "GROUPS" in run.err) == (127, True, False), run.err
