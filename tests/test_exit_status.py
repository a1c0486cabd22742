"""Exit status: 0, 1, 69 or 127, and no other, whatever surrounds the program.

What gives 0 and 69 is in `test_life.py`, 1 in `test_lock.py`, most of 127 in `test_bad_input.py`. Here is what would
end a Python program with a status of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import world
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from needs import slow
from world import COMMAND, PLAIN, Answer, Authority, Device, HttpRequest, Run, Scripted, answers, hours, now

ID = "fffbeec0ffee"
PYTHON = str(Path(PLAIN).parent / "python")


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="exit-status.pem")


@pytest.fixture
def nobody(tmp_path: Path, authority: Authority) -> Device:
    """A device in good order, whose server is not there."""
    device = Device(tmp_path / "device", "localhost:9", authority.certificate_file, ID)
    device.has(authority.identity(ID, not_before=now() - hours(1)))
    return device


def shell(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A POSIX shell runs the script; the command under test is `$0`."""
    return subprocess.run(
        ["sh", "-c", script, COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=world.environment(),
        timeout=60,
        **options,
    )


# --- The command line ---


@pytest.mark.parametrize(
    "option, starts", [("--version", "caramel-embedded "), ("--help", "usage: "), ("-h", "usage: ")]
)
def test_asking_for_a_text_is_no_failure(nobody: Device, option: str, starts: str) -> None:
    run = nobody.run(option, bare=True)
    assert (run.status, run.err) == (0, "")
    assert run.out.startswith(starts) and run.out.endswith("\n")
    # Nothing else on the line matters then, nor what is wrong with the device.
    assert nobody.run("--config", "/nonexistent", option, bare=True).status == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["-x"],
        ["surplus"],
        ["--server"],
        ["--ser", "localhost"],
        ["-v", "-q"],
        ["--timeout"],
        ["--verbose=yes"],
        ["--status=yes"],
        ["--"],
        ["", ""],
        ["-"],
    ],
)
def test_wrong_usage(nobody: Device, arguments: list[str]) -> None:
    nobody.server = None
    before = nobody.snapshot()
    run = nobody.run(*arguments)
    assert (run.status, run.out) == (127, "")
    assert run.err.startswith("caramel-embedded: ") and "Traceback" not in run.err
    assert nobody.snapshot() == before


LINES = {
    "--passwort=secret": "there is no option --passwort; see --help",
    "-psecret": "there is no option -p; see --help",
    "--verbose=secret": "argument -v/--verbose: ignored explicit argument; see --help",
    "web": "there are only options; see --help",
    "--timeout": "argument --timeout: expected one argument; see --help",
    "--timeout 1h": "--timeout: '1h' is no time limit: a number of seconds, more than 0, at most 86400",
    "--server https://x/": "--server: 'https://x/' is no server name: HOST or HOST:PORT, without https:// and path",
    "--mode 999": "--mode: '999' is no octal mode such as 0600 or 0640",
    "--owner nosuch": "--owner: there is no user 'nosuch'",
    "--client-id a,b": "--client-id: 'a,b' is no client ID: 1 to 64 of A-Z a-z 0-9 . _ : -",
    "--instance a/b": "--instance: 'a/b' is no name of an instance: 1 to 64 of A-Z a-z 0-9 . _ : -, "
    "and no dot at first",
    "--config /none": "--config: the configuration file /none is not there",
    "": "no server: name one with --server or CARAMEL_CA",
    "--server x --ca-cert /none": "--ca-cert: the CA certificate /none is not there",
    "--server x --ca-cert /dev/null": "--ca-cert: the CA certificate /dev/null holds no certificate in PEM form",
    "--server localhost:9 --client-id a": "a: localhost:9 can't be reached: Connection refused",
}


@pytest.mark.parametrize("options", LINES)
def test_lines_that_people_act_on(tmp_path: Path, authority: Authority, options: str) -> None:
    config = tmp_path / "conf"
    config.write_text(f"CARAMEL_KEY_FILE={tmp_path}/identity.pem\nCARAMEL_CA_CERT={authority.certificate_file}\n")
    run = Device(tmp_path / "device").run(*options.split(), env={"CARAMEL_CONFIG": str(config)}, bare=True)
    assert (run.status, run.err) == (127, f"caramel-embedded: {LINES[options]}\n")


def fingerprint(pem: bytes) -> str:
    """As `openssl x509 -fingerprint -sha256` begins it."""
    text = x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256())[:8].hex(":").upper()
    return f"(SHA-256 {text}...)"


