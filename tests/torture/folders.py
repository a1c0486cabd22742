"""A key file in a folder of somebody else's: whatever that user puts there, no file outside of it is read, made,
changed or handed over.

Root runs the program for a user who owns the folder. What is planted there is a table; each is tried in every moment
of a device's life. A second kind of case has that user exchange the file for a link all the time
while runs come and go.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Callable, NamedTuple

import world
from world import Snapshot

from torture.fleet import STATUSES, DeviceUnderTest, Fleet
from torture.report import Case

NOBODY = pwd.getpwnam("nobody")


class _Trap(NamedTuple):
    """What is put into the folder, under which name, and whether a run goes on nevertheless."""

    name: str
    #: Takes the place to put something in, and root's file.
    plant: Callable[[Path, Path], None]
    goes_on: bool


def _nobodys(place: Path) -> None:
    os.lchown(place, NOBODY.pw_uid, NOBODY.pw_gid)


def _soft(place: Path, roots: Path) -> None:
    place.symlink_to(roots)
    _nobodys(place)


def _dangling(place: Path, roots: Path) -> None:
    _soft(place, roots.with_name("made"))


def _fifo(place: Path, roots: Path) -> None:
    os.mkfifo(place)
    _nobodys(place)


def _hard(place: Path, roots: Path) -> None:
    os.link(roots, place)


FILE, DRAFT, NOTE = "identity.pem", ".identity.pem.new", ".identity.pem.hook"
TRAPS: Mapping[str, _Trap] = {
    "a link to root's file": _Trap(FILE, _soft, False),
    "a link of root's to root's file": _Trap(FILE, Path.symlink_to, False),
    "a link to a file that isn't there": _Trap(FILE, _dangling, False),
    "a link to itself": _Trap(FILE, lambda place, _: _soft(place, place), False),
    "a hard link to root's file": _Trap(FILE, _hard, False),
    "a FIFO": _Trap(FILE, _fifo, False),
    "a folder": _Trap(FILE, lambda place, _: place.mkdir(), False),
    # A draft is nobody's: what is there goes.
    "a draft that is a link to root's file": _Trap(DRAFT, _soft, True),
    "a draft that is a link to a file that isn't there": _Trap(DRAFT, _dangling, True),
    "a draft that is a hard link to root's file": _Trap(DRAFT, _hard, True),
    "a draft that is a FIFO": _Trap(DRAFT, _fifo, True),
    "a note that is a link to root's file": _Trap(NOTE, _soft, False),
    "a note that is a hard link to root's file": _Trap(NOTE, _hard, False),
    "a note that is a FIFO": _Trap(NOTE, _fifo, False),
}

#: What root's file may hold: with an identity of its own in it, it looks like what the program wants.
CONTENTS = ("a text", "nothing", "longer than a key file", "the device's own identity")


def _hand_over(dut: DeviceUnderTest) -> Path:
    """Makes the key file and its folder nobody's; root's file, in a folder of root's, beside it."""
    dut.owner, dut.group, dut.mode = NOBODY.pw_uid, NOBODY.pw_gid, 0o600
    dut.options = tuple(word for word in dut.options if not word.startswith(("--owner=", "--group=", "--mode=")))
    dut.options += (f"--owner={dut.owner}", f"--group={dut.group}", "--mode=0600")
    folder = dut.device.key_file.parent
    folder.mkdir(exist_ok=True)
    for path in (folder, *folder.iterdir()):
        _nobodys(path)
    if dut.device.key_file.exists():
        dut.device.key_file.chmod(0o600)
    roots = dut.device.folder / "roots"
    roots.mkdir()
    return roots / "file"


