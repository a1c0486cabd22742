"""What a test needs of its machine beside Python, and what becomes of it where that is missing.

`needs("nginx")` marks a test, a class or a parameter; `require("nginx")` says the same in the middle of a fixture or
a test; `slow` marks what `make test` leaves to `make test-all`. Whatever wasn't run is counted and named at the end
of the run, with the one line that installs what was missing. There is no other way to skip a test here.
"""

from __future__ import annotations

import functools
import os
import pwd
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import pytest
from world import BUILD, DEBIANS, ROOT, Apache, Nginx, debian_python, interpreters

#: `make test-all`: everything runs, and what can't fails.
EVERYTHING = os.environ.get("CARAMEL_TESTS_NO_SKIP", "") not in ("", "0")

_SLOW = "slow"
#: Debian keeps some programs out of ordinary users' search path.
_SBIN = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
_REASON = re.compile(r"needs (.*?)(?: \(apt-get install (.*)\))?")


class Need(NamedTuple):
    """Something that a machine has or hasn't."""

    there: Callable[[], bool]
    #: Names of the Debian packages that bring it; none where it isn't a matter of packages.
    packages: tuple[str, ...] = ()
    #: What to call it, if not by its name.
    what: Optional[str] = None


def program(name: str, *packages: str) -> Need:
    """A program on the path; in a package of the same name unless others are given."""
    return Need(lambda: shutil.which(name, path=_SBIN) is not None, packages or (name,))


def _made(path: str, what: str) -> Need:
    """Something that `make` puts into build/."""
    return Need(lambda: (BUILD / path).exists(), what=what)


def _succeeds(*command: str) -> bool:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    except OSError:
        return False
    return done.returncode == 0


def _python(version: str) -> Need:
    """That Python, or what fetches the Debian that has it."""
    return Need(
        lambda: version in dict(interpreters()) or (version in DEBIANS and has("mmdebstrap") and has("mounts")),
        ("mmdebstrap",) if version in DEBIANS else (),
        f"Python {version}" + (f" (or root, to fetch Debian's {DEBIANS[version]})" if version in DEBIANS else ""),
    )


def _ash() -> bool:
    """BusyBox with a shell that takes programs from the path; that of `busybox-static` prefers its own."""
    return _succeeds("busybox", "sh", "-c", "test \"$(PATH=/nonexistent; sleep 0 2>&1)\" != ''")


