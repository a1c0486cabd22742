"""Owner, group and mode: as set, from the first byte on; and links are followed, and stay links."""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
from pathlib import Path

import pytest
from needs import needs
from talking import FIRST_TIME, Talking
from world import PLAIN, WITHOUT_STARTER, answers


@pytest.fixture
def device(new: Talking) -> Talking:
    """At its first boot, its server not there: what is to be seen here is on its own disk."""
    new.server = "localhost:9"
    return new


def state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


SET = ["--owner", "65534", "--group", "8", "--mode", "0640"]
AS_SET = (65534, 8, 0o640)
NAMED = ["--owner", "nobody", "--group", "daemon", "--mode", "440"]
AS_NAMED = (pwd.getpwnam("nobody").pw_uid, grp.getgrnam("daemon").gr_gid, 0o440)
MINE = (os.geteuid(), os.getegid(), 0o600)


@pytest.mark.parametrize("umask", [0o000, 0o777])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], MINE),
        pytest.param(SET, AS_SET, marks=needs("root")),
        pytest.param(NAMED, AS_NAMED, marks=needs("root")),
    ],
)
def test_as_set_or_else_the_callers_own_and_nobody_elses(
    device: Talking, umask: int, options: list[str], expected: tuple[int, int, int]
) -> None:
    device.command = ["sh", "-c", f'umask {umask:04o}; exec "$@"', "sh", PLAIN]
    assert device.run(*options).status == 127
    assert state(device.key_file) == expected


@needs("root", "strace")
@pytest.mark.parametrize("life", ["empty", "pending", "certified"])
@pytest.mark.parametrize("mode", [0o644, 0o000])
def test_a_file_that_stood_there_with_others_gets_them(device: Talking, life: str, mode: int) -> None:
    if life == "empty":
        device.has(b"")
    elif life == "pending":
        device.pending()
    else:
        device.certified()
    content = device.key_file.read_bytes()
    device.key_file.chmod(mode)
    assert device.hears(*(FIRST_TIME if life == "empty" else [answers.PENDING]), options=SET).status == 69
    assert state(device.key_file) == AS_SET
    assert content in (b"", device.key_file.read_bytes())
    device.keeps(answers.PENDING, options=SET, status=69)  # and then nothing is written any more


@needs("root")
def test_a_certificates_time_outlives_another_owner(certified: Talking) -> None:
    os.utime(certified.key_file, (5000, 5000))
    assert certified.hears(answers.NOT_MODIFIED, options=SET).status == 0
    assert state(certified.key_file) == AS_SET and certified.key_file.stat().st_mtime == 5000


@needs("root", "strace")
@pytest.mark.parametrize("life", ["new", "readable by all", "renewed"])
def test_no_secret_byte_is_in_a_file_that_others_can_read(device: Talking, tmp_path: Path, life: str) -> None:
    """From the trace: a file that gets content has its owner, group and mode before, and never loses them."""
    device.command = [*WITHOUT_STARTER]
    if life != "new":
        device.pending()
        device.key_file.chmod(0o644 if "all" in life else 0o600)
    trace = tmp_path / "trace"
    calls = "open,openat,write,pwrite64,writev,fchown,fchmod,chmod,chown,fchmodat,fchownat,link,linkat,rename"
    line = ["strace", "-f", "-qq", "-y", "-s", "16", "-e", f"trace={calls},renameat,renameat2", "-o", str(trace)]
    script = [answers.certificate(device.signed())] if life == "renewed" else FIRST_TIME
    assert device.hears(*script, options=SET, before=line).status in (0, 69)
    done: list[str] = []
    for text in trace.read_text().splitlines():
        if str(device.folder) not in text:
            continue
        call = re.sub(r"^\d+ +", "", text)
        if call.startswith(("fchown(", "fchmod(")):
            done.append(call[:6] + ("8" if ", 8)" in call else "") + ("0640" if "0640" in call else ""))
        elif call.startswith(("openat(", "open(")) and "O_CREAT" in call:
            assert ", 0600)" in call, text
            done = []
        elif call.startswith("write(") and '"\\0\\0' not in call:  # zeros say whether there is room
            assert done == ["fchown8", "fchmod0640"], text
        else:
            assert not call.startswith(("chmod(", "chown(", "fchmodat(", "fchownat(")), text
    assert done, "the trace shows how the file came to be"
    assert state(device.key_file) == AS_SET


@needs("root")
def test_an_owner_that_cannot_be_had(device: Talking) -> None:
    device.command = [PLAIN]
    run = device.run(*SET, before=["setpriv", "--bounding-set=-all", "--inh-caps=-all"])
    assert run.status == 127 and str(device.key_file) in run.err and run.err.count("\n") == 1
    assert not device.key_file.exists() and {path.name for path in device.folder.iterdir()} == {"empty.conf"}


# --- Links ---


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_is_followed_and_stays_a_link(new: Talking, tmp_path: Path, relative: bool) -> None:
    """A read-only root file system, and the data on another partition."""
    data = tmp_path / "data"
    data.mkdir()
    link, target = new.key_file, data / "device.pem"
    link.symlink_to("../data/device.pem" if relative else target)
    new.enrolls()
    assert link.is_symlink() and target.is_file() and not target.is_symlink()
    fresh = new.signed()
    assert new.hears(answers.certificate(fresh)).status == 0
    assert link.is_symlink() and not target.is_symlink()
    assert fresh in target.read_bytes()
    assert [path.name for path in data.iterdir()] == ["device.pem"], "the draft was made where the file is"
    assert {path.name for path in new.folder.iterdir()} == {"empty.conf", "identity.pem"}


@pytest.mark.parametrize("kind", ["to a folder that is not there yet", "to a link", "as the folder"])
def test_other_links_are_followed_and_stay_links_too(device: Talking, tmp_path: Path, kind: str) -> None:
    target, link = tmp_path / "data/identity.pem", device.key_file
    if kind == "to a folder that is not there yet":
        link.symlink_to(target)
    else:
        target.parent.mkdir()
    if kind == "to a link":
        (tmp_path / "middle.pem").symlink_to(target)
        link.symlink_to(tmp_path / "middle.pem")
    elif kind == "as the folder":
        link = tmp_path / "link"
        link.symlink_to("data")
        device.key_file = link / "identity.pem"
    assert device.run().status == 127
    assert link.is_symlink() and target.is_file() and not target.is_symlink()
    assert kind != "to a link" or (tmp_path / "middle.pem").is_symlink()
