"""The command: options to settings, one check on the key file, outcome to one line and an exit status.

A run that finds the key file locked needs none of TLS, HTTP and X.509, and one without options no option parser: what
costs time is imported where it is used.
"""

from __future__ import annotations

import os

from . import __version__, signals
from .errors import CaramelError, Locked, UsageError
from .keyfile import KeyFile
from .settings import Settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from typing import Any, NoReturn, Optional

    from .identity import Identity
    from .session import Outcome

NAME = "caramel-embedded"

CERTIFIED = 0
LOCKED = 1
PENDING = 69  # EX_UNAVAILABLE, sysexits.h
FAILED = 127

# Options that are settings: flag, placeholder, name in the environment, help.
SETTINGS = (
    ("--server", "HOST[:PORT]", "CARAMEL_CA", "the Caramel server; port 443 if none is given"),
    ("--ca-cert", "PATH", "CARAMEL_CA_CERT", "PEM file of the only CA that is trusted"),
    ("--key-file", "PATH", "CARAMEL_KEY_FILE", "where key, certificate and request are kept, in one file"),
    ("--client-id", "ID", "CARAMEL_CN", "who this device is; by default the hardware says"),
    (
        "--interfaces",
        "A,B",
        "CARAMEL_INTERFACES",
        "network interfaces whose MAC address may be the client ID",
    ),
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
    made.add_argument("--json", action="store_true", help="with --status: for machines")
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
        self.client_id: Optional[str] = None

    def step(self, text: str) -> None:
        """A step on the way, for somebody who looks for a fault."""
        if self.verbose:
            self._write("DEBUG", text)

    def result(self, status: int, text: str, priority: str = "INFO") -> None:
        """How it ended. `priority`, where it did not fail: NOTICE for what happens rarely in a device's life, WARNING
        for what its administrator has to know."""
        if status == FAILED:
            priority = "ERROR"
        if not self.quiet or priority in ("ERROR", "WARNING"):
            self._write(priority, text)

    def _write(self, priority: str, text: str) -> None:
        text = "".join(c if c.isprintable() else "?" for c in text)
        if self.client_id:
            text = "%s: %s" % (self.client_id, text)
        if self.syslog:
            from . import system_log

            if system_log.send(getattr(system_log, priority), NAME, text):
                return
        write(2, "%s: %s\n" % (NAME, text))


def write(fd: int, text: str) -> None:
    """Writes `text` if that is possible at once; what can't be written must neither stop nor delay a run."""
    import select

    data = text.encode("utf-8", "backslashreplace")
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        # Up to PIPE_BUF (4096) bytes a pipe that is ready takes without waiting, pipe(7).
        if poll.poll(0):
            os.write(fd, data[:4095] + b"\n" if len(data) > 4096 else data)
    except OSError:
        pass


def main(arguments: Sequence[str], environment: Mapping[str, str], log: Log) -> int:
    """One run of the command; its exit status. Raises `CaramelError` (127) and `Asked`."""
    options: dict[str, str] = {}
    status = json = False
    if arguments:
        parsed = vars(parser().parse_args(arguments))
        options = {name: parsed[name] for _, _, name, _ in SETTINGS if parsed[name] is not None}
        status, json = parsed["status"], parsed["json"]
        log.verbose, log.quiet, log.syslog = parsed["verbose"], parsed["quiet"], parsed["syslog"]
        _require(options, json, status)
    settings = Settings(options, environment)
    if settings.unknown:
        log.step("settings that this version doesn't know: " + ", ".join(settings.unknown))
    if status:
        from .status import report

        text, code = report(settings, json)
        raise Asked(text, code)
    return run(settings, log)


def _require(options: Mapping[str, str], json: bool, status: bool) -> None:
    if json and not status:
        raise UsageError("--json goes with --status")
    for flag, _, name, _ in SETTINGS:
        if options.get(name) == "":
            raise UsageError("%s: its value is empty" % flag)


def run(settings: Settings, log: Log) -> int:
    """One check on the key file; the exit status. Raises `CaramelError`."""
    log.client_id = settings.client_id
    try:
        file = KeyFile.open(settings.key_file)
        try:
            signals.catch()
            arguments = _arguments(settings, log)
            if file is None:
                # Whatever is wrong with the settings has to show before anything is made.
                file = _create(settings, arguments)
            outcome = _check(file, settings, arguments)
        finally:
            if file is not None:
                file.close()
    except Locked as reason:
        log.result(LOCKED, str(reason))
        return LOCKED
    except CaramelError as error:
        _call_hook(settings, log, str(error))  # it can be owed for the certificate that is in place
        raise
    _call_hook(settings, log, str(outcome))
    status = CERTIFIED if outcome.certified else PENDING
    log.result(status, str(outcome), "WARNING" if outcome.notes else "NOTICE" if outcome.new else "INFO")
    return status


def _arguments(settings: Settings, log: Log) -> dict[str, Any]:
    """What the check wants to know from the settings, and from the hardware where they are silent."""
    from . import identity

    if settings.server is None:
        raise UsageError("no server: name one with --server or CARAMEL_CA")
    identity.require_entropy()  # before anything is loaded that would wait for it
    if settings.client_id is None:
        from . import hardware

        settings.client_id, source = hardware.client_id(settings.interfaces)
        log.client_id = settings.client_id
        log.step("client ID from the " + source)
    return {
        "server": settings.server,
        "ca_cert": settings.ca_cert(),
        "client_id": settings.client_id,
        "timeout": settings.timeout,
        "build_time": settings.build_time,
        "say": log.step,
    }


def _create(settings: Settings, arguments: Mapping[str, Any]) -> KeyFile:
    from .trust import Trust

    Trust(arguments["ca_cert"], arguments["build_time"])
    return KeyFile.create(settings.key_file, settings.owner, settings.group, settings.mode)


def _check(file: KeyFile, settings: Settings, arguments: Mapping[str, Any]) -> Outcome:
    """The check of the library, with the key file to keep the bytes in."""
    from . import session
    from .identity import certificate_in

    file.clean()
    data = file.read()
    place = (settings.owner, settings.group, settings.mode)

    def store(identity: Identity) -> None:
        if bytes(identity) == data and identity.modified is not None:
            file.touch(identity.modified)
            return
        # Not for the same certificate, where only the request had to be made again.
        certificate = identity.certificate
        if settings.hook and certificate is not None and certificate != certificate_in(data):
            from . import hook

            hook.owe(file.path, certificate)
        file.replace(bytes(identity), identity.modified, *place)
        arguments["say"]("stored in %s" % file.path)

    if not file.has(*place):
        # By replacing it: at no instant does the file have the new owner with the old mode.
        file.replace(data, file.modified, *place)
        arguments["say"]("owner, group and mode of %s set" % file.path)
    return session.check(stored=data, store=store, modified=file.modified, **arguments)


def _call_hook(settings: Settings, log: Log, so_far: str) -> None:
    """Calls the hook if it is owed. Raises `CaramelError`, which says `so_far` too: a run has one line for all."""
    if settings.hook and settings.client_id:
        from . import hook

        path = os.path.realpath(settings.key_file)
        try:
            called = hook.settle(path, settings.hook, settings.client_id, settings.timeout)
        except CaramelError as error:
            error.args = ("%s; %s" % (so_far, error),)
            raise
        log.step("the hook was called" if called else "the hook is not owed")
