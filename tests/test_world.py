"""The world itself, where a mistake in it would make other tests say something that isn't so; and what isn't run."""

from __future__ import annotations

import http.client
import os
import re
import ssl
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import world
from world import Authority, Caramel, Front, Nginx, TlsFront


@pytest.mark.parametrize("kind", [pytest.param("nginx", marks=needs.needs("nginx")), "python"])
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


@needs.slow
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


# --- What a machine lacks is counted and named, with the line that brings it; and CI lacks nothing ---

MISSING = """
import needs, pytest
needs.NEEDS["a-program"] = needs.program("no-such-program", "one-package")
needs.NEEDS["here"] = needs.program("sh")
needs.NEEDS["all-powers"] = needs.Need(lambda: False, what="root")

@needs.needs("a-program", "all-powers")
def test_marked(): ...

def test_required():
    needs.require("a-program")

@needs.slow
def test_slow(): ...

@needs.needs("here")
def test_here():
    needs.require("here")
"""


def run_of_pytest(folder: Path, **env: str) -> tuple[int, str]:
    (folder / "conftest.py").write_bytes((world.ROOT / "tests/conftest.py").read_bytes())
    (folder / "test_missing.py").write_text(MISSING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(world.ROOT / "tests"), **env},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def test_what_was_not_run_is_counted_and_named(tmp_path: Path) -> None:
    status, text = run_of_pytest(tmp_path)
    assert status == 0, text
    block = text[text.index(" 3 of 4 tests were not run ") :].splitlines()[1:5]
    assert sorted(block[:3]) == [
        "     1 needs a-program",
        "     1 needs a-program, root",
        "     1 too slow for `make test`",
    ], text
    assert block[3] == "All of it: apt-get install one-package && make test-all (as root)"


def test_where_nothing_may_be_skipped_it_fails(tmp_path: Path) -> None:
    status, text = run_of_pytest(tmp_path, CARAMEL_TESTS_NO_SKIP="1")
    assert status == 1 and "1 failed, 2 passed, 1 error" in text, text


def test_every_package_that_a_test_may_want_is_installed_by_ci() -> None:
    text = (world.ROOT / ".ci" / "run").read_text()
    listed = re.search(r"^needed=\((.*?)^\)", text, re.MULTILINE | re.DOTALL)
    assert listed
    installed = set(re.sub(r"#.*", "", listed[1]).split())
    wanted = {package for need in needs.NEEDS.values() for package in need.packages}
    assert wanted - installed == set()


def test_no_test_skips_in_another_way() -> None:
    ways = r"pytest\.skip\(|skipif\(|importorskip|unittest\.skip|mark\.skip\b"
    files = [path for folder in ("tests", "server") for path in (world.ROOT / folder).rglob("*.py")]
    found = {path.name for path in files if re.search(ways, path.read_text())}
    assert len(files) > 60 and found == {"needs.py", "test_world.py"}


@needs.needs("git")
def test_the_rest_is_what_has_not_passed_and_everything_once_a_file_has_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = tmp_path / "passed"
    record.write_text("tests/test_one.py::test_a[x]\ntests/test_one.py::test_b\n")
    monkeypatch.setenv("CARAMEL_TESTS_PASSED", str(record))
    monkeypatch.delenv("CARAMEL_TESTS_REST", raising=False)
    assert needs.passed_before() == set()
    monkeypatch.setenv("CARAMEL_TESTS_REST", "1")
    monkeypatch.setattr(needs, "ROOT", tmp_path)
    assert needs.passed_before() == set(), "nobody knows what has changed"
    for name in ("one", "two"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    for command in (["init", "-q"], ["add", "one", "two"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert needs.passed_before() == {"tests/test_one.py::test_a[x]", "tests/test_one.py::test_b"}
    os.utime(tmp_path / "two", (record.stat().st_mtime + 1,) * 2)
    assert needs.passed_before() == set()
