"""Key, request and certificate as one value: the quick look and the thorough one agree, and damage is found."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable

import pytest
import world
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from world import Authority, key_file_content, private_pem, signing_request

from caramel_embedded.identity import (
    CERTIFICATE,
    Foreign,
    Identity,
    _content,
    _elements,
    examine,
    look,
    make,
    require_sound_key,
    sole_block,
)
from caramel_embedded.trust import Trust

ID = "fffbeec0ffee"


@pytest.fixture(scope="module")
def subjects(authority: Authority) -> list[list[tuple[str, str]]]:
    return [list(subject) for subject in Trust(authority.pem).subjects]


@pytest.fixture(scope="module")
def key() -> world.PrivateKey:
    return world.new_key()


@pytest.fixture(scope="module")
def whole(authority: Authority, key: world.PrivateKey) -> bytes:
    """A whole key file, as another implementation (`cryptography`, by the tests) writes it."""
    return authority.identity(ID, key=key)


Subjects = list[list[tuple[str, str]]]


def test_what_is_made_is_what_both_look_for(subjects: Subjects) -> None:
    made = make(ID, subjects[0])
    data = bytes(made)
    looked = look(data, ID, subjects)
    assert looked and bytes(looked) == data == bytes(examine(data, ID, subjects))
    assert looked.request_hash == made.request_hash
    assert data.startswith(b"-----BEGIN PRIVATE KEY-----\n") and made.certificate is None
    assert b"-----BEGIN NEW CERTIFICATE REQUEST-----\n" in data


def test_what_is_whole_is_the_same_to_both(whole: bytes, subjects: Subjects) -> None:
    looked, examined = look(whole, ID, subjects), examine(whole, ID, subjects)
    assert looked and bytes(looked) == whole == bytes(examined)
    assert (looked.key, looked.request, looked.certificate) == (examined.key, examined.request, examined.certificate)


#: What is right, but not as this program writes it: the thorough look brings it into that form.
OTHER_FORMS: dict[str, Callable[[bytes], bytes]] = {
    "windows": lambda data: data.replace(b"\n", b"\r\n"),
    "no end": lambda data: data[:-1],
    "text before": lambda data: b"# key of the device\n" + data,
    "text between": lambda data: data.replace(b"-----BEGIN CERT", b"\nissued by\n-----BEGIN CERT"),
    "text after": lambda data: data + b"\n\n",
    "usual label": lambda data: data.replace(b" NEW CERTIFICATE REQUEST", b" CERTIFICATE REQUEST"),
    "another order": lambda data: b"".join(reversed(re.findall(rb"(?s)-----BEGIN.*?-----END.*?-----\n", data))),
    "trailing blanks": lambda data: data.replace(b"KEY-----\n", b"KEY----- \n"),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_another_form_is_brought_into_ours(whole: bytes, subjects: Subjects, form: str) -> None:
    data = OTHER_FORMS[form](whole)
    assert data != whole and look(data, ID, subjects) is None
    assert bytes(examine(data, ID, subjects)) == whole


def test_an_old_style_key_is_brought_into_ours(whole: bytes, subjects: Subjects, key: world.PrivateKey) -> None:
    old = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    data = whole.replace(private_pem(key), old)
    assert look(data, ID, subjects) is None
    assert bytes(examine(data, ID, subjects)) == whole


def test_any_cut_of_a_file_is_no_news_to_the_quick_look(whole: bytes, subjects: Subjects) -> None:
    """It takes a file for good only where nothing is missing, at any of its lengths."""
    assert [end for end in range(len(whole)) if look(whole[:end], ID, subjects)] == []


def test_any_missing_line_of_key_or_request_is_seen_at_a_glance(whole: bytes, subjects: Subjects) -> None:
    """Lines of the certificate may be missing there: that is OpenSSL's to judge, in every run."""
    lines = whole.splitlines(keepends=True)
    begin, end = (lines.index(b"-----%s CERTIFICATE-----\n" % word) for word in (b"BEGIN", b"END"))
    others = [number for number in range(len(lines)) if not begin < number < end]
    assert [n for n in others if look(b"".join(lines[:n] + lines[n + 1 :]), ID, subjects)] == []


