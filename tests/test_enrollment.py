"""The state machine by itself: every stage with everything a server can say, held against the interface's table."""

from __future__ import annotations

import pytest

from caramel_embedded.enrollment import FINAL, TRANSITIONS, Said, Stage, Step, following

#: Written from the table "What a run does with the server's answer" of the interface, row by row and without a look
#: at the program's own. What a stage has no line for is "anything else: 127, nothing lost".
EXPECTED: dict[Stage, dict[Said, Step]] = {
    Stage.ASKED: {
        Said.CERTIFICATE: Step.STORE,  # 200: checks it, stores it if it is new, 0
        Said.NOT_MODIFIED: Step.KEEP,  # 304 to a conditional GET: 0
        Said.PENDING: Step.WAIT,  # 202: 69
        Said.UNKNOWN: Step.POST,  # 404 to the first GET: posts the request
        Said.REJECTED: Step.START_OVER,  # 403 from Caramel: wipes, makes new ones, posts them once
        Said.USELESS_KEY: Step.START_OVER,  # "What is never kept": a file whose key can't be used
    },
    Stage.POSTED: {
        Said.ACCEPTED: Step.ASK,  # asks once more
        Said.DECLINED: Step.ASK,  # a duplicate: the earlier POST did arrive, and the GET tells
    },
    Stage.POSTED_NEW: {
        Said.ACCEPTED: Step.ASK,  # 0 or 69; 127 if that is refused too
    },
    Stage.ASKED_AGAIN: {
        Said.CERTIFICATE: Step.STORE,  # a CA that signs by itself answers at once: 0
        Said.PENDING: Step.WAIT,  # 69
    },
}

#: In which stage the answer to a step is awaited.
AWAITED = {
    (Stage.ASKED, Step.POST): Stage.POSTED,
    (Stage.ASKED, Step.START_OVER): Stage.POSTED_NEW,
    (Stage.POSTED, Step.ASK): Stage.ASKED_AGAIN,
    (Stage.POSTED_NEW, Step.ASK): Stage.ASKED_AGAIN,
}


@pytest.mark.parametrize("said", Said)
@pytest.mark.parametrize("stage", Stage)
def test_every_stage_with_everything_that_can_be_said(stage: Stage, said: Said) -> None:
    step, after = following(stage, said)
    assert step is EXPECTED[stage].get(said, Step.FAIL)
    assert after is AWAITED.get((stage, step), stage)
    assert (step in FINAL) == (after is stage), "a run goes on exactly where it awaits another answer"


def test_no_run_is_longer_than_three_answers() -> None:
    """No loop, whatever the server says."""

    def longest(stage: Stage, seen: tuple[Stage, ...] = ()) -> int:
        assert stage not in seen, "a stage is never come to twice"
        steps = [following(stage, said) for said in Said]
        return 1 + max([longest(after, (*seen, stage)) for step, after in steps if step not in FINAL], default=0)

    assert longest(Stage.ASKED) == 3


@pytest.mark.parametrize("stage", Stage)
def test_an_identity_is_given_up_at_the_first_answer_only(stage: Stage) -> None:
    starts_over = [said for said in Said if following(stage, said)[0] is Step.START_OVER]
    assert bool(starts_over) == (stage is Stage.ASKED)


def test_the_table_has_no_line_that_only_says_what_would_happen_anyway() -> None:
    assert all(step is not Step.FAIL for step, _ in TRANSITIONS.values())
    assert {stage for stage, _ in TRANSITIONS} == set(Stage)
