# SPDX-License-Identifier: MIT OR Apache-2.0
"""Records in the devices' zone: answers to `dns-01` challenges, and the devices' addresses.

By dynamic updates (RFC 2136) that are signed with a key (TSIG, RFC 8945), or by a command of the maker's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import dns.exception
import dns.name
import dns.query
import dns.rcode
import dns.tsigkeyring
import dns.update

from .configuration import Dns
from .errors import TryLater, WrongUsage
from .signing_request import in_zone

#: Seconds that the DNS server, or the command, may take.
PATIENCE = 20


class Zone:
    """The zone that the configuration names. Raises WrongUsage where its key can't be read."""

    def __init__(self, settings: Dns) -> None:
        self._settings = settings
        if settings.server:
            try:
                secret = Path(settings.key_file).read_text().strip()
                self._keyring = dns.tsigkeyring.from_text({settings.key_name: secret})
            except (OSError, ValueError, dns.exception.DNSException) as error:
                raise WrongUsage(f"dns.key_file: {error}") from None

    @contextlib.contextmanager
    def challenge(self, name: str, value: str) -> Iterator[None]:
        """The answer to a challenge is in the zone as long as the block lasts. Raises TryLater."""
        self._change("set", name, "TXT", value)
        try:
            time.sleep(self._settings.propagation_seconds)
            yield
        finally:
            self.clear(name)

    def clear(self, name: str) -> None:
        """No answer to a challenge is in the zone under this name. Raises TryLater."""
        self._change("delete", name, "TXT", "")

    def set_address(self, name: str, address: str) -> None:
        """The name leads to this address and to no other. Raises TryLater."""
        if not in_zone(name, self._settings.zone):
            raise TryLater(f"{name} is not in the zone {self._settings.zone}")
        four = ipaddress.ip_address(address).version == 4
        self._change("set", name, "A" if four else "AAAA", address)
        self._change("delete", name, "AAAA" if four else "A", "")

    def _change(self, verb: str, name: str, kind: str, value: str) -> None:
        if self._settings.command:
            self._run(verb, name, kind, value)
        else:
            self._update(verb, name, kind, value)

    def _run(self, verb: str, name: str, kind: str, value: str) -> None:
        command = [self._settings.command, verb, name.rstrip(".") + ".", kind, value]
        try:
            subprocess.run(command, check=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            raise TryLater(f"dns.command: {error}") from None

    def _update(self, verb: str, name: str, kind: str, value: str) -> None:
        update = dns.update.UpdateMessage(
            self._settings.zone, keyring=self._keyring, keyalgorithm=self._settings.key_algorithm
        )
        absolute = dns.name.from_text(name)
        if verb == "set":
            update.replace(absolute, self._settings.ttl, kind, value)
        else:
            update.delete(absolute, kind)
        server, port = self._settings.server, self._settings.port
        try:
            code = dns.query.tcp(update, server, PATIENCE, port).rcode()
        except (OSError, dns.exception.DNSException) as error:
            raise TryLater(f"DNS server {server}: {error or type(error).__name__}") from None
        if code != dns.rcode.NOERROR:
            raise TryLater(f"DNS server {server} says {dns.rcode.to_text(code)} to {verb} {name} {kind}")
