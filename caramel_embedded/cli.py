"""The command: options to settings, one check on the key file, outcome to one line and an exit status.

A run that finds the key file locked needs none of TLS, HTTP and X.509, and one without options no option parser: what
costs time is imported where it is used.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Optional

from . import __version__, hardware, signals, system_log
from .errors import (
    EXIT_CERTIFIED,
    EXIT_FAILED,
    EXIT_LOCKED,
    EXIT_PENDING,
    CaramelError,
    Locked,
    UsageError,
)
from .identity import Identity, certificate_in, remembered
from .keyfile import KeyFile
from .settings import Settings

if TYPE_CHECKING:
    import argparse

    from .session import Outcome, Stored

NAME = "caramel-embedded"

# Options that are settings: flag, placeholder, name in the environment, help.
SETTINGS = (
    ("--server", "HOST[:PORT]", "CARAMEL_CA", "the Caramel server; port 443 if none is given"),
    ("--ca-cert", "PATH", "CARAMEL_CA_CERT", "PEM file of the only CA that is trusted"),
    (
        "--identity-ca",
        "PATH",
        "CARAMEL_IDENTITY_CA",
        "PEM file of the CA that signs this device, where that is not the one above",
    ),
    ("--key-file", "PATH", "CARAMEL_KEY_FILE", "where key, certificate and request are kept, in one file"),
    ("--client-id", "ID", "CARAMEL_CN", "who this device is; by default the hardware says"),
    (
        "--interfaces",
        "A,B",
        "CARAMEL_INTERFACES",
        "network interfaces whose MAC address may be the client ID",
    ),
    ("--domain", "NAME", "CARAMEL_DOMAIN", "makes a host name of an ID from the hardware"),
    ("--key-type", "TYPE", "CARAMEL_KEY_TYPE", "of new keys: rsa-2048 (the default), rsa-4096 or ec-p256"),
    ("--owner", "USER", "CARAMEL_OWNER", "owner of the key file; by default the caller"),
    ("--group", "GROUP", "CARAMEL_GROUP", "group of the key file; by default the caller's"),
    ("--mode", "OCTAL", "CARAMEL_MODE", "mode of the key file; by default 0600"),
    (
        "--timeout",
        "SECONDS",
        "CARAMEL_TIMEOUT",
        "limit on everything that waits on the network; by default 60",
    ),
    ("--hook", "COMMAND", "CARAMEL_HOOK", "run after a new certificate is in place"),
    ("--config", "PATH", "CARAMEL_CONFIG", "configuration file; by default /etc/caramel-embedded.conf"),
)


class Asked(Exception):
    """The command line asked for a text: it is for standard output, and the run ends with `status`."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


def parser() -> argparse.ArgumentParser:
    """The option parser: everything the command line can say. Raises `UsageError` and `Asked`, never exits."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    class Version(argparse.Action):
        def __call__(self, *_: object) -> NoReturn:
            raise Asked("%s %s\n" % (NAME, __version__))

    class Help(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
            raise Asked(parser.format_help())

    made = Parser(
        prog=NAME,
        description="Keep this device's key and certificate up to date with a Caramel server: one check, then gone.",
        epilog="Exit status: 0 the certificate is good; 1 another process holds the lock; 69 the request waits to be "
        "signed; 127 everything else.",
        allow_abbrev=False,
        add_help=False,
    )
    for flag, placeholder, name, text in SETTINGS:
        made.add_argument(flag, metavar=placeholder, dest=name, help="%s (%s)" % (text, name))
    made.add_argument("--status", action="store_true", help="print what the key file holds, and exit")
    made.add_argument(
        "--json", action="store_true", help="with --status: for machines; in a check: its outcome, on standard output"
    )
    made.add_argument("--syslog", action="store_true", help="log to syslog, not to standard error")
    volume = made.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="say every step")
    volume.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    made.add_argument("--version", action=Version, nargs=0, help="print the version, and exit")
    made.add_argument("-h", "--help", action=Help, nargs=0, help="print this text, and exit")
    return made


class Log:
    """Where a run's words go: one line on standard error or in syslog, more of them with -v."""

    def __init__(self) -> None:
        self.verbose = False
        self.quiet = False
        self.syslog = False
        self.json = False
        self.client_id: Optional[str] = None
        self.source = ""  # what told the client ID

    def step(self, text: str) -> None:
        """A step on the way, for somebody who looks for a fault."""
        if self.verbose:
            self._write("DEBUG", text)

    def result(self, status: int, text: str, priority: str = "INFO", **values: Any) -> Optional[str]:
        """How it ended; for standard output, where that was asked for, the same as JSON with `values`.

        `priority`, where it did not fail: NOTICE for what happens rarely in a device's life, WARNING for what its
        administrator has to know.
        """
        if status == EXIT_FAILED:
            priority = "ERROR"
        if not self.quiet or priority in ("ERROR", "WARNING"):
            self._write(priority, text)
        if not self.json:
            return None
        told = {"status": status, "client_id": self.client_id, "retry_after": None, "not_after": None, "new": False}
        return json.dumps({**told, **values, "message": text}) + "\n"

    def _write(self, priority: str, text: str) -> None:
        text = "".join(c if c.isprintable() else "?" for c in text)
        if self.client_id:
            text = "%s: %s" % (self.client_id, text)
        if self.syslog and system_log.send(getattr(system_log, priority), NAME, text):
            return
        write(2, "%s: %s\n" % (NAME, text))


