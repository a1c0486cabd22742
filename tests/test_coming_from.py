"""docs/coming-from-caramel-client.md: what the Python client has made goes on here, and back again."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import world
from needs import require, slow
from world import Caramel, TlsFront

from caramel_embedded import cli, settings

PAGE = world.ROOT / "docs" / "coming-from-caramel-client.md"
CLIENT = world.BUILD / "bench" / "client" / "bin"


@dataclass
class Moving:
    """A device that had the Python client; its commands are those of the page."""

    folder: Path
    address: str
    client_id: str

    def __post_init__(self) -> None:
        for name in ("var/lib/tls", "etc"):
            (self.folder / name).mkdir(parents=True)
        #: What the page says, as a regular expression, and what it is here.
        self.words = {
            r"(?<![\w./])/(etc|var)/": rf"{self.folder}/\1/",
            r"ca\.example\.com": self.address,
            r"fffbeec0ffee": self.client_id,
        }

    @property
    def tls(self) -> Path:
        return self.folder / "var/lib/tls"

    @property
    def key_file(self) -> Path:
        return self.folder / "var/lib/caramel/identity.pem"

    def theirs(self, ending: str) -> Path:
        return self.tls / f"{self.client_id}.{ending}"

    def other(self, seconds: float = 30) -> int:
        """Runs the Python client, which waits for as long as nobody has signed; its exit status, 124 for that."""
        line = ["timeout", str(seconds), str(CLIENT / "caramel-client"), self.address, self.client_id]
        environment = world.environment(HOME=str(self.folder))
        return subprocess.run(line, cwd=self.tls, env=environment, capture_output=True, timeout=60).returncode

    def follow(self, heading: str) -> str:
        """Does what a section of the page says: its files and its commands; what they printed."""
        found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        assert found, heading
        text = found[1]
        for pattern, word in self.words.items():
            text = re.sub(pattern, word, text, flags=re.MULTILINE)
        config = self.folder / "etc" / "caramel-embedded.conf"
        script = f'set -eu\ncaramel-embedded() {{ {world.COMMAND} --config {config} "$@"; }}\n'
        for kind, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            script += (
                block if kind == "sh" else f"cat >{config} <<'END'\n{block}CARAMEL_KEY_FILE={self.key_file}\nEND\n"
            )
        return self.sh(script)

    def sh(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.tls,
            env=world.environment(HOME=str(self.folder)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        text = done.stdout.decode()
        assert done.returncode == 0, text
        return text

    def check(self) -> tuple[int, str]:
        """One run of this project's program."""
        line = [world.COMMAND, "--config", str(self.folder / "etc" / "caramel-embedded.conf")]
        done = subprocess.run(line, env=world.environment(), capture_output=True, timeout=60)
        return done.returncode, done.stderr.decode()

    def parts(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate and request of the key file, as three files would have them."""
        device = world.Device(self.folder / "looks", key_file=self.key_file)
        key, certificate = device.block("PRIVATE KEY"), device.block("CERTIFICATE")
        assert key and certificate
        return key, certificate, device.request


@pytest.fixture
def moving(tmp_path: Path, caramel: Caramel, request: pytest.FixtureRequest) -> Iterator[Moving]:
    """A device whose request is at the server, sent by the Python client, and not signed yet."""
    require("caramel-client")
    client_id = "fc" + hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:10]
    with TlsFront(caramel, caramel.authority.server(file="coming.pem")) as front:
        made = Moving(tmp_path, front.address, client_id)
        (made.tls / f"{front.address}.cacert").write_bytes(caramel.authority.pem)
        for seconds in (3, 10, 30):  # on a busy machine the first three are over before it has sent anything
            assert made.other(seconds) == 124, "it waits"
            if caramel.requests(client_id):
                break
        yield made


def test_the_identity_goes_on(moving: Moving, caramel: Caramel) -> None:
    caramel.sign(moving.client_id)
    assert moving.other() == 0
    key, certificate, request = (moving.theirs(ending).read_bytes() for ending in ("key", "crt", "csr"))
    said = moving.follow("Moving")
    assert said.count(hashlib.sha256(request).hexdigest()) == 2, "the hash, from --status and from sha256sum"
    assert "start over" not in said and "unchanged, valid until" in said
    assert moving.parts() == (key, certificate, request)
    assert len(caramel.requests(moving.client_id)) == 1, "the server has seen nothing new"
    # What the page warns of, where it can still be seen in time.
    config = moving.folder / "etc" / "caramel-embedded.conf"
    config.write_text(config.read_text().replace(f"CN={moving.client_id}", "CN=another"))
    assert "start over" in moving.sh(f"{world.COMMAND} --config {config} --status || :")


def test_a_request_that_waits_goes_on(moving: Moving, caramel: Caramel) -> None:
    """Without a `.crt`, which the page says to leave out; and with a key in the form that older OpenSSL wrote."""
    moving.sh(f"openssl rsa -traditional -in {moving.theirs('key')} -out old && mv old {moving.theirs('key')}")
    assert b"BEGIN RSA PRIVATE KEY" in moving.theirs("key").read_bytes()
    without = {r" fffbeec0ffee\.crt": "", r"^caramel-embedded.*": r"\g<0> || :"}
    moving.words = {**without, **moving.words}
    assert "waits to be signed" in moving.follow("Moving")
    status, said = moving.check()
    assert status == 69 and "waits to be signed" in said
    caramel.sign(moving.client_id)
    assert moving.check()[0] == 0
    assert len(caramel.requests(moving.client_id)) == 1
    assert moving.parts()[2] == moving.theirs("csr").read_bytes()


@slow
def test_both_for_a_while_and_back(moving: Moving, caramel: Caramel) -> None:
    caramel.sign(moving.client_id)
    assert moving.other() == 0
    moving.follow("Moving")
    for life in (60, 70):
        caramel.sign(moving.client_id, hours=life)
        assert (moving.other(), moving.check()[0]) == (0, 0)
        assert moving.parts()[1] == moving.theirs("crt").read_bytes(), "the same certificate"
    # Only a rejection parts them.
    caramel.reject(moving.client_id)
    assert moving.other() == 1
    assert moving.check()[0] == 69
    caramel.sign(moving.client_id)
    assert moving.check()[0] == 0
    assert moving.other() == 1
    assert moving.parts()[0] != moving.theirs("key").read_bytes()
    # Back.
    moving.follow("Going back")
    assert moving.parts() == tuple(moving.theirs(ending).read_bytes() for ending in ("key", "crt", "csr"))
    caramel.sign(moving.client_id, hours=90)
    before = moving.theirs("key").read_bytes()
    assert moving.other() == 0
    assert moving.theirs("key").read_bytes() == before and moving.theirs("key").stat().st_mode & 0o777 == 0o600
    assert (
        moving.theirs("crt").read_bytes()
        == caramel.certificates(hashlib.sha256(moving.theirs("csr").read_bytes()).hexdigest())[-1]
    )
    assert len(caramel.requests(moving.client_id)) == 2


def test_the_table_names_what_there_is() -> None:
    ours = [
        row.split("|")[4] for row in PAGE.read_text().splitlines() if row.startswith("| ") and row.count("|") == 5
    ]
    known = {text for action in cli.parser()._actions for text in action.option_strings}
    names = {name for name, _, flag, placeholder, _ in settings.SETTINGS}
    named = [word for cell in ours for word in re.findall(r"`(--?[\w-]+|CARAMEL_\w+)`", cell)]
    assert len(named) > 12 and set(named) <= known | names
    pairs = re.findall(r"`(--[\w-]+)`, `(CARAMEL_\w+)`", "".join(ours))
    assert set(pairs) <= {(flag, name) for name, _, flag, *_ in settings.SETTINGS}
