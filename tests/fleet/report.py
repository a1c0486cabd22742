"""From the figures of `make fleet` to docs/fleet.md and its pictures: what was measured, and what is computed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, Optional

Figures = dict[str, Any]

HERE = Path(__file__).resolve().parent
FLEETS = (1_000, 90_000, 1_000_000)
#: Hours of a year: 365.25 days.
YEAR = 8766
#: Seconds from one check of a device to the next.
HOURLY = 3600
#: How busy a processor may be for its queue to stay short.
BUSY = 0.7
#: Bytes of TCP and IPv4 headers of a packet, without options.
HEADERS = 40
PARTS = ("nginx", "server", "database")
#: From whose figures the growth is computed: how it is called, and the configuration's name.
GROWTH = (
    ("Caramel, SQLite", "Caramel, SQLite, 1, suggested, RSA"),
    ("Caramel, PostgreSQL", "Caramel, PostgreSQL, 2, suggested, RSA"),
    ("authority, SQLite", "registration authority, SQLite, 1, P-256"),
    ("authority, PostgreSQL", "registration authority, PostgreSQL, 2, P-256"),
)


# --- Numbers and tables -------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}".replace(",", " ")
    if value >= 0.1 or not value:
        return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{value:.4f}".rstrip("0").rstrip(".") or "0"


def about(value: float) -> str:
    """A whole number with two digits that count, the others zero."""
    return number(round(value, 1 - math.floor(math.log10(value)))) if value >= 10 else number(value)


def size(value: float) -> str:
    for unit, bytes_ in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= bytes_:
            return f"{number(value / bytes_)} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    for unit, least, one in (("days", 172800.0, 86400), ("h", 7200.0, 3600), ("min", 120.0, 60)):
        if seconds >= least:
            return f"{number(seconds / one)} {unit}"
    return f"{number(seconds)} s"


def milliseconds(value: Optional[float]) -> str:
    return "" if value is None else number(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table of Markdown; all columns but the first `words` are numbers."""
    marks = ["---"] * words + ["---:"] * (len(head) - words)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, marks, *rows))


# --- What was measured --------------------------------------------------------------------------------------


def entries(seen: Figures) -> dict[str, Figures]:
    return {entry["configuration"]["name"]: entry for entry in seen["configurations"]}


def total(cost: dict[str, float]) -> float:
    """Milliseconds of processor time that the servers had for a check; the load generator's are its own."""
    # Python 3.12 adds up more exactly than those before it; this is exact on all.
    return math.fsum(cost.get(part, 0.0) for part in PARTS)


def _kind(entry: Figures) -> list[str]:
    configuration = entry["configuration"]
    where = {"Caramel": "as most are", "registration authority": "its own"}[configuration["server"]]
    return [
        configuration["server"].replace("registration authority", "authority"),
        configuration["database"],
        str(configuration["processes"]),
        "suggested" if configuration["suggested"] else where,
        configuration["keys"],
    ]


KIND = ["server", "database", "processes", "front", "keys"]


def wire(seen: Figures) -> str:
    """One check of the program, by what it depends on."""
    rows = []
    done = set()
    for entry in seen["configurations"]:
        server, _, _, front, keys = _kind(entry)
        if (server, front, keys) in done:
            continue
        done.add((server, front, keys))
        one = entry["wire"]
        status = next(iter(entry["saturation"]["statuses"]))
        rows.append(
            [server, front, keys, status, *map(str, (one["up"], one["down"], one["packets"], on_wire(entry)))]
        )
    head = ["server", "front", "keys", "answer", "bytes up", "down", "packets", "bytes with headers"]
    return table(head, rows, 3)


def on_wire(entry: Figures) -> int:
    """Bytes of one check with the headers of its packets."""
    one = entry["wire"]
    return int(one["up"] + one["down"] + HEADERS * one["packets"])


def loads(seen: Figures) -> str:
    rows = []
    for entry in seen["configurations"]:
        full, below = entry["saturation"], entry["below"]

        def late(load: Figures) -> list[str]:
            return [milliseconds(load["latency"].get(share)) for share in ("50", "95", "99")]

        errors = full["errors"] + below["errors"]
        rows.append(
            [*_kind(entry), number(full["rate"]), *late(full), number(below["rate"]), *late(below), str(errors)]
        )
    head = [*KIND, "checks/s at most", "50 %", "95 %", "99 %", "checks/s below", "50 %", "95 %", "99 %", "errors"]
    return table(head, rows, 5)


