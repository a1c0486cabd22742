"""The client certificate: shown as soon as there is a usable one, and never in the way of a new one."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import world
from cryptography import x509
from needs import needs
from talking import Talking
from world import Answer, Apache, Authority, Caramel, Device, Front, Nginx, TlsFront, answers, hours, now


@pytest.fixture
def signed(new: Talking, device: Device, caramel: Caramel) -> Talking:
    """A device whose request is signed by the real server, and which hasn't seen that yet."""
    new.server, new.client_id = device.server, device.client_id
    assert new.run().status == 69
    caramel.sign(str(new.client_id))
    return new


def gives(device: Talking, certificate: bytes) -> None:
    """Puts a certificate for the device's own request into its file."""
    key, request = (block for label, block in device.blocks() if label != "CERTIFICATE")
    device.has(key + certificate + request)


def has_newest(device: Talking, caramel: Caramel) -> bool:
    """Whether it has what the server has signed last."""
    return device.block("CERTIFICATE") == caramel.certificates(device.request_hash())[-1]


@pytest.mark.parametrize("protocols", ["TLSv1.2", "TLSv1.3"])
@needs("nginx")
def test_a_server_that_demands_one_sees_ours_once_we_have_it(
    signed: Talking, caramel: Caramel, pem: Path, tmp_path: Path, protocols: str
) -> None:
    """Enrolled where none is demanded, as on the network of the factory."""
    assert signed.run().status == 0
    before = signed.snapshot()
    with Nginx(tmp_path / "nginx", caramel, pem, verify_client="on", protocols=protocols) as front:
        signed.server = front.address
        assert signed.run().status == 0
        seen = front.seen()
    assert [(asked.verify, asked.status, asked.tls) for asked in seen] == [("SUCCESS", 200, protocols)]
    assert f"CN={signed.client_id}" in seen[0].subject
    assert signed.snapshot() == before


@pytest.mark.parametrize("verify", ["optional", "require"])
@pytest.mark.parametrize("good", [True, False])
@needs("apache2")
def test_an_apache_that_asks_for_it_below_a_path_only(
    signed: Talking, caramel: Caramel, authority: Authority, pem: Path, tmp_path: Path, verify: str, good: bool
) -> None:
    """It asks after the handshake, which under TLS 1.3 takes a client that has offered that (RFC 8446, 4.2.6). What
    isn't good for Apache is in nobody's way where it demands none."""
    assert signed.run().status == 0
    before = signed.snapshot()
    client_ca = authority if good else Authority(tmp_path / "other", [("CN", "other")])
    with Apache(tmp_path / "apache", caramel, pem, verify, client_ca.certificate_file) as front:
        signed.server = front.address
        run = signed.run()
    seen = [line for line in front.seen() if line.startswith("GET")]  # Apache writes it after its answer
    assert run.status == (0 if good or verify == "optional" else 127), run.err
    assert ("GET 200 TLSv1.3 SUCCESS" in seen) == good, seen
    assert signed.snapshot() == before


@needs("nginx")
def test_a_server_that_demands_one_before_there_is_any_is_no_reason_to_lose_anything(
    signed: Talking, caramel: Caramel, pem: Path, tmp_path: Path
) -> None:
    before = signed.snapshot()
    with Nginx(tmp_path / "nginx", caramel, pem, verify_client="on") as front:
        signed.server = front.address
        run = signed.run()
        assert [asked.status for asked in front.seen()] == [400]
    assert run.status == 127 and "400" in run.err
    assert signed.snapshot() == before


def test_with_an_expired_one_in_the_file_the_new_one_comes(signed: Talking, front: Front, caramel: Caramel) -> None:
    gives(signed, signed.signed(not_before=now() - hours(4), not_after=now() - hours(1)))
    with front.watched() as seen:
        assert signed.run().status == 0
    assert [(asked.verify, asked.status) for asked in seen] == [("NONE", 200)]
    assert has_newest(signed, caramel)


