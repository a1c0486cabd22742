"""A key in a TPM: the power fails at the system calls of its device and of the TPM at once, and the TPM fails at each
point of a device's life.

The devices are Debian 13's, the TPM is swtpm; see ``world/chips.py``. Whatever happens, the TPM never believes in an
attack, the key file is whole, and the run after it ends as if nothing had happened; where the key is gone for good,
that is so as soon as the server has rejected the device.
"""

from __future__ import annotations

import datetime
import itertools
import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

import world
from world import Between, Run, Tpm, keys_in

from torture import power
from torture.fleet import DeviceUnderTest, Fleet
from torture.report import WORKERS, Case

_HOUR = datetime.timedelta(hours=1)
#: TPM 2.0 Library, part 2, 6.6.3: TPM_RC_RETRY.
RETRY = 0x922


class InTree(DeviceUnderTest):
    """A device in a tree of its own. What is to stand before the program stands in the tree as well."""

    def run_alone(self, *more: str, before: tuple[str, ...] = (), **how: Any) -> Run:
        command = self.device.command
        python = str(Path(command[-1]).with_name("python3"))
        self.device.command = [*command[:-1], *before, python, *world.WITHOUT_STARTER[1:]]
        try:
            return self.run(*more, **how)
        finally:
            self.device.command = command


@dataclass
class Life:
    """A TPM, and the device whose key it has; the device has its first certificate."""

    chip: Tpm
    #: An identity whose key it has, for as long as nobody clears it.
    dut: Optional[InTree] = None
    #: Hours that the next certificate is valid.
    hours: Iterator[int] = field(default_factory=lambda: itertools.count(20))


class Lives:
    """A few TPMs, each for one case at a time."""

    def __init__(self, fleet: Fleet, folder: Path, count: int = WORKERS) -> None:
        self.fleet = fleet
        self._free: queue.Queue[Life] = queue.Queue()
        for number in range(count):
            self._free.put(Life(Tpm(folder / f"tpm{number}")))

    @contextmanager
    def one(self) -> Iterator[Life]:
        life = self._free.get()
        try:
            with life.chip:
                life.chip.parent = False  # it has it now
                yield life
        finally:
            self._free.put(life)

    # --- Points of a life

    def first_enrollment(self, life: Life) -> InTree:
        """Nothing is there, not even the folder."""
        return self._with_chip(self.fleet.first_enrollment(), life)

    def pending(self, life: Life) -> InTree:
        """Key and request are there, and nobody has signed yet."""
        dut = self.first_enrollment(life)
        run = dut.run()
        assert run.status == 69, run
        return self._now(dut, None, 69)

    def signed(self, life: Life) -> InTree:
        """The administrator has signed, and the device doesn't know it yet."""
        dut = self.pending(life)
        return self.signed_again(dut, life)

    def unchanged(self, life: Life) -> InTree:
        """A certificate is there, the newest that the server has."""
        dut = life.dut or self.signed(life)
        dut.device.surroundings = life.chip.env
        run = dut.run()
        assert run.status == 0, run
        life.dut = self._now(dut, None, 0)
        return life.dut

    def renewed(self, life: Life) -> InTree:
        """The server has a newer certificate."""
        dut = self.unchanged(life)
        return self.signed_again(dut, life)

    @property
    def points(self) -> Mapping[str, Callable[[Life], InTree]]:
        return {each.__name__: each for each in (self.pending, self.signed, self.unchanged, self.renewed)}

    def signed_again(self, dut: InTree, life: Life) -> InTree:
        """The administrator has signed once more."""
        return self._now(dut, self._newer(dut, life), 0)

    def _newer(self, dut: InTree, life: Life) -> bytes:
        """The administrator signs; the key file as it will be."""
        dated = {"not_before": world.now() - _HOUR, "not_after": world.now() + next(life.hours) * _HOUR}
        (sha256,) = self.fleet.requests(dut.client_id)
        certificate = self.fleet.sign(sha256, **dated)
        key, *_, request = (block for _, block in dut.device.blocks())
        return world.sealed(key + certificate + request, self.fleet.authority.pem, dut.client_id)

    @staticmethod
    def _with_chip(dut: DeviceUnderTest, life: Life) -> InTree:
        keys_in(life.chip, dut.device, "rsa-2048")
        return InTree(**vars(dut))

    @staticmethod
    def _now(dut: InTree, expected: Optional[bytes], status: int) -> InTree:
        content = dut.content
        inode = dut.device.key_file.stat().st_ino
        return InTree(
            **{**vars(dut), "old": content, "expected": expected or content, "status": status, "inode": inode}
        )


# --- Power cuts


def cuts(lives: Lives, scenario: str, others: int) -> list[Case]:
    """Kills of program and TPM at every call inside the key file's folder, and at `others` outside."""
    make = {"first enrollment": lives.first_enrollment, "renewal": lives.renewed}[scenario]
    with lives.one() as life:
        dut = make(life)
        run, trace = power.traced(dut)
        wrong = lives.fleet.broken(dut, run) + lives.fleet.recovered(dut)
        if wrong or run.status != dut.status:
            raise AssertionError(f"{scenario}, undisturbed: {run} {wrong}")
    found = power.points(trace, dut.device.key_file.parent)
    return [_cut(lives, scenario, make, point) for point in power.spread(found, others)]


