"""Versions: every Python that is promised, the newest libraries, and those of Debian, each with a device's life."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest
import world
from needs import needs, require, slow
from world import Authority, Caramel, Device, Front


def lives(device: Device, caramel: Caramel) -> None:
    """Enrolls, waits, is certified, finds nothing new, is rejected: each with nothing but its one line."""
    me = str(device.client_id)
    for action, status in ((None, 69), (None, 69), (caramel.sign, 0), (None, 0), (caramel.reject, 69)):
        if action:
            action(me)
        run = device.run()
        assert (run.status, run.out, run.err.count("\n")) == (status, "", 1), run
    assert "warning" not in run.err.lower()


def python(version: str) -> tuple[list[str], str]:
    """An interpreter of that version, and what has to stand before it: this machine's own, or that of a Debian."""
    mine = dict(world.interpreters()).get(version)
    if mine:
        return [], mine
    return world.in_tree(world.debian(version)), f"/usr/bin/python{version}"


@slow
@pytest.mark.parametrize("version", world.VERSIONS)
def test_on_every_python_that_is_promised(device: Device, caramel: Caramel, version: str) -> None:
    require(f"python{version}")
    before, program = python(version)
    command = world.installation(version, program, before=before)
    python3 = str(Path(command).with_name("python3"))
    said = subprocess.run([*before, python3, "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert said.startswith(f"Python {version}."), said
    device.command = [*before, command]
    lives(device, caramel)


@slow
@pytest.mark.parametrize("version", [has for has, _ in world.interpreters() if has in world.OTHER_VERSIONS] or [None])
def test_on_other_pythons_that_this_machine_has(device: Device, caramel: Caramel, version: Optional[str]) -> None:
    """Where it has none of them, on its own."""
    program = dict(world.interpreters())[version] if version else sys.executable
    device.command = [world.installation(version or "own", program)]
    lives(device, caramel)


@slow
@needs("debian-python")
def test_on_debians_own_python_and_libraries(device: Device, caramel: Caramel) -> None:
    program = world.debian_python()
    assert program
    command = world.installation("debian", program, system=True)
    where = subprocess.run(
        [str(Path(command).parent / "python"), "-I", "-c", "import cryptography; print(cryptography.__file__)"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    assert where.startswith("/usr/lib/python3/dist-packages/"), "the system's library, and not one from an index"
    device.command = [command]
    lives(device, caramel)


#: The OpenSSL below Python's `ssl`: the oldest and the newest that a Debian has with a Python that is promised.
OPENSSL = {"3.9": "OpenSSL 1.1.1", "3.15": "OpenSSL 3.6"}


@slow
@needs("mmdebstrap", "mounts")
@pytest.mark.parametrize("version", OPENSSL)
def test_on_the_oldest_and_the_newest_openssl(device: Device, caramel: Caramel, version: str) -> None:
    """That of `cryptography`'s wheels is newer still: 4.0, which has no engines."""
    before = world.in_tree(world.debian(version))
    command = world.installation(f"openssl-{version}", f"/usr/bin/python{version}", before=before)
    ask = "import ssl, urllib3; print(ssl.OPENSSL_VERSION, urllib3.__version__)"
    python3 = str(Path(command).with_name("python3"))
    said = subprocess.run([*before, python3, "-c", ask], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert said.startswith(OPENSSL[version])
    # urllib3 2.8 wants Python 3.10; the index gives a device with 3.9 the last one before it.
    assert (tuple(map(int, said.split()[-1].split(".")[:2])) < (2, 8)) == (version == "3.9")
    device.command = [*before, command]
    lives(device, caramel)


@slow
@needs("mmdebstrap", "mounts")
def test_on_debian_13s_own_python_and_libraries(device: Device, caramel: Caramel) -> None:
    before = world.in_tree(world.trixie())
    command = world.installation("debian13", "/usr/bin/python3", system=True, before=before)
    device.command = [*before, command]
    lives(device, caramel)


@slow
@pytest.mark.parametrize("release", ["23.0.0", "25.0.0", "26.4.0", ""])
def test_no_release_of_pyopenssl_warns_of_what_is_used(
    device: Device, caramel: Caramel, authority: Authority, release: str
) -> None:
    """What pyOpenSSL is going to take away is an error here; `certificates` is the only module that uses it."""
    pinned = [f"pyOpenSSL=={release}"] if release else []
    if release == "23.0.0":
        pinned += ["cryptography<40"]
    command = world.installation(f"pyopenssl-{release or 'newest'}", sys.executable, more=pinned)
    start = "import sys; from caramel_embedded.__main__ import main; main(sys.argv[1:])"
    device.command = [str(Path(command).with_name("python3")), "-I", "-W", "error", "-c", start]
    lives(device, caramel)
    device.has(authority.identity("cafe00000000"))
    assert device.run("--replace").status == 69
    assert device.run("--status").status == 69


@slow
def test_no_warning_comes_from_our_own_calls_on_the_newest(
    device: Device, caramel: Caramel, front: Front, authority: Authority
) -> None:
    """Whatever is going to be taken away is an error here, on the newest Python and the newest libraries."""
    newest = world.VERSIONS[-1]
    require(f"python{newest}")
    before, program = python(newest)
    python3 = str(Path(world.installation(newest, program, before=before)).with_name("python3"))
    start = "import sys; from caramel_embedded.__main__ import main; main(sys.argv[1:])"
    device.command = [*before, python3, "-I", "-W", "error", "-c", start]
    lives(device, caramel)
    # Also what is done rarely: a hook, another's file, a request to be made again, another key's certificate.
    caramel.sign(str(device.client_id))
    assert device.run("--hook", "true").status == 0
    device.has(authority.identity("cafe00000000"))
    assert device.run("--replace").status == 69
    key = dict(device.blocks())["PRIVATE KEY"]
    device.has(key)
    assert device.run().status == 69
    device.has(key + authority.sign(device.request, public_key=world.new_key().public_key()))
    assert device.run().status == 69
    assert device.run("--status").status == 69
