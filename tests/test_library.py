"""The library: the same check as the command's, on values, for an application that keeps its identity elsewhere."""

from __future__ import annotations

import gc
import io
import locale
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional

import pytest
import world
from cryptography import x509
from needs import needs
from world import Answer, Authority, Caramel, Device, Front, HttpRequest, Scripted, answers, hours, now

import caramel_embedded
from caramel_embedded import (
    CaramelError,
    Identity,
    Outcome,
    Refused,
    Unreachable,
    Untrusted,
    UsageError,
    check,
)

ID = "0b6c1a52-94ef-4c6e-9d5b-6f2c8f0e7a31"
EXAMPLES = world.ROOT / "examples"


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="library.pem")


class Signing(Scripted):
    """A server that signs as soon as it has a request, and forgets nothing."""

    def __init__(self, authority: Authority, certificate: Path) -> None:
        super().__init__(certificate, self.says, client_ca=authority.certificate_file)
        self.authority = authority
        self.certificates: dict[str, bytes] = {}
        self.life = 48

    def says(self, asked: HttpRequest) -> Answer:
        if asked.method == "POST":
            self.sign(asked.path, asked.body)
            return answers.PENDING
        known = self.certificates.get(asked.path)
        return answers.certificate(known) if known else answers.UNKNOWN

    def sign(self, path: str, request: bytes) -> None:
        fields = {"not_before": now() - hours(1), "not_after": now() + hours(self.life)}
        self.certificates[path] = self.authority.sign(request, **fields)


@pytest.fixture
def server(authority: Authority, pem: Path) -> Iterator[Signing]:
    with Signing(authority, pem) as signing:
        yield signing


class Application:
    """What an application does around a check: it keeps bytes, and knows what was done with them."""

    def __init__(self, authority: Authority, server: str, client_id: str = ID) -> None:
        self.ca_cert = authority.pem
        self.server = server
        self.client_id = client_id
        self.stored: Optional[bytes] = None
        self.modified: Optional[float] = None
        self.stores: list[Identity] = []

    def store(self, identity: Identity) -> None:
        self.stores.append(identity)
        self.stored, self.modified = bytes(identity), identity.modified

    def check(self, **other: Any) -> Outcome:
        arguments: dict[str, Any] = {
            "server": self.server,
            "ca_cert": self.ca_cert,
            "client_id": self.client_id,
            "stored": self.stored,
            "store": self.store,
            "modified": self.modified,
            "timeout": 20,
        }
        return check(**{**arguments, **other})


@pytest.fixture
def application(authority: Authority, server: Signing) -> Application:
    return Application(authority, server.address)


# --- What it does ---


def test_from_nothing_to_a_certificate_and_on(application: Application, server: Signing) -> None:
    outcome = application.check()
    assert (outcome.certified, outcome.new, outcome.notes) == (True, True, ())
    assert application.stored == bytes(outcome.identity)
    assert [identity.certificate is not None for identity in application.stores] == [False, True]
    assert str(outcome).startswith("new certificate, valid until ")

    application.stores.clear()
    outcome = application.check()
    assert (outcome.certified, outcome.new, application.stores) == (True, False, [])
    assert application.stored == bytes(outcome.identity)

    server.life = 96
    server.sign("/" + outcome.identity.request_hash, outcome.identity.request)
    newer = application.check()
    assert (newer.new, len(application.stores)) == (True, 1)
    assert newer.identity.key == outcome.identity.key and newer.identity.certificate != outcome.identity.certificate
    # A life of 96 hours after one of 48, from a little later on.
    assert newer.not_after and outcome.not_after
    assert 48 * 3600 <= newer.not_after - outcome.not_after < 48 * 3600 + 60


def test_it_speaks_with_the_real_server(caramel: Caramel, front: Front, authority: Authority) -> None:
    application = Application(authority, front.address, str(uuid.uuid4()))
    outcome = application.check()
    assert (outcome.certified, outcome.new, outcome.not_after) == (False, False, None)
    assert str(outcome).startswith(f"request {outcome.identity.request_hash} waits to be signed")
    assert [row.sha256 for row in caramel.requests(application.client_id)] == [outcome.identity.request_hash]
    caramel.sign(application.client_id)
    assert application.check().new
    caramel.reject(application.client_id)
    outcome = application.check()
    assert not outcome.certified and "rejected" in outcome.notes[0] and outcome.notes[0] in str(outcome)
    assert application.stored == bytes(outcome.identity)
    assert len(caramel.requests(application.client_id)) == 2


