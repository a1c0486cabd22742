"""Bad input: each a clear line on standard error, 127, and nothing lost."""

from __future__ import annotations

import gzip
import os
import re
import socket
import stat
from pathlib import Path
from typing import Callable, Optional

import pytest
import world
from cryptography.hazmat.primitives import serialization
from talking import FIRST_TIME, ID, Talking
from world import Authority, Run, answer, answers, hours, now

NOBODY = "localhost:9"
#: Root without root's powers over files, so that what others may not do fails as it would for anybody.
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


def refused(run: Run, *words: str) -> None:
    """It ended with 127 and one line that has these words in it."""
    assert (run.status, run.out, run.err.count("\n")) == (127, "", 1), run
    assert run.err.startswith("caramel-embedded: ")
    assert "Traceback" not in run.err and "internal error" not in run.err
    for word in words:
        assert word in run.err, run.err


def nothing_lost(device: Talking, *options: str, env: Optional[dict[str, str]] = None) -> Run:
    """One run, after which the key file is as it was, and without any if there was none."""
    before = device.snapshot()
    run = device.run(*options, env=env)
    assert device.snapshot() == before
    left = {path.name for path in device.folder.iterdir()}
    assert left <= {"empty.conf", "identity.pem"}, left
    return run


@pytest.fixture
def certified(certified: Talking) -> Talking:
    """A device in good order, that nobody listens to."""
    certified.server = NOBODY
    return certified


@pytest.fixture(params=["new", "certified"])
def device(request: pytest.FixtureRequest, certified: Talking) -> Talking:
    """A device in good order, and one at its first boot."""
    if request.param == "new":
        certified.key_file.unlink()
    return certified


# --- Settings ---

SERVERS = """
https://ca.example.com
ca.example.com/path
ca.example.com:
ca.example.com:0
ca.example.com:65536
ca.example.com:https
ca.example.com:-1
:443
ca example com
ca..example.com
-ca.example.com
user@ca.example.com
[::1
[::1]443
[ca.example.com]]:1
ca.example.com:443:443
å.example.com
ca.example.com:٤٤٣
"""
SERVERS_TOO_LONG = ["a" * 64 + ".example.com", ".".join(["abcdefghi"] * 30)]


@pytest.mark.parametrize("name", [*SERVERS.strip().split("\n"), *SERVERS_TOO_LONG, "ca.example.com\n", ""])
def test_a_malformed_server_name(certified: Talking, name: str) -> None:
    certified.server = None
    refused(nothing_lost(certified, f"--server={name}"), "--server")


#: What is set to None, or to a path in the device's folder; the words.
MISSING: list[tuple[str, Optional[str], list[str]]] = [
    ("server", None, ["--server", "CARAMEL_CA"]),
    ("ca", None, ["no CA certificate", "--ca-cert", "CARAMEL_CA_CERT"]),
    ("ca", "nowhere.crt", ["nowhere.crt", "is not there"]),
    ("ca", "", ["device", "can't be read"]),
]


@pytest.mark.parametrize(("setting", "value", "words"), MISSING)
def test_a_setting_that_is_missing(device: Talking, setting: str, value: Optional[str], words: list[str]) -> None:
    setattr(device, setting, value if value is None else device.folder / value)
    refused(nothing_lost(device), *words)


@pytest.mark.parametrize("kind", ["empty", "text", "key", "damaged", "der", "no-ca", "no-ca-beside-one", "huge"])
def test_a_ca_that_is_no_ca_certificate(device: Talking, tmp_path: Path, authority: Authority, kind: str) -> None:
    no_ca = authority.sign(world.signing_request(world.new_key(), authority.subject_for("x")))
    content = {
        "empty": b"",
        "text": b"-----BEGIN CERTIFICATE-----\n",
        "key": world.private_pem(authority.key),
        "damaged": broken(authority.pem),
        "der": authority.certificate.public_bytes(serialization.Encoding.DER),
        "no-ca": no_ca,
        "no-ca-beside-one": authority.pem + no_ca,
        "huge": authority.pem * 1000,
    }[kind]
    device.ca = tmp_path / "ca.crt"
    device.ca.write_bytes(content)
    refused(nothing_lost(device), "CA")


