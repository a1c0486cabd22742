# SPDX-License-Identifier: MIT OR Apache-2.0
"""The README's calendar, walked with real devices and a clock that is moved: one CA follows another, or somebody
else's CA makes the next intermediate. The devices differ in what their firmware knows.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

import pytest
from authority_world import Front, RegistrationAuthority, at
from cryptography import x509
from needs import needs, slow
from world import Device

pytest_plugins = ["authority_fixtures"]
pytestmark = [needs("authority", "faketime", "openssl", "nginx"), slow]

EC = ("--key-type", "ec-p256")
#: Days that each of the two CAs lives, and the README's parts of that.
LIFE = 400
NEXT, SWITCH, FINISH = LIFE - LIFE / 10, LIFE - LIFE / 20, LIFE - LIFE / 100


class Fleet:
    """An authority and its devices, each with a file of the CAs that its firmware knows."""

    def __init__(self, folder: Path, authority: RegistrationAuthority) -> None:
        self.folder = folder
        self.authority = authority
        self.devices: dict[str, Device] = {}
        #: What the front showed and what /root.crt was when it was last looked at.
        self.shown: list[x509.Certificate] = []
        self.root = b""

    def knows(self, name: str, *roots: bytes) -> None:
        """The device's firmware has these CAs from now on; a device that wasn't there before is made."""
        file = self.folder / f"{name}.crt"
        file.write_bytes(b"".join(roots))
        if name not in self.devices:
            self.authority.command("allow", name)
            self.devices[name] = Device(self.folder / name, None, file, name)

    @contextlib.contextmanager
    def day(self, days: float) -> Iterator[None]:
        """The servers on that day, after the timer that looks at the front's certificate."""
        front = self.authority.folder / "front.pem"
        self.authority.command("server-certificate", "localhost", "--out", str(front), before=at(days))
        self.shown = certificates_in(front.read_bytes())
        with self.authority.serving(before=at(days), options=["--behind-proxy"]) as server:
            self.root = server.get("/root.crt").body
            with Front(self.authority.folder / f"front-{days}", front, server.port) as tls:
                for device in self.devices.values():
                    device.server = tls.address
                yield

    def check(self, days: float, *, lost: Sequence[str] = ()) -> None:
        """Each device asks on that day, and has a good certificate afterwards; those that are lost keep what they
        had.
        """
        with self.day(days):
            for name, device in self.devices.items():
                before = device.snapshot()
                run = device.run(*EC, before=at(days))
                assert (name, run.status) == (name, 127 if name in lost else 0), run.err
                assert name not in lost or device.snapshot() == before

    def issued_by(self, ca: bytes) -> set[str]:
        """The devices whose certificate this CA's key has signed."""
        (issuer,) = x509.load_pem_x509_certificates(ca)
        return {name for name, device in self.devices.items() if by(chain_of(device)[0], issuer)}

    def status(self, days: float) -> str:
        return self.authority.command("ca-status", before=at(days)).splitlines()[-1]


