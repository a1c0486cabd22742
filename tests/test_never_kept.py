"""What is never kept: the device starts over with a new key where the old one is of no use, and says why.

Otherwise the key stays: nobody has to sign a second time for a device that lost nothing but its certificate.
"""

from __future__ import annotations

import base64
import json
import math
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import world
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from needs import slow
from talking import Talking
from world import Authority, Caramel, Device, answers, hours, key_file_content, now, signing_request

Make = Callable[[Authority, str], bytes]
PKCS8, OLD_STYLE = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL
OTHER = [("C", "SE"), ("O", "Another company")]


def of(key: world.PrivateKey, authority: Authority, client_id: str) -> bytes:
    """A whole key file with this key."""
    return key_file_content(key, signing_request(key, authority.subject_for(client_id)))


def encrypted(form: serialization.PrivateFormat, authority: Authority, client_id: str) -> bytes:
    """Of the old style careless programs ask on the terminal, and then wait."""
    key = world.new_key()
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"secret"))
    return of(key, authority, client_id).replace(world.private_pem(key), pem)


def damaged(authority: Authority, client_id: str) -> bytes:
    """Some lines of the key are gone: a worn flash block."""
    lines = of(world.new_key(), authority, client_id).splitlines(keepends=True)
    return b"".join([*lines[:6], *lines[9:]])


def damaged_deep_inside(authority: Authority, client_id: str) -> bytes:
    """In the private exponent and the primes; structure and modulus stay as they are, and nothing works with it."""
    key = world.new_key()
    lines = world.private_pem(key).splitlines(keepends=True)
    for place in (12, 18):
        lines[place] = lines[place][:20] + lines[place][20:24].swapcase() + lines[place][24:]
    return of(key, authority, client_id).replace(world.private_pem(key), b"".join(lines))


def zeroed(authority: Authority, client_id: str) -> bytes:
    """What a power cut leaves of a file that another program wrote in place."""
    content = of(world.new_key(), authority, client_id)
    return content[:512] + b"\0" * (len(content) - 512)


def edwards(authority: Authority, client_id: str) -> bytes:
    key = ed25519.Ed25519PrivateKey.generate()
    return key.private_bytes(serialization.Encoding.PEM, PKCS8, serialization.NoEncryption())


def with_subject(change: Callable[[list[tuple[str, str]]], object], authority: Authority, client_id: str) -> bytes:
    """Whose request the server would answer with "Bad subject"."""
    key, subject = world.new_key(), list(authority.subject_for(client_id))
    change(subject)
    return key_file_content(key, signing_request(key, subject))


