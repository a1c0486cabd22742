"""A device's life on a small Debian armhf system: BusyBox as process 1, its init scripts, a clock in 1970.

The tree holds what Debian 12 ships for armhf, unpacked and never configured: BusyBox, Python and cryptography. The
program comes onto it as a maker of devices would put it there: the one file of ``make zipapp``, and the scripts of
``make install-sysv``. qemu-user-static runs it through binfmt_misc, in a chroot and in mount and process namespaces
of its own, so that turning the power off is killing process 1. Caramel and nginx are real, and on this machine's
loopback interface.

    device_test.py TREE        a tree made by tests/device/device-test.sh; needs root
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Optional

from world import ROOT, Authority, Caramel, Nginx, until

SERIAL = "10000000a5b6c7d8"

#: Processor time under emulation is many times that of a device.
PATIENCE = 120.0

#: 1970, as libfaketime(1) has it: each process starts in that minute, sleeping and files' times are left alone.
CLOCK_1970 = (
    "export LD_PRELOAD=/usr/lib/arm-linux-gnueabihf/faketime/libfaketime.so.1\n"
    "export FAKETIME='@1970-01-01 00:05:00' FAKETIME_DONT_FAKE_MONOTONIC=1 DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1\n"
)

#: What BusyBox init does at boot, in the manner of Buildroot: the scripts of /etc/init.d one after the other.
INITTAB = "::sysinit:/etc/init.d/rcS\n"
RCS = """#!/bin/sh
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
export PATH=/usr/sbin:/usr/bin
{clock}for script in /etc/init.d/S??*; do
    "$script" start
done
"""

PATH = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
DEFAULTS = "RETRY_FIRST=1\nRETRY_MAX=2\nSPREAD=1\n"


class Machine:
    """The device: its root file system, and its power switch."""

    def __init__(self, tree: Path, root: Path) -> None:
        self.root = root
        subprocess.run(["cp", "-a", "--reflink=auto", str(tree), str(root)], check=True)
        self.write("etc/inittab", INITTAB)
        self.write("etc/hosts", "127.0.0.1 localhost\n")
        self.write("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n")
        self.write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")
        self.write("etc/group", "root:x:0:\n")
        self.write("etc/default/caramel-embedded", DEFAULTS)
        self.write("etc/init.d/S01syslogd", "#!/bin/sh\nsyslogd -O /var/log/messages\n", 0o755)
        # A Raspberry Pi's device tree has its serial number here, with a NUL at the end.
        self.write("sys/firmware/devicetree/base/serial-number", SERIAL + "\0")
        (self.root / "run").mkdir(exist_ok=True)
        self.init: Optional[subprocess.Popen[bytes]] = None

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    @property
    def inside(self) -> list[str]:
        """What runs a command there: when the first process dies, all do, and what they had mounted is gone."""
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "chroot", str(self.root)]

    @property
    def key_file(self) -> Path:
        return self.root / "var/lib/caramel/identity.pem"

    def labels(self) -> list[str]:
        text = self.key_file.read_text() if self.key_file.exists() else ""
        return [line[11:-5] for line in text.splitlines() if line.startswith("-----BEGIN ")]

    def last_lines(self) -> str:
        logs = (self.root / "boot.log", self.root / "var/log/messages")
        texts = [log.read_text(errors="replace") for log in logs if log.exists()]
        return "\n".join(line for text in texts for line in text.splitlines()[-30:])

    def boot(self, clock: str = "") -> float:
        """Turns the power on; how many seconds the init scripts took."""
        self.write("etc/init.d/rcS", RCS.format(clock=clock), 0o755)
        marker = self.root / "var/booted"
        marker.unlink(missing_ok=True)
        self.write("etc/init.d/S99booted", "#!/bin/sh\n: >/var/booted\n", 0o755)
        started = time.monotonic()
        with open(self.root / "boot.log", "ab") as log:
            self.init = subprocess.Popen(
                [*self.inside, "/bin/busybox", "init"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=PATH
            )
        until("the boot is over", marker.exists, PATIENCE)
        return time.monotonic() - started

    def power_off(self) -> None:
        """Without any warning."""
        if self.init is not None:
            self.init.kill()  # --kill-child: process 1 goes with it, and with that its whole namespace
            self.init.wait()
            self.init = None

    def run(self, *command: str, clock: str = "") -> subprocess.CompletedProcess[str]:
        """A command on the device, as from its console."""
        words = " ".join(f"'{word}'" for word in command)
        script = f"mount -t proc proc /proc; {clock}exec {words}"
        line = [*self.inside, "/bin/sh", "-c", script]
        return subprocess.run(
            line, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=PATH, timeout=PATIENCE
        )


class Story:
    """Answer each step and how it went, and how long it took."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text.strip()}", flush=True)


