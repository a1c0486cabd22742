"""Networks and servers: slow, silent, broken, wrong and lying ones.

What is asked of every run: over within its time limit, one of the four exit statuses, the key file unharmed. What can
be said in a few bytes is said to the installed command; what comes in thousands (an answer cut at every byte) is said
to the library in this process, over real sockets and real TLS.
"""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import ssl
import struct
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Optional, Union

import world
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from world import Authority, Device, HttpRequest, Run, Scripted, answers
from world.answers import Answer

from caramel_embedded import check
from caramel_embedded.errors import CaramelError
from torture.fleet import STATUSES, key_file_parts
from torture.namespaces import cover, isolated
from torture.report import Case, sample

LIMIT = 1.0
#: What a run may take beyond its limit: its start and end on a machine that has other things to do.
SLACK = 3.0
#: KiB of memory that a run may take, whatever is sent to it: a good certificate, and all that judges it, take 51 MiB.
MOST_MEMORY = 72 * 1024

PROBLEM = "Content-Type: application/problem+json"


class Stage:
    """What all of these cases share: an authority, a server's certificate, and identities."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = Authority(folder / "authority")
        self.pem = self.authority.server()
        self.key = world.new_key()
        self._numbers = itertools.count(1)

    def device(self, state: str, command: str = world.PLAIN) -> tuple[Device, bytes]:
        """A device that is "certified" or "pending", and what is in its key file."""
        client_id = f"fd{next(self._numbers):010x}"
        device = Device(
            self.folder / client_id,
            "localhost:1",
            self.authority.certificate_file,
            client_id,
            command=(command,),
        )
        old = self.authority.identity(client_id, key=self.key, certified=state == "certified")
        device.has(old)
        return device, old

    def good(self, device: Device) -> bytes:
        """A certificate for the device that is good in every way."""
        return self.authority.sign(device.request)


def _verdict(
    device: Device, old: bytes, run: Run, expected: Sequence[int], limit: float, stored: Optional[bytes] = None
) -> list[str]:
    """`stored`: a certificate that may be in the file afterwards."""
    wrong = []
    if run.status not in expected or run.status not in STATUSES:
        wrong.append(f"exit status {run.status}, not among {list(expected)}: {run.err[-200:]!r}")
    if run.seconds > limit + SLACK:
        wrong.append(f"took {run.seconds:.1f} s with a limit of {limit:g} s")
    content = device.key_file.read_bytes()
    parts = key_file_parts(content)
    if content != old and (stored is None or parts is None or parts.certificate != stored or run.status != 0):
        wrong.append("the key file was changed")
    if sorted(path.name for path in device.folder.iterdir()) != ["empty.conf", "identity.pem"]:
        wrong.append("litter")
    if run.memory > MOST_MEMORY:
        wrong.append(f"took {run.memory} KiB of memory")
    if "PRIVATE KEY" in run.out + run.err or run.err.count("\n") > 1:
        wrong.append(f"output: {run.err!r}")
    return wrong


def says(
    stage: Stage,
    name: str,
    answers: Union[Callable[[Device, HttpRequest], Answer], Sequence[Answer]],
    expected: Sequence[int] = (127,),
    state: str = "certified",
    limit: float = LIMIT,
    store: bool = False,
    asked: Optional[range] = None,
    command: str = world.PLAIN,
    **server: Any,
) -> Case:
    """A run against a server that says just this. `store`: a good certificate may be taken from it."""

    def act() -> list[str]:
        device, old = stage.device(state, command)
        script: Any = answers
        good = stage.good(device) if store else None
        if callable(answers):
            script = lambda asked: answers(device, asked)  # noqa: E731
        with Scripted(stage.pem, script, **server) as there:
            device.server = there.address
            run = device.run_measured(f"--timeout={limit:g}", timeout=limit + 3 * SLACK)
            count, stored = len(there.requests), good
        if store:
            parts = key_file_parts(device.key_file.read_bytes())
            stored = parts.certificate if parts else None
        wrong = _verdict(device, old, run, expected, limit, stored)
        if asked is not None and count not in asked:
            wrong.append(f"it was asked {count} times")
        return wrong

    return Case(f"{state}: {name}", act)


# --- Every status


def _checked(stage: Stage, device: Device, old: bytes, port: int, timeout: float) -> tuple[str, list[bytes]]:
    """How a check by the library ends, and what it has stored."""
    stored: list[bytes] = []
    try:
        outcome = check(
            server=("localhost", port),
            ca_cert=stage.authority.pem,
            client_id=str(device.client_id),
            stored=old,
            store=lambda identity: stored.append(bytes(identity)),
            timeout=timeout,
        )
    except CaramelError as error:
        return type(error).__name__, stored
    return "certified" if outcome.certified else "pending", stored


def every_status(stage: Stage, numbers: Sequence[int]) -> Case:
    """Each status as an answer to GET, and then as one to POST, as a proxy would say it; to the library, because
    they are so many. Nothing may be stored, and only 202 means that the request waits."""

    def act() -> list[str]:
        device, old = stage.device("pending")
        wrong = []
        number, method = 0, ""
        # What comes before an answer, RFC 9110, 15.2: the answer itself is waited for, up to the time limit.
        interim = {100, *range(102, 200)}

        def answer(asked: HttpRequest) -> bytes:
            if asked.method == method:
                return _page(number, b"<html>no</html>")
            if method == "POST" and not there.requests[:-1]:
                return world.answer(404)
            return world.answer(202, b"{}")

        with Scripted(stage.pem, answer) as there:
            for number, method in itertools.product(numbers, ("GET", "POST")):
                there.requests.clear()
                said, stored = _checked(stage, device, old, there.port, 0.5 if number in interim else 10)
                expected = ("pending",) if number == 202 else ("Refused", "Unreachable")
                if stored or said not in expected:
                    wrong.append(f"{method} {number}: {said}, stored {len(stored)}")
        return wrong

    return Case("every status", act, 2 * len(numbers))


def _page(number: int, body: bytes) -> bytes:
    """An answer with this status as a proxy gives it; some statuses have no body (RFC 9110, 6.4.1)."""
    empty = number in (204, 304) or number < 200
    return world.answer(number, b"" if empty else body, "Content-Type: text/html")


def statuses(stage: Stage, numbers: Iterable[int]) -> list[Case]:
    """Statuses that a proxy gives, to the installed command."""
    cases = []
    for number in numbers:
        state = "certified" if number % 2 else "pending"
        html = _page(number, b"<html>no</html>")
        if number == 304:
            for each, end in (("certified", 0), ("pending", 127)):
                cases.append(says(stage, "GET 304", [html], (end,), each))
        else:
            # At 404 the request is posted, and refused, because this server answers 404 to that as well.
            asked = range(2, 3) if number == 404 else None
            cases.append(says(stage, f"GET {number}", [html], (69,) if number == 202 else (127,), state, asked=asked))
    return cases


def caramel_errors(stage: Stage, numbers: Iterable[int]) -> list[Case]:
    """The same from the application itself; only its 403 means something else than an error."""
    return [
        says(stage, f"GET {number} by the application", [answers.problem(number, "No")], (127,), "certified")
        for number in numbers
        if number not in (200, 202, 304, 403, 404)
    ]


def redirects(stage: Stage) -> list[Case]:
    """Redirects to anywhere: nobody goes there."""
    targets = [
        "/", "//localhost:1/", "http://localhost:1/", "https://example.com/", "file:///etc/passwd", "javascript:0",
        "", "../../etc/passwd", "https://user:secret@localhost/", "\x00", "https://[::1", "/" + "a" * 9000,
    ]  # fmt: skip
    cases = []
    for status in (300, 301, 302, 303, 305, 307, 308):
        for target in targets if status in (302, 308) else targets[:2]:
            answer = world.answer(status, b"", f"Location: {target}")
            cases.append(says(stage, f"{status} to {target[:30]!r}", [answer], asked=range(1, 2)))

    def elsewhere() -> list[str]:
        device, old = stage.device("certified")
        good = stage.good(device)
        with Scripted(stage.pem, [world.answer(200, good)]) as other:
            here = world.answer(302, b"", f"Location: https://{other.address}/{device.request_hash()}")
            with Scripted(stage.pem, [here]) as there:
                device.server = there.address
                run = device.run(f"--timeout={LIMIT:g}")
            wrong = _verdict(device, old, run, (127,), LIMIT)
            return wrong + (["the other server was asked"] if other.connections else [])

    return [*cases, Case("certified: 302 to another good server", elsewhere)]


# --- Answers that are not as they should be


def malformed(stage: Stage) -> list[Case]:
    """Headers and bodies: cut, doubled, oversized, compressed, chunked, lying."""
    ok = b"HTTP/1.1 200 OK\r\n"

    def body(make: Callable[[bytes], Answer]) -> Callable[[Device, HttpRequest], Answer]:
        return lambda device, asked: make(stage.good(device))

    def sized(data: bytes, size: object = None, more: str = "") -> bytes:
        """With this length in the header, by default the true one, and with another header before that."""
        length = len(data) if size is None else size
        return ok + f"{more}Content-Length: {length}\r\n\r\n".encode() + data

    def beside(header: str) -> Callable[[bytes], Answer]:
        return lambda c: sized(c, more=f"{header}\r\n")

    def chunked(pieces: bytes) -> bytes:
        return ok + b"Transfer-Encoding: chunked\r\n\r\n" + pieces

    def forever(piece: bytes) -> Iterable[bytes]:
        return itertools.repeat(piece)

    bad: dict[str, Callable[[bytes], Answer]] = {
        "nothing": lambda c: None,
        "an empty line": lambda c: b"\r\n\r\n",
        "rubbish": lambda c: b"\x00\xff\x16\x03\x01" * 400 + b"\r\n\r\n",
        "HTTP/0.9": lambda c: c,
        "HTTP/2": lambda c: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "another protocol": lambda c: b"SSH-2.0-OpenSSH_9.2\r\n",
        "a status that is none": lambda c: b"HTTP/1.1 abc No\r\n\r\n",
        "a status of 99": lambda c: b"HTTP/1.1 99 No\r\nContent-Length: 0\r\n\r\n",
        "a status of 1000": lambda c: b"HTTP/1.1 1000 No\r\nContent-Length: 0\r\n\r\n",
        "a negative status": lambda c: b"HTTP/1.1 -200 No\r\n\r\n",
        "a status line without end": lambda c: forever(b"HTTP/1.1 200 " + b"x" * 8192),
        "a header without end": lambda c: itertools.chain([ok + b"X: "], forever(b"x" * 8192)),
        "headers without end": lambda c: itertools.chain([ok], forever(b"X: y\r\n" * 1000)),
        "a header of 70 kB": lambda c: ok + b"X: " + b"x" * 70000 + b"\r\n\r\n" + c,
        "101 headers": lambda c: ok + b"X: y\r\n" * 101 + b"\r\n" + c,
        "100 Continue without end": lambda c: forever(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        "no body": lambda c: sized(b""),
        "a body that is cut": lambda c: sized(c[:-30], len(c)),
        "the certificate six times": lambda c: sized(c * 6),
        "text around it": lambda c: sized(b"here: " + c),
        "text after it": lambda c: sized(c + b"bye\n"),
        "another label": lambda c: sized(c.replace(b"CERTIFICATE", b"TRUSTED CERTIFICATE")),
        "a key in the answer": lambda c: sized(c + world.private_pem(stage.key)),
        "a request": lambda c: sized(c.replace(b"CERTIFICATE", b"CERTIFICATE REQUEST")),
        "only the boundary lines": lambda c: sized(b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"),
        "64 KiB and a byte": lambda c: sized(b"x" * 65537),
        "a body without end": lambda c: itertools.chain([ok + b"\r\n"], forever(b"x" * 16384)),
        "a body of a petabyte": lambda c: itertools.chain(
            [ok + b"Content-Length: 1000000000000000\r\n\r\n"], forever(b"x" * 16384)
        ),
        "two lengths": lambda c: sized(c, f"{len(c)}\r\nContent-Length: 5"),
        "two lengths in one line": lambda c: sized(c, f"{len(c)}, {len(c)}"),
        "a negative length": lambda c: sized(c, -5),
        "a length that is none": lambda c: sized(c, "many"),
        "a length of 5000 digits": lambda c: sized(c, "9" * 5000),
        "gzip": lambda c: sized(gzip.compress(c), more="Content-Encoding: gzip\r\n"),
        "gzip unannounced": lambda c: sized(gzip.compress(c)),
        "chunks of a size that is none": lambda c: chunked(b"zz\r\n" + c),
        "chunks of a negative size": lambda c: chunked(b"-5\r\n" + c),
        "chunks of a huge size": lambda c: chunked(b"f" * 40 + b"\r\n" + c),
        "a chunk that is shorter than it says": lambda c: chunked(b"%x\r\n" % (len(c) + 9) + c + b"\r\n0\r\n\r\n"),
        "a chunk size without end": lambda c: itertools.chain([chunked(b"")], forever(b"0" * 8192)),
        "chunks without end": lambda c: itertools.chain([chunked(b"")], forever(b"1\r\nx\r\n" * 1000)),
        "trailers without end": lambda c: itertools.chain([chunked(b"0\r\n")], forever(b"X: y\r\n" * 1000)),
        "chunks that stop": lambda c: (chunked(b"%x\r\n" % len(c) + c[:100]),),
        "a 403 that isn't whole": lambda c: (
            b"HTTP/1.1 403 No\r\n" + PROBLEM.encode() + b"\r\nContent-Length: 99\r\n\r\n{"
        ),
        "a 403 for another status": lambda c: world.answer(403, b'{"status":404}', PROBLEM),
        "a 403 that is no object": lambda c: world.answer(403, b"[403]", PROBLEM),
        "a 403 nested": lambda c: world.answer(403, b"[" * 60000, PROBLEM),
        "a 403 as HTML that says it is Caramel's": lambda c: world.answer(
            403, b'{"status":403}', "Content-Type: text/html"
        ),
        "a 403 with true for a status": lambda c: world.answer(403, b'{"status":true}', PROBLEM),
        "a 403 with NaN": lambda c: world.answer(403, b'{"status":NaN}', PROBLEM),
    }
    good: dict[str, Callable[[bytes], Answer]] = {
        "in chunks": lambda c: chunked(
            b"%x;a=b\r\n" % 10 + c[:10] + b"\r\n%x\r\n" % len(c[10:]) + c[10:] + b"\r\n0\r\nX: y\r\n\r\n"
        ),
        "without a length": lambda c: ok + b"Connection: close\r\n\r\n" + c,
        "after 100 Continue": lambda c: b"HTTP/1.1 100 Continue\r\n\r\n" + sized(c),
        "with Windows line ends": lambda c: sized(c.replace(b"\n", b"\r\n")),
        # Whatever the headers say of it, what comes is the certificate, and judged as one.
        "with a sign before its length": lambda c: sized(c, f"+{len(c)}"),
        "that says it is gzip": beside("Content-Encoding: gzip"),
        "that says it is br": beside("Content-Encoding: br"),
        "twice": lambda c: sized(c + c),
        "with the root in its chain": lambda c: sized(c + stage.authority.pem),
        "with Last-Modified nonsense": beside("Last-Modified: Blursday, 99 Foo -1 25:61"),
        "with Last-Modified in the year 1": lambda c: sized(
            c, more="Last-Modified: Mon, 01 Jan 0001 00:00:00 GMT\r\n"
        ),
        "with Last-Modified in the year 9999": lambda c: sized(
            c, more="Last-Modified: Fri, 31 Dec 9999 23:59:59 GMT\r\n"
        ),
    }
    cases = [says(stage, name, body(make), (127,)) for name, make in bad.items()]
    # They end by themselves, so the limit may be long.
    cases += [
        says(stage, f"a good one {name}", body(make), (0,), store=True, limit=10) for name, make in good.items()
    ]
    return cases


def endless(stage: Stage) -> list[Case]:
    """What comes as fast as it is read, for ever: messages of TLS that a library passes over inside of one call, and
    each part of an answer. For the installed command, and with the libraries of this Debian."""

    ok = b"HTTP/1.1 200 OK\r\n"
    chunks = ok + b"Transfer-Encoding: chunked\r\n\r\n"
    parts = {
        "a header": ok + b"X: ",
        "a chunk's size": chunks,
        "a chunk's extension": chunks + b"1;",
        "a trailer": chunks + b"0\r\nX: ",
        "the text of a status": b"HTTP/1.1 403 ",
    }
    floods: dict[str, dict[str, Any]] = {
        "HelloRequest messages in the place of a handshake": {"instead_of_tls": world.hello_requests},
        "session tickets after a handshake": {"instead_of_tls": world.session_tickets(stage.pem)},
    }
    commands = {"": world.PLAIN}
    python = world.debian_python()
    if python:
        commands[", Debian's libraries"] = world.installation("debian", python, system=True)
    cases = []
    for libraries, command in commands.items():
        for what, server in floods.items():
            cases.append(says(stage, f"endless: {what}{libraries}", [None], command=command, limit=10, **server))
        for what, head in parts.items():
            answer = lambda _, __, head=head: itertools.chain([head], itertools.repeat(b"0" * 65536))  # noqa: E731
            cases.append(says(stage, f"endless: {what}{libraries}", answer, command=command, limit=10))
    return cases


def slow(stage: Stage) -> list[Case]:
    """A byte a second for ever, in turn: handshake, headers, body; and silence at each of these."""

    def dribble(connection: socket.socket, over: threading.Event) -> None:
        """A TLS handshake, byte by byte."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(stage.pem))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = context.wrap_bio(incoming, outgoing, server_side=True)
        connection.settimeout(0.2)
        while not over.is_set():
            with suppress(socket.timeout):
                incoming.write(connection.recv(65536))
            with suppress(ssl.SSLWantReadError):
                session.do_handshake()
            for byte in outgoing.read():
                connection.sendall(bytes([byte]))
                if over.wait(0.3):
                    return

    def after(prefix: bytes) -> Callable[[Device, HttpRequest], Answer]:
        def answer(device: Device, asked: HttpRequest) -> Iterable[Union[bytes, float]]:
            yield prefix
            for byte in stage.good(device) * 9:
                yield bytes([byte])
                yield 0.3

        return answer

    def then_silence(prefix: bytes) -> Callable[[Device, HttpRequest], Answer]:
        return lambda device, asked: [prefix, 60.0]

    head = b"HTTP/1.1 200 OK\r\n"
    places = {
        "in the status line": b"HT",
        "in the headers": head + b"X: ",
        "in the body": head + b"Content-Length: 9999\r\n\r\n",
        "in a body without length": head + b"\r\n",
        "in a chunk": head + b"Transfer-Encoding: chunked\r\n\r\nfff\r\n",
        "in a chunk's size": head + b"Transfer-Encoding: chunked\r\n\r\n",
    }
    cases = [says(stage, f"a few bytes a second {place}", after(prefix)) for place, prefix in places.items()]
    cases += [says(stage, f"silence {place}", then_silence(prefix)) for place, prefix in places.items()]
    cases.append(says(stage, "silence after the request", [[0.0, 60.0]]))
    cases.append(says(stage, "a few bytes a second of the handshake", [None], instead_of_tls=dribble))
    cases.append(says(stage, "silence in place of a handshake", [None], instead_of_tls=world.silence))
    cases.append(says(stage, "hangs up", [None], instead_of_tls=world.hang_up))
    cases.append(says(stage, "resets", [None], instead_of_tls=world.reset))

    def no_accept() -> list[str]:
        """A server whose queue of connections is full: nothing is ever answered, not even the first packet."""
        device, old = stage.device("certified")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            waiting = [socket.socket() for _ in range(4)]
            for each in waiting:
                each.setblocking(False)
                with suppress(BlockingIOError):
                    each.connect(listener.getsockname())
            device.server = f"localhost:{listener.getsockname()[1]}"
            run = device.run(f"--timeout={LIMIT:g}")
            for each in waiting:
                each.close()
        return _verdict(device, old, run, (127,), LIMIT)

    cases.append(Case("certified: no connection is taken", no_accept))
    return cases