IDS = [
    "a" * 65,
    "a,DNS:evil.example.com",
    "a\nb",
    "a b",
    "å",
    "a/b",
    "a\tb",
    "a\x7f",
    "(a)",
    "a\r\nX-Header: y",
    "a@b",
]


@pytest.mark.parametrize("client_id", IDS)
def test_an_impossible_client_id(device: Talking, client_id: str) -> None:
    device.client_id = client_id
    refused(nothing_lost(device), "client ID")


@pytest.mark.parametrize("client_id", ["a" * 65, "a,b"])
def test_an_impossible_client_id_in_the_environment(device: Talking, client_id: str) -> None:
    device.client_id = None
    refused(nothing_lost(device, env={"CARAMEL_CN": client_id}), "client ID", "CARAMEL_CN", "environment")


@pytest.mark.parametrize("client_id", ["a", "a" * 64, "A-Z_a.z:0-9"])
def test_a_possible_client_id(new: Talking, client_id: str) -> None:
    """The other side of the rule: it gets as far as the network."""
    new.server, new.client_id = NOBODY, client_id
    refused(new.run(), "can't be reached")


def test_no_hardware_id(device: Talking) -> None:
    """An interface that doesn't exist has no address; whether this machine has a serial number is not ours to say."""
    device.client_id = None
    device.changed(
        "from caramel_embedded import hardware\nask = hardware.Hardware\n"
        "hardware.Hardware = lambda interfaces: ask(interfaces, root='/nonexistent')"
    )
    refused(nothing_lost(device, "--interfaces", "none0"), "--client-id", "CARAMEL_CN", "hardware")


#: An option with a value that can't be meant, and a word of the line that says so.
VALUES = """
--owner=nobody-of-that-name nobody-of-that-name
--group=nogroup-of-that-name nogroup-of-that-name
--owner=4294967295 4294967295
--owner=-1 --owner
--owner=٣ --owner
--mode=0888 octal
--mode=rw-r----- octal
--mode=01777 octal
--mode=4755 octal
--mode=-600 octal
--mode=0o600 octal
--mode= mode
--mode='' mode
--timeout=0 --timeout
--timeout=-1 --timeout
--timeout=nan --timeout
--timeout=inf --timeout
--timeout=soon --timeout
--interfaces=eth0,,eth1 --interfaces
--interfaces=../../../etc --interfaces
--hook='unclosed --hook
--config=nowhere.conf nowhere.conf
"""


@pytest.mark.parametrize("line", VALUES.strip().split("\n"))
def test_an_option_that_cannot_be_meant(certified: Talking, line: str) -> None:
    option, word = line.split()
    refused(nothing_lost(certified, option), word)


#: A third line of a configuration file.
LINES = r"""
CARAMEL_CA ca.example.com
=value
CARAMEL CA=value
export CARAMEL_CA=ca.example.com
CARAMEL_CA=ca example com
CARAMEL_CA='ca.example.com
CARAMEL_CA='ca'.example.com
CARAMEL_HOOK="echo $HOME"
CARAMEL_HOOK=`id`
CARAMEL_CA=ca.example.com # comment
1CARAMEL=x
[section]
"""


@pytest.mark.parametrize("line", [*(line.encode() for line in LINES.strip().split("\n")), b"X='a\0b'", b"X=\xff\xfe"])
def test_a_malformed_line_in_the_configuration_file(certified: Talking, line: bytes) -> None:
    configuration = certified.folder / "empty.conf"
    configuration.write_bytes(b"# first\nCARAMEL_TIMEOUT=5\n" + line + b"\n")
    refused(nothing_lost(certified), str(configuration), "line 3")


def test_a_bad_value_in_the_configuration_file_names_the_file(certified: Talking) -> None:
    configuration = certified.folder / "empty.conf"
    configuration.write_text("CARAMEL_TIMEOUT=never\n")
    refused(nothing_lost(certified), str(configuration), "CARAMEL_TIMEOUT", "never")


# --- Network ---


def test_name_look_up_fails(certified: Talking) -> None:
    certified.server = "caramel.invalid"  # RFC 6761: this name never exists
    refused(nothing_lost(certified, "--timeout", "10"), "caramel.invalid:443", "look-up failed")


