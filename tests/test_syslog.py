"""`--syslog`: one message a run, with a priority that means something, and a daemon that hangs holds nobody up.

The command runs in a mount namespace whose ``/dev`` is the test's own, so that the machine's log is left alone.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import world
from needs import needs, require
from talking import ID, Talking, server_of
from world import Answer, Authority, Run, Scripted, answers

ERROR, WARNING, NOTICE, INFO, DEBUG = 3, 4, 5, 6, 7
DAEMON = 3

#: In a namespace of its own: the folder $1 becomes /dev, with the few devices that everybody has; then the rest runs.
OWN_DEV = """
dev=$1; shift
for name in null zero full random urandom; do
    : >>"$dev/$name" && mount --bind "/dev/$name" "$dev/$name" || exit 99
done
mount --rbind "$dev" /dev || exit 99
exec "$@"
"""

MESSAGE = re.compile(rb"<(\d+)>([A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d) caramel-embedded\[(\d+)\]: (.*)", re.DOTALL)


class Logged:
    """A device whose messages go to a socket of the test's."""

    def __init__(self, folder: Path, authority: Authority, kind: int = socket.SOCK_DGRAM) -> None:
        self.authority = authority
        self.device = Talking(folder / "device", authority)
        self.device.server = "localhost:1"
        self.dev = folder / "dev"
        self.dev.mkdir()
        self.socket = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)

    def listen(self) -> None:
        self.socket.bind(str(self.dev / "log"))
        if self.socket.type & socket.SOCK_STREAM:
            self.socket.listen()

    @property
    def before(self) -> tuple[str, ...]:
        unshare = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--mount")
        return (*unshare, "sh", "-c", OWN_DEV, "sh", str(self.dev))

    def run(self, *options: str, answers: tuple[Answer, ...] = (), before: tuple[str, ...] = ()) -> Run:
        """One run with --syslog, against a server that gives these answers, or against none."""
        self.device.command = [*world.WITHOUT_STARTER]  # whose process ID is the one in the message
        with ExitStack() as stack:
            if answers:
                server = stack.enter_context(Scripted(server_of(self.authority), answers))
                self.device.server = server.address
            process = self.device.start("--syslog", *options, before=(*self.before, *before))
            self.pid = process.pid
            run = self.device.finish(process, 30)
        assert (run.status != 99, run.out) == (True, ""), run.err
        return run

    def messages(self, of_any_run: bool = False) -> list[tuple[int, str]]:
        """Priority and text of what has come since the last call; all of it is the last run's."""
        found: list[tuple[int, str]] = []
        while True:
            try:
                data = self.socket.recv(65536)
            except BlockingIOError:
                return found
            match = MESSAGE.fullmatch(data)
            assert match, data
            facility, priority = divmod(int(match[1]), 8)
            assert facility == DAEMON and (of_any_run or int(match[3]) == self.pid)
            said = time.strptime(f"{time.strftime('%Y')} {match[2].decode()}", "%Y %b %d %H:%M:%S")
            assert abs(time.mktime(said) - time.time()) < 120
            found.append((priority, match[4].decode()))


@pytest.fixture
def logged(tmp_path: Path, authority: Authority, request: pytest.FixtureRequest) -> Iterator[Logged]:
    """With a daemon that takes datagrams, as all do, or else the kind of socket that the test wants."""
    require("mounts")
    logged = Logged(tmp_path, authority, getattr(request, "param", socket.SOCK_DGRAM))
    logged.device.pending()
    with logged.socket:
        logged.listen()
        yield logged


def certificate(logged: Logged) -> bytes:
    return answers.certificate(logged.device.signed())


def test_each_outcome_is_one_message_with_a_priority_that_means_something(logged: Logged) -> None:
    one = certificate(logged)
    for says, status, priority, text in (
        ((answers.PENDING,), 69, INFO, "waits to be signed"),
        ((one,), 0, NOTICE, "new certificate, valid until "),
        ((one,), 0, INFO, "certificate unchanged, valid until "),
        ((answers.page(500),), 127, ERROR, "status 500"),
        ((), 127, ERROR, "can't be reached"),
        ((answers.REJECTED, answers.PENDING, answers.PENDING), 69, WARNING, "the administrator rejected the request"),
    ):
        run = logged.run(answers=says)
        assert (run.status, run.err) == (status, "")
        ((said, message),) = logged.messages()
        assert (said, message.startswith(f"{ID}: "), text in message) == (priority, True, True), message


