# SPDX-License-Identifier: MIT OR Apache-2.0
"""Signer `ca`: how the CA is made, renewed, replaced and put under another one, and what OpenSSL says of it."""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import world
from authority_world import BIN, COMMAND, SUBJECT, RegistrationAuthority, at, csr, rsa_key, sha256
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from needs import needs, require, slow
from world import Daemon

pytest_plugins = ["authority_fixtures"]
pytestmark = needs("authority", "faketime", "openssl")


def openssl(*arguments: object) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=30)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["ec-p256", "rsa-2048", "rsa-4096"])
def test_a_new_ca(tmp_path: Path, kind: str) -> None:
    authority = RegistrationAuthority(tmp_path)
    authority.create_ca("--key-type", kind)
    key_file = authority.ca.with_suffix(".key")
    assert key_file.stat().st_mode & 0o777 == 0o600
    certificate = x509.load_pem_x509_certificate(authority.ca.read_bytes())
    key = certificate.public_key()
    assert isinstance(key, rsa.RSAPublicKey if kind.startswith("rsa") else ec.EllipticCurvePublicKey)
    # In the order in which it was said.
    assert [one.rfc4514_attribute_name for one in certificate.subject] == ["C", "ST", "L", "O", "OU", "CN"]
    get = certificate.extensions.get_extension_for_class
    constraints, usage = get(x509.BasicConstraints), get(x509.KeyUsage)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    assert usage.critical and usage.value.key_cert_sign and usage.value.crl_sign
    assert not usage.value.digital_signature
    assert get(x509.SubjectKeyIdentifier)
    # Both of a device's key types are signed by either kind of CA, and OpenSSL agrees.
    authority.command("allow", "ec", "rsa")
    with authority.serving() as server:
        for client_id, request in (("ec", csr("ec")), ("rsa", csr("rsa", rsa_key()))):
            (tmp_path / "leaf.crt").write_bytes(server.enroll(request).body)
            said = openssl(
                "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", authority.ca, tmp_path / "leaf.crt"
            )
            assert said.endswith("leaf.crt: OK\n"), (client_id, said)


@pytest.mark.parametrize(
    "name", ["O=a\x1b[2J,CN=x", "O=a\\1b[2J,CN=x", "O=a\\0ab,CN=x", "O=a\u202eb,CN=x", "CN=\u3164"]
)
def test_a_subject_is_text_that_is_seen(tmp_path: Path, name: str) -> None:
    authority = RegistrationAuthority(tmp_path)
    for command in ("ca-create", "ca-request"):
        said = authority.command(command, "--subject", name, status=1)
        assert "which can't be seen" in said and said.isprintable() == said.endswith("x"), said
        assert not list(authority.folder.glob("ca/*"))


def test_a_subject_is_not_empty(tmp_path: Path) -> None:
    """What a script gives whose variable is unset: RFC 5280, 4.1.2.4, wants a name of whoever issues."""
    authority = RegistrationAuthority(tmp_path)
    for command in ("ca-create", "ca-request"):
        assert "it is empty" in authority.command(command, "--subject", "", status=1)
        assert not list(authority.folder.glob("ca/*"))


def test_a_ca_is_not_overwritten(authority: RegistrationAuthority) -> None:
    before = authority.ca.read_bytes(), authority.ca.with_suffix(".key").read_bytes()
    assert "--replace puts another CA in its place" in authority.command("ca-create", "--subject", SUBJECT, status=1)
    assert before == (authority.ca.read_bytes(), authority.ca.with_suffix(".key").read_bytes())


def test_no_ca_yet(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path)
    with authority.serving() as server:
        assert server.get("/root.crt").status == 503
        assert server.post(csr("device")).status == 503
        authority.create_ca()
        assert server.post(csr("device")).status == 202


def test_a_key_that_others_may_read_is_not_used(authority: RegistrationAuthority) -> None:
    authority.command("allow", "device")
    authority.ca.with_suffix(".key").chmod(0o640)
    request = csr("device")
    with authority.serving() as server:
        assert server.enroll(request).status == 503
        authority.ca.with_suffix(".key").chmod(0o600)
        assert server.get(sha256(request)).status == 200


