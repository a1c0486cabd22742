"""A real Apache as TLS front of Caramel, which asks for a client certificate below one path only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Optional

from world.caramel import Caramel
from world.processes import Daemon, Service, listens, start_at_port

MODULES = ("mpm_event", "authn_core", "authz_core", "ssl", "proxy", "proxy_http")


class Apache(Service):
    """`verify` is mod_ssl's SSLVerifyClient for all that Caramel answers: "optional" or "require".

    It stands in a Location, so Apache asks once it has read the request: after the handshake.
    """

    def __init__(self, folder: Path, caramel: Caramel, certificate: Path, verify: str, client_ca: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.caramel = caramel
        self.certificate = certificate
        self.verify = verify
        self.client_ca = client_ca
        self.port = 0
        self._daemon: Optional[Daemon] = None

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @staticmethod
    def program() -> Optional[str]:
        return shutil.which("apache2", path="/usr/sbin:/usr/local/sbin")

    def _configure(self, port: int) -> None:
        self.port = port
        modules = "\n".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so" for name in MODULES)
        (self.folder / "apache.conf").write_text(f"""{modules}
ServerName localhost
ServerRoot {self.folder}
DefaultRuntimeDir {self.folder}
PidFile {self.folder}/pid
Listen 127.0.0.1:{self.port}
User www-data
Group www-data
StartServers 1
ErrorLog {self.folder}/error.log
CustomLog {self.folder}/seen.log "%m %>s %{{SSL_PROTOCOL}}x %{{SSL_CLIENT_VERIFY}}x"
SSLEngine on
SSLCertificateFile {self.certificate}
SSLCACertificateFile {self.client_ca}
<Location "/">
    SSLVerifyClient {self.verify}
</Location>
ProxyPass "/" "{self.caramel.url}/"
""")

    def start(self) -> None:
        command = [str(self.program()), "-DFOREGROUND", "-f", str(self.folder / "apache.conf")]
        self._daemon = Daemon(command, self.folder / "output.log")
        start_at_port(self._daemon, 0, self._configure, lambda: listens(self.port))

    def stop(self) -> None:
        if self._daemon:
            self._daemon.stop()

    def seen(self) -> list[str]:
        """Of each request its method, its status, the TLS version, and what became of the client certificate."""
        path = self.folder / "seen.log"
        return path.read_text().splitlines() if path.exists() else []
