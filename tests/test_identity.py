"""Key, request and certificate as one value: what is made, kept, brought into form and refused."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import world
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from world import Authority, private_pem

from caramel_embedded.certificates import Anchors, InvalidIdentity, examine, key_size, make
from caramel_embedded.identity import Identity, remembered
from caramel_embedded.pem import CERTIFICATE, first, only_certificates
from caramel_embedded.trust import Trust

ID = "fffbeec0ffee"


@pytest.fixture(scope="module")
def trust(authority: Authority) -> Trust:
    return Trust(authority.pem)


@pytest.fixture(scope="module")
def anchors(authority: Authority) -> Anchors:
    return Anchors(authority.pem)


@pytest.fixture(scope="module")
def key() -> world.PrivateKey:
    return world.new_key()


@pytest.fixture(scope="module")
def whole(authority: Authority, key: world.PrivateKey) -> bytes:
    """A whole key file without its line, as another implementation (`cryptography`, by the tests) writes it."""
    return authority.identity(ID, key=key, line=False)


def kept(data: bytes, anchors: Anchors, trust: Trust) -> Identity:
    """What is kept of `data`, where nothing is wrong with it."""
    identity, wrong = examine(data, ID, anchors, trust, (), None)
    assert wrong == []
    return identity


def body(data: bytes) -> bytes:
    return data.partition(b"\n")[2]


def test_what_is_made_is_sealed_and_kept(anchors: Anchors, trust: Trust) -> None:
    made = make(ID, anchors, trust, ("p12345678", "abcdef12"))
    data = bytes(made)
    again = Identity.sealed(data, trust.digest)
    assert again and bytes(again) == data and again.hardware == ("p12345678", "abcdef12") == remembered(data)
    assert (again.key, again.request, again.certificate, again.client_id) == (made.key, made.request, None, ID)
    assert body(data).startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert body(data) == body(bytes(kept(body(data), anchors, trust)))
    assert data.startswith(b"# caramel-embedded/1 id=%s hw=12345678,abcdef12 kinds=p- seal=" % ID.encode())
    known = made.remembering(("mabcdef12", "p87654321"))
    assert known.hardware == ("p12345678", "mabcdef12")


def test_a_whole_file_keeps_every_byte(whole: bytes, anchors: Anchors, trust: Trust) -> None:
    identity = kept(whole, anchors, trust)
    assert body(bytes(identity)) == whole
    again = Identity.sealed(bytes(identity), trust.digest, 17.0)
    assert again and identity.issued and again.issued == identity.issued._replace(modified=17.0, guessed=False)
    assert again.certificate == first(whole, CERTIFICATE)


def traditional(data: bytes, key: world.PrivateKey) -> bytes:
    old = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    return data.replace(private_pem(key), old)


#: What is right, but not as this program writes it: it is brought into that form.
OTHER_FORMS: dict[str, Callable[[bytes, world.PrivateKey], bytes]] = {
    "windows": lambda data, _: data.replace(b"\n", b"\r\n"),
    "no end": lambda data, _: data[:-1],
    "text before": lambda data, _: b"# key of the device\n" + data,
    "text between": lambda data, _: data.replace(b"-----BEGIN CERT", b"\nissued by\n-----BEGIN CERT"),
    "text after": lambda data, _: data + b"\n\n",
    "usual label": lambda data, _: data.replace(b" NEW CERTIFICATE REQUEST", b" CERTIFICATE REQUEST"),
    "another order": lambda data, _: b"".join(reversed(re.findall(rb"(?s)-----BEGIN.*?-----END.*?-----\n", data))),
    "trailing blanks": lambda data, _: data.replace(b"KEY-----\n", b"KEY----- \n"),
    "old style": traditional,
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_another_form_is_brought_into_ours(
    whole: bytes, anchors: Anchors, trust: Trust, key: world.PrivateKey, form: str
) -> None:
    data = OTHER_FORMS[form](whole, key)
    assert data != whole and body(bytes(kept(data, anchors, trust))) == whole


def test_any_cut_and_any_changed_byte_breaks_the_seal(whole: bytes, anchors: Anchors, trust: Trust) -> None:
    sealed = bytes(kept(whole, anchors, trust))
    assert Identity.sealed(sealed, trust.digest)
    assert [end for end in range(len(sealed)) if Identity.sealed(sealed[:end], trust.digest)] == []
    data = bytearray(sealed)
    for place in range(len(data)):
        for bit in (1, 32):
            data[place] ^= bit
            assert Identity.sealed(bytes(data), trust.digest) is None, (place, bit)
            data[place] ^= bit


def test_a_seal_of_another_ca_or_another_family_of_keys_is_none(
    whole: bytes, anchors: Anchors, trust: Trust, authority: Authority
) -> None:
    data = bytes(kept(whole, anchors, trust))
    for other in (
        Trust(authority.pem + b"\n"),
        Trust(authority.pem, authority.pem + b"\n"),
        Trust(authority.pem, key_type="ec-p256"),
    ):
        assert Identity.sealed(data, other.digest) is None
    for same in (Trust(authority.pem, authority.pem), Trust(authority.pem, key_type="rsa-4096")):
        assert Identity.sealed(data, same.digest) is not None


def test_a_right_seal_on_what_is_never_written_is_no_identity(whole: bytes, anchors: Anchors, trust: Trust) -> None:
    identity, wrong = examine(whole, ID, anchors, trust, ("1f0c22ab",), None)
    assert not wrong
    line, _, body = bytes(identity).partition(b"\n")
    head = line.rpartition(b" seal=")[0]

    def sealed(head: bytes, body: bytes) -> bytes:
        seal = hashlib.sha256(b"\n".join((head, trust.digest, body))).hexdigest()
        return b"%s seal=%s\n%s" % (head, seal.encode(), body)

    assert sealed(head, body) == bytes(identity)
    for head_of_others, body_of_others in (
        (head + b" more=1", body),
        (head.replace(b" until=", b" from=2000-01-01T00:00:00Z until="), body),
        (head, body + b"# a note\n"),
        (head, b"# a note\n" + body),
    ):
        assert Identity.sealed(sealed(head_of_others, body_of_others), trust.digest) is None
    forged = Identity(b"no PEM", b"at all", ID, trust.digest)
    assert Identity.sealed(bytes(forged), trust.digest) is None


def test_no_error_and_no_representation_holds_key_material(whole: bytes, anchors: Anchors, trust: Trust) -> None:
    identity = kept(whole, anchors, trust)
    assert identity.request_hash in repr(identity)
    secrets = [line.decode() for line in identity.key.splitlines()[1:-1]]
    assert not any(secret in repr(identity) + str(identity) for secret in secrets)
    assert not any(secret.encode() in bytes(identity).partition(b"\n")[0] for secret in secrets)
    with pytest.raises(InvalidIdentity) as caught:
        examine(whole.replace(secrets[5].encode(), b"A" * 64), ID, anchors, trust, (), None)
    assert not any(secret in str(caught.value) for secret in secrets)


def test_a_value_without_its_certificate(whole: bytes, anchors: Anchors, trust: Trust) -> None:
    identity = kept(whole, anchors, trust)
    bare = identity.with_issued(None)
    assert (bare.key, bare.request, bare.certificate, bare.chain) == (identity.key, identity.request, None, b"")
    assert identity.certificate and identity.modified is not None and bare.modified is None
    assert bytes(bare.with_issued(identity.issued)) == bytes(identity)


def test_what_is_certainly_somebody_elses(whole: bytes, authority: Authority) -> None:
    certificate = first(whole, CERTIFICATE)
    assert certificate is not None
    for others in (
        authority.pem,
        authority.pem + certificate,
        b"a CA\n" + authority.pem,
        b"\r\n".join(authority.pem.splitlines()),
    ):
        assert only_certificates(others), others
    for ours in (b"", b"x", whole, whole[700:], authority.pem[:-30], b"\0" * 1700 + whole[1700:]):
        assert not only_certificates(ours), ours


# --- A key that a chip holds ---


def test_a_chips_block_goes_to_no_function_of_cryptography(
    authority: Authority, anchors: Anchors, trust: Trust, monkeypatch: pytest.MonkeyPatch
) -> None:
    """43.0 panics at one, which is no `Exception`: this version's parsers are watched, whatever they would say."""
    der = b"\x30\x0a\x06\x06\x67\x81\x05\x0a\x01\x03\x05\x00"
    block = b"-----BEGIN TSS2 PRIVATE KEY-----\n%s\n-----END TSS2 PRIVATE KEY-----\n" % base64.b64encode(der)
    content = authority.identity(ID, line=False)
    _, end, rest = content.partition(b"-----END PRIVATE KEY-----\n")
    assert end
    given: list[bytes] = []
    for module in (serialization, x509):
        for name in [name for name in dir(module) if re.fullmatch("load_.*(_key|_csr|_certificates?)", name)]:
            parser = getattr(module, name)

            def watched(data: bytes, *more: Any, parser: Any = parser, **options: Any) -> Any:
                given.append(bytes(data))
                return parser(data, *more, **options)

            monkeypatch.setattr(module, name, watched)
    identity, wrong = examine(block + rest, ID, anchors, trust, (), None)
    assert (wrong, identity.key, identity.holder) == ([], block, "tpm")
    assert key_size(identity) == ("RSA", 2048)
    assert len(given) >= 3
    assert not [data for data in given if b"TSS2" in data or der in data]
    # A software key does go there.
    examine(content, ID, anchors, trust, (), None)
    assert any(b"BEGIN PRIVATE KEY" in data for data in given)
