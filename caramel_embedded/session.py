"""One check: what is stored, what the server says, what is stored then. The one implementation of the main job.

Bytes in, a store to put bytes into, an outcome. Reads no file, environment or configuration, takes no lock, has no
global state. The command is a thin skin over it (``cli``), and so is every application.
"""

from __future__ import annotations

from . import enrollment
from . import identity as identities
from .enrollment import Said, Stage, Step
from .errors import Refused, UsageError
from .identity import Foreign, Identity
from .server import Server
from .settings import client_id as _client_id
from .settings import server as _server
from .trust import Facts, Trust, utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Union

    from .server import Answer


class Outcome:
    """How things stand after a check.

    Attributes:
        certified: whether the identity has a certificate that the server vouches for now; False: nobody has signed
            the request yet.
        new: whether that certificate was fetched by this very check.
        identity: the `Identity` as it has been stored.
        not_after: when its certificate ends, seconds since 1970, UTC; None where there is no usable one.
        notes: what a person has to know beside it, such as why the identity was started over; as a rule nothing.
    """

    __slots__ = ("certified", "identity", "new", "not_after", "notes")

    def __init__(
        self, identity: Identity, certified: bool, new: bool, facts: Optional[Facts], notes: list[str]
    ) -> None:
        self.identity = identity
        self.certified = certified
        self.new = certified and new
        self.not_after = facts.not_after if facts else None
        self.notes = tuple(notes)

    def __str__(self) -> str:
        """One line for a person: what happened, and until when the certificate is valid."""
        if self.certified:
            words = ["new certificate" if self.new else "certificate unchanged"]
        else:
            words = ["request %s waits to be signed" % self.identity.request_hash]
        if self.not_after is not None:
            words.append("valid until " + utc(self.not_after))
        return "; ".join([*self.notes, ", ".join(words)])


class Stored:
    """What was found where the identity is kept, judged.

    Attributes: identity (None: start over); genuine: what its certificate says, where that is by the trusted CA for
    this key and client ID; facts: the same where it is in date, too, and so usable; why: for a person, each reason
    why something can't be kept.
    """

    __slots__ = ("facts", "genuine", "identity", "why")

    def __init__(self, data: bytes, client_id: str, trust: Trust) -> None:
        self.identity: Optional[Identity] = None
        self.genuine: Optional[Facts] = None
        self.facts: Optional[Facts] = None
        self.why: list[str] = []
        if not data:
            return
        try:
            self.identity = identities.look(data, client_id, trust.subjects) or identities.examine(
                data, client_id, trust.subjects
            )
            if self.identity.certificate is not None:
                self._judge(self.identity, client_id, trust)
        except Foreign as reason:
            self.identity = None
            self.why.append("%s: starting over with a new key" % reason)

    def _judge(self, identity: Identity, client_id: str, trust: Trust) -> None:
        judged = trust.judge(identity, client_id)
        if isinstance(judged, Facts):
            self.genuine = judged
            trust.learn(judged)
            reason = trust.why_not_in_date(judged)
        else:
            # Perhaps it is the key that doesn't work any more; that is not to be seen at a glance.
            identities.require_sound_key(identity)
            reason = judged
        if reason is None:
            self.facts = self.genuine
        else:
            self.why.append("the stored certificate %s" % reason)


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
    say: Callable[[str], None] = lambda step: None,
) -> Outcome:
    """Asks a Caramel server once how things stand with an identity, and brings the identity up to date.

    Args:
        server: ``HOST[:PORT]``, or host and port.
        ca_cert: the CA certificate, PEM: the only one that is trusted, for the server and for the identity. May hold
            several (a roll-over); the first one is the one whose subject new requests begin with.
        client_id: who the device or application is, 1 to 64 of ``A-Z a-z 0-9 . _ : -``; a fresh UUID, say.
        stored: what was last given to `store`; None if nothing ever was.
        store: called with each new `Identity`, before anything of it is sent and after a new certificate was checked.
            It has to keep ``bytes(identity)`` durably, in the place of what was there, before it returns, and to
            raise an exception where it can't. A key is sent off only after that, so it can't be lost.
        timeout: seconds for everything that waits on the network, name look-up included.
        modified: when the stored certificate was modified (``identity.modified``), seconds since 1970, UTC; None: its
            notBefore. Saves the body of an answer where the server knows conditional requests.
        build_time: a time that has certainly passed, seconds since 1970, UTC, for devices whose clock starts in 1970.
        say: called with each step, for a person who looks for a fault. Never gets key material.

    Returns:
        An `Outcome`: certified, or pending until somebody has signed the request. Call again later in either case.

    Raises:
        UsageError: an argument is wrong. NotReady: no entropy yet, or a module is missing. Unreachable: try again
        later. Untrusted: whoever answered is not the server. Refused: its answer can't be used. What `store` raises.
        In every case the identity that was stored last is still good.

    Safe to be called from several threads, each with an identity of its own.
    """
    if not isinstance(ca_cert, bytes) or not isinstance(stored, (bytes, type(None))):
        raise UsageError("ca_cert and stored are bytes: encode a text that a key chain keeps, or decode Base64")
    identities.require_entropy()  # OpenSSL would wait for it
    address = _server(server) if isinstance(server, str) else server
    _client_id(client_id)
    trust = Trust(ca_cert, build_time)
    if trust.clock_is_wrong:
        say("the clock is wrong, it is behind a time that has certainly passed: not looking at what isn't valid yet")
    conversation = Server(address, trust, client_id, timeout, say)
    return _Check(conversation, trust, client_id, store, say).run(stored or b"", modified)


