"""Keys that a TPM or a token holds: a device with one lives its whole life, and no failing chip costs it anything.

The devices are Debian 13's; swtpm plays the TPM, SoftHSM the token. See ``docs/keys-in-hardware.md``. Power cuts
at each system call are in `test_torture.py`: the TPM takes none for an attack.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
import world
from needs import fetches, needs, slow
from world import Authority, Between, Caramel, Chip, Daemon, Device, Nginx, Token, Tpm, keys_in

from caramel_embedded import settings

pytestmark = [needs("trixie", "nginx"), fetches]

KINDS: dict[str, Callable[[Path], Chip]] = {"tpm": Tpm, "pkcs11": Token}
REQUEST = "NEW CERTIFICATE REQUEST"
#: Of a run that hangs.
SAYS = "packaging/starter/caramel-embedded"


@pytest.fixture
def chip(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Chip]:
    with KINDS[getattr(request, "param", "tpm")](tmp_path / "chip") as made:
        yield made


@pytest.fixture
def ours(device: Device, chip: Chip) -> Device:
    """A device with the chip, and nothing on its disk. Its hook counts."""
    keys_in(chip, device, "rsa-2048")
    assert device.config
    with device.config.open("a") as file:
        file.write(f"CARAMEL_HOOK='sh -c \"env >>{device.folder}/calls\"'\n")
    return device


def calls(device: Device) -> int:
    """How often the hook was called."""
    log = device.folder / "calls"
    return log.read_text().count("CARAMEL_NOT_AFTER=") if log.exists() else 0


@pytest.fixture
def certified(ours: Device, caramel: Caramel, nginx: Nginx) -> Device:
    assert ours.run().status == 69
    caramel.sign(str(ours.client_id))
    run = ours.run()
    assert (run.status, calls(ours)) == (0, 1), run
    return ours


both = pytest.mark.parametrize("chip", KINDS, indirect=True)
tokens = pytest.mark.parametrize("chip", ["pkcs11"], indirect=True)


# --- A life ---


@slow
@both
@pytest.mark.parametrize("protocols", ["TLSv1.2", "TLSv1.3"])
def test_a_device_lives_its_life(
    ours: Device, chip: Chip, caramel: Caramel, authority: Authority, tmp_path: Path, protocols: str
) -> None:
    me = str(ours.client_id)
    pem = authority.server(file="held.pem")
    with Nginx(tmp_path / "nginx", caramel, pem, protocols=protocols) as front:
        ours.server = front.address
        first = ours.run()
        assert (first.status, first.out, first.err.count("\n")) == (69, "", 1), first
        assert ours.labels == [chip.label, REQUEST]
        born = ours.snapshot()
        assert ours.run().status == 69 and ours.snapshot() == born

        caramel.sign(me)
        run = ours.run()
        assert (run.status, run.err.count("\n")) == (0, 1), run
        assert ours.labels == [chip.label, "CERTIFICATE", REQUEST] and calls(ours) == 1
        text = (ours.folder / "calls").read_text()
        assert "OPENSSL_CONF=" not in text and "TSS2_LOG=" not in text, "they are for this program alone"

        kept = ours.snapshot()
        with front.watched() as seen:
            assert ours.run().status == 0
        assert [(asked.verify, asked.tls) for asked in seen] == [("SUCCESS", protocols)]
        assert ours.snapshot() == kept and calls(ours) == 1

        key = ours.block(chip.label)
        caramel.sign(me, hours=72)
        assert ours.run().status == 0
        assert ours.block(chip.label) == key and calls(ours) == 2

        rejected = ours.certificate
        caramel.reject(me)
        run = ours.run()
        assert run.status == 69 and "rejected" in run.err
        assert ours.labels == [chip.label, REQUEST] and ours.block(chip.label) != key
        caramel.sign(me)
        assert ours.run().status == 0
        assert rejected and ours.certificate and ours.certificate.public_key() != rejected.public_key()
    assert {path.name for path in ours.folder.iterdir()} - {".identity.pem.hook"} == {
        *("empty.conf", "identity.pem", "calls"),
    }


def test_an_everyday_run_loads_no_x509_and_starts_no_program(certified: Device, chip: Chip, nginx: Nginx) -> None:
    """What the program loads is what it is without a chip."""
    with certified.key_file.open() as file:
        assert chip.label in file.read()
    trace = certified.folder / "trace"
    watch = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=execve,openat"]
    python = Path(certified.command[-1]).with_name("python3")
    direct = "from caramel_embedded.__main__ import main; main()"
    certified.command = [*certified.command[:-1], *watch, str(python), "-I", "-B", "-c", direct]
    with nginx.watched() as seen:
        assert certified.run().status == 0
    assert [asked.verify for asked in seen] == ["SUCCESS"]
    text = trace.read_text()
    assert re.findall(r"execve\((\S+),.*= 0", text) == [f'"{python}"']
    assert "/ossl-modules/tpm2.so" in text and "urllib3/" in text, "it sees what is loaded"
    assert not re.findall(r"/(?:cryptography|OpenSSL)/\S*\.(?:so|py).* = \d", text)
    assert not re.findall(r"caramel_embedded/(?:__pycache__/)?(?:held|program|certificates)\..* = \d", text)


# --- A chip that fails ---

#: The chip, what happens to it or to a file, and what is said.
WRONG: dict[str, tuple[str, str, str]] = {
    "no TPM": ("tpm", "away", "the TPM can't be reached"),
    "no provider": ("tpm", "conf is empty", "OpenSSL's provider for TPMs is not there, or not active"),
    "no configuration": ("tpm", "conf is gone", "openssl.cnf is not there"),
    "cleared": ("tpm", "clear", "the TPM has not the parent that wraps the key"),
    "replaced": ("tpm", "replace", "it is another TPM's key"),
    "no token": ("pkcs11", "away", "the token is not there, has no such key, or refuses the PIN"),
    "wrong PIN": ("pkcs11", "pin is wrong", "or refuses the PIN"),
    "no PIN": ("pkcs11", "pin is gone", "the token's PIN file"),
    "no library": ("pkcs11", "conf is wrong", "the token's library"),
}


def breaks(chip: Any, conf: Path, how: str) -> Callable[[], object]:
    """Lets it happen, and returns what ends it."""
    name, _, state = how.partition(" is ")
    if not state:
        getattr(chip, how)()
        return chip.back if how == "away" else lambda: None
    file = conf if name == "conf" else chip.pin_file
    before = file.read_text()
    if state == "gone":
        file.unlink()
    elif state == "empty":
        file.write_text("")
    else:
        file.write_text("99\n" if name == "pin" else before.replace("libsofthsm2", "missing"))
    return lambda: file.write_text(before)


@slow
@pytest.mark.parametrize(
    ("chip", "wrong"), [(kind, name) for name, (kind, *_) in WRONG.items()], indirect=["chip"], ids=list(WRONG)
)
def test_a_chip_that_cannot_be_used_costs_nothing(
    certified: Device, chip: Chip, caramel: Caramel, nginx: Nginx, wrong: str
) -> None:
    _, how, words = WRONG[wrong]
    # The program's own copy, which can break.
    conf = certified.folder / "openssl.cnf"
    shutil.copy(chip.conf, conf)
    assert certified.config
    certified.config.write_text(certified.config.read_text().replace(str(chip.conf), str(conf)))
    kept = certified.snapshot()

    repair = breaks(chip, conf, how)
    run = certified.run()
    assert (run.status, run.err.count("\n")) == (127, 1) and words in run.err and "unchanged" in run.err, run
    assert certified.snapshot() == kept
    state = certified.run("--status", "--json")
    assert state.status == 0
    assert json.loads(state.out)["key"] == {"type": "RSA", "bits": 2048, "holder": chip.kind, "chip": None}
    state = certified.run("--status", "--json", "-v")
    assert words in json.loads(state.out)["key"]["chip"]

    # What is new is stored, and the hook waits.
    caramel.sign(str(certified.client_id), hours=72)
    with nginx.watched() as seen:
        run = certified.run()
    assert run.status == 127 and words in run.err and "new certificate" in run.err, run
    assert {asked.verify for asked in seen} == {"NONE"}
    assert certified.block("CERTIFICATE") == caramel.certificates(certified.request_hash())[-1]
    stored = certified.snapshot()
    assert certified.run().status == 127 and certified.snapshot() == stored and calls(certified) == 1

    repair()
    if wrong in ("cleared", "replaced"):
        # Only the server's rejection starts it over, with whatever chip it has now.
        chip.run(world.chips.KEYS / "tpm-parent")
        assert certified.run().status == 127 and certified.snapshot() == stored
        caramel.reject(str(certified.client_id))
        run = certified.run()
        assert run.status == 69 and certified.labels == [chip.label, REQUEST], run
    else:
        assert certified.run().status == 0
        assert certified.snapshot() == stored and calls(certified) == 2


@slow
def test_a_key_that_counts_as_attacked_is_not_given_up(
    ours: Device, tmp_path: Path, chip: Tpm, caramel: Caramel
) -> None:
    """It can be loaded, and signing fails in the handshake: noda is missing, and the power failed three times."""
    careless = tmp_path / "careless-key"
    careless.write_text((world.chips.KEYS / "tpm-key").read_text().replace("|sign|noda'", "|sign'"))
    careless.chmod(0o755)
    assert ours.config
    ours.config.write_text(ours.config.read_text().replace(chip.key_command, str(careless)))
    assert ours.run().status == 69
    caramel.sign(str(ours.client_id))
    for _ in range(3):
        assert ours.run().status == 0
        chip.cut()
        chip.start()
    kept = ours.snapshot()
    run = ours.run()
    assert run.status == 127 and "the TPM is locked" in run.err, run
    assert ours.snapshot() == kept
    chip.run("tpm2_dictionarylockout", "--clear-lockout")
    assert ours.run().status == 0 and ours.snapshot() == kept


@both
def test_a_chip_that_was_away_longer_than_a_certificate_lives(
    certified: Device, chip: Chip, caramel: Caramel, authority: Authority
) -> None:
    key, _, request = (block for _, block in certified.blocks())
    certified.has(key + authority.sign(certified.request, not_after=world.now() - world.hours(1)) + request)
    chip.away()
    run = certified.run()
    assert run.status == 127 and "ended" in run.err and "new certificate" in run.err, run
    chip.back()
    assert certified.run().status == 0
    assert certified.block(chip.label) == key
    assert certified.block("CERTIFICATE") == caramel.certificates(certified.request_hash())[-1]


@slow
def test_a_tpm_that_hangs_ends_the_run_at_its_time_limit(certified: Device, chip: Tpm) -> None:
    kept = certified.snapshot()
    chip.hang()
    run = certified.run("--timeout", "2", timeout=30)
    assert run.status == 127 and run.seconds < 20 and "doesn't answer within the time limit" in run.err, run
    assert certified.snapshot() == kept


def test_a_tpm_that_is_busy_is_asked_again_and_then_it_is_said(certified: Device, chip: Tpm) -> None:
    """It asks to try again later: its own library does so a few times."""
    kept = certified.snapshot()
    with Between(chip) as wire:
        certified.surroundings = wire.env
        wire.says(0x922, 3)
        assert certified.run().status == 0 and wire.times == 0
        wire.says(0x922)
        run = certified.run()
        assert run.status == 127 and "the key can't be used: the TPM is busy" in run.err, run
        wire.says(0, 0)
        assert certified.run().status == 0
    assert certified.snapshot() == kept and chip.attacks == 0


def test_a_tpm_without_room_is_said(certified: Device, chip: Tpm) -> None:
    """Nobody tidies up, as with /dev/tpm0: swtpm takes three keys."""
    kept = certified.snapshot()
    chip.tidy()
    for _ in range(3):
        chip.run("tpm2_createprimary", "-Q", "-C", "o", "-c", "key", check=False)
    run = certified.run()
    assert run.status == 127 and "the TPM has no room for one more key" in run.err, run
    chip.tidy()
    assert certified.run().status == 0 and certified.snapshot() == kept


def test_a_key_with_a_password_is_refused_before_anything_is_stored(ours: Device, tmp_path: Path, chip: Tpm) -> None:
    """Nobody could type it. With noda, the attempt counts as no attack."""
    secret = tmp_path / "secret-key"
    text = (world.chips.KEYS / "tpm-key").read_text()
    secret.write_text(text.replace("tpm2_create --quiet", "tpm2_create --quiet --key-auth=secret"))
    secret.chmod(0o755)
    run = ours.run("--key-command", str(secret))
    assert run.status == 127 and "the TPM wants a password for the key" in run.err, run
    assert not ours.key_file.exists() and chip.attacks == 0
    block = tmp_path / "block"
    block.write_text(chip.run(secret, env={"CARAMEL_KEY_TYPE": "rsa-2048"}).stdout)
    env = {"OPENSSL_CONF": str(chip.conf), "TSS2_LOG": "esys+error"}
    done = chip.run("openssl", "dgst", "-sha256", "-sign", block, block, env=env, check=False)
    assert done.returncode and "0x000009a2" in done.stderr, done


LIBRARY = """
import ssl, sys
from pathlib import Path
from caramel_embedded import NotReady, check
server, ca, kept, command = sys.argv[1:]
kept = Path(kept)
def run(*command):
    outcome = check(
        server=server, ca_cert=Path(ca).read_bytes(), client_id="library-and-chip", key_command=command,
        stored=kept.read_bytes() if kept.exists() else None, store=lambda new: kept.write_bytes(bytes(new)))
    print("certified" if outcome.identity.certificate else "pending", outcome.new)
    if outcome.identity.certificate:
        outcome.identity.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    return outcome
