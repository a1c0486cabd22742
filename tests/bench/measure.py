# SPDX-License-Identifier: MIT OR Apache-2.0
"""What one check costs: this program, what people use today, and two floors, all against one real server.

`make bench` starts this; `make bench BENCH_ROUNDS=3` for a look. It starts the real Caramel server behind a real
nginx, with a CA of 4096 bits, gives each program the same identity, and hands what it saw to `report.py`, which
writes build/bench/bench.md. It needs nginx, curl and strace; its traffic stays on the loopback interface, and the
machine should do nothing else. docs/bench.md is a report that was made of it by hand; what that says of 1.0.0 and
of the second flush was asked once, and the history has those programs.

Turns: one round is one run of each program in each state, and every round begins with another program, so that a
busy machine is as busy for all of them. With `BENCH_ROUNDS=15` there are 45 without delay, and 5 at each of the
other round trips. The state is put back before each run, and a run with another exit status than it should have
ends the benchmark. Figures are medians, with the bounds of the middle half; ratios are medians of the ratios of
runs of the same round.

Processor time, peak memory and wall time are wait4(2)'s, with all that the run started (`spawner.py`). Round
trips, bytes and connections are counted by a proxy between program and nginx (`proxy.py`): a round trip for TCP's
handshake and each time the server speaks after the device; bytes are TCP's payload. System calls, bytes written
and flushes are of one run under strace, of those that end by themselves. What is elliptic is measured with a real
registration authority (`elliptic.py`), and what a key in a TPM costs by `make bench-keys` (`keys.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import marshal
import os
import platform
import re
import select
import shutil
import signal
import ssl
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import Any, Callable, ClassVar

import world
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from bench import elliptic, records, report
from bench.filtered import FilteredCaramel, MeteredNginx
from bench.proxy import DelayingProxy, Traffic, medians

HERE = Path(__file__).resolve().parent

STATES = ("unchanged", "locked out", "pending", "renewed", "first enrollment")
#: Seconds there and back, and how many of the rounds are made at that distance. Most of them at none, where processor
#: times are compared: of a machine that shares its processor, 15 ratios have a median that is off by some percent.
DISTANCES = ((0.0, 3.0), (0.1, 0.34), (0.6, 0.34))
#: The longest that a single run may take, in seconds.
PATIENCE = 60.0
CLIENT_ID = "fffbeec0ffee"


# --- One run ------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """What one run cost: seconds of wall and processor time, KiB of memory, and what went over the wire."""

    status: int
    wall: float
    cpu: float
    memory: int
    traffic: Traffic


class Spawner:
    """The small process that starts the programs; see spawner.py. `python` may be one in a tree, `world.in_tree`."""

    def __init__(self, folder: Path, python: Sequence[str] = (sys.executable,)) -> None:
        self.output = folder / "output"
        # Not one of the environments: what those install is read by `site`, and this runs without it.
        command = [*python, "-I", "-S", str(HERE / "spawner.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=world.die_with_parent
        )

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)

    def run(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        idle: Callable[[], bool] | None = None,
    ) -> tuple[int, float, float, int]:
        """Exit status, wall time, processor time (seconds), peak memory (KiB). What is `idle` gets a
        SIGINT."""
        assert self._process.stdin and self._process.stdout
        marshal.dump((list(command), dict(env), str(folder), str(self.output)), self._process.stdin)
        self._process.stdin.flush()
        child = marshal.load(self._process.stdout)
        deadline = time.monotonic() + PATIENCE
        while not select.select([self._process.stdout], [], [], 0.05 if idle else PATIENCE)[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            elif idle and idle():
                os.kill(child, signal.SIGINT)
                idle = None
        status, wall, user, system, memory = marshal.load(self._process.stdout)
        return os.waitstatus_to_exitcode(status), wall, user + system, memory


# --- The server, and the states that a device can find it in ------------------------------------------------


@dataclass
class Identity:
    """A device's key and request, and the certificates that the server has signed for it, oldest first."""

    client_id: str
    key: Any
    request: bytes
    certificates: list[bytes] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.request).hexdigest()

    def file(self, certificate: int | None = None) -> bytes:
        """What the combined file holds, with one of the certificates."""
        pem = b"" if certificate is None else self.certificates[certificate]
        return world.key_file_content(self.key, self.request, pem)

    def sealed(self, ca: Path, certificate: int | None = None) -> bytes:
        """The same with the line of text that this program puts in front of what it has judged good."""
        return world.sealed(self.file(certificate), ca.read_bytes(), self.client_id)

    def not_before(self, certificate: int) -> int:
        loaded = x509.load_pem_x509_certificate(self.certificates[certificate])
        return int(loaded.not_valid_before_utc.timestamp())


