"""The hook: called once for each new certificate that is in place, and owed until it has succeeded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import pytest
import world
from needs import needs, slow
from talking import ID, Talking, key
from world import Authority, HttpRequest, Scripted, answers, hours, now


class Hooked(Talking):
    """A device with a hook that writes down each of its calls, and a server that hands out what it is given."""

    asking: Scripted

    def __init__(self, folder: Path, authority: Authority) -> None:
        super().__init__(folder / "device", authority)
        self.beside = folder
        self.certificates: list[bytes] = []
        self.script = folder / "hook"
        #: That the hook has succeeded.
        self.note = self.folder / ".identity.pem.hook"

    def hook(self, *lines: str, shebang: str = "#!/bin/sh\n") -> None:
        """What the hook does after it has written down that it was called."""
        log = f'echo "$CARAMEL_CN $CARAMEL_KEY_FILE $CARAMEL_NOT_AFTER" >>{self.beside}/calls\n'
        text = "\n".join([shebang + log, *lines]).encode()
        # Written by another process: a script that this one has open for writing can't be executed by a fork of it.
        subprocess.run(["tee", str(self.script)], input=text, stdout=subprocess.DEVNULL, check=True)
        self.script.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        log = self.beside / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def sign(self, life: int = 48) -> bytes:
        """The server has a new certificate from now on."""
        self.certificates.append(self.signed(not_after=now() + hours(life)))
        return self.certificates[-1]

    def arguments(self, *options: str) -> list[str]:
        """With the hook, unless another one is named."""
        return super().arguments(*(() if "--hook" in options else ("--hook", str(self.script))), *options)

    def ends(self, status: int, calls: int, *options: str, before: Sequence[str] = ()) -> world.Run:
        """A run that ends with this status, after which the hook has been called so often; nothing is left over."""
        run = self.run(*options, before=before)
        assert (run.status, len(self.calls)) == (status, calls), run
        assert {path.name for path in self.folder.iterdir()} <= {"identity.pem", "empty.conf", self.note.name}
        return run


@pytest.fixture
def hooked(tmp_path: Path, authority: Authority, pem: Path) -> Iterator[Hooked]:
    device = Hooked(tmp_path, authority)
    device.pending()

    def says(asked: HttpRequest) -> bytes:
        return answers.certificate(device.certificates[-1]) if device.certificates else answers.PENDING

    with Scripted(pem, says, client_ca=authority.certificate_file) as device.asking:
        device.server = device.asking.address
        device.hook()
        yield device


@pytest.fixture
def owed(hooked: Hooked) -> Hooked:
    """A device whose hook has failed once for a new certificate, and would succeed now."""
    hooked.hook("exit 1")
    hooked.sign()
    hooked.ends(127, 1)
    hooked.hook()
    return hooked


@contextmanager
def started(hooked: Hooked, *options: str, before: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A run that is still at it."""
    process = hooked.start(*options, before=before)
    try:
        yield process
    finally:
        world.end(process)


def injecting(*what: str) -> list[str]:
    """strace(1) that does this to the one process of a run without starter."""
    return ["strace", "-qq", "-o", os.devnull, *(word for each in what for word in ("-e", f"inject={each}"))]


@pytest.fixture
def alone(hooked: Hooked) -> Hooked:
    """Without the starter, which stays as the parent: for what is traced, or killed, as one process."""
    hooked.command = [*world.WITHOUT_STARTER]
    return hooked


# --- When it is called ---


def test_it_is_called_once_for_each_new_certificate(hooked: Hooked) -> None:
    hooked.ends(69, 0)
    hooked.sign()
    hooked.ends(0, 1)
    assert hooked.calls[0].startswith(f"{ID} {hooked.folder}/identity.pem ")
    for _ in range(2):
        hooked.ends(0, 1)
    hooked.sign(72)
    for _ in range(2):
        hooked.ends(0, 2)


def test_it_is_not_called_for_a_new_request(hooked: Hooked) -> None:
    hooked.key_file.unlink()
    hooked.ends(69, 0)


def test_it_finds_the_new_certificate_in_the_file_and_the_lock_free(hooked: Hooked) -> None:
    hooked.hook(
        f'cp "$CARAMEL_KEY_FILE" {hooked.beside}/seen',
        f'flock -n "$CARAMEL_KEY_FILE" true; echo $? >>{hooked.beside}/lock',
    )
    pem = hooked.sign()
    hooked.ends(0, 1)
    assert pem in (hooked.beside / "seen").read_bytes()
    assert (hooked.beside / "lock").read_text() == "0\n"


