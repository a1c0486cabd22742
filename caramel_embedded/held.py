"""Keys that a TPM or a token holds: made by the maker's command, used by OpenSSL through a provider, never seen here.

Responsible for the programs that have to do with such a key. All of them run under a time limit, which no call of a
library has. Needed where a key is made, where one can't be used, and before the hook: not in everyday runs.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import ssl
from collections.abc import Sequence
from typing import Optional

from . import pem, program
from .errors import KeyUnusable, NotReady, printable
from .identity import Identity

LIMIT, LOOK = 60.0, 10.0  # seconds, for openssl(1): where its answer is needed, and where it is to say why not
_MAXIMUM = 12288  # bytes in a key's block, which is a third longer
# What a block is known by: the object identifier of TPMKey ("ASN.1 Specification for TPM 2.0 Key Files"), and the
# first string of pkcs11-provider's.
_MARKS = {
    pem.KEY_IN_TPM: b"\x06\x06\x67\x81\x05\x0a\x01\x03",
    pem.KEY_IN_TOKEN: b"PKCS#11 Provider URI v1.0",
}
# TPM 2.0 Library, part 2, 6.6: the codes as the TPM's own library prints them.
_CODES = {
    "0x000001df": "it is another TPM's key, or the TPM was cleared",
    "0x0000018b": "the TPM has not the parent that wraps the key",
    "0x00000921": "the TPM is locked, because it believes in an attack",
    "0x00000902": "the TPM has no room for one more key",
    "0x00000922": "the TPM is busy",
    "0x000009a2": "the TPM wants a password for the key",
    "0x0000098e": "the TPM wants a password for the key",
}


def is_whole(block: bytes) -> bool:
    """Whether a key's block is one of the two kinds, as far as that can be seen without the chip."""
    label, _, rest = block.partition(b"-----\n")
    mark = _MARKS.get(label.replace(b"-----BEGIN ", b""))
    try:
        der = base64.b64decode(rest.partition(b"-----")[0].replace(b"\n", b""), validate=True)
        # SEQUENCE, whose length takes one byte or, if that has its highest bit, so many more (X.690, 8.1.3).
        more = max(0, der[1] - 0x80)
        length = int.from_bytes(der[2 : 2 + more], "big") if more else der[1]
    except (binascii.Error, IndexError):
        return False
    return mark is not None and mark in der and der[0] == 0x30 and len(der) == 2 + more + length <= _MAXIMUM


# --- Make ---


def make(command: Sequence[str], client_id: str, key_type: str, limit: float) -> bytes:
    """Has `command` make a key, and returns its block, PEM. `limit`: seconds. Raises `NotReady`."""
    environment = {"CARAMEL_CN": client_id, "CARAMEL_KEY_TYPE": key_type}
    try:
        status, out, err = program.run(command, program.surroundings(environment), limit)
        if status:
            raise program.Failed("failed with status %d%s" % (status, _last_line(err)))
        return _only_block(out.replace(b"\r\n", b"\n"), err)
    except program.Failed as problem:
        raise NotReady("the key command %s %s" % (command[0], problem)) from None


def _only_block(out: bytes, err: bytes) -> bytes:
    blocks = pem.blocks(out)
    if not out.strip():
        raise program.Failed("printed nothing" + _last_line(err))
    if len(blocks) != 1 or blocks[0][1].strip() != out.strip():
        raise program.Failed("printed something else than one PEM block")
    label, block = blocks[0]
    if label not in pem.HELD_KEYS:
        wanted = " or ".join(kind.decode() for kind in pem.HELD_KEYS)
        raise program.Failed("printed a block %s, in the place of %s" % (label.decode(), wanted))
    if not is_whole(block):
        raise program.Failed("printed a damaged block")
    return block


# --- Use ---


def public_key(key: bytes) -> bytes:
    """The public half of a key, PEM (SubjectPublicKeyInfo). Asks the chip. Raises `KeyUnusable`."""
    return _openssl(key, ("pkey", "-pubout", "-in"))


def sign(key: bytes, data: bytes, limit: float = LIMIT) -> bytes:
    """A signature with SHA-256: RSASSA-PKCS1-v1_5, or ECDSA in DER. Asks the chip. Raises `KeyUnusable`."""
    return _openssl(key, ("dgst", "-sha256", "-sign"), data, limit)


def why_not(identity: Identity) -> Optional[str]:
    """Why the chip that holds the identity's key can't be used now, for a person; None where it can."""
    try:
        if identity.holder == "tpm":
            sign(identity.key, b"", LOOK)  # a key can be loaded into a TPM that is locked
        elif identity.issued is not None:
            # Not by openssl(1), which tries a wrong PIN more often, and a token may lock itself for that.
            identity.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    except KeyUnusable as error:
        return str(error)
    except OSError:
        return _why_no_token()
    return None


def _openssl(key: bytes, words: Sequence[str], data: bytes = b"", limit: float = LIMIT) -> bytes:
    """What openssl(1) prints, with the key's file as its last word."""
    fd = os.memfd_create("key")
    try:
        os.write(fd, key)
        line, environment = ["openssl", *words, "/proc/self/fd/%d" % fd], {**os.environ, "TSS2_LOG": "esys+error"}
        status, out, err = program.run(line, environment, limit, given=data, fds=(fd,))
    except program.Failed as problem:
        raise KeyUnusable("openssl(1), which asks the chip, %s" % problem) from None
    finally:
        os.close(fd)
    if status or not out:
        raise KeyUnusable(_why_no_token() if b"PKCS#11" in key[:30] else _why_no_tpm(err.decode("utf-8", "replace")))
    return out


def _why_no_tpm(said: str) -> str:
    """In words what the TPM's library and OpenSSL say, as openssl(1) prints it with TSS2_LOG=esys+error."""
    for code, words in _CODES.items():
        if code in said.lower():
            return words
    if "tcti" in said:
        return "the TPM can't be reached"
    return _why_no_provider() or "OpenSSL's provider for TPMs is not there, or not active"


def _why_no_token() -> str:
    """pkcs11-provider says nothing that would tell one from the other: what its configuration names is looked for."""
    missing = _why_no_provider()
    if missing:
        return missing
    with open(os.environ["OPENSSL_CONF"], encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 20)
    for what, pattern in (
        ("library", r"module-path\s*=\s*(\S+)"),
        ("PIN file", r"module-token-pin\s*=\s*file:(\S+)"),
    ):
        found = re.search(r"^\s*pkcs11-" + pattern, text, re.MULTILINE)
        if found and not os.access(found[1], os.R_OK):
            return "the token's %s %s is not there, or can't be read" % (what, found[1])
    return "the token is not there, has no such key, or refuses the PIN"


def _why_no_provider() -> Optional[str]:
    conf = os.environ.get("OPENSSL_CONF")
    if conf is None:
        return "no provider for it is active: CARAMEL_OPENSSL_CONF is not set"
    if not os.access(conf, os.R_OK):
        return "OpenSSL's configuration %s is not there, or can't be read" % conf
    return None


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return ": " + printable(last) if last else ""
