#!/usr/bin/env python3
"""Makes the program one executable file: a zip archive behind a starter, with the firmware's settings inside.

The same bits come out for the same sources, settings and Python, on any day and in any folder: names are sorted,
times, modes and paths are fixed, and the only time in it is SOURCE_DATE_EPOCH, else that of the last git commit.

Inside are the program and the pure Python that it needs, urllib3 and fasteners; pyOpenSSL and cryptography, which are
compiled for a processor, are the device's.

In front of the archive lie the compiled modules, for the version of Python that makes it; any other version takes the
sources in the archive. Nothing is deflated: a firmware image is compressed as a whole, and inflating costs a device
time at every start.
"""

from __future__ import annotations

import argparse
import marshal
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bake import ROOT, Baked, BakeError, bake, environment

PACKAGE = "caramel_embedded"

#: Pure Python that goes in beside the program, and what of it no run of the program imports: other platforms, other
#: protocols, the bridges to other libraries.
LIBRARIES = ("urllib3", "fasteners")
LEFT_OUT = ("urllib3/contrib/", "urllib3/http2/connection.py", "fasteners/pywin32/")

#: The starter is the archive's head: execve(2) starts a shell, which hands the file to Python. Python would start a
#: zip archive by itself, but with a crash's status, and through runpy, which takes longer than the shell does. Behind
#: the shell's last line come the compiled modules, and behind these the zip archive, which is read from its end.
STARTER = ROOT / "packaging" / "starter" / "caramel-embedded"
#: Shells that know -p, with which Bash takes no options, no functions and no file to run from the environment.
SHELLS = ("", "bash", "dash")
WHERE = re.compile(r"^# --- where .*?^# --- end of where\n", re.MULTILINE | re.DOTALL)

#: Instead of the starter's own part on where Python and the program are. -S: what most runs need is in the standard
#: library and in here, so the device's own packages are looked for when the first of them is wanted, which saves the
#: others 2 ms of processor time.
FIND = r"""# caramel-embedded(8) @VERSION@ in one file: this shell script, compiled modules, a zip archive of sources.
case $0 in */*) file=$0 ;; *) file=$(command -v -- "$0") || file=$0 ;; esac
set -- "$file" "$@"
python=@PYTHON@
more=-S find='
    file = sys.argv.pop(1)
    if sys.implementation.cache_tag == "@TAG@":
        from marshal import loads
        with open(file, "rb", 0) as opened:
            opened.seek(@START@)
            members = loads(opened.read(@SIZE@))
        exec(loads(members.pop("finder")))
    else:
        import site
        site.main()
        sys.path.insert(0, file)'
"""

#: Finds the compiled modules; compiled itself, because compiling it at each start would take as long as all it saves.
#: (zipimport reads the directory of the archive with Python code, and unpacks each module twice.)
FINDER = """
class Compiled:
    device = ("OpenSSL", "cryptography")

    def find_spec(self, name, path=None, target=None):
        if name in self.device:
            self.device = ()
            import site

            site.main()  # as Python itself would have done it without -S
        for member, package in ((name, False), (name + ".__init__", True)):
            if member in members:
                spec = type(sys.__spec__)(name, self, is_package=package)
                spec.origin = "%s/%s.py" % (file, member.replace(".", "/"))
                spec.has_location = True
                return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        exec(loads(members.get(name) or members[name + ".__init__"]), module.__dict__)

    def get_data(self, path):
        try:
            return members[path[len(file) + 1 :]]
        except KeyError:
            raise FileNotFoundError(path) from None

    def find_distributions(self, context=None):
        from importlib.metadata import DistributionFinder, MetadataPathFinder

        named = {"name": context.name} if context else {}
        return MetadataPathFinder.find_distributions(DistributionFinder.Context(path=[file], **named))


sys.meta_path.insert(0, Compiled())
"""

#: For ``python3 -I caramel-embedded.pyz`` and for an image without a shell.
MAIN = "from caramel_embedded.__main__ import main\n\nmain()\n"


def source_time() -> Optional[int]:
    """A time that is the same whoever builds these sources, whenever and wherever; None where none is known."""
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return None  # bake() reads it, and says what is wrong with it
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        return int(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError):
        print(
            "caramel-embedded: neither SOURCE_DATE_EPOCH nor a git commit: the time of this build is now, and it will"
            " not come out the same another time",
            file=sys.stderr,
        )
        return None


#: Run for each module in an interpreter of its own: which references marshal writes depends on what strings the
#: interpreter has come across, folder names among them, and the order of a set on the hash seed.
COMPILER = "import marshal, sys; o = sys.stdout.buffer; " + (
    "o.write(marshal.dumps(compile(sys.stdin.buffer.read(), sys.argv[1], 'exec', dont_inherit=True)))"
)


def compiled(source: bytes, name: str) -> bytes:
    """The module's code, as marshal writes it."""
    surroundings = {key: value for key, value in os.environ.items() if key in ("LD_LIBRARY_PATH", "PATH")}
    done = subprocess.run(
        [sys.executable, "-B", "-S", "-s", "-c", COMPILER, name],
        input=source,
        stdout=subprocess.PIPE,
        env={**surroundings, "PYTHONHASHSEED": "0"},
        check=True,
    )
    return done.stdout


