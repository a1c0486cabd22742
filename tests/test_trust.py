"""Trust: one CA and nothing else, and what a device believes of the time when its clock starts in 1970."""

from __future__ import annotations

import datetime
import json
import shutil
import ssl
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import world
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from needs import needs, require
from talking import Talking
from world import PLAIN, Authority, Caramel, Device, Front, Scripted, answers, hours, now

from caramel_embedded import certificates
from caramel_embedded.certificates import Anchors, InvalidCertificate, anchors
from caramel_embedded.trust import Trust

ID = "fffbeec0ffee"

#: A date as a device without a battery clock has it at each boot.
FIRST_BOOT = "1970-01-01 00:00:10"
PYTHON = str(Path(PLAIN).with_name("python"))


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="trust.pem")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that others trust: same name, another key."""
    return Authority(tmp_path_factory.mktemp("other"))


def clock(moment: object) -> Sequence[str]:
    """Starts a command with its clock at this moment (UTC); how fast time goes by stays as it is."""
    require("faketime")
    text = moment.strftime("%Y-%m-%d %H:%M:%S") if isinstance(moment, datetime.datetime) else str(moment)
    return ["env", "TZ=UTC", "faketime", "--exclude-monotonic", text]


# --- Only the configured CA ---


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_no_variable_makes_a_device_trust_another_ca(
    pending: Talking, other: Authority, tmp_path: Path, variable: str
) -> None:
    """It holds for the server's certificate, and for the one that it hands out."""
    (tmp_path / "folder").mkdir()
    shutil.copy(other.certificate_file, tmp_path / "folder/ca.pem")
    subprocess.run(["openssl", "rehash", str(tmp_path / "folder")], check=True)
    value = str(tmp_path / "folder") if variable.endswith("_DIR") else str(other.certificate_file)
    pending.keeps(by=other.server(), env={variable: value})
    assert pending.asked == []


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_no_variable_keeps_a_device_from_trusting_its_own_ca(device: Device, variable: str) -> None:
    assert device.run(env={variable: "/nonexistent"}).status == 69


