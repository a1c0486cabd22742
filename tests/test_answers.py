"""What a run does with the server's answer: every row of that table in the interface, and what is not in it.

The real server says most of this in `test_life.py`. Here is what it says in rare moments, what others say in its
place, and what it must never be taken for.
"""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import pytest
import world
from world import Answer, Authority, Caramel, Device, HttpRequest, Run, Scripted, answer, answers, hours, now

ID = "fffbeec0ffee"


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="answers.pem")


@pytest.fixture(scope="module")
def key() -> world.PrivateKey:
    return world.new_key()


@dataclass
class Talk:
    """A device, a server that says what the test wants, and what was asked in the last run."""

    device: Device
    certificate: Path
    asked: list[HttpRequest] = field(default_factory=list)
    connections: int = 0

    def run(self, *answers: Answer, options: tuple[str, ...] = ()) -> Run:
        """One run against a server that gives these answers in turn; an answer too few fails the test."""
        surplus: list[HttpRequest] = []

        def next_answer(asked: HttpRequest) -> Answer:
            turn = len(server.requests) - 1
            if turn < len(answers):
                return answers[turn]
            surplus.append(asked)
            return None

        with Scripted(self.certificate, next_answer, client_ca=self.device.ca) as server:
            self.device.server = server.address
            run = self.device.run(*options)
        self.requests, self.connections = server.requests, server.connections
        assert not surplus, f"asked too often: {surplus}"
        assert run.out == ""
        return run

    @property
    def methods(self) -> list[str]:
        return [asked.method for asked in self.requests]


@pytest.fixture
def talk(tmp_path: Path, authority: Authority, pem: Path) -> Talk:
    return Talk(Device(tmp_path / "device", None, authority.certificate_file, ID), pem)


@pytest.fixture
def pending(talk: Talk, authority: Authority, key: world.PrivateKey) -> Talk:
    """A device whose request was sent in an earlier run."""
    talk.device.has(authority.identity(ID, key=key, certified=False))
    return talk


@pytest.fixture
def certified(talk: Talk, authority: Authority, key: world.PrivateKey) -> Talk:
    """A device with a certificate that is good for another two days."""
    talk.device.has(authority.identity(ID, key=key, not_before=now() - hours(1)))
    return talk


@pytest.fixture(params=["pending", "certified"])
def enrolled(request: pytest.FixtureRequest) -> Iterator[Talk]:
    """Either of them."""
    talk: Talk = request.getfixturevalue(request.param)
    yield talk


def newer(authority: Authority, talk: Talk) -> bytes:
    return authority.sign(talk.device.request, not_before=now() - hours(1), not_after=now() + hours(96))


# --- The words themselves ---


@pytest.mark.parametrize("said", ["UNKNOWN", "REJECTED", "DUPLICATE", "PENDING"])
def test_scripts_say_what_the_real_server_says(said: str, caramel: Caramel, authority: Authority) -> None:
    client_id = "words-" + said.lower()
    request = world.signing_request(world.new_key(), authority.subject_for(client_id))
    url = f"{caramel.url}/{hashlib.sha256(request).hexdigest()}"

    def ask(body: Optional[bytes]) -> tuple[int, str, object]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, body), timeout=30) as got:
                return got.status, got.headers["Content-Type"], json.load(got)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["Content-Type"], json.load(error)

    if said != "UNKNOWN":
        ask(request)
    if said == "REJECTED":
        caramel.reject(client_id)
    status, kind, content = ask(request if said == "DUPLICATE" else None)
    head, _, body = getattr(answers, said).decode().partition("\r\n\r\n")
    assert head.split()[1] == str(status)
    assert f"Content-Type: {kind}" in head
    if said == "PENDING":
        assert isinstance(content, dict) and content.keys() == json.loads(body).keys()
    else:
        assert content == json.loads(body)


# --- 200 ---


