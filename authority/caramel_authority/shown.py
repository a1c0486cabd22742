# SPDX-License-Identifier: MIT OR Apache-2.0
"""Text from outside, as it may stand on a terminal or in a log: it moves nothing, hides nothing, and is one line."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TextIO

#: What can't be seen, though its category is that of a letter, a mark or a symbol: Default_Ignorable_Code_Point
#: (Unicode, DerivedCoreProperties.txt) as far as the categories C and Z don't have it, then blanks that are symbols
#: or letters (Braille's, an object's place, Egyptian, Khitan, a note without its head).
INVISIBLE = frozenset(map(ord, "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")) | {
    *range(0xFE00, 0xFE10),
    *range(0xE0100, 0xE01F0),
    *map(ord, "\u2800\ufffc\U00013441\U00013442\U00016fe4\U0001d159"),
}
#: What needs no look at its category.
_NOT_PLAIN = re.compile("[^ -~\u00a1-\u00ac\u00ae-\u0233]")
_NOT_PLAIN_LINES = re.compile("[^\n -~\u00a1-\u00ac\u00ae-\u0233]")
_PLAIN_LINES = b"\n" + bytes(range(ord(" "), ord("~") + 1))


@lru_cache(4096)
def is_hidden(one: str) -> bool:
    """Whether this character isn't seen, or moves what is: control, format (the order of reading is one), private,
    unassigned (C), a separator that is no blank (Z), or INVISIBLE.
    """
    return one != " " and (unicodedata.category(one)[0] in "CZ" or ord(one) in INVISIBLE)


def shown(text: str) -> str:
    """The text with everything hidden as JSON writes it: `\\u001b`."""
    return _NOT_PLAIN.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1] if is_hidden(found[0]) else found[0]


class Shown:
    """A stream to a terminal or a log; what is written there is shown, line by line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # A log has millions of lines, and nearly all of them are plain.
        if not text.isascii() or text.encode().translate(None, _PLAIN_LINES):
            text = _NOT_PLAIN_LINES.sub(_escaped, text)
        return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
