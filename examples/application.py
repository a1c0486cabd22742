#!/usr/bin/env python3
"""An application that keeps its identity in its database, and shows it to the service that it talks to.

    application.py DATABASE SERVER CA_CERT [URL]

Each start is one check with the Caramel server; with a URL it then fetches that, with the identity as client
certificate. The exit status is 0 with a certificate, 69 while nobody has signed the request.
"""

from __future__ import annotations

import contextlib
import sqlite3
import ssl
import sys
import urllib.request
import uuid
from typing import Optional

try:
    import caramel_embedded
    from caramel_embedded import Identity
except ModuleNotFoundError as error:
    sys.exit(f"application.py: there is no module {error.name}: pip install caramel-embedded")


class Wallet:
    """The application's identity in one row of its database."""

    def __init__(self, path: str) -> None:
        self.database = sqlite3.connect(path)
        # What is committed outlives a power cut: that is what `store` has to promise.
        self.database.execute("PRAGMA synchronous = FULL")
        self.database.execute("CREATE TABLE IF NOT EXISTS wallet (client_id TEXT, identity BLOB, modified REAL)")
        with self.database:
            # The client ID is chosen once, and kept: an identity for another one would be thrown away.
            self.database.execute(
                "INSERT INTO wallet (client_id) SELECT ? WHERE NOT EXISTS (SELECT * FROM wallet)",
                (str(uuid.uuid4()),),
            )

    def load(self) -> tuple[str, Optional[bytes], Optional[float]]:
        row: tuple[str, Optional[bytes], Optional[float]]
        row = self.database.execute("SELECT client_id, identity, modified FROM wallet").fetchone()
        return row

    def store(self, identity: Identity) -> None:
        with self.database:
            self.database.execute(
                "UPDATE wallet SET identity = ?, modified = ?", (bytes(identity), identity.modified)
            )


def tls(identity: Identity, ca_cert: bytes) -> ssl.SSLContext:
    """A TLS client's context that trusts the maker's CA and shows the identity."""
    context = ssl.create_default_context(cadata=ca_cert.decode("ascii"))
    identity.load_into(context)
    return context


def main(database: str, server: str, ca_cert_file: str, *url: str) -> int:
    try:
        with open(ca_cert_file, "rb") as file:
            ca_cert = file.read()
    except OSError as error:
        print(f"the CA certificate can't be read: {error}", file=sys.stderr)
        return 2
    wallet = Wallet(database)
    with contextlib.closing(wallet.database):
        client_id, stored, modified = wallet.load()
        try:
            outcome = caramel_embedded.check(
                server=server,
                ca_cert=ca_cert,
                client_id=client_id,
                stored=stored,
                store=wallet.store,
                modified=modified,
                timeout=20,
            )
        except caramel_embedded.Unreachable as error:
            print(f"{error}; trying again later")
            return 1
        except caramel_embedded.CaramelError as error:
            print(f"{error}; somebody has to look at this")
            return 2
    print(f"{client_id}: {outcome}")
    if not outcome.certified:
        return 69
    for address in url:
        with urllib.request.urlopen(address, context=tls(outcome.identity, ca_cert), timeout=20) as answer:
            print(f"{address}: {len(answer.read())} bytes")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("usage: application.py DATABASE SERVER CA_CERT [URL]")
    sys.exit(main(*sys.argv[1:]))