try:
    run("/bin/false") if not kept.exists() else None
except NotReady as error:
    print(error)
run(command)
"""


@slow
@both
def test_the_library_has_a_key_made_and_uses_it(device: Device, chip: Chip, caramel: Caramel, tmp_path: Path) -> None:
    """`check(key_command=...)`, where the caller has OpenSSL's provider active."""
    keys_in(chip, device)
    kept, script, command = tmp_path / "kept", tmp_path / "app.py", tmp_path / "command"
    script.write_text(LIBRARY)
    command.write_text(f"#!/bin/sh\nexec {chip.key_command}\n")
    command.chmod(0o755)
    assert device.server and device.ca
    python = str(Path(device.command[-1]).with_name("python3"))
    ca = tmp_path / "ca.crt"
    shutil.copy(device.ca, ca)

    def run() -> list[str]:
        words = (python, "-I", script, device.server or "", ca, kept, command)
        return chip.run(*words, env={"OPENSSL_CONF": str(chip.conf), "TSS2_LOG": "all+NONE"}).stdout.splitlines()

    assert run() == ["the key command /bin/false failed with status 1", "pending False"]
    caramel.sign("library-and-chip")
    assert run() == ["certified True"]
    assert run() == ["certified False"]
    text = kept.read_text()
    assert re.findall("BEGIN (.*)-----", text) == [chip.label, "CERTIFICATE", REQUEST]


