"""``make torture``: all of it, a table, and exit status 1 if anything was lost."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Callable, NamedTuple

from world import ROOT

from torture import (
    chips,
    clocks,
    concurrency,
    disk,
    folders,
    hardware,
    judged,
    machine,
    network,
    power,
    report,
    simulation,
)
from torture.fleet import Fleet
from torture.report import Case, Row, tried


class Part(NamedTuple):
    """One row to be: the name that --only is searched in, what the table says, and what makes its cases."""

    name: str
    what: str
    cases: Callable[[], Sequence[Case]]
    #: What was counted beside the cases.
    counts: Mapping[str, int] = MappingProxyType({})
    workers: int = report.WORKERS


def of_a_fleet(fleet: Fleet, folder: Path, calls: int) -> Iterator[Part]:
    """Everything that happens to devices with a real server. `calls`: at how many system calls, beside those in the
    key file's folder, a device with a TPM is killed in each scenario.
    """
    for scenario in fleet.scenarios:
        what = f"the process killed at a system call: {scenario}"
        yield Part("power", what, partial(power.cuts, fleet, scenario, 25))
    states: Counter[str] = Counter()
    what = "what was not flushed is lost, by the record of the system calls: states of the disk"
    yield Part("power", what, partial(disk.cases, fleet, states), states)
    lives = chips.Lives(fleet, folder / "chips")
    for scenario in ("first enrollment", "renewal"):
        what = f"a key in a chip: device and TPM killed at a system call: {scenario}"
        yield Part("chip", what, partial(chips.cuts, lives, scenario, calls))
    what = "a key in a chip: a TPM cleared, replaced, missing, locked, busy, hanging, at each point of a life"
    yield Part("chip", what, partial(chips.misfortunes, lives))
    for scenario in fleet.scenarios:
        yield Part("errors", f"a system call fails: {scenario}", partial(power.errors, fleet, scenario, 25))
    for name, what, cases in (
        ("disks", "a full disk, one without inodes, a read-only one", machine.disks),
        ("starved", "too few file descriptors, too little memory, no file may grow", machine.starved),
        ("outputs", "standard input, output and error closed, full or broken", machine.outputs),
        ("signals", "a signal at a system call", machine.signals),
        ("starter", "a signal to the starter, at its system calls and at moments of the run", machine.starter),
        ("ignored", "signals that the caller ignores", machine.ignored),
        ("missing", "a package or another part missing or broken", machine.missing),
        ("cannot start", "an interpreter that can't start", machine.cannot_start),
        ("environments", "a hostile environment", machine.environments),
        ("entropy", "no entropy yet", machine.entropy),
        ("etc", "/etc empty or unreadable", machine.etc),
        ("etc", "a process that is stopped", lambda fleet: [machine.stopped(fleet)]),
        ("folders", "a folder of somebody else's: links, hard links, drafts, FIFOs, a race", folders.cases),
        ("hardware", "hardware that comes, goes, and can't be read", hardware.cases),
        ("judged", "every single bit of a key file lost, with and without network", judged.cases),
        ("clocks", "clocks: 1970, behind, ahead, 2080, jumping", clocks.cases),
        ("clocks", "each certificate of each chain begins late or has ended, by each clock", clocks.chains),
    ):
        yield Part(name, what, partial(cases, fleet))
    counts: Counter[str] = Counter()
    what = "200 starts at the same instant, and readers"
    yield Part("concurrency", what, partial(concurrency.cases, fleet, 200, counts), counts, workers=1)


def of_the_network(folder: Path) -> Iterator[Part]:
    """Everything that a server, or a network, may do."""
    stage = network.Stage(folder / "stage")
    for what, cases in network.everything(stage).items():
        yield Part("network", what, partial(list, cases))
    what = "every status from 100 to 599, to GET and to POST"
    yield Part("network", what, lambda: [network.every_status(stage, range(100, 600))])
    what = "an answer that ends, or is reset, after each of its bytes"
    yield Part("network", what, lambda: [network.every_byte(stage, reset) for reset in (False, True)])


def simulated(folder: Path, sequences: int) -> Row:
    count, runs, lost = simulation.simulate_many(folder, sequences)
    what = f"random sequences of answers, kills, failures, clock jumps, administrators: {runs} runs"
    return Row(what, count, count - len(lost), lost, kind="random sequences")


def fuzzed(target: str, seconds: int, folder: Path) -> Row:
    """One fuzzer, for so many seconds."""
    done = subprocess.run(
        [sys.executable, "-Es", "-m", "torture.fuzz", target, str(seconds), str(folder)],
        cwd=ROOT / "tests",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds + 120,
    )
    text = done.stdout.decode(errors="replace")
    # The second form is that of a Python without atheris.
    counts = re.findall(r"(?:number_of_executed_units:|Done) (\d+)", text)
    inputs = max(map(int, counts), default=0)
    lost = [text[-3000:]] if done.returncode or not inputs else []
    what = f"coverage-guided fuzzing of the parser of the {target.replace('-', ' ')}"
    return Row(what, inputs + len(lost), inputs, lost, kind="fuzz inputs")


def rows(folder: Path, only: str, calls: int) -> Iterator[Row]:
    """Everything of which the name is wanted, row by row."""

    def run(parts: Iterator[Part]) -> Iterator[Row]:
        for part in parts:
            if re.search(only, part.name):
                row = tried(part.what, part.cases(), part.workers)
                row.remarks = ", ".join(f"{count} {what}" for what, count in part.counts.items())
                yield row

    with Fleet(folder / "fleet") as fleet:
        yield from run(of_a_fleet(fleet, folder, calls))
    if re.search(only, "network"):
        yield from run(of_the_network(folder))
    if re.search(only, "simulation"):
        yield simulated(folder / "simulation", 400)
    if re.search(only, "fuzz"):
        for target in ("key-file", "answer"):
            yield fuzzed(target, 60, folder / "fuzz" / target)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", default="", metavar="REGEX", help="the parts to run")
    options.add_argument(
        "--chip-calls",
        type=int,
        default=25,
        metavar="NUMBER",
        help="of a device with a TPM: at how many system calls outside of the key file's folder it is killed; 25",
    )
    given = options.parse_args()
    started = time.monotonic()
    found = []
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        os.chmod(folder, 0o755)
        for row in rows(Path(folder), given.only, given.chip_calls):
            report.tell(row)
            found.append(row)
    print(f"\n{report.table(found)}\n{(time.monotonic() - started) / 60:.1f} minutes")
    return 1 if any(row.lost for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
