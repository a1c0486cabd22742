"""buildroot/ and packaging/yocto/, as far as they can be held without Buildroot and bitbake.

What was held against the real ones, and how to do it again, stands in their READMEs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kconfiglib  # type: ignore[import-untyped, unused-ignore]
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
SED = sed -i -e
{options}
include {root}/buildroot/package/caramel-embedded/caramel-embedded.mk
{folder}/build/built:
\t$(CARAMEL_EMBEDDED_WRITE_SETTINGS)
{folder}/build/installed:
\t$(CARAMEL_EMBEDDED_INSTALL_INIT_SYSV)
\t$(CARAMEL_EMBEDDED_INSTALL_INIT_SYSTEMD)
\t$(CARAMEL_EMBEDDED_INSTALL_KEYS)
\t$(CARAMEL_EMBEDDED_STARTER_FOR_SH)
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
    # "Started by: nothing" and "private key: in the key file" are where nothing is done.
    assert defined - used == {f"{prefix}_START_NONE", f"{prefix}_KEYS_FILE"}


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
        "select BR2_PACKAGE_PYTHON_FASTENERS",
        "select BR2_PACKAGE_PYTHON_PYOPENSSL",
        "select BR2_PACKAGE_PYTHON_URLLIB3",
    ):
        assert re.search(rf"^\t{line}( # .*)?$", CONFIG, re.MULTILINE), line


#: What Buildroot's own files define, as far as ours ask for it; each is set by the test.
KNOWN = (
    *("USE_WCHAR", "USE_MMU", "TOOLCHAIN_HAS_THREADS", "STATIC_LIBS", "INSTALL_LIBSTDCPP", "RISCV_64"),
    *("TOOLCHAIN_USES_GLIBC", "TOOLCHAIN_USES_MUSL", "TOOLCHAIN_USES_UCLIBC", "INIT_SYSTEMD", "INIT_NONE"),
    *("PACKAGE_HOST_RUSTC_ARCH_SUPPORTS", "PACKAGE_HOST_RUSTC_TARGET_ARCH_SUPPORTS"),
    *("PACKAGE_HOST_RUSTC_TARGET_TIER2_HOST_TOOLS_PLATFORMS", "PACKAGE_PYTHON3"),
    *("PACKAGE_HOST_PYTHON3_SSL", "PACKAGE_PYTHON3_SSL", "PACKAGE_PYTHON3_UNICODEDATA"),
    *("PACKAGE_PYTHON_CRYPTOGRAPHY", "PACKAGE_PYTHON_PYOPENSSL", "PACKAGE_PYTHON_URLLIB3"),
    *("PACKAGE_OPENSSL_FORCE_LIBOPENSSL", "PACKAGE_LIBOPENSSL_BIN", "PACKAGE_OPENSC"),
    *("PACKAGE_TPM2_OPENSSL", "PACKAGE_TPM2_TOOLS"),
)
USUAL = "USE_WCHAR USE_MMU TOOLCHAIN_HAS_THREADS PACKAGE_HOST_RUSTC_ARCH_SUPPORTS "
RUST = "PACKAGE_HOST_RUSTC_TARGET_ARCH_SUPPORTS "
TIER2 = "PACKAGE_HOST_RUSTC_TARGET_TIER2_HOST_TOOLS_PLATFORMS "


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (USUAL + RUST + "TOOLCHAIN_USES_GLIBC", []),
        (USUAL + TIER2 + "TOOLCHAIN_USES_MUSL", ["C++ in a toolchain w/ musl"]),
        (USUAL + TIER2 + RUST + "TOOLCHAIN_USES_MUSL INSTALL_LIBSTDCPP", []),
        (USUAL + "RISCV_64 TOOLCHAIN_USES_GLIBC", ["RISC-V extensions M, A, F, D, C"]),
        (USUAL + TIER2 + RUST + "RISCV_64 TOOLCHAIN_USES_GLIBC", []),
        (USUAL + "TOOLCHAIN_USES_GLIBC", ["Rust for this architecture and C library"]),
        (USUAL + "TOOLCHAIN_USES_UCLIBC", ["Rust for this architecture and C library"]),
        (USUAL.replace("USE_WCHAR ", "") + RUST + "TOOLCHAIN_USES_GLIBC", ["wchar, threads, dynamic library"]),
    ],
)
def test_where_the_option_cannot_be_had_the_menu_says_why(tmp_path: Path, machine: str, words: list[str]) -> None:
    tree = ROOT / "buildroot/package"
    lines = [f"config BR2_{name}\n\tbool\n\tdefault {'y' if name in machine.split() else 'n'}\n" for name in KNOWN]
    sources = [f'source "{tree}/{name}/Config.in"\n' for name in ("caramel-embedded", "python-fasteners")]
    (tmp_path / "Config.in").write_text("".join(lines + sources))
    menu = kconfiglib.Kconfig(str(tmp_path / "Config.in"), warn_to_stderr=False)
    assert menu.warnings == []
    said = [node.prompt[0] for node in menu.comments if kconfiglib.expr_value(node.prompt[1])]
    assert len(said) == len(words), said
    assert all(word in text for word, text in zip(words, said))
    assert bool(menu.syms["BR2_PACKAGE_CARAMEL_EMBEDDED"].visibility) == (not words)


def test_fasteners_is_a_package_of_the_tree() -> None:
    folder = ROOT / "buildroot/package/python-fasteners"
    rules = (folder / "python-fasteners.mk").read_text()
    (release,) = re.findall(r"^PYTHON_FASTENERS_VERSION = (\S+)$", rules, re.MULTILINE)
    hashes = (folder / "python-fasteners.hash").read_text()
    assert re.search(rf"^sha256  [0-9a-f]{{64}}  fasteners-{re.escape(release)}\.tar\.gz$", hashes, re.MULTILINE)
    for name in re.findall(r"^PYTHON_FASTENERS_LICENSE_FILES = (.*)$", rules, re.MULTILINE)[0].split():
        assert re.search(rf"^sha256  [0-9a-f]{{64}}  {name}$", hashes, re.MULTILINE)
    assert f"fasteners=={release}" in (ROOT / "packaging/zipapp.txt").read_text().splitlines()


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
    def build(self, folder: Path, target: str, more: str = "", **options: str) -> subprocess.CompletedProcess[str]:
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
        lines = more + "".join(f"BR2_PACKAGE_CARAMEL_EMBEDDED_{name} = {value}\n" for name, value in options.items())
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
            INTERFACES='""', KEY_FILE='"/data/it\'s id.pem"', SETTINGS=f'"{more}"', KEYS_TPM="y",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        text = (tmp_path / "build/buildroot.conf").read_text()
        assert settings.parse(text, "buildroot.conf") == {
            "CARAMEL_CA": "ca.example.com:8443",
            "CARAMEL_CA_CERT": str(authority.certificate_file),
            "CARAMEL_KEY_FILE": "/data/it's id.pem",
            "CARAMEL_HOOK": "/etc/init.d/S50x restart",
            "CARAMEL_KEY_COMMAND": f"/{LIBEXEC}/tpm-key",
            "CARAMEL_OPENSSL_CONF": "/usr/share/caramel-embedded/openssl-tpm.cnf",
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
            (
                "KEYS_TPM",
                {f"{LIBEXEC}/tpm-key", f"{LIBEXEC}/tpm-parent", "usr/share/caramel-embedded/openssl-tpm.cnf"},
            ),
            ("KEYS_PKCS11", {f"{LIBEXEC}/pkcs11-key", "usr/share/caramel-embedded/openssl-pkcs11.cnf"}),
        ],
    )
    def test_what_was_chosen_is_installed(self, tmp_path: Path, start: str, files: set[str]) -> None:
        done = self.build(tmp_path, "installed", **{"SERVER": '"a.example"', "CA_CERT": '"/x"', start: "y"})
        assert done.returncode == 0, done.stderr
        found = {str(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*")}
        assert files <= found
        assert bool(files) == bool(found)

    @pytest.mark.parametrize(("sh", "more"), [("BASH", " -p"), ("DASH", " -p"), ("BUSYBOX", "")])
    def test_the_scripts_are_for_the_shell_of_the_image(self, tmp_path: Path, sh: str, more: str) -> None:
        starter = tmp_path / "target/usr/bin/caramel-embedded"  # which Buildroot has installed of the wheel
        starter.parent.mkdir(parents=True)
        shutil.copy(ROOT / "packaging/starter/caramel-embedded", starter)
        options = {"SERVER": '"a.example"', "CA_CERT": '"/x"', "START_INIT_SCRIPT": "y"}
        done = self.build(tmp_path, "installed", more=f"BR2_SYSTEM_BIN_SH_{sh} = y\n", **options)
        assert done.returncode == 0, done.stderr
        for name in ("usr/bin/caramel-embedded", "etc/init.d/S95caramel-embedded", f"{LIBEXEC}/until-enrolled"):
            assert (tmp_path / "target" / name).read_text().splitlines()[0] == f"#!/bin/sh{more}", name


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


def test_the_recipe_of_yocto_depends_on_what_the_program_stands_on() -> None:
    (recipe,) = RECIPES
    depends = recipe.read_text().partition("RDEPENDS:${PN} += ")[2].split()
    for name in ("cryptography", "fasteners", "pyopenssl", "urllib3"):
        assert f"python3-{name}" in depends
    layer = (recipe.parents[2] / "conf/layer.conf").read_text()
    assert 'LAYERDEPENDS_caramel-embedded = "core meta-python"' in layer  # which has fasteners


def test_the_layer_names_the_long_term_releases() -> None:
    text = (ROOT / "packaging/yocto/meta-caramel-embedded/conf/layer.conf").read_text()
    assert 'LAYERSERIES_COMPAT_caramel-embedded = "scarthgap wrynose"' in text
