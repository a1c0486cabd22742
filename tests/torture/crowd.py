"""Many at once: two hundred starts at the same instant on one key file, while others read it in a loop."""

from __future__ import annotations

import fcntl
import stat
import subprocess
import threading
import time
from collections import Counter
from typing import Callable, Optional

from torture.report import Case
from torture.town import Resident, Town, whole


class _Readers:
    """Threads that read the key file as fast as they can, and judge what they saw once it is over."""

    def __init__(self, resident: Resident, count: int = 3) -> None:
        self.resident = resident
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
        path = self.resident.device.key_file
        while not self._over.is_set():
            try:
                with open(path, "rb") as file:
                    state = path.stat()
                    content: Optional[bytes] = file.read()
            except FileNotFoundError:
                content = None
            with self._lock:
                self.seen[content] += 1
                if content is not None:
                    self.modes[state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode)] += 1
            time.sleep(0.0005)

    @property
    def reads(self) -> int:
        return sum(self.seen.values())

    def wrong(self) -> list[str]:
        found = []
        resident = self.resident
        for content in self.seen:
            if not content:
                if resident.old:
                    found.append("a reader saw nothing where something was")
            elif content != resident.old and (
                whole(content) is None or (resident.expected is not None and content != resident.expected)
            ):
                found.append(f"a reader saw something else: {len(content)} bytes")
        wanted = (resident.owner, resident.group, resident.mode)
        found += [f"a reader saw owner and mode {each}" for each in self.modes if each != wanted]
        keys = {parts.key for parts in map(whole, filter(None, self.seen)) if parts}
        if len(keys) > (2 if resident.expendable else 1):
            found.append(f"readers saw {len(keys)} keys")
        return found


def at_once(town: Town, name: str, make: Callable[[], Resident], starts: int, counts: Counter[str]) -> Case:
    """`starts` runs at the same instant."""

    def act() -> list[str]:
        resident = make()
        gate = resident.device.folder / "gate"
        gate.touch()
        waiting = ("/bin/sh", "-c", 'flock -s "$0" true; exec "$@"', str(gate))
        with open(gate) as held, _Readers(resident) as readers:
            fcntl.flock(held, fcntl.LOCK_EX)
            processes: list[subprocess.Popen[str]] = [
                resident.device.start(*resident.options, before=waiting) for _ in range(starts)
            ]
            fcntl.flock(held, fcntl.LOCK_UN)
            runs = [resident.device.finish(process, 180) for process in processes]
        statuses = Counter(run.status for run in runs)
        wrong = readers.wrong()
        strange = {status: count for status, count in statuses.items() if status not in (0, 1, 69)}
        if strange:
            example = next(run.err for run in runs if run.status in strange)
            wrong.append(f"exit statuses {dict(statuses)}: {example!r}")
        if resident.status not in statuses:
            wrong.append(f"nobody got to {resident.status}: {dict(statuses)}")
        requests = town.requests(resident.client_id)
        if len(requests) != 1:
            wrong.append(f"the server has {len(requests)} requests")
        parts = whole(resident.content or b"")
        if parts is None or parts.sha256 not in requests:
            wrong.append("the key file is not that of the request")
        if resident.expected is not None and resident.content != resident.expected:
            wrong.append("the key file is not as it should be")
        wrong += town.broken(resident)
        counts["reads"] += readers.reads
        counts["starts"] += starts
        return wrong + [f"next: {problem}" for problem in town.recovered(resident)]

    return Case(f"{starts} starts at once, {name}", act)


def cases(town: Town, starts: int = 200, counts: Optional[Counter[str]] = None) -> list[Case]:
    counts = Counter() if counts is None else counts
    kinds: dict[str, Callable[[], Resident]] = {
        "from nothing": town.first_enrollment,
        "with a certificate": town.certified,
        "with a newer certificate to be had": town.renewal,
        "rejected": town.rejection,
    }
    return [at_once(town, name, make, starts, counts) for name, make in kinds.items()]
