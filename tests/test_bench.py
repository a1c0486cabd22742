"""What `make bench` measures that no machine changes, and that its figures get to where they are quoted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import world
from bench import elliptic, report
from needs import needs, slow

MOST = 3200  # bytes in both directions; docs/bench.md has what each part of it weighs


@slow
@needs("authority", "nginx")
def test_with_elliptic_keys_a_check_is_small(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    seen = elliptic.measure(world.PLAIN, tmp_path / "authority", tries=1)
    metered, own = seen[elliptic.METERED], seen[elliptic.OWN]
    assert metered["up"] + metered["down"] <= MOST, metered["records"]
    assert own["up"] + own["down"] <= MOST - 1000, own["records"]
    for wire in (metered, own):
        assert wire["connections"] == 1
        # Nothing is left out of the list, and nothing is in it twice.
        assert sum(size for _, _, size in wire["records"]) == wire["up"] + wire["down"]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the pages and of the script that carries figures from one to another."""
    shutil.copytree(world.ROOT / "docs", tmp_path / "docs")
    shutil.copy(world.ROOT / "README.md", tmp_path)
    return tmp_path / "docs"


def figures(docs: Path, *options: str) -> int:
    return subprocess.run([sys.executable, "-I", str(docs / "figures.py"), *options], timeout=30).returncode


def test_a_new_table_gets_into_readme_and_design(docs: Path) -> None:
    page = docs / "bench.md"
    before = page.read_text().replace("\n## Before and after\n", "\n## Old\n")
    before = before.replace("\n### Everything elliptic\n", "\n### Old\n")
    row = report.table(["", "1.0.0", "2.0.0"], [["unchanged: processor time, ms", "12345", "54321"]])
    records = report.table(
        ["one unchanged check, bytes", "RSA", "elliptic", "elliptic, no client certificate"],
        [["**both ways**", "**6000**", "**2960**", "**1640**"]],
    )
    page.write_text(f"{before}\n## Before and after\n\n{row}\n### Everything elliptic\n\n{records}\n")
    assert figures(docs, "--check") == 1
    assert figures(docs) == 0 and figures(docs, "--check") == 0
    assert "| 12345 | 54321 |" in (docs / "design.md").read_text()
    readme = (docs.parent / "README.md").read_text()
    assert "3.0 kB" in readme and "1.6 kB" in readme


def test_old_figures_are_called_old(docs: Path) -> None:
    """Until the page is written anew, without the line."""
    said = "The figures are of 1.0.0. Those of 2.0.0 are still to be made.\n"
    for page in ("bench.md", "torture.md"):
        path, line = docs / page, "**These figures are of 1.0.0.** Those of 2.0.0 are still to be made.\n"
        new = "\n".join(line for line in path.read_text().split("\n") if "These figures are of 1.0.0" not in line)
        path.write_text(new)
        figures(docs)
        without = (docs.parent / "README.md").read_text().count(said)
        path.write_text(new + line)
        figures(docs)
        assert (docs.parent / "README.md").read_text().count(said) == without + 1
        path.write_text(new)
    figures(docs)
    assert said not in (docs.parent / "README.md").read_text()
