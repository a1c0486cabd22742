# SPDX-License-Identifier: MIT OR Apache-2.0
"""The configuration: one TOML file, of which every name is known and every value has the type of its default.

The file's example, `caramel-authority.toml`, says what each one means.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from .errors import WrongUsage
from .shown import is_hidden
from .signing_request import HOST_NAME

PATH = "/etc/caramel-authority.toml"
#: Days, a century: more is a mistake, and soon beyond the dates that a certificate can have.
LONG = 36500
#: Seconds.
DAY = 86400
#: What a whole number may be. In seconds it is 68 years, and every database and protocol can hold it.
LARGEST = 2**31 - 1
DATABASES = ("sqlite", "postgresql+psycopg")


@dataclass(frozen=True)
class Rules:
    """Who gets a certificate without a person's decision."""

    listed: bool = True
    uuids: bool = False
    zone: str = ""
    again: bool = False


@dataclass(frozen=True)
class Ca:
    folder: str = "/var/lib/caramel-authority/ca"
    signer_socket: str = ""
    life_hours: int = 167
    backdate_seconds: int = 3600
    usages: tuple[str, ...] = ("client",)


@dataclass(frozen=True)
class Acme:
    directory: str = ""
    directory_ca: str = ""
    account_key: str = "/var/lib/caramel-authority/account.key"
    contact: str = ""
    terms_agreed: bool = False
    roots: str = ""
    usages: tuple[str, ...] = ("client",)
    eab_key_id: str = ""
    eab_key_file: str = ""
    orders_per_hour: int = 20
    renewal_share: float = 0.25
    lease_seconds: int = 600


@dataclass(frozen=True)
class Dns:
    zone: str = ""
    server: str = ""
    port: int = 53
    key_name: str = ""
    key_file: str = ""
    key_algorithm: str = "hmac-sha256"
    command: str = ""
    command_seconds: int = 20
    ttl: int = 60
    name_servers: tuple[str, ...] = ()
    propagation_seconds: int = 0
    addresses: str = "off"


