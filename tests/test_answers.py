"""What a run does with the server's answer: every row of that table in the interface, and what is not in it.

The real server says most of this in `test_life.py`. Here is what it says in rare moments, what others say in its
place, and what it must never be taken for.
"""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from typing import Optional

import pytest
import world
from talking import FIRST_TIME, Talking
from world import Answer, Authority, Caramel, HttpRequest, Scripted, answer, answers, hours, now

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


# --- 200, 202, 304 ---


def test_a_new_certificate_is_stored(enrolled: Talking) -> None:
    fresh = enrolled.signed(not_after=now() + hours(96))
    before = enrolled.blocks()
    run = enrolled.hears(answers.certificate(fresh))
    assert run.status == 0 and "new certificate" in run.err
    assert enrolled.block("CERTIFICATE") == fresh
    assert [enrolled.blocks()[i] for i in (0, -1)] == [before[0], before[-1]]
    assert enrolled.methods == ["GET"]


def test_the_same_certificate_again_changes_nothing(certified: Talking) -> None:
    same = answers.certificate(certified.block("CERTIFICATE") or b"")
    assert "unchanged" in certified.keeps(same, status=0).err


def test_not_modified_is_as_good_as_the_certificate(certified: Talking) -> None:
    assert "valid until" in certified.keeps(answers.NOT_MODIFIED, status=0).err
    assert certified.asked[0].if_modified_since


def test_not_modified_that_nobody_asked_for_is_refused(pending: Talking) -> None:
    assert "304" in pending.keeps(answers.NOT_MODIFIED).err
    assert not pending.asked[0].if_modified_since


def test_while_nobody_signs_a_stored_certificate_stays(enrolled: Talking) -> None:
    enrolled.keeps(answers.PENDING, status=69)


# --- 404 to the first GET ---


@pytest.mark.parametrize("posted", [answers.PENDING, answers.DUPLICATE], ids=["taken", "duplicate"])
def test_a_request_that_the_server_does_not_know_is_posted_and_asked_for_again(
    enrolled: Talking, posted: bytes
) -> None:
    """A duplicate: it was posted before the power failed. The server had taken it, and its first answer was stale."""
    run = enrolled.keeps(answers.UNKNOWN, posted, answers.PENDING, status=69)
    assert ("duplicate request" in run.err) == (posted == answers.DUPLICATE)
    assert (enrolled.methods, enrolled.connections) == (["GET", "POST", "GET"], 1)
    assert enrolled.asked[1].body == enrolled.request
    assert {asked.path for asked in enrolled.asked} == {f"/{enrolled.request_hash()}"}


@pytest.mark.parametrize("life", ["new", "certified"])
def test_a_server_that_signs_at_once_needs_one_run(new: Talking, life: str) -> None:
    """From nothing, and after a rejection."""
    if life == "certified":
        new.certified()
    old = new.block("NEW CERTIFICATE REQUEST") if new.key_file.exists() else None
    posted: list[bytes] = []

    def says(asked: HttpRequest) -> Answer:
        if asked.method == "POST":
            posted.append(asked.body)
            return answers.PENDING
        if posted:
            return answers.certificate(new.authority.sign(posted[0]))
        return answers.REJECTED if old else answers.UNKNOWN

    run = new.hears(says)
    assert run.status == 0 and "new certificate" in run.err
    assert (new.methods, new.connections) == (["GET", "POST", "GET"], 1)
    assert new.labels == ["PRIVATE KEY", "CERTIFICATE", "NEW CERTIFICATE REQUEST"]
    assert new.block("NEW CERTIFICATE REQUEST") != old


def test_a_server_that_closes_after_each_answer_is_asked_over_new_connections(pending: Talking) -> None:
    close = "Connection: close"
    unknown = answer(404, b"{}", "Content-Type: application/problem+json", close)
    assert pending.hears(unknown, answer(202, b"{}", close), answer(202, b"{}", close)).status == 69
    assert pending.methods == ["GET", "POST", "GET"] and pending.connections == 3


