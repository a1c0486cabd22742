# SPDX-License-Identifier: MIT OR Apache-2.0
"""The filter, first by itself around applications of one line, then in front of the real Caramel server.

What it must never do is answer 304 to a device that holds another certificate than the server would hand out.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
import uuid
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any, Optional

import caramel_conditional
import pytest
import world
from bench.filtered import FilteredCaramel, MeteredNginx
from cryptography import x509
from needs import needs, slow

SHA256 = "/" + 64 * "a"
SIGNED = 1_700_000_000  # seconds since 1970: when the certificate of the tests without a server was signed

Answer = tuple[int, dict[str, str], bytes]


# --- By itself ----------------------------------------------------------------------------------------------


def serial_of(moment: float) -> int:
    """A serial number as Caramel takes one at this moment."""
    ticks = int((moment + caramel_conditional.GREGORIAN_TO_UNIX) * 10_000_000)
    return uuid.UUID(fields=(ticks & 0xFFFFFFFF, ticks >> 32 & 0xFFFF, ticks >> 48, 0x80, 1, 2), version=1).int


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> world.Authority:
    return world.Authority(tmp_path_factory.mktemp("signer"))


def certificate(signer: world.Authority, moment: float = SIGNED, **fields: Any) -> bytes:
    fields.setdefault("serial", serial_of(moment))
    return signer.issue(signer.key.public_key(), signer.subject_for("device"), **fields)


class Fixed:
    """A WSGI application that always says the same, and remembers whether it was closed."""

    def __init__(self, body: bytes = b"", status: str = "200 OK", *headers: tuple[str, str]) -> None:
        self.body, self.status, self.headers, self.open = body, status, list(headers), 0

    def __call__(self, environ: Any, start_response: Any) -> Fixed:
        self.open += 1
        self.method = environ["REQUEST_METHOD"]
        start_response(self.status, [("Content-Length", str(len(self.body))), *self.headers])
        return self

    def __iter__(self) -> Iterator[bytes]:
        return iter([self.body[:10], self.body[10:]])

    def close(self) -> None:
        self.open -= 1


def ask(app: Any, path: str = SHA256, method: str = "GET", **headers: str) -> Answer:
    """What the filter around `app` says: status, headers, body."""
    said: list[Any] = []

    def start_response(status: str, answered: list[tuple[str, str]], exc_info: Any = None) -> None:
        said[:] = [int(status[:3]), dict(answered)]

    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        **{f"HTTP_{name}": text for name, text in headers.items()},
    }
    if not isinstance(app, caramel_conditional.Conditional):
        app = caramel_conditional.make_filter(app, {})
    body = b"".join(app(environ, start_response))
    return said[0], said[1], body


def test_a_certificate_gets_a_date_and_the_same_date_gets_304(signer: world.Authority) -> None:
    pem = certificate(signer)
    app = Fixed(pem, "200 OK", ("X-Kept", "yes"), ("Content-Type", "application/octet-stream"))
    status, headers, body = ask(app)
    assert (status, body) == (200, pem)
    assert headers["Last-Modified"] == formatdate(SIGNED + 2, usegmt=True)
    status, answered, body = ask(app, IF_MODIFIED_SINCE=headers["Last-Modified"])
    assert (status, answered, body) == (304, {"X-Kept": "yes"}, b"")
    assert app.open == 0


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"])
def test_all_three_forms_of_a_date_are_read(signer: world.Authority, form: str) -> None:
    date = datetime.datetime.fromtimestamp(SIGNED + 2, datetime.timezone.utc)
    assert ask(Fixed(certificate(signer)), IF_MODIFIED_SINCE=date.strftime(form))[0] == 304


@pytest.mark.parametrize(
    "value",
    [
        "",
        "yesterday",
        "0",
        "Tue, 14 Nov 2023",
        "Tue, 14 Nov 2023 22:13:22 GMT and more",
        "Tue, 99 Nov 99999999999999999 22:13:22 GMT",
        "Tue, 14 Nov 2023 25:61:61 GMT",
        "Thu, 01 Jan 1970 00:00:00 GMT",
        ", , , ,",
        "\udcff",
        9999 * "1 ",
    ],
)
def test_what_is_no_date_or_another_one_gets_the_certificate(signer: world.Authority, value: str) -> None:
    pem = certificate(signer)
    status, _headers, body = ask(Fixed(pem), IF_MODIFIED_SINCE=value)
    if "and more" in value:  # lenient reading of what did come from us hurts nobody
        assert status in (200, 304)
    else:
        assert (status, body) == (200, pem)


@pytest.mark.parametrize("off", [-100000, -2, -1, 1, 2, 100000])
def test_only_the_very_date_counts_not_a_later_one(signer: world.Authority, off: int) -> None:
    date = formatdate(SIGNED + 2 + off, usegmt=True)
    assert ask(Fixed(certificate(signer)), IF_MODIFIED_SINCE=date)[0] == 200


@pytest.mark.parametrize("tags", ['"x"', "*", 'W/"y", "z"', ""])
def test_if_none_match_wins_over_a_date(signer: world.Authority, tags: str) -> None:
    date = formatdate(SIGNED + 2, usegmt=True)
    assert ask(Fixed(certificate(signer)), IF_MODIFIED_SINCE=date, IF_NONE_MATCH=tags)[0] == 200


def test_head_says_what_get_says_without_the_body(signer: world.Authority) -> None:
    pem = certificate(signer)
    app = Fixed(pem)
    status, headers, body = ask(app, method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(pem)))
    assert (app.method, app.open) == ("GET", 0)
    assert ask(app, method="HEAD", IF_MODIFIED_SINCE=headers["Last-Modified"])[0] == 304


@pytest.mark.parametrize(
    "status", ["202 Accepted", "403 Forbidden", "404 Not Found", "500 Oops", "206 Partial Content"]
)
def test_any_other_answer_passes_through(signer: world.Authority, status: str) -> None:
    pem = certificate(signer)
    answered, headers, body = ask(Fixed(pem, status), IF_MODIFIED_SINCE=formatdate(SIGNED + 2, usegmt=True))
    assert (answered, headers, body) == (int(status[:3]), {"Content-Length": str(len(pem))}, pem)


@pytest.mark.parametrize("path,method", [(SHA256, "POST"), ("/root.crt", "GET"), ("/bundle.crt", "GET"), ("", "GET")])
def test_any_other_request_passes_through(signer: world.Authority, path: str, method: str) -> None:
    pem = certificate(signer)
    status, headers, body = ask(Fixed(pem), path, method, IF_MODIFIED_SINCE=formatdate(SIGNED + 2, usegmt=True))
    assert (status, headers, body) == (200, {"Content-Length": str(len(pem))}, pem)


@pytest.mark.parametrize(
    "body", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"]
)
def test_a_200_that_is_no_certificate_passes_through(body: bytes) -> None:
    assert ask(Fixed(body)) == (200, {"Content-Length": str(len(body))}, body)


@pytest.mark.parametrize("serial", [1, uuid.UUID("4f1c3a52-7d10-4b6e-9a35-0c2d8be6f701").int, 2**158])
def test_a_serial_number_that_tells_no_time_gets_no_date(signer: world.Authority, serial: int) -> None:
    assert "Last-Modified" not in ask(Fixed(certificate(signer, serial=serial)))[1]


def test_a_date_that_the_server_gave_itself_stays_alone(signer: world.Authority) -> None:
    theirs = ("last-modified", "Sat, 01 Jan 2000 00:00:00 GMT")
    status, headers, _ = ask(Fixed(certificate(signer), "200 OK", theirs), IF_MODIFIED_SINCE=theirs[1])
    assert (status, headers.get("Last-Modified"), headers["last-modified"]) == (200, None, theirs[1])


def test_no_date_is_given_or_believed_before_the_certificate_has_settled(
    signer: world.Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = caramel_conditional.make_filter(Fixed(certificate(signer, SIGNED + 0.999)), {}, "60")
    date = formatdate(SIGNED + 2, usegmt=True)
    for moment, status, dated in [(-5, 200, False), (1, 200, False), (61.9, 200, False), (62, 304, True)]:
        monkeypatch.setattr(time, "time", lambda at=SIGNED + moment: at)
        assert ask(app, IF_MODIFIED_SINCE=date)[0] == status
        assert ("Last-Modified" in ask(app)[1]) == dated


def test_the_date_is_later_than_any_not_before_of_that_and_of_earlier_certificates(
    signer: world.Authority,
) -> None:
    # The serial number is taken first, notBefore a moment later, which may be the next second.
    for moment in (SIGNED, SIGNED + 0.5, SIGNED + 0.999999):
        date = caramel_conditional.last_modified(certificate(signer, moment))
        assert date is not None and date > int(moment + 0.9)


# --- In front of the real server ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caramel(tmp_path_factory: pytest.TempPathFactory, signer: world.Authority) -> Iterator[FilteredCaramel]:
    server = FilteredCaramel(tmp_path_factory.mktemp("filtered"), signer, hours_short=48)
    server.settle = 1.0
    with server:
        yield server


@pytest.fixture(scope="module")
def backdating(tmp_path_factory: pytest.TempPathFactory, signer: world.Authority) -> Iterator[FilteredCaramel]:
    server = FilteredCaramel(tmp_path_factory.mktemp("backdating"), signer, backdate=True)
    server.settle = 1.0
    with server:
        yield server


def http(
    server: world.Caramel, sha256: str, method: str = "GET", body: Optional[bytes] = None, **headers: str
) -> Answer:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(
            method, f"/{sha256}", body, {name.replace("_", "-"): text for name, text in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def enrolled(server: world.Caramel, client_id: str) -> str:
    """The hash of a new device's request, which the server has now."""
    request = world.signing_request(world.new_key(), server.authority.subject_for(client_id))
    sha256 = hashlib.sha256(request).hexdigest()
    assert http(server, sha256)[0] == 404
    assert http(server, sha256, "POST", request)[0] == 202
    return sha256


