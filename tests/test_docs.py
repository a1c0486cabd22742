"""The documentation says the truth: its commands are run as written, its tables and links are held to the program."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional
from xml.etree import ElementTree

import pytest
import world
from needs import needs, require
from world import Authority, Caramel, Device, Front, Nginx

import caramel_embedded
from caramel_embedded import cli, enrollment, settings

PAGES = [
    *(world.ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((world.ROOT / "docs").glob("*.md")),
    *(world.ROOT / name / "README.md" for name in ("server", "authority", "buildroot")),
    *(world.ROOT / "packaging" / name / "README.md" for name in ("yocto", "container")),
]
DOCS = world.ROOT / "docs"
PACKAGE = world.ROOT / "caramel_embedded"


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(world.ROOT)))
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(world.ROOT)))
def test_no_command_waits_for_ever(page: Path) -> None:
    """Who follows a page on a machine where something is missing gets to its next line all the same."""
    for kind, text, _ in blocks(page):
        if kind.split()[:1] in (["sh"], ["bash"]):
            loops = re.findall(r"(?:^|[;&|{(]|\b(?:do|then))\s*((?:until|while)\s.*)", text, re.M)
            assert [loop for loop in loops if not re.match(r"while (IFS=\S* )?read\b", loop)] == []


def test_the_settings_table_is_that_of_the_program() -> None:
    text = (DOCS / "settings.md").read_text()
    table = text.partition("<!-- settings -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    promised = {row[0].strip("`"): (row[1].strip("`"), row[2].strip("`")) for row in rows}
    for name, _, flag, placeholder, _ in settings.SETTINGS:
        assert promised.pop(f"{flag} {placeholder}")[0] == name
    switches = {word.strip("`,") for option in promised for word in option.split() if word[0] in "`-"}
    known = {text for action in cli.parser()._actions for text in action.option_strings}
    assert switches <= known
    # Everything that can be said is in the table; of two spellings, one.
    for action in cli.parser()._actions:
        assert action.dest in settings.VALUES or switches & set(action.option_strings), action.option_strings
    defaults = {row[0].split()[0].strip("`"): row[2].strip("`") for row in rows}
    assert defaults["--key-file"] == settings.KEY_FILE
    assert defaults["--config"] == settings.CONFIG_FILE
    assert float(defaults["--timeout"]) == settings.TIMEOUT
    made = settings.Settings.read({"CARAMEL_CONFIG": os.devnull}, {})
    assert int(defaults["--mode"], 8) == made.permissions.mode


# --- A page is followed to the letter ---

#: What the page takes for granted on its machine, for a machine that has none of it and is not to be changed.
MACHINE = r"""
set -eu
caramel-embedded() { "$COMMAND" --config "$CONFIG" "$@"; }
curl() { command curl --noproxy '*' "$@"; }
python3() { "$PYTHON" -B "$@"; }
ln -s "$SOURCES/examples" .
mkdir -p etc var/lib tmp
"""


def follow(
    page: Path,
    folder: Path,
    address: str = "localhost",
    meanwhile: Optional[dict[int, str]] = None,
    more: str = "",
    words: Optional[dict[str, str]] = None,
) -> str:
    """Puts the page's files where it says, and runs its commands, in the page's order; what they printed.

    `address`: of the server. `meanwhile`: commands before the nth block, for what somebody else does. `words`: what
    is something else here. The server's page is followed on a new Debian: `test_server_package.py`.
    """
    (folder / "empty.conf").write_text("")
    usual = {
        r"(?<![\w.])/((?:etc|var)/(?:caramel|lib/caramel)|tmp/)": rf"{folder}/\1",
        r"ca\.example\.com": address,
        # Installed by `make` already.
        r"(?m)^(python3 -m venv|\S*pip install) .*\n": "",
    }
    environment = world.environment(
        SOURCES=str(world.ROOT),
        PYTHON=sys.executable,
        CONFIG=str(folder / "empty.conf"),
        COMMAND=world.COMMAND,
        HOME=str(folder),
    )
    script, turn = MACHINE + more, 0
    for kind, text, before in blocks(page):
        for pattern, word in {**(words or {}), **usual}.items():
            text = re.sub(pattern, word, text)
        if kind in ("sh", "bash"):
            script += f": {'-' * 8}\n{(meanwhile or {}).get(turn, '')}\n{text}"
            turn += 1
            continue
        named = re.search(r"`(/[^`]+)`:$", before)
        if named:
            path = str(folder) + named[1]
            script += f"mkdir -p {os.path.dirname(path)}\ncat >{path} <<'END OF FILE'\n{text}END OF FILE\n"
    # A file, because what the page starts in the background would keep a pipe open.
    said = folder / "said"
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
        status = bash.wait(300)
    finally:
        world.end(bash)
    text = said.read_text()
    assert status == 0, text[-4000:]
    return text


def test_the_page_for_device_makers(tmp_path: Path, caramel: Caramel, front: Front, authority: Authority) -> None:
    page = DOCS / "device-makers.md"
    files = [text for kind, text, _ in blocks(page) if kind == "ini"]
    for text in (*files, re.findall(r"`(CARAMEL_HOOK=.*)`", page.read_text())[0]):
        settings.check(settings.parse(text, page.name), page.name)
    config = tmp_path / "device.conf"
    config.write_text(
        files[0]
        .replace("/var", f"{tmp_path}/var")
        .replace("=ca.example.com", f"={front.address}")
        .replace("/etc/caramel-ca.pem", str(authority.certificate_file))
        + "CARAMEL_CN=made-by-the-page\n"
    )
    listed = f"{world.CARAMEL}/caramel_tool {caramel.ini}"
    sign = f"{listed} --sign=$({listed} --list | awk '/ made-by-the-page / {{ print $1 }}')"
    said = follow(page, tmp_path, meanwhile={2: sign}, more=f"CONFIG={config}\n")
    outcomes = re.findall(
        r"^exit status \d+|waits to be signed|new certificate|^certificate +\w+", said, re.MULTILINE
    )
    assert outcomes == [
        "waits to be signed",
        "exit status 69",
        "certificate      none",
        "exit status 69",
        "new certificate",
        "certificate      usable",
    ]
    assert (tmp_path / "tmp/backup.pem").read_bytes() == (tmp_path / "var/lib/caramel/identity.pem").read_bytes()
    for name in ("CARAMEL_CN", "CARAMEL_KEY_FILE", "CARAMEL_NOT_AFTER"):
        assert f"`{name}`" in page.read_text() and f'"{name}"' in (PACKAGE / "hook.py").read_text()


def test_the_page_for_application_authors(
    tmp_path: Path, caramel: Caramel, front: Front, authority: Authority
) -> None:
    page = DOCS / "application-authors.md"
    with caramel.autosign():
        said = follow(page, tmp_path, front.address, more=f"cp {authority.certificate_file} ca.crt\n")
    assert re.search("waits to be signed.*\nexit status 69", said)
    assert "new certificate" in said and "root.crt: " in said
    # The first lines of the page, as they are.
    first = next(text for kind, text, _ in blocks(page) if kind == "python").replace("ca.example.com", front.address)
    stores: list[Any] = []
    scope: dict[str, Any] = {
        "ca_cert": authority.pem,
        "client_id": "made-by-the-page-2",
        "stored": None,
        "store": stores.append,
    }
    exec(first, scope)
    assert bytes(scope["outcome"].identity) == bytes(stores[-1])
    # What the tables name is there, and what is there is named.
    text = page.read_text()
    for name in caramel_embedded.__all__:
        assert f"`{name}" in text or f"{name}(" in text, name
    for kind in (caramel_embedded.Outcome, caramel_embedded.Identity):
        for name in kind._fields:
            assert f"`{name}`" in text, name


def test_the_page_on_monitoring(tmp_path: Path, authority: Authority) -> None:
    page = DOCS / "monitoring.md"
    device = Device(tmp_path / "device", "localhost", authority.certificate_file, "fffbeec0ffee")
    device.has(authority.identity("fffbeec0ffee"))
    values = json.loads(device.run("--status", "--json").out)
    table = section(page, "# Monitoring").partition("| name | |\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert named == list(values)
    for row in rows:
        (name, *_) = re.findall(r"`(\w+)`", row[0])
        if isinstance(values[name], dict):
            assert set(re.findall(r"`(\w+)`", row[1])) - {"null"} == set(values[name])
    # The sample shows what is really shown.
    sample = next(text for kind, text, _ in blocks(page) if kind == "console")
    shown = [line[:16].rstrip() for line in sample.splitlines()[1:]]
    assert shown == [line[:16].rstrip() for line in device.run("--status", "--mode", "600").out.splitlines()]
    for path in re.findall(r"`\$\.([\w.]+)`", page.read_text()):
        value: Any = values
        for name in path.split("."):
            value = value[name]
        assert isinstance(value, int)
    # One command, and the right to run it.
    agent = re.search(r"^UserParameter=[\w.]+,sudo -n (.*)$", page.read_text(), re.MULTILINE)
    assert agent and f"NOPASSWD: {agent[1]}\n" in page.read_text()
    # The metrics, by the page's own command.
    config = tmp_path / "device.conf"
    config.write_text(f"CARAMEL_CA_CERT={device.ca}\nCARAMEL_KEY_FILE={device.key_file}\nCARAMEL_CN=fffbeec0ffee\n")
    command = tmp_path / "bin" / "caramel-embedded"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {world.COMMAND} --config {config} "$@"\n')
    command.chmod(0o755)
    more = f"PATH={command.parent}:$PATH; mkdir node; unset -f caramel-embedded\n"
    words = {"/var/lib/prometheus/node-exporter": "node"}
    said = follow(page, tmp_path, more=more, words=words)
    lines = [line for line in said.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r'[a-z_]+(\{(\w+="[^"]*",?)+\})? -?\d+', line) for line in lines), said
    metrics = {line.partition(" ")[0].partition("{")[0]: int(line.rpartition(" ")[2]) for line in lines}
    # Those of the authority stand there, too; its own tests have them.
    of_devices = page.read_text().partition("\n## The registration authority")[0]
    assert set(metrics) == set(re.findall(r"^\| `(caramel_\w+)`", of_devices, re.MULTILINE))
    assert metrics["caramel_certificate_not_after_seconds"] == values["certificate"]["not_after"]
    assert (metrics["caramel_status"], metrics["caramel_hook_owed"]) == (0, 0)
    config.write_text("CARAMEL_MODE=999\n")
    (tmp_path / "again").mkdir()
    said = follow(page, tmp_path / "again", more=more, words=words)
    assert "caramel_status 127" in said and "not_after" not in said


# --- README and design ---


@pytest.mark.parametrize("status, does", [(0, "started"), (1, ""), (69, ""), (127, ""), (5, "")])
@pytest.mark.parametrize("shell", ["dash", "bash", "busybox sh"])
def test_the_idiom_for_an_init_script(shell: str, status: int, does: str, tmp_path: Path) -> None:
    idiom = next(text for kind, text, _ in blocks(world.ROOT / "README.md") if kind == "sh")
    fake = tmp_path / "caramel-embedded"
    fake.write_text(f"#!/bin/sh\nexit {status}\n")
    fake.chmod(0o755)
    require(shell.partition(" ")[0])
    script = f"PATH={tmp_path}:$PATH; start_what_needs_the_certificate() {{ printf started; }}\n{idiom}"
    line = [*shell.split(), "-euc" if status == 0 else "-uc", script]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, does, "")


@needs("nginx", "curl", "openssl")
def test_how_other_programs_use_the_file(tmp_path: Path, authority: Authority) -> None:
    """Each line of that table, as it stands there, against a server that demands a certificate."""
    table = section(DOCS / "recipes.md", "## How other programs use the file")
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", table, re.MULTILINE))
    identity = tmp_path / "identity.pem"
    identity.write_bytes(authority.identity("fffbeec0ffee"))
    identity.chmod(0o600)
    lines = {
        name: code.replace("/var/lib/caramel/identity.pem", str(identity))
        for name, row in rows.items()
        for code in re.findall(r"`([^`]+)`", row)[:1]
    }
    assert set(lines) == {"nginx", "curl", "mosquitto", "stunnel", "OpenSSL", "Python"}
    certificate = authority.server()
    with Nginx(
        tmp_path / "nginx", None, certificate, verify_client="on", client_ca=authority.certificate_file
    ) as server:
        trust = f"--cacert {authority.certificate_file} --noproxy '*' -s -o /dev/null"
        for command in (
            lines["curl"].replace("https://api.example.com/", f"https://{server.address}/curl {trust}"),
            "printf 'GET /openssl HTTP/1.0\\r\\n\\r\\n' | timeout 20 "
            + lines["OpenSSL"].replace("api.example.com:443", f"{server.address} -quiet -ign_eof"),
        ):
            subprocess.run(["sh", "-c", command], env=world.environment(), timeout=30, capture_output=True)
        context = ssl.create_default_context(cafile=str(authority.certificate_file))
        exec(lines["Python"], {"context": context})
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"https://{server.address}/python", context=context, timeout=20)
        seen = {asked.path: (asked.verify, "CN=fffbeec0ffee" in asked.subject) for asked in server.seen()}
    assert seen == {f"/{name}": ("SUCCESS", True) for name in ("curl", "openssl", "python")}
    # As servers they have the file in `test_readers.py` and `test_recipes.py`; here their words.
    assert lines["nginx"] == f"ssl_certificate {identity}; ssl_certificate_key {identity};"
    assert lines["mosquitto"] == f"certfile {identity}" and lines["stunnel"] == f"cert = {identity}"


def test_the_picture_is_the_state_machine() -> None:
    svg = ElementTree.parse(DOCS / "states.svg")
    drawn = {
        (text.get("data-state"), text.get("data-event")): (text.get("data-next"), text.get("data-action"))
        for text in svg.iter("{http://www.w3.org/2000/svg}text")
        if text.get("data-state")
    }
    assert drawn == {
        (state.name, event.name): (after.name, action.name)
        for state, row in enrollment.TRANSITIONS.items()
        for event, (after, action) in row.items()
    }


def test_the_page_of_what_is_supported_claims_what_is_tried() -> None:
    """Each test that its table names is there, and its versions are those that the tests and the Makefile have."""
    text = (DOCS / "supported.md").read_text()
    table = text.partition("<!-- supported -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    supported = {row[0]: row[1] for row in rows}
    for what, _, shown in rows:
        named = re.findall(r"`([\w/.]+\.(?:py|sh))(?:::(\w+))?`", shown)
        assert named, what
        for file, name in named:
            source = (world.ROOT / file).read_text()
            assert not name or re.search(rf"^(class|def|    def) {name}\b", source, re.MULTILINE), f"{file}::{name}"
    assert supported["Python"].split(", ") == list(world.VERSIONS)
    for path in (world.ROOT / "Makefile", DOCS / "server-administrators.md"):
        assert f"'caramel=={supported['Caramel']}' 'pyOpenSSL<24.3'" in path.read_text()
    layer = (world.ROOT / "packaging/yocto/meta-caramel-embedded/conf/layer.conf").read_text()
    assert f'"{supported["Yocto"].partition(":")[0].replace(", ", " ")}"' in layer
    version = caramel_embedded.__version__
    assert f"\n## {version}\n" in (world.ROOT / "CHANGELOG.md").read_text()
    assert f"This is version {version}," in (world.ROOT / "README.md").read_text()
    assert f"/caramel-embedded_{version}_all.deb" in (DOCS / "into-an-image.md").read_text()


def test_every_target_that_the_pages_name_is_there() -> None:
    help_ = subprocess.run(["make", "-s", "help"], cwd=world.ROOT, capture_output=True, text=True, check=True).stdout
    there = set(re.findall(r"^  make ([a-z-]+)", help_, re.MULTILINE))
    for page in PAGES:
        if page.parent.name == "buildroot":  # it speaks of Buildroot's own make
            continue
        for target in re.findall(
            r"(?m)(?:^ {4}|`)make ((?!install-)[a-z]+(?:-[a-z]+)*)\b(?![.:/=])", page.read_text()
        ):
            assert target in there, f"{page.name}: make {target}"


# --- The examples ---


@pytest.mark.parametrize("name", ["application.py", "with_keyring.py", "prometheus_textfile.py"])
def test_an_example_ends_in_a_plain_line_and_not_in_a_traceback(name: str, tmp_path: Path) -> None:
    """Without arguments, without the library, without the folder or file that it is told of."""

    def ends(*arguments: str, without: Sequence[str] = ()) -> str:
        start = "import runpy, sys; sys.argv = sys.argv[2:]; sys.modules.update(dict.fromkeys(%r))" % (without,)
        line = [sys.executable, "-B", "-c", f"{start}; runpy.run_path(sys.argv[0], run_name='__main__')", "-"]
        done = subprocess.run(
            [*line, str(world.ROOT / "examples" / name), *arguments],
            cwd=tmp_path,
            env=world.environment(HOME=str(tmp_path)),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode != 0 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    if name == "prometheus_textfile.py":
        assert ends().startswith("usage: ")
        assert "no/folder" in ends("no/folder/caramel.prom", "true")
        assert "no-such-command" in ends("caramel.prom", "no-such-command")
        return
    if name == "with_keyring.py":  # on a machine without a desktop
        assert "no key chain to be used: " in ends("localhost", str(world.ROOT / "README.md"))
    said = ends("a", "b", "c", without=("caramel_embedded",) if name == "application.py" else ("keyring",))
    assert "there is no module" in said and "pip install" in said
    if name == "application.py":
        assert ends().startswith("usage: ")
        assert "no-such-file" in ends("app.sqlite", "localhost", "no-such-file")


def test_alarms_cover_each_status_that_wants_one() -> None:
    text = (DOCS / "monitoring.md").read_text()
    for status in ("69", "127"):
        assert re.search(rf"expr: caramel_status == {status}$", text, re.MULTILINE), status
        assert re.search(rf"caramel\.exit_status,\w+\)={status}`", text), status
    # And one for what isn't written any more, under the name that the page's timer gives to the file.
    (written,) = re.findall(r"^ExecStart=\S+/prometheus_textfile\.py (\S+)$", text, re.MULTILINE)
    (stale,) = re.findall(r'node_textfile_mtime_seconds\{file=~"(.*)"\} > 3600', text)
    assert re.fullmatch(stale, written)


def test_nobodys_machine_is_in_the_pages() -> None:
    for page in PAGES:
        # A file of an administrator's, right in root's home folder, is nobody's machine; a folder there is.
        found = re.search(r"/root/[^/\s`]+/|/work/|/home/(?!\.)|\bhttp://(?!127|www|%)", page.read_text())
        assert not found, page.name
