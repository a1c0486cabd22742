"""The command: options to settings, one check on the key file, outcome to one line and an exit status.

A run that finds the key file locked needs none of TLS, HTTP and X.509, and one without options no option parser: what
costs time is imported where it is used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Optional

from . import __version__, log, signals
from .errors import EXIT_CERTIFIED, EXIT_FAILED, EXIT_LOCKED, EXIT_PENDING, Locked, UsageError
from .keyfile import KeyFile
from .log import NAME, Log
from .settings import INSTANCE_CONFIG_FILE, INSTANCE_KEY_FILE, SETTINGS, Settings, instance

if TYPE_CHECKING:
    import argparse

GRACE = 5.0  # seconds beyond the time limit, which nearly always ends a run before


def parser() -> argparse.ArgumentParser:
    """The option parser: everything the command line can say. Raises `UsageError`, never exits."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            # What stands in quotes was given: it may be a secret.
            raise UsageError(message.partition(" '")[0] + "; see --help")

    made = Parser(
        prog=NAME,
        description="Keep this device's key and certificate up to date with a Caramel server: one check, then gone.",
        epilog="A setting can be built into the firmware, or stand in the configuration file, the environment or an "
        "option; the later of these wins. The first three use the names in parentheses. Exit status: 0 the "
        "certificate is good; 1 another process holds the lock; 69 the request waits to be signed; "
        "127 everything else.",
        allow_abbrev=False,
        add_help=False,
    )
    for name, _, flag, placeholder, text in SETTINGS:
        made.add_argument(flag, metavar=placeholder, dest=name, help="%s (%s)" % (text, name))
    paths = (INSTANCE_CONFIG_FILE % "NAME", INSTANCE_KEY_FILE % "NAME")
    made.add_argument("--instance", metavar="NAME", help="identity of one service: %s, client ID NAME, %s" % paths)
    made.add_argument(
        "--replace", action="store_true", help="start over, even if a good identity of another name is stored"
    )
    instead = made.add_mutually_exclusive_group()
    instead.add_argument("--status", action="store_true", help="print what the key file holds, and exit")
    instead.add_argument(
        "--dry-run", action="store_true", help="check, and say what would be done; nothing is stored or sent"
    )
    made.add_argument(
        "--json", action="store_true", help="with --status: for machines; in a check: its outcome, on standard output"
    )
    made.add_argument("--syslog", action="store_true", help="log to syslog, not to standard error")
    volume = made.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="say every step")
    volume.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    made.add_argument("--version", action="store_true", help="print the version, and exit")
    made.add_argument("-h", "--help", action="store_true", help="print this text, and exit")
    return made


def main(arguments: Sequence[str], environment: Mapping[str, str], words: Log) -> tuple[int, str]:
    """One run of the command: its exit status, and what belongs on standard output.

    Raises `CaramelError` where the status is 127; `failed` has the text for standard output then.
    """
    status = json = dry_run = False
    if arguments:
        made = parser()
        parsed, unknown = made.parse_known_args(arguments)
        if parsed.help:
            return EXIT_CERTIFIED, made.format_help()
        if parsed.version:
            return EXIT_CERTIFIED, "%s %s\n" % (NAME, __version__)
        if unknown:
            # Not their values: one may be a secret that was meant for another option.
            options_only = [word.partition("=")[0] for word in unknown if word.startswith("--")]
            options_only += [word[:2] for word in unknown if word[:1] == "-" != word[1:2]]
            made.error("there is no option " + options_only[0] if options_only else "there are only options")
        options = {name: value for name, *_ in SETTINGS if (value := vars(parsed)[name]) is not None}
        words.verbose, words.quiet, words.syslog = parsed.verbose, parsed.quiet, parsed.syslog
        status, json, dry_run = parsed.status, parsed.json, parsed.dry_run
        words.json = json and not status
        for name, _, flag, *_ in SETTINGS:
            if options.get(name) == "":
                raise UsageError("%s: its value is empty" % flag)
        service = None if parsed.instance is None else instance(parsed.instance)
        settings = Settings.read(options, environment, service, parsed.replace)
    else:
        settings = Settings.read({}, environment)
    if settings.openssl_conf is not None and (words.verbose or not status):
        # For this process alone, and before anything loads OpenSSL, which reads it once. The TPM's library would
        # write a dozen lines to standard error.
        os.environ.update(OPENSSL_CONF=settings.openssl_conf, TSS2_LOG="all+NONE")
        signals.backstop(settings.timeout + GRACE)  # a chip may hang, and then every call does that asks it
    if settings.unknown:
        words.step("settings that this version doesn't know: " + ", ".join(settings.unknown))
    if status:
        from .status import report

        text, code = report(settings, json, words.verbose)
        return code, text
    words.client_id = settings.client_id
    try:
        file = KeyFile.open(settings.key_file)
        from . import device  # TLS, HTTP and all else: not for a run that finds the key file locked

        signals.catch(lambda text: words.result(log.ERROR, text))
        if dry_run:
            from .dry_run import rehearse

            code, text = rehearse(file, settings, words)
            return code, result(words, code, text, log.INFO)
        outcome, remarks = device.check(file, settings, environment, words)
    except Locked as reason:
        return EXIT_LOCKED, result(words, EXIT_LOCKED, str(reason), log.INFO)
    # NOTICE for what happens rarely in a device's life, WARNING for what its administrator has to know.
    priority = log.WARNING if outcome.notes or remarks else log.NOTICE if outcome.new else log.INFO
    code = EXIT_CERTIFIED if outcome.certified else EXIT_PENDING
    values = {"retry_after": outcome.retry_after, "not_after": outcome.not_after, "new": outcome.new}
    return code, result(words, code, "; ".join([*remarks, str(outcome)]), priority, **values)


def result(words: Log, status: int, text: str, priority: int, **values: Any) -> str:
    """Says how a run ended; the same as JSON with `values`, for standard output, where that was asked for."""
    words.result(priority, text)
    if not words.json:
        return ""
    import json

    empty = {"status": status, "client_id": words.client_id, "retry_after": None, "not_after": None, "new": False}
    return json.dumps({**empty, **values, "message": text}) + "\n"


def failed(words: Log, text: str, retry_after: Optional[int] = None) -> str:
    """`result` of a run that ends with 127."""
    return result(words, EXIT_FAILED, text, log.ERROR, retry_after=retry_after)