@both
def test_status_asks_no_chip(certified: Device, chip: Chip) -> None:
    """One that hangs, or a token that isn't there, is not noticed."""
    chip.hang() if isinstance(chip, Tpm) else chip.away()
    state = certified.run("--status", timeout=20)
    assert state.status == 0
    assert "in a TPM" in state.out if chip.kind == "tpm" else "in a PKCS #11 token" in state.out


# --- The key command ---

BLOCK = "-----BEGIN {0}-----\\nMAMCAQA=\\n-----END {0}-----\\n"
COMMANDS = {
    "exit 3": "failed with status 3",
    "echo no chip at all >&2; exit 1": "failed with status 1: no chip at all",
    "true": "printed nothing",
    "kill -9 $$": "was ended by signal 9",
    "sleep 60": "was ended after 2 seconds",
    f"printf -- '{BLOCK.format('PRIVATE KEY')}'": "printed a block PRIVATE KEY, in the place of TSS2 PRIVATE KEY or",
    f"printf -- '{BLOCK.format('TSS2 PRIVATE KEY')}'": "printed a damaged block",
    "tpm-key; tpm-key": "printed something else than one PEM block",
    "echo hello; tpm-key": "printed something else than one PEM block",
    "exec yes": "printed more than 65536 bytes, and was ended",
    "exec yes >&2": "printed more than 65536 bytes, and was ended",
    "CARAMEL_KEY_TYPE=ec-p256 tpm-key": "made a key of another type: EC, 256 bits",
}


