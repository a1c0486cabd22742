"""What stands in front of Caramel and speaks TLS: what all such servers have in common, and one that needs no other
program."""

from __future__ import annotations

import http.client
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Optional

from cryptography import x509

from world.answers import HttpRequest, answer
from world.caramel import Caramel
from world.processes import PATIENCE, Service
from world.scripted import Scripted


class Front(Service):
    """A TLS server in front of Caramel that remembers what it was asked."""

    port = 0

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @abstractmethod
    def seen(self) -> list[HttpRequest]:
        """All requests so far. Nothing that was answered before this call is missing."""

    @contextmanager
    def watched(self) -> Iterator[list[HttpRequest]]:
        """A list that has, when the block is over, the requests made during it."""
        before, during = len(self.seen()), []  # type: int, list[HttpRequest]
        yield during
        during += self.seen()[before:]


class TlsFront(Scripted, Front):
    """A TLS front made of nothing but Python: says what Caramel says.

    `certificate` is a file with certificate and key. With `client_ca`, clients are asked for a certificate,
    and one that is not good ends the connection with an alert; with `demand` as well, so does none.
    """

    def __init__(
        self, caramel: Caramel, certificate: Path, *, client_ca: Optional[Path] = None, demand: bool = False
    ) -> None:
        super().__init__(certificate, self._pass_on, client_ca=client_ca, demand=demand)
        self.caramel = caramel
        self._seen: list[HttpRequest] = []

    def seen(self) -> list[HttpRequest]:
        return list(self._seen)

    def _pass_on(self, asked: HttpRequest) -> Optional[bytes]:
        behind = http.client.HTTPConnection("127.0.0.1", self.caramel.port, timeout=PATIENCE)
        try:
            behind.request(asked.method, asked.path, asked.body or None, dict(asked.headers))
            got = behind.getresponse()
            lines = [f"{name}: {value}" for name, value in got.getheaders()]
            said = answer(f"{got.status} {got.reason}", got.read(), *lines)
        except (OSError, http.client.HTTPException):
            return None
        finally:
            behind.close()
        client = asked.client_certificate
        subject = x509.load_der_x509_certificate(client).subject.rfc4514_string() if client else ""
        verify = "SUCCESS" if client else "NONE"
        self._seen.append(replace(asked, status=got.status, verify=verify, subject=subject, sent=len(said)))
        return said
