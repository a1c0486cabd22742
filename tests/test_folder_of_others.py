"""Whoever else may write to the key file's folder spoils that identity, and nothing else.

Root runs the program for a user, in a folder that the user owns. Whatever the user puts there, no file outside of the
folder is read, made, changed or handed over.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
from pathlib import Path

import pytest
import world
from needs import needs, slow
from torture import folders, report
from torture.fleet import Fleet
from world import Authority, Device, Scripted, Snapshot, answers, hours, now

ID = "fffbeec0ffee"

pytestmark = needs("root")


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="folder.pem")


@pytest.fixture
def owned(tmp_path: Path, authority: Authority) -> Device:
    """A device whose key file is nobody's, in a folder that nobody owns."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, pwd.getpwnam("nobody").pw_uid, -1)
    device.key_file = home / "identity.pem"
    return device


def checked(device: Device, pem: Path, *says: world.Answer) -> world.Run:
    with Scripted(pem, says or (answers.UNKNOWN, answers.PENDING, answers.PENDING)) as server:
        device.server = server.address
        return device.run("--owner", "nobody", "--mode", "0600")


def as_nobody(path: Path) -> None:
    os.lchown(path, pwd.getpwnam("nobody").pw_uid, -1)


def test_it_does_its_job_there(owned: Device, pem: Path) -> None:
    assert checked(owned, pem).status == 69
    status = owned.key_file.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (pwd.getpwnam("nobody").pw_uid, 0o600)
    assert checked(owned, pem, answers.PENDING).status == 69


@pytest.mark.parametrize("content", ["a text of root's", "", "x" * 5_000_000, "identity"])
def test_a_link_to_roots_file_is_not_followed(
    owned: Device, pem: Path, tmp_path: Path, authority: Authority, content: str
) -> None:
    target = tmp_path / "roots"
    target.write_bytes(authority.identity(ID) if content == "identity" else content.encode())
    target.chmod(0o600)
    before = Snapshot.of(target)
    owned.key_file.symlink_to(target)
    as_nobody(owned.key_file)
    run = checked(owned, pem)
    assert (run.status, "symbolic link that somebody else" in run.err) == (127, True)
    assert Snapshot.of(target) == before and owned.key_file.is_symlink()


@pytest.mark.parametrize("owner", ["nobody", "root"])
def test_a_link_to_nothing_makes_no_file_elsewhere(owned: Device, pem: Path, tmp_path: Path, owner: str) -> None:
    elsewhere = tmp_path / "profile.d"
    elsewhere.mkdir()
    owned.key_file.symlink_to(elsewhere / "made.sh")
    if owner == "nobody":
        as_nobody(owned.key_file)  # root's own link is in a folder that others may write to: no better
    assert checked(owned, pem).status == 127
    assert list(elsewhere.iterdir()) == []


def test_a_folder_that_is_a_link_leads_nowhere(owned: Device, pem: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = owned.key_file.parent / "sub"
    link.symlink_to(elsewhere)
    as_nobody(link)
    owned.key_file = link / "identity.pem"
    assert checked(owned, pem).status == 127
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["identity.pem", ".identity.pem.hook"])
def test_a_hard_link_to_roots_file_is_left_alone(
    owned: Device, pem: Path, tmp_path: Path, authority: Authority, name: str
) -> None:
    target = tmp_path / "roots"
    target.write_bytes(authority.identity(ID))
    target.chmod(0o600)
    before = Snapshot.of(target)
    if name != "identity.pem":
        owned.has(authority.identity(ID))
        as_nobody(owned.key_file)
    os.link(target, owned.key_file.parent / name)
    with Scripted(pem, [answers.NOT_MODIFIED]) as server:
        owned.server = server.address
        run = owned.run("--owner", "nobody", "--hook", "true")
    assert (run.status, "is a hard link that somebody else" in run.err) == (127, True)
    assert Snapshot.of(target) == before


def test_a_draft_that_is_a_link_is_replaced_and_not_followed(owned: Device, pem: Path, tmp_path: Path) -> None:
    target = tmp_path / "roots"
    target.write_text("root's")
    before = Snapshot.of(target)
    draft = owned.key_file.parent / ".identity.pem.new"
    draft.symlink_to(target)
    as_nobody(draft)
    assert checked(owned, pem).status == 69
    assert Snapshot.of(target) == before
    assert not draft.exists() and not draft.is_symlink()


def test_what_was_not_judged_is_written_nowhere(owned: Device, pem: Path) -> None:
    """1.0.0 gave the file its owner first, by a copy of whatever was in it."""
    owned.key_file.write_bytes(b"a secret of root's, moved there by root\n")
    owned.key_file.chmod(0o600)
    before = Snapshot.of(owned.key_file)
    owned.server = "localhost:1"  # nobody listens there
    assert owned.run("--owner", "nobody").status == 127
    assert Snapshot.of(owned.key_file) == before


def test_a_file_whose_owner_may_still_write_to_it_gets_another_inode(
    owned: Device, pem: Path, authority: Authority
) -> None:
    owned.has(authority.identity(ID))
    as_nobody(owned.key_file)
    with open(owned.key_file, "r+b") as kept_open, Scripted(pem, [answers.PENDING]) as server:
        owned.server = server.address
        assert owned.run("--owner", "root").status == 69
        assert os.fstat(kept_open.fileno()).st_ino != owned.key_file.stat().st_ino
    assert owned.key_file.stat().st_uid == 0


