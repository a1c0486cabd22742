"""What can go wrong, named for what the caller can do about it; and the command's exit statuses.

Every error's text is one line that a person can act on, and holds no key material.
"""

from __future__ import annotations

from typing import Optional

EXIT_CERTIFIED = 0
EXIT_LOCKED = 1
EXIT_PENDING = 69  # EX_UNAVAILABLE, sysexits.h
EXIT_FAILED = 127

# The name that a package is installed by, where it isn't the module's.
_PACKAGES = {"OpenSSL": "pyOpenSSL"}


class CaramelError(Exception):
    """The base of all errors that this package raises on purpose.

    Attributes: retry_after: seconds that the server asked to wait before the next check, or None.
    """

    retry_after: Optional[int] = None


class UsageError(CaramelError):
    """A setting or an argument is missing or wrong: correct it, the same call will not work later."""


class NotReady(CaramelError):
    """The machine can't do it at this moment (no entropy, a package is missing): nothing was changed."""


class KeyUnusable(NotReady):
    """The chip that holds the key can't be used now: what was new is stored all the same, and nothing is lost."""


class Locked(CaramelError):
    """Another process holds the lock on the key file: it does the work, there is nothing to do here."""


class StorageError(CaramelError):
    """The identity can't be read or stored where it is kept: what was stored before is still there."""


class Unreachable(CaramelError):
    """No answer within the time limit, or the connection broke: try again later."""


class Untrusted(CaramelError):
    """Whoever answered can't show a certificate for the server's name by the trusted CA: look at the CA
    certificate, the server's name, the clock, and who is in between."""


class Refused(CaramelError):
    """The server's answer can't be used: its administrator has to look at it, or a proxy is in between."""


def lacking(error: BaseException, names: str) -> str:
    """What to say where a package can't be loaded: `error` is what loading it raised, `names` what was loaded."""
    if isinstance(error, ImportError) and error.name:
        module = error.name.split(".")[0]
        names = _PACKAGES.get(module, module)
    return "this device lacks the Python package %s, or it is broken" % names


def printable(text: str, most: int = 200) -> str:
    """Somebody else's words, fit for one line of a log: at most so many characters."""
    return "".join(c if c.isprintable() else "?" for c in text[:most])
