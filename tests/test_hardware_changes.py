"""An identity is held on to while the machine still has any of the IDs that it had when it enrolled.

The real program in a mount namespace of its own whose /sys says what the test wants.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import world
from needs import needs, slow
from talking import Talking
from torture import hardware, judged, report
from torture.fleet import Fleet
from world import Authority, Run, answers

ETH0, ETH1, WLAN0 = "0050c2a1b2c3", "0050c2d4e5f6", "0050c2778899"
KEY = world.new_key()

pytestmark = needs("mounts")


def fingerprint(one: str) -> str:
    return hashlib.sha256(one.encode()).hexdigest()[:8]


class Machine(Talking):
    """A device, and the hardware that it has at the moment: addresses by interface, serial numbers."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        super().__init__(folder, authority)
        self.client_id = None
        self.sys = folder.with_name("sys")
        self.addresses: dict[str, str] = {"lan0": ETH0}
        self.serial: Optional[str] = None
        self.board: Optional[str] = None
        self.readable = True
        #: Interfaces on a USB port, and what the port says of itself.
        self.removable: dict[str, str] = {}

    def becomes(self, **hardware: Any) -> None:
        vars(self).update(hardware)

    def run(self, *options: str, **how: Any) -> Run:
        """In a mount namespace of its own, with the hardware that it has now."""
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
        return super().run(*options, before=("unshare", "-m", "sh", "-c", script, "sh"), **how)

    @property
    def line(self) -> dict[str, str]:
        fields = self.key_file.read_text().splitlines()[0].split()
        assert fields[:2] == ["#", "caramel-embedded/1"]
        return dict(word.split("=", 1) for word in fields[2:])

    def holds_on(self, client_id: str, *options: str) -> None:
        before = self.request
        run = self.hears(answers.PENDING, options=options)
        assert (run.status, f": {client_id}: " in run.err) == (69, True), run.err
        assert self.request == before

    def starts_over(self, client_id: str) -> None:
        before = self.request
        run = self.enrolls()
        assert ("starting over" in run.err, self.line["id"]) == (True, client_id), run.err
        assert self.request != before


@pytest.fixture
def machine(tmp_path: Path, authority: Authority) -> Machine:
    return Machine(tmp_path / "device", authority)


def test_the_file_remembers_all_ids_by_their_hashes(machine: Machine) -> None:
    machine.becomes(addresses={"lan0": ETH0, "wifi0": WLAN0}, serial="SN-4711")
    machine.enrolls()
    hashes = [fingerprint(one) for one in ("SN-4711", ETH0, WLAN0)]
    assert (machine.line["id"], machine.line["hw"].split(",")) == ("SN-4711", hashes)
    assert machine.line["kinds"] == "pmm", "a product's serial number, and two addresses"


#: What the machine has when it enrolls and later, and the options of each run. It stays the first one's.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str, list[str]]] = {
    "a USB adapter comes first": (
        *({"addresses": {"lan1": ETH1}}, {"addresses": {"lan0": ETH0, "lan1": ETH1}}),
        *(ETH1, []),
    ),
    "a driver is late at one boot": (
        *({"addresses": {"lan1": ETH1, "wifi0": WLAN0}}, {"addresses": {"wifi0": WLAN0}}),
        *(ETH1, ["--interfaces", "lan1,wifi0"]),
    ),
    "an interface has another name": ({}, {"addresses": {"enplan1": ETH0}}, ETH0, ["--interfaces", "lan0"]),
    "a newer kernel shows a serial number": ({}, {"serial": "SN-4711"}, ETH0, []),
    "the serial number can't be read any more": ({"serial": "SN-4711"}, {"readable": False}, "SN-4711", []),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_comes_and_goes_costs_no_identity(machine: Machine, what: str) -> None:
    first, later, client_id, options = CHANGES[what]
    machine.becomes(**first)
    machine.enrolls(*options)
    machine.becomes(**later)
    machine.holds_on(client_id, *options)


def test_a_file_of_the_first_release_is_held_on_to_while_its_id_is_there(
    machine: Machine, authority: Authority
) -> None:
    machine.has(authority.identity(ETH1, certified=False, line=False))
    machine.becomes(addresses={"lan0": ETH0, "lan1": ETH1})
    machine.holds_on(ETH1)
    assert machine.line["hw"].count(",") == 1


def test_a_machine_that_has_none_of_them_is_another_one(machine: Machine) -> None:
    """An SD card that was cloned."""
    machine.enrolls()
    machine.becomes(addresses={"lan0": WLAN0})
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
    machine.becomes(**first)
    machine.enrolls()
    machine.becomes(**second)
    machine.starts_over(second.get("serial") or ETH1)


