"""Conditional GET: the body is spared where the server knows Last-Modified and 304, as Caramel doesn't."""

from __future__ import annotations

import calendar
import datetime
import email.utils
import os
from pathlib import Path
from typing import Optional

import pytest
from needs import needs
from world import Authority, Caramel, Device, Front, Nginx, Scripted, answers, hours, now

ID = "fffbeec0ffee"


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="conditional.pem")


@pytest.fixture
def certified(tmp_path: Path, authority: Authority) -> Device:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    device.has(authority.identity(ID, not_before=now() - hours(1)))
    return device


def seconds(moment: datetime.datetime) -> int:
    return calendar.timegm(moment.utctimetuple())


def http_date(moment: datetime.datetime) -> str:
    return email.utils.format_datetime(moment.astimezone(datetime.timezone.utc), usegmt=True)


def asked_since(device: Device, pem: Path) -> Optional[str]:
    """What the device says in If-Modified-Since in one run against a server that has nothing for it."""
    with Scripted(pem, [answers.PENDING]) as server:
        device.server = server.address
        assert device.run().status == 69
    assert len(server.requests) == 1
    return server.requests[0].if_modified_since or None


@needs("nginx")
def test_a_server_that_knows_304(
    tmp_path: Path, device: Device, caramel: Caramel, authority: Authority, pem: Path
) -> None:
    """A real nginx with certificates as files, and Caramel behind it for all others."""
    folder = tmp_path / "static"
    folder.mkdir()
    with Nginx(tmp_path / "nginx", caramel, pem, static=folder) as front:
        device.server = front.address
        assert device.run().status == 69

        # The file's time is the server's word for it, and neither the certificate's nor the clock's.
        signed = now() - hours(2)
        front.publish(device.request_hash(), authority.sign(device.request, not_before=now() - hours(3)), signed)
        assert device.run().status == 0
        certified = device.snapshot()
        assert certified and certified.mtime_ns == seconds(signed) * 10**9

        with front.watched() as seen:
            assert device.run().status == 0
        assert [(asked.status, asked.if_modified_since) for asked in seen] == [(304, http_date(signed))]
        assert device.snapshot() == certified

        newer = authority.sign(device.request, not_before=now() - hours(1), not_after=now() + hours(50))
        front.publish(device.request_hash(), newer, now() - hours(1))
        with front.watched() as seen:
            assert device.run().status == 0
        assert [asked.status for asked in seen] == [200]
        assert device.block("CERTIFICATE") == newer


def test_caramel_itself_is_asked_the_same_and_answers_with_the_body(
    device: Device, caramel: Caramel, front: Front
) -> None:
    assert device.run().status == 69
    caramel.sign(str(device.client_id))
    assert device.run().status == 0
    certificate = device.certificate
    before = device.snapshot()
    with front.watched() as seen:
        assert device.run().status == 0
    assert certificate
    assert [(asked.status, asked.if_modified_since) for asked in seen] == [
        (200, http_date(certificate.not_valid_before_utc))
    ]
    assert device.snapshot() == before


def test_the_files_time_is_what_is_asked_for(certified: Device, pem: Path) -> None:
    moment = now() - hours(7)
    os.utime(certified.key_file, (0, moment.timestamp()))
    assert asked_since(certified, pem) == http_date(moment)


@pytest.mark.parametrize(
    "age, left, asked",
    [(31, 17, True), (33, 15, False), (1, 47, True), (47, 1, False)],
)
def test_the_last_third_of_a_certificates_life_is_for_its_successor(
    certified: Device, authority: Authority, pem: Path, age: int, left: int, asked: bool
) -> None:
    """A server whose clock or file times are wrong must not be able to let the certificate run out."""
    certified.has(authority.identity(ID, not_before=now() - hours(age), not_after=now() + hours(left)))
    assert bool(asked_since(certified, pem)) == asked


def test_without_a_certificate_nothing_is_conditional(certified: Device, authority: Authority, pem: Path) -> None:
    certified.has(authority.identity(ID, certified=False))
    assert asked_since(certified, pem) is None


def test_with_an_unusable_certificate_nothing_is_conditional(
    certified: Device, authority: Authority, pem: Path
) -> None:
    certified.has(authority.identity(ID, not_after=now() - hours(1)))
    assert asked_since(certified, pem) is None


def test_only_the_get_is_conditional(certified: Device, pem: Path) -> None:
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        certified.server = server.address
        assert certified.run().status == 69
    assert [bool(asked.if_modified_since) for asked in server.requests] == [True, False, False]


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Last-Modified: yesterday",
        "Last-Modified:",
        "Last-Modified: Thu, 99 Foo 2026 00:00:00 GMT",
        "Last-Modified: Thu, 01 Jan 99999 00:00:00 GMT",
        "Last-Modified: -1",
        "Last-Modified: 0",
    ],
)
def test_without_a_good_last_modified_the_certificates_own_time_counts(
    certified: Device, authority: Authority, pem: Path, header: Optional[str]
) -> None:
    begun = now() - hours(5)
    fresh = authority.sign(certified.request, not_before=begun)
    with Scripted(pem, [answers.certificate(fresh, *([header] if header else []))]) as server:
        certified.server = server.address
        assert certified.run().status == 0
    assert certified.key_file.stat().st_mtime_ns == seconds(begun) * 10**9
    assert asked_since(certified, pem) == http_date(begun)


@pytest.mark.parametrize(
    "date, moment",
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", datetime.datetime(1994, 11, 6, 8, 49, 37, tzinfo=datetime.timezone.utc)),
        ("Sunday, 06-Nov-94 08:49:37 GMT", datetime.datetime(1994, 11, 6, 8, 49, 37, tzinfo=datetime.timezone.utc)),
        ("Sun Nov  6 08:49:37 1994", datetime.datetime(1994, 11, 6, 8, 49, 37, tzinfo=datetime.timezone.utc)),
    ],
)
def test_a_date_may_have_any_of_https_forms(
    certified: Device, authority: Authority, pem: Path, date: str, moment: datetime.datetime
) -> None:
    """RFC 9110, 5.6.7: all three are to be understood, and the time zone of the device has no part in it."""
    fresh = authority.sign(certified.request, not_before=now() - hours(5))
    with Scripted(pem, [answers.certificate(fresh, f"Last-Modified: {date}")]) as server:
        certified.server = server.address
        assert certified.run(env={"TZ": "Pacific/Kiritimati"}).status == 0
    assert certified.key_file.stat().st_mtime == moment.timestamp()


def test_the_same_certificate_with_another_time_changes_nothing(certified: Device, pem: Path) -> None:
    """Flash wears: a server behind a load balancer may name another time with each answer."""
    before = certified.snapshot()
    same = answers.certificate(certified.block("CERTIFICATE") or b"", f"Last-Modified: {http_date(now())}")
    with Scripted(pem, [same]) as server:
        certified.server = server.address
        assert certified.run().status == 0
    assert certified.snapshot() == before
