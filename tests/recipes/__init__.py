"""Two machines for a recipe of docs/recipes.md: a device and a server, each with an identity that it fetched itself.

The configuration of their programs comes from the page, word for word but for paths, host names, port numbers and,
where it isn't root who runs the test, users. Here is what is no page's business: where a machine's files are, and
what stands in for systemd. That knows `restart` and `reload-or-restart`; whether and how a service can be reloaded it
takes from Debian's unit file, or from a drop-in that the page shows. No service runs until a hook has asked for it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Optional, Union

import world
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from world import Authority, Caramel, Daemon, Device

PAGE = world.ROOT / "docs" / "recipes.md"
ID = "fffbeec0ffee"

#: Debian keeps servers out of ordinary users' search path.
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class Section:
    """One recipe: the files, settings and commands that stand under a heading of the page."""

    def __init__(self, heading: str) -> None:
        found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
        assert found, heading
        self.text = found[1]

    def files(self, side: str) -> dict[str, str]:
        """Path to content, of the files of "device" or "server"; before each is a line such as `# server: /etc/x`."""
        content: dict[str, str] = {}
        for block in re.findall(r"^```\w+\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL):
            pieces = re.split(r"^(?:#|;|//) (device|server|both): (/\S+)\n", block, flags=re.MULTILINE)
            for whose, path, text in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
                if whose in (side, "both"):
                    content[path] = text
        return content

    def settings(self, side: str) -> str:
        """Lines for /etc/caramel-embedded.conf: all that is named in the list's items of that side."""
        items = re.findall(r"^- (\w+): (.*?)(?=^- |^$|\Z)", self.text, re.MULTILINE | re.DOTALL)
        ours = "".join(text for whose, text in items if whose.lower() in (side, "both"))
        return "".join(f"{line}\n" for line in re.findall(r"`(CARAMEL_\w+=[^`]*)`", ours))

    def command(self, first: str) -> str:
        """The shell command in the text that begins with these words."""
        consoles = "".join(re.findall(r"^```console\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL))
        prose = re.sub(r"^```.*?^```$", "", self.text, flags=re.MULTILINE | re.DOTALL)
        known = re.findall(r"^\w+\$ (.*?)\n(?! )", f"{consoles}\n", re.MULTILINE | re.DOTALL)
        (found,) = {str(code) for code in (*known, *re.findall(r"`([^`]+)`", prose)) if code.startswith(first)}
        return re.sub(r"\\?\n +", " ", found)


SYSTEMCTL = r"""
# systemctl restart|reload-or-restart UNIT, as far as the services of this folder go.
set -eu
cd "$(dirname "$0")/../units"
verb=$1 unit=$2
[ -e "$unit.unit" ] || { echo "Unit $unit.service not found." >&2; exit 5; }
if [ "$verb" = reload-or-restart ] && [ -e "$unit.pid" ] && [ -s "$unit.unit" ]; then
    exec kill -s "$(cat "$unit.unit")" "$(cat "$unit.pid")"
fi
[ "$verb" = reload-or-restart ] || [ "$verb" = restart ]
if [ -e "$unit.pid" ]; then
    kill "$(cat "$unit.pid")"
    while [ -e "$unit.pid" ]; do sleep 0.05; done
fi
touch "$unit.start"
while [ -e "$unit.start" ]; do sleep 0.05; done
"""

# A service: waits until it is to be started, runs it in the foreground, and waits again.
SERVICE = r"""
unit=$1 stop=$2; shift 2
trap '[ ! -e "$unit.pid" ] || { kill -s "$stop" "$main"; wait "$main"; }; exit' TERM
while :; do
    while [ ! -e "$unit.start" ]; do sleep 0.05; done
    "$@" & main=$!
    echo "$main" >"$unit.new"; mv "$unit.new" "$unit.pid"; rm "$unit.start"
    wait "$main"
    rm "$unit.pid"
done
"""


class Machine:
    """One of the two: its files under `folder`, the program with its settings, and its services."""

    def __init__(
        self, folder: Path, side: str, section: Section, client_id: str, address: str, caramel: Caramel
    ) -> None:
        self.folder = folder
        self.side = side
        self.section = section
        self.caramel = caramel
        #: What the page says, as a regular expression, and what it is here; beside the paths.
        self.words: dict[str, str] = {}
        self.services: list[Daemon] = []
        self._life = 48
        for name in ("bin", "units", "etc", "var/lib/caramel"):
            (folder / name).mkdir(parents=True)
        self._device = Device(folder, key_file=folder / "var/lib/caramel/identity.pem")
        self.key_file = self._device.key_file
        self.address = address
        self.base = f"CARAMEL_CA_CERT=/etc/caramel-ca.pem\nCARAMEL_CN={client_id}\n"
        self.base += "CARAMEL_KEY_FILE=/var/lib/caramel/identity.pem\n"
        shutil.copy(caramel.authority.certificate_file, folder / "etc" / "caramel-ca.pem")
        self.program("systemctl", SYSTEMCTL)

    def here(self, text: str) -> str:
        """The page's words as they are on this machine."""
        for pattern, word in self.words.items():
            text = re.sub(pattern, word, text)
        return re.sub(r"(?<![\w./])/(etc|var|srv|run|usr/local)/", rf"{self.folder}/\1/", text)

    def write(self, path: str, text: str) -> Path:
        """A file of the page's, or one that the machine has anyway."""
        file = Path(self.here(path))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.here(text))
        return file

    @property
    def environment(self) -> dict[str, str]:
        return world.environment(PATH=f"{self.folder}/bin:{PATH}", HOME=str(self.folder))

    def service(self, unit: str, *command: Union[str, Path], user: Optional[str] = None, **more: str) -> Daemon:
        """A service that the machine has; a hook starts it. `user` is whom it runs as where root runs the test.

        `more`: the signal that stops it (`stop`, else TERM), and variables of its environment.
        """
        template = re.sub(r"@.*", "@", unit)
        known = (
            Path(f"/lib/systemd/system/{template}.service"),
            *self.folder.glob(f"etc/systemd/system/{template}.*"),
        )
        words = "".join(
            file.read_text()
            for path in known
            for file in ([path] if path.is_file() else path.glob("*.conf"))
            if file.exists()
        )
        reload = re.findall(
            r"^ExecReload=.*?(?:kill -(\w+) \$MAINPID|-s reload|pg_ctlcluster .*reload)", words, re.MULTILINE
        )
        (self.folder / "units" / f"{unit}.unit").write_text("".join(name or "HUP" for name in reload))
        line = ["setpriv", "--pdeathsig", "KILL"]
        if user and os.getuid() == 0:
            line += ["--reuid", user, "--regid", user, "--init-groups"]
        stop = more.pop("stop", "TERM")
        log = self.folder / "units" / f"{unit}.log"
        daemon = Daemon(["sh", "-c", SERVICE, "sh", unit, stop, *line, *command], log, {**self.environment, **more})
        daemon.start()
        self.services.append(daemon)
        return daemon

    def stop(self) -> None:
        for daemon in reversed(self.services):
            daemon.stop()

    def program(self, name: str, *lines: str) -> None:
        """A shell script on the search path, for what the machine has elsewhere."""
        text = "\n".join(["#!/bin/sh", *lines, ""])
        # By another process: a script that this one has open for writing can't be executed by a fork of it.
        subprocess.run(["install", "/dev/stdin", str(self.folder / "bin" / name)], input=text.encode(), check=True)

    def sh(self, command: str, *, check: bool = True, env: Optional[Mapping[str, str]] = None) -> str:
        """Runs a shell command of the page's and returns what it printed, on both outputs."""
        done = subprocess.run(
            ["sh", "-c", self.here(command)],
            env={**self.environment, **(env or {})},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        text = done.stdout.decode(errors="replace")
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{text}"
        return text

    @staticmethod
    def owned(user: str) -> str:
        """Options for install(1): a file or folder for whom a service runs as."""
        return f"-o {user} -g {user}" if os.getuid() == 0 else ""

    @staticmethod
    def as_user(user: str, command: str) -> str:
        """The command, run by whom a service runs as."""
        return f"setpriv --reuid {user} --regid {user} --init-groups {command}" if os.getuid() == 0 else command

    def adopt(self, section: Section) -> None:
        """Another recipe's configuration in the place of this one's."""
        self.section = section
        self.configure()

    def configure(self) -> None:
        """Writes the page's files and settings."""
        for path, text in self.section.files(self.side).items():
            self.write(path, text)
        settings = self.section.settings(self.side)
        if os.getuid() != 0:
            settings = re.sub(r"^CARAMEL_(OWNER|GROUP)=.*\n", "", settings, flags=re.MULTILINE)
        file = self.write("/etc/caramel-embedded.conf", self.base + settings)
        # No word of the page's: ":443" would be found at the beginning of a port.
        file.write_text(f"CARAMEL_CA={self.address}\n" + file.read_text())

    def check(self) -> world.Run:
        """One run of the program."""
        config = self.folder / "etc" / "caramel-embedded.conf"
        return self._device.run("--config", str(config), env={"PATH": self.environment["PATH"]}, bare=True)

    def enroll(self) -> None:
        """From nothing to a first certificate, whose hook starts what there is to start."""
        waits = self.check()
        assert waits.status == 69, waits.err
        self.renew()

    def renew(self) -> None:
        """The server has a new certificate, and the program fetches it."""
        before = self._device.certificate
        self._life += 1
        self.caramel.sign(self._device.request_hash(), hours=self._life)
        done = self.check()
        assert done.status == 0 and "new certificate" in done.err, done.err
        assert self._device.certificate != before

    def request_hash(self) -> str:
        """By which Caramel knows the request."""
        return self._device.request_hash()

    @property
    def certificate(self) -> bytes:
        """The certificate in the key file, DER."""
        certificate = self._device.certificate
        assert certificate
        return certificate.public_bytes(Encoding.DER)

    @property
    def serial_number(self) -> int:
        return x509.load_der_x509_certificate(self.certificate).serial_number

    def pid(self, unit: str) -> int:
        """The main process of a service that runs."""
        return int((self.folder / "units" / f"{unit}.pid").read_text())

    def log(self) -> str:
        """What its services have printed."""
        return "".join(f"--- {daemon.output.name}\n{daemon.text()[-3000:]}" for daemon in self.services)


class Place:
    """A device and a server, and what is between them."""

    def __init__(self, folder: Path, heading: str, address: str, caramel: Caramel) -> None:
        self.folder = folder
        self.section = Section(heading)
        self.ca: Authority = caramel.authority
        self.device = Machine(folder / "device", "device", self.section, ID, address, caramel)
        self.server = Machine(folder / "server", "server", self.section, "localhost", address, caramel)
        #: Variables that keep a client at TLS 1.2, whether of OpenSSL or of GnuTLS; see `Tap`.
        self.tls_1_2 = {
            "OPENSSL_CONF": self._file(
                "[o]\nssl_conf = s\n[s]\nsystem_default = d\n[d]\nMaxProtocol = TLSv1.2\n", "openssl_conf = o\n"
            ),
            "GNUTLS_SYSTEM_PRIORITY_FILE": self._file("[overrides]\ndisabled-version = tls1.3\n"),
        }

    def _file(self, text: str, before: str = "") -> str:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.conf"
        path.write_text(before + text)
        return str(path)

    def say(self, words: Mapping[str, object], *, server: Optional[Mapping[str, object]] = None) -> None:
        """What the page's words are here, on both machines or else on the server; then writes the page's files."""
        for machine in (self.device, self.server):
            machine.words = {key: str(word) for key, word in words.items()}
        self.server.words.update({key: str(word) for key, word in (server or {}).items()})
        for machine in (self.device, self.server):
            machine.configure()

    def enroll(self) -> None:
        """Both get their first certificates."""
        for machine in (self.server, self.device):
            machine.enroll()

    def shown(self, port: int, *options: str, by: Optional[Machine] = None) -> Optional[bytes]:
        """The certificate, DER, that a server shows to the device (or to `by`); None where there is no handshake."""
        file = str((by or self.device).key_file)
        done = subprocess.run(
            ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-cert", file, "-key", file, *options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=30,
        )
        found = re.search(rb"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", done.stdout, re.DOTALL)
        return ssl.PEM_cert_to_DER_cert(found[0].decode()) if found else None

    def welcomes_anybody(self, port: int) -> bool:
        """Whether a server goes on talking to a client that shows no certificate."""
        context = ssl.create_default_context(cafile=str(self.ca.certificate_file))
        context.maximum_version = ssl.TLSVersion.TLSv1_2  # where a refusal ends the handshake
        with socket.create_connection(("127.0.0.1", port), 10) as plain:
            try:
                context.wrap_socket(plain, server_hostname="localhost").close()
            except (ssl.SSLError, ConnectionError):
                return False
        return True

    def until_shown(self, port: int, *options: str) -> None:
        """Waits until the server shows the certificate that is in its key file now."""
        world.until(
            "it shows its certificate", lambda: self.shown(port, *options) == self.server.certificate, pause=0.2
        )

    def stop(self) -> None:
        self.device.stop()
        self.server.stop()


class Tap(world.Service):
    """Passes on what comes to a port, as it is, and remembers it: up to TLS 1.2 certificates go in the clear."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.seen = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._spawn(self._accept)

    def _spawn(self, *work: object) -> None:
        self._threads.append(threading.Thread(target=work[0], args=work[1:], daemon=True))  # type: ignore[arg-type]
        self._threads[-1].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here = self._listener.accept()[0]
                try:
                    there = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    here.close()
                    continue
                self._open += [here, there]
                self._spawn(self._pass_on, here, there, True)
                self._spawn(self._pass_on, there, here, False)

    def _pass_on(self, source: socket.socket, target: socket.socket, remember: bool) -> None:
        with suppress(OSError):
            for piece in iter(lambda: source.recv(65536), b""):
                if remember:
                    self.seen += piece
                target.sendall(piece)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """The network breaks, once."""
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(world.PATIENCE)