def planted(fleet: Fleet, scenario: str, what: str, content: str) -> Case:
    """A scenario with a trap in the folder; then the trap is taken away, and the device goes on."""
    trap = TRAPS[what]

    def act() -> list[str]:
        dut = fleet.scenarios[scenario]()
        roots = _hand_over(dut)
        own = fleet.content(dut.device, world.signing_request(fleet.key, fleet.authority.subject_for(dut.client_id)))
        contents = {"a text": b"root's\n", "nothing": b"", "longer than a key file": b"x" * 5_000_000}
        roots.write_bytes(contents.get(content, own))
        roots.chmod(0o600)
        before, place = Snapshot.of(roots), dut.device.key_file.parent / trap.name
        kept = place.read_bytes() if place.exists() and trap.name == FILE else None
        place.unlink(missing_ok=True)
        trap.plant(place, roots)
        run = dut.run()
        needed = trap.name != NOTE or dut.called is not None
        wrong = []
        if run.status not in ((127,) if needed and not trap.goes_on else (dut.status,)):
            wrong.append(f"exit status {run.status}: {run.err[-300:]!r}")
        # A hard link to it is one more, and one less again, of its names: that is no change of the file.
        if Snapshot.of(roots) != before:
            wrong.append("root's file is not what it was")
        if os.listdir(roots.parent) != [roots.name]:
            wrong.append(f"made: {os.listdir(roots.parent)}")
        if trap.name == FILE or not needed or not trap.goes_on:
            if place.is_dir() and not place.is_symlink():
                place.rmdir()
            else:
                place.unlink(missing_ok=True)
        if kept is not None:
            place.write_bytes(kept)
            place.chmod(0o600)
            _nobodys(place)
            dut.inode = place.stat().st_ino
        wrong += [f"next: {problem}" for problem in fleet.recovered(dut)]
        if not wrong:
            fleet.forget(dut)
        return wrong

    return Case(f"{scenario}, {what} that holds {content}", act)


#: Exchanges the key file for a link and back, as fast as it can; the user who owns the folder runs it.
_EXCHANGE = """
import os, sys
place, roots, user, group = sys.argv[1:]
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
while True:
    try:
        os.symlink(roots, place + ".link")
        os.rename(place, place + ".kept")
        os.rename(place + ".link", place)
        os.rename(place + ".kept", place)
    except OSError:
        pass
    try:
        os.unlink(place + ".link")
    except OSError:
        pass
"""


def raced(fleet: Fleet, runs: int) -> Case:
    """The owner of the folder exchanges the key file for a link to root's file while runs come and go."""

    def act() -> list[str]:
        dut = fleet.renewal()
        roots = _hand_over(dut)
        roots.write_bytes(b"root's\n")
        roots.chmod(0o600)
        before = Snapshot.of(roots)
        for path in (dut.device.folder, *dut.device.folder.parents):
            if path.stat().st_uid == 0 and path != Path("/tmp"):
                path.chmod(path.stat().st_mode | 0o011)
        other = subprocess.Popen(
            [sys.executable, "-I", "-c", _EXCHANGE, dut.device.key_file, roots, str(dut.owner), str(dut.group)],
            preexec_fn=world.die_with_parent,
        )
        wrong = []
        try:
            for _ in range(runs):
                run = dut.run()
                if run.status not in STATUSES:
                    wrong.append(f"exit status {run.status}: {run.err[-200:]!r}")
                if Snapshot.of(roots) != before:
                    wrong.append("root's file is not what it was")
                    break
            if other.poll() is not None:
                wrong.append("nobody exchanged anything")
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
        if os.listdir(roots.parent) != [roots.name]:
            wrong.append(f"made: {os.listdir(roots.parent)}")
        return wrong

    return Case(f"{runs} runs, and a user who exchanges the file for a link meanwhile", act)


def cases(fleet: Fleet, full: bool = True) -> list[Case]:
    """Everything about folders of others."""
    scenarios = list(fleet.scenarios) if full else ["renewal with a hook"]
    found = [planted(fleet, scenario, what, "a text") for scenario in scenarios for what in TRAPS]
    for content in CONTENTS[1:] if full else CONTENTS[-1:]:
        for what in ("a link to root's file", "a hard link to root's file", "a draft that is a link to root's file"):
            found.append(planted(fleet, "renewal", what, content))
    return [*found, raced(fleet, 60 if full else 8)]