@needs("debian-python")
@pytest.mark.parametrize("hook", ["true", "false"])
def test_what_roots_run_has_left_is_the_files_owners(
    owned: Device, pem: Path, authority: Authority, tmp_path: Path, hook: str
) -> None:
    """2.0.0: the hook's note was root's, and each later run of the owner ended with 127."""
    owned.has(authority.identity(ID, certified=False))
    as_nobody(owned.key_file)
    certificate = answers.certificate(authority.sign(owned.request, not_before=now() - hours(1)))
    nobody = pwd.getpwnam("nobody")
    with Scripted(pem, [certificate]) as server:
        owned.server = server.address
        owner = ("--owner", "nobody", "--group", str(nobody.pw_gid))
        assert owned.run(*owner, "--hook", hook).status == (0 if hook == "true" else 127)
        for left in owned.key_file.parent.iterdir():
            assert (left.stat().st_uid, left.stat().st_gid) == (nobody.pw_uid, nobody.pw_gid), left
        # Where that user can get at it.
        owned.ca = tmp_path / "ca.pem"
        owned.ca.write_bytes(authority.pem)
        shutil.copytree(world.ROOT / "caramel_embedded", tmp_path / "bin/caramel_embedded")
        main = (
            f"import sys; sys.path.insert(0, {str(tmp_path / 'bin')!r}); from caramel_embedded.__main__ import main"
        )
        owned.command = [str(world.debian_python()), "-I", "-B", "-c", f"{main}; main()"]
        user = ("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
        assert owned.run("--hook", "true", before=user).status == 0
        # Or the note of a 2.0.0 that root once started by hand: it is in the way of nothing.
        note = owned.key_file.with_name(".identity.pem.hook")
        note.unlink(missing_ok=True)
        note.write_text(hashlib.sha256(owned.block("CERTIFICATE") or b"").hexdigest())
        note.chmod(0o600)
        run = owned.run("--hook", f"touch {owned.key_file.parent}/called", before=user)
    assert run.status == 0 and (owned.key_file.parent / "called").exists(), run
    run = owned.run("--owner", "root", before=user)
    why = f"only root can give it to 0:{nobody.pw_gid} (--owner, --group), and this is user {nobody.pw_uid}\n"
    assert run.status == 127 and run.err.endswith(f"{owned.key_file}: {why}"), run


@slow
def test_whatever_is_planted_there_leads_nowhere_in_any_moment_of_a_devices_life(fleet: Fleet) -> None:
    row = report.tried("", folders.cases(fleet, full=False))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases >= 16


# --- Links that are the administrator's ---


def test_roots_own_link_in_roots_own_folder_is_followed(owned: Device, pem: Path, tmp_path: Path) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    link = folder / "identity.pem"
    link.symlink_to(tmp_path / "var" / "identity.pem")
    (tmp_path / "var").mkdir()
    owned.key_file = link
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        owned.server = server.address
        assert owned.run().status == 69
    assert link.is_symlink() and (tmp_path / "var" / "identity.pem").exists()


# --- Somebody else's file, by a slip ---


@pytest.mark.parametrize("kind", ["the CA's file", "a chain"])
def test_a_key_file_that_names_certificates_is_left_alone(
    owned: Device, pem: Path, tmp_path: Path, authority: Authority, kind: str
) -> None:
    path = tmp_path / "certificates.pem"
    path.write_bytes(
        authority.pem
        if kind == "the CA's file"
        else authority.sign(world.signing_request(world.new_key(), authority.subject_for(ID))) + authority.pem
    )
    owned.key_file = path
    before = Snapshot.of(path)
    run = checked(owned, pem)
    assert (run.status, "certificates" in run.err) == (127, True)
    assert Snapshot.of(path) == before


def test_the_ca_file_with_its_key_is_left_alone_too(
    owned: Device, pem: Path, tmp_path: Path, authority: Authority
) -> None:
    path = tmp_path / "ca.pem"
    path.write_bytes(authority.private_key_file.read_bytes() + authority.pem)
    owned.ca = owned.key_file = path
    before = Snapshot.of(path)
    assert checked(owned, pem).status == 127
    assert Snapshot.of(path) == before


# --- Names and folders ---


@pytest.mark.parametrize("name", ["é" * 127, "x" * 255, "identity.pem"])
def test_a_name_may_be_as_long_as_the_file_system_has_them(
    tmp_path: Path, pem: Path, authority: Authority, name: str
) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    device.key_file = device.folder / name
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        assert device.run("--hook", "true").status == 69
    certificate = authority.sign(device.request, not_before=now() - hours(1))
    with Scripted(pem, [answers.certificate(certificate)]) as server:
        device.server = server.address
        run = device.run("--hook", "true")
    assert run.status == 0, run.err
    note = f".{name if len(name.encode()) < 240 else hashlib.sha256(name.encode()).hexdigest()}.hook"
    assert {entry.name for entry in device.folder.iterdir()} == {"empty.conf", name, note}


@pytest.mark.parametrize("umask", ["0077", "0777", "0000"])
def test_folders_are_made_for_everybody_to_pass_whatever_the_umask(
    tmp_path: Path, pem: Path, authority: Authority, umask: str
) -> None:
    device = Device(tmp_path / "device", None, authority.certificate_file, ID)
    device.key_file = device.folder / "a" / "b" / "identity.pem"
    with Scripted(pem, [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
        device.server = server.address
        run = device.run(before=("sh", "-c", f'umask {umask}; exec "$@"', "sh"))
    assert run.status == 69, run.err
    assert [folder.stat().st_mode & 0o777 for folder in list(device.key_file.parents)[:2]] == [0o755, 0o755]
    assert device.key_file.stat().st_mode & 0o777 == 0o600
