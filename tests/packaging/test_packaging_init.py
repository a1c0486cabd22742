"""The shell scripts of an image: the init script for BusyBox, and what it keeps in the background.

make device-test boots them on Arm under BusyBox; here each branch is walked with a stand-in for the program, and with
exactly the programs that small systems have.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Optional, Union

import pytest
from needs import busybox_with_crond, needs, require, slow
from world import PLAIN, ROOT, SYSTEMS, Authority, Daemon, environment, small_system, strays, until

LIBEXEC = ROOT / "packaging/libexec"
INIT_SCRIPT = ROOT / "buildroot/package/caramel-embedded/S95caramel-embedded"
SCRIPTS = [
    ROOT / "packaging/starter/caramel-embedded",
    LIBEXEC / "until-enrolled",
    LIBEXEC / "until-certified",
    LIBEXEC / "keep-enrolled",
    LIBEXEC / "chance",
    ROOT / "examples/split-identity",
    INIT_SCRIPT,
    *(ROOT / "packaging/keys" / name for name in ("tpm-key", "tpm-parent", "pkcs11-key")),
    ROOT / "packaging/deb.sh",
    ROOT / "tests/device/device-test.sh",
]

#: Does what the file "plan" says: a status a line, and how long the server wants to be left alone; the last line for
#: ever. Writes down what it was asked.
STAND_IN = """#!/bin/sh
cd "{folder}" || exit
echo "$*" >>asked
case "$*" in
*--status*)
    case "$*" in
    *--json*) printf '{{\\n  "client_id": "%s",\\n  "key_file": "{folder}/identity.pem"\\n}}\\n' "$(cat id)" ;;
    *) printf 'client ID        %s\\nkey file         {folder}/identity.pem\\n' "$(cat id)" ;;
    esac
    exit "$(cat status)" ;;
