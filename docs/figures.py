#!/usr/bin/env python3
"""Copies the figures of README and design page out of the pages that `make bench` and `make torture` write.

    python3 docs/figures.py [--check]

With --check it changes nothing, and its exit status says whether both have the figures of these pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
#: What a page says that was measured before the program is what it is now.
OLD = "**These figures are of 1.0.0.**"


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


def age(page: Path) -> str:
    """A line that says so, where the figures of the page are those of an earlier release."""
    return "The figures are of 1.0.0. Those of 2.0.0 are still to be made.\n\n" if OLD in page.read_text() else ""


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
    elliptic = ""
    if "| elliptic, no client certificate |" in (DOCS / "bench.md").read_text():  # it isn't measured everywhere
        last = table(DOCS / "bench.md", "### Everything elliptic")[-1]
        asked, alone = (
            f"{int(last[column].strip('*')) / 1000:.1f} kB"
            for column in ("elliptic", "elliptic, no client certificate")
        )
        elliptic = (
            f".\n  With elliptic keys it is {asked}, and {alone} where the server asks for no client certificate"
        )
    assert ours["connections"] == "1", "the sentence below says so"
    metered = re.search(r"= (\d+) ", wire["caramel-embedded"])
    assert metered
    written = "nothing" if ours["written"] == "0" else f"{ours['written']} bytes"
    return (
        f"{age(DOCS / 'bench.md')}- A check that finds nothing new takes {milliseconds('caramel-embedded')} of "
        f"processor time and {float(ours['peak MiB']):.0f} MiB of memory, and writes {written}. "
        f"A shell script with curl and\n"
        f"  openssl takes {milliseconds('curl and openssl')}, the Python client `caramel-client` 1.5.3 "
        f"{milliseconds('caramel-client 1.5.3')}.\n"
        f"- It opens one connection, with {both / 1000:.1f} kB in both directions, or "
        f"{int(metered[1]) / 1000:.1f} kB where the server is set up for metered links{elliptic}."
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
        f"{age(DOCS / 'torture.md')}- The power was cut at each of {total('cases')} system calls that a device "
        f"makes in its life; {total('survived')} of these cuts were survived.\n"
        f"- Of {grouped(everything['cases'])} cases in all (faults of disk, network, clock and server), "
        f"{grouped(everything['survived'])} were survived. Lost: {everything['lost']}."
    )


def before_and_after() -> str:
    """The table of both releases, as it stands in the page of the benchmark."""
    text = (DOCS / "bench.md").read_text()
    heading = "\n## Before and after\n"
    if heading not in text:
        return "The figures of 2.0.0 are still to be made."
    found = re.search(r"^\|.*?(?=^[^|]|\Z)", text.partition(heading)[2], re.M | re.S)
    assert found, "bench.md: no table of before and after"
    return found[0].strip()


def main(*arguments: str) -> int:
    places = {README: {"bench": bench(), "torture": torture()}, DOCS / "design.md": {"before": before_and_after()}}
    same = True
    for page, texts in places.items():
        old = new = page.read_text()
        for name, text in texts.items():
            before, mark, rest = new.partition(f"<!-- {name} -->\n")
            _, end, after = rest.partition("<!-- end -->")
            assert mark and end, f"{page.name}: no place for {name}"
            new = f"{before}{mark}\n{text}\n\n{end}{after}"
        same = same and old == new
        if old != new and "--check" not in arguments:
            page.write_text(new)
    return int(not same and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
