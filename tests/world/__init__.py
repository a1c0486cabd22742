"""The world around a device: a certificate authority, a Caramel server, what stands in front of it, and the
device.

Everything here is the real thing (the Caramel server, nginx, the installed command) or, where no real
server gives a certain answer, a server that says word for word what the test wrote down. Nothing of the
program under test is imported, and nothing here knows what the program ought to do.

Every server lives as long as its `with` block, listens on a free port of the loopback interface, keeps its
files in the folder it was given, and dies with the process that started it, however that one ends. Times
are aware `datetime`s in UTC, durations are seconds unless a name says otherwise.
"""

from __future__ import annotations

import asyncio
import ctypes
import datetime
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    Callable,
    ClassVar,
    Optional,
    TypeVar,
    Union,
)

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
CARAMEL = BUILD / "caramel" / "bin"

#: The command under test: the one that `make` installed, unless the environment names another.
COMMAND = os.environ.get("CARAMEL_TESTS_COMMAND", str(BUILD / "venv" / "bin" / "caramel-embedded"))

#: The same in an environment that has nothing else in it. Coverage doesn't watch it: for what is counted,
#: timed, traced, starved, or run as a user who can't write into build/.
PLAIN = str(BUILD / "venv" / "bin" / "caramel-embedded")

#: Seconds that a server of this world may take until it answers; generous, because machines are shared.
PATIENCE = 30.0

PrivateKey = Union[rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey]
Subject = Sequence[tuple[str, str]]
Moment = datetime.datetime
_Self = TypeVar("_Self", bound="_Living")

#: A CA's subject as `caramel_ca` writes it, with values that are not ASCII.
SUBJECT: Subject = (
    ("C", "SE"),
    ("ST", "Östergötland"),
    ("L", "Linköping"),
    ("O", "Example AB"),
    ("OU", "Caramel"),
    ("CN", "Caramel Signing Certificate"),
)

ATTRIBUTES: dict[str, ObjectIdentifier] = {
    "C": NameOID.COUNTRY_NAME,
    "ST": NameOID.STATE_OR_PROVINCE_NAME,
    "L": NameOID.LOCALITY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "CN": NameOID.COMMON_NAME,
}

CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH


def now() -> Moment:
    """This moment, in whole seconds, which is what certificates count in."""
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)


def hours(count: float) -> datetime.timedelta:
    return datetime.timedelta(hours=count)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment; whoever uses it must be ready
    to retry.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, happened: Callable[[], Any], seconds: float = PATIENCE, pause: float = 0.02) -> Any:
    """Waits until `happened()` is true, and returns what it returned; an AssertionError if it takes too
    long.
    """
    deadline = time.monotonic() + seconds
    while True:
        outcome = happened()
        if outcome:
            return outcome
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain: {what}")
        time.sleep(pause)


# --- Programs -------------------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent() -> None:
    """In a new child, before it becomes another program: the kernel kills it when the thread that started
    it ends.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """From now on, whatever a child of this process leaves behind becomes a child of this process: see
    `strays`.
    """
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end(process: subprocess.Popen[Any], seconds: float = 5) -> None:
    """Ends a process that leads a group, and its group: politely first."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()


def environment(**more: str) -> dict[str, str]:
    """The surroundings of a program of this world: next to nothing of the caller's, plus `more`."""
    kept = ("PATH", "COVERAGE_PROCESS_START", "COVERAGE_FILE")
    return {"LC_ALL": "C.UTF-8", **{name: os.environ[name] for name in kept if name in os.environ}, **more}


class _Living:
    """Something that lives as long as a `with` block."""

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        self.start()
        return self

    def __exit__(self, kind: Optional[type[BaseException]], error: Any, trace: Any) -> None:
        self.stop()