@slow
def test_what_is_wrong_with_the_key_command_is_said_before_anything_is_stored(
    ours: Device, chip: Tpm, caramel: Caramel, nginx: Nginx, tmp_path: Path
) -> None:
    script = tmp_path / "command"
    for text, words in COMMANDS.items():
        line = text.replace("tpm-key", chip.key_command)
        subprocess.run(["tee", str(script)], input=f"#!/bin/sh\n{line}\n".encode(), stdout=subprocess.DEVNULL)
        script.chmod(0o755)
        with nginx.watched() as seen:
            run = ours.run("--key-command", str(script), "--timeout", "2" if "sleep" in text else "60")
        assert (run.status, run.err.count("\n")) == (127, 1) and words in run.err, (text, run)
        assert "the key command" in run.err and seen == []
        assert not ours.key_file.exists()
    run = ours.run("--key-command", "/no/such/command")
    assert run.status == 127 and "the key command /no/such/command can't be run" in run.err, run
    assert caramel.requests(str(ours.client_id)) == []


@tokens
def test_each_key_in_a_token_has_an_id_of_its_own(chip: Token) -> None:
    blocks = {chip.run("sh", "-c", chip.key_command, env={"CARAMEL_KEY_TYPE": "ec-p256"}).stdout for _ in range(2)}
    assert len(blocks) == 2


