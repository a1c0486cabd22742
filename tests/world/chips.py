"""Chips that hold keys: a TPM (swtpm) and a PKCS #11 token (SoftHSM), with devices of Debian 13 that have one.

The programs that play them, and those that use such a key, are in a tree of their own (`trixie`), with the tests'
files and the loopback interface.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Optional, Union

from world.device import Device
from world.processes import Daemon, Service, environment, free_port, listens, until
from world.programs import ROOT, in_tree, installation, trixie

KEYS = ROOT / "packaging/keys"
PARENT = "0x81000001"


class Chip(Service):
    """Something that makes keys and keeps them. Its files are in `folder`."""

    kind: str
    #: Of the block in the key file.
    label: str
    #: For CARAMEL_KEY_COMMAND.
    key_command: str

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        #: What its users need in their environment here, and on no real device; the same object for ever.
        self.env: dict[str, str] = {}
        #: OpenSSL's configuration for its users.
        self.conf = KEYS / f"openssl-{self.kind}.cnf"

    def run(
        self, *command: Union[str, Path], check: bool = True, env: Optional[Mapping[str, str]] = None
    ) -> subprocess.CompletedProcess[str]:
        """A program beside it; what it printed. `env` comes on top of the chip's own."""
        done = subprocess.run(
            [*in_tree(trixie()), *map(str, command)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=self.folder,
            env=environment(**{**self.env, **(env or {})}),
            timeout=60,
        )
        assert done.returncode == 0 or not check, done
        return done

    def away(self) -> None:
        """Nobody can reach it, until `back`."""
        raise NotImplementedError

    def back(self) -> None:
        raise NotImplementedError


class Tpm(Chip):
    """A TPM 2.0, with or without the factory's step (`parent`)."""

    kind, label, key_command = "tpm", "TSS2 PRIVATE KEY", str(KEYS / "tpm-key")

    def __init__(self, folder: Path, *, parent: bool = True) -> None:
        super().__init__(folder)
        self.parent = parent
        self._daemon: Optional[Daemon] = None

    def start(self) -> None:
        (self.folder / "state").mkdir(exist_ok=True)
        for _ in range(5):
            # Two that follow each other. New ones each time: the old ones' last connections linger for a minute.
            port = free_port()
            server, control = (f"type=tcp,port={number}" for number in (port, port + 1))
            self._daemon = Daemon(
                [*in_tree(trixie()), "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.folder}/state",
                 "--server", server, "--ctrl", control, "--flags", "not-need-init,startup-clear"],
                self.folder / "swtpm.log",
                environment(OPENSSL_CONF="/dev/null"),
            )  # fmt: skip
            self._daemon.start()
            # It takes one connection at a time, and ends with it unless it came to the control channel.
            until("swtpm listens", lambda: listens(port + 1) or not (self._daemon and self._daemon.alive))  # noqa: B023
            if self._daemon.alive:
                break
            self._daemon.stop()
        self.env.update({f"TPM2{who}_TCTI": f"swtpm:port={port}" for who in ("OPENSSL", "TOOLS")})
        if self.parent:
            self.run(KEYS / "tpm-parent")

    def stop(self) -> None:
        if self._daemon:
            self._daemon.stop()

    def cut(self) -> None:
        """The power goes: it has no time to write anything."""
        self._signal(signal.SIGKILL)
        self.stop()

    def hang(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        assert self._daemon and self._daemon.process
        self._daemon.process.send_signal(number)

    away, back = stop, start

    def clear(self) -> None:
        """What somebody does who takes it into possession: all that it had is gone."""
        self.run("tpm2_clear", "-c", "p")

    def replace(self) -> None:
        """Another one stands in its place, as after a repair, with the factory's step done."""
        self.stop()
        shutil.rmtree(self.folder / "state")
        self.start()

    @property
    def attacks(self) -> int:
        """How many wrong passwords it believes to have seen."""
        text = self.run("tpm2_getcap", "properties-variable").stdout
        (count,) = re.findall(r"TPM2_PT_LOCKOUT_COUNTER: 0x([0-9A-F]+)", text)
        return int(count, 16)


class Token(Chip):
    """A PKCS #11 token, with its PIN in a file."""

    kind, label = "pkcs11", "PKCS#11 PROVIDER URI"
    module, pin = "/usr/lib/softhsm/libsofthsm2.so", "4321"

    def __init__(self, folder: Path, name: str = "a device") -> None:
        super().__init__(folder)
        self.name = name
        self.pin_file = self.folder / "pin"
        self.key_command = f'{KEYS}/pkcs11-key {self.module} "{name}" {self.pin_file}'
        text = self.conf.read_text()
        self.conf = self.folder / "openssl.cnf"
        self.conf.write_text(text.replace("/etc/caramel-embedded/pin", str(self.pin_file)))

    def start(self) -> None:
        configuration = self.folder / "softhsm2.conf"
        configuration.write_text(f"directories.tokendir = {self.folder}/tokens\nlog.level = ERROR\n")
        self.env["SOFTHSM2_CONF"] = str(configuration)
        self.pin_file.write_text(f"{self.pin}\n")
        self.pin_file.chmod(0o600)
        (self.folder / "tokens").mkdir()
        self.run(
            "softhsm2-util", "--init-token", "--free", "--label", self.name, "--so-pin", "1234", "--pin", self.pin
        )

    def stop(self) -> None:
        pass

    def away(self) -> None:
        (self.folder / "tokens").rename(self.folder / "unplugged")
        (self.folder / "tokens").mkdir()

    def back(self) -> None:
        (self.folder / "tokens").rmdir()
        (self.folder / "unplugged").rename(self.folder / "tokens")


def keys_in(chip: Chip, device: Device, key_type: str = "ec-p256") -> Device:
    """Makes it a device of Debian 13 that has this chip, with the settings for it in its configuration file."""
    before = in_tree(trixie())
    device.command = [*before, installation("trixie", "/usr/bin/python3", system=True, before=before)]
    device.surroundings = chip.env
    assert device.config
    device.config.write_text(
        f"CARAMEL_KEY_COMMAND='{chip.key_command}'\nCARAMEL_OPENSSL_CONF={chip.conf}\nCARAMEL_KEY_TYPE={key_type}\n"
    )
    return device
