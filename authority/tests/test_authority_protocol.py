# SPDX-License-Identifier: MIT OR Apache-2.0
"""The Caramel protocol, word for word, as a device hears it, and what is added: dates, waiting times, renewal."""

from __future__ import annotations

import base64
import datetime
import hashlib
import ipaddress
import json
import math
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path
from typing import Union

import authority_world
import pytest
import world
from authority_world import Postgres, RegistrationAuthority, Reply, Server, ask, at, csr, ec_key, rsa_key, sha256
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from needs import needs, require

pytest_plugins = ["authority_fixtures"]
pytestmark = needs("authority", "faketime", "openssl")

NOBODYS = 64 * "a"


def is_problem(reply: Reply, status: int, title: str, detail: object = None) -> None:
    assert reply.status == status
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json == {"status": status, "title": title, "detail": detail}


# --- Caramel's words ---


def test_unknown_posted_authorized_and_rejected(server: Server) -> None:
    request = csr("fffbeec0ffee")
    url = {"sha256": sha256(request), "url": f"http://127.0.0.1:{server.port}/{sha256(request)}"}
    is_problem(server.get(sha256(request)), 404, "Not Found")

    for reply in (server.post(request), server.get(sha256(request))):
        assert reply.status == 202
        assert reply.headers["content-type"] == "application/json"
        assert reply.json == url

    server.authority.command("authorize", "fffbeec0ffee")
    signed = server.get(sha256(request))
    assert signed.status == 200
    assert signed.headers["content-type"] == "application/octet-stream"
    assert signed.body.count(b"BEGIN") == 1
    assert signed.certificate.public_key() == x509.load_pem_x509_csr(request).public_key()
    assert signed.certificate.subject == x509.load_pem_x509_csr(request).subject

    server.authority.command("reject", sha256(request))
    is_problem(server.get(sha256(request)), 403, "Forbidden")
    is_problem(server.post(request), 400, "Bad Request", "duplicate request")
    is_problem(server.get(sha256(request)), 403, "Forbidden")


def test_a_rejected_device_comes_with_a_new_request(server: Server) -> None:
    first, second = csr("fffbeec0ffee"), csr("fffbeec0ffee")
    server.post(first)
    server.authority.command("reject", "fffbeec0ffee")
    assert server.get(sha256(first)).status == 403
    assert server.post(second).status == 202
    server.authority.command("authorize", "fffbeec0ffee")
    assert server.get(sha256(second)).status == 200
    assert server.get(sha256(first)).status == 403


def test_the_same_request_again(server: Server) -> None:
    request = csr("fffbeec0ffee")
    server.post(request)
    is_problem(server.post(request), 400, "Bad Request", "duplicate request")
    server.authority.command("authorize", "fffbeec0ffee")
    is_problem(server.post(request), 400, "Bad Request", "duplicate request")
    assert server.get(sha256(request)).status == 200


def test_the_cas_certificate(server: Server) -> None:
    for path in ("/root.crt", "/bundle.crt"):
        reply = server.get(path)
        assert reply.status == 200
        assert reply.body == server.authority.ca.read_bytes()


@pytest.mark.parametrize("path", ["/", "/" + 63 * "a", "/" + 64 * "A", "/" + 65 * "a", f"/{NOBODYS}/", "/root.key"])
def test_no_other_path(server: Server, path: str) -> None:
    is_problem(server.get(path), 404, "Not Found")
    assert ask(server.port, "POST", path, csr("fffbeec0ffee")).status == 404


def test_no_other_method(server: Server) -> None:
    reply = ask(server.port, "PUT", f"/{NOBODYS}", b"x")
    is_problem(reply, 405, "Method Not Allowed")
    assert reply.headers["allow"] == "GET, HEAD, POST"


def test_head_says_what_get_says(server: Server) -> None:
    request = csr("fffbeec0ffee")
    server.authority.command("allow", "fffbeec0ffee")
    got = server.enroll(request)
    head = ask(server.port, "HEAD", f"/{sha256(request)}")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["last-modified"] == got.headers["last-modified"]
    assert head.headers["content-length"] == str(len(got.body))