esac
id=$(cat id)
read -r status after <plan
[ "$(wc -l <plan)" = 1 ] || sed -i 1d plan
printf '{{"status": %s, "client_id": "%s", "retry_after": %s}}\\n' "$status" "$id" "${{after:-null}}"
exit "$status"
"""

#: Writes down how long it was to sleep, and sleeps not.
SLEEP = '#!/bin/sh\necho "$1" >>"{folder}/slept"\n[ "$1" -lt 3600 ] || exec /bin/sleep 60\n'


#: For keep-enrolled, as the init script starts it. Short pauses, because a signal that reaches a shell's child before
#: its exec is lost, and would leave a long one behind.
STAND_IN_DAEMON = """#!/bin/sh
trap exit TERM
echo "$* $RETRY_FIRST" >>"{folder}/started"
while :; do /bin/sleep 0.1; done
"""


class Image:
    """The scripts with their surroundings replaced."""

    def __init__(self, folder: Path, shell: list[str], path: str) -> None:
        self.folder, self.shell = folder, shell
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.path = f"{self.bin}:{path}"
        self.program = self.script("caramel-embedded", STAND_IN.format(folder=folder))
        self.script("sleep", SLEEP.format(folder=folder))
        self.script("logger", f'#!/bin/sh\necho "$*" >>"{folder}/logged"\n')
        for name, *theirs in (
            ("until-enrolled", "/proc/uptime"),
            ("until-certified",),
            ("keep-enrolled", "/proc/[0-9]*/comm"),
            ("chance", "/proc/uptime"),
        ):
            shutil.copy(LIBEXEC / name, self.bin)
            text = (LIBEXEC / name).read_text()
            for path in theirs:
                assert path in text
                text = text.replace(path, f"{folder}{path}")
            (self.bin / name).write_text(text)
        (folder / "proc/1").mkdir(parents=True)
        self.write("proc/uptime", "3.14 5.00\n")
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

    def plan(self, *statuses: Union[int, str]) -> None:
        self.write("plan", "".join(f"{status}\n" for status in statuses))

    def start(self, name: str, *options: str, stderr: Optional[int] = None, **env: str) -> subprocess.Popen[bytes]:
        environ = environment(**{"CARAMEL_EMBEDDED": str(self.program), "RETRY_FIRST": "2", "RETRY_MAX": "10", **env})
        environ["PATH"] = self.path
        return subprocess.Popen(
            [*self.shell, str(self.bin / name), *options], env=environ, stderr=stderr, start_new_session=True
        )

    def run(self, name: str, *options: str, **env: str) -> int:
        return self.start(name, *options, stderr=None, **env).wait(30)

    def says(self, name: str, **env: str) -> list[str]:
        """What a run that ends with 0 says on standard error."""
        process = self.start(name, stderr=subprocess.PIPE, **env)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0
        return errors.decode().splitlines()

    @property
    def slept(self) -> list[int]:
        """The pauses, in seconds."""
        return [int(line) for line in self.lines("slept")]

    def paused(self, *bounds: tuple[int, int]) -> bool:
        """Whether there were these pauses and no others: for each the least and the most."""
        return len(self.slept) == len(bounds) and all(
            least <= seconds <= most for seconds, (least, most) in zip(self.slept, bounds)
        )


#: Big shells with all that this machine has, and small systems with nothing but what they have.
PLACES = [
    "dash",
    "openwrt",
    *(pytest.param(name, marks=slow) for name in ("bash", "scarthgap", "wrynose", "buildroot")),
]


@pytest.fixture(params=PLACES)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    if request.param in SYSTEMS:
        require("ash", "flock")
        applets = small_system(request.param, tmp_path / "applets")
        return Image(tmp_path, [str(applets / "sh")], str(applets))
    require(request.param)
    return Image(tmp_path, [request.param], os.environ["PATH"])


def test_what_small_systems_lack_is_not_there(tmp_path: Path) -> None:
    """And each of them can do what the scripts want of it."""
    require("ash", "flock")
    for system in SYSTEMS:
        there = {path.name for path in small_system(system, tmp_path / system).iterdir()}
        assert "cksum" not in there or system == "buildroot"
        assert "stat" not in there or system in ("scarthgap", "wrynose")
        assert {"sh", "sed", "grep", "cat", "ls", "sleep", "dd", "tr", "mv", "cp", "flock"} <= there


@needs("shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.stdout == "" and os.access(SCRIPTS[0], os.X_OK)
    bash = subprocess.run(["shellcheck", "-s", "bash", str(ROOT / "packaging/completion/caramel-embedded.bash")])
    assert bash.returncode == 0


# --- until-enrolled -------------------------------------------------------------------------------------


def test_it_checks_until_there_is_a_certificate_in_growing_pauses(image: Image) -> None:
    image.plan(69, 1, 127, 69, 69, 0)
    assert image.run("until-enrolled", "--syslog") == 0
    assert image.lines("asked") == ["--json --syslog"] * 6
    assert image.paused((1, 4), (1, 8), (1, 16), (1, 20), (1, 20)), image.slept


def test_it_waits_at_least_as_long_as_the_server_asks_for(image: Image) -> None:
    image.plan("127 700", "69 1", "69 null", 0)
    assert image.run("until-enrolled") == 0
    # By chance as much again as the pause, but no more than RETRY_MAX, which is 10 here.
    assert image.paused((700, 709), (4, 7), (1, 16)), image.slept


def test_those_whom_the_server_sends_away_do_not_come_back_together(image: Image) -> None:
    """All are told the same Retry-After, so chance has to be as long as that, and not as the first pause."""
    for _ in range(8):
        image.plan("127 1700", 0)
        assert image.run("until-enrolled", RETRY_MAX="3600") == 0
    slept = sorted(image.slept)
    assert slept[0] >= 1700 and slept[-1] < 3400
    assert slept[-1] - slept[0] > 150


@pytest.mark.parametrize("value", ["0", "0.5", "soon", "-1", "010", "1e3", "99999999999", ""])
def test_no_setting_makes_a_storm_or_an_end(image: Image, value: str) -> None:
    image.plan(69, 69, 0)
    assert unexpected(image.says("until-enrolled", RETRY_FIRST=value, SPREAD=value)) == []
    assert image.paused((1, 30), (1, 20)), image.slept
    image.plan(69, 69, 69, 0)
    image.write("slept", "")
    assert image.run("until-enrolled", RETRY_MAX=value) == 0
    assert image.paused((1, 4), (1, 8), (1, 16)), image.slept


def unexpected(said: list[str]) -> list[str]:
    """What a script has said on standard error beside its own lines."""
    return [line for line in said if not line.startswith("caramel-embedded: ")]


@needs("mounts")
@pytest.mark.parametrize("hidden", ["/proc/sys", "/proc/sys /dev"])
def test_a_fleet_is_not_in_step_where_the_kernels_files_are_hidden(image: Image, hidden: str) -> None:
    """As ProcSubset=pid of systemd hides them, or as a chroot has no /dev. All devices are at the same instant of
    their boot, and with the same process IDs.
    """
    mounts = "".join(f"mount -t tmpfs tmpfs {folder}; " for folder in hidden.split())
    null = "mknod -m 666 /dev/null c 1 3; " if "/dev" in hidden else ""
    script = f'{mounts}{null}PATH={image.path}; exec "$@"'
    image.shell[:0] = ["unshare", "--mount", "--pid", "--fork", "sh", "-ec", script, "hidden"]
    image.path = os.environ["PATH"]
    for number in range(8):
        image.write("id", f"00163e00000{number}\n")
        image.plan(69, 0)
        assert unexpected(image.says("until-enrolled", RETRY_FIRST="1700")) == []
    # Far apart, not numbers that follow each other.
    slept = sorted(image.slept)
    assert len(set(slept)) >= 6 and slept[-1] - slept[0] > 500, slept


def test_it_says_when_the_next_check_is(image: Image) -> None:
    """A device that waits for its certificate is otherwise silent for an hour."""
    image.plan(69, "127 1700", 0)
    said = image.says("until-enrolled")
    assert said == [f"caramel-embedded: the next check is in {seconds} s" for seconds in image.slept]
    assert len(said) == 2
    image.write("status", "0\n")
    (line,) = image.says("until-enrolled", SPREAD="200")
    assert re.fullmatch(r".*there is a usable certificate; the next check is in \d+ s", line)


def test_a_certificate_at_once_is_no_pause(image: Image) -> None:
    assert image.run("until-enrolled") == 0
    assert image.lines("asked") == ["--json"]
    assert image.lines("slept") == []


def test_a_device_with_a_certificate_does_not_hurry_and_one_without_does(image: Image) -> None:
    assert image.run("until-enrolled", SPREAD="4000") == 0
    assert image.lines("slept") == []
    image.write("status", "0\n")
    totals = []
    for _ in range(8):
        image.write("slept", "")
        assert image.run("until-enrolled", SPREAD="2900") == 0
        totals.append(sum(image.slept))
        assert all(0 <= seconds <= 300 for seconds in image.slept)
    assert min(totals) >= 0 and max(totals) < 2900
    assert max(totals) - min(totals) > 300


def test_with_a_certificate_a_check_that_fails_is_no_reason_to_hurry(image: Image) -> None:
    image.write("status", "0\n")
    image.plan(127, 127, 127, 0)
    assert image.run("until-enrolled", SPREAD="1", RETRY_MAX="40") == 0
    assert image.paused((0, 0), (1, 20), (1, 40), (1, 80)), image.slept  # the first one is of a spread of one second
    # By chance one may be short, but not eight of them.
    longest = []
    for _ in range(8):
        image.write("slept", "")
        image.plan(127, 0)
        assert image.run("until-enrolled", SPREAD="1", RETRY_MAX="400") == 0
        longest.append(image.slept[1])
    assert 20 < max(longest) <= 200


@pytest.mark.parametrize(
    ("uptime", "spread", "most"), [("2900.99 1.0", 2900, 60), ("31622400.5 9.9", 2900, 60), ("7200", 20, 20)]
)
def test_the_wait_is_for_the_time_after_the_boot(image: Image, uptime: str, spread: int, most: int) -> None:
    """Cron and the hourly timer have spread the checks themselves, but for the minute in which cron counts."""
    image.write("status", "0\n")
    image.write("proc/uptime", f"{uptime}\n")
    for _ in range(8):
        assert image.run("until-enrolled", SPREAD=str(spread)) == 0
    assert max(image.slept, default=0) < most
    assert len(set(image.slept)) > 1


def test_the_wait_is_over_when_the_certificate_has_ended(image: Image) -> None:
    """Or when the clock is right at last, and shows that it had."""
    image.write("status", "0\n")
    image.script("sleep", f'#!/bin/sh\necho "$1" >>"{image.folder}/slept"\necho 127 >"{image.folder}/status"\n')
    image.write("proc/uptime", "unreadable\n")  # counts as no boot
    assert image.run("until-enrolled", SPREAD="20000") == 0
    (image.folder / "proc/uptime").unlink()  # where it can't be had, every start counts as a boot
    image.write("slept", "")
    image.write("asked", "")
    for _ in range(4):  # by chance the wait may be a short one, too
        image.write("status", "0\n")
        assert image.run("until-enrolled", "--syslog", SPREAD="30000") == 0
    assert len(image.lines("slept")) <= 4
    assert image.lines("asked").count("--json --syslog") == 4
    assert 4 <= image.lines("asked").count("--syslog --status --json") <= 8


def test_pauses_differ_from_device_to_device(image: Image) -> None:
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


@needs("strace")
@pytest.mark.parametrize("script", ["until-enrolled", "keep-enrolled"])
def test_it_can_be_stopped_in_a_pause_that_has_just_begun(image: Image, script: str) -> None:
    """A new process of a shell has the shell's handlers until it has reset them, here each in a tenth of a second. A
    signal that it loses meanwhile would leave it behind for an hour.
    """
    image.plan(69)
    image.script("sleep", '#!/bin/sh\nexec /bin/sleep "$1"\n')
    slowly = ["-e", "trace=rt_sigaction", "-e", "inject=rt_sigaction:delay_enter=100000"]
    image.shell[:0] = [str(shutil.which("strace")), "-D", "-f", "-qq", "-o", "/dev/null", *slowly]
    process = image.start(script, RETRY_MAX="5000", RETRY_FIRST="5000", stderr=subprocess.PIPE)
    assert process.stderr
    if script == "until-enrolled":
        assert b"the next check is in" in process.stderr.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until("there is a child", children.read_text, 20)
    process.stderr.close()
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    until("nothing is left", lambda: not strays(), 60)


# --- until-certified ------------------------------------------------------------------------------------


def test_it_ends_as_soon_as_the_file_has_a_certificate_and_looks_no_oftener(image: Image) -> None:
    """A stand-in for sleep that sleeps a twentieth of the time."""
    image.script("sleep", f'#!/bin/sh\necho "$1" >>"{image.folder}/slept"\nexec /bin/sleep 0.1\n')
    process = image.start("until-certified")
    until("it looks at the file", lambda: len(image.lines("slept")) >= 12)
    # After 0, 4, 12, ... of its seconds.
    assert 2 <= len(image.lines("asked")) <= 4
    before = len(image.lines("asked"))
    image.write("status", "0\n")
    image.write("identity.pem", "another\n")
    assert process.wait(10) == 0
    assert len(image.lines("asked")) - before <= 2


def test_whatever_the_path_is_it_looks_at_that_file(image: Image, authority: Authority) -> None:
    """By what the real program says of it."""
    key_file = image.folder / "é \"a\" \\ 'b' $c.pem"
    image.script("sleep", f'#!/bin/sh\necho "$1" >>"{image.folder}/slept"\nexec /bin/sleep 0.1\n')
    settings = {"CARAMEL_CN": "x", "CARAMEL_CA": "localhost:1", "CARAMEL_CA_CERT": str(authority.certificate_file)}
    env = {"CARAMEL_CONFIG": os.devnull, "CARAMEL_KEY_FILE": str(key_file), "CARAMEL_EMBEDDED": PLAIN, "LC_ALL": "C"}
    process = image.start("until-certified", stderr=None, **settings, **env)
    until("its pauses have grown to eight looks and more", lambda: len(image.lines("slept")) >= 8)
    before = len(image.lines("slept"))
    draft = image.folder / "draft"
    draft.write_bytes(authority.identity("x"))
    draft.rename(key_file)
    assert process.wait(30) == 0
    assert len(image.lines("slept")) - before <= 3


def test_it_ends_at_once_where_there_is_one(image: Image) -> None:
    image.write("status", "0\n")
    assert image.run("until-certified") == 0
    assert (image.lines("asked"), image.lines("slept")) == (["--status"], [])


def test_it_ends_though_no_file_has_changed(image: Image) -> None:
    """The driver of the network interface that the client ID is from was late, say."""
    image.script("sleep", f'#!/bin/sh\necho "$1" >>"{image.folder}/slept"\nexec /bin/sleep 0.01\n')
    image.script(
        "caramel-embedded", f'#!/bin/sh\necho "$*" >>"{image.folder}/asked"\nexit "$(cat {image.folder}/status)"\n'
    )
    process = image.start("until-certified")
    until("it looks again and again", lambda: len(image.lines("asked")) > 4)
    image.write("status", "0\n")
    assert process.wait(20) == 0


# --- keep-enrolled --------------------------------------------------------------------------------------


def cron(image: Image, running: bool = True) -> Path:
    """A folder of crontabs, and a crond that runs or doesn't."""
    image.write("proc/1/comm", "crond\n" if running else "init\n")
    folder = image.folder / "crontabs"
    folder.mkdir()
    return folder


