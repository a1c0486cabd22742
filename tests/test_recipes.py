"""docs/recipes.md: each recipe with the real programs, from no identity at all through a renewal.

Nobody starts or restarts anything by hand: the hook does. What counts is which certificate the other side sees.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
import world
from needs import require, slow
from recipes import ID, PATH, Machine, Place, Section, Tap
from world import Authority, Caramel, TlsFront

Start = Callable[[str], Place]


@pytest.fixture(scope="module")
def address(caramel: Caramel) -> Iterator[str]:
    with TlsFront(caramel, caramel.authority.server(file="recipes.pem")) as front:
        yield front.address


@pytest.fixture
def start(caramel: Caramel, address: str) -> Iterator[Start]:
    """Makes the place of a recipe, which is gone after the test."""
    places: list[Place] = []
    # pytest's own folders are closed to the users that servers run as.
    folder = Path(tempfile.mkdtemp(prefix="recipe-"))
    folder.chmod(0o755)

    def make(heading: str) -> Place:
        places.append(Place(folder, heading, address, caramel))
        return places[-1]

    try:
        yield make
    finally:
        for place in places:
            place.stop()
            print(place.device.log() + place.server.log())
        shutil.rmtree(folder, ignore_errors=True)


@slow
def test_rsyslog(start: Start) -> None:
    require("rsyslogd", "logger")
    place, port = start("Log upload: rsyslog"), world.free_port()
    with Tap(port) as tap:
        place.say({"logs.example.com": "localhost", "2514": tap.port}, server={"2514": port})
        more = 'global(workDirectory="/var/")\ninclude(file="/etc/rsyslog.d/*.conf")\n'
        place.server.write("/etc/rsyslog.conf", more + '*.* action(type="omfile" file="/var/log/received")\n')
        received = place.server.write("/var/log/received", "")
        place.device.write(
            "/etc/rsyslog.conf",
            'module(load="imuxsock" SysSock.Use="off")\ninput(type="imuxsock" Socket="/var/socket")\n' + more,
        )
        for machine, env in ((place.server, {}), (place.device, place.tls_1_2)):
            machine.service("rsyslog", "rsyslogd", "-n", "-iNONE", "-f", machine.folder / "etc/rsyslog.conf", **env)
        place.enroll()
        world.until("rsyslog listens", (place.device.folder / "var/socket").exists)

        def arrives(text: str) -> None:
            # What went into a dead connection goes out again with the next line, as soon as a new one can be had.
            place.device.sh(f"logger --socket /var/socket {text}")
            world.until(
                f"{text} arrives",
                lambda: place.device.sh("logger --socket /var/socket next") or text in received.read_text(),
                pause=0.3,
            )

        arrives("hello-1")
        assert place.device.certificate in tap.seen
        place.device.renew()
        arrives("hello-2")
        assert place.device.certificate in tap.seen
        place.server.renew()
        place.until_shown(port)
        arrives("hello-3")
        # Somebody without a certificate by the CA is told to go.
        assert not place.welcomes_anybody(port)


@slow
def test_postgresql(start: Start) -> None:
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    require("psql", "openssl", "postgresql")
    place, port = start("A database: PostgreSQL"), world.free_port()
    place.say({"db.example.com": f"localhost port={port}"})
    folder, server = binaries[-1], place.server
    data, etc = server.folder / "data", server.folder / "etc/postgresql/15/main"
    server.sh(f"install -d -m 700 {server.owned('postgres')} data")
    server.sh(server.as_user("postgres", f"{folder}/initdb --no-sync -A trust -U postgres -D {data}"))
    config = server.write("/etc/postgresql/15/main/postgresql.conf", "include_dir 'conf.d'\nfsync = off\n")
    with open(etc / "pg_hba.conf", "a") as hba:
        # As Debian has them, and without the page's line above them nobody gets in.
        hba.write(
            "local all postgres trust\nhost all all 127.0.0.1/32 scram-sha-256\nhost all all ::1/128 scram-sha-256\n"
        )
    server.service(
        "postgresql@15-main",
        *(folder / "postgres", "-D", data, f"--config_file={config}", f"--hba_file={etc}/pg_hba.conf"),
        *("-p", str(port), "-k", data, "-c", "listen_addresses=127.0.0.1"),
        user="postgres",
        stop="INT",
    )
    place.enroll()
    place.until_shown(port, "-starttls", "postgres")
    owner = f"-h {data} -p {port} -U postgres"
    for command in (*map(place.section.command, ("createdb", "createuser")), "createuser other"):
        server.sh(command.replace(" ", f" {owner} ", 1))

    client = place.device.section.command("psql")
    assert ID in place.device.sh(client)
    assert "authentication failed" in place.device.sh(client.replace(f"user={ID}", "user=other"), check=False)
    assert "requires a valid client certificate" in place.device.sh(
        client.replace("sslcert=/var/lib/caramel/identity.pem", "sslcert=/none"), check=False
    )
    serial = client.replace(
        "SELECT current_user", "SELECT client_serial FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    )
    assert str(place.device.serial_number) in place.device.sh(serial)
    place.device.renew()
    assert str(place.device.serial_number) in place.device.sh(serial)
    server.renew()
    place.until_shown(port, "-starttls", "postgres")
    assert ID in place.device.sh(client)


@slow
def test_mariadb(start: Start) -> None:
    require("mariadbd", "mariadb", "mariadb-install-db", "openssl")
    place, port = start("A database: MariaDB"), world.free_port()
    server, device = place.server, place.device
    place.say({"-h db.example.com": f"-h localhost --protocol=tcp -P {port}"})
    server.sh(f"install -d -m 700 {server.owned('mysql')} data; install -d -m 755 {server.owned('mysql')} run")
    conf = server.write(
        "/etc/mysql/my.cnf",
        f"[client]\nsocket = {server.folder}/run/s\n[mariadbd]\nsocket = {server.folder}/run/s\nport = {port}\n"
        f"datadir = {server.folder}/data\npid-file = {server.folder}/run/pid\nbind-address = 127.0.0.1\n"
        "!includedir /etc/mysql/mariadb.conf.d/\n",
    )
    options = "--no-defaults --skip-test-db --skip-name-resolve --auth-root-authentication-method=normal"
    server.sh(server.as_user("mysql", f"mariadb-install-db {options} --datadir={server.folder}/data"))
    server.service("mariadb", "mariadbd", f"--defaults-file={conf}", user="mysql")
    for name in ("mariadb", "mariadb-admin"):
        server.program(name, f'exec /usr/bin/{name} --defaults-file={conf} -u root "$@"')
    place.enroll()
    starttls = ("-starttls", "mysql")
    place.until_shown(port, *starttls)

    subject = device.sh(device.section.command("openssl")).partition("subject=")[2].strip().replace("\\", "\\\\")
    create = device.section.command("CREATE USER fffb").replace("...", subject)
    server.sh(f"mariadb <<'END'\n{create}\n{create.replace(ID, 'other')}\nEND\n")
    client = device.section.command("mariadb -h")
    assert f"{ID}@%" in device.sh(client)
    assert "Access denied" in device.sh(client.replace(f"-u {ID}", "-u other"), check=False)
    without = re.sub(r"--ssl-(cert|key)=\S+", "", client)
    assert "Access denied" in device.sh(without, check=False)
    with Tap(port) as tap:
        usual, device.words = device.words, {"-h db.example.com": f"-h localhost --protocol=tcp -P {tap.port}"}
        for _ in range(2):
            device.sh(client, env=place.tls_1_2)
            assert device.certificate in tap.seen
            device.renew()
    device.words = usual
    server.renew()
    place.until_shown(port, *starttls)
    assert f"{ID}@%" in device.sh(client)


@slow
def test_zabbix(start: Start) -> None:
    require("zabbix_agent2", "zabbix_get", "openssl")
    # The agent takes no port above this, and the kernel hands out higher ones.
    place, port = start("Monitoring: Zabbix agent 2"), random.randrange(20000, 32768)
    device, server = place.device, place.server
    place.say({f"-s {ID}.example.com": f"-s 127.0.0.1 -p {port}"})
    conf = device.write(
        "/etc/zabbix/zabbix_agent2.conf",
        f"ListenIP=127.0.0.1\nListenPort={port}\nServer=127.0.0.1\nHostname={ID}\nLogType=console\n"
        f"ControlSocket={device.folder}/run/agent.sock\nPluginSocket={device.folder}/run/plugin.sock\n"
        "Include=/etc/zabbix/zabbix_agent2.d/*.conf\n",
    )
    device.sh(f"install -d -m 755 {device.owned('zabbix')} run")
    device.service("zabbix-agent2", "zabbix_agent2", "-foreground", "-c", conf, user="zabbix")
    place.enroll()
    get = server.section.command("zabbix_get")
    for _ in range(2):
        world.until("it answers", lambda: server.sh(get, check=False).strip() == "1", pause=0.2)
        assert place.shown(port, by=server) == device.certificate
        device.renew()
        world.until("it shows its certificate", lambda: place.shown(port, by=server) == device.certificate, pause=0.2)
    assert server.sh(re.sub(r"--tls.*", "", get), check=False).strip() != "1"
    assert not place.welcomes_anybody(port)


@slow
def test_an_api(start: Start) -> None:
    require("nginx", "curl", "openssl")
    place, port, plain = (
        start("An API: nginx in front, Python and curl as clients"),
        world.free_port(),
        world.free_port(),
    )
    device, server = place.device, place.server
    place.say(
        {"api.example.com": f"localhost:{port}", "listen 443": f"listen 127.0.0.1:{port}", ":8000": f":{plain}"}
    )
    conf = server.write(
        "/etc/nginx/nginx.conf",
        f"daemon off; error_log stderr; pid nginx.pid; {'user nobody nogroup;' if os.getuid() == 0 else ''}\n"
        "events {}\nhttp { access_log off; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f;\n"
        "uwsgi_temp_path u; scgi_temp_path s; include /etc/nginx/conf.d/*.conf; }\n",
    )
    server.service("nginx", "nginx", "-p", server.folder, "-e", "stderr", "-c", conf)
    with Application(plain):
        place.enroll()
        place.until_shown(port)
        curl = device.section.command("curl")
        assert device.sh(curl) == f"hello {ID}\n"
        assert "400 No required SSL certificate" in device.sh(re.sub(r"--cert \S+", "", curl))
        forged = device.sh(f"{curl} -H 'X-Device: CN=somebody'")
        assert forged == f"hello {ID}\n"
        context = ssl.create_default_context(cafile=str(place.ca.certificate_file))
        for _ in range(2):
            exec(device.here(device.section.command("context.load_cert_chain")), {"context": context})
            with urllib.request.urlopen(f"https://localhost:{port}/", context=context, timeout=20) as answer:
                assert answer.read().decode() == f"hello {ID}\n"
            device.renew()
            with Tap(port) as tap:
                device.sh(curl.replace("api.example.com", f"localhost:{tap.port}"), env=place.tls_1_2)
                assert device.certificate in tap.seen
        before = server.pid("nginx")
        server.renew()
        place.until_shown(port)
        assert server.pid("nginx") == before, "reloaded, not restarted"
        assert device.sh(curl) == f"hello {ID}\n"


class Application(world.Service):
    """An application behind a TLS front: greets the device that the front names."""

    def __init__(self, port: int) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                cn = [re.sub(r".*CN=|,.*", "", value) for value in self.headers.get_all("X-Device", [])]
                body = f"hello {', '.join(cn)}\n".encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@slow
def test_mosquitto_as_broker(start: Start) -> None:
    require("mosquitto", "mosquitto_pub", "mosquitto_sub", "openssl")
    place, port = start("MQTT: mosquitto as broker"), world.free_port()
    device, server = place.device, place.server
    place.say(
        {"mqtt.example.com": "localhost", "-p 8883": f"-p {port}", "listener 8883": f"listener {port} 127.0.0.1"}
    )
    conf = server.write("/etc/mosquitto/mosquitto.conf", "include_dir /etc/mosquitto/conf.d\n")
    server.service("mosquitto", "mosquitto", "-c", conf)
    place.enroll()
    place.until_shown(port)
    publish = device.section.command("mosquitto_pub")
    subscribe = publish.replace("mosquitto_pub", "mosquitto_sub").replace("/hello -m hello", "/# -C 1 -W 20 -F %t:%p")

    def round_trip() -> None:
        device.sh(f"{publish} -r")
        assert device.sh(subscribe).strip() == f"devices/{ID}/hello:hello"

    round_trip()
    assert "Error" in device.sh(re.sub(r"--(cert|key) \S+", "", publish), check=False)
    # Another device's topics are closed.
    device.sh(publish.replace(f"devices/{ID}", "devices/other") + " -r")
    other = subscribe.replace(f"devices/{ID}", "devices/other").replace("-W 20", "-W 1")
    assert "hello" not in device.sh(other, check=False)
    with Tap(port) as tap:
        device.renew()
        device.sh(publish.replace("-p 8883", f"-p {tap.port}"), env=place.tls_1_2)
        assert device.certificate in tap.seen
    before = server.pid("mosquitto")
    server.renew()
    place.until_shown(port)
    assert server.pid("mosquitto") == before, "reloaded, not restarted"
    round_trip()


@slow
def test_mosquitto_as_bridge(start: Start) -> None:
    require("mosquitto", "mosquitto_pub", "mosquitto_sub")
    place, port, local = start("MQTT: mosquitto as bridge"), world.free_port(), world.free_port()
    device, server = place.device, place.server
    broker = Section("MQTT: mosquitto as broker")
    with Tap(port) as tap:
        place.say({"mqtt.example.com:8883": f"localhost:{tap.port}", "mosquitto_pub": f"mosquitto_pub -p {local}"})
        server.words = {"listener 8883": f"listener {port} 127.0.0.1"}
        server.adopt(broker)
        include = "include_dir /etc/mosquitto/conf.d\n"
        device.service(
            "mosquitto",
            "mosquitto",
            "-c",
            device.write(
                "/etc/mosquitto/mosquitto.conf", f"listener {local} 127.0.0.1\nallow_anonymous true\n{include}"
            ),
            **place.tls_1_2,
        )
        server.service("mosquitto", "mosquitto", "-c", server.write("/etc/mosquitto/mosquitto.conf", include))
        place.enroll()
        publish = device.section.command("mosquitto_pub")

        def arrives(value: int) -> None:
            """Read with the device's own certificate: the broker shows nobody else's topics."""
            world.until("the local broker listens", lambda: world.listens(local))
            device.sh(publish.replace("21", str(value)) + " -r -q 1")
            seen = (
                f"mosquitto_sub -h localhost -p {port} --cafile /etc/caramel-ca.pem --cert {device.key_file}"
                f" --key {device.key_file} -t 'devices/{ID}/#' -C 1 -W 1 -F %t:%p"
            )
            world.until(
                f"{value} arrives",
                lambda: f"devices/{ID}/temperature:{value}\n" == server.sh(seen, check=False),
                pause=0.1,
            )

        arrives(21)
        assert device.certificate in tap.seen
        device.renew()
        arrives(22)
        tap.cut()
        arrives(23)
        assert device.certificate in tap.seen
        server.renew()
        place.until_shown(port)
        arrives(24)


@contextlib.contextmanager
def asking(device: Machine, *command: str) -> Iterator[Callable[[], str]]:
    """A client program that lives through a renewal: one line in, one line out."""
    line = [device.here(word) for word in command]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=device.environment) as process:
        world.Daemon.running.add(process.pid)
        assert process.stdin and process.stdout

        def ask() -> str:
            assert process.stdin and process.stdout
            process.stdin.write(b"\n")
            process.stdin.flush()
            return process.stdout.readline().decode()

        try:
            yield ask
        finally:
            process.kill()
            process.wait()
            world.Daemon.running.discard(process.pid)


def both_ways(place: Place, port: int, *client: str, reloads: str = "") -> None:
    """A server and a client of our own through a renewal of both, without a restart."""
    device, server = place.device, place.server
    place.enroll()
    server.sh("systemctl reload-or-restart app")
    place.until_shown(port)
    assert not place.welcomes_anybody(port)
    before = server.pid("app")
    with asking(device, *client) as ask:
        for _ in range(2):
            assert ask() == f"hello {ID} {device.serial_number}\n"
            device.renew()
        server.renew()
        place.until_shown(port)
        assert ask() == f"hello {ID} {device.serial_number}\n"
    assert server.pid("app") == before, "the same process"


@slow
def test_go(start: Start) -> None:
    require("go")
    place, port = start("Go, as a server and as a client"), world.free_port()
    place.say({})
    for machine in (place.server, place.device):
        text = (world.ROOT / "tests/recipes/main.go").read_text()
        text = text.replace("SERVER", place.section.command("tls.Config{GetCertificate"))
        text = text.replace("CLIENT", place.section.command("tls.Config{GetClient"))
        machine.write("/srv/app/main.go", text.replace("CALLER", place.section.command("request.TLS")))
        machine.write("/srv/app/go.mod", "module example.com/app\n\ngo 1.19\n")
        # What is compiled anew each time is a minute of the standard library's.
        offline = {
            "GOCACHE": str(world.BUILD / "go"),
            "GOPROXY": "off",
            "GOFLAGS": "-mod=mod",
            "GOTOOLCHAIN": "local",
        }
        machine.sh("cd /srv/app; go build -o app .", env=offline)
    app = place.server.here("/srv/app/app")
    place.server.service("app", app, "server", f"127.0.0.1:{port}", place.ca.certificate_file)
    both_ways(place, port, "/srv/app/app", "client", f"https://localhost:{port}/", str(place.ca.certificate_file))


@slow
def test_nodejs(start: Start) -> None:
    require("node")
    place, port = start("Node.js, as a server and as a client"), world.free_port()
    place.say({})
    text = (world.ROOT / "tests/recipes/main.js").read_text()
    text = text.replace("SERVER(", place.section.command("https.createServer").replace("handler)", ""))
    text = text.replace(
        "CLIENT(", place.section.command("https.get").replace("handler)", "").replace("url", "process.argv[3]")
    )
    for machine in (place.server, place.device):
        machine.write("/srv/app/main.js", text.replace("CALLER", place.section.command("request.socket")))
    place.server.write("/etc/systemd/system/app.service", place.section.command("ExecReload"))
    place.server.service("app", "node", place.server.here("/srv/app/main.js"), "server", str(port))
    both_ways(place, port, "node", "/srv/app/main.js", "client", f"https://localhost:{port}/")


@slow
def test_haproxy(start: Start) -> None:
    require("haproxy", "curl", "openssl")
    place, port, plain, local = start("HAProxy"), *(world.free_port() for _ in range(3))
    device, server = place.device, place.server
    with Tap(port) as tap, Application(plain):
        place.say(
            {
                "api.example.com:443": f"localhost:{tap.port}",
                "api.example.com": "localhost",
                "127.0.0.1:8080": f"127.0.0.1:{local}",
            },
            server={":443": f"127.0.0.1:{port}"},
        )
        who = place.section.command("http-request")
        base = "defaults\n    mode http\n" + "".join(
            f"    timeout {what} 30s\n" for what in ("connect", "client", "server")
        )
        for machine in (server, device):
            file = Path(machine.here("/etc/haproxy/haproxy.cfg"))
            # HAProxy doesn't leave this to OpenSSL's configuration.
            oldest = "global\n    ssl-default-server-options ssl-max-ver TLSv1.2\n" if machine is device else ""
            more = f"    {who}\nbackend application\n    server a 127.0.0.1:{plain}\n" if machine is server else ""
            file.write_text(oldest + base + file.read_text() + more)
            machine.service("haproxy", "haproxy", "-W", "-f", file)
        place.enroll()
        place.until_shown(port)

        def greets() -> bool:
            return device.sh(f"curl -sS http://127.0.0.1:{local}/", check=False) == f"hello {ID}\n"

        world.until("it answers", greets)
        assert not place.welcomes_anybody(port)
        before = device.pid("haproxy"), server.pid("haproxy")
        assert device.certificate in tap.seen
        device.renew()
        world.until("the new certificate is shown", lambda: greets() and device.certificate in tap.seen)
        server.renew()
        place.until_shown(port)
        world.until("it answers", greets)
        assert (device.pid("haproxy"), server.pid("haproxy")) == before, "reloaded, not restarted"


@slow
def test_stunnel(start: Start) -> None:
    require("stunnel4", "mosquitto", "mosquitto_pub", "mosquitto_sub", "openssl")
    place, port, local = start("stunnel"), world.free_port(), world.free_port()
    device, server = place.device, place.server
    with Tap(port) as tap:
        place.say(
            {
                "mqtt.example.com:8883": f"localhost:{tap.port}",
                "mqtt.example.com": "localhost",
                "127.0.0.1:1883": f"127.0.0.1:{local}",
            }
        )
        server.words = {"listener 8883": f"listener {port} 127.0.0.1"}
        server.adopt(Section("MQTT: mosquitto as broker"))
        conf = server.write("/etc/mosquitto/mosquitto.conf", "include_dir /etc/mosquitto/conf.d\n")
        server.service("mosquitto", "mosquitto", "-c", conf)
        device.service("stunnel@mqtt", "stunnel4", device.folder / "etc/stunnel/mqtt.conf", **place.tls_1_2)
        place.enroll()
        place.until_shown(port)

        def works() -> bool:
            line = f"-p {local} -t devices/{ID}/hello"
            device.sh(f"mosquitto_pub {line} -m hello -r -q 1", check=False)
            return device.sh(f"mosquitto_sub {line} -C 1 -W 5", check=False) == "hello\n"

        world.until("it works", works)
        assert device.certificate in tap.seen
        before = device.pid("stunnel@mqtt")
        device.renew()
        world.until("the new certificate is shown", lambda: works() and device.certificate in tap.seen)
        server.renew()
        place.until_shown(port)
        assert works()
        assert device.pid("stunnel@mqtt") == before, "reloaded, not restarted"


@slow
def test_a_program_that_wants_two_files(start: Start) -> None:
    place = start("A program that wants two files")
    device, split = place.device, place.device.folder / "var/lib/caramel/split"
    place.say({})
    device.sh(f"mkdir -p /usr/local/bin; cd {world.ROOT}; {place.section.command('install')}")
    # A program that says which pair it has read.
    app = device.folder / "app"
    device.service("app", "sh", "-c", f"md5sum {split}/*.pem >>{app}; exec sleep 1000")
    device.enroll()
    certificates = []
    for _ in range(2):
        key, certificate = (split / "key.pem").read_bytes(), (split / "cert.pem").read_bytes()
        assert key + certificate in device.key_file.read_bytes()
        assert {(split / name).stat().st_mode & 0o777 for name in ("key.pem", "cert.pem")} == {0o600}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(str(split / "cert.pem"), str(split / "key.pem"))
        assert len(list(split.parent.glob(".split.*"))) == 1, "only the pair of now"
        certificates.append(certificate)
        device.renew()
    assert len(set(certificates)) == 2
    assert device.sh(f"md5sum {split}/*.pem") == "".join(app.read_text().splitlines(keepends=True)[-2:])


SPLIT = world.ROOT / "examples" / "split-identity"

#: In the place of each program that the script calls: the power goes before the call whose turn it is.
CUT = r"""#!/bin/sh
PATH=$USUAL # first of all: what follows is to call no such program
read -r turn <"$COUNT"
echo "$((turn + 1))" >"$COUNT"
[ "$((turn + 1))" != "$AT" ] || kill -9 "-$GROUP"
exec "${0##*/}" "$@"
"""


def identities(authority: Authority, folder: Path) -> list[Path]:
    """Two key files, with different keys."""
    files = []
    for name in ("old", "new"):
        files.append(folder / name)
        files[-1].write_bytes(authority.identity(ID))
        files[-1].chmod(0o640)
    return files


def whose(split: Path, files: list[Path]) -> str:
    """Which of these key files the two files are of."""
    both = (split / "key.pem").read_bytes() + (split / "cert.pem").read_bytes()
    (found,) = [file.name for file in files if both in file.read_bytes()]
    return found


@slow
@pytest.mark.parametrize("shell", ["sh", "busybox"])
def test_power_is_cut_while_two_files_are_made(shell: str, tmp_path: Path, authority: Authority) -> None:
    """Before each program that the script calls; the order of what reaches the disk is the next test's."""
    require("ash" if shell == "busybox" else "dash", "flock")
    line = ["busybox", "sh", str(SPLIT)] if shell == "busybox" else ["sh", str(SPLIT)]
    files = identities(authority, tmp_path)
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in set(re.findall(r"\b(chmod|cp|flock|ln|ls|mkdir|mv|rm|sed|sync)\b", SPLIT.read_text())):
        subprocess.run(["install", "/dev/stdin", str(bin / name)], input=CUT.encode(), check=True)
    count, split = tmp_path / "count", tmp_path / "made" / "split"
    split.parent.mkdir()

    def run(file: Path, at: int = 0) -> int:
        count.write_text("0\n")
        env = {
            "PATH": f"{bin}:{PATH}",
            "USUAL": PATH,
            "COUNT": str(count),
            "AT": str(at),
            "CARAMEL_KEY_FILE": str(file),
        }
        wrapped = ["sh", "-c", 'export GROUP=$$; exec "$@"', "sh", *line, str(split)]
        return subprocess.run(wrapped, env=world.environment(**env), start_new_session=True, timeout=60).returncode

    assert run(files[0]) == run(files[1]) == 0
    calls = int(count.read_text())
    assert calls >= 15
    seen = []
    for at in range(1, calls + 2):
        assert run(files[0]) == 0 and whose(split, files) == "old"
        status = run(files[1], at)
        assert status == (-9 if at <= calls else 0)
        seen.append(whose(split, files))
        assert run(files[1]) == 0 and whose(split, files) == "new"
        assert len(list(split.parent.iterdir())) == 2, "the link and one folder"
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


