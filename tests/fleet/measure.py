"""`make fleet`: every configuration under load, the figures of which become docs/fleet.md. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import world
from bench.proxy import DelayingProxy
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from world import BUILD, PLAIN, ROOT, Authority, until

from fleet import devices, report, usage
from fleet.devices import P256, RSA, Device
from fleet.load import Crowd, Load, Sample, percentile
from fleet.servers import (
    Backend,
    Caramel,
    Database,
    Front,
    Postgres,
    RegistrationAuthority,
    Sqlite,
    authority_front,
    caramel_front,
)

CARAMEL, AUTHORITY = "Caramel", "registration authority"
SQLITE, POSTGRESQL = "SQLite", "PostgreSQL"
#: Checks that are under way at a time at saturation: more than any configuration has threads.
CLOSED_LOOP = 32
#: The second load, as a share of what saturation gave.
BELOW = 0.7
#: Seconds from the first check until figures are taken.
WARM_UP = 2.0
#: Devices in the database: what one process is asked with, to see what a fleet's size costs.
SIZES = (20_000, 90_000)
#: What a fleet of that size is asked by: as many as a process of waitress has threads.
FEW = 4


@dataclass(frozen=True)
class Configuration:
    """What is measured. `suggested`: with the filter and the nginx configuration of server/, else as most are."""

    server: str
    database: str
    processes: int = 1
    suggested: bool = False
    keys: str = RSA

    @property
    def name(self) -> str:
        kind = "" if self.server == AUTHORITY else ", suggested" if self.suggested else ", plain"
        return f"{self.server}, {self.database}, {self.processes}{kind}, {self.keys}"


CONFIGURATIONS = (
    Configuration(CARAMEL, SQLITE),
    Configuration(CARAMEL, SQLITE, suggested=True),
    *(
        Configuration(CARAMEL, POSTGRESQL, processes, suggested)
        for processes in (1, 2, 4)
        for suggested in (False, True)
    ),
    Configuration(CARAMEL, POSTGRESQL, 2, True, P256),
    Configuration(AUTHORITY, SQLITE, keys=P256),
    Configuration(AUTHORITY, POSTGRESQL, keys=P256),
    Configuration(AUTHORITY, POSTGRESQL, 2, keys=P256),
    Configuration(AUTHORITY, POSTGRESQL, 2, keys=RSA),
)

#: What is asked with larger and larger databases.
SIZED = (
    Configuration(CARAMEL, SQLITE, suggested=True),
    Configuration(CARAMEL, POSTGRESQL, suggested=True),
    Configuration(AUTHORITY, SQLITE, keys=P256),
    Configuration(AUTHORITY, POSTGRESQL, keys=P256),
)


class Progress:
    """A line on standard error for each step, which is overwritten where that is a terminal."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._started = steps, 0, time.monotonic()

    def say(self, what: str) -> None:
        end = "" if sys.stderr.isatty() else "\n"
        line = f"[{self._done:2}/{self._steps}] {time.monotonic() - self._started:4.0f} s  {what}"
        print(f"\r{line:100}" if not end else line, end=end, file=sys.stderr, flush=True)

    def step(self, what: str) -> None:
        self._done += 1
        self.say(what)


@dataclass(frozen=True)
class Books:
    """What had been used at a moment. Seconds of processor time by part."""

    moment: float
    spent: Mapping[str, float]
    idle: float

    @classmethod
    def of(cls, groups: Mapping[str, Sequence[int]]) -> Books:
        spent = {name: usage.processor_time(pids) for name, pids in groups.items()}
        return cls(time.monotonic(), spent, usage.idle_time())


def groups(front: Front, backend: Backend, load: Load) -> dict[str, list[int]]:
    """The parts, and the processes that each consists of (with all that descend from them)."""
    parts = {"nginx": [front.pid], "server": backend.pids, "load": load.pids}
    if backend.database.pid:
        parts["database"] = [backend.database.pid]
    return parts


