"""What the key file holds, for a person at a glance and for machines: no lock, no network, nothing changed."""

from __future__ import annotations

import json
import os
import stat
import time

from . import hook
from . import identity as identities
from .errors import StorageError
from .keyfile import MAXIMUM
from .session import Stored
from .trust import Trust, utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional

    from .settings import Settings

CERTIFIED, PENDING, FAILED = 0, 69, 127


def report(settings: Settings, as_json: bool) -> tuple[str, int]:
    """The text for standard output, and the exit status: a check's, as far as it can be told without asking.

    0: a usable certificate; 69: a request only; 127: neither. Raises `CaramelError` where the settings are wrong or
    the file can't be read.
    """
    values = collect(settings)
    code = {"certified": CERTIFIED, "pending": PENDING}.get(values["state"], FAILED)
    if as_json:
        return json.dumps(values, indent=2) + "\n", code
    return _text(values), code


def collect(settings: Settings) -> dict[str, Any]:
    """The same as values with stable names; times in seconds since 1970 (UTC), null where there is nothing."""
    identities.require_entropy()
    client_id, source = settings.client_id, settings.source("CARAMEL_CN")
    if client_id is None:
        from . import hardware

        client_id, source = hardware.client_id(settings.interfaces)
    trust = Trust(settings.ca_cert(), settings.build_time)
    path = os.path.realpath(settings.key_file)
    data, file = _read(path)
    found = Stored(data, client_id, trust)
    facts = found.genuine
    certificate: Optional[dict[str, Any]] = None
    if found.identity is not None and found.identity.certificate is not None:
        certificate = {
            "usable": found.facts is not None,
            "why_not": found.why[-1] if not found.facts else None,
        }
        if facts is not None:
            certificate.update(
                subject=_name(facts.decoded["subject"]),
                issuer=_name(facts.decoded["issuer"]),
                serial_number=facts.decoded["serialNumber"],
                not_before=int(facts.not_before),
                not_after=int(facts.not_after),
                seconds_left=int(facts.not_after - trust.now),
            )
    state = "none"
    if found.identity is not None:
        state = "certified" if found.facts else "pending"
    return {
        "state": state,
        "client_id": client_id,
        "client_id_source": source,
        "server": "%s:%d" % settings.server if settings.server else None,
        "key_file": path,
        "file": file,
        "key": {"type": "RSA", "bits": identities.key_bits(found.identity)} if found.identity else None,
        "request_sha256": found.identity.request_hash if found.identity else None,
        "certificate": certificate,
        "remarks": found.why,
        "hook": {"command": " ".join(settings.hook), "owed": hook.is_owed(path)} if settings.hook else None,
        "clock": {"now": int(trust.clock), "floor": int(trust.floor), "believed": not trust.clock_is_wrong},
        "next": _next(found, data, settings.server is not None),
    }


def _read(path: str) -> tuple[bytes, Optional[dict[str, Any]]]:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            data = file.read(MAXIMUM + 1) if stat.S_ISREG(status.st_mode) else None
    except FileNotFoundError:
        return b"", None
    except OSError as error:
        raise StorageError("can't read %s: %s" % (path, error.strerror)) from None
    if data is None:
        raise StorageError("%s is no regular file" % path)
    return data, {
        "owner": _owner(status.st_uid),
        "group": _group(status.st_gid),
        "mode": "%04o" % stat.S_IMODE(status.st_mode),
        "modified": int(status.st_mtime),
    }


def _owner(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    import grp

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def _name(rdns: Any) -> str:
    short = {
        "countryName": "C",
        "stateOrProvinceName": "ST",
        "localityName": "L",
        "organizationName": "O",
        "organizationalUnitName": "OU",
        "commonName": "CN",
    }
    return ", ".join("%s=%s" % (short.get(name, name), value) for rdn in rdns for name, value in rdn)


def _next(found: Stored, data: bytes, server: bool) -> str:
    if not server:
        return "nothing: no server is configured"
    if found.identity is None:
        return "start over with a new key" if data else "make a key and a request, and send the request"
    if found.facts is not None:
        return "show the certificate, and ask for a newer one"
    if found.identity.certificate is not None:
        return "ask for a certificate, and drop the one in the file"
    return "ask whether the request is signed, and send it where the server doesn't know it"


def _text(values: dict[str, Any]) -> str:
    lines = [
        ("client ID", "%(client_id)s (from the %(client_id_source)s)" % values),
        ("server", values["server"] or "none configured"),
        ("key file", values["key_file"]),
    ]
    file, key, certificate, clock = values["file"], values["key"], values["certificate"], values["clock"]
    owed = values["hook"] and values["hook"]["owed"]
    lines.append(("", "%(owner)s:%(group)s, mode %(mode)s" % file if file else "not there"))
    lines.append(("key", "%(type)s, %(bits)d bits" % key if key else "none that can be used"))
    lines.append(("request", values["request_sha256"] or "none"))
    if certificate is None:
        lines.append(("certificate", "none"))
    else:
        lines.append(
            ("certificate", "usable" if certificate["usable"] else "not usable: %s" % certificate["why_not"])
        )
        if "subject" in certificate:
            lines += [
                ("  subject", certificate["subject"]),
                ("  issuer", certificate["issuer"]),
                ("  serial number", certificate["serial_number"]),
                ("  valid from", utc(certificate["not_before"])),
                (
                    "  valid until",
                    "%s, %s" % (utc(certificate["not_after"]), _left(certificate["seconds_left"])),
                ),
            ]
    if not clock["believed"]:
        lines.append(("clock", "wrong: %s, it is past %s" % (utc(clock["now"]), utc(clock["floor"]))))
    # What is wrong with the certificate stands there already.
    lines += [("", remark) for remark in values["remarks"] if not certificate or remark != certificate["why_not"]]
    lines.append(("next run", values["next"] + (", then call the hook, which is owed" if owed else "")))
    return "".join("%-16s %s\n" % line for line in lines)


def _left(seconds: int) -> str:
    if seconds < 0:
        return "that has passed"
    days, rest = divmod(seconds, 86400)
    return "%d d %s left" % (days, time.strftime("%H h %M min", time.gmtime(rest)))