def serial_of(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


@slow
def test_serial_numbers_are_never_used_again(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """Not by a new CA, not for the CA itself, not after the clock went back, not with a database from yesterday."""
    numbers = [serial_of(authority.ca)]
    authority.command("allow", "one", "two", "three", "four")
    old = {path.name: path.read_bytes() for path in authority.folder.glob("state.db*")}
    with authority.serving() as server:
        numbers.append(server.enroll(csr("one")).certificate.serial_number)
    authority.command("ca-create", "--subject", SUBJECT, "--replace")
    numbers.append(serial_of(authority.ca))
    with authority.serving() as server:
        numbers.append(server.enroll(csr("two")).certificate.serial_number)
    authority.command("ca-renew")
    numbers.append(serial_of(authority.ca))
    with authority.serving(before=at(-0.02)) as server:  # as far as certificates begin earlier, and less
        numbers.append(server.enroll(csr("three")).certificate.serial_number)
    assert numbers == sorted(set(numbers))
    with authority.serving(before=at(-300)) as server:
        # There is no CA yet: nothing is signed that nobody could use, at each question another one.
        assert server.enroll(csr("four")).status == server.get("/health").status == 503
    assert len(authority.log("signed")) == 3
    for path in authority.folder.glob("state.db*"):  # its journal, too, in which the later transactions are
        path.unlink()
    for name, content in old.items():
        (authority.folder / name).write_bytes(content)
    with authority.serving() as server:
        numbers.append(server.enroll(csr("four")).certificate.serial_number)
    assert numbers == sorted(set(numbers))


def test_replaced(authority: RegistrationAuthority) -> None:
    """The CA before is kept, and a server that runs signs with the new one at once."""
    before = authority.ca.read_bytes(), authority.ca.with_suffix(".key").read_bytes()
    authority.command("allow", "one", "two")
    with authority.serving() as server:
        server.enroll(csr("one"))
        authority.command("ca-create", "--subject", SUBJECT, "--replace", "--key-type", "rsa-2048")
        second = server.enroll(csr("two")).certificate
        assert server.get("/root.crt").body == authority.ca.read_bytes()
    second.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.ca.read_bytes()))
    kept = authority.ca.with_name(f"ca.{x509.load_pem_x509_certificate(before[0]).serial_number:x}.crt")
    assert (kept.read_bytes(), kept.with_suffix(".key").read_bytes()) == before
    assert kept.with_suffix(".key").stat().st_mode & 0o777 == 0o600


