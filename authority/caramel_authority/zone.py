# SPDX-License-Identifier: MIT OR Apache-2.0
"""Records in the devices' zone: answers to `dns-01` challenges, and the devices' addresses.

By dynamic updates (RFC 2136) that are signed with a key (TSIG, RFC 8945), or by a command of the maker's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dns.exception
import dns.message
import dns.name
import dns.query
import dns.rcode
import dns.tsigkeyring
import dns.update

from .configuration import Dns
from .errors import TryLater, WrongUsage
from .signing_request import in_zone

#: Seconds that the DNS server may take for an update, and for a question.
PATIENCE, QUESTION = 20, 3
#: What can go wrong with a name server. The package raises EOFError where the server closes the connection.
TROUBLE = (OSError, EOFError, ValueError, dns.exception.DNSException)


class Refused(TryLater):
    """The name server answers, and doesn't do this."""


class Never(Exception):
    """There can't be such a record; the text says why."""


class Zone:
    """The zone that the configuration names. Raises WrongUsage where its key can't be read."""

    def __init__(self, settings: Dns) -> None:
        self._settings = settings
        self._name = dns.name.from_text(settings.zone)
        if settings.server:
            try:
                secret = Path(settings.key_file).read_text().strip()
                if not secret:
                    raise ValueError(f"{settings.key_file} is empty")
                self._keyring = dns.tsigkeyring.from_text({settings.key_name: (settings.key_algorithm, secret)})
            except (OSError, ValueError, dns.exception.DNSException) as error:
                raise WrongUsage(f"dns.key_file: {error}") from None

    @contextlib.contextmanager
    def challenge(self, name: str, value: str, seconds: float) -> Iterator[None]:
        """The answer to a challenge is at all of the zone's name servers as long as the block lasts.

        Raises TryLater, after at most `seconds` if it isn't at all of them by then. It stays in the zone then: it is
        on its way.
        """
        name = self._followed(name)
        self._change("set", name, "TXT", value)
        time.sleep(self._settings.propagation_seconds)
        self._wait_for(name, value, time.monotonic() + seconds)
        try:
            yield
        finally:
            self._change("delete", name, "TXT", "")

    def clear(self, name: str) -> None:
        """No answer to a challenge is in the zone under this name. Raises TryLater."""
        self._change("delete", self._followed(name), "TXT", "")

    def set_address(self, name: str, address: str) -> None:
        """The name leads to this address and to no other. Raises Never, TryLater (Refused: for this name only)."""
        if not in_zone(name, self._settings.zone):
            raise Never(f"{name} is not in the zone {self._settings.zone}")
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            raise Never(f"{address!r} is no address") from None
        # What a socket for both families says of a client with IPv4 (RFC 4291, 2.5.5.2).
        found = getattr(found, "ipv4_mapped", None) or found
        if getattr(found, "scope_id", None):
            raise Never(f"{address!r} has a meaning on one link only")
        kind, other = ("A", "AAAA") if found.version == 4 else ("AAAA", "A")
        self._change("set", name, kind, str(found))
        self._change("delete", name, other, "")

    def own_names(self) -> set[str]:
        """Names below the zone that it needs for itself: name servers, mail servers. None are known by a command.

        Raises TryLater where the name server doesn't say: that isn't to be taken for a zone without any.
        """
        if self._settings.command:
            return set()
        records = [one for kind in ("SOA", "NS", "MX") for one in self._ask(self._name, kind, sure=True)]
        targets = [getattr(one, "target", None) or getattr(one, "mname", None) or one.exchange for one in records]
        below = [one for one in targets if one != self._name and one.is_subdomain(self._name)]
        return {one.to_text(omit_final_dot=True).lower() for one in below}

    # --- What the zone says ---

    def _followed(self, name: str) -> str:
        """Where the zone has the records of this name: it may be an alias (RFC 1034, 3.6.2). Raises TryLater."""
        current = dns.name.from_text(name)
        for _ in range(8):
            aliases = [] if self._settings.command else self._ask(current, "CNAME")
            if not aliases:
                return current.to_text(omit_final_dot=True)
            current = aliases[0].target
            if not current.is_subdomain(self._name):
                raise TryLater(f"{name} is an alias of {current}, which is outside of the zone {self._name}")
        raise TryLater(f"{name} is an alias that leads to no end")

    def _wait_for(self, name: str, value: str, end: float) -> None:
        servers = self._name_servers()
        while True:
            servers = [(address, port) for address, port in servers if not self._shows(address, port, name, value)]
            if not servers:
                return
            if time.monotonic() >= end:
                behind = ", ".join(address for address, _ in servers)
                raise TryLater(f"{name}: the new TXT record is not yet at the name servers {behind}")
            time.sleep(1)

    @staticmethod
    def _shows(address: str, port: int, name: str, value: str) -> bool:
        """Whether this name server has the record, or is one that doesn't say: the CA will ask another one then."""
        try:
            answer, _ = dns.query.udp_with_fallback(dns.message.make_query(name, "TXT"), address, QUESTION, port)
        except TROUBLE:
            return True
        if answer.rcode() not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            return True
        texts = [b"".join(one.strings) for records in answer.answer for one in records if hasattr(one, "strings")]
        return value.encode() in texts

    def _name_servers(self) -> list[tuple[str, int]]:
        """Address and port of all that the CA may ask: those in the configuration, else those of the zone's NS."""
        if self._settings.name_servers:
            named = [one.partition("@") for one in self._settings.name_servers]
            return [(address, int(port or 53)) for address, _, port in named]
        if self._settings.command:
            return []
        found: set[str] = set()
        for one in self._ask(self._name, "NS"):
            if one.target.is_subdomain(self._name):
                found |= {record.address for kind in ("A", "AAAA") for record in self._ask(one.target, kind)}
            else:
                with contextlib.suppress(OSError):
                    known = socket.getaddrinfo(one.target.to_text(True), 53, type=socket.SOCK_DGRAM)
                    found |= {str(place[0]) for *_, place in known}
        own = self._addresses()
        return [(address, self._settings.port if address in own else 53) for address in sorted(found)]

    def _ask(self, name: dns.name.Name, kind: str, sure: bool = False) -> list[Any]:
        """What the server that takes the updates says to everybody, who signs no question. Raises TryLater; with
        `sure` also where the server refuses to answer, or fails, as one whose copy of the zone is too old.
        """
        query = dns.message.make_query(name, kind)
        answer = self._say(query)
        if sure and answer.rcode() != dns.rcode.NOERROR:
            said = f"DNS server {self._settings.server} says {dns.rcode.to_text(answer.rcode())}"
            raise TryLater(f"{said} to the question for {kind} of {name}")
        return [one for records in answer.answer if records.rdtype == query.question[0].rdtype for one in records]

    # --- Changes ---

    def _change(self, verb: str, name: str, kind: str, value: str) -> None:
        if self._settings.command:
            self._run(verb, name, kind, value)
        else:
            self._update(verb, name, kind, value)

    def _run(self, verb: str, name: str, kind: str, value: str) -> None:
        command = [self._settings.command, verb, name.rstrip(".") + ".", kind, value]
        seconds = self._settings.command_seconds
        try:
            subprocess.run(command, check=True, timeout=seconds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise TryLater(f"dns.command: {error}") from None

    def _update(self, verb: str, name: str, kind: str, value: str) -> None:
        update = dns.update.UpdateMessage(self._name, keyring=self._keyring)
        absolute = dns.name.from_text(name)
        if verb == "set":
            update.replace(absolute, self._settings.ttl, kind, value)
        else:
            update.delete(absolute, kind)
        code = self._say(update).rcode()
        if code != dns.rcode.NOERROR:
            said = f"DNS server {self._settings.server} says {dns.rcode.to_text(code)}"
            raise Refused(f"{said} to {verb} {name} {kind}")

    def _say(self, message: dns.message.Message) -> dns.message.Message:
        """What the server answers, at the first of its addresses that does. Raises TryLater."""
        trouble: Exception = OSError("it has no address")
        try:
            for address in self._addresses():
                try:
                    return dns.query.tcp(message, address, PATIENCE, self._settings.port)
                except OSError as error:
                    trouble = error
        except TROUBLE as error:
            trouble = error
        raise TryLater(f"DNS server {self._settings.server}: {trouble or type(trouble).__name__}")

    def _addresses(self) -> list[str]:
        """Those of the server, which the configuration may name. Raises OSError."""
        found = socket.getaddrinfo(self._settings.server, self._settings.port, type=socket.SOCK_STREAM)
        return [str(place[0]) for *_, place in found]
