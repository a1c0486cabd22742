"""A check that changes nothing: settings, hardware, client ID, CA, clock and what the server says, one line each.

It takes the lock as a check does, and reads; nothing is made, stored or posted, and no hook is called.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from typing import Optional

from . import certificates, device, enrollment, hook, pem
from .enrollment import State
from .errors import EXIT_CERTIFIED, EXIT_PENDING, NotReady, UsageError
from .hardware import Hardware
from .identity import Identity, Issued, utc
from .keyfile import KeyFile, require_place
from .log import INFO, Log
from .session import Check
from .settings import Settings
from .stored import Stored, usable
from .trust import Trust


class _Stop(Exception):
    """A check would go on with what this one doesn't do; the text says what."""


class _Rehearsal(Check):
    """Asks as a check does, up to where it would make, store or post something."""

    def _begin(self) -> Identity:
        if self._stored.identity is None:
            self._prepare()
            self._server.connect(None)
            self._server.reach()
            raise _Stop("the server was reached: a check would make a key, and send a request for it")
        return super()._begin()

    def _exchange(self, state: State, identity: Identity) -> tuple[enrollment.Event, Optional[Issued], str]:
        if state in enrollment.POSTS:
            raise _Stop("the server doesn't know the request: a check would send it")
        return super()._exchange(state, identity)

    def _new(self) -> Identity:
        self._prepare()
        raise _Stop("; ".join([*self._notes, "a check would make a new key, and send a request for it"]))


def rehearse(file: Optional[KeyFile], settings: Settings, log: Log) -> tuple[int, str]:
    """The exit status that a check would end with, as far as that can be told, and its last line.

    Closes the file. Raises `CaramelError` where a check would end with 127.
    """

    def say(text: str) -> None:
        log.result(INFO, text)

    try:
        say("dry run: nothing is made, stored or sent")
        say("settings: " + "; ".join("%s from %s" % each for each in sorted(settings.sources.items())))
        if settings.unknown:
            say("no settings: " + ", ".join(settings.unknown))
        if settings.server is None:
            raise UsageError(device.NO_SERVER)
        say("hardware: " + _hardware(settings))
        stored, identified = device.stored_identity(
            settings, file.read() if file else b"", file.modified if file else None, log
        )
        say("client ID from " + identified.source)
        _say_trust(stored.trust, say)
        say("key file %s: %s" % (settings.key_file, _kept(stored)))
        refusal = device.good_identity_of_another(settings, stored)
        if refusal:
            raise UsageError(refusal)

        def require() -> None:
            require_place(settings.key_file, settings.permissions)

        def prepare() -> None:
            command = settings.key_command
            if command is not None and shutil.which(command[0]) is None:
                reason = os.strerror(errno.EACCES if os.path.exists(command[0]) else errno.ENOENT)
                raise NotReady("the key command %s can't be run: %s" % (command[0], reason))
            require()

        def store(identity: Identity) -> None:
            before = stored.identity
            if before is None or (before.request, before.issued) != (identity.request, identity.issued):
                require()  # a file whose form alone is old stays as it is where it can't be replaced
            say("a check would store what is new")

        if stored.identity and file and not file.is_others and file.permissions != settings.permissions:
            require()
            say("a check would set owner, group and mode of the key file")
        check = _Rehearsal(
            *(settings.server, stored, store, settings.timeout, say, lambda identity: None),
            *(settings.key_command, prepare, settings.groups),
        )
        try:
            outcome = check.run()
        except _Stop as stop:
            return EXIT_PENDING, str(stop)
        certificate = outcome.identity.certificate
        if settings.hook is not None and certificate is not None and hook.is_owed(settings.key_file, certificate):
            say("a check would call the hook")
        return EXIT_CERTIFIED if outcome.certified else EXIT_PENDING, "a check would say: " + str(outcome)
    finally:
        if file is not None:
            file.close()


def _hardware(settings: Settings) -> str:
    found = ["%s %s" % (one.name, one.id or "(can't be read)") for one in Hardware(settings.interfaces).sources]
    return "; ".join(found) or "nothing that a client ID can come from"


def _say_trust(trust: Trust, say: Callable[[str], None]) -> None:
    anchors = certificates.anchors(trust, of_server=True)
    for what, text in {"identity's CA": trust.identity_ca, "trusted CA": trust.ca_cert}.items():
        if what == "trusted CA" or text != trust.ca_cert:
            say("%s: %s" % (what, " or ".join(certificates.label([one]) for one in pem.certificates(text))))
    clock = "clock: " + utc(time.time())
    if trust.clock_is_behind:
        clock += ", which is behind: it is past " + utc(trust.floor)
    if time.time() > anchors.ends:
        clock += ", which is after the end of the trusted CA, " + utc(anchors.ends)
    say(clock)


def _kept(stored: Stored) -> str:
    identity = stored.identity
    if identity is None:
        return "nothing that can be kept" if stored.data else "nothing"
    if usable(identity, stored.trust) and identity.issued:
        return "certificate valid until " + utc(identity.issued.not_after)
    return "request " + identity.request_hash
