"""Many starts at the same instant, while others read the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import world
from needs import slow
from torture import concurrency, report
from torture.fleet import Fleet


@slow
def test_many_starts_at_once_make_one_key_and_one_request_and_readers_see_whole_files(fleet: Fleet) -> None:
    counts: Counter[str] = Counter()
    row = report.tried("", concurrency.cases(fleet, 40, counts), workers=1)
    assert not row.lost, "\n".join(row.lost)
    assert counts["starts"] == 160 and counts["reads"] > 200


def test_a_run_that_opened_the_file_just_before_another_replaced_it_looks_again(fleet: Fleet) -> None:
    """Between open and flock the whole life of another run fits in, which makes and posts a new key."""
    dut = fleet.rejection()
    # The call is held up before it is made: strace(1), delay_enter, microseconds.
    slow = ("strace", "-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:delay_enter=4000000:when=1")
    installed, dut.device.command = dut.device.command, list(world.WITHOUT_STARTER)
    process = dut.device.start(*dut.options, before=slow)
    dut.device.command = installed
    descriptors = world.until("the file is open", lambda: _opened_by_child(process.pid, dut.device.key_file))
    assert descriptors
    quick = dut.run()
    assert quick.status == 69, quick
    content = dut.content
    late = dut.device.finish(process)
    assert late.status in (1, 69), late
    assert dut.content == content
    assert len(fleet.requests(dut.client_id)) == 1
    assert fleet.broken(dut, late) + fleet.recovered(dut) == []


def _opened_by_child(parent: int, path: Path) -> bool:
    """Whether a child of the process has the file open."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        for descriptor in Path(f"/proc/{child}/fd").iterdir():
            try:
                if descriptor.readlink() == path:
                    return True
            except OSError:
                continue
    return False
