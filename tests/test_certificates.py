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
from talking import ID, Talking
from world import CLIENT_AUTH, SERVER_AUTH, Authority, answers, hours, now

HOST = "fffbeec0ffee.devices.example.com"
PEM = serialization.Encoding.PEM


def stored(device: Talking) -> list[bytes]:
    """The certificates in its file."""
    return [block for label, block in device.blocks() if label == "CERTIFICATE"]


def takes(device: Talking, text: bytes, *options: str, status: int = 0) -> str:
    """One run in which the server hands out this text; what was said."""
    run = device.hears(answers.certificate(text), options=options)
    assert run.status == status, run.err
    return run.err


def line(device: Talking) -> dict[str, str]:
    return dict(word.split("=", 1) for word in device.key_file.read_text().splitlines()[0].split()[2:])


def plain(subject: x509.Name, issuer: x509.Name, public_key: Any, key: Any, *extensions: x509.ExtensionType) -> bytes:
    """A certificate with these extensions and no others: none identifies a key."""
    builder = x509.CertificateBuilder(issuer, subject, public_key, x509.random_serial_number())
    builder = builder.not_valid_before(now() - hours(24)).not_valid_after(now() + hours(1000))
    for extension in extensions:
        builder = builder.add_extension(extension, isinstance(extension, x509.BasicConstraints))
    return builder.sign(key, hashes.SHA256()).public_bytes(PEM)


# --- Chains ---


@pytest.fixture
def deep(tmp_path: Path) -> Authority:
    """A root that allows CAs under it; the world's own has a path length of 0, as Caramel's."""
    return Authority(tmp_path / "deep", path_length=None)


@pytest.fixture
def rooted(tmp_path: Path, deep: Authority) -> Talking:
    device = Talking(tmp_path / "rooted", deep)
    device.pending()
    return device


def chained(device: Talking, length: int) -> tuple[bytes, list[bytes]]:
    """A certificate under `length` intermediate CAs, and these, lowest first."""
    above = device.authority
    chain: list[bytes] = []
    for number in range(length):
        above, text = above.intermediate(f"Intermediate {number}")
        chain.insert(0, text)
    return above.sign(device.request, not_before=now() - hours(1)), chain


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_chain_is_stored_after_the_leaf_and_without_its_root(rooted: Talking, length: int) -> None:
    leaf, chain = chained(rooted, length)
    takes(rooted, leaf + b"".join(chain))
    assert rooted.labels == ["PRIVATE KEY", *["CERTIFICATE"] * (1 + length), "NEW CERTIFICATE REQUEST"]
    assert stored(rooted) == [leaf, *chain]
    for root in (b"", *([rooted.authority.pem] if length < 4 else [])):
        run = rooted.keeps(answers.certificate(b"".join([leaf, *chain, root])), status=0)
        assert "unchanged" in run.err


@pytest.mark.parametrize("kind", ["six", "leaf last", "missing link", "text between", "ended"])
def test_what_is_no_chain_is_refused(rooted: Talking, kind: str) -> None:
    leaf, chain = chained(rooted, 5 if kind == "six" else 2)
    begun, ended = now() - hours(50), now() - hours(2)
    old, old_text = rooted.authority.intermediate("Old", not_before=begun, not_after=ended)
    text = {
        "six": [leaf, *chain],
        "leaf last": [*chain, leaf],
        "missing link": [leaf, chain[1]],
        "text between": [leaf, b"issued by\n", *chain],
        "ended": [old.sign(rooted.request, not_before=now() - hours(3)), old_text],
    }[kind]
    rooted.keeps(answers.certificate(b"".join(text)))


def test_a_new_chain_for_the_same_leaf_is_news(rooted: Talking, deep: Authority) -> None:
    above, text = deep.intermediate("Cross-signed")
    leaf = above.sign(rooted.request, not_before=now() - hours(1))
    takes(rooted, leaf + text)
    other = deep.issue(above.key.public_key(), above.certificate.subject, ca=True, usage=())
    assert "new certificate" in takes(rooted, leaf + other)


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


