# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which version the tables have, and how they get to this one: steps of Alembic, in `migrations`.

Only `init` and `upgrade` change tables. A program that finds others than its own says so and does nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, MetaData, inspect, text

from .errors import WrongUsage

if TYPE_CHECKING:
    from alembic.config import Config

#: What 2.0.0 made, which knew no versions.
FIRST = "0001"
#: What this program works with: that of the last step. It is said here because every command looks at the version,
#: and Alembic, which knows the steps, takes longer to load than most commands to run.
HEAD = "0002"
MIGRATIONS = str(Path(__file__).with_name("migrations"))


def init(db: Connection, metadata: MetaData) -> bool:
    """Makes the tables in a transaction that writes; whether there were none. Raises WrongUsage for older ones."""
    _alone(db)
    if _version(db) is not None:
        check(db)
        return False
    from alembic import command

    metadata.create_all(db)
    command.stamp(_config(db), "head")
    return True


def upgrade(db: Connection) -> tuple[str, str]:
    """Brings the tables up to this version, in a transaction that writes: all steps are taken, or none.

    The versions before and after. Raises WrongUsage.
    """
    _alone(db)
    before = _version(db)
    if before is None:
        raise WrongUsage("there are no tables; caramel-authority init makes them")
    from alembic import command

    _known(before)
    config = _config(db)
    if before == FIRST:
        command.stamp(config, FIRST)
    command.upgrade(config, "head")
    return before, HEAD


def check(db: Connection) -> None:
    """Raises WrongUsage, with the command that helps, where the tables are not of this version."""
    version = _version(db)
    if version is None:
        raise WrongUsage("the database is empty; caramel-authority init makes the tables")
    if version != HEAD:
        _known(version)
        raise WrongUsage(f"the database has version {version}, this program {HEAD}: run caramel-authority upgrade")


def check_tables(db: Connection, metadata: MetaData) -> None:
    """Raises WrongUsage where a table or a column is missing that this version has."""
    found = inspect(db)
    for table in metadata.sorted_tables:
        there = {column["name"] for column in found.get_columns(table.name)} if found.has_table(table.name) else set()
        missing = [column.name for column in table.columns if column.name not in there]
        if missing:
            raise WrongUsage(f"no sound database of an authority: {table.name} has no {', '.join(missing)}")


def _known(version: str) -> None:
    from alembic.script import ScriptDirectory

    if version not in [step.revision for step in ScriptDirectory(MIGRATIONS).walk_revisions()]:
        raise WrongUsage(f"the database has version {version}, which a newer caramel-authority made")


def _version(db: Connection) -> str | None:
    """What Alembic writes down in a table of one row."""
    known = inspect(db).has_table("alembic_version")
    version = db.execute(text("SELECT version_num FROM alembic_version")).scalar() if known else None
    return version or (FIRST if inspect(db).has_table("requests") else None)


def _config(db: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", MIGRATIONS.replace("%", "%%"))
    config.attributes["connection"] = db
    return config


def _alone(db: Connection) -> None:
    if db.dialect.name == "postgresql":
        # Several processes may start at once; the number is any that nobody else takes.
        db.execute(text("SELECT pg_advisory_xact_lock(8319204)"))
