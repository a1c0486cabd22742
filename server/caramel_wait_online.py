# SPDX-License-Identifier: MIT OR Apache-2.0
"""Waits until a Caramel server answers, so that a unit of systemd counts as started when it does (`ExecStartPost=`).

`pserve` says to nobody when it listens. So this asks for a certificate that nobody has, at the address that the INI
file names, until the answer is 404: then the database has been asked, too. It ends when the server does, and when its
time is up.
"""

from __future__ import annotations

import argparse
import configparser
import os
import socket
import sys
import time
from pathlib import Path
from typing import Optional, Union

#: Where to ask: a host and a port, or the path of a socket.
Address = Union[tuple[str, int], str]

#: Its certificate is nobody's: no request has this SHA-256.
NOBODY = "0" * 64
#: Seconds between two attempts.
PAUSE = 0.1


def listens_at(ini: Path) -> Address:
    """The first address in the section `[server:main]`, as waitress reads it.

    Raises OSError, and `configparser.Error`, KeyError or ValueError where the file isn't such a one.
    """
    parser = configparser.ConfigParser(defaults={"here": str(ini.resolve().parent)}, strict=False)
    with open(ini, encoding="utf-8") as file:
        parser.read_file(file)
    server = parser["server:main"]
    if "unix_socket" in server:
        return server["unix_socket"]
    if "listen" in server:
        host, _, port = server["listen"].split()[0].rpartition(":")
    else:
        host, port = server.get("host", "0.0.0.0"), server.get("port", "8080")
    host = host.strip("[]")
    # What stands for all addresses of a machine is none to connect to.
    return {"": "127.0.0.1", "*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port)


def status(address: Address, seconds: float = 10) -> Optional[int]:
    """The status of the server's answer; None where there is none within `seconds`."""
    try:
        if isinstance(address, str):
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(seconds)
            connection.connect(address)
        else:
            connection = socket.create_connection(address, seconds)
        with connection:
            connection.sendall(f"GET /{NOBODY} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
            words = connection.makefile("rb").readline(100).split()
        return int(words[1])
    except (OSError, ValueError, IndexError):
        return None


def runs(process: int) -> bool:
    """Whether there is a process of this number. /proc doesn't show it where each of a unit's commands has a user
    namespace of its own (`PrivateUsers=` with `ProtectProc=`).
    """
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def main() -> None:
    """The command `caramel-wait-online`."""
    parser = argparse.ArgumentParser(description="Wait until a Caramel server answers.")
    parser.add_argument("ini", type=Path, help="Caramel's INI file, for the address at which it listens")
    parser.add_argument("--seconds", type=float, default=60, help="how long to wait (60)")
    parser.add_argument(
        "--pid", type=int, help="the server's process: where it is gone, there is nothing to wait for"
    )
    arguments = parser.parse_args()
    try:
        address = listens_at(arguments.ini)
    except KeyError as error:
        sys.exit(f"caramel-wait-online: {arguments.ini}: there is no {error}")
    except (OSError, ValueError, configparser.Error) as error:
        sys.exit(f"caramel-wait-online: {str(error).splitlines()[0]}")
    deadline = time.monotonic() + arguments.seconds
    said = None
    while time.monotonic() < deadline:
        if arguments.pid and not runs(arguments.pid):
            sys.exit("caramel-wait-online: the server has ended")
        said = status(address, max(0.1, min(10, deadline - time.monotonic())))
        if said == 404:
            return
        time.sleep(PAUSE)
    sys.exit(f"caramel-wait-online: after {arguments.seconds:g} s {f'status {said}' if said else 'no answer'}")
