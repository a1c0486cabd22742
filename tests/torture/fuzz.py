"""Coverage-guided fuzzing of the two parsers that strangers reach: the key file's and the answer's.

    cd tests && python -m torture.fuzz key-file|answer SECONDS FOLDER

libFuzzer (through atheris) changes inputs so that they reach new lines; where atheris can't be had for this Python,
the same oracles get random changes of the same seeds. Ends with status 0 and a line with the number of inputs where
nothing was found. `FOLDER` keeps the corpus and, for what was found, the input.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

try:
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # no wheel for this Python
    atheris = None

if TYPE_CHECKING:
    from world import Authority

CLIENT_ID = "fe00feedc0de"


def _is_right(request: bytes) -> bool:
    from cryptography import x509

    try:
        return x509.load_pem_x509_csr(request).is_signature_valid
    except Exception:  # no common base, as in identity.py
        return False


def _authority() -> Authority:
    """One for all runs, because the corpus that is kept has its certificates."""
    import world

    folder = Path(os.environ["FUZZ_FOLDER"]) / "authority"
    return world.Authority.open(folder) if folder.exists() else world.Authority(folder)


class Finding(Exception):
    """A promise of the parser that an input breaks."""


def key_file_oracle() -> tuple[Callable[[bytes], None], list[bytes]]:
    """What the key file's parsers may do with any bytes, and inputs to begin with."""
    import world

    from caramel_embedded import certificates, identity, pem, trust
    from torture.fleet import key_file_parts

    authority = _authority()
    trusted = trust.Trust(authority.pem)
    anchors = certificates.Anchors(authority.pem)
    key = world.new_key()
    certified = authority.identity(CLIENT_ID, key=key)
    parts = key_file_parts(certified)
    assert parts is not None and parts.certificate is not None
    seeds = [
        certified,
        authority.identity(CLIENT_ID, key=key, certified=False),
        authority.identity("fe0000000000", key=key),
        parts.certificate,
        certified.replace(b"\n", b"\r\n"),
        certified.replace(b" NEW CERTIFICATE", b" CERTIFICATE"),
        certified[: len(certified) // 2],
    ]

    def oracle(data: bytes) -> None:
        sealed = identity.Identity.sealed(data, trusted.digest)
        if sealed is not None and bytes(sealed) != data:
            raise Finding("a seal holds on what would not have been written")
        try:
            examined, _ = certificates.examine(data, CLIENT_ID, anchors, trusted, (), None)
        except certificates.InvalidIdentity:
            pass
        else:
            again = identity.Identity.sealed(bytes(examined), trusted.digest)
            if again is None or bytes(again) != bytes(examined):
                raise Finding("examine() makes what has no seal")
            if not _is_right(examined.request):
                raise Finding("examine() keeps a request that isn't right")
            twice, wrong = certificates.examine(bytes(examined), CLIENT_ID, anchors, trusted, (), None)
            if wrong or bytes(twice) != bytes(examined):
                raise Finding("what examine() keeps is not what it keeps of it")
        pem.first(data, pem.CERTIFICATE)
        identity.remembered(data)
        pem.only_certificates(data)
        certificates.client_id_in(data)

    return oracle, seeds


def answer_oracle() -> tuple[Callable[[bytes], None], list[bytes]]:
    """What the answer's parser may do with any bytes, and inputs to begin with."""
    import http.client

    import urllib3
    import world

    from caramel_embedded import pem
    from caramel_embedded.errors import Refused, Unreachable
    from caramel_embedded.server import MAXIMUM_BODY
    from torture.simulation import parsed

    authority = _authority()
    problem = "Content-Type: application/problem+json"
    seeds = [
        world.answer(200, authority.pem, "Last-Modified: Sun, 22 Nov 2026 04:00:00 GMT"),
        world.answer(202, b'{"sha256":"","url":""}'),
        world.answer(304),
        world.answer(403, b'{"status":403,"title":"Forbidden","detail":null}', problem),
        world.answer(400, b'{"status":400,"title":"Bad","detail":"duplicate request"}', problem),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\n-----\r\n0\r\nX: y\r\n\r\n",
        world.answer(200, authority.pem, "Content-Encoding: gzip"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + world.answer(404, b"<html>", "Content-Type: text/html; charset=x"),
    ]

    def oracle(data: bytes) -> None:
        try:
            answer = parsed(data)
        # What the program turns into words of its own, see Server._in_our_terms.
        except (Refused, Unreachable, OSError, http.client.HTTPException, urllib3.exceptions.HTTPError, ValueError):
            return
        if len(answer.body) > MAXIMUM_BODY:
            raise Finding("a body that is too long")
        if answer.from_caramel and b"problem+json" not in data.lower():
            raise Finding("a stranger's answer is taken for Caramel's")
        if not str(answer).isprintable() or len(str(answer)) > 300:
            raise Finding("an answer's words don't fit into a line")
        pem.certificates(answer.body)

    return oracle, seeds


ORACLES = {"key-file": key_file_oracle, "answer": answer_oracle}


def _changed(seed: bytes, dice: random.Random) -> bytes:
    """A random change, for where libFuzzer can't be had."""
    data = bytearray(seed)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        place = dice.randrange(len(data) + 1)
        end = min(len(data), place + dice.choice((1, 1, 4, 64)))
        kind = dice.randrange(4)
        if kind == 0:
            data[place:end] = dice.randbytes(end - place)
        elif kind == 1:
            del data[place:end]
        elif kind == 2:
            data[place:place] = data[place:end] or b"\r\n"
        elif place < len(data):
            data[place] ^= 1 << dice.randrange(8)
    return bytes(data)


def main(target: str, seconds: float, folder: str) -> None:
    corpus = Path(folder) / target
    corpus.mkdir(parents=True, exist_ok=True)
    os.environ["FUZZ_FOLDER"] = folder
    if atheris is None:
        oracle, seeds = ORACLES[target]()
        dice, inputs, end = random.Random(1), 0, time.monotonic() + seconds
        while time.monotonic() < end:
            data = _changed(dice.choice(seeds), dice)
            inputs += 1
            try:
                oracle(data)
            except BaseException:
                (corpus / "found").write_bytes(data)
                raise
        print(f"Done {inputs} runs without coverage")
        return
    with atheris.instrument_imports(
        include=["caramel_embedded", "http.client", "email"], enable_loader_override=False
    ):
        from caramel_embedded import identity, server  # noqa: F401
    oracle, seeds = ORACLES[target]()
    for number, data in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(data)
    options: list[Any] = [
        sys.argv[0],
        f"-max_total_time={int(seconds)}",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-max_len=8192",
        "-print_final_stats=1",
        "-verbosity=0",
        f"-artifact_prefix={folder}/",
        str(corpus),
    ]
    atheris.Setup(options, oracle)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
