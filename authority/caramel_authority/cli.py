# SPDX-License-Identifier: MIT OR Apache-2.0
"""The administrator's command: it reads options, calls what does the work, and prints."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import pwd
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO, cast

from sqlalchemy.exc import DBAPIError, OperationalError

from . import __version__, audit, backup, signer, store, views
from .assembly import Parts, assemble
from .ca import KEY_TYPES, Certificates, describe
from .configuration import LONG, PATH, Configuration
from .errors import TryLater, WrongUsage
from .refusals import Refusals
from .rollover import Rollover, calendar
from .shown import Shown, shown
from .signer import Child
from .store import AUTHORIZED, REJECTED, Store


def who() -> str:
    """Who gives this command: as the system says, which keeps who has logged in whatever user they become
    (pam_loginuid(8)), and not as a variable says.
    """
    user, login = os.getuid(), UNSET
    with contextlib.suppress(OSError, ValueError):
        login = int(Path("/proc/self/loginuid").read_text())
    return "administrator:" + (_name(user) if login in (UNSET, user) else f"{_name(login)} as {_name(user)}")


def _name(uid: int) -> str:
    """In a user namespace (user_namespaces(7)) whoever made it has chosen the numbers, and may have put another
    passwd(5) there: then who that is outside of it, by number.
    """
    with contextlib.suppress(OSError):
        rows = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if rows != [(0, 0, UNSET)]:
            outside = [str(uid - first + outer) for first, outer, count in rows if first <= uid < first + count]
            return f"{uid} (user namespace of uid {''.join(outside) or 'nobody'})"
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


#: The login of whoever never logged in: the system's own processes.
UNSET = 2**32 - 1


def duration(text: str) -> int:
    """Seconds, of `90s`, `15m`, `36h`, `3d` or `2w`."""
    found = re.fullmatch("([0-9]{1,6})([smhdw])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no time like 90s, 15m, 36h, 3d or 2w")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


def whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number in this range."""

    def read(text: str) -> int:
        if not re.fullmatch("-?[0-9]{1,18}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return read


def seconds(text: str) -> float:
    """A pause, of an hour at most."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 3600:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to 3600")


def words(text: str) -> str:
    """Text that can be written down. The system passes on bytes that are none as surrogates (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None
    return text


def listener(text: str) -> str:
    host, _, port = text.rpartition(":")
    if re.fullmatch("unix:.+", text) or (host and re.fullmatch("[0-9]{1,5}", port) and int(port) < 65536):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither HOST:PORT nor unix:PATH")


# --- The database ---


def init(configuration: Configuration, options: argparse.Namespace) -> None:
    print("made" if Store.init(configuration.database) else "already there")


def upgrade(configuration: Configuration, options: argparse.Namespace) -> None:
    before, after = Store.upgrade(configuration.database)
    print(f"{before} -> {after}" if before != after else f"{after} already")


def make_backup(configuration: Configuration, options: argparse.Namespace) -> None:
    backup.backup(configuration.database, Path(options.file))


def restore(configuration: Configuration, options: argparse.Namespace) -> None:
    refusals = Refusals(configuration)
    if refusals.read() is None and not options.forget:
        raise refusals.gone()

    def catch_up(database: str) -> int:
        parts = assemble(dataclasses.replace(configuration, database=database))
        newer = parts.catch_up(options.forget)
        parts.store.release()
        return newer

    def prepare(database: str) -> int:
        before, after = Store.upgrade(database)
        if before != after:
            print(f"upgraded: {before} -> {after}")
        return catch_up(database)

    if options.file:
        newer = backup.restore(configuration.database, Path(options.file), prepare)
    else:
        newer = catch_up(configuration.database)
    print(f"{newer} decisions were newer")


# --- What runs all the time ---


def serve(parts: Parts, options: argparse.Namespace) -> None:
    # Only this command needs these, and they take longer to load than others to run. Others that serve WSGI call
    # application.from_environment.
    from waitress.server import create_server

    from .application import Application
    from .metrics import Metrics

    listen: dict[str, Any] = {"listen": options.listen}
    if not options.listen.startswith("unix:"):
        host, _, port = options.listen.rpartition(":")
        try:
            socket.getaddrinfo(None if host == "*" else host.strip("[]"), port)
        except (OSError, UnicodeError) as error:
            raise WrongUsage(f"--listen {options.listen}: {error}") from None
    else:
        listen = {"unix_socket": options.listen[5:], "unix_socket_perms": "660"}
    # A header that nobody may be believed still tells that somebody passes a question on.
    front: dict[str, Any] = {"clear_untrusted_proxy_headers": False}
    if options.behind_proxy:
        # What the front says of the client is believed, because nobody else reaches this port.
        front |= {"trusted_proxy": "*", "trusted_proxy_headers": "x-forwarded-for x-forwarded-proto"}
    registry, child = parts.answering()
    with parts.store.reading():
        pass  # whoever would put a copy in the place of SQLite's file sees from now on that it is in use
    if child:
        threading.Thread(target=_ends_with, args=[child], daemon=True).start()
    metrics = Metrics(registry, parts.configuration)
    if options.metrics:
        metrics.serve(options.metrics)
    # A request that is longer than ours by far is waitress's own to refuse.
    application = Application(registry, parts.configuration.front, metrics.answered)
    logging.basicConfig()
    settings: dict[str, Any] = {**listen, **front, "threads": 8, "ident": None, "max_request_body_size": 65536}
    try:
        server = create_server(application, **settings)
    except OSError as error:
        raise WrongUsage(f"--listen {options.listen}: {error}") from None
    server.run()


def _ends_with(child: Child) -> None:
    """Without a signer there is no use in answering; whoever watches this process starts it again."""
    os.waitpid(child.process, 0)
    print("caramel-authority: the signer has ended", file=sys.stderr, flush=True)
    os._exit(1)


def sign(parts: Parts, options: argparse.Namespace) -> None:
    path = options.socket or parts.configuration.ca.signer_socket
    if not path:
        raise WrongUsage("where? Give --socket, or ca.signer_socket in the configuration")
    parts.ca  # noqa: B018  # only where there is a CA of one's own
    listener = signer.listen(path)
    try:
        parts.sign(lambda: listener.accept()[0])
    finally:
        Path(path).unlink(missing_ok=True)


def work(parts: Parts, options: argparse.Namespace) -> None:
    worker = parts.worker()
    while True:
        if not worker.work_once():
            if options.once:
                return
            time.sleep(options.pause)


# --- Who gets a certificate ---


def show(parts: Parts, options: argparse.Namespace) -> None:
    asked = views.Asked(options.state, options.silent, options.ends_within)
    with parts.store.reading() as db:
        if options.pending:
            rows, text = views.queue(db), _waiting
        elif options.barred:
            rows, text = views.barred(db), _barred
        else:
            rows, text = views.overview(db, asked), _request
        _print(options.json, rows, map(text, rows))


def _request(row: dict[str, Any]) -> str:
    until = f"until {row['until']}" if row["until"] else "no certificate"
    seen = f"  seen {row['seen']}" if row["seen"] else ""
    problems = "".join(f"  {row[name]}" for name in ("problem", "publish_problem") if row[name])
    about = f"{row['sha256'][:16]}  {row['state']:<10}  {row['client_id']}"
    return f"{about}  posted {row['posted']}  {until}{seen}{problems}"


def _waiting(row: dict[str, Any]) -> str:
    about = f"{row['sha256'][:16]}  {row['state']:<10}  {row['client_id']}"
    keys = f"{row['keys']} keys" if row["keys"] != 1 else "1 key"
    before = "  was rejected before" if row["rejected_before"] else ""
    return f"{about}  posted {row['posted']}  from {row['address'] or '-'}  {keys}{before}"


def _barred(row: dict[str, Any]) -> str:
    return f"{row['state']:<10}  {row['device']}  since {row['since']}  by {row['who']}"


def _print(as_json: bool, rows: Iterable[dict[str, Any]], lines: Iterable[str]) -> None:
    if as_json:
        views.print_json(rows, sys.stdout)
    else:
        sys.stdout.writelines(f"{shown(line)}\n" for line in lines)


def decide(parts: Parts, options: argparse.Namespace) -> None:
    state = AUTHORIZED if options.verb == "authorize" else REJECTED
    registry = parts.registry()
    for which in options.which:
        for request in registry.decide(which, state, who()):
            print(f"{request.sha256[:16]}  {request.state}  {request.client_id}")


def hold(parts: Parts, options: argparse.Namespace) -> None:
    done = {"bar": "barred", "unbar": "unbarred", "suspend": "suspended", "resume": "resumed"}[options.verb]
    deed = getattr(parts.registry(), options.verb)
    for client_id in options.ids:
        rejected = deed(client_id, who())
        print(f"{done}  {client_id}" + (f"  ({rejected} requests rejected)" if rejected else ""))


def allow(parts: Parts, options: argparse.Namespace) -> None:
    given: Iterable[str] = options.ids
    if options.file:
        content = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
        try:
            # Spreadsheets put a mark at the beginning (U+FEFF), and their columns' names into the first line.
            lines = content.decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise WrongUsage(f"--file {options.file}: it is not UTF-8: {error}") from None
        given = [*given, *lines[bool(HEADER.fullmatch(lines[0])) :]]
    entries = [entry for line in given if (entry := _entry(line))]
    done = parts.registry().allow(entries, who(), options.again)
    print(f"{done.new} new" + (f", {done.changed} changed" if done.changed else ""))
    for client_id in done.held:
        print(f"{client_id} is barred or suspended, whatever the list says", file=sys.stderr)


#: What the first line of a list may be, in place of a device.
HEADER = re.compile(r"(?i)\s*(client[ _-]?)?id\s*(,\s*sha-?256\s*)?")


def _entry(line: str) -> tuple[str, str | None] | None:
    """ID and SHA-256 (None: not known) of a line like `ID` or `ID,SHA256`; None where there is but a comment."""
    client_id, comma, expected = (one.strip(" \t\r") for one in line.partition("#")[0].partition(","))
    if comma and not re.fullmatch("[0-9A-Fa-f]{64}", expected):
        raise WrongUsage(f"{line.strip()[:200]!r}: behind the comma is no SHA-256 in hexadecimal")
    return (client_id, expected.lower() or None) if client_id or comma else None


def disallow(parts: Parts, options: argparse.Namespace) -> None:
    registry = parts.registry()
    for client_id in options.ids:
        rule = registry.disallow(client_id, who())
        if rule:
            print(f"{client_id}: the rule {rule} admits its next key; bar keeps it out", file=sys.stderr)


def purge(parts: Parts, options: argparse.Namespace) -> None:
    days = parts.configuration.pending_days if options.days is None else options.days
    print(f"{parts.registry().purge(days, who())} requests forgotten")


def show_log(parts: Parts, options: argparse.Namespace) -> None:
    if options.verify:
        print(audit.verify(parts.store, Path(parts.configuration.ca.folder)))
        return
    since = None if options.since is None else store.now() - options.since
    wanted = views.Lines(options.id, options.action, since, options.last)
    with parts.store.reading() as db:
        sys.stdout.writelines((views.log_json if options.json else views.log_text)(db, wanted))


def minimum(parts: Parts, options: argparse.Namespace) -> None:
    if parts.configuration.signer == "acme":
        raise WrongUsage("minimum-serial: an ACME CA's serial numbers don't count up; reject the devices instead")
    if options.now:
        parts.registry().raise_minimum(who())
    with parts.store.reading() as db:
        print(f"{store.number(db, 'minimum'):x}")


# --- The CA ---


def _rolling(parts: Parts) -> Rollover:
    return Rollover(parts.ca, who())


def ca_create(parts: Parts, options: argparse.Namespace) -> None:
    rollover = _rolling(parts)
    with rollover.changing(parts.store) as db:
        rollover.create(db, options.subject, options.key_type, options.days, options.replace)


def ca_renew(parts: Parts, options: argparse.Namespace) -> None:
    rollover = _rolling(parts)
    with rollover.changing(parts.store) as db:
        rollover.renew(db, options.days)


def ca_next(parts: Parts, options: argparse.Namespace) -> None:
    rollover = _rolling(parts)
    with rollover.changing(parts.store) as db:
        if options.stage == "switch":
            rollover.switch(db)
        elif options.stage == "finish":
            rollover.finish(db)
        else:
            rollover.next(db, options.key_type, options.days)
    show_ca(parts, options)


def ca_request(parts: Parts, options: argparse.Namespace) -> None:
    rollover = _rolling(parts)
    with rollover.changing(parts.store):
        pem = rollover.request(options.subject, options.key_type, options.replace)
    sys.stdout.write(pem.decode())


def ca_install(parts: Parts, options: argparse.Namespace) -> None:
    rollover = _rolling(parts)
    with rollover.changing(parts.store) as db:
        print(rollover.install(db, Path(options.file).read_bytes()))


def show_ca(parts: Parts, options: argparse.Namespace) -> None:
    known = Certificates(parts.configuration.ca).known()
    for role, chain in (("signs", known.chain), ("next", known.next), ("old", known.old)):
        for one in chain:
            begin, end = one.not_valid_before_utc, one.not_valid_after_utc
            print(f"{role:<5}  from {begin:%F}  until {end:%F}  {describe(one)}")
    for moment, what in calendar(Certificates(parts.configuration.ca)):
        late = "LATE: " if moment <= store.now() else ""
        print(f"{late}before {(views.when(moment) or '')[:10]}: {what}")


def server_certificate(parts: Parts, options: argparse.Namespace) -> None:
    with parts.store.writing() as db:
        made = parts.ca.server_certificate(db, options.names, Path(options.out), options.days, who())
    print(f"{options.out}: {'made' if made else 'still good'}")
    # The timer comes here several times a day: so a year has somebody who says what it wants.
    for moment, what in calendar(parts.ca):
        if moment <= store.now():
            print(f"the CA ends soon: {what}", file=sys.stderr)


# --- Options ---


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="caramel-authority", description="A registration authority for devices.")
    top.add_argument("--config", metavar="PATH", help=f"the configuration; by default {PATH}")
    top.add_argument("--version", action="version", version=__version__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, run: object, text: str, *, makes: bool = False, unmade: bool = False) -> Any:
        """`makes`: makes the database where there is none. `unmade`: needs none, and gets the configuration only."""
        made = verbs.add_parser(name, help=text, description=text)
        made.set_defaults(run=run, makes=makes, unmade=unmade)
        return made

    verb("init", init, "make the database; what is there already is left alone", unmade=True)
    one = verb("backup", make_backup, "copy the database (SQLite) while it is in use", unmade=True)
    one.add_argument("file")
    one = verb("restore", restore, "put a copy in the place of the database, and what was refused since", unmade=True)
    one.add_argument("file", nargs="?", help="none if PostgreSQL has done that")
    one.add_argument("--forget", action="store_true", help="nothing is known of what was refused since")
    verb("upgrade", upgrade, "bring the database of an older version up to this one", unmade=True)

    one = verb("serve", serve, "answer devices")
    one.add_argument("--listen", type=listener, default="127.0.0.1:8080", metavar="HOST:PORT|unix:PATH")
    one.add_argument("--behind-proxy", action="store_true", help="believe X-Forwarded-For and X-Forwarded-Proto")
    one.add_argument("--metrics", metavar="HOST:PORT", help="where Prometheus finds what to watch")
    one = verb("work", work, "make orders at the ACME CA, and set names in DNS")
    one.add_argument("--once", action="store_true", help="end when there is nothing to do")
    one.add_argument("--pause", type=seconds, default=2.0, metavar="SECONDS", help="between two looks at the queue")

    one = verb("signer", sign, "sign, behind a socket: what `serve` asks if it can't read the CA's key")
    one.add_argument("--socket", metavar="PATH", help="by default ca.signer_socket of the configuration")

    one = verb("list", show, "all requests, what was decided, and until when their certificates are valid")
    which = one.add_mutually_exclusive_group()
    which.add_argument("--state", choices=[store.PENDING, AUTHORIZED, REJECTED, store.RETIRED])
    which.add_argument("--pending", action="store_true", help="what waits for a decision, and what speaks against it")
    which.add_argument("--silent", type=duration, metavar="3d", help="devices that have not asked for so long")
    which.add_argument("--ends-within", type=duration, metavar="2d", help="certificates that end, or have ended")
    which.add_argument("--barred", action="store_true", help="devices that are barred or suspended")
    one.add_argument("--json", action="store_true")
    for name, text in (("authorize", "give a certificate"), ("reject", "never give a certificate again")):
        one = verb(name, decide, f"{text} to the requests with these hashes, or the only ones of these client IDs")
        one.add_argument("which", nargs="+", type=words, metavar="HASH|ID")
    for name, text in (
        ("bar", "keep devices out, whatever they ask with and whatever the rules say; what they have is rejected"),
        ("unbar", "let devices that are barred ask again"),
        ("suspend", "let devices wait and have nothing of theirs accepted, without any of them losing its key"),
        ("resume", "give devices that are suspended back what they had"),
    ):
        one = verb(name, hold, text)
        one.add_argument("ids", nargs="+", type=words, metavar="ID")
    one = verb("allow", allow, "put client IDs on the list of devices, as the production line made them")
    one.add_argument("ids", nargs="*", type=words, metavar="ID[,SHA256]")
    one.add_argument("--file", metavar="PATH|-", help="one a line; SHA-256 of the device's request or public key")
    one.add_argument("--again", action="store_true", help="admit their next keys as well, once: for erased devices")
    one = verb("disallow", disallow, "take client IDs off the list of devices, and reject all their requests")
    one.add_argument("ids", nargs="+", type=words, metavar="ID")
    one = verb("purge", purge, "forget requests that nobody decided about, and that nobody asks about any more")
    one.add_argument("--days", type=whole(0, LONG), help="for how long nobody asked; by default pending_days")
    one = verb("log", show_log, "every decision")
    one.add_argument("--id", type=words, metavar="ID")
    one.add_argument("--action", type=words)
    one.add_argument("--since", type=duration, metavar="3d")
    one.add_argument("--last", type=whole(1, 10**9), metavar="LINES")
    one.add_argument("--json", action="store_true")
    one.add_argument("--verify", action="store_true", help="whether anybody has changed what is in it")
    one = verb("minimum-serial", minimum, "the smallest serial number that is accepted")
    one.add_argument("--now", action="store_true", help="accept nothing that was signed before this moment")

    one = verb("ca-create", ca_create, "make a CA, and the database if there is none", makes=True)
    one.add_argument("--subject", required=True, type=words, metavar="C=..,O=..,CN=..")
    one.add_argument("--key-type", choices=KEY_TYPES, default="ec-p256")
    one.add_argument("--days", type=whole(1, LONG), default=7300)
    one.add_argument(
        "--replace", action="store_true", help="in the place of the CA that is there, which is kept beside it"
    )
    one = verb("ca-renew", ca_renew, "a new certificate of the CA, with the same key and name")
    one.add_argument("--days", type=whole(1, LONG), default=7300)
    one = verb("ca-request", ca_request, "print a request for another CA to sign", makes=True)
    one.add_argument("--subject", required=True, type=words, metavar="C=..,O=..,CN=..")
    one.add_argument("--key-type", choices=KEY_TYPES, default="ec-p256")
    one.add_argument("--replace", action="store_true", help="a new key; the old one signs until ca-install")
    one = verb("ca-next", ca_next, "make the CA that will follow this one; then, stage by stage, let it")
    one.add_argument("--key-type", choices=KEY_TYPES, default="ec-p256")
    one.add_argument("--days", type=whole(1, LONG), default=7300)
    stage = one.add_mutually_exclusive_group()
    for name, text in (("switch", "it signs from now on"), ("finish", "nothing is signed by the old one any more")):
        stage.add_argument(f"--{name}", dest="stage", action="store_const", const=name, help=text)
    verb("ca-status", show_ca, "the CA's certificates, and what has to be done for them when")
    one = verb("ca-install", ca_install, "take what the other CA made of the request: ours first, the root last")
    one.add_argument("file")
    one = verb(
        "server-certificate",
        server_certificate,
        "key and certificate of the TLS front, if it has none or they end soon",
    )
    one.add_argument("names", nargs="+", type=words, metavar="HOST")
    one.add_argument("--out", required=True, metavar="PATH")
    one.add_argument("--days", type=whole(1, LONG), default=6)
    return top


def main() -> int:
    # A command's output may be closed (">&-").
    sys.stdout, sys.stderr = (stream and cast(TextIO, Shown(stream)) for stream in (sys.stdout, sys.stderr))
    options = parser().parse_args()
    os.umask(0o027)
    # Process 1 of a container ends at no signal that it has not asked for (pid_namespaces(7)).
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, end)
    try:
        configuration = Configuration.read(options.config)
        if options.makes:
            Store.init(configuration.database)
        status: int | None = options.run(
            configuration if options.unmade else _assembled(configuration, options), options
        )
        # What nobody reads is to be noticed here, and not when Python ends.
        if sys.stdout:
            sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        # `head` has seen enough. What is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (WrongUsage, TryLater, OSError) as error:
        print(f"caramel-authority: {error}", file=sys.stderr)
    except DBAPIError as error:
        # SQLite doesn't say which file it can't open.
        where = f": {configuration.where}" if "unable to open" in str(error.orig) else ""
        print(f"caramel-authority: the database: {error.orig}{where}", file=sys.stderr)
        if re.search("disk is full|No space left", str(error.orig)):
            print(f"nothing was changed: free some of the disk that has {configuration.where}", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 1


def end(*_: object) -> None:
    """Ends the process. Python ignores an exception inside of a callback of its own (those of fork and of imports are
    some): so it is raised once more, later than waitress waits for the answers that are being given.
    """
    signal.setitimer(signal.ITIMER_REAL, 6)
    sys.exit(0)


def _assembled(configuration: Configuration, options: argparse.Namespace) -> Parts:
    """What runs all the time waits for its database: after a power cut, that may come up later."""
    said = False
    while True:
        try:
            return assemble(configuration)
        except OperationalError as error:
            if options.run not in (serve, sign, work) or configuration.where.startswith("/"):
                raise
            if not said:
                print(f"caramel-authority: waiting for the database: {error.orig}", file=sys.stderr, flush=True)
            said = True
            time.sleep(1)
