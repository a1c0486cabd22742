"""Networks and servers that are slow, silent, broken, wrong or lying: a sample of what `make torture` does."""

from __future__ import annotations

import pytest
from needs import require, slow
from torture import network, report
from torture.network import Stage

TOPICS = (
    "a proxy's statuses", "application", "redirects", "headers and bodies", "without end", "slow and silent",
    "name look-up", "each field wrong", "break at each request", "others' words", "down",
)  # fmt: skip
#: By topic: what is done with the system's tools.
NEEDED = {"name look-up": ("mounts", "iproute2", "strace"), "down": ("strace",)}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.parametrize(
    "topic",
    [
        pytest.param(topic, marks=slow) if topic in ("slow and silent", "break at each request") else topic
        for topic in TOPICS
    ],
)
def test_no_server_costs_a_device_anything(stage: Stage, topic: str) -> None:
    require(*NEEDED.get(topic, ()))
    ((_, cases),) = [(name, cases) for name, cases in network.everything(stage, full=False).items() if topic in name]
    row = report.tried(topic, cases)
    assert not row.lost, "\n".join(row.lost)
    assert row.cases >= 3


@slow
def test_every_status_to_get_and_to_post_stores_nothing(stage: Stage) -> None:
    row = report.tried("", [network.every_status(stage, range(100, 600, 3))])
    assert not row.lost, "\n".join(row.lost)


@pytest.mark.parametrize("reset", [False, True])
def test_an_answer_that_stops_at_any_byte_stores_nothing(stage: Stage, reset: bool) -> None:
    row = report.tried("", [network.every_byte(stage, reset, step=23)])
    assert not row.lost, "\n".join(row.lost)


def test_a_certificate_for_another_is_never_stored(stage: Stage) -> None:
    """All that can be wrong with a certificate, on a device that waits for its first."""
    cases = [case for case in network.certificates(stage) if case.name.startswith("pending")]
    row = report.tried("", report.sample(cases, 14))
    assert not row.lost, "\n".join(row.lost)
