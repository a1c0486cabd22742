"""The state machine: state + event = next state and action. No input or output here.

Everything that decides is in the table below; an event that is not in it ends the run with nothing lost. The sockets
are in ``server``; the actions are carried out in ``session``.

            first GET                         after POST
    200  -> store, certified             200  -> store, certified
    304  -> certified                    202  -> pending
    202  -> pending                      else -> fail
    404  -> POST, GET again
    403  -> new identity, POST, GET again     (at most once a run)
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.Enum):
    """Where a run stands: what the response that is awaited belongs to."""

    ASKED = "the first GET of the run"
    POSTED = "a POST of the stored request, because the server didn't know it"
    POSTED_NEW = "a POST of a new request, because the stored one was rejected"
    ASKED_AGAIN = "a GET after a POST"


class Event(enum.Enum):
    """What the server's response says, authenticated and understood."""

    CERTIFICATE = "a certificate that passes every check"
    NOT_MODIFIED = "the stored certificate is still the newest"
    PENDING = "the request is known and not signed"
    UNKNOWN = "the request is not known"
    REJECTED = "the administrator rejected the request"
    ACCEPTED = "the request was taken"
    DECLINED = "the request was not taken: it is there already, or not as the server wants it"
    UNEXPECTED = "anything else"


class Action(enum.Enum):
    """What to do next."""

    POST = "post the request"
    GET = "ask for the certificate"
    START_OVER = "make a new identity, store it, post its request"
    STORE = "certified: store the certificate if it is a new one"
    KEEP = "certified: keep the stored certificate"
    WAIT = "pending: somebody has to sign"
    FAIL = "leave everything as it is"


FINAL = frozenset((Action.STORE, Action.KEEP, Action.WAIT, Action.FAIL))

TRANSITIONS: Mapping[tuple[State, Event], tuple[State, Action]] = {
    (State.ASKED, Event.CERTIFICATE): (State.ASKED, Action.STORE),
    (State.ASKED, Event.NOT_MODIFIED): (State.ASKED, Action.KEEP),
    (State.ASKED, Event.PENDING): (State.ASKED, Action.WAIT),
    (State.ASKED, Event.UNKNOWN): (State.POSTED, Action.POST),
    (State.ASKED, Event.REJECTED): (State.POSTED_NEW, Action.START_OVER),
    (State.POSTED, Event.ACCEPTED): (State.ASKED_AGAIN, Action.GET),
    # Most likely a duplicate: an earlier run's POST did arrive. Asking tells.
    (State.POSTED, Event.DECLINED): (State.ASKED_AGAIN, Action.GET),
    # A new request can't be a duplicate. Making still another one would be a loop.
    (State.POSTED_NEW, Event.ACCEPTED): (State.ASKED_AGAIN, Action.GET),
    (State.ASKED_AGAIN, Event.CERTIFICATE): (State.ASKED_AGAIN, Action.STORE),
    (State.ASKED_AGAIN, Event.PENDING): (State.ASKED_AGAIN, Action.WAIT),
}


def transition(state: State, event: Event) -> tuple[State, Action]:
    """The state after `event`, and the action that it asks for."""
    return TRANSITIONS.get((state, event), (state, Action.FAIL))