# --- Bad input: a status, a reason, nothing stored ---


def raw(port: int, head: str, body: bytes = b"") -> bytes:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_no_length_and_too_long(server: Server) -> None:
    said = raw(server.port, f"POST /{NOBODYS} HTTP/1.1\r\nHost: x")
    assert said.startswith(b"HTTP/1.1 411 ")
    assert said.endswith(b'{"status": 411, "title": "Length Required", "detail": null}')
    just_too_long = csr("fffbeec0ffee").ljust(2049, b"\n")
    is_problem(server.post(just_too_long), 413, "Request Entity Too Large")
    is_problem(server.post(just_too_long[:2048]), 400, "Bad Request", "PEM not as OpenSSL writes it")
    assert server.authority.rows("SELECT * FROM requests") == []


def test_a_body_in_chunks_has_a_length_once_it_is_there(server: Server) -> None:
    for body, status in ((csr("fffbeec0ffee").ljust(2049, b"\n"), 413), (csr("fffbeec0ffee"), 202)):
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in (body[:9], body[9:], b""))
        head = f"POST /{sha256(body)} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked"
        assert raw(server.port, head, pieces).startswith(b"HTTP/1.1 %d " % status)


def test_the_longest_request_that_a_device_may_have(server: Server) -> None:
    """RSA with 4096 bits and the longest client ID fits."""
    client_id = "d" * 60 + ".com"
    request = csr(client_id, rsa_key(4096), names=[x509.DNSName(client_id)])
    assert len(request) <= 2048
    assert server.post(request).status == 202


def other_curve() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def broken_signature() -> bytes:
    good = csr("fffbeec0ffee", rsa_key())
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    return x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)


def subject(*pairs: tuple[str, str]) -> bytes:
    return csr("", subject=pairs)


def without_cn() -> bytes:
    return subject(*authority_world.PREFIX, ("OU", "Devices"))


