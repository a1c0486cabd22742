"""An identity is held on to while the machine still has any of the IDs that it had when it enrolled.

The real program in a mount namespace of its own whose /sys says what the test wants.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
import world
from needs import needs, slow
from torture import hardware, judged, report
from torture.fleet import Fleet
from world import Answer, Authority, Device, Run, Scripted, answers

ETH0, ETH1, WLAN0 = "0050c2a1b2c3", "0050c2d4e5f6", "0050c2778899"
KEY = world.new_key()

pytestmark = needs("mounts")


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="hardware.pem")


def fingerprint(one: str) -> str:
    return hashlib.sha256(one.encode()).hexdigest()[:8]


class Machine:
    """A device, and the hardware that it has at the moment: addresses by interface, a serial number."""

    def __init__(self, device: Device, pem: Path, tmp_path: Path) -> None:
        self.device = device
        self.device.client_id = None
        self.pem = pem
        self.sys = tmp_path / "sys"
        self.addresses: dict[str, str] = {"lan0": ETH0}
        self.serial: Optional[str] = None
        self.board: Optional[str] = None
        self.readable = True
        #: Interfaces on a USB port, and what the port says of itself.
        self.removable: dict[str, str] = {}

    def run(self, *says: Answer, options: Sequence[str] = ()) -> Run:
        shutil.rmtree(self.sys, ignore_errors=True)
        self.sys.mkdir()
        for name, address in self.addresses.items():
            folder = self.sys / "class" / "net" / name
            folder.mkdir(parents=True)
            if name in self.removable:
                port = self.sys / "devices" / "usb1" / f"1-{name}"
                (port / "1-1:1.0").mkdir(parents=True)
                (port / "removable").write_text(self.removable[name] + "\n")
                (folder / "device").symlink_to(f"../../../devices/usb1/1-{name}/1-1:1.0")
            else:
                (folder / "device").mkdir()
            (folder / "type").write_text("1\n")
            (folder / "addr_assign_type").write_text("0\n")
            (folder / "address").write_text(":".join(address[i : i + 2] for i in range(0, 12, 2)) + "\n")
        for file, number in (("product_serial", self.serial), ("board_serial", self.board)):
            if number:
                folder = self.sys / "class" / "dmi" / "id"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(number + "\n")
                (folder / file).chmod(0o444 if self.readable else 0)
        # Root without the right to read what its mode forbids: what any other user is.
        script = f'mount --rbind "{self.sys}" /sys && exec setpriv --bounding-set -dac_override,-dac_read_search "$@"'
        with Scripted(self.pem, says or [answers.PENDING]) as server:
            self.device.server = server.address
            self.asked = server.requests
            return self.device.run(*options, before=("unshare", "-m", "sh", "-c", script, "sh"))

    def enroll(self, options: Sequence[str] = ()) -> None:
        run = self.run(answers.UNKNOWN, answers.PENDING, answers.PENDING, options=options)
        assert run.status == 69, run.err

    @property
    def line(self) -> dict[str, str]:
        fields = self.device.key_file.read_text().splitlines()[0].split()
        assert fields[:2] == ["#", "caramel-embedded/1"]
        return dict(word.split("=", 1) for word in fields[2:])

    def keeps(self, client_id: str, options: Sequence[str] = ()) -> None:
        before = self.device.request
        run = self.run(options=options)
        assert (run.status, f": {client_id}: " in run.err) == (69, True), run.err
        assert self.device.request == before

    def starts_over(self, client_id: str) -> None:
        before = self.device.request
        run = self.run(answers.UNKNOWN, answers.PENDING, answers.PENDING)
        assert (run.status, "starting over" in run.err, self.line["id"]) == (69, True, client_id), run.err
        assert self.device.request != before


@pytest.fixture
def machine(tmp_path: Path, authority: Authority, pem: Path) -> Machine:
    return Machine(Device(tmp_path / "device", None, authority.certificate_file), pem, tmp_path)


def test_the_file_remembers_all_ids_by_their_hashes(machine: Machine) -> None:
    machine.addresses = {"lan0": ETH0, "wifi0": WLAN0}
    machine.serial = "SN-4711"
    machine.enroll()
    hashes = [fingerprint(one) for one in ("SN-4711", ETH0, WLAN0)]
    assert (machine.line["id"], machine.line["hw"].split(",")) == ("SN-4711", hashes)
    assert machine.line["kinds"] == "pmm", "a product's serial number, and two addresses"


def test_a_usb_adapter_that_comes_first_costs_no_identity(machine: Machine) -> None:
    machine.addresses = {"lan1": ETH1}
    machine.enroll()
    machine.addresses = {"lan0": ETH0, "lan1": ETH1}
    machine.keeps(ETH1)


def test_a_driver_that_is_late_at_one_boot_costs_no_identity(machine: Machine) -> None:
    options = ("--interfaces", "lan1,wifi0")
    machine.addresses = {"lan1": ETH1, "wifi0": WLAN0}
    machine.enroll(options)
    machine.addresses = {"wifi0": WLAN0}
    machine.keeps(ETH1, options)


def test_an_interface_with_another_name_costs_no_identity(machine: Machine) -> None:
    machine.enroll(("--interfaces", "lan0"))
    machine.addresses = {"enplan1": ETH0}
    machine.keeps(ETH0, ("--interfaces", "lan0"))


def test_a_serial_number_that_a_newer_kernel_shows_costs_no_identity(machine: Machine) -> None:
    machine.enroll()
    machine.serial = "SN-4711"
    machine.keeps(ETH0)


def test_a_file_of_the_first_release_is_held_on_to_while_its_id_is_there(
    machine: Machine, authority: Authority
) -> None:
    machine.device.has(authority.identity(ETH1, certified=False, line=False))
    machine.addresses = {"lan0": ETH0, "lan1": ETH1}
    machine.keeps(ETH1)
    assert machine.line["hw"].count(",") == 1


def test_a_machine_that_has_none_of_them_is_another_one(machine: Machine) -> None:
    """An SD card that was cloned."""
    machine.enroll()
    machine.addresses = {"lan0": WLAN0}
    machine.starts_over(WLAN0)


#: An SD card that goes from a machine to another one, and what the two have in common.
SHARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "the board's serial number": (
        {"serial": "PF2X9ABC", "board": "R0C4F2-77", "addresses": {"lan0": ETH0}},
        {"serial": "PF2X9ABD", "board": "R0C4F2-77", "addresses": {"lan0": ETH1}},
    ),
    "the board's serial number, which came first": (
        {"board": "R0C4F2-77", "serial": "PF2X9ABC", "addresses": {}},
        {"board": "R0C4F2-77", "serial": "PF2X9ABD", "addresses": {}},
    ),
    "an adapter": (
        {"serial": "PF2X9ABC", "addresses": {"lan0": ETH0}},
        {"serial": "PF2X9ABD", "addresses": {"lan0": ETH0}},
    ),
    "the address of all sticks of a model": (
        {"addresses": {"lan0": ETH0, "wwan0": WLAN0}, "removable": {"wwan0": "removable"}},
        {"addresses": {"lan0": ETH1, "wwan0": WLAN0}, "removable": {"wwan0": "removable"}},
    ),
    "one of them in a port that doesn't say what it is": (
        {"addresses": {"lan0": ETH0, "wwan0": WLAN0}, "removable": {"wwan0": "unknown"}},
        {"addresses": {"lan0": ETH1, "wwan0": WLAN0}, "removable": {"wwan0": "unknown"}},
    ),
    "an address that is known to be shared": (
        {"addresses": {"lan0": ETH0, "wwan0": "0c5b8f279a64"}},
        {"addresses": {"lan0": ETH1, "wwan0": "0c5b8f279a64"}},
    ),
}


@pytest.mark.parametrize("what", SHARED)
def test_what_two_machines_share_makes_them_no_one_machine(machine: Machine, what: str) -> None:
    first, second = SHARED[what]
    vars(machine).update(first)
    machine.enroll()
    vars(machine).update(second)
    machine.starts_over(second.get("serial") or ETH1)


def test_what_a_machine_of_its_own_gains_and_loses_is_no_other_machine(machine: Machine) -> None:
    """The other side of it: a serial number outweighs addresses, and what isn't there contradicts nothing."""
    machine.serial, machine.board = "PF2X9ABC", "R0C4F2-77"
    machine.enroll()
    machine.addresses = {"lan0": ETH1}  # another network card
    machine.keeps("PF2X9ABC")
    machine.serial = None
    machine.keeps("PF2X9ABC")
    machine.addresses, machine.board = {"lan0": ETH0}, None
    machine.keeps("PF2X9ABC")


