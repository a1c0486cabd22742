"""A device whose key is in a TPM lives its life with a real kernel's /dev/tpmrm0: what ``make device-test-tpm`` does.

The device is a QEMU machine with Debian 13's kernel and programs, its TPM is swtpm, and its certificates come from
the registration authority on this machine. The firmware is what ``make install KEYS=tpm`` makes. Only the file system
with the key file and the TPM's own state outlive the machine; when the power is cut, it is cut for both. Needs root.
"""

from __future__ import annotations

import base64
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Optional

from authority_world import Front, RegistrationAuthority
from powercut.machine import Failed, Machine
from world import PATIENCE, ROOT, Daemon, environment, in_tree, tree, until

from device.device_test import Story, check, make, shown_if_it_fails

#: Seconds for everything, once Debian's tree is there.
LIMIT = 900

PACKAGES = (
    "linux-image-amd64,busybox-static,python3,python3-cryptography,python3-fasteners,python3-openssl,python3-urllib3,"
    "openssl,tpm2-openssl,tpm2-tools,libtss2-tcti-device0t64,swtpm"
)
CLIENT_ID = "fffbeec0ffee"
#: This machine's loopback interface, as the guest sees it.
SERVER = "ca.example"
HOSTS = f"127.0.0.1 localhost\n10.0.2.2 {SERVER}\n"
STORE = "/var/lib/caramel"
REQUEST = "NEW CERTIFICATE REQUEST"
PARENT = "/usr/libexec/caramel-embedded/tpm-parent"


class Board:
    """The device: its disk, the TPMs that are or were soldered onto it (by name), and its power switch."""

    def __init__(self, folder: Path, debian: Path, firmware: Path) -> None:
        self.folder, self.debian, self.firmware = folder, debian, firmware
        self.disk = folder / "disk"
        self.disk.write_bytes(b"")
        subprocess.run(["mke2fs", "-q", "-t", "ext4", str(self.disk), "16M"], check=True)
        self.initrd = folder / "initrd"
        subprocess.run([ROOT / "tests/device/tpm-initrd.sh", debian, self.initrd], check=True)
        (self.kernel,) = (debian / "boot").glob("vmlinuz-*")
        self._machine: Optional[Machine] = None
        self._swtpm: Optional[Daemon] = None

    @property
    def machine(self) -> Machine:
        assert self._machine, "the power is off"
        return self._machine

    def console(self) -> str:
        return "\n".join(self._machine.log[-30:] if self._machine else [])

    def boot(self, chip: Optional[str]) -> float:
        """Turns the power on, with this TPM or without one; how many seconds it took."""
        began = time.monotonic()
        hardware = ["-machine", "q35,accel=tcg", "-cpu", "max", "-smp", "1", "-m", "512M"]
        for name, folder in (("tree", self.debian), ("firmware", self.firmware)):
            hardware += ["-fsdev", f"local,id={name},path={folder},security_model=none,readonly=on"]
            hardware += ["-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}"]
        hardware += ["-drive", f"if=virtio,format=raw,file={self.disk}"]
        if chip:
            socket = self.folder / "swtpm"
            socket.unlink(missing_ok=True)
            (self.folder / chip).mkdir(exist_ok=True)
            self._swtpm = Daemon(
                [*in_tree(self.debian), "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.folder / chip}",
                 "--ctrl", f"type=unixio,path={socket}", "--terminate"],
                self.folder / "swtpm.log",
                environment(OPENSSL_CONF="/dev/null", TMPDIR=tempfile.gettempdir()),
            )  # fmt: skip
            self._swtpm.start()
            until("swtpm listens", socket.exists)
            hardware += ["-chardev", f"socket,id=chip,path={socket}", "-tpmdev", "emulator,id=tpm,chardev=chip"]
            hardware += ["-device", "tpm-tis,tpmdev=tpm"]
        self._machine = Machine.booted(self.kernel, self.initrd, *hardware)
        self._machine.wake()
        return time.monotonic() - began

    def off(self) -> None:
        """Shut down in order; the kernel tells the TPM, which writes down that all was well."""
        self.machine.off()
        self._machine = None
        if self._swtpm and self._swtpm.process:
            self._swtpm.process.wait(PATIENCE)
            self._swtpm.stop()

    def cut(self) -> None:
        """The power goes, for the TPM as well: nobody has time to write anything."""
        if self._swtpm and self._swtpm.process:
            self._swtpm.process.kill()
            self._swtpm.stop()
        if self._machine:
            self._machine.cut()
            self._machine = None

    def does(self, script: str) -> str:
        """A script that has to succeed; what it printed."""
        status, output = self.machine.shell(script)
        check(status == 0, (script, status, output))
        return output

    def checks(self, status: int, *words: str) -> str:
        """A run of the program: ends with this status, and says these words in its one line."""
        found, output = self.machine.shell("caramel-embedded")
        check(found == status and all(word in output for word in words), (status, words, found, output))
        check(len(output.splitlines()) == 1, output)
        return output.strip()

    def file(self) -> dict[str, Any]:
        """All that there is to know about the key file."""
        (found,) = (file for file in self.machine.done("look", folder=STORE) if file["path"] == "identity.pem")
        return {**found, "stat": self.does(f"stat -c '%i %y %z' {STORE}/identity.pem")}

    def blocks(self) -> dict[str, str]:
        text = base64.b64decode(self.file()["data"]).decode()
        return {match[1]: match[0] for match in re.finditer(r"-----BEGIN (.*)-----\n[^-]*-----END \1-----\n", text)}

    def counted(self) -> tuple[int, bool]:
        """How many attacks the TPM believes to have seen, and whether it was shut down in order before it started."""
        text = self.does("tpm2_getcap properties-variable")
        attacks = re.search(r"LOCKOUT_COUNTER: 0x([0-9A-F]+)", text)
        orderly = re.search(r"orderly: *([01])", text)
        assert attacks and orderly, text
        return int(attacks[1], 16), orderly[1] == "1"


