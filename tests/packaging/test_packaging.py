"""What goes into an image: baked-in settings, the one-file program, make install, the wheel, the Debian package."""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union

import pytest
import world
from cryptography.hazmat.primitives import serialization
from needs import needs, require, slow
from world import (
    ROOT,
    SERVER_AUTH,
    Authority,
    Device,
    Scripted,
    environment,
    hours,
    interpreters,
    new_key,
    now,
    private_pem,
    signing_request,
)
from world.answers import NOT_MODIFIED

import caramel_embedded

Done = subprocess.CompletedProcess[str]

#: Some moment in the past, which is a build's own time in most of these tests.
EPOCH = "1700000000"


def surroundings(**more: str) -> dict[str, str]:
    """Of a program that is started here. Coverage doesn't watch it: what runs are copies of the sources."""
    return {name: value for name, value in environment(**more).items() if not name.startswith("COVERAGE_")}


def online(**more: str) -> dict[str, str]:
    """The same, for what asks the package index."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "HOME"}
    return surroundings(**kept, **more)


def run(*command: Union[str, Path], env: Optional[Mapping[str, str]] = None, cwd: Path = ROOT) -> Done:
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=surroundings(SOURCE_DATE_EPOCH=EPOCH) if env is None else dict(env),
        timeout=300,
    )


def bake(folder: Path, conf: str, *options: str, **env: str) -> Done:
    """Bakes the lines of `conf` into folder/out."""
    (folder / "firmware.conf").write_text(conf)
    environ = surroundings(**{"SOURCE_DATE_EPOCH": EPOCH, **env})
    script = ROOT / "packaging/bake.py"
    return run(
        sys.executable, "-B", script, "--conf", folder / "firmware.conf", *options, folder / "out", env=environ
    )


def refused(done: Done) -> str:
    """The one line with which a build has failed."""
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("caramel-embedded: ")
    return lines[0]


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Its folder has a space in its name, which none of the tools may stumble on."""
    return Authority(tmp_path_factory.mktemp("a b"))


# --- Baked in -------------------------------------------------------------------------------------------


def test_settings_are_baked_in_with_the_time_of_the_build(tmp_path: Path, ca: Authority) -> None:
    done = bake(
        tmp_path,
        "# our firmware\nCARAMEL_CA=ca.example.com:8443\n\nCARAMEL_HOOK='/bin/x \"a b\"'\n"
        f'CARAMEL_CA_CERT="{ca.certificate_file}"\nCARAMEL_GROUP=nobody-here-knows\n',
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/baked.conf").read_text().splitlines()[1:] == [
        "CARAMEL_CA=ca.example.com:8443",
        "CARAMEL_GROUP=nobody-here-knows",
        "CARAMEL_HOOK='/bin/x \"a b\"'",
        f"BUILD_TIME={EPOCH}",
    ]
    assert (tmp_path / "out/baked.pem").read_bytes() == ca.pem


def test_without_source_date_epoch_the_time_is_now(tmp_path: Path) -> None:
    before = int(now().timestamp())
    done = bake(tmp_path, "", SOURCE_DATE_EPOCH="")
    assert done.returncode == 0
    time = int((tmp_path / "out/baked.conf").read_text().strip().rpartition("=")[2])
    assert before <= time <= int(now().timestamp())


def test_a_ca_certificate_is_found_beside_the_file_that_names_it(tmp_path: Path, ca: Authority) -> None:
    shutil.copy(ca.certificate_file, tmp_path / "our ca.pem")
    assert bake(tmp_path, 'CARAMEL_CA_CERT="our ca.pem"\n').returncode == 0
    assert (tmp_path / "out/baked.pem").read_bytes() == ca.pem


def test_what_an_earlier_build_has_baked_in_is_gone(tmp_path: Path, ca: Authority) -> None:
    bake(tmp_path, f'CARAMEL_CA_CERT="{ca.certificate_file}"\nCARAMEL_CA=old\n')
    bake(tmp_path, "CARAMEL_TIMEOUT=5\n")
    assert not (tmp_path / "out/baked.pem").exists()
    assert "old" not in (tmp_path / "out/baked.conf").read_text()


def test_the_ca_of_the_identity_is_baked_in_beside_that_of_the_server(tmp_path: Path, ca: Authority) -> None:
    other = Authority(tmp_path / "other")
    (tmp_path / "identity.pem").write_bytes(other.pem)
    conf = f'CARAMEL_CA_CERT="{ca.certificate_file}"\nCARAMEL_IDENTITY_CA=identity.pem\n'
    assert bake(tmp_path, conf + "CARAMEL_DOMAIN=d.example\nCARAMEL_KEY_TYPE=ec-p256\n").returncode == 0
    assert (tmp_path / "out/baked.pem").read_bytes() == ca.pem
    assert (tmp_path / "out/baked-identity.pem").read_bytes() == other.pem
    text = (tmp_path / "out/baked.conf").read_text()
    assert "IDENTITY_CA" not in text
    assert "CARAMEL_DOMAIN=d.example\nCARAMEL_KEY_TYPE=ec-p256\n" in text
    bake(tmp_path, "")
    assert not (tmp_path / "out/baked-identity.pem").exists()
    assert "CARAMEL_IDENTITY_CA: " in refused(bake(tmp_path, "CARAMEL_IDENTITY_CA=missing.pem\n"))


