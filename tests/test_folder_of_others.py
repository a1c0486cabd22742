"""Whoever else may write to the key file's folder spoils that identity, and nothing else.

Root runs the program for a user, in a folder that the user owns. Whatever the user puts there, no file outside of the
folder is read, made, changed or handed over.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import world
from needs import needs, slow
from talking import FIRST_TIME, ID, Talking, key
from torture import folders, report
from torture.fleet import Fleet
from world import Authority, Snapshot, answers

pytestmark = needs("root")
NOBODY = pwd.getpwnam("nobody")
OWNER = ["--owner", "nobody", "--mode", "0600"]


class Owned(Talking):
    """A device whose key file is nobody's, in a folder that nobody owns."""

    @property
    def home(self) -> Path:
        return self.key_file.parent

    def checked(self, *says: world.Answer, options: Sequence[str] = OWNER) -> world.Run:
        """A run of root's for that user."""
        return self.hears(*(says or FIRST_TIME), options=options)

    def refuses(self, words: str, *says: world.Answer, options: Sequence[str] = OWNER) -> None:
        run = self.checked(*says, options=options)
        assert run.status == 127 and words in run.err, run


@pytest.fixture
def owned(tmp_path: Path, authority: Authority) -> Owned:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    device = Owned(tmp_path / "device", authority)
    device.key_file = tmp_path / "home" / "identity.pem"
    device.home.mkdir()
    as_nobody(device.home)
    return device


def as_nobody(path: Path) -> None:
    os.lchown(path, NOBODY.pw_uid, -1)


@pytest.fixture
def roots(tmp_path: Path, authority: Authority) -> Iterator[Path]:
    """A file of root's, an identity, which stays what it is."""
    path = tmp_path / "roots"
    path.write_bytes(authority.identity(ID, key=key()))
    path.chmod(0o600)
    before = Snapshot.of(path)
    yield path
    assert Snapshot.of(path) == before


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder of root's, in which nothing is made."""
    path = tmp_path / "profile.d"
    path.mkdir()
    yield path
    assert list(path.iterdir()) == []


def test_it_does_its_job_there(owned: Owned) -> None:
    assert owned.checked().status == 69
    status = owned.key_file.stat()
    assert (status.st_uid, status.st_mode & 0o777) == (NOBODY.pw_uid, 0o600)
    assert owned.checked(answers.PENDING).status == 69


@pytest.mark.parametrize("content", ["a text of root's", "", "x" * 5_000_000, "identity"])
def test_a_link_to_roots_file_is_not_followed(
    owned: Owned, tmp_path: Path, authority: Authority, content: str
) -> None:
    target = tmp_path / "target"
    target.write_bytes(authority.identity(ID, key=key()) if content == "identity" else content.encode())
    target.chmod(0o600)
    before = Snapshot.of(target)
    owned.key_file.symlink_to(target)
    as_nobody(owned.key_file)
    owned.refuses("symbolic link that somebody else")
    assert Snapshot.of(target) == before and owned.key_file.is_symlink()


@pytest.mark.parametrize("owner", ["nobody", "root"])
def test_a_link_to_nothing_makes_no_file_elsewhere(owned: Owned, elsewhere: Path, owner: str) -> None:
    owned.key_file.symlink_to(elsewhere / "made.sh")
    if owner == "nobody":
        as_nobody(owned.key_file)  # root's own link is in a folder that others may write to: no better
    owned.refuses("")


def test_a_folder_that_is_a_link_leads_nowhere(owned: Owned, elsewhere: Path) -> None:
    link = owned.home / "sub"
    link.symlink_to(elsewhere)
    as_nobody(link)
    owned.key_file = link / "identity.pem"
    owned.refuses("")


@pytest.mark.parametrize("name", ["identity.pem", ".identity.pem.hook"])
def test_a_hard_link_to_roots_file_is_left_alone(owned: Owned, roots: Path, name: str) -> None:
    if name != "identity.pem":
        owned.certified()
        as_nobody(owned.key_file)
    os.link(roots, owned.home / name)
    hook = ["--owner", "nobody", "--hook", "true"]
    owned.refuses("is a hard link that somebody else", answers.NOT_MODIFIED, options=hook)
    (owned.home / name).unlink()


def test_a_draft_that_is_a_link_is_replaced_and_not_followed(owned: Owned, roots: Path) -> None:
    draft = owned.home / ".identity.pem.new"
    draft.symlink_to(roots)
    as_nobody(draft)
    assert owned.checked().status == 69
    assert not draft.exists() and not draft.is_symlink()


def test_what_was_not_judged_is_written_nowhere(owned: Owned) -> None:
    """1.0.0 gave the file its owner first, by a copy of whatever was in it."""
    owned.key_file.write_bytes(b"a secret of root's, moved there by root\n")
    owned.key_file.chmod(0o600)
    before = Snapshot.of(owned.key_file)
    owned.server = "localhost:1"  # nobody listens there
    assert owned.run("--owner", "nobody").status == 127
    assert Snapshot.of(owned.key_file) == before