def test_a_new_certificate_is_stored(enrolled: Talk, authority: Authority) -> None:
    fresh = newer(authority, enrolled)
    before = enrolled.device.blocks()
    run = enrolled.run(answers.certificate(fresh))
    assert run.status == 0 and "new certificate" in run.err
    assert enrolled.device.block("CERTIFICATE") == fresh
    assert [enrolled.device.blocks()[i] for i in (0, -1)] == [before[0], before[-1]]
    assert enrolled.methods == ["GET"]


def test_the_same_certificate_again_changes_nothing(certified: Talk) -> None:
    before = certified.device.snapshot()
    run = certified.run(answers.certificate(certified.device.block("CERTIFICATE") or b""))
    assert run.status == 0 and "unchanged" in run.err
    assert certified.device.snapshot() == before


# --- 304 ---


def test_not_modified_is_as_good_as_the_certificate(certified: Talk) -> None:
    before = certified.device.snapshot()
    run = certified.run(answers.NOT_MODIFIED)
    assert run.status == 0 and "valid until" in run.err
    assert certified.requests[0].if_modified_since
    assert certified.device.snapshot() == before


def test_not_modified_that_nobody_asked_for_is_refused(pending: Talk) -> None:
    before = pending.device.snapshot()
    run = pending.run(answers.NOT_MODIFIED)
    assert run.status == 127 and "304" in run.err
    assert not pending.requests[0].if_modified_since
    assert pending.device.snapshot() == before


# --- 202 ---


def test_while_nobody_signs_a_stored_certificate_stays(enrolled: Talk) -> None:
    before = enrolled.device.snapshot()
    assert enrolled.run(answers.PENDING).status == 69
    assert enrolled.device.snapshot() == before


# --- 404 to the first GET ---


def test_a_request_that_the_server_does_not_know_is_posted_and_asked_for_again(enrolled: Talk) -> None:
    before, request = enrolled.device.snapshot(), enrolled.device.request
    assert enrolled.run(answers.UNKNOWN, answers.PENDING, answers.PENDING).status == 69
    assert enrolled.methods == ["GET", "POST", "GET"]
    assert enrolled.requests[1].body == request
    assert {asked.path for asked in enrolled.requests} == {f"/{hashlib.sha256(request).hexdigest()}"}
    assert enrolled.connections == 1
    assert enrolled.device.snapshot() == before


def test_a_server_that_signs_at_once_needs_one_run_from_nothing(talk: Talk, authority: Authority, pem: Path) -> None:
    requests: list[bytes] = []

    def says(asked: HttpRequest) -> Answer:
        if asked.method == "POST":
            requests.append(asked.body)
            return answers.PENDING
        return answers.certificate(authority.sign(requests[0])) if requests else answers.UNKNOWN

    with Scripted(pem, says) as server:
        talk.device.server = server.address
        run = talk.device.run()
    assert run.status == 0 and "new certificate" in run.err
    assert [asked.method for asked in server.requests] == ["GET", "POST", "GET"] and server.connections == 1
    assert talk.device.labels == ["PRIVATE KEY", "CERTIFICATE", "NEW CERTIFICATE REQUEST"]


def test_a_server_that_closes_after_each_answer_is_asked_over_new_connections(pending: Talk) -> None:
    close = "Connection: close"
    unknown = answer(404, b"{}", "Content-Type: application/problem+json", close)
    assert pending.run(unknown, answer(202, b"{}", close), answer(202, b"{}", close)).status == 69
    assert pending.methods == ["GET", "POST", "GET"] and pending.connections == 3


def test_a_duplicate_is_what_was_posted_before_the_power_failed(enrolled: Talk) -> None:
    """The server had taken the request of an earlier run, and says so only now; its first answer was stale."""
    before = enrolled.device.snapshot()
    run = enrolled.run(answers.UNKNOWN, answers.DUPLICATE, answers.PENDING)
    assert run.status == 69 and "duplicate request" in run.err
    assert enrolled.methods == ["GET", "POST", "GET"]
    assert enrolled.device.snapshot() == before


