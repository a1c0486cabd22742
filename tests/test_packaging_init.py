"""The shell scripts of an image: the init script for BusyBox, and what it keeps in the background.

make device-test boots them on Arm under BusyBox; here each branch is walked with a stand-in for the program.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import needs, require
from world import ROOT, environment, until

LIBEXEC = ROOT / "packaging/libexec"
INIT_SCRIPT = ROOT / "buildroot/package/caramel-embedded/S95caramel-embedded"
SCRIPTS = [
    ROOT / "packaging/starter/caramel-embedded",
    LIBEXEC / "until-enrolled",
    LIBEXEC / "keep-enrolled",
    INIT_SCRIPT,
    ROOT / "packaging/deb.sh",
    ROOT / "tests/device/device-test.sh",
]

#: Does what the file "plan" says, a status a line, the last one for ever; and writes down what it was asked.
STAND_IN = """#!/bin/sh
cd "{folder}" || exit
echo "$*" >>asked
case "$*" in
*--json*) printf '{{"client_id": "%s"}}\\n' "$(cat id)"; exit ;;
*--status*) exit "$(cat status)" ;;
esac
read -r status <plan
[ "$(wc -l <plan)" = 1 ] || sed -i 1d plan
exit "$status"
"""

#: Writes down how long it was to sleep, and sleeps not.
SLEEP = '#!/bin/sh\necho "$1" >>"{folder}/slept"\n[ "$1" -lt 3600 ] || exec /bin/sleep 60\n'


#: For keep-enrolled, as the init script starts it.
STAND_IN_DAEMON = """#!/bin/sh
trap 'kill $!; exit' TERM
echo "$* $RETRY_FIRST" >>"{folder}/started"
sleep 60 &
wait
"""


class Image:
    """The scripts with their surroundings replaced."""

    def __init__(self, folder: Path, shell: list[str]) -> None:
        self.folder, self.shell = folder, shell
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.program = self.script("caramel-embedded", STAND_IN.format(folder=folder))
        self.script("sleep", SLEEP.format(folder=folder))
        for name in ("until-enrolled", "keep-enrolled"):
            shutil.copy(LIBEXEC / name, self.bin)
        self.plan(0)
        self.write("status", "127\n")
        self.write("id", "fffbeec0ffee\n")

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def plan(self, *statuses: int) -> None:
        self.write("plan", "".join(f"{status}\n" for status in statuses))

    def start(self, name: str, *options: str, **env: str) -> subprocess.Popen[bytes]:
        environ = environment(**{"CARAMEL_EMBEDDED": str(self.program), "RETRY_FIRST": "2", "RETRY_MAX": "10", **env})
        environ["PATH"] = f"{self.bin}:{environ['PATH']}"
        return subprocess.Popen([*self.shell, str(self.bin / name), *options], env=environ, start_new_session=True)

    def run(self, name: str, *options: str, **env: str) -> int:
        return self.start(name, *options, **env).wait(30)


@pytest.fixture(params=["dash", "bash", "busybox"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    require(request.param if request.param != "busybox" else "ash")
    return Image(tmp_path, ["busybox", "sh"] if request.param == "busybox" else [request.param])


@needs("shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.stdout == ""
    bash = subprocess.run(["shellcheck", "-s", "bash", str(ROOT / "packaging/completion/caramel-embedded.bash")])
    assert bash.returncode == 0


# --- until-enrolled -------------------------------------------------------------------------------------


def test_it_checks_until_there_is_a_certificate_in_growing_pauses(image: Image) -> None:
    image.plan(69, 1, 127, 69, 69, 0)
    assert image.run("until-enrolled", "--syslog") == 0
    assert image.lines("asked") == ["--syslog"] * 6
    slept = [int(line) for line in image.lines("slept")]
    for seconds, least in zip(slept, (2, 4, 8, 10, 10)):
        assert least <= seconds < 2 * least
    assert len(slept) == 5


def test_a_certificate_at_once_is_no_pause(image: Image) -> None:
    assert image.run("until-enrolled") == 0
    assert image.lines("asked") == [""]
    assert image.lines("slept") == []


def test_a_device_with_a_certificate_does_not_hurry_and_one_without_does(image: Image) -> None:
    assert image.run("until-enrolled", SPREAD="40") == 0
    assert image.lines("slept") == []
    image.write("status", "0\n")
    assert image.run("until-enrolled", SPREAD="40") == 0
    assert len(image.lines("slept")) == 1
    assert 0 <= int(image.lines("slept")[0]) < 40


def test_pauses_differ_from_device_to_device(image: Image) -> None:
    image.write("status", "0\n")
    for _ in range(12):
        image.run("until-enrolled", SPREAD="2900")
    assert len(set(image.lines("slept"))) > 8
    image.write("slept", "")
    image.write("status", "127\n")
    for _ in range(12):
        image.plan(69, 0)
        image.run("until-enrolled", RETRY_FIRST="1700")
    assert len(set(image.lines("slept"))) > 8


def test_it_can_be_stopped_in_a_pause_at_once(image: Image) -> None:
    image.plan(69)
    process = image.start("until-enrolled", RETRY_MAX="5000", RETRY_FIRST="4000")
    until("it pauses", lambda: image.lines("slept"))
    started = time.monotonic()
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    assert time.monotonic() - started < 5


# --- keep-enrolled --------------------------------------------------------------------------------------


def cron(image: Image, running: bool = True) -> Path:
    """A folder of crontabs, and a crond that runs or doesn't."""
    image.script("pidof", f"#!/bin/sh\nexit {0 if running else 1}\n")
    folder = image.folder / "crontabs"
    folder.mkdir()
    return folder


