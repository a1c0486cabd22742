"""The demo tells a story that is true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import world


def test_the_demo_goes_as_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-Es", "-m", "demo.life"],
        cwd=world.ROOT / "tests",
        env=world.environment(CARAMEL_TESTS_COMMAND=world.COMMAND, TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for status in (0, 1, 69, 127):
        assert f"exit status {status}: " in done.stdout
    assert "PRIVATE KEY-----" not in done.stdout
    assert list(tmp_path.iterdir()) == []
