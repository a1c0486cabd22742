"""``make powercut``: real kernels, real file systems, real power cuts. Exit status 1 if anything was lost."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from world import ROOT

from powercut import machine, replaces, runs, stores, verdict, volatile
from powercut.stores import Store
from powercut.verdict import Row

LOADS = {
    "replaces": "The key file, replaced over and over; each replace is acknowledged when it is done:",
    "runs": "The whole program, against a Caramel server; a third of the runs have a hook:",
}

#: A run takes some seconds, a replace some thousandths.
SHARE_OF_RUNS = 4


def main() -> int:
    options = argparse.ArgumentParser(prog="powercut", description=__doc__)
    options.add_argument(
        "--cuts", type=int, default=100, help="for each file system, a quarter of them in whole runs"
    )
    options.add_argument("--only", action="append", metavar="NAME", choices=list(stores.STORES), help="file systems")
    options.add_argument(
        "--short", action="store_true", help=f"20 cuts on {' and '.join(stores.SHORT)}, no whole runs"
    )
    options.add_argument("--program", type=Path, default=ROOT, help="a source tree of the program; else this one")
    options.add_argument("--seed", type=int, default=None, help="of the chances, which is printed")
    options.add_argument("--load", choices=list(LOADS), help="only one of the loads")
    options.add_argument("--jobs", type=int, default=1, help="machines at a time")
    chosen = options.parse_args()
    started = time.monotonic()
    loads = [chosen.load] if chosen.load else ["replaces"] if chosen.short else list(LOADS)
    names = chosen.only or (stores.SHORT if chosen.short else list(stores.STORES))
    cuts = dict.fromkeys(loads, 20 if chosen.short else chosen.cuts)
    if len(loads) > 1:
        cuts["runs"] = chosen.cuts // SHARE_OF_RUNS
        cuts["replaces"] -= cuts["runs"]
    seed = chosen.seed if chosen.seed is not None else int.from_bytes(os.urandom(4), "big")
    print(f"cuts for each of {', '.join(names)}: {cuts}; seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="powercut-") as folder, ExitStack() as stack:
        place = Path(folder)
        guest = prepared(ROOT / os.environ.get("BUILD", "build") / "powercut", chosen.program.resolve(), place)
        fleet = stack.enter_context(runs.fleet(place / "fleet")) if "runs" in loads else None

        def campaign(load: str, store: Store) -> Row:
            chance = random.Random(f"{seed} {load} {store.name}")
            corner = Path(tempfile.mkdtemp(dir=place))  # not by the name: QEMU takes a comma for its own
            if load == "runs":
                assert fleet is not None
                row = runs.campaign(guest, corner, store, cuts[load], chance, fleet)
            else:
                row = replaces.campaign(guest, corner, store, cuts[load], chance)
            tell(load, row)
            return row

        with ThreadPoolExecutor(chosen.jobs) as pool:
            pending = {load: [pool.submit(campaign, load, stores.STORES[name]) for name in names] for load in loads}
            tables = {load: [each.result() for each in pending[load]] for load in loads}
    text = "\n".join(f"{LOADS[load]}\n\n{verdict.table(rows)}" for load, rows in tables.items())
    minutes = (time.monotonic() - started) / 60
    print(f"\n{text}\n{minutes:.0f} minutes")
    if any(row.failed for rows in tables.values() for row in rows):
        return 1
    return 0


def prepared(build: Path, program: Path, folder: Path) -> Path:
    """The guest with this program in it."""
    started = time.monotonic()
    (folder / "flash").write_bytes(b"\xff" * machine.FLASH)
    server = volatile.Server(folder / "disk", volatile.Disk(machine.DISK))
    try:
        guest = machine.prepared(build, program, folder / "disk", folder / "flash")
    finally:
        server.close()
    print(f"the guest is ready, {time.monotonic() - started:.0f} s", flush=True)
    return guest


def tell(load: str, row: Row) -> None:
    """Says how a file system went, as soon as it is known."""
    words = ", ".join(f"{count} {word}" for word, count in row.found.most_common())
    print(f"{load}, {row.store.name}: {row.cuts} cuts, {words}; {row.seconds:.0f} s", flush=True)
    for line in row.lines[:40]:
        print(f"    {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