def busybox_with_crond() -> Optional[str]:
    """Debian's busybox has none, its busybox-static has; the two can't both be installed."""
    for program in (shutil.which("busybox"), str(BUILD / "busybox-static/bin/busybox")):
        if program and Path(program).exists():
            applets = subprocess.run([program, "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout
            # ldd(1) fails on what needs nothing beside it.
            static = subprocess.run(["ldd", program], capture_output=True).returncode != 0
            if static and {"crond", "init", "start-stop-daemon", "pidof"} <= set(applets.split()):
                return program
    return None


#: Programs on the path, by name; behind a colon the Debian package, if it has another one.
_PROGRAMS = """
bash buildah busybox curl dash deb-systemd-helper:init-system-helpers faketime flock:util-linux git
gnutls-cli:gnutls-bin go:golang-go haproxy kdig:knot-dnsutils knotd:knot knsupdate:knot-dnsutils lintian
logger:bsdutils make mandoc mariadb:mariadb-client mariadb-install-db:mariadb-server
mariadbd:mariadb-server mmdebstrap mosquitto mosquitto_pub:mosquitto-clients
mosquitto_sub:mosquitto-clients node:nodejs openssl pebble podman pgbouncer promtool:prometheus
psql:postgresql-client shellcheck sqlite3 ssh:openssh-client ssh-keygen:openssh-client
sshd:openssh-server strace stunnel4 systemctl:systemd wg:wireguard-tools wget
zabbix_agent2:zabbix-agent2 zabbix_get:zabbix-proxy-sqlite3
"""

NEEDS: dict[str, Need] = {
    **{
        name: program(name, package or name)
        for name, _, package in (each.partition(":") for each in _PROGRAMS.split())
    },
    "root": Need(lambda: os.geteuid() == 0, what="root"),
    "mounts": Need(
        lambda: NEEDS["root"].there() and _succeeds("unshare", "--mount", "true"),
        what="root, and mounts of its own (unshare(1))",
    ),
    # As root it becomes another user, who then has to read the tests' files.
    "apache2": Need(lambda: Apache.program() is not None, ("apache2-bin",)),
    "ash": Need(_ash, ("busybox",), "BusyBox's shell (busybox, not busybox-static)"),
    "ca-certificates": Need(lambda: Path("/etc/ssl/certs").is_dir(), ("ca-certificates",)),
    "caramel-client": _made(
        "bench/client/bin/caramel-client", "the Python client (make build/bench/client/installed)"
    ),
    "debian-tools": Need(
        lambda: all(shutil.which(name) for name in ("dpkg-buildpackage", "dh", "dh_python3")),
        ("dpkg-dev", "debhelper", "dh-python"),
        "Debian's packaging tools",
    ),
    "debian-python": Need(
        lambda: debian_python() is not None,
        ("python3-venv", "python3-cryptography", "python3-fasteners", "python3-openssl", "python3-urllib3"),
        "Debian's own Python with the libraries of a device",
    ),
    "e2fsprogs": program("mke2fs", "e2fsprogs"),
    "iproute2": program("ip", "iproute2"),
    "localedef": Need(
        lambda: shutil.which("localedef") is not None and Path("/usr/share/i18n/charmaps").is_dir(), ("locales",)
    ),
    "locust": _made("fleet/bin/locust", "Locust (make build/fleet/installed)"),
    "login": Need(
        lambda: not re.search(r"/(nologin|false)$", pwd.getpwuid(os.getuid()).pw_shell),
        what="a user who may log in",
    ),
    "nginx": Need(lambda: Nginx.program() is not None, ("nginx-light",)),
    "nspawn": Need(
        lambda: (
            NEEDS["root"].there() and shutil.which("systemd-nspawn") is not None and Path("/usr/bin/python3").exists()
        ),
        ("systemd-container", "python3"),
        "root, and systemd-nspawn(1)",
    ),
    # Debian keeps it on nobody's path.
    "postgresql": Need(lambda: any(Path("/usr/lib/postgresql").glob("*/bin/initdb")), ("postgresql",)),
    "rsyslogd": Need(
        lambda: (
            shutil.which("rsyslogd", path=_SBIN) is not None and any(Path("/usr/lib").glob("*/rsyslog/imrelp.so"))
        ),
        ("rsyslog", "rsyslog-relp"),
    ),
    "systemd": program("systemd-analyze", "systemd"),
    **{f"python{version}": _python(version) for version in DEBIANS},
    "busybox-crond": Need(
        lambda: busybox_with_crond() is not None,
        what="a BusyBox with crond (busybox-static, unpacked into build/busybox-static)",
    ),
    "trixie": Need(
        lambda: all(NEEDS[name].there() for name in ("make", "mmdebstrap", "mounts")),
        ("make", "mmdebstrap"),
        "root, to fetch a Debian 13 with a TPM and a token",
    ),
    "authority": _made("authority/bin/caramel-authority", "the registration authority, which needs Python 3.11"),
}


@functools.cache
def has(name: str) -> bool:
    """Whether this machine has it."""
    return NEEDS[name].there()


def _reason(missing: Iterable[str]) -> str:
    needed = [NEEDS[name] for name in missing]
    packages = [package for need in needed for package in need.packages]
    what = ", ".join(need.what or name for need, name in zip(needed, missing))
    return f"needs {what}" + (f" (apt-get install {' '.join(packages)})" if packages else "")


def needs(*names: str) -> pytest.MarkDecorator:
    """Marks what runs only where the machine has all of these."""
    missing = [name for name in names if not has(name)]
    return pytest.mark.skipif(bool(missing), reason=_reason(missing) if missing else "")


def require(*names: str) -> None:
    """Goes on only where the machine has all of these; for fixtures, and where a parameter decides."""
    missing = [name for name in names if not has(name)]
    if missing:
        pytest.skip(_reason(missing))


#: Marks what takes too long for `make test`. By itself: make test CARAMEL_TESTS_NO_SKIP=1 TESTS=tests/test_xyz.py
slow = pytest.mark.skipif(not EVERYTHING, reason=_SLOW)
#: Marks what a Debian 13 is fetched for, which takes minutes: `make test` has it where that was done before.
fetches = pytest.mark.skipif(not (EVERYTHING or (BUILD / "trixie/installed").exists()), reason=_SLOW)


def passed_before() -> set[str]:
    """With `make test-all REST=1`: what `make test` has run in this build, unless something has changed since."""
    record = Path(os.environ.get("CARAMEL_TESTS_PASSED", ""))
    if not os.environ.get("CARAMEL_TESTS_REST") or not record.is_file():
        return set()
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    files = [path for path in map(ROOT.joinpath, listed.stdout.split("\0")) if path.is_file()]
    changed = len(files) < 2 or any(path.stat().st_mtime > record.stat().st_mtime for path in files)
    return set() if changed else set(record.read_text().split("\n")) - {""}


def account(reasons: Iterable[str]) -> list[str]:
    """The lines that say what wasn't run and why, most frequent first, and how to have it run."""
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    lines: list[str] = []
    packages: set[str] = set()
    root = False
    for reason, count in counts.most_common():
        match = _REASON.fullmatch(reason)
        if match:
            packages.update((match[2] or "").split())
            root = root or re.search(r"\broot\b", match[1]) is not None
        what = "too slow for `make test`" if reason == _SLOW else match[0].partition(" (apt")[0] if match else reason
        lines.append(f"{count:6} {what}")
    how = [f"apt-get install {' '.join(sorted(packages))}"] if packages else []
    if counts:
        lines.append(f"All of it: {' && '.join([*how, 'make test-all'])}{' (as root)' if root or how else ''}")
    return lines
