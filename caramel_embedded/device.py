"""The check on a device: the hardware says who it is, the key file keeps the bytes, the hook is called.

One pass: settings, key file, identity, server, key file, hook. Loaded when the key file is locked: a run that finds
it locked by somebody else needs none of this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Optional

from .errors import CaramelError, KeyUnusable, Locked, UsageError
from .identity import Identity, remembered
from .keyfile import KeyFile
from .log import Log
from .settings import ClientId, Permissions, Settings, same_name
from .stored import Stored, require_entropy, usable
from .trust import Trust

# Their modification times have passed: systemd's build, and its last synchronization; systemd-timesyncd.service(8).
CLOCK_FILES = ("/usr/lib/clock-epoch", "/var/lib/systemd/timesync/clock")

NO_SERVER = "no server: name one with --server or CARAMEL_CA"

if TYPE_CHECKING:
    from .session import Outcome


def check(
    file: Optional[KeyFile], settings: Settings, environment: Mapping[str, str], log: Log
) -> tuple[Outcome, list[str]]:
    """One check on `file`, locked, or None where there is none; its outcome, and what else there is to know.

    Closes the file. `environment`: the caller's, for the hook. Raises `CaramelError`.
    """
    failure: Optional[CaramelError] = None
    try:
        if settings.server is None:
            raise UsageError(NO_SERVER)
        stored, _ = stored_identity(settings, file.read() if file else b"", file.modified if file else None, log)
        refusal = good_identity_of_another(settings, stored)
        if refusal:
            raise UsageError(refusal)
        if file is None:
            # Only now: whatever is wrong with the settings shows before anything is made.
            file = KeyFile.create(settings.key_file, settings.permissions)
            if file.read():
                raise Locked("another process has just made " + file.path)
        from .session import Check  # HTTP: not for --status, which judges the file with what stands here

        store = _Store(file, stored, settings.permissions, log)
        address, say, command = settings.server, log.step, settings.key_command
        conversation = Check(
            *(address, stored, store.replace, settings.timeout, say, store.touch),
            *(command, file.prepare, settings.groups),
        )
        remarks = file.remarks
        try:
            outcome = conversation.run()
            remarks += store.finish(outcome.identity)
        except CaramelError as error:
            failure = error
    finally:
        if file is not None:
            file.close()
    ended = str(failure or outcome)
    so_far = "; ".join([*(remark for remark in remarks if remark != ended), ended])
    try:
        # Without the lock, and also after a failure: it can be owed for the certificate that is in place.
        if not isinstance(failure, KeyUnusable):
            _call_hook(settings, environment, file.path, conversation.kept, stored.trust, log)
    except CaramelError as error:
        error.args = ("%s; %s" % (so_far, error),)  # a run has one line for all
        raise
    if failure is not None:
        failure.args = (so_far,)
        raise failure
    return outcome, remarks


def stored_identity(
    settings: Settings,
    data: bytes,
    modified: Optional[float],
    log: Log,
    identify: Optional[Callable[[Settings, bytes, Trust], ClientId]] = None,
) -> tuple[Stored, ClientId]:
    """What the key file holds, examined for the client ID of this device; and that ID.

    `modified`: the file's time, seconds since 1970, UTC; `identify`: tells the client ID in another way than a check
    does. Raises `CaramelError`.
    """
    require_entropy()  # before anything is loaded that would wait for it
    trust = Trust(settings.ca_cert(), settings.identity_ca(), settings.build_time, settings.key_type)
    for path in CLOCK_FILES:
        with suppress(OSError):
            trust.learn(os.stat(path).st_mtime)
    identified = (identify or client_id)(settings, data, trust)
    log.client_id = identified.text
    log.step("client ID from %s" % identified.source)
    return Stored(data, identified.text, trust, identified.hardware, modified), identified


def client_id(settings: Settings, data: bytes, trust: Trust) -> ClientId:
    """The client ID of this device, for which what is stored can vouch. Raises `UsageError`."""
    if settings.client_id is not None:
        return ClientId(settings.client_id, settings.sources["CARAMEL_CN"])
    from . import hardware

    sealed = Identity.sealed(data, trust.digest)
    known = sealed.hardware if sealed else remembered(data)
    stored = sealed.client_id if sealed else stored_client_id(data, trust)
    return hardware.identify(settings.interfaces, settings.domain, stored, known, sealed is not None)


def stored_client_id(data: bytes, trust: Trust) -> Optional[str]:
    """The client ID of what is stored: the sealed line's, or that of the request, which its key has signed."""
    sealed = Identity.sealed(data, trust.digest)
    if sealed is not None or not data:
        return sealed and sealed.client_id
    from . import certificates

    return certificates.client_id_in(data)


