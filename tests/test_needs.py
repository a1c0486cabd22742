"""What a machine lacks is counted and named, with the line that brings it; and CI lacks nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import world

MISSING = """
import needs, pytest
needs.NEEDS["a-program"] = needs.program("no-such-program", "one-package")
needs.NEEDS["here"] = needs.program("sh")
needs.NEEDS["all-powers"] = needs.Need(lambda: False, what="root")

@needs.needs("a-program", "all-powers")
def test_marked(): ...

def test_required():
    needs.require("a-program")

@needs.slow
def test_slow(): ...

@needs.needs("here")
def test_here():
    needs.require("here")
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


def test_every_package_that_a_test_may_want_is_installed_by_ci() -> None:
    text = (world.ROOT / ".ci" / "run").read_text()
    listed = re.search(r"^needed=\((.*?)^\)", text, re.MULTILINE | re.DOTALL)
    assert listed
    installed = set(re.sub(r"#.*", "", listed[1]).split())
    wanted = {package for need in needs.NEEDS.values() for package in need.packages}
    assert wanted - installed == set()


def test_no_test_skips_in_another_way() -> None:
    ways = r"pytest\.skip\(|skipif\(|importorskip|unittest\.skip|mark\.skip\b"
    files = [path for folder in ("tests", "server") for path in (world.ROOT / folder).rglob("*.py")]
    found = {path.name for path in files if re.search(ways, path.read_text())}
    assert len(files) > 60 and found == {"needs.py", "test_needs.py"}


@needs.needs("git")
def test_the_rest_is_what_has_not_passed_and_everything_once_a_file_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = tmp_path / "passed"
    record.write_text("tests/test_one.py::test_a[x]\ntests/test_one.py::test_b\n")
    monkeypatch.setenv("CARAMEL_TESTS_PASSED", str(record))
    monkeypatch.delenv("CARAMEL_TESTS_REST", raising=False)
    assert needs.passed_before() == set()
    monkeypatch.setenv("CARAMEL_TESTS_REST", "1")
    monkeypatch.setattr(needs, "ROOT", tmp_path)
    assert needs.passed_before() == set(), "nobody knows what has changed"
    for name in ("one", "two"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    for command in (["init", "-q"], ["add", "one", "two"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert needs.passed_before() == {"tests/test_one.py::test_a[x]", "tests/test_one.py::test_b"}
    os.utime(tmp_path / "two", (record.stat().st_mtime + 1,) * 2)
    assert needs.passed_before() == set()