def test_an_intermediate_that_ends_first_is_the_end(rooted: Talking, deep: Authority) -> None:
    """`until` has it. So has a file of 2.0.0, whose seal is good and whose `until` is the certificate's own end."""
    end = now() + hours(2)
    above, text = deep.intermediate("Short", not_after=end)
    takes(rooted, above.sign(rooted.request, not_before=now() - hours(1), not_after=now() + hours(48)) + text)
    assert line(rooted)["until"] == f"{end:%Y-%m-%dT%H:%M:%SZ}"
    above, text = deep.intermediate("Ended", not_before=now() - hours(50), not_after=now() - hours(2))
    leaf = above.sign(rooted.request, not_before=now() - hours(3))
    key, request = rooted.blocks()[0][1], rooted.blocks()[-1][1]
    rooted.has(world.sealed(key + leaf + text + request, deep.pem, ID))
    assert "unchanged" not in takes(rooted, leaf + text, status=127)
    assert not rooted.asked[0].client_certificate and not rooted.asked[0].if_modified_since


@pytest.mark.parametrize("place", ["behind", "between"])
def test_what_cannot_be_read_and_nobody_needs_is_left_out(rooted: Talking, deep: Authority, place: str) -> None:
    leaf, chain = chained(rooted, 1)
    odd = deep.issue(world.new_key().public_key(), [("CN", "Oddity")])
    odd = edited(odd, b"Oddity", b"Odd\xff\xfe\xfd", deep.key)
    rubbish = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    takes(rooted, b"".join([leaf, *chain, odd, rubbish] if place == "behind" else [leaf, odd, rubbish, *chain]))
    assert stored(rooted) == [leaf, *chain]


def test_new_with_old_is_no_root(rooted: Talking, deep: Authority, tmp_path: Path) -> None:
    """A CA has a new key; by a self-issued certificate the old one vouches for it (RFC 4210, 4.4). The device knows
    the old root alone, and the server's certificate is still by that."""
    new = Authority(tmp_path / "new")
    assert new.certificate.subject == deep.certificate.subject
    new_with_old = deep.issue(new.key.public_key(), deep.certificate.subject, ca=True, usage=())
    leaf = new.sign(rooted.request, not_before=now() - hours(1))
    takes(rooted, leaf + new_with_old + new.pem)
    assert stored(rooted) == [leaf, new_with_old]


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_of_two_roots_with_one_name_each_is_tried(new: Talking, tmp_path: Path, which: int) -> None:
    """Neither they nor what they sign have key identifiers: only the signature tells."""
    keys, name = [world.new_key(), world.new_key()], world.name_of([("C", "US"), ("O", "Twins"), ("CN", "Twin")])
    ca = x509.BasicConstraints(True, None)
    file = tmp_path / "twins.pem"
    file.write_bytes(b"".join(plain(name, name, key.public_key(), key, ca) for key in keys))
    new.enrolls("--identity-ca", str(file))
    request = x509.load_pem_x509_csr(new.request)
    takes(new, plain(request.subject, name, request.public_key(), keys[which]), "--identity-ca", str(file))