def good_identity_of_another(settings: Settings, stored: Stored) -> Optional[str]:
    """Why a check leaves what is stored as it is: a person gave another client ID than that of a good identity."""
    if stored.identity is not None or settings.replace or not settings.by_hand:
        return None
    other = stored_client_id(stored.data, stored.trust)
    if other is None or same_name(other, stored.client_id):
        return None
    trust = Trust(settings.ca_cert(), settings.identity_ca(), settings.build_time, settings.key_type)
    if not usable(Stored(stored.data, other, trust).identity, trust):
        return None
    return (
        "%s holds a good identity of %s, and not of %s: give --replace to start over as %s, or another file with "
        "--instance or --key-file" % (settings.key_file, other, stored.client_id, stored.client_id)
    )


class _Store:
    """Keeps an identity in the key file."""

    def __init__(self, file: KeyFile, stored: Stored, permissions: Permissions, log: Log) -> None:
        self._file = file
        self._stored = stored
        self._permissions = permissions
        self._log = log
        file.clean()
        # Only what was judged: the path may lead to somebody else's file.
        if stored.identity is not None and not file.is_others and file.permissions != permissions:
            file.set_permissions(permissions)
            log.step("owner, group and mode of %s set" % file.path)

    def replace(self, identity: Identity) -> None:
        """Stores it. Raises `CaramelError`."""
        try:
            self._file.replace(bytes(identity), identity.modified, self._permissions)
        except CaramelError as error:
            before = self._stored.identity
            if before is None or (before.request, before.issued) != (identity.request, identity.issued):
                raise
            self._log.step("%s: it keeps the form that it has" % error)  # and is judged at each check
        else:
            self._log.step("stored in %s" % self._file.path)

    def touch(self, identity: Identity) -> None:
        """Stores the time of its certificate."""
        if identity.modified is not None:
            self._file.touch(identity.modified)

    def finish(self, identity: Identity) -> list[str]:
        """What a person has to know of the file at the end of a check that succeeded. Raises `CaramelError`."""
        if self._file.is_others and self._file.permissions != self._permissions:
            # Another inode: its former owner may have the old one open for writing.
            self._file.replace(bytes(identity), identity.modified, self._permissions)
        has, wanted = self._file.permissions, self._permissions
        if has == wanted:
            return []
        return [
            "the file system doesn't keep the key file's owner and mode: %d:%d, %04o in the place of %d:%d, %04o "
            "(a FAT needs the mount options fmask=0177,dmask=077,uid=%d,gid=%d)" % (*has, *wanted, *wanted[:2])
        ]


def _call_hook(
    settings: Settings,
    environment: Mapping[str, str],
    key_file: str,
    identity: Optional[Identity],
    trust: Trust,
    log: Log,
) -> None:
    """Calls the hook if it is owed for `identity`, which is in the key file. Raises `CaramelError`."""
    if settings.hook is None or identity is None or not usable(identity, trust):
        return
    if environment.get("CARAMEL_IN_HOOK"):
        log.step("inside of a hook: none is called")
        return
    from . import hook

    if identity.holder != "software" and hook.is_owed(key_file, identity.certificate or b""):
        from . import held

        # What the hook starts again would not come up without its key.
        reason = held.why_not(identity)
        if reason:
            raise KeyUnusable("the hook has to wait: the key can't be used, %s" % reason)
    called = hook.call(key_file, identity, trust, settings.hook, settings.timeout, environment)
    log.step("the hook was called" if called else "the hook is not owed")
