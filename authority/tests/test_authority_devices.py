# SPDX-License-Identifier: MIT OR Apache-2.0
"""Devices: the installed program and the authority, with nginx between them as the authority's file configures it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest
import world
from authority_world import (
    BIN,
    DEPLOY,
    ZONE,
    Front,
    Knot,
    Pebble,
    RegistrationAuthority,
    Server,
    at,
    behind_tls,
)
from cryptography import x509
from needs import needs, require, slow
from world import Device, Tpm, keys_in

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl", "nginx"), slow]

EC = ("--key-type", "ec-p256")


def device_of(tmp_path: Path, front: Front, ca: Path, client_id: str = "fffbeec0ffee") -> Device:
    return Device(tmp_path / client_id, front.address, ca, client_id)


# --- A CA of one's own ---


@pytest.mark.parametrize("ca", ["ec-p256", "rsa-2048"])
@pytest.mark.parametrize("key", ["ec-p256", "rsa-2048"])
def test_a_life(tmp_path: Path, ca: str, key: str) -> None:
    authority = RegistrationAuthority(tmp_path / "authority")
    authority.create_ca("--key-type", ca)
    options = ("--key-type", key)
    with behind_tls(authority) as front:
        device = device_of(tmp_path, front, authority.ca)
        assert device.run(*options).status == 69
        assert device.run(*options).status == 69
        authority.command("authorize", "fffbeec0ffee")
        assert device.run(*options).status == 0
        before = device.snapshot()
        assert device.run(*options).status == 0
        assert device.snapshot() == before
        assert front.seen() == ["GET 404", "POST 202", "GET 202", "GET 202", "GET 200", "GET 304"]
        first = device.block("PRIVATE KEY")
        authority.command("reject", "fffbeec0ffee")
        assert device.run(*options).status == 69
        assert device.block("PRIVATE KEY") != first and device.certificate is None
        authority.command("authorize", "fffbeec0ffee")
        assert device.run(*options).status == 0
        assert device.certificate


@needs("trixie")
def test_a_life_with_a_key_in_a_tpm(authority: RegistrationAuthority, tmp_path: Path) -> None:
    with Tpm(tmp_path / "chip") as chip, behind_tls(authority) as front:
        device = keys_in(chip, device_of(tmp_path, front, authority.ca), "ec-p256")
        assert device.run().status == 69
        authority.command("authorize", "fffbeec0ffee")
        assert device.run().status == 0
        before = device.snapshot()
        assert device.run().status == 0 and device.snapshot() == before
        assert front.seen() == ["GET 404", "POST 202", "GET 202", "GET 200", "GET 304"]
        first = device.block(chip.label)
        authority.command("reject", "fffbeec0ffee")
        assert device.run().status == 69
        assert device.block(chip.label) not in (first, None)
        authority.command("authorize", "fffbeec0ffee")
        assert device.run().status == 0 and chip.attacks == 0


def test_a_device_on_the_list_has_its_certificate_in_its_first_run(
    authority: RegistrationAuthority, tmp_path: Path
) -> None:
    authority.command("allow", "fffbeec0ffee")
    with behind_tls(authority) as front:
        assert device_of(tmp_path, front, authority.ca).run(*EC).status == 0
        assert front.seen() == ["GET 404", "POST 202", "GET 200"]


def test_how_long_to_wait_is_told(authority: RegistrationAuthority, tmp_path: Path) -> None:
    with behind_tls(authority) as front:
        run = device_of(tmp_path, front, authority.ca).run(*EC, "--json")
    assert run.status == 69
    assert json.loads(run.out)["retry_after"] == 900


def test_renewed_by_itself(authority: RegistrationAuthority, tmp_path: Path) -> None:
    authority.command("allow", "fffbeec0ffee")
    with behind_tls(authority) as front:
        device = device_of(tmp_path, front, authority.ca)
        assert device.run(*EC).status == 0
        first = device.certificate
    for days in (5, 10, 30):  # the last one after three weeks in a drawer
        with behind_tls(authority, before=at(days)) as front:
            device.server = front.address
            assert device.run(*EC, before=at(days)).status == 0
        assert first and device.certificate
        assert device.certificate.serial_number > first.serial_number
        first = device.certificate


def test_a_name_in_the_certificate(tmp_path: Path) -> None:
    folder = f'folder = "{tmp_path}/authority/ca"\nusages = ["client", "server"]\n'
    authority = RegistrationAuthority(tmp_path / "authority", f"[ca]\n{folder}[rules]\nzone = '{ZONE}'\n")
    authority.create_ca()
    with behind_tls(authority) as front:
        device = device_of(tmp_path, front, authority.ca, f"fffbeec0ffee.{ZONE}")
        assert device.run(*EC).status == 0
    assert device.certificate
    names = device.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [f"fffbeec0ffee.{ZONE}"]


def test_under_an_intermediate(tmp_path: Path) -> None:
    """The device knows the root only, and stores the chain."""
    authority = RegistrationAuthority(tmp_path / "authority", "[rules]\nuuids = true\n")
    request, root, key, chain = (tmp_path / name for name in ("ca.csr", "root.crt", "root.key", "chain.crt"))
    request.write_text(authority.command("ca-request", "--subject", "C=SE,O=Example,CN=Example Intermediate"))
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key]
    by = ["-CA", root, "-CAkey", key, "-days", "20", "-copy_extensions", "copyall"]
    for command in (
        ["req", "-x509", *new, "-days", "30", "-subj", "/C=SE/O=Example/CN=Example Root", "-out", root],
        ["x509", "-req", "-in", request, *by, "-out", chain],
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True, timeout=30)
    chain.write_bytes(chain.read_bytes() + root.read_bytes())
    authority.command("ca-install", str(chain))
    with behind_tls(authority) as front:
        device = device_of(tmp_path, front, root, "0b6c1a52-94ef-4c6e-9d5b-6f2c8f0e7a31")
        run = device.run(*EC)
        assert run.status == 0, run.err
        assert device.run(*EC).status == 0
    assert device.labels == ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE", "NEW CERTIFICATE REQUEST"]


# --- An ACME CA ---


def test_a_public_ca(tmp_path: Path) -> None:
    """Two CAs: the maker's own signs the front, the ACME CA signs the device."""
    require("pebble", "knotd", "kdig")
    own = world.Authority(tmp_path / "own")
    client_id = f"fffbeec0ffee.{ZONE}"
    with Knot(tmp_path / "knot") as knot, Pebble(tmp_path / "pebble", knot, PEBBLE_CHAIN_LENGTH="2") as pebble:
        folder = tmp_path / "authority"
        settings = f'[rules]\nzone = "{ZONE}"\n' + pebble.settings(folder) + knot.settings
        authority = RegistrationAuthority(folder, settings, signer="acme")
        with (
            authority.serving(options=["--behind-proxy"]) as server,
            Front(tmp_path / "front", own.server(), server.port) as front,
        ):
            device = device_of(tmp_path, front, own.certificate_file, client_id)
            options = (*EC, "--identity-ca", str(pebble.roots))
            assert device.run(*options).status == 69
            authority.command("work", "--once")
            run = device.run(*options)
            assert run.status == 0, run.err
            assert device.labels == ["PRIVATE KEY", *3 * ["CERTIFICATE"], "NEW CERTIFICATE REQUEST"]
            before = device.snapshot()
            assert device.run(*options).status == 0
            assert device.snapshot() == before
            assert front.seen()[-2:] == ["GET 200", "GET 304"]


