# SPDX-License-Identifier: MIT OR Apache-2.0
"""The registration authority as its users have it: an installed command, its servers and workers, and what they stand
on.

Nothing of the authority is imported. What stands around it is real: PostgreSQL, Knot DNS, Pebble, nginx. As in
`world`, everything lives as long as its `with` block, on free ports of the loopback interface.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.client
import itertools
import json
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import world
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from world import Daemon, until

#: Where `make` installs the authority, in an environment of its own.
BIN = world.BUILD / "authority" / "bin"
COMMAND = BIN / "caramel-authority"
SUBJECT = "C=SE,ST=Östergötland,L=Linköping,O=Example AB,OU=Devices,CN=Example Device CA"
PREFIX: world.Subject = (("C", "SE"), ("ST", "Östergötland"), ("L", "Linköping"), ("O", "Example AB"))
PEM = serialization.Encoding.PEM


Key = Union[rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey]
#: Making RSA keys takes long, and no test but those of RSA cares.
_RSA: dict[int, rsa.RSAPrivateKey] = {}


def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def rsa_key(size: int = 2048) -> rsa.RSAPrivateKey:
    """A key of this size, always the same one."""
    if size not in _RSA:
        _RSA[size] = rsa.generate_private_key(65537, size)
    return _RSA[size]


def csr(
    client_id: str,
    key: Optional[Key] = None,
    *,
    subject: Optional[world.Subject] = None,
    names: Sequence[x509.GeneralName] = (),
    digest: Any = None,
) -> bytes:
    """A request in PEM as a device makes it under the authority's usual CA."""
    subject = [*PREFIX, ("OU", "Devices"), ("CN", client_id)] if subject is None else subject
    builder = x509.CertificateSigningRequestBuilder().subject_name(world.name_of(subject))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    return builder.sign(key or ec_key(), digest or hashes.SHA256()).public_bytes(PEM)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def chain(self) -> list[x509.Certificate]:
        return x509.load_pem_x509_certificates(self.body)

    @property
    def certificate(self) -> x509.Certificate:
        return self.chain[0]


def ask(port: int, method: str, path: str, body: Optional[bytes] = None, /, **headers: str) -> Reply:
    """One request over plain HTTP, in a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


class RegistrationAuthority:
    """One configuration, with servers and workers that run it. `settings` is TOML, after the lines that are always
    there.
    """

    def __init__(
        self, folder: Path, settings: str = "", *, database: Optional[str] = None, signer: str = "ca"
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = self.folder / "state.db"
        self.config = self.folder / "caramel-authority.toml"
        self.configure(settings, database or f"sqlite:///{self.state}", signer)
        self._logs = 0
        self._made = self.state.exists()

    def configure(self, settings: str, database: str, signer: str) -> None:
        tables = (
            settings if "[ca]" in settings or signer == "acme" else f'{settings}\n[ca]\nfolder = "{self.folder}/ca"\n'
        )
        self.config.write_text(f'database = "{database}"\nsigner = "{signer}"\n{tables}')
        self.database = database

    @property
    def ca(self) -> Path:
        return self.folder / "ca" / "ca.crt"

    def command(
        self, *arguments: str, status: int = 0, before: Sequence[str] = (), given: str = "", timeout: int = 90
    ) -> str:
        """One of the administrator's commands; what it printed, on both outputs."""
        done = subprocess.run(
            [*before, str(COMMAND), "--config", str(self.config), *arguments],
            input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
            env=world.environment(),
        )  # fmt: skip
        assert done.returncode == status, (arguments, done.returncode, done.stdout)
        return done.stdout

    def init(self) -> None:
        """Makes the database, once."""
        if not self._made:
            self.command("init")
            self._made = True

    def create_ca(self, *options: str) -> None:
        self.command("ca-create", "--subject", SUBJECT, *options)
        self._made = True

    @contextmanager
    def serving(self, *, before: Sequence[str] = (), options: Sequence[str] = ()) -> Iterator[Server]:
        self.init()
        server = Server(self, before, options)
        server.start()
        try:
            yield server
        finally:
            server.stop()

    @contextmanager
    def working(self, *, before: Sequence[str] = ()) -> Iterator[Daemon]:
        self.init()
        self._logs += 1
        command: list[Union[str, Path]] = [*before, COMMAND, "--config", self.config, "work", "--pause", "0.2"]
        with Daemon(command, self.folder / f"worker-{self._logs}.log") as worker:
            yield worker

    def log(self, action: str = "") -> list[list[str]]:
        rows = [line.split("  ") for line in self.command("log").splitlines()]
        return [row for row in rows if not action or row[2] == action]

    def rows(self, query: str) -> list[Any]:
        """What an SQLite database holds."""
        with contextlib.closing(sqlite3.connect(self.state)) as database, database:
            return database.execute(query).fetchall()


