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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest
import world
from needs import needs, slow
from world import Authority, Device, HttpRequest, Scripted, answers, hours, now

ID = "fffbeec0ffee"


@dataclass
class Hooked:
    """A device with a hook that writes down each of its calls, and a server that hands out what it is given."""

    folder: Path
    authority: Authority
    device: Device
    server: Scripted
    certificates: list[bytes] = field(default_factory=list)

    @property
    def script(self) -> Path:
        return self.folder / "hook"

    def hook(self, *lines: str, shebang: str = "#!/bin/sh\n") -> None:
        """What the hook does after it has written down that it was called."""
        log = f'echo "$CARAMEL_CN $CARAMEL_KEY_FILE $CARAMEL_NOT_AFTER" >>{self.folder}/calls\n'
        # Written by another process: a script that this one has open for writing can't be executed by a fork of it.
        subprocess.run(
            ["tee", str(self.script)],
            input="\n".join([shebang + log, *lines]).encode(),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        self.script.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def sign(self, life: int = 48) -> bytes:
        """The server has a new certificate from now on."""
        self.certificates.append(
            self.authority.sign(self.device.request, not_before=now() - hours(1), not_after=now() + hours(life))
        )
        return self.certificates[-1]

    def run(self, *options: str, before: tuple[str, ...] = ()) -> world.Run:
        return self.device.run("--hook", str(self.script), *options, before=before)

    @property
    def note(self) -> Path:
        return self.device.folder / ".identity.pem.hook"

    @property
    def litter(self) -> set[str]:
        """What is beside the key file and the note that the hook has succeeded."""
        return set(os.listdir(self.device.folder)) - {"identity.pem", "empty.conf", self.note.name}


@pytest.fixture(scope="module")
def key() -> world.PrivateKey:
    return world.new_key()


@pytest.fixture
def hooked(tmp_path: Path, authority: Authority, key: world.PrivateKey) -> Iterator[Hooked]:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    device.has(authority.identity(ID, key=key, certified=False))

    def says(asked: HttpRequest) -> bytes:
        return answers.certificate(made.certificates[-1]) if made.certificates else answers.PENDING

    with Scripted(authority.server(file="hook.pem"), says, client_ca=authority.certificate_file) as server:
        device.server = server.address
        made = Hooked(tmp_path, authority, device, server)
        made.hook()
        yield made


@contextmanager
def started(hooked: Hooked, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A run that is still at it."""
    process = hooked.device.start("--hook", str(hooked.script), *options)
    try:
        yield process
    finally:
        world.end(process)


# --- When it is called ---


def test_it_is_called_once_for_each_new_certificate(hooked: Hooked) -> None:
    assert (hooked.run().status, hooked.calls) == (69, [])
    hooked.sign()
    end = f"{hooked.device.folder}/identity.pem"
    assert hooked.run().status == 0
    assert len(hooked.calls) == 1 and hooked.calls[0].startswith(f"{ID} {end} ")
    assert (hooked.run().status, hooked.run().status, len(hooked.calls)) == (0, 0, 1)
    hooked.sign(72)
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)
    assert hooked.litter == set()


def test_it_is_not_called_for_a_new_request(hooked: Hooked) -> None:
    hooked.device.key_file.unlink()
    assert (hooked.run().status, hooked.calls) == (69, [])


def test_it_finds_the_new_certificate_in_the_file_and_the_lock_free(hooked: Hooked) -> None:
    hooked.hook(
        f'cp "$CARAMEL_KEY_FILE" {hooked.folder}/seen',
        f'flock -n "$CARAMEL_KEY_FILE" true; echo $? >>{hooked.folder}/lock',
    )
    pem = hooked.sign()
    assert hooked.run().status == 0
    assert pem in (hooked.folder / "seen").read_bytes()
    assert (hooked.folder / "lock").read_text() == "0\n"


def test_it_is_told_when_the_certificate_ends_and_where_the_file_really_is(hooked: Hooked) -> None:
    real = hooked.device.key_file
    link = hooked.folder / "link.pem"
    link.symlink_to(real)
    hooked.device.key_file = link
    hooked.sign()
    assert hooked.run().status == 0
    certificate = hooked.device.certificate
    assert certificate
    end = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC"
    assert hooked.calls == [f"{ID} {real} {end}"]


def test_a_hook_that_is_set_later_is_called_once_for_what_is_there(hooked: Hooked) -> None:
    hooked.sign()
    assert hooked.device.run().status == 0 and not hooked.note.exists()
    assert [(hooked.run().status, len(hooked.calls)) for _ in range(2)] == [(0, 1)] * 2


def test_the_setting_works_in_a_file_and_in_the_environment(hooked: Hooked) -> None:
    hooked.sign()
    assert hooked.device.run(env={"CARAMEL_HOOK": str(hooked.script)}).status == 0
    assert len(hooked.calls) == 1
    assert hooked.device.config
    hooked.device.config.write_text(f'CARAMEL_HOOK="{hooked.script} again"\n')
    hooked.sign(72)
    assert (hooked.device.run().status, len(hooked.calls)) == (0, 2)


# --- How it is called ---


def test_its_output_goes_to_standard_error_and_its_input_is_empty(hooked: Hooked) -> None:
    hooked.hook("echo to output", "echo to error >&2", "cat")
    hooked.sign()
    run = hooked.run(before=("sh", "-c", 'echo typed | "$@"', "sh"))
    assert (run.status, run.out) == (0, "")
    assert run.err.splitlines()[:2] == ["to output", "to error"] and len(run.err.splitlines()) == 3


def test_it_gets_words_and_no_shell(hooked: Hooked) -> None:
    hooked.hook(f'printf "%s\\n" "$@" >{hooked.folder}/arguments')
    hooked.sign()
    options = f'{hooked.script} "two words" $HOME;touch {hooked.folder}/touched *'
    assert hooked.device.run("--hook", options).status == 0
    seen = (hooked.folder / "arguments").read_text().splitlines()
    assert seen == ["two words", "$HOME;touch", f"{hooked.folder}/touched", "*"]
    assert not (hooked.folder / "touched").exists()


def test_a_shell_can_be_the_command(hooked: Hooked) -> None:
    hooked.sign()
    assert hooked.device.run("--hook", f"sh -c 'echo \"$CARAMEL_CN\" | tr f F >{hooked.folder}/said'").status == 0
    assert (hooked.folder / "said").read_text() == "FFFbeec0FFee\n"


def test_what_it_leaves_running_goes_on(hooked: Hooked) -> None:
    hooked.hook(f"sleep 60 >/dev/null 2>&1 & echo $! >{hooked.folder}/pid")
    hooked.sign()
    run = hooked.run()
    left = int((hooked.folder / "pid").read_text())
    try:
        assert (run.status, run.seconds < 20) == (0, True)
        os.kill(left, 0)
    finally:
        os.kill(left, signal.SIGKILL)


# --- It is owed until it has succeeded ---


def test_its_failure_is_127_the_certificate_stays_and_it_is_called_again(hooked: Hooked) -> None:
    hooked.hook("exit 3")
    hooked.sign()
    run = hooked.run()
    assert run.status == 127
    assert "new certificate, valid until " in run.err and f"the hook {hooked.script} failed with status 3" in run.err
    assert len(run.err.splitlines()) == 1
    before = hooked.device.snapshot()
    assert hooked.device.labels == ["PRIVATE KEY", "CERTIFICATE", "NEW CERTIFICATE REQUEST"]
    run = hooked.run()
    assert (run.status, len(hooked.calls)) == (127, 2)
    assert "certificate unchanged, valid until " in run.err
    hooked.hook()
    assert (hooked.run().status, len(hooked.calls)) == (0, 3)
    assert (hooked.run().status, len(hooked.calls)) == (0, 3)
    assert hooked.device.snapshot() == before
    assert hooked.litter == set()


def test_its_death_by_a_signal_is_a_failure(hooked: Hooked) -> None:
    hooked.hook("kill -9 $$")
    hooked.sign()
    run = hooked.run()
    assert (run.status, "was ended by signal 9" in run.err) == (127, True)
    assert (hooked.run().status, len(hooked.calls)) == (127, 2)


@pytest.mark.parametrize("what", ["missing", "not executable", "no program"])
def test_a_hook_that_cannot_be_run_is_owed(hooked: Hooked, what: str) -> None:
    if what == "missing":
        hooked.script.unlink()
    elif what == "not executable":
        hooked.script.chmod(0o644)
    else:
        hooked.hook(shebang="")
    hooked.sign()
    run = hooked.run()
    assert (run.status, f"the hook {hooked.script} can't be run: " in run.err) == (127, True)
    hooked.hook()
    assert (hooked.run().status, len(hooked.calls)) == (0, 1)


def test_it_is_called_though_the_server_is_down(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert hooked.run().status == 127
    hooked.server.stop()
    run = hooked.run()
    assert (run.status, len(hooked.calls)) == (127, 2)
    # One line has both that went wrong.
    assert "can't be reached" in run.err and "failed with status 1" in run.err and run.err.count("\n") == 1
    hooked.hook()
    run = hooked.run()
    assert (run.status, len(hooked.calls)) == (127, 3)
    assert "can't be reached" in run.err and "hook" not in run.err
    assert (hooked.run().status, len(hooked.calls)) == (127, 3)


def test_it_is_not_called_for_an_identity_that_is_wiped(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert (hooked.run().status, len(hooked.calls)) == (127, 1)
    hooked.server.answers = [answers.REJECTED, answers.PENDING, answers.PENDING]
    hooked.server.requests.clear()
    assert (hooked.run().status, len(hooked.calls)) == (69, 1)
    assert hooked.device.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]


@pytest.mark.parametrize("victim", ["hook", "run"])
def test_a_power_cut_while_it_is_at_work_calls_it_again(hooked: Hooked, victim: str) -> None:
    hooked.device.command = [*world.WITHOUT_STARTER]
    hooked.hook("kill -9 $PPID" + (" $$" if victim == "hook" else ""))
    hooked.sign()
    assert hooked.run().status == -9
    hooked.hook()
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)
    assert hooked.litter == set()


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
def test_an_end_at_any_moment_never_forgets_it(hooked: Hooked, call: str, number: int, calls: list[int]) -> None:
    hooked.sign()
    hooked.device.command = [*world.WITHOUT_STARTER]
    end = ("strace", "-qq", "-o", os.devnull, "-e", f"inject={call}:signal=KILL:when={number}")
    assert (hooked.run(before=end).status, len(hooked.calls)) == (-9, calls[0])
    assert [(hooked.run().status, len(hooked.calls)) for _ in range(2)] == [(0, calls[1])] * 2
    assert hooked.litter == set()


def test_a_signal_to_the_run_ends_the_hook_which_stays_owed(hooked: Hooked) -> None:
    hooked.hook(f"echo $$ >{hooked.folder}/pid", "sleep 60 & sleep 60")
    hooked.sign()
    with started(hooked) as process:
        world.until("the hook is at work", lambda: (hooked.folder / "pid").exists())
        process.send_signal(signal.SIGTERM)
        run = hooked.device.finish(process, 20)
    assert (run.status, "ended by a signal" in run.err) == (127, True)
    hooked.hook()
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)


def test_a_caller_that_ignores_the_end_of_its_children_hides_no_failure(hooked: Hooked) -> None:
    """Where SIGCHLD is ignored the kernel keeps no exit status (wait(2)): 1.0.0 took a failure for success."""
    hooked.hook("exit 3")
    hooked.sign()
    ignoring = (sys.executable, "-c", IGNORING)
    run = hooked.run(before=ignoring)
    assert (run.status, "failed with status 3" in run.err) == (127, True), run.err
    hooked.hook()
    assert (hooked.run(before=ignoring).status, len(hooked.calls)) == (0, 2)


#: Becomes the command of its arguments, with SIGCHLD ignored.
IGNORING = (
    "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])"
)


def test_its_time_limit_ends_all_of_it(hooked: Hooked) -> None:
    # `nothing_left_behind` sees that both are gone.
    hooked.hook("trap '' TERM", "sleep 60 & sleep 60")
    hooked.sign()
    run = hooked.run("--timeout", "2")
    assert (run.status, run.seconds < 20) == (127, True)
    assert "after 2 seconds" in run.err
    hooked.hook()
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)


def test_a_note_that_cannot_be_read_is_said(hooked: Hooked) -> None:
    hooked.sign()
    assert (hooked.run().status, len(hooked.calls)) == (0, 1)
    hooked.note.unlink()
    hooked.note.mkdir()
    run = hooked.run()
    assert (run.status, f"{hooked.note} is no regular file" in run.err, len(hooked.calls)) == (127, True, 1), run


@needs("strace")
def test_a_note_that_cannot_be_written_is_said(hooked: Hooked) -> None:
    hooked.sign()
    hooked.device.command = [*world.WITHOUT_STARTER]
    run = hooked.run(before=("strace", "-qq", "-o", os.devnull, "-e", "inject=renameat:error=EROFS:when=2"))
    assert (run.status, len(hooked.calls)) == (127, 1)
    assert "new certificate" in run.err and f"can't store {hooked.note}: Read-only file system" in run.err
    assert (hooked.run().status, len(hooked.calls), hooked.litter) == (0, 2, set())


# --- With others around ---


def test_of_many_runs_at_once_one_calls_it(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert hooked.run().status == 127
    hooked.hook("sleep 1")
    with ThreadPoolExecutor(12) as pool:
        runs = list(pool.map(lambda _: hooked.run(), range(12)))
    assert {run.status for run in runs} <= {0, 1}, [run.err for run in runs]
    assert len(hooked.calls) == 2
    assert hooked.litter == set()


@needs("strace")
def test_a_run_that_comes_too_late_to_the_note_does_not_call_it(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert hooked.run().status == 127
    hooked.hook()
    # The key file's lock is taken and given back; the third is that on the note. By then it is open, and another run
    # does what it asks for.
    delay = ("strace", "-qq", "-f", "-o", os.devnull, "-e", "inject=flock:delay_enter=2000000:when=3")
    asked = len(hooked.server.requests)
    late = hooked.device.start("--hook", str(hooked.script), before=delay)
    try:
        world.until("the late run asks the server", lambda: len(hooked.server.requests) > asked)
        world.until("another run has the key file", lambda: hooked.run().status == 0, pause=0.1)
        assert (late.poll(), len(hooked.calls)) == (None, 2)
        assert hooked.device.finish(late, 20).status == 0
    finally:
        world.end(late)
    assert len(hooked.calls) == 2


def test_a_run_that_is_locked_out_does_not_call_it(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert hooked.run().status == 127
    run = hooked.device.run("--hook", str(hooked.script), before=("flock", str(hooked.device.key_file)))
    assert (run.status, len(hooked.calls)) == (1, 1)


@needs("strace")
def test_the_success_of_an_older_certificates_hook_does_not_pay_for_a_newer_one(hooked: Hooked) -> None:
    """2.0.0 looked whether the note was its own, and removed the newer one that had come meanwhile."""
    hooked.sign()
    hooked.device.command = [*world.WITHOUT_STARTER]
    delay = ("unlinkat:delay_enter=3000000:when=4", "renameat:delay_enter=3000000:when=2")  # 2.0.0's, and now
    line = ["strace", "-qq", "-o", os.devnull, *(word for what in delay for word in ("-e", f"inject={what}"))]
    old = hooked.device.start("--hook", str(hooked.script), before=line)
    try:
        world.until("the hook has been called", lambda: hooked.calls)
        hooked.hook("exit 1")
        hooked.sign(72)
        world.until("the next run has the key file", lambda: hooked.run().status != 1, pause=0.1)
        assert old.poll() is None and hooked.device.block("CERTIFICATE") == hooked.certificates[-1]
        assert hooked.device.finish(old, 20).status == 0
    finally:
        world.end(old)
    called = len(hooked.calls)
    hooked.hook()
    assert [(hooked.run().status, len(hooked.calls) - called) for _ in range(2)] == [(0, 1)] * 2


@needs("strace")
@pytest.mark.parametrize("owed", [True, False])
def test_a_newer_certificate_that_cannot_be_stored_changes_nothing(hooked: Hooked, owed: bool) -> None:
    hooked.hook("exit %d" % owed)
    hooked.sign()
    assert (hooked.run().status, len(hooked.calls)) == (127 if owed else 0, 1)
    hooked.sign(72)
    hooked.hook()
    fault = ("strace", "-qq", "-f", "-o", os.devnull, "-e", "inject=fsync:error=EIO:when=1")
    hooked.device.command = [*world.WITHOUT_STARTER]
    run = hooked.run(before=fault)
    assert (run.status, "can't store" in run.err, len(hooked.calls)) == (127, True, 1 + owed)
    assert (hooked.run().status, len(hooked.calls)) == (0, 2 + owed)


def test_a_run_ends_when_the_hook_has_and_not_later(hooked: Hooked) -> None:
    hooked.hook("sleep 1")
    hooked.sign()
    began = time.monotonic()
    assert hooked.run().status == 0
    assert 1 <= time.monotonic() - began < 20


# --- Whose word counts ---


@pytest.mark.parametrize("owed", [True, False])
@pytest.mark.parametrize("answer", [None, answers.NOT_MODIFIED], ids=["no server", "unchanged"])
@pytest.mark.parametrize("whose", ["another device's", "another CA's", "another CA's, sealed"])
def test_it_is_not_called_for_what_this_very_run_has_not_found_good(
    hooked: Hooked, key: world.PrivateKey, tmp_path: Path, whose: str, answer: Optional[bytes], owed: bool
) -> None:
    """2.0.0 had root call it for whatever the owner of the folder, or the card of another device, had there."""
    content = hooked.authority.identity("fffbeec0ffff", key=key)
    if whose != "another device's":
        content = Authority(tmp_path / "other").identity(ID, key=key, line=False)
    if "sealed" in whose:  # SHA-256 of what everybody may know: it protects against accidents
        content = world.sealed(content, hooked.authority.pem, ID)
    hooked.device.has(content)
    if owed:
        owed_for = hashlib.sha256(hooked.device.block("CERTIFICATE") or b"").hexdigest()
        hooked.note.write_text(owed_for + "\n")  # as 2.0.0 wrote it
    with Scripted(hooked.authority.server(file="unchanged.pem"), [answer]) as server:
        hooked.device.server = server.address if answer else "localhost:9"
        run = hooked.run()
    assert (run.status, hooked.calls) == (127, []), run


def test_it_gets_what_was_judged_and_not_what_the_files_line_says(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert hooked.run().status == 127
    good = hooked.calls
    line, _, content = hooked.device.key_file.read_bytes().partition(b"\n")
    forged = re.sub(rb"until=\S+", b"until=$(reboot)", line.partition(b" seal=")[0])
    under = b"".join(hashlib.sha256(text).digest() for text in (hooked.authority.pem, hooked.authority.pem, b"RSA"))
    seal = hashlib.sha256(b"\n".join((forged, under, content))).hexdigest().encode()
    for end in (b"", b" seal=" + seal):
        hooked.device.has(forged + end + b"\n" + content)
        hooked.run()
    assert hooked.calls == good * 3


# --- Its surroundings ---


def test_inside_of_it_the_program_neither_waits_nor_calls_one_whatever_the_server_signs(hooked: Hooked) -> None:
    """2.0.0, and a server that signs at each question: 194 inside of each other."""
    again = " ".join(hooked.device.arguments("--hook", str(hooked.script)))
    hooked.hook(
        "[ $(wc -l <%s/calls) -gt 3 ] && exit 0" % hooked.folder, "env", again, f"echo $? >{hooked.folder}/inner"
    )
    hooked.server.answers = lambda _: answers.certificate(hooked.sign(48 + len(hooked.certificates)))
    run = hooked.run()
    assert (run.status, len(hooked.calls), len(hooked.certificates)) == (0, 1, 2), run.err
    assert "CARAMEL_IN_HOOK=1\n" in run.err and (hooked.folder / "inner").read_text() == "0\n"
    # It is owed for the certificate that the run inside has stored.
    hooked.hook()
    hooked.server.answers = [answers.NOT_MODIFIED]
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)


def test_inside_of_it_another_configuration_is_another_identity(hooked: Hooked) -> None:
    two = hooked.folder / "two.conf"
    two.write_text(f"CARAMEL_CN=two\nCARAMEL_KEY_FILE={hooked.folder}/two.pem\nCARAMEL_CA_CERT={hooked.device.ca}\n")
    hooked.hook(f"{world.COMMAND} --config {two} --status --json >{hooked.folder}/told; true")
    hooked.sign()
    assert hooked.run().status == 0
    told = json.loads((hooked.folder / "told").read_text())
    assert (told["client_id"], told["key_file"]) == ("two", f"{hooked.folder}/two.pem")


def test_it_has_the_callers_environment_and_the_sbin_folders(hooked: Hooked) -> None:
    """cron's PATH has none of them; what steers OpenSSL is kept from this program alone."""
    kept = {"OPENSSL_CONF": "/etc/admins.cnf", "SSL_CERT_FILE": "/etc/admins.pem", "SSL_CERT_DIR": "/etc/admins"}
    (hooked.folder / "sbin").mkdir()
    hooked.sign()
    hook = ("--hook", "sh -c 'env; command -v ldconfig'")
    run = hooked.device.run(*hook, env={**kept, "PATH": f"{hooked.folder}:/usr/bin:/bin"})
    assert run.status == 0, run
    assert kept.items() <= dict(line.partition("=")[::2] for line in run.err.splitlines()).items()
    assert f"PATH={hooked.folder}:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin\n" in run.err


@pytest.mark.parametrize("end", ["its time limit", "a signal"])
def test_what_it_has_sent_into_other_sessions_ends_with_it_and_nothing_else(hooked: Hooked, end: str) -> None:
    # `nothing_left_behind` sees what is left.
    hooked.hook("setsid sleep 61 & setsid sh -c 'sleep 62 & sleep 63' &", "(setsid setsid sleep 64 &)", "sleep 65")
    hooked.sign()
    hooked.device.command = [*world.WITHOUT_STARTER]
    # A child that the process had before it became this program.
    before = ("sh", "-c", f'sleep 60 >/dev/null 2>&1 & echo $! >{hooked.folder}/pid; exec "$@"', "sh")
    process = hooked.device.start("--hook", str(hooked.script), "--timeout", "2", before=before)
    try:
        if end == "a signal":
            world.until("the hook is at work", lambda: hooked.calls)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
        assert hooked.device.finish(process, 20).status == 127
        os.kill(int((hooked.folder / "pid").read_text()), signal.SIGKILL)
    finally:
        world.end(process)
