"""Cases and their count: runs them on a few threads, keeps what was lost, prints the table."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Callable, NamedTuple

#: Cases at a time: machines are shared, and some cases are about time limits.
WORKERS = 2


class Case(NamedTuple):
    """One misfortune: what it is called, and what does it and returns a list of what went wrong."""

    name: str
    act: Callable[[], list[str]]
    #: How many it counts as.
    weight: int = 1


@dataclass
class Row:
    """One line of the table."""

    what: str
    cases: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: float = 0.0
    remarks: str = ""
    #: What a case of it is, because a fuzz input is not as much as a fault.
    kind: str = "faults"


def tried(what: str, cases: Iterable[Case], workers: int = WORKERS) -> Row:
    """Runs all cases and counts."""
    started = time.monotonic()
    row = Row(what)
    with ThreadPoolExecutor(workers) as pool:
        for case, wrong in pool.map(_act, cases):
            row.cases += case.weight
            if wrong:
                row.lost.append(f"{case.name}: {'; '.join(wrong)}")
            else:
                row.survived += case.weight
    row.seconds = time.monotonic() - started
    return row


def _act(case: Case) -> tuple[Case, list[str]]:
    try:
        return case, case.act()
    except Exception as error:  # a harness that fails has shown nothing: that counts as lost
        place = traceback.extract_tb(error.__traceback__)[-1]
        return case, [f"{type(error).__name__}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"]


def sample(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` of the cases, spread evenly over all of them."""
    if len(cases) <= count:
        return list(cases)
    return [cases[(2 * index + 1) * len(cases) // (2 * count)] for index in range(count)]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown, and a sum for each kind of case."""
    lines = ["| tried | cases | survived | lost |", "| --- | ---: | ---: | --- |"]
    for row in rows:
        what = f"{row.what} ({row.remarks})" if row.remarks else row.what
        lines.append(f"| {what} | {row.cases} | {row.survived} | {len(row.lost) or 'nothing'} |")
    for kind in dict.fromkeys(row.kind for row in rows):
        same = [row for row in rows if row.kind == kind]
        lines.append(
            f"| **all {kind}** | **{sum(row.cases for row in same)}** | **{sum(row.survived for row in same)}** |"
            f" **{sum(len(row.lost) for row in same) or 'nothing'}** |"
        )
    return "\n".join(lines) + "\n"


def tell(row: Row) -> None:
    """Answer how a row went, as soon as it is known."""
    verdict = "nothing lost" if not row.lost else f"{len(row.lost)} LOST"
    print(f"{row.what}: {row.cases} cases, {verdict}, {row.seconds:.0f} s", flush=True)
    for line in row.lost[:40]:
        print(f"    {line}", file=sys.stderr, flush=True)
