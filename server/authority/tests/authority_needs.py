# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a machine may lack."""

from __future__ import annotations

import os
import shutil

import pytest


def needs(*programs: str) -> None:
    """Skips a test for which a program is missing; fails it where nothing may be skipped, as in CI."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    missing = [one for one in programs if not shutil.which(one, path=path)]
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        if os.environ.get("CARAMEL_TESTS_NO_SKIP", "") not in ("", "0"):
            pytest.fail(f"skipped, where nothing may be skipped: {reason}")
        pytest.skip(reason)