def test_a_parent_without_noda_is_refused_by_both_commands(tmp_path: Path) -> None:
    with Tpm(tmp_path / "chip", parent=False) as chip:
        done = chip.run(chip.key_command, check=False)
        assert done.returncode == 1 and "run tpm-parent once" in done.stderr
        chip.run("tpm2_createprimary", "-Q", "-C", "o", "-G", "ecc", "-c", "parent")
        chip.run("tpm2_evictcontrol", "-Q", "-C", "o", "-c", "parent", world.chips.PARENT)
        chip.run("tpm2_flushcontext", "-t")
        for program in ("tpm-key", "tpm-parent"):
            done = chip.run(world.chips.KEYS / program, check=False)
            assert done.returncode == 1 and "noda" in done.stderr, done
        other = "0x81000002"
        chip.run(world.chips.KEYS / "tpm-parent", other)
        assert "BEGIN TSS2" in chip.run(world.chips.KEYS / "tpm-key", other).stdout


# --- The stored file ---


def test_a_block_goes_to_no_function_of_cryptography(certified: Device, chip: Chip, caramel: Caramel) -> None:
    """A file that has to be looked at (no line, another form): 43.0, which Debian 13 has, panics at such a block."""
    kept = certified.key_file.read_bytes()
    certified.has(world.unsealed(kept).replace(b"\n", b"\r\n"))
    run = certified.run()
    assert (run.status, run.err.count("\n")) == (0, 1), run
    assert world.unsealed(certified.key_file.read_bytes()) == world.unsealed(kept)


def test_a_lost_request_is_made_again_with_the_same_key(certified: Device, chip: Tpm, caramel: Caramel) -> None:
    key, certificate, request = (block for _, block in certified.blocks())
    certified.has(key + certificate)
    chip.away()
    run = certified.run()
    assert run.status == 127 and "can't be reached" in run.err, run
    assert certified.key_file.read_bytes() == key + certificate
    chip.back()
    assert certified.run().status == 0
    assert [block for _, block in certified.blocks()] == [key, certificate, request], "RSA: the same request"


def test_a_block_that_is_damaged_is_no_key(certified: Device, chip: Tpm) -> None:
    content = world.unsealed(certified.key_file.read_bytes())
    lines = content.split(b"\n")
    certified.has(b"\n".join([*lines[:3], *lines[4:]]))
    run = certified.run()
    assert run.status == 69 and "the private key can't be read: starting over" in run.err, run


# --- Who reads it ---