def test_an_adapter_that_can_be_unplugged_comes_last(machine: Machine) -> None:
    machine.addresses = {"lan0": ETH0, "lan1": ETH1}
    machine.removable = {"lan0": "removable"}
    machine.enroll()
    assert machine.line["id"] == ETH1
    machine.device.key_file.unlink()
    machine.removable = {"lan0": "fixed"}  # a Raspberry Pi's Ethernet
    machine.enroll()
    assert machine.line["id"] == ETH0


@pytest.mark.parametrize("serial", ["BSN12345678901234567", "EVAL", "c3d9b8674f4b94f6", None])
def test_a_device_that_enrolled_under_a_filler_stays_what_it_is(
    machine: Machine, authority: Authority, serial: Optional[str]
) -> None:
    """2.0.0 took these for serial numbers, and the addresses of LTE sticks for one device's."""
    enrolled = serial or "0c5b8f279a64"
    machine.serial, machine.addresses = serial, {"wwan0": "0c5b8f279a64"}
    content = world.unsealed(authority.identity(enrolled, certified=False))
    remembered = [fingerprint(one) for one in (serial, "0c5b8f279a64") if one]
    machine.device.has(world.sealed(content, authority.pem, enrolled, hardware=remembered))
    before = machine.device.snapshot()
    machine.keeps(enrolled)
    assert machine.device.snapshot() == before
    machine.device.has(content)
    machine.keeps(enrolled)
    machine.serial, machine.addresses = None, {"lan0": ETH0}
    machine.starts_over(ETH0)


