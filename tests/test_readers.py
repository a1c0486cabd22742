"""Who can use the file: other programs, each with the file as the program left it, without any conversion.

Each of them twice: with a certificate of the CA that both sides know, and with one of an intermediate CA that only
the file has. Then the other side knows who it is only if the program has read the chain as well, and sends it.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import pytest
import world
from needs import needs, require
from world import Authority, Caramel, Daemon, Device, Front, Nginx, Scripted, TlsFront, answers

ID = "localhost"  # so that it can be a server's certificate as well


@dataclass(frozen=True)
class Issued:
    """A device that has its certificate, and the CA that everybody knows."""

    device: Device
    root: Authority


@pytest.fixture(scope="module", params=["a certificate", "a chain"])
def issued(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, caramel: Caramel, front: Front
) -> Issued:
    folder = tmp_path_factory.mktemp("device")
    if request.param == "a certificate":
        ours = Device(folder, front.address, caramel.authority.certificate_file, ID)
        assert ours.run().status == 69
        caramel.sign(ours.request_hash())
        assert ours.run().status == 0
        return Issued(ours, caramel.authority)
    root = Authority(tmp_path_factory.mktemp("root"), path_length=None)
    below, intermediate = root.intermediate("Example Intermediate CA")
    ours = Device(folder, None, root.certificate_file, ID)
    ours.has(root.identity(ID, certified=False))
    with Scripted(root.server(), [answers.certificate(below.sign(ours.request) + intermediate)]) as server:
        ours.server = server.address
        assert ours.run().status == 0
    assert ours.labels == ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE", "NEW CERTIFICATE REQUEST"]
    return Issued(ours, root)


@pytest.fixture(scope="module")
def device(issued: Issued) -> Device:
    return issued.device


@pytest.fixture(scope="module")
def root(issued: Issued) -> Authority:
    return issued.root


@pytest.fixture(scope="module")
def text(caramel: Caramel) -> bytes:
    """What the servers here give to whom they let in."""
    return caramel.authority.pem


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, caramel: Caramel, root: Authority) -> Iterator[Front]:
    """A server that lets nobody in without a certificate under the CA that everybody knows."""
    folder, certificate = tmp_path_factory.mktemp("strict"), root.server(file="strict.pem")
    ca = root.certificate_file
    front: Front = TlsFront(caramel, certificate, client_ca=ca, demand=True)
    if Nginx.program():
        front = Nginx(folder, caramel, certificate, verify_client="on", client_ca=ca)
    with front:
        yield front


def chain(device: Device) -> list[Union[str, Path]]:
    """What openssl(1) has to be told where the key file has more than the device's own certificate."""
    return ["-cert_chain", device.key_file] if device.labels.count("CERTIFICATE") > 1 else []


