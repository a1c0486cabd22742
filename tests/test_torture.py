"""Power cuts and I/O errors at system calls: a sample of what `make torture` does in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from needs import needs, slow
from torture import chips, disk, power, report
from torture.fleet import Fleet

SCENARIOS = (
    "first enrollment", "first certificate", "renewal", "renewal with a hook", "rejection", "clean-up of a bad file",
)  # fmt: skip


def in_short(quick: str) -> list[Any]:
    """All scenarios, and for `make test` one of them."""
    return [pytest.param(scenario, marks=() if scenario == quick else slow) for scenario in SCENARIOS]


@pytest.mark.parametrize("scenario", in_short("renewal"))
def test_a_power_cut_at_any_system_call_costs_nothing(fleet: Fleet, scenario: str) -> None:
    row = report.tried(scenario, report.sample(power.cuts(fleet, scenario, 4), 8))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases == 8


@pytest.mark.parametrize("scenario", in_short("first enrollment"))
def test_a_system_call_that_fails_costs_nothing(fleet: Fleet, scenario: str) -> None:
    row = report.tried(scenario, report.sample(power.errors(fleet, scenario, 6), 5))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases == 5


@slow
@needs("trixie")
@pytest.mark.parametrize("scenario", ["first enrollment", "renewal"])
def test_a_power_cut_with_a_key_in_a_tpm_costs_nothing(fleet: Fleet, tmp_path: Path, scenario: str) -> None:
    cases = chips.cuts(chips.Lives(fleet, tmp_path), scenario, 3)
    row = report.tried(scenario, report.sample(cases, 3))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases == 3


@slow
@needs("trixie")
def test_a_tpm_that_fails_at_any_point_of_a_life_costs_nothing(fleet: Fleet, tmp_path: Path) -> None:
    row = report.tried("a TPM", report.sample(chips.misfortunes(chips.Lives(fleet, tmp_path)), 7))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases == 7


def test_content_is_flushed_before_it_gets_the_name_and_the_folder_after(fleet: Fleet) -> None:
    states: dict[str, int] = {}
    row = report.tried("disk", disk.cases(fleet, states))
    assert not row.lost, "\n".join(row.lost)
    assert set(states) == set(SCENARIOS) and min(states.values()) > 1000


def test_the_harness_sees_a_content_that_is_not_flushed(tmp_path: Path) -> None:
    """The model of the disk can fail: no fsync before the rename, none of the folder, a mode that comes late."""
    path = tmp_path / "identity.pem"
    draft = f'"{tmp_path}/draft", O_RDWR|O_CREAT|O_EXCL'
    made = [("openat", f"AT_FDCWD, {draft}, 0600", 4), ("write", '4, ""..., 9', 9)]
    flush, named = [("fsync", "4", 0)], [("rename", f'"{tmp_path}/draft", "{path}"', 0)]
    folder = [("openat", f'AT_FDCWD, "{tmp_path}", O_RDONLY|O_DIRECTORY', 5), ("fsync", "5", 0)]
    tell = [("sendto", '6, "", 5', 5)]
    mode = [("fchmod", "4, 0640", 0)]

    def verdict(*steps: list[tuple[str, str, int]], fat: bool = False) -> list[str]:
        model = disk.Disk(str(path), None, fat=fat)
        for step in steps:
            for call, rest, result in step:
                model.replay(call, rest, result)
        model.end()
        return model.wrong

    assert verdict(made, flush, named, folder, tell) == []
    assert any("before the content" in wrong for wrong in verdict(made, named, folder, tell))
    assert any("before the folder" in wrong for wrong in verdict(made, flush, named, tell))
    assert any("after the first byte" in wrong for wrong in verdict(made, mode, flush, named, folder))
    assert any("before its owner" in wrong for wrong in verdict(made, flush, mode, named, folder))

    # FAT: a renamed file's slot is flushed with the file, once its old slot is gone.
    assert any("slot was flushed" in wrong for wrong in verdict(made, flush, named, folder, tell, fat=True))
    assert any("two slots" in wrong for wrong in verdict(made, flush, named, flush, folder, tell, fat=True))
    assert verdict(made, flush, named, folder, flush, tell, fat=True) == []


def test_the_model_knows_names_that_are_relative_to_a_folder(tmp_path: Path) -> None:
    """As strace -y shows them: 7</folder>, "name"."""
    model = disk.Disk(str(tmp_path / "identity.pem"), None)
    at = f"7<{tmp_path}>"
    model.replay("openat", f'{at}, ".identity.pem.new", O_RDWR|O_CREAT|O_EXCL, 0600', 4)
    model.replay("write", f'4<{tmp_path}/.identity.pem.new>, ""..., 9', 9)
    model.replay("renameat", f'{at}, ".identity.pem.new", {at}, "identity.pem"', 0)
    assert model.wrong == ["after renameat: the name could be there before the content"]
    model.replay("openat", f'{at}, ".", O_RDONLY|O_DIRECTORY', 5)
    model.replay("fsync", f"5<{tmp_path}>", 0)
    assert model.flushes == ["folder"]


def test_the_table_counts_each_kind_of_case_by_itself() -> None:
    rows = [report.Row("a", 3, 3), report.Row("b", 1000, 1000, kind="fuzz inputs"), report.Row("c", 2, 1, ["c"])]
    lines = report.table(rows).splitlines()
    assert lines[-2:] == [
        "| **all faults** | **5** | **4** | **1** |",
        "| **all fuzz inputs** | **1000** | **1000** | **nothing** |",
    ]
