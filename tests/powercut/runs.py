"""The second load: the whole program, against a real Caramel server on the host.

A device enrolls, gets certificates and is rejected; each of its runs is cut off at a random instant, or soon after
its end. What a cut leaves must have the key of the request that the server has, and must not be older than what the
last finished run has said; the next, undisturbed run has to end as if nothing had happened, and a hook that was owed
has been called by then. In a third of the runs there is a hook.
"""

from __future__ import annotations

import datetime
import hashlib
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import world
from torture.fleet import Fleet, key_file_parts
from world import Authority, Caramel, Nginx

from powercut.machine import Failed
from powercut.rig import Rig
from powercut.stores import Store
from powercut.verdict import BAD, DRAFT, KEY_FILE, WORST_FIRST, File, Row, is_exposed

#: The host's loopback interface has this name in the guest.
SERVER = "ca.example"

#: Seconds: a run takes about so long at most; after its first write the power goes within; and it is left alone for.
_RUN, _WRITING, _QUIET = 4.0, 0.4, 1.5
#: Writes and flushes after which the power goes, at most.
_REQUESTS = 24


@contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    """A real Caramel server behind nginx, which the guest reaches."""
    with ExitStack() as stack:
        authority = Authority(folder / "authority")
        caramel = stack.enter_context(Caramel(folder / "caramel", authority))
        front = stack.enter_context(Nginx(folder / "nginx", caramel, authority.server((SERVER,))))
        yield Fleet.around(folder / "fleet", authority, caramel, front)


@dataclass
class History:
    """One device: what the server's administrator has done for it, and what its runs have said."""

    fleet: Fleet
    client_id: str
    #: The content of the key file that the last finished run has left.
    kept: bytes = b""
    certificate: Optional[bytes] = None
    #: Certificates for which the hook was called.
    called: set[str] = field(default_factory=set)
    signed: int = 0

    @property
    def requests(self) -> list[str]:
        return self.fleet.requests(self.client_id)

    def prepare(self, chance: random.Random) -> str:
        """The administrator acts; what the next run will be."""
        requests = self.requests
        if not requests:
            return "enrollment"
        if self.certificate is None:
            self._sign(requests[-1])
            return "first certificate"
        if chance.random() < 0.4:
            self.fleet.reject(requests[-1])
            self.certificate = None
            return "rejection"
        self._sign(requests[-1])
        return "renewal"

    def _sign(self, sha256: str) -> None:
        # Each one ends later than the one before, because Caramel hands out the one that ends last.
        self.signed += 1
        end = world.now() + datetime.timedelta(hours=40 + self.signed)
        begin = world.now() - datetime.timedelta(hours=1)
        self.certificate = self.fleet.sign(sha256, not_before=begin, not_after=end)


def digest(certificate: bytes) -> str:
    return hashlib.sha256(certificate).hexdigest()


def verdict(history: History, store: Store, files: list[File]) -> str:
    """What one look at the file system has found, as one word."""
    named = [file for file in files if file.path == KEY_FILE]
    requests = history.requests
    if not named or not named[0].data:
        return "lost" if requests or history.kept else "absent"
    parts = key_file_parts(named[0].data)
    if parts is None:
        return "torn"
    if requests and parts.sha256 not in requests:
        return "lost"  # the key of the request that the server has is gone
    kept = key_file_parts(history.kept)
    if kept and kept.certificate and kept.sha256 in requests:
        # Renewed by the finished run: an older certificate must not come back.
        allowed = [kept.certificate, *([history.certificate] if history.certificate else [])]
        if parts.certificate not in allowed:
            return "lost"
    if is_exposed(store, files):
        return "wrong mode"
    return "old" if named[0].data == history.kept else "new"