def run(*line: Union[str, Path], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    require(str(line[0]))
    words = [str(word) for word in line]
    return subprocess.run(words, input=stdin, capture_output=True, env=world.environment(), timeout=60)


def test_curl(device: Device, strict: Front, root: Authority, text: bytes) -> None:
    url, ca = f"https://{strict.address}/root.crt", root.certificate_file
    assert run("curl", "-sSf", "--cacert", ca, url).returncode != 0, "without one it is not let in"
    got = run("curl", "-sSf", "--cacert", ca, "--cert", device.key_file, url)
    assert got.stdout == text, got.stderr
    both = run("curl", "-sSf", "--cacert", ca, "--cert", device.key_file, "--key", device.key_file, url)
    assert both.stdout == text


def test_wget(device: Device, strict: Front, root: Authority, text: bytes) -> None:
    """Debian's is built with GnuTLS."""
    ca = f"--ca-certificate={root.certificate_file}"
    pair = [f"--certificate={device.key_file}", f"--private-key={device.key_file}"]
    got = run("wget", "-q", "-O", "-", "--no-hsts", ca, *pair, f"https://{strict.address}/root.crt")
    assert got.stdout == text, got.stderr


def test_gnutls(device: Device, strict: Front, root: Authority, text: bytes) -> None:
    got = run(
        "gnutls-cli",
        *("--x509cafile", root.certificate_file, "--port", str(strict.port), "localhost"),
        *("--x509certfile", device.key_file, "--x509keyfile", device.key_file, "--logfile", "/dev/null"),
        stdin=b"GET /root.crt HTTP/1.0\r\n\r\n",
    )
    assert text in got.stdout.replace(b"\r\n", b"\n"), got


@needs("nginx", "curl")
def test_nginx_as_a_server(device: Device, caramel: Caramel, root: Authority, text: bytes, tmp_path: Path) -> None:
    with Nginx(tmp_path, caramel, device.key_file) as server:
        got = run("curl", "-sSf", "--cacert", root.certificate_file, f"https://{server.address}/root.crt")
    assert got.stdout == text, got.stderr


@needs("nginx", "curl")
def test_nginx_as_a_client(device: Device, strict: Front, root: Authority, text: bytes, tmp_path: Path) -> None:
    """proxy_ssl_certificate: a gateway on the device that speaks to its server."""
    lines = (
        f"location /upstream/ {{ proxy_pass https://{strict.address}/; proxy_ssl_certificate {device.key_file};"
        f" proxy_ssl_certificate_key {device.key_file}; proxy_ssl_trusted_certificate {root.certificate_file};"
        " proxy_ssl_verify on; proxy_ssl_name localhost; }"
    )
    with Nginx(tmp_path, None, root.server(file="gateway.pem"), verify_client=None, server_lines=lines) as gateway:
        url = f"https://{gateway.address}/upstream/root.crt"
        got = run("curl", "-sSf", "--cacert", root.certificate_file, url)
    assert got.stdout == text, got.stderr


def test_openssl_reads_every_part(device: Device, root: Authority) -> None:
    file, ca = device.key_file, root.certificate_file
    moduli = {
        run("openssl", *command, "-noout", "-modulus", "-in", file).stdout for command in (["x509"], ["rsa"], ["req"])
    }
    assert len(moduli) == 1 and moduli.pop().startswith(b"Modulus=")
    assert b"OK" in run("openssl", "verify", "-CAfile", ca, "-untrusted", file, file).stdout
    assert run("openssl", "pkey", "-check", "-noout", "-in", file).returncode == 0
    assert run("openssl", "req", "-verify", "-noout", "-in", file).returncode == 0
    assert run("openssl", "x509", "-checkend", "3600", "-noout", "-in", file).returncode == 0


def test_openssl_s_client(device: Device, strict: Front, root: Authority, text: bytes) -> None:
    got = run(
        *("openssl", "s_client", "-quiet", "-verify_return_error", "-connect", strict.address),
        *("-CAfile", root.certificate_file, "-cert", device.key_file, "-key", device.key_file),
        *chain(device),
        stdin=b"GET /root.crt HTTP/1.0\r\n\r\n",
    )
    assert text in got.stdout, got.stderr


@needs("openssl", "curl")
def test_openssl_s_server(device: Device, root: Authority, tmp_path: Path) -> None:
    port = world.free_port()
    line: list[Union[str, Path]] = [
        "openssl",
        "s_server",
        "-accept",
        f"127.0.0.1:{port}",
        "-cert",
        device.key_file,
        "-key",
        device.key_file,
        *chain(device),
    ]
    with Daemon([*line, "-www"], tmp_path / "output") as server:
        url, ca = f"https://localhost:{port}/", root.certificate_file
        world.until(
            "it answers", lambda: run("curl", "-sSf", "--cacert", ca, url).returncode == 0 or not server.alive
        )
        assert server.alive, server.text()


@needs("mosquitto", "mosquitto_sub", "mosquitto_pub")
def test_mosquitto(device: Device, root: Authority, tmp_path: Path) -> None:
    """As broker, as bridge to it, and the two clients."""
    file, ca, port, local = device.key_file, root.certificate_file, world.free_port(), world.free_port()
    common = "allow_anonymous true\nuser root\nlog_dest stdout\n"
    broker, bridge = tmp_path / "broker.conf", tmp_path / "bridge.conf"
    broker.write_text(
        f"{common}listener {port} 127.0.0.1\ncafile {ca}\ncertfile {file}\nkeyfile {file}\nrequire_certificate true\n"
    )
    bridge.write_text(
        f"{common}listener {local} 127.0.0.1\nconnection upstream\naddress localhost:{port}\ntopic # out 1\n"
        f"bridge_cafile {ca}\nbridge_certfile {file}\nbridge_keyfile {file}\nrestart_timeout 1\n"
    )
    upstream = ["-h", "localhost", "-p", str(port), "--cafile", str(ca), "--cert", str(file), "--key", str(file)]
    with Daemon(["mosquitto", "-c", broker], tmp_path / "broker.log") as server:
        world.until("the broker listens", lambda: world.listens(port) or not server.alive)
        assert server.alive, server.text()
        assert run("mosquitto_pub", *upstream[:6], "-t", "a", "-m", "b").returncode != 0, "not let in without one"
        done = run("mosquitto_pub", *upstream, "-t", "client", "-m", "hello", "-r", "-q", "1")
        assert done.returncode == 0, (done, server.text())
        with Daemon(["mosquitto", "-c", bridge], tmp_path / "bridge.log") as other:
            world.until("the bridge listens", lambda: world.listens(local) or not other.alive)
            done = run("mosquitto_pub", "-p", str(local), "-t", "bridge", "-m", "hello", "-r", "-q", "1")
            assert done.returncode == 0, (done, other.text())
            got = run("mosquitto_sub", *upstream, "-t", "#", "-C", "2", "-W", "20", "-F", "%t:%p")
            assert set(got.stdout.split()) == {b"client:hello", b"bridge:hello"}, (got, other.text())


@needs("stunnel4", "curl")
def test_stunnel(device: Device, strict: Front, root: Authority, text: bytes, tmp_path: Path) -> None:
    """As a server, and behind it as a client."""
    port, between, configuration = world.free_port(), world.free_port(), tmp_path / "stunnel.conf"
    configuration.write_text(
        f"foreground = yes\npid =\ncert = {device.key_file}\nCAfile = {root.certificate_file}\n"
        f"[server]\naccept = 127.0.0.1:{port}\nconnect = 127.0.0.1:{between}\n"
        f"[client]\nclient = yes\nverifyChain = yes\naccept = 127.0.0.1:{between}\n"
        f"connect = localhost:{strict.port}\n"
    )
    with Daemon(["stunnel4", configuration], tmp_path / "stunnel.log") as server:
        world.until("stunnel listens", lambda: world.listens(port) or not server.alive)
        assert server.alive, server.text()
        got = run("curl", "-sSf", "--cacert", root.certificate_file, f"https://localhost:{port}/root.crt")
    assert got.stdout == text, (got, server.text())


def test_python(device: Device, strict: Front, root: Authority, text: bytes) -> None:
    context = ssl.create_default_context(cafile=str(root.certificate_file))
    context.load_cert_chain(str(device.key_file))
    plain = socket.create_connection(("localhost", strict.port), 30)
    with context.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(b"GET /root.crt HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert text in answer


def test_the_shell_finds_out_how_long_it_is_good(device: Device) -> None:
    got = run("openssl", "x509", "-noout", "-enddate", "-subject", "-in", device.key_file)
    # Debian 12's openssl(1) puts spaces around the sign, Debian 13's doesn't.
    assert b"notAfter=" in got.stdout and b"CN=localhost" in got.stdout.replace(b" = ", b"=")