def minute(client_id: str) -> int:
    done = subprocess.run(["cksum"], input=client_id.encode(), stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[0]) % 60


@pytest.fixture
def plain(tmp_path: Path) -> Image:
    """With a shell that takes pidof from PATH; BusyBox has its own."""
    return Image(tmp_path, ["dash"])


def test_cron_takes_over_at_the_minute_of_the_client_id(plain: Image) -> None:
    folder = cron(plain)
    plain.plan(69, 0)
    assert plain.run("keep-enrolled", "--syslog", CRONTABS=str(folder)) == 0
    line = f"{minute('fffbeec0ffee')} * * * * {plain.program} --syslog # caramel-embedded"
    assert plain.lines("crontabs/root") == [line]
    assert plain.lines("crontabs/cron.update") == ["root"]
    assert (folder / "root").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["cron.update", "root"]


def test_a_crontab_that_has_the_line_is_not_written(plain: Image) -> None:
    folder = cron(plain)
    for _ in range(2):
        assert plain.run("keep-enrolled", CRONTABS=str(folder)) == 0
    before = (folder / "root").stat()
    assert plain.run("keep-enrolled", CRONTABS=str(folder)) == 0
    after = (folder / "root").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_lines_of_others_stay_and_an_old_one_of_ours_goes(plain: Image) -> None:
    folder = cron(plain)
    (folder / "root").write_text("5 4 * * * backup\n7 * * * * /old/caramel-embedded # caramel-embedded\n")
    assert plain.run("keep-enrolled", CRONTABS=str(folder)) == 0
    assert plain.lines("crontabs/root")[0] == "5 4 * * * backup"
    assert len(plain.lines("crontabs/root")) == 2
    assert "/old/" not in plain.lines("crontabs/root")[1]


@pytest.mark.parametrize("without", ["crond", "folder"])
def test_without_cron_it_checks_every_hour_by_itself(plain: Image, without: str) -> None:
    folder = cron(plain, running=without != "crond")
    if without == "folder":
        folder.rmdir()
    plain.write("id", "unit-0001\n")
    process = plain.start("keep-enrolled", CRONTABS=str(folder))
    try:
        until("it waits for an hour", lambda: "3600" in plain.lines("slept"))
        # First until its own minute of the hour.
        assert plain.lines("slept")[0] == str(minute("unit-0001") * 60 + 1)
        assert [line for line in plain.lines("asked") if "--" not in line] == ["", ""]
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
    assert not (folder / "root").exists()


