# SPDX-License-Identifier: MIT OR Apache-2.0
"""What Alembic runs for each command: in the connection, and the transaction, that `schema` gives it."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