def test_what_a_machine_of_its_own_gains_and_loses_is_no_other_machine(machine: Machine) -> None:
    """The other side of it: a serial number outweighs addresses, and what isn't there contradicts nothing."""
    machine.serial, machine.board = "PF2X9ABC", "R0C4F2-77"
    machine.enrolls()
    machine.addresses = {"lan0": ETH1}  # another network card
    machine.holds_on("PF2X9ABC")
    machine.serial = None
    machine.holds_on("PF2X9ABC")
    machine.addresses, machine.board = {"lan0": ETH0}, None
    machine.holds_on("PF2X9ABC")


def test_an_adapter_that_can_be_unplugged_comes_last(machine: Machine) -> None:
    machine.addresses = {"lan0": ETH0, "lan1": ETH1}
    machine.removable = {"lan0": "removable"}
    machine.enrolls()
    assert machine.line["id"] == ETH1
    machine.key_file.unlink()
    machine.removable = {"lan0": "fixed"}  # a Raspberry Pi's Ethernet
    machine.enrolls()
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
    machine.has(world.sealed(content, authority.pem, enrolled, hardware=remembered))
    before = machine.snapshot()
    machine.holds_on(enrolled)
    assert machine.snapshot() == before
    machine.has(content)
    machine.holds_on(enrolled)
    machine.serial, machine.addresses = None, {"lan0": ETH0}
    machine.starts_over(ETH0)


def test_what_2_0_0_remembered_is_understood_and_left_as_it_is(machine: Machine, authority: Authority) -> None:
    """Without kinds: any ID in common is enough, as it was. Nothing is written for the sake of a form."""
    content = world.unsealed(authority.identity(ETH1, certified=False))
    machine.has(world.sealed(content, authority.pem, ETH1, hardware=[fingerprint("PF2X9ABC"), fingerprint(ETH1)]))
    before = machine.snapshot()
    machine.serial, machine.addresses = "PF2X9ABC", {"lan0": ETH0}
    machine.holds_on(ETH1)
    assert machine.snapshot() == before


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
    machine.has(LOST_BITS[what](line + newline) + rest)
    says = answers.certificate(machine.block("CERTIFICATE") or b"") if certified else answers.PENDING
    run = machine.hears(says)
    assert (run.status, f": {ETH0}: " in run.err) == (0 if certified else 69, True), run.err
    assert [(asked.method, asked.path) for asked in machine.asked] == [("GET", "/" + machine.request_hash())]
    assert world.unsealed(machine.key_file.read_bytes()) == content
    assert machine.line["id"] == ETH0


@pytest.mark.parametrize("client_id", ["00aa,DNS:admin.example.com", "a b", "x" * 65, "\xe5"])
def test_an_id_in_a_request_is_an_id_or_it_is_none(machine: Machine, authority: Authority, client_id: str) -> None:
    """Also under a good seal, which anybody can make."""
    request = world.signing_request(KEY, [*authority.subject_for("x")[:-1], ("CN", client_id[:64])])
    machine.has(world.key_file_content(KEY, request))
    machine.starts_over(ETH0)


@slow
def test_every_lost_bit_of_a_whole_file_is_survived(fleet: Fleet) -> None:
    row = report.tried("", judged.cases(fleet, full=False))
    assert not row.lost, "\n".join(row.lost)


def test_an_explicit_id_is_not_held_against_anything(machine: Machine) -> None:
    machine.client_id = "meter-7"
    machine.enrolls()
    assert "hw" not in machine.line
    machine.addresses = {}
    machine.holds_on("meter-7")


@slow
def test_whatever_comes_and_goes_costs_no_identity_while_anything_is_left(fleet: Fleet) -> None:
    row = report.tried("", hardware.cases(fleet, full=False))
    assert not row.lost, "\n".join(row.lost)
    assert row.cases == 12


# --- A source that is there and can't be read ---


def test_a_serial_number_for_root_only_leads_to_no_other_id(machine: Machine) -> None:
    machine.serial, machine.readable = "SN-4711", False
    run = machine.hears()
    assert (run.status, "product_serial" in run.err, "--client-id" in run.err) == (127, True, True)
    assert not machine.key_file.exists()


def test_it_wipes_nothing(machine: Machine) -> None:
    machine.serial = "SN-4711"
    machine.addresses = {}
    machine.enrolls()
    before = machine.snapshot()
    machine.readable = False
    assert machine.hears().status == 127
    assert machine.snapshot() == before


# --- Host names ---


def test_a_domain_makes_a_host_name_in_lower_case(machine: Machine) -> None:
    machine.serial = "SN_4711A"
    machine.enrolls("--domain", "Devices.Example.COM")
    assert machine.line["id"] == "sn-4711a.devices.example.com"
    machine.holds_on("sn-4711a.devices.example.com", "--domain", "devices.example.com")


def test_a_domain_that_comes_later_costs_no_identity(machine: Machine) -> None:
    machine.enrolls()
    machine.holds_on(ETH0, "--domain", "devices.example.com")
