"""What scenarios share: one Caramel server with a TLS front, a device for each test, and two promises about the run.

In `make test-all` nothing is skipped: a skip is a failure. In `make test` what wasn't run is accounted for at the end
(see `needs.py`). And no test leaves a process behind.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import world
from needs import EVERYTHING, account, passed_before, require
from talking import Talking, server_of
from torture.fleet import Fleet
from world import Authority, Caramel, Device, Front, Nginx, any_front


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it puts in the background with these ignored, and so does nohup(1). The programs under test
    # would inherit that, and tests of signals would see nothing.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    # A key file in memory is said in each line. Debian 13 has its folder of temporary files there.
    with open("/proc/mounts") as mounts:
        if "TMPDIR" not in os.environ and any(line.split()[1:3] == ["/tmp", "tmpfs"] for line in mounts):
            os.environ["TMPDIR"], tempfile.tempdir = "/var/tmp", None
    world.adopt_orphans()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if EVERYTHING and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if EVERYTHING and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be skipped: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    before = passed_before()
    items[:] = [item for item in items if item.nodeid not in before]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of pytest-xdist's processes: the first one reports
        if "COVERAGE_PROCESS_START" in os.environ:
            save_coverage()
        return
    before = passed_before()
    if before:
        terminalreporter.section(
            f"{len(before)} tests have passed in `make test` just before, and were not run again"
        )
    elif "CARAMEL_TESTS_PASSED" in os.environ:
        names = {report.nodeid for report in terminalreporter.stats.get("passed", [])}
        names -= {report.nodeid for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, [])}
        Path(os.environ["CARAMEL_TESTS_PASSED"]).write_text("".join(f"{name}\n" for name in sorted(names)))
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        reasons = [
            str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr) for report in skipped
        ]
        known = sum(len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "failed", "error", "skipped"))
        terminalreporter.section(f"{len(skipped)} of {known} tests were not run")
        terminalreporter.write("".join(f"{line}\n" for line in account(reasons)))
    if "COVERAGE_PROCESS_START" in os.environ:
        terminalreporter.section("lines of the program that no run and no unit reached")
        terminalreporter.write(covered())


def save_coverage() -> None:
    """What was covered in this process becomes a file beside those of the command's runs."""
    import coverage

    here = coverage.Coverage.current()
    if here:
        here.stop()
        here.save()


def covered() -> str:
    """The coverage report on the tests' processes and all runs of the command so far."""
    import coverage

    save_coverage()
    report = io.StringIO()
    everything = coverage.Coverage(
        data_file=os.environ["COVERAGE_FILE"], config_file=os.environ["COVERAGE_PROCESS_START"]
    )
    try:
        everything.combine()
        everything.report(file=report)
    except coverage.CoverageException as error:
        report.write(f"{error}\n")
    return report.getvalue()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which a process is still running that belongs to no server of this world."""
    world.forget_false_clocks()
    yield
    deadline = time.monotonic() + 2
    left = world.strays()
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = world.strays()
    for process, _ in left:
        os.kill(process, signal.SIGKILL)
    assert not left, f"processes left behind: {left}"


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def caramel(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[Caramel]:
    """The Caramel server that most scenarios share: each uses client IDs of its own."""
    with Caramel(tmp_path_factory.mktemp("caramel"), authority) as server:
        yield server


@pytest.fixture(scope="session")
def front(tmp_path_factory: pytest.TempPathFactory, caramel: Caramel) -> Iterator[Front]:
    """What stands in front of it, as the interface expects it: client certificates are welcome, but optional."""
    with any_front(tmp_path_factory.mktemp("front"), caramel, caramel.authority.server()) as server:
        yield server


@pytest.fixture(scope="session")
def nginx(front: Front) -> Nginx:
    """The same, for tests of what nginx does."""
    require("nginx")
    assert isinstance(front, Nginx)
    return front


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory, authority: Authority, caramel: Caramel, front: Front) -> Fleet:
    """Devices of any owner, with all that is done to them."""
    require("mounts", "strace", "faketime", "e2fsprogs", "iproute2")
    return Fleet.around(tmp_path_factory.mktemp("fleet"), authority, caramel, front)


@pytest.fixture
def device(tmp_path: Path, front: Front, authority: Authority, request: pytest.FixtureRequest) -> Device:
    """A new device with nothing on its disk and a client ID that no other test uses."""
    unique = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:10]
    return Device(tmp_path / "device", front.address, authority.certificate_file, f"fe{unique}")


@pytest.fixture(scope="session")
def pem(authority: Authority) -> Path:
    """A server's certificate and key."""
    return server_of(authority)


@pytest.fixture
def new(tmp_path: Path, authority: Authority) -> Talking:
    """A device with nothing on its disk, whose server says what the test wants."""
    return Talking(tmp_path / "device", authority)


@pytest.fixture
def pending(new: Talking) -> Talking:
    """The same, whose request was sent in an earlier run."""
    new.pending()
    return new


@pytest.fixture
def certified(new: Talking) -> Talking:
    """The same, with a certificate that is good for another two days."""
    new.certified()
    return new


@pytest.fixture(params=["pending", "certified"])
def enrolled(request: pytest.FixtureRequest) -> Talking:
    """Either of these two."""
    return cast(Talking, request.getfixturevalue(request.param))