def test_the_minutes_of_a_fleet_are_spread_evenly() -> None:
    """MAC addresses in a row, as a maker's devices have them: chi-squared, 59 degrees of freedom, p about 1e-6."""
    count = 1500
    script = f'i=0; while [ $i -lt {count} ]; do printf "00163e%06x" $((i + 4711)) | cksum; i=$((i + 1)); done'
    done = subprocess.run(["dash", "-c", script], stdout=subprocess.PIPE, check=True)
    minutes = Counter(int(line.split()[0]) % 60 for line in done.stdout.splitlines())
    expected = count / 60
    assert len(minutes) == 60
    assert sum((found - expected) ** 2 / expected for found in minutes.values()) < 125


# --- The init script ------------------------------------------------------------------------------------


@pytest.fixture
def init(tmp_path: Path) -> Iterator[list[str]]:
    """The command line of the init script, with its paths in a folder of the test's own."""
    require("busybox")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/start-stop-daemon").symlink_to(shutil.which("busybox") or "")
    daemon = tmp_path / "keep-enrolled"
    daemon.write_text(STAND_IN_DAEMON.format(folder=tmp_path))
    daemon.chmod(0o755)
    (tmp_path / "default").write_text('CARAMEL_EMBEDDED_ARGS="--syslog -q"\nRETRY_FIRST=7\n')
    text = INIT_SCRIPT.read_text()
    for old, new in (
        ("/usr/libexec/caramel-embedded/keep-enrolled", str(daemon)),
        ("/var/run/$DAEMON.pid", f"{tmp_path}/pid"),
        ("/etc/default/$DAEMON", f"{tmp_path}/default"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "S95caramel-embedded").write_text(text)
    yield ["env", f"PATH={tmp_path}/bin:{os.environ['PATH']}", "busybox", "sh", str(tmp_path / "S95caramel-embedded")]
    for process in processes(tmp_path):
        os.kill(process, signal.SIGTERM)


def processes(folder: Path) -> list[int]:
    """Those whose command line has the folder's keep-enrolled in it."""
    wanted, found = f"{folder}/keep-enrolled".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def call(init: list[str], word: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*init, word], capture_output=True, text=True, timeout=20)


def test_the_boot_goes_on_at_once(init: list[str], tmp_path: Path) -> None:
    started = time.monotonic()
    done = call(init, "start")
    assert time.monotonic() - started < 5
    assert (done.returncode, done.stdout, done.stderr) == (0, "Starting caramel-embedded: OK\n", "")
    until("it has started", (tmp_path / "started").exists)
    until("it has its options", lambda: (tmp_path / "started").read_text() == "--syslog -q 7\n")


def test_started_twice_it_runs_once_and_stopped_it_is_gone(init: list[str], tmp_path: Path) -> None:
    call(init, "start")
    until("it has started", (tmp_path / "started").exists)
    assert call(init, "start").returncode == 0
    assert len(processes(tmp_path)) == 1
    assert call(init, "restart").returncode == 0
    until("it has started anew", lambda: len((tmp_path / "started").read_text().splitlines()) == 2)
    assert call(init, "stop").stdout == "Stopping caramel-embedded: OK\n"
    until("it is gone", lambda: not processes(tmp_path))
    assert call(init, "stop").returncode == 0


def test_a_process_id_of_an_earlier_boot_is_nobody_it_knows(init: list[str], tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "pid").write_text(f"{other.pid}\n")
        assert call(init, "stop").returncode == 0
        assert other.poll() is None
        (tmp_path / "pid").write_text(f"{other.pid}\n")
        assert call(init, "start").returncode == 0
        until("it has started", (tmp_path / "started").exists)
        assert other.poll() is None
        other.kill()


def test_another_word_is_a_usage_error(init: list[str]) -> None:
    done = call(init, "status")
    assert done.returncode == 1
    assert "{start|stop|restart|reload}" in done.stdout