GET = "printf 'GET /root.crt HTTP/1.0\\r\\n\\r\\n' | "
URL = "https://localhost:PORT/root.crt"
#: What reads a page with FILE as certificate and key.
CLIENTS = {
    "curl": f"curl -sSf --cacert CA --cert FILE --key FILE {URL}",
    "openssl": f"{GET}openssl s_client -quiet -connect localhost:PORT -CAfile CA -cert FILE -key FILE",
    "python": "python3 -c \"import ssl, urllib.request as u; c = ssl.create_default_context(cafile='CA'); "
    f"c.load_cert_chain('FILE'); print(u.urlopen('{URL}', context=c).read().decode(), end='')\"",
    "node": "node --openssl-shared-config -e \"const pem = fs.readFileSync('FILE'), ca = fs.readFileSync('CA'); "
    f"https.get('{URL}', {{ca: ca, cert: pem, key: pem}}, answer => answer.pipe(process.stdout))\"",
    "gnutls": f"cd TMP; cp FILE copy.pem; {GET}gnutls-cli --port PORT --x509cafile CA --logfile /dev/null localhost "
    "--x509certfile copy.pem --x509keyfile copy.pem",
}
TEMPORARY = " ".join(f"{kind}_temp_path TMP/t;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
#: What is a server with it: its command, and the configuration that this names.
SERVERS = {
    "nginx -c": "daemon off; master_process off; pid TMP/pid; error_log stderr; events {}\n"
    f"http {{ access_log off; {TEMPORARY}\n"
    "server { listen 127.0.0.1:PORT ssl; return 204; ssl_certificate FILE; ssl_certificate_key FILE; } }\n",
    "mosquitto -c": "allow_anonymous true\nuser root\nlog_dest stdout\nlistener PORT 127.0.0.1\n"
    "certfile FILE\nkeyfile FILE\n",
    "stunnel4": "foreground = yes\npid =\n[x]\naccept = 127.0.0.1:PORT\nconnect = 127.0.0.1:1\ncert = FILE\n",
    "haproxy -f": "defaults\n  mode http\n  timeout connect 5s\n  timeout client 5s\n  timeout server 5s\n"
    "frontend x\n  bind 127.0.0.1:PORT ssl crt FILE\n  http-request return status 204\n",
}


@slow
@both
def test_programs_that_read_the_file(
    certified: Device, chip: Chip, caramel: Caramel, authority: Authority, tmp_path: Path
) -> None:
    """Servers and clients whose configuration is their own. GnuTLS refuses it."""
    ca = tmp_path / "ca.crt"
    shutil.copy(authority.certificate_file, ca)
    env = {**chip.env, "OPENSSL_CONF": str(chip.conf), "TSS2_LOG": "all+NONE"}
    page = authority.pem.decode()

    def here(text: str, port: int, file: Path = certified.key_file) -> str:
        for word, is_ in (("PORT", port), ("FILE", file), ("TMP", tmp_path), ("CA", ca)):
            text = re.sub(rf"\b{word}\b", str(is_), text)
        return text

    with Nginx(tmp_path / "nginx", caramel, authority.server(file="strict.pem"), verify_client="on") as strict:

        def read(line: str, file: Path = certified.key_file) -> tuple[bool, str]:
            done = chip.run("sh", "-c", here(line, strict.port, file), env=env, check=False)
            return page in done.stdout.replace("\r", ""), done.stdout + done.stderr

        for name in ("curl", "openssl", "python", "node"):
            got, said = read(CLIENTS[name])
            assert got, (name, said)
        # Without the option it reads another section of the configuration.
        got, said = read(CLIENTS["node"].replace("--openssl-shared-config", ""))
        assert not got and "unsupported" in said, said
        # It gets to the server with a key of its own kind, and doesn't begin with this one.
        assert read(CLIENTS["gnutls"], authority.server(file="gnutls.pem"))[0]
        got, said = read(CLIENTS["gnutls"])
        assert not got and "Error importing key" in said, said

    port = world.free_port()
    for command, text in SERVERS.items():
        name = command.split()[0]
        if name == "haproxy" and chip.kind != "tpm":
            continue  # with SoftHSM, HAProxy 3.0 of Debian 13 ends as it starts ("double free")
        conf = tmp_path / f"{name}.conf"
        conf.write_text(here(text, port))
        line = [*world.in_tree(world.trixie()), *command.split(), str(conf)]
        with Daemon(line, tmp_path / f"{name}.log", world.environment(**env)) as daemon:
            world.until("it listens", lambda: world.listens(port) or not daemon.alive)
            assert daemon.alive, daemon.text()
            context = ssl.create_default_context(cafile=str(ca))
            context.check_hostname = False
            with context.wrap_socket(socket.create_connection(("127.0.0.1", port), 20)) as connection:
                der = connection.getpeercert(binary_form=True)
            assert der and ssl.DER_cert_to_PEM_cert(der).encode() == certified.block("CERTIFICATE")


# --- The page ---


def test_the_page_says_what_the_program_says(tmp_path: Path) -> None:
    """Paths are those that are installed, settings are some, and the reasons are the program's own words."""
    page = (world.ROOT / "docs/keys-in-hardware.md").read_text()
    make = ["make", "-s", "-f", "packaging/packaging.mk", "install-keys-tpm", "install-keys-pkcs11"]
    subprocess.run([*make, f"DESTDIR={tmp_path}"], cwd=world.ROOT, check=True, stdin=subprocess.DEVNULL)
    named = set(re.findall(r"/usr/(?:libexec|share)/caramel-embedded/[\w.-]+\w", page))
    assert named == {f"/{path.relative_to(tmp_path)}" for path in tmp_path.rglob("*") if path.is_file()}
    for text in re.findall(r"```sh\n((?:CARAMEL_\w+=.*\n)+)```", page):
        settings.check(settings.parse(text, "the page"), "the page")
    rows = page.partition("| the line says |")[2].partition("\n\n")[0].splitlines()[2:]
    words = "".join((world.ROOT / name).read_text() for name in ("caramel_embedded/held.py", SAYS))
    for row in rows:
        said = row.split("|")[1].strip()
        assert said in words or said == "the token's library, or PIN file, is not there", said
    assert len(rows) == 11