def costs(seen: Figures) -> str:
    rows = []
    for entry in seen["configurations"]:
        load = entry["saturation"]
        memory, busy = load["memory"], load["busy"]
        rows.append(
            [
                *_kind(entry),
                *(number(load["cost"][part]) if part in load["cost"] else "in it" for part in PARTS),
                f"**{number(total(load['cost']))}**",
                number(load["cost"]["load"]),
                *(f"{memory[part] / 2**20:.0f}" if part in memory else "" for part in PARTS),
                f"{busy['server']:.2f}",
                f"{busy['idle']:.2f}",
            ]
        )
    head = [*KIND, "nginx ms", "Python ms", "database ms", "together", "Locust ms", "nginx MiB", "Python MiB"]
    return table([*head, "database MiB", "Python busy", "idle"], rows, 5)


def growth(seen: Figures) -> str:
    rows = []
    for entry in seen["configurations"]:
        configuration, grown = entry["configuration"], entry["growth"]
        if configuration["keys"] == "P-256" and configuration["server"] == "Caramel":
            continue
        log = grown["log"]
        rows.append(
            [
                *_kind(entry)[:4],
                str(grown["checks"]),
                str(grown["rows"]),
                number(max(0.0, grown["bytes"])),
                "" if log is None else number(log),
            ]
        )
    head = [*KIND[:4], "checks", "rows in `accesslog`", "bytes a check", "of the write-ahead log a check"]
    return table(head, rows, 4)


def sizes(seen: Figures) -> str:
    rows = []
    for name, looks in seen["sizes"].items():
        server, database = name.split(", ")[:2]
        for look in looks:
            rows.append(
                [
                    server.replace("registration authority", "authority"),
                    database,
                    number(look["devices"]),
                    ("yes" if look["index"] else "no") if server == "Caramel" else "its own",
                    number(look["rate"]),
                    number(look["cost"]["server"]),
                    number(look["cost"]["database"]) if "database" in look["cost"] else "in it",
                    milliseconds(look["latency"].get("50")),
                    size(look["size"]),
                ]
            )
    head = ["server", "database", "devices in it", "index", "checks/s", "Python ms", "database ms", "50 % within ms"]
    return table([*head, "size"], rows, 2)


def counts(seen: Figures) -> str:
    """Whether Locust, its users and nginx counted the same."""
    every = [load["counts"] for load in _loads(seen)]
    same = sum(len(set(one.values())) == 1 for one in every)
    checks = sum(one["nginx"] for one in every)
    errors = sum(load["errors"] for load in _loads(seen))
    return (
        f"In {same} of {len(every)} loads Locust, its users and nginx's log counted the same number of checks, "
        f"{number(checks)} in all; {errors or 'none'} of them failed."
    )


def _loads(seen: Figures) -> Iterator[Figures]:
    for entry in seen["configurations"]:
        yield entry["saturation"]
        yield entry["below"]
    for looks in seen["sizes"].values():
        yield from looks


def others(seen: Figures) -> float:
    """Cores that others had on average: neither idle, nor used by servers and load. The kernel's own work counts."""
    cores = int(seen["machine"]["cores"])
    return statistics.fmean(max(0.0, cores - math.fsum(load["busy"].values())) for load in _loads(seen))


def quiet(seen: Figures) -> str:
    """What a reader has to know before all else, where the machine had other things to do."""
    had = others(seen)
    if had < 0.3:
        return ""
    return (
        f"\n**The machine was not quiet in this run:** other programs had {number(had)} of its "
        f"{seen['machine']['cores']} cores on average. So rates are too low, and latencies too high. "
        "Processor times suffer less.\n"
    )


# --- What is computed ---------------------------------------------------------------------------------------


