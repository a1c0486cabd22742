# SPDX-License-Identifier: MIT OR Apache-2.0
"""Which version the tables have, and how they get to this one: steps of Alembic, in `migrations`.

Only `init` and `upgrade` change tables. A program that finds others than its own says so and does nothing.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, inspect, text

from .errors import WrongUsage

#: What 2.0.0 made, which knew no versions.
FIRST = "0001"


def init(db: Connection, metadata: MetaData) -> bool:
    """Makes the tables in a transaction that writes; whether there were none. Raises WrongUsage for older ones."""
    _alone(db)
    if _version(db) is not None:
        check(db)
        return False
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
    _known(before)
    config = _config(db)
    if before == FIRST:
        command.stamp(config, FIRST)
    command.upgrade(config, "head")
    return before, head()


def check(db: Connection) -> None:
    """Raises WrongUsage, with the command that helps, where the tables are not of this version."""
    version = _version(db)
    if version is None:
        raise WrongUsage("the database is empty; caramel-authority init makes the tables")
    if version != head():
        _known(version)
        raise WrongUsage(f"the database has version {version}, this program {head()}: run caramel-authority upgrade")


def head() -> str:
    """The version that this program works with."""
    return str(_scripts().get_current_head())


def _known(version: str) -> None:
    if version not in [step.revision for step in _scripts().walk_revisions()]:
        raise WrongUsage(f"the database has version {version}, which a newer caramel-authority made")


def _version(db: Connection) -> str | None:
    version = MigrationContext.configure(db).get_current_revision()
    return version or (FIRST if inspect(db).has_table("requests") else None)


def _config(db: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["connection"] = db
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(__file__).with_name("migrations")))


def _alone(db: Connection) -> None:
    if db.dialect.name == "postgresql":
        # Several processes may start at once; the number is any that nobody else takes.
        db.execute(text("SELECT pg_advisory_xact_lock(8319204)"))
