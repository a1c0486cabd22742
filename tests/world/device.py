"""The device: a folder for its disk, the installed command, and what a run of it left behind."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

from cryptography import x509

from world.processes import die_with_parent, end, environment
from world.programs import COMMAND


@dataclass(frozen=True)
class Run:
    """What is to be seen of one run from outside: exit status (negative: killed by that signal), output,
    wall time, and, if it was asked for, the most memory (KiB) that one of its processes had.
    """

    status: int
    out: str
    err: str
    seconds: float
    memory: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Everything about a file that a run which changes nothing leaves as it was."""

    content: bytes
    inode: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        state = path.stat()
        return cls(
            path.read_bytes(),
            state.st_ino,
            state.st_mtime_ns,
            state.st_mode & 0o7777,
            state.st_uid,
            state.st_gid,
        )


#: Runs a command, and writes into a file how much memory it took: what wait4(2) says, so nobody measures in vain.
_MEASURED = """
import os, resource, sys
status = os.waitpid(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)[1]
with open(sys.argv[1], "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""

_BLOCK = re.compile(rb"-----BEGIN ([^-]*)-----\n.*?-----END \1-----\n", re.DOTALL)


class Device:
    """A device with the installed command on it; `folder` is its disk. The attributes may be changed
    between runs.

    A setting that is None is not passed as option. The command sees an empty configuration file unless
    `config` names another (None: no option at all, and then it reads the host's own), and next to nothing
    of the caller's environment.
    """

    def __init__(
        self,
        folder: Path,
        server: Optional[str] = None,
        ca: Optional[Path] = None,
        client_id: Optional[str] = "fffbeec0ffee",
        *,
        key_file: Optional[Path] = None,
        command: Sequence[str] = (COMMAND,),
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.server = server
        self.ca = ca
        self.client_id = client_id
        self.key_file = key_file or self.folder / "identity.pem"
        self.command = list(command)
        self.config: Optional[Path] = self.folder / "empty.conf"
        self.config.write_text("")
        #: What its runs find in their environment, beside what is said for one of them.
        self.surroundings: Mapping[str, str] = {}

    def arguments(self, *options: str) -> list[str]:
        """The whole command line of a check."""
        settings = {
            "--config": self.config,
            "--server": self.server,
            "--ca-cert": self.ca,
            "--key-file": self.key_file,
            "--client-id": self.client_id,
        }
        given = [word for option, value in settings.items() if value is not None for word in (option, str(value))]
        return [*self.command, *given, *options]

    def start(
        self,
        *options: str,
        env: Optional[Mapping[str, str]] = None,
        before: Sequence[str] = (),
        bare: bool = False,
    ) -> subprocess.Popen[str]:
        """Starts a check and returns at once; whoever calls this sees it to its end (`finish`).

        `env` comes on top of the bare environment. `before` is a command that starts it, such as
        `("faketime", ...)`. With `bare`, the options are all that is passed.
        """
        line = [*before, *([*self.command, *options] if bare else self.arguments(*options))]
        return subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            cwd=self.folder,
            env=environment(HOME=str(self.folder), **self.surroundings, **(env or {})),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

    @staticmethod
    def finish(process: subprocess.Popen[str], timeout: float = 90, started: Optional[float] = None) -> Run:
        """The outcome of what `start` returned; an AssertionError if it takes longer than `timeout`."""
        started = time.monotonic() if started is None else started
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end(process, 0.1)
            raise AssertionError(f"still running after {timeout:g} s: {process.args!r}") from None
        return Run(process.returncode, out, err, time.monotonic() - started)

    def run(
        self,
        *options: str,
        env: Optional[Mapping[str, str]] = None,
        timeout: float = 90,
        before: Sequence[str] = (),
        bare: bool = False,
    ) -> Run:
        """One check from its start to its end; see `start` for the arguments."""
        started = time.monotonic()
        return self.finish(self.start(*options, env=env, before=before, bare=bare), timeout, started)

    def run_measured(self, *options: str, timeout: float = 90) -> Run:
        """One check, and how much memory it took."""
        with tempfile.NamedTemporaryFile("r") as file:
            run = self.run(*options, timeout=timeout, before=(sys.executable, "-I", "-S", "-c", _MEASURED, file.name))
            return replace(run, memory=int(file.read() or "0"))

    def blocks(self) -> list[tuple[str, bytes]]:
        """The PEM blocks in the key file: label, and the block with its two boundary lines."""
        content = self.key_file.read_bytes()
        return [(match[1].decode(), match[0]) for match in _BLOCK.finditer(content)]

    def block(self, label: str) -> Optional[bytes]:
        return dict(self.blocks()).get(label)

    @property
    def labels(self) -> list[str]:
        """What the key file holds, as labels of its blocks; nothing where there is no file."""
        return [label for label, block in self.blocks()] if self.key_file.exists() else []

    @property
    def request(self) -> bytes:
        """The signing request in PEM, as it is posted."""
        return dict(self.blocks())["NEW CERTIFICATE REQUEST"].replace(b" NEW CERTIFICATE", b" CERTIFICATE")

    def request_hash(self) -> str:
        """By which Caramel knows the request."""
        return hashlib.sha256(self.request).hexdigest()

    @property
    def certificate(self) -> Optional[x509.Certificate]:
        pem = self.block("CERTIFICATE") if self.key_file.exists() else None
        return x509.load_pem_x509_certificate(pem) if pem else None

    def snapshot(self) -> Optional[Snapshot]:
        """The state of the key file, to be compared with a later one; None where there is none."""
        return Snapshot.of(self.key_file) if self.key_file.exists() else None

    def has(self, content: bytes, mode: int = 0o600) -> None:
        """Puts a key file there, as an earlier life of the device may have left it."""
        self.key_file.write_bytes(content)
        self.key_file.chmod(mode)
