# SPDX-License-Identifier: MIT OR Apache-2.0
"""When devices asked last. It is written for many of them at once, and for each at most once an hour: a check reads
only, and waits for no writer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from sqlalchemy.exc import DBAPIError

from . import store
from .errors import say
from .store import Store, now

#: Seconds in which a device that is seen again is not written down again.
HOUR = 3600
#: Seconds that what was seen waits for others to be written with it.
GATHER = 2.0


class Sightings:
    """`hourly` is done as often, by whichever process sees devices."""

    def __init__(self, store: Store, hourly: Callable[[], object]) -> None:
        self._store = store
        self._hourly = hourly
        self._last = 0
        self._failed = False
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[int, str | None]] = {}

    def note(self, sha256: str, address: str | None, last: int | None) -> None:
        """The device with this request asks now, from this address; the database says that it did so `last`."""
        # A time in the future is from a clock that was ahead.
        if last is not None and now() - HOUR < last <= now():
            return
        with self._lock:
            first = not self._seen
            self._seen[sha256] = (now(), address)
        if first:
            timer = threading.Timer(GATHER, self.write)
            timer.daemon = True
            timer.start()

    def write(self) -> None:
        """Writes down what was gathered. What can't be is seen again in an hour at most."""
        with self._lock:
            seen, self._seen = self._seen, {}
        try:
            with self._store.writing() as db:
                # In the same order in every process, so that two never wait for each other.
                store.see(db, dict(sorted(seen.items())))
            if not self._last <= now() < self._last + HOUR:
                self._last = now()
                self._hourly()
            self._failed = False
        except DBAPIError as error:
            if not self._failed:  # a full disk is said once, and not every two seconds
                say(f"what was last seen: {error.orig}")
            self._failed = True
