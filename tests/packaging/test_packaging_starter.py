"""The starter: whatever becomes of Python, and whenever a signal comes, one of the four statuses leaves it.

Most of these runs have a stand-in for the program, which ends as a test wants it to: what is under test is the shell
script and the words of Python in it. The script is the same one in the one-file program (test_packaging.py).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
from needs import needs, require, slow
from world import PLAIN, ROOT, Authority, Device, environment, strays

STARTER = ROOT / "packaging/starter/caramel-embedded"

#: Shells that devices have as /bin/sh.
SHELLS = {"dash": ["dash"], "bash": ["bash"], "bash-posix": ["bash", "--posix"], "busybox": ["busybox", "sh"]}

#: Ends as its arguments say; "locked" as the program does where the key file is locked.
STAND_IN = """\
import os, signal, sys, time

def main(arguments=None, statuses={}):
    what, *rest = sys.argv[1:] or ["exit", "0"]
    if what == "locked":
        os._exit(statuses[1])
    if what == "exit":
        os._exit(int(rest[0]) or statuses[0])  # "exit 0" is a good end; all else is as it is
    if what == "kill":
        os.kill(os.getpid(), getattr(signal, rest[0]))
    if what == "raise":
        raise ValueError(rest)
    if what == "tell":
        with open("/proc/self/status") as file:
            ignored = [line.split()[1] for line in file if line.startswith("SigIgn")]
        os.write(1, "|".join([*ignored, os.readlink("/proc/self/fd/0"), sys.executable, *rest]).encode())
        os._exit(statuses[0])
    if what in ("sleep", "hang"):
        if what == "hang":  # as in a library that never comes back to Python
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        os.write(1, b"asleep")
        time.sleep(float(rest[0]))
        os._exit(statuses[0])
"""


#: Bash is rarely what a device has as /bin/sh; `make test-all` has it.
@pytest.fixture(params=[pytest.param(name, marks=slow if "bash" in name else ()) for name in sorted(SHELLS)])
def shell(request: pytest.FixtureRequest) -> list[str]:
    require(SHELLS[request.param][0])
    return SHELLS[request.param]


@pytest.fixture(scope="module")
def bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Python that has the stand-in, and the starter beside it."""
    folder = tmp_path_factory.mktemp("a python")
    python_with(folder)
    return folder / "bin"


def python_with(folder: Path) -> None:
    venv.create(folder, with_pip=False, symlinks=True)
    (package,) = folder.glob("lib/python3*/site-packages")
    (package / "caramel_embedded").mkdir()
    (package / "caramel_embedded/__init__.py").touch()
    (package / "caramel_embedded/__main__.py").write_text(STAND_IN)
    text = STARTER.read_text()
    assert "range(250)" in text
    (folder / "bin/caramel-embedded").write_text(text.replace("range(250)", "range(25)"))
    (folder / "bin/caramel-embedded").chmod(0o755)


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    kept = {name: value for name, value in environment().items() if not name.startswith("COVERAGE_")}
    return subprocess.run(words, capture_output=True, text=True, env=kept, timeout=60, **options)


def start(*command: Any, **options: Any) -> subprocess.Popen[bytes]:
    words = [str(word) for word in command]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), **options)


# --- How Python ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ("exit 0", 0),
        ("exit 69", 69),
        ("locked", 1),
        ("exit 1", 127),
        ("exit 2", 127),
        ("exit 120", 127),
        ("exit 126", 127),
        ("exit 127", 127),
        ("exit 255", 127),
        ("kill SIGKILL", 127),
        ("kill SIGSEGV", 127),
        ("kill SIGABRT", 127),
        ("kill SIGTERM", 127),
        # The shell's own number for it, 129, is also that of a wait that was interrupted.
        ("kill SIGHUP", 127),
        ("raise", 127),
    ],
)
def test_only_the_four_statuses_leave_it(shell: list[str], bin: Path, ends: str, status: int) -> None:
    done = run(*shell, bin / "caramel-embedded", *ends.split())
    assert (done.returncode, done.stdout) == (status, "")
    said = "caramel-embedded: " in done.stderr
    assert said == (status == 127 and ends not in ("exit 126", "exit 127")), done.stderr
    # Standard error may be closed, and nobody may read it.
    assert (
        run("sh", "-c", 'exec "$@" 2>&-', "sh", *shell, bin / "caramel-embedded", *ends.split()).returncode == status
    )


