"""The hook: a command that runs once for each new certificate that is in place.

Responsible for calling it until it has succeeded: a note beside the key file holds the hash of the last certificate
that it succeeded for. A power cut between the hook's good end and the note means that the next run calls it again.
The hook runs without the key file's lock, so it may start this program again; the note is locked meanwhile, so that
such a run, or one by cron, doesn't call the hook a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from .errors import CaramelError, Locked, StorageError
from .identity import Identity, utc
from .keyfile import KeyFile, beside, peek
from .settings import Permissions


class HookFailed(CaramelError):
    """The certificate is in place, the hook did not succeed: the next run calls it again."""


def call(key_file: str, identity: Identity, command: Sequence[str], limit: float, permissions: Permissions) -> bool:
    """Runs `command` if it is owed for the certificate of `identity`, which is in `key_file`; whether it ran.

    `limit`: seconds; `permissions`: of the key file, whose owner gets the note. Raises `HookFailed`, `StorageError`.
    """
    issued = identity.issued
    assert issued is not None
    permissions = permissions._replace(mode=0o600)
    try:
        note = KeyFile.create(beside(key_file, "hook"), permissions)
    except Locked:
        return False  # another run is at it; perhaps the hook itself has started this one
    try:
        if note.read() == _succeeded(issued.pem):
            return False
        environment = {
            "CARAMEL_CN": identity.client_id,
            "CARAMEL_KEY_FILE": key_file,
            "CARAMEL_NOT_AFTER": utc(issued.not_after),
        }
        _run(command, environment, limit)
        note.replace(_succeeded(issued.pem), None, permissions)
        return True
    finally:
        note.close()


def is_owed(key_file: str, certificate: bytes) -> bool:
    """Whether the hook is owed for `certificate`, PEM, as far as the caller may see that."""
    try:
        return peek(beside(key_file, "hook"))[0] != _succeeded(certificate)
    except StorageError:
        return False


def _succeeded(certificate: bytes) -> bytes:
    """The note that says so. A note of 2.0.0 has bare hashes of certificates that the hook is owed for."""
    return b"done=%s\n" % hashlib.sha256(certificate).hexdigest().encode()


def _run(command: Sequence[str], environment: Mapping[str, str], limit: float) -> None:
    from . import program  # most runs with a hook have none to call

    try:
        # Standard output belongs to whoever asked for it; a hook's words are for the log.
        status, _, _ = program.run(command, program.surroundings(environment), limit, output=2)
    except program.Failed as problem:
        raise HookFailed("the hook %s %s" % (command[0], problem)) from None
    if status > 0:
        raise HookFailed("the hook %s failed with status %d" % (command[0], status))