def test_two_roots_and_text_around_them(tmp_path: Path, ca: Authority) -> None:
    other = Authority(tmp_path / "other")
    text = b"our old root\n" + ca.pem + b"\nour new root\n" + other.pem + ca.pem
    (tmp_path / "roots.pem").write_bytes(text)
    assert bake(tmp_path, "CARAMEL_CA_CERT=roots.pem\n").returncode == 0
    assert (tmp_path / "out/baked.pem").read_bytes() == ca.pem + other.pem


def test_windows_line_ends_in_the_ca_certificate_are_converted_and_the_build_says_so(
    tmp_path: Path, ca: Authority
) -> None:
    (tmp_path / "ca.pem").write_bytes(b"\xef\xbb\xbf" + ca.pem.replace(b"\n", b"\r\n"))
    done = bake(tmp_path, "CARAMEL_CA_CERT=ca.pem\r\nCARAMEL_CA=a.example\r\n")
    assert done.returncode == 0
    assert "Windows line ends" in done.stderr
    assert (tmp_path / "out/baked.pem").read_bytes() == ca.pem
    assert "CARAMEL_CA=a.example\n" in (tmp_path / "out/baked.conf").read_text()


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("CARAMEL_CA ca.example.com", "line 1"),
        ("CARAMEL_CA=https://ca.example.com/", "CARAMEL_CA"),
        ("CARAMEL_SERVER=ca.example.com", "there is no setting CARAMEL_SERVER"),
        ("SERVER=ca.example.com", "there is no setting SERVER"),
        ("BUILD_TIME=5", "SOURCE_DATE_EPOCH"),
        ("CARAMEL_CN=a,b", "CARAMEL_CN"),
        ("CARAMEL_MODE=rw", "CARAMEL_MODE"),
        ("CARAMEL_TIMEOUT=-1", "CARAMEL_TIMEOUT"),
        ("CARAMEL_INTERFACES=eth0,verylonginterfacename0", "CARAMEL_INTERFACES"),
        ("CARAMEL_INTERFACES=eth0,,eth1", "CARAMEL_INTERFACES"),
        ("CARAMEL_INTERFACES=eth0:1", "can't be the name of a network interface"),
        ("CARAMEL_INTERFACES=lo", "'lo' has no MAC address"),
        ("CARAMEL_KEY_FILE=identity.pem", "must begin with a slash"),
        ("CARAMEL_KEY_TYPE=dsa", "CARAMEL_KEY_TYPE"),
        ("CARAMEL_DOMAIN=a..b", "CARAMEL_DOMAIN"),
        ("CARAMEL_HOOK=two words", "quotes"),
        ("CARAMEL_CA_CERT=missing.pem", "No such file"),
    ],
)
def test_a_bad_setting_fails_the_build(tmp_path: Path, line: str, word: str) -> None:
    assert word in refused(bake(tmp_path, line + "\n"))
    assert not (tmp_path / "out").exists()


def leaf(ca: Authority) -> bytes:
    return ca.issue(new_key().public_key(), [("CN", "leaf")], usage=[SERVER_AUTH])


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("no certificate", "holds no PEM certificate"),
        ("der", "looks like DER"),
        ("request", "certificate request"),
        ("private key", "private key"),
        ("leaf", "not a CA's certificate"),
        ("root and leaf", "certificate 2: not a CA's certificate"),
        ("damaged", "damaged"),
        ("ended", "before this build"),
        ("folder", "Is a directory"),
    ],
)
def test_what_is_no_ca_certificate_fails_the_build(tmp_path: Path, ca: Authority, what: str, word: str) -> None:
    path = tmp_path / "ca.pem"
    if what == "folder":
        path.mkdir()
    else:
        key = new_key()
        content = {
            "no certificate": b"hello\n",
            "der": ca.certificate.public_bytes(serialization.Encoding.DER),
            "request": signing_request(key, [("CN", "x")]),
            "private key": ca.pem + private_pem(key),
            "leaf": leaf(ca),
            "root and leaf": ca.pem + leaf(ca),
            "damaged": ca.pem[:200] + ca.pem[300:],
            "ended": Authority(tmp_path / "old", not_before=now() - hours(48), not_after=now() - hours(24)).pem,
        }[what]
        path.write_bytes(content)
    message = refused(bake(tmp_path, "CARAMEL_CA_CERT=ca.pem\n", SOURCE_DATE_EPOCH=""))
    assert word in message
    assert "CARAMEL_CA_CERT" in message
    assert not (tmp_path / "out").exists()