class Server:
    """One process that serves."""

    def __init__(self, authority: RegistrationAuthority, before: Sequence[str], options: Sequence[str]) -> None:
        self.authority = authority
        self.before = before
        self.options = options
        self.port = 0
        self.daemon: Optional[Daemon] = None

    def start(self) -> None:
        for _ in range(5):
            self.port = self.port or world.free_port()
            command: list[Union[str, Path]] = [*self.before, COMMAND, "--config", self.authority.config, "serve"]
            command += ["--listen", f"127.0.0.1:{self.port}", *self.options]
            self.daemon = Daemon(command, self.authority.folder / f"server-{self.port}.log")
            self.daemon.start()
            until("the authority answers or has ended", lambda: self._answers() or not self._alive)
            if self._alive:
                return
            text = self.daemon.text()
            self.daemon.stop()
            if "Address already in use" not in text:
                break
            self.port = 0
        raise AssertionError(f"the authority doesn't start: {text}")

    def stop(self) -> None:
        if self.daemon:
            self.daemon.stop()

    def kill(self) -> None:
        assert self.daemon and self.daemon.process
        os.killpg(self.daemon.process.pid, signal.SIGKILL)
        self.daemon.stop()

    @property
    def _alive(self) -> bool:
        return self.daemon is not None and self.daemon.alive

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1):
                return True
        except OSError:
            return False

    def get(self, path: str, **headers: str) -> Reply:
        return ask(self.port, "GET", path if path.startswith("/") else f"/{path}", None, **headers)

    def post(self, body: bytes, path: Optional[str] = None) -> Reply:
        return ask(self.port, "POST", f"/{path or sha256(body)}", body)

    def enroll(self, request: bytes) -> Reply:
        """Posts a request, and returns the first answer to it that is no 202."""
        assert self.post(request).status == 202
        return self.get(sha256(request))


def at(days: float) -> list[str]:
    """What starts a program at another time than now."""
    moment = world.now() + datetime.timedelta(days=days)
    return ["faketime", "-f", f"@{moment.astimezone():%F %T}"]


# --- PostgreSQL ---------------------------------------------------------------------------------------------


