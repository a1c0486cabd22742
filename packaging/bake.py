#!/usr/bin/env python3
"""The firmware's own layer of settings, checked while the firmware is built.

Takes a file of NAME=value lines (the format of /etc/caramel-embedded.conf) and makes from it the data files
that the program reads before anything else: ``baked.conf``, with the build's own time as clock floor,
``baked.pem``, the certificates of the CA, and ``baked-identity.pem``, those of the CA that signs the device, where
that is another one. Whatever is wrong in it fails the build with one line, because on the
device nobody would be there to read that line.

Every way into an image comes through here: setup.py's build step, ``make zipapp`` and ``make install``. It needs
nothing but Python's standard library and the settings module of the program itself, which is how the build and the
device can't differ in what they take for a good value.

    bake.py [--conf FILE] [--set NAME=VALUE]... [--term NAME=WORD]... [--require NAME]... FOLDER

FILE is that of the environment variable CARAMEL_BAKE unless it is given.
"""

from __future__ import annotations

import argparse
import os
import re
import ssl
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent

#: Kernel's IFNAMSIZ less the final NUL, and its dev_valid_name(): what can't be a network interface's name.
INTERFACE = re.compile(r"(?!\.\.?$)[^/:\s]{1,15}")

#: RFC 7468, section 5.1. What stands around the blocks (text dumps, bag attributes) is no part of them.
CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s[A-Za-z0-9+/=\s]+?-----END CERTIFICATE-----")

#: Settings that name a file here and not on the device: its certificates go into the program, its name does not.
CA_FILES = ("CARAMEL_CA_CERT", "CARAMEL_IDENTITY_CA")

#: ``#: CARAMEL_CA = WORD`` in the file: what the tool that wrote the file calls that setting.
TERM = re.compile(r"^#:\s*([A-Z_]+)\s*=\s*(\S.*?)\s*$", re.MULTILINE)


class BakeError(Exception):
    """What the person who builds the image has to put right; one line."""


class Baked(NamedTuple):
    """What is put beside the program's modules."""

    conf: str
    pem: Optional[str]
    identity_pem: Optional[str]
    remarks: tuple[str, ...]

    def write(self, package: Path) -> list[Path]:
        """Put the files into the package's folder, and take away what an earlier build left there."""
        package.mkdir(parents=True, exist_ok=True)
        written = [package / "baked.conf"]
        written[0].write_text(self.conf, encoding="utf-8")
        for name, content in (("baked.pem", self.pem), ("baked-identity.pem", self.identity_pem)):
            path = package / name
            if content is not None:
                path.write_text(content, encoding="ascii")
                written.append(path)
            elif path.exists():
                path.unlink()
        for path in written:
            # The same bits whatever the builder's umask; nothing in them is secret.
            path.chmod(0o644)
        return written


def build_time() -> int:
    """The time of this build in seconds since 1970: SOURCE_DATE_EPOCH where it is set, else now.

    https://reproducible-builds.org/specs/source-date-epoch/
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if not epoch:
        return int(time.time())
    if not re.fullmatch("[0-9]{1,11}", epoch):
        raise BakeError(f"SOURCE_DATE_EPOCH={epoch}: must be whole seconds since 1970, such as 1700000000")
    return int(epoch)


def bake(
    conf: Optional[Path] = None,
    extra: Optional[dict[str, str]] = None,
    terms: Optional[dict[str, str]] = None,
    when: Optional[int] = None,
    require: Iterable[str] = (),
) -> Baked:
    """Check the settings of ``conf``, those of ``extra`` in front of them, and turn them into the files.

    ``terms`` names settings as the person at the build knows them: "SERVER=" of make, an option of Buildroot.
    A path in ``conf`` is relative to its folder. An empty value is none. ``require`` names what may not be missing.
    """
    when = build_time() if when is None else when
    terms = dict(terms or {})
    try:
        settings, errors = _program()
        values: dict[str, str] = {}
        remarks: list[str] = []
        if conf is not None:
            text = _read(conf)
            terms = {**dict(TERM.findall(text)), **terms}
            values.update(settings.parse(text, str(conf)))
        values.update(extra or {})
        values = {name: value for name, value in values.items() if value}
        source = str(conf) if conf is not None else "the settings"
        for name in require:
            if name not in values:
                raise BakeError(f"{name} is not set")
        if "BUILD_TIME" in values:
            raise BakeError(f"{source}: BUILD_TIME is set by the build; set SOURCE_DATE_EPOCH instead")
        named = {name: values.pop(name) for name in CA_FILES if name in values}
        try:
            settings.check(values, source)
        except errors.UsageError as error:
            raise BakeError(str(error)) from error
        _interfaces(values.get("CARAMEL_INTERFACES"), source)
        for name in ("CARAMEL_KEY_FILE", "CARAMEL_CONFIG"):
            if not values.get(name, "/").startswith("/"):
                # It would depend on the folder that the device happens to start the program in.
                raise BakeError(f"{source}: {name}: {values[name]!r} must begin with a slash")
        pems: dict[str, str] = {}
        for name, value in named.items():
            path = Path(value)
            if not (extra and name in extra) and conf is not None:
                path = conf.resolve().parent / path
            pems[name] = _certificates(name, path, when, remarks)
        baked = _conf(values, when)
        if settings.parse(baked, "baked.conf") != {**values, "BUILD_TIME": str(when)}:
            raise BakeError(f"{source}: a value can't be written as a NAME=value line")
    except errors.UsageError as error:
        raise BakeError(_in_terms(str(error), terms)) from error
    except BakeError as error:
        raise BakeError(_in_terms(str(error), terms)) from error
    told = tuple(_in_terms(remark, terms) for remark in remarks)
    return Baked(baked, pems.get("CARAMEL_CA_CERT"), pems.get("CARAMEL_IDENTITY_CA"), told)


def _program() -> tuple[Any, Any]:
    """The settings module of the tree that is built, never that of an older release on the build host."""
    sys.path.insert(0, str(ROOT))
    try:
        from caramel_embedded import errors, settings
    finally:
        sys.path.remove(str(ROOT))
    return settings, errors


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BakeError(f"{path}: not UTF-8: {error}") from error
    except OSError as error:
        raise BakeError(f"{path}: {error.strerror}") from error


def _interfaces(value: Optional[str], source: str) -> None:
    """No device can have these, whatever its hardware. Which ones it has, the build can't know."""
    for name in (value or "").split(",") if value is not None else ():
        name = name.strip()
        if not INTERFACE.fullmatch(name):
            raise BakeError(f"{source}: CARAMEL_INTERFACES: {name!r} can't be the name of a network interface")
        if name == "lo":
            raise BakeError(f"{source}: CARAMEL_INTERFACES: 'lo' has no MAC address")


