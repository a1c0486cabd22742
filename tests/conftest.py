"""What scenarios share: one Caramel server with nginx in front, a device for each test, and two promises
about the run.

Where `CARAMEL_TESTS_NO_SKIP` is set, as in CI, nothing is skipped: a skip is a failure. And no test leaves
a process behind.
"""

from __future__ import annotations

import hashlib
import io
import os
import signal
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import world
from world import Authority, Caramel, Device, Nginx

NO_SKIP = os.environ.get("CARAMEL_TESTS_NO_SKIP", "") not in ("", "0")


def pytest_configure(config: pytest.Config) -> None:
    world.adopt_orphans()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if NO_SKIP and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if NO_SKIP and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be skipped: {report.longrepr}"
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section(f"{len(skipped)} skipped")
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.write_line(f"{report.nodeid}: {reason}")
    if "COVERAGE_PROCESS_START" in os.environ:
        terminalreporter.section("lines of the program that no run and no unit reached")
        terminalreporter.write(covered())


def covered() -> str:
    """The coverage report on this process and all runs of the command so far."""
    import coverage

    here = coverage.Coverage.current()
    if here:
        here.stop()
        here.save()
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
def front(tmp_path_factory: pytest.TempPathFactory, caramel: Caramel) -> Iterator[Nginx]:
    """nginx in front of it, as the interface expects it: client certificates are welcome, but optional."""
    if not Nginx.program():
        pytest.skip("nginx is not installed")
    with Nginx(tmp_path_factory.mktemp("nginx"), caramel, caramel.authority.server()) as server:
        yield server


@pytest.fixture
def device(tmp_path: Path, front: Nginx, authority: Authority, request: pytest.FixtureRequest) -> Device:
    """A new device with nothing on its disk and a client ID that no other test uses."""
    unique = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:10]
    return Device(tmp_path / "device", front.address, authority.certificate_file, f"fe{unique}")
