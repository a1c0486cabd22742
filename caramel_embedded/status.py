"""What the key file holds, for a person at a glance and for machines: no lock, no network, nothing changed."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import time
from collections.abc import Callable, Sequence
from typing import Any, Optional

from . import __version__, certificates, device, held, hook, keyfile, pem
from .errors import EXIT_CERTIFIED, EXIT_FAILED, EXIT_PENDING, UsageError
from .identity import Identity, utc
from .keyfile import peek
from .log import Log
from .settings import ClientId, Permissions, Settings, host_and_port
from .stored import Stored, usable
from .trust import Trust

_HOLDERS = {
    "software": "%(type)s, %(bits)d bits",
    "tpm": "%(type)s, %(bits)d bits, in a TPM",
    "pkcs11": "%(type)s, %(bits)d bits, in a PKCS #11 token",
}


def report(settings: Settings, as_json: bool, verbose: bool = False) -> tuple[str, int]:
    """The text for standard output, and the exit status: a check's, as far as it can be described without asking.

    0: a usable certificate; 69: a request only; 127: neither. Raises `CaramelError` where the settings are wrong or
    the file can't be read.
    """
    values = collect(settings, verbose)
    text = json.dumps(values, indent=2) + "\n" if as_json else _text(values)
    return text, int(values["exit_status"])


def collect(settings: Settings, ask_chip: bool = False) -> dict[str, Any]:
    """The same as values. The names are part of the interface: each is always there, null where there is nothing.

    `ask_chip`: whether the chip that holds the key, if there is one, is asked for its state. Times are seconds since
    1970, UTC.
    """
    data, status = peek(settings.key_file)
    problems: list[str] = []  # why a check would end with 127 before it asks

    def identify(settings: Settings, data: bytes, trust: Trust) -> ClientId:
        try:
            return device.client_id(settings, data, trust)
        except UsageError as error:
            own = device.stored_client_id(data, trust)
            if own is None:
                raise
            problems.append(str(error))
            return ClientId(own, "key file")

    stored, client_id = device.stored_identity(settings, data, status and int(status.st_mtime), Log(), identify)
    if stored.trust.stored_is_ahead:
        stored.notes.append(
            "the stored certificate begins at %s: its CA's clock was ahead, or this one is behind"
            % utc(stored.trust.stored)
        )
    problems += filter(None, [device.good_identity_of_another(settings, stored)])
    identity, trust = stored.identity, stored.trust
    state = "none"
    if identity is not None:
        state = "certified" if usable(identity, trust) else "pending"
    return {
        "version": __version__,
        "state": state,
        "exit_status": {"certified": EXIT_CERTIFIED, "pending": EXIT_PENDING}.get(state, EXIT_FAILED),
        "client_id": client_id.text,
        "client_id_source": client_id.source if settings.client_id else "the " + client_id.source,
        "server": host_and_port(settings.server) if settings.server else None,
        "key_file": settings.key_file if status is None else os.path.realpath(settings.key_file),
        "file": status
        and {
            "owner": _name(pwd.getpwuid, status.st_uid),
            "group": _name(grp.getgrgid, status.st_gid),
            "mode": "%04o" % stat.S_IMODE(status.st_mode),
            "modified": int(status.st_mtime),
        },
        "key": _key(identity, ask_chip) if identity else None,
        "request_sha256": identity.request_hash if identity else None,
        "certificate": _certificate(stored),
        "hook_owed": _hook_is_owed(stored, settings),
        "remarks": [
            *(*keyfile.remarks(settings.key_file), *stored.notes, *problems),
            *(*map(_misspelt, settings.unknown), *_clock(trust)),
        ],
        "clock": {
            "now": int(time.time()),
            "floor": int(trust.floor),
            "believed": trust.stored_is_ahead or not trust.clock_is_behind,
        },
        "next": "nothing: " + problems[0] if problems else _next(stored, status, settings),
        "retry_after": None,  # of a server, which is not asked here
    }


def _key(identity: Identity, ask_chip: bool) -> dict[str, Any]:
    kind, bits = certificates.key_size(identity)
    chip = None
    if ask_chip and identity.holder != "software":
        chip = held.why_not(identity) or "usable"
    return {"type": kind, "bits": bits, "holder": identity.holder, "chip": chip}


def _misspelt(name: str) -> str:
    return "%s is no setting: spelt wrong, or of a later version" % name


def _hook_is_owed(stored: Stored, settings: Settings) -> bool:
    if settings.hook is None or stored.identity is None or not usable(stored.identity, stored.trust):
        return False
    return hook.is_owed(os.path.realpath(settings.key_file), stored.identity.certificate or b"")


def _certificate(stored: Stored) -> Optional[dict[str, Any]]:
    block = pem.first(stored.data, pem.CERTIFICATE) if stored.identity else None
    if block is None:
        return None
    described = certificates.describe(block)
    good = usable(stored.identity, stored.trust)
    issued = stored.identity and stored.identity.issued
    return {
        "usable": good,
        "why_not": None if good else stored.notes[-1],
        "subject": described and described.subject,
        "issuer": described and described.issuer,
        "serial_number": described and described.serial_number,
        "not_before": int(described.not_before) if described else None,
        "not_after": int(described.not_after) if described else None,
        "seconds_left": int(described.not_after - stored.trust.now()) if described else None,
        "for_servers_only": issued.servers_only if issued else None,
        "chain": issued.chain.count(b"-----BEGIN") if issued else None,
    }


def _name(look_up: Callable[[int], Sequence[Any]], number: int) -> str:
    """The name of a user or group; the number where it has none."""
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)


def _clock(trust: Trust) -> list[str]:
    end = max(certificates.anchors(trust).ends, certificates.anchors(trust, of_server=True).ends)
    if time.time() <= end:
        return []
    return [
        "the clock is after the end of the trusted CA, %s: it is far ahead, or the device needs another CA" % utc(end)
    ]


def _next(stored: Stored, status: Optional[os.stat_result], settings: Settings) -> str:
    if not settings.server:
        return "nothing: no server is configured"
    steps = []
    if status and Permissions(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != settings.permissions:
        steps.append("set the file's owner and mode")
    if stored.identity is None:
        steps.append("start over with a new key" if stored.data else "make a key and a request, and send the request")
    elif usable(stored.identity, stored.trust):
        only = stored.identity.for_servers_only
        steps.append("ask for a newer certificate" if only else "show the certificate, and ask for a newer one")
    elif pem.first(stored.data, pem.CERTIFICATE):
        steps.append("ask for a certificate, and drop the one in the file")
    else:
        steps.append("ask whether the request is signed, and send it where the server doesn't know it")
    if _hook_is_owed(stored, settings):
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
    lines.append(("key", _HOLDERS[key["holder"]] % key if key else "none that can be used" if file else "none"))
    if key and key["chip"]:
        lines.append(("  chip", key["chip"]))
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