def indexed(seen: Figures, name: str) -> dict[str, float]:
    """Milliseconds of each part for a check, where the fleet is a large one and the database has its index.

    nginx's part is that of the load; that of server and database is from the largest database that was measured.
    """
    entry = entries(seen)[name]
    cost = dict(entry["saturation"]["cost"])
    configuration = entry["configuration"]
    for other, looks in seen["sizes"].items():
        server, database = other.split(", ")[:2]
        if (server, database) == (configuration["server"], configuration["database"]):
            cost.update(
                {part: looks[-1]["cost"][part] for part in ("server", "database") if part in looks[-1]["cost"]}
            )
    return {part: cost[part] for part in PARTS if part in cost}


def known(seen: Figures) -> list[tuple[str, str]]:
    return [(title, name) for title, name in GROWTH if name in entries(seen)]


def years(seen: Figures) -> str:
    rows = []
    for devices in FLEETS:
        for title, name in known(seen):
            entry, cost = entries(seen)[name], indexed(seen, name)
            rate = devices / HOURLY
            checks = devices * YEAR
            rows.append(
                [
                    number(devices),
                    title,
                    number(rate),
                    *(number(rate * cost[part] / 1000) if part in cost else "in it" for part in PARTS),
                    f"**{number(rate * total(cost) / 1000 / BUSY)}**",
                    size(checks * on_wire(entry)),
                    size(checks * max(0.0, entry["growth"]["bytes"])) if entry["growth"]["rows"] else "nothing",
                    size(devices * 365 * seen["certificate"]["pem"]) if "Caramel" in title else "nothing",
                ]
            )
    head = ["devices", "server", "checks/s", "nginx", "Python", "database", f"cores at {100 * BUSY:.0f} %"]
    return table([*head, "bytes a year", "`accesslog` a year", "old certificates a year"], rows, 2)


def saturation(seen: Figures) -> str:
    """How many checks a second one processor's worth of each part answers, and which fleet that is."""
    rows = []

    def row(title: str, part: str, rate: float, how: str, knob: str) -> None:
        rows.append([title, part, number(rate), about(HOURLY * BUSY * rate), how, knob])

    for title, name in known(seen):
        cost = indexed(seen, name)
        row(title, "nginx, one core", 1000 / cost["nginx"], "computed", "more cores: nginx takes all that there are")
        if "database" in cost:
            row(title, "Python, one process", 1000 / cost["server"], "computed", "more processes, then more machines")
            database = 1000 / cost["database"]
            row(title, "PostgreSQL, one core", database, "computed", "more cores, then a machine of its own")
        elif "Caramel" in title:
            rate = entries(seen)[name]["saturation"]["rate"]
            row(title, "SQLite: one writer, the disk", rate, "measured", "PostgreSQL")
        else:
            row(
                title, "Python, one process", 1000 / cost["server"], "computed", "PostgreSQL, and then more processes"
            )
    head = ["server", "part", "checks/s", f"devices, hourly, {100 * BUSY:.0f} % busy", "", "the next knob"]
    return (
        table(head, rows, 2)
        .replace("| ---: | ---: | ---: | ---: |\n", "| ---: | ---: | --- | --- |\n", 1)
    )  # fmt: skip


def spread(seen: Figures) -> str:
    """Within which time a fleet may check at once for nothing to be busier than `BUSY`."""
    names = dict(known(seen))
    cost = indexed(seen, names["Caramel, PostgreSQL"])
    cores = (2, 8)
    sqlite = entries(seen)[names["Caramel, SQLite"]]["saturation"]["rate"]
    rows = []
    for devices in FLEETS:
        work = [devices * total(cost) / 1000 / count / BUSY for count in cores]
        rows.append([number(devices), duration(devices / sqlite / BUSY), *map(duration, work)])
    return table(["devices", "Caramel, SQLite", *(f"Caramel, PostgreSQL, {count} cores" for count in cores)], rows)


# --- The page -----------------------------------------------------------------------------------------------


