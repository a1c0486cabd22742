"""Where the programs are that the scenarios start: the command under test, Caramel's own, and Python interpreters."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
CARAMEL = BUILD / "caramel" / "bin"

#: The command under test: the one that `make` installed, unless the environment names another.
COMMAND = os.environ.get("CARAMEL_TESTS_COMMAND", str(BUILD / "venv" / "bin" / "caramel-embedded"))

#: The same in an environment that has nothing else in it. Coverage doesn't watch it: for what is counted,
#: timed, traced, starved, or run as a user who can't write into build/.
PLAIN = str(BUILD / "venv" / "bin" / "caramel-embedded")

#: The same without the starter that stays as its parent: for what is traced, or killed, as one process.
WITHOUT_STARTER = (
    str(Path(PLAIN).with_name("python3")),
    "-I",
    "-B",
    "-c",
    "from caramel_embedded.__main__ import main\nmain()",
)

#: The Python versions that the project promises, and the Debian that has each: where this machine has no such Python,
#: that Debian's is taken.
DEBIANS = {"3.9": "bullseye", "3.11": "bookworm", "3.13": "trixie", "3.14": "forky", "3.15": "sid"}
VERSIONS = tuple(DEBIANS)
#: No Debian has them, so they are tried where a machine has them.
OTHER_VERSIONS = ("3.10", "3.12")


def _version(python: str) -> Optional[str]:
    """The version of an interpreter, such as "3.11"; None where the file isn't one that runs."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode().strip() if done.returncode == 0 else None


@functools.cache
def interpreters() -> list[tuple[str, str]]:
    """The Python versions that the project knows and this machine has, from old to new: version and program."""
    installed: list[Path] = []
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=30).stdout
        installed = sorted(Path(root.decode().strip()).glob("versions/3.*/bin/python"))
    found = []
    for version in sorted({*VERSIONS, *OTHER_VERSIONS}, key=lambda version: int(version.partition(".")[2])):
        candidates = [
            f"python{version}",
            *(str(path) for path in installed if path.match(f"versions/{version}.*/bin/python")),
        ]
        fitting = next((program for program in candidates if _version(program) == version), None)
        if fitting:
            found.append((version, fitting))
    return found


#: What BusyBox is on small systems: the names of its applets, by the name of the system.
SYSTEMS = {
    system: names.split()
    for system, _, names in (
        line.partition(": ") for line in (ROOT / "tests/world/applets.txt").read_text().splitlines() if line[0] != "#"
    )
}


def small_system(system: str, folder: Path) -> Path:
    """Makes a folder that is all of a PATH: exactly the applets that this system has, as far as this machine's
    BusyBox knows them. flock(1), which Debian's leaves out, is util-linux's.
    """
    busybox = shutil.which("busybox") or ""
    known = subprocess.run([busybox, "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    folder.mkdir()
    for name in SYSTEMS[system]:
        if name in known:
            (folder / name).symlink_to(busybox)
        elif name == "flock":
            (folder / name).symlink_to(shutil.which(name) or "")
    return folder


def wheel() -> Path:
    """The package as `make` built it."""
    return max((BUILD / "wheel").glob("caramel_embedded-*.whl"), key=lambda path: path.stat().st_mtime)


def installation(
    name: str, python: str, *, system: bool = False, before: Sequence[str] = (), more: Sequence[str] = ()
) -> str:
    """The command, installed for an interpreter into an environment of its own; made once for each build of
    the package.

    With `system`, the libraries are those that the interpreter's system has, as on a device, and no others.
    `before` is what starts it elsewhere, see `in_tree`; `more` are requirements beside the package's own.
    """
    folder = BUILD / "matrix" / name
    stamp = folder / "wheel"
    state = hashlib.sha256(wheel().read_bytes() + repr((python, *before, *more)).encode()).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        # Tests run in several processes, and the second waits for what the first makes.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != state:
            shutil.rmtree(folder, ignore_errors=True)
            made = [python, "-m", "venv", *(["--system-site-packages"] if system else []), str(folder)]
            pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            for command in (made, [*pip, *(["--no-deps"] if system else []), str(wheel()), *more]):
                subprocess.run([*before, *command], check=True, timeout=300, stdin=subprocess.DEVNULL)
            stamp.write_text(state)
    return str(folder / "bin" / "caramel-embedded")


#: Makes a Debian's tree the root folder of one command. What the command shares with this machine: the network, the
#: tests' files, and this project's folder, by the same names.
_IN_TREE = """
set -eu
tree=$1 project=$2
shift 2
mount --rbind /dev "$tree/dev"
mount -t proc proc "$tree/proc"
for folder in "${TMPDIR:-/tmp}" "$project"; do
    mkdir -p "$tree$folder"
    mount --bind "$folder" "$tree$folder"
done
exec chroot "$tree" env --chdir="$PWD" "$@"
"""


def tree(name: str, suite: str, *more: str) -> Path:
    """The Debian `suite` in build/`name`, made once, which takes a minute; `more` as for tests/world/tree.sh.

    Needs root, mmdebstrap(1) and unshare(1).
    """
    line = [str(ROOT / "tests/world/tree.sh"), name, suite, *more]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, text=True)
    return Path(done.stdout.strip())


def debian(version: str) -> Path:
    """The Debian that has this version of Python."""
    # The newest one is not yet the one that is called python3 there.
    more = [f"python{version},python{version}-venv,ca-certificates"] if DEBIANS[version] == "sid" else []
    return tree(f"fresh/{DEBIANS[version]}", DEBIANS[version], *more)


def trixie() -> Path:
    """The Debian 13 that has what a device with a TPM or a token has, and what plays those; see world.mk."""
    subprocess.run(["make", "--silent", "build/trixie/installed"], cwd=ROOT, stdin=subprocess.DEVNULL, check=True)
    return BUILD / "trixie"


def in_tree(root: Path) -> list[str]:
    """What stands before a command, to make a Debian's tree its root folder."""
    return ["unshare", "--mount", "sh", "-c", _IN_TREE, "sh", str(root), str(ROOT)]


def debian_python() -> Optional[str]:
    """Debian's own interpreter, where this is a Debian that has the libraries a device would have."""
    python = "/usr/bin/python3"
    if not Path("/etc/debian_version").exists():
        return None
    done = subprocess.run([python, "-c", "import cryptography, ensurepip"], stderr=subprocess.DEVNULL, check=False)
    return python if done.returncode == 0 else None


if __name__ == "__main__":
    print(*(f"{version} {program}" for version, program in interpreters()), sep="\n", file=sys.stdout)