def test_messages_are_in_the_terms_of_the_tool_that_builds(tmp_path: Path) -> None:
    message = refused(bake(tmp_path, "#: CARAMEL_CA = BR2_SERVER\nCARAMEL_CA=a/b\n"))
    assert "CARAMEL_CA (BR2_SERVER)" in message
    message = refused(bake(tmp_path, "", "--term", "CARAMEL_CA=SERVER=", "--require", "CARAMEL_CA"))
    assert "CARAMEL_CA (SERVER=) is not set" in message


def test_a_source_date_epoch_that_is_none_fails_the_build(tmp_path: Path) -> None:
    assert "SOURCE_DATE_EPOCH=yesterday" in refused(bake(tmp_path, "", SOURCE_DATE_EPOCH="yesterday"))


# --- The one-file program -------------------------------------------------------------------------------


@functools.lru_cache
def libraries() -> Path:
    """The pure Python that goes into the archive, as make zipapp fetches it."""
    folder = ROOT / "build/tests-zipapp"
    done = run(
        "make", "-s", "-f", "packaging/packaging.mk", f"BUILD={folder}", f"PYTHON={sys.executable}",
        f"{folder}/zipapp/installed", env=online(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "zipapp"


def zipapp(output: Path, ca: Authority, *words: str, root: Path = ROOT, **env: str) -> Done:
    environ = surroundings(**{"SOURCE_DATE_EPOCH": EPOCH, **env})
    return run(
        "make", "-s", "-C", root, "-f", "packaging/packaging.mk", "zipapp", "SERVER=localhost:1",
        f"CA_CERT={ca.certificate_file}", f"OUT={output}", f"PYTHON={sys.executable}",
        f"TARGET_PYTHON={sys.executable}", f"PACKAGES={libraries()}", *words, env=environ,
    )  # fmt: skip


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory, ca: Authority) -> Path:
    path = tmp_path_factory.mktemp("zipapp") / "caramel-embedded"
    done = zipapp(path, ca)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory, ca: Authority) -> Path:
    """The same for a Python that has no packages at all."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    done = zipapp(folder / "out.pyz", ca, f"TARGET_PYTHON={folder}/bin/python3")
    assert done.returncode == 0, done.stderr
    return folder / "out.pyz"


def copy_of_the_sources(folder: Path) -> Path:
    for name in ("caramel_embedded", "packaging"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@needs("faketime")
@slow
def test_the_same_bits_in_another_folder_on_another_day(tmp_path: Path, pyz: Path, ca: Authority) -> None:
    root = copy_of_the_sources(tmp_path / "caramel server" / "identity")
    for path in root.rglob("*"):
        os.utime(path, (1, 1))
    other = root / "out.pyz"
    environ = {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C", "LANG": "sv_SE", "SOURCE_DATE_EPOCH": EPOCH}
    command = [
        sys.executable, "packaging/pyz.py", "--server", "localhost:1", "--ca-cert", str(ca.certificate_file),
        "--output", str(other), "--python", sys.executable, "--packages", str(libraries()),
    ]  # fmt: skip
    command = ["faketime", "2031-05-05", *command]
    old = os.umask(0o077)
    try:
        done = run(*command, env=surroundings(**environ), cwd=root)
    finally:
        os.umask(old)
    assert done.returncode == 0, done.stderr
    assert other.read_bytes() == pyz.read_bytes()
    assert stat.S_IMODE(other.stat().st_mode) == 0o755


@slow
def test_its_time_is_that_of_the_git_commit(tmp_path: Path, ca: Authority) -> None:
    root = copy_of_the_sources(tmp_path / "clone")
    environ = surroundings(
        GIT_AUTHOR_DATE="@1650000000 +0000", GIT_COMMITTER_DATE="@1650000000 +0000", HOME=str(tmp_path),
        GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@example.com", GIT_COMMITTER_NAME="a",
        GIT_COMMITTER_EMAIL="a@example.com",
    )  # fmt: skip
    for command in (["init", "-q"], ["add", "packaging"], ["commit", "-q", "-m", "all"]):
        assert run("git", *command, env=environ, cwd=root).returncode == 0
    path = tmp_path / "out.pyz"
    assert zipapp(path, ca, root=root, SOURCE_DATE_EPOCH="").returncode == 0
    assert b"BUILD_TIME=1650000000\n" in path.read_bytes()
    shutil.rmtree(root / ".git")
    done = zipapp(path, ca, root=root, SOURCE_DATE_EPOCH="", GIT_CEILING_DIRECTORIES=str(tmp_path))
    assert done.returncode == 0
    assert "will not come out the same" in done.stderr


def test_it_is_also_a_zip_file_with_the_sources(pyz: Path) -> None:
    with zipfile.ZipFile(pyz) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        sources = {f"caramel_embedded/{path.name}" for path in (ROOT / "caramel_embedded").glob("*.py")}
        data = {"__main__.py", "caramel_embedded/baked.conf", "caramel_embedded/baked.pem"}
        theirs = names - sources - data
        assert sources | data <= names
        assert {name.split("/")[0].partition("-")[0] for name in theirs} == {"urllib3", "fasteners"}
        # Whoever hands the archive on hands on its parts, and their licences say: not without us.
        for library in ("urllib3", "fasteners"):
            assert [name for name in theirs if name.startswith(f"{library}-") and "LICENSE" in name]
            assert f"{library}/__init__.py" in theirs
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@slow
def test_what_is_inside_is_taken_and_known_by_its_version(tmp_path: Path, bare: Path) -> None:
    """The program and the libraries come from the archive, compiled, and as sources for another Python."""
    path = tmp_path / "out.pyz"
    path.touch(0o755)
    content = bare.read_bytes()
    start = content.index(b"from caramel_embedded.__main__ import")
    end = content.index(b"main(statuses={0: 73, 1: 75})\n")
    # In the place of the program, and of the same length, so that what lies behind it stays in its place.
    asked = (
        b"import os, urllib3; from importlib.metadata import version\n"
        b'    os.write(1, (urllib3.__file__ + " " + version("urllib3")).encode()); os._exit(73)\n'
        b"except OSError: pass\n"
    )
    asking = content[:start] + asked.ljust(end - start - 1, b"#") + b"\n" + content[end:]
    tag = sys.implementation.cache_tag.encode()
    assert content.count(tag) == 1
    for known in (tag, b"x" * len(tag)):
        path.write_bytes(content.replace(tag, known))
        version([str(path)])
        path.write_bytes(asking.replace(tag, known))
        done = run(path, env=surroundings())
        assert (done.returncode, done.stdout) == (0, f"{path}/urllib3/__init__.py 2.6.3"), done.stderr


@pytest.mark.parametrize("lacking", ["urllib3", "fasteners", "a licence"])
def test_a_folder_that_lacks_a_library_fails_the_build(tmp_path: Path, ca: Authority, lacking: str) -> None:
    shutil.copytree(libraries(), tmp_path / "packages")
    if lacking == "a licence":
        (licence,) = (tmp_path / "packages").glob("fasteners-*/licenses/LICENSE")
        licence.unlink()
    else:
        shutil.rmtree(tmp_path / "packages" / lacking)
    done = zipapp(tmp_path / "out", ca, f"PACKAGES={tmp_path}/packages")
    assert (done.returncode, f"PACKAGES={tmp_path}/packages" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_its_head_is_the_starter(pyz: Path) -> None:
    """But for where Python and the program are."""
    mark = b"# --- where "
    before, _, rest = (ROOT / "packaging/starter/caramel-embedded").read_bytes().partition(mark)
    behind = rest.partition(b"# --- end of where\n")[2]
    head = pyz.read_bytes().partition(b"\nexit\n")[0] + b"\nexit\n"
    assert before and head.startswith(before)
    assert len(behind) > 1000 and head.endswith(behind)
    assert mark not in head


@pytest.mark.parametrize(
    ("version", "python"),
    [
        pytest.param(*found, marks=() if found[0] == "%d.%d" % sys.version_info[:2] else slow, id=found[0])
        for found in interpreters()
    ],
)
def test_an_unchanged_check_needs_nothing_of_the_device(
    tmp_path: Path, ca: Authority, version: str, python: str
) -> None:
    """But Python itself, of any version: there are no packages at all, which the first check would need."""
    done = run(python, "-m", "venv", "--without-pip", tmp_path / "bare")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out.pyz"
    assert zipapp(path, ca, f"TARGET_PYTHON={tmp_path}/bare/bin/python3").returncode == 0
    device = Device(tmp_path / "device", None, ca.certificate_file, "x", command=[str(path)])
    device.has(ca.identity("x", not_before=now() - hours(1)))
    with Scripted(ca.server(file=f"{version}.pem"), [NOT_MODIFIED]) as server:
        device.server = server.address
        certified = device.run(env={"SSL_CERT_FILE": "/nonexistent"})
    assert (certified.status, certified.err.count("\n")) == (0, 1), certified
    assert len(server.requests) == 1


def version(command: list[str], **env: str) -> None:
    done = run(*command, "--version", env=surroundings(**env))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("caramel-embedded ")


@pytest.mark.parametrize("way", ["itself", "python", "a link", "the path", "bash", "busybox sh"])
def test_it_starts_by_every_way(tmp_path: Path, pyz: Path, way: str) -> None:
    link = tmp_path / "a link"
    link.symlink_to(pyz)
    lines = {"itself": [str(pyz)], "python": [sys.executable, "-I", str(pyz)], "a link": [str(link)]}
    lines["the path"] = [pyz.name]
    if way not in lines:
        require(way.partition(" ")[0])
    version(lines.get(way, [*way.split(), str(pyz)]), PATH=f"{pyz.parent}:/usr/bin:/bin")


def test_it_is_isolated_from_the_users_python(tmp_path: Path, pyz: Path) -> None:
    for name in ("argparse", "os", "caramel_embedded", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken from the user')\n")
    environ = surroundings(
        PYTHONPATH=str(tmp_path), PYTHONSTARTUP=str(tmp_path / "os.py"), PYTHONHOME="/nonexistent",
        PYTHONINSPECT="1", PYTHONVERBOSE="1", HOME=str(tmp_path), PYTHONUSERBASE=str(tmp_path),
    )  # fmt: skip
    # A virtual environment of the user's: without cryptography.
    (tmp_path / "bin").mkdir()
    (tmp_path / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    environ["PYTHONEXECUTABLE"] = str(tmp_path / "bin/python3")
    done = run(pyz, "--client-id", "x", "--key-file", tmp_path / "id.pem", env=environ, cwd=tmp_path)
    # All modules that a check needs were found where they belong, and so were the settings.
    assert done.returncode == 127
    assert "localhost:1 can't be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("__pycache__"))


@slow
def test_it_says_in_one_line_which_module_a_device_lacks(tmp_path: Path, bare: Path) -> None:
    done = run(bare, "--client-id", "x", "--key-file", tmp_path / "id.pem", env=surroundings())
    assert (done.returncode, done.stdout) == (127, "")
    assert "cryptography" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("damage", ["no python", "a python that can't run", "half a file"])
def test_what_cannot_start_is_127(tmp_path: Path, pyz: Path, damage: str) -> None:
    content = pyz.read_bytes()
    broken = tmp_path / "broken"
    if damage == "half a file":
        content = content[: content.index(b"\nexit\n") + 500]
    else:
        python = "/etc/passwd" if "run" in damage else "/nonexistent/python3"
        content = content.replace(sys.executable.encode(), python.encode(), 1)
    broken.write_bytes(content)
    broken.chmod(0o755)
    for shell in ([], ["bash"], ["busybox", "sh"]):
        if shell and not shutil.which(shell[0]):
            continue
        done = run(*shell, broken, "--version", env=surroundings())
        assert (done.returncode, done.stdout) == (127, "")
        assert done.stderr


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["SERVER="], "CARAMEL_CA (SERVER=) is not set"),
        (["CA_CERT="], "CARAMEL_CA_CERT (CA_CERT=) is not set"),
        (["SERVER=http://x"], "(SERVER=)"),
        (["CA_CERT=missing.pem"], "(CA_CERT=): missing.pem: No such file"),
        (["CONF=missing.conf"], "missing.conf: No such file"),
        (["TARGET_PYTHON=python3"], "TARGET_PYTHON=python3"),
        (["OUT=/proc/x/y"], "/proc/x"),
    ],
)
def test_a_bad_option_fails_make_zipapp(tmp_path: Path, ca: Authority, words: list[str], word: str) -> None:
    done = zipapp(tmp_path / "out", ca, *words)
    assert done.returncode == 2  # make's own
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# --- make install ---------------------------------------------------------------------------------------

PACKAGE = sorted(f"usr/lib/p/caramel_embedded/{path.name}" for path in (ROOT / "caramel_embedded").glob("*.py"))
ALWAYS = [
    "usr/bin/caramel-embedded",
    "usr/lib/p/caramel_embedded/baked.conf",
    "usr/lib/p/caramel_embedded/py.typed",
    "usr/share/bash-completion/completions/caramel-embedded",
    "usr/share/doc/caramel-embedded/examples/caramel-embedded.conf",
    "usr/share/man/man8/caramel-embedded.8",
]
SCRIPTS = [f"usr/libexec/caramel-embedded/{name}" for name in ("keep-enrolled", "until-certified", "until-enrolled")]
LIBEXEC = [*SCRIPTS, "usr/libexec/caramel-embedded/chance"]
KEYS = [f"usr/libexec/caramel-embedded/{name}" for name in ("tpm-key", "tpm-parent", "pkcs11-key")]
UNITS = sorted(f"usr/lib/systemd/system/{path.name}" for path in (ROOT / "packaging/systemd").glob("*.*"))
FILES = {
    "INIT=none": ALWAYS,
    "INIT=none KEYS=tpm": [*ALWAYS, *KEYS[:2], "usr/share/caramel-embedded/openssl-tpm.cnf"],
    "INIT=none KEYS=pkcs11": [*ALWAYS, *KEYS[2:], "usr/share/caramel-embedded/openssl-pkcs11.cnf"],
    "INIT=sysv": [*ALWAYS, *LIBEXEC, "etc/init.d/S95caramel-embedded"],
    "INIT=systemd": [
        *ALWAYS,
        *LIBEXEC,
        *UNITS,
        "usr/share/doc/caramel-embedded/examples/instance-own-user.conf",
        "usr/share/doc/caramel-embedded/examples/needs-certificate.conf",
    ],
}
PROGRAMS = {"usr/bin/caramel-embedded", "etc/init.d/S95caramel-embedded", *SCRIPTS, *KEYS}


def make_install(folder: Optional[Path], *words: str, goal: str = "install", **env: str) -> Done:
    return run(
        "make", "-s", "-f", "packaging/packaging.mk", goal, f"DESTDIR={folder or ''}", "PYTHON_DIR=/usr/lib/p",
        f"PYTHON={sys.executable}", "COMPILE=no", *words, env=surroundings(SOURCE_DATE_EPOCH=EPOCH, **env),
    )  # fmt: skip


@pytest.mark.parametrize("words", sorted(FILES))
def test_make_install_puts_the_right_files_into_an_image(tmp_path: Path, words: str) -> None:
    target = tmp_path / "an image"
    done = make_install(target, *words.split())
    assert done.returncode == 0, done.stderr
    found = {str(path.relative_to(target)): path for path in target.rglob("*") if not path.is_dir()}
    assert sorted(found) == sorted(PACKAGE + FILES[words])
    for name, path in found.items():
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if name in PROGRAMS else 0o644), name
        assert (name in PROGRAMS) == path.read_text().startswith("#!/bin/sh\n"), name
    baked = found["usr/lib/p/caramel_embedded/baked.conf"].read_text()
    assert ("CARAMEL_KEY_COMMAND=/usr/libexec/caramel-embedded/tpm-key\n" in baked) == ("KEYS=tpm" in words)
    assert ("CARAMEL_OPENSSL_CONF=/usr/share/caramel-embedded/openssl-tpm.cnf\n" in baked) == ("KEYS=tpm" in words)
    # What somebody has made of it stays.
    (target / "etc/caramel-embedded.conf").parent.mkdir(exist_ok=True)
    (target / "etc/caramel-embedded.conf").touch()
    assert make_install(target, goal="install-keys-tpm").returncode == 0
    assert make_install(target, goal="uninstall").returncode == 0
    assert [path.name for path in target.rglob("*") if not path.is_dir()] == ["caramel-embedded.conf"]


@pytest.mark.parametrize("goal", ["install", "install-sysv", "install-systemd", "install-extras", "uninstall"])
def test_this_machine_is_an_image_only_if_somebody_says_so(goal: str) -> None:
    """Without DESTDIR=, root would get timers on the machine that builds images."""
    done = make_install(None, "INSTALL=false", "PREFIX=/nowhere", "SYSCONFDIR=/nowhere", goal=goal)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"make {goal}: DESTDIR= is not set: name the root folder of the image, or")
    assert "DESTDIR=/" in done.stderr.splitlines()[0]


def test_without_a_builder_make_container_says_what_to_install() -> None:
    done = run("make", "-s", "-f", "packaging/packaging.mk", "container", "IMAGE_BUILDER=no-such-builder --root=x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("make container: no-such-builder is missing: apt-get install podman")


@pytest.mark.parametrize("sh", ["dash", pytest.param("bash", marks=slow)])
def test_the_scripts_for_a_shell_that_knows_p_begin_with_it(
    tmp_path: Path, pyz: Path, ca: Authority, sh: str
) -> None:
    for init, keys in (("systemd", "tpm"), ("sysv", "pkcs11")):
        assert make_install(tmp_path / "image", f"INIT={init}", f"KEYS={keys}", f"TARGET_SH={sh}").returncode == 0
    assert zipapp(tmp_path / "image/one", ca, f"TARGET_SH={sh}").returncode == 0
    for name in (*PROGRAMS, "one"):
        assert (tmp_path / "image" / name).read_bytes().startswith(b"#!/bin/sh -p\n"), name
    assert make_install(tmp_path / "other", "TARGET_SH=zsh").returncode == 2
    assert "TARGET_SH=zsh" in zipapp(tmp_path / "other", ca, "TARGET_SH=zsh").stderr
    assert not (tmp_path / "other").exists()


@slow
@needs("mounts", "bash")
def test_bash_as_sh_takes_nothing_from_the_environment(tmp_path: Path, ca: Authority) -> None:
    """With SHELLOPTS=noexec every script without -p ends with 0, and whoever asks hears "certified"."""
    assert make_install(tmp_path, "INIT=systemd", "TARGET_SH=bash").returncode == 0
    assert zipapp(tmp_path / "one", ca, "TARGET_SH=bash").returncode == 0
    plain = tmp_path / "plain"
    plain.write_bytes((ROOT / "packaging/starter/caramel-embedded").read_bytes())
    plain.chmod(0o755)
    script = tmp_path / "usr/libexec/caramel-embedded/until-certified"
    script.write_text(
        script.read_text().replace("/usr/bin/caramel-embedded", "false", 1).replace("sleep 2", "exit 42")
    )
    as_sh = ["unshare", "--mount", "sh", "-ec", 'mount --bind "$(command -v bash)" /bin/sh; exec "$@"', "as sh"]
    for name, value in (("SHELLOPTS", "noexec"), ("BASH_FUNC_wait%%", "() { trap - EXIT; exit; }")):
        ends = {}
        for path in (tmp_path / "usr/bin/caramel-embedded", tmp_path / "one", script, plain):
            done = run(*as_sh, "env", f"{name}={value}", path, "--nonsense", env=surroundings())
            ends[path.name] = done.returncode
        assert ends == {"caramel-embedded": 127, "one": 127, "until-certified": 42, "plain": 0}, "what it is about"


def test_another_prefix_is_in_all_that_refers_to_it(tmp_path: Path) -> None:
    for init in ("systemd", "sysv"):
        done = make_install(tmp_path, f"INIT={init}", "PREFIX=/opt/caramel")
        assert done.returncode == 0, done.stderr
    installed = [path for path in tmp_path.rglob("*") if path.is_file() and "usr/lib/p" not in str(path)]
    texts = {path.name: path.read_text() for path in installed if path.suffix not in (".8", ".conf")}
    scripts = ("keep-enrolled", "until-certified", "until-enrolled")
    for name in ("caramel-embedded.service", "S95caramel-embedded", *scripts):
        assert "/opt/caramel/" in texts[name]
        assert "/usr/libexec/" not in texts[name]
        assert "/usr/bin/caramel-embedded" not in texts[name]


def test_modules_are_compiled_for_their_place_on_the_device(tmp_path: Path) -> None:
    assert make_install(tmp_path, "COMPILE=yes", "INIT=none").returncode == 0
    compiled = list((tmp_path / "usr/lib/p/caramel_embedded/__pycache__").glob("*.pyc"))
    assert len(compiled) == len(PACKAGE)
    for path in compiled:
        # PEP 552: hash-based and unchecked, so that no time of a file decides whether it is used.
        assert path.read_bytes()[4:8] == b"\x01\0\0\0"
        assert str(tmp_path).encode() not in path.read_bytes()


def test_a_bad_setting_leaves_no_half_of_an_installation(tmp_path: Path) -> None:
    (tmp_path / "bad.conf").write_text("CARAMEL_CA=a/b\n")
    for word in ("a/b", "INIT=openrc", "KEYS=usb"):
        env = {"CARAMEL_BAKE": str(tmp_path / "bad.conf")} if word == "a/b" else {}
        done = make_install(tmp_path / "out", *([] if env else [word]), **env)
        assert done.returncode == 2 and word in done.stderr
        assert not (tmp_path / "out").exists()


# --- The wheel, and packages made from it ---------------------------------------------------------------


@pytest.fixture(scope="session")
def setuptools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("setuptools")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", f"--target={folder}"]
    done = run(*command, "setuptools", "wheel", env=online())
    assert done.returncode == 0, done.stderr
    return folder


@slow
def test_the_wheel_has_the_settings_and_forgets_those_of_an_earlier_build(
    tmp_path: Path, ca: Authority, setuptools: Path
) -> None:
    root = tmp_path / "a checkout"
    copy_of_the_sources(root)
    for pattern in ("setup.*", "LICENSE*", "README.md", "pyproject.toml"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, root)
    conf = root / "firmware.conf"
    conf.write_text(f'CARAMEL_CA=ca.example.com\nCARAMEL_CA_CERT="{ca.certificate_file}"\n')

    def build(**env: str) -> Done:
        more = surroundings(SOURCE_DATE_EPOCH=EPOCH, PYTHONPATH=str(setuptools), **env)
        return run(sys.executable, "setup.py", "--quiet", "bdist_wheel", env=more, cwd=root)

    done = build(CARAMEL_BAKE=str(conf))
    assert done.returncode == 0, done.stderr
    (built,) = (root / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert archive.read("caramel_embedded/baked.pem") == ca.pem
        baked = archive.read("caramel_embedded/baked.conf").decode()
        assert f"CARAMEL_CA=ca.example.com\nBUILD_TIME={EPOCH}\n" in baked
        (launcher,) = [name for name in archive.namelist() if name.endswith("/scripts/caramel-embedded")]
        assert archive.read(launcher) == (ROOT / "packaging/starter/caramel-embedded").read_bytes()
    assert not list((root / "caramel_embedded").glob("baked*")), "a build left something in the sources"

    conf.write_text("CARAMEL_CA=a/b\n")
    done = build(CARAMEL_BAKE=str(conf))
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("caramel-embedded: CARAMEL_CA, from")

    assert build().returncode == 0
    with zipfile.ZipFile(built) as archive:
        assert "caramel_embedded/baked.pem" not in archive.namelist()
        assert b"CARAMEL" not in archive.read("caramel_embedded/baked.conf")


@slow
@needs("debian-tools", "lintian")
def test_the_debian_package(tmp_path: Path, ca: Authority) -> None:
    def build(folder: Path, **env: str) -> bytes:
        folder.mkdir()
        done = run("make", "-s", "-f", "packaging/packaging.mk", "deb", f"BUILD={folder}", env=surroundings(**env))
        assert done.returncode == 0, done.stderr
        (package,) = folder.glob("*.deb")
        return package.read_bytes()

    first = build(tmp_path / "one")
    assert build(tmp_path / "another one", TZ="Asia/Tokyo") == first
    (package,) = (tmp_path / "one").glob("*.deb")
    listing = run("dpkg-deb", "--contents", package).stdout.splitlines()
    names = {line.split()[5] for line in listing}
    assert all(line.split()[1] == "root/root" for line in listing)
    compressed = {"usr/share/man/man8/caramel-embedded.8": "usr/share/man/man8/caramel-embedded.8.gz"}
    for name in ALWAYS:
        assert "./" + compressed.get(name, name.replace("/lib/p/", "/lib/python3/dist-packages/")) in names
    for name in UNITS:
        assert "./" + name[len("usr/") :] in names
    depends = run("dpkg-deb", "--field", package, "Depends").stdout
    for needed in (
        "python3-cryptography (>= 38)",
        "python3-fasteners (>= 0.17.3)",
        "python3-openssl (>= 23)",
        "python3-urllib3 (>= 1.26.12)",
    ):
        assert needed in depends
    found = run("lintian", "--fail-on", "error", package)
    assert found.returncode == 0, found.stdout

    def postinst(package: Path) -> str:
        return run("dpkg-deb", "--info", package, "postinst").stdout

    assert "py3compile -p caramel-embedded" in postinst(package)
    enabled = "so new installations run enable"  # deb-systemd-helper(1p); without it, an update keeps what was
    assert enabled not in postinst(package)
    conf = tmp_path / "firmware.conf"
    conf.write_text(f'CARAMEL_CA=ca.example.com\nCARAMEL_CA_CERT="{ca.certificate_file}"\n')
    build(tmp_path / "baked", CARAMEL_BAKE=str(conf))
    (package,) = (tmp_path / "baked").glob("*.deb")
    assert enabled in postinst(package)
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE, check=True).stdout
    assert ca.pem in tar


@slow
@needs("trixie")
def test_the_debian_package_on_debian_13(tmp_path: Path) -> None:
    """Built there, installed there, and run from there."""
    tree = world.in_tree(world.trixie())

    def there(line: str) -> str:
        done = run(*tree, "sh", "-euc", f"cd {ROOT}; {line}", env=surroundings())
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    there(f"make -s -f packaging/packaging.mk deb BUILD={tmp_path}")
    (package,) = tmp_path.glob("*.deb")
    try:
        there(f"dpkg --install {package}")
        assert there("/usr/bin/caramel-embedded --version") == f"caramel-embedded {caramel_embedded.__version__}\n"
        assert there("dpkg-query --show --showformat '${db:Status-Status}' caramel-embedded") == "installed"
    finally:
        there("dpkg --purge caramel-embedded")
    assert there("find /etc /var/lib/caramel* /usr/lib/python3 -name '*caramel*' | wc -l") == "0\n"


@slow
@needs("debian-tools", "git", "make")
def test_a_release_is_the_same_bits_twice_and_all_of_it_works(tmp_path: Path) -> None:
    """In another folder, with another umask, another time zone; by what the page says of each file."""
    if sys.version_info[:2] != (3, 11):
        return  # the authority, for its SBOM, and the list of what it is made with
    tools = ROOT / "build/release-tools"
    words = ["make", "-s", f"PYTHON={sys.executable}", f"{tools.relative_to(ROOT)}/installed"]
    done = run(*words, env=online())
    assert done.returncode == 0, done.stderr
    made: list[Path] = []
    for name, umask, zone in (("one", 0o022, "UTC"), ("another", 0o077, "Asia/Tokyo")):
        clone = tmp_path / name
        assert run("git", "clone", "--quiet", tmp_path / "one" if made else ROOT, clone).returncode == 0
        old = os.umask(umask)
        try:
            done = run(tools / "bin/python", "packaging/release.py", env=online(TZ=zone), cwd=clone)
        finally:
            os.umask(old)
        assert done.returncode == 0, done.stderr
        made.append(clone / "build/release")
    one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in made)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
    assert run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=made[1]).returncode == 0
    named = [line.split()[1] for line in one["SHA256SUMS"].decode().splitlines()]
    assert sorted([*named, "SHA256SUMS"]) == sorted(one)
    (program,) = made[0].glob("caramel-embedded-*.pyz")
    version([str(program)])
    # Each product is there in each of its forms, and says what it needs.
    page = (ROOT / "docs/releases.md").read_text()
    for form in re.findall(r"`(caramel[^`]*|…cdx\.json|SHA256SUMS)`", page.partition("## Is it whole")[0]):
        pattern = form.replace("VERSION", "*").replace("…", "*")
        assert fnmatch.filter(one, pattern), form
    for name, library in (("embedded", "pyOpenSSL"), ("embedded-server", "SQLAlchemy"), ("authority", "acme")):
        (bill,) = [text for file, text in one.items() if re.fullmatch(rf"caramel-{name}-[\d.]+cdx\.json", file)]
        values = json.loads(bill)
        assert (values["bomFormat"], values["metadata"]["component"]["name"]) == ("CycloneDX", f"caramel-{name}")
        assert library in {component["name"] for component in values["components"]}
        assert str(tmp_path) not in bill.decode() and "file:" not in bill.decode()