class Daemon(_Living):
    """One long-running program with its output in a file, which ends with the block or with whoever started
    it.
    """

    #: Process IDs of all that run now, by which a test's forgotten processes are told from these.
    running: ClassVar[set[int]] = set()

    def __init__(
        self, command: Sequence[Union[str, Path]], output: Path, env: Optional[Mapping[str, str]] = None
    ) -> None:
        self.command = [str(word) for word in command]
        self.output = output
        self.env = environment() if env is None else dict(env)
        self.process: Optional[subprocess.Popen[bytes]] = None

    def start(self) -> None:
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.output.parent,
                env=self.env,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        Daemon.running.add(self.process.pid)

    def stop(self) -> None:
        if self.process:
            end(self.process)
            Daemon.running.discard(self.process.pid)
            self.process = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def text(self) -> str:
        """What it has printed so far, on both of its outputs."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def strays() -> list[tuple[int, str]]:
    """Children of this process that belong to nobody in this world: process ID and name. The dead ones are
    buried.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in Daemon.running:
            continue
        try:
            text = (entry / "stat").read_text(errors="replace")
        except OSError:
            continue  # gone meanwhile
        # proc(5): the name stands in parentheses and may itself contain some; state and parent follow the
        # last one.
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 1 :].split()
        if int(rest[1]) != os.getpid():
            continue
        if rest[0] == "Z":
            with suppress(ChildProcessError):
                os.waitpid(int(entry.name), os.WNOHANG)
            continue
        found.append((int(entry.name), name))
    return found


# --- Certificates ---------------------------------------------------------------------------------------


def new_key(size: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, size)


def private_pem(key: PrivateKey) -> bytes:
    """PKCS #8, not encrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def name_of(subject: Subject) -> x509.Name:
    return x509.Name([x509.NameAttribute(ATTRIBUTES[short], value) for short, value in subject])


def signing_request(key: PrivateKey, subject: Subject) -> bytes:
    """A certificate request in PEM, under its usual label, with the bytes that OpenSSL would write."""
    request = x509.CertificateSigningRequestBuilder().subject_name(name_of(subject)).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def key_file_content(key: PrivateKey, request: bytes, certificate: bytes = b"") -> bytes:
    """The combined file in the order that the interface promises, from PEM parts."""
    return private_pem(key) + certificate + request.replace(b" CERTIFICATE REQUEST", b" NEW CERTIFICATE REQUEST")


class Authority:
    """A certificate authority: its key and certificate in a folder, and certificates of any kind signed by
    it.

    `subject` is a list of pairs such as `("C", "SE")`, in any order.
    """

    def __init__(
        self,
        folder: Path,
        subject: Subject = SUBJECT,
        *,
        key_size: int = 2048,
        not_before: Optional[Moment] = None,
        not_after: Optional[Moment] = None,
        key: Optional[PrivateKey] = None,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key: Any = key or new_key(key_size)
        name = name_of(subject)
        serial = x509.random_serial_number()
        identifier = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        # The same extensions as caramel_ca writes.
        self.certificate = (
            x509.CertificateBuilder(name, name, self.key.public_key(), serial)
            .not_valid_before(not_before or now() - hours(24))
            .not_valid_after(not_after or now() + hours(24 * 365 * 20))
            .add_extension(x509.BasicConstraints(True, 0), True)
            .add_extension(_key_usage(key_cert_sign=True), True)
            .add_extension(identifier, False)
            .add_extension(x509.AuthorityKeyIdentifier(identifier.digest, [x509.DirectoryName(name)], serial), False)
            .sign(self.key, hashes.SHA512())
        )
        self.certificate_file.write_bytes(self.pem)
        self.private_key_file.write_bytes(private_pem(self.key))
        self.private_key_file.chmod(0o600)

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """The authority whose `ca.crt` and `ca.key` are already in the folder."""
        self = cls.__new__(cls)
        self.folder = Path(folder)
        self.certificate = x509.load_pem_x509_certificate(self.certificate_file.read_bytes())
        self.key = serialization.load_pem_private_key(self.private_key_file.read_bytes(), None)
        return self

    @classmethod
    def by_caramel(
        cls, folder: Path, answers: Sequence[str] = ("SE", "Östergötland", "Linköping", "Example AB", "")
    ) -> Authority:
        """An authority made by Caramel's own program; `answers` are to its questions: C, ST, L, O, OU.
        Takes seconds (4096 bits).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        ini = folder / "ca.ini"
        ini.write_text(f"[app:main]\nuse = egg:caramel\nca.cert = {folder}/ca.crt\nca.key = {folder}/ca.key\n")
        subprocess.run(
            [str(CARAMEL / "caramel_ca"), str(ini)],
            input="".join(f"{answer}\n" for answer in answers).encode(),
            env=environment(),
            check=True,
            timeout=120,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        (folder / "ca.key").chmod(0o600)
        return cls.open(folder)

    @property
    def certificate_file(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def private_key_file(self) -> Path:
        return self.folder / "ca.key"

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def subject_for(self, client_id: str) -> Subject:
        """The subject of a device's request that Caramel accepts under this authority."""
        ours = {attribute.oid: str(attribute.value) for attribute in self.certificate.subject}
        return [
            (short, ours[ATTRIBUTES[short]]) for short in ("C", "ST", "L", "O", "OU") if ATTRIBUTES[short] in ours
        ] + [("CN", client_id)]

    def issue(
        self,
        public_key: Any,
        subject: Union[Subject, x509.Name],
        *,
        names: Iterable[str] = (),
        not_before: Optional[Moment] = None,
        not_after: Optional[Moment] = None,
        usage: Sequence[ObjectIdentifier] = (CLIENT_AUTH, SERVER_AUTH),
        ca: bool = False,
        issuer: Optional[x509.Name] = None,
        serial: Optional[int] = None,
    ) -> bytes:
        """A certificate in PEM as Caramel would sign it, or with any of its fields otherwise. Valid for 48
        h from now by default.
        """
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject if isinstance(subject, x509.Name) else name_of(subject))
            .issuer_name(issuer or self.certificate.subject)
            .public_key(public_key)
            .serial_number(serial or x509.random_serial_number())
            .not_valid_before(not_before or min(now(), (not_after or now()) - hours(48)))
            .not_valid_after(not_after or max(now(), not_before or now()) + hours(48))
            .add_extension(x509.BasicConstraints(ca, None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
        )
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usage), True)
        alternatives = [x509.DNSName(name) for name in names]
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def server(
        self,
        names: Sequence[str] = ("localhost",),
        *,
        not_before: Optional[Moment] = None,
        not_after: Optional[Moment] = None,
        usage: Sequence[ObjectIdentifier] = (CLIENT_AUTH, SERVER_AUTH),
        file: str = "server.pem",
    ) -> Path:
        """A server's certificate and key, in one file in this authority's folder."""
        key = new_key()
        certificate = self.issue(
            key.public_key(),
            self.subject_for(names[0]),
            names=names,
            not_before=not_before,
            not_after=not_after,
            usage=usage,
        )
        path = self.folder / file
        path.write_bytes(certificate + private_pem(key))
        path.chmod(0o600)
        return path

    def sign(self, request: bytes, **fields: Any) -> bytes:
        """A device's certificate in PEM for its request in PEM; `fields` as for `issue`, among them another
        `subject`.
        """
        csr = x509.load_pem_x509_csr(request)
        subject = fields.pop("subject", csr.subject)
        common = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        fields.setdefault("names", [str(common[0].value)] if common else [])
        return self.issue(fields.pop("public_key", csr.public_key()), subject, **fields)

    def identity(
        self, client_id: str, *, key: Optional[PrivateKey] = None, certified: bool = True, **fields: Any
    ) -> bytes:
        """What a key file holds for a device that this authority knows: key, certificate (with `fields` as
        for `issue`), request.
        """
        key = key or new_key()
        request = signing_request(key, self.subject_for(client_id))
        return key_file_content(key, request, self.sign(request, **fields) if certified else b"")


