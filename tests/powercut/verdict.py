"""What a power cut has left, as one word for each cut: the columns of the table."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Optional

from powercut.load import MARK, content
from powercut.stores import Store

#: From the worst to the best; what is found on several looks counts once, as the worst of them.
WORST_FIRST = ("lost", "torn", "wrong mode", "absent", "old", "new")
BAD = ("lost", "torn", "wrong mode", "stuck")

#: Where the program is told to keep its identity, below the file system's root, and what else it makes there.
FOLDER = "caramel"
KEY_FILE = FOLDER + "/identity.pem"
DRAFT = FOLDER + "/.identity.pem.new"

#: What a piece of an identity has in it, of either load.
SECRETS = (MARK, b"PRIVATE KEY")


@dataclass(frozen=True)
class File:
    """One file as the guest has found it."""

    path: str
    mode: int
    owner: int
    group: int
    data: bytes

    @classmethod
    def told(cls, told: dict[str, Any]) -> File:
        data = base64.b64decode(told.get("data", ""))
        return cls(str(told["path"]), int(told["mode"]), int(told["owner"]), int(told["group"]), data)

    @property
    def secret(self) -> bool:
        return any(word in self.data for word in SECRETS)

    def has_rights_of(self, store: Store) -> bool:
        """Whether it may be read by those who should, and by nobody else; a draft may also be its maker's only."""
        if self.path == DRAFT and self.mode == 0o600:
            return True
        wanted = store.mode if store.shown is None else store.shown
        return (self.owner, self.group, self.mode) == (store.owner, store.group, wanted)


def is_exposed(store: Store, files: list[File]) -> bool:
    """Whether the key file, or anything with a secret beside it, has an owner or mode that it shouldn't have."""
    ours = [file for file in files if file.path.startswith(FOLDER + "/")]
    return any(not file.has_rights_of(store) for file in ours if file.secret or file.path == KEY_FILE)


def number_of(data: bytes) -> Optional[int]:
    """Which replace has left this content, whole; None where none has."""
    try:
        number = int(data[len(MARK) : len(MARK) + 8])
    except ValueError:
        return None
    return number if data == content(number) else None


def of_replaces(store: Store, files: list[File], floor: Optional[int]) -> tuple[str, Optional[int]]:
    """The verdict on one look, and the number of the content that was found.

    `floor`: the number of the last replace that the program has said to be done; None: none was.
    """
    named = [file for file in files if file.path == KEY_FILE]
    if not named or not named[0].data:
        return ("absent" if floor is None else "lost"), None
    number = number_of(named[0].data)
    if number is None:
        return "torn", None
    if floor is not None and number < floor:
        return "lost", number
    if is_exposed(store, files):
        return "wrong mode", number
    return ("old" if number == floor else "new"), number


@dataclass
class Row:
    """One line of the table."""

    store: Store
    cuts: int = 0
    found: Counter[str] = field(default_factory=Counter)
    #: Cuts that have left a draft beside the key file; pieces that the file system's check has saved, and how many of
    #: them hold key material.
    drafts: int = 0
    saved: int = 0
    saved_secrets: int = 0
    #: Cuts after which the kernel would mount it only once it had been checked.
    unmountable: int = 0
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, word: str, line: str) -> None:
        self.cuts += 1
        self.found[word] += 1
        if word in BAD:
            self.lines.append(f"{word}: {line}")

    def count_beside(self, files: list[File]) -> list[File]:
        """Counts what a cut has left beside the key file; what doesn't belong on this file system at all."""
        self.drafts += any(file.path == DRAFT for file in files)
        saved = [file for file in files if not file.path.startswith(FOLDER + "/")]
        self.saved += len(saved)
        self.saved_secrets += sum(file.secret for file in saved)
        return saved

    @property
    def failed(self) -> bool:
        return self.store.promised and bool(self.lines)


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    columns = ["old", "new", "absent", *BAD]
    lines = [
        f"| file system | cuts | {' | '.join(columns)} | litter | had to be checked | pieces after fsck "
        "| of these with key material |",
        "| --- |" + " ---: |" * (len(columns) + 5),
    ]
    for row in rows:
        left = (row.drafts, row.unmountable, row.saved, row.saved_secrets)
        counts = [row.cuts, *(row.found[word] for word in columns), *left]
        lines.append(f"| {row.store.name} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"
