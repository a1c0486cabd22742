"""Bad input: each a clear line on standard error, 127, and nothing lost."""

from __future__ import annotations

import gzip
import os
import re
import socket
from pathlib import Path
from typing import Callable, Optional

import pytest
import world
from cryptography.hazmat.primitives import serialization
from world import PLAIN, Authority, Device, Run, Scripted, Snapshot, answer, answers, hours, now

ID = "fffbeec0ffee"

#: Root without root's powers over files, so that what others may not do fails as it would for anybody.
POWERLESS = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="bad-input.pem")


@pytest.fixture
def certified(tmp_path: Path, authority: Authority) -> Device:
    """A device in good order, that nobody listens to."""
    device = Device(tmp_path / "device", "localhost:9", authority.certificate_file, ID)
    device.has(authority.identity(ID, not_before=now() - hours(1)))
    return device


def refused(run: Run, *words: str) -> None:
    """It ended with 127 and one line that has these words in it."""
    assert (run.status, run.out, run.err.count("\n")) == (127, "", 1), run
    assert run.err.startswith("caramel-embedded: ")
    assert "Traceback" not in run.err and "internal error" not in run.err
    for word in words:
        assert word in run.err, run.err


def nothing_lost(device: Device, *options: str, env: Optional[dict[str, str]] = None) -> Run:
    """One run, after which the key file is as it was, and without any if there was none."""
    before = device.snapshot()
    run = device.run(*options, env=env)
    assert device.snapshot() == before
    left = {path.name for path in device.folder.iterdir()}
    assert left <= {"empty.conf", "identity.pem"}, left
    return run


@pytest.fixture(params=["new", "certified"])
def device(request: pytest.FixtureRequest, certified: Device) -> Device:
    """A device in good order, and one at its first boot."""
    if request.param == "new":
        certified.key_file.unlink()
    return certified


# --- Settings ---


def test_no_server_name(device: Device) -> None:
    device.server = None
    refused(nothing_lost(device), "--server", "CARAMEL_CA")


@pytest.mark.parametrize(
    "name",
    [
        "https://ca.example.com",
        "ca.example.com/path",
        "ca.example.com:",
        "ca.example.com:0",
        "ca.example.com:65536",
        "ca.example.com:https",
        "ca.example.com:-1",
        ":443",
        "ca example com",
        "ca.example.com\n",
        "ca..example.com",
        "-ca.example.com",
        "a" * 64 + ".example.com",
        ".".join(["abcdefghi"] * 30),
        "user@ca.example.com",
        "[::1",
        "[::1]443",
        "[ca.example.com]]:1",
        "ca.example.com:443:443",
        "å.example.com",
        "ca.example.com:٤٤٣",
    ],
)
def test_a_malformed_server_name(certified: Device, name: str) -> None:
    certified.server = None
    refused(nothing_lost(certified, f"--server={name}"), "--server")


def test_an_empty_server_name(device: Device) -> None:
    device.server = ""
    refused(nothing_lost(device), "--server")


def test_no_ca(device: Device) -> None:
    device.ca = None
    refused(nothing_lost(device), "no CA certificate", "--ca-cert", "CARAMEL_CA_CERT")


def test_a_ca_that_is_not_there(device: Device) -> None:
    device.ca = device.folder / "nowhere.crt"
    refused(nothing_lost(device), "nowhere.crt", "is not there")


def test_a_ca_that_cannot_be_read(device: Device) -> None:
    device.ca = device.folder
    refused(nothing_lost(device), str(device.folder), "can't be read")


@pytest.mark.parametrize("kind", ["empty", "text", "key", "damaged", "der", "no-ca", "no-ca-beside-one", "huge"])
def test_a_ca_that_is_no_ca_certificate(device: Device, tmp_path: Path, authority: Authority, kind: str) -> None:
    no_ca = authority.sign(world.signing_request(world.new_key(), authority.subject_for("x")))
    lines = authority.pem.decode().splitlines(keepends=True)
    content = {
        "empty": b"",
        "text": b"-----BEGIN CERTIFICATE-----\n",
        "key": world.private_pem(authority.key),
        "damaged": "".join([*lines[:3], *lines[5:]]).encode(),
        "der": authority.certificate.public_bytes(serialization.Encoding.DER),
        "no-ca": no_ca,
        "no-ca-beside-one": authority.pem + no_ca,
        "huge": authority.pem * 1000,
    }[kind]
    device.ca = tmp_path / "ca.crt"
    device.ca.write_bytes(content)
    refused(nothing_lost(device), "CA")


@pytest.mark.parametrize(
    "client_id",
    [
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
    ],
)
def test_an_impossible_client_id(device: Device, client_id: str) -> None:
    device.client_id = client_id
    refused(nothing_lost(device), "client ID")


