"""Faults of the machine: what a run makes of no room, no memory, no entropy, no output, signals and broken parts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

import pytest
import world
from needs import needs, slow
from talking import Talking
from torture import machine, power, report
from torture.fleet import Fleet, key_file_parts
from torture.namespaces import isolated
from torture.report import Case
from world import Authority, Device, Run, Scripted, answers

#: Misfortunes of the machine, and at least how many cases of each there are.
FAULTS: dict[str, tuple[Callable[[Fleet], Sequence[Case]], int]] = {
    "a full disk and a read-only one": (lambda fleet: machine.disks(fleet, full=False), 9),
    "stopped for a while": (lambda fleet: [machine.stopped(fleet)], 1),
    "an interpreter that cannot start": (lambda fleet: machine.cannot_start(fleet, full=False), 7),
    "an etc that is empty or unreadable": (machine.etc, 3),
    "too few descriptors, too little memory": (lambda fleet: machine.starved(fleet, full=False), 15),
    "no entropy": (machine.entropy, 8),
    "outputs that are closed or full": (lambda fleet: machine.outputs(fleet, full=False), 10),
    "a signal": (lambda fleet: machine.signals(fleet, full=False), 15),
    "a missing package": (lambda fleet: broken_parts(fleet, " without "), 12),
    "a broken module": (lambda fleet: report.sample(broken_parts(fleet, ": "), 16), 16),
    "a signal to the starter": (lambda fleet: report.sample(machine.starter(fleet, full=False), 12), 12),
    "signals that the caller ignores": (lambda fleet: machine.ignored(fleet, full=False), 10),
    "a hostile environment": (lambda fleet: machine.environments(fleet, full=False), 23),
}
#: The first four are quick enough for `make test`.
QUICK = list(FAULTS)[:4]


def broken_parts(fleet: Fleet, what: str) -> list[Case]:
    return [case for case in machine.missing(fleet, full=False) if what in case.name]


@pytest.mark.parametrize("what", [pytest.param(what, marks=() if what in QUICK else slow) for what in FAULTS])
def test_a_machine_that_fails_costs_a_device_nothing(fleet: Fleet, what: str) -> None:
    """A sample of what `make torture` does in full: it ends with the right status, and nothing is lost."""
    make, least = FAULTS[what]
    row = report.tried(what, make(fleet))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases >= least


@needs("mounts")
@pytest.mark.parametrize("answer", [answers.UNKNOWN, answers.REJECTED, answers.NOT_MODIFIED])
def test_a_key_file_that_is_a_mount_point_is_said_before_a_key_is_made(new: Talking, answer: bytes) -> None:
    """A container that mounts the one file: nothing can be put in its place, rename(2) says EBUSY."""
    new.has(b"") if answer == answers.UNKNOWN else new.certified()
    mounted = f'mount --bind "{new.key_file}" "{new.key_file}" && exec "$@"'
    before = new.key_file.read_bytes()
    run = new.hears(answer, options=["-v"], before=("unshare", "-m", "sh", "-c", mounted, "sh"))
    assert run.status == (0 if answer == answers.NOT_MODIFIED else 127), run
    assert f"{new.key_file} is mounted by itself, and can't be replaced: mount its folder" in run.err
    assert "making a key" not in run.err and "POST" not in new.methods
    assert new.key_file.read_bytes() == before
    assert {path.name for path in new.folder.iterdir()} == {"empty.conf", "identity.pem"}


#: What a root file system in memory, or an overlay with one, looks like.
IN_MEMORY = {
    "tmpfs": "mount -t tmpfs none {0}",
    "ramfs": "mount -t ramfs none {0}",
    "overlay": "mount -t tmpfs none {1} && mkdir {1}/up {1}/work {1}/low && "
    "mount -t overlay -o lowerdir={1}/low,upperdir={1}/up,workdir={1}/work none {0}",
    "disk": "mount --bind {1} {0}",
    "overlay over a disk": "mkdir {1}/up {1}/work {1}/low && "
    "mount -t overlay -o lowerdir={1}/low,upperdir={1}/up,workdir={1}/work none {0}",
}


@needs("mounts")
@pytest.mark.parametrize("kind", IN_MEMORY)
def test_a_key_file_that_the_next_boot_has_not_is_said_each_time(
    device: Device, authority: Authority, tmp_path: Path, kind: str
) -> None:
    folder, beside = tmp_path / "state", tmp_path / "beside"
    folder.mkdir()
    beside.mkdir()
    device.key_file = folder / "caramel" / "identity.pem"

    def there() -> list[Run]:
        subprocess.run(["sh", "-ec", IN_MEMORY[kind].format(folder, beside)], check=True, timeout=60)
        return [device.run(), device.run(), device.run("--status"), device.run("--status", "--json")]

    with Scripted(authority.server(), [answers.UNKNOWN, answers.PENDING]) as server:
        device.server = server.address
        runs = isolated(there)
    assert [run.status for run in runs] == [69] * 4, runs
    remark = f"{device.key_file} is in memory ({kind.split()[0]}): each boot begins with a new key and request"
    said = [(run.err + run.out).count(remark) for run in runs]
    assert said == ([0] * 4 if "disk" in kind else [1] * 4), runs


@needs("root")
def test_a_folder_that_cannot_be_read_is_no_reason_to_fail(new: Talking) -> None:
    """It can be written to, and can't be opened to be flushed: 2.0.0 stored, and ended with 127."""
    state = new.folder / "state"
    state.mkdir()
    new.key_file = state / "caramel" / "identity.pem"
    state.chmod(0o311)
    powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    new.enrolls(before=powerless)
    new.key_file.parent.chmod(0o311)
    content = new.key_file.read_bytes()
    new.key_file.write_bytes(world.unsealed(content))
    run = new.hears(answers.PENDING, before=powerless)
    assert run.status == 69, run
    assert new.key_file.read_bytes() == content, "it was written anew"