@pytest.mark.parametrize("system", world.SYSTEMS)
def test_two_files_are_made_with_what_small_systems_have(system: str, tmp_path: Path, authority: Authority) -> None:
    """And however it ends, no folder with a key in it is left behind."""
    require("ash", "flock")
    applets = world.small_system(system, tmp_path / "applets")
    files = identities(authority, tmp_path)
    (tmp_path / "half").write_bytes(files[0].read_bytes().partition(b"-----BEGIN CERT")[0])
    files[0].chmod(0o440)
    split = tmp_path / "made" / "split"
    split.parent.mkdir()
    sync, waits = applets / "sync", b"#!/bin/sh\n: >$0.waits\nexec sleep 1000\n"

    def start(file: Path) -> subprocess.Popen[bytes]:
        env = {"PATH": str(applets), "CARAMEL_KEY_FILE": str(file)}
        return subprocess.Popen([applets / "sh", SPLIT, split], env=env, start_new_session=True)

    assert start(files[0]).wait(60) == 0 and whose(split, files) == "old"
    assert {path.stat().st_mode & 0o777 for path in split.iterdir()} == {0o440}
    assert {path.stat().st_uid for path in split.iterdir()} == {os.getuid()}
    assert start(tmp_path / "half").wait(60) != 0 and start(tmp_path / "missing").wait(60) != 0
    assert len(list(split.parent.iterdir())) == 2, "the link and one folder"
    sync.unlink()
    sync.write_bytes(waits)
    sync.chmod(0o755)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        process = start(files[1])
        world.until("it is at the disk", Path(f"{sync}.waits").exists)
        os.killpg(process.pid, number)
        assert process.wait(60) != 0 and whose(split, files) == "old"
        Path(f"{sync}.waits").unlink()
    sync.write_bytes(b"#!/bin/sh\n")
    assert len(list(split.parent.glob(".split.*"))) == 3, "of the one that was killed"
    assert start(files[1]).wait(60) == 0 and whose(split, files) == "new"
    assert len(list(split.parent.iterdir())) == 2


