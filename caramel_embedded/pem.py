"""PEM text (RFC 7468): the one reader of it. Responsible for where a block begins and ends, not for what is in it.

Whatever `text` is, reading takes time in proportion to its length.
"""

from __future__ import annotations

import re
from typing import Optional

KEY = b"PRIVATE KEY"  # PKCS #8, RFC 5958
# In the place of a key that a chip holds: for tpm2-openssl and pkcs11-provider, which OpenSSL reads them with.
KEY_IN_TPM = b"TSS2 PRIVATE KEY"
KEY_IN_TOKEN = b"PKCS#11 PROVIDER URI"
HELD_KEYS = (KEY_IN_TPM, KEY_IN_TOKEN)
CERTIFICATE = b"CERTIFICATE"
REQUEST = b"CERTIFICATE REQUEST"  # PKCS #10, RFC 2986
# In the file the request bears the older label of RFC 7468, section 7: GnuTLS takes any block that begins with
# "-----BEGIN CERTIFICATE" for a certificate, and then refuses the whole file.
FILED_REQUEST = b"NEW CERTIFICATE REQUEST"

# From a beginning to the end of the same label, with no other boundary in between.
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 #]+)-----([^-]*(?:-(?!----)[^-]*)*)-----END \1-----")
_BASE64 = re.compile(rb"[ \t]*\r?\n[A-Za-z0-9+/=\s]+")


def blocks(text: bytes) -> list[tuple[bytes, bytes]]:
    """Label and text of each block, whatever stands between its boundaries; the text ends with a newline."""
    return [(match[1], match[0] + b"\n") for match in _BLOCK.finditer(text)]


def first(text: bytes, *labels: bytes) -> Optional[bytes]:
    """The first block with one of `labels`, the earlier label before the later; None if there is none."""
    present = dict(reversed(blocks(text)))
    return next((present[label] for label in labels if label in present), None)


def certificates(text: bytes) -> list[bytes]:
    """The certificates in `text`, Base64 with any line ends, each without a last newline."""
    return [m[0] for m in _BLOCK.finditer(text) if m[1] == CERTIFICATE and _BASE64.fullmatch(m[2])]


def only_certificates(text: bytes) -> bool:
    """Whether `text` is whole certificates, text beside them, and nothing more."""
    whole = certificates(text)
    return bool(whole) and text.count(b"-----BEGIN ") == len(whole) and text.count(b"-----END ") == len(whole)
