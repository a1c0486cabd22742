"""The command: options to settings, one check on the key file, outcome to one line and an exit status.

A run that finds the key file locked needs none of TLS, HTTP and X.509, and one without options no option parser: what
costs time is imported where it is used.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Optional

from . import __version__, signals
from .errors import (
    EXIT_CERTIFIED,
    EXIT_FAILED,
    EXIT_LOCKED,
    EXIT_PENDING,
    Locked,
    UsageError,
    printable,
)
from .keyfile import KeyFile
from .settings import SETTINGS, Settings

if TYPE_CHECKING:
    import argparse

NAME = "caramel-embedded"


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
    for name, _, flag, placeholder, text in SETTINGS:
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
        import json

        told = {"status": status, "client_id": self.client_id, "retry_after": None, "not_after": None, "new": False}
        return json.dumps({**told, **values, "message": text}) + "\n"

    def _write(self, priority: str, text: str) -> None:
        text = printable(text, len(text))
        if self.client_id:
            text = "%s: %s" % (self.client_id, text)
        if self.syslog:
            from . import system_log

            if system_log.send(getattr(system_log, priority), NAME, text):
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


def main(arguments: Sequence[str], environment: Mapping[str, str], log: Log) -> int:
    """One run of the command; its exit status.

    Raises `CaramelError` (127) and `Asked`.
    """
    options: dict[str, str] = {}
    status = False
    if arguments:
        parsed = vars(parser().parse_args(arguments))
        options = {name: parsed[name] for name, *_ in SETTINGS if parsed[name] is not None}
        status = parsed["status"]
        log.verbose, log.quiet, log.syslog = parsed["verbose"], parsed["quiet"], parsed["syslog"]
        log.json = parsed["json"] and not status
        for name, _, flag, *_ in SETTINGS:
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
        log.client_id = settings.client_id
        file = KeyFile.open(settings.key_file)
        from . import device  # TLS, HTTP and all else: not for a run that finds the key file locked

        signals.catch()
        outcome, notes = device.check(file, settings, log)
    except Locked as reason:
        code, told = EXIT_LOCKED, log.result(EXIT_LOCKED, str(reason))
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