class Stage:
    """A configuration that runs, and the devices that it knows."""

    def __init__(
        self, folder: Path, backend: Backend, front: Front, fleet: Sequence[Device], modified: bool, seconds: float
    ) -> None:
        """`modified`: whether the server says when a certificate was made, so that devices send that back."""
        self.folder, self.backend, self.front, self.seconds = folder, backend, front, seconds
        self.fleet = fleet
        self._modified = modified
        identities = folder / "devices"
        identities.mkdir()
        self._lines = [one.line(identities, self._since(one)) for one in fleet]
        self._ca: Path = backend.authority.certificate_file  # type: ignore[attr-defined]
        self._loads = 0
        #: Checks of all loads so far, as Locust counts them.
        self.checks = 0

    def _since(self, device: Device) -> int:
        return device.modified if self._modified else device.not_before

    def loaded(self, crowd: Crowd) -> dict[str, Any]:
        """What this crowd's checks cost, and how long they took."""
        self._loads += 1
        folder = self.folder / f"load-{self._loads}"
        before = len(self.front.seen())
        with Load(folder, self.front.port, self._ca, self._lines, crowd) as load:
            until("the first check", lambda: load.begun() and len(self.front.seen()) > before, 60, 0.1)
            time.sleep(WARM_UP)
            parts = groups(self.front, self.backend, load)
            first = Books.of(parts)
            time.sleep(self.seconds)
            last = Books.of(parts)
            memory = {name: usage.memory(pids) for name, pids in parts.items()}
            load.finish()
            samples, counted = load.samples(), load.counted()
        self.checks += counted
        seen = self.front.seen()[before:]
        return {
            "users": crowd.users,
            "pace": crowd.pace,
            **figures(samples, first, last),
            "memory": memory,
            "counts": {"locust": counted, "samples": len(samples), "nginx": len(seen)},
            "tls": dict(Counter(f"{line[3]} {line[4]} {line[5]}" for line in seen)),
        }

    def wire(self) -> dict[str, int]:
        """Bytes and packets of one check of the program itself, with the identity of one of the devices."""
        device = self.fleet[0]
        key = x509.load_pem_x509_certificate(device.certificate).public_key()
        kind = b"EC" if isinstance(key, ec.EllipticCurvePublicKey) else b"RSA"
        ca = self._ca.read_bytes()
        content = device.key + device.certificate + device.request.replace(b" CERT", b" NEW CERT")
        with DelayingProxy(self.front.port, 0.0) as proxy:
            one = world.Device(self.folder / "disk", proxy.address, self._ca, device.client_id, command=(PLAIN,))
            found = []
            for _ in range(5):
                one.has(world.sealed(content, ca, device.client_id, key_kind=kind))
                os.utime(one.key_file, (self._since(device), self._since(device)))
                proxy.reset()
                run = one.run(*(["--key-type", "ec-p256"] if kind == b"EC" else []))
                if run.status:
                    raise AssertionError(f"the program's check ended with {run.status}: {run.err}")
                found.append(proxy.wait())
        names = ("connections", "up", "down", "packets")
        return {name: int(statistics.median(getattr(one, name) for one in found)) for name in names}


def figures(samples: Sequence[Sample], first: Books, last: Books) -> dict[str, Any]:
    """The figures of the time between the two: rates in checks a second, times in milliseconds, shares in cores."""
    seconds = last.moment - first.moment
    within = [one for one in samples if first.moment <= one.ended < last.moment]
    took = [1000 * one.seconds for one in within]
    spent = {name: last.spent[name] - first.spent[name] for name in first.spent}
    count = len(within)
    return {
        "seconds": round(seconds, 3),
        "checks": count,
        "rate": round(count / seconds, 2),
        "latency": {str(share): round(percentile(took, share), 1) for share in (50, 95, 99)} if took else {},
        "cost": {name: round(1000 * value / count, 3) for name, value in spent.items()} if count else {},
        "busy": {
            **{name: round(value / seconds, 3) for name, value in spent.items()},
            "idle": round((last.idle - first.idle) / seconds, 3),
        },
        "statuses": dict(Counter(str(one.status) for one in samples)),
        "errors": sum(one.status not in (200, 304) for one in samples),
    }


