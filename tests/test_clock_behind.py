"""A clock that is behind: by a few seconds, by a month in a warehouse, or since 1970."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import world
from needs import require
from world import Authority, Device, Scripted, answers, hours, now

ID = "fffbeec0ffee"

#: The program as a package that no firmware's build time was baked into: nothing tells it what time it must be.
UNBAKED = [
    str(Path(world.COMMAND).parent / "python"),
    "-I",
    "-c",
    "import sys\nfrom caramel_embedded import settings\nfrom caramel_embedded.__main__ import main\n"
    "settings.baked = lambda name: None\nmain(sys.argv[1:])",
]
FIRST_BOOT = "1970-01-01 00:00:10"


def clock(text: str) -> Sequence[str]:
    require("faketime")
    return ["env", "TZ=UTC", "faketime", "--exclude-monotonic", text]


def at(moment: world.Moment) -> Sequence[str]:
    return clock(moment.strftime("%Y-%m-%d %H:%M:%S"))


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="behind.pem")


@pytest.fixture
def device(tmp_path: Path, authority: Authority) -> Device:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID, command=UNBAKED)
    device.has(authority.identity(ID, certified=False))
    return device


@pytest.mark.parametrize("ahead", [2, 600, 23 * 3600])
def test_a_certificate_that_has_not_begun_by_our_clock_is_taken(
    device: Device, pem: Path, authority: Authority, ahead: int
) -> None:
    leaf = authority.sign(device.request, not_before=now() + hours(ahead / 3600), not_after=now() + hours(48))
    for _ in range(2):
        with Scripted(pem, [answers.certificate(leaf)]) as server:
            device.server = server.address
            run = device.run()
        assert run.status == 0, run.err


@pytest.mark.parametrize("days", [1, 20, 300])
def test_a_saved_clock_that_is_behind_costs_nothing(
    device: Device, authority: Authority, tmp_path: Path, days: int
) -> None:
    """The CA is old, nothing in the file tells a later time, and the server's certificate is of today."""
    old = Authority(tmp_path / "old", not_before=now() - hours(24 * 400))
    device.ca = old.certificate_file
    device.has(old.identity(ID, certified=False))
    leaf = old.sign(device.request, not_before=now() - hours(1))
    with Scripted(old.server(not_before=now() - hours(1)), [answers.certificate(leaf)]) as server:
        device.server = server.address
        run = device.run(before=at(now() - hours(24 * days)))
    assert (run.status, device.certificate is not None) == (0, True), run.err


def test_a_clock_that_is_behind_makes_nothing_good_that_has_ended(
    device: Device, authority: Authority, tmp_path: Path
) -> None:
    old = Authority(tmp_path / "old", not_before=now() - hours(24 * 400))
    device.ca = old.certificate_file
    device.has(old.identity(ID, certified=False))
    pem = old.server(not_before=now() - hours(24 * 35), not_after=now() - hours(24 * 33))
    with Scripted(pem, [answers.PENDING]) as server:
        device.server = server.address
        behind = device.run(before=at(now() - hours(24 * 34)))
        assert behind.status == 69, "by that clock it is good"
        assert device.run(before=at(now() - hours(24 * 20))).status == 127


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("ended", [False, True])
def test_an_intermediate_of_the_server_is_looked_at_too(tmp_path: Path, ended: bool, newest: ssl.TLSVersion) -> None:
    """In 1970 OpenSSL looks at no dates; what ended before the floor is refused, wherever it stands in the chain. And
    where the server demands a client certificate, under TLS 1.2 too."""
    root = Authority(tmp_path / "root", not_before=now() - hours(24 * 400), path_length=None)
    end = now() - hours(24 * 399) + hours(5) if ended else now() + hours(24)
    below, text = root.intermediate("Server CA", not_before=now() - hours(24 * 399), not_after=end)
    pem = below.server(not_before=now() - hours(1), file="below.pem")
    content = pem.read_bytes()
    split = content.index(b"-----BEGIN PRIVATE")
    pem.write_bytes(content[:split] + text + content[split:])
    device = Device(tmp_path / "device", None, root.certificate_file, ID, command=UNBAKED)
    # The certificate in the file tells the time: today's.
    device.has(root.identity(ID, not_before=now() - hours(2)))
    demands: dict[str, Any] = {"client_ca": root.certificate_file, "demand": True, "newest_tls": newest}
    with Scripted(pem, [answers.PENDING], **demands) as server:
        device.server = server.address
        run = device.run(before=clock(FIRST_BOOT))
    assert run.status == (127 if ended else 69), run.err
    assert ("trusted CA" in run.err) == ended, run.err


