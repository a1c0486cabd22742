"""What must hold for anything: any bytes in the key file, any text in the configuration, any answer, any sequence of
answers, kills and clocks.

What hypothesis and the fuzzer have found stands as a named test in test_faults.py.
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import urllib3
import world
from hypothesis import HealthCheck, example, given
from hypothesis import settings as bounded
from hypothesis import strategies as st
from needs import slow
from torture import simulation
from torture.fleet import key_file_parts

from caramel_embedded import certificates, hardware, identity, settings, trust
from caramel_embedded.certificates import InvalidCertificate, InvalidIdentity
from caramel_embedded.errors import Refused, Unreachable, UsageError

ID = "fe00feedc0de"
#: Bounded in count, and the same every time: a test that fails by chance helps nobody.
BOUNDS = bounded(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storm")


@pytest.fixture(scope="module")
def trusted(folder: Path) -> trust.Trust:
    return trust.Trust(simulation.authority(str(folder)).pem)


@pytest.fixture(scope="module")
def certified(folder: Path) -> bytes:
    return simulation.authority(str(folder)).identity(ID)


#: Changes to a file: where (as a share of it), how many bytes go, what comes in their place.
CHANGES = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 90), st.one_of(st.binary(max_size=70), st.just(b"\n"))),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, changes: Sequence[tuple[float, int, bytes]]) -> bytes:
    for share, length, instead in changes:
        place = int(share * len(data))
        data = data[:place] + instead + data[place + length :]
    return data


def _whatever_is_kept_is_whole(data: bytes, trusted: trust.Trust) -> None:
    sealed = identity.Identity.sealed(data, trusted.digest)
    assert sealed is None or bytes(sealed) == data
    anchors = certificates.Anchors(trusted.ca_cert)
    try:
        kept, wrong = certificates.examine(data, ID, anchors, trusted, (), None)
    except InvalidIdentity as reason:
        assert str(reason).isprintable() and "PRIVATE" not in str(reason)
        return
    assert all(reason.isprintable() for reason in wrong)
    again = identity.Identity.sealed(bytes(kept), trusted.digest)
    assert again is not None and bytes(again) == bytes(kept)
    twice, wrong = certificates.examine(bytes(kept), ID, anchors, trusted, (), None)
    assert (bytes(twice), wrong) == (bytes(kept), [])
    assert key_file_parts(bytes(kept)) is not None


@bounded(BOUNDS, max_examples=60)
@given(CHANGES)
@example([(0.25, 1, b"\n")])  # one letter less: no length that Base64 can have
def test_any_damage_to_the_key_file_is_noticed_or_repaired(
    certified: bytes, trusted: trust.Trust, changes: list[tuple[float, int, bytes]]
) -> None:
    _whatever_is_kept_is_whole(changed(certified, changes), trusted)


@BOUNDS
@given(st.one_of(st.binary(max_size=300), st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))))
@example(b"-----BEGIN PRIVATE KEY-----\n" * 1000)
@example(b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n")
def test_any_bytes_can_be_in_the_key_file(trusted: trust.Trust, data: bytes) -> None:
    _whatever_is_kept_is_whole(data, trusted)


@bounded(BOUNDS, max_examples=40)
@given(st.integers(0, 1 << 20), st.integers(1, 255))
def test_any_changed_byte_of_a_certificate_makes_it_unusable_or_nothing(
    certified: bytes, trusted: trust.Trust, place: int, change: int
) -> None:
    parts = key_file_parts(certified)
    assert parts is not None and parts.certificate is not None
    data = bytearray(parts.certificate)
    data[place % len(data)] ^= change
    anchors = certificates.Anchors(trusted.ca_cert)
    owner = identity.Identity(parts.key, parts.request, ID, trusted.digest)
    try:
        issued = certificates.accept(bytes(data), owner, anchors, trusted)
    except InvalidCertificate as reason:
        assert str(reason).isprintable()
        return
    assert _same_der(issued.pem, parts.certificate)


def _same_der(one: bytes, other: bytes) -> bool:
    """The last letter of base64 has bits that mean nothing."""
    return ssl.PEM_cert_to_DER_cert(one.decode()) == ssl.PEM_cert_to_DER_cert(other.decode())


# --- The configuration

NAMES = st.sampled_from([*settings.VALUES, "OTHER", "A1"])
VALUES = st.text(
    st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"], exclude_characters="\"'\\$`"), max_size=30
)


@BOUNDS
@given(st.text(max_size=120))
@example("A='")
@example('A="""')
@example("A='\u2028'")
@example("\0=\0")
def test_any_text_can_be_in_the_configuration_file(text: str) -> None:
    try:
        values = settings.parse(text, "file")
    except UsageError as error:
        assert str(error).startswith("file, line ")
        return
    for name, value in values.items():
        assert name.isascii() and value.isprintable()


