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
from collections.abc import Iterator
from pathlib import Path

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


def fuzzed(target: str, seconds: int, folder: Path) -> Row:
    """One fuzzer, for so many seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-Es", "-m", "torture.fuzz", target, str(seconds), str(folder)],
        cwd=ROOT / "tests",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds + 120,
    )
    text = done.stdout.decode(errors="replace")
    counts = re.findall(r"number_of_executed_units: (\d+)|Done (\d+) ", text)
    inputs = max((int(each) for pair in counts for each in pair if each), default=0)
    row = Row(f"coverage-guided fuzzing of the parser of the {target.replace('-', ' ')}", inputs, inputs)
    row.kind = "fuzz inputs"
    row.seconds = time.monotonic() - started
    if done.returncode or not inputs:
        row.cases, row.lost = inputs + 1, [text[-3000:]]
    return row


def simulated(folder: Path, sequences: int) -> Row:
    started = time.monotonic()
    count, runs, lost = simulation.simulate_many(folder, sequences)
    row = Row("random sequences of answers, kills, failures, clock jumps, administrators", count, count - len(lost))
    row.lost, row.remarks, row.seconds = lost, f"{runs} runs", time.monotonic() - started
    row.kind = "random sequences"
    return row


def rows(folder: Path, only: str, calls: int) -> Iterator[Row]:
    """Everything, row by row. `calls`: at how many system calls, beside those in the key file's folder, a device with
    a TPM is killed in each scenario.
    """

    def wanted(name: str) -> bool:
        return re.search(only, name) is not None

    with Fleet(folder / "fleet") as fleet:
        scenarios = list(fleet.scenarios)
        if wanted("power"):
            for scenario in scenarios:
                found = power.cuts(fleet, scenario, 25)
                yield tried(f"the process killed at a system call: {scenario}", found)
            states: dict[str, int] = {}
            row = tried("what was not flushed is lost, by the record of the system calls", disk.cases(fleet, states))
            row.remarks = disk.total(states)
            yield row
        if wanted("chip"):
            lives = chips.Lives(fleet, folder / "chips")
            for scenario in ("first enrollment", "renewal"):
                found = chips.cuts(lives, scenario, calls)
                row = tried(f"a key in a chip: device and TPM killed at a system call: {scenario}", found)
                row.remarks = f"killed at {row.cases} system calls"
                yield row
            what = "a key in a chip: a TPM cleared, replaced, missing, locked, busy, hanging, at each point of a life"
            yield tried(what, chips.misfortunes(lives))
        if wanted("errors"):
            for scenario in scenarios:
                yield tried(f"a system call fails: {scenario}", power.errors(fleet, scenario, 25))
        kinds = {
            "disks": ("a full disk, one without inodes, a read-only one", machine.disks),
            "starved": ("too few file descriptors, too little memory, no file may grow", machine.starved),
            "outputs": ("standard input, output and error closed, full or broken", machine.outputs),
            "signals": ("a signal at a system call", machine.signals),
            "starter": ("a signal to the starter, at its system calls and at moments of the run", machine.starter),
            "ignored": ("signals that the caller ignores", machine.ignored),
            "missing": ("a package or another part missing or broken", machine.missing),
            "cannot start": ("an interpreter that can't start", machine.cannot_start),
            "environments": ("a hostile environment", machine.environments),
        }
        for name, (what, make) in kinds.items():
            if wanted(name):
                yield tried(what, make(fleet))
        if wanted("entropy"):
            yield tried("no entropy yet", machine.entropy(fleet))
        if wanted("etc"):
            yield tried(
                "/etc empty or unreadable; a process that is stopped", [*machine.etc(fleet), machine.stopped(fleet)]
            )
        if wanted("folders"):
            yield tried("a folder of somebody else's: links, hard links, drafts, FIFOs, a race", folders.cases(fleet))
        if wanted("hardware"):
            yield tried("hardware that comes, goes, and can't be read", hardware.cases(fleet))
        if wanted("judged"):
            yield tried("every single bit of a key file lost, with and without network", judged.cases(fleet))
        if wanted("clocks"):
            yield tried("clocks: 1970, behind, ahead, 2080, jumping", clocks.cases(fleet))
            yield tried(
                "each certificate of each chain begins late or has ended, by each clock", clocks.chains(fleet)
            )
        if wanted("concurrency"):
            counts: Counter[str] = Counter()
            row = tried(
                "200 starts at the same instant, and readers", concurrency.cases(fleet, 200, counts), workers=1
            )
            row.remarks = f"{counts['starts']} starts, {counts['reads']} reads"
            yield row
    if wanted("network"):
        stage = network.Stage(folder / "stage")
        for name, cases in network.everything(stage).items():
            yield tried(name, cases)
        row = tried(
            "every status from 100 to 599, to GET and to POST", [network.every_status(stage, range(100, 600))]
        )
        row.cases, row.survived = row.cases * 1000, row.survived * 1000
        yield row
        places = network.bytes_of_answer(stage)
        row = tried(
            "an answer that ends, or is reset, after each of its bytes",
            [network.every_byte(stage, False), network.every_byte(stage, True)],
        )
        row.cases, row.survived = row.cases * places, row.survived * places
        yield row
    if wanted("simulation"):
        yield simulated(folder / "simulation", 400)
    if wanted("fuzz"):
        fuzz = folder / "fuzz"
        both: list[Row] = []
        cases = [
            Case(target, lambda target=target: both.append(fuzzed(target, 60, fuzz / target)) or [])  # type: ignore[func-returns-value, misc]
            for target in ("key-file", "answer")
        ]
        failed = tried("fuzzing", cases).lost
        if failed:
            yield Row("fuzzing", len(failed), 0, failed)
        yield from both


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
    only = given.only
    started = time.monotonic()
    found = []
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        os.chmod(folder, 0o755)
        for row in rows(Path(folder), only, given.chip_calls):
            report.tell(row)
            found.append(row)
    seconds = time.monotonic() - started
    print(f"\n{report.table(found)}\n{seconds / 60:.1f} minutes")
    lost = any(row.lost for row in found)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
