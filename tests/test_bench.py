"""What `make bench` measures that no machine changes."""

from __future__ import annotations

from pathlib import Path

import world
from bench import elliptic
from needs import needs, slow

MOST = 3200  # bytes in both directions; docs/bench.md has what each part of it weighs


@slow
@needs("authority", "nginx")
def test_with_elliptic_keys_a_check_is_small(tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    seen = elliptic.measure(world.PLAIN, tmp_path / "authority", tries=1)
    metered, own = seen[elliptic.METERED], seen[elliptic.OWN]
    assert metered["up"] + metered["down"] <= MOST, metered["records"]
    assert own["up"] + own["down"] <= MOST - 1000, own["records"]
    for wire in (metered, own):
        assert wire["connections"] == 1
        # Nothing is left out of the list, and nothing is in it twice.
        assert sum(size for _, _, size in wire["records"]) == wire["up"] + wire["down"]
