# SPDX-License-Identifier: MIT OR Apache-2.0
"""`make morning-after`: measures the server, lets a small fleet come back to it, and simulates large ones.

The figures go to build/morning/, one file for each stage, and from there to docs/morning-after.md and its pictures.
Ends with 1 where the simulation didn't foresee what the small fleet did.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Callable

import world

from fleet import morning_report, morning_server
from fleet.morning_model import Machine, Scenario, simulate
from fleet.morning_pace import BUSYBOX, SYSTEMD, Pace, shipped

Figures = dict[str, Any]

FLEETS = (1_000, 90_000, 1_000_000)
#: How many devices a simulation has at most, of a storm and else; in larger fleets each of them stands for some. What
#: goes on in a storm takes long to simulate, and doesn't depend on single devices.
STORM, SIMULATED = 5_000, 15_000
#: How busy the hourly checks may keep a server: what the number of cores follows from.
BUSY = 0.7
#: Connections of one nginx worker on Debian (worker_connections), and there is one for each core.
CONNECTIONS = 768
#: What nginx is told in the scenario with Retry-After, seconds; and which share of what it can do it lets through.
RETRY_AFTER, LET_THROUGH = 900, 0.8
#: The small fleet: devices, seconds within which they boot, seconds of the slowed server for a check, nginx's
#: connections, seconds after which it ends.
SMALL = {"devices": 2000, "boots_within": 120.0, "hold": 0.2, "room": 128, "limit": 540.0}
#: How far the simulation may be from the small fleet: the largest distance of the two curves of those that were
#: served, and the shares of runs that end in 127; both of one.
TOLERANCE = 0.1


def before(pace: Pace) -> Pace:
    """As it was until this was looked at: 2.0.0's first state."""
    spread = 60 if pace.kind == SYSTEMD else 300
    return dataclasses.replace(pace, spread=spread, least_spread=spread, unhurried=pace.first, chance="delay")


def together(pace: Pace) -> Pace:
    """Without any spread at boot."""
    return dataclasses.replace(before(pace), boot_spread=0.0, spread=0)


def server(devices: int, cost: dict[str, float], share: float = 1.0) -> Machine:
    """The server that the hourly checks of this fleet need, or what `share` of its capacity is left of it."""
    work = cost["front"] + cost["back"]
    cores = max(1, math.ceil(devices / 3600 * work / BUSY))
    back = cost["back"] / share
    return Machine(
        cores, cores, cost["front"] / share, lambda chance: back, cost["turned_away"] / share, CONNECTIONS * cores
    )


def scenario(name: str, kind: str, devices: int, cost: dict[str, float]) -> Scenario:
    """One of `morning_report.SCENARIOS`."""
    pace, machine, certified = shipped(kind), server(devices, cost), "no certificate" not in name
    capacity = machine.cores / (cost["front"] + cost["back"])
    if name.startswith("before"):
        pace = before(pace)
    if name.startswith("no spread"):
        pace = together(pace)
    if name.startswith("half"):
        machine = server(devices, cost, 0.5)
    if name.startswith("late"):
        machine = dataclasses.replace(machine, back_from=3600.0)
    if name.endswith("Retry-After"):
        rate = LET_THROUGH * capacity
        machine = dataclasses.replace(machine, rate=rate, burst=math.ceil(2 * rate), retry_after=RETRY_AFTER)
    calm = name in ("now", "half", "late")
    each = math.ceil(devices / (SIMULATED if calm else STORM))
    return Scenario(devices, pace, machine, certified=certified, each=each, until=4 * 3600.0)


def live(task: tuple[str, str, int, dict[str, float]]) -> Figures:
    """What comes of a scenario."""
    name, kind, devices, cost = task
    seen = simulate(scenario(name, kind, devices, cost))
    machine = server(devices, cost)
    return {
        "name": name,
        "kind": kind,
        "devices": devices,
        "cores": machine.cores,
        "capacity": machine.cores / (cost["front"] + cost["back"]),
        "served": {str(share): seen.served_after(share) for share in (0.5, 0.99, 1.0)},
        "share": len(seen.first) / seen.devices,
        "failures": seen.failures,
        "peak": seen.peak,
        "begun": seen.rate(seen.begun),
        "done": seen.rate(seen.done),
    }


def measured(folder: Path) -> Figures:
    """What one check costs the server as it is."""
    site = morning_server.site(folder, hold=0.0)
    with site.caramel, site.nginx:
        morning_server.enroll(site)
        cost = site.closed_loop(10)
        return {**cost, "turned_away": site.turned_away(), "for who has left": site.works_for_who_has_left()}


def small(folder: Path) -> Figures:
    """The real small fleet, and what the simulation makes of the same boots."""
    site = morning_server.site(folder, SMALL["hold"], int(SMALL["room"]))
    with site.caramel, site.nginx:
        morning_server.enroll(site)
        rates = [site.closed_loop(10)["rate"]]
        real = morning_server.storm(site, int(SMALL["devices"]), SMALL["boots_within"], SMALL["limit"], print)
        rates.append(site.closed_loop(10)["rate"])
    return {
        "devices": real.devices,
        "programs": real.programs,
        "rates": rates,
        "seconds": real.seconds,
        "pace": dataclasses.asdict(shipped(BUSYBOX)),
        "events": [(event.at, event.device, event.status) for event in real.events],
    }


