"""One check: what is stored, what the server says, what is stored then. The one implementation of the main job.

Bytes in, a store to put bytes into, an outcome. Reads no file, environment or configuration, takes no lock, has no
global state. The command is a thin skin over it (``cli``), and so is every application.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from . import enrollment, pem, settings, signals
from .enrollment import Action, Event, State
from .errors import CaramelError, KeyUnusable, Refused, UsageError
from .identity import Identity, Issued, utc
from .server import ConnectionLost, Response, Server
from .stored import Stored, usable
from .trust import Trust

if TYPE_CHECKING:
    from . import certificates


class Outcome(NamedTuple):
    """How things stand after a check.

    Attributes:
        identity: the `Identity` as it has been stored.
        certified: whether the identity has a certificate that the server vouches for now; False: nobody has signed
            the request yet.
        new: whether that certificate was fetched by this very check.
        not_after: when its certificate ends, seconds since 1970, UTC; None where there is no usable one.
        retry_after: seconds that the server asked to wait before the next check; None where it didn't.
        notes: what a person has to know beside it, such as why the identity was started over; as a rule nothing.
    """

    identity: Identity
    certified: bool
    new: bool
    not_after: Optional[float]
    retry_after: Optional[int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """One line for a person: what happened, and until when the certificate is valid."""
        if self.certified:
            words = ["new certificate" if self.new else "certificate unchanged"]
        else:
            words = ["request %s waits to be signed on the server%s" % (self.identity.request_hash, _SIGNING)]
        if self.not_after is not None:
            words.append("valid until " + utc(self.not_after))
        if self.retry_after is not None:
            words.append(wish(self.retry_after))
        return "; ".join([*self.notes, ", ".join(words)])


# What its administrator does, who knows the request by its hash.
_SIGNING = " (Caramel: caramel_tool INI --list, then --sign=ID)"


def wish(retry_after: int) -> str:
    """A server's Retry-After, for a person."""
    return "the server asks to wait %d s" % retry_after


def check(
    *,
    server: Union[str, tuple[str, int]],
    ca_cert: bytes,
    client_id: str,
    stored: Optional[bytes],
    store: Callable[[Identity], None],
    timeout: float = 60.0,
    modified: Optional[float] = None,
    build_time: float = 0.0,
    identity_ca: Optional[bytes] = None,
    key_type: str = "rsa-2048",
    key_command: Optional[Sequence[str]] = None,
    groups: str = "small",
    say: Callable[[str], None] = lambda step: None,
) -> Outcome:
    """Asks a Caramel server once how things stand with an identity, and brings the identity up to date.

    Args:
        server: ``HOST[:PORT]``, or host and port.
        ca_cert: the CA certificate, PEM: the only one that is trusted for the server. May hold several (a roll-over);
            the first one is the one whose subject new requests begin with.
        client_id: who the device or application is, 1 to 64 of ``A-Z a-z 0-9 . _ : -``; a fresh UUID, say.
        stored: what was last given to `store`; None if nothing ever was.
        store: called with each new `Identity`, before anything of it is sent and after a new certificate was checked.
            It has to keep ``bytes(identity)`` durably, in the place of what was there, before it returns, and to
            raise an exception where it can't. A key is sent off only after that, so it can't be lost.
        timeout: seconds for everything that waits on the network, name look-up included.
        modified: when the stored certificate was modified (``identity.modified``), seconds since 1970, UTC; None: its
            notBefore. Saves the body of a response where the server knows conditional requests.
        build_time: a time that has certainly passed, seconds since 1970, UTC, for devices whose clock starts in 1970.
        identity_ca: the CA that signs this identity, PEM, where it isn't the one that signs the server.
        key_type: of new keys: ``rsa-2048``, ``rsa-4096`` or ``ec-p256``; Caramel itself signs no EC keys.
        key_command: program and arguments that make a key which a chip holds, see ``docs/keys-in-hardware.md``; the
            caller has to have OpenSSL's provider for it active. None: the key is made here.
        groups: key exchanges of TLS: ``small`` (P-256 alone, without a post-quantum share), or OpenSSL's ``default``.
        say: called with each step, for a person who looks for a fault. Never gets key material.

    Returns:
        An `Outcome`: certified, or pending until somebody has signed the request. Call again later in either case.

    Raises:
        UsageError: an argument is wrong. NotReady: no entropy yet, or a package is missing. Unreachable: try again
        later. Untrusted: whoever answered is not the server. Refused: its response can't be used. What `store`
        raises. In every case the identity that was stored last is still good.

    Safe to be called from several threads, each with an identity of its own.
    """
    _require(isinstance(ca_cert, bytes), "ca_cert is bytes: PEM text")
    _require(isinstance(identity_ca, (bytes, type(None))), "identity_ca is bytes: PEM text")
    _require(isinstance(stored, (bytes, type(None))), "stored is bytes: encode a text, or decode Base64")
    _require(callable(store) and callable(say), "store and say are functions")
    _require(_number(timeout) and 0 < timeout <= 86400, "timeout is seconds: more than 0, at most 86400")
    _require(_number(build_time), "build_time is seconds since 1970")
    _require(modified is None or _number(modified), "modified is seconds since 1970, or None")
    address = _address(server)
    trust = Trust(ca_cert, identity_ca, build_time, settings.key_type(key_type))
    judged = Stored(stored or b"", settings.client_id(client_id), trust, modified=modified)
    return Check(address, judged, store, timeout, say, key_command=key_command, groups=settings.groups(groups)).run()