def test_connection_refused(certified: Talking) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody else gets this port, and nobody listens there
        certified.server = f"localhost:{bound.getsockname()[1]}"
        refused(nothing_lost(certified), str(certified.server), "refused")


def test_nobody_at_home_at_the_first_boot_leaves_a_key_for_the_next(new: Talking) -> None:
    new.server = NOBODY
    refused(new.run(), "can't be reached")
    assert new.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    refused(nothing_lost(new), "can't be reached")


# --- The server's certificate: see also test_trust.py ---


def other_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "other")


STRANGERS = {
    "another-ca": "self-signed|unable to get|signature",
    "another-name": "localhost",
    "expired": "expired|ended",
}


@pytest.mark.parametrize("fault", STRANGERS)
@pytest.mark.parametrize("life", ["pending", "certified", "unusable"])
def test_a_server_that_is_not_ours(new: Talking, authority: Authority, tmp_path: Path, fault: str, life: str) -> None:
    new.certified() if life == "certified" else new.pending()
    if life == "unusable":
        # What would be replaced stays, as long as nobody trustworthy has been met.
        new.has(authority.identity("another-device", certified=False))
    file = f"{fault}.pem"
    certificate = {
        "another-ca": lambda: other_authority(tmp_path).server(),
        "another-name": lambda: authority.server(["ca.example.com"], file=file),
        "expired": lambda: authority.server(not_before=now() - hours(9), not_after=now() - hours(1), file=file),
    }[fault]()
    run = new.keeps(answers.REJECTED, by=certificate)
    refused(run, str(new.server))
    assert re.search(STRANGERS[fault], run.err), run.err
    assert new.asked == [], "no request and no client certificate for a stranger"


# --- Answers ---


def broken(pem: bytes) -> bytes:
    lines = pem.splitlines(keepends=True)
    return b"".join([*lines[:4], *lines[6:]])


def certificate(device: Talking, **fields: object) -> bytes:
    return answers.certificate(device.signed(**fields))


CHUNK = b"8000\r\n" + b"a" * 0x8000 + b"\r\n"
BadAnswer = Callable[[Talking, Path], bytes]
BAD_ANSWERS: dict[str, tuple[BadAnswer, str]] = {
    "no certificate": (lambda d, p: answers.certificate(b"Welcome to our hotel's network"), "no certificate"),
    "empty": (lambda d, p: answers.certificate(b""), "no certificate"),
    "a page": (lambda d, p: answers.page(200), "no certificate"),
    "the request": (lambda d, p: answers.certificate(d.request), "no certificate"),
    "a damaged certificate": (lambda d, p: answers.certificate(broken(d.signed())), ""),
    "text around it": (lambda d, p: answers.certificate(b"Here:\n" + d.signed()), "no certificate"),
    "another key's": (lambda d, p: certificate(d, public_key=world.new_key().public_key()), "another key's"),
    "another device's": (
        lambda d, p: certificate(d, subject=d.authority.subject_for("cafe00000000")),
        "another device's",
    ),
    "no device's": (
        lambda d, p: certificate(d, subject=d.authority.subject_for("x")[:-1], names=["x"]),
        "another device's",
    ),
    "another CA's": (
        lambda d, p: answers.certificate(other_authority(p).sign(d.request, not_before=now() - hours(2))),
        "not by the trusted CA",
    ),
    "self-signed": (
        lambda d, p: answers.certificate(Authority(p / "self", d.authority.subject_for(ID)).pem),
        "another key's",
    ),
    "expired": (lambda d, p: certificate(d, not_before=now() - hours(2), not_after=now() - hours(1)), "ended at"),
    "for something else": (
        lambda d, p: certificate(d, usage=[world.CODE_SIGNING]),
        "neither for clients nor for servers",
    ),
    "too long": (lambda d, p: answers.certificate(d.signed() + b"\n" * 65536), "65536"),
    "too long, in chunks": (
        lambda d, p: answer(200, CHUNK, "Transfer-Encoding: chunked") + CHUNK * 2 + b"0\r\n\r\n",
        "65536",
    ),
    "too long, until the end": (lambda d, p: b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 70000, "65536"),
    "compressed": (
        lambda d, p: answers.certificate(gzip.compress(d.signed()), "Content-Encoding: gzip"),
        "no certificate",
    ),
    "cut short": (
        lambda d, p: answer(200, d.signed()[:-100], "Content-Length: 9000", "Connection: close"),
        "broke",
    ),
    "of two lengths": (
        lambda d, p: answers.certificate(d.signed(), "Content-Length: 20", "Content-Length: 30"),
        "Length",
    ),
}


