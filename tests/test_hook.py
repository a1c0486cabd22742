"""The hook: called once for each new certificate that is in place, and owed until it has succeeded."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

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
    def litter(self) -> list[str]:
        """What is beside the key file."""
        return [
            name for name in os.listdir(self.device.key_file.parent) if name not in ("identity.pem", "empty.conf")
        ]


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
    assert hooked.litter == []


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


def test_a_certificate_that_was_there_before_the_hook_was_set_is_no_news(hooked: Hooked) -> None:
    hooked.sign()
    assert hooked.device.run().status == 0
    assert (hooked.run().status, hooked.calls) == (0, [])


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
    assert hooked.litter == []


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
    assert hooked.litter == []


@pytest.mark.parametrize(
    "cut",
    [
        *(pytest.param(f"fsync:when={number}", marks=slow) for number in range(1, 7)),
        *(f"renameat:when={number}" for number in range(1, 3)),
    ],
)
@needs("strace")
def test_a_power_cut_around_the_storing_calls_it_once(hooked: Hooked, cut: str) -> None:
    """The note is flushed (1 to 3) before the certificate is (4 to 6): at no moment is it forgotten."""
    hooked.sign()
    hooked.device.command = [*world.WITHOUT_STARTER]
    call, when = cut.split(":")
    killed = hooked.run(before=("strace", "-qq", "-o", os.devnull, "-e", f"inject={call}:signal=KILL:{when}"))
    assert (killed.status, hooked.calls) == (-9, [])
    assert (hooked.run().status, len(hooked.calls)) == (0, 1)
    assert (hooked.run().status, len(hooked.calls)) == (0, 1)
    assert hooked.litter == []


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


def test_a_note_that_cannot_be_read_is_no_reason_to_forget_it(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert hooked.run().status == 127
    (note,) = (hooked.device.folder / name for name in hooked.litter)
    note.rename(hooked.folder / "elsewhere")
    note.symlink_to(hooked.folder / "elsewhere")
    run = hooked.run()
    assert (run.status, f"can't read {note}" in run.err, len(hooked.calls)) == (127, True, 1)


@needs("strace")
def test_a_note_that_cannot_be_removed_is_said(hooked: Hooked) -> None:
    hooked.sign()
    note = hooked.device.folder / ".identity.pem.hook"
    # After the clean-up and the removal of two drafts that aren't there.
    hooked.device.command = [*world.WITHOUT_STARTER]
    fault = ("strace", "-qq", "-f", "-o", os.devnull, "-e", "inject=unlinkat:error=EROFS:when=4")
    run = hooked.run(before=fault)
    assert (run.status, len(hooked.calls)) == (127, 1)
    assert "new certificate" in run.err and f"can't settle {note}: Read-only file system" in run.err
    assert (hooked.run().status, len(hooked.calls), hooked.litter) == (0, 2, [])


# --- With others around ---


def test_a_hook_that_starts_the_program_again_neither_waits_nor_recurses(hooked: Hooked) -> None:
    again = " ".join(hooked.device.arguments("--hook", str(hooked.script)))
    # A limit, so that a program that does recurse is a failure and not a fork bomb.
    hooked.hook(f"[ $(wc -l <{hooked.folder}/calls) -gt 3 ] && exit 0", again, f"echo $? >>{hooked.folder}/inner")
    hooked.sign()
    run = hooked.run()
    assert (run.status, run.seconds < 20, len(hooked.calls)) == (0, True, 1)
    assert (hooked.folder / "inner").read_text() == "0\n"
    assert hooked.litter == []


def test_of_many_runs_at_once_one_calls_it(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert hooked.run().status == 127
    hooked.hook("sleep 1")
    with ThreadPoolExecutor(12) as pool:
        runs = list(pool.map(lambda _: hooked.run(), range(12)))
    assert {run.status for run in runs} <= {0, 1}, [run.err for run in runs]
    assert len(hooked.calls) == 2
    assert hooked.litter == []


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


def test_a_slow_hooks_success_does_not_pay_for_the_next_certificate(hooked: Hooked) -> None:
    go = hooked.folder / "go"
    hooked.hook(f"while [ ! -e {go} ]; do sleep 0.05; done")
    hooked.sign()
    with started(hooked) as slow:
        world.until("the first hook is at work", lambda: hooked.calls)
        hooked.script.rename(hooked.folder / "old")
        hooked.hook("exit 1")
        hooked.sign(72)
        assert (hooked.run().status, len(hooked.calls)) == (127, 2)
        go.touch()
        assert hooked.device.finish(slow, 20).status == 0
    hooked.hook()
    assert (hooked.run().status, len(hooked.calls)) == (0, 3)
    assert (hooked.run().status, len(hooked.calls)) == (0, 3)


@needs("strace")
def test_what_is_owed_stays_owed_while_a_newer_certificate_cannot_be_stored(hooked: Hooked) -> None:
    hooked.hook("exit 1")
    hooked.sign()
    assert hooked.run().status == 127
    hooked.sign(72)
    hooked.device.command = [*world.WITHOUT_STARTER]
    # The fourth flush is that of the newer certificate; the note that names it is in place already.
    fault = ("strace", "-qq", "-f", "-o", os.devnull, "-e", "inject=fsync:error=EIO:when=4")
    hooked.hook()
    run = hooked.run(before=fault)
    assert (run.status, "can't store" in run.err, len(hooked.calls)) == (127, True, 2)
    assert (hooked.run().status, len(hooked.calls)) == (0, 3)


@needs("strace")
def test_a_certificate_that_could_not_be_stored_is_no_news(hooked: Hooked) -> None:
    hooked.sign()
    assert (hooked.run().status, len(hooked.calls)) == (0, 1)
    hooked.sign(72)
    hooked.device.command = [*world.WITHOUT_STARTER]
    run = hooked.run(before=("strace", "-qq", "-o", os.devnull, "-e", "inject=fsync:error=EIO:when=3"))
    assert (run.status, len(hooked.calls)) == (127, 1)
    assert (hooked.run().status, len(hooked.calls)) == (0, 2)


def test_a_run_ends_when_the_hook_has_and_not_later(hooked: Hooked) -> None:
    hooked.hook("sleep 1")
    hooked.sign()
    began = time.monotonic()
    assert hooked.run().status == 0
    assert 1 <= time.monotonic() - began < 20
