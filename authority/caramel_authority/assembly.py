# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the configuration describes, put together."""

from __future__ import annotations

from dataclasses import dataclass

from .acme_ca import AcmeCa
from .ca import CertificateAuthority
from .configuration import Configuration
from .orders import OrderSigner, Worker
from .registry import Registry, Signer
from .store import Store
from .zone import Zone


@dataclass(frozen=True)
class Parts:
    configuration: Configuration
    store: Store
    registry: Registry
    #: None where the signer is `acme`.
    ca: CertificateAuthority | None

    def worker(self) -> Worker:
        """What does the slow work. It alone reads the account's key and the one for DNS."""
        zone = Zone(self.configuration.dns) if self.configuration.can_set_names else None
        acme = AcmeCa(self.configuration.acme, zone) if zone and not self.ca else None
        return Worker(self.store, self.configuration, acme, zone)


def assemble(configuration: Configuration) -> Parts:
    store = Store(configuration.database)
    ca = CertificateAuthority(configuration.ca) if configuration.signer == "ca" else None
    signer: Signer = ca or OrderSigner(configuration)
    registry = Registry(store, configuration.rules, signer, configuration.retry_after, configuration.dns.addresses)
    return Parts(configuration, store, registry, ca)