def test_locked_is_1_by_the_program_itself(shell: list[str], tmp_path: Path, authority: Authority) -> None:
    device = Device(tmp_path, "localhost:9", authority.certificate_file, command=[*shell, PLAIN])
    device.has(authority.identity("fffbeec0ffee"))
    run = device.run(before=["flock", str(device.key_file)])
    assert (run.status, run.err.count("\n")) == (1, 1), run


def test_arguments_reach_python_as_they_are(shell: list[str], bin: Path) -> None:
    words = ["two words", "", "*", "$HOME", "a\nb", "\\", "'", '"', "-c", "é"]
    done = run(*shell, bin / "caramel-embedded", "tell", *words)
    assert done.stdout.split("|", 3)[3] == "|".join(words)


# --- Python can't start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["no encodings", "half a file", "ends with 1"])
def test_a_damaged_standard_library(shell: list[str], tmp_path: Path, damage: str) -> None:
    """With the parts of it that no Python has inside its own executable."""
    python_with(tmp_path / "venv")
    source = Path(os.__file__).parent
    library = tmp_path / "lib" / source.name
    library.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in ("encodings", "__pycache__"):
            (library / path.name).symlink_to(path)
    if damage != "no encodings":
        shutil.copytree(source / "encodings", library / "encodings", ignore=shutil.ignore_patterns("__pycache__"))
        module = library / "encodings/__init__.py"
        text = "import posix\nposix._exit(1)\n" if "1" in damage else "def f(:\n"
        module.write_text(text)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(Path(sys.executable).resolve())
    python = tmp_path / "venv/bin/python3"
    python.unlink()
    python.symlink_to(tmp_path / "bin/python3")
    config = tmp_path / "venv/pyvenv.cfg"
    config.write_text(re.sub(r"(?m)^home = .*$", f"home = {tmp_path}/bin", config.read_text()))
    assert run(python, "-I", "-c", "pass").returncode == 1, "what it is about"
    done = run(*shell, tmp_path / "venv/bin/caramel-embedded")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr.splitlines()[-1].endswith(f"{python} ended with status 1")


@pytest.mark.parametrize(
    "instead", ["nothing", "a folder", "no mode", "some other processor's", "a script of nobody", "emptied", "zeros"]
)
def test_no_working_python(shell: list[str], tmp_path: Path, instead: str) -> None:
    shutil.copy(STARTER, tmp_path)
    python = tmp_path / "python3"
    if instead == "a folder":
        python.mkdir()
    elif instead == "nothing":
        # Not even one on the path: in the starter's own words, so that the test doesn't need a machine without.
        text = STARTER.read_text().replace("/usr/bin/python3", "/nonexistent/python3")
        (tmp_path / STARTER.name).write_text(text.replace("python=python3", "python=no-python3"))
    else:
        # The last two are what a power cut leaves of a file on flash: a shell takes either for an empty script.
        contents = {"a script of nobody": b"#!/nonexistent\n", "emptied": b"", "zeros": bytes(999)}
        python.write_bytes(contents.get(instead, b"\x7fELF"))
        python.chmod(0o755)
    if instead == "no mode":
        text = STARTER.read_text().replace("-x ", "-e ")
        (tmp_path / STARTER.name).write_text(text)
        python.chmod(0o644)
    done = run(*shell, tmp_path / STARTER.name)
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr


def test_too_little_memory(shell: list[str], bin: Path) -> None:
    """From what a shell alone needs to what is enough."""
    seen: Counter[int] = Counter()
    for mebibytes in range(6, 21):
        limit = ["prlimit", f"--as={mebibytes << 20}"]
        if run(*limit, *shell, "-c", "exit 42").returncode != 42:
            continue
        process = start(*limit, *shell, bin / "caramel-embedded", start_new_session=True)
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            # Some interpreters turn in circles where not even the error's text fits, with or without a starter.
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        seen[process.returncode] += 1
    assert seen.keys() <= {0, 127, -signal.SIGKILL}
    assert seen[0] and seen[127] >= 3 > seen[-signal.SIGKILL], seen


