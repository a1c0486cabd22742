"""The first load: the program's own key file, replaced over and over; each replace is acknowledged once it is done.

What a cut leaves must not be older than the last acknowledgement that came out of the machine.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from powercut import volatile
from powercut.machine import FLASH, DISK, Failed, Machine
from powercut.stores import Store
from powercut.verdict import DRAFT, MARK, WORST_FIRST, File, Row, of_replaces

FOLDER = "caramel"
KEY_FILE = FOLDER + "/identity.pem"

#: Seconds that the load runs at most, and that a run that has ended is left alone at most.
_LOAD, _QUIET = 0.6, 1.5
#: Writes and flushes after which the power goes, at most.
_REQUESTS = 60


@dataclass
class Cut:
    """One cut: what was the case before it, and how it went."""

    number: int
    kind: str
    floor: Optional[int]
    acks: int = 0
    survived: str = ""
    sectors: int = 0

    def __str__(self) -> str:
        done = f"{self.acks} replaces done" if self.acks else "no replace done"
        disk = f", {self.survived} of what was unflushed kept, {self.sectors} sectors lost" if self.survived else ""
        return f"cut {self.number} ({self.kind}): {done}, the last is {self.floor}{disk}"


class Bench:
    """A disk and a flash memory, and one machine after the other that has them."""

    def __init__(self, guest: Path, folder: Path, store: Store, chance: random.Random) -> None:
        self.guest, self.store, self.chance = guest, store, chance
        self.disk = volatile.Disk(DISK)
        self.flash = folder / "flash"
        self.flash.write_bytes(b"\xff" * FLASH)
        self._server = volatile.Server(folder / "disk", self.disk)
        self.machine: Optional[Machine] = None

    def start(self) -> Machine:
        """The power comes."""
        self._server.expect()
        self.machine = Machine.restored(self.guest, self._server.path, self.flash)
        self.machine.wake()
        self.do(self.store.attach)
        return self.machine

    def do(self, script: str) -> str:
        """Runs a script that has to succeed. Raises `Failed`."""
        assert self.machine
        status, output = self.machine.shell(script) if script else (0, "")
        if status:
            raise Failed(f"{self.store.name}: {script!r} ends with {status}: {output}")
        return output

    def make(self) -> None:
        """A new, empty file system."""
        self.start()
        self.do(self.store.make)
        self.do("sync")
        self.cut("all")

    def cut(self, survives: str) -> tuple[list[dict[str, Any]], int]:
        """The power goes. What the machine had said and nobody has read, and the number of sectors that are lost."""
        assert self.machine
        said = self.machine.cut()
        self.machine = None
        self._server.settle()
        return said, self.disk.cut(self.chance, survives)

    def looked(self) -> list[list[File]]:
        """What is on the file system: as it is, and after what a system does at boot; it stays mounted."""
        assert self.machine
        looks = []
        if self.store.look:
            self.do(self.store.look)
            looks.append(self._files())
            self.do(self.store.unmount)
        if self.store.check:
            status, output = self.machine.shell(self.store.check)
            if status > 1:
                raise Failed(f"{self.store.check} ends with {status}: {output}")
        self.do(self.store.mount)
        looks.append(self._files())
        return looks

    def _files(self) -> list[File]:
        assert self.machine
        return [File.told(told) for told in self.machine.done("look", folder="/data")]

    def close(self) -> None:
        if self.machine:
            self.machine.cut()
            self._server.settle()
        self._server.close()


def campaign(guest: Path, folder: Path, store: Store, cuts: int, chance: random.Random) -> Row:
    """So many cuts, one after the other, on one file system that lives through all of them."""
    row = Row(store)
    started = time.monotonic()
    bench = Bench(guest, folder, store, chance)
    try:
        bench.make()
        cut: Optional[Cut] = None
        found: Optional[int] = None
        following = 1
        for number in range(cuts + 1):
            bench.start()
            try:
                looks = bench.looked()
            except Failed as error:
                if cut is None:
                    raise
                row.count("lost", f"{cut}: {error}")
                bench.cut("all")
                bench.make()
                cut, found = None, None
                continue
            if cut is not None:
                found = _judged(row, cut, looks)
            _tidied(bench, row, looks[-1])
            if number == cuts:
                break
            cut = Cut(number + 1, chance.choice(("loop", "loop", "first ones", "single")), found)
            following = _loaded(bench, cut, following)
    finally:
        bench.close()
    row.seconds = time.monotonic() - started
    return row


def _judged(row: Row, cut: Cut, looks: list[list[File]]) -> Optional[int]:
    verdicts = [of_replaces(row.store, KEY_FILE, files, cut.floor) for files in looks]
    word, found = min(verdicts, key=lambda verdict: WORST_FIRST.index(verdict[0]))
    row.count(word, f"{cut}; found {found}")
    return verdicts[-1][1]


def _tidied(bench: Bench, row: Row, files: list[File]) -> None:
    """Counts what a cut has left beside the key file, and removes what the check has saved."""
    row.drafts += any(file.path == f"{FOLDER}/{DRAFT}" for file in files)
    saved = [file for file in files if not file.path.startswith(FOLDER + "/")]
    row.saved += len(saved)
    row.saved_secrets += sum(MARK in file.data for file in saved)
    if saved:
        bench.do("cd /data; rm -f " + " ".join(f"'{file.path}'" for file in saved) + "; sync -f /data")


def _loaded(bench: Bench, cut: Cut, first: int) -> int:
    """The load, and the cut; the number that the next load begins with."""
    machine, chance, store = bench.machine, bench.chance, bench.store
    assert machine
    if cut.kind == "first ones":
        bench.do(f"rm -rf /data/{FOLDER}; sync -f /data")
        cut.floor = None
    count = 1 if cut.kind == "single" else 1 << 20
    bench.disk.writes = bench.disk.flushes = 0
    rights = {"owner": store.owner, "group": store.group, "mode": store.mode}
    machine.order("replace", path=f"/data/{KEY_FILE}", first=first, count=count, **rights)
    machine.event("loading")
    acks = []
    if cut.kind == "single":
        acks.append(machine.event("ack"))
        time.sleep(chance.uniform(0, _QUIET))
    elif store.flash or chance.random() < 0.5:
        time.sleep(chance.uniform(0, _LOAD))
    else:
        bench.disk.wait(chance.randint(1, _REQUESTS), _LOAD)
        time.sleep(chance.uniform(0, 0.005))
    survives = chance.choice(volatile.CUTS)
    said, cut.sectors = bench.cut(survives)
    cut.survived = "" if store.flash else survives
    for event in said:
        if "failed" in event:
            raise Failed(f"the load failed: {event['failed']}")
    acks += [event["ack"] for event in said if "ack" in event]
    if acks:
        cut.floor, cut.acks = max(acks), len(acks)
    return first + len(acks) + 2