class Check:
    """Carries out what ``enrollment`` decides.

    Attributes: kept: the identity that is stored now, as far as this run has judged it; None where there is none.
    """

    def __init__(
        self,
        address: tuple[str, int],
        stored: Stored,
        store: Callable[[Identity], None],
        timeout: float,
        say: Callable[[str], None],
        touch: Optional[Callable[[Identity], None]] = None,
        key_command: Optional[Sequence[str]] = None,
        prepare: Callable[[], None] = lambda: None,
        groups: str = "small",
    ) -> None:
        """See `check`. `touch`: called in the place of `store` where nothing but the certificate's time is new;
        `prepare`: before a key is made, which takes its time, and raises where it could not be stored."""
        self.kept = stored.identity
        self._stored = stored
        self._trust = stored.trust
        self._store = store
        self._touch = touch or store
        self._prepare = prepare
        self._say = say
        self._timeout = timeout
        self._key_command = key_command
        self._server = Server(address, stored.trust, stored.client_id, timeout, say, groups)
        self._data = stored.data  # the bytes that are stored now
        self._retry_after: Optional[int] = None
        self._notes = list(stored.notes)
        self._shown = False  # whether there was a client certificate to show

    def run(self) -> Outcome:
        """Asks the server, and stores what is new. Raises what `check` raises."""
        for note in self._notes:
            self._say(note)
        if self._trust.clock_is_behind:
            self._say("the clock is behind a time that has certainly passed: not looking at what isn't valid yet")
        try:
            outcome = self._converse(self._begin())
            problem = self._problem_of_chip(outcome.new)
            if problem:
                raise KeyUnusable("%s; %s" % (outcome, problem))
            return outcome
        except CaramelError as error:
            if not isinstance(error, KeyUnusable):
                # That the request was rejected, say.
                learned = [note for note in self._notes[len(self._stored.notes) :] if note not in str(error)]
                error.args = ("; ".join([*learned, str(error), *filter(None, [self._problem_of_chip(False)])]),)
            if self._retry_after is not None:
                error.retry_after = self._retry_after
                error.args = ("%s, %s" % (error, wish(self._retry_after)),)
            raise
        finally:
            self._server.close()

    def _begin(self) -> Identity:
        """The identity to ask for, on a connection that shows its certificate where that is of use."""
        identity = self._stored.identity
        if identity is None:
            self._server.connect(None)
            if self._data:
                # A wrong CA in the configuration must not cost the device a good identity.
                self._server.reach()
            return self._new()
        self._shown = usable(identity, self._trust) and not identity.for_servers_only
        self._server.connect(identity if self._shown else None)
        return identity

    def _converse(self, identity: Identity) -> Outcome:
        state, action, event = State.ASKED, Action.GET, Event.PENDING
        while action not in enrollment.FINAL:
            if action is Action.START_OVER:
                identity = self._new()
                if event is Event.REJECTED:
                    self._note("the old key is gone")
            elif action is Action.GET_PLAINLY:
                self._server.connect(None)
            event, issued, words = self._exchange(state, identity)
            if event in (Event.REJECTED, Event.DECLINED, Event.UNFIT):
                self._note("%s (%s)" % (event.value, words))
            asked = state
            state, action = enrollment.transition(state, event)
            self._say("%s: %s" % (event.value, action.value))

        if action is Action.FAIL:
            problem = "the server's response can't be used: %s, %s" % (words, asked.value)
            raise Refused("; ".join([*self._notes, problem]))
        new = False
        if action is Action.DROP:
            identity = identity.with_issued(None)
        elif issued is not None:
            new = identity.issued is None or issued.text != identity.issued.text
            identity = identity.with_issued(issued)
            if new:  # what is written anyway
                identity = identity.remembering(self._stored.hardware)
        self._keep(identity)
        not_after = identity.issued.not_after if identity.issued else None
        return Outcome(
            identity, action in (Action.STORE, Action.KEEP), new, not_after, self._retry_after, tuple(self._notes)
        )

    def _exchange(self, state: State, identity: Identity) -> tuple[Event, Optional[Issued], str]:
        """Sends the request that belongs to `state`; what the response says, a certificate in it, and its words."""
        if state in enrollment.POSTS:
            self._keep(identity)  # a request that was made again is stored before it is sent
            response = self._server.post(identity.request_hash, identity.request)
            self._retry_after = response.retry_after
            return _event_of_post(response), None, str(response)
        # Whoever refuses our certificate is asked without a date, too: he doesn't seem to think much of what we have.
        since = self._since(identity) if state is State.ASKED else None
        try:
            response = self._server.get(identity.request_hash, since)
        except ConnectionLost as lost:
            if not self._server.shows_certificate or state is not State.ASKED:
                raise
            return Event.UNWANTED, None, str(lost)
        self._retry_after = response.retry_after
        if self._server.shows_certificate and state is State.ASKED and response.refuses_certificate:
            return Event.UNWANTED, None, str(response)
        return (*self._event(response, identity), str(response))

    def _since(self, identity: Identity) -> Optional[float]:
        """For If-Modified-Since; None once less than a third of the certificate's life is left."""
        issued = identity.issued
        if issued is None or not usable(identity, self._trust):
            return None
        if self._trust.clock_is_behind:
            from . import certificates  # the server's dates need it anyway

            certificates.anchors(self._trust)
            if self._trust.stored_is_ahead:
                return None  # a certificate of another time than the clock's: a newer one may have an earlier date
        left = issued.not_after - self._trust.now()
        return None if left < (issued.not_after - issued.not_before) / 3 else issued.modified

    def _event(self, response: Response, identity: Identity) -> tuple[Event, Optional[Issued]]:
        """What a response to a GET says, and the certificate in it. Raises `Refused` for one that isn't good."""
        if response.status == 304 and response.conditional:
            return Event.NOT_MODIFIED, None
        if response.is_rejection:
            return Event.REJECTED, None
        if response.status == 202:
            lapsed = identity.issued is not None and not usable(identity, self._trust)
            return Event.LAPSED if lapsed else Event.PENDING, None
        if response.status == 200:
            return Event.CERTIFICATE, self._certificate(response, identity)
        if response.status != 404:
            return Event.UNEXPECTED, None
        from . import certificates  # a request that the server doesn't know is rare

        fits = certificates.has_subject(identity.request, certificates.anchors(self._trust))
        return Event.UNKNOWN if fits else Event.UNFIT, None

    def _certificate(self, response: Response, identity: Identity) -> Issued:
        """The certificate in a response, judged. Raises `Refused`."""
        lines = response.body.strip().replace(b"\r\n", b"\n").split(b"\n")
        text = b"".join(line + b"\n" for line in lines if line.strip(b" \t"))
        current = identity.issued
        if current and usable(identity, self._trust) and text == current.text:
            # A time that the server tells takes the place of a guessed one, once: asked with the guessed one it would
            # send the same certificate for ever, and a server may tell another time with each response.
            if current.guessed and response.last_modified is not None:
                return current._replace(modified=response.last_modified, guessed=False)
            return current
        from . import certificates

        sent = pem.certificates(text)
        if not 1 <= len(sent) <= certificates.MAXIMUM_CHAIN or b"".join(one + b"\n" for one in sent) != text:
            raise Refused("the server answered with something that is no certificate")
        anchors = certificates.anchors(self._trust)
        if self._trust.stored_is_ahead:
            # The stored certificate's beginning is the weakest of the times that have passed. What the server gives
            # now, if it is good by the clock, is believed more than that.
            now = time.time()
            try:
                issued = self._judged(text, identity, anchors, now, response.last_modified)
            except Refused as reason:
                self._say("not good by the clock: %s" % reason)
            else:
                if issued.not_before <= now:
                    self._say("the stored certificate's beginning was ahead of time: forgotten")
                    self._trust.stored = issued.not_before
                    return issued
        return self._judged(text, identity, anchors, self._trust.now(), response.last_modified)

    def _judged(
        self,
        text: bytes,
        identity: Identity,
        anchors: certificates.Anchors,
        now: float,
        last_modified: Optional[float],
    ) -> Issued:
        """The certificate in `text`, good at the time `now`, seconds since 1970, UTC. Raises `Refused`."""
        from . import certificates

        try:
            issued = certificates.accept(text, identity, anchors, self._trust, last_modified, now)
        except certificates.InvalidCertificate as reason:
            raise Refused("the certificate from the server %s" % reason) from None
        if issued.not_after < now:
            raise Refused("the certificate from the server ended at " + utc(issued.not_after))
        # A server whose clock is ahead must not set our floor to a time at which it can't be believed itself.
        if issued.not_before > self._server.certificate_end:
            raise Refused(
                "the certificate from the server begins at %s, after the server's own has ended: its clock is ahead"
                % utc(issued.not_before)
            )
        return issued

    def _new(self) -> Identity:
        from . import certificates

        self._prepare()
        self._say("making a key and a certificate request")
        if self._shown and self._key_command is not None:
            self._shown = False
            self._server.connect(None)
            gc.collect()  # the chip may have room for few keys at a time, and the connection has one
        with self._server.pause(), signals.unhurried():
            anchors = certificates.anchors(self._trust)
            identity = certificates.make(
                self._stored.client_id, anchors, self._trust, self._stored.hardware, self._key_command, self._timeout
            )
        self._keep(identity)
        return identity

    def _problem_of_chip(self, new: bool) -> Optional[str]:
        """Why the chip that holds the key can't be used; None where it can, or was just used."""
        if self.kept is None or self.kept.holder == "software":
            return None
        if not new and (not self._shown or self._server.shows_certificate):
            return None
        self._server.close()
        gc.collect()  # a TPM without a resource manager has room for three keys, and the connection has one of them
        from . import held

        reason = held.why_not(self.kept)
        return reason and "the key can't be used: " + reason

    def _keep(self, identity: Identity) -> None:
        """Stores the identity if it isn't what is stored, or its certificate's time if that is all that is new."""
        data = bytes(identity)
        if data != self._data:
            self._store(identity)
        elif self.kept is not None and self.kept.modified != identity.modified:
            self._touch(identity)
        self._data, self.kept = data, identity

    def _note(self, note: str) -> None:
        self._notes.append(note)
        self._say(note)


def _event_of_post(response: Response) -> Event:
    """What a response to a POST says."""
    if response.status == 202:
        return Event.ACCEPTED
    return Event.DECLINED if response.status == 400 and response.from_caramel else Event.UNEXPECTED


def _require(right: bool, what: str) -> None:
    if not right:
        raise UsageError(what)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _address(server: Union[str, tuple[str, int]]) -> tuple[str, int]:
    """Raises `UsageError`."""
    if isinstance(server, str):
        return settings.server(server)
    try:
        host, port = server
        return settings.server(settings.host_and_port((host, port)))
    except (TypeError, ValueError):
        raise UsageError("server is a text HOST[:PORT], or a host and a port number") from None