class Postgres:
    """A PostgreSQL of its own, in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.port = world.free_port()
        self._numbers = itertools.count()
        self.url = f"postgresql+psycopg://authority@127.0.0.1:{self.port}/postgres"

    @staticmethod
    def program(name: str) -> Optional[str]:
        """Debian keeps them out of the search path."""
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
        return str(found[-1]) if found else shutil.which(name)

    def __enter__(self) -> Postgres:
        self.folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, *self.folder.parents):  # pytest's folders belong to one user only
            if folder.owner() == pwd.getpwuid(os.getuid()).pw_name and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o711)
        other = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []  # it refuses to run as root
        if other:
            shutil.chown(self.folder, "postgres")
        data = self.folder / "data"
        command = [self.program("initdb"), "-D", data, "-U", "authority", "-A", "trust", "--no-sync", "-E", "UTF8"]
        if not data.exists():
            subprocess.run([*other, *map(str, command)], check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=120)
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder), "-c", "max_connections=60"]
        # setpriv becomes the server itself, so that there is no process between it and the daemon.
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if other else []
        self._daemon = Daemon(
            [*user, str(self.program("postgres")), "-D", str(data), *options], self.folder / "postgres.log"
        )
        (self.folder / "postgres.log").touch()
        self._daemon.start()
        until("PostgreSQL answers", self._answers)
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemon.process and self._daemon.alive:
            self._daemon.process.send_signal(signal.SIGINT)  # pg_ctl's "fast": waits for no client
            self._daemon.process.wait(30)
        self._daemon.stop()

    def _answers(self) -> bool:
        return bool(self._daemon.alive) and self.sql("SELECT 1", check=False) == "1"

    @contextmanager
    def database(self) -> Iterator[str]:
        """The address of a database of its own, which goes with the block."""
        name = f"d{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name}")
        try:
            yield self.url.removesuffix("/postgres") + f"/{name}"
        finally:
            self.sql(f"DROP DATABASE {name} WITH (FORCE)")

    @property
    def pid(self) -> int:
        assert self._daemon.process
        return self._daemon.process.pid

    def sql(self, statement: str, url: str = "", check: bool = True, timeout: int = 30) -> str:
        """What `psql` prints, in the database of this address."""
        address = (url or self.url).replace("+psycopg", "")
        done = subprocess.run(
            [str(self.program("psql")), "-At", "-d", address, "-c", statement],
            capture_output=True, text=True, timeout=timeout, cwd="/",
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()


# --- Many devices -------------------------------------------------------------------------------------------


def fill(authority: RegistrationAuthority, postgres: Optional[Postgres] = None) -> None:
    """90 000 devices with two certificates, of which every tenth waits, and 900 000 lines in the log."""
    pem = "-----BEGIN CERTIFICATE-----\n" + 14 * (64 * "A" + "\n") + "-----END CERTIFICATE-----\n"
    now = int(time.time())
    numbers = "(WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {}) SELECT i FROM n)"
    name = "to_char(i, 'FM000000')" if postgres else "printf('%06d', i)"
    digits = "lpad(to_hex(i * 7919), 64, '0')" if postgres else "printf('%064x', i * 7919)"
    statements = [
        f"CREATE TEMP TABLE d AS SELECT i, {digits} AS h, 'dev' || {name} AS id FROM {numbers.format(89999)} AS n",
        "INSERT INTO requests (sha256, pem, client_id, device, key_sha256, posted, state, address) "
        f"SELECT h, '{pem}', id, id, h, {now} - 900000 + i, "
        "CASE WHEN i % 10 > 0 THEN 'authorized' ELSE 'pending' END, '10.0.0.1' FROM d",
        "INSERT INTO keys SELECT h, id FROM d",
        f"INSERT INTO devices (client_id, added, sha256) SELECT id, {now}, h FROM d WHERE i % 10 > 0",
        f"INSERT INTO sightings SELECT h, {now} - i, '10.0.0.1' FROM d",
        "INSERT INTO certificates (sha256, serial, pem, not_before, not_after, renew_after, modified) "
        f"SELECT h, substr(h, 40) || life.i, '{pem}', {now} - 100, {now} + 500000, {now} + 300000, "
        f"{now} - 100 + life.i FROM {numbers.format(1)} AS life, d WHERE d.i % 10 > 0",
        "INSERT INTO log (at, who, action, client_id, sha256, detail) "
        f"SELECT {now} - 900000 + turn.i * 90000 + d.i, 'signer', 'signed', id, h, 'serial 1a2b3c' "
        f"FROM {numbers.format(9)} AS turn, d",
    ]
    if postgres:
        # It does that by itself, some minutes after so much has changed.
        postgres.sql("; ".join([*statements, "ANALYZE"]), timeout=300)
    else:
        with contextlib.closing(sqlite3.connect(authority.state)) as database, database:
            for statement in statements:
                database.execute(statement)


# --- DNS and ACME -------------------------------------------------------------------------------------------

ZONE = "devices.example.com"


class Knot:
    """A real name server with the devices' zone, which takes updates that are signed with its key.

    With `primary` it takes the zone from there instead, and is told nothing of changes: it looks every three seconds.
    """

    def __init__(
        self,
        folder: Path,
        zone: str = ZONE,
        records: str = "",
        primary: Optional[Knot] = None,
        at: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.zone, self.primary, self.address = zone, primary, at
        self._fixed = self.port = port
        self.key_file = self.folder / "tsig.key"
        self._secret = base64.b64encode(os.urandom(32)).decode()
        self.key_file.write_text(f"{self._secret}\n")
        (self.folder / "zone").write_text(
            f"$ORIGIN {zone}.\n@ 60 SOA ns admin 1 3 3 600 1\n@ 60 NS ns\nns 60 A 127.0.0.1\n{records}"
        )
        self._daemon = Daemon([self.program("knotd"), "-c", self.folder / "knot.conf"], self.folder / "knot.log")

    def _configure(self, control: str) -> None:
        remote, source = "", "file: zone\n    acl: [updates, transfers]"
        if self.primary:
            remote = f"remote:\n  - id: primary\n    address: 127.0.0.1@{self.primary.port}\n"
            source = "master: primary\n    refresh-max-interval: 3"
        (self.folder / "knot.conf").write_text(f"""server:
    rundir: "{control}"
    listen: {self.address}@{self.port}
    udp-workers: 1
    tcp-workers: 1
    background-workers: 1
