"""The lock: flock(2) on the key file itself, as flock(1) takes it; one process works, the others leave at once."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import world
from talking import FIRST_TIME, Talking
from world import PLAIN, Answer, Caramel, Device, Front, HttpRequest, answers

from caramel_embedded.errors import Locked
from caramel_embedded.keyfile import KeyFile


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Another process, flock(1), holds the lock on the file until the block is over."""
    # The lock is there when what it guards has begun.
    holder = subprocess.Popen(
        ["flock", str(path), "sh", "-c", "echo; read gone"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=world.die_with_parent,
    )
    try:
        assert holder.stdout and holder.stdout.readline() == b"\n"
        yield
    finally:
        world.end(holder)


def is_free(path: Path) -> bool:
    return subprocess.run(["flock", "-n", str(path), "true"], timeout=30).returncode == 0


def test_a_device_whose_file_is_locked_leaves_everything_alone(new: Talking) -> None:
    new.has(b"anything, for nobody reads it")
    with held(new.key_file):
        run = new.keeps(status=1)
    assert "another process holds the lock" in run.err and new.connections == 0
    assert [path.name for path in new.folder.iterdir() if path.name.startswith(".")] == []
    assert run.seconds < 5


def test_the_lock_is_on_the_file_that_a_link_leads_to(tmp_path: Path, device: Device) -> None:
    assert device.run().status == 69
    link = tmp_path / "link.pem"
    link.symlink_to(device.key_file)
    with held(device.key_file):
        target = device.key_file
        device.key_file = link
        assert device.run().status == 1
    with held(link):
        device.key_file = target
        assert device.run().status == 1
    assert device.run().status == 69 and is_free(device.key_file)


def test_a_working_run_holds_the_lock_also_on_the_file_that_replaced_the_first(certified: Talking) -> None:
    free: list[bool] = []
    inodes: list[int] = []
    locked_out: list[int] = []

    def says(asked: HttpRequest) -> Answer:
        free.append(is_free(certified.key_file))
        inodes.append(certified.key_file.stat().st_ino)
        # A run during a run; not where it would be let in, and ask this server, and so on.
        locked_out.append(-1 if free[-1] else certified.run().status)
        return [answers.REJECTED, answers.PENDING, answers.PENDING][len(free) - 1]

    assert certified.hears(says).status == 69
    assert free == [False, False, False] and locked_out == [1, 1, 1]
    assert inodes[0] != inodes[1] == inodes[2], "the rejected identity was replaced during the run"
    assert is_free(certified.key_file)


def test_a_first_boot_holds_the_lock_from_before_there_is_a_key(new: Talking) -> None:
    free: list[bool] = []

    def says(asked: HttpRequest) -> Answer:
        free.append(is_free(new.key_file))
        return FIRST_TIME[len(free) - 1]

    assert new.hears(says).status == 69
    assert free == [False, False, False]


def test_a_backup_of_the_file_that_is_still_locked_locks_nobody_out(pending: Talking, tmp_path: Path) -> None:
    """The path has another file meanwhile, which nobody holds."""
    inner: list[int] = []

    def says(asked: HttpRequest) -> Answer:
        if not inner:
            inner.append(0)
            pending.key_file.rename(tmp_path / "backup")
            pending.pending()
            inner[0] = pending.run().status
        return answers.PENDING

    assert pending.hears(says).status == 69
    assert inner == [69]


@pytest.mark.parametrize("times", [1, 9])
def test_a_lock_on_what_no_longer_has_the_name_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Another run replaces the file between this one's open(2) and flock(2)."""
    path, flock = tmp_path / "identity.pem", fcntl.flock
    path.write_bytes(b"0")

    def late(fd: int, how: int) -> None:
        count = int(path.read_bytes())
        if count < times:
            new = tmp_path / "new"
            new.write_bytes(b"%d" % (count + 1))
            new.rename(path)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    if times > 1:
        # Never waits, and so doesn't try for ever: whoever replaces it all the time is at work.
        with pytest.raises(Locked):
            KeyFile.open(str(path))
        return
    file = KeyFile.open(str(path))
    assert file and file.read() == b"1" and not is_free(path)
    file.close()
    assert is_free(path)


def test_fifty_first_boots_at_once_make_one_key_and_one_request(
    device: Device, front: Front, caramel: Caramel
) -> None:
    device.command = [PLAIN]
    with front.watched() as seen:
        started = [device.start() for _ in range(50)]
        runs = [device.finish(process, 120) for process in started]
    statuses = sorted({run.status for run in runs})
    assert set(statuses) <= {1, 69} and 69 in statuses, [run.err for run in runs if run.status not in (1, 69)]
    assert [row.sha256 for row in caramel.requests(str(device.client_id))] == [device.request_hash()]
    assert {asked.path for asked in seen} == {f"/{device.request_hash()}"}
    assert [asked.method for asked in seen].count("POST") == 1
    assert {path.name for path in device.folder.iterdir()} == {"empty.conf", "identity.pem"}

    caramel.sign(str(device.client_id))
    started = [device.start() for _ in range(20)]
    runs = [device.finish(process, 120) for process in started]
    assert {run.status for run in runs} <= {0, 1} and 0 in {run.status for run in runs}
    assert device.labels == ["PRIVATE KEY", "CERTIFICATE", "NEW CERTIFICATE REQUEST"]
