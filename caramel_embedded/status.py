"""What the key file holds, for a person at a glance and for machines: no lock, no network, nothing changed."""

from __future__ import annotations

import json
import os
import stat
import time

from . import __version__, hook
from . import identity as identities
from .errors import StorageError
from .keyfile import MAXIMUM
from .session import Stored
from .trust import Facts, Trust, utc

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
    text = json.dumps(values, indent=2) + "\n" if as_json else _text(values)
    return text, int(values["exit_status"])


def collect(settings: Settings) -> dict[str, Any]:
    """The same as values. The names are part of the interface: each is always there, null where there is nothing.

    Times are seconds since 1970, UTC.
    """
    identities.require_entropy()
    client_id, source = settings.client_id, settings.source("CARAMEL_CN")
    if client_id is None:
        from . import hardware

        client_id, found_in = hardware.client_id(settings.interfaces)
        source = "the " + found_in
    trust = Trust(settings.ca_cert(), settings.build_time)
    path = os.path.realpath(settings.key_file)
    data, status = _read(path)
    found = Stored(data, client_id, trust)
    identity = found.identity
    state = "none"
    if identity is not None:
        state = "certified" if found.facts else "pending"
    return {
        "version": __version__,
        "state": state,
        "exit_status": {"certified": CERTIFIED, "pending": PENDING}.get(state, FAILED),
        "client_id": client_id,
        "client_id_source": source,
        "server": "%s:%d" % settings.server if settings.server else None,
        "key_file": path,
        "file": status
        and {
            "owner": _owner(status.st_uid),
            "group": _group(status.st_gid),
            "mode": "%04o" % stat.S_IMODE(status.st_mode),
            "modified": int(status.st_mtime),
        },
        "key": {"type": "RSA", "bits": identities.key_bits(identity)} if identity else None,
        "request_sha256": identity.request_hash if identity else None,
        "certificate": _certificate(found, trust),
        "hook_owed": settings.hook is not None and hook.is_owed(path),
        "remarks": found.why,
        "clock": {"now": int(trust.clock), "floor": int(trust.floor), "believed": not trust.clock_is_wrong},
        "next": _next(found, data, status, settings),
    }


def _read(path: str) -> tuple[bytes, Optional[os.stat_result]]:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise StorageError("%s is no regular file" % path)
            return file.read(MAXIMUM + 1), status
    except FileNotFoundError:
        return b"", None
    except OSError as error:
        raise StorageError("can't read %s: %s" % (path, error.strerror)) from None


def _certificate(found: Stored, trust: Trust) -> Optional[dict[str, Any]]:
    if found.identity is None or found.identity.certificate is None:
        return None
    facts = found.genuine or _foreign(found.identity.certificate)
    return {
        "usable": found.facts is not None,
        "why_not": None if found.facts else found.why[-1],
        "subject": _name(facts.decoded["subject"]) if facts else None,
        "issuer": _name(facts.decoded["issuer"]) if facts else None,
        "serial_number": facts.decoded["serialNumber"] if facts else None,
        "not_before": int(facts.not_before) if facts else None,
        "not_after": int(facts.not_after) if facts else None,
        "seconds_left": int(facts.not_after - trust.now) if facts else None,
    }


def _foreign(pem: bytes) -> Optional[Facts]:
    """What a certificate says that is not by the trusted CA: to be shown, and to be believed in nothing."""
    try:
        from cryptography import x509

        certificate = x509.load_pem_x509_certificate(pem)
        # cryptography 42 has other names for them, and warns of the old ones
        new = hasattr(certificate, "not_valid_after_utc")
        start = certificate.not_valid_before_utc if new else certificate.not_valid_before
        end = certificate.not_valid_after_utc if new else certificate.not_valid_after
        digits = "%X" % certificate.serial_number
        return Facts(
            {
                "subject": _decoded(certificate.subject),
                "issuer": _decoded(certificate.issuer),
                "serialNumber": digits.zfill(len(digits) + len(digits) % 2),
                "notBefore": start.strftime("%b %d %H:%M:%S %Y GMT"),
                "notAfter": end.strftime("%b %d %H:%M:%S %Y GMT"),
            }
        )
    except Exception:  # damaged in whatever way, or nothing there that could read it
        return None


def _decoded(name: Any) -> list[list[tuple[str, str]]]:
    names = {"2.5.4.%d" % last: name for name, last in identities.ATTRIBUTES.items()}
    return [[(names.get(a.oid.dotted_string, a.oid.dotted_string), str(a.value)) for a in rdn] for rdn in name.rdns]


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
    text = ", ".join("%s=%s" % (short.get(name, name), value) for rdn in rdns for name, value in rdn)
    return "".join(c if c.isprintable() else "?" for c in text)


def _next(found: Stored, data: bytes, status: Optional[os.stat_result], settings: Settings) -> str:
    if not settings.server:
        return "nothing: no server is configured"
    steps = []
    if status and (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) != (
        settings.owner,
        settings.group,
        settings.mode,
    ):
        steps.append("set the file's owner and mode")
    if found.identity is None:
        steps.append("start over with a new key" if data else "make a key and a request, and send the request")
    elif found.facts is not None:
        steps.append("show the certificate, and ask for a newer one")
    elif found.identity.certificate is not None:
        steps.append("ask for a certificate, and drop the one in the file")
    else:
        steps.append("ask whether the request is signed, and send it where the server doesn't know it")
    if settings.hook and hook.is_owed(os.path.realpath(settings.key_file)):
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
