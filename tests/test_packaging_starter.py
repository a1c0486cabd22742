"""The starter: whatever becomes of Python and of the shell, one of the four statuses, and nobody left behind."""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from world import environment

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / "packaging/starter/caramel-embedded"

SHELLS = {"dash": ["dash"], "bash": ["bash"], "busybox": ["busybox", "sh"]}

#: In the place of the program: ends as its first argument says.
STUB = """
import os, signal, sys, time

def main(locked=1):
    what = sys.argv[1]
    if what == "sleep":
        # No handlers of Python's: one that comes just before the sleep would be seen only after it.
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    if what == "ignored":
        with open("/proc/self/status") as file:
            print(file.read().split("SigIgn:")[1].split()[0], flush=True)
        os._exit(0)
    if what == "locked":
        os._exit(locked)
    if what == "killed":
        os.kill(os.getpid(), int(sys.argv[2]))
    if what == "raise":
        raise RuntimeError("traceback")
    os._exit(int(what))
"""


@pytest.fixture(params=sorted(SHELLS))
def shell(request: pytest.FixtureRequest) -> list[str]:
    words = SHELLS[request.param]
    if not shutil.which(words[0]):
        pytest.skip(f"{words[0]} is not installed")
    return words


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter in an environment of its own, with the stub as the program."""
    folder = tmp_path_factory.mktemp("starter")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "caramel_embedded").mkdir()
    (packages / "caramel_embedded/__init__.py").touch()
    (packages / "caramel_embedded/__main__.py").write_text(STUB)
    shutil.copy(STARTER, folder / "bin/caramel-embedded")
    return folder / "bin/caramel-embedded"


def clean() -> dict[str, str]:
    return {name: value for name, value in environment().items() if not name.startswith("COVERAGE_")}


def run(
    *command: object, prepare: Callable[[], object] = lambda: None, ignored: Iterable[int] = ()
) -> subprocess.CompletedProcess[str]:
    def before() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        prepare()

    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=clean(),
        preexec_fn=before,
        restore_signals=False,
        timeout=60,
    )


# --- Statuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "status"),
    [("0", 0), ("69", 69), ("locked", 1), *((str(n), 127) for n in (1, 2, 64, 68, 70, 76, 120, 126, 127, 128, 255))],
)
def test_only_what_has_a_meaning_gets_out(starter: Path, shell: list[str], inner: str, status: int) -> None:
    assert run(*shell, starter, inner).returncode == status


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM])
def test_a_python_that_is_killed_is_127_and_is_told_of(starter: Path, shell: list[str], number: int) -> None:
    done = run(*shell, starter, "killed", number, prepare=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)))
    assert (done.returncode, done.stdout) == (127, "")
    assert f"ended with status {128 + number}" in done.stderr


def test_a_traceback_is_127(starter: Path, shell: list[str]) -> None:
    done = run(*shell, starter, "raise")
    assert (done.returncode, "ended with status 1" in done.stderr) == (127, True)


def test_a_damaged_standard_library_is_127(tmp_path: Path, shell: list[str]) -> None:
    """A real interpreter that finds the place of its library, and next to nothing there."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (tmp_path / "bin").mkdir()
    shutil.copy(os.path.realpath(sys.executable), tmp_path / "bin/python3")
    (tmp_path / "lib" / version / "lib-dynload").mkdir(parents=True)
    (tmp_path / "lib" / version / "os.py").touch()  # what getpath.py knows the place by
    shutil.copy(STARTER, tmp_path / "bin/caramel-embedded")
    assert run(tmp_path / "bin/python3", "-I", "-c", "").returncode == 1, "this Python isn't damaged"
    done = run(*shell, tmp_path / "bin/caramel-embedded")
    assert (done.returncode, done.stdout) == (127, "")


def test_too_little_memory_is_127(starter: Path, shell: list[str]) -> None:
    statuses = []
    for size in range(6, 64, 2):
        limit = size << 20
        done = run(*shell, starter, "0", prepare=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))  # noqa: B023
        statuses.append(done.returncode)
        if done.returncode == 0:
            break
    assert statuses[-1] == 0
    assert set(statuses[:-1]) == {127}


