# SPDX-License-Identifier: MIT OR Apache-2.0
"""Who gets a certificate: the administrator's command, the rules, the log, the smallest accepted serial number."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

import pytest
from authority_world import PREFIX, Postgres, RegistrationAuthority, Server, csr, ec_key, sha256
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from needs import needs, slow

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]

UUID = "0b6c1a52-94ef-4c6e-9d5b-6f2c8f0e7a31"


def status(server: Server, request: bytes) -> int:
    return server.enroll(request).status


def accepted(server: Server, of: bytes | x509.Certificate | int) -> int:
    """What the front is told about a certificate: this one, the one with this number, or that of this request."""
    if isinstance(of, bytes):
        (serial,) = server.authority.rows(f"SELECT serial FROM certificates WHERE sha256 = '{sha256(of)}'")[0]
        of = int(serial, 16)
    serial = of.serial_number if isinstance(of, x509.Certificate) else of
    return server.get("/accepted", X_Client_Serial=f"{serial:X}").status


def key_sha256(key: ec.EllipticCurvePrivateKey) -> str:
    """As `openssl pkey -pubout -outform DER | sha256sum` says it."""
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return sha256(key.public_key().public_bytes(serialization.Encoding.DER, info))


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
    assert authority.command("list", "--pending") == ""
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
    for _ in range(2):
        said = server.authority.command("authorize", "device", status=1)
        assert f"device: which one? {sha256(request)[:16]} (rejected)" in said
    assert server.get(sha256(request)).status == 403
    server.authority.command("authorize", sha256(request)[:16])
    assert server.get(sha256(request)).status == 200


def test_a_key_that_was_refused_wants_its_hash(server: Server) -> None:
    """Whoever says the ID thinks of another key."""
    authority, keys = server.authority, [ec_key() for _ in range(2)]
    rejected, retired, present = csr("rejected", keys[0]), csr("retired", keys[1]), csr("retired")
    for request in (rejected, retired):
        server.post(request)
    authority.command("reject", "rejected")
    authority.command("authorize", "retired")
    server.post(present)
    authority.command("authorize", "retired")
    for client_id, key in zip(("rejected", "retired"), keys, strict=True):
        back = csr(client_id, key)
        server.post(back)
        said = authority.command("authorize", client_id, status=1)
        assert f"{client_id}: its key was refused before: which one? {sha256(back)[:16]} (pending)" in said
        assert server.get(sha256(back)).status == 202
        authority.command("authorize", sha256(back)[:16])
        assert server.get(sha256(back)).status == 200


def test_said_twice(server: Server) -> None:
    """What was said once is no other decision when it is said again."""
    first, second, third = (csr("device") for _ in range(3))
    server.post(first)
    server.authority.command("reject", "device")
    server.authority.command("reject", "device")
    server.post(second)
    for _ in range(2):
        assert server.authority.command("authorize", "device").split()[:2] == [sha256(second)[:16], "authorized"]
    server.post(third)
    # Which of the two is meant: the one that the device has, or the one that waits?
    assert "which one?" in server.authority.command("reject", "device", status=1)
    assert [server.get(sha256(one)).status for one in (first, second, third)] == [403, 200, 202]


def test_after_a_leak_neither_key_of_a_device_is_renewed(server: Server) -> None:
    """`reject ID` means the key that the device has; the one before is out already."""
    authority, keys = server.authority, [ec_key(), ec_key()]
    authority.command("allow", "device")
    first, second = (csr("device", key) for key in keys)
    assert status(server, first) == 200
    server.post(second)
    authority.command("authorize", "device")
    assert server.get(sha256(second)).status == 200
    for _ in range(2):  # said twice, it is no decision about the other one
        assert authority.command("reject", "device") == f"{sha256(second)[:16]}  rejected  device\n"
    authority.command("minimum-serial", "--now")
    assert [server.get(sha256(one)).status for one in (first, second)] == [202, 403]
    assert [accepted(server, one) for one in (first, second)] == [403, 403]
    # Nor does a rule take either of them in another request.
    assert [status(server, csr("device", key)) for key in keys] == [202, 202]
    assert len(authority.log("signed")) == 2


def test_an_id_wins_over_the_beginning_of_a_hash(server: Server) -> None:
    first = csr("first")
    server.post(first)
    short, long = (csr(sha256(first)[:digits]) for digits in (8, 16))
    server.post(short)
    server.post(long)
    assert server.authority.command("authorize", sha256(first)[:8]).split()[0] == sha256(short)[:16]
    # So many digits are no accident: somebody wants to be taken for another.
    said = server.authority.command("authorize", sha256(first)[:16], status=1)
    assert f"the beginning of another request's hash: {sha256(first)[:16]} (pending)" in said
    assert [server.get(sha256(one)).status for one in (first, short, long)] == [202, 200, 202]


def test_a_whole_hash_is_nobodys_id(server: Server) -> None:
    """A stranger chose a victim's hash as an ID: neither decision about the victim is blocked by it."""
    victim = csr("victim")
    stranger = csr(sha256(victim))
    server.post(victim)
    server.post(stranger)
    for verb, expected in (("authorize", 200), ("reject", 403)):
        assert server.authority.command(verb, sha256(victim)).split()[2] == "victim"
        assert [server.get(sha256(one)).status for one in (victim, stranger)] == [expected, 202]
    server.authority.command("authorize", sha256(stranger))
    assert server.get(sha256(stranger)).status == 200