@pytest.mark.parametrize("what", ["another CA", "a chain", "another name", "pending", "rejected"])
def test_lines_that_people_act_on_about_the_server(tmp_path: Path, authority: Authority, what: str) -> None:
    """Whole lines, and nothing is sent to somebody who isn't the server."""
    other = Authority(tmp_path / "other", [("O", "Another")])
    strange = other.server()
    if what == "a chain":
        strange.write_bytes(strange.read_bytes() + other.pem)
    certificate = {
        "another name": lambda: authority.server(
            ["ca.example.com", "CN=a folder", "*.example.org"], file="names.pem"
        ),
        "another CA": lambda: strange,
        "a chain": lambda: strange,
    }.get(what, lambda: authority.server(file="lines.pem"))()
    says = [answers.REJECTED, answers.PENDING, answers.PENDING] if what == "rejected" else [answers.PENDING]
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    device.has(authority.identity(ID, not_before=now() - hours(1)))
    if what == "pending":
        device.has(authority.identity(ID, certified=False))
    with Scripted(certificate, says) as server:
        device.server = server.address
        run = device.run()
    if what in ("another CA", "a chain", "another name"):
        assert (run.status, server.requests) == (127, [])
    waits = f"request {device.request_hash()} waits to be signed on the server"
    waits += " (Caramel: caramel_tool INI --list, then --sign=ID)"
    wrong = f"{server.address} can't show a certificate that the trusted CA vouches for"
    ours = "C=SE, ST=Östergötland, L=Linköping, O=Example AB, OU=Caramel, CN=Caramel Signing Certificate "
    ours += f"{fingerprint(authority.pem)}"
    line = {
        "another CA": f"{wrong}: unable to get local issuer certificate; it shows O=Another, CN=localhost by "
        f"O=Another {fingerprint(strange.read_bytes())}, and trusted is {ours}",
        "a chain": f"{wrong}: self-signed certificate in certificate chain; it shows O=Another, CN=localhost "
        f"by O=Another {fingerprint(other.pem)}, and trusted is {ours}",
        "another name": f"{wrong}: Hostname mismatch, certificate is not valid for 'localhost'.; the trusted CA does "
        "vouch for the server, for other names: ca.example.com, *.example.org",
        "pending": waits,
        "rejected": "the administrator rejected the request (status 403, Forbidden); the old key is gone; " + waits,
    }
    assert run.err == f"caramel-embedded: {ID}: {line[what]}\n"


def test_arguments_that_are_no_text(nobody: Device) -> None:
    assert shell("exec $0 --server $(printf 'a\\377b') --config /dev/null").returncode == 127


@pytest.mark.parametrize("option", ["--version", "--help", "--status"])
def test_a_closed_or_full_output_is_not_taken_for_success(nobody: Device, option: str) -> None:
    line = [str(word) for word in nobody.arguments(option)[1:]]
    assert shell('exec "$0" "$@" >&-', *line).returncode == 127
    assert shell('exec "$0" "$@" >/dev/full', *line).returncode == 127
    assert shell('exec "$0" "$@" >/dev/full 2>&1', *line).returncode == 127
    assert shell('exec "$0" "$@" >&- 2>&- <&-', *line).returncode == 127
    assert shell('"$0" "$@" | true; exit 0', *line).returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [COMMAND, *line], stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.DEVNULL, env=world.environment()
    )
    os.close(writer)
    assert done.returncode == 127, "nobody reads any more"


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("option", ["--json", "--help"])
def test_an_output_that_nobody_reads_keeps_no_run(nobody: Device, option: str, late: bool, blocking: bool) -> None:
    """A full pipe; what is read in time, however late, arrives whole."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while os.write(writer, b"x" * 4096):
            pass
    os.set_blocking(writer, blocking)
    with (
        open(reader, "rb") as file,
        subprocess.Popen(
            nobody.arguments(option),
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.DEVNULL,
            env=world.environment(),
        ) as run,
    ):
        os.close(writer)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(1)  # it is patient
        said = file.read().lstrip(b"x").decode() if late else ""
        try:
            status = run.wait(10)
        finally:
            run.kill()
    assert status == (0 if late and option == "--help" else 127)
    assert not late or (said.startswith("usage: ") if option == "--help" else json.loads(said)["status"] == 127)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", ">/dev/full 2>&1"])
def test_a_check_needs_no_standard_files(device: Device, closed: str) -> None:
    """And no line of a log ever lands in the key file, which must not get the number 2."""
    line = [str(word) for word in device.arguments("-v")[1:]]
    for _ in range(2):
        assert shell(f'exec "$0" "$@" {closed}', *line).returncode == 69
        assert device.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
        content = device.key_file.read_bytes()
        assert b"".join(block for _, block in device.blocks()) == world.unsealed(content)


# --- What a device lacks ---


def without(device: Device, tmp_path: Path, module: str, instead: str) -> None:
    """The device's Python has something else in the place of a module."""
    folder = tmp_path / "broken"
    path = folder / (module.replace(".", "/") + ".py")
    path.parent.mkdir(parents=True)
    path.write_text(instead)
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); from caramel_embedded.__main__ import main; "
        "main(sys.argv[1:])"
    )
    device.command = [PYTHON, "-I", "-B", "-c", code]