def test_the_command_and_the_library_keep_the_same_bytes(
    application: Application, authority: Authority, tmp_path: Path
) -> None:
    outcome = application.check()
    device = Device(tmp_path / "device", application.server, authority.certificate_file, ID)
    assert application.stored
    device.has(application.stored)
    os.utime(device.key_file, (outcome.not_after or 0,) * 2)
    before = device.snapshot()
    assert (device.run().status, device.snapshot()) == (0, before)
    device.key_file.unlink()
    assert device.run().status == 0
    application.stored, application.stores = device.key_file.read_bytes(), []
    assert (application.check().new, application.stores) == (False, [])


def test_an_identity_is_a_value_in_the_forms_that_interfaces_want(application: Application) -> None:
    identity = application.check().identity
    file = identity.file()
    assert isinstance(file, io.IOBase) and file.readable() and file.read() == bytes(identity) == application.stored
    assert identity.key.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert identity.request.startswith(b"-----BEGIN CERTIFICATE REQUEST-----\n")
    assert "PRIVATE" not in repr(identity) and identity.request_hash in repr(identity)
    with pytest.raises(AttributeError):
        identity.other = 1  # type: ignore[attr-defined]


def test_a_certificate_that_is_dropped_is_no_new_one(
    application: Application, server: Signing, authority: Authority
) -> None:
    application.stored = authority.identity(ID, not_before=now() - hours(3), not_after=now() - hours(1))
    server.answers = [answers.PENDING]
    outcome = application.check()
    assert (outcome.certified, outcome.new, outcome.not_after, len(outcome.notes)) == (False, False, None, 1)
    assert application.stores[-1].certificate is None and application.stores[-1].modified is None


def test_the_time_of_a_certificate_is_known_after_every_check(application: Application, server: Signing) -> None:
    outcome = application.check()
    certificate = outcome.identity.certificate
    assert certificate
    begin = x509.load_pem_x509_certificate(certificate).not_valid_before_utc.timestamp()
    assert outcome.identity.modified == application.modified == begin
    assert application.check().identity.modified == begin
    assert application.check(modified=None).identity.modified == begin
    server.answers = [answers.NOT_MODIFIED]
    server.requests.clear()
    outcome = application.check(modified=begin + 5)
    assert (outcome.certified, outcome.new, outcome.identity.modified) == (True, False, begin + 5)
    assert server.requests[0].if_modified_since.endswith("GMT")


# --- The two things that a caller has to do, and can't do wrong ---


def test_it_is_stored_before_anything_of_it_is_sent(application: Application, server: Signing) -> None:
    def store(identity: Identity) -> None:
        assert (server.connections, server.requests) == (0, [])
        application.store(identity)
        raise KeyError("no room in the key chain")

    with pytest.raises(KeyError, match="no room"):
        application.check(store=store)
    assert (server.connections, len(application.stores)) == (0, 1)


def test_a_new_key_after_a_rejection_is_stored_before_it_is_sent(application: Application, server: Signing) -> None:
    application.check()
    old = application.stored
    server.answers = [answers.REJECTED, answers.PENDING]
    server.requests.clear()

    with pytest.raises(OSError, match="disk full"):
        application.check(store=full)
    assert [asked.method for asked in server.requests] == ["GET"]
    assert application.stored == old

    def store(identity: Identity) -> None:
        assert [asked.method for asked in server.requests] == ["GET"]
        application.store(identity)

    server.requests.clear()
    outcome = application.check(store=store)
    assert [asked.method for asked in server.requests] == ["GET", "POST", "GET"]
    assert server.requests[1].path == "/" + application.stores[-1].request_hash == "/" + outcome.identity.request_hash


def full(identity: Identity) -> None:
    raise OSError("disk full")


def test_a_certificate_that_cannot_be_stored_is_fetched_again(application: Application, server: Signing) -> None:
    application.check()
    old, identity = application.stored, application.stores[-1]
    server.life = 96
    server.sign("/" + identity.request_hash, identity.request)
    with pytest.raises(OSError, match="disk full"):
        application.check(store=full)
    assert application.stored == old
    assert application.check().new and application.stored != old


def test_what_is_stored_is_not_optional() -> None:
    with pytest.raises(TypeError, match="stored"):
        check(server="localhost", ca_cert=b"", client_id=ID, store=print)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="store"):
        check(server="localhost", ca_cert=b"", client_id=ID, stored=None)  # type: ignore[call-arg]


