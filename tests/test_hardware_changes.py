"""An identity is held on to while the machine still has any of the IDs that it had when it enrolled.

The real program in a mount namespace of its own whose /sys says what the test wants.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import pytest
from needs import needs
from torture import hardware, report
from torture.fleet import Fleet
from world import Answer, Authority, Device, Run, Scripted, answers

ETH0, ETH1, WLAN0 = "0050c2a1b2c3", "0050c2d4e5f6", "0050c2778899"

pytestmark = needs("mounts")


@pytest.fixture(scope="module")
def pem(authority: Authority) -> Path:
    return authority.server(file="hardware.pem")


class Machine:
    """A device, and the hardware that it has at the moment: addresses by interface, a serial number."""

    def __init__(self, device: Device, pem: Path, tmp_path: Path) -> None:
        self.device = device
        self.device.client_id = None
        self.pem = pem
        self.sys = tmp_path / "sys"
        self.addresses: dict[str, str] = {"lan0": ETH0}
        self.serial: Optional[str] = None
        self.readable = True

    def run(self, *says: Answer, options: Sequence[str] = ()) -> Run:
        shutil.rmtree(self.sys, ignore_errors=True)
        self.sys.mkdir()
        for name, address in self.addresses.items():
            folder = self.sys / "class" / "net" / name
            (folder / "device").mkdir(parents=True)
            (folder / "type").write_text("1\n")
            (folder / "addr_assign_type").write_text("0\n")
            (folder / "address").write_text(":".join(address[i : i + 2] for i in range(0, 12, 2)) + "\n")
        if self.serial:
            folder = self.sys / "class" / "dmi" / "id"
            folder.mkdir(parents=True)
            (folder / "product_serial").write_text(self.serial + "\n")
            (folder / "product_serial").chmod(0o444 if self.readable else 0)
        # Root without the right to read what its mode forbids: what any other user is.
        script = f'mount --rbind "{self.sys}" /sys && exec setpriv --bounding-set -dac_override,-dac_read_search "$@"'
        with Scripted(self.pem, says or [answers.PENDING]) as server:
            self.device.server = server.address
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


@pytest.fixture
def machine(tmp_path: Path, authority: Authority, pem: Path) -> Machine:
    return Machine(Device(tmp_path / "device", None, authority.certificate_file), pem, tmp_path)


def test_the_file_remembers_all_ids_by_their_hashes(machine: Machine) -> None:
    machine.addresses = {"lan0": ETH0, "wifi0": WLAN0}
    machine.serial = "SN-4711"
    machine.enroll()
    hashes = [hashlib.sha256(one.encode()).hexdigest()[:8] for one in ("SN-4711", ETH0, WLAN0)]
    assert (machine.line["id"], machine.line["hw"].split(",")) == ("SN-4711", hashes)


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
    machine.device.has(authority.identity(ETH1, certified=False))
    machine.addresses = {"lan0": ETH0, "lan1": ETH1}
    machine.keeps(ETH1)
    assert machine.line["hw"].count(",") == 1


def test_a_machine_that_has_none_of_them_is_another_one(machine: Machine) -> None:
    """An SD card that was cloned."""
    machine.enroll()
    before = machine.device.request
    machine.addresses = {"lan0": WLAN0}
    run = machine.run(answers.UNKNOWN, answers.PENDING, answers.PENDING)
    assert (run.status, "starting over" in run.err, machine.line["id"]) == (69, True, WLAN0)
    assert machine.device.request != before


def test_an_explicit_id_is_not_held_against_anything(machine: Machine) -> None:
    machine.device.client_id = "meter-7"
    machine.enroll()
    assert "hw" not in machine.line
    machine.addresses = {}
    machine.keeps("meter-7")


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
