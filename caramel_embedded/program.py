"""Other programs: the hook, the key command, openssl(1). Each in a session of its own, under a time limit."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
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

    `limit`: seconds; what has not ended by then is ended, with all of its session. `output`: a descriptor for both
    outputs, instead of being returned. `fds`: descriptors that it gets.
    """
    import subprocess  # most runs start no program

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
            process.wait()
    if process.returncode < 0:
        raise Failed("was ended by signal %d" % -process.returncode)
    return process.returncode, out, err