def test_what_2_0_0_remembered_is_understood_and_left_as_it_is(machine: Machine, authority: Authority) -> None:
    """Without kinds: any ID in common is enough, as it was. Nothing is written for the sake of a form."""
    content = world.unsealed(authority.identity(ETH1, certified=False))
    machine.device.has(
        world.sealed(content, authority.pem, ETH1, hardware=[fingerprint("PF2X9ABC"), fingerprint(ETH1)])
    )
    before = machine.device.snapshot()
    machine.serial, machine.addresses = "PF2X9ABC", {"lan0": ETH0}
    machine.keeps(ETH1)
    assert machine.device.snapshot() == before


# --- What the line says is believed under its seal only ---


LOST_BITS: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the ID": lambda line: line.replace(b"id=0050c2a1b2c3", b"id=0050c2a1b2c2"),
    "another character of it": lambda line: line.replace(b"id=0050c2a1b2c3", b"id=0050c2a1b2c\xb3"),
    "a name added to it": lambda line: line.replace(b"id=0050c2a1b2c3", b"id=00aa,DNS:admin.example.com"),
    "a carriage return in it": lambda line: line.replace(b"id=0050c2a1b2c3", b"id=0050c2a1b2c3\rX:y"),
    "another machine's ID": lambda line: line.replace(b"id=0050c2a1b2c3", b"id=0050c2d4e5f6"),
    "a bit of what is remembered": lambda line: line.replace(b"hw=", b"hw=f", 1),
    "its name": lambda line: b"$" + line[1:],
    "its end": lambda line: line[:-1] + b"\x0b",
}


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("what", LOST_BITS)
def test_a_lost_bit_of_the_line_costs_no_identity(
    machine: Machine, authority: Authority, what: str, certified: bool
) -> None:
    machine.addresses = {"lan0": ETH0, "lan1": ETH1}
    content = world.unsealed(authority.identity(ETH0, certified=certified))
    good = world.sealed(content, authority.pem, ETH0, hardware=[fingerprint(ETH0), fingerprint(ETH1)])
    line, newline, rest = good.partition(b"\n")
    machine.device.has(LOST_BITS[what](line + newline) + rest)
    says = answers.certificate(machine.device.block("CERTIFICATE") or b"") if certified else answers.PENDING
    run = machine.run(says)
    assert (run.status, f": {ETH0}: " in run.err) == (0 if certified else 69, True), run.err
    assert [(asked.method, asked.path) for asked in machine.asked] == [("GET", "/" + machine.device.request_hash())]
    assert world.unsealed(machine.device.key_file.read_bytes()) == content
    assert machine.line["id"] == ETH0