def firmware(folder: Path, address: str, ca: Path) -> Path:
    """What the maker of the image does: one command, and the settings that are the fleet's."""
    settings = folder / "firmware.conf"
    settings.write_text(f"CARAMEL_KEY_TYPE=ec-p256\nCARAMEL_CN={CLIENT_ID}\n")
    made = folder / "firmware"
    make(
        "install", "INIT=none", "KEYS=tpm", "COMPILE=no", "PYTHON_DIR=/usr/lib/python3/dist-packages",
        f"DESTDIR={made}", f"SERVER={address}", f"CA_CERT={ca}", f"CONF={settings}",
    )  # fmt: skip
    (made / "etc").mkdir(exist_ok=True)
    (made / "etc/hosts").write_text(HOSTS)
    return made


def live(board: Board, authority: RegistrationAuthority, front: Front, say: Story) -> None:
    seconds = board.boot("chip")
    say(f"the factory: kernel {board.does('uname -r').strip()}, up in {seconds:.1f} s")
    driver = board.does("test -c /dev/tpmrm0; basename $(readlink /sys/class/tpm/tpm0/device/driver)").strip()
    say(f"there is /dev/tpmrm0, by the kernel's driver {driver}")
    board.checks(127, "run tpm-parent once")
    check("identity.pem" not in board.does(f"ls {STORE}"), "something is stored before there is a key")
    board.does(PARENT)
    check("noda" in board.does("tpm2_readpublic -c 0x81000001"), "the parent lacks noda")
    board.off()
    say("tpm-parent: the TPM has the parent, and no run before it has stored anything")

    board.boot("chip")
    say("first boot: " + board.checks(69))
    check(list(board.blocks()) == ["TSS2 PRIVATE KEY", REQUEST], board.blocks())
    authority.command("authorize", CLIENT_ID)
    board.checks(0)
    first = board.blocks()
    check(list(first) == ["TSS2 PRIVATE KEY", "CERTIFICATE", REQUEST], first)
    kept = board.file()
    board.off()
    say("authorized: there is a certificate for the key in the TPM")

    def unchanged(what: str) -> None:
        board.checks(0)
        check(front.seen()[-1] == "GET 304", front.seen())
        check(board.file() == kept, "the file isn't as it was")
        say(f"{what}: unchanged, the file is as it was")

    board.boot("chip")
    check(board.counted() == (0, True), board.counted())
    unchanged("rebooted")

    authority.command("minimum-serial", "--now")
    board.checks(0)
    renewed = board.blocks()
    check(renewed["CERTIFICATE"] != first["CERTIFICATE"], "the certificate is the old one")
    check({**renewed, "CERTIFICATE": ""} == {**first, "CERTIFICATE": ""}, "key or request are other ones")
    say("renewed: a newer certificate for the same key")
    kept = board.file()

    for number, pause in enumerate((0.2, 0.5, None), 1):
        unchanged(f"used before power cut {number}")
        board.does("sync")
        if pause:
            board.machine.order("shell", script="caramel-embedded")
            time.sleep(pause)
        board.cut()
        board.boot("chip")
        check(board.counted() == (0, False), board.counted())
        say(f"power cut {number} noticed by the TPM, and its counter of attacks is 0")
    unchanged("after the power cuts")
    board.off()

    def useless(what: str, *words: str) -> None:
        line = board.checks(127, "unchanged", *words)
        check(board.file() == kept, "the file isn't as it was")
        say(f"{what}: 127, the file is as it was: {line}")

    board.boot(None)
    check("no" in board.does("test -e /dev/tpmrm0 || echo no"), "there is a TPM")
    useless("without a TPM", "the TPM can't be reached")
    board.off()
    board.boot("another")
    useless("another TPM, straight from its maker", "the TPM has not the parent")
    board.does(PARENT)
    useless("another TPM, after the factory's step", "it is another TPM's key")
    board.off()
    board.boot("chip")
    unchanged("the old TPM is back")

    board.does("tpm2_clear -c l")
    useless("cleared", "the TPM has not the parent")
    board.does(PARENT)
    useless("cleared, after the factory's step", "or the TPM was cleared")
    authority.command("reject", CLIENT_ID)
    say("rejected: " + board.checks(69))
    check(board.blocks()["TSS2 PRIVATE KEY"] != first["TSS2 PRIVATE KEY"], "the key is the old one")
    authority.command("authorize", CLIENT_ID)
    board.checks(0)
    kept = board.file()
    unchanged("authorized again, with a new key in the cleared TPM")
    board.off()


def too_long(*_: object) -> None:
    raise Failed(f"not done in {LIMIT} s")


def main() -> int:
    programs = ("qemu-system-x86_64", "mmdebstrap", "mke2fs", "cpio", "modprobe", "xz", "nginx")
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        print(f"make device-test-tpm: missing: {', '.join(missing)}", file=sys.stderr)
        return 1
    debian = tree("device/trixie-amd64", "trixie", PACKAGES)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    say = Story()
    with tempfile.TemporaryDirectory(prefix="caramel-tpm-") as name:
        folder = Path(name)
        authority = RegistrationAuthority(folder / "authority")
        authority.create_ca()
        certificate = folder / "front.pem"
        authority.command("server-certificate", SERVER, "--out", str(certificate))
        with (
            authority.serving(options=["--behind-proxy"]) as server,
            Front(folder / "front", certificate, server.port) as front,
        ):
            board = Board(folder, debian, firmware(folder, f"{SERVER}:{front.port}", authority.ca))
            try:
                with shown_if_it_fails(board.console):
                    live(board, authority, front, say)
            finally:
                board.cut()
    say("all of a device's life, with its key in a TPM")
    return 0


if __name__ == "__main__":
    sys.exit(main())