def _certificates(name: str, path: Path, when: int, remarks: list[str]) -> str:
    """The CA certificates of a PEM file, in the file's order, written the one way that OpenSSL writes them."""
    source = f"{name}: {path}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BakeError(f"{source}: {error.strerror}") from error
    text = content.decode("latin-1")
    if "PRIVATE KEY-----" in text:
        # Whoever has the firmware would have the CA.
        raise BakeError(f"{source}: holds a private key, which must not get into a firmware image")
    blocks = CERTIFICATE.findall(text)
    if not blocks:
        hint = ""
        if content[:1] == b"\x30":
            hint = " (it looks like DER; openssl x509 -inform DER converts it)"
        elif "-----BEGIN CERTIFICATE REQUEST" in text:
            hint = " (it is a certificate request)"
        raise BakeError(f"{source}: holds no PEM certificate{hint}")
    pems = []
    for number, block in enumerate(blocks, 1):
        which = source if len(blocks) == 1 else f"{source}: certificate {number}"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            # Python looks for the label at the start of a line that ends in a plain line feed.
            context.load_verify_locations(cadata="\n".join(block.split("\r\n")) + "\n")
        except (ssl.SSLError, ValueError) as error:
            raise BakeError(f"{which}: damaged: {error}") from error
        # Of what was loaded, only what may sign certificates is listed.
        found = context.get_ca_certs(binary_form=True)
        if not found:
            raise BakeError(f"{which}: not a CA's certificate; the file must hold the certificate that signs")
        ends = str(context.get_ca_certs()[0]["notAfter"])
        if ssl.cert_time_to_seconds(ends) <= when:
            raise BakeError(f"{which}: ended at {ends}, before this build")
        pem = ssl.DER_cert_to_PEM_cert(found[0])
        if pem not in pems:
            pems.append(pem)
    if "\r\n" in text:
        remarks.append(f"{source}: has Windows line ends; converted")
    return "".join(pems)


def _conf(values: dict[str, str], when: int) -> str:
    lines = ["# Made when the firmware was built; the program's lowest layer of settings."]
    for name in sorted(values):
        value = values[name]
        if not re.fullmatch(r"[A-Za-z0-9_./:@%+,=-]*", value):
            value = f'"{value}"' if '"' not in value else f"'{value}'"
        lines.append(f"{name}={value}")
    lines.append(f"BUILD_TIME={when}")
    return "\n".join(lines) + "\n"


def _in_terms(message: str, terms: dict[str, str]) -> str:
    """Say after a setting's name what it is called where the person at the build has set it."""
    for name, word in terms.items():
        found = re.search(rf"\b{name}\b(?!=)", message)
        if found:
            message = f"{message[: found.end()]} ({word}){message[found.end() :]}"
    return message


def main(arguments: Optional[list[str]] = None) -> int:
    options = argparse.ArgumentParser(prog="bake.py", description="Put settings into the program.")
    options.add_argument("--conf", type=Path, help="file of NAME=value lines; $CARAMEL_BAKE unless given")
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting more")
    options.add_argument("--term", action="append", default=[], metavar="NAME=WORD", help="for messages")
    options.add_argument("folder", type=Path, help="the installed package")
    options.add_argument("--require", action="append", default=[], metavar="NAME", help="must have a value")
    given = options.parse_args(arguments)
    try:
        conf = given.conf or environment()
        baked = bake(conf, pairs(given.set), pairs(given.term), require=given.require)
    except BakeError as error:
        print(f"caramel-embedded: {error}", file=sys.stderr)
        return 1
    for remark in baked.remarks:
        print(f"caramel-embedded: {remark}", file=sys.stderr)
    baked.write(given.folder)
    return 0


def environment() -> Optional[Path]:
    """The file that CARAMEL_BAKE names."""
    conf = os.environ.get("CARAMEL_BAKE")
    return Path(conf) if conf else None


def pairs(arguments: list[str]) -> dict[str, str]:
    return dict((name, value) for name, _, value in (argument.partition("=") for argument in arguments))


if __name__ == "__main__":
    sys.exit(main())