def test_renewed(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """Whoever trusts the old certificate trusts what the renewed CA signs, and the other way round."""
    authority.command("allow", "one", "two")
    (tmp_path / "old.crt").write_bytes(authority.ca.read_bytes())
    with authority.serving() as server:
        (tmp_path / "one.crt").write_bytes(server.enroll(csr("one")).body)
        authority.command("ca-renew", "--days", "9000")
        (tmp_path / "two.crt").write_bytes(server.enroll(csr("two")).body)
    for ca in (tmp_path / "old.crt", authority.ca):
        for leaf in ("one.crt", "two.crt"):
            assert openssl("verify", "-CAfile", ca, tmp_path / leaf).endswith(": OK\n")


def test_a_ca_at_its_end(tmp_path: Path) -> None:
    """Nothing outlives it; when it has ended devices are told to come again, and then it is renewed."""
    authority = RegistrationAuthority(tmp_path)
    authority.create_ca("--days", "3")
    authority.command("allow", "device")
    request = csr("device")
    with authority.serving() as server:
        certificate = server.enroll(request).certificate
    ca = x509.load_pem_x509_certificate(authority.ca.read_bytes())
    assert certificate.not_valid_after_utc == ca.not_valid_after_utc
    with authority.serving(before=at(4)) as server:
        reply = server.get(sha256(request))
        assert (reply.status, reply.headers["retry-after"]) == (503, "3600")
        authority.command("ca-renew", "--days", "30", before=at(4))
        assert server.get(sha256(request)).status == 200


@slow
def test_an_intermediate_of_somebody_elses_ca(tmp_path: Path) -> None:
    """The chain goes to the device, without the root; the root and the bundle are to be had."""
    above = world.Authority(tmp_path / "above", [("C", "SE"), ("O", "Above"), ("CN", "Above Root")])
    authority = RegistrationAuthority(
        tmp_path / "authority", '[ca]\nfolder = "' + str(tmp_path / "authority/ca") + '"\n'
    )
    request = tmp_path / "intermediate.csr"
    request.write_text(authority.command("ca-request", "--subject", "C=SE,O=Below,CN=Below Intermediate"))
    # The root of the tests' world allows nothing below it (path length 0); this one is OpenSSL's.
    key = tmp_path / "root.key"
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key]
    openssl("req", "-x509", *new, "-days", 30, "-subj", "/C=SE/O=Above/CN=Above Root", "-out", tmp_path / "root.crt")
    by = ["-CA", tmp_path / "root.crt", "-CAkey", key, "-days", 20, "-copy_extensions", "copyall"]
    openssl("x509", "-req", "-in", request, *by, "-out", tmp_path / "intermediate.crt")
    root, intermediate = ((tmp_path / f"{name}.crt").read_bytes() for name in ("root", "intermediate"))
    chain = tmp_path / "chain.crt"
    for wrong in (root, intermediate, root + intermediate, above.pem, intermediate + above.pem, b"x"):
        chain.write_bytes(wrong)
        authority.command("ca-install", str(chain), status=1)
        assert not authority.ca.exists()
    chain.write_bytes(intermediate + root)
    authority.command("ca-install", str(chain))
    authority.command("allow", "one", "two")
    with authority.serving() as server:
        assert server.get("/root.crt").body == root
        assert server.get("/bundle.crt").body == intermediate + root
        # A device knows the root, or the intermediate, and makes its subject by that.
        for client_id, organization in (("one", "Above"), ("two", "Below")):
            reply = server.enroll(csr(client_id, subject=[("C", "SE"), ("O", organization), ("CN", client_id)]))
            assert [one.public_bytes(serialization.Encoding.PEM) for one in reply.chain[1:]] == [intermediate]
            (tmp_path / "leaf.crt").write_bytes(reply.body)
            untrusted = ["-untrusted", tmp_path / "leaf.crt", tmp_path / "leaf.crt"]
            assert openssl("verify", "-CAfile", tmp_path / "root.crt", *untrusted).endswith(": OK\n")
    assert "intermediate" in authority.command("ca-renew", status=1)


def test_the_fronts_certificate(authority: RegistrationAuthority, tmp_path: Path) -> None:
    out = tmp_path / "front.pem"
    make = ["server-certificate", "ca.example.com", "localhost", "--out", str(out)]
    assert authority.command(*make) == f"{out}: made\n"
    assert out.stat().st_mode & 0o777 == 0o600
    first = out.read_bytes()
    for purpose, name in (("sslserver", "localhost"), ("sslserver", "ca.example.com")):
        check = ["-purpose", purpose, "-verify_hostname", name, "-CAfile", authority.ca, out]
        assert openssl("verify", *check).endswith(": OK\n")
    assert authority.command(*make) == f"{out}: still good\n"
    assert out.read_bytes() == first
    assert authority.command(*make, before=at(4.5)) == f"{out}: made\n"
    assert authority.command("server-certificate", "other.example.com", "--out", str(out)) == f"{out}: made\n"
    assert "no host name" in authority.command("server-certificate", "a b", "--out", str(out), status=1)


def test_the_fronts_certificate_takes_the_place_of_nothing_else(
    authority: RegistrationAuthority, tmp_path: Path
) -> None:
    """A mistyped path, with root's rights, would be the end of a device, or of the CA's key."""
    make = ["server-certificate", "ca.example.com", "--out"]
    link, folder, fifo, new = (tmp_path / name for name in ("link", "folder", "fifo", "new"))
    (tmp_path / "linked").touch()
    link.symlink_to(tmp_path / "linked")
    folder.mkdir()
    os.mkfifo(fifo)
    for other in (link, folder, fifo):
        before = other.lstat()
        assert authority.command(*make, str(other), status=1) == f"caramel-authority: {other} is no regular file\n"
        assert other.lstat().st_ino == before.st_ino
    (tmp_path / "notes").write_text("of mine")
    for valuable in (authority.folder / "ca" / "ca.key", authority.ca, authority.state, tmp_path / "notes"):
        content = valuable.read_bytes()
        assert "name another file" in authority.command(*make, str(valuable), status=1)
        assert valuable.read_bytes() == content
    # What is not ours and is one, however odd, is made anew, as what is empty.
    new.touch()
    assert authority.command(*make, str(new)).endswith(": made\n")
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
            "-keyout", tmp_path / "x.key", "-out", tmp_path / "x.crt")  # fmt: skip
    new.write_bytes((tmp_path / "x.key").read_bytes() + (tmp_path / "x.crt").read_bytes())
    assert authority.command(*make, str(new)).endswith(": made\n")


