"""The demo tells a story that is true."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import world
from demo import picture
from needs import slow
from world import Device


@slow
def test_the_demo_goes_as_told_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-Es", "-m", "demo.life"],
        cwd=world.ROOT / "tests",
        env=world.environment(CARAMEL_TESTS_COMMAND=world.COMMAND, TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for status in (0, 1, 69, 127):
        assert f"exit status {status}: " in done.stdout
    assert "PRIVATE KEY-----" not in done.stdout
    assert list(tmp_path.iterdir()) == []
    # The README's picture shows this demo: nothing but names, numbers and times may differ.
    lines = [line for line in picture.chosen(done.stdout.replace(str(tmp_path), "/tmp")) if line]
    svg = ElementTree.parse(world.ROOT / "docs" / "demo.svg")
    drawn = [text.text or "" for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert [alike(line) for line in drawn] == [alike(line) for line in lines], "make demo-picture draws it anew"


def alike(line: str) -> str:
    """The line without what differs from run to run; where the line breaks, a hash is in two pieces."""
    return re.sub(r"[0-9a-f]", "0", re.sub(r"caramel-demo-\w{8}", "", line.lstrip()))


def test_the_demos_server_says_what_a_zipapp_needs(tmp_path: Path) -> None:
    """The lines that it prints are used as they stand: by make zipapp, and by a device."""
    demo = subprocess.Popen(
        [sys.executable, "-Es", "-m", "demo.life", "--stay"],
        cwd=world.ROOT / "tests",
        env=world.environment(CARAMEL_TESTS_COMMAND=world.COMMAND, TMPDIR=str(tmp_path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert demo.stdout
        said = ""
        for line in demo.stdout:
            said += line
            if "--reject" in line:
                break
        found = re.search(r"\$ make zipapp SERVER=(\S+) CA_CERT=(\S+)$", said, re.MULTILINE)
        assert found, said
        assert "BEGIN CERTIFICATE" in Path(found[2]).read_text()
        assert Device(tmp_path / "device", found[1], Path(found[2])).run().status == 69
    finally:
        demo.send_signal(signal.SIGTERM)
        demo.communicate(timeout=30)
