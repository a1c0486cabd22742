"""The state machine: where a run stands + what the server said = what is next.

Everything that decides is in the table below; anything that is not in it ends the run with nothing lost. No I/O
here: the sockets are in ``server``, the sequence of steps is carried out in ``session``.

            first GET                         after POST
    200  -> store, certified             200  -> store, certified
    304  -> certified                    202  -> pending
    202  -> pending                      else -> fail
    404  -> POST, ask again
    403  -> new identity, POST, ask again     (at most once a run)
"""

from __future__ import annotations

import enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Stage(enum.Enum):
    """Where a run stands: what the answer that is awaited belongs to."""

    ASKED = "the first GET of the run"
    POSTED = "a POST of the stored request, because the server didn't know it"
    POSTED_NEW = "a POST of a new request, because the stored one was rejected"
    ASKED_AGAIN = "a GET after a POST"


class Said(enum.Enum):
    """What the server said, authenticated and understood."""

    CERTIFICATE = "a certificate that passes every check"
    NOT_MODIFIED = "the stored certificate is still the newest"
    PENDING = "the request is known and not signed"
    UNKNOWN = "the request is not known"
    REJECTED = "the administrator rejected the request"
    USELESS_KEY = "a certificate, and the stored key turns out to be damaged"
    ACCEPTED = "the request was taken"
    DECLINED = "the request was not taken: it is there already, or not as the server wants it"
    UNEXPECTED = "anything else"


class Step(enum.Enum):
    """What to do next."""

    POST = "post the request"
    ASK = "ask for the certificate"
    START_OVER = "make a new identity, store it, post its request"
    STORE = "certified: store the certificate if it is a new one"
    KEEP = "certified: keep the stored certificate"
    WAIT = "pending: somebody has to sign"
    FAIL = "leave everything as it is"


FINAL = frozenset((Step.STORE, Step.KEEP, Step.WAIT, Step.FAIL))

TRANSITIONS: Mapping[tuple[Stage, Said], tuple[Step, Stage]] = {
    (Stage.ASKED, Said.CERTIFICATE): (Step.STORE, Stage.ASKED),
    (Stage.ASKED, Said.NOT_MODIFIED): (Step.KEEP, Stage.ASKED),
    (Stage.ASKED, Said.PENDING): (Step.WAIT, Stage.ASKED),
    (Stage.ASKED, Said.UNKNOWN): (Step.POST, Stage.POSTED),
    (Stage.ASKED, Said.REJECTED): (Step.START_OVER, Stage.POSTED_NEW),
    (Stage.ASKED, Said.USELESS_KEY): (Step.START_OVER, Stage.POSTED_NEW),
    (Stage.POSTED, Said.ACCEPTED): (Step.ASK, Stage.ASKED_AGAIN),
    # Most likely a duplicate: an earlier run's POST did arrive. Asking tells.
    (Stage.POSTED, Said.DECLINED): (Step.ASK, Stage.ASKED_AGAIN),
    # A new request can't be a duplicate. Making still another one would be a loop.
    (Stage.POSTED_NEW, Said.ACCEPTED): (Step.ASK, Stage.ASKED_AGAIN),
    (Stage.ASKED_AGAIN, Said.CERTIFICATE): (Step.STORE, Stage.ASKED_AGAIN),
    (Stage.ASKED_AGAIN, Said.PENDING): (Step.WAIT, Stage.ASKED_AGAIN),
}


def following(stage: Stage, said: Said) -> tuple[Step, Stage]:
    """The next step, and the stage that the run is in after it."""
    return TRANSITIONS.get((stage, said), (Step.FAIL, stage))
