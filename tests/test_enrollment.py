"""The state machine by itself: every state with everything a server can say, held against the interface's table."""

from __future__ import annotations

import pytest

from caramel_embedded.enrollment import FINAL, TRANSITIONS, Action, Event, State, transition

#: Written from the table "What a run does with the server's answer" of the interface, row by row and without a look
#: at the program's own. What a state has no line for is "anything else: 127, nothing lost".
EXPECTED: dict[State, dict[Event, Action]] = {
    State.ASKED: {
        Event.CERTIFICATE: Action.STORE,  # 200: checks it, stores it if it is new, 0
        Event.NOT_MODIFIED: Action.KEEP,  # 304 to a conditional GET: 0
        Event.PENDING: Action.WAIT,  # 202: 69
        Event.LAPSED: Action.DROP,  # a certificate that stopped being usable is dropped, its key kept
        Event.UNWANTED: Action.GET_PLAINLY,  # one more try is made without it
        Event.UNKNOWN: Action.POST,  # 404 to the first GET: posts the request
        Event.UNFIT: Action.START_OVER,  # after the server was asked about the stored request and didn't know it
        Event.REJECTED: Action.START_OVER,  # 403 from Caramel: wipes, makes new ones, posts them once
    },
    State.POSTED: {
        Event.ACCEPTED: Action.GET,  # asks once more
        Event.DECLINED: Action.GET,  # a duplicate: the earlier POST did arrive, and the GET tells
    },
    State.POSTED_NEW: {
        Event.ACCEPTED: Action.GET,  # 0 or 69; 127 if that is refused too
    },
    State.ASKED_AGAIN: {
        Event.CERTIFICATE: Action.STORE,  # a CA that signs by itself answers at once: 0
        Event.PENDING: Action.WAIT,  # 69
        Event.LAPSED: Action.DROP,
    },
}
#: The one more try without certificate is a first GET without a date.
EXPECTED[State.ASKED_PLAINLY] = {
    event: action
    for event, action in EXPECTED[State.ASKED].items()
    if event not in (Event.NOT_MODIFIED, Event.UNWANTED)
}

#: In which state the answer to a action is awaited.
AWAITED = {
    (State.ASKED, Action.POST): State.POSTED,
    (State.ASKED, Action.START_OVER): State.POSTED_NEW,
    (State.ASKED, Action.GET_PLAINLY): State.ASKED_PLAINLY,
    (State.ASKED_PLAINLY, Action.POST): State.POSTED,
    (State.ASKED_PLAINLY, Action.START_OVER): State.POSTED_NEW,
    (State.POSTED, Action.GET): State.ASKED_AGAIN,
    (State.POSTED_NEW, Action.GET): State.ASKED_AGAIN,
}


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_every_state_with_everything_that_can_be_event(state: State, event: Event) -> None:
    after, action = transition(state, event)
    assert action is EXPECTED[state].get(event, Action.FAIL)
    if action in FINAL:
        assert action is not Action.FAIL or after is state, "what failed is told by its state"
    else:
        assert after is AWAITED[state, action], "a run goes on exactly where it awaits another answer"
        assert after is not state


def test_no_run_is_longer_than_four_answers() -> None:
    """No loop, whatever the server says."""

    def longest(state: State, seen: tuple[State, ...] = ()) -> int:
        assert state not in seen, "a state is never come to twice"
        following = [after for after, action in (transition(state, event) for event in Event) if action not in FINAL]
        return 1 + max([longest(after, (*seen, state)) for after in following], default=0)

    assert longest(State.ASKED) == 4  # the first one without client certificate included


def test_the_table_has_no_line_that_only_says_what_would_happen_anyway() -> None:
    assert all(action is not Action.FAIL for row in TRANSITIONS.values() for _, action in row.values())
    assert set(TRANSITIONS) == set(State)