def look_ups(stage: Stage) -> list[Case]:
    """A name server that never answers, one that isn't there, one that answers with rubbish."""

    files = {
        "/etc/resolv.conf": "nameserver 127.0.0.53\noptions timeout:30 attempts:5\n",
        "/etc/nsswitch.conf": "hosts: dns\n",
    }

    def case(name: str, answer: Optional[bytes], listening: bool, slow: bool) -> Case:
        def act() -> list[str]:
            device, old = stage.device("certified")
            device.server = "caramel.example.com"
            etc = stage.folder / f"{device.client_id}-etc"
            etc.mkdir()
            over = threading.Event()

            def serve(server: socket.socket) -> None:
                while not over.is_set():
                    with suppress(OSError):
                        query, sender = server.recvfrom(4096)
                        if answer is not None:
                            server.sendto(query[:2] + answer, sender)

            def there() -> Run:
                for path, text in files.items():
                    by = etc / Path(path).name
                    by.write_text(text)
                    if Path(path).exists():
                        cover(Path(path), by)
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
                    server.settimeout(0.1)
                    if listening:
                        server.bind(("127.0.0.53", 53))
                    thread = threading.Thread(target=serve, args=(server,))
                    thread.start()
                    try:
                        return device.run("--timeout=2")
                    finally:
                        over.set()
                        thread.join()

            run = isolated(there, network=True)
            wrong = _verdict(device, old, run, (127,), 2.0)
            if slow and run.seconds < 1.5:
                wrong.append("the name server was not waited for")
            return wrong

        return Case(f"name look-up: {name}", act)

    return [
        case("never answers", None, True, True),
        case("nobody there", None, False, False),
        case("rubbish", b"\xff" * 40, True, False),
    ]


