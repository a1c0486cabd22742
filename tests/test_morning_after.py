"""A town has lost its power, and all devices boot within the same minute: the pauses that ship make no herd of them.

The fleet here is arithmetic. Its pauses are those of until-enrolled, which runs beside it with the same chance; its
settings are read from what ships. docs/morning-after.md has what was measured and simulated when they were chosen.
"""

from __future__ import annotations

import heapq
import random
import re
import subprocess
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple, Optional

import pytest
import world
from needs import needs

LIBEXEC, UNITS = world.ROOT / "packaging/libexec", world.ROOT / "packaging/systemd"
#: One run's limit, and the minute within which all devices boot; seconds.
TIMEOUT, BOOT = 60.0, 60.0


class Pace(NamedTuple):
    """Seconds of what ships: the spread after a boot, the first and the longest pause between checks that fail."""

    spread: int
    first: int
    most: int


def found(path: Path, pattern: str) -> int:
    match = re.search(pattern, path.read_text(), re.MULTILINE)
    assert match, f"{path.name} doesn't say {pattern!r}"
    return int(match[1])


def shipped(kind: str) -> Pace:
    if kind == "systemd":
        unit = UNITS / "caramel-embedded.service"
        return Pace(
            *(found(unit, rf"^Environment=.*\b{name}=(\d+)") for name in ("SPREAD", "RETRY_FIRST", "RETRY_MAX"))
        )
    script = LIBEXEC / "until-enrolled"
    pauses = [found(script, rf'"\$\{{{name}-\}}" (\d+) 1\)') for name in ("RETRY_FIRST", "RETRY_MAX")]
    return Pace(found(LIBEXEC / "keep-enrolled", r"^(?:export )?SPREAD=\"?\$\{SPREAD:-(\d+)\}"), *pauses)


def pause(delay: int, wish: Optional[int], number: int, most: int = 3600) -> int:
    """The pause of until-enrolled after a check that failed; `number` is what chance gave, `wish` the Retry-After."""
    if not wish:
        return 1 + number % (2 * delay)
    rest = max(delay, wish)
    return rest + number % min(rest, max(most, delay))


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@needs("dash")
@pytest.mark.parametrize(
    ("number", "up"), [(0, 0), (59, 3599), (123_456_789, 100_000), (4_294_967_295, 3600), (2_147_483_647, 7)]
)
def test_the_script_pauses_as_the_fleet_of_this_file(tmp_path: Path, number: int, up: int) -> None:
    """The script itself, with stand-ins for chance, sleep and the program; pause by pause."""
    pace = shipped("BusyBox")
    wishes: list[Optional[int]] = [None, 700, None, 86400, *[None] * 8]
    script(tmp_path, "chance", f'random() {{ echo "$(({number} % ($1 > 0 ? $1 : 1)))"; }}')
    script(tmp_path, "sleep", f"echo $1 >>{tmp_path}/slept")
    plan = "".join(f'{{"status": 127, "retry_after": {"null" if wish is None else wish}}}\n' for wish in wishes)
    (tmp_path / "plan").write_text(plan + '{"status": 0, "retry_after": null}\n')
    script(
        tmp_path,
        "program",
        f'case "$*" in *--status*) exit 0 ;; esac\ncd {tmp_path}; head -n 1 plan; '
        'grep -q \'status": 0\' plan && status=$(wc -l <plan); sed -i 1d plan; [ "${status-}" = 1 ]',
    )
    (tmp_path / "uptime").write_text(f"{up}.42 1.00\n")
    text = (LIBEXEC / "until-enrolled").read_text()
    assert "/proc/uptime" in text
    script(tmp_path, "until-enrolled", text.replace("/proc/uptime", str(tmp_path / "uptime")))
    environ = world.environment(CARAMEL_EMBEDDED=str(tmp_path / "program"), SPREAD=str(pace.spread))
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    subprocess.run(["dash", str(tmp_path / "until-enrolled")], env=environ, check=True, timeout=60)

    slept = [int(line) for line in (tmp_path / "slept").read_text().splitlines()]
    expected, delay = [], pace.most // 4
    for wish in wishes:
        expected.append(pause(delay, wish, number, pace.most))
        delay = min(2 * delay, pace.most)
    assert slept[-len(wishes) :] == expected
    assert sum(slept[: -len(wishes)]) == number % (pace.spread if up < pace.spread else 60)