class Stage:
    """A Caramel server behind nginx, and the two devices that it knows: one with two certificates, one still
    unsigned."""

    def __init__(self, folder: Path, caramel: world.Caramel, nginx: world.Nginx) -> None:
        self.folder = folder
        self.caramel, self.nginx = caramel, nginx
        self.known = self.enroll(CLIENT_ID)
        for hours in (48, 72):  # of two the server hands out the one that ends last
            caramel.sign(self.known.sha256, hours=hours)
        self.known.certificates = caramel.certificates(self.known.sha256)
        self.pending = self.enroll("fffbeec0ffed")
        #: The modification time that goes with the newest certificate, once the server has said one.
        self.modified = self.known.not_before(1)

    @property
    def ca(self) -> Path:
        return self.caramel.authority.certificate_file

    @property
    def port(self) -> int:
        return self.nginx.port

    def enroll(self, client_id: str) -> Identity:
        key = world.new_key()
        request = world.signing_request(key, self.caramel.authority.subject_for(client_id))
        device = Identity(client_id, key, request)
        with urllib.request.urlopen(f"{self.caramel.url}/{device.sha256}", request, timeout=30):
            pass
        return device

    def settle(self) -> None:
        """Waits until the server gives the newest certificate a date, and remembers it."""

        def dated() -> str | None:
            with urllib.request.urlopen(f"{self.caramel.url}/{self.known.sha256}", timeout=30) as answer:
                said: str | None = answer.headers["Last-Modified"]
            return said

        date = world.until("the server says Last-Modified", dated, pause=0.2)
        self.modified = int(parsedate_to_datetime(str(date)).timestamp())


# --- The programs -------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """All that a program needs to know for one run."""

    stage: Stage
    server: str
    state: str
    folder: Path
    client_id: str = CLIENT_ID

    @property
    def identity(self) -> Path:
        return self.folder / "identity.pem"

    @property
    def ca(self) -> str:
        return str(self.stage.ca)

    def place(self, sealed: bool = False) -> None:
        """Puts the device's combined file into the state that the run shall find.

        `sealed`: with the line of text in front, as this program leaves it; else as everybody else does.
        """
        known, pending = self.stage.known, self.stage.pending
        if self.state == "first enrollment":
            self.identity.unlink(missing_ok=True)
            return
        device, certificate, modified = {
            "unchanged": (known, 1, self.stage.modified),
            "locked out": (known, 1, self.stage.modified),
            "renewed": (known, 0, known.not_before(0)),
            "pending": (pending, None, int(time.time())),
        }[self.state]
        content = device.sealed(self.stage.ca, certificate) if sealed else device.file(certificate)
        self.identity.write_bytes(content)
        self.identity.chmod(0o600)
        os.utime(self.identity, (modified, modified))


class Program:
    """One of those that are measured. `statuses` says how it ends in the states that it knows."""

    name = ""
    statuses: ClassVar[Mapping[str, int]] = {}
    #: States in which it waits for ever, and is ended with SIGINT when it has nothing more to say.
    waits: ClassVar[Sequence[str]] = ()
    #: Whether it is nobody's choice, only there to tell where the time goes: not measured over long distances.
    probe: ClassVar[bool] = False

    def command(self, setting: Setting) -> tuple[list[str], dict[str, str]]:
        raise NotImplementedError

    def place(self, setting: Setting) -> None:
        setting.place()