def page(seen: Figures) -> str:
    """docs/fleet.md."""
    every, names = entries(seen), dict(known(seen))
    postgres, sqlite = every[names["Caramel, PostgreSQL"]], every[names["Caramel, SQLite"]]
    authority = every[names["authority, PostgreSQL"]]
    cost = indexed(seen, names["Caramel, PostgreSQL"])
    looks = {name.split(", ")[1]: looks for name, looks in seen["sizes"].items() if name.startswith("Caramel")}
    largest = {kind: [look for look in several if not look["index"]][-1] for kind, several in looks.items()}
    helped = {kind: several[-1] for kind, several in looks.items()}
    plain = every["Caramel, PostgreSQL, 2, plain, RSA"]
    elliptic = every["Caramel, PostgreSQL, 2, suggested, P-256"]
    hourly = 90_000 / HOURLY

    def spent(look: Figures) -> str:
        return number(look["cost"]["server"] + look["cost"].get("database", 0))

    return (HERE / "fleet.md.in").read_text().format(
        **{name: seen["machine"][name] for name in ("processor", "kernel", "nginx", "PostgreSQL", "Locust", "flush")},
        version=seen["version"],
        devices=f"{seen['devices']:,}".replace(",", " "),
        seconds=f"{seen['measured for']:g}",
        minutes=f"{seen['seconds'] / 60:.0f}",
        counts=counts(seen),
        wire=wire(seen),
        loads=loads(seen),
        costs=costs(seen),
        growth=growth(seen),
        sizes=sizes(seen),
        years=years(seen),
        saturation=saturation(seen),
        spread=spread(seen),
        year=number(YEAR),
        others=number(others(seen)),
        quiet=quiet(seen),
        cores_there=seen["machine"]["cores"],
        busy=f"{100 * BUSY:.0f} %",
        share=BUSY,
        headers=HEADERS,
        hourly=number(hourly),
        check=number(total(cost)),
        cost_nginx=number(cost["nginx"]),
        cost_python=number(cost["server"]),
        cost_database=number(cost["database"]),
        cores=number(hourly * total(cost) / 1000),
        cores_busy=number(hourly * total(cost) / 1000 / BUSY),
        authority=number(total(indexed(seen, names["authority, PostgreSQL"]))),
        authority_python=number(authority["saturation"]["cost"]["server"]),
        plain_nginx=number(plain["saturation"]["cost"]["nginx"]),
        plain_python=number(plain["saturation"]["cost"]["server"]),
        suggested_nginx=number(postgres["saturation"]["cost"]["nginx"]),
        suggested_python=number(postgres["saturation"]["cost"]["server"]),
        elliptic_nginx=number(elliptic["saturation"]["cost"]["nginx"]),
        elliptic_bytes=number(on_wire(postgres) - on_wire(elliptic)),
        sqlite_rate=number(sqlite["saturation"]["rate"]),
        sqlite_busy=f"{100 * sqlite['saturation']['busy']['server']:.0f} %",
        many=number(largest["SQLite"]["devices"]),
        sqlite_many=spent(largest["SQLite"]),
        sqlite_helped=spent(helped["SQLite"]),
        postgres_many=spent(largest["PostgreSQL"]),
        postgres_helped=spent(helped["PostgreSQL"]),
        row=number(postgres["growth"]["bytes"]),
        row_sqlite=number(sqlite["growth"]["bytes"]),
        pem=seen["certificate"]["pem"],
        wire_plain=on_wire(plain),
        wire_suggested=on_wire(postgres),
        device_plain=size(YEAR * on_wire(plain)),
        device_suggested=size(YEAR * on_wire(postgres)),
        fleet_plain=size(90_000 * YEAR * on_wire(plain)),
        fleet_suggested=size(90_000 * YEAR * on_wire(postgres)),
        accesslog=size(90_000 * YEAR * postgres["growth"]["bytes"]),
        index=seen["index"],
        certificates=size(90_000 * 365 * seen["certificate"]["pem"]),
    )  # fmt: skip


def write(seen: Figures, docs: Path) -> None:
    """The page and its pictures."""
    for name, text in contents(seen).items():
        (docs / name).write_text(text)


def contents(seen: Figures) -> dict[str, str]:
    """The files below docs/ that are made of the figures."""
    return {
        "fleet.md": page(seen),
        "fleet-cost.svg": picture_of_costs(seen),
        "fleet-size.svg": picture_of_sizes(seen),
    }


# --- Pictures -----------------------------------------------------------------------------------------------

STYLE = (
    "text{font:12px sans-serif;fill:#24292f}.title{font-weight:bold}.right{text-anchor:end}"
    ".middle{text-anchor:middle}"
    ".nginx{fill:#9aa4af}.server{fill:#b5651d}.database{fill:#3b6ea5}.line{fill:none;stroke-width:2}"
    ".grid{stroke:#d8dee4;stroke-width:1}"
)
SAID = {"nginx": "nginx", "server": "Python", "database": "PostgreSQL"}


