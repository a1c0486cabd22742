# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is kept: versions and the steps between them, copies, what is forgotten, and what it costs to look at it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import world
from authority_world import BIN, Postgres, RegistrationAuthority, Server, at, csr, ec_key, sha256
from needs import needs, slow

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]

#: Under faketime(1), a timer waits for ever unless the clock that it waits by is left alone.
TIMERS = ["env", "FAKETIME_DONT_FAKE_MONOTONIC=1"]
#: An SQLite dump of what 2.0.0 kept.
OLD = Path(__file__).with_name("made_by_2_0_0.sql").read_text()


def old_request(client_id: str) -> str:
    """The hash of the request that 2.0.0 had of this device."""
    found = re.search(rf"'([0-9a-f]{{64}})','-----BEGIN CERTIFICATE REQUEST[^']*','{client_id}'", OLD)
    assert found
    return found[1]


# --- Versions ---


def test_a_mistyped_path_makes_no_empty_authority(authority: RegistrationAuthority) -> None:
    authority.config.write_text(authority.config.read_text().replace("state.db", "sate.db"))
    for command in (["list"], ["allow", "device"], ["serve"], ["work", "--once"], ["upgrade"]):
        assert "sate.db: there is no database; caramel-authority init" in authority.command(*command, status=1)
    assert not authority.state.with_name("sate.db").exists()


def test_an_empty_file_is_no_database(authority: RegistrationAuthority) -> None:
    authority.state.write_bytes(b"")
    for command in ("list", "upgrade"):
        assert "caramel-authority init makes" in authority.command(command, status=1)


def test_init_leaves_what_is_there(authority: RegistrationAuthority) -> None:
    authority.command("allow", "device")
    assert authority.command("init") == "already there\n"
    assert [row[3] for row in authority.log("allowed")] == ["device"]


def test_a_newer_database_is_left_alone(authority: RegistrationAuthority) -> None:
    authority.rows("UPDATE alembic_version SET version_num = '9999'")
    for command in ("list", "serve", "upgrade", "init"):
        assert "which a newer caramel-authority made" in authority.command(command, status=1)


