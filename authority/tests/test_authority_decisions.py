# SPDX-License-Identifier: MIT OR Apache-2.0
"""Who gets a certificate: the administrator's command, the rules, the log, the smallest accepted serial number."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from authority_world import Postgres, RegistrationAuthority, Server, csr, sha256
from needs import needs, slow

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]

UUID = "0b6c1a52-94ef-4c6e-9d5b-6f2c8f0e7a31"


def status(server: Server, request: bytes) -> int:
    return server.enroll(request).status


# --- By hand ---


def test_list_authorize_reject(server: Server) -> None:
    authority = server.authority
    requests = {name: csr(name) for name in ("one", "two", "three")}
    for request in requests.values():
        server.post(request)
    authority.command("authorize", "one", sha256(requests["two"])[:12])
    authority.command("reject", "three")
    server.get(sha256(requests["one"]))
    listed = [line.split() for line in authority.command("list").splitlines()]
    assert [(row[0], row[1], row[2]) for row in listed] == [
        (sha256(requests["one"])[:16], "authorized", "one"),
        (sha256(requests["two"])[:16], "authorized", "two"),
        (sha256(requests["three"])[:16], "rejected", "three"),
    ]
    assert [row[5] for row in listed] == ["until", "no", "no"]
    assert authority.command("list", "--state", "rejected").split()[2] == "three"


def test_which_one_has_to_be_clear(server: Server) -> None:
    first, second = csr("device"), csr("device")
    server.post(first)
    server.post(second)
    said = server.authority.command("authorize", "device", status=1)
    assert sha256(first)[:16] in said and sha256(second)[:16] in said
    assert "no such request" in server.authority.command("reject", "nobody", status=1)
    assert server.authority.log("authorized") == []
    server.authority.command("authorize", sha256(second))
    assert [server.get(sha256(one)).status for one in (first, second)] == [202, 200]


def test_a_rejected_request_can_be_authorized_again(server: Server) -> None:
    request = csr("device")
    server.post(request)
    server.authority.command("reject", "device")
    server.authority.command("authorize", "device")
    assert server.get(sha256(request)).status == 200


# --- Rules ---


def test_the_list_of_the_production_line(authority: RegistrationAuthority, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("# batch 7\nfffbeec0ff01\nfffbeec0ff02  # the demo's\n\n")
    assert authority.command("allow", "--file", str(ids), "fffbeec0ff03") == "3 new\n"
    assert authority.command("allow", "--file", "-", given="fffbeec0ff03\nfffbeec0ff04\n") == "1 new\n"
    with authority.serving() as server:
        assert [status(server, csr(f"fffbeec0ff0{number}")) for number in range(1, 6)] == [200, 200, 200, 200, 202]
    assert [row[1] for row in authority.log("authorized")] == 4 * ["rule:listed"]


def test_an_id_that_is_none_leaves_the_list_as_it_was(authority: RegistrationAuthority) -> None:
    assert "no client ID" in authority.command("allow", "good", "not good", status=1)
    with authority.serving() as server:
        assert status(server, csr("good")) == 202


def test_allowed_after_the_request_came(server: Server) -> None:
    request = csr("late")
    assert status(server, request) == 202
    server.authority.command("allow", "late")
    assert server.get(sha256(request)).status == 200


def test_a_rule_admits_an_id_once(server: Server) -> None:
    """Whoever comes with a second key may be somebody else, and that is for a person to say."""
    server.authority.command("allow", "device")
    first, second = csr("device"), csr("device")
    assert status(server, first) == 200
    assert status(server, second) == 202
    server.authority.command("authorize", sha256(second))
    assert server.get(sha256(second)).status == 200
    assert server.get(sha256(first)).status == 200


def test_a_rule_that_admits_again(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path, "[rules]\nagain = true\n")
    authority.create_ca()
    authority.command("allow", "device")
    with authority.serving() as server:
        assert [status(server, csr("device")) for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(
    "rules, client_id, expected",
    [
        ("uuids = true", UUID, 200),
        ("uuids = true", UUID.upper(), 200),
        ("uuids = true", UUID[:-1], 202),
        ("uuids = true", "fffbeec0ffee", 202),
        ("", UUID, 202),
        ('zone = "devices.example.com"', "fffbeec0ffee.devices.example.com", 200),
        ('zone = "devices.example.com"', "fffbeec0ffee.DEVICES.example.com", 200),
        ('zone = "devices.example.com"', "a.b.devices.example.com", 202),
        ('zone = "devices.example.com"', "devices.example.com", 202),
        ('zone = "devices.example.com"', ".devices.example.com", 202),
        ('zone = "devices.example.com"', "_acme-challenge.devices.example.com", 202),
        ('zone = "devices.example.com"', "evil-devices.example.com", 202),
    ],
)
def test_rules(tmp_path: Path, rules: str, client_id: str, expected: int) -> None:
    authority = RegistrationAuthority(tmp_path, f"[rules]\n{rules}\n")
    authority.create_ca()
    with authority.serving() as server:
        assert status(server, csr(client_id)) == expected


def test_the_list_may_be_no_rule(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path, "[rules]\nlisted = false\n")
    authority.create_ca()
    authority.command("allow", "device")
    request = csr("device")
    with authority.serving() as server:
        assert status(server, request) == 202
        authority.command("authorize", "device")
        assert server.get(sha256(request)).status == 200


def test_off_the_list(server: Server) -> None:
    server.authority.command("allow", "device")
    request, again = csr("device"), csr("device")
    assert status(server, request) == 200
    server.authority.command("disallow", "device")
    assert server.get(sha256(request)).status == 403
    assert status(server, again) == 202
    assert "no such device" in server.authority.command("disallow", "nobody", status=1)


def test_nothing_is_signed_that_is_not_on_the_list(authority: RegistrationAuthority) -> None:
    """Even where a database says that a request is authorized."""
    request = csr("device")
    with authority.serving() as server:
        server.post(request)
        with contextlib.closing(sqlite3.connect(authority.state)) as database, database:
            database.execute("UPDATE requests SET state = 'authorized'")
        reply = server.get(sha256(request))
    assert (reply.status, reply.json["detail"]) == (503, "device is authorized, and not on the list of devices")
    assert authority.rows("SELECT * FROM certificates") == []


# --- The log ---


def test_every_decision_is_in_the_log(server: Server) -> None:
    server.authority.command("allow", "one")
    first, second = csr("one"), csr("two")
    server.enroll(first)
    server.post(second)
    server.authority.command("authorize", "two")
    server.authority.command("reject", "one")
    server.authority.command("disallow", "two")
    rows = [(row[1].split(":")[0], row[2], row[3], row[4]) for row in server.authority.log()]
    one, two = sha256(first)[:16], sha256(second)[:16]
    assert rows == [
        ("administrator", "ca-created", "-", "-"),
        ("administrator", "allowed", "one", "-"),
        ("rule", "authorized", "one", one),
        ("signer", "signed", "one", one),
        ("administrator", "authorized", "two", two),
        ("administrator", "rejected", "one", one),
        ("administrator", "disallowed", "two", "-"),
        ("administrator", "rejected", "two", two),
    ]


@pytest.mark.parametrize("statement", ["UPDATE log SET who = 'nobody'", "DELETE FROM log"])
def test_the_log_is_never_rewritten(authority: RegistrationAuthority, statement: str) -> None:
    before = authority.log()
    with (
        contextlib.closing(sqlite3.connect(authority.state)) as database,
        database,
        pytest.raises(sqlite3.IntegrityError, match="never rewritten"),
    ):
        database.execute(statement)
    assert authority.log() == before


@pytest.mark.parametrize("statement", ["UPDATE log SET who = 'nobody'", "DELETE FROM log", "TRUNCATE log"])
def test_the_log_is_never_rewritten_by_postgresql(tmp_path: Path, postgres: Postgres, statement: str) -> None:
    authority = RegistrationAuthority(tmp_path, database=postgres.url)
    authority.init()
    authority.command("allow", f"device-{len(statement)}")
    before = postgres.sql("SELECT count(*) FROM log")
    with pytest.raises(AssertionError, match="never rewritten"):
        postgres.sql(statement)
    assert postgres.sql("SELECT count(*) FROM log") == before
    assert postgres.sql("SELECT count(*) FROM log WHERE who = 'nobody'") == "0"


# --- In place of a revocation list ---


def test_the_smallest_accepted_serial_number(server: Server) -> None:
    server.authority.command("allow", "good", "stolen")
    good, stolen = csr("good"), csr("stolen")
    before = {name: server.enroll(request) for name, request in (("good", good), ("stolen", stolen))}

    def accepted(serial: int) -> int:
        return server.get("/accepted", X_Client_Serial=f"{serial:X}").status

    serials = {name: reply.certificate.serial_number for name, reply in before.items()}
    assert [accepted(serial) for serial in serials.values()] == [204, 204]
    server.authority.command("reject", "stolen")
    assert [accepted(serial) for serial in serials.values()] == [204, 403]

    minimum = int(server.authority.command("minimum-serial", "--now"), 16)
    assert [accepted(serial) for serial in serials.values()] == [403, 403]
    # Every device that asks has a new one, long before a third of its life is left.
    renewed = server.get(sha256(good), If_Modified_Since=before["good"].headers["last-modified"])
    assert renewed.status == 200
    assert renewed.certificate.serial_number > minimum > max(serials.values())
    assert accepted(renewed.certificate.serial_number) == 204
    assert server.get(sha256(stolen)).status == 403
    assert int(server.authority.command("minimum-serial"), 16) == minimum
    for nonsense in ("", "xyz", "0", "-1", "F" * 41, f"{minimum:x}"):
        assert server.get("/accepted", X_Client_Serial=nonsense).status == 403


# --- The configuration ---


@pytest.mark.parametrize(
    "settings, said",
    [
        ("nonsense = 1", "nonsense is no setting"),
        ("[rules]\nuuid = true", "rules.uuid is no setting"),
        ("[rules]\nuuids = 1", "rules.uuids is to be of the type of False"),
        ('retry_after = "soon"', "retry_after is to be of the type of 900"),
        ('[ca]\nusages = ["web"]', 'ca.usages are "client" and "server"'),
        ("[ca]\nlife_hours = 1", "ca.life_hours is longer than backdate_seconds"),
        ("= 1", "Invalid statement"),
        ('[dns]\naddresses = "post"', "dns.addresses needs a zone"),
    ],
)
def test_a_wrong_configuration_is_said(tmp_path: Path, settings: str, said: str) -> None:
    authority = RegistrationAuthority(tmp_path, settings)
    assert said in authority.command("list", status=1)


def test_no_configuration(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path)
    authority.config.unlink()
    assert "No such file" in authority.command("list", status=1)
