"""Certificates of any CA: chains, names, uses, kinds of keys, and one CA for the server, another for the device."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import Any, Optional

import pytest
import world
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from needs import needs
from world import CLIENT_AUTH, SERVER_AUTH, Authority, Device, Run, Scripted, answers, hours, now

ID = "fffbeec0ffee"
HOST = "fffbeec0ffee.devices.example.com"


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="certificates.pem")


@pytest.fixture(scope="module")
def public_ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The CA that signs devices, where that is not the one that signs the server."""
    return Authority(tmp_path_factory.mktemp("public"), [("C", "US"), ("O", "Public"), ("CN", "Public Root")])


class Intermediate:
    """A CA under another one; `issue` as an `Authority` does."""

    def __init__(self, above: Any, name: str, **dates: Any) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = world.name_of([("O", "Example AB"), ("CN", name)])
        self.pem = above.issue(self.key.public_key(), self.subject, ca=True, usage=(), **dates)
        self.certificate = x509.load_pem_x509_certificate(self.pem)

    issue: Any = Authority.issue
    sign: Any = Authority.sign


@pytest.fixture
def device(tmp_path: Path, authority: Authority) -> Device:
    """One whose request is at the server."""
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    device.has(authority.identity(ID, certified=False))
    return device


def answered(device: Device, pem: Path, body: bytes, *options: str, **fields: Any) -> Run:
    with Scripted(pem, [answers.certificate(body)], client_ca=device.ca) as server:
        device.server = server.address
        run = device.run(*options, **fields)
    device.asked = server.requests  # type: ignore[attr-defined]
    return run


def line(device: Device) -> dict[str, str]:
    return dict(word.split("=", 1) for word in device.key_file.read_text().splitlines()[0].split()[2:])


# --- Chains ---


def chained(authority: Authority, request: bytes, length: int) -> tuple[bytes, list[bytes]]:
    """A certificate under `length` intermediate CAs, and these, lowest first."""
    above: Any = authority
    chain: list[bytes] = []
    for number in range(length):
        above = Intermediate(above, f"Intermediate {number}")
        chain.insert(0, above.pem)
    return above.sign(request, not_before=now() - hours(1)), chain


