"""The life of a device, told run by run against a real Caramel server: what `make demo` prints.

It starts Caramel's own programs and a TLS front on a free port of the loopback interface, runs the
installed command as a device would, and checks each outcome: if the story doesn't go as told, the exit
status is 1. Everything that it makes is in a temporary folder, and gone afterwards. With --stay it starts
the servers only, and leaves the runs to you.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import world
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from world import Authority, Caramel, Device, Run, Snapshot, TlsFront

MEANING = {
    0: "the key file holds a certificate that the server vouches for now",
    1: "another process is at work on the key file; nothing was touched",
    69: "the server has the request, and nobody has signed it yet",
    127: "it didn't work out; nothing was lost",
}

#: A quarter of an hour or an hour passes between two runs of a real device. Seconds that the demo takes for
#: it.
MEANWHILE = 1.1


class StoryBroken(Exception):
    """A run didn't end as the story says."""


# --- Telling --------------------------------------------------------------------------------------------


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def say(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), 100), flush=True)


def heading(text: str) -> None:
    print(f"\n{_bold(text)}\n", flush=True)


def quote(text: str, mark: str) -> None:
    for line in text.rstrip().splitlines():
        print(f"    {mark} {line}", flush=True)


def common_name(name: x509.Name) -> str:
    return str(name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)


# --- The device and its administrator -------------------------------------------------------------------


class Told:
    """A device whose every run is told: the command, what it printed, how it ended, and what is in the key
    file now.
    """

    def __init__(self, folder: Path, name: str, client_id: str, address: str, ca: Path) -> None:
        self.device = Device(folder / name)
        self.settings = folder / f"{name}.conf"
        self.settings.write_text(
            f"CARAMEL_CA={address}\n"
            f"CARAMEL_CA_CERT={ca}\n"
            f"CARAMEL_KEY_FILE={self.device.key_file}\n"
            f"CARAMEL_CN={client_id}\n"
        )
        self._before: Optional[Snapshot] = None
        self._blocks: dict[str, bytes] = {}

    def runs(self, happens: str, *expected: int) -> Run:
        """Tells what happens, then one run, which has to end with one of the expected statuses."""
        heading(happens)
        quote(f"caramel-embedded --config {self.settings}", "$")
        run = self.device.run("--config", str(self.settings), bare=True)
        quote(run.err, "|")
        print(f"    exit status {run.status}: {MEANING.get(run.status, 'none that is promised')}")
        self._tell_file()
        if run.status not in expected or run.out:
            raise StoryBroken(f"expected exit status {' or '.join(map(str, expected))} and no output")
        return run

    def _tell_file(self) -> None:
        after = self.device.snapshot()
        if after is None:
            print("    no key file")
            return
        # Of several certificates the first: it is the device's own, and its chain follows.
        blocks = dict(reversed(self.device.blocks()))
        blocks = {label: blocks[label] for label in dict.fromkeys(self.device.labels)}
        if after == self._before:
            what = "not written: the same bytes, inode and modification time as before"
        else:
            what = "rewritten" if self._before else "written for the first time"
        print(f"    {self.device.key_file.name}, mode {after.mode:04o}, {what}")
        for label in [*blocks, *(gone for gone in self._blocks if gone not in blocks)]:
            if label not in blocks:
                print(f"        {label:<24} gone")
                continue
            state = "the same" if blocks[label] == self._blocks.get(label) else "new"
            print(f"        {label:<24} {state:<9} {describe(label, blocks[label])}")
        self._before, self._blocks = after, blocks
        sys.stdout.flush()

    def has_changed(self, since: Optional[Snapshot]) -> bool:
        return self.device.snapshot() != since


def describe(label: str, block: bytes) -> str:
    """One line about a PEM block, without a secret in it."""
    if label == "CERTIFICATE":
        certificate = x509.load_pem_x509_certificate(block)
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        return f"for {common_name(certificate.subject)}, {start:%F %T} to {end:%F %T} UTC"
    if label.endswith("CERTIFICATE REQUEST"):
        usual = block.replace(b" NEW CERTIFICATE", b" CERTIFICATE")
        return f"for {common_name(x509.load_pem_x509_csr(usual).subject)}"
    key: Any = serialization.load_pem_private_key(block, None)
    kind = "RSA" if isinstance(key, rsa.RSAPrivateKey) else "elliptic curve"
    return f"{kind}, {key.key_size} bits; it never leaves the device"


class Administrator:
    """Who decides at the server, with Caramel's own tool."""

    def __init__(self, caramel: Caramel) -> None:
        self.caramel = caramel

    def does(self, *arguments: str) -> None:
        quote(shlex.join(["caramel_tool", str(self.caramel.ini), *arguments]), "#")
        quote(self.caramel.program("caramel_tool", str(self.caramel.ini), *arguments), "|")

    def looks(self) -> None:
        self.does("--list")

    def signs(self, client_id: str, *lifetime: str) -> None:
        self.does(*lifetime, f"--sign={self.caramel.requests(client_id)[-1].id}")

    def rejects(self, client_id: str) -> None:
        self.does(f"--reject={self.caramel.requests(client_id)[-1].id}")


# --- The story ------------------------------------------------------------------------------------------


@contextmanager
def servers(folder: Path) -> Iterator[tuple[Caramel, TlsFront]]:
    """A new CA, a Caramel server and TLS in front of it."""
    authority = Authority.by_caramel(folder / "ca")
    certificate, ca = authority.server(), authority.certificate_file
    with (
        Caramel(folder / "server", authority) as caramel,
        TlsFront(caramel, certificate, client_ca=ca) as front,
    ):
        yield caramel, front