def with_a_number_of(bits: int, authority: Authority, client_id: str) -> bytes:
    """A key whose first prime has so many bits: whoever asks whether it is one has time."""
    key = world.new_key()
    numbers = key.private_numbers()
    public, prime = numbers.public_numbers, random.Random(bits).getrandbits(bits) | 1 << bits - 1 | 1
    # No small factor, which would show at once.
    prime += next(step for step in range(0, 1 << 20, 2) if math.gcd(prime + step, math.factorial(1000)) == 1)
    values = (0, public.n, public.e, 3, prime, numbers.q, 1, 1, 1)
    inner = der(0x30, b"".join(der(2, value.to_bytes(value.bit_length() // 8 + 1, "big")) for value in values))
    pem = b"-----BEGIN RSA PRIVATE KEY-----\n%s-----END RSA PRIVATE KEY-----\n" % base64.encodebytes(inner)
    return pem + signing_request(key, authority.subject_for(client_id))


def der(tag: int, content: bytes) -> bytes:
    size = len(content).to_bytes(4, "big").lstrip(b"\0")
    return bytes([tag]) + (size if len(content) < 128 and size else bytes([0x80 | len(size)]) + size) + content


NEVER_KEPT: dict[str, tuple[Make, str]] = {
    "text": (lambda a, i: b"hello\n", "no private key"),
    "zeros": (lambda a, i: b"\0" * 4096, "no private key"),
    "half a file": (lambda a, i: of(world.new_key(), a, i)[:600], "no private key"),
    "a key without request or end": (lambda a, i: of(world.new_key(), a, i)[:1600], "no private key"),
    "no key": (lambda a, i: signing_request(world.new_key(), a.subject_for(i)), "no private key"),
    "a damaged key": (damaged, "can't be read"),
    "a key that is damaged deep inside": (damaged_deep_inside, ""),
    "half zeros": (zeroed, "no private key"),
    "an encrypted key": (partial(encrypted, PKCS8), "no private key"),
    "a key of old style, encrypted": (partial(encrypted, OLD_STYLE), "can't be read"),
    "an EC key": (lambda a, i: of(ec.generate_private_key(ec.SECP256R1()), a, i), "not an RSA key"),
    "an Ed25519 key": (edwards, "not an RSA key"),
    "1024 bits": (lambda a, i: of(world.new_key(1024), a, i), "1024 bits"),
    "3072 bits": (lambda a, i: of(world.new_key(3072), a, i), "3072 bits"),
    "a cloned card": (lambda a, i: a.identity("cafe00000000", certified=False), "another client ID, 'cafe00000000'"),
    "a cloned card that has ended": (
        lambda a, i: a.identity("cafe00000000", not_after=now() - hours(1)),
        "another client ID",
    ),
    "a longer client ID": (lambda a, i: a.identity(i + "0", certified=False), "another client ID"),
    "another case of the client ID": (lambda a, i: a.identity(i.upper(), certified=False), "another client ID"),
    "another CA's subject": (partial(with_subject, lambda s: s.__setitem__(slice(-1), OTHER)), "refuse its subject"),
    "a subject without O": (partial(with_subject, lambda s: s.remove(("O", "Example AB"))), "refuse its subject"),
    "a subject in another order": (partial(with_subject, lambda s: s.insert(1, s.pop(2))), "refuse its subject"),
    "a key of 20000 bits": (partial(with_a_number_of, 20000), "longer than any"),
    "a key of 4104 bits": (partial(with_a_number_of, 4104), "longer than any"),
}


@pytest.mark.parametrize("what", NEVER_KEPT)
def test_a_device_starts_over_with_what_it_cannot_keep(
    device: Device, caramel: Caramel, authority: Authority, what: str
) -> None:
    make, reason = NEVER_KEPT[what]
    device.has(make(authority, str(device.client_id)))
    old = device.key_file.read_bytes()
    run = device.run(timeout=30)
    assert (run.status, run.out, run.err.count("\n")) == (69, "", 1), run
    assert run.seconds < 10
    assert reason in run.err and "starting over with a new key" in run.err
    assert device.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    for _, block in device.blocks():
        assert block not in old
    assert [row.sha256 for row in caramel.requests(str(device.client_id))] == [device.request_hash()]
    # The new life is good: nothing starts over again.
    before = device.snapshot()
    assert device.run().status == 69
    assert device.snapshot() == before


# --- Another's good identity ---


@pytest.mark.parametrize("sealed", [True, False])
def test_a_client_id_given_by_hand_costs_no_good_identity(
    device: Device, caramel: Caramel, authority: Authority, sealed: bool
) -> None:
    device.has(authority.identity("cafe00000000", line=sealed))
    before = device.snapshot()
    run = device.run("--hook", f"touch {device.folder}/called")
    assert (run.status, run.err.count("\n")) == (127, 1), run.err
    assert "cafe00000000" in run.err and f" {device.client_id}" in run.err and "--replace" in run.err
    shown = device.run("--status", "--json")
    values = json.loads(shown.out)
    assert (shown.status, values["next"].startswith("nothing: "), "--replace" in values["next"]) == (127, True, True)
    assert device.snapshot() == before and caramel.requests(str(device.client_id)) == []
    assert not (device.folder / "called").exists()
    replaced = device.run("--replace")
    assert (replaced.status, "starting over with a new key" in replaced.err) == (69, True)
    assert [row.sha256 for row in caramel.requests(str(device.client_id))] == [device.request_hash()]


@pytest.mark.parametrize("source", ["environment", "file"])
def test_a_client_id_from_elsewhere_is_believed(
    device: Device, caramel: Caramel, authority: Authority, source: str
) -> None:
    device.has(authority.identity("cafe00000000"))
    client_id, device.client_id = str(device.client_id), None
    if source == "file":
        assert device.config
        device.config.write_text(f"CARAMEL_CN={client_id}\n")
    run = device.run(env={"CARAMEL_CN": client_id} if source == "environment" else {})
    assert (run.status, "starting over" in run.err) == (69, True), run.err
    assert [row.sha256 for row in caramel.requests(client_id)] == [device.request_hash()]


@pytest.mark.parametrize("sealed", [True, False])
def test_a_host_name_in_another_case_is_the_same_one(new: Talking, authority: Authority, sealed: bool) -> None:
    """The stored form stays, on the line, in the request and in what the server hears."""
    stored = "Meter-7.Devices.Example.com"
    new.has(authority.identity(stored, line=sealed))
    content, new.client_id = world.unsealed(new.key_file.read_bytes()), stored.lower()
    assert new.hears(answers.NOT_MODIFIED).status == 0
    assert f"({stored})" in new.asked[0].user_agent
    assert new.key_file.read_bytes() == world.sealed(content, authority.pem, stored)


def test_a_wrong_ca_of_the_identity_costs_none(
    device: Device, caramel: Caramel, authority: Authority, tmp_path: Path
) -> None:
    """Not at the run that has it, and not at the one that has the right one again; pending or certified."""
    other = Authority(tmp_path / "other", [("C", "US"), ("O", "Public"), ("CN", "Public Root")])
    wrong = ("--identity-ca", str(other.certificate_file))
    assert device.run().status == 69
    first = device.request
    run = device.run(*wrong)
    assert (run.status, "starting over" in run.err, device.request) == (69, False, first), run.err
    caramel.sign(str(device.client_id))
    assert device.run().status == 0
    before = device.snapshot()
    run = device.run(*wrong)
    assert (run.status, "not by the trusted CA" in run.err) == (127, True), run.err
    assert device.snapshot() == before
    assert device.run().status == 0 and device.snapshot() == before


def test_an_empty_file_is_a_first_boot(device: Device) -> None:
    """It is what `flock KEYFILE` leaves behind where there was none."""
    device.has(b"")
    run = device.run()
    assert run.status == 69 and "starting over" not in run.err


def test_a_file_of_a_megabyte_and_more_is_not_ours(device: Device, authority: Authority) -> None:
    device.has(b"\n" * (3 << 20))
    before = device.snapshot()
    run = device.run()
    assert run.status == 127 and "longer than" in run.err
    assert device.snapshot() == before


# --- The key is kept ---


@pytest.fixture(scope="module")
def key() -> world.PrivateKey:
    return world.new_key()


UNUSABLE: dict[str, tuple[Callable[[Authority, bytes, Path], bytes], str]] = {
    "ended": (lambda a, r, p: a.sign(r, not_after=now() - hours(1)), "ended at"),
    "by another CA": (lambda a, r, p: Authority(p / "other").sign(r), "not by the trusted CA"),
    "by another CA of the same name": (
        lambda a, r, p: Authority(p / "other", world.SUBJECT).sign(r),
        "not by the trusted CA",
    ),
    "another device's": (lambda a, r, p: a.sign(r, subject=a.subject_for("cafe00000000")), "another device's"),
    "another key's": (lambda a, r, p: a.sign(r, public_key=world.new_key().public_key()), "another key's"),
    "a CA's": (lambda a, r, p: a.pem, "another key's"),
    "for something else": (lambda a, r, p: a.sign(r, usage=[world.CODE_SIGNING]), "neither for"),
    "none": (lambda a, r, p: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", ""),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_certificate_that_stopped_being_usable_is_dropped_and_its_key_kept(
    device: Device, caramel: Caramel, authority: Authority, key: world.PrivateKey, tmp_path: Path, what: str
) -> None:
    make, reason = UNUSABLE[what]
    request = signing_request(key, authority.subject_for(str(device.client_id)))
    device.has(key_file_content(key, request, make(authority, request, tmp_path)))
    run = device.run()
    assert run.status == 69 and re.search(f"stored certificate .*{reason}", run.err)
    assert world.unsealed(device.key_file.read_bytes()) == key_file_content(key, request)
    assert [row.sha256 for row in caramel.requests(str(device.client_id))] == [device.request_hash()]


def test_an_unusable_certificate_is_not_shown_and_goes_only_when_a_trustworthy_server_was_asked(new: Talking) -> None:
    """A clock that has jumped ahead lies about the end of a certificate; see also `test_trust.py`."""
    new.certified(not_after=now() - hours(1))
    new.keeps(answers.page(503))
    asked = new.asked
    assert new.hears(answers.PENDING).status == 69
    assert new.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    assert [(one.client_certificate, one.if_modified_since) for one in asked + new.asked] == [(None, "")] * 2


@pytest.mark.parametrize(
    "fault", ["missing", "another key's", *(pytest.param(fault, marks=slow) for fault in ("damaged", "cut"))]
)
def test_a_damaged_request_is_made_again_with_the_same_key_and_hash(
    device: Device, caramel: Caramel, authority: Authority, fault: str
) -> None:
    """The same key and subject make the same request, so what the administrator has signed stays signed."""
    assert device.run().status == 69
    caramel.sign(str(device.client_id))
    assert device.run().status == 0
    good, sha256 = device.key_file.read_bytes(), device.request_hash()
    blocks = dict(device.blocks())
    request = blocks["NEW CERTIFICATE REQUEST"]
    lines = request.splitlines(keepends=True)
    other = signing_request(world.new_key(), authority.subject_for(str(device.client_id)))
    instead = {
        "missing": b"",
        "damaged": b"".join([*lines[:4], *lines[6:]]),
        "another key's": other.replace(b" CERTIFICATE REQUEST", b" NEW CERTIFICATE REQUEST"),
        "cut": b"".join(lines[:-2]),
    }[fault]
    device.has(good.replace(request, instead))
    run = device.run()
    assert run.status == 0
    assert device.key_file.read_bytes() == good and device.request_hash() == sha256


def test_a_key_of_4096_bits_is_kept(device: Device, caramel: Caramel, authority: Authority) -> None:
    device.has(of(world.new_key(4096), authority, str(device.client_id)))
    before = device.key_file.read_bytes()
    assert device.run().status == 69
    assert world.unsealed(device.key_file.read_bytes()) == before
    caramel.sign(str(device.client_id))
    assert device.run().status == 0