def minute(client_id: str) -> int:
    """By the script's own words: a function of the client ID, 0 to 59."""
    done = subprocess.run(
        ["dash", "-c", f'. {LIBEXEC}/chance; number "$1"', "minute", client_id], stdout=subprocess.PIPE, check=True
    )
    return int(done.stdout) % 60


def test_cron_takes_over_at_the_minute_of_the_client_id(image: Image) -> None:
    folder = cron(image)
    image.plan(69, 0)
    assert image.run("keep-enrolled", "--syslog", CRONTABS=str(folder), CRON_COMMAND="/etc/x start") == 0
    line = f"{minute('fffbeec0ffee')} * * * * /etc/x start # caramel-embedded"
    assert image.lines("crontabs/root") == [line]
    assert image.lines("crontabs/cron.update") == ["root"]
    assert (folder / "root").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["cron.update", "root"]


def test_a_crontab_that_has_the_line_is_not_written(image: Image) -> None:
    folder = cron(image)
    for _ in range(2):
        assert image.run("keep-enrolled", CRONTABS=str(folder), CRON_COMMAND="/etc/x start") == 0
    before = (folder / "root").stat()
    assert image.run("keep-enrolled", CRONTABS=str(folder), CRON_COMMAND="/etc/x start") == 0
    after = (folder / "root").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_lines_of_others_stay_and_an_old_one_of_ours_goes(image: Image) -> None:
    folder = cron(image)
    (folder / "root").write_text("5 4 * * * backup\n7 * * * * /old/caramel-embedded # caramel-embedded\n")
    assert image.run("keep-enrolled", CRONTABS=str(folder), CRON_COMMAND="/etc/x start") == 0
    assert image.lines("crontabs/root")[0] == "5 4 * * * backup"
    assert len(image.lines("crontabs/root")) == 2
    assert "/old/" not in image.lines("crontabs/root")[1]


