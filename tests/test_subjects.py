"""CAs as they are: any order of the parts of their names, any of them missing, any script; and two at once."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest
import world
from cryptography import x509
from needs import slow
from talking import FIRST_TIME, ID, Talking
from world import ATTRIBUTES, Authority, Caramel, Device, Front, Scripted, answers, any_front, hours, now

#: By what is special about it; None: as Caramel's own program makes it, with 4096 bits.
SUBJECTS: dict[str, Optional[list[tuple[str, str]]]] = {
    "reversed": [("CN", "A"), ("OU", "B"), ("O", "Beispiel & Söhne"), ("L", "Köln"), ("ST", "NRW"), ("C", "DE")],
    "mixed": [("O", "例え株式会社"), ("CN", "Root"), ("L", "東京"), ("OU", "ルート"), ("C", "JP")],
    "sparse": [("CN", "Root"), ("O", "Example")],
    "Caramel's own": None,
}


def parts(certificate: bytes) -> list[tuple[str, str]]:
    names = {oid: short for short, oid in ATTRIBUTES.items()}
    return [(names[a.oid], str(a.value)) for a in x509.load_pem_x509_csr(certificate).subject]


def lives(device: Device, caramel: Caramel) -> None:
    """From nothing to a certificate, and on."""
    assert device.run().status == 69
    assert parts(device.request) == list(caramel.authority.subject_for(str(device.client_id)))
    before = device.snapshot()
    assert device.run().status == 69 and device.snapshot() == before
    caramel.sign(str(device.client_id))
    assert device.run().status == 0
    before = device.snapshot()
    run = device.run()
    assert run.status == 0 and "unchanged" in run.err and device.snapshot() == before


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=slow if kind != "reversed" else ()) for kind in SUBJECTS])
def test_a_ca_whose_name_has_its_own_order(tmp_path: Path, kind: str) -> None:
    subject = SUBJECTS[kind]
    authority = Authority(tmp_path / "ca", subject) if subject else Authority.by_caramel(tmp_path / "ca")
    with (
        Caramel(tmp_path / "caramel", authority) as caramel,
        any_front(tmp_path / "front", caramel, authority.server()) as front,
    ):
        lives(Device(tmp_path / "device", front.address, authority.certificate_file, ID), caramel)


def test_a_ca_with_a_name_of_only_other_parts(tmp_path: Path) -> None:
    """Nothing is required then: the request has the client ID alone."""
    device = Talking(tmp_path / "device", Authority(tmp_path / "ca", [("CN", "Root")]))
    device.enrolls()
    assert parts(device.request) == [("CN", ID)]


# --- Two roots: a roll-over ---


@pytest.fixture(scope="module")
def new_root(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The next root, of the same name."""
    return Authority(tmp_path_factory.mktemp("new"), not_before=now() - hours(2))


@pytest.fixture(params=["old first", "new first"])
def both(request: pytest.FixtureRequest, tmp_path: Path, authority: Authority, new_root: Authority) -> Path:
    """A CA file with two roots."""
    file = tmp_path / "both.crt"
    pair = [authority.pem, new_root.pem]
    file.write_bytes(b"# roots\n".join(pair if request.param == "old first" else reversed(pair)))
    return file


def test_a_device_lives_through_a_roll_over_of_the_ca(
    tmp_path: Path, both: Path, new_root: Authority, caramel: Caramel, front: Front
) -> None:
    device = Device(tmp_path / "device", front.address, both, "fe" + tmp_path.name[-10:].replace("_", "-"))
    assert device.run().status == 69
    caramel.sign(str(device.client_id))
    assert device.run().status == 0
    key = device.block("PRIVATE KEY")

    # The server moves to the new root, with another server certificate, and the device's request is signed by it.
    fresh = new_root.sign(device.request, not_before=now() - hours(1))
    with Scripted(new_root.server(), [answers.certificate(fresh)], client_ca=both) as server:
        device.server = server.address
        run = device.run()
        assert run.status == 0 and "new certificate" in run.err
        before = device.snapshot()
        assert device.run().status == 0 and device.snapshot() == before
        assert all(asked.client_certificate for asked in server.requests)
    assert device.block("CERTIFICATE") == fresh and device.block("PRIVATE KEY") == key

    # The old root is taken away; nothing changes.
    device.ca = new_root.certificate_file
    with Scripted(new_root.server(), [answers.certificate(fresh)]) as server:
        device.server = server.address
        assert device.run().status == 0 and before
        # Judged again under another CA's text: the line of text says so, and nothing else is new.
        assert world.unsealed(device.key_file.read_bytes()) == world.unsealed(before.content)


@pytest.mark.parametrize("which", ["old", "new", "third"])
def test_a_server_certificate_may_be_by_either_root_and_by_no_third(
    tmp_path: Path, both: Path, authority: Authority, new_root: Authority, which: str
) -> None:
    device = Talking(tmp_path / "device", authority)
    device.ca = both
    ca = {"old": authority, "new": new_root}.get(which) or Authority(tmp_path / "third")
    run = device.hears(*([] if which == "third" else FIRST_TIME), by=ca.server(file="either.pem"))
    assert run.status == (127 if which == "third" else 69)


def test_a_request_under_either_roots_name_is_kept(pending: Talking, tmp_path: Path, authority: Authority) -> None:
    """The next root has another name, and is listed first: devices that are enrolled under the old one stay so."""
    new = Authority(tmp_path / "new", [("C", "SE"), ("O", "Renamed AB"), ("CN", "Root 2")])
    pending.ca = tmp_path / "both.crt"
    pending.ca.write_bytes(new.pem + authority.pem)
    before = world.unsealed(pending.key_file.read_bytes())
    assert pending.hears(answers.PENDING).status == 69
    assert world.unsealed(pending.key_file.read_bytes()) == before
    pending.key_file.unlink()
    pending.enrolls(by=new.server())
    assert parts(pending.request) == list(new.subject_for(ID)), "a new device belongs to the first"


def test_an_ended_root_of_two_does_no_harm(new: Talking, tmp_path: Path, authority: Authority) -> None:
    old = Authority(tmp_path / "old", not_before=now() - hours(99), not_after=now() - hours(1))
    new.ca = tmp_path / "both.crt"
    new.ca.write_bytes(old.pem + authority.pem)
    new.enrolls()
    new.has(old.identity(ID))
    run = new.hears(answers.PENDING)
    assert run.status == 69 and "not by the trusted CA" in run.err
    assert new.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]


@pytest.mark.parametrize("both", [True, False])
def test_a_ca_that_was_renewed_with_the_same_key(
    device: Device, caramel: Caramel, authority: Authority, tmp_path: Path, both: bool
) -> None:
    """Caramel's certificates name their issuer's serial number too (RFC 5280, 4.2.1.1): it has a new one.

    So the renewed CA certificate alone doesn't vouch for what was signed before. Both together do.
    """
    renewed = Authority(tmp_path / "renewed", key=authority.key)
    assert device.run().status == 69
    caramel.sign(str(device.client_id))
    assert device.run().status == 0
    device.ca = tmp_path / "ca.crt"
    device.ca.write_bytes((authority.pem if both else b"") + renewed.pem)
    run = device.run()
    assert run.status == (0 if both else 127), run.err