def _key_usage(**yes: bool) -> x509.KeyUsage:
    kinds = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign "
        "crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{kind: yes.get(kind, False) for kind in kinds.split()})


# --- Caramel --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A signing request as Caramel's database has it; `not_after` (UTC, as text) is the longest-lived
    certificate's.
    """

    id: int
    client_id: str
    sha256: str
    rejected: bool
    certificates: int
    not_after: Optional[str]
    pem: bytes = field(repr=False, default=b"")


class Caramel(_Living):
    """A real Caramel server on plain HTTP, and its administrator.

    `hours_short` and `hours_long` are the lives of certificates signed by hand, `hours_auto` of those that
    `caramel_autosign` signs; `backdate` has effect on long-lived ones only, as in Caramel.
    """

    def __init__(
        self,
        folder: Path,
        authority: Authority,
        *,
        backdate: bool = False,
        hours_short: int = 48,
        hours_long: int = 7 * 24,
        hours_auto: int = 3,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.authority = authority
        self.backdate = backdate
        self.lifetimes = (hours_short, hours_long, hours_auto)
        self.ini = self.folder / "caramel.ini"
        self.database = self.folder / "caramel.sqlite"
        self.port = 0
        self._server = Daemon([CARAMEL / "pserve", self.ini], self.folder / "caramel.log")

    def _write_ini(self) -> None:
        short, long, auto = self.lifetimes
        self.ini.write_text(
            f"""[app:main]
