# SPDX-License-Identifier: MIT OR Apache-2.0
"""From the measured figures of one check to what a fleet costs its server: docs/fleet.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import OURS, table

Figures = dict[str, Any]

FLEETS = (1_000, 90_000, 1_000_000)
#: Hours of a month: 365.25 days of 24 hours, by 12.
MONTH = 730.5
#: Bytes of TCP and IPv4 headers of a packet, without options.
HEADERS = 40
#: How busy a server may be for its queue to stay short.
BUSY = 0.7
#: Seconds that a device waits for an answer: the default of --timeout.
PATIENCE = 60
#: Seconds within which a fleet checks after a power cut, and what they stand for.
SPREADS = (
    (10, "10 s, no spread: boots differ a little"),
    (60, "1 minute, as our timer for the boot"),
    (300, "5 minutes, as our init script for the boot"),
    (3600, "1 hour, as our hourly timer"),
    (21600, "6 hours"),
)
KINDS = (("plain", "as most are"), ("filter", "with the filter"), ("metered", "filter, metered nginx"))


def _thousands(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return _thousands(value)
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{_number(value / size)} {unit}"
    return f"{value:.0f} B"


def _time(seconds: float) -> str:
    for unit, size in (("days", 172800.0), ("h", 7200.0), ("min", 120.0)):
        if seconds >= size:
            return f"{_number(seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit])} {unit}"
    return f"{_number(seconds)} s"


def page(seen: Figures) -> str:
    """docs/fleet.md."""
    wires = {kind: seen["wire"][kind].get(OURS) or seen["wire"][kind]["urllib3 floor"] for kind, _ in KINDS}
    payload = {kind: wire["up"] + wire["down"] for kind, wire in wires.items()}
    total = {kind: payload[kind] + HEADERS * wires[kind]["packets"] for kind in payload}
    server = {kind: (seen["server"][kind]["nginx"], seen["server"][kind]["caramel"]) for kind, _ in KINDS}
    row = seen["server"]["plain"]["row"]
    one = table(
        ["one unchanged check", *(name for _, name in KINDS)],
        [
            ["bytes up + down (payload)", *(f"{wires[k]['up']} + {wires[k]['down']}" for k, _ in KINDS)],
            ["packets", *(str(wires[k]["packets"]) for k, _ in KINDS)],
            [f"bytes with headers ({HEADERS} a packet)", *(str(total[k]) for k, _ in KINDS)],
            ["nginx, ms", *(f"{server[k][0]:.2f}" for k, _ in KINDS)],
            ["Caramel, ms", *(f"{server[k][1]:.2f}" for k, _ in KINDS)],
            ["answer", *(f"{seen['server'][k]['answer']:.0f}" for k, _ in KINDS)],
        ],
    )
    months: list[list[str]] = []
    for devices in FLEETS:
        for every, hours in (("an hour", 1), ("a day", 24)):
            checks = devices * MONTH / hours
            months.append(
                [
                    f"{_thousands(devices)} devices, one check {every}",
                    f"{_number(checks / 1e6)} million",
                    *(_bytes(checks * total[kind]) for kind, _ in KINDS),
                    *(f"{_number(checks * sum(server[kind]) / 3.6e6)} h" for kind in ("plain", "filter")),
                    f"{_number(devices / hours / 3600 * sum(server['filter']) / 10)} %",
                    _bytes(checks * row),
                ]
            )
    monthly = table(
        [
            "",
            "checks a month",
            *(f"bytes, {name}" for _, name in KINDS),
            "processor",
            "with filter",
            "of one core",
            "log",
        ],
        months,
    )
    caramel = 1 / seen["capacity"]  # seconds
    rates: list[list[str]] = []
    for devices in FLEETS:
        for spread, name in SPREADS:
            load, served, last = after_power_cut(devices, spread, caramel)
            rates.append(
                [
                    _thousands(devices),
                    name,
                    _number(devices / spread),
                    f"{_number(100 * load)} %",
                    f"{_number(100 * served)} %",
                    _time(last) if load > 1 else "none",
                ]
            )
    storm = table(
        [
            "devices",
            "checks come within",
            "checks a second",
            "Caramel busy",
            f"answered within {PATIENCE} s",
            "longest queue",
        ],
        rates,
    )
    needed = table(
        ["devices", "work", f"spread for {100 * BUSY:.0f} % of one process", "with four processes"],
        [
            [
                _thousands(devices),
                _time(devices * caramel),
                _time(devices * caramel / BUSY),
                _time(devices * caramel / BUSY / 4),
            ]
            for devices in FLEETS
        ],
    )
    hourly = 90_000 * MONTH
    machine = seen["machine"]
    return (
        (Path(__file__).parent / "fleet.md.in")
        .read_text()
        .format(
            program=seen["measured with"],
            processor=machine["processor"],
            kernel=machine["kernel"],
            nginx=machine["nginx"],
            one=one,
            monthly=monthly,
            month=MONTH,
            checks=_number(hourly / 1e6),
            bytes_plain=total["plain"],
            bytes_metered=total["metered"],
            month_plain=_bytes(hourly * total["plain"]),
            month_metered=_bytes(hourly * total["metered"]),
            nginx_plain=f"{server['plain'][0]:.2f}",
            caramel_plain=f"{server['plain'][1]:.2f}",
            nginx_filter=f"{server['filter'][0]:.2f}",
            caramel_filter=f"{server['filter'][1]:.2f}",
            hours_plain=_number(hourly * sum(server["plain"]) / 3.6e6),
            hours_filter=_number(hourly * sum(server["filter"]) / 3.6e6),
            device_plain=_bytes(MONTH * total["plain"]),
            device_metered=_bytes(MONTH * total["metered"]),
            row=f"{row:.0f}",
            rate=_number(1 / caramel),
            work=_number(1000 * caramel),
            patience=PATIENCE,
            storm=storm,
            burst_some=_thousands(FLEETS[1] / 60),
            burst_some_time=_time(FLEETS[1] / 60 * caramel),
            burst_many=_thousands(FLEETS[2] / 60),
            burst_many_time=_time(FLEETS[2] / 60 * caramel),
            busy=f"{100 * BUSY:.0f} %",
            share=BUSY,
            needed=needed,
        )
    )


def after_power_cut(devices: int, spread: float, work: float) -> tuple[float, float, float]:
    """How busy one process is, which share is answered in time, and the longest wait in seconds.

    `devices` come evenly within `spread` seconds, each with `work` seconds of work.
    """
    load = devices * work / spread
    if load <= 1:
        return load, 1.0, 0.0
    in_time = min(1.0, PATIENCE / (load - 1) / spread)
    return load, in_time, devices * work - spread
