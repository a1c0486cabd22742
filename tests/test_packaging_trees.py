"""buildroot/ and packaging/yocto/, as far as they can be held without Buildroot and bitbake.

What was held against the real ones, and how to do it again, stands in their READMEs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs
from world import ROOT, Authority, environment

from caramel_embedded import __version__, settings

PACKAGE = ROOT / "buildroot/package/caramel-embedded"
CONFIG = (PACKAGE / "Config.in").read_text()
RULES = (PACKAGE / "caramel-embedded.mk").read_text()
RECIPES = list((ROOT / "packaging/yocto/meta-caramel-embedded").glob("recipes-*/*/*.bb"))

LIBEXEC = "usr/libexec/caramel-embedded"

#: What Buildroot gives to a package's file, as far as this one uses it.
BUILDROOT = """\
qstrip = $(strip $(subst ",,$(1)))
python-package =
BR_BUILDING = y
BR2_EXTERNAL_CARAMEL_EMBEDDED_PATH = {root}/buildroot
BR2_PACKAGE_CARAMEL_EMBEDDED = y
HOST_DIR = {folder}/host
TARGET_DIR = {folder}/target
INSTALL = install
{options}
include {root}/buildroot/package/caramel-embedded/caramel-embedded.mk
{folder}/build/built:
\t$(CARAMEL_EMBEDDED_WRITE_SETTINGS)
{folder}/build/installed:
\t$(CARAMEL_EMBEDDED_INSTALL_INIT_SYSV)
\t$(CARAMEL_EMBEDDED_INSTALL_INIT_SYSTEMD)
"""


def test_every_place_has_the_same_version() -> None:
    changelog = (ROOT / "packaging/debian/changelog").read_text()
    assert changelog.startswith(f"caramel-embedded ({__version__}) ")
    assert f"CARAMEL_EMBEDDED_VERSION = {__version__}\n" in RULES
    assert [recipe.name for recipe in RECIPES] == [f"caramel-embedded_{__version__}.bb"]


def test_the_options_of_buildroot_are_those_that_its_rules_use() -> None:
    prefix = "BR2_PACKAGE_CARAMEL_EMBEDDED"
    defined = set(re.findall(rf"^config ({prefix}\w*)$", CONFIG, re.MULTILINE))
    used = set(re.findall(rf"{prefix}\w*", RULES))
    assert used <= defined
    # "Started by: nothing" is where nothing is done.
    assert defined - used == {f"{prefix}_START_NONE"}


def test_what_python_needs_is_asked_of_buildroot() -> None:
    """As python3 and python-cryptography have it; kconfig doesn't hand on what a selected option depends on."""
    for line in (
        "depends on BR2_USE_WCHAR",
        "depends on BR2_USE_MMU",
        "depends on BR2_TOOLCHAIN_HAS_THREADS",
        "depends on !BR2_STATIC_LIBS",
        "depends on BR2_PACKAGE_HOST_RUSTC_TARGET_ARCH_SUPPORTS",
        "select BR2_PACKAGE_HOST_PYTHON3_SSL",
        "select BR2_PACKAGE_PYTHON3_SSL",
        "select BR2_PACKAGE_PYTHON3_UNICODEDATA",
        "select BR2_PACKAGE_PYTHON_CRYPTOGRAPHY",
    ):
        assert re.search(rf"^\t{line}( # .*)?$", CONFIG, re.MULTILINE), line


def test_the_config_keeps_to_buildroots_format() -> None:
    help_text = False
    for line in CONFIG.splitlines():
        help_text = line == "\thelp" or (help_text and line.startswith("\t  ")) or (help_text and not line)
        assert len(line.expandtabs(8)) <= 80 or "depends on" in line or "select" in line or "default" in line, line
        if help_text and line and line != "\thelp":
            assert re.match(r"\t  \S", line)
            assert len(line) <= 2 + 63  # a tab, two spaces, and no more than 62 characters


@needs("make")
class TestBuildroot:
    def build(self, folder: Path, target: str, **options: str) -> subprocess.CompletedProcess[str]:
        (folder / "host/bin").mkdir(parents=True, exist_ok=True)
        python = folder / "host/bin/python3"
        if not python.exists():
            python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            python.chmod(0o755)
        (folder / "build").mkdir(exist_ok=True)
        if not (folder / "build/packaging").exists():
            # Buildroot has rsynced the sources there.
            for name in ("packaging", "buildroot", "caramel_embedded"):
                shutil.copytree(ROOT / name, folder / "build" / name)
        lines = "".join(f"BR2_PACKAGE_CARAMEL_EMBEDDED_{name} = {value}\n" for name, value in options.items())
        (folder / "Makefile").write_text(BUILDROOT.format(root=ROOT, folder=folder, options=lines))
        return subprocess.run(
            ["make", "-s", "-C", str(folder), f"{folder}/build/{target}"],
            capture_output=True,
            text=True,
            env={"PATH": environment()["PATH"], "SOURCE_DATE_EPOCH": "1700000000"},  # and no coverage
        )

    def test_the_options_become_settings(self, tmp_path: Path, authority: Authority) -> None:
        more = tmp_path / "more.conf"
        more.write_text('CARAMEL_CA=overridden\nCARAMEL_HOOK="/etc/init.d/S50x restart"')
        done = self.build(
            tmp_path, "built", SERVER='"ca.example.com:8443"', CA_CERT=f'"{authority.certificate_file}"',
            INTERFACES='""', KEY_FILE='"/data/it\'s id.pem"', SETTINGS=f'"{more}"',
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        text = (tmp_path / "build/buildroot.conf").read_text()
        assert settings.parse(text, "buildroot.conf") == {
            "CARAMEL_CA": "ca.example.com:8443",
            "CARAMEL_CA_CERT": str(authority.certificate_file),
            "CARAMEL_KEY_FILE": "/data/it's id.pem",
            "CARAMEL_HOOK": "/etc/init.d/S50x restart",
        }
        assert (tmp_path / "build/.settings-checked/baked.pem").read_bytes() == authority.pem

    @pytest.mark.parametrize(
        ("option", "value", "word"),
        [
            ("SERVER", '""', "Check your BR2_PACKAGE_CARAMEL_EMBEDDED_SERVER setting"),
            ("CA_CERT", '""', "Check your BR2_PACKAGE_CARAMEL_EMBEDDED_CA_CERT setting"),
            ("SERVER", '"http://x/y"', "(BR2_PACKAGE_CARAMEL_EMBEDDED_SERVER)"),
            ("CA_CERT", '"/no such file"', "(BR2_PACKAGE_CARAMEL_EMBEDDED_CA_CERT): /no such file: No such file"),
            ("INTERFACES", '"eth0,lo"', "(BR2_PACKAGE_CARAMEL_EMBEDDED_INTERFACES): 'lo' has no MAC address"),
            ("KEY_FILE", '"id.pem"', "(BR2_PACKAGE_CARAMEL_EMBEDDED_KEY_FILE): 'id.pem' must begin with a slash"),
            ("SETTINGS", '"/no such file"', "/no such file"),
        ],
    )
    def test_a_bad_option_is_named(
        self, tmp_path: Path, authority: Authority, option: str, value: str, word: str
    ) -> None:
        options = {"SERVER": '"ca.example.com"', "CA_CERT": f'"{authority.certificate_file}"', option: value}
        done = self.build(tmp_path, "built", **options)
        assert done.returncode == 2
        assert word in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("start", "files"),
        [
            ("START_INIT_SCRIPT", {"etc/init.d/S95caramel-embedded", "usr/libexec/caramel-embedded/keep-enrolled"}),
            (
                "START_TIMER",
                {"usr/lib/systemd/system/caramel-embedded.timer", "usr/libexec/caramel-embedded/until-enrolled"},
            ),
            ("START_NONE", set()),
        ],
    )
    def test_what_starts_it_is_installed(self, tmp_path: Path, start: str, files: set[str]) -> None:
        done = self.build(tmp_path, "installed", **{"SERVER": '"a.example"', "CA_CERT": '"/x"', start: "y"})
        assert done.returncode == 0, done.stderr
        found = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*")}
        assert files <= found
        assert bool(files) == bool(found)


def test_the_recipe_of_yocto_fetches_what_is_there_and_all_that_is_installed() -> None:
    (recipe,) = RECIPES
    text = recipe.read_text()
    match = re.search(r'^CARAMEL_EMBEDDED_SOURCES = "(.*)"$', text, re.MULTILINE)
    assert match
    sources = match[1].split()
    assert all((ROOT / name).exists() for name in sources)
    # What setup.py, setup.cfg and packaging.mk open.
    assert {"setup.py", "setup.cfg", "caramel_embedded", "packaging", "buildroot"} <= set(sources)
    # THISDIR is the recipe's folder.
    assert (recipe.parent / "../../../../..").resolve() == ROOT
    for setting in re.findall(r'"(CARAMEL_[A-Z_]+)"\),$', text, re.MULTILINE):
        assert setting in settings.VALUES


def test_the_layer_names_the_long_term_releases() -> None:
    text = (ROOT / "packaging/yocto/meta-caramel-embedded/conf/layer.conf").read_text()
    assert 'LAYERSERIES_COMPAT_caramel-embedded = "scarthgap wrynose"' in text