def test_what_fails_leaves_what_is_stored(application: Application, server: Signing) -> None:
    application.check()
    before = application.stored
    application.stores.clear()
    for said in (None, answers.page(403), answers.page(500), answers.certificate(b"hello"), answers.UNKNOWN + b"x"):
        server.answers = [said]
        with pytest.raises(CaramelError):
            application.check(timeout=5)
    server.stop()
    with pytest.raises(Unreachable):
        application.check()
    assert (application.stores, application.stored) == ([], before)


# --- Errors ---


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"server": "https://ca.example.com/"}, "HOST or HOST:PORT"),
        ({"client_id": "two words"}, "1 to 64 of A-Z"),
        ({"ca_cert": b"nothing"}, "no certificate in PEM form"),
        ({"ca_cert": "text"}, "is bytes"),
        ({"stored": "text"}, "is bytes"),
        ({"identity_ca": "text"}, "is bytes"),
        ({"identity_ca": b"nothing"}, "no certificate in PEM form"),
        ({"client_id": None}, "1 to 64 of A-Z"),
        ({"client_id": 7}, "1 to 64 of A-Z"),
        ({"server": None}, "HOST"),
        ({"server": ("localhost",)}, "host and a port"),
        ({"server": ("localhost", "http")}, "host and a port"),
        ({"server": ("localhost", 99999)}, "from 1 to 65535"),
        ({"server": 443}, "host and a port"),
        ({"timeout": "60"}, "timeout is seconds"),
        ({"timeout": 0}, "timeout is seconds"),
        ({"timeout": float("nan")}, "timeout is seconds"),
        ({"timeout": float("inf")}, "timeout is seconds"),
        ({"timeout": None}, "timeout is seconds"),
        ({"modified": "now"}, "modified is seconds"),
        ({"modified": float("nan")}, "modified is seconds"),
        ({"build_time": None}, "build_time is seconds"),
        ({"key_type": "dsa"}, "no key type"),
        ({"key_type": None}, "no key type"),
        ({"store": None}, "are functions"),
        ({"say": "print"}, "are functions"),
    ],
)
def test_a_wrong_argument_is_a_usage_error(
    application: Application, server: Signing, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        application.check(**arguments)
    assert isinstance(caught.value, CaramelError)
    assert (application.stores, server.connections) == ([], 0)


def test_errors_are_named_for_what_the_caller_can_do(
    application: Application, authority: Authority, pem: Path, tmp_path: Path
) -> None:
    application.check()
    with Scripted(pem, [answers.page(500)]) as faulty, pytest.raises(Refused, match="status 500"):
        application.check(server=faulty.address)
    with pytest.raises(Unreachable, match="can't be reached"):
        application.check(server=("localhost", world.free_port()))
    with (
        Scripted(pem, [], instead_of_tls=world.silence) as silent,
        pytest.raises(Unreachable, match="within the time limit"),
    ):
        application.check(server=silent.address, timeout=0.5)
    other = Authority(tmp_path / "other")
    with Scripted(other.server(), [answers.PENDING]) as foreign, pytest.raises(Untrusted, match="trusted CA"):
        application.check(server=foreign.address)


def test_every_name_it_promises_is_there() -> None:
    assert caramel_embedded.__all__ == sorted(caramel_embedded.__all__, key=str)
    for name in caramel_embedded.__all__:
        assert getattr(caramel_embedded, name).__doc__
        if name not in ("Identity", "Outcome", "check"):
            assert issubclass(getattr(caramel_embedded, name), CaramelError)
    with pytest.raises(AttributeError):
        caramel_embedded.other  # noqa: B018


# --- What it leaves alone ---


def surroundings() -> tuple[Any, ...]:
    """What is global in a process."""
    mask = os.umask(0o22)
    os.umask(mask)
    return (
        dict(os.environ), os.getcwd(), mask, [signal.getsignal(number) for number in signal.valid_signals()],
        socket.getdefaulttimeout(), locale.setlocale(locale.LC_ALL), gc.isenabled(), sys.excepthook,
        warnings.filters[:], ssl._create_default_https_context, len(os.listdir("/proc/self/fd")),
    )  # fmt: skip


def test_it_leaves_the_process_as_it_was(application: Application, server: Signing) -> None:
    application.check()  # what is loaded once is loaded
    server.stop()
    before = surroundings()
    with pytest.raises(Unreachable):
        application.check()
    application.stored = None
    with pytest.raises(Unreachable):
        application.check()
    assert surroundings() == before
    assert [thread.name for thread in threading.enumerate() if thread.daemon and "resolve" in thread.name] == []


def test_several_threads_with_an_identity_each(authority: Authority, server: Signing) -> None:
    applications = [Application(authority, server.address, str(uuid.uuid4())) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for turn in range(3):
            outcomes = list(pool.map(Application.check, applications))
            assert all(outcome.certified and outcome.new is (turn == 0) for outcome in outcomes)
    for application, outcome in zip(applications, outcomes):
        assert application.stored == bytes(outcome.identity)
        assert outcome.identity.certificate
        name = x509.load_pem_x509_certificate(outcome.identity.certificate).subject.rfc4514_string()
        assert f"CN={application.client_id}" in name
    assert len({application.stored for application in applications}) == 8


#: Two checks, the second with the identity of the first: server, CA's file and client ID are the arguments.
TWICE = """
kept = [None]
with open(sys.argv[2], "rb") as file:
    ca_cert = file.read()
for turn in range(2):
    outcome = caramel_embedded.check(
        server=sys.argv[1], ca_cert=ca_cert, client_id=sys.argv[3], stored=kept[0],
        store=lambda identity: kept.__setitem__(0, bytes(identity)), timeout=20,
    )
    print(outcome.certified, outcome.new)
"""

#: What makes green threads of all that a program does, and the program: a check, while another green thread goes on.
GREEN = """
import sys
{patch}
import caramel_embedded, time, threading
turns = []
def busy():
    while True:
        turns.append(time.sleep(0.01))
threading.Thread(target=busy, daemon=True).start()
{twice}assert len(turns) > 10, turns
"""


GREEN_PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}


@pytest.mark.parametrize("green", GREEN_PATCHES)
def test_in_an_application_of_green_threads(server: Signing, authority: Authority, green: str) -> None:
    """gevent and eventlet put their own sockets, threads and TLS into the standard library's place."""
    code = GREEN.format(patch=GREEN_PATCHES[green], twice=TWICE)
    server.pause = 0.0005
    command = [sys.executable, "-I", "-c", code, server.address, str(authority.certificate_file), ID]
    done = subprocess.run(command, env=world.environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True True\nTrue False\n"), done.stderr


#: A program with nothing but the library in it, which keeps its identity in a variable.
ALONE = """
import os
import sys
import caramel_embedded

assert not {{"ssl", "socket", "cryptography", "argparse", "signal"}} & set(sys.modules), "loaded before it is needed"
before = dict(os.environ)
{twice}assert os.environ == before
"""


def alone(server: str, ca: Path, *before: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The program above, in the environment that has the command and nothing else."""
    python = str(Path(world.PLAIN).with_name("python3"))
    command = [*before, python, "-I", "-B", "-W", "error", "-c", ALONE.format(twice=TWICE), server, str(ca), ID]
    return subprocess.run(command, env=world.environment(**env), capture_output=True, text=True, timeout=60)


@needs("strace")
def test_it_writes_no_file_and_takes_no_lock(server: Signing, authority: Authority, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = alone(server.address, authority.certificate_file, "strace", "-f", "-qq", "-o", str(trace))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\nTrue False\n", "")
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    assert any(call.startswith("memfd_create(") for call in calls), "the trace is not what this test takes it for"
    opened = [call for call in calls if call.startswith(("open(", "openat(", "creat(", "openat2("))]
    writable = ("O_WRONLY", "O_RDWR", "O_CREAT", "O_APPEND", "O_TRUNC", "O_TMPFILE", "creat(")
    written = [call for call in opened if any(word in call for word in writable)]
    assert not [call for call in written if '"/dev/null"' not in call]
    # Nor is there a file of ours that is read: no configuration, no key file.
    assert not [call for call in opened if "/etc/caramel" in call or "/var/lib/caramel" in call]
    names = "flock( rename link unlink mkdir mknod fsync fdatasync truncate utime chmod kill("
    forbidden = tuple(names.split())
    assert not [call for call in calls if call.startswith(forbidden)]
    assert not [call for call in calls if "F_SETLK" in call or "F_OFD_SETLK" in call]


def test_the_environment_steers_nothing(server: Signing, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    hostile = {
        "CARAMEL_CA": "localhost:1",
        "CARAMEL_CA_CERT": str(other.certificate_file),
        "CARAMEL_CN": "another",
        "CARAMEL_KEY_FILE": str(tmp_path / "identity.pem"),
        "CARAMEL_TIMEOUT": "0",
        "CARAMEL_HOOK": f"touch {tmp_path}/touched",
        "HTTPS_PROXY": "http://localhost:1",
        "ALL_PROXY": "http://localhost:1",
        "SSL_CERT_FILE": str(other.certificate_file),
        "SSLKEYLOGFILE": str(tmp_path / "keys"),
    }
    done = alone(server.address, authority.certificate_file, **hostile)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\nTrue False\n", "")
    with Scripted(other.server(), [answers.PENDING]) as foreign:
        done = alone(foreign.address, authority.certificate_file, **hostile)
    assert done.returncode == 1 and "Untrusted" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


# --- The examples ---


def example(name: str, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", str(EXAMPLES / name), *map(str, arguments)],
        env=world.environment(**env),
        capture_output=True,
        text=True,
        timeout=60,
    )


def until_signed(caramel: Caramel, name: str, *arguments: object, **env: str) -> list[str]:
    """Starts an example until it has a certificate; what it printed in all of its runs."""
    printed: list[str] = []

    def signed() -> bool:
        run = example(name, *arguments, **env)
        assert run.returncode in (0, 69) and run.stderr == "", run
        printed.extend(run.stdout.splitlines())
        return run.returncode == 0

    world.until("the example has its certificate", signed, pause=0.3)
    return printed


def test_the_complete_example(caramel: Caramel, front: Front, authority: Authority, tmp_path: Path) -> None:
    arguments = (tmp_path / "app.sqlite", front.address, authority.certificate_file)
    with caramel.autosign():
        printed = until_signed(caramel, "application.py", *arguments)
    client_ids = {line.partition(": ")[0] for line in printed}
    (client_id,) = client_ids
    assert uuid.UUID(client_id) and "new certificate" in printed[-1]
    assert len(caramel.requests(client_id)) == 1
    with front.watched() as seen:
        run = example("application.py", *arguments, f"https://{front.address}/root.crt")
    assert run.returncode == 0 and "certificate unchanged" in run.stdout
    assert f"root.crt: {len(authority.pem)} bytes" in run.stdout
    assert [asked.verify for asked in seen] == ["SUCCESS", "SUCCESS"]
    assert client_id in seen[-1].subject
    # And what it says when things go wrong.
    wrong = example("application.py", arguments[0], "localhost:1", authority.certificate_file)
    assert (wrong.returncode, "trying again later" in wrong.stdout) == (1, True)
    wrong = example("application.py", arguments[0], "local host", authority.certificate_file)
    assert (wrong.returncode, "somebody has to look" in wrong.stdout) == (2, True)


#: A key chain in a file, in the place of a desktop's.
KEY_CHAIN = """
import json, os, pathlib
from keyring.backend import KeyringBackend

FILE = pathlib.Path(os.environ["KEY_CHAIN_FILE"])

class KeyChain(KeyringBackend):
    priority = 1

    def _all(self):
        return json.loads(FILE.read_text()) if FILE.exists() else {}

    def get_password(self, service, username):
        return self._all().get(f"{service}/{username}")

    def set_password(self, service, username, password):
        FILE.write_text(json.dumps({**self._all(), f"{service}/{username}": password}))
"""


def test_the_example_with_a_key_chain(caramel: Caramel, front: Front, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "keychain.py").write_text(KEY_CHAIN)
    env = {
        "PYTHONPATH": str(tmp_path),
        "PYTHON_KEYRING_BACKEND": "keychain.KeyChain",
        "KEY_CHAIN_FILE": str(tmp_path / "chain"),
        "HOME": str(tmp_path),
    }
    with caramel.autosign():
        printed = until_signed(caramel, "with_keyring.py", front.address, authority.certificate_file, **env)
    assert "new certificate" in printed[-1]
    run = example("with_keyring.py", front.address, authority.certificate_file, **env)
    assert (run.returncode, "certificate unchanged" in run.stdout) == (0, True)


def test_a_type_checker_knows_the_types(tmp_path: Path) -> None:
    """From what was installed, and without the sources: `py.typed` is there, and says the truth."""
    (tmp_path / "good.py").write_text((EXAMPLES / "application.py").read_text())
    (tmp_path / "bad.py").write_text(
        textwrap.dedent(
            """
            from caramel_embedded import check
            outcome = check(server="localhost", ca_cert="text", client_id="x", stored=None, store=print)
            outcome.certified = "yes"
            outcome.nothing
            """
        )
    )
    mypy = [sys.executable, "-I", "-m", "mypy", "--strict", "--cache-dir", str(world.BUILD / "mypy-examples")]
    done = subprocess.run([*mypy, "good.py", "bad.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert {line.partition(":")[0] for line in errors} == {"bad.py"}, done.stdout + done.stderr
    assert {line.rpartition("[")[2] for line in errors} >= {"arg-type]", "assignment]", "attr-defined]"}
