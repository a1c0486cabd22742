# SPDX-License-Identifier: MIT OR Apache-2.0
"""The README's installation, run as it stands there on a machine that boots: this machine's systemd as process 1 of a
container that shares nothing with it but /usr, and has a network of its own (systemd-nspawn(1), --volatile).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import world
from authority_world import BIN, DEPLOY
from needs import needs, require

pytest_plugins = ["authority_fixtures"]
pytestmark = needs("authority", "faketime", "openssl")

README = DEPLOY.parent / "README.md"

#: What an administrator and a device do when all of it is up.
VISIT = """
exec 2>&1
echo "--- the units"
systemctl start caramel-authority-front.service
for unit in caramel-authority.service caramel-authority-signer.service caramel-authority-worker.service \\
    caramel-authority-front.timer nginx.service; do
    echo "$unit $(systemctl is-active $unit)"
done
systemctl list-units --failed --no-legend --plain 'caramel*'
cd /var/lib/caramel-authority-signer
stat -c '%U %G %a %n' . ca/ca.crt ca/ca.key front.pem /run/caramel-authority-signer/socket
stat -c '%U %G %a %n' ../caramel-authority/state.db
echo "--- who can read the key"
! runuser -u caramel-authority -- cat ca/ca.key
! runuser -u caramel-authority -- cat front.pem
! runuser -u nobody -- cat ca/ca.crt
for unit in caramel-authority caramel-authority-worker; do
    ! nsenter --target "$(systemctl show -P MainPID $unit)" --mount --net --setuid "$(id -u caramel-authority)" \
        --setgid "$(id -g caramel-authority)" cat "$PWD/ca/ca.key"
done

echo "--- a device"
cd /tmp
visit() { curl -sS --max-time 10 --cacert ca.crt --resolve ca.example.com:443:127.0.0.1 "$@"; }
cp /var/lib/caramel-authority-signer/ca/ca.crt .
openssl req -new -newkey rsa:2048 -nodes -keyout key.pem -utf8 -subj '/C=SE/O=Example AB/OU=Devices/CN=fffbeec0ffee' \
    -out request.pem 2>/dev/null