@pytest.mark.parametrize("without", ["crond", "folder", "command"])
def test_without_cron_it_checks_every_hour_by_itself(image: Image, without: str) -> None:
    folder = cron(image, running=without != "crond")
    if without == "folder":
        folder.rmdir()
    image.write("id", "unit-0001\n")
    command = "" if without == "command" else "/etc/x start"
    process = image.start("keep-enrolled", "--hook", "a 'b' c", CRONTABS=str(folder), CRON_COMMAND=command)
    try:
        until("it waits for an hour", lambda: "3600" in image.lines("slept"))
        # First until its own minute of the hour.
        assert image.lines("slept")[0] == str(minute("unit-0001") * 60 + 1)
        assert [line for line in image.lines("asked") if "--status" not in line] == ["--json --hook a 'b' c"] * 2
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
    assert not (folder / "root").exists()
    # Nobody wonders why there is no line in a crontab, unless it was said that there is to be none.
    said = {"crond": "no crond runs", "folder": "no folder of crontabs can be written to"}
    assert (without == "command") == (not image.lines("logged"))
    assert all(said[without] in line for line in image.lines("logged"))


def test_without_cron_an_hourly_check_that_fails_is_no_reason_to_hurry(image: Image) -> None:
    image.write("id", "unit-0001\n")
    image.write("status", "0\n")
    image.plan(0, 127, 0)
    process = image.start("keep-enrolled", CRON_COMMAND="", SPREAD="1", RETRY_MAX="40")
    try:
        until("it waits for an hour", lambda: "3600" in image.lines("slept"))
        own, _, retry = [seconds for seconds in image.slept if seconds != 3600][1:4]
        assert own == minute("unit-0001") * 60 + 1
        assert 1 <= retry <= 20
    finally:
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM


def test_every_shell_counts_the_same(image: Image) -> None:
    """A device whose shell is another one after an update keeps its line in the crontab."""
    for client_id in ("fffbeec0ffee", "SN-00000001", "*.?[a]", "x" * 64):
        script = f'. {LIBEXEC}/chance; number "$1"'
        command = [*image.shell, "-c", script, "number", client_id]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={"PATH": image.path})
        assert int(done.stdout) % 60 == minute(client_id)


@pytest.mark.parametrize("form", ["00163e%06x", "SN-%08d", "unit-%d.example.com"])
def test_the_minutes_of_a_fleet_are_spread_evenly(form: str) -> None:
    """IDs in a row, as a maker's devices have them: chi-squared, 59 degrees of freedom, p about 1e-6."""
    count = 1500
    each = f'number "$(printf "{form}" $((i + 4711)))"'
    script = f". {LIBEXEC}/chance; i=0; while [ $i -lt {count} ]; do {each}; i=$((i + 1)); done"
    done = subprocess.run(["dash", "-c", script], stdout=subprocess.PIPE, check=True)
    minutes = Counter(int(line) % 60 for line in done.stdout.splitlines())
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


def test_options_are_words_as_in_a_shell(init: list[str], tmp_path: Path) -> None:
    (tmp_path / "keep-enrolled").write_text(
        f"#!/bin/sh\nprintf '%s|' \"$@\" >{tmp_path}/draft; mv {tmp_path}/draft {tmp_path}/started\n"
    )
    (tmp_path / "default").write_text("CARAMEL_EMBEDDED_ARGS=\"--hook 'service x  restart' --syslog\"\n")
    call(init, "start")
    until("it has started", (tmp_path / "started").exists)
    assert (tmp_path / "started").read_text() == "--hook|service x  restart|--syslog|"