@pytest.mark.parametrize("count", range(3, 15))
def test_too_few_descriptors(shell: list[str], bin: Path, tmp_path: Path, count: int) -> None:
    """dash and BusyBox need 12 to read a script at all; with fewer they end with 2 before its first word."""
    (tmp_path / "empty").write_text("exit 42\n")
    limit = ["prlimit", f"--nofile={count}"]
    reads = run(*limit, *shell, tmp_path / "empty").returncode == 42
    assert reads or count < 12
    for ends, status in (("exit 0", 0), ("exit 69", 69), ("exit 1", 127), ("kill SIGSEGV", 127), ("locked", 1)):
        done = run(*limit, *shell, bin / "caramel-embedded", *ends.split())
        if reads:
            assert done.returncode == status or (count < 12 and done.returncode == 127)
        else:
            assert done.returncode not in (0, 1, 69)
    link = tmp_path / "link"
    link.symlink_to(bin / "caramel-embedded")
    assert run(*limit, *shell, link, "exit", "1").returncode == (127 if reads else done.returncode)


def test_no_process_to_be_had(shell: list[str], bin: Path) -> None:
    if shell[0] == "bash":
        return  # it tries again for 15 seconds, and ends the same way
    user = ["setpriv", "--reuid=65534", "--clear-groups"] if os.getuid() == 0 else []
    for folder in reversed(bin.parents):
        if folder.stat().st_uid == os.getuid() and os.getuid() == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    done = run(*user, "prlimit", "--nproc=1", *shell, bin / "caramel-embedded")
    assert (done.returncode, done.stdout) == (127, "")
    assert "fork" in done.stderr


def test_without_the_package(shell: list[str], tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False, symlinks=True)
    shutil.copy(STARTER, tmp_path / "bin")
    done = run(*shell, tmp_path / "bin/caramel-embedded")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "caramel-embedded: can not start: ModuleNotFoundError: No module named 'caramel_embedded'\n"


# --- Which Python ---------------------------------------------------------------------------------------


def test_a_link_leads_to_the_python_beside_the_starter(shell: list[str], bin: Path, tmp_path: Path) -> None:
    """Also from a folder with a Python of its own, as /usr/local/bin is, and below a folder that is a link."""
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 69\n")
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "first").symlink_to(bin / "caramel-embedded")
    (tmp_path / "second").symlink_to("first")
    (tmp_path / "current").symlink_to(bin.parent)
    for name in ("first", "second", "current/bin/caramel-embedded"):
        done = run(*shell, tmp_path / name, "tell", cwd="/")
        beside = tmp_path / name if "/" in name else bin / "caramel-embedded"
        assert (done.returncode, done.stdout.split("|", 2)[2]) == (0, str(beside.parent / "python3")), done.stderr
    done = run(*shell, "-c", 'exec "$0" tell', "./second", cwd=tmp_path)
    assert done.stdout.endswith(f"|{bin}/python3")


def test_the_current_folder_is_not_where_python_is_looked_for(shell: list[str], tmp_path: Path) -> None:
    shutil.copy(STARTER, tmp_path)
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 69\n")
    (tmp_path / "python3").chmod(0o755)
    require("debian-python")
    assert run(*shell, STARTER.name, "--nonsense", cwd=tmp_path).returncode == 127


# --- Its surroundings ---


@slow
def test_a_path_beyond_ascii_is_one_file_in_every_locale(tmp_path: Path, authority: Authority) -> None:
    """Python would encode it as the locale does, and a device would have one identity at boot, another by hand."""
    require("localedef")
    for charset in ("ISO-8859-1", "UTF-8"):
        run("localedef", "--no-archive", "-i", "sv_SE", "-f", charset, tmp_path / f"sv_SE.{charset}")
    device = Device(tmp_path / "disk", "localhost:9", authority.certificate_file, command=[PLAIN])
    device.key_file, config = tmp_path / "disk/nyckel-ö/id.pem", device.config
    assert config
    config.write_text(f"CARAMEL_KEY_FILE='{device.key_file}'\n", encoding="utf-8")
    options = ["--server", "localhost:9", "--ca-cert", str(authority.certificate_file), "--config", str(config)]
    for locale in ("sv_SE.ISO-8859-1", "sv_SE.UTF-8", "C", "POSIX"):
        done = device.run(*options, "--client-id", "x", bare=True, env={"LC_ALL": locale, "LOCPATH": str(tmp_path)})
        assert done.status == 127 and "can't be reached" in done.err
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"empty.conf", "nyckel-ö"}
    assert sorted(path.name for path in device.key_file.parent.iterdir()) == ["id.pem"]