class Command(Program):
    """This program."""

    sealed: ClassVar[bool] = True

    statuses: ClassVar[Mapping[str, int]] = {
        "unchanged": 0,
        "locked out": 1,
        "pending": 69,
        "renewed": 0,
        "first enrollment": 69,
    }

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def command(self, setting: Setting) -> tuple[list[str], dict[str, str]]:
        # As a device runs it: settings from the environment, as a unit's EnvironmentFile= or an init script
        # gives them.
        return [str(self.path)], {
            "CARAMEL_CA": setting.server,
            "CARAMEL_CA_CERT": setting.ca,
            "CARAMEL_KEY_FILE": str(setting.identity),
            "CARAMEL_CN": setting.client_id,
        }

    def place(self, setting: Setting) -> None:
        setting.place(self.sealed)


class WithoutStarter(Command):
    """This program without the shell that stays as its parent: what that shell costs."""

    statuses: ClassVar[Mapping[str, int]] = {"unchanged": 0, "locked out": 1}
    probe = True

    def command(self, setting: Setting) -> tuple[list[str], dict[str, str]]:
        return list(world.WITHOUT_STARTER), super().command(setting)[1]


class CurlScript(Command):
    """A shell script around curl and openssl: the same statuses, the same environment."""

    sealed = False

    def command(self, setting: Setting) -> tuple[list[str], dict[str, str]]:
        return [_which("sh"), str(self.path)], super().command(setting)[1]


class PythonClient(Program):
    """`caramel-client` from PyPI: files named after the device and the server, in the folder where it is
    started."""

    name = "caramel-client 1.5.3"
    statuses: ClassVar[Mapping[str, int]] = {
        "unchanged": 0,
        "pending": 1,
        "renewed": 0,
        "first enrollment": 1,
    }
    waits = ("pending", "first enrollment")

    def command(self, setting: Setting) -> tuple[list[str], dict[str, str]]:
        program = world.BUILD / "bench" / "client" / "bin"
        return [
            str(program / "python"),
            str(program / "caramel-client"),
            setting.server,
            setting.client_id,
        ], {}

    def place(self, setting: Setting) -> None:
        for file in setting.folder.iterdir():
            file.unlink()
        shutil.copyfile(setting.ca, setting.folder / f"{setting.server}.cacert")
        if setting.state == "first enrollment":
            return
        device = setting.stage.pending if setting.state == "pending" else setting.stage.known
        setting.client_id = device.client_id
        base = setting.folder / device.client_id
        base.with_suffix(".key").write_bytes(world.private_pem(device.key))
        base.with_suffix(".csr").write_bytes(device.request)
        if setting.state != "pending":
            newest = setting.state == "unchanged"
            base.with_suffix(".crt").write_bytes(device.certificates[newest])


class Urllib3(Program):
    """The floor: one request, by hand."""

    name = "urllib3 floor"
    statuses: ClassVar[Mapping[str, int]] = {"unchanged": 0, "pending": 0}

    def command(self, setting: Setting) -> tuple[list[str], dict[str, str]]:
        pending = setting.state == "pending"
        device = setting.stage.pending if pending else setting.stage.known
        since = formatdate(setting.identity.stat().st_mtime, usegmt=True)
        identity = "" if pending else str(setting.identity)
        python = str(world.BUILD / "bench" / "urllib3" / "bin" / "python")
        url = f"https://{setting.server}/{device.sha256}"
        return [python, str(HERE / "floor.py"), url, setting.ca, identity, since], {}


class Bare(Program):
    """The other floor: an interpreter that does nothing, the one that this program runs with."""

    name = "bare interpreter"
    statuses: ClassVar[Mapping[str, int]] = {"unchanged": 0, "locked out": 0}
    probe = True
    code = "pass"

    def command(self, setting: Setting) -> tuple[list[str], dict[str, str]]:
        python = world.BUILD / "venv" / "bin" / "python"
        return [str(python if python.exists() else sys.executable), "-c", self.code], {}


class Fasteners(Bare):
    """The least that a run with this lock can cost."""

    name = "fasteners, imported alone"
    statuses: ClassVar[Mapping[str, int]] = {"locked out": 0}
    code = "import fasteners"