@pytest.mark.parametrize(
    "instead",
    [
        "raise ModuleNotFoundError(\"No module named 'cryptography'\", name='cryptography')",
        "raise ImportError('libssl.so.1.1: cannot open shared object file')",
        "raise SystemExit(1)",
        "raise RuntimeError('built for another Python')",
        "1 /",
    ],
    ids=["missing", "library", "exit", "other-python", "damaged"],
)
def test_a_device_without_cryptography_says_so(tmp_path: Path, authority: Authority, pem: Path, instead: str) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    without(device, tmp_path, "cryptography", instead)
    with Scripted(pem, [answers.UNKNOWN]) as server:
        device.server = server.address
        run = device.run()
    assert (run.status, run.out, server.requests) == (127, "", [])
    assert run.err.count("\n") == 1 and "cryptography" in run.err
    assert not device.key_file.exists()


@pytest.mark.parametrize("module", ["ssl", "http", "socket", "hashlib"])
@pytest.mark.parametrize(
    "instead", ["raise ImportError(name=__name__)", "raise SystemExit(1)", "import sys; sys.exit(2)"]
)
def test_a_device_without_a_part_of_python_says_so(nobody: Device, tmp_path: Path, module: str, instead: str) -> None:
    before = nobody.snapshot()
    without(nobody, tmp_path, module, instead)
    run = nobody.run()
    assert (run.status, run.out) == (127, "")
    assert run.err.startswith("caramel-embedded: ") and "Traceback" not in run.err
    if "ImportError" in instead:
        assert module in run.err
    assert nobody.snapshot() == before