class Fleet:
    """All that is made once: folder, CA, keys, PostgreSQL."""

    def __init__(self, folder: Path, count: int, seconds: float, progress: Progress) -> None:
        self.folder, self.count, self.seconds, self.progress = folder, count, seconds, progress
        self.postgres: Optional[Postgres] = None
        self._numbers = iter(range(1000))
        self._devices: dict[str, list[Device]] = {}
        progress.say("keys")
        kept = BUILD / "fleet" / "rsa-2048.pem"
        self._keys = {kind: devices.keys(kind, count, kept, progress.say) for kind in (RSA, P256)}
        progress.say("Caramel's CA")
        self.authority = Authority.by_caramel(folder / "ca")
        self._certificates = {RSA: self.authority.server(), P256: elliptic(self.authority)}

    def _database(self, kind: str, folder: Path, stack: ExitStack) -> Database:
        if kind == SQLITE:
            return Sqlite(folder / "server.sqlite")
        if self.postgres is None:
            raise AssertionError("PostgreSQL isn't started")
        return self.postgres.database(f"fleet_{folder.name}")

    def known(self, keys: str) -> list[Device]:
        """The devices of Caramel's CA."""
        if keys not in self._devices:
            self.progress.say(f"{self.count} certificates, {keys}")
            self._devices[keys] = devices.make(self.authority, self._keys[keys])
        return self._devices[keys]

    @contextmanager
    def stage(self, configuration: Configuration) -> Iterator[Stage]:
        folder = self.folder / str(next(self._numbers))
        folder.mkdir()
        with ExitStack() as stack:
            database = self._database(configuration.database, folder, stack)
            backend: Backend
            if configuration.server == CARAMEL:
                fleet = self.known(configuration.keys)
                backend = Caramel(
                    folder / "server", database, configuration.processes, self.authority, configuration.suggested
                )
                backend.prepare()
                certificate = self._certificates[configuration.keys]
                front = caramel_front(folder / "front", backend, certificate)
            else:
                backend = RegistrationAuthority(folder / "server", database, configuration.processes)
                backend.prepare()
                # What a device's key is doesn't show there: the front asks for no certificate.
                fleet = devices.make(backend.authority, self._keys[RSA])
                rsa = backend.authority.server() if configuration.keys == RSA else None
                front = authority_front(folder / "front", backend, rsa)
            backend.load(fleet)
            stack.enter_context(backend)
            stack.enter_context(front)
            modified = configuration.suggested or configuration.server == AUTHORITY
            yield Stage(folder, backend, front, fleet, modified, self.seconds)
        shutil.rmtree(folder)

    def measured(self, configuration: Configuration) -> dict[str, Any]:
        """Everything about one configuration."""
        with self.stage(configuration) as stage:
            self.progress.step(f"{configuration.name}: saturation")
            size, log = stage.backend.database.size(), stage.backend.database.written()
            seen: dict[str, Any] = {
                "configuration": vars(configuration) | {"name": configuration.name},
                "wire": stage.wire(),
                "saturation": stage.loaded(Crowd(CLOSED_LOOP)),
            }
            rate = max(0.1, seen["saturation"]["rate"] * BELOW)
            self.progress.step(f"{configuration.name}: {100 * BELOW:.0f} % of {seen['saturation']['rate']:.0f}/s")
            seen["below"] = stage.loaded(Crowd(self.count, self.count / rate))
            database = stage.backend.database
            after = database.written()
            # Beside the loads' checks, the program made five: see `Stage.wire`.
            checks = stage.checks + 5
            seen["growth"] = {
                "bytes": round(max(0, database.size() - size) / checks, 1),
                "log": round((after - log) / checks, 1) if after is not None and log is not None else None,
                "rows": stage.backend.rows() - 5 if isinstance(stage.backend, Caramel) else 0,
                "checks": stage.checks,
            }
            if isinstance(stage.backend, Caramel):
                seen["growth"]["bytes"] = round(stage.backend.row(), 1)
        return seen

    def sizes(self, configuration: Configuration) -> list[dict[str, Any]]:
        """What one check costs where the database has more and more devices; at last with an index."""
        found = []
        with self.stage(configuration) as stage:

            def look(count: int, index: bool) -> None:
                self.progress.step(f"{configuration.name}: {count} devices{', index' if index else ''}")
                found.append({"devices": count, "index": index, **stage.loaded(Crowd(FEW))})
                found[-1]["size"] = stage.backend.database.size()

            caramel = isinstance(stage.backend, Caramel)
            look(self.count, not caramel)
            for size in [size for size in SIZES if size > self.count][0 if caramel else -1 :]:
                stage.backend.fill(self.count, size)
                look(size, not caramel)
            if caramel:
                stage.backend.database.execute(Caramel.INDEX)
                stage.backend.database.analyze()
                look(found[-1]["devices"], True)
        return found


