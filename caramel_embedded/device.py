"""The check on a device: the hardware says who it is, the key file keeps the bytes, the hook is called.

Loaded when the key file is locked: a run that finds it locked by somebody else needs none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Optional

from . import cli
from .errors import CaramelError, Locked, UsageError
from .identity import Identity, certificate_in, remembered
from .keyfile import KeyFile
from .settings import Settings
from .stored import Stored, require_entropy
from .trust import Trust

if TYPE_CHECKING:
    from .hardware import Hardware
    from .session import Outcome


def check(file: Optional[KeyFile], settings: Settings, log: cli.Log) -> tuple[Outcome, list[str]]:
    """One check on `file`, locked, or None where there is none; its outcome, and what else there is to know.

    Closes the file. Raises `CaramelError`.
    """
    try:
        outcome, notes = _check(file, settings, log)
    except Locked:
        raise
    except CaramelError as error:
        _call_hook(settings, log, str(error))  # it can be owed for the certificate that is in place
        raise
    _call_hook(settings, log, str(outcome))
    return outcome, notes


def _check(file: Optional[KeyFile], settings: Settings, log: cli.Log) -> tuple[Outcome, list[str]]:
    place = (settings.owner, settings.group, settings.mode)
    try:
        if settings.server is None:
            raise UsageError("no server: name one with --server or CARAMEL_CA")
        found = stored_identity(settings, file.read() if file else b"", file.modified if file else None, log)
        if file is None:
            # Only now: whatever is wrong with the settings shows before anything is made.
            file = KeyFile.create(settings.key_file, *place)
            if file.read():
                raise Locked("another process has just made " + file.path)
        file.clean()
        # Only what was judged: the path may lead to somebody else's file.
        if found.identity is not None and not file.is_others and file.misplaced(*place):
            file.settle(*place)
            log.step("owner, group and mode of %s set" % file.path)
        store = _store_in(file, found, settings, log)
        from .session import Check  # HTTP: not for --status, which judges the file with what stands here

        outcome = Check(settings.server, found, store, settings.timeout, log.step).run()
        if file.is_others and file.misplaced(*place):
            # Another inode: its former owner may have the old one open for writing.
            file.replace(bytes(outcome.identity), outcome.identity.modified, *place)
        misplaced = file.misplaced(*place)
        return outcome, [misplaced] if misplaced else []
    finally:
        if file is not None:
            file.close()


def stored_identity(settings: Settings, data: bytes, modified: Optional[float], log: cli.Log) -> Stored:
    """What the key file holds, examined for the client ID of this device, which the hardware tells if nobody does."""
    require_entropy()  # before anything is loaded that would wait for it
    trust = Trust(settings.ca_cert(), settings.identity_ca(), settings.build_time, settings.key_type)
    fingerprints: tuple[str, ...] = ()
    if settings.client_id is None:
        from . import hardware

        present = hardware.Hardware(settings.interfaces)
        settings.client_id, source = _client_id(present, data, settings.domain)
        log.client_id = settings.client_id
        log.source = source
        log.step("client ID from the " + source)
        fingerprints = present.fingerprints
    return Stored(data, settings.client_id, trust, fingerprints, modified)


def _client_id(present: Hardware, data: bytes, domain: Optional[str]) -> tuple[str, str]:
    """The client ID, and where it is from: the key file, while the hardware is that of which it remembers an ID."""
    fields = remembered(data)
    stored = fields.get("id")
    if data and not stored:
        from . import certificates  # a file without the line of text, by an earlier version or another client

        stored = certificates.client_id_in(data)
    if stored and present.holds(stored, fields.get("hw", "").split(","), domain):
        return stored, "key file, which was made on this hardware"
    return present.client_id(domain)


def _store_in(file: KeyFile, found: Stored, settings: Settings, log: cli.Log) -> Callable[[Identity], None]:
    """What keeps an identity in the key file."""

    def store(identity: Identity) -> None:
        if bytes(identity) == found.data and identity.modified is not None:
            file.touch(identity.modified)
            return
        # Not for the same certificate, where only its form or the request had to be made again.
        certificate = identity.certificate
        if settings.hook and certificate is not None and certificate != certificate_in(found.data):
            from . import hook

            hook.owe(file.path, certificate)
        try:
            file.replace(bytes(identity), identity.modified, settings.owner, settings.group, settings.mode)
        except CaramelError as error:
            before = found.identity
            if before is None or (before.request, before.issued) != (identity.request, identity.issued):
                raise
            log.step("%s: it keeps the form that it has" % error)  # and is judged at each check
        else:
            log.step("stored in %s" % file.path)

    return store


def _call_hook(settings: Settings, log: cli.Log, so_far: str) -> None:
    """Calls the hook if it is owed. Raises `CaramelError`, which says `so_far` too: a run has one line for all."""
    if settings.hook and settings.client_id:
        from . import hook

        try:
            called = hook.settle(settings.key_file, settings.hook, settings.client_id, settings.timeout)
        except CaramelError as error:
            error.args = ("%s; %s" % (so_far, error),)
            raise
        log.step("the hook was called" if called else "the hook is not owed")