@needs("faketime", "nginx")
def test_with_one_that_has_ended_but_not_by_our_clock_the_new_one_comes(
    signed: Talking, nginx: Nginx, caramel: Caramel
) -> None:
    """It slept through its certificate's life and woke up in 1970: nginx answers 400 to that for ever."""
    gives(signed, signed.signed(not_before=now() - hours(4), not_after=now() - hours(1)))
    # Of a firmware without its build's time, which could tell that this end has passed.
    signed.changed("from caramel_embedded import settings\nsettings.baked = lambda name: None")
    with nginx.watched() as seen:
        run = signed.run(before=["faketime", "--exclude-monotonic", "1970-01-01 00:00:10"])
    assert run.status == 0, run.err
    assert [asked.status for asked in seen] == [400, 200]
    assert seen[0].verify.startswith("FAILED") and seen[1].verify == "NONE"
    assert has_newest(signed, caramel)


@needs("nginx")
def test_with_one_that_is_foreign_to_the_front_end_the_new_one_comes(
    signed: Talking, caramel: Caramel, pem: Path, tmp_path: Path
) -> None:
    """The front end believes in another CA than the device: a roll-over that is done by half."""
    gives(signed, signed.signed())
    other = Authority(tmp_path / "other", [("CN", "other")])
    with Nginx(tmp_path / "nginx", caramel, pem, client_ca=other.certificate_file) as front:
        signed.server = front.address
        run = signed.run()
        seen = front.seen()
    assert run.status == 0 and "new certificate" in run.err
    assert [asked.status for asked in seen] == [400, 200]
    assert seen[0].verify.startswith("FAILED") and seen[1].verify == "NONE"
    assert seen[0].if_modified_since and not seen[1].if_modified_since
    assert has_newest(signed, caramel)


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_that_ends_the_connection_with_an_alert(
    signed: Talking, caramel: Caramel, pem: Path, tmp_path: Path, newest: ssl.TLSVersion
) -> None:
    """Under TLS 1.3 that is seen only when the first answer is read."""
    gives(signed, signed.signed())
    other = Authority(tmp_path / "other", [("CN", "other")])
    front = TlsFront(caramel, pem, client_ca=other.certificate_file)
    front.context.maximum_version = newest
    with front:
        signed.server = front.address
        run = signed.run()
    assert run.status == 0, run.err
    assert front.handshakes == 1, "of two handshakes one went well"
    assert has_newest(signed, caramel)


# --- What a scripted server sees ---


@pytest.mark.parametrize("status", [400, 401, 403])
def test_there_is_one_more_try_and_no_third(certified: Talking, status: int) -> None:
    """A front end may say this because of the client certificate."""
    page = answers.page(status)
    assert str(status) in certified.keeps(page, page).err
    assert [bool(asked.client_certificate) for asked in certified.asked] == [True, False]


def test_a_server_that_ends_every_connection_is_tried_twice(certified: Talking) -> None:
    certified.keeps(None, None)
    assert certified.connections == 2


@pytest.mark.parametrize(
    "says", [[answers.REJECTED, None, None], [answers.problem(400, "Bad Request")], [answers.page(500)]]
)
def test_what_caramel_itself_says_is_not_put_down_to_the_certificate(certified: Talking, says: list[Answer]) -> None:
    assert certified.hears(*says).status == 127
    # (Where the connection breaks, the POST goes out once more on one that has none to show.)
    assert all(asked.client_certificate for asked in certified.asked[:2])
    assert certified.methods.count("GET") == 1


def test_without_one_a_server_that_fails_is_asked_once(pending: Talking) -> None:
    pending.keeps(answers.page(400))
    assert [asked.client_certificate for asked in pending.asked] == [None]


def test_what_is_shown_is_what_is_in_the_file_and_a_new_identity_does_not_ride_on_it(certified: Talking) -> None:
    """The connection is the old one, and so is what was shown on it; the next run's is not."""
    in_file = certified.certificate
    assert certified.hears(answers.REJECTED, answers.PENDING, answers.PENDING).status == 69
    shown = certified.asked[0].client_certificate
    assert shown and x509.load_der_x509_certificate(shown) == in_file
    assert certified.hears(answers.PENDING).status == 69
    assert certified.asked[0].client_certificate is None
    assert world.Snapshot.of(certified.key_file).mode == 0o600


@needs("nginx")
def test_a_server_that_wants_none_gets_none(signed: Talking, caramel: Caramel, pem: Path, tmp_path: Path) -> None:
    assert signed.run().status == 0
    with Nginx(tmp_path / "nginx", caramel, pem, verify_client=None) as front:
        signed.server = front.address
        assert signed.run().status == 0
        assert [(asked.verify, asked.status) for asked in front.seen()] == [("NONE", 200)]