def test_a_server_whose_clock_was_ahead_strands_nobody(device: Device, pem: Path, authority: Authority) -> None:
    """It signed for a time at which its own certificate will have ended: as a floor, that would lock us out."""
    before = device.snapshot()
    leaf = authority.sign(device.request, not_before=now() + hours(24 * 30), not_after=now() + hours(24 * 32))
    with Scripted(pem, [answers.certificate(leaf)]) as server:
        device.server = server.address
        run = device.run(before=clock(FIRST_BOOT))
        assert (run.status, "clock is ahead" in run.err) == (127, True), run.err
        assert device.run().status == 127
    assert device.snapshot() == before


def test_in_1970_a_device_lives(device: Device, pem: Path, authority: Authority) -> None:
    leaf = authority.sign(device.request, not_before=now() - hours(1))
    for says in ([answers.PENDING], [answers.certificate(leaf)], [answers.certificate(leaf)]):
        with Scripted(pem, says, client_ca=authority.certificate_file) as server:
            device.server = server.address
            run = device.run(before=clock(FIRST_BOOT))
        assert run.status in (0, 69) and run.err.count("\n") == 1, run.err
    assert server.requests[0].client_certificate is not None


@pytest.mark.parametrize("path", ["/usr/lib/clock-epoch", "/var/lib/systemd/timesync/clock"])
@pytest.mark.parametrize("told", [True, False])
def test_times_that_systemd_knows_to_have_passed(
    device: Device, authority: Authority, tmp_path: Path, path: str, told: bool
) -> None:
    """A server's certificate that ended last week, in 1970, under an old CA."""
    require("mounts")
    old = Authority(tmp_path / "old", not_before=now() - hours(24 * 400))
    device.ca = old.certificate_file
    device.has(old.identity(ID, certified=False))
    pem = old.server(not_before=now() - hours(24 * 35), not_after=now() - hours(24 * 7))
    passed = now() - hours(1 if told else 24 * 30)
    top = path[: path.index("/", 5)]  # what is new there is in memory, and gone with the run
    layers = f"lowerdir={top},upperdir={tmp_path}/layer/upper,workdir={tmp_path}/layer/work"
    script = (
        f"set -e; mkdir {tmp_path}/layer; mount -t tmpfs none {tmp_path}/layer; "
        f"mkdir {tmp_path}/layer/upper {tmp_path}/layer/work; "
        f"mount -t overlay none -o {layers} {top}; mkdir -p ${{1%/*}}; touch -d @{passed.timestamp():.0f} $1; "
        'shift; exec "$@"'
    )
    with Scripted(pem, [answers.PENDING]) as server:
        device.server = server.address
        run = device.run(before=["unshare", "-m", "sh", "-c", script, "sh", path, *clock(FIRST_BOOT)])
    assert run.status == (127 if told else 69), run.err


@pytest.mark.parametrize("first", ["", FIRST_BOOT])
def test_a_year_offline_then_one_run(tmp_path: Path, first: str) -> None:
    """Meanwhile the certificate, the CA between and the server's certificate have ended. Also in 1970."""
    root = Authority(tmp_path / "root", not_before=now() - hours(24 * 800), path_length=None)
    year = {"not_before": now() - hours(24 * 400), "not_after": now() - hours(24 * 20)}
    device = Device(tmp_path / "device", None, root.certificate_file, ID, command=UNBAKED)
    old, old_text = root.intermediate("Device CA of last year", **year)
    device.has(root.identity(ID, certified=False))
    key, request = (block for _, block in device.blocks())
    device.has(key + old.sign(device.request, **year) + old_text + request)
    below, text = root.intermediate("CA of this year", not_before=now() - hours(24))
    pem = below.server(not_before=now() - hours(1), file="below.pem")
    content = pem.read_bytes()
    split = content.index(b"-----BEGIN PRIVATE")
    pem.write_bytes(content[:split] + text + content[split:])
    chain = below.sign(device.request, not_before=now() - hours(1)) + text
    with Scripted(pem, [answers.certificate(chain)], client_ca=root.certificate_file) as server:
        device.server = server.address
        run = device.run(before=clock(first) if first else ())
        assert (run.status, "new certificate" in run.err) == (0, True), run.err
        assert device.run(before=clock(first) if first else ()).status == 0


def test_a_clock_that_is_after_the_cas_end_is_named(device: Device, pem: Path, authority: Authority) -> None:
    """Nothing is lost by it, and the next run with a right clock goes on."""
    device.has(authority.identity(ID, not_before=now() - hours(1)))
    before = device.snapshot()
    with Scripted(pem, [answers.PENDING]) as server:
        device.server = server.address
        run = device.run(before=clock("2080-01-01 00:00:00"))
        assert (run.status, "the clock is far ahead" in run.err, "2080-01-01" in run.err) == (127, True, True), (
            run.err
        )
        assert device.snapshot() == before
        status = device.run("--status", before=clock("2080-01-01 00:00:00"))
        assert "the clock is after the end of the trusted CA" in status.out, status.out
        assert device.run().status == 69
    assert "the clock is" not in device.run("--status").out
