# SPDX-License-Identifier: MIT OR Apache-2.0
"""docs/which-ca.md: each of the three walks is run as it stands there, and prints what stands there.

In a network namespace of its own, because its ports are fixed ones; the programs are on the path, as the page says.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import world
from authority_world import BIN, DEPLOY
from needs import needs, require, slow

PAGE = world.ROOT / "docs" / "which-ca.md"
pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl"), slow]

FENCE = re.compile(r"^```(\w+) ?(\w*)\n(.*?)^```$", re.M | re.S)


def steps(walk: str) -> list[tuple[str, str]]:
    """The blocks of one walk in their order, each with what it is said to print."""
    found: list[tuple[str, str]] = []
    mine = False
    for language, name, text in FENCE.findall(PAGE.read_text()):
        if language == "sh":
            mine = name in ("front", walk, "all")
            if mine:
                found.append((text, ""))
        elif language == "text" and mine:
            found[-1] = (found[-1][0], text)
    return found


@pytest.mark.parametrize("walk", ["caramel", "ca", "acme"])
def test_a_walk(walk: str, tmp_path: Path) -> None:
    require("mounts", "iproute2", "nginx", "curl", "openssl")
    if walk == "acme":
        require("pebble", "knotd")
    blocks = steps(walk)
    assert len(blocks) == {"caramel": 4, "ca": 4, "acme": 6}[walk]
    script = "ip link set lo up\n" + "echo '--- next ---'\n".join(text for text, _ in blocks)
    programs = [str(path.parent) for path in (world.CARAMEL / "x", BIN / "x", Path(world.PLAIN))]
    path = ":".join([*programs, os.environ["PATH"], "/usr/sbin"])
    # The name space ends with its first process, and all that the page has started with it.
    alone = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.getuid() == 0:
        alone = [word for word in alone if not word.endswith("user")]
    done = subprocess.run(
        [*alone, "bash", "-c", script],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env=world.environment(PATH=path, HOME=str(tmp_path)),
    )  # fmt: skip
    logs = {one.name: one.read_text()[-600:] for one in tmp_path.glob("*.log")}
    assert [said for _, said in blocks] == done.stdout.split("--- next ---\n"), (done.stderr, logs)


def test_the_table_links_and_the_page_of_the_authority() -> None:
    """The heading that the table leads to is there, and the page is named in the authority's own."""
    readme = (DEPLOY.parent / "README.md").read_text()
    assert "\n### 90 000 devices\n" in readme
    assert "docs/which-ca.md" in readme


def test_the_table_for_90_000_devices_is_calculated() -> None:
    text = (DEPLOY.parent / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) days \| (\w+)", text.partition("### 90 000 devices")[2], re.M)
    assert len(rows) == 6
    renewals = round(90_000 / (60 * 24) + 0.5)
    assert f"need {renewals} orders an hour" in text and f"it is {90_000 // (30 * 24)} an hour" in text
    for per_hour, days, left in rows:
        assert days == f"{90_000 / int(per_hour) / 24:.1f}"
        assert left == (str(int(per_hour) - renewals) if int(per_hour) > renewals else "none")
