# SPDX-License-Identifier: MIT OR Apache-2.0
"""What was refused, in a small file of its own: a database that comes back from an older copy is told of it again, so
that no copy lets in again who was kept out. `refusals` of the configuration says where it is; by default that is
beside the CA's folder, or the ACME account's key.

One line of JSON for each decision, written before the database's transaction ends. Of several lines about the same
thing (`about`: a request, a device's bar, its place on the list, the minimum) the one that was decided last counts,
`at` says when, in milliseconds. The database keeps the last line about each, in `refused`. So whoever has a newer one
tells the other, in whatever order, and several machines may each have a file. The lines of requests have the request
itself: an older database has never seen it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from . import store
from .configuration import Configuration
from .errors import WrongUsage, say
from .store import AUTHORIZED, BARRED, REJECTED, RETIRED, SUSPENDED
from .whole_file import flush

#: What is remembered of a request.
REMEMBERED = {"sha256": str, "pem": str, "client_id": str, "device": str, "key_sha256": str, "posted": int}
#: What a decision is about: a kind, and the name of what says which one; and all that its line has to say.
ABOUT: dict[str, tuple[str, str, dict[str, type]]] = {
    **dict.fromkeys((AUTHORIZED, REJECTED, RETIRED), ("request", "sha256", REMEMBERED)),
    **dict.fromkeys((BARRED, "unbarred", SUSPENDED, "resumed"), ("bar", "device", {"device": str})),
    "disallowed": ("list", "device", {"device": str}),
    "minimum": ("minimum", "", {"value": int}),
}
#: More than the longest line: a request has 2048 bytes.
LONGEST = 65536


class Line(NamedTuple):
    about: str
    at: int
    action: str
    said: dict[str, Any]
    text: str


class Refusals:
    def __init__(self, configuration: Configuration) -> None:
        acme = configuration.signer == "acme"
        beside = configuration.acme.account_key if acme else configuration.ca.folder
        self.path = Path(configuration.refusals or Path(beside).parent / "refusals")

    def write(self, db: Connection, action: str, **said: Any) -> None:
        """Remembers a decision of this transaction, which has locked what it is about. What can't be written to the
        file is said, and decided all the same.
        """
        kind, name, _ = ABOUT[action]
        known = store.refused_at(db, f"{kind} {said.get(name, '')}")
        # Later than the one before it, whatever the clock says.
        at = max(time.time_ns() // 1_000_000, known + 1)
        line = _read(json.dumps({"at": at, "action": action, **said}))
        store.set_refused(db, line.about, line.at, line.text)
        self.append([line.text])

    def append(self, lines: Iterable[str]) -> None:
        new = "".join(f"{line}\n" for line in lines).encode()
        try:
            # It is not made here: a new one would hide that the one with all the others is lost.
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                size = _end_of_lines(handle)
                if os.write(handle, new) < len(new):
                    os.ftruncate(handle, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            say(f"{self.path}: {error.strerror}: a restored database won't know of this")

    def make(self) -> None:
        """An empty file, where there is none: that it was there can be seen from now on. Raises WrongUsage."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                # Whoever may write to the folder may decide, as with SQLite's file: the signer's user as well.
                with contextlib.suppress(PermissionError):
                    os.fchmod(handle, self.path.parent.stat().st_mode & 0o660)
            finally:
                os.close(handle)
            flush(self.path.parent)
        except OSError as error:
            raise WrongUsage(f"{self.path}: {error.strerror}: what is refused is to be written there") from None

    def gone(self) -> WrongUsage:
        return WrongUsage(
            f"{self.path} is gone: who was refused after a copy of the database was made is not known without it. "
            "Put it back (on a new machine, the one of another machine), or say restore --forget"
        )

    def read(self) -> dict[str, Line] | None:
        """The last line about each thing, None where there is no file. Raises WrongUsage."""
        last: dict[str, Line] = {}
        try:
            with self.path.open("rb") as file:
                for number, content in enumerate(file, 1):
                    try:
                        line = _read(content)
                    except ValueError:
                        if not content.strip() or not content.endswith(b"\n"):
                            continue  # the power cut it in two: it was never a decision
                        wrong = f"{self.path}, line {number}: it can't be read: mend it, or take it out"
                        raise WrongUsage(wrong) from None
                    if line.about not in last or line.at >= last[line.about].at:
                        last[line.about] = line
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WrongUsage(f"{self.path}: {error.strerror}") from None
        return last


def _read(content: str | bytes) -> Line:
    """Raises ValueError where it is none of ours."""
    try:
        said = json.loads(content)
        kind, name, has = ABOUT[said["action"]]
        for one, type_ in {"at": int, **has}.items():
            # What a database can't take is no value either: half of a character, a number of more than 64 bits.
            if type(said[one]) is not type_ or (said[one] >> 62 if type_ is int else not said[one].encode()):
                raise ValueError(one)
        text = content if isinstance(content, str) else content.decode().strip()
        return Line(f"{kind} {said.get(name, '')}", said["at"], said["action"], said, text)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def _end_of_lines(handle: int) -> int:
    """Lets the next line begin behind the end of one; the file's size then. What the power cut in two goes."""
    size = os.fstat(handle).st_size
    last = os.pread(handle, LONGEST, max(0, size - LONGEST)).rpartition(b"\n")[2]
    if not last:
        return size
    try:
        _read(last)
    except ValueError:
        os.ftruncate(handle, size - len(last))
        return _end_of_lines(handle)
    return size + os.write(handle, b"\n")