@pytest.mark.parametrize("last", [answers.UNKNOWN, answers.REJECTED, answers.page(502), answers.NOT_MODIFIED])
def test_after_a_post_nothing_but_a_certificate_or_pending_counts(enrolled: Talk, last: bytes) -> None:
    before = enrolled.device.snapshot()
    assert enrolled.run(answers.UNKNOWN, answers.PENDING, last).status == 127
    assert enrolled.device.snapshot() == before


@pytest.mark.parametrize(
    "refusal",
    [
        answers.page(400),
        answers.page(403),
        answers.REJECTED,
        answers.page(413),
        answers.page(502),
        answer(200),
        answer(201),
    ],
)
def test_a_request_that_is_not_taken_is_kept_for_the_next_run(enrolled: Talk, refusal: bytes) -> None:
    before = enrolled.device.snapshot()
    assert enrolled.run(answers.UNKNOWN, refusal).status == 127
    assert enrolled.device.snapshot() == before


def test_a_bad_subject_is_told_in_the_servers_words(pending: Talk) -> None:
    refusal = answers.problem(400, "Bad Request", "Bad subject: (('C', 'SE'),)")
    run = pending.run(answers.UNKNOWN, refusal, answers.UNKNOWN)
    assert run.status == 127 and "Bad subject" in run.err and run.err.count("\n") == 1


def test_a_key_whose_request_may_have_arrived_is_not_lost(talk: Talk) -> None:
    """The line breaks while the first request of its life is posted."""
    assert talk.run(answers.UNKNOWN, None, None).status == 127
    request = talk.requests[1].body
    assert talk.device.request == request
    assert talk.run(answers.PENDING).status == 69
    assert talk.device.request == request


# --- 403 ---


def test_a_rejected_device_starts_over_within_the_run(enrolled: Talk) -> None:
    before = enrolled.device.snapshot()
    old, requests = enrolled.device.blocks(), enrolled.device.request
    run = enrolled.run(answers.REJECTED, answers.PENDING, answers.PENDING)
    assert run.status == 69 and "rejected" in run.err
    assert enrolled.methods == ["GET", "POST", "GET"]
    assert enrolled.requests[1].body == enrolled.device.request != requests
    assert enrolled.device.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    after = enrolled.device.snapshot()
    assert before and after and not [label for label, block in old if block in after.content]


def test_a_rejected_device_is_certified_again_at_once(certified: Talk, authority: Authority, pem: Path) -> None:
    def says(asked: HttpRequest) -> Answer:
        posted = [one.body for one in server.requests if one.method == "POST"]
        if asked.method == "POST":
            return answers.PENDING
        return answers.certificate(authority.sign(posted[0])) if posted else answers.REJECTED

    old = certified.device.request
    with Scripted(pem, says) as server:
        certified.device.server = server.address
        assert certified.device.run().status == 0
    assert certified.device.request != old and certified.device.certificate


@pytest.mark.parametrize(
    "says",
    [
        [answers.REJECTED, answers.REJECTED],
        [answers.REJECTED, answers.DUPLICATE],
        [answers.REJECTED, answers.page(502)],
        [answers.REJECTED, answers.PENDING, answers.REJECTED],
        [answers.REJECTED, None, None],
    ],
    ids=["403", "400", "502", "403-later", "end"],
)
def test_a_rejected_device_whose_new_request_is_refused_tries_no_third_one(
    enrolled: Talk, says: list[Answer]
) -> None:
    old = enrolled.device.request
    assert enrolled.run(*says).status == 127
    # Where the connection broke, the same request once more on a new one.
    assert len({asked.body for asked in enrolled.requests if asked.method == "POST"}) == 1
    assert enrolled.methods.count("POST") == says.count(None) or enrolled.methods.count("POST") == 1
    # What was posted is what is kept: it may have arrived.
    assert enrolled.requests[1].body == enrolled.device.request != old