@pytest.mark.parametrize("what", ["a name in Latin-1", "half an authority key identifier"])
def test_what_openssl_takes_for_a_ca_is_one(tmp_path: Path, what: str) -> None:
    ca = Authority(tmp_path / "ca", [("C", "SE"), ("O", "Bruecke AB"), ("CN", "Bruecke CA")])
    if what == "a name in Latin-1":
        # T61String with one octet for each letter, as OpenSSL read and wrote it for decades.
        text = edited(ca.pem, b"\x0c\x0aBruecke AB", b"\x14\x0aBr\xfc\xdfcke AB", ca.key)
    else:
        # A serial number, and no name to it: RFC 5280, 4.2.1.1 wants both or neither.
        half = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.5.29.35"), bytes.fromhex("3003820101"))
        name = ca.certificate.subject
        text = plain(name, name, ca.key.public_key(), ca.key, x509.BasicConstraints(True, 0), half)
    with pytest.raises(ValueError):
        loaded = x509.load_pem_x509_certificate(text)
        str(loaded.issuer), list(loaded.extensions)
    ca.certificate_file.write_bytes(text)
    sign = f"openssl x509 -req -CA {ca.certificate_file} -CAkey {ca.private_key_file} -CAcreateserial -days 2"

    def by_openssl(command: str, text: bytes = b"") -> bytes:
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, input=text, capture_output=True, check=True)
        return done.stdout

    (tmp_path / "names").write_text("subjectAltName=DNS:localhost\n")
    server = tmp_path / "server.pem"
    make = "openssl req -new -newkey rsa:2048 -nodes -keyout server.key -subj /CN=localhost"
    server.write_bytes(by_openssl(f"{make} | {sign} -extfile names; cat server.key"))
    device = Talking(tmp_path / "device", ca)
    device.enrolls(by=server)
    subject = [str(one.value) for one in x509.load_pem_x509_csr(device.request).subject]
    assert subject == ["SE", "Brüßcke AB" if what == "a name in Latin-1" else "Bruecke AB", ID]
    leaf = by_openssl(sign, device.request)
    run = device.hears(answers.certificate(leaf), by=server)
    assert run.status == 0, run.err
    shown = device.run("--status")
    assert (shown.status, "valid until" in shown.out) == (0, True), shown


# --- Names ---

#: Alternative names, CN; whether it is this device's.
NAMES: list[tuple[str, list[str], Optional[str], bool]] = [
    (HOST, [HOST], None, True),
    (HOST, ["other.example.com", HOST], None, True),
    (HOST, [HOST.upper()], None, True),
    (HOST, [], HOST.upper(), True),
    (HOST, ["other.example.com"], None, False),
    (HOST, [], None, False),
    (HOST, [HOST], "other.example.com", False),
    (ID, [], ID.upper(), False),  # the case of what is no host name counts
]


@pytest.mark.parametrize(("client_id", "names", "cn", "good"), NAMES)
def test_whose_it_is(new: Talking, client_id: str, names: list[str], cn: Optional[str], good: bool) -> None:
    new.client_id = client_id
    new.pending()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cn)] if cn else [])
    said = takes(new, new.signed(subject=subject, names=names, usage=[SERVER_AUTH]), status=0 if good else 127)
    assert (new.certificate is not None, "another device's" in said) == (good, not good)


@pytest.mark.parametrize(("client_id", "expected"), [(HOST, [HOST]), (ID, [])])
def test_a_new_request_of_a_host_name_has_it_as_alternative_name(
    new: Talking, client_id: str, expected: list[str]
) -> None:
    new.client_id = client_id
    new.enrolls()
    extensions = x509.load_pem_x509_csr(new.asked[1].body).extensions
    found = [one.value for one in extensions if isinstance(one.value, x509.SubjectAlternativeName)]
    assert [name for value in found for name in value.get_values_for_type(x509.DNSName)] == expected


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
def test_what_it_is_for(pending: Talking, usage: list[Any], status: int, use: Optional[str]) -> None:
    leaf = pending.signed(usage=usage)
    takes(pending, leaf, status=status)
    if status == 0:
        assert line(pending).get("use") == use
        takes(pending, leaf)
        assert (pending.asked[0].client_certificate is None) == (use is not None)
        assert pending.asked[0].if_modified_since, "the conditional GET goes out all the same"


# --- Two CAs ---


def test_the_ca_of_the_device_is_another_one_and_not_believed_for_the_server(
    new: Talking, authority: Authority, tmp_path: Path
) -> None:
    public = Authority(tmp_path / "public", [("C", "US"), ("O", "Public"), ("CN", "Public Root")])
    option = ["--identity-ca", str(public.certificate_file)]
    assert (new.hears(by=public.server(), options=option).status, new.asked) == (127, [])
    new.enrolls(*option)
    subject = x509.load_pem_x509_csr(new.request).subject
    assert [a.value for a in subject] == ["US", "Public", ID], "it begins with that CA's subject"
    takes(new, authority.sign(new.request, not_before=now() - hours(1)), *option, status=127)
    good = public.sign(new.request, not_before=now() - hours(1))
    takes(new, good, *option)
    new.keeps(answers.certificate(good), options=option, status=0)