class _Check:
    """Carries out what ``enrollment`` decides."""

    def __init__(
        self,
        server: Server,
        trust: Trust,
        client_id: str,
        store: Callable[[Identity], None],
        say: Callable[[str], None],
    ) -> None:
        self._server = server
        self._trust = trust
        self._client_id = client_id
        self._store = store
        self._say = say
        self._notes: list[str] = []  # what a person has to know beside the outcome

    def run(self, data: bytes, modified: Optional[float]) -> Outcome:
        found = Stored(data, self._client_id, self._trust)
        identity, facts = found.identity, found.facts
        for note in found.why:
            self._note(note)
        if identity is not None:
            self._say("found %r, %s certificate" % (identity, "a usable" if facts else "no usable"))
        if identity is not None and identity.certificate is not None:
            time = facts.not_before if modified is None and facts else modified
            identity = identity.with_certificate(identity.certificate, time)
        if identity is None and not data:
            identity = self._new()
        elif identity is not None and bytes(identity) != data:
            self._store(identity)  # the same key in another form, or with its request made again
        try:
            self._server.connect(identity if facts else None)
            if identity is None:
                # Only now: a wrong CA in the configuration must not cost the device a good identity.
                identity = self._new()
            return self._converse(identity, facts, modified)
        finally:
            self._server.close()

    def _converse(self, identity: Identity, facts: Optional[Facts], modified: Optional[float]) -> Outcome:
        since = self._since(facts, modified)
        fetched, fetched_facts = identity, facts
        stage, step = Stage.ASKED, Step.ASK
        while step not in enrollment.FINAL:
            if step is Step.START_OVER:
                identity, facts = self._new(), None
            if step is Step.ASK:
                answer = self._server.get(identity.request_hash, since)
                said, fetched, fetched_facts = self._understood(answer, identity, facts)
                since = None
            else:
                if stage is Stage.POSTED:
                    identity = self._mended(identity)
                answer = self._server.post(identity.request_hash, identity.request)
                said = self._taken(answer)
            if said in (Said.REJECTED, Said.DECLINED):
                self._note("%s (%s)" % (said.value, answer))
            step, stage = enrollment.following(stage, said)
            self._say("%s: %s" % (said.value, step.value))

        new = fetched.certificate != identity.certificate
        # The server's own date in the place of the one that was put there for want of it: asked with any other, the
        # server sends the same certificate for ever. Once only, whatever dates it goes on to give.
        dated = facts is not None and modified == facts.not_before and fetched.modified not in (None, modified)
        if step is Step.STORE and (new or dated):
            self._store(fetched)
        elif step is Step.WAIT and facts is None and identity.certificate is not None:
            # Dropped only now that the server was asked: a clock that has jumped ahead may have lied about it.
            fetched = identity.with_certificate(None)
            self._store(fetched)
        elif step is Step.FAIL:
            raise Refused(
                "; ".join([*self._notes, "the server's answer can't be used: %s, %s" % (answer, stage.value)])
            )
        return Outcome(fetched, step is not Step.WAIT, new, fetched_facts or facts, self._notes)

    def _since(self, facts: Optional[Facts], modified: Optional[float]) -> Optional[float]:
        """For If-Modified-Since; None once less than a third of the certificate's life is left."""
        if facts is None or facts.not_after - self._trust.now < (facts.not_after - facts.not_before) / 3:
            return None
        return facts.not_before if modified is None else modified

    def _understood(
        self, answer: Answer, identity: Identity, facts: Optional[Facts]
    ) -> tuple[Said, Identity, Optional[Facts]]:
        """What an answer to a GET means; the identity with the certificate of the answer, and what that says.

        `facts`: of the stored certificate, where it is usable. Raises `Refused` for a certificate that isn't good.
        """
        if answer.status == 304 and answer.conditional:
            return Said.NOT_MODIFIED, identity, facts
        if answer.status == 403 and answer.from_caramel:
            return Said.REJECTED, identity, None
        if answer.status != 200:
            return {202: Said.PENDING, 404: Said.UNKNOWN}.get(answer.status, Said.UNEXPECTED), identity, None
        pem = identities.sole_block(answer.body, identities.CERTIFICATE)
        if pem is None:
            raise Refused("the server answered with something that is no certificate")
        if pem == identity.certificate and facts:
            time = identity.modified if answer.last_modified is None else answer.last_modified
            return Said.CERTIFICATE, identity.with_certificate(pem, time), facts
        judged = self._trust.judge(identity.with_certificate(pem), self._client_id)
        reason = judged if isinstance(judged, str) else self._trust.why_not_in_date(judged)
        if isinstance(judged, Facts) and reason is None:
            time = judged.not_before if answer.last_modified is None else answer.last_modified
            return Said.CERTIFICATE, identity.with_certificate(pem, time), judged
        try:
            identities.require_sound_key(identity)
        except Foreign as why:
            self._note("%s: starting over with a new key" % why)
            return Said.USELESS_KEY, identity, None
        raise Refused("the certificate from the server %s" % reason)

    @staticmethod
    def _taken(answer: Answer) -> Said:
        """What an answer to a POST means."""
        if answer.status == 202:
            return Said.ACCEPTED
        return Said.DECLINED if answer.status == 400 and answer.from_caramel else Said.UNEXPECTED

    def _mended(self, identity: Identity) -> Identity:
        """The identity with its request as it was before a worn flash changed a bit of it.

        A look doesn't see that, but to the server it is another request: one that it doesn't know, and won't take.
        """
        try:
            found = identities.examine(bytes(identity), self._client_id, self._trust.subjects)
        except Foreign:
            return identity  # it is the key that is damaged; that shows once there is a certificate
        if found.request != identity.request:
            self._note("the stored request is damaged: made again with the same key")
            identity = Identity(identity.key, found.request, identity.certificate, identity.modified)
            self._store(identity)
        return identity

    def _new(self) -> Identity:
        self._say("making a key and a certificate request")
        identity = identities.make(self._client_id, self._trust.subjects[0])
        self._store(identity)
        return identity

    def _note(self, note: str) -> None:
        self._notes.append(note)
        self._say(note)
