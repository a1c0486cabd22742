# SPDX-License-Identifier: MIT OR Apache-2.0
"""From the figures of `morning` to docs/morning-after.md and its pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, Optional

from bench.report import table

Figures = dict[str, Any]

#: Names of scenarios, and how the page calls them.
SCENARIOS = (
    ("before", "before: one minute or five of spread"),
    ("no spread", "without any spread"),
    ("now", "as it ships"),
    ("half", "as it ships, server at half of its capacity"),
    ("late", "as it ships, server an hour late"),
    ("no certificate", "no device has a usable certificate"),
    ("no certificate, Retry-After", "the same, and nginx says Retry-After"),
)
COLORS = ("#c0392b", "#1f6feb", "#777777")
KIND = "systemd"


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _time(seconds: Optional[float]) -> str:
    if seconds is None:
        return "not in 4 h"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _seconds(seconds: Optional[float]) -> str:
    return "never" if seconds is None else f"{seconds:.0f} s"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"


def _of(seen: Figures, name: str, devices: int, kind: str = KIND) -> Figures:
    (found,) = (
        one for one in seen["mornings"] if (one["name"], one["devices"], one["kind"]) == (name, devices, kind)
    )
    return dict(found)


def page(seen: Figures) -> str:
    """docs/morning-after.md."""
    cost, small, compared, pace = seen["cost"], seen["small"], seen["compared"], seen["pace"]
    parts = []
    head = ["systemd / BusyBox", "half are served after", "99 %", "runs with 127", "busiest minute, checks/s"]
    for devices in (1_000, 90_000, 1_000_000):
        one = _of(seen, "now", devices)
        rows = []
        for name, title in SCENARIOS:
            both = [_of(seen, name, devices, kind) for kind in ("systemd", "BusyBox")]
            rows.append(
                [
                    title,
                    *(
                        " / ".join(values)
                        for values in (
                            [_time(each["served"]["0.5"]) for each in both],
                            [_time(each["served"]["0.99"]) for each in both],
                            [_share(each["failures"]) for each in both],
                            [_number(each["peak"]) for each in both],
                        )
                    ),
                ]
            )
        parts.append(
            f"**{_number(devices)} devices**, {devices / 3600:.3g} checks a second on average, a server of "
            f"{one['cores']} core{'s' if one['cores'] > 1 else ''} that can do {_number(one['capacity'])}:\n\n"
            + table(head, rows)
        )
    names = dict(SCENARIOS)
    unserved = [
        f"{_number(one['devices'])} devices, {one['kind']}, {names[one['name']]}: {_share(1 - one['share'])}"
        for one in seen["mornings"]
        if one["share"] < 0.999
    ]
    return (
        (Path(__file__).parent / "morning.md.in")
        .read_text()
        .format(
            processor=seen["machine"]["processor"],
            kernel=seen["machine"]["kernel"],
            nginx=seen["machine"]["nginx"],
            front=f"{1000 * cost['front']:.1f}",
            back=f"{1000 * cost['back']:.1f}",
            turned_away=f"{1000 * cost['turned_away']:.2f}",
            left=cost["for who has left"],
            mornings="\n".join(parts),
            unserved=textwrap.fill(
                "After four hours, more than one device of a thousand was still waiting in these: "
                + ("; ".join(unserved) or "none")
                + ".",
                118,
            ),
            devices=_number(small["devices"]),
            programs=_number(small["programs"]),
            boots=_seconds(max(_begun(small).values())),
            pauses=small["pace"]["chance"],
            runs=_number(compared["runs"]),
            seconds=_number(small["seconds"]),
            slow=f"{sum(small['rates']) / len(small['rates']):.1f}",
            rates=" and ".join(f"{rate:.1f}" for rate in small["rates"]),
            served=_number(len(compared["first"])),
            served_foreseen=_number(len(compared["foreseen"])),
            half=_seconds(_at(compared["first"], small["devices"])),
            half_foreseen=_seconds(_at(compared["foreseen"], small["devices"])),
            failures=_share(compared["failures"]),
            failures_foreseen=_share(compared["failures foreseen"]),
            distance=_share(compared["distance"]),
            spread=pace["systemd"]["spread"],
            unhurried=pace["systemd"]["unhurried"],
            boot_spread=f"{pace['systemd']['boot_spread']:.0f}",
            first=pace["systemd"]["first"],
            most=pace["systemd"]["most"],
            timeout=f"{pace['systemd']['timeout']:.0f}",
        )
    )


def _begun(small: Figures) -> dict[int, float]:
    """When each device of the small fleet began its first run."""
    begun: dict[int, float] = {}
    for at, device, status in small["events"]:
        if status is None:
            begun.setdefault(device, at)
    return begun


def _at(first: Sequence[float], devices: int, share: float = 0.5) -> Optional[float]:
    number = round(share * devices) - 1
    return sorted(first)[number] if number < len(first) else None


Line = tuple[str, str, Sequence[tuple[float, float]]]


def _panel(title: str, x: str, y: str, lines: Sequence[Line], top: int, most_x: float, most_y: float) -> str:
    """A diagram of lines; each is a name, a color and points."""
    left, width, height = 80, 560, 190
    bottom = top + height
    parts = [
        f'<text x="10" y="{top - 14}" class="title">{escape(title)}</text>',
        f'<path d="M{left} {top}V{bottom}H{left + width}" class="axis"/>',
        f'<text x="{left + width}" y="{bottom + 30}" class="end">{escape(x)}</text>',
        f'<text x="{left}" y="{top - 2}" class="small">{escape(y)}</text>',
    ]
    for step in range(5):
        at, value = left + width * step / 4, most_x * step / 4
        parts.append(f'<text x="{at:.0f}" y="{bottom + 15}" class="middle">{value:g}</text>')
        at, value = bottom - height * step / 4, most_y * step / 4
        parts.append(f'<text x="{left - 6}" y="{at + 4:.0f}" class="end">{_number(value)}</text>')
    for number, (name, color, points) in enumerate(lines):
        shape = " ".join(
            f"{left + width * min(px, most_x) / most_x:.1f},{bottom - height * min(py, most_y) / most_y:.1f}"
            for px, py in points
            if px <= most_x
        )
        parts.append(f'<polyline points="{shape}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        at = top + 12 + 15 * number
        parts.append(f'<text x="{left + width - 6}" y="{at}" class="end" fill="{color}">{escape(name)}</text>')
    return "\n".join(parts)


def _picture(title: str, panels: Sequence[str], height: int) -> str:
    style = (
        "text{font:12px sans-serif}.title{font-weight:bold;font-size:13px}.end{text-anchor:end}"
        ".middle{text-anchor:middle}.small{font-size:11px}.axis{fill:none;stroke:#333}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{height}" viewBox="0 0 680 {height}">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n"
        f'<rect width="680" height="{height}" fill="#fff"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def loads(seen: Figures, devices: int = 1_000_000) -> str:
    """docs/morning-after.svg: checks a second over the hours."""
    panels = []
    top = 40
    groups = (
        ("Before: the first checks come within two minutes", ("before",), 1.0),
        ("As it ships: within an hour", ("now",), 4.0),
        ("As it ships, and the server is an hour late", ("late",), 4.0),
        ("No device has a usable certificate", ("no certificate", "no certificate, Retry-After"), 4.0),
    )
    for title, names, hours in groups:
        lines: list[Line] = []
        capacity = _of(seen, names[0], devices)["capacity"]
        highest = capacity
        for name, color in zip(names, COLORS):
            one = _of(seen, name, devices)
            points = [(minute / 60, rate) for minute, rate in enumerate(one["begun"])]
            lines.append(("checks that begin" + (", Retry-After" if "Retry" in name else ""), color, points))
            highest = max(highest, *(rate for at, rate in points if at <= hours))
        lines.append(("what the server can do", COLORS[2], [(0, capacity), (hours, capacity)]))
        panels.append(
            _panel(title, "hours after the power is back", "checks a second", lines, top, hours, _round(highest))
        )
        top += 255
    return _picture(f"Checks a second of {_number(devices)} devices after a power cut", panels, top - 20)


def curves(seen: Figures) -> str:
    """docs/morning-after-real.svg: the small fleet, real and simulated."""
    small, compared = seen["small"], seen["compared"]
    lines: list[Line] = []
    for name, color, first in (
        ("real", COLORS[0], compared["first"]),
        ("simulated", COLORS[1], compared["foreseen"]),
    ):
        times = range(0, int(small["seconds"]) + 1, 5)
        lines.append((name, color, [(t, sum(at <= t for at in first)) for t in times]))
    panel = _panel(
        f"{_number(small['devices'])} devices, and a server that was made slow", "seconds",
        "devices that were served", lines, 40, _round(small["seconds"]), small["devices"],
    )  # fmt: skip
    return _picture("A small fleet, real and simulated", [panel], 275)


def _round(value: float) -> float:
    """The next number that divides into four nicely."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * nice for nice in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if power * nice >= value)
