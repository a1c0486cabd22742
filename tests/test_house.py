"""How the house is built: who may import whom, and what a run may not load. Both are lists with reasons."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import world
from world import Authority, Device, Scripted, answers, hours, now

PACKAGE = world.ROOT / "caramel_embedded"
ID = "fffbeec0ffee"

#: From the door to the cellar: each room may go down, and none up. What looks up something in the room that sent for
#: it makes both of them one.
ROOMS = (
    *("__main__", "cli", "status", "dry_run", "device", "hook", "session"),
    *("server", "stored", "certificates", "held", "program", "enrollment", "hardware", "keyfile", "tls"),
    *("identity", "trust", "settings", "signals", "log", "pem", "errors"),
)


def imports(path: Path) -> set[str]:
    """The rooms that a file imports, wherever in it that stands; also what is there for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_no_room_sends_for_one_above_it() -> None:
    files = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert sorted(files) == sorted(ROOMS), "each room has its place"
    up = [
        (name, other) for name in ROOMS for other in imports(files[name]) if ROOMS.index(other) <= ROOMS.index(name)
    ]
    assert up == []
    assert imports(PACKAGE / "__init__.py") == {"errors", "identity", "session"}


def test_one_room_alone_speaks_to_cryptography() -> None:
    """Where a chip's block must not get to: its parsers are called in this one, and a private key's in two places."""
    names: dict[str, set[str]] = {}
    calls = []
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                named = [each.name for each in node.names]
                for module in [node.module or ""] if isinstance(node, ast.ImportFrom) else named:
                    if module.partition(".")[0] in ("cryptography", "OpenSSL"):
                        names.setdefault(path.stem, set()).add(module.partition(".")[0])
        for function in tree.body:
            if isinstance(function, ast.FunctionDef):
                calls += [
                    (path.stem, function.name)
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute) and re.fullmatch("load_.*private_key", node.attr)
                ]
    assert names == {"certificates": {"cryptography", "OpenSSL"}}
    assert sorted(calls) == [("certificates", "_loaded_key"), ("certificates", "_signable_key")]


# --- What may not be loaded ---

_ALWAYS = {
    "argparse": "options are rare on a device; 6 ms",
    "ctypes": "for a hook's time limit only",
}
_UNCHANGED = {
    **_ALWAYS,
    "OpenSSL": "what was judged once needs no X.509; 24 ms",
    "cryptography": "the same; half of a run's memory",
    "caramel_embedded.certificates": "it loads both",
    "caramel_embedded.held": "a key that a chip holds is OpenSSL's matter",
    "caramel_embedded.hook": "no hook is set",
    "caramel_embedded.status": "nobody asked",
    "caramel_embedded.dry_run": "the same",
    "encodings.idna": "the server's name goes out as bytes; 3 ms",
    "shlex": "no hook is set",
    "subprocess": "no hook is to be called; 4 ms",
    "urllib3.contrib.pyopenssl": "urllib3 itself says that it is no longer recommended",
    # From 3.13 on `pathlib` loads both, which fasteners imports.
    **({} if sys.version_info >= (3, 13) else {"pwd": "owners are numbers, or configured", "grp": "the same"}),
}
WORK = "device session server tls stored identity trust hardware enrollment pem"
_LOCKED_OUT = {
    **_UNCHANGED,
    "ssl": "nobody is asked; 10 ms",
    "socket": "the same",
    "_socket": "the same",
    "http": "the same",
    "email": "the same",
    "urllib3": "the same; 45 ms",
    "json": "nothing is said to a machine",
    "hashlib": "nothing is judged",
    **{"caramel_embedded." + room: "another run does its work" for room in WORK.split()},
}
#: What the library adds to a program that has only imported it.
_IMPORTED = {**_LOCKED_OUT, "fasteners": "there is no file", "logging": "there is no log", "signal": "not ours"}

#: Becomes the command, and leaves a list of what was loaded when it ends.
_WATCHED = (
    "import os, sys; before, end = set(sys.modules), os._exit\n"
    "def watched(status):\n"
    "    with open(sys.argv[1], 'w') as file: file.write(' '.join(set(sys.modules) - before))\n"
    "    end(status)\n"
    "os._exit = watched\n"
    "from caramel_embedded.__main__ import main; main(sys.argv[2:])\n"
)
_PYTHON = [str(Path(world.PLAIN).with_name("python3")), "-I", "-B", "-c"]


@pytest.fixture
def device(tmp_path: Path, authority: Authority) -> Device:
    command = [*_PYTHON, _WATCHED, str(tmp_path / "loaded")]
    device = Device(tmp_path / "device", "localhost:9", authority.certificate_file, ID, command=command)
    device.has(authority.identity(ID, not_before=now() - hours(1)))
    return device


def unwanted(loaded: str, unwanted: dict[str, str]) -> dict[str, str]:
    """What was loaded and may not be, with the reason."""
    modules = loaded.split()
    assert "caramel_embedded" in modules
    return {
        name: why
        for name, why in unwanted.items()
        if any(module == name or module.startswith(name + ".") for module in modules)
    }


@pytest.mark.parametrize("answer", [answers.NOT_MODIFIED, answers.PENDING])
def test_an_unchanged_run_loads_no_x509_and_starts_nothing(
    device: Device, authority: Authority, tmp_path: Path, answer: bytes
) -> None:
    if answer == answers.PENDING:
        device.has(authority.identity(ID, certified=False))
    config = tmp_path / "device.conf"
    with Scripted(authority.server(), [answer]) as server:
        config.write_text(f"CARAMEL_CA={server.address}\nCARAMEL_CA_CERT={device.ca}\nCARAMEL_CN={ID}\n")
        env = {"CARAMEL_CONFIG": str(config), "CARAMEL_KEY_FILE": str(device.key_file)}
        run = device.run(bare=True, env=env)
    assert run.status == (69 if answer == answers.PENDING else 0), run
    assert unwanted((tmp_path / "loaded").read_text(), _UNCHANGED) == {}


def test_a_run_that_is_locked_out_loads_next_to_nothing(device: Device, tmp_path: Path) -> None:
    env = {"CARAMEL_CA": "localhost:9", "CARAMEL_CA_CERT": str(device.ca), "CARAMEL_KEY_FILE": str(device.key_file)}
    run = device.run(bare=True, env=env, before=("flock", str(device.key_file)))
    assert (run.status, "another process holds the lock" in run.err) == (1, True), run
    assert unwanted((tmp_path / "loaded").read_text(), _LOCKED_OUT) == {}


def test_an_import_of_the_library_loads_next_to_nothing() -> None:
    code = "import sys; a = set(sys.modules); import caramel_embedded; print(*set(sys.modules) - a)"
    done = subprocess.run([*_PYTHON, code], capture_output=True, text=True, timeout=60, env=world.environment())
    assert unwanted(done.stdout, _IMPORTED) == {}