url=https://ca.example.com/$(sha256sum request.pem | cut -d ' ' -f 1)
visit -o /dev/null -w '%{http_code}\\n' "$url"
visit -o /dev/null -w '%{http_code}\\n' --data-binary @request.pem "$url"
authority authorize fffbeec0ffee | cut -d ' ' -f 3-
visit -o device.pem -w '%{http_code}\\n' "$url"
openssl verify -CAfile ca.crt device.pem
visit -o /dev/null -w '%{http_code}\\n' https://ca.example.com/accepted
curl -sS -o /dev/null -w '%{http_code}\\n' http://127.0.0.1:8080/health
curl -sS http://127.0.0.1:9464/metrics | grep '^caramel_authority_requests{'
authority log --verify | cut -d : -f 1
ca minimum-serial --now >minimum
authority reject fffbeec0ffee | cut -d ' ' -f 3-
stat -c '%G %a' /var/lib/caramel-authority/refusals
wc -l </var/lib/caramel-authority/refusals
"""

SAYS = """--- the units
caramel-authority.service active
caramel-authority-signer.service active
caramel-authority-worker.service active
caramel-authority-front.timer active
nginx.service active
caramel-authority-signer caramel-authority 2750 .
caramel-authority-signer caramel-authority 644 ca/ca.crt
caramel-authority-signer caramel-authority 600 ca/ca.key
caramel-authority-signer caramel-authority 600 front.pem
caramel-authority-signer caramel-authority 660 /run/caramel-authority-signer/socket
caramel-authority caramel-authority 660 ../caramel-authority/state.db
--- who can read the key
cat: ca/ca.key: Permission denied
cat: front.pem: Permission denied
cat: ca/ca.crt: Permission denied
cat: /var/lib/caramel-authority-signer/ca/ca.key: Permission denied
cat: /var/lib/caramel-authority-signer/ca/ca.key: Permission denied
--- a device
404
202
authorized  fffbeec0ffee
200
device.pem: OK
404
204
caramel_authority_requests{state="pending"} 0.0
caramel_authority_requests{state="authorized"} 1.0
caramel_authority_requests{state="rejected"} 0.0
4 entries, each follows from those before it
rejected  fffbeec0ffee
caramel-authority 660
2
"""


def installed_at_opt(folder: Path) -> None:
    """What `pip install` leaves in /opt, with the modules of the environment that `make` has already filled."""
    subprocess.run(["/usr/bin/python3", "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    (packages,) = (folder / "lib").glob("python3.*/site-packages")
    (filled,) = (BIN.parent / "lib").glob("python3.*/site-packages")
    assert packages.parent.name == filled.parent.name, "the environment is for another Python than the system's"
    (packages / "authority.pth").write_text(f"/srv/environment/{filled.relative_to(BIN.parent)}\n")
    program = folder / "bin" / "caramel-authority"
    program.write_text("#!/opt/caramel-authority/bin/python\nimport sys\nfrom caramel_authority.cli import main\n")
    program.write_text(program.read_text() + "sys.exit(main())\n")
    program.chmod(0o755)


@needs("root")
def test_set_up_as_the_page_says(tmp_path: Path) -> None:
    require("nspawn", "nginx", "curl")
    installed_at_opt(tmp_path / "opt/caramel-authority")
    blocks = re.findall(r"^```sh setup\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert len(blocks) == 4
    control, units, nginx = (tmp_path / name for name in ("control", "units", "nginx"))
    control.mkdir()
    shutil.copytree("/etc/nginx", nginx, symlinks=True)
    units.mkdir()
    for name in ("systemd-firstboot.service", "console-getty.service", "systemd-networkd-wait-online.service"):
        (units / name).symlink_to("/dev/null")
    (units / "boot.target").write_text(
        "[Unit]\nRequires=basic.target script.service\nAfter=basic.target\nAllowIsolate=yes\n"
    )
    (units / "script.service").write_text(
        "[Unit]\nAfter=basic.target\n[Service]\nType=oneshot\nExecStart=/bin/bash /control/script\n"
        "StandardOutput=file:/control/out\nStandardError=file:/control/err\n"
        "ExecStopPost=/bin/sh -c 'journalctl --no-pager >/control/journal; systemctl poweroff --force'\n"
    )
    # nginx as its package leaves it: running, with folders for what it writes.
    before = "mkdir -p /var/log/nginx /var/lib/nginx\nsystemctl start nginx\ncd /srv/authority\n"
    (control / "script").write_text(before + "set -e\n" + "".join(blocks) + VISIT)
    binds = [
        f"--bind={control}:/control", f"--bind={nginx}:/etc/nginx", f"--bind={units}:/etc/systemd/system",
        f"--bind-ro={tmp_path / 'opt'}:/opt", f"--bind-ro={DEPLOY.parent}:/srv/authority",
        f"--bind-ro={BIN.parent}:/srv/environment",
        *(f"--bind-ro=/etc/{name}" for name in ("nsswitch.conf", "pam.d", "security", "login.defs", "ssl")),
    ]  # fmt: skip
    command = [
        "systemd-nspawn", "--quiet", "--directory=/", "--volatile=yes", "--register=no", "--keep-unit",
        "--settings=no", "--link-journal=no", "--private-network", "--resolv-conf=off", "--boot", "--console=pipe",
        f"--machine=authority-{os.getpid()}", *binds, "systemd.unit=boot.target",
    ]  # fmt: skip
    with world.Daemon(command, tmp_path / "boot.log") as machine:
        world.until("the machine has gone down", lambda: not machine.alive, 120, 0.2)
        said = {name: (control / name).read_text() if (control / name).exists() else "" for name in ("out", "err")}
        journal = (control / "journal").read_text()[-5000:] if (control / "journal").exists() else machine.text()
    _, _, visited = said["out"].partition("--- the units")
    assert "--- the units" + visited == SAYS, (said, journal)
