"""What the key file holds, for a person at a glance and for machines: no lock, no network, nothing changed."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import time
from typing import Any, Optional

from . import __version__, certificates, cli, device, hook
from .errors import EXIT_CERTIFIED, EXIT_FAILED, EXIT_PENDING
from .identity import certificate_in, utc
from .keyfile import Folder, doing, read
from .settings import Settings
from .stored import Stored, usable


def report(settings: Settings, as_json: bool) -> tuple[str, int]:
    """The text for standard output, and the exit status: a check's, as far as it can be told without asking.

    0: a usable certificate; 69: a request only; 127: neither. Raises `CaramelError` where the settings are wrong or
    the file can't be read.
    """
    values = collect(settings)
    text = json.dumps(values, indent=2) + "\n" if as_json else _text(values)
    return text, int(values["exit_status"])


def collect(settings: Settings) -> dict[str, Any]:
    """The same as values. The names are part of the interface: each is always there, null where there is nothing.

    Times are seconds since 1970, UTC.
    """
    source = settings.source("CARAMEL_CN")
    data, status = _read(settings.key_file)
    log = cli.Log()
    found = device.stored_identity(settings, data, status and int(status.st_mtime), log)
    if source is None:
        source = "the " + log.source
    identity, trust = found.identity, found.trust
    state = "none"
    if identity is not None:
        state = "certified" if usable(identity, trust) else "pending"
    kind, bits = certificates.key_size(identity) if identity else ("", 0)
    return {
        "version": __version__,
        "state": state,
        "exit_status": {"certified": EXIT_CERTIFIED, "pending": EXIT_PENDING}.get(state, EXIT_FAILED),
        "client_id": settings.client_id,
        "client_id_source": source,
        "server": "%s:%d" % settings.server if settings.server else None,
        "key_file": settings.key_file if status is None else os.path.realpath(settings.key_file),
        "file": status
        and {
            "owner": _owner(status.st_uid),
            "group": _group(status.st_gid),
            "mode": "%04o" % stat.S_IMODE(status.st_mode),
            "modified": int(status.st_mtime),
        },
        "key": {"type": kind, "bits": bits} if identity else None,
        "request_sha256": identity.request_hash if identity else None,
        "certificate": _certificate(found),
        "hook_owed": settings.hook is not None and hook.is_owed(settings.key_file),
        "remarks": found.notes,
        "clock": {
            "now": int(time.time()),
            "floor": int(trust.floor),
            "believed": not trust.clock_is_behind,
        },
        "next": _next(found, status, settings),
        "retry_after": None,  # of a server, which is not asked here
    }


def _read(path: str) -> tuple[bytes, Optional[os.stat_result]]:
    try:
        with doing("read", path, but=FileNotFoundError), Folder(path) as folder:
            fd = folder.open(folder.name)
            with open(fd, "rb"):  # closes it
                return read(fd, path), os.fstat(fd)
    except FileNotFoundError:
        return b"", None


def _certificate(found: Stored) -> Optional[dict[str, Any]]:
    pem = certificate_in(found.data) if found.identity else None
    if pem is None:
        return None
    told = certificates.describe(pem)
    good = usable(found.identity, found.trust)
    issued = found.identity and found.identity.issued
    return {
        "usable": good,
        "why_not": None if good else found.notes[-1],
        "subject": told and told.subject,
        "issuer": told and told.issuer,
        "serial_number": told and told.serial_number,
        "not_before": int(told.not_before) if told else None,
        "not_after": int(told.not_after) if told else None,
        "seconds_left": int(told.not_after - found.trust.now()) if told else None,
        "for_servers_only": issued.servers_only if issued else None,
        "chain": issued.chain.count(b"-----BEGIN") if issued else None,
    }


def _owner(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _next(found: Stored, status: Optional[os.stat_result], settings: Settings) -> str:
    if not settings.server:
        return "nothing: no server is configured"
    steps = []
    place = (settings.owner, settings.group, settings.mode)
    if status and (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != place:
        steps.append("set the file's owner and mode")
    if found.identity is None:
        steps.append("start over with a new key" if found.data else "make a key and a request, and send the request")
    elif usable(found.identity, found.trust):
        only = found.identity.for_servers_only
        steps.append("ask for a newer certificate" if only else "show the certificate, and ask for a newer one")
    elif certificate_in(found.data):
        steps.append("ask for a certificate, and drop the one in the file")
    else:
        steps.append("ask whether the request is signed, and send it where the server doesn't know it")
    if settings.hook and hook.is_owed(settings.key_file):
        steps.append("call the hook, which is owed")
    return "; ".join(steps)


def _text(values: dict[str, Any]) -> str:
    lines = [
        ("client ID", "%(client_id)s, from %(client_id_source)s" % values),
        ("server", values["server"] or "none configured"),
        ("key file", values["key_file"]),
    ]
    file, key, certificate, clock = values["file"], values["key"], values["certificate"], values["clock"]
    lines.append(("", "%(owner)s:%(group)s, mode %(mode)s" % file if file else "not there"))
    lines.append(("key", "%(type)s, %(bits)d bits" % key if key else "none that can be used" if file else "none"))
    lines.append(("request", values["request_sha256"] or "none"))
    if certificate is None:
        lines.append(("certificate", "none"))
    else:
        lines.append(("certificate", "usable" if certificate["usable"] else "not usable"))
        if certificate["subject"] is not None:
            lines += [
                ("  subject", certificate["subject"]),
                ("  issuer", certificate["issuer"]),
                ("  serial number", certificate["serial_number"]),
                ("  valid from", utc(certificate["not_before"])),
                ("  valid until", "%s, %s" % (utc(certificate["not_after"]), _left(certificate["seconds_left"]))),
            ]
    if not clock["believed"]:
        lines.append(("clock", "wrong: %s, it is past %s" % (utc(clock["now"]), utc(clock["floor"]))))
    lines += [("remark", remark) for remark in values["remarks"]]
    lines.append(("next run", values["next"]))
    return "".join("%-16s %s\n" % line for line in lines)


def _left(seconds: int) -> str:
    if seconds < 0:
        return "that has passed"
    days, rest = divmod(seconds, 86400)
    return "%d d %s left" % (days, time.strftime("%H h %M min", time.gmtime(rest)))