def check(good: bool, what: object) -> None:
    if not good:
        raise AssertionError(what)


def make(*words: str) -> None:
    """A command of whoever makes the image."""
    line = ["make", "-s", "-C", str(ROOT), "-f", "packaging/packaging.mk", *words]
    subprocess.run(line, check=True)


@contextmanager
def shown_if_it_fails(lines: Callable[[], str]) -> Iterator[None]:
    """What a device said last is printed if its story breaks off."""
    try:
        yield
    except BaseException:
        print("--- the device", lines(), sep="\n", file=sys.stderr)
        raise


def install(machine: Machine, server: str, ca: Path) -> None:
    """What the maker of the image does: two commands."""
    program = f"{machine.root}/usr/bin/caramel-embedded"
    make("zipapp", f"SERVER={server}", f"CA_CERT={ca}", f"OUT={program}", "PYTHON=/usr/bin/python3")
    make("install-sysv", f"DESTDIR={machine.root}")


def live(machine: Machine, caramel: Caramel, front: Nginx, say: Story) -> None:
    def certified() -> bool:
        # Read by whoever wants to: at no time is it anything but a whole file.
        labels = machine.labels()
        return labels == ["PRIVATE KEY", "CERTIFICATE", "NEW CERTIFICATE REQUEST"]

    def log() -> list[str]:
        messages = machine.root / "var/log/messages"
        lines = messages.read_text(errors="replace").splitlines() if messages.exists() else []
        return [line.split("caramel-embedded", 1)[1] for line in lines if "caramel-embedded" in line]

    seconds = machine.boot(CLOCK_1970)
    say(f"first boot, clock in 1970: the init scripts took {seconds:.1f} s")
    until("the server has the request", lambda: caramel.requests(SERIAL), PATIENCE)
    requests = caramel.requests(SERIAL)
    check(len(requests) == 1, requests)
    check(machine.labels() == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"], machine.labels())
    check(machine.key_file.stat().st_mode & 0o777 == 0o600, "mode of the key file")
    say(f"the server has the request of {SERIAL}, the serial number in the device tree")

    caramel.sign(SERIAL)
    until("the device fetches the certificate by itself", certified, PATIENCE)
    say("signed: the init script's loop has fetched the certificate")
    crontab = machine.root / "var/spool/cron/crontabs/root"
    until("cron takes over", crontab.exists, PATIENCE)
    asked = ["sh", "-c", '. "$1/chance"; number "$2"', "sh", str(ROOT / "packaging/libexec"), SERIAL]
    number = int(subprocess.run(asked, stdout=subprocess.PIPE, check=True).stdout)
    started = "/etc/init.d/S95caramel-embedded start >/dev/null 2>&1"
    expected = f"{number % 60} * * * * {started} # caramel-embedded\n"
    check(crontab.read_text() == expected, crontab.read_text())
    say(f"cron has taken over, at minute {number % 60} of every hour")

    before = machine.key_file.read_bytes(), machine.key_file.stat().st_ino, machine.key_file.stat().st_mtime_ns
    lines = len(log())
    # Nothing that this console started lives longer than its shell.
    checked = "until grep -q unchanged /var/log/messages; do sleep 1; done"
    done = machine.run("/bin/sh", "-c", f"{started}; status=$?; {checked}; exit $status", clock=CLOCK_1970)
    # Behind it there may be a line on crond, which this console doesn't see.
    until("the log has it", lambda: any("unchanged" in line for line in log()[lines:]), PATIENCE)
    check(done.returncode == 0 and not done.stdout, done)
    after = machine.key_file.read_bytes(), machine.key_file.stat().st_ino, machine.key_file.stat().st_mtime_ns
    check(before == after, "an unchanged check wrote something")
    say(f"cron's check, still in 1970: 0, nothing written: {log()[lines]}")

    machine.power_off()
    front.stop()
    seconds = machine.boot(CLOCK_1970)
    say(f"power cut, the server is down: the init scripts took {seconds:.1f} s")
    until("it says why", lambda: "can't be reached" in log()[-1], PATIENCE)
    check(certified(), machine.labels())
    say(f"it has kept its certificate, and says why: {log()[-1]}")
    front.start()
    until("it tries again", lambda: "unchanged" in log()[-1], PATIENCE)
    machine.power_off()
    say("the server is back, and so is the device")

    caramel.sign(SERIAL, hours=72)
    newer = caramel.certificates(caramel.requests(SERIAL)[0].sha256)[-1]
    machine.boot()
    until("the newer certificate is stored", lambda: newer.strip() in machine.key_file.read_bytes(), PATIENCE)
    say("booted with the right time: the newer certificate is stored")

    done = machine.run("/usr/bin/caramel-embedded", "--status")
    check(done.returncode == 0 and SERIAL in done.stdout, done)
    say("--status: " + done.stdout.splitlines()[0])

    caramel.reject(SERIAL)
    done = machine.run("/usr/bin/caramel-embedded")
    check(done.returncode == 69, done)
    check(machine.labels() == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"], machine.labels())
    check(newer.strip() not in machine.key_file.read_bytes(), "the rejected certificate is still there")
    say(f"rejected: wiped, and a new request posted, 69: {done.stderr.strip()}")

    caramel.sign(SERIAL)
    machine.power_off()
    machine.boot(CLOCK_1970)
    until("the certificate after the rejection", certified, PATIENCE)
    say("signed again, booted in 1970 again: there is a new certificate")

    holder = "flock /var/lib/caramel/identity.pem /usr/bin/caramel-embedded"
    done = machine.run("/bin/sh", "-c", holder)
    check(done.returncode == 1, done)
    say(f"under flock(1): 1: {done.stderr.strip()}")

    machine.power_off()
    cryptography = machine.root / "usr/lib/python3/dist-packages/cryptography"
    cryptography.rename(cryptography.with_name("gone"))
    done = machine.run("/usr/bin/caramel-embedded", "--key-file", "/var/lib/caramel/another.pem")
    check(done.returncode == 127 and "cryptography" in done.stderr, done)
    check(len(done.stderr.splitlines()) == 1, done)
    say(f"without the module: 127: {done.stderr.strip()}")
    check(certified(), machine.labels())


def main() -> int:
    tree = Path(sys.argv[1]).resolve()
    say = Story()
    with tempfile.TemporaryDirectory(prefix="caramel-device-") as name:
        folder = Path(name)
        # The folder that everything is in must not keep nginx's workers out.
        folder.chmod(0o755)
        authority = Authority(folder / "authority")
        machine = Machine(tree, folder / "root")
        with (
            Caramel(folder / "caramel", authority) as caramel,
            Nginx(folder / "nginx", caramel, authority.server()) as front,
        ):
            install(machine, front.address, authority.certificate_file)
            say("image made: the tree, make zipapp, make install-sysv")
            try:
                with shown_if_it_fails(machine.last_lines):
                    live(machine, caramel, front, say)
            finally:
                machine.power_off()
    say("all of a device's life, on Arm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
