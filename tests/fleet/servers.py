"""The servers that are measured: Caramel and the registration authority, on SQLite or PostgreSQL, behind nginx.

Each is what its page says that an administrator sets up, at other ports and in other folders. Everything lives as
long as its `with` block.
"""

from __future__ import annotations

import pwd
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from signal import SIGINT
from typing import Any, Optional, Union

import world
from bench.filtered import SERVER
from world import BUILD, CARAMEL, Authority, Daemon, Service, environment, free_port, listens, until

from fleet.devices import Device

AUTHORITY = BUILD / "authority" / "bin" / "caramel-authority"
#: The subject of the registration authority's CA.
SUBJECT = "C=SE,O=Example AB,OU=Devices,CN=Example Device CA"

Row = Sequence[Any]


def started(daemon: Daemon, what: str, port: int) -> None:
    """Starts a server, and waits until it takes connections."""
    daemon.start()
    until(f"{what} answers or has ended", lambda: listens(port) or not daemon.alive)
    if not daemon.alive:
        daemon.stop()
        raise AssertionError(f"{what} doesn't start: {daemon.text()[-2000:]}")


# --- Databases ----------------------------------------------------------------------------------------------


class Sqlite:
    """A database in one file. `pid` is None: it works inside of the server's own processes."""

    name = "SQLite"
    pid: Optional[int] = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite:///{path}"
        self.caramel_url = f"{self.url}?timeout=60&check_same_thread=false"

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(str(self.path), timeout=60)
        try:
            with connection:
                return connection.execute(statement).fetchall()
        finally:
            connection.close()

    def insert(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        marks = ", ".join("?" * len(columns))
        connection = sqlite3.connect(str(self.path), timeout=60)
        with connection:
            connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", rows)
        connection.close()

    def series(self, first: int, last: int) -> str:
        """A table `n` with the numbers from `first` to `last` in its column `i`."""
        return (
            f"(WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})"
            " SELECT i FROM n) AS n"
        )

    hash = "lower(hex(randomblob(32)))"

    def analyze(self) -> None:
        self.execute("ANALYZE")

    def size(self) -> int:
        """Bytes of the file, once all that was written is in it."""
        self.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return self.path.stat().st_size

    def written(self) -> Optional[int]:
        return None


class Postgres(Service):
    """A PostgreSQL with Debian's own settings. It refuses to run as root: then it belongs to `postgres` or nobody."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.port = free_port()
        self._daemon = Daemon([], self.folder / "postgres.log")

    @staticmethod
    def program(name: str) -> str:
        """Debian keeps them out of the search path."""
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
        program = str(found[-1]) if found else shutil.which(name)
        if not program:
            raise SystemExit("fleet: PostgreSQL is not installed (apt-get install postgresql)")
        return program

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        become: list[str] = []
        if Path("/proc/self").stat().st_uid == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            # setpriv becomes the server itself, so that there is no process between it and the daemon. Who has become
            # another user would outlive us (prctl(2), PR_SET_PDEATHSIG); SIGQUIT is PostgreSQL's "immediate".
            become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            become += ["--pdeathsig", "QUIT"]
            shutil.chown(self.folder, user.pw_uid, user.pw_gid)
        data = self.folder / "data"
        command = [self.program("initdb"), "-D", str(data), "-U", "fleet", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run([*become, *command], check=True, stdout=subprocess.DEVNULL, cwd="/", timeout=120)
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self.folder)]
        self._daemon.command = [*become, self.program("postgres"), "-D", str(data), *options]
        started(self._daemon, "PostgreSQL", self.port)
        until("PostgreSQL answers", lambda: self.sql("postgres", "SELECT 1", check=False) == "1")

    def stop(self) -> None:
        if self._daemon.process and self._daemon.alive:
            self._daemon.process.send_signal(SIGINT)  # pg_ctl's "fast": waits for no client
            self._daemon.process.wait(30)
        self._daemon.stop()

    @property
    def pid(self) -> int:
        assert self._daemon.process
        return self._daemon.process.pid

    def sql(self, database: str, statement: str, given: Optional[str] = None, check: bool = True) -> str:
        command = [
            self.program("psql"),
            "-qAtX",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-U",
            "fleet",
            "-d",
            database,
        ]
        done = subprocess.run(
            [*command, "-v", "ON_ERROR_STOP=1", "-c", statement],
            input=given, capture_output=True, text=True, timeout=300, cwd="/", env=environment(),
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"psql: {statement[:200]}: {done.stderr}")
        return done.stdout.strip()

    def database(self, name: str) -> PostgresDatabase:
        """A new database in it."""
        self.sql("postgres", f"CREATE DATABASE {name}")
        return PostgresDatabase(self, name)


class PostgresDatabase:
    """One of the databases of a PostgreSQL."""

    name = "PostgreSQL"
    hash = "md5(i::text) || md5((i + 1)::text)"

    def __init__(self, server: Postgres, database: str) -> None:
        self.server, self.database = server, database
        address = f"fleet@127.0.0.1:{server.port}/{database}"
        self.url = f"postgresql+psycopg://{address}"
        self.caramel_url = f"postgresql://{address}"

    @property
    def pid(self) -> Optional[int]:
        return self.server.pid

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        return [tuple(line.split("|")) for line in self.server.sql(self.database, statement).splitlines()]

    def insert(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        # PostgreSQL's COPY: fields between tabs, and backslashes before what would end one.
        def field(value: Any) -> str:
            if value is None:
                return "\\N"
            if isinstance(value, bytes):
                return "\\\\x" + value.hex()
            text = str(value)
            for plain, escaped in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
                text = text.replace(plain, escaped)
            return text

        text = "".join("\t".join(map(field, row)) + "\n" for row in rows)
        self.server.sql(self.database, f"COPY {table} ({', '.join(columns)}) FROM STDIN", text)

    def series(self, first: int, last: int) -> str:
        return f"generate_series({first}, {last}) AS n(i)"

    def analyze(self) -> None:
        """As autovacuum does it by itself within minutes; and what was loaded is no longer on its way to the disk."""
        self.server.sql(self.database, "VACUUM ANALYZE")
        self.server.sql(self.database, "CHECKPOINT")

    def size(self) -> int:
        return int(self.execute("SELECT pg_database_size(current_database())")[0][0])

    def written(self) -> Optional[int]:
        """Bytes of the write-ahead log so far, which is what replicas and backups get."""
        return int(self.execute("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint")[0][0])


Database = Union[Sqlite, PostgresDatabase]


# --- What answers -------------------------------------------------------------------------------------------


class Backend(Service):
    """Some processes that answer devices in plain HTTP."""

    def __init__(self, folder: Path, database: Database, processes: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.database = database
        self.ports = [free_port() for _ in range(processes)]
        self.daemons: list[Daemon] = []

    def prepare(self) -> None:
        """Makes CA and tables; the CA is in `authority` then."""
        raise NotImplementedError

    def serve(self, number: int) -> Daemon:
        raise NotImplementedError

    def load(self, devices: Sequence[Device]) -> None:
        """Puts the devices into the database, each with a certificate."""
        raise NotImplementedError

    def fill(self, devices: int, up_to: int) -> None:
        """Puts more devices beside the first ones, copies of them under another hash, until there are so many."""
        raise NotImplementedError

    def start(self) -> None:
        for number, port in enumerate(self.ports):
            self.daemons.append(self.serve(number))
            started(self.daemons[-1], type(self).__name__, port)

    def stop(self) -> None:
        for daemon in self.daemons:
            daemon.stop()
        self.daemons.clear()

    @property
    def pids(self) -> list[int]:
        return [daemon.process.pid for daemon in self.daemons if daemon.process]


class Caramel(Backend):
    """Caramel as docs/server-administrators.md sets it up; `filtered`: with the filter of server/ in front."""

    #: Makes Caramel's `csr_id` quick to look up, which its own tables don't.
    INDEX = "CREATE INDEX certificate_of_request ON certificate (csr_id)"
    #: Rows that each check adds, and where.
    LOG = "accesslog"

    def __init__(
        self, folder: Path, database: Database, processes: int, authority: Authority, filtered: bool = False
    ) -> None:
        super().__init__(folder, database, processes)
        self.authority, self.filtered = authority, filtered

    def _ini(self, number: int) -> Path:
        path = self.folder / f"caramel-{number}.ini"
        path.write_text(
            f"""[app:main]
use = egg:caramel
{"filter-with = conditional" if self.filtered else ""}
sqlalchemy.url = {self.database.caramel_url}
ca.cert = {self.authority.certificate_file}
ca.key = {self.authority.private_key_file}

[filter:conditional]
paste.filter_app_factory = caramel_conditional:make_filter

[server:main]
use = egg:waitress#main
listen = 127.0.0.1:{self.ports[number]}
"""
        )
        return path

    @property
    def _env(self) -> dict[str, str]:
        return environment(PYTHONPATH=str(next(SERVER.rglob("caramel_conditional.py")).parent))

    def prepare(self) -> None:
        command = [str(CARAMEL / "caramel_initialize_db"), str(self._ini(0))]
        subprocess.run(command, env=self._env, check=True, timeout=60, stdin=subprocess.DEVNULL)

    def serve(self, number: int) -> Daemon:
        return Daemon([CARAMEL / "pserve", self._ini(number)], self.folder / f"caramel-{number}.log", self._env)

    def load(self, devices: Sequence[Device]) -> None:
        def moment(seconds: int) -> str:
            return time.strftime("%Y-%m-%d %H:%M:%S.000000", time.gmtime(seconds))

        self.database.insert(
            "csr",
            ("id", "sha256sum", "pem", "orgunit", "commonname", "rejected"),
            [(n, one.sha256, one.request, "", one.client_id, 0) for n, one in enumerate(devices, 1)],
        )
        self.database.insert(
            "certificate",
            ("id", "pem", "not_before", "not_after", "csr_id"),
            [(n, d.certificate, moment(d.not_before), moment(d.not_after), n) for n, d in enumerate(devices, 1)],
        )
        self.database.analyze()

    def fill(self, devices: int, up_to: int) -> None:
        first = 1 + int(self.database.execute("SELECT max(id) FROM csr")[0][0])
        several, base = self.database.series(first, up_to), f"1 + n.i % {devices}"
        self.database.execute(
            "INSERT INTO csr (id, sha256sum, pem, orgunit, commonname, rejected)"
            f" SELECT n.i, {self.database.hash}, c.pem, c.orgunit, c.commonname, c.rejected"
            f" FROM {several} JOIN csr c ON c.id = {base}"
        )
        self.database.execute(
            "INSERT INTO certificate (id, pem, not_before, not_after, csr_id)"
            " SELECT n.i, c.pem, c.not_before, c.not_after, n.i"
            f" FROM {several} JOIN certificate c ON c.id = {base}"
        )
        self.database.analyze()

    def row(self, copies: int = 100_000) -> float:
        """Bytes by which the database grows with a row of the log; from many copies, because it grows by pages."""
        before = self.database.size()
        self.database.execute(
            f'INSERT INTO {self.LOG} ("when", addr, csr_id) SELECT l."when", l.addr, l.csr_id'
            f" FROM {self.database.series(1, copies)} JOIN {self.LOG} l ON l.id = 1"
        )
        return (self.database.size() - before) / copies

    def rows(self) -> int:
        """How many checks it has written down."""
        return int(self.database.execute(f"SELECT count(*) FROM {self.LOG}")[0][0])


class RegistrationAuthority(Backend):
    """The registration authority as its README sets it up, with signer `ca`."""

    def _config(self) -> Path:
        path = self.folder / "caramel-authority.toml"
        path.write_text(f'database = "{self.database.url}"\n[ca]\nfolder = "{self.folder}/ca"\n')
        return path

    def _command(self, *arguments: str) -> None:
        command = [str(AUTHORITY), "--config", str(self._config()), *arguments]
        subprocess.run(command, env=environment(), check=True, timeout=60, stdout=subprocess.DEVNULL)

    def prepare(self) -> None:
        self._command("ca-create", "--subject", SUBJECT)
        self._command("server-certificate", "localhost", "--out", str(self.folder / "front.pem"))
        self.authority = Authority.open(self.folder / "ca")

    def serve(self, number: int) -> Daemon:
        command = [str(AUTHORITY), "--config", str(self._config()), "serve", "--behind-proxy"]
        return Daemon(
            [*command, "--listen", f"127.0.0.1:{self.ports[number]}"], self.folder / f"authority-{number}.log"
        )

    def load(self, devices: Sequence[Device]) -> None:
        self.database.insert(
            "requests",
            ("sha256", "pem", "client_id", "key_sha256", "posted", "state"),
            [
                (one.sha256, one.request.decode(), one.client_id, one.key_sha256, one.not_before, "authorized")
                for one in devices
            ],
        )
        self.database.insert(
            "devices",
            ("client_id", "added", "sha256"),
            [(one.client_id, one.not_before, one.sha256) for one in devices],
        )
        self.database.insert(
            "certificates",
            ("id", "sha256", "serial", "pem", "not_after", "renew_after", "modified"),
            [
                (
                    number,
                    one.sha256,
                    f"{one.serial:x}",
                    one.certificate.decode(),
                    one.not_after,
                    one.not_after - (one.not_after - one.not_before) // 3,
                    one.modified,
                )
                for number, one in enumerate(devices, 1)
            ],
        )
        self.database.analyze()

    def fill(self, devices: int, up_to: int) -> None:
        first = 1 + int(self.database.execute("SELECT max(id) FROM certificates")[0][0])
        several, base = self.database.series(first, up_to), f"1 + n.i % {devices}"
        self.database.execute(
            "INSERT INTO requests (sha256, pem, client_id, key_sha256, posted, state)"
            f" SELECT {self.database.hash}, r.pem, 'more' || n.i, {self.database.hash}, r.posted, r.state"
            f" FROM {several} JOIN certificates c ON c.id = {base} JOIN requests r ON r.sha256 = c.sha256"
        )
        self.database.execute(
            "INSERT INTO certificates (id, sha256, serial, pem, not_after, renew_after, modified)"
            " SELECT n.i, r.sha256, 'a' || n.i, c.pem, c.not_after, c.renew_after, c.modified"
            f" FROM {several} JOIN certificates c ON c.id = {base} JOIN requests r ON r.client_id = 'more' || n.i"
        )
        self.database.analyze()


# --- What stands in front -----------------------------------------------------------------------------------


class Front(Service):
    """nginx in front of all processes of a backend, and its log of what it saw.

    `server` is a `server` block that listens on port 443 for localhost; the names in `replace` are put in for what it
    has. More lines for the log of a test: `log`.
    """

    LOG = "$msec $status $request_time $ssl_protocol $ssl_client_verify $connection_requests"

    def __init__(
        self,
        folder: Path,
        backend: Backend,
        server: str,
        replace: Mapping[str, str],
        *,
        log: str = LOG,
        error_log: str = "error.log warn",
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.backend, self.server, self.replace = backend, server, replace
        self.log, self.error_log = log, error_log
        self.port = free_port()
        program = world.Nginx.program()
        if not program:
            raise SystemExit("fleet: nginx is not installed (apt-get install nginx-light)")
        command = [program, "-p", f"{self.folder}/", "-e", "error.log", "-c", "nginx.conf"]
        self._daemon = Daemon(command, self.folder / "output.log")

    def start(self) -> None:
        text = self.server
        for old, new in {"listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl;", **self.replace}.items():
            if old not in text:
                raise AssertionError(f"the server block has no {old!r}")
            text = text.replace(old, new)
        temporary = " ".join(
            f"{kind}_temp_path {kind}_temp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        upstream = " ".join(f"server 127.0.0.1:{port};" for port in self.backend.ports)
        # A single process, so that there is nothing but it to end.
        (self.folder / "nginx.conf").write_text(
            f"""daemon off; master_process off; pid nginx.pid; error_log {self.error_log};
events {{ worker_connections 1024; }}
http {{
    {temporary}
    log_format seen '{self.log}'; access_log seen.log seen;
    upstream backend {{ {upstream} }}
{text}
}}
"""
        )
        started(self._daemon, "nginx", self.port)

    def stop(self) -> None:
        self._daemon.stop()

    @property
    def pid(self) -> int:
        assert self._daemon.process
        return self._daemon.process.pid

    def seen(self) -> list[list[str]]:
        """The fields of each line of its log."""
        path = self.folder / "seen.log"
        return [line.split(" ") for line in path.read_text().splitlines()] if path.exists() else []


#: As docs/server-administrators.md has it, in TLS 1.3 where the device can, as Debian's nginx.conf has it.
PLAIN = """
server {
    listen 443 ssl;
    server_name localhost;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_certificate /etc/caramel/server.pem;
    ssl_certificate_key /etc/caramel/server.pem;
    ssl_client_certificate /etc/caramel/ca.crt;
    ssl_verify_client optional;
    client_max_body_size 4k;
    location / {
        proxy_pass http://127.0.0.1:6543;
        proxy_set_header Host $http_host;
    }
}
"""


def caramel_front(folder: Path, backend: Caramel, certificate: Path, **options: Any) -> Front:
    """What stands in front of Caramel: server/nginx-metered.conf where it has the filter, else as most are."""
    server = next(SERVER.rglob("nginx-metered.conf")).read_text() if backend.filtered else PLAIN
    replace = {
        "/etc/caramel/server.pem": str(certificate),
        "/etc/caramel/ca.crt": str(backend.authority.certificate_file),
        "http://127.0.0.1:6543": "http://backend",
    }
    return Front(folder, backend, server, replace, **options)


def authority_front(folder: Path, backend: RegistrationAuthority, certificate: Optional[Path] = None) -> Front:
    """What stands in front of the registration authority: its own configuration."""
    replace = {
        "server_name ca.example.com": "server_name localhost",
        "/var/lib/caramel-authority-signer/front.pem": str(certificate or backend.folder / "front.pem"),
        "http://127.0.0.1:8080": "http://backend",
    }
    return Front(folder, backend, (world.ROOT / "authority/deploy/nginx.conf").read_text(), replace)