def columns_and_indexes(authority: RegistrationAuthority) -> set[object]:
    found: set[object] = set()
    for (table,) in authority.rows("SELECT name FROM sqlite_master WHERE type = 'table'"):
        columns = authority.rows(f"SELECT name, type, \"notnull\", pk FROM pragma_table_info('{table}')")
        indexes = authority.rows(f"SELECT name, \"unique\", partial FROM pragma_index_list('{table}')")
        covered = [(name, authority.rows(f"SELECT name FROM pragma_index_info('{name}')")) for name, *_ in indexes]
        found |= {(table, *row) for row in [*columns, *indexes]} | {(table, name, *of) for name, of in covered}
    return found | set(authority.rows("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))


def test_upgrade_of_2_0_0(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """Nothing is lost, a device goes on with its key, and the tables are those that a new authority has."""
    old = RegistrationAuthority(tmp_path / "old", "[rules]\nuuids = true\n")
    with contextlib.closing(sqlite3.connect(old.state)) as database:
        database.executescript(OLD)
    for command in ("list", "serve", "init"):
        said = old.command(command, status=1)
        assert "has version 0001, this program" in said and "run caramel-authority upgrade" in said
    assert old.command("upgrade").startswith("0001 -> ")
    assert old.command("upgrade").endswith(" already\n")
    assert columns_and_indexes(old) == columns_and_indexes(authority)
    assert len(old.log()) == 12
    assert old.log("upgraded")[0][5].startswith("0001 -> ")
    old.create_ca()
    certificates = old.rows("SELECT usages, not_after - not_before FROM certificates")
    assert certificates == 2 * [("client", 167 * 3600)]
    with old.serving() as server:
        reply = server.get(old_request("Device-1"))
        assert reply.status == 200
        # 2.0.0 had accepted nothing that was signed before 1795848747533.
        assert reply.certificate.serial_number > 1795848747533
        assert server.get(old_request("refused")).status == 403
        # Two rows that differ in case only were one device, and its place was free.
        assert [server.enroll(csr(name)).status for name in ("device-2", "Device-2", "device-1")] == [200, 202, 202]


def test_an_upgrade_that_is_killed_has_changed_nothing(tmp_path: Path) -> None:
    old = RegistrationAuthority(tmp_path / "old")
    with contextlib.closing(sqlite3.connect(old.state)) as database:
        # The last but one step finds what it would make: that is as good as any other end.
        database.executescript(OLD + "CREATE INDEX ix_log_client_id ON log (client_id);")
    before = columns_and_indexes(old)
    old.command("upgrade", status=1)
    assert columns_and_indexes(old) == before


def test_the_version_is_that_of_the_last_step() -> None:
    """The program says it by itself, because every command looks at it."""
    program = "from caramel_authority.schema import HEAD, MIGRATIONS; from alembic.script import ScriptDirectory; "
    program += "print(HEAD, ScriptDirectory(MIGRATIONS).get_current_head())"
    said, steps = subprocess.check_output([BIN / "python", "-c", program], text=True).split()
    assert said == steps


def test_what_takes_long_to_load_is_loaded_by_whom_it_serves(authority: RegistrationAuthority) -> None:
    program = "import sys; from caramel_authority.cli import main; main(); print(*sys.modules)"
    command = [str(word) for word in (BIN / "python", "-c", program, "--config", authority.config, "list")]
    loaded = set(subprocess.check_output(command, text=True).split())
    assert "sqlalchemy" in loaded
    assert not loaded & {"acme", "alembic", "dns", "prometheus_client", "requests", "waitress", "werkzeug"}


# --- Copies ---


def test_a_copy_while_serving(server: Server, tmp_path: Path) -> None:
    """What was there when the copy was begun is in it, as one file that needs no other."""
    authority, copy = server.authority, tmp_path / "copy.db"
    authority.command("allow", *(f"device-{number}" for number in range(20)))
    with ThreadPoolExecutor(2) as pool:
        devices = [pool.submit(server.enroll, csr(f"device-{number}")) for number in range(20)]
        for _ in range(3):
            authority.command("backup", str(copy))
        assert [one.result().status for one in devices] == 20 * [200]
    assert [one.name for one in tmp_path.glob("*copy*")] == ["copy.db"]
    assert copy.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(copy)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT count(*) FROM devices").fetchone() == (20,)
    said = authority.command("restore", str(copy), status=1)
    assert "state.db is in use: stop what serves and works first" in said


def test_a_copy_on_another_machine(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """There is no database yet in whose place it comes: it has the folder's rights, as one that `init` makes."""
    authority.command("bar", "device")
    authority.command("backup", str(tmp_path / "copy.db"))
    other = RegistrationAuthority(tmp_path / "other")
    other.folder.chmod(0o2770)
    assert "refusals is gone" in other.command("restore", str(tmp_path / "copy.db"), status=1)
    shutil.copy(authority.folder / "refusals", other.folder)
    other.command("restore", str(tmp_path / "copy.db"))
    assert other.state.stat().st_mode & 0o777 == 0o660
    with other.serving() as server:
        assert "is in use" in other.command("restore", str(tmp_path / "copy.db"), status=1)
        shutil.copytree(authority.ca.parent, other.ca.parent)
        assert server.post(csr("device")).status == 400


@pytest.mark.parametrize("how", ["restore", "by hand"])
def test_a_restored_database_lets_nobody_in_again(authority: RegistrationAuthority, tmp_path: Path, how: str) -> None:
    copy = tmp_path / "copy.db"
    names = ("kept", "rejected", "barred", "suspended", "disallowed", "moved")
    requests = {name: csr(name) for name in names}
    authority.command("allow", *(name for name in names if name != "disallowed"))
    with authority.serving() as server:
        serial = server.enroll(requests["kept"]).certificate.serial_number
        server.enroll(requests["moved"])
        server.post(csr("disallowed"))
        authority.command("authorize", "disallowed")
        authority.command("backup", str(copy))
        for name in ("rejected", "barred", "suspended"):
            assert server.enroll(requests[name]).status == 200
        authority.command("reject", "rejected")
        authority.command("bar", "barred", "never-seen")
        authority.command("suspend", "suspended")
        authority.command("disallow", "disallowed")
        second = csr("moved")
        server.post(second)
        authority.command("authorize", sha256(second))
        minimum = authority.command("minimum-serial", "--now")
    if how == "restore":
        assert authority.command("restore", str(copy)) == "9 decisions were newer\n"
    else:
        for suffix in ("-wal", "-shm"):
            authority.state.with_name(f"state.db{suffix}").unlink(missing_ok=True)
        shutil.copy(copy, authority.state)
    with authority.serving() as server:
        assert authority.command("minimum-serial") == minimum
        assert server.get("/accepted", X_Client_Serial=f"{serial:X}").status == 403
        known = {name: server.get(sha256(requests[name])).status for name in ("kept", "rejected", "barred", "moved")}
        assert known == {"kept": 200, "rejected": 403, "barred": 403, "moved": 202}
        # Their places on the list were taken, or they have none.
        for name, status in (("rejected", 202), ("barred", 400), ("never-seen", 400), ("disallowed", 202)):
            request = csr(name)
            posted = server.post(request).status
            assert (posted if posted == 400 else server.get(sha256(request)).status) == status
        assert server.post(requests["suspended"]).status == 202
        assert server.get(sha256(requests["suspended"])).status == 202
        authority.command("resume", "suspended")
        assert server.get(sha256(requests["suspended"])).status == 200
        assert [row[5].split()[0] for row in authority.log("restored")] == ["9"]
        authority.command("unbar", "barred")
    with authority.serving() as server:
        assert len(authority.log("restored")) == 1
        assert server.post(csr("barred")).status == 202


def test_what_can_not_be_restored(authority: RegistrationAuthority, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.db", tmp_path / "other.db"
    authority.command("allow", "device")
    before = authority.state.read_bytes()
    for content in (b"", b"no database " * 1000):
        other.write_bytes(content)
        assert f"{other}" in authority.command("restore", str(other), status=1)
    assert authority.state.read_bytes() == before
    authority.command("backup", str(copy))
    # Nothing was ever refused, or the file is lost: somebody has to say which.
    assert "refusals is gone" in authority.command("restore", str(copy), status=1)
    assert authority.command("restore", str(copy), "--forget") == "0 decisions were newer\n"
    # What is to be replaced may be broken: that is why.
    authority.state.write_bytes(b"no database " * 1000)
    authority.command("restore", str(copy), "--forget")
    assert [row[3] for row in authority.log("allowed")] == ["device"]


def test_a_copy_of_postgresql_is_its_own_affair(tmp_path: Path, postgres: Postgres) -> None:
    with postgres.database() as url:
        authority = RegistrationAuthority(tmp_path, database=url)
        authority.create_ca()
        assert "pg_dump" in authority.command("backup", str(tmp_path / "copy"), status=1)
        authority.command("bar", "device")
        postgres.sql("DELETE FROM bars; UPDATE numbers SET value = 0 WHERE name = 'refusals'", url)
        assert authority.command("restore") == "1 decisions were newer\n"
        with authority.serving() as server:
            assert server.post(csr("device")).status == 400


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_log_for_machines_is_the_log_for_people(tmp_path: Path, postgres: Postgres, database: str) -> None:
    """Each database writes both by functions of its own."""
    with postgres.database() as url:
        authority = RegistrationAuthority(tmp_path, **({"database": url} if database == "postgresql" else {}))
        authority.create_ca()
        with authority.serving() as server:
            server.post(csr("device"))
        authority.command("authorize", "device")
        authority.command("bar", "other")
        lines = [line.split("  ") for line in authority.command("log").splitlines()]
        rows = json.loads(authority.command("log", "--json"))
        last = json.loads(authority.command("log", "--json", "--last", "1"))
    assert len(rows) >= 3 and last == rows[-1:]
    assert [row["id"] for row in rows] == sorted({row["id"] for row in rows})
    for row, line in zip(rows, lines, strict=True):
        said = [row["at"], row["who"], row["action"], row["client_id"] or "-", (row["sha256"] or "-")[:16]]
        assert line == [*said, *([row["detail"]] if row["detail"] else [])]


# --- What goes ---


def test_what_nobody_decided_about_goes(authority: RegistrationAuthority) -> None:
    """A device that is still there posts again; and a key that nobody has any more may be anybody's."""
    key = ec_key()
    requests = {name: csr(name, key if name == "gone" else None) for name in ("gone", "asks", "rejected", "good")}
    authority.command("allow", "good")
    with authority.serving() as server:
        for request in requests.values():
            server.post(request)
        authority.command("reject", "rejected")
    with authority.serving(before=[*TIMERS, *at(20)]) as server:
        server.get(sha256(requests["asks"]))
        world.until("it was seen", lambda: authority.rows("SELECT * FROM sightings"))
    assert authority.command("purge", "--days", "50") == "0 requests forgotten\n"
    with authority.serving(before=[*TIMERS, *at(31)]) as server:
        # It is done as devices ask, once in an hour.
        server.get(sha256(requests["good"]))
        world.until("what was forgotten is in the log", lambda: authority.log("purged"))
        statuses = {name: server.get(sha256(request)).status for name, request in requests.items()}
        assert statuses == {"gone": 404, "asks": 202, "rejected": 403, "good": 200}
        assert server.post(csr("other", key)).status == 202


def test_a_flood_is_kept_out(tmp_path: Path) -> None:
    authority = RegistrationAuthority(tmp_path, "pending_limit = 30\n")
    authority.create_ca()
    authority.command("allow", "device")
    with authority.serving() as server:
        same = [server.post(csr("same")).status for _ in range(21)]
        assert same == [*20 * [202], 503]
        others = [server.post(csr(f"stranger-{number}")) for number in range(11)]
        assert [one.status for one in others] == [*10 * [202], 503]
        assert others[-1].json["detail"] == "30 requests wait for a decision: no more are taken"
        assert others[-1].headers["retry-after"] == "900"
        assert server.enroll(csr("device")).status == 200


@needs("root")
def test_a_full_disk(tmp_path: Path) -> None:
    """Devices have their certificates, and whoever decides is told what to do; then it works."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], check=True)
    try:
        authority = RegistrationAuthority(disk)
        authority.create_ca()
        authority.command("allow", "device")
        request = csr("device")
        with authority.serving() as server:
            assert server.enroll(request).status == 200
            filled = disk / "filled"
            with filled.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            said = authority.command("reject", "device", status=1)
            assert f"nothing was changed: free some of the disk that has {authority.state}" in said
            assert server.get(sha256(request)).status == 200
            assert server.post(csr("other")).status == 503
            filled.unlink()
            authority.command("reject", "device")
            assert server.get(sha256(request)).status == 403
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# --- The calendar ---


@pytest.mark.parametrize("ahead, usable", [(365, False), (0.03, True)])
def test_a_clock_that_was_ahead_strands_nobody(authority: RegistrationAuthority, ahead: float, usable: bool) -> None:
    """What was signed then begins in the future, and is never handed out again; within the hour by which
    certificates begin earlier it is as good as any.
    """
    authority.command("allow", "device")
    request = csr("device")
    with authority.serving(before=at(ahead)) as server:
        first = server.enroll(request)
    with authority.serving() as server:
        second = server.get(sha256(request), If_Modified_Since=first.headers["last-modified"])
        assert (second.body == first.body) == usable
        if not usable:
            assert second.certificate.not_valid_before_utc < world.now()
            unchanged = server.get(sha256(request), If_Modified_Since=second.headers["last-modified"])
            assert unchanged.status == 304
            assert second.certificate.serial_number > first.certificate.serial_number
    assert len(authority.log("signed")) == (1 if usable else 2)


def test_when_a_device_was_last_seen(authority: RegistrationAuthority) -> None:
    """It is written at most once an hour, and not while the device waits for its answer."""
    authority.command("allow", "device", "silent")
    requests = [csr("device"), csr("silent")]
    with authority.serving() as server:
        for request in requests:
            server.enroll(request)
        seen = "SELECT count(*), max(at) FROM sightings"
        world.until("both were seen", lambda: authority.rows(seen)[0][0] == 2)
        before = authority.rows(seen)
        server.get(sha256(requests[0]))
        time.sleep(3)  # longer than others are waited for
    assert authority.rows(seen) == before

    def differs(before: object) -> bool:
        return authority.rows(seen) != before

    for days in (3, 5):
        with authority.serving(before=[*TIMERS, *at(days)]) as server:
            server.get(sha256(requests[0]))
            world.until("it was seen again", functools.partial(differs, before))
            before = authority.rows(seen)
    (silent,) = authority.command("list", "--silent", "2d", before=at(5.1)).splitlines()
    assert silent.split()[2] == "silent"
    assert authority.command("list", "--silent", "6d", before=at(5.1)) == ""
    ends = authority.command("list", "--ends-within", "1d", before=at(6.5)).splitlines()
    assert [line.split()[2] for line in ends] == ["silent"]
    (row, _) = json.loads(authority.command("list", "--json"))
    assert (row["client_id"], row["state"], row["seen_from"]) == ("device", "authorized", "127.0.0.1")


def test_what_waits_and_what_speaks_against_it(server: Server) -> None:
    for _ in range(2):
        server.post(csr("often"))
    server.authority.command("reject", server.authority.command("list").split()[0])
    server.post(csr("once"))
    waiting = [line.split("  ") for line in server.authority.command("list", "--pending").splitlines()]
    assert [(row[1].strip(), row[-1]) for row in waiting] == [
        ("pending", "was rejected before"),
        ("pending", "1 key"),
    ]
    assert waiting[0][-3:-1] == ["from 127.0.0.1", "2 keys"]
    rows = json.loads(server.authority.command("list", "--pending", "--json"))
    assert [(row["client_id"], row["keys"], row["rejected_before"]) for row in rows] == [
        ("often", 2, 1),
        ("once", 1, 0),
    ]


def test_one_look_at_90_000_devices(authority: RegistrationAuthority) -> None:
    """In processor time, which other programs on the machine don't make longer."""
    fill(authority)
    spent = {}
    for command in ("list", "list --pending", "list --silent 3h", "log", "log --id dev000007 --last 5"):
        before = os.times()
        said = authority.command(*command.split())
        after = os.times()
        spent[command] = after.children_user + after.children_system - before.children_user - before.children_system
        lines = {"list": 90000, "list --pending": 9000, "log": 900001, "log --id dev000007 --last 5": 5}
        assert said.count("\n") == lines.get(command, said.count("\n"))
    print(spent)
    assert max(spent.values()) < 8, spent  # 79 s were the reason


def test_30_000_ids_while_devices_are_served(authority: RegistrationAuthority, tmp_path: Path) -> None:
    """Devices that post meanwhile are admitted, and none waits for the whole list."""
    ids = tmp_path / "ids"
    ids.write_text("".join(f"dev{number:06}\n" for number in range(30000)))
    with authority.serving() as server, ThreadPoolExecutor(1) as pool:
        listing = pool.submit(authority.command, "allow", "--file", str(ids), timeout=300)
        requests, slowest, start = [], 0.0, time.monotonic()
        for number in itertools.count(0, 4057):
            requests.append(csr(f"dev{number % 30000:06}"))
            begun = time.monotonic()
            assert server.post(requests[-1]).status == 202
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.2)
            if listing.done():
                break
        assert listing.result() == "30000 new\n"
        # A slow machine takes longer for both.
        assert slowest < max(5, (time.monotonic() - start) / 4)
        assert len(requests) > 5
        assert {server.get(sha256(request)).status for request in requests} == {200}


def fill(authority: RegistrationAuthority) -> None:
    """90 000 devices with two certificates, of which every tenth waits, and 900 000 lines in the log."""
    pem = "-----BEGIN CERTIFICATE-----\n" + 14 * (64 * "A" + "\n") + "-----END CERTIFICATE-----\n"
    now = int(time.time())
    with contextlib.closing(sqlite3.connect(authority.state)) as database, database:
        database.execute(
            "CREATE TEMP TABLE d AS WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n "
            "WHERE i < 89999) SELECT i, printf('%064x', i * 7919) AS h, printf('dev%06d', i) AS id FROM n"
        )
        database.execute(
            "INSERT INTO requests (sha256, pem, client_id, device, key_sha256, posted, state, address) "
            f"SELECT h, ?, id, id, h, {now} - 900000 + i, "
            "CASE WHEN i % 10 THEN 'authorized' ELSE 'pending' END, '10.0.0.1' FROM d",
            [pem],
        )
        database.execute(f"INSERT INTO sightings SELECT h, {now} - i, '10.0.0.1' FROM d")
        for life in (0, 1):
            database.execute(
                "INSERT INTO certificates (sha256, serial, pem, not_before, not_after, renew_after, "
                f"modified) SELECT h, printf('%x', i * 2 + {life}), ?, {now} - 100, {now} + 500000, "
                f"{now} + 300000, {now} - 100 + {life} FROM d WHERE i % 10",
                [pem],
            )
        database.execute(
            "INSERT INTO log (at, who, action, client_id, sha256, detail) SELECT "
            f"{now} - 900000 + j * 90000 + i, 'signer', 'signed', id, h, 'serial 1a2b3c' FROM d, "
            "(WITH RECURSIVE m(j) AS (SELECT 0 UNION ALL SELECT j + 1 FROM m WHERE j < 9) SELECT j FROM m)"
        )


def test_upgrade_on_postgresql(tmp_path: Path, postgres: Postgres) -> None:
    with postgres.database() as new_url, postgres.database() as old_url:
        new = RegistrationAuthority(tmp_path / "new", database=new_url)
        new.init()
        old = RegistrationAuthority(tmp_path / "old", database=old_url)
        tables = re.sub(r"^CREATE TRIGGER.*\n", "", OLD, flags=re.M).replace("id INTEGER NOT", "id SERIAL NOT")
        for table in ("certificates", "log"):
            tables += f"SELECT setval('{table}_id_seq', 100);\n"
        postgres.sql(tables, old_url)
        assert old.command("upgrade").startswith("0001 -> ")
        query = """SELECT table_name, column_name, data_type, is_nullable, character_maximum_length
            FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"""
        indexes = "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1"
        for what in (query, indexes):
            assert postgres.sql(what, old_url) == postgres.sql(what, new_url)
        old.create_ca()
        with old.serving() as server:
            assert server.get(old_request("Device-1")).status == 200
            assert sha256(b"") not in old.command("list")