def test_it_is_told_when_the_certificate_ends_and_where_the_file_really_is(hooked: Hooked) -> None:
    real = hooked.key_file
    hooked.key_file = hooked.beside / "link.pem"
    hooked.key_file.symlink_to(real)
    hooked.sign()
    hooked.ends(0, 1)
    assert hooked.certificate
    assert hooked.calls == [f"{ID} {real} {hooked.certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC"]


def without_hook(hooked: Hooked, **how: Any) -> world.Run:
    """A run that has no hook by an option."""
    line = Talking.arguments(hooked)[len(hooked.command) :]
    return hooked.run(*line, bare=True, **how)


def test_a_hook_that_is_set_later_is_called_once_for_what_is_there(hooked: Hooked) -> None:
    hooked.sign()
    assert without_hook(hooked).status == 0 and not hooked.note.exists()
    for _ in range(2):
        hooked.ends(0, 1)


def test_the_setting_works_in_a_file_and_in_the_environment(hooked: Hooked) -> None:
    hooked.sign()
    assert without_hook(hooked, env={"CARAMEL_HOOK": str(hooked.script)}).status == 0
    assert hooked.config and len(hooked.calls) == 1
    hooked.config.write_text(f'CARAMEL_HOOK="{hooked.script} again"\n')
    hooked.sign(72)
    assert (without_hook(hooked).status, len(hooked.calls)) == (0, 2)


# --- How it is called ---


def test_its_output_goes_to_standard_error_and_its_input_is_empty(hooked: Hooked) -> None:
    hooked.hook("echo to output", "echo to error >&2", "cat")
    hooked.sign()
    run = hooked.ends(0, 1, before=("sh", "-c", 'echo typed | "$@"', "sh"))
    assert run.out == "" and run.err.splitlines()[:2] == ["to output", "to error"] and run.err.count("\n") == 3


def test_it_gets_words_and_no_shell(hooked: Hooked) -> None:
    hooked.hook(f'printf "%s\\n" "$@" >{hooked.beside}/arguments')
    hooked.sign()
    hooked.ends(0, 1, "--hook", f'{hooked.script} "two words" $HOME;touch {hooked.beside}/touched *')
    seen = (hooked.beside / "arguments").read_text().splitlines()
    assert seen == ["two words", "$HOME;touch", f"{hooked.beside}/touched", "*"]
    assert not (hooked.beside / "touched").exists()


def test_a_shell_can_be_the_command(hooked: Hooked) -> None:
    hooked.sign()
    hooked.ends(0, 0, "--hook", f"sh -c 'echo \"$CARAMEL_CN\" | tr f F >{hooked.beside}/said'")
    assert (hooked.beside / "said").read_text() == "FFFbeec0FFee\n"


def test_what_it_leaves_running_goes_on(hooked: Hooked) -> None:
    hooked.hook(f"sleep 60 >/dev/null 2>&1 & echo $! >{hooked.beside}/pid")
    hooked.sign()
    run = hooked.run()
    left = int((hooked.beside / "pid").read_text())
    try:
        assert (run.status, run.seconds < 20) == (0, True)
        os.kill(left, 0)
    finally:
        os.kill(left, signal.SIGKILL)


# --- It is owed until it has succeeded ---


def test_its_failure_is_127_the_certificate_stays_and_it_is_called_again(hooked: Hooked) -> None:
    hooked.hook("exit 3")
    hooked.sign()
    run = hooked.ends(127, 1)
    assert "new certificate, valid until " in run.err and f"the hook {hooked.script} failed with status 3" in run.err
    assert run.err.count("\n") == 1
    before = hooked.snapshot()
    assert hooked.labels == ["PRIVATE KEY", "CERTIFICATE", "NEW CERTIFICATE REQUEST"]
    assert "certificate unchanged, valid until " in hooked.ends(127, 2).err
    hooked.hook()
    for _ in range(2):
        hooked.ends(0, 3)
    assert hooked.snapshot() == before