# --- Rules ---


def test_the_list_of_the_production_line(authority: RegistrationAuthority, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("# batch 7\nfffbeec0ff01\nfffbeec0ff02  # the demo's\n\n")
    assert authority.command("allow", "--file", str(ids), "fffbeec0ff03") == "3 new\n"
    assert authority.command("allow", "--file", "-", given="fffbeec0ff03\nfffbeec0ff04\n") == "1 new\n"
    with authority.serving() as server:
        assert [status(server, csr(f"fffbeec0ff0{number}")) for number in range(1, 6)] == [200, 200, 200, 200, 202]
    assert [row[1] for row in authority.log("authorized")] == 4 * ["rule:listed"]


@pytest.mark.parametrize("header", ["", "ID\r\n", "client_id,SHA256\r\n"])
def test_a_list_as_a_spreadsheet_writes_it(authority: RegistrationAuthority, tmp_path: Path, header: str) -> None:
    ids, request = tmp_path / "ids.csv", csr("one")
    lines = f"{header}one,{sha256(request)}\r\n\r\n# batch 7\r\ntwo\r\n \r\n"
    ids.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert authority.command("allow", "--file", str(ids)) == "2 new\n"
    assert authority.rows("SELECT client_id, expected FROM devices ORDER BY client_id") == [
        ("one", sha256(request)),
        ("two", None),
    ]
    # A name in another line is an ID, or none.
    said = authority.command("allow", "--file", "-", given="three\nID,SHA256\n", status=1)
    assert "'ID,SHA256': behind the comma is no SHA-256" in said
    # Which of the two is meant? The one that knows its key would be let in by a label else.
    said = authority.command("allow", "--file", "-", given=f"four,{sha256(request)}\nFOUR\n", status=1)
    assert "FOUR stands there twice, and not with the same SHA-256" in said
    for split in ("five\u2028six", "five\rsix", "five\x0bsix"):
        assert "no client ID" in authority.command("allow", "--file", "-", given=split, status=1)
    # What is no list at all is not shown as a whole.
    for given in ("a" * 10**6, "a" * 10**6 + ",b"):
        said = authority.command("allow", "--file", "-", given=given, status=1)
        assert "'aaa" in said and said.count("\n") == 1 and len(said) < 300
    assert authority.rows("SELECT count(*) FROM devices") == [(2,)]


def test_an_id_that_is_none_leaves_the_list_as_it_was(authority: RegistrationAuthority) -> None:
    assert "no client ID" in authority.command("allow", "good", "no\u202egood", status=1)
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
    said = server.authority.command("authorize", sha256(second))
    assert said.split("\n")[1] == f"{sha256(first)[:16]}  retired  device"
    assert server.get(sha256(second)).status == 200
    # The first key is no longer the device's: it isn't renewed, nor accepted. Nothing tells its holder to wipe it.
    retired = server.get(sha256(first))
    assert (retired.status, retired.headers["retry-after"]) == (202, "900")
    assert accepted(server, first) == 403
    server.authority.command("authorize", sha256(first))
    assert [server.get(sha256(one)).status for one in (first, second)] == [200, 202]


@pytest.mark.parametrize(
    "rules, ids",
    [
        ("", ("Device", "dEVICE", "device.")),
        ("uuids = true", (UUID, UUID.upper(), UUID.capitalize())),
        ('zone = "d.example.com"', ("a.d.example.com", "A.d.example.com", "a.D.EXAMPLE.com")),
    ],
)
def test_an_id_is_one_id_in_any_case(tmp_path: Path, rules: str, ids: tuple[str, ...]) -> None:
    authority = RegistrationAuthority(tmp_path, f"[rules]\n{rules}\n")
    authority.create_ca()
    authority.command("allow", "device")
    with authority.serving() as server:
        assert [status(server, csr(one)) for one in ids] == [200, 202, 202]
        authority.command("bar", ids[-1])
        assert server.post(csr(ids[1])).json["detail"] == "Bad subject: this client ID is barred"


def test_a_rule_that_admits_again(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path, "[rules]\nagain = true\n")
    authority.create_ca()
    authority.command("allow", "device")
    with authority.serving() as server:
        first, second = csr("device"), csr("device")
        assert [status(server, one) for one in (first, second)] == [200, 200]
        assert server.get(sha256(first)).status == 202


def test_erased_and_admitted_once_more(server: Server) -> None:
    """Its flash was erased: somebody says so for this device, before it comes or after."""
    authority = server.authority
    authority.command("allow", "before", "after")
    for client_id in ("before", "after"):
        assert status(server, csr(client_id)) == 200
    late = csr("after")
    assert status(server, late) == 202
    assert authority.command("allow", "--again", "before", "after") == "0 new, 2 changed\n"
    assert server.get(sha256(late)).status == 200
    assert [status(server, csr("before")) for _ in range(2)] == [200, 202]
    assert status(server, csr("after")) == 202
    assert [row[1] for row in authority.log("authorized")] == [
        "rule:listed",
        "rule:listed",
        "rule:again",
        "rule:again",
    ]


def test_an_id_with_its_hash_on_the_list(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """Whoever has read the ID off a label doesn't have the key."""
    keys = [ec_key() for _ in range(2)]
    requests = [csr("by-request"), csr("by-key", keys[0]), csr("later", keys[1])]
    lines = [f"by-request, {sha256(requests[0])}", f"by-key,{key_sha256(keys[0]).upper()}  # its public key", "later"]
    ids = tmp_path / "ids"
    ids.write_text("\n".join(lines))
    assert authority.command("allow", "--file", str(ids)) == "3 new\n"
    assert authority.command("allow", f"later,{key_sha256(keys[1])}") == "0 new, 1 changed\n"
    assert "no SHA-256" in authority.command("allow", "other,1234", status=1)
    with authority.serving() as server:
        for request, client_id in zip(requests, ("by-request", "by-key", "later"), strict=True):
            assert status(server, csr(client_id)) == 202
            assert status(server, request) == 200
        # Another request with the same key is the same device; one that was rejected is not.
        assert status(server, csr("by-key", keys[0], names=[x509.DNSName("by-key")])) == 200
        authority.command("disallow", "by-key")
        authority.command("allow", f"by-key,{key_sha256(keys[0])}")
        assert status(server, csr("by-key", keys[0], subject=[*PREFIX, ("CN", "by-key")])) == 202


@pytest.mark.parametrize("rules, hashed", [("", True), ("again = true", False)])
def test_a_retired_key_comes_back_by_its_hash_only(tmp_path: Path, rules: str, hashed: bool) -> None:
    """It may be in other hands, whatever request it comes with."""
    authority = RegistrationAuthority(tmp_path, f"[rules]\n{rules}\n")
    authority.create_ca()
    old, new = ec_key(), ec_key()
    first, second, back, again = (csr("device", key) for key in (old, new, old, old))
    authority.command("allow", "--file", "-", given=f"device,{key_sha256(old)}\n" if hashed else "device\n")
    with authority.serving() as server:
        assert status(server, first) == 200
        server.post(second)
        authority.command("authorize", sha256(second))
        assert [server.get(sha256(one)).status for one in (first, second)] == [202, 200]
        assert status(server, back) == 202
        # Nor is it the next key of an erased device.
        authority.command("allow", "--again", "device")
        assert [status(server, again), server.get(sha256(back)).status] == [202, 202]
        assert server.get(sha256(second)).status == 200
        authority.command("reject", sha256(again))
        authority.command("authorize", sha256(back))
        assert [server.get(sha256(one)).status for one in (back, second)] == [200, 202]


@pytest.mark.parametrize("rules, expected", [("", 202), ("again = true", 200)])
def test_the_present_key_is_not_the_next_one(tmp_path: Path, rules: str, expected: int) -> None:
    """What was said for an erased device's next key is kept for that key."""
    authority = RegistrationAuthority(tmp_path, f"[rules]\n{rules}\n")
    authority.create_ca()
    authority.command("allow", "device")
    key = ec_key()
    with authority.serving() as server:
        assert status(server, csr("device", key)) == 200
        authority.command("allow", "--again", "device")
        present, more = csr("device", key), csr("device", key)
        assert status(server, present) == expected
        # Its requests before are retired then, and it is the present key all the same.
        assert status(server, more) == expected
        authority.command("authorize", sha256(more))
        assert authority.rows("SELECT again FROM devices") == [(1,)]
        assert status(server, csr("device")) == 200
        assert authority.log("authorized")[-1][1] == "rule:again"
        assert authority.rows("SELECT again FROM devices") == [(0,)]


# --- A no that outlives rules and keys, and one that can be taken back ---

RULES = {"listed": "", "uuids": "uuids = true", "zone": 'zone = "d.example.com"', "again": "again = true"}


@pytest.mark.parametrize("rule", RULES)
def test_barred(tmp_path: Path, rule: str) -> None:
    authority = RegistrationAuthority(tmp_path, f"[rules]\n{RULES[rule]}\n")
    authority.create_ca()
    client_id = {"uuids": UUID, "zone": "a.d.example.com"}.get(rule, "device")
    if rule != "uuids":
        authority.command("allow", client_id)
    first, second, third = (csr(client_id) for _ in range(3))
    with authority.serving() as server:
        assert status(server, first) == 200
        assert authority.command("bar", client_id) == f"barred  {client_id}  (1 requests rejected)\n"
        for request in (second, third):
            assert server.get(sha256(first)).status == 403
            assert server.post(request).json["detail"] == "Bad subject: this client ID is barred"
            assert server.get(sha256(request)).status == 404
            authority.command("allow", client_id)
            authority.command("allow", "--again", client_id)
        assert accepted(server, first) == 403
        assert authority.command("list", "--barred").startswith(f"barred      {client_id}  since 2")
        assert "is barred; unbar it first" in authority.command("authorize", sha256(first), status=1)
        authority.command("unbar", client_id)
        assert server.get(sha256(first)).status == 403
        # It was said that its next key is to be admitted, and now it may be.
        assert status(server, second) == 200
        assert "is not barred" in authority.command("unbar", client_id, status=1)


def test_barred_before_it_ever_came(server: Server) -> None:
    server.authority.command("bar", "stolen")
    assert server.post(csr("stolen")).status == 400
    assert server.authority.command("list") == ""
    assert [row[2:4] for row in server.authority.log("barred")] == [["barred", "stolen"]]


def test_disallow_says_that_a_rule_admits_again(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path, "[rules]\nuuids = true\n")
    authority.create_ca()
    with authority.serving() as server:
        assert status(server, csr(UUID)) == 200
        assert "the rule uuids admits its next key; bar keeps it out" in authority.command("disallow", UUID)


def test_suspended_and_resumed(server: Server) -> None:
    """It waits; nothing is accepted, renewed or wiped; and then it goes on with what it had."""
    authority = server.authority
    authority.command("allow", "device", "new")
    request, new = csr("device"), csr("new")
    before = server.enroll(request)
    authority.command("suspend", "DEVICE", "new")
    reply = server.get(sha256(request), If_Modified_Since=before.headers["last-modified"])
    assert (reply.status, reply.headers["retry-after"]) == (202, "900")
    assert accepted(server, before.certificate) == 403
    assert status(server, new) == 202
    authority.command("minimum-serial", "--now")
    assert server.get(sha256(request)).status == 202
    assert len(authority.log("signed")) == 1
    assert [line.split()[1] for line in authority.command("list").splitlines()] == ["suspended", "suspended"]
    authority.command("resume", "device", "new")
    assert [server.get(sha256(one)).status for one in (request, new)] == [200, 200]
    assert "is not suspended" in authority.command("resume", "device", status=1)
    authority.command("suspend", "device")
    authority.command("bar", "device")
    assert "is barred, which is more" in authority.command("suspend", "device", status=1)
    assert server.get(sha256(request)).status == 403


@pytest.mark.parametrize("name", ["ns", "NS1", "mail", "_acme-challenge", "www", ""])
def test_a_zones_own_names_are_nobodys(tmp_path: Path, name: str) -> None:
    authority = RegistrationAuthority(tmp_path, '[rules]\nzone = "d.example.com"\n')
    authority.create_ca()
    request = csr(f"{name}.d.example.com".lstrip("."))
    with authority.serving() as server:
        assert server.post(request).json["detail"] == "Bad subject: the CN is a name that the zone needs for itself"
        authority.rows("INSERT INTO zone_names VALUES ('primary.d.example.com', 1)")
        assert server.post(csr("Primary.d.example.com")).status == 400


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
        ('zone = "devices.example.com"', ".devices.example.com", 202),
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
    assert (reply.status, reply.json["detail"]) == (
        503,
        "the signer: device is authorized, and not on the list of devices",
    )
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


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_log_of_a_device_whatever_it_is_called(tmp_path: Path, postgres: Postgres, kind: str) -> None:
    with postgres.database() as database:
        authority = RegistrationAuthority(tmp_path, database=database if kind == "postgresql" else None)
        authority.init()
        authority.command("allow", "Stra\u00dfe", "K\u00d6LN", "x.", "y")
        for client_id, called in (("Stra\u00dfe", "STRASSE."), ("K\u00d6LN", "k\u00f6ln"), ("x.", "X"), ("y", "Y.")):
            (line,) = authority.command("log", "--id", called).splitlines()
            assert line.split("  ")[3] == client_id
            assert authority.command("log", "--json", "--id", called).count('"allowed"') == 1
        for nobodys in (["--id", "z"], ["--id", ""], ["--action", ""]):
            assert authority.command("log", *nobodys) == ""


HIDDEN = "\x1b[2J\x9b\u202e\u3164\u2800\ufe0f\U000e0100"


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_what_moves_a_terminal_is_never_shown_raw(tmp_path: Path, postgres: Postgres, kind: str) -> None:
    """Whatever got into the database: by an older version, by hand, or by what a CA or a name server said."""
    with postgres.database() as url:
        authority = RegistrationAuthority(tmp_path, database=url if kind == "postgresql" else None)
        authority.create_ca()
        with authority.serving() as server:
            assert server.post(csr("device")).status == 202
        bad = f"a{HIDDEN}\nz"

        def change(statement: str) -> None:
            if kind == "sqlite":
                authority.rows(statement)
            else:
                postgres.sql(statement, url)

        change(f"UPDATE requests SET client_id = '{bad}', address = '{bad}'")
        change(f"INSERT INTO bars (device, kind, since, who) VALUES ('{bad}', 'barred', 1, '{bad}')")
        change(f"INSERT INTO log (at, who, action, client_id, detail) VALUES (1, '{bad}', 'x', '{bad}', '{bad}')")
        for command in (["list"], ["list", "--pending"], ["list", "--barred"], ["log", "--action", "x"]):
            plain, data = authority.command(*command), authority.command(*command, "--json")
            assert plain.count("\n") == 1
            assert "a\\u001b[2J\\u009b\\u202e\\u3164\\u2800\\ufe0f\\udb40\\udd00\\nz" in plain
            assert not set(HIDDEN) - {"[", "2", "J"} & set(plain + data)
            assert bad in json.loads(data)[0].values()
        said = authority.command("authorize", bad, status=1)
        assert not set(HIDDEN) - {"[", "2", "J"} & set(said)


# --- In place of a revocation list ---


def test_the_smallest_accepted_serial_number(server: Server) -> None:
    server.authority.command("allow", "good", "stolen")
    good, stolen = csr("good"), csr("stolen")
    before = {name: server.enroll(request) for name, request in (("good", good), ("stolen", stolen))}

    serials = {name: reply.certificate.serial_number for name, reply in before.items()}
    assert [accepted(server, serial) for serial in serials.values()] == [204, 204]
    server.authority.command("reject", "stolen")
    assert [accepted(server, serial) for serial in serials.values()] == [204, 403]

    minimum = int(server.authority.command("minimum-serial", "--now"), 16)
    assert [accepted(server, serial) for serial in serials.values()] == [403, 403]
    # Every device that asks has a new one, long before a third of its life is left.
    renewed = server.get(sha256(good), If_Modified_Since=before["good"].headers["last-modified"])
    assert renewed.status == 200
    assert renewed.certificate.serial_number > minimum > max(serials.values())
    assert accepted(server, renewed.certificate) == 204
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
        ("pending_days = 40000", "pending_days is at most 36500"),
        ("[ca]\nlife_hours = 1000000000000000", "ca.life_hours is a whole number from 0 to 2147483647"),
        ("[ca]\nlife_hours = 1000000", "ca.life_hours is at most 876000"),
        ("[ca]\nbackdate_seconds = -1", "ca.backdate_seconds is a whole number from 0"),
        ('[ca]\nusages = ["client", "client"]', "ca.usages are "),
        ('[ca]\nfolder = ""', "ca.folder is the path of a folder"),
        ('[rules]\nzone = "*.bad zone"', "rules.zone is a host name"),
        ("rules = 1", "rules is a table: [rules], "),
        ("[[dns]]", "dns is a table: [dns], "),
        (f"retry_after = {10**23}", "retry_after is a whole number from 0 to 2147483647"),
        ("retry_after = 2147483647", "retry_after is between 1 and 2592000"),
        ('front = ["10.0.0.0/8"]', "front are IP addresses, not networks"),
        ('refusals = "/tmp/a\\u0000b"', "refusals has a character that can't be seen"),
        ('[dns]\nname_servers = ["192.0.2.1@99999"]', "dns.name_servers are addresses"),
        ('[dns]\nname_servers = ["192.0.2.1@0"]', "dns.name_servers are addresses"),
        ('[dns]\nname_servers = ["192.0.2.1@\u00b2"]', "dns.name_servers are addresses"),
        ('[dns]\nname_servers = ["192.0.2.1@"]', "dns.name_servers are addresses"),
        ("[dns]\ncommand_seconds = 2147483647", "dns.command_seconds is between 1 and 86400"),
    ],
)
def test_a_wrong_configuration_is_said(tmp_path: Path, settings: str, said: str) -> None:
    authority = RegistrationAuthority(tmp_path, settings)
    assert said in (line := authority.command("list", status=1)) and line.count("\n") == 1