# --- Keys ---


@pytest.mark.parametrize(("key_type", "kind"), [("rsa-2048", "RSA"), ("rsa-4096", "RSA"), ("ec-p256", "EC")])
def test_a_new_key_is_of_the_type_that_was_asked_for(new: Talking, key_type: str, kind: str) -> None:
    option = ["--key-type", key_type]
    new.enrolls(*option)
    key: Any = serialization.load_pem_private_key(new.block("PRIVATE KEY") or b"", None)
    size = int(key_type.partition("-")[2].lstrip("p"))
    assert (isinstance(key, ec.EllipticCurvePrivateKey), key.key_size) == (kind == "EC", size)
    leaf = new.signed()
    takes(new, leaf, *option)
    new.keeps(answers.certificate(leaf), options=option, status=0)
    assert new.asked[0].client_certificate is not None


def test_a_request_that_caramel_would_find_too_long_is_not_made(tmp_path: Path) -> None:
    """413 for ever would be the answer: what to choose is said, and nothing is stored."""
    words = [("C", "SE"), ("ST", "s" * 120), ("L", "l" * 120), ("O", "o" * 64), ("OU", "u" * 64), ("CN", "CA")]
    device = Talking(tmp_path / "device", Authority(tmp_path / "long", words), "a" * 60 + ".com")
    run = device.keeps(answers.UNKNOWN, options=["--key-type", "rsa-4096"])
    assert "2048" in run.err and "rsa-2048" in run.err
    assert device.asked == [] and device.labels == []


def test_an_ec_key_is_not_kept_where_the_key_type_says_rsa(new: Talking) -> None:
    new.enrolls("--key-type", "ec-p256")
    before = new.request
    assert "not an RSA key" in new.enrolls().err and new.request != before
    # An RSA key is kept where it says EC.
    kept = new.request
    run = new.hears(answers.PENDING, options=["--key-type", "ec-p256"])
    assert (run.status, new.request) == (69, kept), run.err


# --- The line ---


def test_the_first_line_of_a_whole_life(new: Talking) -> None:
    new.enrolls()
    assert list(line(new)) == ["id", "seal"] and line(new)["id"] == ID
    begin, end = now() - hours(1), now() + hours(47)
    takes(new, new.signed(not_before=begin, not_after=end))
    told = line(new)
    assert list(told) == ["id", "from", "until", "seal"]
    assert (told["from"], told["until"]) == tuple(t.strftime("%Y-%m-%dT%H:%M:%SZ") for t in (begin, end))
    assert len(told["seal"]) == 64


def test_a_file_without_its_line_is_looked_at_and_gets_it_once(pending: Talking) -> None:
    """1.0.0's, or `cat client.key client.crt client.csr` of another client."""
    leaf, key, request = pending.signed(), pending.block("PRIVATE KEY") or b"", pending.request
    pending.has(key + leaf + request)  # the usual label, as other clients have it
    takes(pending, leaf)
    renamed = request.replace(b" CERTIFICATE REQUEST", b" NEW CERTIFICATE REQUEST")
    assert [block for _, block in pending.blocks()] == [key, leaf, renamed]
    assert list(line(pending)) == ["id", "from", "until", "seal"]
    pending.keeps(answers.certificate(leaf), status=0)


@needs("mounts")
def test_where_the_line_can_not_be_written_all_goes_on(pending: Talking) -> None:
    leaf, folder = pending.signed(), pending.folder
    pending.has((pending.block("PRIVATE KEY") or b"") + leaf + pending.request)
    script = f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,ro "{folder}" && exec "$@"'
    for _ in range(2):
        pending.keeps(answers.certificate(leaf), before=("unshare", "-m", "sh", "-c", script, "sh"), status=0)
