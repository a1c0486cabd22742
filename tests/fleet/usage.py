"""What the kernel's books say of a group of processes: processor time and memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name (proc(5)); the first is the state, the second the parent."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    return text[text.rindex(")") + 2 :].split()


def families(roots: Iterable[int]) -> set[int]:
    """These processes and all that descend from them."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, ValueError):
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found: set[int] = set()
    ahead = list(roots)
    while ahead:
        pid = ahead.pop()
        if pid not in found:
            found.add(pid)
            ahead += children.get(pid, [])
    return found


def processor_time(roots: Iterable[int]) -> float:
    """Seconds of processor time that these processes and their descendants have had, the dead ones included.

    The kernel adds what a dead child had to its parent, once that has waited for it.
    """
    total = 0
    for pid in families(roots):
        with suppress(OSError, ValueError):
            total += sum(map(int, _stat(pid)[11:15]))  # utime, stime, cutime, cstime
    return total / _TICK


def memory(roots: Iterable[int]) -> int:
    """Bytes of memory of these processes and their descendants; what several share is counted once (`Pss`)."""
    total = 0
    for pid in families(roots):
        with suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
            total += 1024 * int(found[1]) if found else 0
    return total


def idle_time() -> float:
    """Seconds that the machine's processors have been idle, those that waited for a disk included."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / _TICK
