"""The world itself, where a mistake in it would make other tests say something that isn't so."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Optional, Union

import pytest
import world
from cryptography import x509
from needs import needs, require, slow
from world import Authority, Caramel, Daemon, Front, Nginx, Scripted, TlsFront, answer


def curl(url: str, ca: Path, *options: Union[str, Path]) -> subprocess.CompletedProcess[bytes]:
    require("curl")
    line = ["curl", "-sS", "-m", "20", "--cacert", ca, *options, url]
    return subprocess.run([str(word) for word in line], capture_output=True, timeout=30)


def openssl_request(folder: Path, authority: Authority, client_id: str) -> bytes:
    """A key (`key.pem`) and a request made by openssl(1)."""
    subject = "".join(f"/{short}={value}" for short, value in authority.subject_for(client_id))
    command = [
        "openssl",
        "req",
        "-new",
        "-utf8",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "key.pem",
        "-subj",
        subject,
    ]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout


@needs("curl", "openssl")
def test_a_request_is_posted_signed_fetched_and_rejected(tmp_path: Path, caramel: Caramel, front: Front) -> None:
    ca = caramel.authority.certificate_file
    request = openssl_request(tmp_path, caramel.authority, "0000feedbeef")
    url = f"https://{front.address}/{hashlib.sha256(request).hexdigest()}"
    (tmp_path / "request.pem").write_bytes(request)

    with front.watched() as seen:
        assert curl(url, ca, "-w", "%{http_code}", "-o", "/dev/null").stdout == b"404"
        posted = curl(url, ca, "-w", "%{http_code}", "-o", "/dev/null", "--data-binary", f"@{tmp_path}/request.pem")
        assert posted.stdout == b"202"
    assert [(asked.method, asked.status) for asked in seen] == [("GET", 404), ("POST", 202)]
    assert seen[0].connection != seen[1].connection
    assert seen[0].user_agent.startswith("curl/")

    caramel.sign("0000feedbeef")
    certificate = curl(url, ca).stdout
    assert caramel.certificates(hashlib.sha256(request).hexdigest()) == [certificate]
    assert "0000feedbeef" in [row.client_id for row in caramel.listed()]

    (tmp_path / "both.pem").write_bytes((tmp_path / "key.pem").read_bytes() + certificate)
    with front.watched() as seen:
        curl(url, ca, "--cert", tmp_path / "both.pem")
    assert [(asked.verify, "CN=0000feedbeef" in asked.subject) for asked in seen] == [("SUCCESS", True)]

    caramel.reject("0000feedbeef")
    assert b'"status":403' in curl(url, ca).stdout
    assert [row.rejected for row in caramel.requests("0000feedbeef")] == [True]
    assert "0000feedbeef" not in [row.client_id for row in caramel.listed()]


@pytest.mark.parametrize("kind", [pytest.param("nginx", marks=needs("nginx")), "python"])
def test_a_front_remembers_what_it_was_asked(tmp_path: Path, caramel: Caramel, kind: str) -> None:
    authority = caramel.authority
    certificate = authority.server(file=f"{kind}.pem")
    (tmp_path / "identity.pem").write_bytes(authority.identity("00000000cafe"))
    context = ssl.create_default_context(cafile=str(authority.certificate_file))
    context.load_cert_chain(str(tmp_path / "identity.pem"))
    front: Front = (
        Nginx(tmp_path / "nginx", caramel, certificate)
        if kind == "nginx"
        else TlsFront(caramel, certificate, client_ca=authority.certificate_file)
    )
    with front, front.watched() as seen:
        connection = http.client.HTTPSConnection("localhost", front.port, timeout=20, context=context)
        bodies = []
        for method, path, body in (("GET", "/root.crt", None), ("POST", "/" + 64 * "0", b"no request")):
            connection.request(method, path, body, {"User-Agent": "somebody/1"})
            bodies.append(connection.getresponse().read())
        connection.close()
        another = http.client.HTTPSConnection("localhost", front.port, timeout=20, context=context)
        another.request("GET", "/root.crt")
        bodies.append(another.getresponse().read())
        another.close()
    assert bodies[0] == bodies[2] == authority.pem
    assert [(asked.method, asked.path, asked.status) for asked in seen[:2]] == [
        ("GET", "/root.crt", 200),
        ("POST", "/" + 64 * "0", 400),
    ]
    assert seen[0].connection == seen[1].connection != seen[2].connection
    assert {asked.user_agent for asked in seen[:2]} == {"somebody/1"}
    assert all(asked.verify == "SUCCESS" and "CN=00000000cafe" in asked.subject for asked in seen)
    assert seen[0].sent > len(bodies[0]) and seen[1].received > len(b"no request") and seen[0].tls == "TLSv1.3"


def test_the_front_made_of_python_passes_everything_on(caramel: Caramel) -> None:
    with TlsFront(caramel, caramel.authority.server(file="front.pem")) as front:
        got = curl(f"https://{front.address}/root.crt", caramel.authority.certificate_file)
    assert got.stdout == caramel.authority.pem
    assert front.connections == 1


@slow
def test_caramel_is_the_same_after_a_restart(tmp_path: Path, authority: Authority) -> None:
    with Caramel(tmp_path, authority) as server:
        port = server.port
        server.restart()
        assert server.port == port


@slow
def test_caramels_own_program_makes_a_usable_authority(tmp_path: Path) -> None:
    authority = Authority.by_caramel(tmp_path, ["se", "", "Linköping", "Example AB", ""])
    assert authority.subject_for("x") == [
        ("C", "SE"),
        ("L", "Linköping"),
        ("O", "Example AB"),
        ("OU", "Caramel"),
        ("CN", "x"),
    ]
    ours = Authority(tmp_path / "ours", authority.subject_for("Caramel Signing Certificate"))
    assert [extension.oid for extension in ours.certificate.extensions] == [
        extension.oid for extension in authority.certificate.extensions
    ]


@slow
def test_caramel_signs_uuids_by_itself(tmp_path: Path, authority: Authority) -> None:
    client_id = "3a38c4b2-0f3e-4a5c-9c5e-0a3f0b8f7a10"
    request = openssl_request(tmp_path, authority, client_id)
    sha256 = hashlib.sha256(request).hexdigest()
    (tmp_path / "request.pem").write_bytes(request)
    with Caramel(tmp_path / "caramel", authority) as server, server.autosign():
        curl(f"{server.url}/{sha256}", authority.certificate_file, "--data-binary", f"@{tmp_path}/request.pem")
        world.until("Caramel signs", lambda: server.certificates(sha256))


@pytest.mark.parametrize("verify, status", [(None, b"200"), ("optional", b"400"), ("on", b"400")])
@needs("nginx", "curl")
def test_nginx_answers_400_to_an_expired_client_certificate(
    tmp_path: Path, caramel: Caramel, verify: Optional[str], status: bytes
) -> None:
    authority = caramel.authority
    identity = authority.identity("expired", not_after=world.now() - world.hours(1))
    (tmp_path / "identity.pem").write_bytes(identity)
    with Nginx(tmp_path / "nginx", caramel, authority.server(), verify_client=verify) as front:
        got = curl(
            f"https://{front.address}/root.crt",
            authority.certificate_file,
            *("--cert", tmp_path / "identity.pem", "-o", "/dev/null", "-w", "%{http_code}"),
        )
    assert got.stdout == status


@needs("nginx", "curl")
def test_published_certificates_know_their_time(tmp_path: Path, caramel: Caramel) -> None:
    static = tmp_path / "static"
    static.mkdir()
    ca = caramel.authority.certificate_file
    with Nginx(tmp_path / "nginx", caramel, caramel.authority.server(), static=static) as front:
        moment = world.now() - world.hours(1)
        front.publish("ab" * 32, b"a certificate\n", moment)
        url = f"https://{front.address}/{'ab' * 32}"
        headers = curl(url, ca, "-D", "-").stdout.decode()
        modified = moment.strftime("%a, %d %b %Y %H:%M:%S GMT")
        assert f"Last-Modified: {modified}" in headers and headers.endswith("a certificate\n")
        again = curl(url, ca, "-H", f"If-Modified-Since: {modified}", "-w", "%{http_code}")
        assert again.stdout == b"304"
        assert front.seen()[-1].if_modified_since == modified
        # What is not there is asked of Caramel.
        assert b'"status":404' in curl(f"https://{front.address}/{'cd' * 32}", ca).stdout


def test_a_script_is_followed(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "identity.pem").write_bytes(authority.identity("x"))
    ca = authority.certificate_file
    answers: list[world.Answer] = [answer(200, b"first"), [b"HTTP/1.1 200 OK\r\n\r\n", 0.1, b"second"], None]
    with Scripted(authority.server(), answers, client_ca=ca) as server:
        assert curl(f"https://{server.address}/1", ca, "--cert", tmp_path / "identity.pem").stdout == b"first"
        assert curl(f"https://{server.address}/2", ca, "--data", "body").stdout == b"second"
        assert curl(f"https://{server.address}/3", ca).returncode == 52  # an empty answer
    assert [(asked.method, asked.path, asked.body) for asked in server.requests] == [
        ("GET", "/1", b""),
        ("POST", "/2", b"body"),
        ("GET", "/3", b""),
    ]
    shown = server.requests[0].client_certificate
    assert shown and "CN=x" in x509.load_der_x509_certificate(shown).subject.rfc4514_string()
    assert server.requests[1].client_certificate is None
    assert (server.connections, server.handshakes) == (3, 3)


def test_a_script_can_do_without_tls(authority: Authority) -> None:
    ca = authority.certificate_file
    with Scripted(authority.server(), [None], instead_of_tls=world.silence) as server:
        assert curl(f"https://{server.address}/", ca, "-m", "1").returncode == 28  # too late
    with Scripted(authority.server(), [None], instead_of_tls=world.reset) as server:
        assert curl(f"https://{server.address}/", ca).returncode == 35
    with Scripted(authority.server(), [None], instead_of_tls=world.hang_up) as server:
        assert curl(f"https://{server.address}/", ca).returncode == 35


def test_a_script_ends_while_somebody_is_connected(authority: Authority) -> None:
    with Scripted(authority.server(), [None], instead_of_tls=world.silence) as server:
        connection = socket.create_connection(("127.0.0.1", server.port))
        world.until("it is seen", lambda: server.connections)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    connection.close()


def test_a_forgotten_process_is_found() -> None:
    orphan = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    subprocess.run([sys.executable, "-c", orphan], check=True)
    world.until("it became ours", lambda: [name for _, name in world.strays()] == ["sleep"])
    os.kill(world.strays()[0][0], 9)


def test_a_server_dies_with_who_started_it(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, world; from pathlib import Path\n"
        "d = world.Daemon(['sleep', '60'], Path(sys.argv[1]) / 'out')\n"
        "d.start(); print(d.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(world.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, stdout=subprocess.PIPE)
    pid = int(done.stdout)
    world.until("it is gone", lambda: pid not in [number for number, _ in world.strays()] and not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        return b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_daemon_is_ours_until_it_is_stopped(tmp_path: Path) -> None:
    with Daemon(["sleep", "60"], tmp_path / "out") as daemon:
        assert daemon.alive and not world.strays()
    assert not daemon.alive
