"""The world itself, where a mistake in it would make other tests say something that isn't so."""

from __future__ import annotations

import http.client
import os
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import world
from needs import needs, slow
from world import Authority, Caramel, Front, Nginx, TlsFront


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