def test_a_launcher_without_its_package(tmp_path: Path) -> None:
    """The package is gone, the command is still there: a half-removed program."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    command = environment / "bin" / "caramel-embedded"
    shutil.copy(PLAIN, command)
    run = Device(tmp_path / "device", command=[str(command)]).run()
    assert (run.status, run.out) == (127, "")
    assert "caramel_embedded" in run.err


def test_a_launcher_without_its_interpreter(tmp_path: Path) -> None:
    command = tmp_path / "bin" / "caramel-embedded"
    command.parent.mkdir()
    shutil.copy(PLAIN, command)
    python = command.parent / "python3"
    for content, mode in (("", 0o755), ("#!/nonexistent\n", 0o755), ("\x7fELF", 0o755)):
        python.write_text(content)
        python.chmod(mode)
        run = Device(tmp_path / "device", command=[str(command)]).run()
        # An empty file is a script that does nothing well, for execvp(3) of shells; nothing else is.
        assert run.status == 127 or content == "", (content, run)
        assert run.out == ""


def test_a_bug_is_127_and_its_words_stay_inside(nobody: Device, tmp_path: Path) -> None:
    """The text of an error that nobody foresaw may hold anything, a key too."""
    code = (
        "import sys\n"
        "from caramel_embedded import session\n"
        "from caramel_embedded.__main__ import main\n"
        "def run(self):\n"
        "    raise ZeroDivisionError('-----BEGIN PRIVATE KEY-----')\n"
        "session.Check.run = run\n"
        "main(sys.argv[1:])\n"
    )
    nobody.command = [PYTHON, "-I", "-c", code]
    run = nobody.run("-v")
    assert run.status == 127 and "PRIVATE" not in run.err
    assert "internal error: ZeroDivisionError at <string>:5" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    "error", ["SystemExit(0)", "SystemExit(1)", "KeyboardInterrupt()", "MemoryError()", "GeneratorExit()"]
)
def test_nothing_that_is_raised_gets_out(nobody: Device, error: str) -> None:
    code = (
        "import sys\n"
        "from caramel_embedded import settings\n"
        "from caramel_embedded.__main__ import main\n"
        f"def parse(*_):\n    raise {error}\n"
        "settings.parse = parse\n"
        "main(sys.argv[1:])\n"
    )
    nobody.command = [PYTHON, "-I", "-c", code]
    run = nobody.run()
    assert (run.status, run.out, run.err.count("\n")) == (127, "", 1)


# --- Surroundings ---


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A folder full of modules that end Python with status 1."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("sitecustomize", "usercustomize", "ssl", "os", "json", "cryptography", "caramel_embedded", "signal"):
        (folder / f"{name}.py").write_text("import posix; posix._exit(1)\n")
    yield folder


@pytest.mark.parametrize(
    "name, value",
    [
        ("PYTHONPATH", "{hostile}"),
        ("PYTHONHOME", "{hostile}"),
        ("PYTHONSTARTUP", "{hostile}/os.py"),
        ("PYTHONUSERBASE", "{hostile}"),
        ("PYTHONINSPECT", "1"),
        ("PYTHONWARNINGS", "error"),
        ("PYTHONDEVMODE", "1"),
        ("PYTHONMALLOC", "nonsense"),
        ("PYTHONHASHSEED", "nonsense"),
        ("PYTHONIOENCODING", "nonsense"),
        ("PYTHONUTF8", "nonsense"),
        ("PYTHONOPTIMIZE", "2"),
        ("PYTHONTRACEMALLOC", "nonsense"),
        ("PYTHONBREAKPOINT", "nonsense"),
        ("PYTHONSAFEPATH", ""),
        ("LC_ALL", "nonsense"),
        ("LC_ALL", "C"),
        ("LC_ALL", "tr_TR.UTF-8"),
        ("TZ", "nonsense"),
        ("TZ", "Pacific/Kiritimati"),
        ("PATH", "/nonexistent"),
        ("CARAMEL_UNKNOWN", "x"),
        ("CARAMEL_CA", ""),
        ("COLUMNS", "nonsense"),
    ],
)
def test_the_environment_steers_nothing(nobody: Device, hostile: Path, pem: Path, name: str, value: str) -> None:
    """Seen with a certificate that is good, so that the status would be 0."""
    nobody.command = [PLAIN]
    with Scripted(pem, [answers.certificate(nobody.block("CERTIFICATE") or b"")]) as server:
        nobody.server = server.address
        run = nobody.run(env={name: value.format(hostile=hostile)})
    assert (run.status, run.out, run.err.count("\n")) == (0, "", 1), run


def test_modules_in_the_current_folder_are_not_loaded(nobody: Device, hostile: Path, pem: Path) -> None:
    nobody.command = [PLAIN]
    for path in hostile.iterdir():
        shutil.copy(path, nobody.folder)
    with Scripted(pem, [answers.certificate(nobody.block("CERTIFICATE") or b"")]) as server:
        nobody.server = server.address
        assert nobody.run().status == 0


def test_a_command_that_is_called_by_a_link(nobody: Device, tmp_path: Path, pem: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(PLAIN)
    nobody.command = [str(link)]
    with Scripted(pem, [answers.certificate(nobody.block("CERTIFICATE") or b"")]) as server:
        nobody.server = server.address
        assert nobody.run().status == 0


def test_as_python_runs_modules(nobody: Device, pem: Path) -> None:
    nobody.command = [PYTHON, "-m", "caramel_embedded"]
    with Scripted(pem, [answers.certificate(nobody.block("CERTIFICATE") or b"")]) as server:
        nobody.server = server.address
        assert nobody.run().status == 0
        nobody.server = None
        assert nobody.run("--nonsense").status == 127


def test_the_folder_is_gone_in_which_it_starts(nobody: Device, tmp_path: Path, pem: Path) -> None:
    nobody.command = [PLAIN]
    with Scripted(pem, [answers.certificate(nobody.block("CERTIFICATE") or b"")]) as server:
        nobody.server = server.address
        line = nobody.arguments()
        script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
        done = subprocess.run(["sh", "-c", script, "sh", *line], cwd=tmp_path, env=world.environment(), timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize("limit", ["--nofile=5", "--nofile=6", "--fsize=512"])
def test_a_device_that_has_too_little(tmp_path: Path, authority: Authority, pem: Path, limit: str) -> None:
    """Too few descriptors, no room in a file: 127, and the content is as it was."""
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    # Without the launcher: some shells need descriptors of their own, and end with 2 before they have read a word.
    device.command = [PYTHON, "-I", "-m", "caramel_embedded"]
    device.has(authority.identity(ID, certified=False))
    before = device.snapshot()
    with Scripted(pem, [answers.certificate(authority.sign(device.request))]) as server:
        device.server = server.address
        run = device.run(before=["prlimit", limit])
    assert (run.status, run.out) == (127, ""), run
    assert "Traceback" not in run.err
    assert device.snapshot() == before


# --- Signals ---

#: Python ignores these: the write that finds a broken pipe or a full limit fails instead.
IGNORED = ("PIPE", "XFSZ")
ENDING = ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "XCPU", "PWR", "IO", *IGNORED]


@pytest.mark.parametrize(
    "name", [name if name in ("HUP", "INT", "TERM", "PIPE") else pytest.param(name, marks=slow) for name in ENDING]
)
def test_a_signal_while_the_server_keeps_it_waiting(
    tmp_path: Path, authority: Authority, pem: Path, name: str
) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    started: list[subprocess.Popen[str]] = []

    def says(asked: HttpRequest) -> Answer:
        world.until("it is known", lambda: started)
        os.kill(started[0].pid, getattr(signal, "SIG" + name))
        return answers.PENDING if name in IGNORED else [10.0, answers.PENDING]

    with Scripted(pem, says) as server:
        device.server = server.address
        started.append(device.start())
        run = device.finish(started[0], 30)
    if name in IGNORED:
        assert run.status == 69
    else:
        assert (run.status, run.out, run.err.count("\n")) == (127, "", 1), run
        assert "signal" in run.err
    assert device.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    assert {path.name for path in device.folder.iterdir()} == {"empty.conf", "identity.pem"}
    assert subprocess.run(["flock", "-n", str(device.key_file), "true"], timeout=30).returncode == 0


@pytest.mark.parametrize("name", ["HUP", "INT", "TERM"])
def test_a_signal_that_the_caller_ignores_stays_ignored(
    tmp_path: Path, authority: Authority, pem: Path, name: str
) -> None:
    """nohup(1), and what a shell does for what it starts in the background."""
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    started: list[subprocess.Popen[str]] = []

    def says(asked: HttpRequest) -> Answer:
        world.until("it is known", lambda: started)
        os.kill(started[0].pid, getattr(signal, "SIG" + name))
        return answers.PENDING

    with Scripted(pem, says) as server:
        device.server = server.address
        started.append(device.start(before=["sh", "-c", f"trap '' {name}; exec \"$@\"", "sh"]))
        assert device.finish(started[0], 30).status == 69


@pytest.mark.parametrize("name", ["HUP", "TERM", "PWR"])
def test_a_signal_when_the_outcome_is_known_or_a_second_one_ends_it_at_once(name: str) -> None:
    code = (
        "import os, signal, time\nfrom caramel_embedded import signals\n"
        f"signals.catch(print)\nsignals.exit_at_once()\nos.kill(os.getpid(), signal.SIG{name})\ntime.sleep(9)\n"
    )
    done = subprocess.run([PYTHON, "-I", "-c", code], capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (127, b"", b"")


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_ends_a_run_also_inside_of_a_librarys_call(name: str) -> None:
    """Where no handler of Python's runs: 2.0.0 went on for as long as that took, a TPM's driver say."""
    code = (
        "import hashlib, os, signal, threading\nfrom caramel_embedded import signals\n"
        "signals.catch(lambda text: os.write(1, text.encode()))\n"
        f"threading.Timer(0.3, os.kill, (os.getpid(), signal.SIG{name})).start()\n"
        "hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 29)\n"
    )
    began = time.monotonic()
    done = subprocess.run([PYTHON, "-I", "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (127, b"ended by a signal", b"")
    assert time.monotonic() - began < 10


# --- The idiom of init scripts ---


def test_a_shell_tells_the_outcomes_apart(device: Device) -> None:
    script = """
        "$@" 2>/dev/null
        case $? in
            0) echo certified ;;
            1) echo busy ;;
            69) echo waiting ;;
            *) echo failed ;;
        esac
    """
    line = device.arguments()
    assert told(script, line) == "waiting\n"
    device.server = None
    assert told(script, device.arguments()) == "failed\n"
    assert told(f"flock {device.key_file} sh -c '{script}' sh \"$@\"", line) == "busy\n"


def told(script: str, line: list[str]) -> str:
    done = subprocess.run(
        ["sh", "-c", script, "sh", *line], stdout=subprocess.PIPE, env=world.environment(), timeout=60
    )
    return done.stdout.decode()


def test_a_status_is_one_of_four(device: Device) -> None:
    runs: list[Run] = [device.run(), device.run("--nonsense"), device.run("--version")]
    assert [run.status for run in runs] == [69, 127, 0]
