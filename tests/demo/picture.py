"""A picture of `make demo` in a terminal, from a real run: what `make demo-picture` writes.

    python -m demo.picture FILE.svg

The run is the whole one. The picture shows some of its steps, word for word, and says where it leaves others out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from html import escape
from pathlib import Path

#: How the steps begin that are shown, in their order.
SHOWN = (
    "The device boots for the first time.",
    "The administrator looks at the requests, and signs this one.",
    "The device asks again, and has an identity.",
)
LEFT_OUT = "[...]"

#: The terminal, in columns; a column and a line in pixels.
COLUMNS, WIDTH, HEIGHT = 110, 7.8, 17

#: Colours by what a line begins with, after its four spaces.
COLOURS = {"$": "#7ee787", "#": "#e3b341", "|": "#9da7b3"}


def chosen(output: str) -> list[str]:
    """The lines of the picture, out of all that the demo has printed. Raises `ValueError` where a step is missing."""
    lines = ["$ make demo"]
    steps: list[list[str]] = []
    for line in output.splitlines():
        # A step begins with a line of prose; what is run and seen in it stands further to the right.
        if line and not line.startswith(" "):
            steps.append([])
        if steps:
            steps[-1].append(line)
    wanted = list(SHOWN)
    last = -1
    for number, step in enumerate(steps):
        if not wanted or not step[0].startswith(wanted[0]):
            continue
        del wanted[0]
        lines += [LEFT_OUT] * (number > last + 1) + [""] + [line for line in step if line]
        last = number
    if wanted:
        raise ValueError(f"the demo has no step that begins with {wanted[0]!r}")
    rows: list[str] = []
    for line in [*lines, LEFT_OUT]:
        rows += [line[start : start + COLUMNS] for start in range(0, len(line), COLUMNS)] or [""]
    return rows


def drawn(lines: list[str]) -> str:
    """The picture of a terminal with these lines, as SVG."""
    width, height = round(COLUMNS * WIDTH) + 32, (len(lines) + 1) * HEIGHT + 16
    text, mark = [], ""
    for number, line in enumerate(lines):
        if not line:
            continue
        # What a wrapped line goes on with looks like its beginning.
        if line.startswith("    "):
            mark = line[4]
        elif number and len(lines[number - 1]) < COLUMNS:
            mark = line[0] if line[0] in COLOURS else ""
        if line == LEFT_OUT:
            style = ' fill="#6e7681"'
        elif line.lstrip().startswith("exit status"):
            style = ' fill="#79c0ff"'
        elif mark in COLOURS:
            style = f' fill="{COLOURS[mark]}"'
        else:
            style = "" if line.startswith(" ") else ' font-weight="bold"'
        # The length keeps the columns where the viewer's font is wider.
        bare = line.lstrip()
        left = 16 + (len(line) - len(bare)) * WIDTH
        text.append(
            f'<text x="{left:.1f}" y="{(number + 1) * HEIGHT + 8}" textLength="{len(bare) * WIDTH:.1f}"'
            f' lengthAdjust="spacingAndGlyphs"{style}>{escape(bare)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        "<title>What make demo prints: the life of a device</title>\n"
        '<style>text{font:13px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace}</style>\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n<g fill="#e6edf3" xml:space="preserve">\n'
        + "\n".join(text)
        + "\n</g>\n</svg>\n"
    )


def main(path: str) -> int:
    done = subprocess.run(
        [sys.executable, "-Es", "-m", "demo.life"],
        stdout=subprocess.PIPE,
        text=True,
        # Not what this machine calls its folder for temporary files.
        env={**os.environ, "TMPDIR": "/tmp", "NO_COLOR": "1"},
    )
    if done.returncode:
        return done.returncode
    Path(path).write_text(drawn(chosen(done.stdout)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