@BOUNDS
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=4))
def test_a_configuration_in_quotes_means_the_same_to_a_shell(tmp_path: Path, values: dict[str, str]) -> None:
    text = "".join(f'{name}="{value}"\n' for name, value in values.items())
    try:
        parsed = settings.parse(text, "file")
    except UsageError:
        return
    assert parsed == values
    path = tmp_path / "conf"
    path.write_text(text)
    shown = "".join(f'printf "%s\\0" "${name}"; ' for name in parsed)
    done = subprocess.run(["/bin/sh", "-c", f". {path}; {shown}"], stdout=subprocess.PIPE, timeout=20, check=True)
    assert done.stdout.decode().split("\0")[:-1] == list(parsed.values())


@BOUNDS
@given(st.sampled_from(sorted(settings.VALUES)), st.text(max_size=80))
@example("CARAMEL_CA", "[::1]:443")
@example("CARAMEL_CA", "a:٣")
@example("CARAMEL_OWNER", "²")
@example("CARAMEL_GROUP", "\0")
@example("CARAMEL_OWNER", "\0")
@example("CARAMEL_TIMEOUT", "nan")
@example("CARAMEL_TIMEOUT", "1_0")
@example("CARAMEL_HOOK", "'")
def test_any_text_can_be_a_value(name: str, text: str) -> None:
    try:
        settings.VALUES[name](text)
    except UsageError as error:
        assert str(error).isprintable()


# --- The hardware


@BOUNDS
@given(
    st.lists(st.tuples(st.sampled_from(hardware.SERIAL_NUMBER_FILES), st.binary(max_size=80)), max_size=3),
    st.lists(st.tuples(st.sampled_from(["eth0", "wlan0", "br0"]), st.binary(max_size=30), st.booleans()), max_size=3),
)
def test_whatever_the_hardware_says_a_client_id_is_one(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[tuple[str, bytes]],
    interfaces: list[tuple[str, bytes, bool]],
) -> None:
    root = tmp_path_factory.mktemp("root")
    for name, data in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    for interface, address, physical in interfaces:
        net = root / "sys/class/net" / interface
        net.mkdir(parents=True, exist_ok=True)
        (net / "address").write_bytes(address)
        (net / "type").write_text("1\n")
        (net / "addr_assign_type").write_text("0\n")
        if physical:
            (net / "device").mkdir(exist_ok=True)
    try:
        found, source = hardware.Hardware(root=str(root)).client_id()
    except UsageError:
        return
    assert settings.is_client_id(found) and source
    if source.startswith("MAC"):
        assert len(found) == 12 and int(found[1], 16) & 3 == 0 and int(found, 16)


# --- The server's answer

NAMES_OF_HEADERS = "Content-Type Content-Length Transfer-Encoding Content-Encoding Last-Modified X"
VALUES_OF_HEADERS = (
    "application/problem+json",
    "chunked",
    "identity",
    "0",
    "5",
    "-1",
    "Sun, 22 Nov 2026 04:00:00 GMT",
)
ANY_VALUE = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=40)
HEADERS = st.lists(
    st.tuples(st.sampled_from(NAMES_OF_HEADERS.split()), st.one_of(st.sampled_from(VALUES_OF_HEADERS), ANY_VALUE)),
    max_size=5,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=9)),
    lambda inner: st.dictionaries(st.sampled_from(["status", "title", "detail"]), inner) | st.lists(inner),
    max_leaves=5,
)
BODIES = st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()))


@BOUNDS
@given(st.integers(0, 1100), HEADERS, BODIES)
@example(403, [("Content-Type", "application/problem+json")], b'{"status":403}')
def test_any_answer_is_understood_or_refused(status: int, headers: list[tuple[str, str]], body: bytes) -> None:
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    data = f"HTTP/1.1 {status} X\r\n{head}\r\n".encode("latin-1", "replace") + body
    try:
        answer = simulation.parsed(data)
    except (Refused, Unreachable, OSError, http.client.HTTPException, urllib3.exceptions.HTTPError, ValueError):
        return  # what Server makes words of
    assert str(answer).isprintable() and len(answer.body) <= 65536
    assert not answer.from_caramel or any("problem+json" in value for _, value in headers)
    assert answer.last_modified is None or 0 <= answer.last_modified < 1e12


# --- The state machine


@slow
@bounded(BOUNDS, max_examples=12)
@given(simulation.ACTS)
@example([("ok", (), (), 0.0), "sign for a short time", ("ok", (), (), 0.0), "time passes", ("ok", (), (), 0.0)])
def test_no_sequence_of_answers_kills_and_clocks_loses_a_key(folder: Path, acts: list[Any]) -> None:
    played = simulation.simulate(folder, acts)
    assert not played.wrong, played.wrong


# --- The fuzzers


@slow
@pytest.mark.parametrize("target", ["key-file", "answer"])
def test_the_fuzzer_finds_nothing_in_a_few_seconds(tmp_path: Path, target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-Es", "-m", "torture.fuzz", target, "4", str(tmp_path)],
        cwd=world.ROOT / "tests",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        env=world.environment(),
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-3000:]