def tell(folder: Path) -> None:
    say("""caramel-embedded gives a device its identity: a private key that is made on the device and stays
        there, and a certificate for it from your own certificate authority (CA). A Caramel server takes the
        requests, and a person, or a program, decides there who gets a certificate. The device just runs the
        command below at boot and now and then after that; each run is one short check. This is a device's
        life, on a real server.""")
    print()
    say("""Lines with $ are run on the device, lines with # by the server's administrator; what they print
        stands behind |.""")

    heading("A CA is made, and a Caramel server started, with TLS in front of it.")
    with servers(folder) as (caramel, front):
        ca = caramel.authority.certificate_file
        administrator = Administrator(caramel)
        quote(f"CA      {caramel.authority.certificate.subject.rfc4514_string()}", " ")
        quote(f"server  https://{front.address}", " ")
        _first_device(folder, caramel, front, administrator, ca)
        _device_with_uuid(folder, caramel, front, ca)


def _first_device(folder: Path, caramel: Caramel, front: TlsFront, administrator: Administrator, ca: Path) -> None:
    client_id = "fffbeec0ffee"
    told = Told(folder, "device", client_id, front.address, ca)
    device = told.device
    heading("This is all that a device has to know: it is in its firmware.")
    quote(f"cat {told.settings}", "$")
    quote(told.settings.read_text(), "|")

    told.runs("The device boots for the first time. It makes a key and a request, and sends the request.", 69)
    first = device.snapshot()
    told.runs("An hour later it asks again. Nobody has looked at the request yet.", 69)
    expect(not told.has_changed(first), "nothing is written while it waits")

    heading("The administrator looks at the requests, and signs this one.")
    administrator.looks()
    administrator.signs(client_id)
    told.runs("The device asks again, and has an identity. Programs on it can use the one file as it is.", 0)
    signed = device.snapshot()
    told.runs("From now on most runs find nothing new, and write nothing.", 0)
    expect(not told.has_changed(signed), "nothing is written when nothing is new")

    heading("Certificates are short-lived. The administrator signs the same request again, for 3 days.")
    time.sleep(MEANWHILE)
    administrator.signs(client_id, "--life-short=72")
    told.runs("The device gets the newer certificate. Key and request stay.", 0)
    renewed = device.snapshot()
    expect(told.has_changed(signed), "the newer certificate is in the file")

    with locked(device.key_file):
        told.runs("Another program holds the lock on the file: the run ends at once, and leaves it alone.", 1)
    front.stop()
    told.runs("The server can't be reached. Whatever goes wrong, the device keeps what it has.", 127)
    expect(not told.has_changed(renewed), "nothing is lost")
    front.start()

    key = device.block("PRIVATE KEY")
    heading("The device is stolen, or its key has leaked. The administrator rejects it.")
    administrator.rejects(client_id)
    told.runs("The device wipes its identity, and asks with a new key for another one.", 69)
    expect(device.block("PRIVATE KEY") != key and device.certificate is None, "the old identity is wiped")

    heading("It turns out that all is well. The administrator signs the new request.")
    administrator.looks()
    administrator.signs(client_id)
    told.runs("The device has an identity again.", 0)


def _device_with_uuid(folder: Path, caramel: Caramel, front: TlsFront, ca: Path) -> None:
    heading("Where a person need not decide, caramel_autosign signs whoever comes with a UUID as client ID.")
    quote(f"caramel_autosign {caramel.ini} &", "#")
    with caramel.autosign() as autosign:
        # Its first look at the database comes with its start, which takes a while.
        time.sleep(MEANWHILE)
        told = Told(folder, "phone", "0b6c1a52-94ef-4c6e-9d5b-6f2c8f0e7a31", front.address, ca)
        run = told.runs("A device starts from nothing. Caramel takes a moment to sign.", 69, 0)
        if run.status == 69:
            sha256 = told.device.request_hash()
            world.until("caramel_autosign signs", lambda: caramel.certificates(sha256) or not autosign.alive)
            run = told.runs("A moment later:", 0)


def expect(true: bool, what: str) -> None:
    if not true:
        raise StoryBroken(f"expected: {what}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """The lock that flock(1) takes."""
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- By hand --------------------------------------------------------------------------------------------


def stay(folder: Path) -> None:
    """Starts the servers, says what to type, and waits to be interrupted."""
    with servers(folder) as (caramel, front):
        told = Told(folder, "device", "fffbeec0ffee", front.address, caramel.authority.certificate_file)
        say("A Caramel server is up until you press Ctrl-C. In another terminal, run a device:")
        quote(f"{world.COMMAND} --config {told.settings} -v; echo $?", "$")
        say("See what it has:")
        quote(f"{world.COMMAND} --config {told.settings} --status", "$")
        say("Or make one file of the program, for this server (the file for the CA goes into it):")
        # As options of make, so that the line can be typed as it stands.
        quote(f"make zipapp SERVER={front.address} CA_CERT={caramel.authority.certificate_file}", "$")
        say("And be the administrator:")
        tool = f"{world.CARAMEL / 'caramel_tool'} {caramel.ini}"
        for action in ("--list", "--sign 1", "--reject 1"):
            quote(f"{tool} {action}", "#")
        while True:
            signal.pause()


def interrupted(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="The life of a device against a real Caramel server.")
    parser.add_argument("--stay", action="store_true", help="start the servers only, and say what to type")
    stays = parser.parse_args().stay
    # Whoever ends this program ends what it started, folder included.
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    with tempfile.TemporaryDirectory(prefix="caramel-demo-") as folder:
        try:
            (stay if stays else tell)(Path(folder))
        except StoryBroken as error:
            print(f"\nThe story doesn't go as told: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print()
            return 0 if stays else 130
    heading("That was it: all of it is taken down again.")
    say("To go on by hand, `make demo-server` starts the same servers and says what to type.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