def test_too_few_descriptors_are_never_taken_for_locked(starter: Path, shell: list[str]) -> None:
    statuses = set()
    for count in range(3, 14):
        done = run(*shell, starter, "0", prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count)))  # noqa: B023
        statuses.add(done.returncode)
    # 2: dash and ash keep the script open at 10 or above; where they can't, not one line of it has run.
    assert 0 in statuses
    assert statuses <= {0, 2, 127}


@pytest.mark.parametrize("name", ["dash", "busybox"])  # bash tries for 15 seconds
def test_no_process_to_be_had_is_127(name: str) -> None:
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")

    def nobody() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        if os.geteuid() == 0:  # whom the limit doesn't hold
            # A user of whom nothing runs: else not even the shell could be started (execve(2), EAGAIN).
            os.setgid(64321)
            os.setuid(64321)

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copy(STARTER, folder)
        done = run(*SHELLS[name], Path(folder) / "caramel-embedded", "0", prepare=nobody)
    assert (done.returncode, "fork" in done.stderr) == (127, True)


def test_it_says_which_python_can_not_be_run(tmp_path: Path, shell: list[str]) -> None:
    launcher = tmp_path / "caramel-embedded"
    shutil.copy(STARTER, launcher)
    python = tmp_path / "python3"
    python.write_bytes(b"\x7fELF, of some other processor")
    python.chmod(0o755)
    done = run(*shell, launcher)
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr


def test_without_the_package_it_is_127(tmp_path: Path, shell: list[str]) -> None:
    venv.create(tmp_path, with_pip=False, symlinks=True)
    shutil.copy(STARTER, tmp_path / "bin/caramel-embedded")
    done = run(*shell, tmp_path / "bin/caramel-embedded")
    assert (done.returncode, done.stdout) == (127, "")
    assert "No module named 'caramel_embedded'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- Signals --------------------------------------------------------------------------------------------


def traps_are_set(pid: int) -> bool:
    """Whether the starter's first lines have run: it catches the last signal of its list (proc(5), SigCgt).

    TERM and others bash catches by itself, before it reads a script.
    """
    number = signal.SIGPWR
    with open(f"/proc/{pid}/status") as file:
        return bool(int(file.read().split("SigCgt:")[1].split()[0], 16) >> number - 1 & 1)