#: To a POST, and to the GET after it: the request is kept for the next run.
REFUSALS: dict[str, list[Answer]] = {
    **{f"{status} to POST": [answers.page(status)] for status in (400, 403, 413, 502)},
    **{f"empty {status} to POST": [answer(status)] for status in (200, 201)},
    "rejected by POST": [answers.REJECTED],
    "404 after POST": [answers.PENDING, answers.UNKNOWN],
    "rejected after POST": [answers.PENDING, answers.REJECTED],
    "502 after POST": [answers.PENDING, answers.page(502)],
    "304 after POST": [answers.PENDING, answers.NOT_MODIFIED],
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_request_that_is_not_taken_is_kept_for_the_next_run(enrolled: Talking, what: str) -> None:
    enrolled.keeps(answers.UNKNOWN, *REFUSALS[what])


def test_a_bad_subject_is_told_in_the_servers_words(pending: Talking) -> None:
    refusal = answers.problem(400, "Bad Request", "Bad subject: (('C', 'SE'),)")
    assert "Bad subject" in pending.keeps(answers.UNKNOWN, refusal, answers.UNKNOWN).err


@pytest.mark.parametrize("first", [[answers.page(502)], [answers.UNKNOWN, None, None]], ids=["502", "line breaks"])
def test_a_key_whose_request_may_have_arrived_is_not_lost(new: Talking, first: list[Answer]) -> None:
    """Whatever happens to the first run of its life, the next one goes on with the same request."""
    assert new.hears(*first).status == 127
    request = new.request
    assert {asked.body for asked in new.asked if asked.method == "POST"} <= {request}
    assert new.hears(*FIRST_TIME).status == 69
    assert new.asked[1].body == new.request == request


# --- 403 ---


def test_a_rejected_device_starts_over_within_the_run(enrolled: Talking) -> None:
    old, request = enrolled.blocks(), enrolled.request
    run = enrolled.hears(answers.REJECTED, answers.PENDING, answers.PENDING)
    assert run.status == 69 and "rejected" in run.err
    assert enrolled.methods == ["GET", "POST", "GET"]
    assert enrolled.asked[1].body == enrolled.request != request
    assert enrolled.labels == ["PRIVATE KEY", "NEW CERTIFICATE REQUEST"]
    content = enrolled.key_file.read_bytes()
    assert not [label for label, block in old if block in content]


@pytest.mark.parametrize(
    "says",
    [
        [answers.REJECTED],
        [answers.DUPLICATE],
        [answers.page(502)],
        [answers.PENDING, answers.REJECTED],
        [None, None],
    ],
    ids=["403", "400", "502", "403-later", "end"],
)
def test_a_rejected_device_whose_new_request_is_refused_tries_no_third_one(
    enrolled: Talking, says: list[Answer]
) -> None:
    old = enrolled.request
    assert enrolled.hears(answers.REJECTED, *says).status == 127
    # Where the connection broke, the same request once more on a new one.
    posted = [asked.body for asked in enrolled.asked if asked.method == "POST"]
    assert len(posted) == says.count(None) or len(posted) == 1
    # What was posted is what is kept: it may have arrived.
    assert {enrolled.request} == set(posted) and enrolled.request != old


FORBIDDEN = b'{"status":403,"title":"Forbidden","detail":null}'
PROBLEM = "Content-Type: application/problem+json"
PROXIES = {
    "nginx": answers.page(403),
    "empty": answer(403),
    "html-type": answer(403, FORBIDDEN, "Content-Type: text/html"),
    "json": answer(403, FORBIDDEN, "Content-Type: application/json"),
    "other-status": answer(403, FORBIDDEN.replace(b"403", b"502"), PROBLEM),
    "page": answer(403, b"<html></html>", PROBLEM),
    "list": answer(403, b"[403]", PROBLEM),
    "text": answer(403, b'"status"', PROBLEM),
    "nothing": answer(403, b"", PROBLEM),
    "bytes": answer(403, b"\xff", PROBLEM),
    "deep": answer(403, b"[" * 60000, PROBLEM),
}


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_broken_proxy_costs_no_device_its_identity(pending: Talking, proxy: str) -> None:
    """Nor one with a certificate: see `test_client_certificate.py`, because that one asks once more without it."""
    assert "403" in pending.keeps(PROXIES[proxy]).err


# --- Anything else ---

STATUSES = [201, 203, 204, 205, 206, 300, 402, 405, 408, 410, 418, 429, 451, 500, 502, 503, 504, 599]


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_that_caramel_never_gives_changes_nothing_and_is_asked_for_once(
    enrolled: Talking, status: int
) -> None:
    assert str(status) in enrolled.keeps(answer(status, b"", "Retry-After: 1")).err


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(enrolled: Talking, status: int, authority: Authority) -> None:
    good = answers.certificate(enrolled.signed(not_after=now() + hours(96)))
    with Scripted(authority.server(file="elsewhere.pem"), [good]) as elsewhere:
        for server in (f"https://{elsewhere.address}", ""):
            location = f"Location: {server}/{enrolled.request_hash()}"
            assert str(status) in enrolled.keeps(answer(status, b"", location)).err
    assert elsewhere.connections == 0


@pytest.mark.parametrize(
    "what",
    [b"", b"SSH-2.0-OpenSSH_9.2p1\r\n", b"HTTP/1.1 abc Whatever\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200],
    ids=["nothing", "ssh", "status", "headers"],
)
def test_what_is_no_http_changes_nothing(pending: Talking, what: bytes) -> None:
    pending.keeps([what, 0.0, b""])