def test_usages(tmp_path: Path) -> None:
    folder = f'folder = "{tmp_path}/ca"\nusages = ["client", "server"]\nlife_hours = 48\n'
    authority = RegistrationAuthority(tmp_path, f"[ca]\n{folder}")
    authority.create_ca()
    authority.command("allow", "device.example.com")
    with authority.serving() as server:
        certificate = server.enroll(csr("device.example.com")).certificate
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert [one._name for one in usage] == ["clientAuth", "serverAuth"]
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds() == 48 * 3600


def test_no_output_has_key_material(authority: RegistrationAuthority) -> None:
    printed = authority.command("log") + authority.command("list") + authority.command("ca-renew")
    assert not re.search("PRIVATE KEY", printed)


# --- The key and the network ---


def with_socket(tmp_path: Path, folder: str = "ca") -> RegistrationAuthority:
    """Its signer is a process of its own. The socket's path has 108 bytes at most (unix(7))."""
    path = Path(tempfile.mkdtemp(prefix="signer-", dir="/tmp")) / "socket"
    made = RegistrationAuthority(tmp_path, f'[ca]\nfolder = "{tmp_path}/{folder}"\nsigner_socket = "{path}"\n')
    made.create_ca()
    made.command("allow", "one", "two")
    return made


def socket_of(authority: RegistrationAuthority) -> Path:
    return Path(tomllib.loads(authority.config.read_text())["ca"]["signer_socket"])


@contextlib.contextmanager
def signing(authority: RegistrationAuthority) -> Iterator[Daemon]:
    with Daemon([COMMAND, "--config", authority.config, "signer"], authority.folder / "signer.log") as signer:
        world.until("the signer answers", lambda: ask_signer(authority, b"\n") == b"{}")
        yield signer


def test_who_answers_has_no_key(tmp_path: Path) -> None:
    """What serves has the CA's certificate only. Devices wait where there is no signer."""
    authority = with_socket(tmp_path / "a")
    serving = RegistrationAuthority(tmp_path / "b", database=authority.database)
    (serving.ca.parent).mkdir()
    serving.ca.write_bytes(authority.ca.read_bytes())
    serving.config.write_text(f"{serving.config.read_text()}signer_socket = {str(socket_of(authority))!r}\n")
    with serving.serving() as server:
        reply = server.enroll(csr("one"))
        assert (reply.status, reply.headers["retry-after"]) == (503, "60")
        assert server.get("/health").status == 503
        with signing(authority) as signer:
            assert socket_of(authority).stat().st_mode & 0o777 == 0o660
            assert server.get("/health").status == 204
            assert server.enroll(csr("two")).status == 200
            assert "another signer listens there" in authority.command("signer", status=1)
            assert signer.process
            signer.process.kill()
            signer.process.wait(10)
        assert server.get("/health").status == 503
        with signing(authority):  # in the place of what the killed one has left
            assert server.get("/health").status == 204
        assert not socket_of(authority).exists()


def ask_signer(authority: RegistrationAuthority, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        # Nobody is there yet; and it reads no further than a hash is long.
        with contextlib.suppress(ConnectionError, FileNotFoundError):
            connection.connect(str(socket_of(authority)))
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b""))
    return b""