def test_a_file_whose_owner_may_still_write_to_it_gets_another_inode(owned: Owned) -> None:
    owned.certified()
    as_nobody(owned.key_file)
    with open(owned.key_file, "r+b") as kept_open:
        assert owned.checked(answers.PENDING, options=["--owner", "root"]).status == 69
        assert os.fstat(kept_open.fileno()).st_ino != owned.key_file.stat().st_ino
    assert owned.key_file.stat().st_uid == 0


@needs("debian-python")
@pytest.mark.parametrize("hook", ["true", "false"])
def test_what_roots_run_has_left_is_the_files_owners(
    owned: Owned, authority: Authority, tmp_path: Path, hook: str
) -> None:
    """2.0.0: the hook's note was root's, and each later run of the owner ended with 127."""
    owned.pending()
    as_nobody(owned.key_file)
    certificate = answers.certificate(owned.signed())
    owner = ["--owner", "nobody", "--group", str(NOBODY.pw_gid), "--hook", hook]
    assert owned.checked(certificate, options=owner).status == (0 if hook == "true" else 127)
    for left in owned.home.iterdir():
        assert (left.stat().st_uid, left.stat().st_gid) == (NOBODY.pw_uid, NOBODY.pw_gid), left
    # Where that user can get at it.
    owned.ca = tmp_path / "ca.pem"
    owned.ca.write_bytes(authority.pem)
    shutil.copytree(world.ROOT / "caramel_embedded", tmp_path / "bin/caramel_embedded")
    owned.changed(f"sys.path.insert(0, {str(tmp_path / 'bin')!r})")
    owned.command[0] = str(world.debian_python())
    user = ("setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups")
    assert owned.hears(certificate, options=["--hook", "true"], before=user).status == 0
    # Or the note of a 2.0.0 that root once started by hand: it is in the way of nothing.
    note = owned.key_file.with_name(".identity.pem.hook")
    note.unlink(missing_ok=True)
    note.write_text(hashlib.sha256(owned.block("CERTIFICATE") or b"").hexdigest())
    note.chmod(0o600)
    run = owned.hears(certificate, options=["--hook", f"touch {owned.home}/called"], before=user)
    assert run.status == 0 and (owned.home / "called").exists(), run
    run = owned.run("--owner", "root", before=user)
    why = f"only root can give it to 0:{NOBODY.pw_gid} (--owner, --group), and this is user {NOBODY.pw_uid}\n"
    assert run.status == 127 and run.err.endswith(f"{owned.key_file}: {why}"), run


@slow
def test_whatever_is_planted_there_leads_nowhere_in_any_moment_of_a_devices_life(fleet: Fleet) -> None:
    row = report.tried("", folders.cases(fleet, full=False))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases >= 16


# --- Links that are the administrator's ---


def test_roots_own_link_in_roots_own_folder_is_followed(owned: Owned, tmp_path: Path) -> None:
    for name in ("etc", "var"):
        (tmp_path / name).mkdir()
    owned.key_file = tmp_path / "etc" / "identity.pem"
    owned.key_file.symlink_to(tmp_path / "var" / "identity.pem")
    owned.enrolls()
    assert owned.key_file.is_symlink() and (tmp_path / "var" / "identity.pem").exists()


# --- Somebody else's file, by a slip ---


@pytest.mark.parametrize("kind", ["the CA's file", "a chain", "the CA's file with its key"])
def test_a_key_file_that_names_certificates_is_left_alone(
    owned: Owned, tmp_path: Path, authority: Authority, kind: str
) -> None:
    first = {
        "the CA's file": b"",
        "a chain": authority.sign(world.signing_request(key(), authority.subject_for(ID))),
        "the CA's file with its key": authority.private_key_file.read_bytes(),
    }[kind]
    owned.key_file = tmp_path / "certificates.pem"
    owned.key_file.write_bytes(first + authority.pem)
    if "key" in kind:
        owned.ca = owned.key_file
    before = Snapshot.of(owned.key_file)
    owned.refuses("" if "key" in kind else "certificates")
    assert Snapshot.of(owned.key_file) == before


# --- Names and folders ---


@pytest.mark.parametrize("name", ["é" * 127, "x" * 255, "identity.pem"])
def test_a_name_may_be_as_long_as_the_file_system_has_them(new: Talking, name: str) -> None:
    new.key_file = new.folder / name
    new.enrolls("--hook", "true")
    run = new.hears(answers.certificate(new.signed()), options=["--hook", "true"])
    assert run.status == 0, run.err
    note = f".{name if len(name.encode()) < 240 else hashlib.sha256(name.encode()).hexdigest()}.hook"
    assert {entry.name for entry in new.folder.iterdir()} == {"empty.conf", name, note}


@pytest.mark.parametrize("umask", ["0077", "0777", "0000"])
def test_folders_are_made_for_everybody_to_pass_whatever_the_umask(new: Talking, umask: str) -> None:
    new.key_file = new.folder / "a" / "b" / "identity.pem"
    new.enrolls(before=("sh", "-c", f'umask {umask}; exec "$@"', "sh"))
    assert [folder.stat().st_mode & 0o777 for folder in list(new.key_file.parents)[:2]] == [0o755, 0o755]
    assert new.key_file.stat().st_mode & 0o777 == 0o600