def _which(program: str) -> str:
    found = shutil.which(program)
    if not found:
        raise SystemExit(f"bench: {program} is not installed")
    return found


def programs(folder: Path, authority: world.Authority) -> list[Program]:
    """Those that can be measured here; what is missing is said."""
    command = world.BUILD / "venv" / "bin" / "caramel-embedded"
    found: list[Program] = []
    if command.exists():
        found.append(Command("caramel-embedded", command))
        packed = zipapp(folder / "caramel-embedded.pyz", authority)
        if packed:
            found.append(Command("caramel-embedded, zipapp", packed))
        found.append(WithoutStarter("caramel-embedded, no starter", command))
    else:
        print("bench: the program itself is not installed, and so not measured", file=sys.stderr)
    return [
        *found,
        CurlScript("curl and openssl", HERE / "caramel-curl.sh"),
        PythonClient(),
        Urllib3(),
        Bare(),
        Fasteners(),
    ]


def zipapp(path: Path, authority: world.Authority) -> Path | None:
    """The program in one file as `make zipapp` makes it, for the interpreter of the installed one."""
    python = str(world.BUILD / "venv" / "bin" / "python")
    command = [python, "-B", str(world.ROOT / "packaging" / "pyz.py"), "--output", str(path), "--python", python]
    # The libraries inside are the installed one's own.
    packages = next((world.BUILD / "venv").glob("lib/python3*/site-packages"))
    command += ["--packages", str(packages)]
    # What is baked in is what the environment says anyway.
    settings = ["--server", "localhost:443", "--ca-cert", str(authority.certificate_file)]
    done = subprocess.run([*command, *settings], stderr=subprocess.PIPE, check=False, timeout=120)
    if done.returncode:
        print(f"bench: no zipapp: {done.stderr.decode(errors='replace').strip()}", file=sys.stderr)
        return None
    return path


# --- Measuring ----------------------------------------------------------------------------------------------


