# SPDX-License-Identifier: MIT OR Apache-2.0
"""Errors, named for what whoever gets them can do."""

from __future__ import annotations

import contextlib
import sys

from .shown import shown


class BadRequest(Exception):
    """What was posted will never be taken; the text says why. Nothing was stored."""


class WrongUsage(Exception):
    """The administrator has to change a command or the configuration; the text says what."""


class TryLater(Exception):
    """It could not be done now, and may be possible later. `seconds` is for how long there is no use in it."""

    def __init__(self, text: str, seconds: int = 60) -> None:
        super().__init__(text)
        self.seconds = seconds


def say(text: str) -> None:
    """For the administrator, who reads the log. That it can't be written, on a full disk, is no reason to do less."""
    with contextlib.suppress(OSError):
        print("\n".join(map(shown, text.splitlines())), file=sys.stderr, flush=True)
