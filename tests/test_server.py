"""The conversation by itself: name look-up, addresses and time, without a server where none is needed."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from typing import Any, Callable

import pytest

from caramel_embedded import Untrusted, certificates, server, trust
from caramel_embedded.errors import KeyUnusable
from caramel_embedded.tls import Limits, Tcp


def limit(seconds: float) -> Limits:
    limits = Limits(seconds)
    limits.start()
    return limits


def soon() -> Limits:
    return limit(20)


def found(*addresses: tuple[str, int]) -> list[Any]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]


def test_an_address_needs_no_look_up() -> None:
    before = threading.active_count()
    assert server.look_up("127.0.0.1", 443, soon())[0][4] == ("127.0.0.1", 443)
    assert threading.active_count() == before


def is_asked(monkeypatch: pytest.MonkeyPatch, says: Callable[[], Any]) -> None:
    """The system's look-up finds no address in the name itself, and then does this."""

    def getaddrinfo(*_: Any, flags: int = 0, **__: Any) -> Any:
        if flags:
            raise socket.gaierror("not an address")
        return says()

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def out_of_memory() -> Any:
    raise MemoryError("no room")


@pytest.mark.parametrize(
    ("says", "text"), [(lambda: [], "no address"), (out_of_memory, "name look-up failed: no room")]
)
def test_a_look_up_that_finds_nothing_says_why(
    monkeypatch: pytest.MonkeyPatch, says: Callable[[], Any], text: str
) -> None:
    is_asked(monkeypatch, says)
    with pytest.raises(OSError, match=text):
        server.look_up("caramel.example", 443, soon())


def test_a_name_that_is_none() -> None:
    with pytest.raises(OSError, match="name look-up failed"):
        server.look_up("a" * 64 + ".example", 443, soon())


def test_a_look_up_that_never_answers_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    is_asked(monkeypatch, lambda: answered.wait(20))
    with pytest.raises(TimeoutError):
        server.look_up("caramel.example", 443, limit(0.2))
    answered.set()


def test_a_chip_that_hangs_inside_of_a_library_ends_in_time() -> None:
    began = time.monotonic()
    with pytest.raises(KeyUnusable, match="gave no answer"):
        limit(0.2).by_chip(time.sleep, 3)
    assert time.monotonic() - began < 2
    assert limit(20).by_chip(max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        limit(20).by_chip(divmod, 1, 0)


def test_no_room_for_a_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    with pytest.raises(OSError, match="no room"):
        server.look_up("localhost", 443, soon())


def test_an_address_of_a_family_that_the_system_lacks() -> None:
    with pytest.raises(OSError, match="Address family not supported"):
        Tcp((4711, socket.SOCK_STREAM, 0, "", ("::1", 1)), soon())


def test_a_server_that_sends_its_chain_byte_by_byte_makes_nobody_wait_longer() -> None:
    over = threading.Event()

    def dribble() -> None:
        with theirs:
            # The head of a handshake's record of 4096 bytes (RFC 8446, 5.1), and then its bytes, one at a time.
            theirs.sendall(b"\x16\x03\x03\x10\x00")
            for _ in range(200):
                if not over.wait(0.05):
                    theirs.sendall(b"\x02")

    listener = socket.create_server(("127.0.0.1", 0))
    tcp = Tcp(found(listener.getsockname())[0], limit(0.3))
    theirs = listener.accept()[0]
    listener.close()
    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        with pytest.raises(TimeoutError):
            certificates.chain_sent(tcp, "caramel.example")
    finally:
        over.set()
        thread.join()


def test_a_signal_while_it_connects_closes_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Interrupted(socket.socket):
        def connect(self, _address: Any) -> None:
            made.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(socket, "socket", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tcp(found(("127.0.0.1", 9))[0], soon())
    assert made[0].fileno() == -1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Thu, 01 Jan 1970 00:01:40 GMT", 100),
        ("Thu, 01 Jan 1970 01:01:40 +0100", 100),
        ("Thu, 01 Jan 1970 00:01:40", 100),
        ("Sun Nov  6 08:49:37 1994", 784111777),
        ("yesterday", None),
        ("Thu, 99 Abc 1970 99:99:99 GMT", None),
        ("", None),
        ("Sat, 01 Jan 12000 00:00:00 GMT", None),
        ("Thu, 01 Jan 1960 00:00:00 GMT", None),
        (None, None),
    ],
)
def test_dates(text: Any, seconds: Any) -> None:
    assert server.seconds(text) == seconds


def test_a_certificate_that_is_early_even_without_dates_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every TLS library has to know OpenSSL's flag."""
    tries = []

    def early(_: server.Server, address: Any, dates: bool, small: bool) -> None:
        tries.append(dates)
        error = ssl.SSLCertVerificationError("not yet valid")
        error.verify_code, error.verify_message = server.NOT_YET_VALID, "certificate is not yet valid"
        raise error

    asked = server.Server(("127.0.0.1", 9), trust.Trust(b""), "a", 20, lambda _: None)
    monkeypatch.setattr(server.Server, "_handshake", early)
    asked.connect(None)
    with pytest.raises(Untrusted):
        asked.reach()
    assert tries == [True, False]
