# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the authority's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from authority_world import Postgres, RegistrationAuthority, Server
from needs import require


@pytest.fixture
def authority(tmp_path: Path) -> RegistrationAuthority:
    """A registration authority with a CA, and nothing else."""
    made = RegistrationAuthority(tmp_path / "authority")
    made.create_ca()
    return made


@pytest.fixture
def server(authority: RegistrationAuthority) -> Iterator[Server]:
    with authority.serving() as started:
        yield started


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    require("postgresql")
    with Postgres(tmp_path_factory.mktemp("postgres")) as started:
        yield started
