"""Hardware that changes between two runs: an identity from the hardware is held on to while the machine still has any
of the IDs that it had, and given up only where it has none of them.

The real program in a mount namespace of its own whose /sys says what the table wants: a serial number and two network
interfaces, each there, not there, or not to be read, before and after.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Sequence
from typing import Optional

import world
from world import Run

from torture.fleet import DeviceUnderTest, Fleet, key_file_parts
from torture.report import Case, sample

#: In the order in which they become a client ID; the interfaces as they are called.
PARTS = ("serial", "lan0", "wlan0")
Parts = frozenset[str]
#: Everything that a machine may have of these, nothing first.
MACHINES = [frozenset(each) for count in range(4) for each in itertools.combinations(PARTS, count)]


class Machine:
    """A device of the fleet whose client ID comes from its hardware; `ids` by part."""

    def __init__(self, fleet: Fleet, enrolled: Parts, first_release: bool = False, kinds_too: bool = True) -> None:
        self.fleet = fleet
        device = fleet.device()
        number = str(device.client_id)[-10:]
        self.ids = {"serial": f"SN-{number}", "lan0": f"00{number}", "wlan0": f"04{number}"}
        self.enrolled = next(self.ids[part] for part in PARTS if part in enrolled)
        device.client_id = self.enrolled
        request = world.signing_request(fleet.key, fleet.authority.subject_for(self.enrolled))
        certificate = fleet.sign(fleet.admit(request, self.enrolled))
        content = world.key_file_content(fleet.key, request, certificate)
        fingerprints = [hashlib.sha256(self.ids[part].encode()).hexdigest()[:8] for part in PARTS if part in enrolled]
        if not first_release:
            kinds = "".join("p" if part == "serial" else "m" for part in PARTS if part in enrolled)
            content = world.sealed(
                content, fleet.authority.pem, self.enrolled, hardware=fingerprints, kinds=kinds if kinds_too else ""
            )
        device.has(content)
        self.dut = DeviceUnderTest(device, content, content, 0, inode=device.key_file.stat().st_ino)
        self.sys = device.folder / "sys"

    def run(self, has: Parts, unreadable: bool = False) -> Run:
        """A run on a machine that has these parts; with `unreadable` it may not read the serial number."""
        shutil.rmtree(self.sys, ignore_errors=True)
        self.sys.mkdir()
        for name in sorted(has - {"serial"}):
            folder = self.sys / "class" / "net" / name
            (folder / "device").mkdir(parents=True)
            (folder / "type").write_text("1\n")
            (folder / "addr_assign_type").write_text("0\n")
            address = self.ids[name]
            (folder / "address").write_text(":".join(address[i : i + 2] for i in range(0, 12, 2)) + "\n")
        if "serial" in has:
            folder = self.sys / "class" / "dmi" / "id"
            folder.mkdir(parents=True)
            (folder / "product_serial").write_text(self.ids["serial"] + "\n")
            (folder / "product_serial").chmod(0 if unreadable else 0o444)
        script = 'mount --rbind "$1" /sys && shift && exec setpriv --bounding-set -dac_override,-dac_read_search "$@"'
        self.dut.device.client_id = None
        try:
            return self.dut.run("--timeout=20", before=("unshare", "-m", "sh", "-c", script, "sh", str(self.sys)))
        finally:
            self.dut.device.client_id = self.enrolled


def _as_it_was(machine: Machine, run: Run, status: int) -> list[str]:
    """The run ended with this status, and nothing else has happened."""
    wrong = machine.fleet.broken(machine.dut, run)
    if run.status != status:
        wrong.append(f"exit status {run.status}: {run.err[-300:]!r}")
    if machine.dut.content != machine.dut.old:
        wrong.append("the key file was changed")
    return wrong


def _another(machine: Machine, run: Run, now: Parts) -> list[str]:
    """A card from another machine: a new key under this machine's own ID, and the other's request is left alone."""
    client_id = next(machine.ids[part] for part in PARTS if part in now)
    parts = key_file_parts(machine.dut.content or b"")
    wrong = [] if run.status == 69 else [f"exit status {run.status}: {run.err[-300:]!r}"]
    known = machine.fleet.requests(client_id)
    if parts is None or [parts.sha256] != known:
        wrong.append(f"the key file's request isn't the one that the server has: {known}")
    if not (machine.dut.content or b"").startswith(f"# caramel-embedded/1 id={client_id} ".encode()):
        wrong.append("the key file's first line names another")
    if parts is not None and parts.key == world.private_pem(machine.fleet.key):
        wrong.append("the other machine's key is still in use")
    return wrong


def changed(fleet: Fleet, before: Parts, now: Parts, unreadable: bool = False) -> Case:
    """An identity that was made on a machine with some parts, and a run on one with others."""

    def act() -> list[str]:
        machine = Machine(fleet, before)
        run = machine.run(now, unreadable)
        seen = now - {"serial"} if unreadable else now
        if before & seen:
            wrong = _as_it_was(machine, run, 0)
        elif unreadable or not now:
            wrong = _as_it_was(machine, run, 127)
        else:
            wrong = _another(machine, run, now)
        if before & seen or not now or unreadable:
            # And back again: nothing is left of it.
            wrong += [f"back again: {problem}" for problem in _as_it_was(machine, machine.run(before), 0)]
        if not wrong:
            fleet.forget(machine.dut)
        return wrong

    words = [" and ".join(part for part in PARTS if part in parts) or "nothing" for parts in (before, now)]
    return Case(f"{words[0]}, then {words[1]}{', the serial number not to be read' if unreadable else ''}", act)


def first_release(fleet: Fleet, enrolled: Parts, now: Parts) -> Case:
    """A file without the line that remembers: its own ID counts while any part of the hardware has it."""

    def act() -> list[str]:
        machine = Machine(fleet, enrolled, first_release=True)
        run = machine.run(now)
        content = machine.dut.content or b""
        wrong = [] if run.status == 0 else [f"exit status {run.status}: {run.err[-300:]!r}"]
        if world.unsealed(content) != machine.dut.old:
            wrong.append("the identity was changed")
        line: Optional[bytes] = content.partition(b"\n")[0]
        hashes = [hashlib.sha256(machine.ids[part].encode()).hexdigest()[:8] for part in PARTS if part in now]
        if f" hw={','.join(hashes)} ".encode() not in (line or b""):
            wrong.append(f"its line is {line!r}")
        return wrong

    return Case(f"a file of the first release, {sorted(now)}", act)


def cases(fleet: Fleet, full: bool = True) -> list[Case]:
    """Every machine, and every one that may become of it."""
    found = [changed(fleet, before, now) for before in MACHINES[1:] for now in MACHINES]
    with_serial: Sequence[Parts] = [each for each in MACHINES if "serial" in each]
    found += [changed(fleet, before, now, unreadable=True) for before in MACHINES[1:] for now in with_serial]
    found += [
        first_release(fleet, enrolled, now)
        for enrolled in MACHINES[1:]
        for now in MACHINES
        if next(part for part in PARTS if part in enrolled) in now
    ]
    return found if full else sample(found, 12)