def elliptic(authority: Authority) -> Path:
    """A server's certificate on P-256 by this authority, in one file with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = authority.issue(key.public_key(), authority.subject_for("localhost"), names=["localhost"])
    path = authority.folder / "server-p256.pem"
    path.write_bytes(pem + world.private_pem(key))
    path.chmod(0o600)
    return path


def machine(folder: Path) -> dict[str, str]:
    """What the figures were made on, without anything that names it."""
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)

    def said(*command: str) -> str:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=30)
        found = re.search(r"(?:nginx/|PostgreSQL\) |locust )(\d[\d.]*)", done.stdout.decode(errors="replace"))
        return found[1] if found else "?"

    return {
        "processor": (model[1] if model else platform.machine()) + f", {os.cpu_count()} cores",
        "cores": str(os.cpu_count()),
        "kernel": f"Linux {platform.release().split('-')[0]}, {platform.machine()}",
        "nginx": said(world.Nginx.program() or "nginx", "-v"),
        "PostgreSQL": said(Postgres.program("postgres"), "--version"),
        "Python": platform.python_version(),
        "Locust": said(str(BUILD / "fleet/bin/locust"), "--version"),
        "flush": f"{1000 * flush(folder):.2f}",
    }


def flush(folder: Path, times: int = 100) -> float:
    """Seconds that 4 KiB take to be written and flushed to the disk under this folder; the median."""
    took = []
    with open(folder / "flush", "wb", buffering=0) as file:
        for _ in range(times):
            began = time.perf_counter()
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    (folder / "flush").unlink()
    return statistics.median(took)


def measure(
    seen: dict[str, Any],
    configurations: Sequence[Configuration],
    looks: Sequence[Configuration],
    count: int,
    seconds: float,
) -> None:
    """Everything, as JSON would have it: one thing after the other goes into `seen`."""
    steps = 2 * len(configurations) + sum(2 + len(SIZES) if one.server == CARAMEL else 2 for one in looks)
    progress = Progress(steps)
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    try:
        folder.chmod(0o711)  # PostgreSQL's user goes through it
        with ExitStack() as stack:
            fleet = Fleet(folder, count, seconds, progress)
            if any(one.database == POSTGRESQL for one in (*configurations, *looks)):
                progress.say("PostgreSQL")
                fleet.postgres = stack.enter_context(Postgres(folder / "postgresql"))
            seen |= {
                "machine": machine(folder),
                "version": version(),
                "devices": count,
                "measured for": seconds,
                "index": Caramel.INDEX,
                "certificate": certificate(fleet.known(RSA)[0]),
                "configurations": [],
                "sizes": {},
            }
            for one in configurations:
                seen["configurations"].append(fleet.measured(one))
            for one in looks:
                seen["sizes"][one.name] = fleet.sizes(one)
            seen["seconds"] = round(time.monotonic() - started)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def version() -> str:
    return subprocess.run([PLAIN, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


def certificate(device: Device) -> dict[str, int]:
    """How large a device's certificate and request are, in bytes of PEM; how long the certificate lives, in hours."""
    loaded = x509.load_pem_x509_certificate(device.certificate)
    life = loaded.not_valid_after_utc - loaded.not_valid_before_utc
    return {
        "pem": len(device.certificate), "request": len(device.request), "hours": int(life.total_seconds() / 3600)
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="What a fleet of devices costs its server, under load.")
    parser.add_argument("--again", action="store_true", help="only write the page again from the last figures")
    parser.add_argument("--only", default="", help="those whose names hold this; nothing is written to docs/")
    parser.add_argument("--no-sizes", action="store_true", help="without larger and larger databases")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends all the same
    stored = ROOT / "docs" / "fleet.json"
    if not options.again:
        seconds = min(600.0, float(os.environ.get("FLEET_SECONDS") or 10))
        count = min(100_000, max(2, int(os.environ.get("FLEET_DEVICES") or 2000)))
        chosen = [one for one in CONFIGURATIONS if options.only in one.name]
        looks = [one for one in SIZED if options.only in one.name and not options.no_sizes]
        seen: dict[str, Any] = {}
        try:
            measure(seen, chosen, looks, count, seconds)
        finally:  # what ended too early is worth a look, too
            (BUILD / "fleet" / "figures.json").write_text(json.dumps(seen, indent=1) + "\n")
        if options.only or options.no_sizes:
            print(json.dumps(seen, indent=1))
            return
        shutil.copyfile(BUILD / "fleet" / "figures.json", stored)
    report.write(json.loads(stored.read_text()), ROOT / "docs")
    print("Written: docs/fleet.json, docs/fleet.md and its pictures")


if __name__ == "__main__":
    main()
