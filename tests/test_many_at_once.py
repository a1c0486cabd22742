"""Many starts at the same instant, while others read the file."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import world
from world import Authority, Caramel, Nginx

sys.path.append(str(world.ROOT))

from torture import crowd, report
from torture.town import Town


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory, authority: Authority, caramel: Caramel, front: Nginx) -> Town:
    return Town.around(tmp_path_factory.mktemp("town"), authority, caramel, front)


def test_many_starts_at_once_make_one_key_and_one_request_and_readers_see_whole_files(town: Town) -> None:
    counts: Counter[str] = Counter()
    row = report.tried("", crowd.cases(town, 40, counts), workers=1)
    assert not row.lost, "\n".join(row.lost)
    assert counts["starts"] == 160 and counts["reads"] > 200
