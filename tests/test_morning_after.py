"""The simulated morning after a power cut: held to the scripts that ship, and to what any such morning has to be."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Optional

import pytest
import world
from fleet import morning_server
from fleet.morning_model import CERTIFIED, FAILED, Machine, Morning, Scenario, simulate
from fleet.morning_pace import BUSYBOX, SYSTEMD, Pace, shipped
from needs import needs, slow

FILES = [
    "packaging/libexec/until-enrolled",
    "packaging/libexec/keep-enrolled",
    "packaging/systemd/caramel-embedded.service",
    "packaging/systemd/caramel-embedded-boot.timer",
    "packaging/systemd/caramel-embedded.timer",
    "caramel_embedded/settings.py",
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world.ROOT / name, tmp_path / name)
    return tmp_path


# --- The scripts are where the pauses come from ---


@pytest.mark.parametrize(
    ("kind", "name", "old", "new", "attribute", "value"),
    [
        (BUSYBOX, FILES[0], '"${RETRY_FIRST-}" 15', '"${RETRY_FIRST-}" 20', "first", 20),
        (BUSYBOX, FILES[0], "delay=$((most / 4))", "delay=$((most / 2))", "unhurried", 1800),
        (
            BUSYBOX,
            FILES[0],
            '$((1 + $(random "$((2 * delay))" "$id")))',
            '$((delay + $(random "$delay" "$id")))',
            "chance",
            "rest",
        ),
        (BUSYBOX, FILES[0], "60 ]; then\n\t\tmost_wait=60", "90 ]; then\n\t\tmost_wait=90", "least_spread", 90),
        (BUSYBOX, FILES[1], "SPREAD:-3600", "SPREAD:-300", "spread", 300),
        (SYSTEMD, FILES[2], "SPREAD=3600", "SPREAD=60", "spread", 60),
        (SYSTEMD, FILES[2], "RETRY_FIRST=15", "RETRY_FIRST=30", "first", 30),
        (SYSTEMD, FILES[3], "OnBootSec=1s", "OnBootSec=5min", "after_boot", 300.0),
        (SYSTEMD, FILES[3], "RandomizedDelaySec=1min", "RandomizedDelaySec=2min", "boot_spread", 120.0),
        (SYSTEMD, FILES[4], "RandomizedDelaySec=1h", "RandomizedDelaySec=10min", "later_spread", 600.0),
        (SYSTEMD, FILES[5], "TIMEOUT = 60.0", "TIMEOUT = 30.0", "timeout", 30.0),
    ],
)
def test_a_change_of_what_ships_is_a_change_of_the_model(
    tree: Path, kind: str, name: str, old: str, new: str, attribute: str, value: object
) -> None:
    before = shipped(kind, tree)
    assert before == shipped(kind)
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new))
    after = shipped(kind, tree)
    assert getattr(after, attribute) == value
    assert dataclasses.replace(after, **{attribute: getattr(before, attribute)}) == before


@pytest.mark.parametrize(
    ("kind", "name", "old"), [(BUSYBOX, FILES[0], '"${RETRY_MAX-}" 3600'), (SYSTEMD, FILES[2], "RETRY_MAX=3600")]
)
def test_the_longest_pause_is_also_what_a_quarter_is_of(tree: Path, kind: str, name: str, old: str) -> None:
    path = tree / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, old.replace("3600", "1800")))
    pace = shipped(kind, tree)
    assert (pace.most, pace.unhurried) == (1800, 450)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_does_not_say_it_is_an_error(tree: Path, name: str) -> None:
    (tree / name).write_text("# nothing\n")
    with pytest.raises(ValueError, match="doesn't say"):
        for kind in (BUSYBOX, SYSTEMD):
            shipped(kind, tree)


def script(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@needs("dash")
@pytest.mark.parametrize(
    ("number", "up"), [(0, 0), (59, 3599), (123_456_789, 100_000), (4_294_967_295, 3600), (2_147_483_647, 7)]
)
def test_the_model_pauses_as_the_script_does(tmp_path: Path, number: int, up: int) -> None:
    """The script itself, with stand-ins for chance, sleep and the program; pause by pause."""
    pace = shipped(BUSYBOX)
    wishes: list[Optional[int]] = [None, 700, None, 86400, *[None] * 8]
    script(tmp_path, "chance", f'random() {{ echo "$(({number} % ($1 > 0 ? $1 : 1)))"; }}')
    script(tmp_path, "sleep", f"echo $1 >>{tmp_path}/slept")
    plan = "".join(f'{{"status": 127, "retry_after": {"null" if wish is None else wish}}}\n' for wish in wishes)
    (tmp_path / "plan").write_text(plan + '{"status": 0, "retry_after": null}\n')
    script(
        tmp_path,
        "program",
        f'case "$*" in *--status*) exit 0 ;; esac\ncd {tmp_path}; head -n 1 plan; '
        'grep -q \'status": 0\' plan && status=$(wc -l <plan); sed -i 1d plan; [ "${status-}" = 1 ]',
    )
    (tmp_path / "uptime").write_text(f"{up}.42 1.00\n")
    text = (world.ROOT / FILES[0]).read_text()
    assert "/proc/uptime" in text
    script(tmp_path, "until-enrolled", text.replace("/proc/uptime", str(tmp_path / "uptime")))
    environ = world.environment(CARAMEL_EMBEDDED=str(tmp_path / "program"), SPREAD=str(pace.spread))
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    subprocess.run(["dash", str(tmp_path / "until-enrolled")], env=environ, check=True, timeout=60)

    slept = [int(line) for line in (tmp_path / "slept").read_text().splitlines()]
    expected, delay = [], pace.unhurried
    for wish in wishes:
        expected.append(pace.pause(delay, wish, number))
        delay = pace.longer(delay)
    assert slept[-len(wishes) :] == expected
    assert sum(slept[: -len(wishes)]) == pace.wait(up, number)


# --- What any morning has to be ---

#: Half a second for a check, and room for a dozen: 200 devices are a storm.
SMALL = Machine(1, 1, 0.05, lambda chance: 0.5, 0.001, 24)


def morning(pace: Pace, **changes: object) -> Morning:
    wanted = {"devices": 200, "pace": pace, "machine": SMALL, "until": 7200.0, **changes}
    return simulate(Scenario(**wanted))  # type: ignore[arg-type]


def hurried(pace: Pace) -> Pace:
    """The same without any spread."""
    return dataclasses.replace(pace, boot_spread=0.0, spread=0)


@pytest.mark.parametrize("kind", [BUSYBOX, SYSTEMD])
@pytest.mark.parametrize("certified", [True, False])
def test_all_are_served_in_the_end_and_each_is_served_once(kind: str, certified: bool) -> None:
    seen = morning(hurried(shipped(kind)), certified=certified, hourly=False)
    assert len(seen.first) == 200
    assert sum(seen.done.values()) == seen.runs[CERTIFIED] == seen.server.served == 200
    assert sum(seen.begun.values()) == sum(seen.runs.values())
    # It was a storm, and the server can't have been quicker than it is.
    assert seen.runs[FAILED] > 100
    assert (seen.served_after() or 0) >= 200 * 0.5
    assert seen.first == sorted(seen.first)
    assert seen.server.free == SMALL.room


def test_the_same_seed_is_the_same_morning() -> None:
    pace = shipped(SYSTEMD)
    assert morning(pace, seed=7).first == morning(pace, seed=7).first != morning(pace, seed=8).first


@pytest.mark.parametrize("kind", [BUSYBOX, SYSTEMD])
def test_the_spread_that_ships_lowers_the_peak(kind: str) -> None:
    pace = shipped(kind)
    spread, none = morning(pace), morning(hurried(pace))
    assert spread.peak * 5 < none.peak
    assert spread.failures < 0.05 < 0.4 < none.failures


def test_nobody_comes_before_the_server_wants_it() -> None:
    limited = dataclasses.replace(SMALL, rate=1.0, burst=5, retry_after=300)
    seen = morning(hurried(shipped(BUSYBOX)), machine=limited)
    told = [(delay, pause) for delay, wish, pause in seen.pauses if wish == 300]
    assert len(told) > 100
    assert all(max(300, delay) <= pause < 2 * max(300, delay) for delay, pause in told)
    assert seen.server.told_to_wait == len(told)
    assert len(seen.first) == 200


def test_those_sent_away_together_do_not_come_back_together() -> None:
    """With a chance that is as long as the first pause only, as 2.0.0 first had it, they do."""
    limited = dataclasses.replace(SMALL, rate=1.0, burst=5, retry_after=1500)
    pace = hurried(shipped(BUSYBOX))
    later = [
        max(
            morning(used, machine=limited, hourly=False).rate(morning(used, machine=limited, hourly=False).begun)[20:]
        )
        for used in (pace, dataclasses.replace(pace, chance="delay"))
    ]
    assert later[0] * 3 < later[1]


def test_a_server_that_comes_back_late_serves_nobody_before() -> None:
    seen = morning(shipped(SYSTEMD), machine=dataclasses.replace(SMALL, back_from=1800.0), until=14_400.0)
    assert 1800 < seen.first[0] < 2000
    assert len(seen.first) == 200


def test_a_device_leaves_after_its_time_limit_and_the_server_works_for_it_all_the_same() -> None:
    slow = dataclasses.replace(SMALL, back=lambda chance: 5.0, room=400)
    seen = morning(hurried(shipped(BUSYBOX)), machine=slow, until=3600.0)
    assert seen.server.wasted > 50
    # What the server worked for those that had left, it couldn't for others.
    assert seen.server.served + seen.server.wasted <= 3600 / 5


def test_the_cores_are_shared_and_never_more_than_there_are() -> None:
    """Four processes on one core are not quicker than one; on four cores they are."""
    pace = hurried(shipped(SYSTEMD))
    took = []
    for cores in (1, 4):
        machine = dataclasses.replace(SMALL, cores=cores, processes=4, room=400)
        took.append(morning(pace, machine=machine, boots_within=1.0, hourly=False).served_after())
    one, four = took
    assert one and four
    work = 200 * (0.5 + SMALL.front)
    assert one >= work
    assert work / 4 <= four < work / 2


def test_one_for_ten_comes_to_the_same() -> None:
    """A large fleet is simulated by fewer devices, each of which stands for some."""
    big = Machine(1, 1, 0.002, lambda chance: 0.02, 0.0001, 768)
    alone, ten = (
        morning(hurried(shipped(BUSYBOX)), devices=6000, machine=big, each=each, hourly=False) for each in (1, 10)
    )
    for share in (0.5, 0.9):
        one, other = alone.served_after(share), ten.served_after(share)
        assert one and other and abs(one - other) < 0.15 * one
    assert abs(alone.failures - ten.failures) < 0.08


# --- The small fleet ---


@slow
@needs("nginx", "curl")
def test_the_devices_of_the_small_fleet_ask_as_the_program_does(tmp_path: Path) -> None:
    """A few of them, at ease; nginx says what it saw. And with no room for two at a time, some are turned away."""
    place = morning_server.site(tmp_path, hold=0.0)
    with place.caramel, place.nginx:
        morning_server.enroll(place, 2)
        with place.nginx.watched() as seen:
            calm = morning_server.storm(place, 42, 4.0, 60.0)
        assert (calm.left, calm.failures, len(calm.first)) == (0, 0.0, 42)
        assert calm.programs == 3
        begun = {event.device for event in calm.events if event.status is None}
        assert begun == {event.device for event in calm.events if event.status == 0} == set(range(42))
        assert len(seen) == 42
        assert {(one.method, one.verify, one.status) for one in seen} == {("GET", "SUCCESS", 200)}
        assert len({one.connection for one in seen}) == 42
        for client in {one.user_agent.partition(" ")[2] for one in seen}:
            of_one = [one for one in seen if one.user_agent.endswith(client)]
            assert len({(one.path, one.if_modified_since, one.tls, tuple(one.headers)) for one in of_one}) == 1
        assert place.works_for_who_has_left(5) == 5
        place.caramel.hold = 0.4
        place.caramel.restart()
        place.nginx.room = 12
        place.nginx.restart()
        crowded = morning_server.storm(place, 30, 1.0, 120.0)
    assert crowded.left == 0 and crowded.failures > 0.1
    assert len(crowded.first) == 30


# --- What ships makes no herd ---


@pytest.mark.parametrize("kind", [BUSYBOX, SYSTEMD])
def test_a_server_that_can_bear_every_hour_can_bear_the_morning_after(kind: str) -> None:
    """A server that the hourly checks of this fleet keep busy to 70 %."""
    devices, busy = 3000, 0.7
    work = busy * 3600 / devices
    machine = Machine(1, 1, work / 3, lambda chance: work * 2 / 3, 0.0001, 86)
    seen = morning(shipped(kind), devices=devices, machine=machine, until=3 * 3600.0)
    assert len(seen.first) == devices
    assert seen.failures < 0.05
    # In the first hour, those that were served early come again while others come for the first time.
    assert max(seen.rate(seen.begun, 600)) < 1.3 / work
    # What 2.0.0 first had is the herd that this is about.
    before = dataclasses.replace(shipped(kind), spread=300, least_spread=300)
    assert morning(before, devices=devices, machine=machine, until=3 * 3600.0).failures > 0.3


def waves(pace: Pace) -> float:
    """How much busier two minutes are than two earlier ones, at most, in the first part of a storm."""
    machine = Machine(1, 1, 0.1, lambda chance: 0.25, 0.002, 24)
    seen = morning(hurried(pace), devices=2000, machine=machine, certified=False, until=3000.0)
    rates = seen.rate(seen.begun, 120)[1:]
    return max(later / max(earlier, 0.01) for number, earlier in enumerate(rates) for later in rates[number:])


def test_retries_do_not_come_in_waves() -> None:
    pace = shipped(BUSYBOX)
    assert waves(pace) < 4 < 8 < waves(dataclasses.replace(pace, chance="rest"))
