"""Exit status: 0, 1, 69 or 127, and no other, whatever surrounds the program.

What gives 0 and 69 is in `test_life.py`, 1 in `test_lock.py`, most of 127 in `test_bad_input.py`; what can become of
the starter, in `packaging/test_packaging_starter.py`. Here is what would end a Python program with a status of its
own.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import world
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from needs import slow
from talking import ID, Talking
from world import CLIENT_AUTH, COMMAND, PLAIN, Answer, Authority, Device, HttpRequest, Run, answers

PYTHON = str(Path(PLAIN).parent / "python")


@pytest.fixture
def nobody(certified: Talking) -> Talking:
    """A device in good order, whose server is not there."""
    certified.server = "localhost:9"
    return certified


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
def test_asking_for_a_text_is_no_failure(nobody: Talking, option: str, starts: str) -> None:
    run = nobody.run(option, bare=True)
    assert (run.status, run.err) == (0, "")
    assert run.out.startswith(starts) and run.out.endswith("\n")
    # Nothing else on the line matters then, nor what is wrong with the device.
    assert nobody.run("--config", "/nonexistent", option, bare=True).status == 0


USAGES: list[list[str]] = [
    *(["--nonsense"], ["-x"], ["surplus"], ["--server"], ["--ser", "localhost"], ["-v", "-q"], ["--timeout"]),
    *(["--verbose=yes"], ["--status=yes"], ["--"], ["", ""], ["-"]),
]


@pytest.mark.parametrize("arguments", USAGES, ids=" ".join)
def test_wrong_usage(nobody: Talking, arguments: list[str]) -> None:
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


@pytest.mark.parametrize(
    "what",
    ["another CA", "a chain", "long names", "another name", "for clients", "pending", "rejected", "and no new key"],
)
def test_lines_that_people_act_on_about_the_server(
    new: Talking, tmp_path: Path, authority: Authority, what: str
) -> None:
    """Whole lines, and nothing is sent to somebody who isn't the server."""
    other = Authority(tmp_path / "other", [("O", "Another" * (9 if what == "long names" else 1))])
    strange = other.server()
    if what in ("a chain", "long names"):
        strange.write_bytes(strange.read_bytes() + other.pem)
    certificate = strange if what in ("another CA", "a chain", "long names") else None
    if what == "another name":
        certificate = authority.server(["ca.example.com", "CN=a folder", "*.example.org"], file="names.pem")
    if what == "for clients":
        certificate = authority.server(file="clients.pem", usage=[CLIENT_AUTH])
    new.pending() if what == "pending" else new.certified()
    says = [answers.REJECTED, answers.PENDING] if what in ("rejected", "and no new key") else []
    options = ("--key-command", "/none") if what == "and no new key" else ()
    run = new.hears(*says, answers.PENDING, by=certificate, options=options)
    if certificate:
        assert (run.status, new.asked) == (127, [])
    waits = f"request {new.request_hash()} waits to be signed on the server"
    waits += " (Caramel: caramel_tool INI --list, then --sign=ID)"
    rejected = "the administrator rejected the request (status 403, Forbidden)"
    wrong = f"{new.server} can't show a certificate that the trusted CA vouches for"
    ours = "C=SE, ST=Östergötland, L=Linköping, O=Example AB, OU=Caramel, CN=Caramel Signing Certificate "
    ours += f"{fingerprint(authority.pem)}"
    chain = "self-signed certificate in certificate chain"
    long = "Another" * 9
    line = {
        "another CA": f"{wrong}: unable to get local issuer certificate; it shows O=Another, CN=localhost by "
        f"O=Another, and trusted is {ours}",
        "a chain": f"{wrong}: {chain}; it shows O=Another, CN=localhost by O=Another {fingerprint(other.pem)}, and "
        f"trusted is {ours}",
        "long names": f"{wrong}: {chain}; it shows O={long}, CN=localhost by O={long} {fingerprint(other.pem)}, and "
        f"trusted is {ours}",
        "for clients": f"{wrong}: unsuitable certificate purpose",
        "another name": f"{wrong}: Hostname mismatch, certificate is not valid for 'localhost'; the trusted CA does "
        "vouch for the server, for other names: ca.example.com, *.example.org",
        "pending": waits,
        "rejected": f"{rejected}; the old key is gone; {waits}",
        "and no new key": f"{rejected}; the key command /none can't be run: No such file or directory",
    }
    assert run.err == f"caramel-embedded: {ID}: {line[what]}\n"


