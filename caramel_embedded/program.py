"""Other programs: the hook, the key command, openssl(1). Each in a session of its own, under a time limit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from . import signals

if TYPE_CHECKING:
    import subprocess

MAXIMUM_OUTPUT = 65536  # bytes, of each of the two


class Failed(Exception):
    """It can't be run, didn't end in time, or was ended by a signal; the text says which."""


def surroundings(more: Mapping[str, str]) -> dict[str, str]:
    """This program's environment and `more`, without what was set for its own OpenSSL alone (see ``cli``)."""
    return {**{name: os.environ[name] for name in os.environ if name not in ("OPENSSL_CONF", "TSS2_LOG")}, **more}


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    limit: float,
    output: Optional[int] = None,
    given: bytes = b"",
    fds: Sequence[int] = (),
) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and standard error of a program that gets `given`. Raises `Failed`.

    `limit`: seconds; what has not ended by then is ended, with all that it has started, in whatever session.
    `output`: a descriptor for both outputs, instead of being returned; else each is 64 KiB at most. `fds`: what
    descriptors it gets. `given`: no more than a pipe holds.
    """
    import subprocess  # most runs start no program

    _adopt_orphans()
    out_to = subprocess.PIPE if output is None else output
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if given else subprocess.DEVNULL,
            stdout=out_to,
            stderr=out_to,
            env=environment,
            pass_fds=fds,
            start_new_session=True,  # so that all of it can be ended
        )
    except (OSError, ValueError) as error:
        raise Failed("can't be run: %s" % getattr(error, "strerror", error)) from None
    try:
        with signals.unhurried():
            out, err = _talk(process, given, limit)
    except subprocess.TimeoutExpired:
        raise Failed("was ended after %g seconds" % limit) from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            _end_descendants(process.pid)
            process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    if process.returncode < 0:
        raise Failed("was ended by signal %d" % -process.returncode)
    return process.returncode, out, err


def _talk(process: subprocess.Popen[bytes], given: bytes, limit: float) -> tuple[bytes, bytes]:
    """Both outputs of a program that gets `given`, when it has ended. Raises `Failed`, subprocess.TimeoutExpired.

    Popen.communicate() takes all that comes into memory.
    """
    import selectors
    import subprocess

    deadline = time.monotonic() + limit
    if process.stdin is not None:
        try:
            os.write(process.stdin.fileno(), given)
        except BrokenPipeError:
            pass  # its status says why it didn't want it
        process.stdin.close()
    taken = {pipe.fileno(): bytearray() for pipe in (process.stdout, process.stderr) if pipe is not None}
    with selectors.DefaultSelector() as selector:
        for fd in taken:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired(process.args, limit)
            for key, _ in ready:
                data = os.read(key.fd, MAXIMUM_OUTPUT)
                taken[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
                if len(taken[key.fd]) > MAXIMUM_OUTPUT:
                    raise Failed("printed more than %d bytes, and was ended" % MAXIMUM_OUTPUT)
    process.wait(max(0.0, deadline - time.monotonic()))
    out, err = [bytes(data) for data in taken.values()] or (b"", b"")
    return out, err


def _adopt_orphans() -> None:
    """From now on, what a descendant leaves behind becomes a child of this process, whatever session it is in."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, prctl(2)
    except Exception:  # some systems have Python without it, or a C library that is in no file
        pass  # then what has no parent any more is out of reach


def _end_descendants(first: int) -> None:
    """Ends all that this process has started since its child `first`; again, for what is ended may just have forked.

    What is older is a child of what this process was before it became this program.
    """
    since = _processes().get(first, (b"", 0, 0))[2]
    for _ in range(100):
        processes, found, generation = _processes(), set(), {os.getpid()}
        while generation:
            generation = {
                number
                for number, (_, parent, start) in processes.items()
                if parent in generation and start >= since and number not in found
            }
            found |= generation
        living = [number for number in found if processes[number][0] != b"Z"]
        for number in living:
            try:
                os.kill(number, signal.SIGKILL)
            except OSError:
                pass  # it has gone meanwhile, or has become another user
        if not living:
            return
        time.sleep(0.01)


def _processes() -> dict[int, tuple[bytes, int, int]]:
    """State, parent and start of all that the system tells of, by process ID; see proc_pid_stat(5)."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open("/proc/%s/stat" % name, "rb") as file:
                fields = file.read().rpartition(b")")[2].split()  # the name before it may hold anything
        except OSError:
            continue
        found[int(name)] = (fields[0], int(fields[1]), int(fields[19]))
    return found