use = egg:caramel
sqlalchemy.url = sqlite:///%(here)s/{self.database.name}?timeout=60
ca.cert = {self.authority.certificate_file}
ca.key = {self.authority.private_key_file}
backdate = {str(self.backdate).lower()}
lifetime.short = {short}
lifetime.long = {long}
valid = {auto}
delay = 200

[server:main]
use = egg:waitress#main
listen = 127.0.0.1:{self.port}
"""
        )

    def start(self) -> None:
        """Starts the server; the first time on a port that the kernel chooses, later on the same one."""
        if not self.port:
            # waitress could choose by itself, but says which only through a logger that is silent by
            # default.
            self.port = free_port()
        for _ in range(5):
            self._write_ini()
            if not self.database.exists():
                self.program("caramel_initialize_db", str(self.ini))
            self._server.start()
            until("Caramel answers or has ended", lambda: self._answers() or not self._server.alive)
            if self._server.alive:
                return
            self._server.stop()
            if "Address already in use" not in self._server.text():
                break
            self.port = free_port()
        raise AssertionError(f"Caramel doesn't start: {self._server.text()}")

    def stop(self) -> None:
        self._server.stop()

    def restart(self) -> None:
        self.stop()
        self.start()

    def _answers(self) -> bool:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"{self.url}/root.crt", timeout=5
            ) as answer:
                return bool(answer.read() == self.authority.pem)
        except OSError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def program(self, name: str, *arguments: str) -> str:
        """Runs one of Caramel's own programs to its end and returns its standard output."""
        done = subprocess.run(
            [str(CARAMEL / name), *arguments],
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            preexec_fn=die_with_parent,
        )
        if done.returncode:
            raise AssertionError(
                f"{name} {' '.join(arguments)}: {done.returncode}\n{done.stderr.decode(errors='replace')}"
            )
        return done.stdout.decode()

    def listed(self) -> list[Request]:
        """What `caramel_tool --list` shows its administrator: all but the rejected requests."""
        rows = []
        for line in self.program("caramel_tool", str(self.ini), "--list").splitlines():
            number, client_id, sha256, end_of_life = line.split(" ", 3)
            unsigned = end_of_life.startswith("-")
            rows.append(
                Request(int(number), client_id, sha256, False, not unsigned, None if unsigned else end_of_life)
            )
        return rows

    def requests(self, client_id: Optional[str] = None) -> list[Request]:
        """All requests in the database, also the rejected ones, oldest first; of one device or of all."""
        connection = sqlite3.connect(str(self.database), timeout=60)
        try:
            rows = connection.execute(
                "SELECT csr.id, commonname, sha256sum, rejected, COUNT(certificate.id), MAX(not_after),"
                " csr.pem FROM csr LEFT JOIN certificate ON certificate.csr_id = csr.id"
                " GROUP BY csr.id ORDER BY csr.id"
            ).fetchall()
        finally:
            connection.close()
        found = [Request(row[0], row[1], row[2], bool(row[3]), row[4], row[5], bytes(row[6])) for row in rows]
        return [row for row in found if client_id in (None, row.client_id)]

    def certificates(self, sha256: str) -> list[bytes]:
        """All certificates, in PEM, signed so far for the request with this hash, oldest first."""
        connection = sqlite3.connect(str(self.database), timeout=60)
        try:
            rows = connection.execute(
                "SELECT certificate.pem FROM certificate JOIN csr ON certificate.csr_id = csr.id"
                " WHERE sha256sum = ? ORDER BY certificate.id",
                (sha256,),
            ).fetchall()
        finally:
            connection.close()
        return [bytes(row[0]) for row in rows]

    def _id(self, which: Union[int, str]) -> int:
        if isinstance(which, int):
            return which
        fitting = [row.id for row in self.requests() if which in (row.client_id, row.sha256) and not row.rejected]
        if not fitting:
            raise AssertionError(f"Caramel has no request of {which}")
        return fitting[-1]

    def sign(self, which: Union[int, str], *, hours: Optional[int] = None, long: bool = False) -> None:
        """The administrator signs a request: an ID, a hash, or a client ID (its newest one). Takes about a
        second.

        Caramel refuses to sign for a shorter time than the certificate that it has; 0 hours makes one that
        has ended already. It hands out the certificate that ends last, so a newer one of equal life within
        the same second may go unseen: sign for more hours to be sure.
        """
        life = [] if hours is None else [f"--life-{'long' if long else 'short'}={hours}"]
        if hours is not None and not long and hours > self.lifetimes[1]:
            life.append(f"--life-long={hours}")
        self.program("caramel_tool", str(self.ini), *life, *(["--long"] if long else []), f"--sign={self._id(which)}")

    def reject(self, which: Union[int, str]) -> None:
        """The administrator rejects a request: an ID, a hash, or a client ID (its newest one)."""
        self.program("caramel_tool", str(self.ini), f"--reject={self._id(which)}")

    def autosign(self) -> Daemon:
        """`caramel_autosign`, to be used in a `with`: signs, a moment after it came in, each request whose
        client ID is a UUID.
        """
        return Daemon([CARAMEL / "caramel_autosign", self.ini], self.folder / "autosign.log")


