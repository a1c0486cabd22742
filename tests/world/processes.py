"""Programs that run beside the tests: they are waited for, ended with whoever started them, and none is forgotten."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, ClassVar, Optional, TypeVar, Union

#: Seconds that a server of this world may take until it answers; generous, because machines are shared.
PATIENCE = 30.0

_Self = TypeVar("_Self", bound="Service")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment; whoever uses it must be ready
    to retry.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def forget_false_clocks() -> None:
    """Removes what a faketime(1) that was killed has left in memory: by its process ID, so that another program of
    the same number can't start.
    """
    for left in Path("/dev/shm").glob("*faketime_*"):
        number = left.name.rpartition("_")[2]
        if number.isdigit() and not Path("/proc", number).exists():
            with suppress(OSError):
                left.unlink()


def listens(port: int) -> bool:
    """Whether somebody takes connections at this port of the loopback interface."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def until(what: str, happened: Callable[[], Any], seconds: float = PATIENCE, pause: float = 0.02) -> Any:
    """Waits until `happened()` is true, and returns what it returned; an AssertionError if it takes too
    long.
    """
    deadline = time.monotonic() + seconds
    while True:
        outcome = happened()
        if outcome:
            return outcome
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain: {what}")
        time.sleep(pause)


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent() -> None:
    """In a new child, before it becomes another program: the kernel kills it when the thread that started
    it ends.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """From now on, whatever a child of this process leaves behind becomes a child of this process: see
    `strays`.
    """
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end(process: subprocess.Popen[Any], seconds: float = 5) -> None:
    """Ends a process that leads a group, and its group: politely first."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


def environment(**more: str) -> dict[str, str]:
    """The surroundings of a program of this world: next to nothing of the caller's, plus `more`."""
    kept = ("PATH", "COVERAGE_PROCESS_START", "COVERAGE_FILE")
    return {"LC_ALL": "C.UTF-8", **{name: os.environ[name] for name in kept if name in os.environ}, **more}


class Service:
    """Something that lives as long as a `with` block."""

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        self.start()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Any, trace: Any) -> None:
        self.stop()


class Daemon(Service):
    """One long-running program with its output in a file, which ends with the block or with whoever started
    it.
    """

    #: Process IDs of all that run now, by which a test's forgotten processes are told from these.
    running: ClassVar[set[int]] = set()

    def __init__(
        self, command: Sequence[Union[str, Path]], output: Path, env: Optional[Mapping[str, str]] = None
    ) -> None:
        self.command = [str(word) for word in command]
        self.output = output
        self.env = environment() if env is None else dict(env)
        self.process: Optional[subprocess.Popen[bytes]] = None

    def start(self) -> None:
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.output.parent,
                env=self.env,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        Daemon.running.add(self.process.pid)

    def stop(self) -> None:
        if self.process:
            end(self.process)
            Daemon.running.discard(self.process.pid)
            self.process = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def text(self) -> str:
        """What it has printed so far, on both of its outputs."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def start_at_port(daemon: Daemon, port: int, configure: Callable[[int], None], answers: Callable[[], bool]) -> None:
    """Starts a server at this port (0: a free one), or at another one if somebody has that meanwhile; `configure`
    tells the server, and whoever asks, which.
    """
    for _ in range(5):
        port = port or free_port()
        configure(port)
        daemon.start()
        until(f"{daemon.command[0]} answers or has ended", lambda: answers() or not daemon.alive)
        if daemon.alive:
            return
        daemon.stop()
        if "Address already in use" not in daemon.text():
            break
        port = 0
    raise AssertionError(f"{daemon.command[0]} doesn't start: {daemon.text()}")


def strays() -> list[tuple[int, str]]:
    """Children of this process that belong to nobody in this world: process ID and name. The dead ones are
    buried.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in Daemon.running:
            continue
        try:
            text = (entry / "stat").read_text(errors="replace")
        except OSError:
            continue  # gone meanwhile
        # proc(5): the name stands in parentheses and may itself contain some; state and parent follow the
        # last one.
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 1 :].split()
        if int(rest[1]) != os.getpid():
            continue
        if rest[0] == "Z":
            with suppress(ChildProcessError):
                os.waitpid(int(entry.name), os.WNOHANG)
            continue
        found.append((int(entry.name), name))
    return found
