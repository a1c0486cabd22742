# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the authority costs with 90 000 devices and 900 000 lines in the log, on SQLite and on PostgreSQL: what
`make bench-authority` prints, and the page has.

It is processor time, by the kernel's books: of a command, or of the processes that serve and sign, and of PostgreSQL
with them. Medians of ROUNDS rounds; a round of a device's questions is over DEVICES devices.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Optional

import world
from authority_world import Postgres, RegistrationAuthority, Server, ask, csr, fill, sha256
from fleet.usage import processor_time

ROUNDS, DEVICES = 3, 100
COMMANDS = (
    "list",
    "list --json",
    "list --pending",
    "list --silent 3h",
    "list --ends-within 2d",
    "list --barred",
    "log",
    "log --json",
    "log --id dev000007",
    "log --action signed --last 100",
    "log --since 1h",
)
SCRAPE = "a scrape of the metrics"
POST, FIRST, CHECK = "a first post that the list admits", "the first certificate's GET", "a check (304)"

#: Milliseconds of processor time: all of it, and what of it was PostgreSQL's.
Cost = tuple[float, float]


def spent(do: Callable[[], object], processes: Sequence[int], database: Sequence[int], over: int = 1) -> Cost:
    """What these processes, commands that are run meanwhile, and the database have used, for one of `over`."""
    kept = os.times()
    before, database_before = processor_time(processes), processor_time(database)
    do()
    now, after, database_after = os.times(), processor_time(processes), processor_time(database)
    commands = now.children_user + now.children_system - kept.children_user - kept.children_system
    its = database_after - database_before
    return 1000 * (commands + after - before + its) / over, 1000 * its / over


def measure(folder: Path, postgres: Optional[Postgres]) -> dict[str, Cost]:
    authority = RegistrationAuthority(folder, database=postgres.url if postgres else None)
    authority.create_ca()
    fill(authority, postgres)
    names = [f"new-{number}" for number in range(ROUNDS * DEVICES)]
    # The first decision also brings the log that was put there into the chain.
    authority.command("allow", "--file", "-", given="\n".join(names))
    database = [postgres.pid] if postgres else []
    figures: dict[str, list[Cost]] = {}

    def note(what: str, do: Callable[[], object], processes: Sequence[int] = (), over: int = 1) -> None:
        figures.setdefault(what, []).append(spent(do, processes, database, over))

    for _ in range(ROUNDS):
        for command in COMMANDS:
            note(command, partial(authority.command, *command.split()))
    metrics = world.free_port()
    with authority.serving(options=["--metrics", f"127.0.0.1:{metrics}"]) as server:
        assert server.daemon and server.daemon.process
        processes = [server.daemon.process.pid]
        for turn in range(ROUNDS):
            requests = {body: "" for body in map(csr, names[turn * DEVICES :][:DEVICES])}
            note(POST, partial(answers, server, "POST", requests, 202), processes, DEVICES)
            note(FIRST, partial(answers, server, "GET", requests, 200), processes, DEVICES)
            note(CHECK, partial(answers, server, "GET", requests, 304), processes, DEVICES)
            note(SCRAPE, partial(ask, metrics, "GET", "/metrics"), processes)
    median = statistics.median
    return {what: (median(one for one, _ in all_), median(one for _, one in all_)) for what, all_ in figures.items()}


def answers(server: Server, method: str, requests: dict[bytes, str], status: int) -> None:
    """Each device asks once; what it is given a date for, it asks about with that date the next time."""
    for body, date in requests.items():
        headers = {"If_Modified_Since": date} if date else {}
        reply = ask(server.port, method, f"/{sha256(body)}", body if method == "POST" else None, **headers)
        assert reply.status == status, reply
        requests[body] = reply.headers.get("last-modified", date)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="caramel-authority-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        sqlite = measure(folder / "sqlite", None)
        with Postgres(folder / "postgres") as postgres:
            other = measure(folder / "postgresql", postgres)
    print("| ms of processor time | SQLite | PostgreSQL | of it PostgreSQL's own |\n| --- | --- | --- | --- |")
    for what, (cost, _) in sqlite.items():
        shown = f"`{what}`" if what in COMMANDS else what
        print(f"| {shown} | {cost:.3g} | {other[what][0]:.3g} | {other[what][1]:.3g} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
