# SPDX-License-Identifier: MIT OR Apache-2.0
"""Signer `ca`: how the CA is made, renewed, replaced and put under another one, and what OpenSSL says of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import world
from authority_world import SUBJECT, RegistrationAuthority, at, csr, rsa_key, sha256
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from needs import needs, slow

pytest_plugins = ["authority_fixtures"]
pytestmark = needs("authority", "faketime", "openssl")


def openssl(*arguments: object) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=30)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["ec-p256", "rsa-2048", "rsa-4096"])
def test_a_new_ca(tmp_path: Path, kind: str) -> None:
    authority = RegistrationAuthority(tmp_path)
    authority.create_ca("--key-type", kind)
    key_file = authority.ca.with_suffix(".key")
    assert key_file.stat().st_mode & 0o777 == 0o600
    certificate = x509.load_pem_x509_certificate(authority.ca.read_bytes())
    key = certificate.public_key()
    assert isinstance(key, rsa.RSAPublicKey if kind.startswith("rsa") else ec.EllipticCurvePublicKey)
    # In the order in which it was said.
    assert [one.rfc4514_attribute_name for one in certificate.subject] == ["C", "ST", "L", "O", "OU", "CN"]
    get = certificate.extensions.get_extension_for_class
    constraints, usage = get(x509.BasicConstraints), get(x509.KeyUsage)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert usage.critical and usage.value.key_cert_sign and usage.value.crl_sign
    assert not usage.value.digital_signature
    assert get(x509.SubjectKeyIdentifier)
    # Both of a device's key types are signed by either kind of CA, and OpenSSL agrees.
    authority.command("allow", "ec", "rsa")
    with authority.serving() as server:
        for client_id, request in (("ec", csr("ec")), ("rsa", csr("rsa", rsa_key()))):
            (tmp_path / "leaf.crt").write_bytes(server.enroll(request).body)
            said = openssl(
                "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", authority.ca, tmp_path / "leaf.crt"
            )
            assert said.endswith("leaf.crt: OK\n"), (client_id, said)


def test_a_ca_is_not_overwritten(authority: RegistrationAuthority) -> None:
    before = authority.ca.read_bytes(), authority.ca.with_suffix(".key").read_bytes()
    assert "--replace puts another CA in its place" in authority.command("ca-create", "--subject", SUBJECT, status=1)
    assert before == (authority.ca.read_bytes(), authority.ca.with_suffix(".key").read_bytes())


def test_no_ca_yet(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path)
    with authority.serving() as server:
        assert server.get("/root.crt").status == 503
        assert server.post(csr("device")).status == 503
        authority.create_ca()
        assert server.post(csr("device")).status == 202


def test_a_key_that_others_may_read_is_not_used(authority: RegistrationAuthority) -> None:
    authority.command("allow", "device")
    authority.ca.with_suffix(".key").chmod(0o640)
    request = csr("device")
    with authority.serving() as server:
        assert server.enroll(request).status == 503
        authority.ca.with_suffix(".key").chmod(0o600)
        assert server.get(sha256(request)).status == 200


def serial_of(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


@slow
def test_serial_numbers_are_never_used_again(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """Not by a new CA, not for the CA itself, not after the clock went back, not with a database from yesterday."""
    numbers = [serial_of(authority.ca)]
    authority.command("allow", "one", "two", "three", "four")
    old = {path.name: path.read_bytes() for path in authority.folder.glob("state.db*")}
    with authority.serving() as server:
        numbers.append(server.enroll(csr("one")).certificate.serial_number)
    authority.command("ca-create", "--subject", SUBJECT, "--replace")
    numbers.append(serial_of(authority.ca))
    with authority.serving() as server:
        numbers.append(server.enroll(csr("two")).certificate.serial_number)
    authority.command("ca-renew")
    numbers.append(serial_of(authority.ca))
    with authority.serving(before=at(-300)) as server:
        numbers.append(server.enroll(csr("three")).certificate.serial_number)
    assert numbers == sorted(set(numbers))
    for path in authority.folder.glob("state.db*"):  # its journal, too, in which the later transactions are
        path.unlink()
    for name, content in old.items():
        (authority.folder / name).write_bytes(content)
    with authority.serving() as server:
        numbers.append(server.enroll(csr("four")).certificate.serial_number)
    assert numbers == sorted(set(numbers))


def test_replaced(authority: RegistrationAuthority) -> None:
    """The CA before is kept, and a server that runs signs with the new one at once."""
    before = authority.ca.read_bytes(), authority.ca.with_suffix(".key").read_bytes()
    authority.command("allow", "one", "two")
    with authority.serving() as server:
        server.enroll(csr("one"))
        authority.command("ca-create", "--subject", SUBJECT, "--replace", "--key-type", "rsa-2048")
        second = server.enroll(csr("two")).certificate
        assert server.get("/root.crt").body == authority.ca.read_bytes()
    second.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.ca.read_bytes()))
    kept = authority.ca.with_name(f"ca.{x509.load_pem_x509_certificate(before[0]).serial_number:x}.crt")
    assert (kept.read_bytes(), kept.with_suffix(".key").read_bytes()) == before
    assert kept.with_suffix(".key").stat().st_mode & 0o777 == 0o600


def test_renewed(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """Whoever trusts the old certificate trusts what the renewed CA signs, and the other way round."""
    authority.command("allow", "one", "two")
    (tmp_path / "old.crt").write_bytes(authority.ca.read_bytes())
    with authority.serving() as server:
        (tmp_path / "one.crt").write_bytes(server.enroll(csr("one")).body)
        authority.command("ca-renew", "--days", "9000")
        (tmp_path / "two.crt").write_bytes(server.enroll(csr("two")).body)
    for ca in (tmp_path / "old.crt", authority.ca):
        for leaf in ("one.crt", "two.crt"):
            assert openssl("verify", "-CAfile", ca, tmp_path / leaf).endswith(": OK\n")


def test_a_ca_at_its_end(tmp_path: Path) -> None:
    """Nothing outlives it; when it has ended devices are told to come again, and then it is renewed."""
    authority = RegistrationAuthority(tmp_path)
    authority.create_ca("--days", "3")
    authority.command("allow", "device")
    request = csr("device")
    with authority.serving() as server:
        certificate = server.enroll(request).certificate
    ca = x509.load_pem_x509_certificate(authority.ca.read_bytes())
    assert certificate.not_valid_after_utc == ca.not_valid_after_utc
    with authority.serving(before=at(4)) as server:
        reply = server.get(sha256(request))
        assert (reply.status, reply.headers["retry-after"]) == (503, "3600")
        authority.command("ca-renew", "--days", "30", before=at(4))
        assert server.get(sha256(request)).status == 200


@slow
def test_an_intermediate_of_somebody_elses_ca(tmp_path: Path) -> None:
    """The chain goes to the device, without the root; the root and the bundle are to be had."""
    above = world.Authority(tmp_path / "above", [("C", "SE"), ("O", "Above"), ("CN", "Above Root")])
    authority = RegistrationAuthority(
        tmp_path / "authority", '[ca]\nfolder = "' + str(tmp_path / "authority/ca") + '"\n'
    )
    request = tmp_path / "intermediate.csr"
    request.write_text(authority.command("ca-request", "--subject", "C=SE,O=Below,CN=Below Intermediate"))
    # The root of the tests' world allows nothing below it (path length 0); this one is OpenSSL's.
    key = tmp_path / "root.key"
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key]
    openssl("req", "-x509", *new, "-days", 30, "-subj", "/C=SE/O=Above/CN=Above Root", "-out", tmp_path / "root.crt")
    by = ["-CA", tmp_path / "root.crt", "-CAkey", key, "-days", 20, "-copy_extensions", "copyall"]
    openssl("x509", "-req", "-in", request, *by, "-out", tmp_path / "intermediate.crt")
    root, intermediate = ((tmp_path / f"{name}.crt").read_bytes() for name in ("root", "intermediate"))
    chain = tmp_path / "chain.crt"
    for wrong in (root, intermediate, root + intermediate, above.pem, intermediate + above.pem, b"x"):
        chain.write_bytes(wrong)
        authority.command("ca-install", str(chain), status=1)
        assert not authority.ca.exists()
    chain.write_bytes(intermediate + root)
    authority.command("ca-install", str(chain))
    authority.command("allow", "one", "two")
    with authority.serving() as server:
        assert server.get("/root.crt").body == root
        assert server.get("/bundle.crt").body == intermediate + root
        # A device knows the root, or the intermediate, and makes its subject by that.
        for client_id, organization in (("one", "Above"), ("two", "Below")):
            reply = server.enroll(csr(client_id, subject=[("C", "SE"), ("O", organization), ("CN", client_id)]))
            assert [one.public_bytes(serialization.Encoding.PEM) for one in reply.chain[1:]] == [intermediate]
            (tmp_path / "leaf.crt").write_bytes(reply.body)
            untrusted = ["-untrusted", tmp_path / "leaf.crt", tmp_path / "leaf.crt"]
            assert openssl("verify", "-CAfile", tmp_path / "root.crt", *untrusted).endswith(": OK\n")
    assert "intermediate" in authority.command("ca-renew", status=1)


def test_the_fronts_certificate(authority: RegistrationAuthority, tmp_path: Path) -> None:
    out = tmp_path / "front.pem"
    make = ["server-certificate", "ca.example.com", "localhost", "--out", str(out)]
    assert authority.command(*make) == f"{out}: made\n"
    assert out.stat().st_mode & 0o777 == 0o600
    first = out.read_bytes()
    for purpose, name in (("sslserver", "localhost"), ("sslserver", "ca.example.com")):
        check = ["-purpose", purpose, "-verify_hostname", name, "-CAfile", authority.ca, out]
        assert openssl("verify", *check).endswith(": OK\n")
    assert authority.command(*make) == f"{out}: still good\n"
    assert out.read_bytes() == first
    assert authority.command(*make, before=at(4.5)) == f"{out}: made\n"
    assert authority.command("server-certificate", "other.example.com", "--out", str(out)) == f"{out}: made\n"
    assert "no host name" in authority.command("server-certificate", "a b", "--out", str(out), status=1)


def test_usages(tmp_path: Path) -> None:
    folder = f'folder = "{tmp_path}/ca"\nusages = ["client", "server"]\nlife_hours = 48\n'
    authority = RegistrationAuthority(tmp_path, f"[ca]\n{folder}")
    authority.create_ca()
    authority.command("allow", "device.example.com")
    with authority.serving() as server:
        certificate = server.enroll(csr("device.example.com")).certificate
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [one._name for one in usage] == ["clientAuth", "serverAuth"]
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds() == 48 * 3600


def test_no_output_has_key_material(authority: RegistrationAuthority) -> None:
    printed = authority.command("log") + authority.command("list") + authority.command("ca-renew")
    assert not re.search("PRIVATE KEY", printed)
