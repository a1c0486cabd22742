# SPDX-License-Identifier: MIT OR Apache-2.0
"""From the benchmark's figures to tables, and the list of what was to be reached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Figures = dict[str, Any]

OURS = "caramel-embedded"
ZIPAPP = "caramel-embedded, zipapp"
FLOOR = "urllib3 floor"
BARE = "bare interpreter"
FASTENERS = "fasteners, imported alone"
ALL_LINES = "with all lines"

#: What was to be reached: the run, the aim, the figure, and whether it was reached (None: not measured).
Aim = tuple[str, str, str, "bool | None"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _run(seen: Figures, state: str, name: str, distance: str = "0") -> Figures | None:
    found: Figures | None = seen["runs"].get(state, {}).get(name, {}).get(distance)
    return found


def _both(wire: dict[str, Any]) -> int:
    """Bytes in both directions."""
    return int(wire["up"] + wire["down"])


def reached(seen: Figures) -> Iterator[Aim]:
    """Each aim."""
    ours, floor = _run(seen, "unchanged", OURS), _run(seen, "unchanged", FLOOR)
    if not ours or not floor:
        yield "all", "", "the program isn't there", None
        return

    def times(run: str, aim: str, share: float, most: float) -> Aim:
        return run, f"{aim}: at most {most:g} times", f"{share:.3f} times", share <= most

    ratios = seen["ratios"]["unchanged"]
    yield times("unchanged", "processor time of the urllib3 floor", ratios[OURS], 0.88)
    yield times("unchanged", "peak memory of the floor", ours["memory"][1] / floor["memory"][1], 1.05)
    far = _run(seen, "unchanged", OURS, "0.6")
    if far:
        met = (far["connections"], far["round_trips"]) == (1, 3)
        figure = f"{far['connections']} and {far['round_trips']}"
        yield "unchanged", "one connection, three round trips", figure, met
        # The quicker quarter of both: at three times as many waits, a busy machine is late three times as often.
        late = far["wall"][0] / (1800 + ours["wall"][0])
        yield times("unchanged", "wall time at 0.6 s, of 1.8 s and the run at 0 s", late, 1.05)
    size = _both(seen["wire"]["metered"][OURS])
    yield "unchanged", "304, no tickets: at most 6479 bytes, as 1.0.0 had", f"{size} bytes", size <= 6479
    if "elliptic" in seen:
        size = _both(seen["elliptic"]["metered"])
        yield "unchanged", "everything elliptic: at most 3200 bytes", f"{size} bytes", size <= 3200
    for state in ("unchanged", "pending", "locked out"):
        trace = seen["traces"][state][OURS]
        figure = f"{trace['bytes']} bytes, {trace['flushes']} flushes, {trace['changes']} other changes"
        written = trace["bytes"] + trace["flushes"] + trace["changes"]
        yield state, "nothing written, nothing flushed", figure, not written
    locked = seen["ratios"]["locked out"]
    yield times("locked out", "processor time of the bare interpreter", locked[OURS], 2.3)
    yield times("locked out", "processor time of fasteners' import alone", locked[OURS] / locked[FASTENERS], 1.05)
    pending = _run(seen, "pending", OURS)
    assert pending
    yield times("pending", "processor time of an unchanged check", pending["cpu"][1] / ours["cpu"][1], 1.05)
    zipped = _run(seen, "unchanged", ZIPAPP)
    if zipped:
        yield times("zipapp", "processor time of the urllib3 floor", ratios[ZIPAPP], 0.86)
        yield times("zipapp", "processor time of the installed one", zipped["cpu"][1] / ours["cpu"][1], 1.03)
    else:
        yield "zipapp", "no slower than installed", "not measured", None


def targets(seen: Figures) -> str:
    """The list for the terminal."""
    words = {True: "reached", False: "MISSED", None: "-"}
    return "\n".join(f"{words[good]:8} {run:12} {figure:44} {aim}" for run, aim, figure, good in reached(seen))


def _state(seen: Figures, state: str) -> str:
    head = ["", "processor ms (middle half)", "ratio", "wall ms", "at 0.1 s", "at 0.6 s", "peak MiB", "connections"]
    head += ["round trips", "bytes up", "down", "system calls", "written", "flushes"]
    rows = []
    for name in seen["runs"][state]:
        run = _run(seen, state, name)
        assert run
        far = [_run(seen, state, name, distance) for distance in ("0.1", "0.6")]
        trace = seen["traces"][state].get(name, {})
        low, middle, high = run["cpu"]
        ratio = seen["ratios"].get(state, {}).get(name)
        wire = [run["connections"], (far[0] or run)["round_trips"], run["up"], run["down"]]
        rows.append(
            [
                name,
                f"{middle:.1f} ({low:.1f} to {high:.1f})",
                f"{ratio:.2f}" if ratio else "",
                f"{run['wall'][1]:.0f}",
                *(f"{one['wall'][1]:.0f}" if one else "" for one in far),
                f"{run['memory'][1]:.1f}",
                *(str(figure) if run["round_trips"] else "" for figure in wire),
                *(str(trace.get(what, "")) for what in ("calls", "bytes", "flushes")),
            ]
        )
    return table(head, rows)


def _bytes(wire: dict[str, int]) -> str:
    total = _both(wire)
    return f"{wire['up']} + {wire['down']} = {total} ({total + 40 * wire['packets']})"


def _elliptic(seen: Figures) -> str:
    """Record by record, what an unchanged check puts on the wire with RSA and with elliptic keys."""
    kinds = [seen["records"], seen["elliptic"]["metered"]["records"], seen["elliptic"]["own"]["records"]]
    weights = [{(side, name): size for side, name, size in kind} for kind in kinds]
    rows = [
        [f"{side}: {name}", *(str(weight.get((side, name), "")) for weight in weights)] for side, name, _ in kinds[0]
    ]
    rows.append(["both ways", *(str(sum(weight.values())) for weight in weights)])
    return table(["one unchanged check, bytes", "RSA", "elliptic", "elliptic, no client certificate"], rows)


def _lines(seen: Figures) -> str:
    """What each line of the configuration for metered fleets saves."""
    whole = seen["lines"][ALL_LINES]
    rows = []
    for name, wire in seen["lines"].items():
        more, waits = _both(wire) - _both(whole), wire["round_trips"] - whole["round_trips"]
        rows.append([name, str(_both(wire)), f"{more:+d}", f"{waits:+d}"])
    return table(["", "bytes, both ways", "difference", "round trips"], rows)


def page(seen: Figures) -> str:
    """All tables. What the columns mean stands at the head of measure.py."""
    what = {**seen["machine"], **seen["versions"], "rounds": seen["rounds"], "seconds": seen["seconds"]}
    parts = {"Measured with": "".join(f"- {name}: {value}\n" for name, value in what.items())}
    words = {True: "reached", False: "**missed**", None: ""}
    aims = [[run, aim, figure, words[good]] for run, aim, figure, good in reached(seen)]
    parts["To reach"] = table(["run", "aim", "figure", ""], aims)
    for state in seen["runs"]:
        parts[state.capitalize()] = _state(seen, state)
    wire = seen["wire"]
    rows = [[name, *(_bytes(wire[kind][name]) for kind in wire)] for name in wire["plain"]]
    parts["On the wire, up and down"] = table(["unchanged check, bytes", *wire], rows)
    if "elliptic" in seen:
        parts["Everything elliptic"] = _elliptic(seen)
    parts["What each line of nginx-metered.conf saves"] = _lines(seen)
    return "\n".join(f"# {title}\n\n{text}" for title, text in parts.items())
