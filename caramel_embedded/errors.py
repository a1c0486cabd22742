"""What can go wrong, named for what the caller can do about it.

Every error's text is one line that a person can act on, and holds no key material.
"""

from __future__ import annotations


class CaramelError(Exception):
    """The base of all errors that this package raises on purpose."""


class UsageError(CaramelError):
    """A setting or an argument is missing or wrong: correct it, the same call will not work later."""


class NotReady(CaramelError):
    """The machine can't do it at this moment (no entropy, a module is missing): nothing was changed."""


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