# --- What stands in front of Caramel --------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One request as a server saw it: nginx from its log, `Scripted` from the wire.

    `connection` numbers the connections; `verify` and `subject` are nginx's words about the client
    certificate. `received` and `sent` are bytes of HTTP, without TLS.
    """

    connection: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    client_certificate: Optional[bytes] = None
    status: int = 0
    verify: str = ""
    subject: str = ""
    received: int = 0
    sent: int = 0
    tls: str = ""

    @property
    def user_agent(self) -> str:
        return self.headers.get("user-agent", "")

    @property
    def if_modified_since(self) -> str:
        return self.headers.get("if-modified-since", "")


class Nginx(_Living):
    """A real nginx as TLS front of Caramel, or of files that hold certificates, or both (files first).

    `certificate` is a file with certificate and key. `verify_client` is None (no client certificate asked
    for), "optional" or "on". `protocols` is nginx's `ssl_protocols`. `static` is a folder of certificates:
    see `publish`; these are served with Last-Modified and answered with 304, as Caramel never does.
    `server_lines` go into nginx's `server` block as they are.
    """

    LOG = (
        '{"connection":$connection,"method":"$request_method","path":"$request_uri","status":$status,'
        '"verify":"$ssl_client_verify","subject":"$ssl_client_s_dn",'
        '"received":$request_length,"sent":$bytes_sent,'
        '"tls":"$ssl_protocol","user-agent":"$http_user_agent","if-modified-since":"$http_if_modified_since",'
        '"accept-encoding":"$http_accept_encoding","host":"$http_host","accept":"$http_accept"}'
    )

    def __init__(
        self,
        folder: Path,
        caramel: Optional[Caramel],
        certificate: Path,
        *,
        verify_client: Optional[str] = "optional",
        client_ca: Optional[Path] = None,
        protocols: str = "TLSv1.2 TLSv1.3",
        session_tickets: bool = False,
        static: Optional[Path] = None,
        server_lines: str = "",
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.caramel = caramel
        self.certificate = Path(certificate)
        self.verify_client = verify_client
        self.client_ca = client_ca or (caramel.authority.certificate_file if caramel else None)
        self.protocols = protocols
        self.session_tickets = session_tickets
        self.static = static
        self.server_lines = server_lines
        self.port = 0
        self._mark = 0
        self._daemon: Optional[Daemon] = None

    @staticmethod
    def program() -> Optional[str]:
        """Where nginx is, if it is: Debian keeps it out of ordinary users' search path."""
        return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def _configuration(self) -> str:
        verify = ""
        if self.verify_client:
            verify = f"ssl_verify_client {self.verify_client}; ssl_client_certificate {self.client_ca};"
        upstream = "return 404;"
        if self.caramel:
            upstream = f"proxy_pass {self.caramel.url}; proxy_set_header Host $http_host;"
        static = ""
        if self.static:
            static = (
                f'location ~ "^/[0-9a-f]{{64}}$" {{ root {self.static};'
                " default_type application/octet-stream;"
                " error_page 404 405 = @caramel; }"
            )
        # A single process, so that there is nothing but it to end, and none that has another user's rights.
        return f"""daemon off; master_process off; pid nginx.pid; error_log error.log info;
events {{ worker_connections 1024; }}
http {{
    log_format seen escape=json '{self.LOG}';
    client_body_temp_path temporary; proxy_temp_path temporary; fastcgi_temp_path temporary;
    uwsgi_temp_path temporary; scgi_temp_path temporary;
    server {{ listen 127.0.0.1:{self._mark}; access_log off; return 204; }}
    server {{
        listen 127.0.0.1:{self.port} ssl;
        access_log seen.log seen;
        ssl_certificate {self.certificate}; ssl_certificate_key {self.certificate};
        ssl_protocols {self.protocols}; ssl_session_tickets {"on" if self.session_tickets else "off"};
        {verify}
        {self.server_lines}
        location / {{ {upstream} }}
        location @caramel {{ {upstream} }}
        {static}
    }}
}}
"""

    def start(self) -> None:
        program = self.program()
        if not program:
            raise FileNotFoundError("nginx is not installed")
        configuration = self.folder / "nginx.conf"
        for _ in range(5):
            self.port, self._mark = self.port or free_port(), free_port()
            configuration.write_text(self._configuration())
            command = [program, "-p", f"{self.folder}/", "-e", "error.log", "-c", str(configuration)]
            self._daemon = Daemon(command, self.folder / "output.log")
            self._daemon.start()
            until(
                "nginx answers or has ended",
                lambda: self._answers() or not (self._daemon and self._daemon.alive),
            )
            if self._daemon.alive:
                return
            self._daemon.stop()
            if "Address already in use" not in self._daemon.text():
                break
            self.port = 0
        raise AssertionError(f"nginx doesn't start: {self._daemon.text() if self._daemon else ''}")

    def stop(self) -> None:
        if self._daemon:
            self._daemon.stop()

    def restart(self) -> None:
        """On the same port, with what was changed of the attributes, with the log going on."""
        self.stop()
        self.start()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._mark), 5) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return connection.recv(100).startswith(b"HTTP/1.1 204")
        except OSError:
            return False

    def seen(self) -> list[Asked]:
        """All requests so far. Nothing that was answered before this call is missing."""
        # nginx writes its log after the answer. It is a single process that does one thing after the other:
        # when it has answered this, it has finished with what it did before.
        self._answers()
        path = self.folder / "seen.log"
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        headers = ("user-agent", "if-modified-since", "accept-encoding", "host", "accept")
        return [
            Asked(
                connection=entry["connection"],
                method=entry["method"],
                path=entry["path"],
                headers={name: entry[name] for name in headers if entry[name]},
                status=entry["status"],
                verify=entry["verify"],
                subject=entry["subject"],
                received=entry["received"],
                sent=entry["sent"],
                tls=entry["tls"],
            )
            for entry in entries
        ]

    @contextmanager
    def watched(self) -> Iterator[list[Asked]]:
        """A list that has, when the block is over, the requests made during it."""
        before, during = len(self.seen()), []  # type: int, list[Asked]
        yield during
        during += self.seen()[before:]

    def publish(self, sha256: str, certificate: bytes, modified: Optional[Moment] = None) -> None:
        """Puts a certificate into the folder `static`, whole at once, with this modification time
        (Last-Modified).
        """
        assert self.static
        path = Path(self.static) / sha256
        temporary = path.with_suffix(".new")
        temporary.write_bytes(certificate)
        moment = (modified or now()).timestamp()
        os.utime(temporary, (moment, moment))
        temporary.replace(path)


