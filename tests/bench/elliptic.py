# SPDX-License-Identifier: MIT OR Apache-2.0
"""A server that is elliptic throughout: the registration authority with its own CA, and P-256 keys only.

Caramel signs no elliptic keys, so this is a real registration authority behind a real nginx, set up by the commands
of its README. The device is one that the program itself has enrolled.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import world

from bench import records
from bench.proxy import DelayingProxy, Traffic, medians

# What starts the registration authority stands beside its tests, and knows nothing of this program either.
sys.path.append(str(world.ROOT / "authority/tests"))

from authority_world import COMMAND as COMMAND
from authority_world import Front, RegistrationAuthority

#: As in the README of authority.
SUBJECT = "C=SE,O=Example AB,OU=Devices,CN=Example Device CA"
#: Behind which configuration of nginx: that for metered links, which asks for the device's certificate, and that
#: which comes with the authority, which doesn't.
METERED, OWN = "metered", "own"
CLIENT_ID = "fffbeec0ffee"


def create(folder: Path) -> RegistrationAuthority:
    """A registration authority with a CA, and a certificate by it for `localhost`, in `front.pem`."""
    authority = RegistrationAuthority(folder)
    authority.command("ca-create", "--subject", SUBJECT)
    authority.command("server-certificate", "localhost", "--out", str(folder / "front.pem"))
    return authority


@contextmanager
def behind(authority: RegistrationAuthority, configuration: str) -> Iterator[Front]:
    """The authority at work behind nginx, with the configuration METERED or OWN."""
    text = None
    if configuration == METERED:
        text = (world.ROOT / "server" / "nginx-metered.conf").read_text()
        for old, new in {
            "server_name localhost": "server_name ca.example.com",
            "/etc/caramel/server.pem": "/var/lib/caramel-authority-signer/front.pem",
            "/etc/caramel/ca.crt": str(authority.ca),
            "127.0.0.1:6543": "127.0.0.1:8080",
        }.items():
            if old not in text:
                raise AssertionError(f"server/nginx-metered.conf has no {old!r}")
            text = text.replace(old, new)
    certificate = authority.folder / "front.pem"
    with authority.serving(options=["--behind-proxy"]) as server:
        folder = authority.folder / configuration
        with Front(folder, certificate, server.port, text) as front:
            yield front


def measure(command: str, folder: Path, tries: int = 3) -> dict[str, Any]:
    """What an unchanged check puts on the wire, behind each configuration: medians, and the records of the last try.

    `command`: the program, which enrolls the device first. `folder` is made. Raises AssertionError where a run
    doesn't end as it should.
    """
    authority = create(folder)
    identity = folder / "identity.pem"
    found: dict[str, Any] = {}
    for configuration in (METERED, OWN):
        with behind(authority, configuration) as front, DelayingProxy(front.port, 0.05) as proxy:
            settings = {
                "CARAMEL_CA": proxy.address,
                "CARAMEL_CA_CERT": str(authority.ca),
                "CARAMEL_KEY_FILE": str(identity),
                "CARAMEL_CN": CLIENT_ID,
                "CARAMEL_KEY_TYPE": "ec-p256",
            }
            if not identity.exists():
                check(command, settings, proxy, 69)
                authority.command("authorize", CLIENT_ID)
                check(command, settings, proxy, 0)
            seen = [check(command, settings, proxy, 0) for _ in range(tries)]
            weights = records.weights(bytes(seen[-1].said_up), bytes(seen[-1].said_down), configuration == METERED)
            found[configuration] = {**medians(seen), "records": weights}
    return found


def check(command: str, settings: dict[str, str], proxy: DelayingProxy, status: int) -> Traffic:
    """One run; what went over the wire. Raises AssertionError where it ends with another exit status."""
    proxy.reset()
    env = world.environment(**settings)
    done = subprocess.run([command], env=env, stderr=subprocess.PIPE, timeout=60, check=False)
    if done.returncode != status:
        raise AssertionError(f"elliptic: ended with {done.returncode}: {done.stderr.decode()}")
    return proxy.wait()