@pytest.mark.parametrize("what", BAD_ANSWERS)
def test_an_answer_that_is_no_certificate_for_us(enrolled: Talking, tmp_path: Path, what: str) -> None:
    make, words_of_it = BAD_ANSWERS[what]
    # (No client certificate is asked for: where one was shown, a line that breaks is tried once more.)
    refused(enrolled.keeps(make(enrolled, tmp_path), server={"client_ca": None}), words_of_it)


def test_an_answer_of_64_kib_is_not_too_long(pending: Talking) -> None:
    body = pending.signed()
    assert pending.hears(answers.certificate(body + b"\n" * (65536 - len(body)))).status == 0


# --- The key file's folder ---


def test_a_folder_that_is_missing_is_made(new: Talking, tmp_path: Path) -> None:
    new.server = NOBODY
    new.key_file = tmp_path / "data" / "with space" / "identity.pem"
    refused(new.run(), "can't be reached")
    assert new.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    assert {path.stat().st_mode & 0o7777 for path in (tmp_path / "data", tmp_path / "data/with space")} == {0o755}


@pytest.fixture
def powerless(certified: Talking) -> Talking:
    """Its folder is not writable, and it has no root's powers."""
    certified.command = [world.PLAIN]  # coverage's files lie where the powerless may not write
    certified.folder.chmod(0o555)
    return certified


def test_a_folder_that_cannot_be_made(powerless: Talking, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    powerless.key_file = closed / "data" / "identity.pem"
    refused(powerless.run(before=POWERLESS), str(closed / "data"))
    assert list(closed.iterdir()) == []


def test_a_folder_in_which_a_file_stands_in_the_way(new: Talking, tmp_path: Path) -> None:
    new.server = NOBODY
    (tmp_path / "data").write_text("not a folder")
    new.key_file = tmp_path / "data" / "identity.pem"
    refused(new.run(), str(tmp_path / "data"))
    assert (tmp_path / "data").read_text() == "not a folder"


@pytest.mark.parametrize("life", ["new", "certified"])
def test_a_folder_that_is_not_writable_has_no_room_for_what_is_new(powerless: Talking, life: str) -> None:
    says = [answers.certificate(powerless.signed(not_after=now() + hours(96)))]
    if life == "new":
        powerless.folder.chmod(0o755)
        powerless.key_file.unlink()
        powerless.folder.chmod(0o555)
        says = list(FIRST_TIME)
    refused(powerless.keeps(*says, before=POWERLESS), str(powerless.key_file if life == "new" else "device"))


def test_an_unchanged_check_needs_no_writable_folder(powerless: Talking) -> None:
    same = answers.certificate(powerless.block("CERTIFICATE") or b"")
    powerless.keeps(same, before=POWERLESS, status=0)


def test_a_key_file_that_cannot_be_read(powerless: Talking) -> None:
    powerless.key_file.chmod(0)
    before = powerless.key_file.stat()
    refused(powerless.run(before=POWERLESS), str(powerless.key_file), "ermission")
    after = powerless.key_file.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "device", "link to itself"])
def test_something_else_stands_in_the_key_files_place(new: Talking, kind: str) -> None:
    new.server = NOBODY
    with socket.socket(socket.AF_UNIX) as server:
        if kind == "folder":
            new.key_file.mkdir()
        elif kind == "fifo":
            os.mkfifo(new.key_file)
        elif kind == "socket":
            home = os.getcwd()
            os.chdir(new.folder)  # sun_path is short
            server.bind("identity.pem")
            os.chdir(home)
        elif kind == "device":
            try:
                # Not the machine's own: a program that fails here puts a file in its place.
                os.mknod(new.key_file, stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except PermissionError:
                new.key_file = Path("/dev/null")
        else:
            new.key_file.symlink_to(new.key_file.name)
        before = new.key_file.lstat().st_mode
        refused(new.run(timeout=20), str(new.key_file))
        assert new.key_file.lstat().st_mode == before