def test_the_signer_signs_what_was_authorized_and_nothing_else(tmp_path: Path) -> None:
    """Whoever has broken into the process that answers may ask, and change the database."""
    authority = with_socket(tmp_path)
    requests = {name: csr(name) for name in ("one", "two", "stranger")}
    with authority.serving() as server, signing(authority):
        for request in requests.values():
            assert server.post(request).status == 202
        hashes = {name: sha256(request) for name, request in requests.items()}
        for line in (b"", b"x\n", b"a" * 64 + b"\n", hashes["stranger"].encode() + b"\n", b"a" * 999):
            assert b"PRIVATE" not in ask_signer(authority, line)
        assert authority.rows("SELECT * FROM certificates") == []
        # Another request, or another name, in the place of what was authorized.
        authority.rows(
            f"UPDATE requests SET pem = '{requests['stranger'].decode()}' WHERE sha256 = '{hashes['one']}'"
        )
        authority.rows(f"UPDATE requests SET client_id = 'admin' WHERE sha256 = '{hashes['two']}'")
        assert b"hash mismatch" in ask_signer(authority, hashes["one"].encode() + b"\n")
        assert b"no request of admin" in ask_signer(authority, hashes["two"].encode() + b"\n")
        assert authority.rows("SELECT * FROM certificates") == []