def settled(server: FilteredCaramel, sha256: str) -> Answer:
    """The server's answer, with the date, as soon as it has one."""

    def dated() -> Optional[Answer]:
        answer = http(server, sha256)
        return answer if "Last-Modified" in answer[1] else None

    answer = world.until("the certificate has settled", dated, pause=0.1)
    assert isinstance(answer, tuple)
    return answer


def test_a_life_behind_the_filter(caramel: FilteredCaramel) -> None:
    sha256 = enrolled(caramel, "life")
    anything = formatdate(usegmt=True)
    assert http(caramel, sha256, If_Modified_Since=anything)[0] == 202
    caramel.sign(sha256)
    _, headers, pem = settled(caramel, sha256)
    assert caramel.certificates(sha256) == [pem]
    date = headers["Last-Modified"]
    status, headers, body = http(caramel, sha256, If_Modified_Since=date)
    assert (status, body) == (304, b"") and "Content-Type" not in headers
    assert http(caramel, sha256, "HEAD", If_Modified_Since=date)[0] == 304
    caramel.sign(sha256, hours=72)
    status, _, renewed = http(caramel, sha256, If_Modified_Since=date)
    assert status == 200 and renewed != pem
    assert settled(caramel, sha256)[2] == renewed
    caramel.reject(sha256)
    for asked in (date, anything):
        status, headers, body = http(caramel, sha256, If_Modified_Since=asked)
        assert status == 403 and b"Forbidden" in body and headers["Content-Type"] == "application/problem+json"