def foreseen(real: Figures, cost: Figures, seed: int = 1) -> Figures:
    """What the simulation says to the small fleet's boots: the server's rate is what was measured beside it."""
    boots: dict[int, float] = {}
    for at, device, status in real["events"]:
        if status is None:
            boots.setdefault(device, at)
    rate = sum(real["rates"]) / len(real["rates"])
    # Two connections are nginx's own: what it listens on.
    machine = Machine(3, 1, cost["front"], lambda chance: 1 / rate, cost["turned_away"], int(SMALL["room"]) - 2)
    pace = Pace(**{**real["pace"], "spread": 0})
    seen = simulate(
        Scenario(
            len(boots), pace, machine, until=real["seconds"], round_trip=0.0, hourly=False, seed=seed,
            boots=sorted(boots.values()),
        )
    )  # fmt: skip
    return {"first": seen.first, "failures": seen.failures, "peak": seen.peak}


def compared(real: Figures, cost: Figures) -> Figures:
    """How far the simulation is from the small fleet."""
    first = sorted(at for at, _, status in real["events"] if status == 0)
    ended = [status for _, _, status in real["events"] if status is not None]
    failures = sum(status != 0 for status in ended) / max(1, len(ended))
    guess = foreseen(real, cost)
    devices = real["devices"]
    distance = max(
        abs(sum(at <= t for at in first) - sum(at <= t for at in guess["first"])) / devices
        for t in range(0, math.ceil(real["seconds"]), 5)
    )
    return {
        "first": first,
        "foreseen": guess["first"],
        "failures": failures,
        "failures foreseen": guess["failures"],
        "runs": len(ended),
        "distance": distance,
        "good": distance <= TOLERANCE and abs(failures - guess["failures"]) <= TOLERANCE,
    }


def machine() -> dict[str, str]:
    """What the figures were made on, without anything that names it."""
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    said = subprocess.run([world.Nginx.program() or "nginx", "-v"], capture_output=True, text=True, timeout=30).stderr
    version = re.search(r"nginx/(\S+)", said)
    return {
        "processor": f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores",
        "kernel": f"Linux {platform.release().split('-')[0]}, {platform.machine()}",
        "nginx": version[1] if version else "?",
    }


def mornings(cost: dict[str, float]) -> list[Figures]:
    """All scenarios."""
    tasks = [
        (name, kind, devices, cost)
        for devices in FLEETS
        for kind in (SYSTEMD, BUSYBOX)
        for name, _ in morning_report.SCENARIOS
    ]
    began, results = time.monotonic(), []
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for number, result in enumerate(pool.map(live, tasks), 1):
            results.append(result)
            what = f"{result['devices']} devices, {result['kind']}, {result['name']}"
            print(f"[{number}/{len(tasks)}, {time.monotonic() - began:.0f} s] {what}", flush=True)
    return results


STAGES = ("server", "small", "mornings", "page")


def main() -> int:
    parser = argparse.ArgumentParser(description="The morning after a power cut: measured, simulated, compared.")
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], help="only these; the last figures of the others")
    wanted = parser.parse_args().stages or STAGES
    folder = world.BUILD / "morning"
    folder.mkdir(parents=True, exist_ok=True)

    def stage(name: str, make: Callable[[], Any]) -> Any:
        figures = folder / f"{name}.json"
        if name in wanted:
            figures.write_text(json.dumps(make()))
        return json.loads(figures.read_text())

    def fresh(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return folder / name

    measured_ = stage("server", lambda: {"machine": machine(), "cost": measured(fresh("server"))})
    cost = {name: measured_["cost"][name] for name in ("front", "back", "turned_away")}
    print(f"one check: nginx {1000 * cost['front']:.1f} ms, Caramel {1000 * cost['back']:.1f} ms")
    seen: Figures = dict(measured_)
    if "small" in wanted or "page" in wanted:
        seen["small"] = stage("small", lambda: small(fresh("small")))
    if "mornings" in wanted or "page" in wanted:
        seen["mornings"] = stage("mornings", lambda: mornings(cost))
    if "page" not in wanted:
        return 0
    seen["compared"] = compare = compared(seen["small"], cost)
    seen["pace"] = {kind: dataclasses.asdict(shipped(kind)) for kind in (SYSTEMD, BUSYBOX)}
    docs = world.ROOT / "docs"
    (docs / "morning-after.md").write_text(morning_report.page(seen))
    (docs / "morning-after.svg").write_text(morning_report.loads(seen))
    (docs / "morning-after-real.svg").write_text(morning_report.curves(seen))
    print(
        f"The simulation is {100 * compare['distance']:.1f} % of the devices away from the real run at most; "
        f"runs that end in 127: {100 * compare['failures']:.0f} % and {100 * compare['failures foreseen']:.0f} %"
    )
    return 0 if compare["good"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