@pytest.mark.parametrize(
    "proxy",
    [
        answers.page(403),
        answer(403),
        answer(403, b'{"status":403,"title":"Forbidden","detail":null}', "Content-Type: text/html"),
        answer(403, b'{"status":403,"title":"Forbidden","detail":null}', "Content-Type: application/json"),
        answer(403, b'{"status":502,"title":"Bad Gateway"}', "Content-Type: application/problem+json"),
        answer(403, b"<html></html>", "Content-Type: application/problem+json"),
        answer(403, b"[403]", "Content-Type: application/problem+json"),
        answer(403, b'"status"', "Content-Type: application/problem+json"),
        answer(403, b"", "Content-Type: application/problem+json"),
        answer(403, b"\xff", "Content-Type: application/problem+json"),
        answer(403, b"[" * 60000, "Content-Type: application/problem+json"),
    ],
    ids=["nginx", "empty", "html-type", "json", "other-status", "page", "list", "text", "nothing", "bytes", "deep"],
)
def test_a_broken_proxy_costs_no_device_its_identity(pending: Talk, proxy: bytes) -> None:
    before = pending.device.snapshot()
    run = pending.run(proxy)
    assert run.status == 127 and "403" in run.err
    assert pending.device.snapshot() == before


def test_a_broken_proxy_costs_no_certified_device_its_identity(certified: Talk) -> None:
    """A front end may say this because of the client certificate: hence one more try, see the client certificate."""
    before = certified.device.snapshot()
    assert certified.run(answers.page(403), answers.page(403)).status == 127
    assert certified.device.snapshot() == before
    assert [bool(asked.client_certificate) for asked in certified.requests] == [True, False]


# --- Anything else ---


@pytest.mark.parametrize("status", [201, 203, 204, 205, 206, 300, 402, 405, 408, 410, 418, 429, 451])
def test_a_status_that_caramel_never_gives_changes_nothing(enrolled: Talk, status: int) -> None:
    before = enrolled.device.snapshot()
    run = enrolled.run(answer(status))
    assert run.status == 127 and str(status) in run.err and run.err.count("\n") == 1
    assert enrolled.device.snapshot() == before


@pytest.mark.parametrize("status", [500, 502, 503, 504, 599])
def test_a_server_in_trouble_is_asked_once_a_run(enrolled: Talk, status: int) -> None:
    before = enrolled.device.snapshot()
    run = enrolled.run(answer(status, b"", "Retry-After: 1"))
    assert run.status == 127 and str(status) in run.err
    assert enrolled.device.snapshot() == before


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(enrolled: Talk, status: int, pem: Path, authority: Authority) -> None:
    before = enrolled.device.snapshot()
    with Scripted(pem, [answers.certificate(newer(authority, enrolled))]) as elsewhere:
        target = f"Location: https://{elsewhere.address}/{enrolled.device.request_hash()}"
        run = enrolled.run(answer(status, b"", target))
        here = enrolled.run(answer(status, b"", f"Location: /{enrolled.device.request_hash()}"))
    assert (run.status, here.status, elsewhere.connections) == (127, 127, 0)
    assert str(status) in run.err
    assert enrolled.device.snapshot() == before


@pytest.mark.parametrize(
    "what",
    [b"", b"SSH-2.0-OpenSSH_9.2p1\r\n", b"HTTP/1.1 abc Whatever\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200],
    ids=["nothing", "ssh", "status", "headers"],
)
def test_what_is_no_http_changes_nothing(pending: Talk, what: bytes) -> None:
    before = pending.device.snapshot()
    run = pending.run([what, 0.0, b""])
    assert run.status == 127 and run.err.count("\n") == 1
    assert pending.device.snapshot() == before


def test_a_device_with_nothing_keeps_the_key_that_it_made_whatever_the_server_says(talk: Talk) -> None:
    assert talk.run(answers.page(502)).status == 127
    request = talk.device.request
    assert talk.run(answers.UNKNOWN, answers.PENDING, answers.PENDING).status == 69
    assert talk.requests[1].body == talk.device.request == request
