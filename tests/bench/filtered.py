# SPDX-License-Identifier: MIT OR Apache-2.0
"""A Caramel server of the tests' world with the filter in front, installed as server/README.md says.

Shared by the benchmark and the filter's own test; no part of what an administrator installs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

import world

SERVER = world.ROOT / "server"

#: The server's own Python, and in it the server's own signing.
PYTHON = world.CARAMEL / "python"

#: Signs the request `sys.argv[2]` `sys.argv[3]` times for `sys.argv[4]` hours, all within one second of the
#: clock, and prints that second. The administrator's tool takes a second for each.
SIGN_WITHIN_A_SECOND = """
import datetime, sys, time
import transaction
from caramel import models
from pyramid.paster import bootstrap

env = bootstrap(sys.argv[1])
settings = env["registry"].settings
ca = models.SigningCert.from_files(settings["ca.cert"], settings["ca.key"])
backdate = settings["backdate"] == "true"
hours = datetime.timedelta(hours=float(sys.argv[4]))
time.sleep(1.05 - time.time() % 1)
with transaction.manager:
    request = models.CSR.by_sha256sum(sys.argv[2])
    for _ in range(int(sys.argv[3])):
        certificate = models.Certificate.sign(request, ca, hours, backdate)
        # Of two that end at the same time any may be the one that is handed out: make it the last.
        if sys.argv[5] == "replace":
            request.certificates = []
        certificate.save()
print(int(time.time()))
"""


def install() -> None:
    """Puts the filter where the server's Python finds it."""
    (folder,) = (world.BUILD / "caramel" / "lib").glob("python3*/site-packages")
    new = folder / f".caramel_conditional.{os.getpid()}"  # whole at once: another clone's server may be starting
    shutil.copyfile(SERVER / "caramel_conditional.py", new)
    new.replace(folder / "caramel_conditional.py")


class FilteredCaramel(world.Caramel):
    """A real Caramel server whose INI file names the filter; `settle` is the filter's setting, in seconds."""

    settle = 60.0

    def _write_ini(self) -> None:
        super()._write_ini()
        ini = self.ini.read_text().replace("use = egg:caramel\n", "use = egg:caramel\nfilter-with = conditional\n", 1)
        self.ini.write_text(
            f"{ini}\n[filter:conditional]\n"
            f"paste.filter_app_factory = caramel_conditional:make_filter\nsettle = {self.settle}\n"
        )

    def start(self) -> None:
        install()
        super().start()

    def sign_at_once(self, sha256: str, times: int = 1, hours: float = 48, replace: bool = True) -> int:
        """Signs a request several times within one second, and returns that second (since 1970)."""
        done = subprocess.run(
            [
                str(PYTHON),
                "-c",
                SIGN_WITHIN_A_SECOND,
                str(self.ini),
                sha256,
                str(times),
                str(hours),
                "replace" if replace else "keep",
            ],
            env=world.environment(),
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        )
        return int(done.stdout)


class MeteredNginx(world.Nginx):
    """An nginx with server/nginx-metered.conf, of which `lines` are replaced."""

    lines: Mapping[str, str] = {}

    def _configuration(self) -> str:
        assert self.caramel
        server = (SERVER / "nginx-metered.conf").read_text()
        for old, new in {
            "listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl; access_log seen.log seen;",
            "/etc/caramel/server.pem": str(self.certificate),
            "/etc/caramel/ca.crt": str(self.client_ca),
            "127.0.0.1:6543": f"127.0.0.1:{self.caramel.port}",
            **self.lines,
        }.items():
            if old not in server:
                raise AssertionError(f"server/nginx-metered.conf has no {old!r}")
            server = server.replace(old, new)
        whole = super()._configuration()
        start = whole.index("    server {\n")  # the first one in a line of its own is the one with TLS
        return f"{whole[:start]}{server}\n}}\n"