@needs("mounts", "openssl", "ca-certificates")
def test_the_systems_own_certificates_do_not_count(pending: Talking, other: Authority, tmp_path: Path) -> None:
    """Somebody has put a CA of their own into the system's bundle, where every other program believes in it."""
    show = "import ssl; p = ssl.get_default_verify_paths(); print(p.openssl_cafile); print(p.openssl_capath)"
    file, folder = subprocess.run([PYTHON, "-c", show], stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    system = tmp_path / "system"
    system.mkdir()
    shutil.copy(other.certificate_file, system / "ca.pem")
    shutil.copy(other.certificate_file, system / "ca-certificates.crt")
    subprocess.run(["openssl", "rehash", str(system)], check=True)
    mounts = f"mount --bind {system} {folder}"
    if Path(file).exists():
        mounts += f" && mount --bind {other.certificate_file} {Path(file).resolve()}"
    before = ["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh"]
    with Scripted(other.server(), [answers.REJECTED]) as server:
        believer = (
            "import socket, ssl, sys; s = socket.create_connection(('localhost', int(sys.argv[1])));"
            "ssl.create_default_context().wrap_socket(s, server_hostname='localhost')"
        )
        subprocess.run([*before, PYTHON, "-c", believer, str(server.port)], check=True)
        assert server.handshakes == 1, "the system does believe in it"
        pending.server = server.address
        assert pending.run(before=before).status == 127
        assert server.requests == []


def test_no_openssl_configuration_file_steers_a_run(device: Device, tmp_path: Path) -> None:
    """One that would break TLS for whoever reads it: the run doesn't."""
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = x\n[x]\nMaxProtocol = TLSv1.1\n"
    )
    env = {"OPENSSL_CONF": str(configuration)}
    code = "import ssl; c = ssl.create_default_context(); print(int(c.maximum_version))"
    done = subprocess.run([PYTHON, "-I", "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == str(int(ssl.TLSVersion.TLSv1_1)), "it does break other programs"
    device.command = [PLAIN]  # coverage loads OpenSSL before the program can say anything
    assert device.run(env=env).status == 69


def test_no_keys_are_logged_for_whoever_listens(device: Device, tmp_path: Path) -> None:
    assert device.run(env={"SSLKEYLOGFILE": str(tmp_path / "keys")}).status == 69
    assert not (tmp_path / "keys").exists()


def test_no_proxy_is_asked(device: Device, pem: Path) -> None:
    with Scripted(pem, [None], instead_of_tls=world.hang_up) as proxy:
        env = {
            name: f"http://{proxy.address}"
            for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        }
        assert device.run(env=env).status == 69
        assert proxy.connections == 0


def test_another_ca_of_the_same_name_is_another_ca(pending: Talking, other: Authority) -> None:
    assert "vouches for" in pending.keeps(by=other.server()).err and pending.asked == []


def test_a_certificate_that_the_ca_signed_for_a_device_makes_it_no_ca(
    pending: Talking, authority: Authority, tmp_path: Path
) -> None:
    """A stolen device signs a server's certificate with its own key, and sends its certificate along."""
    stolen = Authority(tmp_path / "stolen", [("CN", "stolen")])
    server = stolen.server()
    server.write_bytes(server.read_bytes() + authority.issue(stolen.key.public_key(), [("CN", "stolen")]))
    pending.keeps(by=server)
    assert pending.asked == []


# --- The server's name ---


@pytest.mark.parametrize(
    "names, asked, fits",
    [
        (["localhost"], "localhost", True),
        (["ca.example.com", "localhost"], "localhost", True),
        (["LOCALHOST"], "localhost", True),
        (["ca.example.com"], "localhost", False),
        (["*"], "localhost", False),
        (["localhost.example.com"], "localhost", False),
        (["localhost"], "127.0.0.1", False),
    ],
)
def test_the_servers_name_has_to_match(
    pending: Talking, authority: Authority, names: list[str], asked: str, fits: bool
) -> None:
    key = world.new_key()
    # A common name doesn't count where there are alternative names (RFC 6125, 6.4.4), and Caramel always makes those.
    certificate = authority.issue(key.public_key(), [("CN", "localhost")], names=names)
    file = pending.folder / "server.pem"
    file.write_bytes(certificate + world.private_pem(key))
    with Scripted(file, [answers.PENDING]) as server:
        pending.server = f"{asked}:{server.port}"
        assert pending.run().status == (69 if fits else 127)
        assert bool(server.requests) == fits


# --- The clock ---


def baked(device: Talking, build_time: datetime.datetime) -> None:
    """Gives the device a firmware that was built at this time."""
    conf = f"BUILD_TIME={int(build_time.timestamp())}\n".encode()
    device.changed(
        f"from caramel_embedded import settings\nsettings.baked = lambda name: {{'baked.conf': {conf!r}}}.get(name)"
    )


def test_a_first_boot_in_1970_enrolls_and_gets_its_certificate(
    device: Device, caramel: Caramel, front: Front
) -> None:
    """Nothing is valid yet by its clock: neither the CA nor the server nor what is signed for it."""
    before = clock(FIRST_BOOT)
    assert device.run(before=before).status == 69
    caramel.sign(str(device.client_id))
    run = device.run(before=before)
    assert run.status == 0, run.err
    with front.watched() as seen:
        unchanged = device.snapshot()
        assert device.run(before=before).status == 0
    assert [asked.verify for asked in seen] == ["SUCCESS"]
    assert device.snapshot() == unchanged
    assert device.run().status == 0, "and with the right time"


@pytest.mark.parametrize(
    ("floor", "passed"),
    [("the CA's notBefore", 24), ("the stored certificate's", 1), ("the firmware's", 2)],
)
def test_in_1970_what_ended_before_the_floor_is_refused(
    pending: Talking, authority: Authority, floor: str, passed: int
) -> None:
    """What ended after it is believed: the device can't know better. `passed`: hours since that time."""
    baked(pending, now() - hours(passed if floor.startswith("the firmware") else 1000))
    if floor.startswith("the stored"):
        pending.has(authority.identity(ID, not_before=now() - hours(passed)))
    for ago, good in ((passed + 1, False), (passed - 0.5, True)):
        ended = authority.server(not_before=now() - hours(60), not_after=now() - hours(ago), file="ended.pem")
        said = [answers.PENDING] if good else []
        run = pending.keeps(*said, by=ended, before=clock(FIRST_BOOT), status=69 if good else 127)
        assert ("ended at" in run.err, len(pending.asked)) == (not good, good)
        pending.keeps(by=ended)  # with the right time


def test_a_strangers_certificate_in_the_file_tells_no_time(pending: Talking) -> None:
    """Else whoever can write a certificate could make a device believe that all others have ended."""
    foreign = Authority(pending.folder / "foreign", not_before=now() - hours(1))
    content = pending.key_file.read_bytes()
    late = foreign.sign(pending.request, not_before=now() + hours(24 * 365), not_after=now() + hours(24 * 366))
    pending.has(content.replace(b"-----BEGIN NEW", late + b"-----BEGIN NEW"))
    run = pending.hears(answers.PENDING, before=clock(FIRST_BOOT))
    assert run.status == 69 and "not by the trusted CA" in run.err


def test_in_1970_a_new_certificate_that_ended_before_the_floor_is_refused(pending: Talking) -> None:
    baked(pending, now() - hours(1000))
    ended = pending.signed(not_before=now() - hours(60), not_after=now() - hours(25))
    assert "ended at" in pending.keeps(answers.certificate(ended), before=clock(FIRST_BOOT)).err


def test_a_ca_that_was_ahead_once_costs_nobody_the_certificates_that_follow(
    pending: Talking, authority: Authority
) -> None:
    """Its clock was a year ahead for a day; the server's own certificate lasts longer than that."""
    years = authority.server(not_after=now() + hours(5 * 8766), file="years.pem")
    ahead = pending.signed(not_before=now() + hours(8766), not_after=now() + hours(8766 + 48))
    good = pending.signed(not_after=now() + hours(47))
    hook = ("--hook", f"touch {pending.folder}/called")
    assert pending.hears(answers.certificate(ahead), by=years).status == 0
    values = json.loads(pending.run("--status", "--json").out)
    assert values["clock"]["believed"] is True and any("was ahead" in remark for remark in values["remarks"])
    run = pending.hears(answers.certificate(good), by=years, options=hook)
    assert (run.status, "new certificate" in run.err) == (0, True), run.err
    assert not pending.asked[0].if_modified_since, "a date that lies ahead would get a 304 for ever"
    assert pending.block("CERTIFICATE") == good and (pending.folder / "called").exists()
    pending.keeps(answers.certificate(good), by=years, options=hook, status=0)
    assert json.loads(pending.run("--status", "--json").out)["remarks"] == []


def test_a_clock_that_is_behind_the_firmware_forgets_nothing(pending: Talking) -> None:
    """The other side of it: with such a clock an old certificate is no news."""
    baked(pending, now() - hours(2))
    older = pending.signed(not_before=now() - hours(20), not_after=now() - hours(3))
    assert pending.hears(answers.certificate(pending.signed())).status == 0
    assert "ended at" in pending.keeps(answers.certificate(older), before=clock(now() - hours(10))).err


def test_a_believed_clock_takes_what_is_not_valid_yet_and_refuses_what_has_ended(
    pending: Talking, authority: Authority
) -> None:
    """That something isn't valid yet says that the clock is behind, and is no reason to refuse."""
    early = authority.server(not_before=now() + hours(1), not_after=now() + hours(9), file="early.pem")
    ended = authority.server(not_before=now() - hours(9), not_after=now() - hours(1), file="ended.pem")
    pending.keeps(answers.PENDING, by=early, status=69)
    assert "expired" in pending.keeps(by=ended).err and pending.asked == []


def test_a_stored_certificate_that_has_not_begun_shows_that_the_clock_is_wrong(new: Talking) -> None:
    """The clock has lost a day: what is in the file was valid once, so that day has passed."""
    new.certified(not_before=now() + hours(12), not_after=now() + hours(60))
    new.keeps(answers.certificate(new.block("CERTIFICATE") or b""), status=0)


# --- The rule by itself ---

T = 1_600_000_000  # the CA's notBefore in what follows
FAR = T + 10**8


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("dated"), not_before=moment(T), not_after=moment(FAR))


def moment(seconds: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the clock of the program."""

    def set_clock(seconds: int) -> None:
        monkeypatch.setattr("caramel_embedded.trust.time.time", lambda: seconds)

    return set_clock


@pytest.mark.parametrize(
    "clock, build, certificate, good",
    [
        # Ends count by the best known time, to the second (RFC 5280, 4.1.2.5: inclusive).
        (T, 0, (T, T + 10), True),
        (T + 10, 0, (T, T + 10), True),
        (T + 11, 0, (T, T + 10), False),
        # Beginnings don't.
        (T, 0, (T + 1, T + 10), True),
        (T + 1000, T + 1000, (T + 1001, T + 2000), True),
        # A clock behind the floor is wrong: what ended before the floor is refused.
        (T - 1, 0, (T + 1, T + 10), True),
        (0, 0, (T + 5000, T + 6000), True),
        (0, 0, (T - 10, T), True),
        (0, 0, (T - 10, T - 1), False),
        (T - 5, 0, (T - 10, T - 1), False),
        (T + 999, T + 1000, (T, T + 1000), True),
        (T + 999, T + 1000, (T, T + 999), False),
        # A build time before the CA's notBefore is no news.
        (T, T - 1000, (T - 10, T - 1), False),
    ],
)
def test_the_rule_of_the_clock(
    dated: Authority, at: Callable[[int], None], clock: int, build: int, certificate: tuple[int, int], good: bool
) -> None:
    at(clock)
    trust = Trust(dated.pem, build_time=build)
    trusted = anchors(trust)
    assert trust.clock_is_behind == (clock < max(T, build)) and trust.now() == max(clock, T, build)
    request = world.signing_request(world.new_key(), dated.subject_for(ID))
    pem = dated.sign(request, not_before=moment(certificate[0]), not_after=moment(certificate[1]))
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    try:
        certificates.verify_server([der], trusted, trust.now())
        assert good
    except InvalidCertificate as reason:
        assert not good and "ended at" in str(reason)


def test_a_time_that_has_passed_raises_the_floor_and_never_lowers_it(
    dated: Authority, at: Callable[[int], None]
) -> None:
    at(T + 10)
    trust = Trust(dated.pem)
    at(T + 15)
    assert trust.now() == T + 15, "time is taken when something is judged"
    trust.learn(T + 20)
    assert trust.clock_is_behind and trust.now() == T + 20
    trust.learn(T - 20)
    assert trust.now() == T + 20


def test_of_two_roots_the_older_one_is_the_floor(dated: Authority, tmp_path: Path) -> None:
    """A new root may be handed out before it begins."""
    new = Authority(tmp_path, not_before=moment(T + 5000), not_after=moment(FAR))
    for text in (dated.pem + new.pem, new.pem + dated.pem):
        assert Anchors(text).begins == T


def test_a_ca_that_has_ended_vouches_for_nothing(dated: Authority) -> None:
    trusted = Anchors(dated.pem)
    request = world.signing_request(world.new_key(), dated.subject_for(ID))
    certificate = x509.load_pem_x509_certificate(dated.sign(request))
    certificates.verify(certificate, [], trusted, FAR)
    with pytest.raises(InvalidCertificate, match="CA certificate has ended"):
        certificates.verify(certificate, [], trusted, FAR + 1)