# --- Cut at every byte


def _reset(connection: socket.socket) -> None:
    """Its end will be a reset, and no orderly one."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class _Cut(Scripted):
    """Ends, or resets, each connection after so many bytes of its answer, without a word of TLS's."""

    length, by_reset = 0, False

    def _say(self, connection: ssl.SSLSocket, says: Any) -> bool:
        connection.sendall(says[: self.length])
        if self.by_reset:
            _reset(connection)
        raise ConnectionAbortedError


def every_byte(stage: Stage, reset: bool, step: int = 1) -> Case:
    """A good answer that ends, or is reset, after each of its bytes: nothing is stored before all of it is there."""
    device, old = stage.device("pending")
    full = world.answer(200, stage.good(device))
    # The last few always: there an answer without its end looks most like a whole one.
    lengths = sorted({*range(0, len(full), step), *range(len(full) - 40, len(full) + 1)})

    def act() -> list[str]:
        wrong = []
        with _Cut(stage.pem, [full]) as there:
            there.by_reset = reset
            for there.length in lengths:
                said, stored = _checked(stage, device, old, there.port, 10)
                whole, good = there.length == len(full), said == "certified"
                # With a reset, even the whole answer may be lost in the receiver's kernel.
                lost = whole and not good and not reset
                if said == "pending" or lost or (good and not whole):
                    wrong.append(f"after {there.length} of {len(full)} bytes: {said}")
                if stored and not good:
                    wrong.append(f"after {there.length} bytes something was stored")
        return wrong[:5]

    return Case(f"an answer that {'is reset' if reset else 'ends'} after each byte (step {step})", act, len(lengths))