class Bench:
    """Everything that was started, and everything that was seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spawner = Spawner(folder)
        self.counter = 0
        self.home = folder / "home"
        self.home.mkdir()

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        path = os.environ.get("PATH", "/usr/bin:/bin")
        return {"PATH": path, "LC_ALL": "C.UTF-8", "HOME": str(self.home), **more}

    def setting(self, program: Program, stage: Stage, state: str, server: str) -> Setting:
        folder = self.folder / "devices" / re.sub(r"\W+", "-", program.name)
        folder.mkdir(parents=True, exist_ok=True)
        setting = Setting(stage, server, state, folder)
        if state == "pending":
            setting.client_id = stage.pending.client_id
        elif state == "first enrollment":
            self.counter += 1
            setting.client_id = f"fe{os.getpid() % 65536:04x}{self.counter:06x}"
        program.place(setting)
        return setting

    @contextlib.contextmanager
    def locked(self, setting: Setting) -> Iterator[None]:
        """Another process has the lock, where the state is that."""
        if setting.state != "locked out":
            yield
            return
        with open(setting.identity, "rb") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield

    def run(
        self, program: Program, stage: Stage, state: str, proxy: DelayingProxy, before: Sequence[str] = ()
    ) -> Sample:
        """One run, with its cost; `before`: what stands before the command. A run that ends otherwise than it should
        ends the benchmark: its figures mean nothing."""
        setting = self.setting(program, stage, state, proxy.address)
        command, env = program.command(setting)
        proxy.reset()
        idle = None
        if state in program.waits:
            # Its second GET after the first 404 or 202 comes a quarter of a minute later.
            def idle() -> bool:
                quiet = time.monotonic() - proxy.traffic.last
                return bool(proxy.traffic.last) and quiet > 0.5 + 2 * proxy.round_trip

        line = [*before, *command]
        with self.locked(setting):
            status, wall, cpu, memory = self.spawner.run(line, self.environment(env), setting.folder, idle)
        traffic = proxy.wait()
        if status != program.statuses[state]:
            said = self.spawner.output.read_text(errors="replace")[-2000:]
            raise SystemExit(f"bench: {program.name}, {state}: ended with {status}\n{said}")
        return Sample(status, wall, cpu, memory, traffic)

    def traced(self, program: Program, stage: Stage, state: str, proxy: DelayingProxy) -> dict[str, int]:
        """System calls, and what they did to the file system; from a run under strace(1)."""
        trace = self.folder / "trace"
        strace = [_which("strace"), "-f", "-y", "-qq", "-s", "0", "-o", str(trace)]
        self.run(program, stage, state, proxy, strace)
        return read_trace(trace.read_text(errors="replace"))


#: strace's name of a descriptor of a regular file: a path, and none of a pipe, a socket, a memfd or a device; nor is
#: it the file that takes what a run prints.
_REGULAR = re.compile(r"^\w+\(\d+</(?!dev/|proc/|sys/|memfd:)[^>]*(?<!/output)>")
_FLUSHES = {"fsync", "fdatasync", "sync", "syncfs", "msync", "sync_file_range"}
_CHANGES = re.compile(r"(rename|link|symlink|unlink|mkdir|rmdir|truncate|ftruncate|f?chmod|f?l?chown|utime)")
_WRITES = {"write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range"}


def read_trace(text: str) -> dict[str, int]:
    """Figures of one run from strace's output (`-f -y`): calls, bytes written to files, flushes, other
    changes."""
    seen = {"calls": 0, "bytes": 0, "flushes": 0, "changes": 0}
    begun: dict[str, str] = {}
    for line in text.splitlines():
        process, _, call = line.partition(" ")
        call = call.strip()
        resumed = re.match(r"<\.\.\. \w+ resumed>(.*)", call)
        if resumed:
            call = begun.pop(process, "") + resumed[1]
        elif call.endswith("<unfinished ...>"):
            begun[process] = call[: -len("<unfinished ...>")]
            continue
        if not re.match(r"\w+\(", call):
            continue  # a signal, an exit
        seen["calls"] += 1
        name = call.partition("(")[0]
        result = re.search(r"= (-?\d+)", call[call.rfind(") ") :])
        if not result or int(result[1]) < 0:
            continue
        if name in _WRITES and _REGULAR.match(call):
            seen["bytes"] += int(result[1])
        elif name in _FLUSHES:
            seen["flushes"] += 1
        elif _CHANGES.match(name):
            seen["changes"] += 1
    return seen


def metered(bench: Bench, program: Program, stage: Stage, tries: int = 3) -> dict[str, int]:
    """What an unchanged check puts on the wire; the median of a few runs, because TLS has fields of varying
    length."""
    with DelayingProxy(stage.port, 0.05) as proxy:
        seen = [bench.run(program, stage, "unchanged", proxy).traffic for _ in range(tries)]
    return medians(seen)


def recorded(bench: Bench, program: Program, stage: Stage) -> list[tuple[str, str, int]]:
    """What each record of an unchanged check weighs, behind an nginx that asks for the device's certificate."""
    with DelayingProxy(stage.port, 0.05) as proxy:
        traffic = bench.run(program, stage, "unchanged", proxy).traffic
    return records.weights(bytes(traffic.said_up), bytes(traffic.said_down), True)


def machine() -> dict[str, str]:
    """What the figures were made on, without anything that names it."""
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "processor": f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores",
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}, {platform.machine()}",
        "Python": f"{platform.python_version()}, {ssl.OPENSSL_VERSION}",
        "nginx": _said([world.Nginx.program() or "nginx", "-v"]),
        "curl": _said(["curl", "--version"]),
        "OpenSSL": _said(["openssl", "version"]),
    }


def _said(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=30)
    return done.stdout.decode(errors="replace").partition("\n")[0]