def test_started_twice_it_runs_once_and_stopped_it_is_gone(init: list[str], tmp_path: Path) -> None:
    call(init, "start")
    until("it has started", (tmp_path / "started").exists)
    assert call(init, "start").returncode == 0
    until("there is one", lambda: len(processes(tmp_path)) == 1)  # what it starts is two until its exec
    assert len((tmp_path / "started").read_text().splitlines()) == 1
    assert call(init, "restart").returncode == 0
    until("it has started anew", lambda: len((tmp_path / "started").read_text().splitlines()) == 2)
    assert call(init, "stop").stdout == "Stopping caramel-embedded: OK\n"
    until("it is gone", lambda: not processes(tmp_path))
    assert call(init, "stop").returncode == 0


def test_stopped_in_a_check_the_check_is_over_too(init: list[str], tmp_path: Path) -> None:
    """Not only told to end: whoever swaps the firmware next finds nothing that still writes or calls a hook."""
    for name in ("until-enrolled", "chance", "keep-enrolled"):
        shutil.copy(LIBEXEC / name, tmp_path)
    check = tmp_path / "check"
    ended = f"/bin/sleep 1; : >{tmp_path}/ended; exit 127"
    forever = "while :; do /bin/sleep 0.1; done"
    check.write_text(f'#!/bin/sh\ntrap "{ended}" TERM\n: >{tmp_path}/asked\n{forever}\n')
    check.chmod(0o755)
    (tmp_path / "default").write_text(f"CARAMEL_EMBEDDED={check}\n")
    call(init, "start")
    until("it checks", (tmp_path / "asked").exists)
    assert call(init, "stop").stdout == "Stopping caramel-embedded: OK\n"
    assert (tmp_path / "ended").exists()
    assert not processes(tmp_path)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("where", ["sbin", "nowhere"])