@pytest.fixture
def deep(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A root that allows CAs under it; the world's own has a path length of 0, as Caramel's."""
    authority = Authority(tmp_path_factory.mktemp("deep"))
    builder = (
        x509.CertificateBuilder(
            authority.certificate.subject,
            authority.certificate.subject,
            authority.key.public_key(),
            x509.random_serial_number(),
        )
        .not_valid_before(now() - hours(24))
        .not_valid_after(now() + hours(24 * 365))
        .add_extension(x509.BasicConstraints(True, None), True)
    )
    authority.certificate = builder.sign(authority.key, hashes.SHA256())
    authority.certificate_file.write_bytes(authority.pem)
    return authority


@pytest.fixture
def rooted(tmp_path: Path, deep: Authority) -> tuple[Device, Path]:
    device = Device(tmp_path / "rooted", None, deep.certificate_file, ID)
    device.has(deep.identity(ID, certified=False))
    return device, deep.server(file="deep.pem")


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_chain_is_stored_after_the_leaf(rooted: tuple[Device, Path], deep: Authority, length: int) -> None:
    device, pem = rooted
    leaf, chain = chained(deep, device.request, length)
    run = answered(device, pem, leaf + b"".join(chain))
    assert run.status == 0, run.err
    labels = ["PRIVATE KEY", *["CERTIFICATE"] * (1 + length), "NEW CERTIFICATE REQUEST"]
    assert (device.labels, [block for label, block in device.blocks() if label == "CERTIFICATE"]) == (
        labels,
        [leaf, *chain],
    )
    before = device.snapshot()
    again = answered(device, pem, leaf + b"".join(chain))
    assert (again.status, "unchanged" in again.err, device.snapshot()) == (0, True, before)


def test_a_root_in_the_answer_is_not_stored(rooted: tuple[Device, Path], deep: Authority) -> None:
    device, pem = rooted
    leaf, chain = chained(deep, device.request, 1)
    for _ in range(2):
        assert answered(device, pem, leaf + chain[0] + deep.pem).status == 0
        assert [block for label, block in device.blocks() if label == "CERTIFICATE"] == [leaf, *chain]


@pytest.mark.parametrize("kind", ["six", "leaf last", "missing link", "text between", "ended"])
def test_what_is_no_chain_is_refused(rooted: tuple[Device, Path], deep: Authority, kind: str) -> None:
    device, pem = rooted
    leaf, chain = chained(deep, device.request, 5 if kind == "six" else 2)
    text = leaf + b"".join(chain)
    if kind == "leaf last":
        text = b"".join(chain) + leaf
    if kind == "missing link":
        text = leaf + chain[1]
    if kind == "text between":
        text = leaf + b"issued by\n" + b"".join(chain)
    if kind == "ended":
        old = Intermediate(deep, "Old", not_before=now() - hours(50), not_after=now() - hours(2))
        text = old.sign(device.request, not_before=now() - hours(3)) + old.pem
    before = device.snapshot()
    run = answered(device, pem, text)
    assert (run.status, device.snapshot()) == (127, before), run.err


def test_a_new_chain_for_the_same_leaf_is_news(rooted: tuple[Device, Path], deep: Authority) -> None:
    device, pem = rooted
    above = Intermediate(deep, "Cross-signed")
    leaf = above.sign(device.request, not_before=now() - hours(1))
    assert answered(device, pem, leaf + above.pem).status == 0
    other = deep.issue(above.key.public_key(), above.subject, ca=True, usage=())
    run = answered(device, pem, leaf + other)
    assert (run.status, "new certificate" in run.err) == (0, True)


def edited(pem_text: bytes, old: bytes, new: bytes, key: Any) -> bytes:
    """A certificate with other bytes of the same length in what is signed, signed anew by `key` (RSA, SHA-256)."""
    loaded = x509.load_pem_x509_certificate(pem_text)
    signed = loaded.tbs_certificate_bytes
    assert signed.count(old) >= 1 and len(old) == len(new)
    signed = signed.replace(old, new)
    der = loaded.public_bytes(serialization.Encoding.DER)
    signature = key.sign(signed, padding.PKCS1v15(), loaded.signature_hash_algorithm)
    der = der.replace(loaded.tbs_certificate_bytes, signed).replace(loaded.signature, signature)
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def test_an_intermediate_that_ends_first_is_the_end(rooted: tuple[Device, Path], deep: Authority) -> None:
    """`until` has it. So has a file of 2.0.0, whose seal is good and whose `until` is the certificate's own end."""
    device, pem = rooted
    end = now() + hours(2)
    above = Intermediate(deep, "Short", not_after=end)
    leaf = above.sign(device.request, not_before=now() - hours(1), not_after=now() + hours(48))
    assert answered(device, pem, leaf + above.pem).status == 0
    assert line(device)["until"] == f"{end:%Y-%m-%dT%H:%M:%SZ}"
    ended = Intermediate(deep, "Ended", not_before=now() - hours(50), not_after=now() - hours(2))
    request = device.request
    leaf = ended.sign(request, not_before=now() - hours(3))
    content = (
        (device.block("PRIVATE KEY") or b"") + leaf + ended.pem + (device.block("NEW CERTIFICATE REQUEST") or b"")
    )
    device.has(world.sealed(content, deep.pem, ID))
    run = answered(device, pem, leaf + ended.pem)
    assert (run.status, "unchanged" in run.err) == (127, False), run.err
    assert not device.asked[0].client_certificate and not device.asked[0].if_modified_since  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["behind", "between"])
def test_what_cannot_be_read_and_nobody_needs_is_left_out(
    rooted: tuple[Device, Path], deep: Authority, place: str
) -> None:
    device, pem = rooted
    leaf, chain = chained(deep, device.request, 1)
    odd = edited(
        deep.issue(world.new_key().public_key(), [("CN", "Oddity")]), b"Oddity", b"Odd\xff\xfe\xfd", deep.key
    )
    rubbish = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    parts = [leaf, *chain, odd, rubbish] if place == "behind" else [leaf, odd, rubbish, *chain]
    run = answered(device, pem, b"".join(parts))
    assert run.status == 0, run.err
    assert [block for label, block in device.blocks() if label == "CERTIFICATE"] == [leaf, *chain]


