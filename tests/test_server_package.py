"""The server's half as administrators get it: its units, its packages, and the page that installs them, walked as it
is written on a new Debian 12 that boots (systemd-nspawn(1)).
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import world
from needs import needs, slow

import caramel_embedded

SERVER = world.ROOT / "server"
PACKAGING = SERVER / "packaging"
UNITS = PACKAGING / "systemd"
PAGE = world.ROOT / "docs/server-administrators.md"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
TIMERS = sorted(path.name for path in UNITS.glob("*.timer"))
VERSION = caramel_embedded.__version__
WHEEL = f"caramel_embedded_server-{VERSION}-py3-none-any.whl"
DEB = f"caramel-embedded-server_{VERSION}_all.deb"


# --- The units ---


@needs("systemd")
@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_of_the_server_has_what_it_needs_and_no_more(name: str) -> None:
    """systemd-analyze's exposure level: 10 is everything open."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=yes", "--threshold=29", str(UNITS / name)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@needs("systemd")
def test_systemd_has_nothing_to_say_about_the_units_of_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/systemd/system"
    shutil.copytree(UNITS, folder)
    for name in ["network", "multi-user", "timers", "time-sync", "sysinit", "shutdown", "basic", "time-set"]:
        (folder / f"{name}.target").write_text("[Unit]\nDescription=stub\n")
    for program in {path for name in SERVICES for path in re.findall(r"=(/opt/\S+)", (UNITS / name).read_text())}:
        file = tmp_path / program[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("#!/bin/true\n")
        file.chmod(0o755)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={tmp_path}", *SERVICES, *TIMERS],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_who_signs_reads_the_key() -> None:
    for name in SERVICES:
        text = (UNITS / name).read_text()
        signs = re.search(r"^ExecStart=\S+/(caramel_tool|caramel_autosign) ", text, re.MULTILINE) is not None
        assert re.findall(r"^(?:User|Group)=(.*)$", text, re.MULTILINE) == 2 * ["caramel-ca" if signs else "caramel"]


def test_certificates_are_renewed_before_half_of_their_life() -> None:
    (hours,) = re.findall(r"^OnCalendar=\*-\*-\* ([\d,]+):17$", (UNITS / "caramel-refresh.timer").read_text(), re.M)
    first, second = map(int, hours.split(","))
    lives = re.findall(r"^(?:lifetime\.short|valid) = (\d+)$", PAGE.read_text(), re.MULTILINE)
    assert second - first == 12 and len(lives) == 2 and min(map(int, lives)) / 2 > 12.25


def test_the_servers_package_has_this_version() -> None:
    assert f'\nversion = "{VERSION}"\n' in (SERVER / "pyproject.toml").read_text()
    assert (PACKAGING / "debian/changelog").read_text().startswith(f"caramel-embedded-server ({VERSION}) ")
    assert set(re.findall(r"caramel[_-]embedded[_-]server[_-](\d[\w.]*?)[_-]", PAGE.read_text())) == {VERSION}


# --- The packages ---


def make(folder: Path, **env: str) -> Path:
    """`make server-package`; the folder with both packages."""
    done = subprocess.run(
        ["make", "-s", "-C", str(world.ROOT), "server-package", f"BUILD={folder}"],
        capture_output=True,
        text=True,
        # What else pip needs on this machine is in its environment.
        env={**{name: text for name, text in os.environ.items() if not name.startswith("COVERAGE_")}, **env},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder / "server"


@pytest.fixture(scope="module")
def packages() -> Path:
    # Workers share the folder, and each would clear away what another one is building.
    with (world.BUILD / "server-package.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make(world.BUILD)


@slow
@needs("debian-tools")
def test_what_is_in_the_servers_packages(packages: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again", TZ="Asia/Tokyo")
    for name in (WHEEL, DEB):
        assert (again / name).read_bytes() == (packages / name).read_bytes(), name
    listing = subprocess.run(
        ["dpkg-deb", "--contents", packages / DEB], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert all(line.split()[1] == "root/root" for line in listing)
    files = {line.split()[5][1:] for line in listing if not line.endswith("/")}
    share, doc = "/usr/share/caramel-embedded-server", "/usr/share/doc/caramel-embedded-server"
    assert files == {
        *(f"/lib/systemd/system/{name}" for name in (*SERVICES, *TIMERS)),
        *(f"{share}/{name}" for name in ("nginx.conf", "nginx-metered.conf", WHEEL)),
        *(f"/usr/lib/{name}.d/caramel-embedded-server.conf" for name in ("sysusers", "tmpfiles")),
        f"{doc}/changelog.gz",
        f"{doc}/copyright",
    }
    if shutil.which("lintian"):
        found = subprocess.run(
            ["lintian", "--fail-on", "error", packages / DEB], capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


# --- The page, walked ---

#: Somebody without any rights who is logged in meanwhile: opens each file as soon as it has a name, and keeps it
#: open, so that what is written into it later can be read, too. inotify(7). Ends with its standard input.
SPY = """
import ctypes, os, select, struct, sys

CREATE, MOVED_TO, ATTRIB, MODIFY = 0x100, 0x80, 0x4, 0x2
libc = ctypes.CDLL(None, use_errno=True)
watch = libc.inotify_init1(os.O_NONBLOCK)
folders = {libc.inotify_add_watch(watch, name.encode(), CREATE | MOVED_TO | ATTRIB | MODIFY): name
           for name in sys.argv[1:]}
assert -1 not in folders, sys.argv
opened, seen = {}, set()
print("watching", flush=True)
over = False
while not over:
    ready = select.select([watch, 0], [], [])[0]
    over = 0 in ready and not os.read(0, 100)
    events = os.read(watch, 1 << 16) if watch in ready else b""
    while events:
        number, _, _, length = struct.unpack("iIII", events[:16])
        name = os.path.join(folders[number], events[16:16 + length].rstrip(b"\\0").decode())
        events = events[16 + length:]
        files = opened.setdefault(name, [])
        try:
            files.append(os.open(name, os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            continue
        if len(files) > 20:
            os.close(files.pop(1))
    seen |= {name for name, files in opened.items()
             if any(b"PRIVATE KEY" in os.pread(file, 1 << 20, 0) for file in files)}
print(*sorted(seen))
"""

#: A look into the database, whichever it is, as the user who owns it.
SQL = """
import pathlib, sys
import caramel_accesslog, sqlalchemy

settings = caramel_accesslog.settings(pathlib.Path("/etc/caramel/caramel.ini"))
with sqlalchemy.engine_from_config(settings, "sqlalchemy.").begin() as connection:
    result = connection.execute(sqlalchemy.text(sys.argv[1]))
    if result.returns_rows:
        print(*(row[0] for row in result))
"""

OLD_ROWS = """INSERT INTO accesslog ("when", addr, csr_id)
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500)
SELECT CAST('2020-01-01 00:00:00.000000' AS {time}), '127.0.0.1', 1 FROM n"""

#: Certificates of the request that has most of them, of those that aren't rejected.
MOST = """SELECT max(n) FROM (SELECT count(*) AS n FROM certificate
WHERE csr_id NOT IN (SELECT id FROM csr WHERE rejected) GROUP BY csr_id) AS c"""

#: Whether the table of certificates has its index.
INDEXED = {
    "sqlite": "SELECT count(*) FROM sqlite_master WHERE name = 'certificate_of_request'",
    "postgresql": "SELECT count(*) FROM pg_indexes WHERE indexname = 'certificate_of_request'",
}

#: With this, the next `--refresh` would sign a request that nobody has signed.
MADE_UP = """INSERT INTO certificate (id, pem, not_before, not_after, csr_id)
SELECT 1000, pem, not_before, not_after, 1 FROM certificate LIMIT 1"""

#: `look` finds each private key that somebody else can read. Who may: root, and for the CA's key who signs.
BEFORE = r"""
set -eu
cd /control
sql() { runuser -u caramel -- /opt/caramel/bin/python /control/sql.py "$1"; }
look() {
    find /etc/caramel /etc/nginx /var/lib/caramel-server /tmp /root /srv -xdev -type f \
        \( -perm /o=rwx -o -perm /g=rwx ! -group caramel-ca ! -group root \) ! -name canary \
        -exec grep -l 'PRIVATE KEY' {} + >&3 || :
}
exec 3>readable
"""

#: The spy sees what it can see.
WATCH = r"""
setpriv --reuid=nobody --regid=nogroup --clear-groups python3 spy.py /etc/caramel /tmp /etc/nginx/conf.d \
    < <(until [ -e enough ]; do sleep 0.2; done) >spied &
spy=$!
until [ -s spied ]; do sleep 0.1; done
echo 'PRIVATE KEY' >/tmp/canary
set -T
trap look DEBUG
"""

#: What the administrator looks at when all of it is up.
VISIT = r"""
trap - DEBUG
set +T
cd /control
ca=$(sed -n 's/^ca.cert = //p' /etc/caramel/caramel.ini)
ask() { curl -sS -o /dev/null -w '%{http_code}\n' --cacert $ca "$@"; }
echo "--- the database"
sql "$MOST"
sql "$INDEXED"
stat -c '%U %G %a %n' /etc/caramel/*.key /etc/caramel/*.pem
echo "--- renewed"
requests=$(sql 'SELECT count(DISTINCT csr_id) FROM certificate JOIN csr ON csr.id = csr_id WHERE NOT rejected')
before=$(sql 'SELECT count(*) FROM certificate')
systemctl start caramel-refresh
[ $(($(sql 'SELECT count(*) FROM certificate') - before)) = $requests ] && [ $requests != 0 ] && echo "each once"
echo "--- what runs"
for unit in caramel caramel-autosign caramel-refresh.timer caramel-clean.timer caramel-accesslog.timer; do
    echo "$unit $(systemctl is-active $unit) $(systemctl is-enabled $unit)"
done
systemctl is-active logrotate.timer
logrotate --debug /etc/logrotate.d/nginx 2>&1 | grep -c 'considering log /var/log/nginx/access.log'
systemctl list-units --failed --no-legend --plain
stat -c '%U' /proc/$(systemctl show -P MainPID caramel) /proc/$(systemctl show -P MainPID caramel-autosign)
echo "--- the service answers at once"
for _ in 1 2; do
    systemctl restart caramel
    ask https://ca.example.com/root.crt
done
echo "--- a server that can't start says so"
cp /etc/caramel/caramel.ini good.ini
sed -i 's/egg:waitress/egg:nonsense/' /etc/caramel/caramel.ini
systemctl restart caramel 2>/dev/null || echo "no"
cp good.ini /etc/caramel/caramel.ini
echo "--- unchanged"
sed -i '/^use = egg:caramel-embedded-server/a settle = 0' /etc/caramel/caramel.ini
systemctl restart caramel
request=$(sql 'SELECT csr.sha256sum FROM csr JOIN certificate ON csr_id = csr.id WHERE NOT rejected')
request=https://ca.example.com/${request%% *}
date=$(ask -D - $request | tr -d '\r' | sed -n 's/^Last-Modified: //p')
ask -H "If-Modified-Since: $date" $request
"""

SAYS = """--- the database
1
1
{keys}root root 600 /etc/caramel/server.key
root root 600 /etc/caramel/server.pem
--- renewed
each once
--- what runs
caramel active enabled
caramel-autosign active enabled
caramel-refresh.timer active enabled
caramel-clean.timer active enabled
caramel-accesslog.timer active enabled
active
1
caramel
caramel-ca
--- the service answers at once
200
200
--- a server that can't start says so
no
--- unchanged
304
"""

AFTER = ": >enough\nwait $spy\n: >done\n"


def steps(*without: str) -> list[tuple[str, str]]:
    """The commands and files of the page in its order, as shell, each with the heading above it; `without` these
    kinds of commands.
    """
    found: list[tuple[str, str]] = []
    heading, before, kind, lines = "", "", None, []  # type: str, str, str | None, list[str]
    for line in PAGE.read_text().splitlines():
        if not line.startswith("```"):
            if kind is not None:
                lines.append(line)
            elif line.startswith("#"):
                heading = line.strip("# ")
            elif line:
                before = line
            continue
        if kind is None:
            kind, lines = line[3:], []
            continue
        text = "".join(f"{line}\n" for line in lines)
        file = re.search(r"`(/[^`]+)`:$", before)
        if kind.startswith("sh") and kind not in without:
            found.append((heading, text))
        elif file and kind == "ini":
            path = file[1]
            text = f"mkdir -p {os.path.dirname(path)}\ncat >{path} <<'END OF FILE'\n{text}END OF FILE\n"
            found.append((heading, text))
        kind = None
    return found


def commands(kind: str) -> str:
    """The text of the page's only block of this kind."""
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(text)


#: What pip brings into the tree, and the device of the trials, whose modules are those of this checkout.
TREE = """
python3 -m venv /opt/caramel
/opt/caramel/bin/pip install --quiet {pip}
python3 -m venv /opt/device
/opt/device/bin/pip install --quiet cryptography fasteners pyOpenSSL urllib3
program=/usr/local/bin/caramel-embedded
printf '#!/bin/sh\\nPYTHONPATH=/project exec /opt/device/bin/python -m caramel_embedded "$@"\\n' >$program
chmod 755 $program
"""


@pytest.fixture(scope="module")
def tree() -> Path:
    """A new Debian with what the page fetches from elsewhere; made once."""
    fetched = commands("sh install") + commands("sh install-postgresql")
    debian = " ".join(re.findall(r"^apt-get install -y --no-install-recommends (.*)$", fetched, re.MULTILINE))
    pip = " ".join(re.findall(r"^/opt/caramel/bin/pip install (.*)$", PAGE.read_text(), re.MULTILINE))
    pip = " ".join(shlex.quote(word) for word in shlex.split(pip) if not word.startswith("/"))
    packages = ",".join(["systemd-sysv", "dbus", *debian.split()])
    return world.tree("server-tree", "bookworm", packages, TREE.format(pip=pip))


def walk(folder: Path, tree: Path, packages: Path, script: str, database: str) -> str:
    """Boots a copy of the tree that has no network, runs the script in it, and shuts it down; what it printed."""
    control, units, project = (folder / name for name in ("control", "units", "project"))
    for made in (control, units, project):
        made.mkdir()
    shutil.copytree(world.ROOT / "caramel_embedded", project / "caramel_embedded")
    shutil.copy(packages / DEB, control)
    (control / "hosts").write_text("127.0.0.1 localhost ca.example.com\n")
    for name, text in (("sql.py", SQL), ("spy.py", SPY), ("script", f"MOST={shlex.quote(MOST)}\n{BEFORE}{script}")):
        (control / name).write_text(text)
    (units / "boot.target").write_text(
        "[Unit]\nRequires=multi-user.target script.service\nAfter=multi-user.target\nAllowIsolate=yes\n"
    )
    (units / "script.service").write_text(
        "[Unit]\nAfter=multi-user.target\n[Service]\nType=oneshot\nExecStart=/bin/bash /control/script\n"
        "StandardOutput=file:/control/out\nStandardError=file:/control/err\n"
        "ExecStopPost=/bin/sh -c 'journalctl --no-pager >/control/journal; systemctl poweroff --force'\n"
    )
    command = [
        "systemd-nspawn", "--quiet", f"--directory={tree}", "--volatile=overlay", "--register=no", "--keep-unit",
        "--settings=no", "--link-journal=no", "--private-network", "--resolv-conf=off", "--boot", "--console=pipe",
        f"--machine=server-{os.getpid()}", f"--bind={control}:/control", f"--bind-ro={project}:/project",
        f"--bind-ro={control}/hosts:/etc/hosts",
        *(f"--bind-ro={unit}:/etc/systemd/system/{unit.name}" for unit in units.iterdir()),
        "systemd.unit=boot.target",
        *(["systemd.mask=postgresql.service"] if database == "sqlite" else []),
    ]  # fmt: skip
    with world.Daemon(command, folder / "boot.log") as machine:
        world.until("the machine has gone down", lambda: not machine.alive, 600, 0.2)
    said = {
        name: (control / name).read_text(errors="replace") if (control / name).exists() else ""
        for name in ("out", "err", "journal")
    }
    assert (control / "done").exists(), (said["out"][-3000:], said["err"][-3000:], said["journal"][-6000:])
    return said["out"] + said["err"]


@slow
@needs("nspawn", "mmdebstrap", "debian-tools")
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_the_page_for_server_administrators_on_a_new_debian(
    tmp_path: Path, tree: Path, packages: Path, database: str
) -> None:
    """All of it with SQLite; with PostgreSQL what concerns the database."""
    elsewhere = ["sh install", "sh install-postgresql", "sh upgrade"]
    if database == "sqlite":
        found = [step for step in steps(*elsewhere, "sh postgresql") if step[0] != "PostgreSQL"]
        time, keys = "TEXT", "root caramel-ca 640 /etc/caramel/{ca,new-ca}.key\n"
    else:
        found = [step for step in steps(*elsewhere) if step[0] not in ("SQLite", "A new CA")]
        time, keys = "TIMESTAMP", "root caramel-ca 640 /etc/caramel/ca.key\n"
    (_, first), *others = found
    assert first.startswith("apt-get install") and first.endswith(f"./{DEB}\n")
    script = f"INDEXED={shlex.quote(INDEXED[database])}\n" + first + WATCH
    for heading, step in others:
        if heading == "What grows":
            script += f"sql {shlex.quote(OLD_ROWS.format(time=time))}\n"
        # Of two certificates that end in the same second, Caramel may go on handing out the older. Here lie days, on
        # the page.
        if "caramel-refresh\n" in step:
            script += "sleep 1.1\n"
        script += f"echo {shlex.quote(f'--- {heading}')}\n{step}"
    script += VISIT
    if database == "postgresql":
        script += "echo '--- PostgreSQL starts again'\nsystemctl restart postgresql\nask $request\n"
        script += "echo '--- no signatures without the key'\n"
        for statement in ("UPDATE csr SET rejected = false", "DELETE FROM certificate", MADE_UP):
            script += (
                f"sql {shlex.quote(statement)} 2>&1 | grep -o 'permission denied for table [a-z]*' | tail -n 1\n"
            )
    said = walk(tmp_path, tree, packages, script + AFTER, database)
    expected = SAYS.format(keys="".join(keys_of(keys)))
    if database == "postgresql":
        expected += "--- PostgreSQL starts again\n200\n--- no signatures without the key\n"
        expected += "".join(f"permission denied for table {name}\n" for name in ("csr", "certificate", "certificate"))
    out = (tmp_path / "control/out").read_text()
    assert out[out.index("--- the database") :] == expected
    assert "\naccesslog: 2500 rows deleted that were older than 30 days\n" in out
    assert said.count(" new certificate, ") == (4 if database == "sqlite" else 2)
    assert (tmp_path / "control/readable").read_text() == ""
    assert (tmp_path / "control/spied").read_text() == "watching\n/tmp/canary\n"


def keys_of(line: str) -> list[str]:
    """A line with alternatives in braces, as the shell has them, as lines."""
    match = re.search(r"\{(.*)\}", line)
    return [line.replace(match[0], word) for word in match[1].split(",")] if match else [line]


#: What 1.0.0's page had.
OLD_UNIT = """[Unit]
Description=Caramel
After=network.target

[Service]
ExecStart=/opt/caramel/bin/pserve /etc/caramel/caramel.ini
Restart=on-failure

DynamicUser=yes
User=caramel
StateDirectory=caramel-server
StateDirectoryMode=0700
UMask=0077

[Install]
WantedBy=multi-user.target
"""


@slow
@needs("nspawn", "mmdebstrap", "debian-tools")
def test_a_server_of_the_first_release_goes_on_and_what_cant_be_made_again_outlives_the_package(
    tmp_path: Path, tree: Path, packages: Path
) -> None:
    page = PAGE.read_text()
    (ini,) = re.findall(r"^```ini\n(\[app:main\]\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ini = re.sub(r"(?ms)^filter-with.*?$|^\[filter:.*?(?=^\[)", "", ini)
    (subject,) = set(re.findall(r"\(umask 077; (printf .*) \| /opt/caramel/bin/caramel_ca ", page))
    script = (
        "mkdir -p /etc/caramel /var/lib/caramel-server\n"
        f"cat >/etc/caramel/caramel.ini <<'END'\n{ini}END\n"
        f"cat >/etc/systemd/system/caramel.service <<'END'\n{OLD_UNIT}END\n"
        "umask 077\n"
        f"{subject} | /opt/caramel/bin/caramel_ca /etc/caramel/caramel.ini\n"
        "chmod 644 /etc/caramel/ca.crt /etc/caramel/caramel.ini\n"
        "/opt/caramel/bin/caramel_initialize_db /etc/caramel/caramel.ini\n"
        "umask 022\n"
        "systemctl daemon-reload\nsystemctl enable --now caramel\n"
        "until curl -s http://127.0.0.1:6543/root.crt >/dev/null; do sleep 0.2; done\n"
        "test -L /var/lib/caramel-server\n"
        f"{commands('sh upgrade')}"
        "echo '--- after'\n"
        "curl -sS http://127.0.0.1:6543/root.crt | cmp - /etc/caramel/ca.crt\n"
        "stat -c '%U %G %a %n' /var/lib/caramel-server /var/lib/caramel-server/caramel.sqlite /etc/caramel/ca.key\n"
        "stat -c '%U' /proc/$(systemctl show -P MainPID caramel)\n"
        "systemctl start caramel-refresh caramel-clean caramel-accesslog\n"
        "systemctl show -P FragmentPath caramel\n"
        "echo '--- without it'\n"
        "apt-get purge -y caramel-embedded-server | grep ^caramel\n"
        "systemctl is-active caramel caramel-refresh.timer || :\n"
        "ls /etc/caramel/ca.key /var/lib/caramel-server/caramel.sqlite\n"
        ": >done\n"
    )
    walk(tmp_path, tree, packages, script, "sqlite")
    out = (tmp_path / "control/out").read_text()
    assert out[out.index("--- after") :] == (
        "--- after\n"
        "caramel caramel 2770 /var/lib/caramel-server\n"
        "caramel caramel 660 /var/lib/caramel-server/caramel.sqlite\n"
        "root caramel-ca 640 /etc/caramel/ca.key\n"
        "caramel\n"
        "/lib/systemd/system/caramel.service\n"
        "--- without it\n"
        "caramel-embedded-server: left in place: /etc/caramel\n"
        "caramel-embedded-server: left in place: /var/lib/caramel-server\n"
        "inactive\ninactive\n"
        "/etc/caramel/ca.key\n/var/lib/caramel-server/caramel.sqlite\n"
    )
