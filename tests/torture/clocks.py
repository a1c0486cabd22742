"""Clocks: 1970, behind, ahead, 2080, and one that jumps during the run.

The rule of INTERFACE.md: the CA's notBefore, the stored certificate's and the firmware's build time have certainly
passed, the latest is the floor. A clock at or past it is believed; behind it, what isn't valid *yet* is taken, and
what ended before the floor is not. Devices run under libfaketime; the server has the right time.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional

import world
from world import Authority, HttpRequest, Run, Scripted, answers

from torture.fleet import DeviceUnderTest, Fleet, key_file_parts
from torture.report import Case

DAY = datetime.timedelta(days=1)
FIRST_BOOT = datetime.datetime(1970, 1, 1, 0, 0, 40, tzinfo=datetime.timezone.utc)
FAR = datetime.datetime(2080, 6, 1, tzinfo=datetime.timezone.utc)


def at(moment: Optional[datetime.datetime]) -> tuple[str, ...]:
    """What stands before a command so that it begins at `moment`; None: the right time."""
    if moment is None:
        return ()
    world.forget_false_clocks()
    # Durations stay true: with a faked monotonic clock time limits would end too early (or never).
    seconds = int(moment.timestamp() - time.time())
    return ("env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "DONT_FAKE_MONOTONIC=1", "faketime", "-f", f"{seconds:+d}s")


def _said(run: Run, status: int) -> list[str]:
    return [] if run.status == status else [f"exit status {run.status}, not {status}: {run.err[-250:]!r}"]


def set_to(
    fleet: Fleet, name: str, make: Callable[[], DeviceUnderTest], moment: datetime.datetime, status: int
) -> Case:
    """A run by that clock, and one at the right time."""

    def act() -> list[str]:
        dut = make()
        run = dut.run(before=at(moment))
        wrong = _said(run, status) + fleet.broken(dut, run)
        if status == 127 and dut.old is not None and dut.content != dut.old:
            wrong.append("127, and the key file was changed")
        return wrong + [f"next, at the right time: {problem}" for problem in fleet.recovered(dut)]

    return Case(name, act)


def life_in_1970(fleet: Fleet) -> list[str]:
    """From nothing to a certificate, and through a renewal and a rejection, in January 1970."""
    dut = fleet.first_enrollment()
    run = dut.run(before=at(FIRST_BOOT))
    wrong = _said(run, 69) + fleet.broken(dut, run)
    (sha256,) = fleet.requests(dut.client_id)
    first = fleet.sign(sha256, not_before=world.now() - DAY, not_after=world.now() + DAY)
    for certificate, label in ((first, "certified"), (None, "unchanged")):
        run = dut.run(before=at(FIRST_BOOT + DAY))
        wrong += [f"{label}: {problem}" for problem in _said(run, 0)]
        parts = key_file_parts(dut.content or b"")
        if certificate is not None and (parts is None or parts.certificate != certificate):
            wrong.append("the certificate isn't there")
    newer = fleet.sign(sha256, not_before=world.now(), not_after=world.now() + 5 * DAY)
    wrong += _said(dut.run(before=at(FIRST_BOOT + 2 * DAY)), 0)
    parts = key_file_parts(dut.content or b"")
    if parts is None or parts.certificate != newer:
        wrong.append("the newer certificate isn't there")
    fleet.reject(sha256)
    wrong += _said(dut.run(before=at(FIRST_BOOT + 3 * DAY)), 69)
    if len(fleet.requests(dut.client_id)) != 1 or fleet.requests(dut.client_id) == [sha256]:
        wrong.append("the rejected device didn't start over")
    return wrong


def slept_for_a_year(fleet: Fleet, moment: Optional[datetime.datetime], signed: bool) -> list[str]:
    """The certificate in the file ended a year ago; the server has a newer one, or none."""
    device, request, sha256 = fleet.enrolled()
    ended = fleet.authority.sign(request, not_before=world.now() - 367 * DAY, not_after=world.now() - 365 * DAY)
    old = fleet.content(device, request, ended)
    expected = fleet.content(device, request, fleet.sign(sha256) if signed else b"")
    status = 0 if signed else 69
    dut = fleet.dut(device, old, expected, status)
    run = dut.run(before=at(moment))
    wrong = _said(run, status)
    # Behind its certificate's notBefore, a device can't know that the certificate has ended.
    if dut.content != expected and not (moment is not None and moment.year == 1970 and not signed):
        wrong.append("the key file is not what it should be")
    return wrong + fleet.recovered(dut)


def ended_before_the_floor(fleet: Fleet, moment: Optional[datetime.datetime], stored: bool) -> list[str]:
    """A certificate that had ended before the CA began is refused, from the server and from the file."""
    device = fleet.device()
    request = world.signing_request(fleet.key, fleet.authority.subject_for(str(device.client_id)))
    begin = fleet.authority.certificate.not_valid_before_utc
    ended = fleet.authority.sign(request, not_before=begin - 3 * DAY, not_after=begin - DAY)
    old = world.key_file_content(fleet.key, request, ended if stored else b"")
    device.has(old)
    answers = [world.answer(200, ended)]
    with Scripted(
        fleet.authority.folder / "server.pem", answers, client_ca=fleet.authority.certificate_file
    ) as server:
        device.server = server.address
        run = device.run("--timeout=10", before=at(moment))
        shown = [asked for asked in server.requests if asked.client_certificate]
    wrong = _said(run, 127)
    if device.key_file.read_bytes() != old:
        wrong.append("the key file was changed")
    if shown:
        wrong.append("the certificate was used")
    return wrong


def server_ended_before_the_floor(fleet: Fleet, moment: Optional[datetime.datetime]) -> list[str]:
    """A server whose own certificate had ended before the floor is no server of ours."""
    begin = fleet.authority.certificate.not_valid_before_utc
    name = f"ended-{moment.year if moment else 0}.pem"
    pem = fleet.authority.server(not_before=begin - 3 * DAY, not_after=begin - DAY, file=name)
    dut = fleet.pending()
    with Scripted(pem, [answers.REJECTED]) as server:
        dut.device.server = server.address
        run = dut.run(before=at(moment))
        asked = len(server.requests)
    wrong = _said(run, 127) + (["it was asked"] if asked else [])
    if dut.content != dut.old:
        wrong.append("the key file was changed")
    return wrong


def signed_at(fleet: Fleet, begin: datetime.datetime) -> DeviceUnderTest:
    """A pending device for which the server has a certificate that begins then."""
    device, request, sha256 = fleet.enrolled()
    pem = fleet.sign(sha256, not_before=begin, not_after=world.now() + 5 * DAY)
    return fleet.dut(device, fleet.content(device, request), fleet.content(device, request, pem), 0)


def a_day_behind_but_past_the_floor(fleet: Fleet) -> list[str]:
    """The clock seems right, and the certificate isn't valid yet: it is taken, for it is the clock that is behind.

    The floor is the firmware's build, which may be a minute ago: here the rest of the world is a day ahead.
    """
    dut = signed_at(fleet, world.now() + DAY)
    run = dut.run()
    wrong = _said(run, 0) + fleet.broken(dut, run)
    if dut.content != dut.expected:
        wrong.append("the certificate isn't there")
    later = dut.run(before=at(world.now() + DAY + DAY / 24))
    wrong += _said(later, 0) + fleet.broken(dut, later)
    if dut.content != dut.expected:
        wrong.append("a day later the certificate isn't there")
    return wrong


# --- Each certificate of each chain

#: The certificates of the two chains below the CA.
LINKS = ("the server's", "the server's intermediate", "the device's", "the device's intermediate")
YEAR = datetime.timedelta(days=365)


class Chains:
    """A CA that is two years old, two intermediates under it, and what they sign: the server and the device."""

    def __init__(self, folder: Path, link: str, begin: datetime.datetime, end: datetime.datetime) -> None:
        """`link` is valid from `begin` to `end`, all others for two years around now."""
        now = world.now()
        self.root = Authority(folder, not_before=now - 2 * YEAR, not_after=now + 2 * YEAR, path_length=None)

        def dates(name: str) -> dict[str, Any]:
            usual = (now - YEAR, now + YEAR)
            return dict(zip(("not_before", "not_after"), (begin, end) if name == link else usual))

        servers, text = self.root.intermediate("Servers", **dates(LINKS[1]))
        self.pem = servers.server(file="below.pem", **dates(LINKS[0]))
        certificate, boundary, key = self.pem.read_bytes().partition(b"-----BEGIN PRIVATE KEY-----")
        self.pem.write_bytes(certificate + text + boundary + key)
        self._devices, self._text = self.root.intermediate("Devices", **dates(LINKS[3]))
        self._dates = dates(LINKS[2])

    def sign(self, request: bytes) -> bytes:
        """The device's certificate and its intermediate's."""
        return self._devices.sign(request, **self._dates) + self._text


#: The program as a package that no firmware's build time was baked into: nothing but certificates tells the time.
UNBAKED = [
    *world.WITHOUT_STARTER[:-1],
    "from caramel_embedded import settings\n"
    "from caramel_embedded.__main__ import main\n"
    "settings.baked = lambda name: None\n"
    "main()",
]

#: By the words for the device's clock: how many days it is behind the right time.
CLOCKS = {"1970": None, "300 days behind": 300, "20 days behind": 20, "right": 0}


def each_of_a_chain(fleet: Fleet, link: str, which: str, clock: str) -> Case:
    """One certificate of the chains hasn't begun by the device's clock, or has ended before a time that has certainly
    passed: before the CA began, or before the certificate that the device has."""

    def act() -> list[str]:
        now, behind = world.now(), CLOCKS[clock]
        moment = FIRST_BOOT if behind is None else now - DAY * behind
        dates = {
            "has just begun": (now - DAY / 24, now + 30 * DAY),
            "ended before the CA began": (now - 4 * YEAR, now - 3 * YEAR),
            "ended before the device's own began": (now - 200 * DAY, now - 100 * DAY),
            "ended by the clock": (now - 400 * DAY, now - DAY / 24),
        }[which]
        device = fleet.device()
        chains = Chains(device.folder / "ca", link, *dates)
        device.ca, device.command = chains.root.certificate_file, UNBAKED
        request = world.signing_request(fleet.key, chains.root.subject_for(str(device.client_id)))
        # What the device has began 50 days ago: that is the floor, unless the clock is past it.
        held = chains.root.sign(request, not_before=now - 50 * DAY, not_after=now + 9 * DAY)
        # In one case it has none, and the CA's beginning is the floor.
        content = world.key_file_content(fleet.key, request, b"" if "the CA" in which else held)
        device.has(world.sealed(content, chains.root.pem, str(device.client_id)))
        old = device.key_file.read_bytes()
        # What ended an hour ago is good for a clock that is behind that.
        good = which == "has just begun" or (which == "ended by the clock" and behind != 0)
        pem = chains.sign(request)
        with Scripted(chains.pem, [answers.certificate(pem)]) as server:
            device.server = server.address
            run = device.run("--timeout=20", before=at(moment))
            asked = len(server.requests)
        wrong = _said(run, 0 if good else 127)
        if good and pem not in device.key_file.read_bytes():
            wrong.append("the certificate isn't there")
        if not good and device.key_file.read_bytes() != old:
            wrong.append("the key file was changed")
        if not good and link in LINKS[:2] and asked:
            wrong.append("it was asked")
        return wrong

    return Case(f"{link} {which}, the clock is {clock}", act)


def chains(fleet: Fleet) -> list[Case]:
    """Every certificate of both chains, in every way, by every clock."""
    ways = (
        "has just begun",
        "ended by the clock",
        "ended before the CA began",
        "ended before the device's own began",
    )
    return [each_of_a_chain(fleet, link, which, clock) for link in LINKS for which in ways for clock in CLOCKS]


def jump(fleet: Fleet, name: str, start: datetime.datetime, to: datetime.datetime, statuses: Sequence[int]) -> Case:
    """The clock is set at the moment when the server has received the request."""

    def act() -> list[str]:
        dut = fleet.renewal()
        parts = key_file_parts(dut.expected or b"")
        assert parts is not None and parts.certificate is not None
        certificate = parts.certificate
        offset = dut.device.folder / "clock"

        def set_clock(moment: datetime.datetime) -> None:
            draft = offset.with_suffix(".new")
            draft.write_text(f"{int(moment.timestamp() - time.time()):+d}s\n")
            os.replace(draft, offset)

        def answer(asked: HttpRequest) -> bytes:
            set_clock(to)
            time.sleep(0.05)
            return world.answer(200, certificate)

        set_clock(start)
        library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
        environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(offset),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }
        real, certificate_file = dut.device.server, fleet.authority.folder / "server.pem"
        with Scripted(certificate_file, answer) as server:
            dut.device.server = server.address
            run = dut.run(env=environment)
            wrong = [] if len(server.requests) >= 1 or 127 in statuses else ["the server was never asked"]
        dut.device.server = real
        if run.status not in statuses:
            wrong.append(f"exit status {run.status}, not among {statuses}: {run.err[-250:]!r}")
        if dut.content not in (dut.old, dut.expected):
            wrong.append("the key file is neither old nor new")
        return wrong + [f"next: {problem}" for problem in fleet.recovered(dut)]

    return Case(f"the clock jumps during the run, {name}", act)


def cases(fleet: Fleet) -> list[Case]:
    """Everything about clocks."""
    now = world.now()

    def renewed_now() -> DeviceUnderTest:
        """The CA is older than a day; the certificate in the file began an hour ago, and the server's begins now."""
        dut = signed_at(fleet, world.now())
        parts = key_file_parts(dut.expected or b"")
        assert parts is not None
        earlier = fleet.authority.sign(parts.request, not_before=world.now() - DAY / 24, not_after=world.now() + DAY)
        dut.old = fleet.content(dut.device, parts.request, earlier)
        dut.device.key_file.write_bytes(dut.old)
        return dut

    behind, ahead = now - DAY, now + DAY
    simple = [
        ("a day behind, before the floor: first enrollment", fleet.first_enrollment, behind, 69),
        ("a day behind, before the floor that the stored certificate sets: renewal", renewed_now, behind, 0),
        ("a day behind: unchanged", fleet.certified, behind, 0),
        ("a day behind: rejection", fleet.rejection, behind, 69),
        ("a day ahead: first enrollment", fleet.first_enrollment, ahead, 69),
        ("a day ahead: first certificate", fleet.first_certificate, ahead, 0),
        ("a day ahead: renewal", fleet.renewal, ahead, 0),
        ("a day ahead: a bad file", fleet.bad_file, ahead, 69),
        ("1970: renewal", fleet.renewal, FIRST_BOOT, 0),
        ("1970: unchanged", fleet.certified, FIRST_BOOT, 0),
        ("1970: pending", fleet.pending, FIRST_BOOT, 69),
        ("1970: a bad file", fleet.bad_file, FIRST_BOOT, 69),
        ("2080: first enrollment", fleet.first_enrollment, FAR, 127),
        ("2080: first certificate", fleet.first_certificate, FAR, 127),
        ("2080: unchanged", fleet.certified, FAR, 127),
        ("2080: renewal", fleet.renewal, FAR, 127),
        ("2080: rejection", fleet.rejection, FAR, 127),
        ("2080: a bad file", fleet.bad_file, FAR, 127),
    ]
    found = [set_to(fleet, *each) for each in simple]
    found.append(Case("1970: a whole life", partial(life_in_1970, fleet)))
    found.append(Case("a day behind, past the floor", partial(a_day_behind_but_past_the_floor, fleet)))
    moments = {"the right time": None, "1970": FIRST_BOOT, "a day behind": behind, "2080": FAR}
    for name, moment in moments.items():
        if name != "2080":  # then the server's certificate has ended, too
            for signed, words in ((True, "a newer certificate"), (False, "none")):
                what = f"slept for a year, {name}, the server has {words}"
                found.append(Case(what, partial(slept_for_a_year, fleet, moment, signed)))
        for stored, where in ((True, "in the file"), (False, "from the server")):
            what = f"ended before the floor, {name}, {where}"
            found.append(Case(what, partial(ended_before_the_floor, fleet, moment, stored)))
        what = f"a server that ended before the floor, {name}"
        found.append(Case(what, partial(server_ended_before_the_floor, fleet, moment)))
    found += [
        jump(fleet, "from 1970 to now", FIRST_BOOT, now, (0, 127)),
        jump(fleet, "from now to 1970", now, FIRST_BOOT, (0, 127)),
        jump(fleet, "from now to 2080", now, FAR, (0, 127)),
        jump(fleet, "from 1970 to 2080", FIRST_BOOT, FAR, (0, 127)),
        jump(fleet, "a day back", now, behind, (0, 127)),
        jump(fleet, "a day forward", now, ahead, (0, 127)),
    ]
    return found
