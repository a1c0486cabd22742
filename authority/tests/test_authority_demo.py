# SPDX-License-Identifier: MIT OR Apache-2.0
"""The authority's demo tells stories that are true."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import authority_demo
import world
from needs import needs, require, slow

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]


def demo(tmp_path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    places = [str(world.ROOT / "tests"), str(Path(authority_demo.__file__).parent)]
    env = world.environment(
        CARAMEL_TESTS_COMMAND=world.COMMAND, TMPDIR=str(tmp_path), PYTHONPATH=os.pathsep.join(places)
    )
    command = [sys.executable, "-m", "authority_demo"]
    return subprocess.run(command, env={**env, **more}, capture_output=True, text=True, timeout=180, cwd=tmp_path)


def test_the_demo_goes_as_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    require(*authority_demo.PROGRAMS)
    done = demo(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for status in (0, 1, 69):
        assert f"exit status {status}: " in done.stdout
    assert "SECOND STORY" in done.stdout
    assert "PRIVATE KEY-----" not in done.stdout
    assert list(tmp_path.iterdir()) == []