def test_every_check_is_still_in_the_servers_log(caramel: FilteredCaramel) -> None:
    import sqlite3

    sha256 = enrolled(caramel, "logged")
    caramel.sign_at_once(sha256)
    date = settled(caramel, sha256)[1]["Last-Modified"]

    def logged() -> int:
        with contextlib.closing(sqlite3.connect(str(caramel.database), timeout=60)) as database, database:
            return int(database.execute("SELECT COUNT(*) FROM accesslog").fetchone()[0])

    before = logged()
    assert http(caramel, sha256, If_Modified_Since=date)[0] == 304
    assert logged() == before + 1


@slow
@pytest.mark.parametrize("kind", ["caramel", "backdating"])
def test_signed_again_within_the_same_second(kind: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(kind)
    sha256 = enrolled(server, f"twice-{kind}")
    # A device may have fetched the first one before there was a second: then it got no date, ...
    server.settle = 1.0
    first_second = server.sign_at_once(sha256)
    status, headers, first = http(server, sha256)
    assert status == 200 and ("Last-Modified" not in headers or time.time() > first_second + 3)
    # ... and asks with the notBefore of what it holds. Here both are signed in one second, and the second one
    # stays.
    server.sign_at_once(sha256, times=2)
    (held,) = server.certificates(sha256)
    _, headers, body = settled(server, sha256)
    assert body == held != first
    not_before = x509.load_pem_x509_certificate(held).not_valid_before_utc
    asked = formatdate(not_before.timestamp(), usegmt=True)
    assert asked != headers["Last-Modified"]
    assert http(server, sha256, If_Modified_Since=asked)[0] == 200
    assert http(server, sha256, If_Modified_Since=headers["Last-Modified"])[0] == 304


@slow
def test_backdated_certificates_have_the_same_not_before_and_different_dates(
    backdating: FilteredCaramel,
) -> None:
    sha256 = enrolled(backdating, "backdated")
    seen = []
    for hours in (48, 72):
        backdating.sign_at_once(sha256, hours=hours)
        _, headers, pem = settled(backdating, sha256)
        not_before = x509.load_pem_x509_certificate(pem).not_valid_before_utc
        # Caramel takes the CA's date from the clock's distance, and may be a second off.
        assert abs(not_before - backdating.authority.certificate.not_valid_before_utc).total_seconds() <= 1
        asked = formatdate(not_before.timestamp(), usegmt=True)
        assert http(backdating, sha256, If_Modified_Since=asked)[0] == 200
        seen.append(headers["Last-Modified"])
    assert len(set(seen)) == 2
    assert http(backdating, sha256, If_Modified_Since=seen[0])[0] == 200
    assert http(backdating, sha256, If_Modified_Since=seen[1])[0] == 304


@slow
def test_an_older_certificate_that_is_current_again_is_handed_out(caramel: FilteredCaramel) -> None:
    sha256 = enrolled(caramel, "older")
    caramel.sign_at_once(sha256, hours=48)
    _, _, older = settled(caramel, sha256)
    caramel.sign_at_once(sha256, hours=72, replace=False)
    _, headers, newer = settled(caramel, sha256)
    assert newer != older
    import sqlite3

    with contextlib.closing(sqlite3.connect(str(caramel.database), timeout=60)) as database, database:
        database.execute("DELETE FROM certificate WHERE pem = ?", (newer,))
    status, _, body = http(caramel, sha256, If_Modified_Since=headers["Last-Modified"])
    assert (status, body) == (200, older)


def test_the_servers_own_tools_read_the_ini_file_as_before(caramel: FilteredCaramel, tmp_path: Path) -> None:
    assert "filter-with" in caramel.ini.read_text()
    sha256 = enrolled(caramel, "listed")
    assert sha256 in [request.sha256 for request in caramel.listed()]


@needs("nginx")
@pytest.mark.parametrize("kind", ["any nginx", "nginx-metered.conf"])
def test_the_command_gets_304_and_writes_nothing(
    kind: str, caramel: FilteredCaramel, signer: world.Authority, tmp_path: Path
) -> None:
    client_id = kind.replace(" ", "-")
    front_of = MeteredNginx if kind == "nginx-metered.conf" else world.Nginx
    with front_of(tmp_path / "nginx", caramel, signer.server()) as front:
        device = world.Device(tmp_path / "device", front.address, signer.certificate_file, client_id)
        assert device.run().status == 69
        caramel.sign(client_id)
        assert device.run().status == 0
        settled(caramel, device.request_hash())
        # Whether the first date came too early or not: after one more run the device has it, ...
        assert device.run().status == 0
        before = device.snapshot()
        with front.watched() as seen:
            assert device.run().status == 0
        # ... and is answered 304 from then on.
        assert [asked.status for asked in seen] == [304]
        assert device.snapshot() == before
        caramel.reject(client_id)
        assert device.run().status == 69
        assert device.snapshot() != before
