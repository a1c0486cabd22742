"""`make fleet`: its devices are those of the program, and it counts right."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import world
from bench.filtered import FilteredCaramel, MeteredNginx
from bench.proxy import DelayingProxy
from cryptography import x509
from fleet import devices, measure, usage
from fleet.load import Load, Sample, percentile
from fleet.measure import Books, figures
from needs import needs, slow
from world import PLAIN, ROOT, Authority

# --- The devices --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, list[devices.Device]]:
    authority = Authority(tmp_path_factory.mktemp("fleet-ca"))
    return authority, devices.make(authority, 3)


@slow
@needs("nginx", "locust")
def test_a_user_of_the_load_sends_what_the_program_sends(
    known: tuple[Authority, list[devices.Device]], tmp_path: Path
) -> None:
    authority, fleet = known
    one = fleet[0]
    with (
        FilteredCaramel(tmp_path / "caramel", authority) as caramel,
        MeteredNginx(tmp_path / "front", caramel, authority.server()) as front,
    ):
        measure.store(caramel, fleet)
        with DelayingProxy(front.port, 0.0) as proxy:
            device = world.Device(
                tmp_path / "device", proxy.address, authority.certificate_file, one.client_id, command=(PLAIN,)
            )
            content = one.key + one.certificate + one.request.replace(b" CERT", b" NEW CERT")
            device.has(world.sealed(content, authority.pem, one.client_id))
            os.utime(device.key_file, (one.modified, one.modified))
            run = device.run()
            assert run.status == 0, run.err
            traffic = proxy.wait()
            assert traffic.connections == 1
            proxy.reset()
            line = one.line(tmp_path, one.modified)
            # Two devices, because there are two workers; they are the same one.
            port = int(proxy.address.rpartition(":")[2])
            with Load(tmp_path / "load", port, authority.certificate_file, [line, line], 1) as load:
                world.until("some checks", lambda: load.begun() and len(front.seen()) > 3, 60)
                load.finish()
            again = proxy.wait()
            checks = len(load.samples())
        first, *others = front.seen()
    assert len(others) == checks == load.counted() == again.connections
    assert (first.method, first.path, first.status, first.tls) == ("GET", f"/{one.sha256}", 304, "TLSv1.3")
    assert first.verify == "SUCCESS" and one.client_id in str(first.subject)
    for other in others:
        assert dataclasses.replace(other, connection=first.connection, sent=first.sent) == first
    # All of TLS as well, to the byte.
    assert again.up == traffic.up * checks


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
@needs("nginx", "locust")
def test_a_short_run_counts_every_check_and_leaves_nothing(tmp_path: Path) -> None:
    env = world.environment(FLEET_SECONDS="1", FLEET_DEVICES="8", FLEET_SIZES="50", TMPDIR=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-Es", "-m", "fleet.measure"], cwd=ROOT / "tests", env=env, capture_output=True, text=True,
        timeout=300, check=False, preexec_fn=world.die_with_parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    seen = json.loads(done.stdout)
    assert [(load["devices"], load["users"], load["index"]) for load in seen] == [
        (8, 32, False), (8, 4, False), (50, 4, False), (50, 4, True),
    ]  # fmt: skip
    for load in seen:
        assert set(load["statuses"]) == {"304"} and load["errors"] == 0
        assert load["counts"]["locust"] == load["counts"]["samples"] == load["counts"]["nginx"] > 0
        assert set(load["tls"]) == {"TLSv1.3 SUCCESS"}
        assert set(load["cost"]) == set(load["memory"]) == {"nginx", "server", "load"}
        assert min(load["cost"].values()) > 0


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
