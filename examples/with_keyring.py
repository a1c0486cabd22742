#!/usr/bin/env python3
"""The same with the desktop's key chain, through the library `keyring`: GNOME's, KDE's, and others.

with_keyring.py SERVER CA_CERT
"""

from __future__ import annotations

import sys
import uuid

try:
    import keyring
    import keyring.errors

    import caramel_embedded
    from caramel_embedded import Identity
except ModuleNotFoundError as error:
    sys.exit(f"with_keyring.py: there is no module {error.name}: pip install keyring caramel-embedded")

SERVICE = "com.example.app"


def client_id() -> str:
    """Chosen once, and kept."""
    known = keyring.get_password(SERVICE, "client ID")
    if known is None:
        known = str(uuid.uuid4())
        keyring.set_password(SERVICE, "client ID", known)
    return known


def store(identity: Identity) -> None:
    # A key chain keeps text; all of an identity is ASCII. It raises an exception where it can't, and then nothing
    # of the identity is sent anywhere.
    keyring.set_password(SERVICE, "identity", bytes(identity).decode("ascii"))


def main(server: str, ca_cert_file: str) -> int:
    try:
        with open(ca_cert_file, "rb") as file:
            ca_cert = file.read()
    except OSError as error:
        print(f"the CA certificate can't be read: {error}", file=sys.stderr)
        return 2
    try:
        # A key chain that is locked raises an exception here. That must not be taken for "there is none".
        text = keyring.get_password(SERVICE, "identity")
        outcome = caramel_embedded.check(
            server=server,
            ca_cert=ca_cert,
            client_id=client_id(),
            stored=None if text is None else text.encode("ascii"),
            store=store,
        )
    except keyring.errors.KeyringError as error:  # no desktop, say, or nobody to unlock it
        print(f"no key chain to be used: {error}", file=sys.stderr)
        return 2
    except caramel_embedded.CaramelError as error:
        print(error, file=sys.stderr)
        return 1
    print(outcome)
    return 0 if outcome.certified else 69


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: with_keyring.py SERVER CA_CERT")
    sys.exit(main(*sys.argv[1:]))