#: Ways to fail: the hook, its file's mode, what starts it, what is said, and whether it has written down its call.
IGNORING = (
    "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])"
)
FAILURES: dict[str, tuple[list[str], int, str, Sequence[str], str, int]] = {
    "a signal": (["kill -9 $$"], 0o755, "#!/bin/sh\n", (), "was ended by signal 9", 1),
    "not executable": ([], 0o644, "#!/bin/sh\n", (), "can't be run: ", 0),
    "no program": ([], 0o755, "", (), "can't be run: ", 0),
    "missing": ([], 0, "#!/bin/sh\n", (), "can't be run: ", 0),
    # Where SIGCHLD is ignored the kernel keeps no exit status (wait(2)): 1.0.0 took a failure for success.
    "its caller ignores the end of its children": (
        *(["exit 3"], 0o755, "#!/bin/sh\n", (sys.executable, "-c", IGNORING)),
        *("failed with status 3", 1),
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_hook_that_fails_in_any_way_is_owed(hooked: Hooked, what: str) -> None:
    lines, mode, shebang, before, words, calls = FAILURES[what]
    hooked.hook(*lines, shebang=shebang)
    hooked.script.chmod(mode) if mode else hooked.script.unlink()
    hooked.sign()
    assert f"the hook {hooked.script} {words}" in hooked.ends(127, calls, before=before).err
    hooked.hook()
    hooked.ends(0, calls + 1, before=before)


def test_it_is_called_though_the_server_is_down(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    hooked.ends(127, 1)
    hooked.asking.stop()
    # One line has both that went wrong.
    run = hooked.ends(127, 2)
    assert "can't be reached" in run.err and "failed with status 1" in run.err and run.err.count("\n") == 1
    hooked.hook()
    for _ in range(2):
        run = hooked.ends(127, 3)
        assert "can't be reached" in run.err and "hook" not in run.err


def test_it_is_not_called_for_an_identity_that_is_wiped(owed: Hooked) -> None:
    owed.asking.answers = [answers.REJECTED, answers.PENDING, answers.PENDING]
    owed.asking.requests.clear()
    owed.ends(69, 1)
    assert owed.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]


@pytest.mark.parametrize("victim", ["hook", "run"])
def test_a_power_cut_while_it_is_at_work_calls_it_again(alone: Hooked, victim: str) -> None:
    alone.hook("kill -9 $PPID" + (" $$" if victim == "hook" else ""))
    alone.sign()
    assert alone.run().status == -9
    alone.hook()
    for _ in range(2):
        alone.ends(0, 2)


@pytest.mark.parametrize(
    "call, number, calls",
    [
        *(pytest.param("fsync", number, [0, 1], marks=slow) for number in (1, 2, 3)),  # of the certificate
        pytest.param("fsync", 4, [1, 2], marks=slow),  # the note has no name yet
        *(pytest.param("fsync", number, [1, 1], marks=slow) for number in (5, 6)),
        ("renameat", 1, [0, 1]),
        ("renameat", 2, [1, 2]),
    ],
)
@needs("strace")
def test_an_end_at_any_moment_never_forgets_it(alone: Hooked, call: str, number: int, calls: list[int]) -> None:
    alone.sign()
    end = injecting(f"{call}:signal=KILL:when={number}")
    assert (alone.run(before=end).status, len(alone.calls)) == (-9, calls[0])
    for _ in range(2):
        alone.ends(0, calls[1])


@pytest.mark.parametrize("end", ["its time limit", "a signal"])
def test_an_end_of_the_run_ends_all_of_it_and_it_stays_owed(hooked: Hooked, end: str) -> None:
    # `nothing_left_behind` sees that all are gone.
    hooked.hook("trap '' TERM" if end == "its time limit" else "", "sleep 60 & sleep 60")
    hooked.sign()
    with started(hooked, "--timeout", "2" if end == "its time limit" else "60") as process:
        world.until("the hook is at work", lambda: hooked.calls)
        if end == "a signal":
            process.send_signal(signal.SIGTERM)
        run = hooked.finish(process, 20)
    assert run.status == 127 and ("ended by a signal" if end == "a signal" else "after 2 seconds") in run.err, run
    hooked.hook()
    hooked.ends(0, 2)


def test_a_note_that_cannot_be_read_is_said(hooked: Hooked) -> None:
    hooked.sign()
    hooked.ends(0, 1)
    hooked.note.unlink()
    hooked.note.mkdir()
    assert f"{hooked.note} is no regular file" in hooked.ends(127, 1).err


@needs("strace")
def test_a_note_that_cannot_be_written_is_said(alone: Hooked) -> None:
    alone.sign()
    run = alone.ends(127, 1, before=injecting("renameat:error=EROFS:when=2"))
    assert "new certificate" in run.err and f"can't store {alone.note}: Read-only file system" in run.err
    alone.ends(0, 2)


# --- With others around ---


def test_of_many_runs_at_once_one_calls_it(owed: Hooked) -> None:
    owed.hook("sleep 1")
    with ThreadPoolExecutor(12) as pool:
        runs = list(pool.map(lambda _: owed.run(), range(12)))
    assert {run.status for run in runs} <= {0, 1}, [run.err for run in runs]
    owed.ends(0, 2)


@needs("strace")
def test_a_run_that_comes_too_late_to_the_note_does_not_call_it(owed: Hooked) -> None:
    # The key file's lock is taken and given back; the third is that on the note. By then it is open, and another run
    # does what it asks for.
    delay = ("strace", "-qq", "-f", "-o", os.devnull, "-e", "inject=flock:delay_enter=2000000:when=3")
    asked = len(owed.asking.requests)
    with started(owed, before=delay) as late:
        world.until("the late run asks the server", lambda: len(owed.asking.requests) > asked)
        world.until("another run has the key file", lambda: owed.run().status == 0, pause=0.1)
        assert (late.poll(), len(owed.calls)) == (None, 2)
        assert owed.finish(late, 20).status == 0
    assert len(owed.calls) == 2


def test_a_run_that_is_locked_out_does_not_call_it(owed: Hooked) -> None:
    owed.ends(1, 1, before=("flock", str(owed.key_file)))


@needs("strace")
def test_the_success_of_an_older_certificates_hook_does_not_pay_for_a_newer_one(alone: Hooked) -> None:
    """2.0.0 looked whether the note was its own, and removed the newer one that had come meanwhile."""
    alone.sign()
    delay = ("unlinkat:delay_enter=3000000:when=4", "renameat:delay_enter=3000000:when=2")  # 2.0.0's, and now
    with started(alone, before=injecting(*delay)) as old:
        world.until("the hook has been called", lambda: alone.calls)
        alone.hook("exit 1")
        alone.sign(72)
        world.until("the next run has the key file", lambda: alone.run().status != 1, pause=0.1)
        assert old.poll() is None and alone.block("CERTIFICATE") == alone.certificates[-1]
        assert alone.finish(old, 20).status == 0
    called = len(alone.calls)
    alone.hook()
    for _ in range(2):
        alone.ends(0, called + 1)


@needs("strace")
@pytest.mark.parametrize("owes", [True, False])
def test_a_newer_certificate_that_cannot_be_stored_changes_nothing(alone: Hooked, owes: bool) -> None:
    alone.hook("exit %d" % owes)
    alone.sign()
    alone.ends(127 if owes else 0, 1)
    alone.sign(72)
    alone.hook()
    assert "can't store" in alone.ends(127, 1 + owes, before=injecting("fsync:error=EIO:when=1")).err
    alone.ends(0, 2 + owes)


def test_a_run_ends_when_the_hook_has_and_not_later(hooked: Hooked) -> None:
    hooked.hook("sleep 1")
    hooked.sign()
    assert 1 <= hooked.ends(0, 1).seconds < 20


# --- Whose word counts ---


@pytest.mark.parametrize("owes", [True, False])
@pytest.mark.parametrize("answer", [None, answers.NOT_MODIFIED], ids=["no server", "unchanged"])
@pytest.mark.parametrize("whose", ["another device's", "another CA's", "another CA's, sealed"])
def test_it_is_not_called_for_what_this_very_run_has_not_found_good(
    hooked: Hooked, tmp_path: Path, whose: str, answer: Optional[bytes], owes: bool
) -> None:
    """2.0.0 had root call it for whatever the owner of the folder, or the card of another device, had there."""
    content = hooked.authority.identity("fffbeec0ffff", key=key())
    if whose != "another device's":
        content = Authority(tmp_path / "other").identity(ID, key=key(), line=False)
    if "sealed" in whose:  # SHA-256 of what everybody may know: it protects against accidents
        content = world.sealed(content, hooked.authority.pem, ID)
    hooked.has(content)
    if owes:
        # As 2.0.0 wrote it.
        hooked.note.write_text(hashlib.sha256(hooked.block("CERTIFICATE") or b"").hexdigest() + "\n")
    hooked.asking.answers = [answer]
    if not answer:
        hooked.server = "localhost:9"
    hooked.ends(127, 0)


def test_it_gets_what_was_judged_and_not_what_the_files_line_says(owed: Hooked) -> None:
    owed.hook("exit 1")
    good = owed.calls
    line, _, content = owed.key_file.read_bytes().partition(b"\n")
    forged = re.sub(rb"until=\S+", b"until=$(reboot)", line.partition(b" seal=")[0])
    under = b"".join(hashlib.sha256(text).digest() for text in (owed.authority.pem, owed.authority.pem, b"RSA"))
    seal = hashlib.sha256(b"\n".join((forged, under, content))).hexdigest().encode()
    for end in (b"", b" seal=" + seal):
        owed.has(forged + end + b"\n" + content)
        owed.run()
    assert owed.calls == good * 3


# --- Its surroundings ---


def test_inside_of_it_the_program_neither_waits_nor_calls_one_whatever_the_server_signs(hooked: Hooked) -> None:
    """2.0.0, and a server that signs at each question: 194 inside of each other."""
    again = " ".join(hooked.arguments())
    stop = f"[ $(wc -l <{hooked.beside}/calls) -gt 3 ] && exit 0"
    hooked.hook(stop, "env", again, f"echo $? >{hooked.beside}/inner")
    hooked.asking.answers = lambda _: answers.certificate(hooked.sign(48 + len(hooked.certificates)))
    run = hooked.ends(0, 1)
    assert len(hooked.certificates) == 2, run.err
    assert "CARAMEL_IN_HOOK=1\n" in run.err and (hooked.beside / "inner").read_text() == "0\n"
    # It is owed for the certificate that the run inside has stored.
    hooked.hook()
    hooked.asking.answers = [answers.NOT_MODIFIED]
    for _ in range(2):
        hooked.ends(0, 2)


def test_inside_of_it_another_configuration_is_another_identity(hooked: Hooked) -> None:
    two = hooked.beside / "two.conf"
    two.write_text(f"CARAMEL_CN=two\nCARAMEL_KEY_FILE={hooked.beside}/two.pem\nCARAMEL_CA_CERT={hooked.ca}\n")
    hooked.hook(f"{world.COMMAND} --config {two} --status --json >{hooked.beside}/told; true")
    hooked.sign()
    hooked.ends(0, 1)
    told = json.loads((hooked.beside / "told").read_text())
    assert (told["client_id"], told["key_file"]) == ("two", f"{hooked.beside}/two.pem")


def test_it_has_the_callers_environment_and_the_sbin_folders(hooked: Hooked) -> None:
    """cron's PATH has none of them; what steers OpenSSL is kept from this program alone."""
    kept = {"OPENSSL_CONF": "/etc/admins.cnf", "SSL_CERT_FILE": "/etc/admins.pem", "SSL_CERT_DIR": "/etc/admins"}
    hooked.sign()
    path = f"{hooked.beside}:/usr/bin:/bin"
    run = hooked.run("--hook", "sh -c 'env; command -v ldconfig'", env={**kept, "PATH": path})
    assert run.status == 0, run
    assert kept.items() <= dict(line.partition("=")[::2] for line in run.err.splitlines()).items()
    assert f"PATH={path}:/usr/local/sbin:/usr/sbin:/sbin\n" in run.err


@pytest.mark.parametrize("end", ["its time limit", "a signal"])
def test_what_it_has_sent_into_other_sessions_ends_with_it_and_nothing_else(alone: Hooked, end: str) -> None:
    # `nothing_left_behind` sees what is left.
    alone.hook("setsid sleep 61 & setsid sh -c 'sleep 62 & sleep 63' &", "(setsid setsid sleep 64 &)", "sleep 65")
    alone.sign()
    # A child that the process had before it became this program.
    before = ("sh", "-c", f'sleep 60 >/dev/null 2>&1 & echo $! >{alone.beside}/pid; exec "$@"', "sh")
    with started(alone, "--timeout", "2", before=before) as process:
        if end == "a signal":
            world.until("the hook is at work", lambda: alone.calls)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
        assert alone.finish(process, 20).status == 127
        os.kill(int((alone.beside / "pid").read_text()), signal.SIGKILL)