@pytest.mark.parametrize("kind", ["ec", "1024", "3072", "another key", "another device", "another subject"])
def test_neither_keeps_what_is_never_kept(authority: Authority, subjects: Subjects, kind: str) -> None:
    ours = authority.subject_for(ID)
    made: world.PrivateKey = world.new_key(int(kind)) if kind.isdigit() else world.new_key()
    if kind == "ec":
        made = ec.generate_private_key(ec.SECP256R1())
    subject = {"another device": authority.subject_for("x"), "another subject": [("O", "x"), ("CN", ID)]}.get(
        kind, ours
    )
    data = key_file_content(made, signing_request(made, subject))
    if kind == "another key":
        data = key_file_content(made, signing_request(world.new_key(), ours))
        assert look(data, ID, subjects) is None
        assert bytes(examine(data, ID, subjects)) == key_file_content(made, signing_request(made, ours))
        return
    assert look(data, ID, subjects) is None
    with pytest.raises(Foreign):
        examine(data, ID, subjects)


def test_no_error_and_no_representation_holds_key_material(whole: bytes, subjects: Subjects) -> None:
    looked = look(whole, ID, subjects)
    assert looked and looked.request_hash in repr(looked)
    secrets = [line.decode() for line in looked.key.splitlines()[1:-1]]
    assert not any(secret in repr(looked) + str(looked) for secret in secrets)
    damaged = whole.replace(secrets[5].encode(), b"A" * 64)
    with pytest.raises(Foreign) as caught:
        examine(damaged, ID, subjects)
    assert not any(secret in str(caught.value) for secret in secrets)


def test_a_key_that_is_damaged_where_nobody_looks_is_found_when_asked_for(whole: bytes, subjects: Subjects) -> None:
    lines = whole.splitlines(keepends=True)
    lines[15] = lines[15][:8] + bytes(reversed(lines[15][8:16])) + lines[15][16:]
    looked = look(b"".join(lines), ID, subjects)
    assert looked, "its outside is whole"
    with pytest.raises(Foreign):
        require_sound_key(looked)


def test_the_file_object_holds_the_same(whole: bytes, subjects: Subjects) -> None:
    looked = look(whole, ID, subjects)
    assert looked and looked.file().read() == whole


def test_a_value_without_its_certificate(whole: bytes, subjects: Subjects) -> None:
    looked = look(whole, ID, subjects)
    assert looked and looked.certificate
    bare = looked.with_certificate(None)
    assert (bare.key, bare.request, bare.certificate) == (looked.key, looked.request, None)
    assert bytes(bare.with_certificate(looked.certificate)) == whole
    assert isinstance(bare, Identity)


# --- One certificate in an answer ---


def test_a_sole_certificate(authority: Authority) -> None:
    pem = authority.pem
    assert sole_block(pem, CERTIFICATE) == pem
    assert sole_block(pem.replace(b"\n", b"\r\n"), CERTIFICATE) == pem
    assert sole_block(b"\n" + pem + b"\n\n", CERTIFICATE) == pem


def test_what_is_no_sole_certificate(authority: Authority) -> None:
    pem = authority.pem
    der = authority.certificate.public_bytes(serialization.Encoding.DER)

    def armored(content: bytes) -> bytes:
        text = base64.b64encode(content)
        lines = [text[at : at + 64] for at in range(0, len(text), 64)]
        return b"\n".join([b"-----BEGIN CERTIFICATE-----", *lines, b"-----END CERTIFICATE-----", b""])

    assert sole_block(armored(der), CERTIFICATE) == pem, "the armour of this test is right"
    for wrong in (
        *(b"", b"x", pem + pem, b"x" + pem, pem + b"x", der, pem.replace(b"CERTIFICATE", b"PRIVATE KEY"), pem[:-40]),
        *(armored(der + b"\0"), armored(der + der), armored(der[:-1]), armored(b""), armored(b"0")),
        pem.replace(b"\n", b" "),
    ):
        assert sole_block(wrong, CERTIFICATE) is None, wrong


# --- DER ---


@pytest.mark.parametrize(
    "der",
    [
        b"\x30",
        b"\x30\x05\x00",
        b"\x30\x80\x00\x00",
        b"\x30\x84\x00\x00\x00\x00",
        b"\x30\x81",
        b"\x30\x82\x01",
        b"\x30\xff" + b"\xff" * 127,
    ],
)
def test_what_is_no_der_is_refused(der: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        list(_elements(der))


def test_der_is_taken_apart() -> None:
    assert _content(b"\x02\x01\x05\x04\x02ab", 0x02, 0x04) == [b"\x05", b"ab"]
    assert _content(b"\x04\x81\x80" + b"x" * 128, 0x04) == [b"x" * 128]
    assert _content(b"") == []
    with pytest.raises(ValueError):
        _content(b"\x02\x01\x05", 0x04)
    with pytest.raises(ValueError):
        _content(b"\x02\x01\x05", 0x02, 0x02)
