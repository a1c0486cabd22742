"""The man page and the shell completion say what the option parser says: no less, and no more."""

from __future__ import annotations

import json
import re
import subprocess

from needs import needs
from world import ROOT, environment

from caramel_embedded import cli, errors, settings
from caramel_embedded.log import INFO, Log

PAGE = ROOT / "packaging/man/caramel-embedded.8"
COMPLETION = ROOT / "packaging/completion/caramel-embedded.bash"


def options() -> dict[str, str]:
    """Every option of the command with the name of its setting, if it is one."""
    names = {flag: name for name, _, flag, *_ in settings.SETTINGS}
    actions = cli.parser()._actions
    return {string: names.get(string, "") for action in actions for string in action.option_strings}


def page() -> dict[str, str]:
    """The options that the page's list has, with what stands in parentheses behind them."""
    text = PAGE.read_text()
    section = text[text.index(".Sh OPTIONS") : text.index(".Sh FILES")]
    found = {}
    for line in re.findall(r"^\.It Fl (.*)$", section, re.MULTILINE):
        flags, _, name = line.partition(" Pq Ev ")
        for flag in re.split(r" , ", flags):
            found["-" + flag.split(" ")[0]] = name
    return found


def test_the_page_has_the_options_of_the_program_and_no_others() -> None:
    assert page() == options()


def test_the_page_has_the_defaults_and_statuses() -> None:
    text = PAGE.read_text()
    assert settings.KEY_FILE in text
    assert settings.CONFIG_FILE in text
    section = text[text.index(".Sh EXIT STATUS") : text.index(".Sh EXAMPLES")]
    statuses = [int(number) for number in re.findall(r"^\.It (\d+)$", section, re.MULTILINE)]
    assert statuses == [errors.EXIT_CERTIFIED, errors.EXIT_LOCKED, errors.EXIT_PENDING, errors.EXIT_FAILED]


def test_the_page_has_all_of_a_checks_json() -> None:
    words = Log()
    words.json = words.quiet = True
    outcome = cli.result(words, errors.EXIT_CERTIFIED, "text", INFO)
    section = re.sub(r"\s+", " ", PAGE.read_text().partition(".It Fl -json\n")[2].partition(".It ")[0])
    assert set(re.findall(r"\.Va (\w+)", section)) == set(json.loads(outcome))


#: Options of 1.0.0, whose section names what they are for.
FIRST = {
    *(
        "--server",
        "--ca-cert",
        "--key-file",
        "--client-id",
        "--interfaces",
        "--owner",
        "--group",
        "--mode",
        "--config",
    ),
    *("--verbose", "--quiet", "--version", "--help", "-v", "-q", "-h"),
}


def test_no_place_is_forgotten_where_an_option_stands() -> None:
    """The other places are held to the program above, and in test_docs.py: see "Add an option" in CONTRIBUTING.md."""
    example = re.findall(r"^#([A-Z_]+)=", (ROOT / "packaging/caramel-embedded.conf").read_text(), re.MULTILINE)
    # The example is itself the file that CARAMEL_CONFIG names.
    assert sorted(example) == sorted(set(settings.VALUES) - {"CARAMEL_CONFIG"}), "packaging/caramel-embedded.conf"
    changes = re.findall(r"`(--[a-z-]+)\b", (ROOT / "CHANGELOG.md").read_text())
    assert sorted(set(options()) - set(changes) - FIRST) == [], "CHANGELOG.md"


def test_the_help_and_the_page_say_each_default() -> None:
    text = PAGE.read_text()
    items = dict(re.findall(r"^\.It Fl -([a-z-]+) Ar [^\n]*\n(.*?)(?=^\.It |^\.El)", text, re.MULTILINE | re.DOTALL))
    for _, _, flag, _, words in settings.SETTINGS:
        assert "default" in words, flag
        assert "default" in items[flag[2:]] or flag == "--server", flag
    layers = ["firmware", "configuration file", "environment", "option"]
    for place in (cli.parser().epilog or "", text.partition(".Sh OPTIONS")[2]):
        order = [place.index(layer) for layer in layers]
        assert order == sorted(order)


@needs("mandoc")
def test_the_page_is_well_formed() -> None:
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "style", str(PAGE)], capture_output=True, text=True)
    # It compares cross references with the pages of this machine.
    elsewhere = ("mandoc.db", "referenced manual")
    assert not [line for line in done.stdout.splitlines() if not any(word in line for word in elsewhere)]


def complete(*words: str) -> list[str]:
    """What the shell would offer for the last word."""
    script = (
        f'. "{COMPLETION}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); compopt() {{ :; }}; '
        '$(complete -p caramel-embedded | sed "s/.*-F \\([^ ]*\\) .*/\\1/"); printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", "caramel-embedded", *words],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_completion_offers_the_options_of_the_program_and_no_others() -> None:
    assert sorted(complete("-")) == sorted(options())
    assert complete("--key") == ["--key-file", "--key-type", "--key-command"]


def test_the_completion_knows_what_an_option_takes() -> None:
    assert tuple(complete("--key-type", "")) == tuple(settings.KEY_TYPES)
    assert "root" in complete("--owner", "ro")
    assert "lo" in complete("--interfaces", "l")
    assert complete("--config", "setup.c") == ["setup.cfg"]
    for _, _, flag, *_ in settings.SETTINGS:
        # Whatever it offers behind an option that takes a value, it is not another option.
        assert not [word for word in complete(flag, "-") if word.startswith("-")]
