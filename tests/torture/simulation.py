"""The state machine, simulated: any sequence of answers, kills, failures to store, clock jumps and administrators.

Here the check runs in this process, against a server that is a value and a store that can die; everything between,
the answers' parser included, is the real thing. Sequences come from hypothesis, which shrinks what it finds.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import http.client
import io
import itertools
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union
from unittest import mock

import urllib3
import world
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from world import Authority, answers

from caramel_embedded import session
from caramel_embedded.errors import CaramelError, StorageError, Unreachable, Untrusted
from caramel_embedded.server import Response
from torture.fleet import key_file_parts

CLIENT_ID = "fe00feedc0de"
HOUR = 3600.0
DAY = 24 * HOUR

#: What can happen at each exchange with the server, at each store, and at the connection.
EXCHANGES = (
    "ok", "ok", "ok", "lost on the way", "lost on the way back", "killed before", "killed after", "500", "html 403",
    "rubbish", "another's certificate", "an older certificate", "304", "not found",
)  # fmt: skip
STORES = ("ok", "ok", "ok", "ok", "killed before", "killed after", "fails")
CONNECTIONS = ("ok", "ok", "ok", "ok", "unreachable", "untrusted", "killed")
CLOCKS = (0.0, -DAY, DAY, -400 * DAY, 400 * DAY, 60 * 365 * DAY, -3 * HOUR, None)  # None: 1970
ADMINISTRATORS = (
    "sign", "sign", "sign for a short time", "sign for the future", "reject", "forget everything", "time passes",
)  # fmt: skip

Run = tuple[str, tuple[str, ...], tuple[str, ...], Optional[float]]
Act = Union[str, Run]

RUNS: st.SearchStrategy[Act] = st.tuples(
    st.sampled_from(CONNECTIONS),
    st.lists(st.sampled_from(EXCHANGES), max_size=4).map(tuple),
    st.lists(st.sampled_from(STORES), max_size=3).map(tuple),
    st.sampled_from(CLOCKS),
)
#: Half of the sequences happen to a device that has its certificate already.
BEFORE: list[list[Act]] = [[], [("ok", (), (), 0.0), "sign for a short time", ("ok", (), (), 0.0)]]
ACTS: st.SearchStrategy[list[Act]] = st.builds(
    lambda before, acts: [*before, *acts],
    st.sampled_from(BEFORE),
    st.lists(st.one_of(RUNS, RUNS, st.sampled_from(ADMINISTRATORS), st.just("damage")), min_size=1, max_size=20),
)


class Killed(BaseException):
    """The power is gone: nothing of the program runs any more."""


class _Socket:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, *_: object) -> io.BytesIO:
        return io.BytesIO(self._data)


def parsed(data: bytes, conditional: bool = False) -> Response:
    """What the program's own parser makes of an answer's bytes."""
    response = http.client.HTTPResponse(_Socket(data), method="GET")  # type: ignore[arg-type]
    response.begin()
    raw = urllib3.HTTPResponse(
        body=response,
        headers=urllib3.HTTPHeaderDict(response.msg.items()),
        status=response.status,
        preload_content=False,
        decode_content=False,
        original_response=response,
        enforce_content_length=True,
        request_method="GET",
    )
    return Response.read(raw, conditional)


@functools.cache
def _keys() -> list[Any]:
    return [world.new_key() for _ in range(16)]


@functools.cache
def authority(folder: str) -> Authority:
    return Authority(Path(folder))


class Simulation:
    """One device, one server, and what has happened to them."""

    def __init__(self, folder: Path) -> None:
        self.authority = authority(str(folder))
        self.begin = time.time()
        self.clock: float = self.begin
        self.disk: Optional[bytes] = None
        #: Requests by hash: certificates (begin, end, PEM); and those that the administrator rejected.
        self.requests: dict[str, list[tuple[float, float, bytes]]] = {}
        self.texts: dict[str, bytes] = {}
        self.rejected: set[str] = set()
        self.signed: set[bytes] = set()
        self.damaged = 0
        self.wrong: list[str] = []
        self.runs = 0
        self._keys = itertools.cycle(_keys())
        self._plan: list[Any] = [[], []]

    # --- The server

    def newest(self, sha256: str) -> Optional[bytes]:
        good = [each for each in self.requests[sha256] if each[1] > self.begin]
        return max(good, key=lambda each: each[1])[2] if good else None

    def administrate(self, what: str) -> None:
        live = [sha256 for sha256 in self.requests if sha256 not in self.rejected]
        if what == "forget everything":
            self.requests.clear()
            self.rejected.clear()
        elif what == "time passes":
            self.begin += 3 * DAY
        elif not live:
            return
        elif what == "reject":
            self.rejected.add(live[-1])
        else:
            begin = self.begin + (DAY if what == "sign for the future" else -HOUR)
            end = begin + (2 * HOUR if what == "sign for a short time" else 3 * DAY + len(self.signed))
            moments = [datetime.datetime.fromtimestamp(int(at), datetime.timezone.utc) for at in (begin, end)]
            pem = self.authority.sign(self.texts[live[-1]], not_before=moments[0], not_after=moments[1])
            self.requests[live[-1]].append((begin, end, pem))
            self.signed.add(pem)

    def answer(self, method: str, sha256: str, body: Optional[bytes]) -> bytes:
        """As Caramel would."""
        if method == "POST":
            assert body is not None
            if sha256 in self.requests or hashlib.sha256(body).hexdigest() != sha256:
                return answers.DUPLICATE
            self.requests[sha256], self.texts[sha256] = [], body
            return answers.PENDING
        if sha256 not in self.requests:
            return answers.UNKNOWN
        if sha256 in self.rejected:
            return answers.REJECTED
        pem = self.newest(sha256)
        return answers.certificate(pem) if pem else answers.PENDING

    def exchange(self, method: str, sha256: str, body: Optional[bytes], conditional: bool) -> Response:
        what = self._plan[0].pop(0) if self._plan[0] else "ok"
        if what == "killed before":
            raise Killed
        if what == "lost on the way":
            raise Unreachable("lost")
        other = {
            "500": world.answer(500, b"oops"),
            "html 403": answers.page(403),
            "rubbish": world.answer(200, b"\x00rubbish"),
            "304": answers.NOT_MODIFIED,
            "not found": answers.page(404),
            "another's certificate": world.answer(200, self.authority.pem),
        }
        if what in other:
            return parsed(other[what], conditional)
        if what == "an older certificate" and method == "GET" and self.requests.get(sha256):
            return parsed(world.answer(200, self.requests[sha256][0][2]), conditional)
        said = self.answer(method, sha256, body)
        if what == "killed after":
            raise Killed
        if what == "lost on the way back":
            raise Unreachable("lost")
        return parsed(said, conditional)

    # --- The device

    def store(self, identity: Any) -> None:
        what = self._plan[1].pop(0) if self._plan[1] else "ok"
        if what == "killed before":
            raise Killed
        if what == "fails":
            raise StorageError("no room")
        self.disk = bytes(identity)
        if what == "killed after":
            raise Killed

    def run(self, connection: str, exchanges: Sequence[str], stores: Sequence[str], clock: Optional[float]) -> Any:
        """One run; its outcome, or None."""
        self.clock = 40.0 if clock is None else self.begin + clock
        self._plan = [list(exchanges), list(stores)]
        self.runs += 1
        simulation = self

        class Server:
            certificate_end = float("inf")

            def __init__(self, *_: object) -> None:
                pass

            shows_certificate = False

            def connect(self, _identity: object) -> None:
                pass

            def reach(self) -> None:
                if connection == "killed":
                    raise Killed
                if connection == "unreachable":
                    raise Unreachable("down")
                if connection == "untrusted":
                    raise Untrusted("another")

            def get(self, sha256: str, since: Optional[float] = None) -> Response:
                self.reach()
                return simulation.exchange("GET", sha256, None, since is not None)

            def pause(self) -> Any:
                return contextlib.nullcontext()

            def post(self, sha256: str, request: bytes) -> Response:
                return simulation.exchange("POST", sha256, request, False)

            def close(self) -> None:
                pass

        watch = types.SimpleNamespace(
            time=lambda: simulation.clock, strftime=time.strftime, gmtime=time.gmtime, monotonic=time.monotonic
        )
        before, outcome = self.disk, None
        with (
            mock.patch.object(session, "Server", Server),
            mock.patch("caramel_embedded.trust.time", watch),
            mock.patch(
                "cryptography.hazmat.primitives.asymmetric.rsa.generate_private_key", lambda *_: next(self._keys)
            ),
        ):
            try:
                outcome = session.check(
                    server=("localhost", 1),
                    ca_cert=self.authority.pem,
                    client_id=CLIENT_ID,
                    stored=self.disk,
                    store=self.store,
                )
            except (CaramelError, Killed):
                pass
        self._judge(before, outcome)
        return outcome

    def _judge(self, before: Optional[bytes], outcome: Any) -> None:
        parts = key_file_parts(self.disk) if self.disk else None
        if self.disk is not None and parts is None and self.disk != before:
            self.wrong.append("what is stored is neither the whole old nor the whole new")
        live = [sha256 for sha256 in self.requests if sha256 not in self.rejected]
        if len(live) > 1 + self.damaged:
            self.wrong.append(f"the server has {len(live)} requests")
        if live and not self.damaged and (parts is None or parts.sha256 not in live):
            self.wrong.append("a key whose request reached the server is gone")
        if parts is not None and parts.certificate is not None and parts.certificate not in self.signed:
            self.wrong.append("a certificate is stored that nobody signed for us")
        if outcome is not None:
            if bytes(outcome.identity) != self.disk:
                self.wrong.append("the outcome is not what is stored")
            if outcome.certified and (parts is None or parts.certificate is None):
                self.wrong.append("certified without a certificate")

    def damage(self) -> None:
        """A worn flash: half of what was stored is gone."""
        if self.disk:
            self.disk = self.disk[: len(self.disk) // 2]
            self.damaged += 1

    def calm(self) -> None:
        """The clock is right and the server honest: after three runs everything is as it should be."""
        for _ in range(3):
            self.run("ok", (), (), 0.0)
        outcome = self.run("ok", (), (), 0.0)
        parts = key_file_parts(self.disk or b"")
        if outcome is None or parts is None or parts.sha256 not in self.requests:
            self.wrong.append("the device doesn't recover")
            return
        due = self.newest(parts.sha256)
        if outcome.certified != (due is not None) or (due is not None and parts.certificate != due):
            self.wrong.append("the device doesn't end where an undisturbed one would")


def simulate(folder: Path, acts: Sequence[Act]) -> Simulation:
    """All of a sequence, and an undisturbed end."""
    simulation = Simulation(folder)
    for act in acts:
        if act == "damage":
            simulation.damage()
        elif isinstance(act, str):
            simulation.administrate(act)
        else:
            simulation.run(*act)
    simulation.calm()
    return simulation


def simulate_many(folder: Path, count: int) -> tuple[int, int, list[str]]:
    """So many sequences: how many were tried, the runs they had, and what was lost in the smallest bad one."""
    counts = [0, 0]

    @seed(1)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ACTS)
    def any_sequence(acts: list[Act]) -> None:
        simulation = simulate(folder, acts)
        counts[0] += 1
        counts[1] += simulation.runs
        assert not simulation.wrong, (simulation.wrong, acts)

    try:
        any_sequence()
    except AssertionError as error:
        return counts[0], counts[1], [str(error)]
    return counts[0], counts[1], []
