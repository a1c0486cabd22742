# SPDX-License-Identifier: MIT OR Apache-2.0
"""The bytes of an unchanged check by OpenSSL: that of Debian 12 and that of Debian 13, at either end, with each
setting of `CARAMEL_GROUPS`, with RSA and with P-256 throughout. `make bench-link` prints the table; docs/bench.md has
it. Needs root and a Debian 12, because Debian 13 is a tree below build/.
"""

from __future__ import annotations

import itertools
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import world
from cryptography.hazmat.primitives.asymmetric import ec

from bench.proxy import DelayingProxy

CLIENT_ID = "fffbeec0ffee"
TRIES = 5
MODIFIED = world.now()


class InTree(world.Nginx):
    """nginx of a Debian's tree."""

    tree: ClassVar[list[str]] = []

    @staticmethod
    def program() -> str | None:
        """A script that starts it."""
        script = world.BUILD / "bench" / "nginx-in-tree"
        script.parent.mkdir(parents=True, exist_ok=True)
        words = shlex.join([*InTree.tree, "/usr/sbin/nginx"])
        script.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        script.chmod(0o755)
        return str(script)


def openssl(before: Sequence[str], python: str) -> str:
    """The version of OpenSSL below a Python's `ssl`."""
    ask = [*before, python, "-c", "import ssl; print(ssl.OPENSSL_VERSION.split()[1])"]
    return subprocess.run(ask, stdout=subprocess.PIPE, check=True, text=True).stdout.strip()


def bytes_of_check(device: world.Device, proxy: DelayingProxy, *options: str) -> int:
    """Both directions of one run. Raises AssertionError if it doesn't end with 0."""
    proxy.reset()
    run = device.run(*options)
    assert run.status == 0, run
    traffic = proxy.wait()
    return traffic.up + traffic.down


def measured(
    folder: Path,
    authority: world.Authority,
    pair: Path,
    device: world.Device,
    front: type[world.Nginx],
    *options: str,
) -> int:
    """The median of some unchanged checks, behind a server that has nginx-metered.conf's settings and knows 304."""
    (folder / "static").mkdir(exist_ok=True)
    nginx = front(
        folder / "nginx",
        None,
        pair,
        client_ca=authority.certificate_file,
        protocols="TLSv1.3",
        static=folder / "static",
        server_lines="ssl_ecdh_curve X25519:prime256v1; keepalive_timeout 0; server_tokens off;",
    )
    with nginx, DelayingProxy(nginx.port) as proxy:
        device.server = proxy.address
        certificate = device.block("CERTIFICATE")
        assert certificate
        # Always with the same time: the device takes the first one that it is told, and asks with that for ever.
        nginx.publish(device.request_hash(), certificate, MODIFIED)
        bytes_of_check(device, proxy, *options)  # the file gets its line and its time
        return sorted(bytes_of_check(device, proxy, *options) for _ in range(TRIES))[TRIES // 2]


def main() -> None:
    """Prints the table."""
    tree = world.in_tree(world.trixie())
    InTree.tree = tree
    program = world.debian_python()
    assert program, "this is no Debian with the libraries of a device"
    here = world.installation("debian", program, system=True)
    there = world.installation("debian13", "/usr/bin/python3", system=True, before=tree)
    ends = {
        openssl([], program): ([here], world.Nginx),
        openssl(tree, "/usr/bin/python3"): ([*tree, there], InTree),
    }
    print("| keys | device's OpenSSL | server's OpenSSL | `small` | `default` |\n| --- | --- | --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for kind, new in (("rsa-2048", world.new_key), ("ec-p256", lambda: ec.generate_private_key(ec.SECP256R1()))):
            authority = world.Authority(folder / kind, key=new())
            pair = authority.server(key=new())
            device = world.Device(folder / kind / "device", "", authority.certificate_file, CLIENT_ID)
            device.has(authority.identity(CLIENT_ID, key=new(), line=False))
            for client, server in itertools.product(ends, ends):
                device.command = ends[client][0]
                front = ends[server][1]
                sums = [
                    measured(folder, authority, pair, device, front, "--key-type", kind, "--groups", groups)
                    for groups in ("small", "default")
                ]
                print(f"| {kind} | {client} | {server} | {sums[0]} | {sums[1]} |", flush=True)


if __name__ == "__main__":
    main()