#: What else could stand in the configuration for metered fleets, to see what a line of it saves.
_OPTIONAL, _OF_CLIENTS = "ssl_verify_client optional;", "ssl_client_certificate"
_TICKETS = "ssl_session_tickets off;"
LINES: Mapping[str, Mapping[str, str]] = {
    report.ALL_LINES: {},
    "without: no session tickets": {_TICKETS: ""},
    "without: TLS 1.3 only": {"ssl_protocols TLSv1.3;": "ssl_protocols TLSv1.2;"},
    "without: curves X25519 and P-256 only": {"ssl_ecdh_curve X25519:prime256v1;": ""},
    "without: keep-alive off": {"keepalive_timeout 0;": ""},
    "without: no version in Server": {"server_tokens off;": ""},
    "otherwise: optional_no_ca, without the CA's name": {
        _OPTIONAL: "ssl_verify_client optional_no_ca;",
        _OF_CLIENTS: "ssl_trusted_certificate",
    },
    "otherwise: no ticket at all, `ssl_conf_command NumTickets 0` (nginx 1.19.4)": {
        _TICKETS: f"{_TICKETS} ssl_conf_command NumTickets 0;"
    },
    "otherwise: client certificates not asked for": {
        _OPTIONAL: "ssl_verify_client off;",
        _OF_CLIENTS: "ssl_trusted_certificate",
    },
}


def versions() -> dict[str, str]:
    """What the program says of itself, and with which packages it was measured."""
    python = str(world.BUILD / "venv" / "bin" / "python")
    names = ("caramel-embedded", "urllib3", "fasteners", "pyOpenSSL", "cryptography")
    code = f"from importlib.metadata import version as v; print(*map(v, {names!r}))"
    return dict(zip(names, _said([python, "-I", "-c", code]).split()))


def measure(rounds: int, folder: Path, quick: bool) -> dict[str, Any]:
    """The whole benchmark; returns everything that the reports need, as JSON would have it."""
    authority = world.Authority.by_caramel(folder / "ca")
    contestants = programs(folder, authority)
    distances = [(distance, max(1, round(rounds * share))) for distance, share in DISTANCES]
    if quick:
        distances = distances[:1]
    runs = [(program, state) for program in contestants for state in STATES if state in program.statuses]
    seen: dict[str, Any] = {"machine": machine(), "versions": versions(), "rounds": rounds}
    seen.update({"runs": {}, "ratios": {}, "traces": {}})
    with contextlib.ExitStack() as stack:
        plain_caramel = stack.enter_context(world.Caramel(folder / "plain", authority))
        filtered_caramel = FilteredCaramel(folder / "filtered", authority)
        filtered_caramel.settle = 1.0
        stack.enter_context(filtered_caramel)
        certificate = authority.server()
        # As most stand today: TLS 1.3, session tickets as nginx has them by default, no filter.
        plain_nginx = world.Nginx(folder / "nginx", plain_caramel, certificate, session_tickets=True)
        filtered_nginx = world.Nginx(folder / "nginx-filter", filtered_caramel, certificate, session_tickets=True)
        metered_nginx = MeteredNginx(folder / "nginx-metered", filtered_caramel, certificate)
        stages = []
        for caramel, nginx in (
            (plain_caramel, plain_nginx),
            (filtered_caramel, filtered_nginx),
            (filtered_caramel, metered_nginx),
        ):
            stack.enter_context(nginx)
            stages.append(Stage(folder / nginx.folder.name, caramel, nginx))
        plain, filtered, cheap = stages
        filtered.settle()
        cheap.settle()
        bench = Bench(folder)
        stack.callback(bench.spawner.close)

        proxies = {d: stack.enter_context(DelayingProxy(plain_nginx.port, d)) for d, _ in distances}
        near = proxies[0.0]
        # Warm-up: bytecode, page cache, the server's own caches. And a contestant that fails does so at once.
        for program, state in runs:
            bench.run(program, plain, state, near)
        samples: dict[tuple[str, str, float], list[Sample]] = {}
        for distance, count in distances:
            for turn in range(count):
                for state in STATES:
                    fitting = [program for program in contestants if state in program.statuses]
                    # Whoever comes first finds the caches as the last one left them: so it is another one
                    # each time.
                    for program in fitting[turn % len(fitting) :] + fitting[: turn % len(fitting)]:
                        if distance and (state in program.waits or program.probe or state == "locked out"):
                            continue  # no wall time of its own, or no network
                        sample = bench.run(program, plain, state, proxies[distance])
                        samples.setdefault((program.name, state, distance), []).append(sample)
                say(f"{distance:g} s round trip, round {turn + 1} of {count}")
        for state in STATES:
            floor = samples.get((Bare.name if state == "locked out" else Urllib3.name, state, 0.0))
            for program in contestants:
                several = samples.get((program.name, state, 0.0))
                if floor and several:
                    # Of the same round, seconds apart: a busy machine was as busy for both.
                    ratios = [one.cpu / other.cpu for one, other in zip(several, floor)]
                    seen["ratios"].setdefault(state, {})[program.name] = statistics.median(ratios)
        for (name, state, distance), several in samples.items():
            seen["runs"].setdefault(state, {}).setdefault(name, {})[f"{distance:g}"] = summary(several)

        for program, state in runs:
            if state not in program.waits:
                seen["traces"].setdefault(state, {})[program.name] = bench.traced(program, plain, state, near)
        say("system calls")

        online = [p for p in contestants if "unchanged" in p.statuses and not p.probe]
        seen["wire"] = {
            name: {program.name: metered(bench, program, stage) for program in online}
            for name, stage in (("plain", plain), ("filter", filtered), ("metered", cheap))
        }
        say("bytes on the wire")
        ours = online[0]
        if isinstance(ours, Command) and elliptic.COMMAND.exists():
            seen["elliptic"] = elliptic.measure(str(ours.path), folder / "authority")
            seen["records"] = recorded(bench, ours, cheap)
            say("everything elliptic")

        def served(certificate: Path, lines: Mapping[str, str]) -> dict[str, int]:
            metered_nginx.certificate, metered_nginx.lines = certificate, lines
            metered_nginx.restart()
            return metered(bench, ours, cheap)

        seen["lines"] = {name: served(certificate, lines) for name, lines in LINES.items()}
        with_root = folder / "with-root.pem"
        with_root.write_bytes(certificate.read_bytes() + authority.pem)
        seen["lines"]["without: the server's certificate alone"] = served(with_root, {})
        seen["lines"]["otherwise: an elliptic key for the server"] = served(small_server(authority), {})
    return seen


