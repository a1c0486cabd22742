"""What the Debian package's own scripts do, with dpkg and deb-systemd-helper of this machine, on a copy of it.

The copy is an overlay in a mount namespace of its own: what is installed and removed in it, is gone with it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from needs import needs, slow
from world import ROOT, environment

pytestmark = [slow, needs("mounts", "debian-tools", "deb-systemd-helper", "systemctl")]

COPY = """
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
mount --bind "$1" /mnt/root/mnt
mount -t proc proc /mnt/root/proc
mount --bind /dev /mnt/root/dev
exec chroot /mnt/root /bin/sh -euc "$2"
"""


def package(folder: Path, conf: str = "") -> Path:
    """The package, with these settings of a device in it."""
    env = {name: value for name, value in environment(BUILD=str(folder)).items() if not name.startswith("COVERAGE_")}
    folder.mkdir()
    if conf:
        (folder / "firmware.conf").write_text(conf)
        env["CARAMEL_BAKE"] = str(folder / "firmware.conf")
    done = subprocess.run([ROOT / "packaging/deb.sh"], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.deb")
    return made


def on_a_copy(folder: Path, script: str) -> list[str]:
    """Runs it on a copy of this machine where `folder` is /mnt; its lines."""
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", COPY, "copy", str(folder), script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


#: Quiet but for what the package's own scripts say; what it depends on is another test's matter.
DPKG = (
    'dpkg() { command dpkg --force-depends "$@" 2>&1 | grep -e "^caramel-embedded: " -e "^  /" -e rror || true; }\n'
)

ENABLED = """
enabled() { systemctl is-enabled caramel-embedded.timer caramel-embedded-boot.timer | xargs echo "$1:" || true; }
"""


def test_settings_that_come_later_enable_the_timers_and_a_decision_stays(tmp_path: Path) -> None:
    package(tmp_path / "plain")
    package(tmp_path / "baked", "CARAMEL_CA=ca.example.com\n")
    lines = on_a_copy(
        tmp_path,
        DPKG + ENABLED + "dpkg --purge caramel-embedded\n"
        "dpkg -i /mnt/plain/*.deb; enabled plain\n"
        "dpkg -i /mnt/baked/*.deb; enabled baked\n"
        "systemctl disable --quiet caramel-embedded.timer\n"
        "dpkg -i /mnt/baked/*.deb; enabled again\n"
        "dpkg -i /mnt/plain/*.deb; enabled plain\n"
        "dpkg --purge caramel-embedded; dpkg -i /mnt/baked/*.deb; enabled new\n"
        "ls /run/caramel-embedded* || echo nothing left\n",
    )
    assert lines == [
        "plain: disabled disabled",
        "baked: enabled enabled",
        "again: disabled enabled",
        "plain: disabled enabled",
        "new: enabled enabled",
        "nothing left",
    ]


def test_purging_says_where_private_keys_are_left(tmp_path: Path) -> None:
    package(tmp_path / "baked", 'CARAMEL_CA=ca.example.com\nCARAMEL_KEY_FILE="/var/a b/identity.pem"\n')
    files = [
        "/var/a b/identity.pem",
        "/var/lib/caramel/identity.pem",
        "/var/lib/caramel/web/identity.pem",
        "/var/other.pem",
    ]
    make = "".join(f'mkdir -p "$(dirname "{file}")"; echo key >"{file}"\n' for file in files)
    lines = on_a_copy(
        tmp_path,
        DPKG + "dpkg --purge caramel-embedded; rm -rf /var/lib/caramel\n"
        "dpkg -i /mnt/baked/*.deb; dpkg --purge caramel-embedded; echo nothing to say\n"
        + make
        + "mkdir -p /etc/caramel-embedded; echo 'CARAMEL_KEY_FILE=/var/other.pem' >/etc/caramel-embedded/mail.conf\n"
        "dpkg -i /mnt/baked/*.deb; systemctl enable --quiet caramel-embedded@mail.timer\n"
        "dpkg --remove caramel-embedded; ls /etc/systemd/system/*/caramel-embedded@*; echo removed\n"
        "dpkg --purge caramel-embedded; ls /etc/systemd/system/*/caramel-embedded@* 2>/dev/null || true\n"
        'for file in /var/lib/caramel-embedded*; do echo "$file"; done\n'
        + "".join(f'cat "{file}"\n' for file in files),
    )
    link = "/etc/systemd/system/timers.target.wants/caramel-embedded@mail.timer"
    assert lines[:3] == ["nothing to say", link, "removed"]
    assert "private keys" in lines[3]
    assert lines[4:8] == [f"  {file}" for file in files]
    assert lines[8:] == ["/var/lib/caramel-embedded*", "key", "key", "key", "key"]