@pytest.mark.parametrize("client_id", ["a" * 65, "a,b"])
def test_an_impossible_client_id_in_the_environment(device: Device, client_id: str) -> None:
    device.client_id = None
    refused(nothing_lost(device, env={"CARAMEL_CN": client_id}), "client ID", "CARAMEL_CN", "environment")


@pytest.mark.parametrize("client_id", ["a", "a" * 64, "A-Z_a.z:0-9"])
def test_a_possible_client_id(certified: Device, client_id: str) -> None:
    """The other side of the rule: it gets as far as the network."""
    certified.client_id = client_id
    certified.key_file.unlink()
    run = certified.run()
    assert run.status == 127 and "can't be reached" in run.err


def test_no_hardware_id(device: Device) -> None:
    """An interface that doesn't exist has no address; whether this machine has a serial number is not ours to say."""
    device.client_id = None
    code = (
        "import sys, os\n"
        "from caramel_embedded import hardware\n"
        "from caramel_embedded.__main__ import main\n"
        "ask = hardware.Hardware\n"
        "hardware.Hardware = lambda interfaces: ask(interfaces, root='/nonexistent')\n"
        "main(sys.argv[1:])\n"
    )
    device.command = [str(Path(PLAIN).parent / "python"), "-I", "-c", code]
    refused(nothing_lost(device, "--interfaces", "none0"), "--client-id", "CARAMEL_CN", "hardware")


@pytest.mark.parametrize(
    "option, value, word",
    [
        ("--owner", "nobody-of-that-name", "nobody-of-that-name"),
        ("--group", "nogroup-of-that-name", "nogroup-of-that-name"),
        ("--owner", "4294967295", "4294967295"),
        ("--owner", "-1", "--owner"),
        ("--owner", "٣", "--owner"),
        ("--mode", "0888", "octal"),
        ("--mode", "rw-r-----", "octal"),
        ("--mode", "01777", "octal"),
        ("--mode", "4755", "octal"),
        ("--mode", "-600", "octal"),
        ("--mode", "0o600", "octal"),
        ("--timeout", "0", "--timeout"),
        ("--timeout", "-1", "--timeout"),
        ("--timeout", "nan", "--timeout"),
        ("--timeout", "inf", "--timeout"),
        ("--timeout", "soon", "--timeout"),
        ("--interfaces", "eth0,,eth1", "--interfaces"),
        ("--interfaces", "../../../etc", "--interfaces"),
        ("--hook", "'unclosed", "--hook"),
        ("--config", "nowhere.conf", "nowhere.conf"),
    ],
)
def test_an_option_that_cannot_be_meant(certified: Device, option: str, value: str, word: str) -> None:
    refused(nothing_lost(certified, f"{option}={value}"), word)


@pytest.mark.parametrize("mode", ["", "''"])
def test_an_option_without_a_value(certified: Device, mode: str) -> None:
    refused(nothing_lost(certified, "--mode", mode), "mode")


@pytest.mark.parametrize(
    "line, number",
    [
        ("CARAMEL_CA ca.example.com", 3),
        ("=value", 3),
        ("CARAMEL CA=value", 3),
        ("export CARAMEL_CA=ca.example.com", 3),
        ("CARAMEL_CA=ca example com", 3),
        ("CARAMEL_CA='ca.example.com", 3),
        ("CARAMEL_CA='ca'.example.com", 3),
        ('CARAMEL_HOOK="echo $HOME"', 3),
        ("CARAMEL_HOOK=`id`", 3),
        ("CARAMEL_CA=ca.example.com # comment", 3),
        ("1CARAMEL=x", 3),
        ("[section]", 3),
        ("CARAMEL_CA='a\x00b'", 3),
    ],
)
def test_a_malformed_line_in_the_configuration_file(certified: Device, line: str, number: int) -> None:
    configuration = certified.folder / "empty.conf"
    configuration.write_text(f"# first\nCARAMEL_TIMEOUT=5\n{line}\n")
    refused(nothing_lost(certified), str(configuration), f"line {number}")


def test_a_configuration_file_that_is_no_text(certified: Device) -> None:
    configuration = certified.folder / "empty.conf"
    configuration.write_bytes(b"# first\nCARAMEL_CA=\xff\xfe\n")
    refused(nothing_lost(certified), str(configuration), "line 2")


def test_a_bad_value_in_the_configuration_file_names_the_file(certified: Device) -> None:
    configuration = certified.folder / "empty.conf"
    configuration.write_text("CARAMEL_TIMEOUT=never\n")
    refused(nothing_lost(certified), str(configuration), "CARAMEL_TIMEOUT", "never")


# --- Network ---


def test_name_look_up_fails(certified: Device) -> None:
    certified.server = "caramel.invalid"  # RFC 6761: this name never exists
    refused(nothing_lost(certified, "--timeout", "10"), "caramel.invalid:443", "look-up failed")


