# SPDX-License-Identifier: MIT OR Apache-2.0
"""The pauses and limits of a device, read from the scripts and units that ship.

Nothing here has a default of its own: a script that no longer says what is looked for is an error, so that the
simulation can't go on with figures that nobody ships. Times are seconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from world import ROOT

SYSTEMD, BUSYBOX = "systemd", "BusyBox"
_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "hr": 3600.0}


@dataclass(frozen=True)
class Pace:
    """When a device checks; each time is in seconds.

    Attributes:
        kind: `SYSTEMD` or `BUSYBOX`.
        after_boot, boot_spread: the first start comes so long after the boot, and by chance up to so much later.
        spread: how long a device that has a usable certificate waits, at most, before its first check, where it was
            started within as long of the boot.
        least_spread: how long it waits, at most, where it was started later.
        first, most: the first and the longest pause between checks that fail.
        unhurried: the first one of a device that has a usable certificate.
        chance: "any": by chance a pause is anything up to twice as long, and where the server has a wish, up to as
            much again is added to that; "rest": up to as much again is added to each; "delay": up to as much as the
            pause would be without the server's wish. The last two are what once was.
        later_spread: within how long after each full hour the timer starts the later checks; cron's minute where it
            is 0.
        timeout: of one run.
    """

    kind: str
    after_boot: float
    boot_spread: float
    spread: int
    least_spread: int
    first: int
    unhurried: int
    most: int
    chance: str
    later_spread: float
    timeout: float

    def pause(self, delay: int, retry_after: Optional[int], number: int) -> int:
        """The pause of until-enrolled after a check that failed; `number` is what chance gave."""
        if self.chance == "any" and not retry_after:
            return 1 + number % (2 * delay)
        rest = max(delay, retry_after or 0)
        return rest + number % (min(rest, max(self.most, delay)) if self.chance != "delay" else delay)

    def wait(self, up: float, number: int) -> int:
        """The wait before the first check of a start, `up` seconds after the boot, of a device with a certificate."""
        left = self.spread if up < self.spread else min(self.spread, self.least_spread)
        return number % left if left else 0

    def longer(self, delay: int) -> int:
        """The pause that comes after `delay`."""
        return min(2 * delay, self.most)


def _found(pattern: str, text: str, where: Path) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if not found:
        raise ValueError(f"{where.name} doesn't say {pattern!r}")
    return found[1]


def duration(text: str) -> float:
    """Seconds of a time span such as 1min (systemd.time(7))."""
    found = re.fullmatch(r"([0-9.]+) ?([a-z]*)", text.strip())
    if not found or found[2] not in _UNITS:
        raise ValueError(f"no time span: {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def shipped(kind: str, root: Path = ROOT) -> Pace:
    """What a device of this kind does by the files below `root`. Raises ValueError where one doesn't say it."""
    script = root / "packaging/libexec/until-enrolled"
    text = script.read_text()
    first, most = (
        int(_found(rf'^{name}=\$\(seconds "\$\{{{setting}-\}}" ([0-9]+) 1\)', text, script))
        for name, setting in (("delay", "RETRY_FIRST"), ("most", "RETRY_MAX"))
    )
    least = int(_found(r'"\$most_wait" -gt ([0-9]+) \]; then\n\t\tmost_wait=\1$', text, script))
    quarter = int(_found(r"\|\| delay=\$\(\(most / ([0-9]+)\)\)$", text, script))
    chance = _found(r"^\t+more=\$(rest|delay)$", text, script)
    if 'next=$((1 + $(random "$((2 * delay))" "$id")))' in text:
        chance = "any"
    program = root / "caramel_embedded/settings.py"
    timeout = float(_found(r"^TIMEOUT(?:: \w+)? = ([0-9.]+)", program.read_text(), program))
    if kind == BUSYBOX:
        script = root / "packaging/libexec/keep-enrolled"
        text = script.read_text()
        spread = int(_found(r"^SPREAD=\$\{SPREAD:-([0-9]+)\} ", text, script))
        _found(r"(% 60)", text, script)
        return Pace(kind, 0.0, 0.0, spread, least, first, max(first, most // quarter), most, chance, 0.0, timeout)
    unit = root / "packaging/systemd/caramel-embedded.service"
    text = unit.read_text()
    first = int(_found(r"^Environment=.*\bRETRY_FIRST=([0-9]+)", text, unit))
    most = int(_found(r"^Environment=.*\bRETRY_MAX=([0-9]+)", text, unit))
    spread = int(_found(r"^Environment=.*\bSPREAD=([0-9]+)", text, unit))
    boot, hourly = (root / f"packaging/systemd/caramel-embedded{name}.timer" for name in ("-boot", ""))
    _found(r"^(OnCalendar=hourly)$", hourly.read_text(), hourly)
    return Pace(
        kind,
        duration(_found(r"^OnBootSec=(.*)", boot.read_text(), boot)),
        duration(_found(r"^RandomizedDelaySec=(.*)", boot.read_text(), boot)),
        spread,
        least,
        first,
        max(first, most // quarter),
        most,
        chance,
        duration(_found(r"^RandomizedDelaySec=(.*)", hourly.read_text(), hourly)),
        timeout,
    )