def test_cron_starts_it_with_a_path_of_its_own(init: list[str], tmp_path: Path, system: str, where: str) -> None:
    """cronie's and Vixie cron's is /usr/bin:/bin, where no start-stop-daemon is; not every system has one at all."""
    require("ash", "flock")
    applets, sbin = small_system(system, tmp_path / "usr-bin"), tmp_path / "sbin"
    sbin.mkdir()
    (applets / "start-stop-daemon").rename(sbin / "start-stop-daemon" if where == "sbin" else tmp_path / "taken away")
    script = Path(init[-1])
    text = script.read_text()
    assert ":/usr/sbin:/sbin" in text
    script.write_text(text.replace(":/usr/sbin:/sbin", f":{sbin}"))
    init = ["env", "-i", f"PATH={applets}", str(applets / "sh"), str(script)]
    assert call(init, "start").stdout == "Starting caramel-embedded: OK\n"
    until("it has its options", lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text())
    assert (tmp_path / "started").read_text() == "--syslog -q 7\n"
    assert call(init, "start").returncode == 0
    assert call(init, "stop").stdout == "Stopping caramel-embedded: OK\n"
    until("it is gone", lambda: not processes(tmp_path))
    assert (tmp_path / "started").read_text() == "--syslog -q 7\n", "it was started once"


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


# --- A device -------------------------------------------------------------------------------------------

RCS = """#!/bin/sh
mount -t proc proc /proc
for script in /etc/init.d/S??*; do
    "$script" start
done
: >/booted
"""

#: Writes down its options, one a line, and a setting that only /etc/default has.
RECORDER = """#!/bin/sh
case "$*" in
*--status*) printf '{"client_id": "%s"}\\n' "$CARAMEL_CN"; exit 127 ;;
esac
printf '%s\\n' "$@" "CARAMEL_CN=$CARAMEL_CN" end >>/asked
echo '{"status": 0, "retry_after": null}'
"""


@slow
@needs("mounts", "busybox-crond")
def test_busybox_boots_and_its_cron_makes_the_same_check(tmp_path: Path) -> None:
    """init, shell, start-stop-daemon and crond are BusyBox's. Takes up to a minute: that's how often crond looks."""
    root = tmp_path / "root"
    etc, var = ("etc/default", "etc/init.d"), ("var/run", "var/spool/cron/crontabs")
    for folder in ("bin", "dev", "proc", *etc, "usr/bin", "usr/sbin", *var):
        (root / folder).mkdir(parents=True)
    shutil.copy(busybox_with_crond() or "", root / "bin/busybox")
    subprocess.run(["chroot", str(root), "/bin/busybox", "--install", "-s", "/bin"], check=True)
    subprocess.run(
        ["make", "-s", "-C", str(ROOT), "-f", "packaging/packaging.mk", "install-sysv", f"DESTDIR={root}"], check=True
    )
    for name, text in (
        ("etc/inittab", "::sysinit:/etc/init.d/rcS\n"),
        ("etc/init.d/rcS", RCS),
        ("etc/init.d/S50crond", "#!/bin/sh\ncrond\n"),
        ("usr/bin/caramel-embedded", RECORDER),
        ("etc/default/caramel-embedded", 'CARAMEL_EMBEDDED_ARGS="--hook \'a  \\"b\\"\' -q"\nCARAMEL_CN=unit-0001\n'),
        ("etc/passwd", "root:x:0:0:root:/:/bin/sh\n"),
        ("dev/urandom", os.urandom(64).hex()),
    ):
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    (root / "dev/null").touch()

    def asked() -> list[str]:
        return (root / "asked").read_text().split("end\n")[:-1] if (root / "asked").exists() else []

    device = Daemon(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "chroot", str(root), "/bin/busybox", "init"],
        tmp_path / "log",
        {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    with device:
        until("the boot is over", (root / "booted").exists)
        until("it checks", asked)
        crontab = root / "var/spool/cron/crontabs/root"
        until("cron takes over", crontab.exists)
        made, _, rest = crontab.read_text().partition(" ")
        assert 0 <= int(made) <= 59
        assert rest == "* * * * /etc/init.d/S95caramel-embedded start >/dev/null 2>&1 # caramel-embedded\n"
        # Not within the hour, but now.
        crontab.write_text(f"* {rest}")
        (crontab.parent / "cron.update").write_text("root\n")
        until("cron checks", lambda: len(asked()) > 1, 130, 0.5)
    expected = '--json\n--hook\na  "b"\n-q\nCARAMEL_CN=unit-0001\n'
    assert asked()[:2] == [expected] * 2