class Device:
    """The machine with the program on it, and its history."""

    def __init__(self, rig: Rig, fleet: Fleet, number: int) -> None:
        self.rig, self.fleet = rig, fleet
        self.history = History(fleet, f"fe{number:010x}")

    def _order(self, hook: bool) -> dict[str, Any]:
        store = self.rig.store
        options = [
            f"--server={SERVER}:{self.fleet.front.port}",
            "--ca-cert=/run/ca.pem",
            f"--key-file=/data/{KEY_FILE}",
            f"--client-id={self.history.client_id}",
            f"--owner={store.owner}",
            f"--group={store.group}",
            f"--mode={store.mode:04o}",
            *(["--hook=/run/hook"] if hook else []),
        ]
        return {"options": options, "environment": {}}

    def start(self) -> None:
        self.rig.start()
        self.rig.do(f"cat >/run/ca.pem <<'END'\n{self.fleet.authority.pem.decode()}END")

    def files(self) -> list[File]:
        return self.rig.files()

    def run(self, hook: bool) -> tuple[int, str]:
        """An undisturbed run: its exit status and output."""
        assert self.rig.machine
        others: list[dict[str, Any]] = []
        status, output = self.rig.machine.done("check", others, **self._order(hook))
        self._heard(others)
        return int(status), str(output)

    def interrupted(self, hook: bool, chance: random.Random) -> str:
        """A run whose power goes: what was the case then, and what it cost, for a person."""
        machine = self.rig.machine
        assert machine
        others: list[dict[str, Any]] = []
        kind = chance.choice(("at any time", "while it writes", "while it writes", "while it writes", "at rest"))
        last = chance.randint(1, _REQUESTS) if kind == "while it writes" and chance.random() < 0.5 else None
        self.rig.disk.watch(last)
        machine.order("check", **self._order(hook))
        machine.event("loading")
        if kind == "at any time":
            time.sleep(chance.uniform(0, _RUN))
        elif last and not self.rig.store.flash:
            self.rig.disk.wait(last, _RUN)
            time.sleep(0.02)  # what was said by then is on its way
        elif kind == "while it writes":
            self.rig.written(_RUN)
            time.sleep(chance.choice((0.01, 0.05, _WRITING)) * chance.random())
        else:
            machine.event("done", others)
            self._heard(others)
            self._finished()
            time.sleep(chance.uniform(0, _QUIET))
        said, cost = self.rig.cut()
        self._heard(said)
        return kind + cost

    def _heard(self, events: list[dict[str, Any]]) -> None:
        self.history.called.update(event["hook"] for event in events if "hook" in event)

    def _finished(self) -> None:
        """What a finished run has left is what no cut may take away."""
        named = [file for file in self.files() if file.path == KEY_FILE]
        self.history.kept = named[0].data if named else b""

    def recovered(self, hook: bool, owed: bool) -> list[str]:
        """Runs undisturbed, and says what is otherwise than if nothing had happened."""
        status, output = self.run(hook)
        self._finished()
        history = self.history
        wrong = []
        parts = key_file_parts(history.kept)
        wanted = 0 if history.certificate else 69
        if status != wanted:
            wrong.append(f"the next run ends with {status}, not {wanted}: {output.strip()[-300:]}")
        if parts is None or [parts.sha256] != history.requests:
            wrong.append("the next run doesn't leave the key of the server's one request")
        elif parts.certificate != history.certificate:
            wrong.append("the next run doesn't leave the newest certificate")
        elif owed and parts.certificate and digest(parts.certificate) not in history.called:
            wrong.append("the hook was never called")
        # It may be called twice for one certificate: a cut can come between its end and the note.
        if any(file.path == DRAFT for file in self.files()):
            wrong.append("the next run leaves the draft")
        if self.rig.store.shown is not None and not wrong:
            wrong += self._resigned(hook)
        return wrong

    def _resigned(self, hook: bool) -> list[str]:
        """Where the file system can't keep a mode, a run that changes nothing says so, and writes nothing."""
        self.rig.do("sync -f /data")  # the clusters that the run before has freed
        self.rig.disk.watch()
        _, output = self.run(hook)
        wrong = []
        self.rig.do("sync -f /data")
        if self.rig.disk.requests > 1:  # sync itself flushes
            wrong.append(f"a run that changes nothing writes, {self.rig.disk.requests} requests")
        if "fmask=" not in output:
            wrong.append(f"no word of the mount option in: {output.strip()[-300:]}")
        return wrong


def campaign(guest: Path, folder: Path, store: Store, cuts: int, chance: random.Random, fleet: Fleet) -> Row:
    """So many cuts, one after the other; every now and then a device of its own that has nothing yet."""
    row = Row(store)
    started = time.monotonic()
    rig = Rig(guest, folder, store, chance)
    numbers = iter(range(chance.getrandbits(32) << 8, 1 << 48))
    try:
        rig.make()
        device = Device(rig, fleet, next(numbers))
        device.start()
        rig.looked()
        while row.cuts < cuts:
            history = device.history
            scenario = history.prepare(chance)
            hook = chance.random() < 1 / 3
            line = f"cut {row.cuts + 1} ({scenario}{', hook' if hook else ''}"
            try:
                line += f", {device.interrupted(hook, chance)})"
                device.start()
                looks = rig.looked()
                word = min((verdict(history, store, files) for files in looks), key=WORST_FIRST.index)
                wrong = device.recovered(hook, owed=hook and scenario in ("first certificate", "renewal"))
                rig.tidy(row.count_beside(looks[-1]))
                if wrong and word not in BAD:
                    word = "stuck"
            except Failed as error:
                word, wrong = "lost", [str(error)]
                rig.cut()
                rig.make()
                device.start()
                rig.looked()
            row.count(word, f"{line}: {'; '.join(wrong)}")
            if word in BAD or chance.random() < 0.2:
                if store.empty:
                    rig.do(f"{store.empty}; sync -f /data")
                device = Device(rig, fleet, next(numbers))
    finally:
        rig.close()
    row.unmountable, row.seconds = rig.unmountable, time.monotonic() - started
    return row