@dataclass(frozen=True)
class Configuration:
    database: str = "sqlite:////var/lib/caramel-authority/state.db"
    signer: str = "ca"
    retry_after: int = 900
    refusals: str = ""
    pending_days: int = 30
    pending_limit: int = 10000
    front: tuple[str, ...] = ("127.0.0.1", "::1", "localhost")
    rules: Rules = field(default_factory=Rules)
    ca: Ca = field(default_factory=Ca)
    acme: Acme = field(default_factory=Acme)
    dns: Dns = field(default_factory=Dns)

    @classmethod
    def read(cls, path: str | None = None) -> Configuration:
        """The file's content; by default that of $CARAMEL_AUTHORITY_CONFIG or /etc. Raises WrongUsage."""
        path = path or os.environ.get("CARAMEL_AUTHORITY_CONFIG", PATH)
        try:
            # Some editors begin a file with a byte order mark; and TOML is UTF-8 whatever the locale says.
            content = tomllib.loads(Path(path).read_text("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise WrongUsage(f"{path}: {error}") from None
        try:
            read: Configuration = _filled(cls, content)
            read._check()
            if url_of(read.database).password and os.stat(path).st_mode & 0o004:
                raise WrongUsage("it has the database's password, and everybody may read it: chmod o-r")
        except WrongUsage as error:
            raise WrongUsage(f"{path}: {error}") from None
        return read

    def _check(self) -> None:
        dns, acme = self.dns, self.acme
        wants: list[tuple[object, str]] = [
            (self.signer in ("ca", "acme"), 'signer is "ca" or "acme"'),
            (0 < self.retry_after <= 30 * DAY, f"retry_after is between 1 and {30 * DAY}"),
            (self.pending_days > 0 and self.pending_limit > 0, "pending_days and pending_limit are positive"),
            (self.pending_days <= LONG, f"pending_days is at most {LONG}"),
            (
                all(one == "localhost" or _is_address(one) for one in self.front),
                'front are IP addresses, not networks, and "localhost"',
            ),
            (_is_zone(self.rules.zone), "rules.zone is a host name"),
            (self.ca.folder, "ca.folder is the path of a folder"),
            (self.ca.life_hours <= LONG * 24, f"ca.life_hours is at most {LONG * 24}"),
            (self.ca.life_hours * 3600 > self.ca.backdate_seconds, "ca.life_hours is longer than backdate_seconds"),
            (self.ca.usages and _are_usages(self.ca.usages), 'ca.usages are "client" and "server", each once'),
            (dns.addresses in ("off", "post", "check"), 'dns.addresses is "off", "post" or "check"'),
            (not (dns.server and dns.command), "dns has a server or a command"),
            (not dns.server or (dns.key_name and dns.key_file), "dns.server needs a key"),
            (
                not dns.server or _is_address(dns.server) or HOST_NAME.fullmatch(dns.server.rstrip(".")),
                "dns.server is an address or a host name",
            ),
            (
                all(map(_is_name_server, dns.name_servers)),
                "dns.name_servers are addresses, and ADDRESS@PORT where the port is not 53",
            ),
            (_is_zone(dns.zone), "dns.zone is a host name"),
            (0 < dns.port < 65536, "dns.port is between 1 and 65535"),
            (0 < dns.command_seconds <= DAY, f"dns.command_seconds is between 1 and {DAY}"),
            (dns.propagation_seconds <= DAY, f"dns.propagation_seconds is at most {DAY}"),
            (dns.addresses == "off" or self.can_set_names, "dns.addresses needs a zone, and a server or a command"),
        ]
        if self.signer == "acme":
            wants += [
                (acme.directory.startswith("https://"), "acme.directory is an https address"),
                (acme.account_key, "acme.account_key is the path of a file"),
                (acme.roots, "acme.roots names the CA's roots"),
                (acme.terms_agreed, "acme.terms_agreed has to be true: read the CA's terms first"),
                (acme.orders_per_hour > 0, "acme.orders_per_hour is positive"),
                (0 <= acme.renewal_share < 1, "acme.renewal_share is at least 0.0 and less than 1.0"),
                (_are_usages(acme.usages), 'acme.usages are "client" and "server", each once'),
                (
                    bool(acme.eab_key_id) == bool(acme.eab_key_file),
                    "acme.eab_key_id and acme.eab_key_file belong together",
                ),
                (
                    self.shortest_lease <= acme.lease_seconds <= 30 * DAY,
                    f"acme.lease_seconds is {self.shortest_lease} or more with these settings of dns, "
                    f"and at most {30 * DAY}",
                ),
                (self.can_set_names, "the signer acme needs dns.zone, and dns.server or dns.command"),
            ]
        if dns != Dns():
            wants += _keys_wants(dns)
        for true, what in wants:
            if not true:
                raise WrongUsage(what)

    @property
    def where(self) -> str:
        """The database, for a person: a path, or an address without its password."""
        url = url_of(self.database)
        return str(Path(url.database or "").absolute()) if url.get_backend_name() == "sqlite" else str(url)

    @property
    def shortest_lease(self) -> int:
        """Seconds: a worker changes the zone thrice in a lease, and needs as long for everything else."""
        return 2 * (3 * (self.dns.command_seconds if self.dns.command else 20) + self.dns.propagation_seconds)

    @property
    def can_set_names(self) -> bool:
        return bool(self.dns.zone and (self.dns.server or self.dns.command))


def url_of(database: str) -> URL:
    with contextlib.suppress(ArgumentError, ValueError):  # a port that is no number
        url = make_url(database)
        if url.drivername in DATABASES and url.database:
            return url
    raise WrongUsage("database is no address like sqlite:////PATH or postgresql+psycopg://HOST/NAME")


def _keys_wants(settings: Dns) -> list[tuple[object, str]]:
    """The same of the key that signs updates: only who has one waits until dnspython is loaded."""
    import dns.exception
    import dns.name
    import dns.tsig

    def name(text: str) -> dns.name.Name | None:
        try:
            return dns.name.from_text(text)
        except (dns.exception.DNSException, ValueError):
            return None

    # As dnspython knows them (RFC 8945, 6); that of GSS-API (RFC 3645) has no key in a file.
    algorithms = [one for one in dns.tsig.mac_sizes if one != dns.tsig.GSS_TSIG]
    known = ", ".join(one.to_text(True) for one in algorithms)
    return [
        (name(settings.key_algorithm) in algorithms, f"dns.key_algorithm is one of {known}"),
        (not settings.key_name or name(settings.key_name), "dns.key_name is a name"),
    ]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_zone(text: str) -> bool:
    return bool(HOST_NAME.fullmatch(text.strip(".") or "none"))


def _is_name_server(text: str) -> bool:
    address, at, port = text.partition("@")
    good = not at or (re.fullmatch("[0-9]{1,5}", port) and 0 < int(port) < 65536)
    return bool(good) and _is_address(address)


def _are_usages(usages: tuple[str, ...]) -> bool:
    return len(set(usages)) == len(usages) and set(usages) <= {"client", "server"}


def _filled(kind: Any, content: dict[str, Any], where: str = "") -> Any:
    """An instance of the dataclass, with what the file says in place of the defaults."""
    known = {one.name: one for one in fields(kind)}
    values: dict[str, Any] = {}
    default = kind()
    for name, value in content.items():
        if name not in known:
            raise WrongUsage(f"{where}{name} is no setting")
        wanted: Any = getattr(default, name)
        texts = value if isinstance(value, list) else [value]
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                raise WrongUsage(f"{name} is a table: [{name}], and its settings below it")
            value = _filled(type(wanted), value, f"{name}.")
        elif any(isinstance(one, str) and any(map(is_hidden, one)) for one in texts):
            raise WrongUsage(f"{where}{name} has a character that can't be seen")
        elif type(value) is int is type(wanted) and not 0 <= value <= LARGEST:
            raise WrongUsage(f"{where}{name} is a whole number from 0 to {LARGEST}")
        elif isinstance(wanted, tuple) and isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = tuple(value)
        elif type(value) is not type(wanted):
            raise WrongUsage(f"{where}{name} is to be of the type of {wanted!r}")
        values[name] = value
    return kind(**values)
