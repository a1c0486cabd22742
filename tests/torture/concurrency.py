"""Many at once: two hundred starts at the same instant on one key file, while others read it in a loop."""

from __future__ import annotations

import fcntl
import stat
import subprocess
import threading
import time
from collections import Counter
from typing import Callable, Optional

from torture.fleet import DeviceUnderTest, Fleet, key_file_parts
from torture.report import Case


class _Readers:
    """Threads that read the key file as fast as they can, and judge what they saw once it is over."""

    def __init__(self, dut: DeviceUnderTest, count: int = 3) -> None:
        self.dut = dut
        self.seen: Counter[Optional[bytes]] = Counter()
        self.modes: Counter[tuple[int, int, int]] = Counter()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._read) for _ in range(count)]

    def __enter__(self) -> _Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        path = self.dut.device.key_file
        while not self._over.is_set():
            try:
                with open(path, "rb") as file:
                    state = path.stat()
                    content: Optional[bytes] = file.read()
            except FileNotFoundError:
                content = None
            with self._lock:
                self.seen[content] += 1
                # An empty file may be seen before it has its owner and mode; it has them before anything is in it.
                if content:
                    self.modes[state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode)] += 1
            time.sleep(0.0005)

    @property
    def reads(self) -> int:
        return sum(self.seen.values())

    def wrong(self) -> list[str]:
        found = []
        dut = self.dut
        for content in self.seen:
            if not content:
                if dut.old:
                    found.append("a reader saw nothing where something was")
            elif content != dut.old and (
                key_file_parts(content) is None or (dut.expected is not None and content != dut.expected)
            ):
                found.append(f"a reader saw something else: {len(content)} bytes")
        wanted = (dut.owner, dut.group, dut.mode)
        found += [f"a reader saw owner and mode {each}" for each in self.modes if each != wanted]
        keys = {parts.key for parts in map(key_file_parts, filter(None, self.seen)) if parts}
        if len(keys) > (2 if dut.expendable else 1):
            found.append(f"readers saw {len(keys)} keys")
        return found


def at_once(fleet: Fleet, name: str, make: Callable[[], DeviceUnderTest], starts: int, counts: Counter[str]) -> Case:
    """`starts` runs at the same instant."""

    def act() -> list[str]:
        dut = make()
        gate = dut.device.folder / "gate"
        gate.touch()
        waiting = ("/bin/sh", "-c", 'flock -s "$0" true; exec "$@"', str(gate))
        with open(gate) as held, _Readers(dut) as readers:
            fcntl.flock(held, fcntl.LOCK_EX)
            processes: list[subprocess.Popen[str]] = [
                dut.device.start(*dut.options, before=waiting) for _ in range(starts)
            ]
            fcntl.flock(held, fcntl.LOCK_UN)
            runs = [dut.device.finish(process, 180) for process in processes]
        statuses = Counter(run.status for run in runs)
        wrong = readers.wrong()
        strange = {status: count for status, count in statuses.items() if status not in (0, 1, 69)}
        if strange:
            example = next(run.err for run in runs if run.status in strange)
            wrong.append(f"exit statuses {dict(statuses)}: {example!r}")
        if dut.status not in statuses:
            wrong.append(f"nobody got to {dut.status}: {dict(statuses)}")
        requests = fleet.requests(dut.client_id)
        if len(requests) != 1:
            wrong.append(f"the server has {len(requests)} requests")
        parts = key_file_parts(dut.content or b"")
        if parts is None or parts.sha256 not in requests:
            wrong.append("the key file is not that of the request")
        if dut.expected is not None and dut.content != dut.expected:
            wrong.append("the key file is not as it should be")
        wrong += fleet.broken(dut)
        counts["reads"] += readers.reads
        counts["starts"] += starts
        return wrong + [f"next: {problem}" for problem in fleet.recovered(dut)]

    return Case(f"{starts} starts at once, {name}", act)


def cases(fleet: Fleet, starts: int = 200, counts: Optional[Counter[str]] = None) -> list[Case]:
    counts = Counter() if counts is None else counts
    kinds: dict[str, Callable[[], DeviceUnderTest]] = {
        "from nothing": fleet.first_enrollment,
        "with a certificate": fleet.certified,
        "with a newer certificate to be had": fleet.renewal,
        "rejected": fleet.rejection,
    }
    return [at_once(fleet, name, make, starts, counts) for name, make in kinds.items()]