# --- Signals --------------------------------------------------------------------------------------------

#: What would end a process and can be caught, but for the faults of a process itself.
ENDING = ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "XCPU", "IO", "PWR"]
ENDING += ["ABRT", "TRAP", "SYS"]


def calls_until_end(shell: Sequence[str], bin: Path, trace: Path) -> list[tuple[str, int]]:
    """The system calls of the shell in one run as (name, how many times so far), from the one that makes it catch
    SIGTERM to the one in which it waits for Python.
    """
    run("strace", "-qq", "-o", trace, *shell, bin / "caramel-embedded", "sleep", "0.1")
    seen: Counter[str] = Counter()
    calls: list[tuple[str, int]] = []
    ready = last = 0
    for line in trace.read_text().splitlines():
        match = re.match(r"(\w+)\((.*)", line)
        if not match or match[1] in ("execve", "exit_group"):
            continue
        seen[match[1]] += 1
        calls.append((match[1], seen[match[1]]))
        if match[1] == "rt_sigaction" and re.match("SIGTERM, {sa_handler=0x", match[2]):
            ready = len(calls)
        if "ERESTART" in line or (match[1] == "wait4" and "WIFEXITED" in line):
            last = last or len(calls)
    assert 0 < ready < last, "the trace is not understood"
    return calls[ready - 1 : last]


@slow
@pytest.mark.parametrize("name", ["TERM", "INT"])
@needs("strace")
def test_a_signal_at_any_system_call_of_the_shell(shell: list[str], bin: Path, tmp_path: Path, name: str) -> None:
    calls = calls_until_end(shell, bin, tmp_path / "trace")
    assert len(calls) > 20
    if name != "TERM":
        calls = calls[::4]
    for call, number in calls:
        began = time.monotonic()
        inject = f"inject={call}:signal=SIG{name}:when={number}"
        done = run("strace", "-qq", "-o", "/dev/null", "-e", inject, *shell, bin / "caramel-embedded", "sleep", "20")
        assert (done.returncode, time.monotonic() - began < 15) == (127, True), (call, number, done)
        assert not strays(), (call, number)