def say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def small_server(authority: world.Authority) -> Path:
    """A server certificate of this authority for an elliptic key, which Caramel's own tool can't sign."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = authority.issue(key.public_key(), authority.subject_for("localhost"), names=["localhost"])
    path = authority.folder / "server-ec.pem"
    path.write_bytes(pem + world.private_pem(key))
    return path


def summary(several: Sequence[Sample]) -> dict[str, Any]:
    """Medians, and the middle half's bounds where the spread says something. Times in milliseconds, memory in
    MiB."""

    def spread(values: Sequence[float]) -> list[float]:
        ordered = sorted(values)
        if len(ordered) < 3:
            return [ordered[0], statistics.median(ordered), ordered[-1]]
        low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return [round(low, 3), round(middle, 3), round(high, 3)]

    return {
        "count": len(several),
        "cpu": spread([1000 * one.cpu for one in several]),
        "wall": spread([1000 * one.wall for one in several]),
        "memory": spread([one.memory / 1024 for one in several]),
        **medians([one.traffic for one in several]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What one check costs, side by side with what people use today.")
    parser.add_argument("--quick", action="store_true", help="no long distances; to see that it works")
    options = parser.parse_args()
    # A shell's job in the background ignores it (POSIX, 2.11), and so would the programs that are ended with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rounds = max(1, min(200, int(os.environ.get("BENCH_ROUNDS") or 15)))
    folder = world.BUILD / "bench" / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    seen = measure(rounds, folder, options.quick)
    seen["seconds"] = round(time.monotonic() - started)
    figures, page = folder.parent / "figures.json", folder.parent / "bench.md"
    figures.write_text(json.dumps(seen, indent=1))
    page.write_text(report.page(seen))
    print(report.targets(seen))
    print(f"\nWritten: {page} (from {figures})")


if __name__ == "__main__":
    main()
