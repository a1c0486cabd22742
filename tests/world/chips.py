"""Chips that hold keys: a TPM (swtpm) and a PKCS #11 token (SoftHSM), with devices of Debian 13 that have one.

The programs that play them, and those that use such a key, are in a tree of their own (`trixie`), with the tests'
files and the loopback interface.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
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


def at_port(port: int) -> dict[str, str]:
    """The environment of programs whose TPM is there."""
    return {f"TPM2{who}_TCTI": f"swtpm:port={port}" for who in ("OPENSSL", "TOOLS")}


class Tpm(Chip):
    """A TPM 2.0, with or without the factory's step (`parent`)."""

    kind, label, key_command = "tpm", "TSS2 PRIVATE KEY", str(KEYS / "tpm-key")

    def __init__(self, folder: Path, *, parent: bool = True) -> None:
        super().__init__(folder)
        self.parent = parent
        self._daemon: Optional[Daemon] = None
        #: Where it listens; the control channel is at the next one.
        self.port = 0

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
        self.port = port
        self.env.update(at_port(port))
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

    def go_on(self) -> None:
        """After `hang`."""
        self._signal(signal.SIGCONT)

    def tidy(self) -> None:
        """What /dev/tpmrm0 does when a program has ended: the keys that it had loaded make room. swtpm has room for
        three.
        """
        self.run("tpm2_flushcontext", "-t")

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


class Between(Service):
    """Stands between a TPM and those who use it: counts its commands, and answers some in its place. Its users have
    `env` in the place of the TPM's own.
    """

    def __init__(self, chip: Tpm) -> None:
        self.chip = chip
        #: Commands that came, by their code (TPM 2.0 Library, part 2, 6.5.2).
        self.commands: Counter[int] = Counter()
        #: What it answers to each command by itself, with no other content, and how often it still does.
        self.answer, self.times = 0, 0
        self.env: dict[str, str] = {}
        self._sockets: list[socket.socket] = []

    def says(self, code: int, times: int = 1 << 30) -> None:
        """From now on the next `times` commands get this response code."""
        self.answer, self.times = code, times

    def start(self) -> None:
        while not self._sockets:
            port = free_port()
            try:
                for number in (port, port + 1):
                    listener = socket.socket()
                    self._sockets.append(listener)
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    listener.bind(("127.0.0.1", number))
                    listener.listen()
            except OSError:
                self.stop()
        for offset, listener in enumerate(self._sockets):
            threading.Thread(target=self._listen, args=(listener, offset), daemon=True).start()
        self.env = {**self.chip.env, **at_port(port)}

    def stop(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._sockets = []

    def _listen(self, listener: socket.socket, offset: int) -> None:
        with suppress(OSError):
            while True:
                connection = listener.accept()[0]
                threading.Thread(target=self._serve, args=(connection, offset), daemon=True).start()

    def _serve(self, user: socket.socket, offset: int) -> None:
        with suppress(OSError), user, socket.create_connection(("127.0.0.1", self.chip.port + offset)) as tpm:
            if offset:
                back = threading.Thread(target=self._copy, args=(tpm, user), daemon=True)
                back.start()
                self._copy(user, tpm)
                back.join()
                return
            while True:
                command = _message(user)
                if not command:
                    return
                self.commands[struct.unpack(">I", command[6:10])[0]] += 1
                if self.times > 0:
                    self.times -= 1
                    user.sendall(struct.pack(">HII", 0x8001, 10, self.answer))
                else:
                    tpm.sendall(command)
                    user.sendall(_message(tpm))

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(4096):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def _message(connection: socket.socket) -> bytes:
    """A whole command or response: tag, size of all of it, and code; nothing where the other side has ended."""
    data = b""
    while len(data) < 6 or len(data) < struct.unpack(">I", data[2:6])[0]:
        more = connection.recv(4096)
        if not more:
            return b""
        data += more
    return data


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
