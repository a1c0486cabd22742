# SPDX-License-Identifier: MIT OR Apache-2.0
"""The README's installation, run as it stands there on a machine that boots: this machine's systemd as process 1 of a
container that shares nothing with it but /usr, and has a network of its own (systemd-nspawn(1), --volatile).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import world
from authority_world import BIN, DEPLOY, Postgres, RegistrationAuthority, csr, sha256
from needs import needs, require, slow

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


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """/opt as the page fills it, with this machine's pip; Debian's packages are here already."""
    folder = tmp_path_factory.mktemp("opt")
    folder.chmod(0o755)
    source = shutil.copytree(DEPLOY.parent, tmp_path_factory.mktemp("source") / "authority")
    (commands,) = blocks_of("packages")
    script = "apt-get() { :; }\n" + commands.replace("/opt/", f"{folder}/")
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name == "HOME"}
    env = world.environment(**{**pip, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
    done = subprocess.run(["bash", "-ec", script], cwd=source, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for program in (folder / "caramel-authority/bin").iterdir():
        if not program.is_symlink():
            program.write_text(program.read_text().replace(f"{folder}/", "/opt/"))
    return folder


def blocks_of(name: str) -> list[str]:
    return re.findall(rf"^```sh {name}\n(.*?)^```$", README.read_text(), re.M | re.S)


def on_a_machine(tmp_path: Path, opt: Path, script: str) -> tuple[dict[str, str], str]:
    """What this script printed on both outputs, and the journal. Its folder is the page's."""
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
    (control / "script").write_text(before + "set -e\n" + script)
    binds = [
        f"--bind={control}:/control", f"--bind={nginx}:/etc/nginx", f"--bind={units}:/etc/systemd/system",
        f"--bind-ro={opt}:/opt", f"--bind-ro={DEPLOY.parent}:/srv/authority",
        *(f"--bind-ro=/etc/{name}" for name in ("nsswitch.conf", "pam.d", "security", "login.defs", "ssl")),
    ]  # fmt: skip
    command = [
        "systemd-nspawn", "--quiet", "--directory=/", "--volatile=yes", "--register=no", "--keep-unit",
        "--settings=no", "--link-journal=no", "--private-network", "--resolv-conf=off", "--boot", "--console=pipe",
        f"--machine=authority-{os.getpid()}", *binds, "systemd.unit=boot.target",
    ]  # fmt: skip
    # Two of them at once would share a control group, and each would clear up the other one's.
    with (world.BUILD / "machine.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with world.Daemon(command, tmp_path / "boot.log") as machine:
            world.until("the machine has gone down", lambda: not machine.alive, 240, 0.2)
        said = {name: (control / name).read_text() if (control / name).exists() else "" for name in ("out", "err")}
        journal = (control / "journal").read_text()[-5000:] if (control / "journal").exists() else machine.text()
    return said, journal


@needs("root")
def test_set_up_as_the_page_says(tmp_path: Path, opt: Path) -> None:
    require("nspawn", "nginx", "curl")
    blocks = blocks_of("setup")
    assert len(blocks) == 4
    said, journal = on_a_machine(tmp_path, opt, "".join(blocks) + VISIT)
    _, _, visited = said["out"].partition("--- the units")
    assert "--- the units" + visited == SAYS, (said, journal)


#: What 2.0.0's page had made: one user, whose folder has the key, the database and the front's certificate.
SET_UP_2_0_0 = """
mkdir -p /etc/sysusers.d
echo 'u caramel-authority - "Registration authority" /var/lib/caramel-authority' \\
    >/etc/sysusers.d/caramel-authority.conf
systemd-sysusers caramel-authority.conf
install -d -o caramel-authority -g caramel-authority -m 0750 /var/lib/caramel-authority
printf '%s\n' '#signer = "ca"' '[rules]' '[ca]' '#folder = "/var/lib/caramel-authority/ca"' '[acme]' \
    >/etc/caramel-authority.toml
cd /var/lib/caramel-authority
python3 -c 'import sqlite3, sys; sqlite3.connect("state.db").executescript(open(sys.argv[1]).read())' \
    /srv/authority/tests/made_by_2_0_0.sql
mkdir -m 0750 ca
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 7300 -keyout ca/ca.key -out ca/ca.crt \
    -subj '/C=SE/O=Example AB/CN=Example Device CA' -addext basicConstraints=critical,CA:TRUE,pathlen:0 \
    -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null
cat ca/ca.crt ca/ca.key >front.pem
chmod 0600 ca/ca.key front.pem
chmod 0640 state.db
chown -R caramel-authority:caramel-authority .
sed 's,/caramel-authority-signer/front.pem,/caramel-authority/front.pem,' /srv/authority/deploy/nginx.conf \
    >/etc/nginx/conf.d/caramel-authority.conf
cd /srv/authority
for unit in caramel-authority.service caramel-authority-worker.service caramel-authority-front.timer; do
    cp deploy/$unit /etc/systemd/system/
done
mkdir -p /etc/systemd/system/caramel-authority-front.service.d
printf '[Service]\\nEnvironment=NAMES=ca.example.com\\n' \\
    >/etc/systemd/system/caramel-authority-front.service.d/names.conf
systemctl daemon-reload
"""
VISIT_2_0_0 = """
exec 2>&1
look() {
    echo "--- $1"
    systemctl start caramel-authority-front.service
    for unit in caramel-authority.service caramel-authority-signer.service caramel-authority-front.timer; do
        echo "$unit $(systemctl is-active $unit)"
    done
    stat -c '%U %G %a %n' /var/lib/caramel-authority /var/lib/caramel-authority/state.db /etc/caramel-authority.toml
    stat -c '%U %G %a %n' /var/lib/caramel-authority-signer/*
    visit() { curl -sS --max-time 10 --cacert /tmp/ca.crt --resolve ca.example.com:443:127.0.0.1 "$@"; }
    cp /var/lib/caramel-authority-signer/ca/ca.crt /tmp
    # nginx reads its certificate anew when it gets to it.
    until visit -o /dev/null https://ca.example.com/root.crt 2>/dev/null; do sleep 0.5; done
    for hash in GOOD REFUSED; do visit -o /tmp/$hash -w '%{http_code}\\n' https://ca.example.com/$hash; done
    openssl verify -CAfile /tmp/ca.crt /tmp/GOOD | cut -d / -f 3
}
"""
SAYS_2_0_0 = """caramel-authority.service active
caramel-authority-signer.service active
caramel-authority-front.timer active
caramel-authority caramel-authority 2770 /var/lib/caramel-authority
caramel-authority caramel-authority 660 /var/lib/caramel-authority/state.db
root caramel-authority 640 /etc/caramel-authority.toml
caramel-authority-signer caramel-authority 750 /var/lib/caramel-authority-signer/ca
caramel-authority-signer caramel-authority 600 /var/lib/caramel-authority-signer/front.pem
200
403
GOOD: OK
"""


@needs("root")
@slow
def test_from_2_0_0_to_another_machine(tmp_path: Path, opt: Path) -> None:
    """The page's way up from 2.0.0, then its copies, the other machine, and the next CA. A device that 2.0.0 knew is
    served all the time, and one that was refused after the copy was made stays out.
    """
    require("nspawn", "nginx", "curl")
    old = Path(__file__).with_name("made_by_2_0_0.sql").read_text()
    visit, hashes = VISIT_2_0_0, {}
    for name, client_id in (("GOOD", "Device-1"), ("REFUSED", "refused")):
        found = re.search(rf"'([0-9a-f]{{64}})','-----BEGIN CERTIFICATE REQUEST[^']*','{client_id}'", old)
        assert found
        hashes[name] = found[1]
        visit = visit.replace(name, found[1])
    setup, migrate, copy, another = (blocks_of(name) for name in ("setup", "migrate", "copy", "another"))
    assert [len(one) for one in (setup, migrate, copy, another)] == [4, 3, 1, 1]
    # The other machine is this one without what the first one had.
    lost = (
        "systemctl disable --now caramel-authority.service caramel-authority-signer.service "
        "caramel-authority-front.timer\n"
        "rm -r /var/lib/caramel-authority /var/lib/caramel-authority-signer /etc/caramel-authority.toml\n"
    )
    again = "".join(setup).replace("authority init\n", "".join(another))
    again, replaced = re.subn(r"^ca ca-create .*\n", "", again, flags=re.M)
    assert replaced == 1
    # Somebody decides after the one copy, and before the other one.
    copied, between, secret = copy[0].partition("tar ")
    assert between
    script = SET_UP_2_0_0 + "".join(migrate) + visit + "look migrated\nauthority bar outside >/tmp/said\n"
    script += copied + "authority bar another >/tmp/said\n" + between + secret + lost + again + "look moved\n"
    script += "echo '--- restored'\nauthority list --barred | tr -s ' ' | cut -d ' ' -f 1,2 | sort\n"
    script += "".join(f"ca ca-next {stage} >/tmp/said\n" for stage in ("", "--switch", "--finish"))
    script += "authority minimum-serial --now >/tmp/said\nlook followed\n"
    said, journal = on_a_machine(tmp_path, opt, script)
    _, *parts = re.split(r"^--- (\w+)\n", said["out"], flags=re.M)
    printed = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(printed) == ["migrated", "moved", "restored", "followed"], (said, journal)
    for name in ("migrated", "moved", "followed"):
        assert printed[name].replace(hashes["GOOD"], "GOOD").startswith(SAYS_2_0_0), (name, said, journal)
    assert "1 decisions were newer\n" in said["out"]
    assert printed["restored"] == "barred another\nbarred outside\n", said


# --- PostgreSQL ---


@pytest.fixture
def of_the_page(tmp_path: Path) -> Iterator[Postgres]:
    """A PostgreSQL of its own: the page's users and databases have fixed names."""
    require("postgresql", "psql")
    with Postgres(tmp_path / "postgres") as started:
        yield started


def run_blocks(name: str, server: Postgres, folder: Path, before: str = "") -> None:
    """The page's commands of this name, as the database's own administrator."""
    blocks = re.findall(rf"^```sh {name}\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert blocks
    programs = f"{BIN}:{Path(str(server.program('initdb'))).parent}:{os.environ['PATH']}"
    env = world.environment(PATH=programs, PGHOST="127.0.0.1", PGPORT=str(server.port), PGUSER="authority")
    done = subprocess.run(
        ["bash", "-ec", before + "".join(blocks)], cwd=folder, env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


@slow
def test_postgresql_as_the_page_says(of_the_page: Postgres, tmp_path: Path) -> None:
    """Two users, of whom the one that serves can add to the log and not change it; a dump, and the way back."""
    address = of_the_page.url.partition("authority@")[0]
    owner, serving = (
        f"{address}{user}@127.0.0.1:{of_the_page.port}/caramel" for user in ("caramel_owner", "caramel_authority")
    )
    (tmp_path / "deploy").symlink_to(DEPLOY)
    (tmp_path / "owner.toml").write_text(f'database = "{owner}"\n[ca]\nfolder = "{tmp_path}/a/ca"\n')
    run_blocks("postgresql", of_the_page, tmp_path)
    authority = RegistrationAuthority(tmp_path / "a", database=serving)
    authority.create_ca()
    authority.command("allow", "kept", "rejected")
    requests = {name: csr(name) for name in ("kept", "rejected", "other")}
    with authority.serving() as server:
        for name in ("kept", "rejected"):
            assert server.enroll(requests[name]).status == 200
        assert "caramel_authority has no right to change any" in authority.command("log", "--verify")
        denied = (
            "UPDATE log SET who = 'somebody'",
            "DELETE FROM log",
            "TRUNCATE log",
            "DROP TABLE log",
            "DROP TRIGGER log_never_rewritten ON log",
            "ALTER TABLE log DISABLE TRIGGER ALL",
            "SET session_replication_role = replica",
            "CREATE RULE no_log AS ON INSERT TO log DO INSTEAD NOTHING",
            "ALTER FUNCTION log_never_rewritten() RENAME TO nothing",
            "SELECT setval('log_id_seq', 1)",
            "SET ROLE caramel_owner",
            "UPDATE alembic_version SET version_num = '0001'",
        )
        before = of_the_page.sql("SELECT * FROM log ORDER BY id", owner)
        for statement in denied:
            with pytest.raises(AssertionError, match=r"permission denied|must be owner"):
                of_the_page.sql(statement, serving)
        for statement in denied[:3]:  # whose the tables are may, as soon as he takes the trigger away
            with pytest.raises(AssertionError, match="the log is never rewritten"):
                of_the_page.sql(statement, owner)
        assert of_the_page.sql("SELECT * FROM log ORDER BY id", owner) == before
        run_blocks("dump", of_the_page, tmp_path)
        authority.command("reject", "rejected")
        authority.command("bar", "other")
    assert b"PGDMP" in (tmp_path / "state.dump").read_bytes()[:5]
    owning = [*map(str, (BIN / "caramel-authority", "--config", tmp_path / "owner.toml", "log", "--verify"))]
    said = subprocess.run(owning, capture_output=True, text=True, timeout=60)
    assert "caramel_owner could change the log, by these rights: the owner's" in said.stderr
    run_blocks("undump", of_the_page, tmp_path)
    # The rights are in the dump, and the decisions in the file.
    assert authority.command("restore") == "2 decisions were newer\n"
    assert "caramel_authority has no right to change any" in authority.command("log", "--verify")
    with authority.serving() as server:
        assert {name: server.get(sha256(one)).status for name, one in requests.items()} == {
            "kept": 200, "rejected": 403, "other": 404}  # fmt: skip
        assert server.post(requests["other"]).status == 400
