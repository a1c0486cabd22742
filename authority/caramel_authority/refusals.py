# SPDX-License-Identifier: MIT OR Apache-2.0
"""What was refused, in a small file of its own: a database that comes back from an older copy is told of it again, so
that no copy lets in again who was kept out. `refusals` of the configuration says where it is; by default that is
beside the CA's folder, or the ACME account's key.

One line of JSON for each decision, written before the database's transaction ends. `n` counts them; the number
`refusals` in the database says up to which one it knows them. The lines of requests have the request itself: an older
database has never seen it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from . import store
from .configuration import Configuration
from .errors import say


class Refusals:
    def __init__(self, configuration: Configuration) -> None:
        acme = configuration.signer == "acme"
        beside = configuration.acme.account_key if acme else configuration.ca.folder
        self.path = Path(configuration.refusals or Path(beside).parent / "refusals")

    def write(self, db: Connection, action: str, **about: Any) -> None:
        """Remembers a decision of this transaction. What can't be written is said, and decided all the same."""
        number = store.number(db, "refusals", lock=True) + 1
        store.set_number(db, "refusals", number)
        line = json.dumps({"n": number, "at": store.now(), "action": action, **about}) + "\n"
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                size = os.fstat(handle).st_size
                if not size:
                    # Whoever may write to the folder may decide, as with SQLite's file: the signer's user as well.
                    with contextlib.suppress(PermissionError):
                        os.fchmod(handle, self.path.parent.stat().st_mode & 0o660)
                if os.write(handle, line.encode()) < len(line.encode()):
                    os.ftruncate(handle, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            say(f"{self.path}: {error.strerror}: a restored database won't know of this")

    def newer(self, db: Connection) -> list[dict[str, Any]]:
        """What the database doesn't know of, in the order in which it was decided."""
        known = store.number(db, "refusals")
        found = []
        with contextlib.suppress(FileNotFoundError), self.path.open() as lines:
            for line in lines:
                # One that the power cut in two was never a decision.
                with contextlib.suppress(json.JSONDecodeError):
                    read = json.loads(line)
                    if read["n"] > known:
                        found.append(read)
        return sorted(found, key=lambda line: int(line["n"]))