# --- The maker's own services ---


def test_a_certificate_that_is_no_longer_accepted(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """The README's lines for the maker's nginx: who was rejected is refused while the certificate is still valid."""
    readme = (DEPLOY.parent / "README.md").read_text()
    (configuration,) = re.findall(r"```nginx\n(.*?)```", readme, re.S)
    configuration = configuration.replace("/etc/caramel-authority/root.crt", str(authority.ca))
    authority.command("allow", "good", "stolen")
    (tmp_path / "site").mkdir()
    with behind_tls(authority) as front, authority.serving() as server:
        certificate = authority.folder / "front.pem"
        with Front(tmp_path / "maker", certificate, server.port, configuration) as maker:
            (tmp_path / "maker" / "html").mkdir()
            (tmp_path / "maker" / "html" / "index.html").write_text("hello device")

            def visit(device: Device) -> str:
                command = ["curl", "-sS", "--cacert", str(authority.ca), "-o", "/dev/null", "-w", "%{http_code}"]
                both = ["--cert", str(device.key_file), "--key", str(device.key_file)]
                address = f"https://localhost:{maker.port}/"
                return subprocess.run([*command, *both, address], capture_output=True, text=True, timeout=20).stdout

            devices = [device_of(tmp_path, front, authority.ca, name) for name in ("good", "stolen")]
            for device in devices:
                assert device.run(*EC).status == 0
            assert [visit(device) for device in devices] == ["200", "200"]
            authority.command("reject", "stolen")
            assert [visit(device) for device in devices] == ["200", "403"]
            authority.command("minimum-serial", "--now")
            assert [visit(device) for device in devices] == ["403", "403"]
            assert [device.run(*EC).status for device in devices] == [0, 69]
            assert visit(devices[0]) == "200"


# --- What is installed ---


@pytest.mark.parametrize("unit", sorted(path.name for path in DEPLOY.glob("*.service")))
def test_hardened(unit: str) -> None:
    require("systemd")
    command = ["systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=20", str(DEPLOY / unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout
    assert re.search(r"Overall exposure level for \S+: [01]\.\d (OK|SAFE)", done.stdout)


def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    require("systemd")
    folder = tmp_path / "usr/lib/systemd/system"
    folder.mkdir(parents=True)
    program = tmp_path / "opt/caramel-authority/bin/caramel-authority"
    for path in (program, tmp_path / "usr/bin/systemctl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/true\n")
        path.chmod(0o755)
    for name in ("network-online", "timers", "sysinit", "shutdown", "basic", "multi-user", "network"):
        (folder / f"{name}.target").write_text("[Unit]\nDescription=stub\n")
    names = sorted(path.name for path in DEPLOY.iterdir() if path.suffix in (".service", ".timer"))
    assert len(names) == 5
    for name in names:
        (folder / name).write_text((DEPLOY / name).read_text())
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={tmp_path}", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_example_says_what_is_the_default(tmp_path: Path) -> None:
    """Every line that is commented out, put in force, changes nothing; and none is missing. What is in force is for
    the units.
    """
    text = (DEPLOY / "caramel-authority.toml").read_text()
    units = dict(re.findall(r'^([a-z_]+) = "(.*)"$', text, re.M))
    assert sorted(units) == ["folder", "refusals", "signer_socket"]
    text = re.sub(r"^#(?=[a-z_]+ = )", "", text, flags=re.M)
    (tmp_path / "all.toml").write_text(text)
    program = """
import dataclasses, sys, tomllib
from caramel_authority.configuration import Configuration

def names(settings):
    values = {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)}
    return {name: names(one) if dataclasses.is_dataclass(one) else None for name, one in values.items()}

def keys(table):
    return {name: keys(one) if isinstance(one, dict) else None for name, one in table.items()}

read = Configuration.read(sys.argv[1])
ca = dataclasses.replace(read.ca, folder=Configuration().ca.folder, signer_socket="")
assert dataclasses.replace(read, refusals="", ca=ca) == Configuration()
with open(sys.argv[1], "rb") as file:
    assert keys(tomllib.load(file)) == names(Configuration())
"""
    command = [str(BIN / "python"), "-c", program, str(tmp_path / "all.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr


def test_a_header_byte_by_byte_is_not_waited_for(tmp_path: Path, server: Server) -> None:
    own = world.Authority(tmp_path / "own")
    text = (DEPLOY / "nginx.conf").read_text()
    assert "client_header_timeout 10s;" in text
    text = text.replace("client_header_timeout 10s;", "client_header_timeout 2s;")
    with Front(tmp_path / "front", own.server(), server.port, text) as front:
        context = ssl.create_default_context(cafile=str(own.certificate_file))
        with (
            socket.create_connection(("127.0.0.1", front.port), 10) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as slow,
        ):
            slow.settimeout(0.2)
            begun = time.monotonic()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, ssl.SSLError):
                while time.monotonic() - begun < 50:
                    slow.sendall(b"G")
                    with contextlib.suppress(TimeoutError):
                        if not slow.recv(1000):
                            break
            assert 1 < time.monotonic() - begun < 40  # nginx's own limit is 60 s


def test_strangers_that_are_slow_hold_up_no_device(authority: RegistrationAuthority) -> None:
    """As many connections as one address may have, and headers that never end: the front cuts them by itself."""
    context = ssl.create_default_context(cafile=str(authority.ca))
    with behind_tls(authority) as front, contextlib.ExitStack() as held:

        def connect(address: str = "127.0.0.2") -> ssl.SSLSocket:
            plain = socket.create_connection(("127.0.0.1", front.port), 30, (address, 0))
            return held.enter_context(context.wrap_socket(plain, server_hostname="localhost"))

        def answer(to: ssl.SSLSocket) -> bytes:
            to.sendall(b"GET /root.crt HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return b"".join(iter(lambda: to.recv(4096), b"")).split(b"\r\n")[0]

        slow = connect()
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        # A connection counts from when its header has been read: these hold their bodies back.
        for _ in range(100):
            connect().sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        world.until("all are counted", lambda: b" 503 " in answer(connect()))
        assert answer(connect("127.0.0.1")) == b"HTTP/1.1 200 OK"
        # Nothing is said any more, and nothing waited for: reset, or closed.
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(1) in (b"", b"H")