def test_arguments_that_are_no_text(nobody: Talking) -> None:
    assert shell("exec $0 --server $(printf 'a\\377b') --config /dev/null").returncode == 127


@pytest.mark.parametrize("option", ["--version", "--help", "--status"])
def test_a_closed_or_full_output_is_not_taken_for_success(nobody: Talking, option: str) -> None:
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


WAITS = itertools.product(["--json", "--help"], [True, False], [True, False])


@pytest.mark.parametrize(
    ("option", "late", "blocking"),
    # Of any two of them each pair is in `make test`.
    [pytest.param(*wait, marks=slow if (wait[0] == "--json") ^ wait[1] ^ wait[2] else ()) for wait in WAITS],
)
def test_an_output_that_nobody_reads_keeps_no_run(nobody: Talking, option: str, late: bool, blocking: bool) -> None:
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


MISSING = "raise ModuleNotFoundError(\"No module named 'cryptography'\", name='cryptography')"
LIBRARY = "raise ImportError('libssl.so.1.1: cannot open shared object file')"
#: What Python has in the place of a module, and whether the line names it.
INSTEAD: list[tuple[str, str, bool]] = [
    *(
        ("cryptography", text, True)
        for text in (MISSING, LIBRARY, "raise SystemExit(1)", "raise RuntimeError", "1 /")
    ),
    *((name, "raise ImportError(name=__name__)", True) for name in ("ssl", "http", "socket", "hashlib")),
    *((name, "import sys; sys.exit(2)", False) for name in ("ssl", "http", "socket", "hashlib")),
]


