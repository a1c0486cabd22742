"""Clocks: behind by seconds, by a month in a warehouse, or since 1970; ahead; 2080; and jumps during the run."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from needs import require, slow
from talking import Talking
from torture import clocks, report
from torture.fleet import Fleet
from world import Authority, answers, hours, now

#: A package that no firmware's build time was baked into: nothing tells the program what time it must be.
UNBAKED = "from caramel_embedded import settings\nsettings.baked = lambda name: None"
FIRST_BOOT = "1970-01-01 00:00:10"


#: Which clock, and how many of its cases at the most.
LONGER = [
    ("1970", 999),
    *((about, 6) for about in ("a day behind", "a day ahead", "slept for a year", "floor", "jumps")),
]


@pytest.mark.parametrize(
    ("about", "most"), [("1970", 6), ("2080", 6), *(pytest.param(*longer, marks=slow) for longer in LONGER)]
)
def test_no_clock_costs_a_device_anything(fleet: Fleet, about: str, most: int) -> None:
    cases = [case for case in clocks.cases(fleet) if about in case.name]
    assert len(cases) >= 4
    row = report.tried(about, report.sample(cases, most))
    assert not row.lost, "\n".join(row.lost)


def clock(text: str) -> Sequence[str]:
    require("faketime")
    return ["env", "TZ=UTC", "faketime", "--exclude-monotonic", text]


def days_ago(days: int) -> Sequence[str]:
    return clock((now() - hours(24 * days)).strftime("%Y-%m-%d %H:%M:%S"))


@pytest.fixture
def device(pending: Talking) -> Talking:
    """Its request is at the server, and nothing tells what time it must be."""
    pending.changed(UNBAKED)
    return pending


@pytest.fixture
def old(tmp_path: Path) -> Talking:
    """The same, of a CA that is old: so nothing in the file tells a later time."""
    root = Authority(tmp_path / "old", not_before=now() - hours(24 * 800), path_length=None)
    device = Talking(tmp_path / "old-device", root)
    device.pending()
    device.changed(UNBAKED)
    return device


def chain_of_server(below: Authority, text: bytes) -> Path:
    """The server's certificate and key by an intermediate CA, whose own certificate stands behind it."""
    pem = below.server(not_before=now() - hours(1), file="below.pem")
    certificate, begin, key = pem.read_bytes().partition(b"-----BEGIN PRIVATE")
    pem.write_bytes(certificate + text + begin + key)
    return pem


@pytest.mark.parametrize("ahead", [2, 600, 23 * 3600])
def test_a_certificate_that_has_not_begun_by_our_clock_is_taken(device: Talking, ahead: int) -> None:
    leaf = device.signed(not_before=now() + hours(ahead / 3600), not_after=now() + hours(48))
    for _ in range(2):
        run = device.hears(answers.certificate(leaf))
        assert run.status == 0, run.err


@pytest.mark.parametrize("days", [1, 20, 300])
def test_a_saved_clock_that_is_behind_costs_nothing(old: Talking, days: int) -> None:
    """The server's certificate is of today."""
    today = old.authority.server(not_before=now() - hours(1))
    run = old.hears(answers.certificate(old.signed()), by=today, before=days_ago(days))
    assert (run.status, old.certificate is not None) == (0, True), run.err


def test_a_clock_that_is_behind_makes_nothing_good_that_has_ended(old: Talking) -> None:
    ended = old.authority.server(not_before=now() - hours(24 * 35), not_after=now() - hours(24 * 33))
    for days, status in ((34, 69), (20, 127)):  # by the first clock it is good
        assert old.hears(answers.PENDING, by=ended, before=days_ago(days)).status == status


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("ended", [False, True])
def test_an_intermediate_of_the_server_is_looked_at_too(old: Talking, ended: bool, newest: ssl.TLSVersion) -> None:
    """In 1970 OpenSSL looks at no dates; what ended before the floor is refused, wherever it stands in the chain. And
    where the server demands a client certificate, under TLS 1.2 too."""
    begun = now() - hours(24 * 399)
    end = begun + hours(5) if ended else now() + hours(24)
    pem = chain_of_server(*old.authority.intermediate("Server CA", not_before=begun, not_after=end))
    # The certificate in the file tells the time: today's.
    old.certified(not_before=now() - hours(2))
    demands: dict[str, Any] = {"demand": True, "newest_tls": newest}
    run = old.hears(answers.PENDING, by=pem, server=demands, before=clock(FIRST_BOOT))
    assert run.status == (127 if ended else 69), run.err
    assert ("trusted CA" in run.err) == ended, run.err