@pytest.mark.parametrize("variable", ["PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__"])
def test_no_variable_says_where_the_interpreters_modules_are(fleet: Fleet, variable: str) -> None:
    """Python 3.11 looks beside the file that these name for its own and all other modules, in spite of -I."""
    dut = fleet.certified()
    evil = dut.device.folder / "evil"
    (evil / "bin").mkdir(parents=True)
    version = "python%d.%d" % sys.version_info[:2]
    packages = evil / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    marker = evil / "marker"
    (packages / "evil.pth").write_text(f"import os; open({str(marker)!r}, 'w').close()\n")
    (evil / "pyvenv.cfg").write_text(f"home = {os.path.dirname(sys.executable)}\n")
    run = dut.run(env={variable: str(evil / "bin" / "python3")})
    assert run.status == 0 and not marker.exists(), run


@pytest.mark.parametrize("start", ["pending", "first_certificate", "certified"])
def test_a_request_with_a_flipped_bit_is_made_again(fleet: Fleet, start: str) -> None:
    """Found by the fuzzer: a signature that isn't right is nothing that a look sees, and the server would have
    declined that request for ever."""
    dut = getattr(fleet, start)()
    content = bytearray(dut.content or b"")
    place = content.rindex(b"-----END") - 20
    content[place] = ord("A") if content[place] != ord("A") else ord("B")
    dut.device.key_file.write_bytes(content)
    dut.old = bytes(content)
    run = dut.run()
    assert run.status == dut.status and "damaged" in run.err, run
    assert dut.content == dut.expected
    assert fleet.broken(dut, run) + fleet.recovered(dut) == []


@slow
def test_key_material_never_leaves_the_file(fleet: Fleet) -> None:
    """No output, argument or environment of a run has a piece of the key in it, and no other file gets one."""
    for make in fleet.scenarios.values():
        dut = make()
        run, trace = power.traced(dut)
        loud = dut.run("-v")
        parts = key_file_parts(dut.content or b"")
        assert parts is not None
        secret = parts.key.decode().splitlines()[1:-1]
        said = run.out + run.err + loud.out + loud.err + trace
        assert not any(line[:24] in said for line in secret)


@slow
def test_nothing_is_written_outside_the_key_files_folder(fleet: Fleet) -> None:
    for make in fleet.scenarios.values():
        dut = make()
        _, trace = power.traced(dut)
        folder = str(dut.device.key_file.parent)
        for line in trace.splitlines():
            writes = any(flag in line for flag in ("O_WRONLY", "O_RDWR", "O_CREAT"))
            if "openat(" in line and writes and " = -1 " not in line:
                hook = dut.called is not None and str(dut.called) in line
                # An absolute path, or a name in the opened folder: 4</folder>, "name".
                inside = re.search(rf'openat\(\d+<{re.escape(folder)}>, "[^/"]*"', line)
                assert f'"{folder}' in line or inside or "/dev/null" in line or hook, line


def test_a_draft_that_somebody_else_has_put_there_is_not_followed(fleet: Fleet) -> None:
    """In a folder that others may write to, too: a link in the draft's place leads the key nowhere."""
    for make in (fleet.first_enrollment, fleet.renewal, fleet.rejection):
        dut = make()
        folder = dut.device.key_file.parent
        folder.mkdir(exist_ok=True)
        victim = dut.device.folder / "victim"
        victim.write_text("mine\n")
        (folder / ".identity.pem.new").symlink_to(victim)
        run = dut.run()
        assert run.status == dut.status, run
        assert victim.read_text() == "mine\n"
        assert fleet.broken(dut, run) + fleet.recovered(dut) == []


def test_a_bad_wait_for_a_name_is_no_wait_for_ever(device: Device) -> None:
    """The time limit holds from the look-up on, whatever the resolver does."""
    device.server = "a.name.that.is.not.there.invalid"
    run = device.run("--timeout=2")
    assert run.status == 127 and run.seconds < 6, run
