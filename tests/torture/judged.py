"""Nothing counts that was not judged: every single bit of a key file is lost, one at a time.

The device's ID comes from its hardware, and the server knows what the file held. With the network the identity is
kept, or it is started over under the device's own name; without it the file stays as it is. Nothing is ever sent or
stored under another name, and the run after the next one works, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import world
from world import Run

from torture.fleet import Fleet, key_file_parts
from torture.hardware import Machine
from torture.report import Case, sample

#: A machine whose ID isn't the first that it has now: what the file says of it counts.
ENROLLED, NOW = frozenset(("wlan0",)), frozenset(("lan0", "wlan0"))


@contextmanager
def unreachable(machine: Machine) -> Iterator[None]:
    """Nobody listens there."""
    device = machine.dut.device
    address, device.server = device.server, "localhost:9"
    try:
        yield
    finally:
        device.server = address


def lost(fleet: Fleet, bit: int, network: bool) -> Case:
    """The bit with this number, counted from the file's first byte, has another value."""

    def act() -> list[str]:
        machine = Machine(fleet, NOW if bit % 2 else ENROLLED)
        good = machine.dut.content or b""
        at = bit // 8 % len(good)
        damaged = good[:at] + bytes([good[at] ^ 1 << bit % 8]) + good[at + 1 :]
        machine.dut.device.has(damaged)
        if not network:
            with unreachable(machine):
                run = machine.run(NOW)
            wrong = [] if run.status == 127 else [f"exit status {run.status}: {run.err[-300:]!r}"]
            if machine.dut.content != damaged:
                wrong.append("the file was changed, and nobody was asked")
            return wrong + _survived(machine, good, machine.run(NOW))
        wrong = _survived(machine, good, machine.run(NOW))
        now = machine.dut.content or b""
        return wrong + _survived(machine, now, machine.run(NOW), _client_id(now))

    return Case(f"bit {bit} of the file{'' if network else ', without network'}", act)


def _client_id(content: bytes) -> str:
    """As the line of text has it."""
    return content.partition(b"\n")[0].decode().partition(" id=")[2].partition(" ")[0]


def _survived(machine: Machine, before: bytes, run: Run, name: Optional[str] = None) -> list[str]:
    """`name`: that under which what is kept has to be kept, where it isn't the one that the device enrolled with."""
    content = machine.dut.content or b""
    parts = key_file_parts(content)
    if parts is None:
        return [f"the key file is not whole, {run.status}: {run.err[-300:]!r}"]
    own = {machine.ids[part] for part in NOW}
    client_id = _client_id(content)
    wrong = []
    if world.unsealed(content) == world.unsealed(before):
        if (run.status, client_id) != (0 if parts.certificate else 69, name or machine.enrolled):
            wrong.append(f"kept as {client_id}, {run.status}: {run.err[-300:]!r}")
    elif run.status != 69 or client_id not in own or hashlib.sha256(parts.request).hexdigest() != parts.sha256:
        wrong.append(f"started over as {client_id}, {run.status}: {run.err[-300:]!r}")
    known = [row for one in own for row in machine.fleet.requests(one)]
    if parts.sha256 not in known or len(known) > 2:
        wrong.append(f"the server has {known}")
    return wrong


def cases(fleet: Fleet, full: bool = True) -> list[Case]:
    """All bits of a file with a certificate of 3 kB; in short some of each block, and the line's more closely."""
    length = 8 * len(Machine(fleet, NOW).dut.content or b"")
    found = [lost(fleet, bit, network) for bit in range(length) for network in (True, False)]
    return found if full else [*sample(found[: 16 * 150], 12), *sample(found[16 * 150 :], 12)]
