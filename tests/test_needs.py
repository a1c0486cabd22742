"""What a machine lacks is counted and named, with the line that brings it; and CI lacks nothing."""

from __future__ import annotations

import re

import needs
import pytest
import world


def test_every_package_that_a_test_may_want_is_installed_by_ci() -> None:
    text = (world.ROOT / ".ci" / "run").read_text()
    listed = re.search(r"^needed=\((.*?)^\)", text, re.MULTILINE | re.DOTALL)
    assert listed
    installed = set(re.sub(r"#.*", "", listed[1]).split())
    wanted = {package for need in needs.NEEDS.values() for package in need.packages}
    assert wanted - installed == set()


def test_what_was_not_run_is_counted_and_the_line_that_brings_it_is_one() -> None:
    reasons = [
        *[f"Skipped: {needs._reason(['nginx'])}"] * 3,
        needs._reason(["mounts", "strace"]),
        needs._reason(["strace"]),
        *["slow"] * 2,
    ]
    assert needs.account(reasons) == [
        "     3 needs nginx",
        "     2 too slow for `make test`",
        "     1 needs root, and mounts of its own (unshare(1)), strace",
        "     1 needs strace",
        "All of it: apt-get install nginx-light strace && make test-all (as root)",
    ]


def test_nothing_left_out_is_nothing_said() -> None:
    assert needs.account([]) == []


def test_a_program_that_is_missing_skips_and_one_that_is_there_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(needs.NEEDS, "here", needs.program("sh"))
    monkeypatch.setitem(needs.NEEDS, "nowhere", needs.program("no-such-program", "its-package"))
    needs.require("here")
    with pytest.raises(pytest.skip.Exception) as skipped:
        needs.require("here", "nowhere")
    assert str(skipped.value) == "needs nowhere (apt-get install its-package)"
    assert needs.needs("here").args == (False,)
    assert needs.needs("here", "nowhere").args == (True,)


def test_no_test_skips_in_another_way() -> None:
    ways = r"pytest\.skip\(|skipif\(|importorskip|unittest\.skip|mark\.skip\b"
    files = [path for folder in ("tests", "server") for path in (world.ROOT / folder).rglob("*.py")]
    found = {path.name for path in files if re.search(ways, path.read_text())}
    assert len(files) > 60 and found == {"needs.py", "test_needs.py"}