def certificates_in(pem: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(re.sub(rb"(?s)-----BEGIN PRIVATE.*?\n-----END.*?\n", b"", pem))


def by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether this CA's key signed it; two CAs that follow each other have one name."""
    with contextlib.suppress(Exception):
        certificate.verify_directly_issued_by(issuer)
        return True
    return False


def chain_of(device: Device) -> list[x509.Certificate]:
    """What the device has stored: its certificate, and what stands above it."""
    return [x509.load_pem_x509_certificate(pem) for label, pem in device.blocks() if label == "CERTIFICATE"]


def test_one_ca_follows_another(tmp_path: Path) -> None:
    """`steady` gets each firmware in time, `late` after the switch only, `new` leaves the production line with the
    next CA alone, and `forgotten` never gets another firmware.
    """
    authority = RegistrationAuthority(tmp_path / "authority")
    authority.create_ca("--days", str(LIFE))
    old = authority.ca.read_bytes()
    fleet = Fleet(tmp_path, authority)
    for name in ("steady", "late", "forgotten"):
        fleet.knows(name, old)
    fleet.check(0)
    keys = {name: device.block("PRIVATE KEY") for name, device in fleet.devices.items()}

    # A tenth of the life is left: both are handed out, and the old one signs.
    assert "LATE" not in fleet.status(NEXT - 2)
    assert "LATE: before" in fleet.status(NEXT + 1) and "ca-next, and" in fleet.status(NEXT + 1)
    with fleet.day(NEXT + 1):
        assert fleet.root == old
    authority.command("ca-next", "--days", str(LIFE), before=at(NEXT + 1))
    assert "LATE" not in fleet.status(NEXT + 2)
    fleet.check(NEXT + 2)
    both, new = fleet.root, fleet.root.removeprefix(old)
    assert both == old + new and new
    assert fleet.issued_by(old) == {"steady", "late", "forgotten"}
    fleet.knows("steady", both)
    fleet.check(NEXT + 8)

    # A twentieth: the next CA signs. Who knows the old one alone goes on by "new with old"; the front stays with the
    # old CA, and shows "old with new" to who knows the next one alone.
    assert "LATE: before" in fleet.status(SWITCH + 1) and "ca-next --switch" in fleet.status(SWITCH + 1)
    authority.command("ca-next", "--switch", before=at(SWITCH + 1))
    assert "LATE" not in fleet.status(SWITCH + 2)
    fleet.knows("new", new)
    fleet.check(SWITCH + 2)
    assert fleet.issued_by(new) == {"steady", "late", "forgotten", "new"} and not fleet.issued_by(old)
    assert {len(chain_of(device)) for device in fleet.devices.values()} == {2}
    first, cross = fleet.shown
    assert by(first, x509.load_pem_x509_certificate(old)) and by(cross, x509.load_pem_x509_certificate(new))
    assert fleet.root == both
    fleet.knows("late", both)
    fleet.check(SWITCH + 9)

    # A hundredth: the front follows. Who still knows the old one alone believes nobody any more, and loses nothing.
    assert "LATE: before" in fleet.status(FINISH + 1) and "ca-next --finish" in fleet.status(FINISH + 1)
    authority.command("ca-next", "--finish", before=at(FINISH + 1))
    fleet.check(FINISH + 1.5, lost=["forgotten"])
    assert fleet.root == new
    (front,) = fleet.shown
    assert by(front, x509.load_pem_x509_certificate(new))

    # After the old one's end.
    fleet.check(LIFE + 8, lost=["forgotten"])
    fleet.knows("forgotten", new)
    fleet.knows("steady", new)
    fleet.check(LIFE + 20)
    assert fleet.issued_by(new) == set(fleet.devices)
    assert {len(chain_of(device)) for device in fleet.devices.values()} == {1}
    assert keys == {name: fleet.devices[name].block("PRIVATE KEY") for name in keys}


def test_the_calendar_was_forgotten(tmp_path: Path) -> None:
    """Nobody said `--switch` in time, and nobody `--finish`: who knows the next CA goes on all the same."""
    authority = RegistrationAuthority(tmp_path / "authority")
    authority.create_ca("--days", str(LIFE))
    fleet = Fleet(tmp_path, authority)
    old = authority.ca.read_bytes()
    authority.command("ca-next", "--days", "900", before=at(NEXT))
    with fleet.day(LIFE - 3):
        assert by(fleet.shown[0], x509.load_pem_x509_certificate(old))
        fleet.knows("device", fleet.root)
    fleet.check(LIFE - 3)
    new = fleet.root.removeprefix(old)
    authority.command("ca-next", "--switch", before=at(LIFE + 1))
    fleet.check(LIFE + 1)
    assert fleet.issued_by(new) == {"device"}
    assert "LATE: before" in fleet.status(LIFE + 1) and "--finish" in fleet.status(LIFE + 1)
    # The front didn't wait for that.
    assert by(fleet.shown[0], x509.load_pem_x509_certificate(new))


def test_a_ca_that_has_ended(tmp_path: Path) -> None:
    """No next CA, and too late for one: what helps is said, and helps."""
    authority = RegistrationAuthority(tmp_path / "authority")
    authority.create_ca("--days", "10")
    fleet = Fleet(tmp_path, authority)
    fleet.knows("device", authority.ca.read_bytes())
    fleet.check(0)
    assert "ca-status says what helps" in authority.command(
        "server-certificate", "localhost", "--out", str(tmp_path / "front.pem"), status=1, before=at(11)
    )
    assert "LATE: before" in fleet.status(11) and "ca-renew" in fleet.status(11)
    assert "ca-renew comes first" in authority.command("ca-next", status=1, before=at(11))
    authority.command("ca-renew", "--days", "100", before=at(11))
    fleet.knows("device", authority.ca.read_bytes())
    fleet.check(11)
    authority.command("ca-next", "--days", "100", before=at(11.5))


@pytest.mark.parametrize("root", ["the same root", "another root"])
def test_an_intermediate_follows_another(tmp_path: Path, root: str) -> None:
    """Under somebody else's CA: the present intermediate signs until the next one is installed. Under another root
    it is the next CA, whose root the firmware has to have before the switch.
    """
    authority = RegistrationAuthority(tmp_path / "authority")
    present = installed(authority, tmp_path, "Above", 0, LIFE)
    fleet = Fleet(tmp_path, authority)
    fleet.knows("device", present)
    fleet.check(0)
    intermediate = authority.ca.read_bytes()
    assert "LATE: before" in fleet.status(NEXT + 1) and "ca-request and ca-install" in fleet.status(NEXT + 1)

    above = "Above" if root == "the same root" else "Other"
    following = installed(authority, tmp_path, above, NEXT + 2, 2 * LIFE, "--replace", check=fleet)
    if above == "Other":
        assert authority.ca.read_bytes() == intermediate
        fleet.check(NEXT + 3)
        assert fleet.root == present + following
        fleet.knows("device", fleet.root)
        fleet.check(SWITCH + 1)
        authority.command("ca-next", "--switch", before=at(SWITCH + 1))
        fleet.check(SWITCH + 2)
        authority.command("ca-next", "--finish", before=at(FINISH + 1))
    fleet.check(FINISH + 2)
    fleet.check(LIFE + 8)
    assert fleet.root == following
    assert by(chain_of(fleet.devices["device"])[0], certificates_in(authority.ca.read_bytes())[0])
    assert authority.ca.read_bytes() != intermediate


def installed(
    authority: RegistrationAuthority, folder: Path, above: str, days: float, life: int, *options: str,
    check: Optional[Fleet] = None,
) -> bytes:  # fmt: skip
    """Has somebody else's CA of this name make the intermediate on that day, for so many days; that CA's root."""
    request, root, key, chain = (folder / f"{above}.{kind}" for kind in ("csr", "root", "key", "chain"))
    asked = authority.command(
        "ca-request", "--subject", "C=SE,O=Example,CN=Example Intermediate", *options, before=at(days)
    )
    request.write_text(asked)
    if check:
        check.check(days + 0.5)  # the CA that is there goes on
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key]
    by = ["-CA", root, "-CAkey", key, "-days", life, "-copy_extensions", "copyall"]
    commands: list[list[object]] = [["x509", "-req", "-in", request, *by, "-out", chain]]
    if not root.exists():
        subject = f"/C=SE/O=Example/CN={above} Root"
        commands.insert(0, ["req", "-x509", *new, "-days", 3 * LIFE, "-subj", subject, "-out", root])
    for command in commands:
        subprocess.run([*at(days), "openssl", *map(str, command)], check=True, capture_output=True, timeout=30)
    chain.write_bytes(chain.read_bytes() + root.read_bytes())
    authority.command("ca-install", str(chain), before=at(days + 0.6 if check else days))
    return root.read_bytes()
