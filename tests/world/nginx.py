"""A real nginx as TLS front of Caramel."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Optional

from world.answers import HttpRequest
from world.authority import Moment, now
from world.caramel import Caramel
from world.processes import Daemon, free_port, start_at_port
from world.tls_front import Front, TlsFront


class Nginx(Front):
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
        self._mark = 0
        self._daemon: Optional[Daemon] = None

    @staticmethod
    def program() -> Optional[str]:
        """Where nginx is, if it is: Debian keeps it out of ordinary users' search path."""
        return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")

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

    def _configure(self, port: int) -> None:
        self.port, self._mark = port, free_port()
        (self.folder / "nginx.conf").write_text(self._configuration())

    def start(self) -> None:
        program = self.program()
        if not program:
            raise FileNotFoundError("nginx is not installed")
        command = [program, "-p", f"{self.folder}/", "-e", "error.log", "-c", str(self.folder / "nginx.conf")]
        self._daemon = Daemon(command, self.folder / "output.log")
        start_at_port(self._daemon, self.port, self._configure, self._answers)

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

    def seen(self) -> list[HttpRequest]:
        # nginx writes its log after the answer. It is a single process that does one thing after the other:
        # when it has answered this, it has finished with what it did before.
        self._answers()
        path = self.folder / "seen.log"
        entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        headers = ("user-agent", "if-modified-since", "accept-encoding", "host", "accept")
        return [
            HttpRequest(
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


def any_front(folder: Path, caramel: Caramel, certificate: Path, *, demand: bool = False) -> Front:
    """nginx where it is installed, else one made of Python: for tests that only want to reach Caramel. Client
    certificates are welcome, with `demand` nobody gets in without.
    """
    if Nginx.program():
        return Nginx(folder, caramel, certificate, verify_client="on" if demand else "optional")
    return TlsFront(caramel, certificate, client_ca=caramel.authority.certificate_file, demand=demand)