def test_new_with_old_is_no_root(tmp_path: Path) -> None:
    """A CA has a new key; by a self-issued certificate the old one vouches for it (RFC 4210, 4.4). The device knows
    the old root alone, and the server's certificate is still by that."""
    old = Authority(tmp_path / "old")
    device = Device(tmp_path / "device", None, old.certificate_file, ID)
    device.has(old.identity(ID, certified=False))
    new = Authority(tmp_path / "new")
    assert new.certificate.subject == old.certificate.subject
    builder = (
        x509.CertificateBuilder(
            old.certificate.subject, old.certificate.subject, new.key.public_key(), x509.random_serial_number()
        )
        .not_valid_before(now() - hours(1))
        .not_valid_after(now() + hours(100))
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(new.key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(old.key.public_key()), False)
    )
    new_with_old = builder.sign(old.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    leaf = new.sign(device.request, not_before=now() - hours(1))
    run = answered(device, old.server(), leaf + new_with_old + new.pem)
    assert run.status == 0, run.err
    assert [block for label, block in device.blocks() if label == "CERTIFICATE"] == [leaf, new_with_old]


@pytest.mark.parametrize("order", ["first", "second"])
def test_of_two_roots_with_one_name_each_is_tried(
    tmp_path: Path, authority: Authority, pem: Path, order: str
) -> None:
    """Neither they nor what they sign have key identifiers: only the signature tells."""
    roots = []
    for number in range(2):
        key, name = world.new_key(), world.name_of([("C", "US"), ("O", "Twins"), ("CN", "Twin")])
        root = (
            x509.CertificateBuilder(name, name, key.public_key(), number + 1)
            .not_valid_before(now() - hours(24))
            .not_valid_after(now() + hours(24 * 365))
            .add_extension(x509.BasicConstraints(True, None), True)
            .sign(key, hashes.SHA256())
        )
        roots.append((key, root))
    ca = tmp_path / "twins.pem"
    ca.write_bytes(b"".join(root.public_bytes(serialization.Encoding.PEM) for _, root in roots))
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    options = ("--identity-ca", str(ca))
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        assert device.run(*options).status == 69
    key, root = roots[order == "second"]
    request = x509.load_pem_x509_csr(device.request)
    leaf = (
        x509.CertificateBuilder(root.subject, request.subject, request.public_key(), 7)
        .not_valid_before(now() - hours(1))
        .not_valid_after(now() + hours(48))
        .sign(key, hashes.SHA256())
    )
    run = answered(device, pem, leaf.public_bytes(serialization.Encoding.PEM), *options)
    assert run.status == 0, run.err


@pytest.mark.parametrize("what", ["a name in Latin-1", "half an authority key identifier"])
def test_what_openssl_takes_for_a_ca_is_one(tmp_path: Path, what: str) -> None:
    ca = Authority(tmp_path / "ca", [("C", "SE"), ("O", "Bruecke AB"), ("CN", "Bruecke CA")])
    if what == "a name in Latin-1":
        # T61String with one octet for each letter, as OpenSSL read and wrote it for decades.
        text = edited(ca.pem, b"\x0c\x0aBruecke AB", b"\x14\x0aBr\xfc\xdfcke AB", ca.key)
    else:
        # A serial number, and no name to it: RFC 5280, 4.2.1.1 wants both or neither.
        half = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.35"), bytes.fromhex("3003820101"))
        root = (
            x509.CertificateBuilder(ca.certificate.subject, ca.certificate.subject, ca.key.public_key(), 1)
            .not_valid_before(now() - hours(24))
            .not_valid_after(now() + hours(1000))
            .add_extension(x509.BasicConstraints(True, 0), True)
            .add_extension(half, False)
        )
        text = root.sign(ca.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(ValueError):
        loaded = x509.load_pem_x509_certificate(text)
        str(loaded.issuer), list(loaded.extensions)
    ca.certificate_file.write_bytes(text)
    device = Device(tmp_path / "device", None, ca.certificate_file, ID)
    pem = ca.folder / "server.pem"
    issuer = tmp_path / "issuer.pem"
    issuer.write_bytes(text)
    key = tmp_path / "server.key"
    make = (
        f"openssl req -new -newkey rsa:2048 -nodes -keyout {key} -subj /CN=localhost 2>/dev/null | "
        f"openssl x509 -req -CA {issuer} -CAkey {ca.private_key_file} -CAcreateserial "
        f"-CAserial {tmp_path}/serial -days 2 -extfile {tmp_path}/names 2>/dev/null; cat {key}"
    )
    (tmp_path / "names").write_text("subjectAltName=DNS:localhost\n")
    pem.write_bytes(subprocess.run(["sh", "-c", make], stdout=subprocess.PIPE, check=True).stdout)
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        run = device.run()
    assert run.status == 69, run.err
    subject = [str(one.value) for one in x509.load_pem_x509_csr(device.request).subject]
    assert subject == ["SE", "Brüßcke AB" if what == "a name in Latin-1" else "Bruecke AB", ID]
    (tmp_path / "request.pem").write_bytes(device.request)
    sign = f"openssl x509 -req -in {tmp_path}/request.pem -CA {issuer} -CAkey {ca.private_key_file}"
    sign += f" -CAcreateserial -CAserial {tmp_path}/serial -days 2"
    leaf = subprocess.run(sign.split(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    run = answered(device, pem, leaf)
    assert run.status == 0, run.err
    shown = device.run("--status")
    assert (shown.status, "valid until" in shown.out) == (0, True), shown


# --- Names ---


def without_cn(authority: Authority, request: bytes, *names: str, cn: Optional[str] = None) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)] if cn else [])
    return authority.sign(request, subject=subject, names=names, not_before=now() - hours(1), usage=[SERVER_AUTH])


@pytest.fixture
def host(tmp_path: Path, authority: Authority) -> Device:
    device = Device(tmp_path / "host", None, authority.certificate_file, HOST)
    device.has(authority.identity(HOST, certified=False))
    return device


@pytest.mark.parametrize(
    ("names", "cn", "good"),
    [
        ([HOST], None, True),
        (["other.example.com", HOST], None, True),
        ([HOST.upper()], None, True),
        ([], HOST.upper(), True),
        (["other.example.com"], None, False),
        ([], None, False),
        ([HOST], "other.example.com", False),
    ],
)
def test_whose_it_is(
    host: Device, pem: Path, authority: Authority, names: list[str], cn: Optional[str], good: bool
) -> None:
    run = answered(host, pem, without_cn(authority, host.request, *names, cn=cn))
    assert run.status == (0 if good else 127), run.err
    assert (host.certificate is not None) == good
    if not good:
        assert "another device's" in run.err


def test_the_case_of_what_is_no_host_name_counts(device: Device, pem: Path, authority: Authority) -> None:
    run = answered(device, pem, without_cn(authority, device.request, cn=ID.upper()))
    assert (run.status, "another device's" in run.err) == (127, True)


def test_a_new_request_of_a_host_name_has_it_as_alternative_name(
    tmp_path: Path, pem: Path, authority: Authority
) -> None:
    for client_id, expected in ((HOST, [HOST]), (ID, None)):
        device = Device(tmp_path / client_id, None, authority.certificate_file, client_id)
        with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
            device.server = server.address
            assert device.run().status == 69
        request = x509.load_pem_x509_csr(server.requests[1].body)
        try:
            alternative = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert alternative.get_values_for_type(x509.DNSName) == expected
        except x509.ExtensionNotFound:
            assert expected is None


# --- Uses ---


@pytest.mark.parametrize(
    ("usage", "status", "use"),
    [
        ([CLIENT_AUTH], 0, None),
        ([CLIENT_AUTH, SERVER_AUTH], 0, None),
        ([], 0, None),
        ([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE], 127, None),  # OpenSSL's servers refuse it
        ([SERVER_AUTH], 0, "serverAuth"),
        ([ExtendedKeyUsageOID.CODE_SIGNING], 127, None),
    ],
)
def test_what_it_is_for(
    device: Device, pem: Path, authority: Authority, usage: list[Any], status: int, use: Optional[str]
) -> None:
    leaf = authority.sign(device.request, usage=usage, not_before=now() - hours(1))
    run = answered(device, pem, leaf)
    assert run.status == status, run.err
    if status == 0:
        assert line(device).get("use") == use
        again = answered(device, pem, leaf)
        shown = device.asked[0].client_certificate  # type: ignore[attr-defined]
        assert (again.status, shown is None) == (0, use is not None)
        assert device.asked[0].if_modified_since, "the conditional GET goes out all the same"  # type: ignore[attr-defined]


# --- Two CAs ---


def test_the_ca_of_the_device_is_not_believed_for_the_server(
    tmp_path: Path, authority: Authority, public_ca: Authority
) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    option = ("--identity-ca", str(public_ca.certificate_file))
    with Scripted(public_ca.server(file="false.pem"), [answers.UNKNOWN]) as server:
        device.server = server.address
        run = device.run(*option)
    assert (run.status, server.requests) == (127, []), run.err


def test_a_certificate_by_the_ca_of_the_device(
    tmp_path: Path, pem: Path, authority: Authority, public_ca: Authority
) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    option = ("--identity-ca", str(public_ca.certificate_file))
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        assert device.run(*option).status == 69
    subject = x509.load_pem_x509_csr(device.request).subject
    assert [a.value for a in subject] == ["US", "Public", ID], "it begins with that CA's subject"
    by_other = authority.sign(device.request, not_before=now() - hours(1))
    assert answered(device, pem, by_other, *option).status == 127
    good = public_ca.sign(device.request, not_before=now() - hours(1))
    assert answered(device, pem, good, *option).status == 0
    before = device.snapshot()
    assert answered(device, pem, good, *option).status == 0
    assert device.snapshot() == before


# --- Keys ---


@pytest.mark.parametrize(
    ("key_type", "kind", "size"), [("rsa-2048", "RSA", 2048), ("rsa-4096", "RSA", 4096), ("ec-p256", "EC", 256)]
)
def test_a_new_key_is_of_the_type_that_was_asked_for(
    tmp_path: Path, pem: Path, authority: Authority, key_type: str, kind: str, size: int
) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    option = ("--key-type", key_type)
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        assert device.run(*option).status == 69
    key: Any = serialization.load_pem_private_key(device.block("PRIVATE KEY") or b"", None)
    assert (isinstance(key, ec.EllipticCurvePrivateKey), key.key_size) == (kind == "EC", size)
    leaf = authority.sign(device.request, not_before=now() - hours(1))
    assert answered(device, pem, leaf, *option).status == 0
    before = device.snapshot()
    again = answered(device, pem, leaf, *option)
    assert (again.status, device.snapshot()) == (0, before)
    assert device.asked[0].client_certificate is not None  # type: ignore[attr-defined]


def test_a_request_that_caramel_would_find_too_long_is_not_made(tmp_path: Path) -> None:
    """413 for ever would be the answer: what to choose is said, and nothing is stored."""
    words = [("C", "SE"), ("ST", "s" * 120), ("L", "l" * 120), ("O", "o" * 64), ("OU", "u" * 64), ("CN", "CA")]
    long = Authority(tmp_path / "long", words)
    device = Device(tmp_path / "device", None, long.certificate_file, "a" * 60 + ".com")
    with Scripted(long.server(), [answers.UNKNOWN]) as server:
        device.server = server.address
        run = device.run("--key-type", "rsa-4096")
    assert (run.status, "2048" in run.err, "rsa-2048" in run.err) == (127, True, True), run.err
    assert server.requests == [] and device.labels == []


def test_an_ec_key_is_not_kept_where_the_key_type_says_rsa(tmp_path: Path, pem: Path, authority: Authority) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        assert device.run("--key-type", "ec-p256").status == 69
    before = device.request
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        run = device.run()
    assert (run.status, "not an RSA key" in run.err, device.request == before) == (69, True, False)
    with Scripted(pem, [answers.PENDING]) as server:
        device.server = server.address
        kept = device.request
        run = device.run("--key-type", "ec-p256")
    assert (run.status, device.request) == (69, kept), "an RSA key is kept where it says EC"


# --- The line ---


def test_the_first_line_of_a_whole_life(tmp_path: Path, pem: Path, authority: Authority) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        assert device.run().status == 69
    assert list(line(device)) == ["id", "seal"] and line(device)["id"] == ID
    begin, end = now() - hours(1), now() + hours(47)
    leaf = authority.sign(device.request, not_before=begin, not_after=end)
    assert answered(device, pem, leaf).status == 0
    told = line(device)
    assert list(told) == ["id", "from", "until", "seal"]
    assert (told["from"], told["until"]) == tuple(t.strftime("%Y-%m-%dT%H:%M:%SZ") for t in (begin, end))
    assert len(told["seal"]) == 64


def test_a_file_without_its_line_is_looked_at_and_gets_it_once(
    device: Device, pem: Path, authority: Authority
) -> None:
    """1.0.0's, or `cat client.key client.crt client.csr` of another client."""
    leaf = authority.sign(device.request, not_before=now() - hours(1))
    key, request = device.block("PRIVATE KEY") or b"", device.request
    device.has(key + leaf + request)  # the usual label, as other clients have it
    assert answered(device, pem, leaf).status == 0
    assert device.blocks() == [
        ("PRIVATE KEY", key),
        ("CERTIFICATE", leaf),
        ("NEW CERTIFICATE REQUEST", request.replace(b" CERTIFICATE REQUEST", b" NEW CERTIFICATE REQUEST")),
    ]
    assert list(line(device)) == ["id", "from", "until", "seal"]
    before = device.snapshot()
    assert answered(device, pem, leaf).status == 0
    assert device.snapshot() == before


@needs("mounts")
def test_where_the_line_can_not_be_written_all_goes_on(device: Device, pem: Path, authority: Authority) -> None:
    leaf = authority.sign(device.request, not_before=now() - hours(1))
    device.has((device.block("PRIVATE KEY") or b"") + leaf + device.request)
    before = device.snapshot()
    script = (
        f'mount --bind "{device.folder}" "{device.folder}" && mount -o remount,bind,ro "{device.folder}" && exec "$@"'
    )
    for _ in range(2):
        run = answered(device, pem, leaf, before=("unshare", "-m", "sh", "-c", script, "sh"))
        assert (run.status, device.snapshot()) == (0, before), run.err
