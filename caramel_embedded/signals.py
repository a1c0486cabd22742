"""Signals: one that comes while a run is at work ends it in order, with the status that says that it didn't work out.

Before that, the default will do: nothing has been touched, and the starter turns the end into the same status.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import EXIT_FAILED

GRACE = 1.0  # seconds for the main thread to end a run in order
ENDED = "ended by a signal"

# All that can be caught and would otherwise end the process with a status of their own, signal(7).
NAMES = (
    *("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM"),
    *("VTALRM", "PROF", "POLL", "STKFLT", "XCPU", "XFSZ", "PWR"),
)


class Interrupted(BaseException):
    """A signal: the run ends, and what it has not finished is removed on the way."""


_at_work = False
_backstop = False
_over = False


def catch(say: Callable[[str], None]) -> None:
    """From now on a signal raises `Interrupted` in the main thread. What is ignored (nohup(1)) stays ignored.

    But for SIGCHLD: where the caller ignores it, the kernel forgets how the hook ended (wait(2), ECHILD). Where the
    main thread can't hear of the signal, inside of one call of a library that goes on and on, `say` says it instead.
    """
    global _at_work
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for name in NAMES:
        number = getattr(signal, "SIG" + name, None)
        if name == "ALRM" and _backstop:
            continue
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    _at_work = True
    came, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        threading.Thread(target=_end_after_signal, args=(came, say), daemon=True).start()
    except RuntimeError:
        pass  # no memory for a thread: the starter is there, too


def backstop(seconds: float) -> None:
    """Ends the process after so many seconds, also inside of a library's call, where no handler of Python's runs.

    It is the kernel that ends it (SIGALRM, setitimer(2)), so that no line says why but the starter's.
    """
    global _backstop
    _backstop = True
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


@contextmanager
def unhurried() -> Iterator[None]:
    """What is done inside has a limit of its own, and doesn't count for the backstop."""
    left = signal.setitimer(signal.ITIMER_REAL, 0)[0] if _backstop else 0.0
    try:
        yield
    finally:
        if left:
            signal.setitimer(signal.ITIMER_REAL, left)


def exit_at_once() -> None:
    """From now on, with the outcome known, a signal that would have raised `Interrupted` ends the process instead."""
    global _at_work, _over
    _at_work, _over = False, True


def _on_signal(_number: int, _frame: object) -> None:
    global _at_work
    if not _at_work:
        os._exit(EXIT_FAILED)
    _at_work = False  # a second signal doesn't wait for the clean-up
    # The starter passes a signal on as SIGIO, also one that the whole process group has got: once is enough.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    raise Interrupted(ENDED)


def _end_after_signal(came: int, say: Callable[[str], None]) -> None:
    """Ends the process some time after a signal, which the kernel tells by a byte in `came` without the main thread.

    Nothing is lost by that: it is what a power cut does.
    """
    os.read(came, 1)
    time.sleep(GRACE)
    if not _over:
        say(ENDED)
    os._exit(EXIT_FAILED)