@pytest.mark.parametrize(("module", "instead", "named"), INSTEAD)
def test_a_device_without_a_part_of_python_says_so(
    new: Talking, tmp_path: Path, module: str, instead: str, named: bool
) -> None:
    """Nothing is made, and nobody is asked."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / f"{module}.py").write_text(instead)
    new.changed(f"sys.path.insert(0, {str(folder)!r})")
    run = new.keeps(answers.UNKNOWN)
    assert run.err.startswith("caramel-embedded: ") and "Traceback" not in run.err
    assert not named or module in run.err
    assert new.asked == []


def test_a_bug_is_127_and_its_words_stay_inside(nobody: Talking) -> None:
    """The text of an error that nobody foresaw may hold anything, a key too."""
    nobody.changed(
        "from caramel_embedded import session\n"
        "def run(self):\n    raise ZeroDivisionError('-----BEGIN PRIVATE KEY-----')\nsession.Check.run = run"
    )
    run = nobody.run("-v")
    assert run.status == 127 and "PRIVATE" not in run.err
    assert "internal error: ZeroDivisionError at <string>:4" in run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize(
    "error", ["SystemExit(0)", "SystemExit(1)", "KeyboardInterrupt()", "MemoryError()", "GeneratorExit()"]
)
def test_nothing_that_is_raised_gets_out(nobody: Talking, error: str) -> None:
    nobody.changed(
        f"from caramel_embedded import settings\ndef parse(*_):\n    raise {error}\nsettings.parse = parse"
    )
    run = nobody.run()
    assert (run.status, run.out, run.err.count("\n")) == (127, "", 1)


# --- Surroundings ---


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder full of modules that end Python with status 1."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in ("sitecustomize", "usercustomize", "ssl", "os", "json", "cryptography", "caramel_embedded", "signal"):
        (folder / f"{name}.py").write_text("import posix; posix._exit(1)\n")
    return folder


def unchanged(device: Talking, **how: Any) -> None:
    """A run that a server confirms, so that the status would be 0."""
    device.keeps(answers.certificate(device.block("CERTIFICATE") or b""), status=0, **how)


#: One at a time they are in `test_faults.py`.
ENVIRONMENTS = {
    "folders": "PYTHONPATH={0} PYTHONHOME={0} PYTHONSTARTUP={0}/os.py PYTHONUSERBASE={0} PATH=/nonexistent",
    "switches": "PYTHONINSPECT=1 PYTHONWARNINGS=error PYTHONDEVMODE=1 PYTHONOPTIMIZE=2 PYTHONSAFEPATH= CARAMEL_CA=",
    "nonsense": "PYTHONMALLOC=x PYTHONHASHSEED=x PYTHONIOENCODING=x PYTHONUTF8=x PYTHONTRACEMALLOC=x "
    "PYTHONBREAKPOINT=x LC_ALL=x TZ=x CARAMEL_UNKNOWN=x COLUMNS=x",
    "places": "LC_ALL=tr_TR.UTF-8 TZ=Pacific/Kiritimati",
    "C": "LC_ALL=C",
}


@pytest.mark.parametrize("what", ENVIRONMENTS)
def test_the_environment_steers_nothing(nobody: Talking, hostile: Path, what: str) -> None:
    nobody.command = [PLAIN]
    words = ENVIRONMENTS[what].format(hostile).split()
    unchanged(nobody, env=dict(word.split("=", 1) for word in words))


def test_modules_in_the_current_folder_are_not_loaded(nobody: Talking, hostile: Path) -> None:
    nobody.command = [PLAIN]
    for path in hostile.iterdir():
        shutil.copy(path, nobody.folder)
    unchanged(nobody)


def test_as_python_runs_modules(nobody: Talking) -> None:
    nobody.command = [PYTHON, "-m", "caramel_embedded"]
    unchanged(nobody)
    assert nobody.run("--nonsense").status == 127


def test_the_folder_is_gone_in_which_it_starts(nobody: Talking) -> None:
    nobody.command = [PLAIN]
    same = answers.certificate(nobody.block("CERTIFICATE") or b"")
    gone = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    assert nobody.hears(same, before=["sh", "-c", gone, "sh"]).status == 0  # some shells have a line to say, too


@pytest.mark.parametrize("limit", ["--nofile=5", "--nofile=6", "--fsize=512"])
def test_a_device_that_has_too_little(pending: Talking, limit: str) -> None:
    """Too few descriptors, no room in a file: 127, and the content is as it was."""
    # Without the launcher: some shells need descriptors of their own, and end with 2 before they have read a word.
    pending.command = [PYTHON, "-I", "-B", "-m", "caramel_embedded"]
    before = pending.snapshot()
    run = pending.hears(lambda _: answers.certificate(pending.signed()), before=["prlimit", limit])
    assert (run.status, run.out) == (127, ""), run
    assert "Traceback" not in run.err
    assert pending.snapshot() == before


# --- Signals ---

#: Python ignores these: the write that finds a broken pipe or a full limit fails instead.
IGNORED = ("PIPE", "XFSZ")
ENDING = ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "XCPU", "PWR", "IO", *IGNORED]


def signalled(device: Talking, name: str, answer: Answer, *before: str) -> Run:
    """A run that gets this signal while it waits for the first answer."""
    pid = device.folder / "pid"
    # The process that a caller knows: exec(1) keeps its number.
    before = (*before, "sh", "-c", f'echo $$ >{pid}; exec "$@"', "sh")

    def says(asked: HttpRequest) -> Answer:
        os.kill(int(pid.read_text()), getattr(signal, "SIG" + name))
        return answer

    run = device.hears(says, before=before, timeout=30)
    pid.unlink()
    return run


@pytest.mark.parametrize(
    "name", [name if name in ("HUP", "INT", "TERM", "PIPE") else pytest.param(name, marks=slow) for name in ENDING]
)
def test_a_signal_while_the_server_keeps_it_waiting(new: Talking, name: str) -> None:
    if name in IGNORED:
        assert signalled(new, name, answers.PENDING).status == 69
    else:
        run = signalled(new, name, [10.0, answers.PENDING])
        assert (run.status, run.out, run.err.count("\n")) == (127, "", 1), run
        assert "signal" in run.err
    assert new.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    assert {path.name for path in new.folder.iterdir()} == {"empty.conf", "identity.pem"}
    assert subprocess.run(["flock", "-n", str(new.key_file), "true"], timeout=30).returncode == 0


@pytest.mark.parametrize("name", ["HUP", "INT", "TERM"])
def test_a_signal_that_the_caller_ignores_stays_ignored(new: Talking, name: str) -> None:
    """nohup(1), and what a shell does for what it starts in the background."""
    run = signalled(new, name, answers.PENDING, "sh", "-c", f"trap '' {name}; exec \"$@\"", "sh")
    assert run.status == 69, run


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
