# SPDX-License-Identifier: MIT OR Apache-2.0
"""What is kept: its versions and the steps between them."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path

from authority_world import Postgres, RegistrationAuthority, csr, sha256
from needs import needs, slow

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]

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
    assert len(old.log()) == 11
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