def write(fd: int, text: str) -> None:
    """Writes `text` if that is possible at once; what can't be written must neither stop nor delay a run."""
    data = text.encode("utf-8", "backslashreplace")
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        # Up to PIPE_BUF (4096) bytes a pipe that is ready takes without waiting, pipe(7).
        if poll.poll(0):
            os.write(fd, data[:4095] + b"\n" if len(data) > 4096 else data)
    except OSError:
        pass


def main(arguments: Sequence[str], environment: Mapping[str, str], log: Log, locked: int) -> int:
    """One run of the command; its exit status, `locked` where that is `EXIT_LOCKED`.

    Raises `CaramelError` (127) and `Asked`.
    """
    options: dict[str, str] = {}
    status = False
    if arguments:
        parsed = vars(parser().parse_args(arguments))
        options = {name: parsed[name] for _, _, name, _ in SETTINGS if parsed[name] is not None}
        status = parsed["status"]
        log.verbose, log.quiet, log.syslog = parsed["verbose"], parsed["quiet"], parsed["syslog"]
        log.json = parsed["json"] and not status
        for flag, _, name, _ in SETTINGS:
            if options.get(name) == "":
                raise UsageError("%s: its value is empty" % flag)
    settings = Settings(options, environment)
    if settings.unknown:
        log.step("settings that this version doesn't know: " + ", ".join(settings.unknown))
    if status:
        from .status import report

        text, code = report(settings, parsed["json"])
        raise Asked(text, code)
    told: Optional[str]
    try:
        outcome, notes = run(settings, log)
    except Locked as reason:
        code, told = locked, log.result(EXIT_LOCKED, str(reason))
    else:
        code = EXIT_CERTIFIED if outcome.certified else EXIT_PENDING
        told = log.result(
            code,
            "; ".join([*notes, str(outcome)]),
            "WARNING" if outcome.notes or notes else "NOTICE" if outcome.new else "INFO",
            retry_after=outcome.retry_after,
            not_after=outcome.not_after,
            new=outcome.new,
        )
    if told:
        raise Asked(told, code)
    return code


def run(settings: Settings, log: Log) -> tuple[Outcome, list[str]]:
    """One check on the key file; its outcome, and what else its administrator has to know. Raises `CaramelError`."""
    log.client_id = settings.client_id
    try:
        outcome, notes = _check(settings, log)
    except Locked:
        raise
    except CaramelError as error:
        _call_hook(settings, log, str(error))  # it can be owed for the certificate that is in place
        raise
    _call_hook(settings, log, str(outcome))
    return outcome, notes


def judge(settings: Settings, data: bytes, modified: Optional[float], log: Log) -> Stored:
    """What the key file holds, judged for the client ID of this device, which the hardware tells if nobody does."""
    from .session import Stored, require_entropy
    from .trust import Trust

    require_entropy()  # before anything is loaded that would wait for it
    trust = Trust(settings.ca_cert(), settings.identity_ca(), settings.build_time, settings.key_type)
    fingerprints: tuple[str, ...] = ()
    if settings.client_id is None:
        present = hardware.Hardware(settings.interfaces)
        settings.client_id, source = _client_id(present, data, settings.domain)
        log.client_id = settings.client_id
        log.source = source
        log.step("client ID from the " + source)
        fingerprints = present.fingerprints
    return Stored(data, settings.client_id, trust, fingerprints, modified)


def _client_id(present: hardware.Hardware, data: bytes, domain: Optional[str]) -> tuple[str, str]:
    """The client ID, and where it is from: the key file, while the hardware is that of which it remembers an ID."""
    fields = remembered(data)
    stored = fields.get("id")
    if data and not stored:
        from . import certificates  # a file without the line of text, by an earlier version or another client

        stored = certificates.client_id_in(data)
    if stored and present.holds(stored, fields.get("hw", "").split(","), domain):
        return stored, "key file, which was made on this hardware"
    return present.client_id(domain)


def _check(settings: Settings, log: Log) -> tuple[Outcome, list[str]]:
    """The check of the library, with the key file, locked, to keep the bytes in."""
    file = KeyFile.open(settings.key_file)
    try:
        signals.catch()
        if settings.server is None:
            raise UsageError("no server: name one with --server or CARAMEL_CA")
        found = judge(settings, file.read() if file else b"", file.modified if file else None, log)
        place = (settings.owner, settings.group, settings.mode)
        if file is None:
            # Only now: whatever is wrong with the settings shows before anything is made.
            file = KeyFile.create(settings.key_file, *place)
            if file.read():
                raise Locked("another process has just made " + file.path)
        file.clean()
        if found.identity is not None and file.settle(found.data, *place):
            log.step("owner, group and mode of %s set" % file.path)
        from .session import Check

        store = _store_in(file, found, settings, log)
        outcome = Check(settings.server, found, store, settings.timeout, log.step).run()
        misplaced = file.misplaced(*place)
        return outcome, [misplaced] if misplaced else []
    finally:
        if file is not None:
            file.close()


def _store_in(file: KeyFile, found: Stored, settings: Settings, log: Log) -> Callable[[Identity], None]:
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


def _call_hook(settings: Settings, log: Log, so_far: str) -> None:
    """Calls the hook if it is owed. Raises `CaramelError`, which says `so_far` too: a run has one line for all."""
    if settings.hook and settings.client_id:
        from . import hook

        try:
            called = hook.settle(settings.key_file, settings.hook, settings.client_id, settings.timeout)
        except CaramelError as error:
            error.args = ("%s; %s" % (so_far, error),)
            raise
        log.step("the hook was called" if called else "the hook is not owed")
