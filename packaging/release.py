#!/usr/bin/env python3
"""Makes what is handed out of a version: `make release`, into build/release/.

Everything is made of the last commit, whatever lies around in the checkout, with the tools and libraries that
packaging/release.txt names. So the same commit gives the same bits, in any folder, on any day; docs/releases.md says
how somebody else sees that. The SBOMs are made by cyclonedx-py, of an environment with what a product needs.
"""

from __future__ import annotations

import argparse
import email
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Union

ROOT = Path(__file__).resolve().parents[1]


class ReleaseError(Exception):
    """What is to be said to whoever makes the release."""


class Release:
    """One making, with its files in a folder of its own."""

    def __init__(self, build: Path) -> None:
        self.out, self.work = build / "release", build / "release-work"
        self.tree = self.work / "source"
        for folder in (self.out, self.work):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], stdout=subprocess.PIPE, check=True)
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as source:
            source.extractall(self.tree)
        time = subprocess.run(
            ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"], stdout=subprocess.PIPE, check=True
        )
        self.time = int(time.stdout)
        self.env = {
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
            "PIP_CONSTRAINT": "packaging/release.txt",  # a list, for pip: the path of the tree may have spaces
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "SOURCE_DATE_EPOCH": str(self.time),
        }

    def run(self, *command: Union[str, Path], without: Sequence[str] = ()) -> None:
        """A tool, whose words are shown if it fails; without these variables in its environment."""
        words = [str(word) for word in command]
        env = {name: value for name, value in self.env.items() if name not in without}
        done = subprocess.run(
            words, cwd=self.tree, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise ReleaseError(f"{done.stdout[-3000:]}\nmake release: {' '.join(words)} has failed")

    def python_packages(self, folder: str) -> Path:
        """Source distribution and wheel of what stands in this folder; returns the wheel."""
        source, made = self.tree / folder, self.work / "made" / folder
        if folder:
            for licence in self.tree.glob("LICENSE-*"):
                shutil.copy(licence, source)
        self.run(sys.executable, "-m", "build", "--outdir", made, source)
        (archive,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
        self._write_again(archive, self.out / archive.name)
        shutil.copy(wheel, self.out)
        return wheel

    def _write_again(self, archive: Path, to: Path) -> None:
        """setuptools writes owners, modes and times of the machine into an archive. The same without them."""
        with tarfile.open(archive) as old, open(to, "wb") as file:
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=self.time)
            with packed, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
                for member in sorted(old.getmembers(), key=lambda member: member.name):
                    member.uid = member.gid = 0
                    member.uname = member.gname = ""
                    member.mtime, member.pax_headers = self.time, {}
                    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
                    new.addfile(member, old.extractfile(member) if member.isfile() else None)

    def bill_of_materials(self, wheel: Path, only: Sequence[str] = (), suffix: str = "") -> None:
        """What else is installed with this wheel, in which release, under which licence; or only that much of it."""
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            about = email.message_from_bytes(archive.read(name))
        needs = only or [line for line in about.get_all("Requires-Dist", []) if "extra ==" not in line]
        place = self.work / f"{about['Name']}{suffix}"
        self.run(sys.executable, "-m", "venv", "--without-pip", place)
        pip = [sys.executable, "-m", "pip", "--python", str(place / "bin/python")]
        self.run(*pip, "install", "--quiet", *needs, without=["PIP_CONSTRAINT"] if only else [])
        # Not the wheel itself: where it lay on this machine would be in there.
        values = {"name": about["Name"], "version": about["Version"], "description": about["Summary"]}
        lines = [f"{key} = {json.dumps(value)}" for key, value in {**values, "dependencies": needs}.items()]
        (place / "pyproject.toml").write_text("\n".join(["[project]", 'license = "MIT OR Apache-2.0"', *lines, ""]))
        to = self.out / f"{about['Name']}-{about['Version']}{suffix}.cdx.json"
        command = [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"]
        self.run(*command, "--pyproject", place / "pyproject.toml", "-o", to, place / "bin/python")

    def checksums(self) -> None:
        """For `sha256sum --check SHA256SUMS`."""
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(self.out.iterdir())}
        (self.out / "SHA256SUMS").write_text("".join(f"{number}  {name}\n" for name, number in sums.items()))


def make(build: Path) -> Path:
    """All of it; returns the folder."""
    release = Release(build)
    program = release.python_packages("")
    version = program.name.split("-")[1]
    for wheel in (program, release.python_packages("server"), release.python_packages("authority")):
        release.bill_of_materials(wheel)
    libraries = (release.tree / "packaging/zipapp.txt").read_text().splitlines()
    release.bill_of_materials(program, [line for line in libraries if not line.startswith("#")], ".pyz")
    # As they come out of these commands by themselves: a Debian package has its changelog's time, and the one-file
    # program libraries from a list of its own.
    built, python = release.work / "build", f"PYTHON={sys.executable}"
    own = ["SOURCE_DATE_EPOCH", "PIP_CONSTRAINT"]
    release.run("make", "-s", f"BUILD={built}", "deb", without=own)
    release.run("make", "-s", f"BUILD={built}", python, "server-package", without=own)
    for package in (*built.glob("*.deb"), *built.glob("server/*.deb")):
        shutil.copy(package, release.out)
    one = release.out / f"caramel-embedded-{version}.pyz"
    release.run("make", "-s", f"BUILD={built}", python, "zipapp", "BARE=yes", f"OUT={one}", without=own[1:])
    release.checksums()
    return release.out


def main() -> int:
    options = argparse.ArgumentParser(prog="release.py", description="Make what is handed out of a version.")
    options.add_argument("--build", type=Path, default=ROOT / "build")
    os.umask(0o022)
    try:
        out = make(options.parse_args().build.resolve())
    except (OSError, subprocess.CalledProcessError, ReleaseError) as error:
        print(error, file=sys.stderr)
        return 1
    print((out / "SHA256SUMS").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
