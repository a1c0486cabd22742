"""A sample of what `make torture` does in full: power cuts, I/O errors, many starts at the same instant, and networks
and servers that are slow, silent, broken, wrong or lying.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import world
from needs import needs, require, slow
from torture import chips, concurrency, disk, network, power, report
from torture.fleet import Fleet
from torture.network import Stage

SCENARIOS = (
    "first enrollment", "first certificate", "renewal", "renewal with a hook", "rejection", "clean-up of a bad file",
)  # fmt: skip


def in_short(quick: str) -> list[Any]:
    """All scenarios, and for `make test` one of them."""
    return [pytest.param(scenario, marks=() if scenario == quick else slow) for scenario in SCENARIOS]


def survived(cases: Iterable[Any], workers: int = report.WORKERS) -> int:
    """How many cases there were, of which none lost anything."""
    row = report.tried("", cases, workers)
    assert not row.lost, "\n".join(row.lost)
    return row.cases


@pytest.mark.parametrize("scenario", in_short("renewal"))
def test_a_power_cut_at_any_system_call_costs_nothing(fleet: Fleet, scenario: str) -> None:
    assert survived(report.sample(power.cuts(fleet, scenario, 4), 8)) == 8


@pytest.mark.parametrize("scenario", in_short("first enrollment"))
def test_a_system_call_that_fails_costs_nothing(fleet: Fleet, scenario: str) -> None:
    assert survived(report.sample(power.errors(fleet, scenario, 6), 5)) == 5


@slow
@needs("trixie")
@pytest.mark.parametrize("scenario", ["first enrollment", "renewal"])
def test_a_power_cut_with_a_key_in_a_tpm_costs_nothing(fleet: Fleet, tmp_path: Path, scenario: str) -> None:
    assert survived(report.sample(chips.cuts(chips.Lives(fleet, tmp_path), scenario, 3), 3)) == 3


@slow
@needs("trixie")
def test_a_tpm_that_fails_at_any_point_of_a_life_costs_nothing(fleet: Fleet, tmp_path: Path) -> None:
    assert survived(report.sample(chips.misfortunes(chips.Lives(fleet, tmp_path)), 7)) == 7


def test_content_is_flushed_before_it_gets_the_name_and_the_folder_after(fleet: Fleet) -> None:
    states: dict[str, int] = {}
    survived(disk.cases(fleet, states))
    assert set(states) == set(SCENARIOS) and min(states.values()) > 1000


# --- Networks and servers ---

#: By topic: what is done with the system's tools.
TOPICS: dict[str, tuple[str, ...]] = {
    "a proxy's statuses": (),
    "application": (),
    "redirects": (),
    "headers and bodies": (),
    "without end": (),
    "slow and silent": (),
    "name look-up": ("mounts", "iproute2", "strace"),
    "each field wrong": (),
    "break at each request": (),
    "others' words": (),
    "down": ("strace",),
}
SLOW = ("slow and silent", "break at each request")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.mark.parametrize("topic", [pytest.param(topic, marks=slow if topic in SLOW else ()) for topic in TOPICS])
def test_no_server_costs_a_device_anything(stage: Stage, topic: str) -> None:
    require(*TOPICS[topic])
    ((_, cases),) = [(name, cases) for name, cases in network.everything(stage, full=False).items() if topic in name]
    assert survived(cases) >= 3


@slow
def test_every_status_to_get_and_to_post_stores_nothing(stage: Stage) -> None:
    assert survived([network.every_status(stage, range(100, 600, 3))])


@pytest.mark.parametrize("reset", [False, True])
def test_an_answer_that_stops_at_any_byte_stores_nothing(stage: Stage, reset: bool) -> None:
    assert survived([network.every_byte(stage, reset, step=23)])


def test_a_certificate_for_another_is_never_stored(stage: Stage) -> None:
    """All that can be wrong with a certificate, on a device that waits for its first."""
    cases = [case for case in network.certificates(stage) if case.name.startswith("pending")]
    assert survived(report.sample(cases, 14)) == 14


# --- Many at once ---


@slow
def test_many_starts_at_once_make_one_key_and_one_request_and_readers_see_whole_files(fleet: Fleet) -> None:
    counts: Counter[str] = Counter()
    survived(concurrency.cases(fleet, 40, counts), workers=1)
    assert counts["starts"] == 160 and counts["reads"] > 200


@slow
def test_a_run_that_opened_the_file_just_before_another_replaced_it_looks_again(fleet: Fleet) -> None:
    """Between open and flock the whole life of another run fits in, which makes and posts a new key."""
    dut = fleet.rejection()
    # The call is held up before it is made: strace(1), delay_enter, microseconds.
    late_lock = ("strace", "-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:delay_enter=4000000:when=1")
    installed, dut.device.command = dut.device.command, list(world.WITHOUT_STARTER)
    process = dut.device.start(*dut.options, before=late_lock)
    dut.device.command = installed
    world.until("the file is open", lambda: _opened_by_child(process.pid, dut.device.key_file))
    quick = dut.run()
    assert quick.status == 69, quick
    content = dut.content
    late = dut.device.finish(process)
    assert late.status in (1, 69), late
    assert dut.content == content
    assert len(fleet.requests(dut.client_id)) == 1
    assert fleet.broken(dut, late) + fleet.recovered(dut) == []


def _opened_by_child(parent: int, path: Path) -> bool:
    """Whether a child of the process has the file open."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        for descriptor in Path(f"/proc/{child}/fd").iterdir():
            try:
                if descriptor.readlink() == path:
                    return True
            except OSError:
                continue
    return False


# --- The judge ---


def test_the_harness_sees_a_content_that_is_not_flushed(tmp_path: Path) -> None:
    """The model of the disk can fail: no fsync before the rename, none of the folder, a mode that comes late."""
    path = tmp_path / "identity.pem"
    draft = f'"{tmp_path}/draft", O_RDWR|O_CREAT|O_EXCL'
    made = [("openat", f"AT_FDCWD, {draft}, 0600", 4), ("write", '4, ""..., 9', 9)]
    flush, named = [("fsync", "4", 0)], [("rename", f'"{tmp_path}/draft", "{path}"', 0)]
    folder = [("openat", f'AT_FDCWD, "{tmp_path}", O_RDONLY|O_DIRECTORY', 5), ("fsync", "5", 0)]
    tell = [("sendto", '6, "", 5', 5)]
    mode = [("fchmod", "4, 0640", 0)]

    def verdict(*steps: list[tuple[str, str, int]], fat: bool = False) -> list[str]:
        model = disk.Disk(str(path), None, fat=fat)
        for step in steps:
            for call, rest, result in step:
                model.replay(call, rest, result)
        model.end()
        return model.wrong

    assert verdict(made, flush, named, folder, tell) == []
    assert any("before the content" in wrong for wrong in verdict(made, named, folder, tell))
    assert any("before the folder" in wrong for wrong in verdict(made, flush, named, tell))
    assert any("after the first byte" in wrong for wrong in verdict(made, mode, flush, named, folder))
    assert any("before its owner" in wrong for wrong in verdict(made, flush, mode, named, folder))

    # FAT: a renamed file's slot is flushed with the file, once its old slot is gone.
    assert any("slot was flushed" in wrong for wrong in verdict(made, flush, named, folder, tell, fat=True))
    assert any("two slots" in wrong for wrong in verdict(made, flush, named, flush, folder, tell, fat=True))
    assert verdict(made, flush, named, folder, flush, tell, fat=True) == []
