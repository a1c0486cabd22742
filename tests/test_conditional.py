"""Conditional GET: the body is spared where the server knows Last-Modified and 304, as Caramel doesn't."""

from __future__ import annotations

import calendar
import datetime
import email.utils
import os
import tempfile
from pathlib import Path

import pytest
from needs import needs
from talking import Talking
from world import Authority, Caramel, Device, Front, Nginx, answers, hours, now


def seconds(moment: datetime.datetime) -> int:
    return calendar.timegm(moment.utctimetuple())


def http_date(moment: datetime.datetime) -> str:
    return email.utils.format_datetime(moment.astimezone(datetime.timezone.utc), usegmt=True)


def asked_since(device: Talking) -> str:
    """What the device says in If-Modified-Since in one run against a server that has nothing for it."""
    assert device.hears(answers.PENDING).status == 69
    return device.asked[0].if_modified_since


@needs("nginx")
def test_a_server_that_knows_304(tmp_path: Path, device: Device, caramel: Caramel, authority: Authority) -> None:
    """A real nginx with certificates as files, and Caramel behind it for all others."""
    folder = tmp_path / "static"
    folder.mkdir()
    with Nginx(tmp_path / "nginx", caramel, authority.server(), static=folder) as front:
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
    certificate, before = device.certificate, device.snapshot()
    with front.watched() as seen:
        assert device.run().status == 0
    assert certificate
    began = http_date(certificate.not_valid_before_utc)
    assert [(asked.status, asked.if_modified_since) for asked in seen] == [(200, began)]
    assert device.snapshot() == before


def test_the_files_time_is_what_is_asked_for(certified: Talking) -> None:
    moment = now() - hours(7)
    os.utime(certified.key_file, (0, moment.timestamp()))
    assert asked_since(certified) == http_date(moment)


@pytest.mark.parametrize(("age", "left", "asked"), [(31, 17, True), (33, 15, False), (1, 47, True), (47, 1, False)])
def test_the_last_third_of_a_certificates_life_is_for_its_successor(
    new: Talking, age: int, left: int, asked: bool
) -> None:
    """A server whose clock or file times are wrong must not be able to let the certificate run out."""
    new.certified(not_before=now() - hours(age), not_after=now() + hours(left))
    assert bool(asked_since(new)) == asked


@pytest.mark.parametrize("life", ["pending", "expired"])
def test_without_a_usable_certificate_nothing_is_conditional(new: Talking, life: str) -> None:
    new.pending() if life == "pending" else new.certified(not_after=now() - hours(1))
    assert not asked_since(new)


def test_only_the_get_is_conditional(certified: Talking) -> None:
    certified.enrolls()
    assert [bool(asked.if_modified_since) for asked in certified.asked] == [True, False, False]


#: No good dates.
HEADERS = [
    "",
    *("Last-Modified: yesterday", "Last-Modified:", "Last-Modified: -1", "Last-Modified: 0"),
    *("Last-Modified: Thu, 99 Foo 2026 00:00:00 GMT", "Last-Modified: Thu, 01 Jan 99999 00:00:00 GMT"),
]


@pytest.mark.parametrize("header", HEADERS)
def test_without_a_good_last_modified_the_certificates_own_time_counts(certified: Talking, header: str) -> None:
    begun = now() - hours(5)
    fresh = certified.signed(not_before=begun)
    assert certified.hears(answers.certificate(fresh, *filter(None, [header]))).status == 0
    assert certified.key_file.stat().st_mtime_ns == seconds(begun) * 10**9
    assert asked_since(certified) == http_date(begun)


DATES = ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]


@pytest.mark.parametrize("date", DATES)
def test_a_date_may_have_any_of_https_forms(certified: Talking, date: str) -> None:
    """RFC 9110, 5.6.7: all three are to be understood, and the time zone of the device has no part in it."""
    fresh = answers.certificate(certified.signed(not_before=now() - hours(5)), f"Last-Modified: {date}")
    assert certified.hears(fresh, env={"TZ": "Pacific/Kiritimati"}).status == 0
    assert certified.key_file.stat().st_mtime == 784111777


@pytest.mark.parametrize("date", ["Fri, 31 Dec 9999 23:59:59 GMT", "Sat, 01 Jan 12000 00:00:00 GMT"])
def test_a_date_at_the_end_of_time(pending: Talking, date: str) -> None:
    assert pending.hears(answers.certificate(pending.signed(), f"Last-Modified: {date}")).status == 0
    pending.keeps(answers.PENDING, status=69)


def test_a_file_time_past_the_year_9999(new: Talking) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # an ext4 has no such times
        new.key_file = Path(folder) / "identity.pem"
        new.certified()
        os.utime(new.key_file, (300_000_000_000, 300_000_000_000))
        assert new.key_file.stat().st_mtime == 300_000_000_000
        run = new.hears(answers.certificate(new.block("CERTIFICATE") or b""))
    assert run.status == 0, run.err
    assert new.asked[0].if_modified_since == ""


def test_the_same_certificate_with_another_time_changes_nothing(certified: Talking) -> None:
    """Flash wears: a server behind a load balancer may name another time with each answer."""
    same = answers.certificate(certified.block("CERTIFICATE") or b"", f"Last-Modified: {http_date(now())}")
    certified.keeps(same, status=0)
