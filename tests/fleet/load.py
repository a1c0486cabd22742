"""Locust in its distributed mode, from start to counts: a master without a web page, and workers with the users."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from world import BUILD, PLAIN, Daemon, Service, environment, free_port, until

LOCUST = BUILD / "fleet" / "bin" / "locust"
LOCUSTFILE = Path(__file__).parent / "locustfile.py"
#: Processes with users. More of them than processors would only take turns.
WORKERS = 2
#: Seconds that checks which are under way get at the end.
LAST_CHECKS = 30


@dataclass(frozen=True)
class Sample:
    """One check: when it began (CLOCK_MONOTONIC) and how long it took, in seconds; its status, 0 for none."""

    began: float
    seconds: float
    status: int

    @property
    def ended(self) -> float:
        return self.began + self.seconds


class Load(Service):
    """Devices that check, from the beginning of the block to its end: so many users at a time, each of which is one
    device after the other. `lines` is what `Device.line` says of each.
    """

    def __init__(self, folder: Path, port: int, ca: Path, lines: Sequence[Sequence[str]], users: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.users = users
        self._settings, self._end = self.folder / "load.json", self.folder / "end"
        settings = {
            "port": port,
            "ca": str(ca),
            "agent": agent(),
            "devices": [list(line) for line in lines],
            "end": str(self._end),
        }
        self._settings.write_text(json.dumps(settings))
        self._master: Optional[Daemon] = None
        self._workers: list[Daemon] = []

    def start(self) -> None:
        port = str(free_port())
        common = [str(LOCUST), "-f", str(LOCUSTFILE), "--loglevel", "WARNING", "--exit-code-on-error", "0"]
        # A user is spawned as soon as it can be; the run is bounded, even if nobody ends it.
        master = ["--master", "--headless", "--only-summary", "--master-bind-host", "127.0.0.1"]
        master += ["--master-bind-port", port, "--expect-workers", str(WORKERS), "--expect-workers-max-wait", "60"]
        master += ["--users", str(self.users), "--spawn-rate", str(self.users), "--run-time", "900s"]
        master += ["--stop-timeout", str(LAST_CHECKS), "--json-file", str(self.folder / "locust")]
        env = {"HOME": str(self.folder), "FLEET_LOAD": str(self._settings)}
        self._master = Daemon([*common, *master], self.folder / "master.log", environment(**env))
        self._master.start()
        for number in range(WORKERS):
            share = {"FLEET_SHARE": f"{number}/{WORKERS}", "FLEET_SAMPLES": str(self.folder / f"samples-{number}")}
            worker = Daemon(
                [*common, "--worker", "--master-host", "127.0.0.1", "--master-port", port],
                self.folder / f"worker-{number}.log",
                environment(**env, **share),
            )
            self._workers.append(worker)
            worker.start()

    def begun(self) -> bool:
        """Whether it still runs; a load that has ended by itself is an AssertionError with what it said."""
        for daemon in (self._master, *self._workers):
            if not daemon or not daemon.alive:
                raise AssertionError(f"Locust ended: {daemon.text()[-2000:] if daemon else ''}")
        return True

    @property
    def pids(self) -> list[int]:
        return [one.process.pid for one in (self._master, *self._workers) if one and one.process]

    def finish(self) -> None:
        """No new check, and the end of those that are under way."""
        self._end.touch()
        until("Locust ends", lambda: not (self._master and self._master.alive), LAST_CHECKS + 70)
        for worker in self._workers:  # a master that has its last reports doesn't reach them any more
            assert worker.process
            worker.process.terminate()
        until("Locust's workers end", lambda: not any(one.alive for one in self._workers), 10)

    def stop(self) -> None:
        for daemon in (self._master, *self._workers):
            if daemon:
                daemon.stop()
        self._master = None
        self._workers.clear()

    def counted(self) -> int:
        """How many checks Locust says that there were, after `finish`."""
        path = next(self.folder.glob("locust*.json"))
        return sum(int(entry["num_requests"]) for entry in json.loads(path.read_text()))

    def samples(self) -> list[Sample]:
        """Every check, after `finish`; oldest first."""
        found = []
        for path in self.folder.glob("samples-*"):
            for line in path.read_text().splitlines():
                began, seconds, status = line.split()
                found.append(Sample(float(began), float(seconds), int(status)))
        return sorted(found, key=lambda sample: sample.began)


def agent() -> str:
    """What the program's User-Agent begins with."""
    said = subprocess.run([PLAIN, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    return "/".join(said.split()[:2])


def percentile(values: Sequence[float], hundredths: float) -> float:
    """The value that so many of a hundred don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * hundredths / 100) - 1)] if ordered else 0.0
