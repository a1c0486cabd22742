"""The hook: a command that runs once for each new certificate that is in place.

Responsible for calling it until it has succeeded: a note beside the key file holds the hash of the last certificate
that it succeeded for. A power cut between the hook's good end and the note means that the next run calls it again.
The hook runs without the key file's lock, so it may start this program again; the note is locked meanwhile, so that
a run by cron doesn't call the hook a second time. It runs with the rights of whoever started this program, who need
not be the file's owner: so it is called for what this very run has found good, whatever a seal or a note says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence

from . import pem
from .errors import CaramelError, Locked, StorageError
from .identity import Identity, Issued, utc
from .keyfile import Folder, KeyFile, beside, peek
from .settings import Permissions
from .trust import Trust

# Where programs of the system are that cron's PATH has not.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class HookFailed(CaramelError):
    """The certificate is in place, the hook did not succeed: the next run calls it again."""


def call(
    key_file: str,
    identity: Identity,
    trust: Trust,
    command: Sequence[str],
    limit: float,
    environment: Mapping[str, str],
) -> bool:
    """Runs `command` if it is owed for the certificate of `identity`, which is in `key_file`; whether it ran.

    `limit`: seconds; `environment`: the caller's. Raises `HookFailed`, `StorageError`.
    """
    content, status = peek(key_file)
    certificate = identity.certificate
    if certificate is None or status is None or pem.first(content, pem.CERTIFICATE) != certificate:
        return False  # another run has stored a newer one meanwhile, and calls it for that
    permissions = Permissions(status.st_uid, status.st_gid, 0o600)
    path = beside(key_file, "hook")
    _remove_unreadable(path)
    try:
        note = KeyFile.create(path, permissions)
    except Locked:
        return False  # another run is at it
    try:
        if note.read() == _succeeded(certificate):
            return False
        issued = _judged(identity, trust)
        note.clean()
        search = environment.get("PATH") or os.defpath
        missing = [folder for folder in SBIN if folder not in search.split(":")]
        more = {
            "PATH": ":".join([search, *missing]),
            "CARAMEL_CN": identity.client_id,
            "CARAMEL_KEY_FILE": key_file,
            "CARAMEL_NOT_AFTER": utc(issued.not_after),
            "CARAMEL_IN_HOOK": "1",
        }
        _run(command, {**environment, **more}, limit)
        note.replace(_succeeded(certificate), None, permissions)
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


def _remove_unreadable(path: str) -> None:
    """Removes a note that a run of root's has left to itself, as 2.0.0's did: it would be in the way for ever."""
    with Folder(path) as folder:
        try:
            os.close(folder.open(folder.name))
        except PermissionError:
            folder.discard(folder.name)
        except (OSError, StorageError):
            pass  # there is none, or what it is will be said


def _judged(identity: Identity, trust: Trust) -> Issued:
    """The identity's certificate, looked at as a whole. Raises `HookFailed`."""
    from . import certificates

    issued = identity.issued
    assert issued is not None
    try:
        anchors = certificates.anchors(trust)
        return certificates.accept(issued.text, identity, anchors, trust, issued.modified)
    except certificates.InvalidCertificate as reason:
        raise HookFailed("the hook was not called: the certificate %s" % reason) from None


def _run(command: Sequence[str], environment: Mapping[str, str], limit: float) -> None:
    from . import program  # most runs with a hook have none to call

    try:
        # Standard output belongs to whoever asked for it; a hook's words are for the log.
        status, _, _ = program.run(command, environment, limit, output=2)
    except program.Failed as problem:
        raise HookFailed("the hook %s %s" % (command[0], problem)) from None
    if status > 0:
        raise HookFailed("the hook %s failed with status %d" % (command[0], status))