def _cut(lives: Lives, scenario: str, make: Callable[[Life], InTree], point: power.Point) -> Case:
    def act() -> list[str]:
        with lives.one() as life:
            earlier = [] if point.inside else [point.number * 2 // 3, point.number // 3]
            for number in [point.number] * 3 + [number for number in earlier if number]:
                dut = make(life)
                _run, happened = power.injected(dut, point.call, number, "signal=KILL")
                if happened:
                    break
            else:
                return ["the run never came to this call"]
            life.chip.cut()
            life.chip.start()
            wrong = lives.fleet.broken(dut)
            wrong += [f"next: {problem}" for problem in lives.fleet.recovered(dut)]
            if life.chip.attacks:
                wrong.append(f"the TPM believes in {life.chip.attacks} attacks")
            return wrong

    place = point.text.split(" ", 1)[-1].strip()[-110:]
    return Case(f"{scenario} with a TPM, killed at {point} [{place}]", act)


# --- A TPM that fails


@dataclass(frozen=True)
class Misfortune:
    """What happens to a TPM, and what ends it."""

    begins: Callable[[Tpm, Between], object]
    ends: Callable[[Tpm, Between], object]
    #: What a run says that needs the key; nothing where it works all the same.
    says: str = ""
    #: The key is gone for good.
    gone: bool = False
    #: Runs fail that don't need the key: OpenSSL's provider speaks to the TPM when it is loaded.
    always: bool = False


def _factory(chip: Tpm, _: Between) -> None:
    chip.run(world.chips.KEYS / "tpm-parent")


def _lock(chip: Tpm, _: Between) -> None:
    """Somebody else's wrong passwords, for a key of his own."""
    chip.run("tpm2_dictionarylockout", "-s", "-n", "1", "-t", "100000", "-l", "100000")
    chip.run("tpm2_createprimary", "-Q", "-C", "o", "-p", "right", "-c", "locked")
    chip.tidy()
    for _again in range(2):
        done = chip.run("tpm2_create", "-Q", "-C", "locked", "-P", "wrong", check=False)
        chip.tidy()
    assert "0x921" in done.stderr, done


def _unlock(chip: Tpm, _: Between) -> None:
    # The others' key is one whose use counts as an attack when the power fails: that happens now, and not later.
    chip.cut()
    chip.start()
    chip.run("tpm2_dictionarylockout", "--clear-lockout")


MISFORTUNES: dict[str, Misfortune] = {
    "cleared": Misfortune(lambda chip, _: chip.clear(), _factory, "the TPM has not the parent that wraps", gone=True),
    "replaced": Misfortune(lambda chip, _: _replace(chip), lambda *_: None, "it is another TPM's key", gone=True),
    "missing": Misfortune(lambda chip, _: chip.away(), lambda chip, _: chip.back(), "the TPM can't be reached"),
    "locked by others": Misfortune(_lock, _unlock),
    "busy for some commands": Misfortune(lambda _, wire: wire.says(RETRY, 3), lambda _, wire: wire.says(0, 0)),
    "busy": Misfortune(lambda _, wire: wire.says(RETRY), lambda _, wire: wire.says(0, 0), "the TPM is busy"),
    "hangs": Misfortune(
        lambda chip, _: chip.hang(), lambda chip, _: chip.go_on(), "doesn't answer within the time limit", always=True
    ),
}


def _replace(chip: Tpm) -> None:
    chip.parent = True
    chip.replace()
    chip.parent = False


def misfortunes(lives: Lives) -> list[Case]:
    """Each of them at each point of a life."""
    return [
        _misfortune(lives, name, each, point, make)
        for name, each in MISFORTUNES.items()
        for point, make in lives.points.items()
    ]


def _misfortune(lives: Lives, name: str, misfortune: Misfortune, point: str, make: Callable[[Life], InTree]) -> Case:
    def act() -> list[str]:
        wrong: list[str] = []
        with lives.one() as life, Between(life.chip) as wire:
            dut = make(life)
            dut.device.surroundings = wire.env
            misfortune.begins(life.chip, wire)
            run = dut.run("--timeout=3" if name == "hangs" else "--timeout=20")
            # While nobody has signed, no run asks the chip.
            fails = misfortune.says if point != "pending" or misfortune.always else ""
            wrong += lives.fleet.broken(dut, run)
            if run.status != (127 if fails else dut.status) or fails not in run.err:
                wrong.append(f"exit status {run.status}: {run.err[-300:]!r}")
            if dut.content != (dut.old if misfortune.always else dut.expected):
                wrong.append("what was new is not stored")

            misfortune.ends(life.chip, wire)
            life.chip.tidy()
            # Its address may be another one.
            dut.device.surroundings = life.chip.env
            if misfortune.gone:
                life.dut = None
                run = dut.run()
                if run.status != (127 if fails else dut.status) or dut.content != dut.expected:
                    wrong.append(f"it started over by itself, or not at all: {run}")
                lives.fleet.reject(lives.fleet.requests(dut.client_id)[0])
                before, dut.expected = dut.device.block(life.chip.label), None
                run = dut.run()
                if run.status != 69 or dut.device.block(life.chip.label) == before:
                    wrong.append(f"rejected, it has no new key: {run}")
                dut = lives.signed_again(dut, life)  # and its life goes on
            wrong += [f"next: {problem}" for problem in lives.fleet.recovered(dut)]
            if life.chip.attacks:
                wrong.append(f"the TPM believes in {life.chip.attacks} attacks")
        return wrong

    return Case(f"TPM {name}, {point}", act)
