"""SECURITY.md keeps its word: every test that it names exists, and what no other test shows is shown here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import world
from talking import Talking
from world import Authority, Caramel, Device, Scripted, answers


def test_every_test_that_the_page_names_exists() -> None:
    text = (world.ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((world.ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
    # Nothing is said to be defended without a test.
    table = text.partition("## Defended")[2].partition("## Not defended")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert rows and all("`tests/" in row for row in rows)


def test_a_man_in_the_middle_with_a_public_cas_certificate_gets_nothing(
    device: Device, tmp_path: Path, caramel: Caramel
) -> None:
    """It is for the right name, in date, and by a CA that the whole system trusts."""
    public = Authority(tmp_path / "public", [("C", "US"), ("O", "Public Trust"), ("CN", "Public Root")])
    assert device.run().status == 69
    before = device.key_file.read_bytes()
    environment = {"SSL_CERT_FILE": str(public.certificate_file), "REQUESTS_CA_BUNDLE": str(public.certificate_file)}
    with Scripted(public.server(), [answers.REJECTED]) as it:
        device.server = it.address
        run = device.run(env=environment)
        assert run.status == 127 and "trusted CA" in run.err, run
        # The second connection only looks at what is shown, for the line that names it.
        assert it.connections == 2 and it.handshakes == 0 and it.requests == []
    assert device.key_file.read_bytes() == before


def test_nothing_but_the_request_is_ever_sent(new: Talking) -> None:
    """All that a server gets to see in a device's life, with the key beside it."""
    new.enrolls()
    seen = [(asked.method, asked.path, asked.body, dict(asked.headers)) for asked in new.asked]
    digest, request = new.request_hash(), new.request
    assert [(method, path, body) for method, path, body, _ in seen] == [
        ("GET", f"/{digest}", b""),
        ("POST", f"/{digest}", request),
        ("GET", f"/{digest}", b""),
    ]
    key = new.block("PRIVATE KEY")
    assert key is not None
    everything = repr(seen).encode()
    # The first lines hold the modulus, which is in the request as well.
    assert not any(line[:20] in everything for line in key.splitlines()[8:-1])
    for *_, headers in seen:
        assert set(headers) <= {"host", "user-agent", "content-length", "if-modified-since", "accept-encoding"}
