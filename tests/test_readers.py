"""Who can use the file: other programs, each with the file as the program left it, without any conversion."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Union

import pytest
import world
from needs import needs, require
from world import Authority, Caramel, Daemon, Device, Front, Nginx, any_front

ID = "localhost"  # so that it can be a server's certificate as well


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory, caramel: Caramel, front: Front) -> Device:
    """A device that has its certificate."""
    ours = Device(tmp_path_factory.mktemp("device"), front.address, caramel.authority.certificate_file, ID)
    assert ours.run().status == 69
    caramel.sign(ours.request_hash())
    assert ours.run().status == 0
    return ours


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory, caramel: Caramel, authority: Authority) -> Iterator[Front]:
    """A server that lets nobody in without a certificate by the CA."""
    certificate = authority.server(file="strict.pem")
    with any_front(tmp_path_factory.mktemp("strict"), caramel, certificate, demand=True) as server:
        yield server


def run(*line: Union[str, Path], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    require(str(line[0]))
    words = [str(word) for word in line]
    return subprocess.run(words, input=stdin, capture_output=True, env=world.environment(), timeout=60)


def test_curl(device: Device, strict: Front, authority: Authority) -> None:
    url, ca = f"https://{strict.address}/root.crt", authority.certificate_file
    assert run("curl", "-sSf", "--cacert", ca, url).returncode != 0, "without one it is not let in"
    got = run("curl", "-sSf", "--cacert", ca, "--cert", device.key_file, url)
    assert got.stdout == authority.pem, got.stderr
    both = run("curl", "-sSf", "--cacert", ca, "--cert", device.key_file, "--key", device.key_file, url)
    assert both.stdout == authority.pem


def test_wget(device: Device, strict: Front, authority: Authority) -> None:
    """Debian's is built with GnuTLS."""
    ca = f"--ca-certificate={authority.certificate_file}"
    pair = [f"--certificate={device.key_file}", f"--private-key={device.key_file}"]
    got = run("wget", "-q", "-O", "-", "--no-hsts", ca, *pair, f"https://{strict.address}/root.crt")
    assert got.stdout == authority.pem, got.stderr


def test_gnutls(device: Device, strict: Front, authority: Authority) -> None:
    got = run(
        "gnutls-cli",
        *("--x509cafile", authority.certificate_file, "--port", str(strict.port), "localhost"),
        *("--x509certfile", device.key_file, "--x509keyfile", device.key_file, "--logfile", "/dev/null"),
        stdin=b"GET /root.crt HTTP/1.0\r\n\r\n",
    )
    assert authority.pem in got.stdout.replace(b"\r\n", b"\n"), got


@needs("nginx", "curl")
def test_nginx_as_a_server(device: Device, caramel: Caramel, authority: Authority, tmp_path: Path) -> None:
    with Nginx(tmp_path, caramel, device.key_file) as server:
        got = run("curl", "-sSf", "--cacert", authority.certificate_file, f"https://{server.address}/root.crt")
    assert got.stdout == authority.pem, got.stderr


@needs("nginx", "curl")
def test_nginx_as_a_client(device: Device, strict: Front, authority: Authority, tmp_path: Path) -> None:
    """proxy_ssl_certificate: a gateway on the device that speaks to its server."""
    lines = (
        f"location /upstream/ {{ proxy_pass https://{strict.address}/; proxy_ssl_certificate {device.key_file};"
        f" proxy_ssl_certificate_key {device.key_file}; proxy_ssl_trusted_certificate {authority.certificate_file};"
        " proxy_ssl_verify on; proxy_ssl_name localhost; }"
    )
    with Nginx(
        tmp_path, None, authority.server(file="gateway.pem"), verify_client=None, server_lines=lines
    ) as gateway:
        url = f"https://{gateway.address}/upstream/root.crt"
        got = run("curl", "-sSf", "--cacert", authority.certificate_file, url)
    assert got.stdout == authority.pem, got.stderr


def test_openssl_reads_every_part(device: Device, authority: Authority) -> None:
    file, ca = device.key_file, authority.certificate_file
    moduli = {
        run("openssl", *command, "-noout", "-modulus", "-in", file).stdout for command in (["x509"], ["rsa"], ["req"])
    }
    assert len(moduli) == 1 and moduli.pop().startswith(b"Modulus=")
    assert b"OK" in run("openssl", "verify", "-CAfile", ca, file).stdout
    assert run("openssl", "pkey", "-check", "-noout", "-in", file).returncode == 0
    assert run("openssl", "req", "-verify", "-noout", "-in", file).returncode == 0
    assert run("openssl", "x509", "-checkend", "3600", "-noout", "-in", file).returncode == 0


def test_openssl_s_client(device: Device, strict: Front, authority: Authority) -> None:
    got = run(
        *("openssl", "s_client", "-quiet", "-verify_return_error", "-connect", strict.address),
        *("-CAfile", authority.certificate_file, "-cert", device.key_file, "-key", device.key_file),
        stdin=b"GET /root.crt HTTP/1.0\r\n\r\n",
    )
    assert authority.pem in got.stdout, got.stderr


@needs("openssl", "curl")
def test_openssl_s_server(device: Device, authority: Authority, tmp_path: Path) -> None:
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
    ]
    with Daemon([*line, "-www"], tmp_path / "output") as server:
        url, ca = f"https://localhost:{port}/", authority.certificate_file
        world.until(
            "it answers", lambda: run("curl", "-sSf", "--cacert", ca, url).returncode == 0 or not server.alive
        )
        assert server.alive, server.text()


def test_python(device: Device, strict: Front, authority: Authority) -> None:
    context = ssl.create_default_context(cafile=str(authority.certificate_file))
    context.load_cert_chain(str(device.key_file))
    plain = socket.create_connection(("localhost", strict.port), 30)
    with context.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(b"GET /root.crt HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert authority.pem in answer


def test_the_shell_finds_out_how_long_it_is_good(device: Device) -> None:
    got = run("openssl", "x509", "-noout", "-enddate", "-subject", "-in", device.key_file)
    # Debian 12's openssl(1) puts spaces around the sign, Debian 13's doesn't.
    assert b"notAfter=" in got.stdout and b"CN=localhost" in got.stdout.replace(b" = ", b"=")