def test_connection_refused(certified: Device) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody else gets this port, and nobody listens there
        certified.server = f"localhost:{bound.getsockname()[1]}"
        refused(nothing_lost(certified), str(certified.server), "refused")


def test_nobody_at_home_at_the_first_boot_leaves_a_key_for_the_next(tmp_path: Path, authority: Authority) -> None:
    device = Device(tmp_path, "localhost:9", authority.certificate_file, ID)
    refused(device.run(), "can't be reached")
    assert device.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    before = device.snapshot()
    refused(device.run(), "can't be reached")
    assert device.snapshot() == before


# --- The server's certificate: see also test_trust.py ---


def other_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "other")


@pytest.mark.parametrize("fault", ["another-ca", "another-name", "expired"])
@pytest.mark.parametrize("life", ["pending", "certified", "unusable"])
def test_a_server_that_is_not_ours(
    certified: Device, authority: Authority, tmp_path: Path, fault: str, life: str
) -> None:
    if life == "pending":
        certified.has(authority.identity(ID, certified=False))
    if life == "unusable":
        # What would be replaced stays, as long as nobody trustworthy has been met.
        certified.has(authority.identity("another-device", certified=False))
    file = f"{fault}.pem"
    certificate = {
        "another-ca": lambda: other_authority(tmp_path).server(),
        "another-name": lambda: authority.server(["ca.example.com"], file=file),
        "expired": lambda: authority.server(not_before=now() - hours(9), not_after=now() - hours(1), file=file),
    }[fault]()
    with Scripted(certificate, [answers.REJECTED]) as server:
        certified.server = server.address
        run = nothing_lost(certified)
    refused(run, server.address)
    reason = {
        "another-ca": "self-signed|unable to get|signature",
        "another-name": "localhost",
        "expired": "expired|ended",
    }
    assert re.search(reason[fault], run.err), run.err
    assert server.requests == [], "no request and no client certificate for a stranger"


# --- Answers ---


BadAnswer = Callable[[Authority, Device, Path], bytes]


def signed(authority: Authority, device: Device, **fields: object) -> bytes:
    return authority.sign(device.request, **{"not_before": now() - hours(2), **fields})


def gzipped(authority: Authority, device: Device, _: Path) -> bytes:
    body = gzip.compress(signed(authority, device))
    return answers.certificate(body, "Content-Encoding: gzip")


def broken(pem: bytes) -> bytes:
    lines = pem.splitlines(keepends=True)
    return b"".join([*lines[:4], *lines[6:]])


BAD_ANSWERS: dict[str, tuple[BadAnswer, str]] = {
    "no certificate": (lambda a, d, p: answers.certificate(b"Welcome to our hotel's network"), "no certificate"),
    "empty": (lambda a, d, p: answers.certificate(b""), "no certificate"),
    "a page": (lambda a, d, p: answers.page(200), "no certificate"),
    "the request": (lambda a, d, p: answers.certificate(d.request), "no certificate"),
    "a damaged certificate": (lambda a, d, p: answers.certificate(broken(signed(a, d))), ""),
    "text around it": (lambda a, d, p: answers.certificate(b"Here:\n" + signed(a, d)), "no certificate"),
    "another key's": (
        lambda a, d, p: answers.certificate(signed(a, d, public_key=world.new_key().public_key())),
        "another key's",
    ),
    "another device's": (
        lambda a, d, p: answers.certificate(signed(a, d, subject=a.subject_for("cafe00000000"))),
        "another device's",
    ),
    "no device's": (
        lambda a, d, p: answers.certificate(signed(a, d, subject=a.subject_for("x")[:-1], names=["x"])),
        "another device's",
    ),
    "another CA's": (
        lambda a, d, p: answers.certificate(signed(other_authority(p), d)),
        "not by the trusted CA",
    ),
    "self-signed": (
        lambda a, d, p: answers.certificate(Authority(p / "self", a.subject_for(ID)).pem),
        "another key's",
    ),
    "expired": (lambda a, d, p: answers.certificate(signed(a, d, not_after=now() - hours(1))), "ended at"),
    "for something else": (
        lambda a, d, p: answers.certificate(signed(a, d, usage=[world.CODE_SIGNING])),
        "neither for clients nor for servers",
    ),
    "too long": (lambda a, d, p: answers.certificate(signed(a, d) + b"\n" * 65536), "65536"),
    "too long, in chunks": (
        lambda a, d, p: (
            answer(200, b"8000\r\n" + b"a" * 0x8000 + b"\r\n", "Transfer-Encoding: chunked")
            + (b"8000\r\n" + b"a" * 0x8000 + b"\r\n") * 2
            + b"0\r\n\r\n"
        ),
        "65536",
    ),
    "too long, until the end": (lambda a, d, p: b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 70000, "65536"),
    "compressed": (gzipped, "no certificate"),
    "cut short": (
        lambda a, d, p: answer(200, signed(a, d)[:-100], "Content-Length: 9000", "Connection: close"),
        "broke",
    ),
    "of two lengths": (
        lambda a, d, p: answers.certificate(signed(a, d), "Content-Length: 20", "Content-Length: 30"),
        "Length",
    ),
}


