#!/usr/bin/env python3
"""Copies the figures that the README speaks of out of the pages that `make bench` and `make torture` write.

    python3 docs/figures.py [--check]

With --check it changes nothing, and its exit status says whether the README has the figures of these pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"


def table(page: Path, heading: str = "") -> list[dict[str, str]]:
    """The rows of the first table in the page, or of the first one under a heading of it; cells by column."""
    text = page.read_text()
    if heading:
        text = text.partition(f"\n{heading}\n")[2]
    found = re.search(r"^\|.*?(?=^[^|]|\Z)", text, re.M | re.S)
    assert found, f"{page.name}: no table under {heading!r}"
    lines = [
        [cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in found[0].splitlines() if line
    ]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def grouped(number: str) -> str:
    return f"{int(number):,}".replace(",", " ")


def bench() -> str:
    """One check that finds nothing new: what it costs here and elsewhere, and what goes over the wire."""
    runs = {row[""]: row for row in table(DOCS / "bench.md", "### Unchanged")}
    wire = {next(iter(row.values())): row["metered"] for row in table(DOCS / "bench.md", "## On the wire")}
    ours = runs["caramel-embedded"]

    def milliseconds(name: str) -> str:
        return f"{float(runs[name]['processor ms (middle half)'].partition(' (')[0]):.0f} ms"

    both = int(ours["bytes up"]) + int(ours["down"])
    assert ours["connections"] == "1", "the sentence below says so"
    metered = re.search(r"= (\d+) ", wire["caramel-embedded"])
    assert metered
    written = "nothing" if ours["written"] == "0" else f"{ours['written']} bytes"
    return (
        f"- A check that finds nothing new takes {milliseconds('caramel-embedded')} of processor time and "
        f"{float(ours['peak MiB']):.0f} MiB of memory, and writes {written}. A shell script with curl and\n"
        f"  openssl takes {milliseconds('curl and openssl')}, the Python client `caramel-client` 1.5.3 "
        f"{milliseconds('caramel-client 1.5.3')}.\n"
        f"- It opens one connection, with {both / 1000:.1f} kB in both directions, or "
        f"{int(metered[1]) / 1000:.1f} kB where the server is set up for metered links."
    )


def torture() -> str:
    """How many misfortunes were tried, and what was lost."""
    rows = table(DOCS / "torture.md")
    everything = rows[-1]
    assert everything["tried"] == "all"
    cuts = [row for row in rows if row["tried"].startswith("power cut at a system call")]

    def total(column: str) -> int:
        return sum(int(row[column]) for row in cuts)

    return (
        f"- The power was cut at each of {total('cases')} system calls that a device "
        f"makes in its life; {total('survived')} of these cuts were survived.\n"
        f"- Of {grouped(everything['cases'])} cases in all (faults of disk, network, clock and server), "
        f"{grouped(everything['survived'])} were survived. Lost: {everything['lost']}."
    )


def main(*arguments: str) -> int:
    old = new = README.read_text()
    for name, text in (("bench", bench()), ("torture", torture())):
        before, mark, rest = new.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert mark and end, f"README.md: no place for {name}"
        new = f"{before}{mark}\n{text}\n\n{end}{after}"
    if "--check" in arguments:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
