"""A fleet of devices and their one real Caramel server, and what must be true of each device at every instant.

Responsible for states to begin with (a device that has nothing, one whose request was signed, one that was rejected),
made in bulk by writing into Caramel's database what its own tools would have written, and for the promises of
INTERFACE.md about the key file, put as questions to the disk and to the database. Leaves to the other modules what is
done to a device.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import itertools
import os
import re
import shutil
import sqlite3
import stat
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

import world
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from world import Authority, Caramel, Device, Front, Run, any_front

#: All that may ever leave the program.
STATUSES = (0, 1, 69, 127)

_FORM = re.compile(
    rb"(?P<line># caramel-embedded/1 id=[!-~ ]+ seal=[0-9a-f]{64}\n)?"
    rb"(?P<key>-----BEGIN (?P<tpm>TSS2 )?PRIVATE KEY-----\n[A-Za-z0-9+/=\n]+-----END (?(tpm)TSS2 )PRIVATE KEY-----\n)"
    rb"(?P<certificate>-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]+-----END CERTIFICATE-----\n)?"
    rb"(?P<request>-----BEGIN NEW CERTIFICATE REQUEST-----\n[A-Za-z0-9+/=\n]+-----END NEW CERTIFICATE REQUEST-----\n)"
)


@dataclass(frozen=True)
class KeyFileParts:
    """The parts of a key file that is whole: every one can be read, and they belong together."""

    key: bytes = field(repr=False)
    certificate: Optional[bytes]
    request: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.request).hexdigest()


def key_file_parts(content: bytes) -> Optional[KeyFileParts]:
    """The parts of `content` if it is a whole key file as INTERFACE.md has it, else None."""
    match = _FORM.fullmatch(content)
    if not match:
        return None
    request = match["request"].replace(b" NEW CERTIFICATE", b" CERTIFICATE")
    try:
        csr = x509.load_pem_x509_csr(request)
        asked: Any = csr.public_key()
        public = asked.public_numbers()
        if match["tpm"]:
            # With the public half, RSA, as the TPM writes it: its modulus stands there as it is.
            block = base64.b64decode(b"".join(match["key"].splitlines()[1:-1]))
            belong = public.n.to_bytes(asked.key_size // 8, "big") in block
        else:
            key: Any = serialization.load_pem_private_key(match["key"], None)
            belong = key.public_key().public_numbers() == public
        certificate = match["certificate"] and x509.load_pem_x509_certificate(match["certificate"])
    except ValueError:
        return None
    certified: Any = certificate and certificate.public_key()
    if not belong or (certified and certified.public_numbers() != public):
        return None
    return KeyFileParts(match["key"], match["certificate"], request)


@dataclass
class DeviceUnderTest:
    """One device of the fleet, the state it begins with, and what is expected of it."""

    device: Device
    #: Content of the key file in the beginning, None: not there.
    old: Optional[bytes]
    #: Content of the key file that an undisturbed run leaves, where it is known beforehand.
    expected: Optional[bytes]
    #: Exit status of an undisturbed run.
    status: int
    options: tuple[str, ...] = ()
    owner: int = 0
    group: int = 0
    mode: int = 0o600
    #: Whether the key of the beginning is one that the server's administrator rejected, or that can't be used.
    expendable: bool = False
    #: The inode of the beginning, whose owner and mode are somebody else's work.
    inode: Optional[int] = None
    #: Where the hook leaves a line for each time it was called.
    called: Optional[Path] = None

    @property
    def client_id(self) -> str:
        return str(self.device.client_id)

    def run(self, *more: str, **how: Any) -> Run:
        return self.device.run(*self.options, *more, **how)

    def run_alone(self, *more: str, **how: Any) -> Run:
        """A run without the starter: one process, which can be traced, or killed at one of its own calls."""
        command, self.device.command = self.device.command, list(world.WITHOUT_STARTER)
        try:
            return self.run(*more, **how)
        finally:
            self.device.command = command

    @property
    def content(self) -> Optional[bytes]:
        try:
            return self.device.key_file.read_bytes()
        except FileNotFoundError:
            return None


class Fleet:
    """One Caramel server with a TLS front and any number of devices; lives as long as its `with` block."""

    def __init__(self, folder: Path, command: Sequence[str] = (world.PLAIN,)) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.command = list(command)
        self._stack = ExitStack()
        # Several fleets may share one server.
        self._numbers = itertools.count(int.from_bytes(os.urandom(4), "big") << 6)
        self._lock = threading.Lock()
        # One key for all that is made in bulk: a request's hash is another one for each client ID.
        self.key = world.new_key()

    def __enter__(self) -> Fleet:
        self.authority = Authority(self.folder / "authority")
        self.caramel = self._stack.enter_context(Caramel(self.folder / "caramel", self.authority))
        self.front = self._stack.enter_context(
            any_front(self.folder / "front", self.caramel, self.authority.server())
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @classmethod
    def around(cls, folder: Path, authority: Authority, caramel: Caramel, front: Front) -> Fleet:
        """A fleet around servers that somebody else has started, and will end."""
        fleet = cls(folder)
        fleet.authority, fleet.caramel, fleet.front = authority, caramel, front
        return fleet

    # --- Caramel's administrator, quickly

    def _database(self, statement: str, *values: Any) -> list[Any]:
        with self._lock:
            connection = sqlite3.connect(str(self.caramel.database), timeout=60)
            try:
                with connection:
                    return connection.execute(statement, values).fetchall()
            finally:
                connection.close()

    def admit(self, request: bytes, client_id: str) -> str:
        """Puts a request where Caramel would have put it; its hash."""
        sha256 = hashlib.sha256(request).hexdigest()
        self._database(
            "INSERT INTO csr (sha256sum, pem, orgunit, commonname, rejected) VALUES (?, ?, 'Caramel', ?, 0)",
            sha256,
            request,
            client_id,
        )
        return sha256

    def sign(self, sha256: str, **fields: Any) -> bytes:
        """Signs a request as caramel_tool would have; the certificate."""
        ((number, request),) = self._database("SELECT id, pem FROM csr WHERE sha256sum = ?", sha256)
        pem = self.authority.sign(bytes(request), **fields)
        certificate = x509.load_pem_x509_certificate(pem)
        form = "%Y-%m-%d %H:%M:%S.000000"
        self._database(
            "INSERT INTO certificate (pem, not_before, not_after, csr_id) VALUES (?, ?, ?, ?)",
            pem,
            certificate.not_valid_before_utc.strftime(form),
            certificate.not_valid_after_utc.strftime(form),
            number,
        )
        return pem

    def reject(self, sha256: str) -> None:
        self._database("UPDATE csr SET rejected = 1 WHERE sha256sum = ?", sha256)

    def requests(self, client_id: str) -> list[str]:
        """The hashes of the requests that Caramel has of one device, without the rejected ones."""
        rows = self._database("SELECT sha256sum FROM csr WHERE commonname = ? AND NOT rejected", client_id)
        return [row[0] for row in rows]

    # --- Devices to begin with

    def device(self, folder_there: bool = True) -> Device:
        """A device with nothing on its disk, and a client ID of its own. Its key file stands in a folder of its own,
        and nothing else does."""
        with self._lock:
            number = next(self._numbers)
        client_id = f"fe{number:010x}"
        folder = self.folder / "devices" / client_id
        device = Device(
            folder,
            self.front.address,
            self.authority.certificate_file,
            client_id,
            key_file=folder / "store" / "identity.pem",
            command=self.command,
        )
        if folder_there:
            device.key_file.parent.mkdir()
        return device

    def content(self, device: Device, request: bytes, certificate: bytes = b"") -> bytes:
        """What a key file of this fleet holds, with its line of text."""
        content = world.key_file_content(self.key, request, certificate)
        return world.sealed(content, self.authority.pem, str(device.client_id))

    def enrolled(self) -> tuple[Device, bytes, str]:
        """A device whose request the server has: that device, the request and its hash."""
        device = self.device()
        request = world.signing_request(self.key, self.authority.subject_for(str(device.client_id)))
        return device, request, self.admit(request, str(device.client_id))

    def dut(
        self, device: Device, old: Optional[bytes], expected: Optional[bytes], status: int, **more: Any
    ) -> DeviceUnderTest:
        """A device that begins with `old`; see `DeviceUnderTest`."""
        dut = DeviceUnderTest(device, old, expected, status, **more)
        if old is not None:
            device.has(old, dut.mode)
            os.chown(device.key_file, dut.owner, dut.group)
            dut.inode = device.key_file.stat().st_ino
        dut.options += (f"--owner={dut.owner}", f"--group={dut.group}", f"--mode={dut.mode:04o}", "--timeout=20")
        return dut

    def first_enrollment(self) -> DeviceUnderTest:
        """Nothing is there, not even the folder."""
        return self.dut(self.device(folder_there=False), None, None, 69, owner=33, group=33, mode=0o640)

    def pending(self) -> DeviceUnderTest:
        """Key and request are there, and nobody has signed yet."""
        device, request, _ = self.enrolled()
        content = self.content(device, request)
        return self.dut(device, content, content, 69)

    def first_certificate(self) -> DeviceUnderTest:
        """Key and request are there, and the administrator has signed."""
        device, request, sha256 = self.enrolled()
        expected = self.content(device, request, self.sign(sha256))
        return self.dut(device, self.content(device, request), expected, 0)

    def certified(self) -> DeviceUnderTest:
        """A certificate is there, the newest that the server has."""
        device, request, sha256 = self.enrolled()
        content = self.content(device, request, self.sign(sha256))
        return self.dut(device, content, content, 0)

    def renewal(self, **more: Any) -> DeviceUnderTest:
        """A certificate is there, and the server has a newer one."""
        device, request, sha256 = self.enrolled()
        hour = datetime.timedelta(hours=1)
        older = self.sign(sha256, not_before=world.now() - hour, not_after=world.now() + 10 * hour)
        newer = self.sign(sha256, not_before=world.now() - hour, not_after=world.now() + 40 * hour)
        old, new = (self.content(device, request, pem) for pem in (older, newer))
        return self.dut(device, old, new, 0, **more)

    def renewal_with_hook(self) -> DeviceUnderTest:
        """The same, and a hook that wants to be called."""
        dut = self.renewal()
        dut.called = dut.device.folder / "called"
        hook = dut.device.folder / "hook"
        hook.write_text(f'#!/bin/sh\necho "$CARAMEL_CN" >>{dut.called}\n')
        hook.chmod(0o755)
        dut.options += (f"--hook={hook}",)
        return dut

    def rejection(self) -> DeviceUnderTest:
        """A certificate is there, and the administrator has rejected the device."""
        device, request, sha256 = self.enrolled()
        content = self.content(device, request, self.sign(sha256))
        self.reject(sha256)
        return self.dut(device, content, None, 69, owner=33, group=33, mode=0o640, expendable=True)

    def bad_file(self) -> DeviceUnderTest:
        """Half a key is there, and a draft that a power cut has left."""
        device = self.device()
        half = world.private_pem(self.key)[:700]
        dut = self.dut(device, half, None, 69, expendable=True)
        draft = device.key_file.with_name(".identity.pem.new")
        draft.write_bytes(half)
        draft.chmod(0o600)
        return dut

    @property
    def scenarios(self) -> Mapping[str, Callable[[], DeviceUnderTest]]:
        """The moments of a device's life that write: name, and what makes a device that is about to have one."""
        return {
            "first enrollment": self.first_enrollment,
            "first certificate": self.first_certificate,
            "renewal": self.renewal,
            "renewal with a hook": self.renewal_with_hook,
            "rejection": self.rejection,
            "clean-up of a bad file": self.bad_file,
        }

    # --- The promises

    def broken(self, dut: DeviceUnderTest, run: Optional[Run] = None) -> list[str]:
        """Which promises don't hold at this instant, whatever has happened to the run so far."""
        wrong: list[str] = []
        content = dut.content
        parts = key_file_parts(content) if content else None
        if content and content != dut.old:
            if parts is None:
                wrong.append("the key file is neither the whole old nor the whole new one")
            elif dut.expected is not None and content != dut.expected:
                wrong.append("the key file is another one than was to be expected")
            elif content != world.sealed(world.unsealed(content), self.authority.pem, dut.client_id):
                wrong.append("the key file's line of text isn't that of what follows it")
        if not content and dut.old:
            wrong.append("the key file's old content is gone")
        wrong += self._exposed(dut)
        known = self.requests(dut.client_id)
        if len(known) > 1:
            wrong.append(f"the server has {len(known)} requests of one device")
        # The key of a request that the server has, and that nobody rejected, must be in the file.
        if known and (parts is None or parts.sha256 not in known):
            wrong.append("a key whose request reached the server is gone")
        if run is not None:
            if run.status not in STATUSES:
                wrong.append(f"exit status {run.status}: {run.err[-200:]!r}")
            if run.status == 0 and (dut.status != 0 or parts is None or parts.certificate is None):
                wrong.append("exit status 0 without a certificate")
            if run.status == 69 and not known:
                wrong.append("exit status 69, and the server has no request")
            if "PRIVATE KEY" in run.out + run.err:
                wrong.append("key material in the output")
        return wrong

    @staticmethod
    def _exposed(dut: DeviceUnderTest) -> list[str]:
        """Files with a secret in them, or a key file that isn't empty, that somebody else might read."""
        wrong = []
        folder = dut.device.key_file.parent
        for entry in os.scandir(folder) if folder.is_dir() else ():
            state = entry.stat(follow_symlinks=False)
            if not stat.S_ISREG(state.st_mode) or state.st_ino == dut.inode:
                continue
            found = (state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode))
            wanted = (dut.owner, dut.group, dut.mode)
            content = Path(entry.path).read_bytes()
            secret = b"PRIVATE KEY" in content
            named = content and entry.path == str(dut.device.key_file)
            if (secret or named) and found != wanted and not (entry.name.endswith(".new") and found[2] == 0o600):
                wrong.append("%s has owner %d:%d, mode %04o" % (entry.name, *found))
        return wrong

    def recovered(self, dut: DeviceUnderTest) -> list[str]:
        """Runs the device once more, undisturbed, and says where it ends otherwise than if nothing had happened."""
        run = dut.run()
        wrong = self.broken(dut, run)
        if run.status != dut.status:
            wrong.append(f"the next run ends with {run.status}, not {dut.status}: {run.err[-300:]!r}")
        content = dut.content or b""
        parts = key_file_parts(content)
        if parts is None:
            wrong.append("after the next run the key file is not whole")
        elif dut.expected is not None and content != dut.expected:
            wrong.append("after the next run the key file is not what it should be")
        elif parts.sha256 not in self.requests(dut.client_id):
            wrong.append("after the next run the server doesn't have the request")
        elif dut.expendable and dut.old and parts.key in dut.old:
            wrong.append("the key that had to go is still there")
        there = {"identity.pem"} if dut.called is None else {"identity.pem", ".identity.pem.hook"}
        litter = set(os.listdir(dut.device.key_file.parent)) ^ there if content else set()
        if litter:
            wrong.append(f"litter, or missing: {sorted(litter)}")
        if dut.called is not None and not dut.called.exists():
            wrong.append("the hook was never called")
        return wrong

    @staticmethod
    def forget(dut: DeviceUnderTest) -> None:
        """Removes what is left of a device that survived."""
        shutil.rmtree(dut.device.folder, ignore_errors=True)