def version() -> str:
    for line in (ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__ = "):
            return line.split('"')[1]
    raise BakeError("there is no __version__ in the package")


def libraries(folder: Path) -> dict[str, bytes]:
    """The files of LIBRARIES in `folder`, as pip lays them: modules, what a package says of itself, its licence."""
    found = {}
    for library in LIBRARIES:
        abouts = list(folder.glob(f"{library}-*.dist-info"))
        if len(abouts) != 1 or not (folder / library / "__init__.py").exists():
            raise BakeError(
                f"PACKAGES={folder}: there is not one {library} in it, as pip install --target puts it there"
            )
        about = abouts[0]
        licences = [path for path in about.rglob("*") if re.match("LICEN[CS]E|COPYING|NOTICE|AUTHORS", path.name)]
        if not licences:
            raise BakeError(f"PACKAGES={folder}: {about.name} has no licence, without which it may not be handed on")
        for path in (*(folder / library).rglob("*.py"), about / "METADATA", *licences):
            name = path.relative_to(folder).as_posix()
            if not name.startswith(LEFT_OUT):
                found[name] = path.read_bytes()
    return found


def head(values: dict[str, str], sh: str) -> bytes:
    """The starter, with the archive's own way to Python and the program, for a device whose /bin/sh is `sh`."""
    find = FIND
    for name, value in values.items():
        find = find.replace(f"@{name}@", value)
    text, count = WHERE.subn(lambda _: find, STARTER.read_text(encoding="ascii"))
    if count != 1:
        raise BakeError(f"{STARTER}: the marks around where Python is are gone")
    if sh:
        text = text.replace("#!/bin/sh\n", "#!/bin/sh -p\n", 1)
    return text.encode()


def write(output: Path, python: str, sh: str, baked: Baked, packages: Path) -> None:
    data = {f"{PACKAGE}/baked.conf": baked.conf.encode()}
    for name, pem in (("baked.pem", baked.pem), ("baked-identity.pem", baked.identity_pem)):
        if pem is not None:
            data[f"{PACKAGE}/{name}"] = pem.encode()
    files = {f"{PACKAGE}/{path.name}": path.read_bytes() for path in (ROOT / PACKAGE).glob("*.py")}
    files.update(libraries(packages))
    code = {name: compiled(source, name) for name, source in sorted(files.items()) if name.endswith(".py")}
    modules = {name[:-3].replace("/", "."): content for name, content in code.items()}
    # Version 2 of the format: nothing in it depends on the interpreter that writes it.
    blob = marshal.dumps({**modules, **data, "finder": compiled(FINDER.encode(), "finder")}, 2)

    def start(at: int) -> bytes:
        tag = sys.implementation.cache_tag
        values = {"VERSION": version(), "PYTHON": python, "TAG": tag, "START": f"{at:5}", "SIZE": str(len(blob))}
        return head(values, sh)

    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(output.name + ".new")
    with open(draft, "wb") as file:
        file.write(start(len(start(0))) + blob)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, member in sorted({**files, **data, "__main__.py": MAIN.encode()}.items()):
                entry = zipfile.ZipInfo(name)  # 1980-01-01, the earliest that a zip file knows
                entry.create_system = 3  # Unix, whatever this is built on
                entry.external_attr = 0o100644 << 16
                archive.writestr(entry, member)
    draft.chmod(0o755)
    draft.replace(output)


def main() -> int:
    options = argparse.ArgumentParser(prog="pyz.py", description="Make the program one executable file.")
    options.add_argument("--output", type=Path, default=ROOT / "build" / "caramel-embedded.pyz")
    options.add_argument("--python", default="/usr/bin/python3", help="where Python is on the device")
    options.add_argument("--sh", default="", help="what /bin/sh is on the device: bash or dash")
    where = "folder with urllib3 and fasteners, as pip install --target makes it"
    options.add_argument("--packages", type=Path, required=True, help=where)
    options.add_argument("--server", help="the Caramel server, HOST or HOST:PORT")
    options.add_argument("--ca-cert", help="PEM file with the CA's certificate")
    options.add_argument("--conf", type=Path, help="file with more settings; $CARAMEL_BAKE unless given")
    options.add_argument("--bare", action="store_true", help="a server and a CA need not be named")
    given = options.parse_args()
    try:
        if not given.python.startswith("/") or not given.python.isprintable() or set(given.python) & set(" '\"\\$`"):
            raise BakeError(f"TARGET_PYTHON={given.python}: must be a path without spaces and quotes")
        if given.sh not in SHELLS:
            raise BakeError(f"TARGET_SH={given.sh}: must be bash or dash, or nothing where it is neither")
        extra = {"CARAMEL_CA": given.server, "CARAMEL_CA_CERT": given.ca_cert}
        baked = bake(
            given.conf or environment(),
            {name: value for name, value in extra.items() if value},
            {"CARAMEL_CA": "SERVER=", "CARAMEL_CA_CERT": "CA_CERT="},
            source_time(),
            require=() if given.bare else extra,
        )
        write(given.output, given.python, given.sh, baked, given.packages)
    except BakeError as error:
        print(f"caramel-embedded: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"caramel-embedded: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    for remark in baked.remarks:
        print(f"caramel-embedded: {remark}", file=sys.stderr)
    print(f"{given.output}: {given.output.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
