"""Power cuts and I/O errors, at every system call that touches the key file's folder and at a sample of the others.

A first, undisturbed run of each scenario is traced with strace(1). Then, for each of its system calls, a device in
the very same state runs under strace's fault injection, which kills it (SIGKILL can't be caught: for the disk it is a
power cut without the loss of what was not flushed; for that see ``disk.py``) or makes the call fail, at exactly
that call.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

from world import Run

from torture.fleet import DeviceUnderTest, Fleet
from torture.report import Case, sample

_LINE = re.compile(r"^(?P<thread>\d+) +(?P<call>[a-z0-9_]+)\((?P<rest>.*)$")

#: What a call may fail with, by its name; all others get EIO.
ERRORS = {
    "mmap": "ENOMEM",
    "mprotect": "ENOMEM",
    "socket": "EMFILE",
    "pipe2": "EMFILE",
    "getrandom": "ENOSYS",
    "flock": "ENOLCK",
    "memfd_create": "EMFILE",
}

#: What would be no fault of the machine but of the harness: the end itself, and how the program begins.
# A futex(2) that fails is no fault that a kernel has; the C library ends the process. brk(2) returns no errors: what
# an injected one makes of it is an address, and a crash.
_SPARED = frozenset(["execve", "exit", "exit_group", "rt_sigreturn", "futex", "brk"])


@dataclass(frozen=True)
class Point:
    """The `number`th `call` of the main thread; `text` as strace showed it; `inside`: in the key file's folder."""

    call: str
    number: int
    text: str
    inside: bool
    started: bool

    def __str__(self) -> str:
        return f"{self.call} {self.number}"


def points(trace: str, folder: Path) -> list[Point]:
    """All system calls of the main thread in a trace made with strace -f -y."""
    found: list[Point] = []
    counts: Counter[str] = Counter()
    main: Optional[str] = None
    # The folder itself, by its path or by its name in the folder above, and all in it.
    above, name = (re.escape(text) for text in (str(folder.parent), folder.name))
    inside = re.compile(rf'{above}(/|>, "){name}[/">(]')
    started = False
    for line in trace.splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        main = main or match["thread"]
        if match["thread"] != main:
            continue
        counts[match["call"]] += 1
        started = started or "caramel_embedded/" in match["rest"]
        if match["call"] in _SPARED:
            continue
        found.append(Point(match["call"], counts[match["call"]], line, bool(inside.search(match["rest"])), started))
    return found


def traced(dut: DeviceUnderTest) -> tuple[Run, str]:
    """An undisturbed run, and its trace."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "trace"
        run = dut.run_alone(before=("strace", "-f", "-y", "-s", "0", "-o", str(log)))
        return run, log.read_text(errors="replace")


def injected(dut: DeviceUnderTest, call: str, number: int, what: str) -> tuple[Run, bool]:
    """A run to which `what` happens at that system call; and whether it did happen."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "trace"
        inject = f"inject={call}:{what}:when={number}"
        # Not with --seccomp-bpf, which loses injected signals (strace 6.1).
        strace = ("strace", "-f", "-o", str(log), "-e", f"trace={call}", "-e", inject)
        run = dut.run_alone(before=strace)
        text = log.read_text(errors="replace")
    return run, "(INJECTED)" in text or "killed by SIGKILL" in text


def spread(found: Sequence[Point], others: int) -> list[Point]:
    """All points inside the folder, and `others` of the rest."""
    rest = [Case(str(number), list) for number, point in enumerate(found) if not point.inside]
    chosen = {int(case.name) for case in sample(rest, others)}
    return [point for number, point in enumerate(found) if point.inside or number in chosen]


def _case(
    fleet: Fleet, scenario: str, make: Callable[[], DeviceUnderTest], point: Point, what: str, label: str
) -> Case:
    def act() -> list[str]:
        # How many calls a key takes is a matter of chance, because primes are looked for at random. Outside the
        # folder an earlier one of them will do.
        earlier = [] if point.inside else [point.number * 2 // 3, point.number // 3]
        for number in [point.number] * 3 + [number for number in earlier if number]:
            dut = make()
            run, happened = injected(dut, point.call, number, what)
            if happened:
                break
            fleet.forget(dut)
        else:
            return ["the run never came to this call"]
        wrong = fleet.broken(dut, run if what.startswith("error") else None)
        if what.startswith("error") and point.call in ("fsync", "renameat") and run.status != 127:
            wrong.append(f"{point.call} failed, and the exit status is {run.status}")
        wrong += [f"next: {problem}" for problem in fleet.recovered(dut)]
        if not wrong:
            fleet.forget(dut)
        return wrong

    place = point.text.split(" ", 1)[-1].strip()[-110:]
    return Case(f"{scenario}, {label} at {point} [{place}]", act)


def reference(fleet: Fleet, scenario: str) -> list[Point]:
    """The system calls of an undisturbed run of a scenario, which has to go as it should."""
    dut = fleet.scenarios[scenario]()
    run, trace = traced(dut)
    wrong = fleet.broken(dut, run) + fleet.recovered(dut)
    if wrong or run.status != dut.status:
        raise AssertionError(f"{scenario}, undisturbed: {run} {wrong}")
    return points(trace, dut.device.key_file.parent)


def cuts(fleet: Fleet, scenario: str, others: int) -> list[Case]:
    """Kills at every call inside the folder, and at `others` outside."""
    found = spread(reference(fleet, scenario), others)
    return [_case(fleet, scenario, fleet.scenarios[scenario], point, "signal=KILL", "killed") for point in found]


def errors(fleet: Fleet, scenario: str, others: int) -> list[Case]:
    """An error returned by every call inside the folder, and by `others` outside, once the program has begun.

    Before that it is the shell's and the interpreter's own start that fails, see ``machine.py``.
    """
    found = [point for point in spread(reference(fleet, scenario), others) if point.started]
    cases = []
    for point in found:
        kinds = [ERRORS.get(point.call, "EIO")]
        if point.inside and point.call in ("write", "openat", "mkdirat", "fsync", "renameat"):
            kinds.append("ENOSPC")
        for kind in kinds:
            cases.append(_case(fleet, scenario, fleet.scenarios[scenario], point, f"error={kind}", f"{kind}"))
    return cases
