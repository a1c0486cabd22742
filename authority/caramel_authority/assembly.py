# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the configuration describes, put together. Which process is which part decides what it can reach: the one that
answers asks another one to sign, the one that signs has no network, the worker has the ACME account's key.
"""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import audit, signer
from .ca import CertificateAuthority
from .configuration import Configuration
from .errors import WrongUsage, say
from .refusals import Refusals
from .registry import Registry, Signer
from .signer import Child, RemoteCa
from .store import Store, logged_since

if TYPE_CHECKING:
    # What talks to an ACME CA and to a name server takes longer to load than most commands to run: it is loaded by
    # those who need it.
    from .orders import Worker


@dataclass(frozen=True)
class Parts:
    configuration: Configuration
    store: Store

    def registry(self, by: Signer | None = None) -> Registry:
        """Who decides. By default nothing can be signed, which nobody who decides needs."""
        self._begin()
        return Registry(self.store, self.configuration, by or self._signer_at(_nobody))

    def catch_up(self, forget: bool = False) -> int:
        """As `Registry.catch_up`."""
        return Registry(self.store, self.configuration, self._signer_at(_nobody)).catch_up(forget)

    def _begin(self) -> None:
        newer = self.catch_up()
        if newer:
            say(f"the database was an older one: {newer} decisions of {Refusals(self.configuration).path}")

    def answering(self) -> tuple[Registry, Child | None]:
        """The part that answers devices; and the signer, where none is configured: a child of this process."""
        registry = self.registry()
        self.store.release()
        if self.configuration.signer != "ca":
            return registry, None
        path = self.configuration.ca.signer_socket
        child = None if path else Child(self.sign)
        registry.signer = self._signer_at(child.connect if child else signer.at(path))
        return registry, child

    def sign(self, accept: signer.Accept) -> None:
        """The part that signs: it alone reads the CA's key, and it knows no network."""
        audit.watch(self.store, Path(self.configuration.ca.folder))
        signer.run(self.registry(self.ca).renew, accept)

    @property
    def ca(self) -> CertificateAuthority:
        """The CA with its keys. Raises WrongUsage where it is somebody else's."""
        if self.configuration.signer != "ca":
            raise WrongUsage('the signer is not "ca"')
        return CertificateAuthority(self.configuration.ca)

    def worker(self) -> Worker:
        """What does the slow work. It alone reads the account's key and the one for DNS."""
        from .acme_ca import AcmeCa
        from .orders import Worker
        from .zone import Zone

        self._begin()
        zone = Zone(self.configuration.dns) if self.configuration.can_set_names else None
        if self.configuration.signer == "acme":
            self._say_if_the_account_is_gone(Path(self.configuration.acme.account_key))
        acme = AcmeCa(self.configuration.acme, zone) if zone and self.configuration.signer == "acme" else None
        return Worker(self.store, self.configuration, acme, zone)

    def _say_if_the_account_is_gone(self, key: Path) -> None:
        with self.store.reading() as db:
            if not key.exists() and logged_since(db, "ordered", 0):
                print(
                    f"acme.account_key: {key} is gone, and with it the account that made all orders so far, and its "
                    "limits at the CA. A new one is made. If you have a copy: stop all workers, put it there, start.",
                    file=sys.stderr, flush=True,
                )  # fmt: skip

    def _signer_at(self, connect: signer.Connect) -> Signer:
        if self.configuration.signer == "ca":
            return RemoteCa(self.configuration.ca, connect)
        from .orders import OrderSigner

        return OrderSigner(self.configuration)


def assemble(configuration: Configuration) -> Parts:
    return Parts(configuration, Store(configuration.database))


def _nobody() -> socket.socket:
    raise OSError("this process asks no signer")
