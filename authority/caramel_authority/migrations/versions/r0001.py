# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tables as 2.0.0 made them: where there is no version, they are these."""

revision = "0001"
down_revision = None


def upgrade() -> None:
    pass
