"""``make powercut``: real kernels, real file systems, real power cuts. Exit status 1 if anything was lost."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from powercut import lives, machine, replaces, stores, verdict, volatile  # noqa: E402

LOADS = {
    "replaces": "The key file, replaced over and over",
    "lives": "The whole program, against a Caramel server",
}


def main() -> int:
    options = argparse.ArgumentParser(prog="make powercut", description=__doc__)
    options.add_argument("--cuts", type=int, default=100, help="for each file system")
    options.add_argument("--only", action="append", metavar="NAME", choices=list(stores.STORES), help="file systems")
    options.add_argument("--short", action="store_true", help=f"20 cuts on {' and '.join(stores.SHORT)}")
    options.add_argument("--program", type=Path, default=ROOT, help="a source tree of the program; else this one")
    options.add_argument("--seed", type=int, default=None, help="of the chances, which is printed")
    options.add_argument("--load", choices=list(LOADS), help="only one of the loads")
    chosen = options.parse_args()
    loads = [chosen.load] if chosen.load else ["replaces"] if chosen.short else list(LOADS)
    names = chosen.only or (stores.SHORT if chosen.short else list(stores.STORES))
    cuts = 20 if chosen.short else chosen.cuts
    seed = chosen.seed if chosen.seed is not None else int.from_bytes(os.urandom(4), "big")
    build = ROOT / os.environ.get("BUILD", "build") / "powercut"
    tables: dict[str, list[verdict.Row]] = {}
    print(f"{cuts} cuts on each of: {', '.join(names)}; seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="powercut-") as folder, ExitStack() as stack:
        place = Path(folder)
        guest = prepared(build, chosen.program, place)
        town = stack.enter_context(lives.town(place / "town")) if "lives" in loads else None
        for load in loads:
            tables[load] = []
            for name in names:
                chance = random.Random(f"{seed} {load} {name}")
                store = stores.STORES[name]
                if town is not None and load == "lives":
                    row = lives.campaign(guest, place, store, cuts, chance, town)
                else:
                    row = replaces.campaign(guest, place, store, cuts, chance)
                tables[load].append(row)
                tell(load, row)
    for load, rows in tables.items():
        print(f"\n{LOADS[load]}:\n\n{verdict.table(rows)}")
    return 1 if any(row.failed for rows in tables.values() for row in rows) else 0


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


def tell(load: str, row: verdict.Row) -> None:
    """Says how a file system went, as soon as it is known."""
    words = ", ".join(f"{count} {word}" for word, count in row.found.most_common())
    print(f"{load}, {row.store.name}: {row.cuts} cuts, {words}; {row.seconds:.0f} s", flush=True)
    for line in row.lines[:40]:
        print(f"    {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