@slow
@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_a_signal_at_any_moment(shell: list[str], bin: Path, group: bool) -> None:
    """In the first milliseconds a shell has not yet read its script, and dies of it; nothing was started."""
    late = 0
    for step in range(41):
        process = start(*shell, bin / "caramel-embedded", "sleep", "20", start_new_session=True)
        time.sleep(step / 1000)
        (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
        process.communicate(timeout=15)
        assert process.returncode in (127, -signal.SIGTERM)
        late += process.returncode == 127
        assert not strays(), step
    assert late > 10


def asleep(*command: Any) -> subprocess.Popen[bytes]:
    """A run, once Python is at it, in a process group of its own."""
    process = start(*command, start_new_session=True)
    assert process.stdout and process.stdout.read(6) == b"asleep"
    return process


@pytest.mark.parametrize(
    "name", [name if name in ("HUP", "INT", "TERM") else pytest.param(name, marks=slow) for name in ENDING]
)
def test_a_signal_ends_the_run(shell: list[str], bin: Path, name: str) -> None:
    process = asleep(*shell, bin / "caramel-embedded", "sleep", "20")
    process.send_signal(getattr(signal, "SIG" + name))
    out, err = process.communicate(timeout=15)
    assert (process.returncode, out) == (127, b"")
    assert err.splitlines()[-1] == b"caramel-embedded: ended by a signal"


@pytest.mark.parametrize("group", [False, True], ids=["process", "group"])
def test_what_has_not_ended_after_a_signal_is_killed(shell: list[str], bin: Path, group: bool) -> None:
    """Half a second later here, however many more signals come. Nothing is left, the second process included."""
    process = asleep(*shell, bin / "caramel-embedded", "hang", "50")
    for name in ("TERM", "HUP", "INT", "TERM"):
        (os.killpg if group else os.kill)(process.pid, getattr(signal, "SIG" + name))
        time.sleep(0.05)
    lines = [path.read_bytes() for path in Path("/proc").glob(f"{process.pid}/task/*/children")]
    assert sum(len(line.split()) for line in lines) == 2, "Python, and one that waits, not one for each signal"
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (127, b"")
    assert err.splitlines()[-1] == b"caramel-embedded: ended by a signal"
    assert not strays()


@pytest.mark.parametrize("name", ["PIPE", "XFSZ", "CHLD", "WINCH", "URG", "CONT"])
def test_a_signal_that_python_ignores_ends_nothing(shell: list[str], bin: Path, name: str) -> None:
    process = asleep(*shell, bin / "caramel-embedded", "sleep", "0.3")
    for _ in range(3):
        process.send_signal(getattr(signal, "SIG" + name))
        time.sleep(0.03)
    process.communicate(timeout=15)
    assert process.returncode == 0


def ignoring(names: Optional[str]) -> list[str]:
    """What stands before a command so that its caller ignores these signals."""
    return ["sh", "-c", f"trap '' {names}; exec \"$@\"", "sh"] if names else []


def masks(*command: Any, ignored: Optional[str] = None) -> tuple[int, int]:
    """What Python ignores: started by the starter, and started by itself."""
    found = []
    for words in (
        command,
        [command[-2].parent / "python3", "-I", "-c", "from caramel_embedded.__main__ import main; main()", "tell"],
    ):
        found.append(int(run(*ignoring(ignored), *words).stdout.split("|")[0], 16))
    return found[0], found[1]


@pytest.mark.parametrize("ignored", [None, "HUP", "INT", "QUIT", "INT QUIT HUP TERM", "CHLD"])
def test_what_is_ignored_is_what_the_caller_ignores(shell: list[str], bin: Path, ignored: Optional[str]) -> None:
    """No more of it, though a shell makes what it starts in the background ignore SIGINT and SIGQUIT: a hook and what
    it starts would inherit that.
    """
    started, alone = masks(*shell, bin / "caramel-embedded", "tell", ignored=ignored)
    chld = 1 << signal.SIGCHLD - 1
    assert started & ~chld == alone & ~chld


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "TERM"])
def test_an_ignored_signal_ends_nothing(shell: list[str], bin: Path, name: str) -> None:
    process = asleep(*ignoring(name), *shell, bin / "caramel-embedded", "sleep", "0.3")
    os.killpg(process.pid, getattr(signal, "SIG" + name))
    process.communicate(timeout=15)
    assert process.returncode == 0


@pytest.mark.parametrize(("ends", "status"), [("exit 0", 0), ("locked", 1), ("exit 69", 69), ("exit 1", 127)])
def test_a_caller_that_ignores_its_children(shell: list[str], bin: Path, ends: str, status: int) -> None:
    """Of a child that ends where SIGCHLD is ignored, the kernel keeps no status (wait(2))."""
    assert run(*ignoring("CHLD"), *shell, bin / "caramel-embedded", *ends.split()).returncode == status


# --- What it costs --------------------------------------------------------------------------------------


@needs("strace")
def test_it_starts_one_program_and_no_other(shell: list[str], bin: Path, tmp_path: Path) -> None:
    """Each costs a small device tens of milliseconds at every check; `make bench` measures what the shell does."""
    trace = tmp_path / "trace"
    run(
        "strace",
        "-f",
        "-qq",
        "-e",
        "trace=execve,clone,clone3,fork,vfork",
        "-o",
        trace,
        *shell,
        bin / "caramel-embedded",
    )
    calls = Counter(line.split()[1].partition("(")[0] for line in trace.read_text().splitlines() if " = " in line)
    assert calls.pop("execve") == 2  # the shell itself, and Python
    assert sum(calls.values()) == 1