def svg(title: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n"
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
        f'<text x="10" y="24" class="title">{escape(title)}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def picture_of_costs(seen: Figures) -> str:
    """Bars: milliseconds of processor time for a check, by part."""
    left, width, bar, y = 300, 320, 20, 60
    top = max(total(entry["saturation"]["cost"]) for entry in seen["configurations"])
    parts = []
    x = float(left)
    for part in PARTS:
        parts.append(f'<rect x="{x:.0f}" y="36" width="12" height="12" class="{part}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="46">{SAID[part]}</text>')
        x += 90
    for entry in seen["configurations"]:
        server, database, processes, front, keys = _kind(entry)
        name = f"{server}, {database}, {processes} \u00d7, {front}, {keys}"
        parts.append(f'<text x="{left - 8}" y="{y + 13}" class="right">{escape(name)}</text>')
        x = float(left)
        for part in PARTS:
            long = width * entry["saturation"]["cost"].get(part, 0.0) / top
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{long:.1f}" height="{bar - 6}" class="{part}"/>')
            x += long
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 12}">{total(entry["saturation"]["cost"]):.2f} ms</text>')
        y += bar
    return svg("Processor time of a check that finds nothing new", 700, y + 12, parts)


def picture_of_sizes(seen: Figures) -> str:
    """Lines: milliseconds of Python and database for a check, over the devices in the database; both logarithmic."""
    left, right, top, bottom, height = 60, 500, 50, 300, 340
    lines: list[tuple[str, str, list[tuple[float, float]]]] = []
    for name, looks in seen["sizes"].items():
        server, database = name.split(", ")[:2]
        points = [(look["devices"], look["cost"]["server"] + look["cost"].get("database", 0.0)) for look in looks]
        if server == "Caramel":
            lines.append((f"Caramel, {database}", "", points[:-1]))
            lines.append((f"Caramel, {database}, index", "index", points[-1:]))
        else:
            lines.append((f"authority, {database}", "", points))
    lines.sort(key=lambda line: -line[2][-1][1])  # as their ends lie on the right, from the top
    values = [point for _, _, points in lines for point in points]
    first, last = min(x for x, _ in values), max(x for x, _ in values)
    least = 10.0 ** math.floor(math.log10(min(y for _, y in values)))
    most = 10.0 ** math.ceil(math.log10(max(y for _, y in values)))
    scale = _logarithmic(first, last, left, right), _logarithmic(least, most, bottom, top)
    parts = []
    decade = least
    while decade <= most * 1.01:
        y = scale[1](decade)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="right">{decade:g} ms</text>')
        decade *= 10
    for devices in sorted({x for x, _ in values}):
        parts.append(f'<text x="{scale[0](devices):.1f}" y="{bottom + 18}" class="middle">{number(devices)}</text>')
    parts.append(f'<text x="{(left + right) // 2}" y="{bottom + 36}" class="middle">devices in the database</text>')
    colors = {"SQLite": "#b5651d", "PostgreSQL": "#3b6ea5"}
    ends: list[float] = []
    for name, kind, points in lines:
        color = colors[name.split(", ")[1]]
        dashes = ' stroke-dasharray="5 4"' if name.startswith("authority") else ""
        at = [(scale[0](x), scale[1](y)) for x, y in points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        parts.append(f'<path d="{path}" class="line" stroke="{color}"{dashes}/>')
        fill = "#fff" if kind else color
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{color}"/>' for x, y in at]
        y = at[-1][1] + 4
        while any(abs(y - other) < 14 for other in ends):  # labels that would lie on each other
            y += 2
        ends.append(y)
        parts.append(f'<text x="{right + 12}" y="{y:.1f}">{escape(name)}: {number(points[-1][1])} ms</text>')
    return svg("Python and database for a check, as the fleet grows", 760, height, parts)


def _logarithmic(least: float, most: float, start: float, end: float) -> Callable[[float], float]:
    span = math.log(most / least) or 1.0
    return lambda value: start + (end - start) * math.log(value / least) / span
