"""The state machine of one run: state and event give the next state and what to do. No input or output here.

The rules:

- Everything that decides is in the table. An event that is not in it ends the run with nothing lost.
- A run begins with a GET, and a state says which request was sent last. `POSTS` are the states whose request is a
  POST; in all others it is a GET.
- A client certificate that isn't wanted costs one more GET without it, once a run.
- A new identity is made at most once a run: only Caramel's own rejection asks for it, or a request that the server
  doesn't know and the CA would refuse.
- A stored certificate is dropped only if it has ended and the server has none; its key stays.

            first GET                            after POST
    200  -> store, certified                200  -> store, certified
    304  -> certified                       202  -> pending
    202  -> pending                         else -> fail
    404  -> POST, GET again; new identity, POST, GET again if the CA would refuse the request
    403  -> new identity, POST, GET again
    certificate not wanted -> GET without it, then as above

``server`` sends a request and understands HTTP, ``session`` carries out what is decided here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class State(enum.Enum):
    """What the response that is awaited belongs to."""

    ASKED = "the first GET of the run"
    ASKED_PLAINLY = "a GET without client certificate, because it was not wanted"
    POSTED = "a POST of the stored request, because the server didn't know it"
    POSTED_NEW = "a POST of a new request, because the stored one was rejected, or would be refused"
    ASKED_AGAIN = "a GET after a POST"


class Event(enum.Enum):
    """What the server's response says, authenticated and understood."""

    CERTIFICATE = "a certificate that passes every check"
    NOT_MODIFIED = "the stored certificate is still the newest"
    PENDING = "the request is known and not signed"
    LAPSED = "the request is known and not signed, and the stored certificate has ended"
    UNKNOWN = "the request is not known"
    UNFIT = "the request is not known, and the trusted CA would refuse its subject: starting over with a new key"
    REJECTED = "the administrator rejected the request"
    UNWANTED = "the client certificate is not wanted"
    ACCEPTED = "the request was taken"
    DECLINED = "the request was not taken: it is there already, or not as the server wants it"
    UNEXPECTED = "anything else"


class Action(enum.Enum):
    """What to do next; the last five end the run."""

    POST = "post the request"
    GET = "ask for the certificate"
    GET_PLAINLY = "ask over a new connection, without client certificate and date"
    START_OVER = "make a new identity, store it, post its request"
    STORE = "certified: store the certificate if it is a new one"
    KEEP = "certified: keep the stored certificate"
    WAIT = "pending: somebody has to sign"
    DROP = "pending: drop the certificate that has ended, somebody has to sign"
    FAIL = "leave everything as it is"


POSTS = frozenset((State.POSTED, State.POSTED_NEW))
FINAL = frozenset((Action.STORE, Action.KEEP, Action.WAIT, Action.DROP, Action.FAIL))

# What a GET may say that no POST went before. As long as the state stays, nothing more is sent.
_FIRST: Mapping[Event, tuple[State, Action]] = {
    Event.CERTIFICATE: (State.ASKED, Action.STORE),
    Event.PENDING: (State.ASKED, Action.WAIT),
    Event.LAPSED: (State.ASKED, Action.DROP),
    Event.UNKNOWN: (State.POSTED, Action.POST),
    Event.UNFIT: (State.POSTED_NEW, Action.START_OVER),
    Event.REJECTED: (State.POSTED_NEW, Action.START_OVER),
}
TRANSITIONS: Mapping[State, Mapping[Event, tuple[State, Action]]] = {
    State.ASKED: {
        **_FIRST,
        Event.NOT_MODIFIED: (State.ASKED, Action.KEEP),
        Event.UNWANTED: (State.ASKED_PLAINLY, Action.GET_PLAINLY),
    },
    State.ASKED_PLAINLY: _FIRST,
    State.POSTED: {
        Event.ACCEPTED: (State.ASKED_AGAIN, Action.GET),
        # Most likely a duplicate: an earlier run's POST did arrive. Asking tells.
        Event.DECLINED: (State.ASKED_AGAIN, Action.GET),
    },
    # A new request can't be a duplicate. Making still another one would be a loop.
    State.POSTED_NEW: {Event.ACCEPTED: (State.ASKED_AGAIN, Action.GET)},
    State.ASKED_AGAIN: {
        Event.CERTIFICATE: (State.ASKED_AGAIN, Action.STORE),
        Event.PENDING: (State.ASKED_AGAIN, Action.WAIT),
        Event.LAPSED: (State.ASKED_AGAIN, Action.DROP),
    },
}


def transition(state: State, event: Event) -> tuple[State, Action]:
    """The state after `event`, and the action that it asks for."""
    return TRANSITIONS[state].get(event, (state, Action.FAIL))