database:
    storage: "{self.folder}"
key:
  - id: authority
    algorithm: hmac-sha256
    secret: {self._secret}
acl:
  - id: updates
    key: authority
    action: update
  - id: transfers
    address: 127.0.0.0/8
    action: transfer
{remote}zone:
  - domain: {self.zone}
    storage: "{self.folder}"
    {source}
""")

    @staticmethod
    def program(name: str) -> str:
        return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin") or name

    def __enter__(self) -> Knot:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """On the port that it had, if it had one; else on one that is free, which somebody may be faster to take."""
        # A socket's path has 108 bytes at most (unix(7)), and a test's folder may be deeper.
        self._control = tempfile.mkdtemp(prefix="knot-")
        for last in (False, False, True):
            self.port = self.port or world.free_port()
            self._configure(self._control)
            self._daemon.start()
            try:
                until("Knot answers", lambda: self.look_up(self.zone, "SOA"), 10)
                return
            except AssertionError:
                self._daemon.stop()
                self.port = self._fixed
                if last:
                    raise AssertionError(self._daemon.text()[-2000:]) from None

    def stop(self) -> None:
        self._daemon.stop()
        shutil.rmtree(self._control, ignore_errors=True)

    @property
    def settings(self) -> str:
        return (
            f'[dns]\nzone = "{self.zone}"\nserver = "127.0.0.1"\nport = {self.port}\n'
            f'key_name = "authority"\nkey_file = "{self.key_file}"\n'
        )

    def look_up(self, name: str, kind: str) -> list[str]:
        """What the server says, one line a record."""
        command = ["kdig", "+short", "+timeout=2", "+retry=0", f"@{self.address}", "-p", str(self.port), name, kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return sorted(line for line in done.stdout.splitlines() if not line.startswith(";"))


class Pebble:
    """The ACME CA that Let's Encrypt's people made for tests. It validates: every name is looked up at `knot`."""

    def __init__(
        self, folder: Path, knot: Knot, *, validity: int = 7776000, more: Mapping[str, Any] = {}, **environment: str
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.https = world.Authority(self.folder / "https")
        self._certificate = self.https.server(["localhost"])
        self._validity, self._more = validity, dict(more)
        self.port, self._management = world.free_port(), world.free_port()
        # Pebble waits up to 15 s before it validates, to remind us that CAs take their time; and it takes half of the
        # authorizations for a second order, where each test wants its name validated.
        env = world.environment(**{"PEBBLE_VA_NOSLEEP": "1", "PEBBLE_AUTHZREUSE": "0", **environment})
        command = ["pebble", "-config", f"{folder}/pebble.json", "-dnsserver", f"{knot.address}:{knot.port}"]
        self.daemon = Daemon(command, self.folder / "pebble.log", env)

    def _configure(self) -> None:
        settings = {
            "listenAddress": f"127.0.0.1:{self.port}",
            "managementListenAddress": f"127.0.0.1:{self._management}",
            "certificate": str(self._certificate),
            "privateKey": str(self._certificate),
            "httpPort": 1,
            "tlsPort": 1,
            "certificateValidityPeriod": self._validity,
            **self._more,
        }
        (self.folder / "pebble.json").write_text(json.dumps({"pebble": settings}))

    def __enter__(self) -> Pebble:
        for last in (False, False, True):
            self._configure()
            self.daemon.start()
            until("Pebble answers or has ended", lambda: self._answers() or not self.daemon.alive)
            if self.daemon.alive:
                break
            assert not last, self.daemon.text()
            self.port, self._management = world.free_port(), world.free_port()
        self.roots.write_bytes(self.get("/roots/0"))
        return self

    def __exit__(self, *_: object) -> None:
        self.daemon.stop()

    @property
    def roots(self) -> Path:
        return self.folder / "roots.pem"

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.get("/roots/0"))
        return False

    def get(self, path: str) -> bytes:
        """What its management interface says."""
        context = ssl.create_default_context(cafile=str(self.https.certificate_file))
        address = f"https://localhost:{self._management}{path}"
        with urllib.request.urlopen(address, context=context, timeout=10) as answer:
            return bytes(answer.read())

    def settings(self, folder: Path, **more: Any) -> str:
        values = {
            "directory": f"https://localhost:{self.port}/dir",
            "directory_ca": str(self.https.certificate_file),
            "account_key": f"{folder}/account.key",
            "contact": "devices@example.com",
            "terms_agreed": True,
            "roots": str(self.roots),
            "orders_per_hour": 1000,
            **more,
        }
        return "[acme]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


# --- TLS in front -------------------------------------------------------------------------------------------

DEPLOY = world.ROOT / "authority" / "deploy"


class Front:
    """nginx with the configuration that comes with the authority: only host, file and port are other ones.

    `configuration` is that of the maker's own site, in place of it.
    """

    def __init__(self, folder: Path, certificate: Path, port: int, configuration: Optional[str] = None) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._text = configuration or (DEPLOY / "nginx.conf").read_text()
        self._certificate, self._upstream, self.port = certificate, port, 0
        command = [str(world.Nginx.program()), "-p", f"{self.folder}/", "-e", "error.log", "-c", "nginx.conf"]
        self._daemon = Daemon(command, self.folder / "output.log")

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    def _configure(self) -> None:
        text = self._text
        for old, new in (
            ("listen 443 ssl", f"listen 127.0.0.1:{self.port} ssl"),
            ("ca.example.com", "localhost"),
            ("/var/lib/caramel-authority-signer/front.pem", str(self._certificate)),
            ("127.0.0.1:8080", f"127.0.0.1:{self._upstream}"),
        ):
            assert old in text, old
            text = text.replace(old, new)
        paths = "".join(f"{kind}_temp_path tmp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        log = 'log_format seen "$request_method $status";'
        (self.folder / "nginx.conf").write_text(
            f"daemon off; master_process off; pid nginx.pid; error_log error.log info; events {{ }}\n"
            f"http {{ {paths} {log} access_log seen.log seen;\n{text}\n}}\n"
        )

    def __enter__(self) -> Front:
        for last in (False, False, True):
            self.port = world.free_port()
            self._configure()
            self._daemon.start()
            until("nginx answers or has ended", lambda: self._answers() or not self._daemon.alive)
            if self._daemon.alive:
                break
            assert not last, self._daemon.text()
        return self

    def __exit__(self, *_: object) -> None:
        self._daemon.stop()

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1):
                return True
        except OSError:
            return False

    def seen(self) -> list[str]:
        """Method and status of every request so far."""
        return (self.folder / "seen.log").read_text().splitlines()


@contextmanager
def behind_tls(authority: RegistrationAuthority, *, before: Sequence[str] = ()) -> Iterator[Front]:
    """An authority with a CA of its own that serves, and its front with a certificate by that CA."""
    certificate = authority.folder / "front.pem"
    authority.command("server-certificate", "localhost", "--out", str(certificate), "--days", "40")
    with authority.serving(before=before, options=["--behind-proxy"]) as server:
        folder = authority.folder / f"front-{server.port}"
        with Front(folder, certificate, server.port) as front:
            yield front
