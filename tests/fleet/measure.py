"""`make fleet`: what a check costs Caramel's side under load, and how that grows with the fleet.

The load: 32 devices check at a time, without a pause, for `FLEET_SECONDS`. The curve: what a check costs when the
database has `FLEET_SIZES` devices, and at last with an index. The server is Caramel on SQLite with the filter and the
nginx configuration of server/. It needs nginx, and its traffic stays on the loopback interface.

Each device has a certificate of its own, which goes straight into the database, as if the server had signed it an
hour ago. A check is one connection with the client certificate and the request that the program sends; a test
compares the two. A window begins two seconds after the first check; a check counts where it ends. Latency is the
device's, with the load generator's own waits in it. In larger fleets the rows of the devices are copied under
other hashes.

docs/fleet.md and docs/morning-after.md are reports of longer programs, which the history has.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.filtered import FilteredCaramel, MeteredNginx
from world import Authority, until

from fleet import devices, usage
from fleet.devices import Device
from fleet.load import Load, Sample, percentile

#: Checks that are under way at a time at saturation, and those of the curve: as many as waitress has threads.
CLOSED_LOOP, FEW = 32, 4
#: Seconds from the first check until figures are taken.
WARM_UP = 2.0
#: Makes Caramel's `csr_id` quick to look up, which its own tables don't.
INDEX = "CREATE INDEX certificate_of_request ON certificate (csr_id)"


@dataclass(frozen=True)
class Books:
    """What had been used at a moment. Seconds of processor time by part."""

    moment: float
    spent: Mapping[str, float]
    idle: float

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[int]]) -> Books:
        spent = {name: usage.processor_time(pids) for name, pids in groups.items()}
        return cls(time.monotonic(), spent, usage.idle_time())


def execute(caramel: FilteredCaramel, statement: str, rows: Sequence[Sequence[Any]] = ((),)) -> None:
    connection = sqlite3.connect(str(caramel.database), timeout=60)
    with connection:
        connection.executemany(statement, rows)
    connection.close()


def store(caramel: FilteredCaramel, fleet: Sequence[Device]) -> None:
    """Puts the devices into the database, each with a certificate."""

    def moment(seconds: int) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S.000000", time.gmtime(seconds))

    execute(
        caramel,
        "INSERT INTO csr (id, sha256sum, pem, orgunit, commonname, rejected) VALUES (?, ?, ?, '', ?, 0)",
        [(n, one.sha256, one.request, one.client_id) for n, one in enumerate(fleet, 1)],
    )
    execute(
        caramel,
        "INSERT INTO certificate (id, pem, not_before, not_after, csr_id) VALUES (?, ?, ?, ?, ?)",
        [(n, d.certificate, moment(d.not_before), moment(d.not_after), n) for n, d in enumerate(fleet, 1)],
    )
    execute(caramel, "ANALYZE")


def fill(caramel: FilteredCaramel, known: int, first: int, up_to: int) -> None:
    """Puts more devices beside the first ones, copies of them under other hashes, until there are so many."""
    several = (
        f"(WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {up_to}) SELECT i FROM n)"
    )
    execute(
        caramel,
        "INSERT INTO csr (id, sha256sum, pem, orgunit, commonname, rejected)"
        " SELECT n.i, lower(hex(randomblob(32))), c.pem, c.orgunit, c.commonname, c.rejected"
        f" FROM {several} AS n JOIN csr c ON c.id = 1 + n.i % {known}",
    )
    execute(
        caramel,
        "INSERT INTO certificate (id, pem, not_before, not_after, csr_id)"
        " SELECT n.i, c.pem, c.not_before, c.not_after, n.i"
        f" FROM {several} AS n JOIN certificate c ON c.id = 1 + n.i % {known}",
    )
    execute(caramel, "ANALYZE")


def loaded(
    folder: Path, front: MeteredNginx, lines: Sequence[Sequence[str]], users: int, seconds: float
) -> dict[str, Any]:
    """What the checks of so many devices at a time cost, and how long they took."""
    before = len(front.seen())
    assert front.client_ca and front.caramel and front._daemon
    processes = {"nginx": front._daemon.process, "server": front.caramel._server.process}
    with Load(folder, front.port, front.client_ca, lines, users) as load:
        until("the first check", lambda: load.begun() and len(front.seen()) > before, 60, 0.1)
        time.sleep(WARM_UP)
        parts = {**{name: [one.pid] for name, one in processes.items() if one}, "load": load.pids}
        first = Books.of(parts)
        time.sleep(seconds)
        last = Books.of(parts)
        memory = {name: usage.memory(pids) for name, pids in parts.items()}
        load.finish()
        samples, counted = load.samples(), load.counted()
    seen = front.seen()[before:]
    return {
        "users": users,
        **figures(samples, first, last),
        "memory": memory,
        "counts": {"locust": counted, "samples": len(samples), "nginx": len(seen)},
        "tls": dict(Counter(f"{one.tls} {one.verify}" for one in seen)),
    }


def figures(samples: Sequence[Sample], first: Books, last: Books) -> dict[str, Any]:
    """The figures of the time between the two: rates in checks a second, times in milliseconds, shares in cores."""
    seconds = last.moment - first.moment
    within = [one for one in samples if first.moment <= one.ended < last.moment]
    took = [1000 * one.seconds for one in within]
    spent = {name: last.spent[name] - first.spent[name] for name in first.spent}
    count = len(within)
    return {
        "seconds": round(seconds, 3),
        "checks": count,
        "rate": round(count / seconds, 2),
        "latency": {str(share): round(percentile(took, share), 1) for share in (50, 95, 99)} if took else {},
        "cost": {name: round(1000 * value / count, 3) for name, value in spent.items()} if count else {},
        "busy": {
            **{name: round(value / seconds, 3) for name, value in spent.items()},
            "idle": round((last.idle - first.idle) / seconds, 3),
        },
        "statuses": dict(Counter(str(one.status) for one in samples)),
        "errors": sum(one.status not in (200, 304) for one in samples),
    }


def measure(folder: Path, count: int, seconds: float, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The load first, then the curve; the last point of it is with an index."""
    say(f"{count} devices: certificates, Caramel's CA")
    authority = Authority.by_caramel(folder / "ca")
    fleet = devices.make(authority, count)
    (folder / "devices").mkdir()
    lines = [one.line(folder / "devices", one.modified) for one in fleet]
    found: list[dict[str, Any]] = []
    with (
        FilteredCaramel(folder / "server", authority) as caramel,
        MeteredNginx(folder / "front", caramel, authority.server()) as front,
    ):
        store(caramel, fleet)

        def look(size: int, users: int, index: bool = False) -> None:
            one = loaded(folder / f"load-{len(found)}", front, lines, users, seconds)
            found.append({"devices": size, "index": index, **one})
            spent = ", ".join(f"{name} {one['cost'].get(name, 0):.2f}" for name in ("nginx", "server"))
            what = f"{size} devices{', index' if index else ''}, {users} at a time"
            say(f"{what}: {one['rate']:.0f}/s; ms of each: {spent}")

        look(count, CLOSED_LOOP)
        look(count, FEW)
        for size in sizes:
            if size > found[-1]["devices"]:
                fill(caramel, count, 1 + found[-1]["devices"], size)
                look(size, FEW)
        execute(caramel, INDEX)
        execute(caramel, "ANALYZE")
        look(found[-1]["devices"], FEW, True)
    return found


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends all the same
    seconds = min(600.0, float(os.environ.get("FLEET_SECONDS") or 10))
    count = min(100_000, max(2, int(os.environ.get("FLEET_DEVICES") or 2000)))
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    try:
        folder.chmod(0o711)
        sizes = [int(size) for size in os.environ.get("FLEET_SIZES", "20000 90000").split()]
        print(json.dumps(measure(folder, count, seconds, sizes), indent=1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
