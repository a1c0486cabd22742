"""What runs inside the guest, as its process 1: obeys the harness over the serial port, one JSON object a line.

Responsible for the loads and for looking at what a power cut has left; judges nothing. The harness imports `content`
from here, to know what a file has to hold.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import stat
import subprocess
import sys
import termios
import time
import tty
from typing import Any, Callable, Optional

SERIAL = "/dev/ttyS0"

#: Every line of the content begins with this, so that pieces of it are found wherever they come to light.
MARK = b"secret "

#: Longer ones are none of the program's.
_LONGEST = 1 << 16


def content(number: int) -> bytes:
    """What the key file holds after the `number`th replace: 1.5 to 6 kB, every line of it with its number."""
    lines = 25 + number * 7919 % 75
    return b"".join(b"%s%08d %02d %s\n" % (MARK, number, line, b"=" * 40) for line in range(lines)) + b"whole\n"


def replaced(path: str, data: bytes, owner: int, group: int, mode: int) -> None:
    """The program's own way to store an identity. Raises what it raises."""
    from caramel_embedded.keyfile import KeyFile
    from caramel_embedded.settings import Permissions

    permissions = Permissions(owner, group, mode)
    file = KeyFile.open(path) or KeyFile.create(path, permissions)
    try:
        file.replace(data, None, permissions)
    finally:
        file.close()


class Guest:
    """The serial port, and what can be asked for over it."""

    def __init__(self, serial: int) -> None:
        self._serial = serial
        self._commands: dict[str, Callable[..., Any]] = {
            "now": self._now,
            "shell": self._shell,
            "look": self._look,
            "replace": self._replace,
            "check": self._check,
            "copy_up": self._copy_up,
        }

    def say(self, **what: Any) -> None:
        data = json.dumps(what).encode() + b"\n"
        while data:
            data = data[os.write(self._serial, data) :]

    def obey(self) -> None:
        """Carries out what comes, without end."""
        os.write(self._serial, b"\n")  # what the firmware said ends in the middle of a line
        self.say(ready=True)
        with os.fdopen(self._serial, "rb", closefd=False) as lines:
            for line in lines:
                order = json.loads(line)
                try:
                    self.say(done=self._commands[order.pop("do")](**order))
                except Exception as error:
                    self.say(failed="%s: %s" % (type(error).__name__, error))

    @staticmethod
    def _now(seconds: float, seed: str) -> None:
        """The time, and randomness: after a restore, the machine has those of the snapshot."""
        time.clock_settime(time.CLOCK_REALTIME, seconds)
        with open("/dev/urandom", "wb") as pool:
            pool.write(base64.b64decode(seed))
            fcntl.ioctl(pool, 0x5207)  # RNDRESEEDCRNG, see random(4)

    @staticmethod
    def _shell(script: str, seconds: float = 60) -> list[Any]:
        """Exit status and output of a script."""
        done = subprocess.run(
            ["/bin/sh", "-ec", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
        return [done.returncode, done.stdout.decode(errors="replace")[-2000:]]

    @staticmethod
    def _look(folder: str) -> list[dict[str, Any]]:
        """All files below a folder."""
        found = []
        for where, _, names in os.walk(folder):
            for name in names:
                path = os.path.join(where, name)
                status = os.lstat(path)
                file = {
                    "path": os.path.relpath(path, folder),
                    "mode": stat.S_IMODE(status.st_mode),
                    "owner": status.st_uid,
                    "group": status.st_gid,
                    "size": status.st_size,
                }
                if stat.S_ISREG(status.st_mode):
                    try:
                        with open(path, "rb") as stream:
                            file["data"] = base64.b64encode(stream.read(_LONGEST)).decode()
                    except OSError as error:
                        file["error"] = error.strerror
                found.append(file)
        return found

    def _replace(self, path: str, first: int, count: int, owner: int, group: int, mode: int) -> None:
        """Replaces the key file `count` times and says each time that it is done, once it is."""
        self.say(loading=True)
        for number in range(first, first + count):
            replaced(path, content(number), owner, group, mode)
            self.say(ack=number)

    @staticmethod
    def _copy_up(path: str, owner: int, group: int, mode: int) -> dict[str, bool]:
        """Copies a key file of the lower layer to the upper one under a lock; whether others see that lock."""
        from caramel_embedded.errors import Locked
        from caramel_embedded.keyfile import KeyFile
        from caramel_embedded.settings import Permissions

        def locked() -> bool:
            return subprocess.run(["flock", "--nonblock", path, "true"]).returncode == 1

        file = KeyFile.open(path)
        assert file
        found = {"opened": locked()}
        os.chmod(path, 0o600)
        found["copied up"] = locked()
        file.replace(content(1), None, Permissions(owner, group, mode))
        found["replaced"] = locked()
        file.close()
        found["free in the end"] = not locked()
        # The other way round: somebody else has the lock, and copies.
        other = os.open(path.replace("identity", "other"), os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)
        os.chmod(other, 0o600)
        try:
            KeyFile.open(path.replace("identity", "other"))
        except Locked:
            found["another's"] = True
        else:
            found["another's"] = False
        os.close(other)
        return found

    def _check(self, options: list[str], environment: dict[str, str], seconds: float = 120) -> list[Any]:
        """One run of the whole program: exit status and output."""
        self.say(loading=True)
        done = subprocess.run(
            ["/bin/sh", "/run/program/caramel-embedded", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": os.environ["PATH"], **environment},
            timeout=seconds,
        )
        return [done.returncode, done.stdout.decode(errors="replace")[-2000:]]


#: The hook says for which certificate it was called, once it is done.
_HOOK = """#!/bin/sh
set -e
sum=$(sed -n '/BEGIN CERTIFICATE-/,/END CERTIFICATE-/p' "$CARAMEL_KEY_FILE" | sha256sum)
echo "{\\"hook\\": \\"${sum%% *}\\"}" >/dev/ttyS0
"""

_NETWORK = """
modprobe virtio_net; modprobe virtio_rng
busybox ip link set lo up; busybox ip link set eth0 up; busybox ip addr add 10.0.2.15/24 dev eth0
"""


def _warm(path: str) -> None:
    """All that the loads need is there before the snapshot; it needn't be read and made after every restore."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", "/run/program"], check=True)
    subprocess.run(["/bin/sh", "-ec", _NETWORK], check=True)
    with open("/run/hook", "w") as hook:
        hook.write(_HOOK)
    os.chmod("/run/hook", 0o755)
    for number in range(3):
        replaced(path, content(number), 1, 2, 0o640)
    os.unlink(path)
    subprocess.run(["/bin/sh", "/run/program/caramel-embedded", "--version"], check=True, stdout=subprocess.DEVNULL)


def main(serial: Optional[int] = None) -> None:
    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    if serial is None:
        serial = os.open(SERIAL, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(serial, termios.TCSANOW)
    _warm("/run/warm.pem")
    Guest(serial).obey()


if __name__ == "__main__":
    main()
