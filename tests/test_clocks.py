"""Clocks: 1970, a day behind, a day ahead, 2080, and jumps during the run."""

from __future__ import annotations

import pytest
from needs import slow
from torture import clocks, report
from torture.fleet import Fleet


@pytest.mark.parametrize(
    "about",
    [
        "1970",
        "2080",
        *(
            pytest.param(about, marks=slow)
            for about in ("a day behind", "a day ahead", "slept for a year", "floor", "jumps")
        ),
    ],
)
def test_no_clock_costs_a_device_anything(fleet: Fleet, about: str) -> None:
    cases = [case for case in clocks.cases(fleet) if about in case.name]
    assert len(cases) >= 4
    row = report.tried(about, cases if about == "1970" else report.sample(cases, 6))
    assert not row.lost, "\n".join(row.lost)
