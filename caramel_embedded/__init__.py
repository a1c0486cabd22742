"""The identity of a device or an application: a private key that never leaves it, a certificate by a Caramel server.

`check` does the whole job on values: bytes in, a store to put bytes into, an outcome. The command
``caramel-embedded`` is the same check with a file to keep the bytes in. See ``docs/application-authors.md``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .errors import CaramelError, Locked, NotReady, Refused, StorageError, Unreachable, Untrusted, UsageError

if TYPE_CHECKING:
    from .identity import Identity
    from .session import Outcome, check

__version__ = "2.0.0"

__all__ = [
    "CaramelError",
    "Identity",
    "Locked",
    "NotReady",
    "Outcome",
    "Refused",
    "StorageError",
    "Unreachable",
    "Untrusted",
    "UsageError",
    "check",
]


def __getattr__(name: str) -> object:
    # A run of the command that finds the key file locked must not pay for TLS: what is not asked for is not loaded.
    if name in ("check", "Outcome", "Identity"):
        module = importlib.import_module(".identity" if name == "Identity" else ".session", __name__)
        return getattr(module, name)
    raise AttributeError("module %r has no attribute %r" % (__name__, name))