def interrupted(command: list[str], number: int, delay: float, *, group: bool) -> tuple[int, float]:
    """Status, and seconds from the signal to the end, of a run that gets it `delay` seconds after its traps."""
    process = subprocess.Popen(
        command, env=clean(), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not traps_are_set(process.pid):
        assert process.poll() is None
    began = time.monotonic()
    while time.monotonic() - began < delay:
        pass
    (os.killpg if group else os.kill)(process.pid, number)
    sent = time.monotonic()
    status = process.wait(60)
    took = time.monotonic() - sent
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # anybody of it, a zombie too
    return status, took


#: Every millisecond to 40, and closely where the shell forks.
INSTANTS = [n * 0.001 for n in range(40)] + [n * 0.00005 for n in range(30)]


@pytest.mark.parametrize("group", [False, True], ids=["itself", "its group"])
@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_at_any_time_is_127_at_once(starter: Path, shell: list[str], name: str, group: bool) -> None:
    number = getattr(signal, f"SIG{name}")
    ends = [interrupted([*shell, str(starter), "sleep", "1.5"], number, t, group=group) for t in INSTANTS]
    late = [end for end in ends if end[1] > 1]
    # A signal in the moment between bash's last look for one and its wait is seen only when Python has ended.
    assert len(late) <= (2 if shell == ["bash"] else 0), late
    assert {status for status, took in ends if took <= 1} == {127}


def test_other_signals_are_127_too(starter: Path, shell: list[str]) -> None:
    names = ["QUIT", "PIPE", "ALRM", "USR2", "PROF", "XCPU", "XFSZ", "PWR", "VTALRM"]
    for name in names:
        number = getattr(signal, f"SIG{name}")
        assert interrupted([*shell, str(starter), "sleep", "5"], number, 0.1, group=False)[0] == 127, name


def test_a_signal_that_the_caller_ignores_stays_ignored(starter: Path, shell: list[str]) -> None:
    process = subprocess.Popen(
        [*shell, str(starter), "sleep", "0.5"],
        env=clean(),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        start_new_session=True,
    )
    while not traps_are_set(process.pid):
        assert process.poll() is None
    for _ in range(10):
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(0.02)
    assert process.wait(60) == 0


@pytest.mark.parametrize("number", [0, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
def test_python_ignores_what_the_caller_ignores_and_nothing_more(
    starter: Path, shell: list[str], number: int
) -> None:
    done = run(*shell, starter, "ignored", ignored=[number] if number else [])
    mask = int(done.stdout, 16)
    asked = [n for n in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM) if mask >> n - 1 & 1]
    assert (done.returncode, asked) == (0, [number] if number else [])


@pytest.mark.parametrize(("inner", "status"), [("0", 0), ("69", 69), ("locked", 1), ("3", 127)])
def test_a_caller_that_ignores_its_children_changes_nothing(
    starter: Path, shell: list[str], inner: str, status: int
) -> None:
    assert run(*shell, starter, inner, ignored=[signal.SIGCHLD]).returncode == status


# --- The right Python -----------------------------------------------------------------------------------


def python_that_tells(folder: Path) -> Path:
    """A folder with the starter and a python3 that says where it is and what it was given."""
    folder.mkdir()
    shutil.copy(STARTER, folder / "caramel-embedded")
    other_python(folder)
    return folder / "caramel-embedded"


def other_python(folder: Path) -> None:
    python = folder / "python3"
    python.write_text('#!/bin/sh\nprintf "%s|" "${0%/*}" "$1" "$2" "$3" "$5" "$6"\n')
    python.chmod(0o755)


def test_it_takes_the_python_beside_it(tmp_path: Path, shell: list[str]) -> None:
    launcher = python_that_tells(tmp_path / "a b")
    done = run(*shell, launcher, "--client-id", "two words")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/a b|-I|-B|-c|--client-id|two words|")


@pytest.mark.parametrize("with_python", [False, True])
def test_by_way_of_a_link_it_takes_the_python_beside_the_real_one(
    tmp_path: Path, shell: list[str], with_python: bool
) -> None:
    launcher = python_that_tells(tmp_path / "real")
    (tmp_path / "local").mkdir()
    if with_python:
        other_python(tmp_path / "local")
    (tmp_path / "between").symlink_to(launcher)
    (tmp_path / "local/caramel-embedded").symlink_to(tmp_path / "between")
    done = run(*shell, tmp_path / "local/caramel-embedded", "--version")
    assert (done.returncode, done.stdout.split("|")[0]) == (0, f"{tmp_path}/real")


def test_it_is_a_program_and_posix(tmp_path: Path) -> None:
    assert stat.S_IMODE(STARTER.stat().st_mode) & 0o111 == 0o111
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = run("shellcheck", STARTER)
    assert (done.returncode, done.stdout) == (0, "")


# --- What it needs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "word"),
    [("fasteners", "fasteners"), ("urllib3", "urllib3"), ("OpenSSL", "pyOpenSSL"), ("cryptography", "cryptography")],
)
def test_each_package_that_is_missing_is_named(tmp_path: Path, missing: str, word: str) -> None:
    """The real program, on a device that has all packages but one, at its first run."""
    venv.create(tmp_path / "device", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "device").glob("lib/python*/site-packages")
    names = {
        "fasteners",
        "urllib3",
        "OpenSSL",
        "cryptography",
        "cffi",
        "_cffi_backend",
        "pycparser",
        "typing_extensions",
    }
    for name in names - {missing}:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue  # newer releases do without some of them
        origin = Path(spec.origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        (packages / source.name).symlink_to(source)
    (packages / "caramel_embedded").symlink_to(ROOT / "caramel_embedded")
    shutil.copy(STARTER, tmp_path / "device/bin/caramel-embedded")
    folder = tmp_path / "identity"
    authority = tmp_path / "ca.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ca", "-keyout", os.devnull]
    subprocess.run([*command, "-out", str(authority)], check=True, stderr=subprocess.DEVNULL)
    done = run(
        tmp_path / "device/bin/caramel-embedded", "--server", "localhost:1", "--client-id", "x",
        "--ca-cert", authority, "--key-file", folder / "identity.pem", "--config", os.devnull,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (127, "")
    assert f"lacks the Python package {word}" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "identity.pem").exists() or not (folder / "identity.pem").read_bytes()