# --- A certificate with each field wrong in turn


def certificates(stage: Stage) -> list[Case]:
    """Certificates by the right authority, but for one field; none of them may be stored."""
    other = Authority(stage.folder / "other")
    twin = Authority(stage.folder / "twin")  # the same names as the real one, another key
    hour = world.hours(1)
    foreign, curve = world.new_key(), ec.generate_private_key(ec.SECP256R1())
    sign = stage.authority.sign

    def subject(device: Device, *more: tuple[str, str], cn: Optional[str] = None) -> list[tuple[str, str]]:
        wanted = list(stage.authority.subject_for(cn or str(device.client_id)))
        return [*wanted, *more]

    def der(pem: bytes, change: Callable[[bytearray], None]) -> bytes:
        data = bytearray(x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER))
        change(data)
        return ssl.DER_cert_to_PEM_cert(bytes(data)).encode()

    def flip(place: int) -> Callable[[bytearray], None]:
        def change(data: bytearray) -> None:
            data[place] ^= 0x01

        return change

    def self_signed(device: Device) -> bytes:
        name = world.name_of(subject(device))
        made = x509.CertificateBuilder(
            name, name, stage.key.public_key(), 7, world.now() - hour, world.now() + hour * 9
        )
        return made.sign(stage.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def md5(device: Device) -> bytes:
        pem = sign(device.request)
        # The algorithm in both places that name it: sha256WithRSAEncryption becomes md5WithRSAEncryption.
        data = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
        return ssl.DER_cert_to_PEM_cert(data.replace(b"\x01\x01\x0b", b"\x01\x01\x04")).encode()

    wrong: dict[str, Callable[[Device], bytes]] = {
        "another key": lambda d: sign(d.request, public_key=foreign.public_key()),
        "a key of another kind": lambda d: sign(d.request, public_key=curve.public_key()),
        "another client ID": lambda d: sign(d.request, subject=subject(d, cn="fffffffffff0")),
        "the client ID in capitals": lambda d: sign(d.request, subject=subject(d, cn=str(d.client_id).upper())),
        "the client ID and more": lambda d: sign(d.request, subject=subject(d, cn=f"{d.client_id}0")),
        "a space after the client ID": lambda d: sign(d.request, subject=subject(d, cn=f"{d.client_id} ")),
        "two client IDs": lambda d: sign(d.request, subject=subject(d, ("CN", "fffffffffff0"))),
        "no client ID": lambda d: sign(d.request, subject=subject(d)[:-1], names=[]),
        "no subject": lambda d: sign(d.request, subject=[], names=[]),
        "another DNS name and no client ID": lambda d: sign(d.request, subject=[], names=["fffffffffff0"]),
        "the client ID as DNS name below another's": lambda d: sign(
            d.request, subject=subject(d, cn="fffffffffff0"), names=[str(d.client_id)]
        ),
        "another authority": lambda d: other.sign(d.request),
        "another authority of the same name": lambda d: twin.sign(d.request),
        "signed by itself": self_signed,
        "an issuer of another name": lambda d: sign(d.request, issuer=world.name_of([("CN", "Somebody")])),
        "ended": lambda d: sign(d.request, not_before=world.now() - 9 * hour, not_after=world.now() - hour),
        "begun after the server's own has ended": lambda d: sign(
            d.request, not_before=world.now() + hour * 72, not_after=world.now() + hour * 99
        ),
        "for programs only": lambda d: sign(d.request, usage=[world.CODE_SIGNING]),
        "the authority's own": lambda d: stage.authority.pem,
        "a broken signature": lambda d: der(sign(d.request), flip(-9)),
        "a broken serial number": lambda d: der(sign(d.request), flip(20)),
        "a broken middle": lambda d: der(sign(d.request), flip(300)),
        "cut": lambda d: der(sign(d.request), lambda data: data.__delitem__(slice(-40, None))),
        "something behind it": lambda d: der(sign(d.request), lambda data: data.extend(b"more")),
        "an MD5 signature": md5,
    }

    def answering(make: Callable[[Device], bytes]) -> Callable[[Device, HttpRequest], Answer]:
        return lambda device, asked: world.answer(200, make(device))

    cases = [
        says(stage, f"a certificate, {name}", answering(make), (127,), state)
        for name, make in wrong.items()
        for state in ("certified", "pending")
    ]
    good: dict[str, Callable[[Device], bytes]] = {
        "as it should be": stage.good,
        "not begun": lambda d: sign(d.request, not_before=world.now() + hour, not_after=world.now() + 9 * hour),
        "for servers only": lambda d: sign(d.request, usage=[world.SERVER_AUTH]),
        "the client ID as DNS name only": lambda d: sign(d.request, subject=[], names=[str(d.client_id)]),
    }
    cases += [
        says(stage, f"a good certificate, {name}", answering(make), (0,), state, store=True, limit=10)
        for name, make in good.items()
        for state in ("certified", "pending")
    ]
    return cases


# --- Connections that break

#: Ways to break a connection: what happens to the answer, and how the connection ends. "before" is once the answer
#: before it has gone out; the others come in place of the answer, when the request has been carried out.
BREAKS = (
    "closed before it",
    "cut before it",
    "reset before it",
    "closed in place of the answer",
    "cut in place of the answer",
    "reset in place of the answer",
    "reset in the answer's body",
    "cut in the answer's status line",
    "cut in the answer's body",
)


class _Breaking(Scripted):
    """A server that behaves as Caramel does, and breaks its connections at the requests that it was told."""

    def __init__(self, pem: Path, way: str, at: Sequence[int], known: Sequence[str], rejected: Sequence[str]) -> None:
        super().__init__(pem, self._answered)
        self.way, self.at = way, list(at)
        #: Hashes of requests.
        self.known, self.rejected = set(known), set(rejected)

    def _answered(self, asked: HttpRequest) -> Answer:
        sha256 = asked.path.strip("/")
        if asked.method == "POST":
            if sha256 in self.known:
                return answers.DUPLICATE
            self.known.add(sha256)
            return answers.PENDING
        if sha256 in self.rejected:
            return answers.REJECTED
        return answers.PENDING if sha256 in self.known else answers.UNKNOWN

    def _say(self, connection: ssl.SSLSocket, says: Any) -> bool:
        number = len(self.requests)
        place = number + 1 if "before" in self.way else number
        if place not in self.at:
            return super()._say(connection, says)
        if "before" in self.way:
            connection.sendall(says)
            self._over.wait(0.05)  # so that a reset doesn't overtake the answer
        if " in the answer's " in self.way:
            connection.sendall(says[:11] if "line" in self.way else says[:-3])
            self._over.wait(0.05)
        if "closed" in self.way:
            return False
        if "reset" in self.way:
            _reset(connection)
        raise ConnectionAbortedError


def broken_off(stage: Stage, state: str, way: str, at: Sequence[int]) -> Case:
    """A run whose connection breaks at its requests `at`, counted from 1: GET, POST, GET."""

    def act() -> list[str]:
        device, old = stage.device("certified" if state == "rejected" else "pending")
        request = device.request_hash()
        if state == "new":
            device.key_file.unlink()
        rejected = [request] if state == "rejected" else []
        with _Breaking(stage.pem, way, at, rejected, rejected) as there:
            device.server = there.address
            run = device.run("--timeout=10")
            tries = len(there.requests)
            content = device.key_file.read_bytes() if device.key_file.exists() else None
            parts = key_file_parts(content or b"")
            live = there.known - there.rejected
            wrong = []
            # A request that isn't the first of its connection is made once more, and so is one that would have shown
            # a certificate, without it. An answer that has begun is not asked for again.
            again = at != [1] or state == "rejected"
            twice = len(at) > 1 and "before" not in way
            expected = {69} if again and not twice and " in the answer's " not in way else {127}
            if (state, at) == ("rejected", [2]) and "before" not in way:
                expected.add(127)  # the second time the server says that it has it: the next run asks
            if run.status not in expected:
                wrong.append(f"exit status {run.status}, not {expected}: {run.err[-300:]!r}")
            if tries > 5:
                wrong.append(f"asked {tries} times")
            if len(live) > 1 or (live and (parts is None or parts.sha256 not in live)):
                wrong.append("a key whose request reached the server is gone")
            if state == "forgotten" and content != old and world.unsealed(content or b"") != world.unsealed(old):
                wrong.append("the identity was changed")
            there.at.clear()
            for _ in range(2):
                run = device.run("--timeout=10")
            parts = key_file_parts(device.key_file.read_bytes())
            if run.status != 69 or parts is None or {parts.sha256} != there.known - there.rejected:
                wrong.append(f"undisturbed: exit status {run.status}: {run.err[-300:]!r}")
        if sorted(path.name for path in device.folder.iterdir()) != ["empty.conf", "identity.pem"]:
            wrong.append("litter")
        return wrong

    places = " and ".join(map(str, at))
    return Case(f"{state}: the connection is {way}, at request {places}", act)


def breaks(stage: Stage) -> list[Case]:
    """Each way, at each request, in each state that has three of them; and twice in a row."""
    return [
        broken_off(stage, state, way, at)
        for state in ("new", "forgotten", "rejected")
        for way in BREAKS
        for at in ([1], [2], [3], [2, 3])
        if not ("before" in way and 1 in at)
    ]


# --- 403 in other words than Caramel's

_FORBIDDEN: dict[str, Any] = {"status": 403, "title": "Forbidden", "detail": None}
WORDS: dict[str, tuple[str, Any]] = {
    "Spring's": ("application/problem+json", {**_FORBIDDEN, "type": "about:blank", "instance": "/x"}),
    "ASP.NET's": ("application/problem+json", {"type": "x", "title": "Forbidden", "status": 403, "traceId": "0"}),
    "a CDN's": ("application/problem+json", {"title": "Error 1020", "status": 403, "detail": "Access denied"}),
    "without a detail": ("application/problem+json", {"title": "Forbidden", "status": 403}),
    "another title": ("application/problem+json", {**_FORBIDDEN, "title": "forbidden"}),
    "a status as text": ("application/problem+json", {**_FORBIDDEN, "status": "403"}),
    "a status of another": ("application/problem+json", {**_FORBIDDEN, "status": 401}),
    "a list": ("application/problem+json", [_FORBIDDEN]),
    "nested": ("application/problem+json", {"error": _FORBIDDEN}),
    "as JSON": ("application/json", _FORBIDDEN),
    "as HTML": ("text/html", _FORBIDDEN),
    "of no type": ("", _FORBIDDEN),
}


def other_words(stage: Stage) -> list[Case]:
    """Whoever says 403 in other words is somebody in between: nothing is wiped."""
    cases = []
    for name, (kind, document) in WORDS.items():
        said = world.answer(403, json.dumps(document).encode(), *([f"Content-Type: {kind}"] if kind else []))
        for state in ("certified", "pending"):
            cases.append(says(stage, f"a 403 in other words, {name}", [said], state=state))
        cases.append(
            says(
                stage,
                f"a 403 in other words after the request was posted, {name}",
                [answers.UNKNOWN, answers.PENDING, said],
                state="pending",
                asked=range(3, 4),
            )
        )
    return cases


# --- A server that is down


def down(stage: Stage) -> list[Case]:
    """One short try a run, and no more: whoever comes up again must not be trampled down."""

    def refused() -> list[str]:
        device, old = stage.device("certified")
        port = world.free_port()
        device.server = f"localhost:{port}"
        log = device.folder / "trace"
        run = device.run(before=("strace", "-f", "-o", str(log), "-e", "trace=connect"))
        tries = [line for line in log.read_text().splitlines() if f"htons({port})" in line]
        log.unlink()
        wrong = _verdict(device, old, run, (127,), LIMIT)
        if len(tries) != len(set(tries)) or not 0 < len(tries) <= 2:  # ::1 and 127.0.0.1
            wrong.append(f"tried {len(tries)} times")
        return wrong

    def dropped(state: str, most: int) -> Callable[[], list[str]]:
        def act() -> list[str]:
            device, old = stage.device(state)
            with Scripted(stage.pem, [None], instead_of_tls=world.hang_up) as there:
                device.server = there.address
                run = device.run()
                tries = there.connections
            wrong = _verdict(device, old, run, (127,), LIMIT)
            return wrong + ([] if tries <= most else [f"tried {tries} times"])

        return act

    page = world.answer(503, b"<html>later</html>", "Content-Type: text/html", "Retry-After: 1")
    return [
        Case("down: the connection is refused", refused),
        Case("down: the connection is dropped, pending", dropped("pending", 1)),
        # Once more without client certificate: that may have been the reason.
        Case("down: the connection is dropped, certified", dropped("certified", 2)),
        says(stage, "down: 502", [world.answer(502, b"<html>")], asked=range(1, 2)),
        says(stage, "down: 503", [page], asked=range(1, 2)),
        says(stage, "down: 504, pending", [world.answer(504, b"")], state="pending", asked=range(1, 2)),
    ]


def everything(stage: Stage, full: bool = True) -> dict[str, list[Case]]:
    """All of it by what it is about; in short form a sample of it."""
    numbers = [100, 101, 200, 204, 206, 226, 300, 304, 400, 401, 403, 404, 407, 410, 421, 500, 502, 511, 599]
    found = {
        "answers with a proxy's statuses": statuses(stage, numbers),
        "the same from the application itself": caramel_errors(stage, numbers),
        "redirects to anywhere": redirects(stage),
        "headers and bodies cut, doubled, oversized, compressed, chunked, lying": malformed(stage),
        "answers and messages of TLS without end": endless(stage),
        "slow and silent servers": slow(stage),
        "name look-up that doesn't answer": look_ups(stage),
        "a certificate with each field wrong in turn": certificates(stage),
        "connections that break at each request": breaks(stage),
        "a 403 in others' words": other_words(stage),
        "a server that is down": down(stage),
    }
    return found if full else {name: sample(cases, 14) for name, cases in found.items()}
