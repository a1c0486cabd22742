#!/usr/bin/env python3
"""Copies the figures that the README shows out of the pages that `make bench` and `make torture` write.

    python3 docs/figures.py [--check]

With --check it changes nothing, and its exit status says whether the README has the figures of these pages.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Callable

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"


def table(page: Path, heading: str = "") -> list[str]:
    """The lines of the first table in the page, or of the first one under a heading of it."""
    text = page.read_text()
    found = re.search(r"^\|.*?(?=^[^|]|\Z)", text.partition(f"\n{heading}\n")[2] if heading else text, re.M | re.S)
    return found[0].strip().splitlines() if found else []


def bench() -> str:
    """Some columns of the table of unchanged checks."""
    lines = table(DOCS / "bench.md", "### Unchanged")
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    at = {name: header.index(name) for name in header if name}
    columns: dict[str, Callable[[list[str]], str]] = {
        "processor, ms": lambda row: row[at["processor ms (middle half)"]].partition(" (")[0],
        "against the urllib3 floor": lambda row: row[at["ratio"]],
        "peak memory, MiB": lambda row: row[at["peak MiB"]],
        "connections": lambda row: row[at["connections"]],
        "bytes up + down": lambda row: " + ".join(filter(None, (row[at["bytes up"]], row[at["down"]]))),
        "bytes written": lambda row: row[at["written"]],
    }
    short = ["| a check that finds nothing new | " + " | ".join(columns) + " |"]
    short.append("| --- |" + " ---: |" * len(columns))
    short += ["| " + " | ".join([row[0], *(cell(row) for cell in columns.values())]) + " |" for row in rows]
    return "\n".join(short)


def torture() -> str:
    """What `make torture` is, and its first table as it is."""
    page = DOCS / "torture.md"
    if not page.exists():
        return ""
    about = "`make torture` tries to make it lose something, and [fails where anything was lost](docs/torture.md):"
    return "\n".join([about, "", *table(page)])


def main(*arguments: str) -> int:
    old = new = README.read_text()
    for name, text in (("bench", bench()), ("torture", torture())):
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        new = marks.sub(lambda match, text=text: f"{match[1]}{text and chr(10) + text + chr(10) * 2}{match[2]}", new)  # type: ignore[misc]
    if "--check" in arguments:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
