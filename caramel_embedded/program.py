"""Other programs: the hook, the key command, openssl(1). Each in a session of its own, under a time limit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Optional

from . import signals


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
    `output`: a descriptor for both outputs, instead of being returned. `fds`: descriptors that it gets.
    """
    import subprocess  # most runs start no program

    _adopt_orphans()
    others = set(_children(os.getpid()))  # of what this process was before it became this program
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
            out, err = process.communicate(given or None, limit)
    except subprocess.TimeoutExpired:
        raise Failed("was ended after %g seconds" % limit) from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            _end_descendants(others)
            process.wait()
    if process.returncode < 0:
        raise Failed("was ended by signal %d" % -process.returncode)
    return process.returncode, out, err


def _adopt_orphans() -> None:
    """From now on, what a descendant leaves behind becomes a child of this process, whatever session it is in."""
    try:
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER, prctl(2)
    except Exception:  # some systems have Python without it, or a C library that is in no file
        pass  # then what has no parent any more is out of reach


def _end_descendants(others: set[int]) -> None:
    """Ends all that this process has started, but for `others`; again, because what is ended may just have forked."""
    for _ in range(100):
        found = [process for child in _children(os.getpid()) if child not in others for process in _tree(child)]
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                pass  # it has gone meanwhile, or has become another user
        if not found:
            return
        time.sleep(0.01)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return


def _tree(process: int) -> Iterator[int]:
    yield process
    for child in _children(process):
        yield from _tree(child)


def _children(parent: int) -> list[int]:
    """The process IDs of its children; none where the system doesn't tell."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else []):
        try:
            with open("/proc/%s/stat" % name, "rb") as file:
                fields = file.read().rpartition(b")")[2].split()  # the name before it may hold anything, proc(5)
        except OSError:
            continue
        if fields[0] != b"Z" and int(fields[1]) == parent:
            found.append(int(name))
    return found
