"""A real Caramel server and its administrator."""

from __future__ import annotations

import sqlite3
import subprocess
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from world.authority import Authority
from world.processes import Daemon, Service, die_with_parent, environment, start_at_port
from world.programs import CARAMEL


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


class Caramel(Service):
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

    def _configure(self, port: int) -> None:
        self.port = port
        self._write_ini()
        if not self.database.exists():
            self.program("caramel_initialize_db", str(self.ini))

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
        start_at_port(self._server, self.port, self._configure, self._answers)

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

    def _rows(self, question: str, *values: str) -> list[Any]:
        connection = sqlite3.connect(str(self.database), timeout=60)
        try:
            return connection.execute(question, values).fetchall()
        finally:
            connection.close()

    def requests(self, client_id: Optional[str] = None) -> list[Request]:
        """All requests in the database, also the rejected ones, oldest first; of one device or of all."""
        rows = self._rows(
            "SELECT csr.id, commonname, sha256sum, rejected, COUNT(certificate.id), MAX(not_after),"
            " csr.pem FROM csr LEFT JOIN certificate ON certificate.csr_id = csr.id"
            " GROUP BY csr.id ORDER BY csr.id"
        )
        found = [Request(row[0], row[1], row[2], bool(row[3]), row[4], row[5], bytes(row[6])) for row in rows]
        return [row for row in found if client_id in (None, row.client_id)]

    def certificates(self, sha256: str) -> list[bytes]:
        """All certificates, in PEM, signed so far for the request with this hash, oldest first."""
        rows = self._rows(
            "SELECT certificate.pem FROM certificate JOIN csr ON certificate.csr_id = csr.id"
            " WHERE sha256sum = ? ORDER BY certificate.id",
            sha256,
        )
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