def test_a_run_that_is_locked_out_says_so_without_alarm(logged: Logged) -> None:
    run = logged.run(before=("flock", str(logged.device.key_file)))
    assert (run.status, run.err) == (1, "")
    # flock(1) has the process ID that was started, and the run another one.
    data = logged.socket.recv(65536)
    assert data.startswith(b"<%d>" % (DAEMON << 3 | INFO)) and b"holds the lock" in data


def test_wrong_settings_are_logged_as_well(logged: Logged) -> None:
    run = logged.run("--mode", "999")
    assert (run.status, run.err) == (127, "")
    ((priority, message),) = logged.messages()
    assert priority == ERROR and "--mode" in message


def test_steps_are_for_debugging(logged: Logged) -> None:
    assert logged.run("-v", answers=(answers.PENDING,)).err == ""
    *steps, (priority, result) = logged.messages()
    assert (priority, "waits to be signed" in result) == (INFO, True)
    assert steps and {priority for priority, _ in steps} == {DEBUG}
    assert any("connected to localhost" in text for _, text in steps)


def test_quiet_is_about_what_went_wrong(logged: Logged) -> None:
    one = certificate(logged)
    for says, priorities in (
        ((answers.PENDING,), []),
        ((one,), []),
        ((answers.page(500),), [ERROR]),
        ((answers.REJECTED, answers.PENDING, answers.PENDING), [WARNING]),
    ):
        assert logged.run("-q", answers=says).err == ""
        assert [priority for priority, _ in logged.messages()] == priorities


def test_a_daemon_that_hangs_holds_nobody_up(logged: Logged) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
        other.connect(str(logged.dev / "log"))
        with pytest.raises(BlockingIOError):
            while True:
                other.send(b"until its queue is full")
    run = logged.run("-v", answers=(answers.PENDING,))
    assert (run.status, run.seconds < 20) == (69, True)
    # What the log doesn't take is not lost.
    assert "waits to be signed" in run.err.splitlines()[-1]


@pytest.mark.parametrize("what", ["absent", "dead", "no socket", "another kind of socket"])
def test_without_a_daemon_it_is_standard_error(logged: Logged, what: str) -> None:
    logged.socket.close()
    if what != "dead":
        (logged.dev / "log").unlink()
    if what == "no socket":
        (logged.dev / "log").write_text("")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        if what == "another kind of socket":
            other.bind(str(logged.dev / "log"))
            other.listen()
        run = logged.run(answers=(answers.PENDING,))
    assert (run.status, run.err.count("\n")) == (69, 1)
    assert run.err.startswith(f"caramel-embedded: {ID}: request ")
    assert what != "no socket" or (logged.dev / "log").read_text() == ""


@pytest.mark.parametrize("logged", [socket.SOCK_STREAM], indirect=True)
def test_a_daemon_with_a_stream(logged: Logged) -> None:
    run = logged.run(answers=(answers.PENDING,))
    assert (run.status, run.err) == (69, "")
    with logged.socket.accept()[0] as connection:
        data = connection.recv(65536)
    assert MESSAGE.fullmatch(data) and b"waits to be signed" in data and data.endswith(b"\0")


def test_a_line_of_the_log_is_one_line_and_not_too_long(logged: Logged) -> None:
    said = answers.problem(500, "Bad", "first\nsecond\x1b[31m" + "x" * 5000)
    assert logged.run("-v", answers=(said,)).status == 127
    assert logged.run("--ca-cert", "/no\nsuch" + "/file" * 600).status == 127
    messages = logged.messages(of_any_run=True)
    assert len(messages) > 2 and "the CA certificate /no?such/file/file" in messages[-1][1]
    for _, text in messages:
        assert "\n" not in text and "\x1b" not in text and len(text) < 1024


@needs("mounts", "busybox")
def test_busybox_syslogd_understands_it(logged: Logged, tmp_path: Path) -> None:
    logged.socket.close()
    (logged.dev / "log").unlink()
    daemon = world.Daemon([*logged.before, "busybox", "syslogd", "-n", "-O", tmp_path / "messages"], tmp_path / "out")
    with daemon:
        world.until("syslogd listens", lambda: (logged.dev / "log").exists())
        run = logged.run(answers=(certificate(logged),))
        assert (run.status, run.err) == (0, "")
        line = f" daemon.notice caramel-embedded[{logged.pid}]: {ID}: new certificate, valid until "
        world.until("it is in the file", lambda: line in (tmp_path / "messages").read_text())