class TlsFront(_Living):
    """A TLS front made of nothing but Python, which passes bytes on to Caramel as they are.

    `certificate` is a file with certificate and key. With `client_ca`, clients are asked for a certificate,
    and one that is not good ends the connection with an alert; with `demand` as well, so does none.
    """

    def __init__(
        self, caramel: Caramel, certificate: Path, *, client_ca: Optional[Path] = None, demand: bool = False
    ) -> None:
        self.caramel = caramel
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(str(certificate))
        if client_ca:
            self.context.load_verify_locations(str(client_ca))
            self.context.verify_mode = ssl.CERT_REQUIRED if demand else ssl.CERT_OPTIONAL
        self.port = 0
        self.connections = 0
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._thread: Optional[threading.Thread] = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def start(self) -> None:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        # Failed handshakes are the client's to report.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(target=self._run, args=(self._loop, ready), daemon=True)
        self._thread.start()
        if not ready.wait(PATIENCE):
            raise AssertionError("the TLS front doesn't start")

    def _run(self, loop: asyncio.AbstractEventLoop, ready: threading.Event) -> None:
        asyncio.set_event_loop(loop)

        listening = asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.context)
        server = loop.run_until_complete(listening)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    def stop(self) -> None:
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            self._loop = self._thread = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            behind, to_behind = await asyncio.open_connection("127.0.0.1", self.caramel.port)
        except OSError:
            writer.close()
            return

        async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while True:
                    piece = await source.read(65536)
                    if not piece:
                        break
                    target.write(piece)
                    await target.drain()

        # TLS has no half-closed connections that are of use here: the first end is the end.
        both = [
            asyncio.ensure_future(pass_on(reader, to_behind)),
            asyncio.ensure_future(pass_on(behind, writer)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            for stream in (writer, to_behind):
                stream.close()


def answer(status: Union[int, str], body: bytes = b"", *headers: str) -> bytes:
    """An HTTP answer as a well-behaved server writes it; `headers` are lines such as "Last-Modified: ..."."""
    lines = [f"HTTP/1.1 {status}" if isinstance(status, str) else f"HTTP/1.1 {status} Scripted", *headers]
    if (
        not any(line.lower().startswith(("content-length:", "transfer-encoding:")) for line in headers)
        and status != 304
    ):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


#: What a script says to one request: bytes; pieces with pauses (seconds) in between; or None: the
#: connection ends.
Says = Union[bytes, Iterable[Union[bytes, float]], None]


class Scripted(_Living):
    """A TLS server that answers what the test wrote down, bytes as they are, and remembers what it was
    asked.

    `answers` is called with each request, or holds what is said to the first, second, ... request over all
    connections; the last one is said again and again. With `client_ca`, clients are asked for a certificate
    (one that isn't good ends the handshake with an alert), with `demand` as well it is demanded.
    `instead_of_tls` gets the raw socket in place of a handshake: see `silence`, `reset`. `pause` is the
    time between any two bytes of an answer. An answer that says `Connection: close`, or has no length, ends
    the connection.
    """

    def __init__(
        self,
        certificate: Path,
        answers: Union[Callable[[Asked], Says], Sequence[Says]],
        *,
        client_ca: Optional[Path] = None,
        demand: bool = False,
        newest_tls: Optional[ssl.TLSVersion] = None,
        instead_of_tls: Optional[Callable[[socket.socket, threading.Event], None]] = None,
        pause: float = 0,
    ) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(str(certificate))
        if client_ca:
            self.context.load_verify_locations(str(client_ca))
            self.context.verify_mode = ssl.CERT_REQUIRED if demand else ssl.CERT_OPTIONAL
        if newest_tls:
            self.context.maximum_version = newest_tls
        self.answers = answers
        self.instead_of_tls = instead_of_tls
        self.pause = pause
        self.port = 0
        #: Requests in the order they came, and how many TCP connections and completed TLS handshakes there
        #: were.
        self.asked: list[Asked] = []
        self.connections = 0
        self.handshakes = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener: Optional[socket.socket] = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._over.clear()
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        self._over.set()
        if self._listener:
            # Closing alone doesn't wake a thread that waits in accept(2).
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._threads.clear()

    def _spawn(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        for number in itertools.count(1):
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._spawn(self._serve, connection, number)

    def _serve(self, raw: socket.socket, number: int) -> None:
        # A duplicate, because wrapping takes the first one away, and this one has to be able to end it.
        handle = raw.dup()
        with self._lock:
            self._open.add(handle)
        connection = raw
        try:
            if self.instead_of_tls:
                self.instead_of_tls(raw, self._over)
                return
            connection = self.context.wrap_socket(raw, server_side=True)
            self.handshakes += 1
            self._converse(connection, number)
            # A close_notify, so that the end of an answer without a length can be told from a cut line.
            connection.settimeout(2)
            connection = connection.unwrap()
        except (OSError, ValueError):
            pass  # the client went away or refused us: what it says about that is what counts
        finally:
            with self._lock:
                self._open.discard(handle)
            handle.close()
            connection.close()

    def _converse(self, connection: ssl.SSLSocket, number: int) -> None:
        stream = connection.makefile("rb")
        while not self._over.is_set():
            asked = self._read(stream, connection, number)
            if not asked:
                return
            with self._lock:
                turn = len(self.asked)
                self.asked.append(asked)
            says = self.answers(asked) if callable(self.answers) else self.answers[min(turn, len(self.answers) - 1)]
            if says is None or not self._say(connection, says):
                return

    @staticmethod
    def _read(stream: Any, connection: ssl.SSLSocket, number: int) -> Optional[Asked]:
        first = stream.readline().decode("latin-1").split()
        if len(first) < 2:
            return None
        headers: dict[str, str] = {}
        size = 0
        for line in iter(stream.readline, b""):
            size += len(line)
            if not line.strip():
                break
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", "0")))
        return Asked(
            connection=number,
            method=first[0],
            path=first[1],
            headers=headers,
            body=body,
            client_certificate=connection.getpeercert(binary_form=True),
            received=size + len(body),
            tls=connection.version() or "",
        )

    def _say(self, connection: ssl.SSLSocket, says: Union[bytes, Iterable[Union[bytes, float]]]) -> bool:
        """Sends an answer; true if the connection can take another request."""
        head = b""
        for piece in [says] if isinstance(says, bytes) else says:
            if isinstance(piece, (int, float)):
                if self._over.wait(piece):
                    return False
                continue
            head = (head + piece)[:65536]
            if not self.pause:
                connection.sendall(piece)
                continue
            for byte in piece:
                connection.sendall(bytes([byte]))
                if self._over.wait(self.pause):
                    return False
        head = head.partition(b"\r\n\r\n")[0].lower()
        return b"connection: close" not in head and (
            b"content-length:" in head
            or b"transfer-encoding:" in head
            or b" 304" in head[:20]
            or b" 204" in head[:20]
        )


def silence(connection: socket.socket, over: threading.Event) -> None:
    """For `Scripted.instead_of_tls`: takes everything, says nothing, never ends."""
    connection.settimeout(0.2)
    while not over.is_set():
        with suppress(socket.timeout):
            if not connection.recv(65536):
                over.wait(0.2)


def hang_up(connection: socket.socket, over: threading.Event) -> None:
    """For `Scripted.instead_of_tls`: ends the connection in an orderly way at once."""


def reset(connection: socket.socket, over: threading.Event) -> None:
    """For `Scripted.instead_of_tls`: ends the connection with a TCP reset as soon as the client has said
    something.
    """
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # A shutdown would be an orderly end; the duplicate that ends this at the world's end has to be gone,
    # too.
    connection.close()


# --- The device -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What is to be seen of one run from outside: exit status (negative: killed by that signal), output,
    wall time.
    """

    status: int
    out: str
    err: str
    seconds: float


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
            env=environment(HOME=str(self.folder), **(env or {})),
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


# --- Interpreters ---------------------------------------------------------------------------------------

VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13")


def _version(python: str) -> Optional[str]:
    """The version of an interpreter, such as "3.11"; None where the file isn't one that runs."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode().strip() if done.returncode == 0 else None


def interpreters() -> list[tuple[str, str]]:
    """The Python versions that the project promises and this machine has: version and program."""
    installed: list[Path] = []
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30).stdout
        installed = sorted(Path(root.decode().strip()).glob("versions/3.*/bin/python"))
    found = []
    for version in VERSIONS:
        candidates = [
            f"python{version}",
            *(str(path) for path in installed if path.match(f"versions/{version}.*/bin/python")),
        ]
        fitting = next((program for program in candidates if _version(program) == version), None)
        if fitting:
            found.append((version, fitting))
    return found


def wheel() -> Path:
    """The package as `make` built it."""
    return max((BUILD / "wheel").glob("caramel_embedded-*.whl"), key=lambda path: path.stat().st_mtime)


def installation(name: str, python: str, *, system: bool = False) -> str:
    """The command, installed for an interpreter into an environment of its own; made once for each build of
    the package.

    With `system`, the libraries are those that the interpreter's system has, as on a device, and no others.
    """
    folder = BUILD / "matrix" / name
    stamp, state = folder / "wheel", hashlib.sha256(wheel().read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != state:
        shutil.rmtree(folder, ignore_errors=True)
        made = [python, "-m", "venv", *(["--system-site-packages"] if system else []), str(folder)]
        pip = [
            str(folder / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ]
        for command in (made, [*pip, *(["--no-deps"] if system else []), str(wheel())]):
            subprocess.run(command, check=True, timeout=300, stdin=subprocess.DEVNULL)
        stamp.write_text(state)
    return str(folder / "bin" / "caramel-embedded")


def debian_python() -> Optional[str]:
    """Debian's own interpreter, where this is a Debian that has the libraries a device would have."""
    python = "/usr/bin/python3"
    if not Path("/etc/debian_version").exists():
        return None
    done = subprocess.run([python, "-c", "import cryptography, ensurepip"], stderr=subprocess.DEVNULL, check=False)
    return python if done.returncode == 0 else None


if __name__ == "__main__":
    print(*(f"{version} {program}" for version, program in interpreters()), sep="\n", file=sys.stdout)