@pytest.mark.parametrize("client_id", ["00aa,DNS:admin.example.com", "a b", "x" * 65, "\xe5"])
def test_an_id_in_a_request_is_an_id_or_it_is_none(machine: Machine, authority: Authority, client_id: str) -> None:
    """Also under a good seal, which anybody can make."""
    request = world.signing_request(KEY, [*authority.subject_for("x")[:-1], ("CN", client_id[:64])])
    machine.device.has(world.key_file_content(KEY, request))
    machine.starts_over(ETH0)


@slow
def test_every_lost_bit_of_a_whole_file_is_survived(fleet: Fleet) -> None:
    row = report.tried("", judged.cases(fleet, full=False))
    assert not row.lost, "\n".join(row.lost)


def test_an_explicit_id_is_not_held_against_anything(machine: Machine) -> None:
    machine.device.client_id = "meter-7"
    machine.enroll()
    assert "hw" not in machine.line
    machine.addresses = {}
    machine.keeps("meter-7")


@slow
def test_whatever_comes_and_goes_costs_no_identity_while_anything_is_left(fleet: Fleet) -> None:
    row = report.tried("", hardware.cases(fleet, full=False))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases == 12


# --- A source that is there and can't be read ---


def test_a_serial_number_for_root_only_leads_to_no_other_id(machine: Machine) -> None:
    machine.serial, machine.readable = "SN-4711", False
    run = machine.run()
    assert (run.status, "product_serial" in run.err, "--client-id" in run.err) == (127, True, True)
    assert not machine.device.key_file.exists()


def test_it_wipes_nothing(machine: Machine) -> None:
    machine.serial = "SN-4711"
    machine.addresses = {}
    machine.enroll()
    before = machine.device.snapshot()
    machine.readable = False
    assert machine.run().status == 127
    assert machine.device.snapshot() == before


def test_a_file_that_the_readable_ones_vouch_for_goes_on(machine: Machine) -> None:
    machine.serial = "SN-4711"
    machine.enroll()
    machine.readable = False
    machine.keeps("SN-4711")


# --- Host names ---


def test_a_domain_makes_a_host_name_in_lower_case(machine: Machine) -> None:
    machine.serial = "SN_4711A"
    machine.enroll(("--domain", "Devices.Example.COM"))
    assert machine.line["id"] == "sn-4711a.devices.example.com"
    machine.keeps("sn-4711a.devices.example.com", ("--domain", "devices.example.com"))


def test_a_domain_that_comes_later_costs_no_identity(machine: Machine) -> None:
    machine.enroll()
    machine.keeps(ETH0, ("--domain", "devices.example.com"))
