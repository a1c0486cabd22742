"""`make fleet`: its devices are those of the program, it counts right, and its page says what was measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import world
from bench.proxy import DelayingProxy
from cryptography import x509
from fleet import devices, usage
from fleet.load import Crowd, Load, Sample, percentile
from fleet.measure import CONFIGURATIONS, Books, figures
from fleet.servers import Caramel, Front, Sqlite, caramel_front
from needs import needs, slow
from world import PLAIN, ROOT, Authority

#: All that nginx can say of a check: the greeting, the certificate that was shown, the request.
LOG = "\t".join(
    f"${name}"
    for name in (
        "request", "status", "ssl_protocol", "ssl_cipher", "ssl_ciphers", "ssl_curves", "ssl_server_name",
        "ssl_client_verify", "ssl_client_serial", "ssl_session_reused", "connection_requests", "request_length",
    )
)  # fmt: skip
PATH = re.compile("/[0-9a-f]{64}")


# --- The devices --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, list[devices.Device]]:
    authority = Authority(tmp_path_factory.mktemp("fleet-ca"))
    keys = [world.private_pem(world.new_key()) for _ in range(3)]
    return authority, devices.make(authority, keys)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "suggested"])
def front(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    known: tuple[Authority, list[devices.Device]],
) -> Iterator[Front]:
    """Caramel behind nginx, as `make fleet` sets them up; nginx also writes down every header that it gets."""
    authority, fleet = known
    folder = tmp_path_factory.mktemp("fleet")
    backend = Caramel(folder / "caramel", Sqlite(folder / "caramel.sqlite"), 2, authority, request.param)
    backend.prepare()
    backend.load(fleet)
    with backend:
        options = {"log": LOG, "error_log": "headers.log debug"}
        with caramel_front(folder / "front", backend, authority.server(), **options) as front:
            yield front


def headers(front: Front) -> list[tuple[str, ...]]:
    """The header lines of each check, as nginx got them, in their order: its own log for those who debug it."""
    found: dict[str, list[str]] = {}
    for line in (front.folder / "headers.log").read_text(errors="replace").splitlines():
        match = re.search(r" \*(\d+) http (header: \"|request line: \"GET /[0-9a-f]{64} )(.*)\"$", line)
        if match:
            found.setdefault(match[1], []).append(match[3])
    return [tuple(lines) for lines in found.values() if lines[0] == "HTTP/1.1"]


@slow
@needs("nginx", "locust")
def test_a_user_of_the_load_sends_what_the_program_sends(
    front: Front, known: tuple[Authority, list[devices.Device]], tmp_path: Path
) -> None:
    authority, fleet = known
    one = fleet[0]
    assert isinstance(front.backend, Caramel)
    since = one.modified if front.backend.filtered else one.not_before
    with DelayingProxy(front.port, 0.0) as proxy:
        device = world.Device(tmp_path, proxy.address, authority.certificate_file, one.client_id, command=(PLAIN,))
        content = one.key + one.certificate + one.request.replace(b" CERT", b" NEW CERT")
        device.has(world.sealed(content, authority.pem, one.client_id))
        os.utime(device.key_file, (since, since))
        run = device.run()
        assert run.status == 0, run.err
        traffic = proxy.wait()
        assert traffic.connections == 1
        proxy.reset()
        line = one.line(tmp_path, since)
        # Two devices, because there are two workers; they are the same one.
        port = int(proxy.address.rpartition(":")[2])
        with Load(tmp_path / "load", port, authority.certificate_file, [line, line], Crowd(1)) as load:
            world.until("some checks", lambda: load.begun() and len(front.seen()) > 3, 60)
            load.finish()
        again = proxy.wait()
        checks = len(load.samples())
    first, *others = map(" ".join, front.seen())
    assert len(others) == checks == load.counted() == again.connections
    assert set(others) == {first}
    status = "304" if front.backend.filtered else "200"
    serial = f"{one.serial:X}"
    request, got, tls, *_, verify, shown, reused, which, _ = first.split("\t")
    assert (request, got, tls) == (f"GET /{one.sha256} HTTP/1.1", status, "TLSv1.3")
    assert (verify, shown.lstrip("0"), reused, which) == ("SUCCESS", serial, ".", "1")
    sent, *also = headers(front)
    assert len(also) == checks
    assert set(also) == {sent}
    assert f"User-Agent: caramel-embedded/{load_version()} ({one.client_id})" in sent
    # All of TLS as well, to the byte.
    assert again.up == traffic.up * checks


def load_version() -> str:
    return subprocess.run([PLAIN, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


@slow
def test_a_prepared_certificate_is_what_caramel_would_have_signed(
    known: tuple[Authority, list[devices.Device]], tmp_path: Path
) -> None:
    authority, fleet = known
    with world.Caramel(tmp_path, authority) as caramel:
        device = fleet[0]
        with urllib.request.urlopen(f"{caramel.url}/{device.sha256}", device.request, timeout=30) as answer:
            assert answer.status == 202
        caramel.sign(device.sha256)
        (signed,) = caramel.certificates(device.sha256)
    theirs, ours = x509.load_pem_x509_certificate(signed), x509.load_pem_x509_certificate(device.certificate)
    assert [(one.critical, one.value) for one in ours.extensions] == [
        (one.critical, one.value) for one in theirs.extensions
    ]
    assert (ours.subject, ours.issuer) == (theirs.subject, theirs.issuer)
    assert ours.signature_hash_algorithm and theirs.signature_hash_algorithm
    assert ours.signature_hash_algorithm.name == theirs.signature_hash_algorithm.name
    lives = [one.not_valid_after_utc - one.not_valid_before_utc for one in (ours, theirs)]
    assert lives[0] == lives[1]
    # Serial numbers have no leading zeros, so one can be shorter by some bytes.
    assert abs(len(signed) - len(device.certificate)) <= 4


# --- The whole of it ----------------------------------------------------------------------------------------


@slow
@needs("nginx", "locust", "postgresql", "authority")
@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("Caramel, PostgreSQL, 2, suggested, P-256", "304"),
        ("registration authority, SQLite, 1, P-256", "304"),
    ],
)
def test_a_short_run_counts_every_check_and_leaves_nothing(name: str, status: str, tmp_path: Path) -> None:
    # A folder for temporary files that PostgreSQL's user gets into, unlike pytest's.
    with tempfile.TemporaryDirectory(prefix="fleet-test-") as temporary:
        Path(temporary).chmod(0o711)
        env = world.environment(FLEET_SECONDS="1", FLEET_DEVICES="8", TMPDIR=temporary)
        command = [sys.executable, "-Es", "-m", "fleet.measure", "--only", name, "--no-sizes"]
        done = subprocess.run(
            command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=300, check=False,
            preexec_fn=world.die_with_parent,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert list(Path(temporary).iterdir()) == []
    (seen,) = json.loads(done.stdout)["configurations"]
    assert seen["configuration"]["name"] == name
    for load in (seen["saturation"], seen["below"]):
        assert set(load["statuses"]) == {status}
        assert load["errors"] == 0
        assert load["counts"]["locust"] == load["counts"]["samples"] == load["counts"]["nginx"] > 0
        shown = "SUCCESS" if name.startswith("Caramel") else "NONE"
        assert set(load["tls"]) == {f"TLSv1.3 {shown} 1"}
        parts = {"nginx", "server", "load", *(["database"] if "PostgreSQL" in name else [])}
        assert set(load["cost"]) == set(load["memory"]) == parts
        assert min(load["cost"].values()) > 0
    assert seen["growth"]["rows"] == (seen["growth"]["checks"] if name.startswith("Caramel") else 0)
    assert seen["wire"]["connections"] == 1


# --- Arithmetic ---------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_window() -> None:
    samples = [Sample(0.0, 0.5, 304), Sample(0.9, 0.2, 304), Sample(1.0, 0.4, 200), Sample(2.9, 0.5, 0)]
    first = Books(1.0, {"nginx": 10.0, "server": 20.0}, 100.0)
    seen = figures(samples, first, Books(3.0, {"nginx": 10.5, "server": 21.0}, 101.0))
    assert (seen["checks"], seen["rate"], seen["errors"]) == (2, 1.0, 1)
    assert seen["cost"] == {"nginx": 250.0, "server": 500.0}
    assert seen["busy"] == {"nginx": 0.25, "server": 0.5, "idle": 0.5}
    assert seen["latency"] == {"50": 200.0, "95": 400.0, "99": 400.0}
    assert seen["statuses"] == {"304": 2, "200": 1, "0": 1}
    assert [percentile(list(range(1, 101)), share) for share in (50, 95, 99)] == [50, 95, 99]


def test_processor_time_is_that_of_a_process_and_of_its_children_dead_or_alive() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    whole = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n"
        f"child = subprocess.Popen([sys.executable, '-c', {burn + 'print(flush=True); input()'!r}], stdin=-1)\n"
        "input()\nchild.communicate(b'\\n')\n"
    )
    with subprocess.Popen([sys.executable, "-c", whole], stdin=-1, stdout=-1) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        spent, held = usage.processor_time([process.pid]), usage.memory([process.pid])
        assert len(usage.families([process.pid])) == 2
        process.stdin.write(b"\n")
        process.stdin.close()
    assert spent >= 0.55  # two times 0.3, counted in hundredths
    assert held > 2**20


# --- The page -----------------------------------------------------------------------------------------------


def test_every_configuration_is_in_the_figures_and_every_check_was_counted() -> None:
    seen: dict[str, Any] = json.loads((ROOT / "docs/fleet.json").read_text())
    assert [entry["configuration"]["name"] for entry in seen["configurations"]] == [
        one.name for one in CONFIGURATIONS
    ]
    for entry in seen["configurations"]:
        for load in (entry["saturation"], entry["below"]):
            assert len(set(load["counts"].values())) == 1, entry["configuration"]["name"]
