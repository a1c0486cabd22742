"""The first load: the program's own key file, replaced over and over; each replace is acknowledged once it is done.

What a cut leaves must not be older than the last acknowledgement that came out of the machine.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from powercut.machine import Failed
from powercut.rig import Rig
from powercut.stores import Store
from powercut.verdict import KEY_FILE, WORST_FIRST, File, Row, of_replaces

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
    cost: str = ""

    def __str__(self) -> str:
        return f"cut {self.number} ({self.kind}): {self.acks} replaces done, the last is {self.floor}{self.cost}"


def campaign(guest: Path, folder: Path, store: Store, cuts: int, chance: random.Random) -> Row:
    """So many cuts, one after the other, on one file system that lives through all of them."""
    row = Row(store)
    started = time.monotonic()
    rig = Rig(guest, folder, store, chance)
    try:
        if store.lower:
            row.lines += _copied_up(rig)
        rig.make()
        cut: Optional[Cut] = None
        found: Optional[int] = None
        following = 1
        while True:
            rig.start()
            try:
                looks = rig.looked()
            except Failed as error:
                if cut is None:
                    raise
                row.count("lost", f"{cut}: {error}")
                rig.cut()
                rig.make()
                cut, found = None, None
                continue
            if cut is not None:
                found = _judged(row, cut, looks)
            rig.tidy(row.count_beside(looks[-1]))
            if row.cuts == cuts:
                break
            cut = Cut(row.cuts + 1, chance.choice(("loop", "loop", "first ones", "single")), found)
            try:
                following = _loaded(rig, cut, following)
            except Failed as error:
                row.count("stuck", f"{cut}: {error}")
                rig.cut()
                rig.make()
                cut, found = None, None
    finally:
        rig.close()
    row.unmountable, row.seconds = rig.unmountable, time.monotonic() - started
    return row


def _copied_up(rig: Rig) -> list[str]:
    """What is wrong with the lock on a key file of the lower layer while it is copied to the upper one."""
    store = rig.store
    rig.make()
    machine = rig.start()
    folder = f"{store.lower}/caramel"
    rig.do(f"mkdir -p {folder}; echo image >{folder}/identity.pem; echo image >{folder}/other.pem; {store.mount}")
    found = machine.done("copy_up", path=f"/data/{KEY_FILE}", owner=store.owner, group=store.group, mode=store.mode)
    rig.cut()
    return [f"lock: not seen when {when}" for when, seen in found.items() if not seen]


def _judged(row: Row, cut: Cut, looks: list[list[File]]) -> Optional[int]:
    verdicts = [of_replaces(row.store, files, cut.floor) for files in looks]
    word, found = min(verdicts, key=lambda verdict: WORST_FIRST.index(verdict[0]))
    row.count(word, f"{cut}; found {found}")
    return verdicts[-1][1]


def _loaded(rig: Rig, cut: Cut, first: int) -> int:
    """The load, and the cut; the number that the next load begins with."""
    machine, chance, store = rig.machine, rig.chance, rig.store
    assert machine
    if cut.kind == "first ones" and store.empty:
        rig.do(f"{store.empty}; sync -f /data")
        cut.floor = None
    count = 1 if cut.kind == "single" else 1 << 20
    last = None
    if cut.kind != "single" and not store.flash and chance.random() < 0.6:
        last = chance.randint(1, _REQUESTS)
    rig.disk.watch(last)
    rights = {"owner": store.owner, "group": store.group, "mode": store.mode}
    machine.order("replace", path=f"/data/{KEY_FILE}", first=first, count=count, **rights)
    machine.event("loading")
    acks = []
    if cut.kind == "single":
        acks.append(machine.event("ack"))
        time.sleep(chance.uniform(0, _QUIET))
    elif last is None:
        time.sleep(chance.uniform(0, _LOAD))
    else:
        rig.disk.wait(last, _LOAD)
        time.sleep(0.02)  # what was acknowledged is on its way
    said, cut.cost = rig.cut()
    for event in said:
        if "failed" in event:
            raise Failed(f"the load failed: {event['failed']}; {machine.log[-5:]}")
    acks += [event["ack"] for event in said if "ack" in event]
    if acks:
        cut.floor, cut.acks = max(acks), len(acks)
    return first + len(acks) + 2