def asks_to_be_a_ca() -> bytes:
    name = world.name_of([*authority_world.PREFIX, ("CN", "fffbeec0ffee")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    builder = builder.add_extension(x509.BasicConstraints(True, None), True)
    return builder.sign(ec_key(), hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def of_version_2() -> bytes:
    """`INTEGER 0` is the version (RFC 2986, 4.1), the first element of the inner sequence."""
    der = x509.load_pem_x509_csr(csr("fffbeec0ffee")).public_bytes(serialization.Encoding.DER)
    assert der.count(b"\x02\x01\x00") == 1
    return armored(der.replace(b"\x02\x01\x00", b"\x02\x01\x01"))


def armored(der: bytes) -> bytes:
    text = base64.b64encode(der)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN CERTIFICATE REQUEST-----", *lines, b"-----END CERTIFICATE REQUEST-----", b""])


def is_prime(number: int) -> bool:
    """As good as certain, for numbers that nobody chose to deceive (Fermat)."""
    return all(number % small for small in (3, 5, 7, 11, 13)) and pow(2, number - 1, number) == 1


def next_prime(number: int) -> int:
    number += 1 + number % 2
    while not is_prime(number):
        number += 2
    return number


def prime(bits: int) -> int:
    said = subprocess.run(["openssl", "prime", "-generate", "-bits", str(bits)], capture_output=True, check=True)
    return int(said.stdout)


def roca_prime() -> int:
    """A prime of the form that Nemec et al. found in 2017: k * M + (65537 ** a mod M)."""
    product = math.prod(one for one in range(2, 350) if all(one % two for two in range(2, one)))
    while True:
        low = pow(65537, random.randrange(1 << 64), product)
        factor = random.randrange(3 << 1022, 1 << 1024) // product
        if is_prime(number := factor * product + low):
            return number


def weak(p: int, q: int) -> bytes:
    """A request with the modulus p * q, and a signature that is right for it (RFC 8017, 8.2.1)."""
    modulus, exponent = p * q, 65537
    order = math.lcm(*(one - 1 for one in (p, q) if one > 1))
    secret = pow(exponent, -1, order)
    size = (modulus.bit_length() + 7) // 8
    der = x509.load_pem_x509_csr(csr("fffbeec0ffee", rsa_key())).public_bytes(serialization.Encoding.DER)
    known = rsa_key().public_key().public_numbers().n.to_bytes(256, "big")
    assert size == 256 and der.count(known) == 1
    der = der.replace(known, modulus.to_bytes(256, "big"))
    # Outer sequence and inner one have headers of four bytes; behind the inner one are algorithm and signature.
    inner = der[4 : 8 + int.from_bytes(der[6:8], "big")]
    digest_info = bytes.fromhex("3031300d060960864801650304020105000420") + hashlib.sha256(inner).digest()
    padded = b"\0\1" + b"\xff" * (size - 3 - len(digest_info)) + b"\0" + digest_info
    signature = pow(int.from_bytes(padded, "big"), secret, modulus).to_bytes(256, "big")
    return armored(der[:-256] + signature)


OU_OF_900 = subject(*authority_world.PREFIX, ("OU", "x" * 900), ("CN", "fffbeec0ffee"))
P = authority_world.PREFIX
GOOD = csr("fffbeec0ffee")
BAD: dict[str, tuple[Union[bytes, Callable[[], bytes]], str]] = {
    "nothing": (b"", "not a certificate request in PEM"),
    "no PEM": (b"hello\n", "not a certificate request in PEM"),
    "a certificate's label": (
        GOOD.replace(b"CERTIFICATE REQUEST", b"CERTIFICATE"),
        "not a certificate request in PEM",
    ),
    "the older label": (GOOD.replace(b" CERTIFICATE R", b" NEW CERTIFICATE R"), "PEM not as OpenSSL writes it"),
    "text before": (b"hello\n" + GOOD, "PEM not as OpenSSL writes it"),
    "text after": (GOOD + b"hello\n", "PEM not as OpenSSL writes it"),
    "no newline at the end": (GOOD[:-1], "PEM not as OpenSSL writes it"),
    "DOS lines": (GOOD.replace(b"\n", b"\r\n"), "PEM not as OpenSSL writes it"),
    "bytes that are no text": (GOOD[:100] + b"\xff" + GOOD[101:], "not a certificate request in PEM"),
    "a bad signature": (broken_signature(), "bad signature"),
    "RSA 1024": (csr("fffbeec0ffee", rsa.generate_private_key(65537, 1024)), "Bad key: RSA of 1024 bits"),
    "RSA with exponent 3": (csr("fffbeec0ffee", rsa.generate_private_key(3, 2048)), "Bad key: RSA with a public exp"),
    "another curve": (csr("fffbeec0ffee", other_curve()), "Bad key: neither RSA nor P-256"),
    "no CN": (without_cn(), "Bad subject: it has to end with the only CN"),
    "two CNs": (subject(*P, ("CN", "a"), ("CN", "b")), "Bad subject: it has to end with the only CN"),
    "CN not last": (subject(("CN", "a"), *P), "Bad subject: it has to end with the only CN"),
    "no subject": (subject(), "Bad subject: it has to end with the only CN"),
    "CN with a comma": (csr("a,DNS:ca.example.com"), "Bad subject: the CN is no client ID: it has no ','"),
    "CN with a wild card": (csr("*.example.com"), "Bad subject: the CN is no client ID: it has no '*'"),
    "CN with a new line": (csr("a\nb"), "Bad subject: the CN is no client ID: it has no '\\n'"),
    "CN that reads backwards": (csr("a\u202eb"), "Bad subject: the CN is no client ID: it has no '\\u202e'"),
    "CN with a blank of Braille's": (csr("a\u2800b"), "Bad subject: the CN is no client ID: it has no '\\u2800'"),
    "CN with a filler": (csr("\u3164"), "Bad subject: the CN is no client ID: it has no '\\u3164'"),
    "CN with the first filler": (csr("a\u115fb"), "Bad subject: the CN is no client ID: it has no '\\u115f'"),
    "CN with a joiner": (csr("a\u034fb"), "Bad subject: the CN is no client ID: it has no '\\u034f'"),
    "CN with a selector": (csr("a\ufe0f"), "Bad subject: the CN is no client ID: it has no '\\ufe0f'"),
    "CN with a tag": (csr("a\U000e0061"), "Bad subject: the CN is no client ID: it has no '\\udb40\\udc61'"),
    "CN that is private": (csr("a\ue000"), "Bad subject: the CN is no client ID: it has no '\\ue000'"),
    "CN that is unassigned": (csr("a\u0378"), "Bad subject: the CN is no client ID: it has no '\\u0378'"),
    "CN that begins with a mark": (csr("\u0332a"), "Bad subject: the CN is no client ID: it begins with no mark"),
    "OU with a filler": (subject(*P, ("OU", "\u3164"), ("CN", "a")), "Bad subject: the OU has at most 64"),
    "CN with blanks": (csr("a  b"), "Bad subject: the CN is no client ID: it has no blank at its ends"),
    "CN in two forms": (csr("e\u0301"), "Bad subject: the CN is no client ID: it has composed"),
    "a long OU": (OU_OF_900, "Bad subject: the OU has at most 64 characters"),
    "version 2": (of_version_2(), "not a certificate request in PEM"),
    "the modulus is a prime": (lambda: weak(prime(2048), 1), "Bad key: RSA, its modulus is a prime"),
    "a small factor": (lambda: weak(prime(2040), 251), "Bad key: RSA, its modulus has a small factor"),
    "an even modulus": (lambda: weak(prime(2047), 2), "bad signature"),
    "factors that are close": (
        lambda: weak(close := prime(1024), next_prime(close)),
        "Bad key: RSA, the factors of its modulus are close",
    ),
    "ROCA": (lambda: weak(roca_prime(), roca_prime()), "Bad key: RSA, made by a library whose keys can be factored"),
    "O missing": (subject(*P[:3], ("CN", "a")), "Bad subject: L=Linköping,ST=Östergötland,C=SE before OU"),
    "another O": (subject(*P[:3], ("O", "Other AB"), ("CN", "a")), "Bad subject: O=Other AB,"),
    "another order": (subject(P[1], P[0], *P[2:], ("CN", "a")), "Bad subject: O=Example AB,L=Link"),
    "two OUs": (subject(*P, ("OU", "1"), ("OU", "2"), ("CN", "a")), "Bad subject: OU=1,O=Example AB"),
    "another's name": (csr("a.example.com", names=[x509.DNSName("b.example.com")]), "Bad subjectAltName"),
    "one name more": (
        csr("a.example.com", names=[x509.DNSName("a.example.com"), x509.DNSName("b.example.com")]),
        "Bad subjectAltName",
    ),
    "an address": (
        csr("a.example.com", names=[x509.IPAddress(ipaddress.ip_address("10.0.0.1"))]),
        "Bad subjectAltName",
    ),
    "a CA": (asks_to_be_a_ca(), "Bad extension: asks to be a CA"),
}


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> object:
    made = authority_world.RegistrationAuthority(tmp_path_factory.mktemp("authority"))
    made.create_ca()
    with made.serving() as started:
        yield started


@pytest.mark.parametrize("what", BAD)
def test_bad_input(one_server: Server, what: str) -> None:
    given, detail = BAD[what]
    body = given() if callable(given) else given
    reply = one_server.post(body)
    assert reply.status == 400
    assert reply.json["detail"].startswith(detail)
    is_problem(reply, 400, "Bad Request", reply.json["detail"])
    assert one_server.authority.rows("SELECT * FROM requests") == []
    assert one_server.get(sha256(body)).status == 404


@pytest.mark.parametrize("client_id", ["Bj\u00f6rn's unit 7", "line/3@plant", "a:b", "\u6a5f-1", "x" * 64])
def test_what_a_client_id_may_be(one_server: Server, client_id: str) -> None:
    """What the server that is replaced took, as far as nobody takes it for something else."""
    request = csr(client_id)
    one_server.authority.command("allow", client_id)
    reply = one_server.enroll(request)
    assert reply.status == 200
    name = reply.certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert [one.value for one in name] == [client_id]
    one_server.authority.rows("DELETE FROM certificates")
    one_server.authority.rows("DELETE FROM sightings")
    one_server.authority.rows("DELETE FROM requests")


def test_ed25519_is_refused(one_server: Server) -> None:
    key: object = ed25519.Ed25519PrivateKey.generate()
    builder = x509.CertificateSigningRequestBuilder().subject_name(world.name_of([*P, ("CN", "a")]))
    body = builder.sign(key, None).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]
    assert one_server.post(body).json["detail"] == "bad signature: not made with SHA-2"


def test_hash_mismatch(one_server: Server) -> None:
    is_problem(one_server.post(GOOD, NOBODYS), 400, "Bad Request", "hash mismatch")
    assert one_server.authority.rows("SELECT * FROM requests") == []


def test_one_key_under_two_names(server: Server) -> None:
    """Devices that make their keys without entropy make the same ones."""
    key = ec_key()
    assert server.post(csr("fffbeec0ffee", key)).status == 202
    second = csr("fffbeec0ffef", key)
    is_problem(server.post(second), 400, "Bad Request", "Bad key: another device has it")
    assert server.get(sha256(second)).status == 404
    assert server.post(csr("fffbeec0ffee", key, subject=[*P, ("CN", "fffbeec0ffee")])).status == 202


# --- What is added ---


def test_the_date_and_304(server: Server) -> None:
    server.authority.command("allow", "fffbeec0ffee")
    request = csr("fffbeec0ffee")
    first = server.enroll(request)
    date = first.headers["last-modified"]
    path = sha256(request)
    unchanged = server.get(path, If_Modified_Since=date)
    assert (unchanged.status, unchanged.body) == (304, b"")
    # Any doubt gets the certificate: another date, earlier or later, nonsense, a tag.
    moment = parsedate_to_datetime(date)
    for seconds in (-1, 1, 86400):
        other = format_datetime(moment + datetime.timedelta(seconds=seconds), usegmt=True)
        assert server.get(path, If_Modified_Since=other).body == first.body
    not_before = format_datetime(first.certificate.not_valid_before_utc, usegmt=True)
    for header in ("soon", "", not_before):
        assert server.get(path, If_Modified_Since=header).status == 200
    assert server.get(path, If_Modified_Since=date, If_None_Match='"x"').status == 200


def test_waiting_times(server: Server) -> None:
    request = csr("fffbeec0ffee")
    assert server.post(request).headers["retry-after"] == "900"
    assert server.get(sha256(request)).headers["retry-after"] == "900"
    assert "retry-after" not in server.get(NOBODYS).headers


@pytest.mark.parametrize(
    "days, renewed",
    [(0.1, False), (4.5, False), (4.7, True), (6.9, True), (7.1, True), (40, True)],
)
def test_renewal_when_a_third_is_left(
    authority: authority_world.RegistrationAuthority, days: float, renewed: bool
) -> None:
    """The life is 167 hours, of which one has passed at the start: a third is left after 4.6 days."""
    authority.command("allow", "fffbeec0ffee")
    request = csr("fffbeec0ffee")
    with authority.serving() as server:
        first = server.enroll(request)
    with authority.serving(before=at(days)) as server:
        second = server.get(sha256(request), If_Modified_Since=first.headers["last-modified"])
        assert (second.status == 200) == renewed
        if renewed:
            assert second.certificate.serial_number > first.certificate.serial_number
            assert second.certificate.not_valid_after_utc > first.certificate.not_valid_after_utc
            assert second.headers["last-modified"] != first.headers["last-modified"]
            again = server.get(sha256(request), If_Modified_Since=second.headers["last-modified"])
            assert again.status == 304


def test_nobody_is_renewed_who_does_not_ask(authority: authority_world.RegistrationAuthority) -> None:
    authority.command("allow", "fffbeec0ffee", "fffbeec0ffef")
    requests = [csr("fffbeec0ffee"), csr("fffbeec0ffef")]
    with authority.serving() as server:
        for request in requests:
            server.enroll(request)
    with authority.serving(before=at(6)) as server:
        assert server.get(sha256(requests[0])).status == 200
    assert [row[3] for row in authority.log("signed")] == ["fffbeec0ffee", "fffbeec0ffef", "fffbeec0ffee"]


def test_what_a_certificate_says(server: Server) -> None:
    server.authority.command("allow", "fffbeec0ffee", "fffbeec0ffef.devices.example.com")
    for client_id, key in (("fffbeec0ffee", ec_key()), ("fffbeec0ffef.devices.example.com", rsa_key())):
        certificate = server.enroll(csr(client_id, key)).certificate
        get = certificate.extensions.get_extension_for_class
        life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert datetime.timedelta(days=6) < life < datetime.timedelta(days=7)
        assert not get(x509.BasicConstraints).value.ca and get(x509.BasicConstraints).critical
        assert list(get(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.CLIENT_AUTH]
        assert get(x509.SubjectAlternativeName).value.get_values_for_type(x509.DNSName) == [client_id]
        ca = x509.load_pem_x509_certificate(server.authority.ca.read_bytes())
        certificate.verify_directly_issued_by(ca)
        identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        assert get(x509.AuthorityKeyIdentifier).value.key_identifier == identifier


def test_a_database_that_fails_is_no_rejection(server: Server) -> None:
    """Whatever breaks here must not cost a device its identity: it asks again."""
    server.authority.state.write_bytes(b"no database any more" * 1000)
    for suffix in ("-wal", "-shm"):
        server.authority.state.with_name(server.authority.state.name + suffix).unlink(missing_ok=True)
    reply = server.get(NOBODYS)
    is_problem(reply, 503, "Service Unavailable", "the registration authority is not able to answer now")
    assert reply.headers["retry-after"] == "60"


# --- For the front, and for who watches ---


def test_what_is_the_fronts_only(server: Server) -> None:
    """What it passes on for somebody, and what another address asks, is a page that isn't there."""
    for path in ("/accepted", "/health"):
        assert server.get(path).status in (204, 403)
        is_problem(server.get(path, X_Forwarded_For="192.0.2.1"), 404, "Not Found")
    assert server.get("/health").status == 204
    text = server.authority.config.read_text()
    server.authority.config.write_text('front = ["192.0.2.7"]\n' + text)
    with server.authority.serving(options=["--behind-proxy"]) as other:
        assert [other.get(path).status for path in ("/accepted", "/health")] == [404, 404]
        assert other.get("/health", X_Forwarded_For="192.0.2.7").status == 404  # passed on, and not asked
    server.authority.ca.unlink()
    assert server.get("/health").status == 503


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_an_address_that_is_none(tmp_path: Path, postgres: Postgres, kind: str) -> None:
    """A front passes on what its client said, if nobody told it better."""
    with postgres.database() as url:
        authority = RegistrationAuthority(tmp_path, database=url if kind == "postgresql" else None)
        authority.create_ca()
        given = {"unknown": "-", "\x9b2J": "-", "x" * 300: "-", "fe80::1%\x9b2J": "-", "192.0.2.7": "192.0.2.7",
                 "2001:DB8:0::1": "2001:db8::1"}  # fmt: skip
        with authority.serving(options=["--behind-proxy"]) as server:
            for number, address in enumerate(given):
                body = csr(f"device-{number}")
                headers = {"X_Forwarded_For": address}
                path = f"/{sha256(body)}"
                assert ask(server.port, "POST", path, body, **headers).status == 202
                assert ask(server.port, "GET", path, None, **headers).status == 202
        shown = [line.split("  from ")[1].split()[0] for line in authority.command("list", "--pending").splitlines()]
        assert sorted(shown) == sorted(given.values())


def test_metrics(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """docs/monitoring.md names what is there, Prometheus understands it, and each alarm goes off when it should."""
    require("promtool")
    page = (world.ROOT / "docs" / "monitoring.md").read_text().partition("## The registration authority")[2]
    (rules,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    authority.command("server-certificate", "localhost", "--out", str(tmp_path / "front.pem"))
    authority.command("allow", "one")
    request, port = csr("one"), world.free_port()
    with authority.serving(options=["--metrics", f"127.0.0.1:{port}"]) as server:
        server.enroll(request)
        server.post(csr("two"))
        assert server.get("/metrics").status == 404
        text = ask(port, "GET", "/metrics").body.decode()
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
        )
        assert (checked.returncode, checked.stderr) == (0, "")
        # Its database was taken away: the rest is left out, and that is said.
        shutil.move(authority.state, tmp_path / "away")
        authority.ca.unlink()
        assert "caramel_authority_healthy 0.0" in ask(port, "GET", "/metrics").body.decode()
    values = dict(re.findall(r"^(caramel_authority.*) (\S+)$", text, re.M))
    assert values['caramel_authority_requests{state="pending"}'] == "1.0"
    assert values['caramel_authority_answers_total{method="POST",status="202"}'] == "2.0"
    assert values["caramel_authority_healthy"] == "1.0"
    named = {name.partition("{")[0] for name in re.findall(r"^\| `(\w+)", page, re.M)}
    assert named == {name.partition("{")[0] for name in values} - {"caramel_authority_answers_created"}

    (tmp_path / "rules.yml").write_text(rules)
    fires = {
        "AuthorityDown": [("caramel_authority_healthy", "0")],
        "RequestsWait": [('caramel_authority_requests{state="pending"}', "1")],
        "DevicesSilent": [("caramel_authority_devices_silent", "20"),
                          ('caramel_authority_requests{state="authorized"}', "1000")],
        "CertificatesEnd": [("caramel_authority_certificates_ending", "1")],
        "OrdersFail": [('caramel_authority_orders{state="failed"}', "1")],
        "AuthorityCaStep": [('caramel_authority_ca_step_seconds{step="x"}', "7")],
        "AuthorityFrontEnds": [("caramel_authority_front_not_after_seconds", "9000")],
        "AuthorityErrors": [('caramel_authority_answers_total{method="GET",status="503"}', "0+600")],
    }  # fmt: skip
    assert list(fires) == re.findall(r"alert: (\w+)", rules)
    tests = []
    for name, given in fires.items():
        series = [{"series": one, "values": f"{v}x400" if "+" in v else f"{v}+0x400"} for one, v in given]
        query = f'count(ALERTS{{alertname="{name}", alertstate="firing"}})'
        # After 26 hours, which is longer than each of them waits; and not where all is well.
        well = [{"series": one, "values": "0+0x400" if "seconds" not in one else "9999999+0x400"} for one, _ in given]
        if name == "AuthorityDown":
            well = [{"series": "caramel_authority_healthy", "values": "1+0x400"}]
        for which, expected in ((series, [{"labels": "{}", "value": 1}]), (well, [])):
            tests.append({"interval": "4m", "input_series": which, "promql_expr_test": [
                {"expr": query, "eval_time": "26h", "exp_samples": expected}]})  # fmt: skip
    (tmp_path / "tests.yml").write_text(
        json.dumps({"rule_files": ["rules.yml"], "evaluation_interval": "4m", "tests": tests})
    )
    done = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
