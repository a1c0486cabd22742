"""The documentation says the truth: its commands are run as written, its tables and links are held to the program."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import world
from world import Nginx

from caramel_embedded import cli, settings

PAGES = [world.ROOT / "README.md", world.ROOT / "CHANGELOG.md", *sorted((world.ROOT / "docs").glob("*.md"))]
DOCS = world.ROOT / "docs"


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Each fenced block: its language, its text, and the line of prose right before it."""
    before, kind, lines = "", None, []  # type: str, str | None, list[str]
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            if kind is None:
                kind, lines = line[3:], []
            else:
                yield kind, "".join(f"{line}\n" for line in lines), before
                kind = None
        elif kind is not None:
            lines.append(line)
        elif line:
            before = line


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next one of that or a higher level."""
    text = page.read_text()
    level = heading.split()[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


# --- Links and tables ---


def anchors(page: Path) -> set[str]:
    """What can stand behind # in a link to the page, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, ahead = set(), [world.ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s:]+\.md)", page.read_text()):
            linked = (page.parent / target).resolve()
            if linked not in seen and linked.exists():
                ahead.append(linked)
    assert not [page.name for page in PAGES if page not in seen]


def test_the_settings_table_is_that_of_the_program() -> None:
    text = (world.ROOT / "README.md").read_text()
    table = text.partition("<!-- settings -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    promised = {row[0].strip("`"): (row[1].strip("`"), row[2].strip("`")) for row in rows}
    for flag, placeholder, name, _ in cli.SETTINGS:
        assert promised.pop(f"{flag} {placeholder}")[0] == name
    switches = {word.strip("`,") for option in promised for word in option.split()}
    known = {text for action in cli.parser()._actions for text in action.option_strings}
    assert switches <= known
    # Everything that can be said is in the table; of two spellings, one.
    for action in cli.parser()._actions:
        assert action.dest in settings.VALUES or switches & set(action.option_strings), action.option_strings
    defaults = {row[0].split()[0].strip("`"): row[2].strip("`") for row in rows}
    assert defaults["--key-file"] == settings.KEY_FILE
    assert defaults["--config"] == settings.CONFIG_FILE
    assert float(defaults["--timeout"]) == settings.TIMEOUT
    made = settings.Settings({"CARAMEL_CONFIG": os.devnull}, {})
    assert int(defaults["--mode"], 8) == made.mode


def test_the_examples_stand_in_the_page_as_they_are() -> None:
    shown = [text for kind, text, _ in blocks(DOCS / "application-authors.md") if kind == "python"]
    for name in ("application.py", "with_keyring.py"):
        assert (world.ROOT / "examples" / name).read_text() in shown


# --- A page is followed to the letter ---

#: What the page takes for granted on its machine, for a machine that has none of it and is not to be changed.
MACHINE = r"""
set -eu
caramel-embedded() { "$COMMAND" --config "$ROOT/empty.conf" "$@"; }
curl() { command curl --noproxy '*' "$@"; }
nginx() { command "$NGINX_PROGRAM" -p "$ROOT/nginx/" -e error.log -c "$ROOT/nginx/nginx.conf" "$@"; }
listens() { for _ in $(seq 300); do (: <>"/dev/tcp/127.0.0.1/$1") 2>/dev/null && return; sleep 0.1; done; return 1; }
systemctl() {
    case "$*" in
        daemon-reload) ;;
        "enable --now caramel" | "restart caramel")
            [ -z "${SERVER-}" ] || { kill "$SERVER"; wait "$SERVER" || :; }
            unit=$ROOT/etc/systemd/system/caramel.service
            if command -v systemd-analyze >/dev/null; then systemd-analyze verify "$unit"; fi
            $(sed -n 's/^ExecStart=//p' "$unit") >>"$ROOT/server.log" 2>&1 &
            SERVER=$!
            listens "$PLAIN_PORT" ;;
        "reload nginx")
            # (`nginx -t` makes an empty one.)
            if [ -s "$ROOT/nginx/nginx.pid" ]; then nginx -s reload && sleep 0.3; else nginx 2>"$ROOT/log" & fi
            listens "$TLS_PORT" ;;
        *) echo "systemctl $*?" >&2; return 1 ;;
    esac
}
cd "$ROOT"
"""


@contextmanager
def _machine(folder: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Words of the page and what they are here; and the environment of its commands."""
    plain, tls = world.free_port(), world.free_port()
    (folder / "nginx").mkdir()
    for name in ("etc/nginx/conf.d", "etc/systemd/system", "etc/cron.d", "etc/caramel", "opt/caramel", "tmp"):
        (folder / name).mkdir(parents=True)
    (folder / "opt/caramel/bin").symlink_to(world.CARAMEL)
    (folder / "empty.conf").write_text("")
    (folder / "nginx" / "nginx.conf").write_text(
        "daemon off; pid nginx.pid; error_log error.log; events {} http { access_log off;"
        + "".join(f"{kind}_temp_path temporary;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        + f" include {folder}/etc/nginx/conf.d/*.conf; }}\n"
    )
    words = {
        r"(?<![\w.])/((?:etc|opt|var)/(?:caramel|nginx|systemd|cron\.d|lib/caramel)|tmp/)": rf"{folder}/\1",
        r"(--server |https://)ca\.example\.com": rf"\1localhost:{tls}",
        r"ca\.example\.com": "localhost",
        r"127\.0\.0\.1:6543": f"127.0.0.1:{plain}",
        r"listen 443 ssl": f"listen 127.0.0.1:{tls} ssl",
        # Installed by `make` already, with the very same words; see below.
        r"(?m)^(python3 -m venv|\S*pip install) .*\n": "",
    }
    environment = world.environment(
        ROOT=str(folder),
        COMMAND=world.COMMAND,
        NGINX_PROGRAM=Nginx.program() or "nginx",
        PLAIN_PORT=str(plain),
        TLS_PORT=str(tls),
        HOME=str(folder),
    )
    yield words, environment


def follow(page: Path, folder: Path) -> str:
    """Puts the page's files where it says, and runs its commands, in the page's order; what they printed."""
    with _machine(folder) as (words, environment):
        script = MACHINE
        for kind, text, before in blocks(page):
            for pattern, word in words.items():
                text = re.sub(pattern, word, text)
            if kind in ("sh", "bash"):
                script += f": {'-' * 8}\n{text}"
                continue
            named = re.search(r"`(/[^`]+)`:$", before)
            if named:
                path = str(folder) + named[1]
                script += f"cat >{path} <<'END OF FILE'\n{text}END OF FILE\n"
        said = folder / "said"
        # A file, because what the page starts in the background would keep a pipe open.
        with open(said, "wb") as output:
            bash = subprocess.Popen(
                ["bash", "-c", script],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            status = bash.wait(90)
        finally:
            world.end(bash)
    text = re.sub(r"[.+*]{20,}", "", said.read_text())
    assert status == 0, text[-4000:]
    return text


def test_the_page_for_server_administrators(tmp_path: Path) -> None:
    if not Nginx.program():
        pytest.skip("nginx is not installed")
    page = DOCS / "server-administrators.md"
    said = follow(page, tmp_path)
    assert said.count("waits to be signed") == 4 and said.count("new certificate") == 4
    assert "the administrator rejected the request" in said
    new = tmp_path / "etc/caramel/new-ca.crt"
    verified = subprocess.run(
        ["openssl", "verify", "-CAfile", str(new), str(tmp_path / "tmp/unit-0002.pem")],
        capture_output=True,
        text=True,
    )
    assert verified.stdout.endswith(": OK\n"), verified.stderr
    assert (tmp_path / "etc/caramel/ca.key").stat().st_mode & 0o077 == 0
    # What is not run again here stands in the Makefile, and is run by it.
    makefile = (world.ROOT / "Makefile").read_text()
    assert "'caramel==1.9.6' 'pyOpenSSL<24.3'" in makefile and "'caramel==1.9.6' 'pyOpenSSL<24.3'" in page.read_text()