class Morning(NamedTuple):
    """What came of it: devices that were served, the share of runs that failed, runs begun in each two minutes."""

    served: int
    failures: float
    begun: list[int]


def morning(
    pace: Pace,
    work: float,
    room: int,
    until: float,
    *,
    devices: int = 2000,
    certified: bool = True,
    rate: Optional[float] = None,
    wish: Optional[int] = None,
) -> Morning:
    """A server that works `work` seconds for a check, one at a time, and has room for so many that wait.

    Whoever finds no room fails at once, whoever waits for longer than a minute fails then, and is worked for all the
    same. With `rate`, more checks than that in a second are told to come back after `wish`.
    """
    chance = random.Random(1)
    starts = [
        (chance.random() * BOOT + (chance.random() * pace.spread if certified else 0), n) for n in range(devices)
    ]
    heapq.heapify(starts)
    delays = [max(pace.first, pace.most // 4) if certified else pace.first] * devices
    ends: deque[float] = deque()
    served, failed, let, begun = set(), 0, 0.0, [0] * (int(until / 120) + 1)
    runs = 0
    while starts and starts[0][0] < until:
        at, device = heapq.heappop(starts)
        runs += 1
        begun[int(at / 120)] += 1
        while ends and ends[0] <= at:
            ends.popleft()
        told = rate is not None and let > at + 5 / rate
        over, good = at, False
        if not told and len(ends) < room:
            let = max(let, at) + 1 / rate if rate else 0
            ends.append((max(at, ends[-1]) if ends else at) + work)
            over, good = min(ends[-1], at + TIMEOUT), ends[-1] <= at + TIMEOUT
        if good:
            served.add(device)
            if certified:
                heapq.heappush(starts, (over + 3600 * (0.5 + chance.random()), device))
            continue
        failed += 1
        number = chance.getrandbits(32)
        heapq.heappush(starts, (over + pause(delays[device], wish if told else None, number, pace.most), device))
        delays[device] = min(2 * delays[device], pace.most)
    return Morning(len(served), failed / runs, begun)


@pytest.mark.parametrize("kind", ["BusyBox", "systemd"])
def test_a_server_that_can_bear_every_hour_can_bear_the_morning_after(kind: str) -> None:
    """A server that the hourly checks of this fleet keep busy to 70 %."""
    devices, pace = 3000, shipped(kind)
    work = 0.7 * 3600 / devices
    seen = morning(pace, work, 43, 3 * 3600, devices=devices)
    assert seen.served == devices
    assert seen.failures < 0.05
    assert max(seen.begun) < 1.3 * 120 / work


@pytest.mark.parametrize("kind", ["BusyBox", "systemd"])
def test_without_certificates_all_are_served_in_the_end_and_retries_do_not_come_in_waves(kind: str) -> None:
    assert morning(shipped(kind), 0.35, 12, 4 * 3600, certified=False).served == 2000
    begun = morning(shipped(kind), 0.35, 12, 3000, devices=6000, certified=False).begun[1:-1]
    assert max(later / max(earlier, 1) for n, earlier in enumerate(begun) for later in begun[n:]) < 3


def test_those_sent_away_together_do_not_come_back_together() -> None:
    """A server that takes ten checks in 100 s sends the others away for 25 min: 27 come in the worst two minutes.

    With a chance as long as the first pause, and not as long as what the server asked for, 177 do.
    """
    sent_away: dict[str, Any] = {"devices": 200, "certified": False, "rate": 0.1, "wish": 1500}
    assert max(morning(shipped("BusyBox"), 0.05, 24, 7200, **sent_away).begun[5:]) < 60


@pytest.mark.parametrize(
    ("timer", "lines"),
    [
        ("caramel-embedded-boot.timer", ["OnBootSec=1s", "RandomizedDelaySec=1min"]),
        ("caramel-embedded.timer", ["OnCalendar=hourly", "RandomizedDelaySec=1h"]),
    ],
)
def test_the_timers_spread_what_the_script_does_not(timer: str, lines: list[str]) -> None:
    assert set(lines) <= set((UNITS / timer).read_text().splitlines())