def test_a_signer_and_what_it_is_for_end_together(authority: RegistrationAuthority) -> None:
    """`serve` by itself: its signer is a child, which nobody else can ask."""
    with authority.serving() as server:
        assert server.daemon and server.daemon.process
        serving = server.daemon.process.pid
        (child,) = Path(f"/proc/{serving}/task/{serving}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        world.until("the server has ended", lambda: not server.daemon or not server.daemon.alive)
        assert "the signer has ended" in server.daemon.text()
    with authority.serving() as server:
        assert server.daemon and server.daemon.process
        serving = server.daemon.process.pid
        (child,) = Path(f"/proc/{serving}/task/{serving}/children").read_text().split()
        server.daemon.process.kill()
        # Whoever adopts it has to bury it: this process, after a test that made it a subreaper.
        world.until("the signer has ended", lambda: not world.strays() and not Path(f"/proc/{child}").exists())


@slow
def test_process_1_ends_at_sigterm(authority: RegistrationAuthority) -> None:
    require("mounts")
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    log = authority.folder / "alone.log"
    for command in (["serve", "--listen", f"127.0.0.1:{world.free_port()}"], ["work"]):
        with Daemon([*alone, COMMAND, "--config", authority.config, *command], log) as outer:
            assert outer.process
            of_outer = Path(f"/proc/{outer.process.pid}/task/{outer.process.pid}/children")
            world.until("it runs", of_outer.read_text)
            first = int(of_outer.read_text().split()[0])
            world.until("it has asked for signals", functools.partial(caught, first, signal.SIGTERM))
            os.kill(first, signal.SIGTERM)
            assert outer.process.wait(30) == 0


def test_a_signal_inside_of_a_callback_ends_it_too() -> None:
    """Python ignores what is raised there, as in the callbacks of fork."""
    program = """if True:
        import os, signal, time
        from caramel_authority import cli

        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, cli.end)
        os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM) or sum(range(9)))
        os.fork() or os._exit(0)
        time.sleep(60)
    """
    done = subprocess.run([BIN / "python", "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "Exception ignored" in done.stderr


def caught(process: int, number: int) -> bool:
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_who_gave_a_command_is_what_the_system_says(authority: RegistrationAuthority) -> None:
    lies = ["env", "SUDO_USER=somebody", "LOGNAME=somebody", "USER=somebody", "LNAME=somebody", "USERNAME=somebody"]
    authority.command("allow", "device", before=lies)
    (entry,) = authority.log("allowed")
    assert re.fullmatch(rf"administrator:(\S+ as )?{getpass.getuser()}", entry[1])


def test_who_is_nobody_else_in_a_user_namespace(authority: RegistrationAuthority) -> None:
    """There everybody may be root, and his own passwd(5) may say who that is."""
    authority.command("bar", "device", before=["unshare", "--user", "--map-root-user"])
    (entry,) = authority.log("barred")
    assert entry[1] == f"administrator:0 (user namespace of uid {os.getuid()})"


# --- The log ---


def test_what_is_logged_cant_be_changed_without_a_trace(tmp_path: Path) -> None:
    authority = with_socket(tmp_path)
    # A quiet fleet: nothing is signed, and the last decision is noted all the same.
    noted = authority.ca.with_name("log-entry")
    with signing(authority):
        authority.command("bar", "two")
        last = authority.rows("SELECT max(id) FROM log")[0][0]
        world.until("it is noted", lambda: noted.exists() and noted.read_text().startswith(f"{last} "))
    authority.command("allow", "three")
    assert re.match(
        r"\d+ entries, each follows from those before it: [0-9a-f]{64}\n", authority.command("log", "--verify")
    )
    whole = {path: path.read_bytes() for path in tmp_path.glob("state.db*")}
    entries = authority.rows("SELECT id, at, who, action, client_id, sha256, detail FROM log ORDER BY id")
    free = "DROP TRIGGER log_no_update; DROP TRIGGER log_no_delete;"
    forged, chain = [list(one) for one in entries], ""
    forged[0][2] = "administrator:somebody-else"
    rewritten = free
    for one in forged:
        chain = hashlib.sha256(json.dumps([chain, *one]).encode()).hexdigest()
        rewritten += f"UPDATE log SET who = '{one[2]}', chain = '{chain}' WHERE id = {one[0]};"
    for change, said in (
        (free + "UPDATE log SET who = 'x' WHERE id = 2", "entry 2 doesn't follow"),
        (free + "DELETE FROM log WHERE id = 2", "entry 3 doesn't follow"),
        (free + "DELETE FROM log WHERE id >= 3", "which the signer has seen, isn't there"),
        ("INSERT INTO log (at, who, action) VALUES (1, 'x', 'y')", "doesn't follow"),
        (rewritten, "is not the one that the signer has seen"),
    ):
        with contextlib.closing(sqlite3.connect(authority.state)) as database:
            database.executescript(change)
        assert said in authority.command("log", "--verify", status=1), change
        for path in tmp_path.glob("state.db*"):
            path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)
    # A damaged note is said, by the signer too, and is no end of its notes.
    for damaged in (b"", b"\xff", b"0", b"two words"):
        noted.write_bytes(damaged)
        said = authority.command("log", "--verify", status=1)
        assert said.startswith(f"caramel-authority: {noted} is damaged: remove it as root") and said.count("\n") == 1
    with signing(authority) as signer:
        world.until("it is said", lambda: "log-entry is damaged" in signer.text())
        noted.unlink()
        world.until("it is noted again", noted.exists)
    assert "each follows" in authority.command("log", "--verify")


# --- One CA follows another ---


def verified(leaf: bytes, *roots: bytes, strict: bool = True) -> bool:
    """What OpenSSL says to whoever knows these roots, with the chain that came."""
    with tempfile.TemporaryDirectory() as folder:
        known, shown = Path(folder) / "roots.pem", Path(folder) / "leaf.pem"
        known.write_bytes(b"".join(roots))
        shown.write_bytes(leaf)
        strictly = ["-x509_strict"] if strict else []
        said = openssl("verify", *strictly, "-CAfile", known, "-untrusted", shown, shown)
    return said.endswith(": OK\n")


@slow
def test_one_ca_follows_another(authority: RegistrationAuthority, tmp_path: Path) -> None:
    old, out = authority.ca.read_bytes(), tmp_path / "front.pem"
    make = ["server-certificate", "localhost", "--out", str(out)]
    authority.command("allow", "one", "two", "three", "four")

    def front() -> bytes:
        authority.command(*make)
        return re.sub(rb"(?s)-----BEGIN PRIVATE.*?\n-----END.*?\n", b"", out.read_bytes())

    with authority.serving() as server:
        assert "there is no next CA" in authority.command("ca-next", "--switch", status=1)
        said = authority.command("ca-next")
        assert re.search(r"^next .*\nbefore 20\d\d-\d\d-\d\d: ca-next --switch", said, re.M)
        both = server.get("/root.crt").body
        new = both.removeprefix(old)
        assert both == old + new == server.get("/bundle.crt").body
        leaf = server.enroll(csr("one")).body
        assert [verified(leaf, root) for root in (old, new)] == [True, False]

        authority.command("ca-next", "--switch")
        reply = server.enroll(csr("two"))
        assert len(reply.chain) == 2 and verified(reply.body, old) and verified(reply.body, new)
        assert not verified(reply.chain[0].public_bytes(serialization.Encoding.PEM), old)
        # The front stays with the old one, and whoever knows the new one only believes it too.
        assert verified(front(), old) and verified(front(), new)
        assert x509.load_pem_x509_certificates(front())[0].issuer == reply.chain[0].issuer
        assert server.get("/root.crt").body == old + new
        assert "one CA follows another" in authority.command("ca-next", status=1)

        authority.command("ca-next", "--finish")
        assert server.get("/root.crt").body == new == authority.ca.read_bytes()
        leaf = server.enroll(csr("three")).body
        assert [verified(leaf, root) for root in (old, new)] == [False, True]
        assert [verified(front(), root) for root in (old, new)] == [False, True]
        assert not list(authority.ca.parent.glob("old.*")) + list(authority.ca.parent.glob("next.*"))
    assert [row[2] for row in authority.log() if row[2].startswith("ca-")] == [
        "ca-created", "ca-next", "ca-switched", "ca-finished"]  # fmt: skip


def test_a_next_ca_that_cant_sign_is_not_switched_to(authority: RegistrationAuthority) -> None:
    """Devices would be told to come again until somebody looks."""
    next_ca = authority.ca.with_name("next.crt")
    for made, days, said in ((3, "100", "the next CA begins on "), (-4, "2", "the next CA has ended, on ")):
        authority.command("ca-next", "--days", days, before=at(made))
        assert said in (refused := authority.command("ca-next", "--switch", status=1)) and refused.count("\n") == 1
        next_ca.unlink()
    authority.command("allow", "device")
    with authority.serving() as server:
        assert server.enroll(csr("device")).status == 200
    authority.command("ca-next")
    authority.command("ca-next", "--switch")


@slow
def test_killed_at_any_step_there_is_a_ca_that_signs(authority: RegistrationAuthority) -> None:
    """Each command of a roll-over dies before it gives a file its name, at the first, at the second and so on. A
    server signs all the time, and the command given again ends what was begun.
    """
    require("strace")
    roots = [authority.ca.read_bytes()]
    names = "rename,renameat,renameat2,link,linkat,unlink,unlinkat"
    number = kills = 0
    with authority.serving() as server:
        for stage in ([], ["--switch"], ["--finish"]):
            died, at_call = True, 0
            while died:
                at_call += 1
                inject = f"--inject={names}:signal=SIGKILL:when={at_call}"
                trace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={names}", inject]
                done = subprocess.run(
                    [*trace, COMMAND, "--config", authority.config, "ca-next", *stage],
                    capture_output=True, timeout=60,
                )  # fmt: skip
                died = done.returncode < 0 or b"killed" in done.stderr.lower()
                kills += died
                number += 1
                roots.append(server.get("/root.crt").body)
                authority.command("allow", f"device-{number}")
                reply = server.enroll(csr(f"device-{number}"))
                assert reply.status == 200, (stage, at_call, reply)
                assert verified(reply.body, server.get("/root.crt").body)
                authority.command("server-certificate", "localhost", "--out", str(authority.folder / "front.pem"))
                if not died:
                    assert done.returncode in (0, 1), done
    assert kills > 6
    files = sorted(path.name for path in authority.ca.parent.iterdir() if not path.name.startswith("."))
    assert [name for name in files if name.startswith(("old", "next", "cross"))] == []
    assert len(x509.load_pem_x509_certificates(roots[-1])) == 1 and roots[-1] != roots[0]


def test_near_its_end_nothing_is_signed_at_each_question(tmp_path: Path) -> None:
    """A certificate that ends with the CA has no better one after it; a renewed CA makes one at once."""
    authority = RegistrationAuthority(tmp_path)
    authority.create_ca("--days", "3")
    authority.command("allow", "device")
    request = csr("device")
    with authority.serving() as server:
        first = server.enroll(request).body
    with authority.serving(before=at(2.95)) as server:
        assert [server.get(sha256(request)).body for _ in range(3)] == [first] * 3
        assert "LATE: before" in authority.command("ca-status", before=at(2.95))
        out = str(tmp_path / "front.pem")
        said = [authority.command("server-certificate", "localhost", "--out", out, before=at(2.95)) for _ in "12"]
        assert ["made" in said[0], "still good" in said[1]] == [True, True]
        assert "the CA ends soon: ca-next" in said[1]
        authority.command("ca-renew", "--days", "30", before=at(2.95))
        assert server.get(sha256(request)).body != first


@slow
def test_a_new_key_under_somebody_elses_ca(tmp_path: Path) -> None:
    """ca-request --replace: the CA goes on until ca-install. What is no CA, or has ended, is refused."""
    authority = RegistrationAuthority(tmp_path / "authority")
    key, root, request, made = (tmp_path / name for name in ("root.key", "root.crt", "ours.csr", "ours.crt"))
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key]
    openssl("req", "-x509", *new, "-days", 30, "-subj", "/C=SE/O=Above/CN=Above Root", "-out", root)

    def installed(*options: object, status: int = 0, replace: bool = False) -> str:
        ask = ["ca-request", "--subject", "C=SE,O=Below,CN=Below", *(["--replace"] if replace else [])]
        request.write_text(authority.command(*ask))
        by = ["-CA", root, "-CAkey", key, *options]
        openssl("x509", "-req", "-in", request, *by, "-out", made)
        made.write_bytes(made.read_bytes() + root.read_bytes())
        return authority.command("ca-install", str(made), status=status)

    good = ["-days", 20, "-copy_extensions", "copyall"]
    assert "is no CA" in installed("-days", 20, status=1)
    assert "has ended" in installed("-days", -1, "-copy_extensions", "copyall", status=1)
    assert not authority.ca.exists()
    installed(*good)
    first = authority.ca.read_bytes()
    authority.command("allow", "one", "two", "three")
    with authority.serving() as server:
        assert "is no CA" in installed("-days", 20, status=1, replace=True)
        assert (authority.ca.read_bytes(), server.enroll(csr("one", subject=BELOW)).status) == (first, 200)
        assert "it signs from now on" in installed(*good, replace=True)
        reply = server.enroll(csr("two", subject=[*BELOW[:-1], ("CN", "two")]))
        assert verified(reply.body, root.read_bytes(), strict=False) and authority.ca.read_bytes() != first
        # Another root, which devices have to learn first: it is the next CA.
        openssl("req", "-x509", *new, "-days", 30, "-subj", "/C=SE/O=Other/CN=Other Root", "-out", root)
        assert "it is the next CA" in installed(*good, replace=True)
        assert len(x509.load_pem_x509_certificates(server.get("/root.crt").body)) == 2
        authority.command("ca-next", "--switch")
        reply = server.enroll(csr("three", subject=[*BELOW[:-1], ("CN", "three")]))
        assert verified(reply.body, root.read_bytes(), strict=False)


@slow
@pytest.mark.parametrize("meanwhile", [["ca-next"], ["ca-create", "--subject", "CN=Other", "--replace"]])
def test_a_request_that_is_at_another_ca_keeps_its_key(
    authority: RegistrationAuthority, tmp_path: Path, meanwhile: list[str]
) -> None:
    """Whatever is done meanwhile, and whatever it ends with: its certificate is of use only with that key."""
    key, root, request, made = (tmp_path / name for name in ("root.key", "root.crt", "ours.csr", "ours.crt"))
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key]
    openssl("req", "-x509", *new, "-days", 30, "-subj", "/C=SE/O=Above/CN=Above Root", "-out", root)
    ask = ["ca-request", "--replace", "--subject", "C=SE,O=Below,CN=Below"]
    request.write_text(authority.command(*ask))
    assert "request.key waits for ca-install" in authority.command(*ask, "--key-type", "rsa-2048", status=1)
    authority.command(*meanwhile)
    by = ["-CA", root, "-CAkey", key, "-days", 20, "-copy_extensions", "copyall"]
    openssl("x509", "-req", "-in", request, *by, "-out", made)
    made.write_bytes(made.read_bytes() + root.read_bytes())
    if meanwhile == ["ca-next"]:
        # The next CA may be in firmware: it is not thrown away either.
        before = (authority.folder / "ca" / "next.crt").read_bytes()
        assert "one CA follows another now" in authority.command("ca-install", str(made), status=1)
        assert before == (authority.folder / "ca" / "next.crt").read_bytes()
        for stage in ("--switch", "--finish"):
            authority.command("ca-next", stage)
    authority.command("ca-install", str(made))
    authority.command("ca-next", "--switch")
    authority.command("allow", "one")
    with authority.serving() as server:
        reply = server.enroll(csr("one", subject=BELOW))
        assert reply.status == 200 and reply.chain[1:]
        assert verified(reply.body, root.read_bytes(), strict=False)
    assert not list((authority.folder / "ca").glob("request.*"))


BELOW: world.Subject = (("C", "SE"), ("O", "Below"), ("CN", "one"))
