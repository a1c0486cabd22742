"""packaging/container: both images, made with buildah and run with podman, through the life of a device.

No registry is asked: the base image is made by mmdebstrap and gets the name that the Containerfile wants. Podman runs
in a mount namespace of its own without control groups; its storage is a folder that goes away with the tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import world
from needs import require, slow
from world import Authority, Caramel, Daemon, Scripted, TlsFront

# The images are made once, which takes minutes.
pytestmark = slow

HERE = world.ROOT / "packaging" / "container"
BASE = "docker.io/library/debian:12-slim"

#: In a mount namespace of its own, a machine without control groups: crun refuses a mixture of their two versions.
APART = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "sh"]

#: What a machine such as CI's can't do: control groups, and more open files than it has itself.
HERE_ONLY = ["--cgroups=disabled", "--ulimit=nofile=1000:1000", "--ulimit=nproc=1000:1000"]
STRICT = ["--read-only", "--cap-drop=all", "--user=1000"]


@dataclass
class Images:
    """Podman with its own storage, in which both images are."""

    folder: Path
    driver: str

    @property
    def storage(self) -> list[str]:
        return [f"--root={self.folder}/storage", f"--runroot={self.folder}/run", f"--storage-driver={self.driver}"]

    @property
    def podman(self) -> list[str]:
        more = [f"--tmpdir={self.folder}/tmp", "--cgroup-manager=cgroupfs", "--events-backend=none"]
        return [*APART, "podman", *self.storage, *more]

    def do(self, *line: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.podman, *line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )

    def run(self, *line: str, network: str = "host") -> subprocess.CompletedProcess[str]:
        return self.do("run", "--rm", *HERE_ONLY, f"--network={network}", *STRICT, *line)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    require("mounts", "buildah", "podman", "mmdebstrap")
    # Not in pytest's folder: podman wants a path of 50 characters at most.
    made = Images(Path(tempfile.mkdtemp(prefix="containers-")), _driver(tmp_path_factory.mktemp("overlay")))
    base = world.BUILD / "container" / "base.tar"
    base.parent.mkdir(parents=True, exist_ok=True)
    log = made.folder / "log"
    buildah = " ".join(["buildah", *made.storage])
    script = f"""
        [ -e {base} ] || {{ mmdebstrap --variant=minbase bookworm {base}.new.tar && mv {base}.new.tar {base}; }}
        from=$({buildah} from scratch)
        {buildah} add "$from" {base} /
        {buildah} commit "$from" {BASE}
        {buildah} rm "$from"
        make -C {world.ROOT} container IMAGE=caramel-embedded IMAGE_BUILDER="{buildah}" \
            IMAGE_OPTIONS="--isolation chroot --pull-never --layers"
    """
    with open(log, "wb") as output:
        done = subprocess.run(
            [*APART, "sh", "-euc", script], stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=600
        )
    assert done.returncode == 0, log.read_text(errors="replace")[-4000:]
    yield made
    made.do("rm", "--all", "--force")
    shutil.rmtree(made.folder, ignore_errors=True)


def _driver(folder: Path) -> str:
    """Overlay where this machine has it, which is quick; else vfs, which copies everything and works anywhere."""
    for name in ("lower", "upper", "work", "both"):
        (folder / name).mkdir()
    options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
    line = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, str(folder / "both")]
    return "vfs" if subprocess.run(line, capture_output=True).returncode else "overlay"


@pytest.fixture(scope="module")
def address(caramel: Caramel) -> Iterator[str]:
    with TlsFront(caramel, caramel.authority.server(file="container.pem")) as front:
        yield front.address


def settings(authority: Authority, address: str, client_id: str) -> list[str]:
    ca = ["--volume", f"{authority.certificate_file}:/etc/caramel-ca.pem:ro"]
    named = {"CARAMEL_CA": address, "CARAMEL_CA_CERT": "/etc/caramel-ca.pem", "CARAMEL_CN": client_id}
    return [*ca, *(f"--env={name}={value}" for name, value in named.items() if value)]


@pytest.mark.parametrize("image", ["caramel-embedded", "caramel-embedded:small"])
def test_the_life_of_a_device(images: Images, image: str, address: str, caramel: Caramel, tmp_path: Path) -> None:
    client_id = "in-" + image.replace(":", "-")
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    os.chown(data, 1000, 1000)
    line = [*settings(caramel.authority, address, client_id), f"--volume={data}:/data", image]
    device = world.Device(tmp_path / "looks", key_file=data / "identity.pem")

    waits = images.run(*line)
    assert waits.returncode == 69 and "waits to be signed" in waits.stderr, waits.stderr
    caramel.sign(client_id)
    fetched = images.run(*line)
    assert fetched.returncode == 0 and "new certificate" in fetched.stderr, fetched.stderr
    before = device.snapshot()
    assert before and (before.uid, before.mode) == (1000, 0o600)
    same = images.run(*line)
    assert same.returncode == 0 and "unchanged" in same.stderr and device.snapshot() == before
    caramel.sign(client_id, hours=60)
    assert images.run(*line).returncode == 0
    assert device.snapshot() != before
    # The lock is in the file, so it holds between containers, and between them and the host.
    with Daemon(["flock", data / "identity.pem", "sleep", "60"], tmp_path / "flock"):
        world.until("it is locked", lambda: images.run(*line).returncode == 1, pause=0.2)
    caramel.reject(client_id)
    assert images.run(*line).returncode == 69
    assert len(caramel.requests(client_id)) == 2


@pytest.mark.parametrize("image", ["caramel-embedded", "caramel-embedded:small"])
def test_what_fails_is_127(images: Images, image: str, address: str, authority: Authority) -> None:
    without = images.run(*settings(authority, address, ""), image, network="none")
    assert without.returncode == 127 and "CARAMEL_CN" in without.stderr, without.stderr
    nobody = images.run(*settings(authority, "localhost:1", "x"), image)
    assert nobody.returncode == 127 and "localhost" in nobody.stderr
    assert images.run(image, "--nonsense").returncode == 127
    assert images.run(image, "--version").stdout.startswith("caramel-embedded ")


def test_without_a_volume_each_run_is_a_new_device(images: Images, address: str, caramel: Caramel) -> None:
    for count in (1, 2):
        line = settings(caramel.authority, address, "without-a-volume")
        assert images.run(*line, "caramel-embedded:small").returncode == 69
        assert len({row.sha256 for row in caramel.requests("without-a-volume")}) == count


def test_the_small_one(images: Images) -> None:
    (state,) = json.loads(images.do("image", "inspect", "caramel-embedded:small").stdout)
    assert state["Size"] <= 60 * 1000 * 1000
    assert state["Config"]["User"] == "1000:1000" and "/data" in state["Config"]["Volumes"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", state["Labels"]["org.opencontainers.image.version"])
    listed = images.run("--entrypoint=/usr/bin/busybox", "caramel-embedded:small", "ls", "/usr/bin").stdout.split()
    assert listed == ["busybox", "caramel-embedded", "python3", "python3.11", "sh"]


def test_a_container_that_is_stopped_ends_at_once(images: Images, authority: Authority, caramel: Caramel) -> None:
    """As process 1 of its container, where a signal that nobody handles is ignored."""
    silent = Scripted(authority.server(file="silent.pem"), [None], instead_of_tls=world.silence)
    with silent as server:
        line = ["run", "--rm", *HERE_ONLY, "--network=host", *STRICT, *settings(authority, server.address, "stopped")]
        with Daemon([*images.podman, *line, "caramel-embedded:small"], images.folder / "stopped") as container:
            world.until("it waits for the server", lambda: server.connections)
            assert container.process
            started = time.monotonic()
            container.process.send_signal(signal.SIGTERM)
            assert container.process.wait(20) == 127, container.text()
            assert time.monotonic() - started < 10


def test_the_page(images: Images, address: str, caramel: Caramel, tmp_path: Path) -> None:
    """The commands of the README, as they are; only the image is there already."""
    page = (HERE / "README.md").read_text()
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)).replace(
        "make container\n", ""
    )
    assert script.count("podman") == 2
    for word, here in {
        "ca.example.com": address,
        "/etc/caramel-ca.pem:/": f"{caramel.authority.certificate_file}:/",
        "unit-0001": "by-the-page",
        "podman run": f"podman run {' '.join(HERE_ONLY)} --network=host",
    }.items():
        assert word in script
        script = script.replace(word, here)
    quoted = " ".join(f"'{word}'" for word in images.podman)
    function = f'podman() {{ {quoted} "$@"; }}\n'
    for status in (69, 0):
        done = subprocess.run(["sh", "-c", function + script], capture_output=True, text=True, timeout=120)
        assert done.returncode == status, done.stderr
        if status == 69:
            caramel.sign("by-the-page")
            script = script.replace("podman volume create identity\n", "")