@pytest.mark.parametrize(
    "database",
    ["postgresql+psycopg://h:port/x", "mysql://h/x", "postgresql://h/x", "sqlite://", "sqlite+no:////x", "x"],
)
def test_a_database_that_is_none_of_ours(tmp_path: Path, database: str) -> None:
    authority = RegistrationAuthority(tmp_path, database=database)
    said = authority.command("list", status=1)
    assert "database is no address like" in said and said.count("\n") == 1


@pytest.mark.parametrize("setting", ["roots", "account_key", "eab_key_file"])
def test_a_file_of_an_acme_ca_that_is_none_is_named(tmp_path: Path, setting: str) -> None:
    (tmp_path / "none").write_text("nothing \u00e5")
    files = {"roots": tmp_path / "ca" / "ca.crt", "account_key": tmp_path / "account.key", setting: tmp_path / "none"}
    made = RegistrationAuthority(tmp_path)
    made.create_ca()
    settings = '[acme]\ndirectory = "https://localhost/dir"\nterms_agreed = true\neab_key_id = "x"\n'
    settings += "".join(f'{name} = "{path}"\n' for name, path in {"eab_key_file": tmp_path / "none", **files}.items())
    settings += '[dns]\nzone = "d.example.com"\ncommand = "/bin/true"\n'
    authority = RegistrationAuthority(tmp_path, settings, signer="acme")
    said = authority.command("work", "--once", status=1)
    assert said.startswith(f"caramel-authority: acme.{setting}: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "line, named",
    [
        ("ca-renew --days 3000000", "--days"),
        ("ca-renew --days -5", "--days"),
        ("ca-next --days 0", "--days"),
        ("server-certificate localhost --out /dev/null --days -1", "--days"),
        ("server-certificate localhost --out /dev/null --days 0", "--days"),
        ("purge --days -5", "--days"),
        ("purge --days 99999999999999999999", "--days"),
        ("log --last -1", "--last"),
        ("log --last 99999999999999999999", "--last"),
        ("log --id \udcff", "--id"),
        ("authorize \udcff", "HASH|ID"),
        ("bar \udcff", "ID"),
        ("allow \udcff", "ID[,SHA256]"),
        ("serve --listen garbage", "--listen"),
        ("serve --listen 127.0.0.1:abc", "--listen"),
        ("serve --listen 127.0.0.1:65536", "--listen"),
        ("work --pause -1", "--pause"),
        ("work --pause nan", "--pause"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(tmp_path: Path, line: str, named: str) -> None:
    said = RegistrationAuthority(tmp_path).command(*line.split(), status=2)
    assert f"error: argument {named}: " in said.splitlines()[-1] and "Traceback" not in said


def test_what_is_no_text_or_no_host_is_said_in_a_line(authority: RegistrationAuthority, tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(b"device\n\xff\n")
    said = authority.command("allow", "--file", str(tmp_path / "ids"), status=1)
    assert f"--file {tmp_path}/ids: it is not UTF-8" in said and said.count("\n") == 1
    assert authority.rows("SELECT * FROM devices") == []
    said = authority.command("serve", "--listen", "no host:80", status=1)
    assert "--listen no host:80: " in said and said.count("\n") == 1


@pytest.mark.parametrize("address", ["unix:/nowhere/at/all", "192.0.2.1:8080"])
def test_where_nobody_can_listen_is_said_by_name(authority: RegistrationAuthority, address: str) -> None:
    said = authority.command("serve", "--listen", address, status=1)
    assert said.startswith(f"caramel-authority: --listen {address}: ") and said.count("\n") == 1


def test_a_configuration_from_another_editor(authority: RegistrationAuthority) -> None:
    text = authority.config.read_text()
    authority.config.write_text(f"\ufeff{text}# Linköping\n", "utf-8")
    authority.command("list", before=["env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0"])
    authority.config.write_text("a = " + 9999 * "[")
    said = authority.command("list", status=1)
    assert said.startswith(f"caramel-authority: {authority.config}: ") and said.count("\n") == 1


def test_who_reads_no_further_gets_no_complaint(authority: RegistrationAuthority) -> None:
    """As in `log | head`, both for what fits into a buffer and for what doesn't."""
    authority.command("allow", *(f"device-{number}" for number in range(3000)))
    for options in ([], ["--last", "1"]):
        # The pipe's reader is gone before anything is written.
        script = 'exec 3>&1; "$0" "$@" 2>&3 | true; exit "${PIPESTATUS[0]}"'
        assert authority.command("log", *options, before=["bash", "-c", script], status=1) == ""


def test_a_password_is_nobodys_to_read(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path, database="postgresql+psycopg://me:secret@127.0.0.1:1/none")
    authority.config.chmod(0o644)
    assert "everybody may read it: chmod o-r" in authority.command("list", status=1)
    authority.config.chmod(0o640)
    said = authority.command("list", status=1)
    assert "the database: connection" in said and "secret" not in said


def test_no_configuration(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path)
    authority.config.unlink()
    assert "No such file" in authority.command("list", status=1)
