"""Who can use the file: other programs, each with the file as the program left it, without any conversion.

More of them, through a renewal, are in test_recipes.py.

Each of them twice: with a certificate of the CA that both sides know, and with one of an intermediate CA that only
the file has. Then the other side knows who it is only if the program has read the chain as well, and sends it.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import pytest
import world
from needs import needs, require
from talking import Talking
from world import Authority, Caramel, Device, Front, Nginx, TlsFront, answers

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
        device = Device(folder, front.address, caramel.authority.certificate_file, ID)
        assert device.run().status == 69
        caramel.sign(device.request_hash())
        assert device.run().status == 0
        return Issued(device, caramel.authority)
    root = Authority(tmp_path_factory.mktemp("root"), path_length=None)
    below, intermediate = root.intermediate("Example Intermediate CA")
    ours = Talking(folder, root, ID)
    ours.pending()
    assert ours.hears(answers.certificate(below.sign(ours.request) + intermediate)).status == 0
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


def run(*line: Union[str, Path], stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    require(str(line[0]))
    words = [str(word) for word in line]
    return subprocess.run(words, input=stdin, capture_output=True, env=world.environment(), timeout=60)


REQUEST = b"GET /root.crt HTTP/1.0\r\n\r\n"
#: By program: the line with which it reads /root.crt with the file as certificate and key, or without.
CLIENTS: dict[str, Callable[[Path, Path, int], list[Union[str, Path]]]] = {
    "curl": lambda file, ca, port: [
        *("curl", "-sSf", "--cacert", ca, f"https://localhost:{port}/root.crt"),
        *("--cert", file, "--key", file),
    ],
    # Debian's is built with GnuTLS.
    "wget": lambda file, ca, port: [
        *("wget", "-q", "-O", "-", "--no-hsts", f"--ca-certificate={ca}", f"https://localhost:{port}/root.crt"),
        *(f"--certificate={file}", f"--private-key={file}"),
    ],
    "gnutls-cli": lambda file, ca, port: [
        *("gnutls-cli", "--x509cafile", ca, "--port", str(port), "localhost", "--logfile", "/dev/null"),
        *("--x509certfile", file, "--x509keyfile", file),
    ],
    "openssl": lambda file, ca, port: [
        *("openssl", "s_client", "-quiet", "-verify_return_error", "-connect", f"localhost:{port}", "-CAfile", ca),
        *("-cert", file, "-key", file, "-cert_chain", file),
    ],
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client(device: Device, strict: Front, root: Authority, text: bytes, client: str) -> None:
    got = run(*CLIENTS[client](device.key_file, root.certificate_file, strict.port), stdin=REQUEST)
    assert text in got.stdout.replace(b"\r\n", b"\n"), got


def test_curl_with_one_option_and_with_none(device: Device, strict: Front, root: Authority, text: bytes) -> None:
    line: list[Union[str, Path]] = [
        "curl",
        "-sSf",
        "--cacert",
        root.certificate_file,
        f"https://{strict.address}/root.crt",
    ]
    assert run(*line).returncode != 0, "without one it is not let in"
    assert run(*line, "--cert", device.key_file).stdout == text


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
    told = run("openssl", "x509", "-noout", "-enddate", "-subject", "-in", file).stdout
    # Debian 12's openssl(1) puts spaces around the sign, Debian 13's doesn't.
    assert b"notAfter=" in told and b"CN=localhost" in told.replace(b" = ", b"=")


def test_python(device: Device, strict: Front, root: Authority, text: bytes) -> None:
    context = ssl.create_default_context(cafile=str(root.certificate_file))
    context.load_cert_chain(str(device.key_file))
    plain = socket.create_connection(("localhost", strict.port), 30)
    with context.wrap_socket(plain, server_hostname="localhost") as connection:
        connection.sendall(REQUEST)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert text in answer