@pytest.mark.parametrize("life", ["pending", "certified"])
@pytest.mark.parametrize("what", BAD_ANSWERS)
def test_an_answer_that_is_no_certificate_for_us(
    certified: Device, authority: Authority, pem: Path, tmp_path: Path, what: str, life: str
) -> None:
    if life == "pending":
        certified.has(authority.identity(ID, certified=False))
    make, words_of_it = BAD_ANSWERS[what]
    with Scripted(pem, [make(authority, certified, tmp_path)]) as server:
        certified.server = server.address
        refused(nothing_lost(certified), words_of_it)
    assert len(server.requests) == 1


def test_an_answer_of_64_kib_is_not_too_long(certified: Device, authority: Authority, pem: Path) -> None:
    body = signed(authority, certified)
    body += b"\n" * (65536 - len(body))
    with Scripted(pem, [answers.certificate(body)]) as server:
        certified.server = server.address
        assert certified.run().status == 0


# --- The key file's folder ---


def test_a_folder_that_is_missing_is_made(device: Device, tmp_path: Path) -> None:
    device.key_file = tmp_path / "data" / "with space" / "identity.pem"
    assert device.run().status == 127  # nobody listens
    assert device.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    assert {path.stat().st_mode & 0o7777 for path in (tmp_path / "data", tmp_path / "data/with space")} == {0o755}


def powerless(device: Device) -> Run:
    if os.geteuid() == 0:
        device.command = [PLAIN]  # coverage's files lie where the powerless may not write
        return device.run(before=POWERLESS)
    return device.run()


def test_a_folder_that_cannot_be_made(device: Device, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    device.key_file = closed / "data" / "identity.pem"
    refused(powerless(device), str(closed / "data"))
    assert list(closed.iterdir()) == []


def test_a_folder_in_which_a_file_stands_in_the_way(device: Device, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    device.key_file = tmp_path / "data" / "identity.pem"
    refused(device.run(), str(tmp_path / "data"))
    assert (tmp_path / "data").read_text() == "not a folder"


def test_a_folder_that_is_not_writable(tmp_path: Path, authority: Authority) -> None:
    device = Device(tmp_path / "device", "localhost:9", authority.certificate_file, ID)
    device.folder.chmod(0o555)
    refused(powerless(device), str(device.key_file))
    assert not device.key_file.exists()


def test_a_new_certificate_has_no_room_in_a_folder_that_is_not_writable(
    certified: Device, authority: Authority, pem: Path
) -> None:
    certified.folder.chmod(0o555)
    before = certified.snapshot()
    with Scripted(pem, [answers.certificate(signed(authority, certified, not_after=now() + hours(96)))]) as server:
        certified.server = server.address
        refused(powerless(certified), certified.folder.name)
    assert certified.snapshot() == before


def test_an_unchanged_check_needs_no_writable_folder(certified: Device, authority: Authority, pem: Path) -> None:
    certified.folder.chmod(0o555)
    with Scripted(pem, [answers.certificate(certified.block("CERTIFICATE") or b"")]) as server:
        certified.server = server.address
        assert powerless(certified).status == 0


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "device"])
def test_something_else_stands_in_the_key_files_place(tmp_path: Path, authority: Authority, kind: str) -> None:
    device = Device(tmp_path / "device", "localhost:9", authority.certificate_file, ID)
    server = socket.socket(socket.AF_UNIX)
    with server:
        if kind == "folder":
            device.key_file.mkdir()
        elif kind == "fifo":
            os.mkfifo(device.key_file)
        elif kind == "socket":
            home = os.getcwd()
            os.chdir(device.folder)  # sun_path is short
            server.bind("identity.pem")
            os.chdir(home)
        else:
            device.key_file = Path("/dev/null")
        before = device.key_file.lstat().st_mode
        refused(device.run(timeout=20), str(device.key_file))
        assert device.key_file.lstat().st_mode == before


def test_a_key_file_that_cannot_be_read(certified: Device) -> None:
    certified.key_file.chmod(0)
    before = certified.snapshot() if os.geteuid() == 0 else None
    refused(powerless(certified), str(certified.key_file), "ermission")
    if before:
        assert Snapshot.of(certified.key_file) == before


def test_a_link_that_leads_to_itself(certified: Device) -> None:
    certified.key_file.unlink()
    certified.key_file.symlink_to(certified.key_file.name)
    refused(certified.run(), str(certified.key_file))
    assert certified.key_file.is_symlink()
