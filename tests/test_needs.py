"""What a machine lacks is counted and named, and everything else fails: see needs.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import world

MISSING = """
import needs, pytest
needs.NEEDS["a-program"] = needs.program("no-such-program", "one-package")
needs.NEEDS["all-powers"] = needs.Need(lambda: False, what="root")

@needs.needs("a-program", "all-powers")
def test_marked(): ...

def test_required():
    needs.require("a-program")

@needs.slow
def test_slow(): ...

def test_here(): ...
"""


def run(folder: Path, **env: str) -> tuple[int, str]:
    (folder / "conftest.py").write_bytes((world.ROOT / "tests/conftest.py").read_bytes())
    (folder / "test_missing.py").write_text(MISSING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(world.ROOT / "tests"), **env},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_what_was_not_run_is_counted_and_named(tmp_path: Path) -> None:
    status, text = run(tmp_path)
    assert status == 0, text
    block = text[text.index(" 3 of 4 tests were not run ") :].splitlines()[1:5]
    assert sorted(block[:3]) == [
        "     1 needs a-program",
        "     1 needs a-program, root",
        "     1 too slow for `make test`",
    ], text
    assert block[3] == "All of it: apt-get install one-package && make test-all (as root)"


def test_where_nothing_may_be_skipped_it_fails(tmp_path: Path) -> None:
    status, text = run(tmp_path, CARAMEL_TESTS_NO_SKIP="1")
    assert status == 1 and "1 failed, 2 passed, 1 error" in text, text


def test_a_machine_that_has_everything_is_told_nothing() -> None:
    assert needs.account([]) == []


def test_a_need_that_is_there_skips_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(needs.NEEDS, "python", needs.Need(lambda: True))
    needs.require("python")
    assert needs.needs("python").args == (False,)