def test_a_server_whose_clock_was_ahead_strands_nobody(device: Talking) -> None:
    """It signed for a time at which its own certificate will have ended: as a floor, that would lock us out."""
    leaf = answers.certificate(device.signed(not_before=now() + hours(24 * 30), not_after=now() + hours(24 * 32)))
    run = device.keeps(leaf, before=clock(FIRST_BOOT))
    assert "clock is ahead" in run.err
    device.keeps(leaf)


def test_in_1970_a_device_lives(device: Talking) -> None:
    leaf = answers.certificate(device.signed())
    for says in (answers.PENDING, leaf, leaf):
        run = device.hears(says, before=clock(FIRST_BOOT))
        assert run.status in (0, 69) and run.err.count("\n") == 1, run.err
    assert device.asked[0].client_certificate is not None


@pytest.mark.parametrize("path", ["/usr/lib/clock-epoch", "/var/lib/systemd/timesync/clock"])
@pytest.mark.parametrize("told", [True, False])
def test_times_that_systemd_knows_to_have_passed(old: Talking, tmp_path: Path, path: str, told: bool) -> None:
    """A server's certificate that ended last week, in 1970, under an old CA."""
    require("mounts")
    pem = old.authority.server(not_before=now() - hours(24 * 35), not_after=now() - hours(24 * 7))
    passed = now() - hours(1 if told else 24 * 30)
    top = path[: path.index("/", 5)]  # what is new there is in memory, and gone with the run
    layers = f"lowerdir={top},upperdir={tmp_path}/layer/upper,workdir={tmp_path}/layer/work"
    script = (
        f"set -e; mkdir {tmp_path}/layer; mount -t tmpfs none {tmp_path}/layer; "
        f"mkdir {tmp_path}/layer/upper {tmp_path}/layer/work; "
        f"mount -t overlay none -o {layers} {top}; mkdir -p ${{1%/*}}; touch -d @{passed.timestamp():.0f} $1; "
        'shift; exec "$@"'
    )
    before = ["unshare", "-m", "sh", "-c", script, "sh", path, *clock(FIRST_BOOT)]
    run = old.hears(answers.PENDING, by=pem, before=before)
    assert run.status == (127 if told else 69), run.err


@pytest.mark.parametrize("first", ["", FIRST_BOOT])
def test_a_year_offline_then_one_run(old: Talking, first: str) -> None:
    """Meanwhile the certificate, the CA between and the server's certificate have ended. Also in 1970."""
    year = {"not_before": now() - hours(24 * 400), "not_after": now() - hours(24 * 20)}
    last, last_text = old.authority.intermediate("Device CA of last year", **year)
    key, request = (block for _, block in old.blocks())
    old.has(key + last.sign(old.request, **year) + last_text + request)
    below, text = old.authority.intermediate("CA of this year", not_before=now() - hours(24))
    pem = chain_of_server(below, text)
    chain = below.sign(old.request, not_before=now() - hours(1)) + text
    for said in ("new certificate", "unchanged"):
        run = old.hears(answers.certificate(chain), by=pem, before=clock(first) if first else ())
        assert run.status == 0 and said in run.err, run.err


def test_a_clock_that_is_after_the_cas_end_is_named(new: Talking) -> None:
    """Nothing is lost by it, and the next run with a right clock goes on."""
    new.certified()
    new.changed(UNBAKED)
    late = clock("2080-01-01 00:00:00")
    run = new.keeps(answers.PENDING, before=late)
    assert "the clock is far ahead" in run.err and "2080-01-01" in run.err
    status = new.run("--status", before=late)
    assert "the clock is after the end of the trusted CA" in status.out, status.out
    new.keeps(answers.PENDING, status=69)
    assert "the clock is" not in new.run("--status").out
