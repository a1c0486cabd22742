"""The life of a device, step by step: each step one run of the installed command against the real Caramel server."""

from __future__ import annotations

import calendar
import sqlite3
import uuid
from pathlib import Path

import pytest
import world
from cryptography import x509
from world import Authority, Caramel, Device, Front, Snapshot, any_front

REQUEST = "NEW CERTIFICATE REQUEST"
WITHOUT, WITH = ["PRIVATE KEY", REQUEST], ["PRIVATE KEY", "CERTIFICATE", REQUEST]


def shown(moment: world.Moment) -> str:
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def of(device: Device) -> tuple[Snapshot, x509.Certificate]:
    """The key file as it is, and the certificate in it."""
    snapshot, certificate = device.snapshot(), device.certificate
    assert snapshot and certificate
    return snapshot, certificate


def test_from_nothing_to_a_certificate_a_newer_one_a_rejection_and_a_new_life(
    device: Device, caramel: Caramel, front: Front
) -> None:
    me = str(device.client_id)

    # Nothing is there: key and request are made, and the request is posted, all over one connection.
    with front.watched() as seen:
        run = device.run()
    assert (run.status, run.out) == (69, "")
    assert [(asked.method, asked.status) for asked in seen] == [("GET", 404), ("POST", 202), ("GET", 202)]
    assert len({asked.connection for asked in seen}) == 1
    assert {asked.path for asked in seen} == {f"/{device.request_hash()}"}
    assert all(asked.user_agent.startswith("caramel-embedded/") for asked in seen)
    assert all(asked.user_agent.endswith(f" ({me})") for asked in seen)
    assert device.labels == WITHOUT
    assert [row.sha256 for row in caramel.requests(me)] == [device.request_hash()]
    assert run.err.startswith(f"caramel-embedded: {me}: ") and run.err.count("\n") == 1
    assert device.request_hash() in run.err
    first, born = device.snapshot(), device.request_hash()
    assert first and first.mode == 0o600

    # Nobody has signed it yet: nothing to do, and nothing is done.
    with front.watched() as seen:
        run = device.run()
    assert (run.status, run.out, run.err.count("\n")) == (69, "", 1)
    assert [asked.method for asked in seen] == ["GET"]
    assert device.snapshot() == first and len(caramel.requests(me)) == 1

    # The administrator signs.
    caramel.sign(me)
    run = device.run()
    assert (run.status, run.out, run.err.count("\n")) == (0, "", 1)
    certified, certificate = of(device)
    assert device.labels == WITH
    assert device.block("CERTIFICATE") == caramel.certificates(born)[-1]
    bare = world.unsealed(first.content)
    assert world.unsealed(certified.content).startswith(bare[: bare.index(b"-----END PRIVATE KEY")])
    assert device.request_hash() == born
    assert me in run.err and shown(certificate.not_valid_after_utc) in run.err
    assert certified.mtime_ns == calendar.timegm(certificate.not_valid_before_utc.utctimetuple()) * 10**9

    # Nothing is new: nothing is written, not even a time.
    with front.watched() as seen:
        run = device.run()
    assert (run.status, run.out, run.err.count("\n")) == (0, "", 1)
    assert device.snapshot() == certified
    assert [(asked.method, asked.verify) for asked in seen] == [("GET", "SUCCESS")]

    # The server has a newer one.
    caramel.sign(me, hours=72)
    assert device.run().status == 0
    renewed, newer = of(device)
    assert newer.not_valid_after_utc > certificate.not_valid_after_utc
    assert newer.public_key() == certificate.public_key() and device.request_hash() == born
    assert renewed.inode != certified.inode
    assert device.run().status == 0 and device.snapshot() == renewed

    # The administrator rejects: everything is wiped, and the same run asks again with a new key.
    caramel.reject(me)
    with front.watched() as seen:
        run = device.run()
    assert (run.status, run.out, run.err.count("\n")) == (69, "", 1)
    assert "rejected" in run.err
    assert [(asked.method, asked.status) for asked in seen] == [("GET", 403), ("POST", 202), ("GET", 202)]
    assert device.labels == WITHOUT
    assert [row.rejected for row in caramel.requests(me)] == [True, False]
    assert caramel.requests(me)[-1].sha256 == device.request_hash() != born
    for _, block in device.blocks():
        assert block not in renewed.content  # neither the key nor the request of the rejected life

    # Signed again.
    caramel.sign(me)
    assert device.run().status == 0
    assert of(device)[1].public_key() != newer.public_key()
    assert {path.name for path in device.folder.iterdir()} == {"empty.conf", "identity.pem"}


def test_a_uuid_is_certified_as_soon_as_the_server_signs_by_itself(tmp_path: Path, authority: Authority) -> None:
    client_id = str(uuid.uuid4())
    with Caramel(tmp_path / "caramel", authority) as server, server.autosign():
        with any_front(tmp_path / "front", server, authority.server(file="autosign.pem")) as front:
            device = Device(tmp_path / "device", front.address, authority.certificate_file, client_id)
            first = device.run()
            # caramel_autosign looks into the database from time to time only: that is why it isn't 0 at once.
            assert first.status == 69
            sha256 = device.request_hash()
            world.until("Caramel signs", lambda: server.certificates(sha256))
            assert device.run().status == 0
            assert device.run().status == 0
        assert device.request_hash() == sha256
        assert [row.client_id for row in server.requests()] == [client_id]


def test_the_server_forgot_its_requests_and_gets_them_again(device: Device, caramel: Caramel) -> None:
    """A server whose database was lost: the device's identity must outlive it."""
    assert device.run().status == 69
    caramel.sign(str(device.client_id))
    assert device.run().status == 0
    certified = device.snapshot()
    forget(caramel, device.request_hash())
    run = device.run()
    assert run.status == 69 and "waits to be signed" in run.err
    # The certificate is good until it ends: 202 doesn't take it away.
    assert device.snapshot() == certified
    assert [row.sha256 for row in caramel.requests(str(device.client_id))] == [device.request_hash()]


def forget(caramel: Caramel, sha256: str) -> None:
    """Takes a request and its certificates out of Caramel's database."""
    connection = sqlite3.connect(str(caramel.database), timeout=60)
    with connection:
        for table in ("certificate", "accesslog"):
            connection.execute(
                f"DELETE FROM {table} WHERE csr_id = (SELECT id FROM csr WHERE sha256sum = ?)", (sha256,)
            )
        connection.execute("DELETE FROM csr WHERE sha256sum = ?", (sha256,))
    connection.close()


@pytest.mark.parametrize("word", ["-q", "-v"])
def test_a_run_says_as_much_as_it_was_asked_to(device: Device, word: str) -> None:
    run = device.run(word)
    assert (run.status, run.out) == (69, "")
    if word == "-q":
        assert run.err == ""
    else:
        lines = run.err.splitlines()
        assert len(lines) > 3 and all(line.startswith("caramel-embedded: ") for line in lines)
        assert device.request_hash() in lines[-1]
    private = dict(device.blocks())["PRIVATE KEY"].decode().splitlines()[1:-1]
    assert not any(line in run.err for line in private)
