# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the records of one TLS 1.3 connection weigh, each with the name of what is in it.

Nothing is decrypted. Each handshake message of OpenSSL's is a record of its own, and their order is known (RFC 8446,
2), so counting is enough.
"""

from __future__ import annotations

HANDSHAKE, CHANGE_CIPHER_SPEC, APPLICATION_DATA = 22, 20, 23
HEADER = 5

#: What comes from each side, in this order, where a certificate is asked for; and what doesn't come where none is.
DEVICE = ("ClientHello", "Certificate", "CertificateVerify", "Finished", "HTTP request")
SERVER = (
    "ServerHello",
    "EncryptedExtensions",
    "CertificateRequest",
    "Certificate",
    "CertificateVerify",
    "Finished",
    "HTTP response, and the end",
)
BY_DEVICE, BY_SERVER = "device", "server"
ONLY_IF_ASKED = {
    (BY_SERVER, "CertificateRequest"),
    (BY_DEVICE, "Certificate"),
    (BY_DEVICE, "CertificateVerify"),
}


def records(stream: bytes) -> list[tuple[int, int]]:
    """Type and length in bytes of each record, its header included."""
    found, at = [], 0
    while at < len(stream):
        size = HEADER + int.from_bytes(stream[at + 3 : at + HEADER], "big")
        found.append((stream[at], size))
        at += size
    return found


def weights(sent: bytes, received: bytes, asked: bool) -> list[tuple[str, str, int]]:
    """Who says what, and the bytes of it, in the order of each side; the last line of a side is all that is left.

    `asked`: whether the server wants a certificate of the device.
    """
    lines: list[tuple[str, str, int]] = []
    for side, stream, names in ((BY_DEVICE, sent, DEVICE), (BY_SERVER, received, SERVER)):
        said = [name for name in names if asked or (side, name) not in ONLY_IF_ASKED]
        found = records(stream)
        changes = sum(size for kind, size in found if kind == CHANGE_CIPHER_SPEC)
        sizes = [size for kind, size in found if kind != CHANGE_CIPHER_SPEC]
        assert len(sizes) >= len(said), f"the {side} said less than TLS 1.3 wants: {found}"
        lines += [(side, name, size) for name, size in zip(said[:-1], sizes)]
        lines.append((side, said[-1], sum(sizes[len(said) - 1 :])))
        lines.append((side, "ChangeCipherSpec", changes))
    return lines