def test_two_files_are_on_the_disk_before_they_are_named(tmp_path: Path, authority: Authority) -> None:
    require("strace", "flock")
    files = identities(authority, tmp_path)
    split = tmp_path / "made" / "split"
    split.parent.mkdir()
    for file in files:
        subprocess.run(
            ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), "sh", str(SPLIT), str(split)],
            env=world.environment(CARAMEL_KEY_FILE=str(file)),
            check=True,
            timeout=60,
        )
        assert (split / "key.pem").stat().st_mode & 0o777 == 0o640
    steps = []
    for line in (tmp_path / "trace").read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call and re.match(r"(write|chmod|fchmodat|chown|fchownat|symlink)", call[1]) and "made" in line + call[2]:
            steps.append("make")
        elif call and call[1] == "sync":
            steps.append("sync")
        elif call and call[1].startswith("rename") and '/split"' in call[2]:
            steps.append("rename")
        elif call and call[1] in ("unlink", "unlinkat", "rmdir") and re.search(r"key\.pem|cert\.pem", call[2]):
            steps.append("remove")
    order = [step for step, before in zip(steps, [None, *steps]) if step != before]
    assert order == ["make", "sync", "rename", "sync", "remove"], order


@slow
def test_ssh(start: Start, request: pytest.FixtureRequest) -> None:
    require("sshd", "ssh", "ssh-keygen", "stunnel4", "openssl", "wg", "login")
    place, port, tls = start("SSH and WireGuard: what an identity can't do"), world.free_port(), world.free_port()
    device, server = place.device, place.server
    place.say({"ssh.example.com:443": f"localhost:{tls}", "ssh.example.com": "localhost"})
    server.words = {"accept = 443": f"accept = 127.0.0.1:{tls}", "127.0.0.1:22": f"127.0.0.1:{port}"}
    server.configure()
    server.sh("ssh-keygen -q -t ed25519 -N '' -f host")
    keys = server.folder / "authorized_keys"
    conf = server.write(
        "/etc/sshd_config",
        f"ListenAddress 127.0.0.1:{port}\nHostKey {server.folder}/host\nAuthorizedKeysFile {keys}\n"
        "StrictModes no\nUsePAM no\nPidFile none\nPermitRootLogin prohibit-password\nPasswordAuthentication no\n",
    )
    server.service("stunnel@ssh", "stunnel4", server.folder / "etc/stunnel/ssh.conf")
    place.enroll()
    server.sh("systemctl restart stunnel@ssh")
    place.until_shown(tls)
    keys.write_text(device.sh(place.section.command("ssh-keygen")))
    options = (
        f" -p {port} -F none -o BatchMode=yes -o IdentitiesOnly=yes -o StrictHostKeyChecking=no"
        f" -o UserKnownHostsFile={device.folder}/known -o HostKeyAlias=server -o LogLevel=ERROR"
    )
    privileged = Path("/run/sshd")  # which root's sshd wants, and systemd would make
    if os.getuid() == 0 and not privileged.exists():
        privileged.mkdir(mode=0o755)
        request.addfinalizer(privileged.rmdir)
    with world.Daemon([shutil.which("sshd", path=PATH) or "", "-D", "-e", "-f", conf], server.folder / "sshd.log"):
        world.until("sshd listens", lambda: world.listens(port))
        direct = place.section.command("ssh -i") + options + " echo in"
        assert device.sh(direct) == "in\n"
        # What the section is about: the key alone still opens, when the server has long rejected the device.
        shutil.copy(device.key_file, device.folder / "old.pem")
        device.caramel.reject(device.request_hash())
        assert device.check().status == 69
        assert "Permission denied" in device.sh(direct, check=False)
        assert device.sh(direct.replace("/var/lib/caramel/identity.pem", f"{device.folder}/old.pem")) == "in\n"
        # Through TLS, one needs a certificate first.
        through = place.section.command("ssh -o") + options + f" -i {device.folder}/old.pem echo in 2>errors"
        assert device.sh(through.replace("-cert /var/lib/caramel/identity.pem", ""), check=False) == ""
        device.renew()
        assert device.sh(through) == "in\n"
    assert "wg: " in device.sh("wg pubkey </var/lib/caramel/identity.pem", check=False)
