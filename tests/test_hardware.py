"""Who am I: serial numbers and MAC addresses, on hardware of all kinds, and never what another device has, too."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest
from needs import require
from world import PLAIN, Device

from caramel_embedded.errors import UsageError
from caramel_embedded.hardware import Hardware, is_permanent_address, is_real_serial

DEVICE_TREE = "proc/device-tree/serial-number"
SOC = "sys/devices/soc0/serial_number"
DMI = "sys/class/dmi/id/product_serial"
BOARD = "sys/class/dmi/id/board_serial"


def put(root: Path, name: str, content: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def interface(
    root: Path, name: str, address: str, *, physical: bool = True, kind: str = "1", assigned: Optional[str] = "0"
) -> None:
    folder = f"sys/class/net/{name}/"
    put(root, folder + "address", f"{address}\n".encode())
    put(root, folder + "type", f"{kind}\n".encode())
    if assigned is not None:
        put(root, folder + "addr_assign_type", f"{assigned}\n".encode())
    if physical:
        (root / folder / "device").mkdir()


def asked(root: Path, *names: str) -> str:
    return Hardware(names or None, str(root)).client_id()[0]


def nothing(root: Path, *names: str) -> bool:
    try:
        asked(root, *names)
    except UsageError as error:
        assert "--client-id" in str(error)
        return True
    return False


def test_a_real_serial_number_comes_first(tmp_path: Path) -> None:
    interface(tmp_path, "eth0", "00:1b:21:aa:bb:cc")
    put(tmp_path, BOARD, b"BOARD-8821\n")
    put(tmp_path, DMI, b"PRODUCT-8821\n")
    assert asked(tmp_path) == "PRODUCT-8821"
    put(tmp_path, SOC, b"SOC8821\n")
    assert asked(tmp_path) == "SOC8821"
    put(tmp_path, DEVICE_TREE, b"10000000c0ffee42\0")
    assert asked(tmp_path) == "10000000c0ffee42"
    assert DEVICE_TREE in Hardware(None, str(tmp_path)).client_id()[1]


PLACEHOLDERS = [
    "To be filled by O.E.M.",
    "To Be Filled By O.E.M.",
    "Default string",
    "System Serial Number",
    "0000000000000000",
    "0",
    "00000000-0000",
    "0x00000000",
    "FFFFFFFF",
    "ffffffffffff",
    "xxxxxxxx",
    "XXXXXXXXXXXX",
    "None",
    "N/A",
    "NA",
    "Not Specified",
    "Not Applicable",
    "Unknown",
    "unknown",
    "INVALID",
    "123456789",
    "0123456789",
    "1234567890",
    "0123456789ABCDEF",
    "SerialNumber",
    "Chassis Serial Number",
    "OEM",
    "........",
    "---",
    "",
    " ",
    "a",
    "12",
    "a serial with spaces",
    "x" * 65,
    "comma,DNS:evil",
]


@pytest.mark.parametrize("text", PLACEHOLDERS)
def test_a_vendors_placeholder_is_no_serial_number(tmp_path: Path, text: str) -> None:
    assert not is_real_serial(text)
    put(tmp_path, DMI, text.encode() + b"\n")
    assert nothing(tmp_path)
    interface(tmp_path, "eth0", "00:1b:21:aa:bb:cc")
    assert asked(tmp_path) == "001b21aabbcc"


@pytest.mark.parametrize(
    "text", ["10000000c0ffee42", "PF2X9ABC", "5CG1234XYZ", "4C4C4544-0042-3010", "VMware-56:4d", "SN-0042", "A1B2"]
)
def test_a_real_serial_number(tmp_path: Path, text: str) -> None:
    put(tmp_path, DMI, text.encode() + b"\n")
    assert asked(tmp_path) == text


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"\0", b"\n\n", b"\x01\x02\x03\x04\x05"])
def test_a_serial_number_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, DEVICE_TREE, content)
    assert nothing(tmp_path)


def test_a_serial_number_that_cannot_be_read_leads_to_no_other_source(tmp_path: Path) -> None:
    """An ID doesn't depend on who asks. (A folder in the place of a file can't be read by root either.)"""
    (tmp_path / DMI).mkdir(parents=True)
    interface(tmp_path, "eth0", "00:1b:21:aa:bb:cc")
    assert nothing(tmp_path)
    put(tmp_path, SOC, b"SOC8821\n")
    assert asked(tmp_path) == "SOC8821", "one that comes before it is as good as ever"


def test_all_ids_are_remembered_and_any_of_them_is_enough(tmp_path: Path) -> None:
    interface(tmp_path, "eth0", "00:1b:21:00:00:01")
    interface(tmp_path, "wlan0", "00:1b:21:00:00:02")
    put(tmp_path, DMI, b"PRODUCT-8821\n")
    hardware = Hardware(("wlan0",), str(tmp_path))
    assert hardware.ids == ["PRODUCT-8821", "001b21000002", "001b21000001"]
    assert hardware.holds("anything", hardware.fingerprints[2:])
    assert not hardware.holds("anything", ["00000000"])
    assert hardware.holds("001b21000001", []) and not hardware.holds("001b21000003", [])
    assert hardware.holds("001b21000001.example.com", [], "example.com")


def test_a_domain_makes_a_host_name(tmp_path: Path) -> None:
    put(tmp_path, DMI, b"PF_2X:9.ABC\n")
    assert Hardware(None, str(tmp_path)).client_id("example.com")[0] == "pf-2x-9-abc.example.com"
    with pytest.raises(UsageError, match="too long"):
        Hardware(None, str(tmp_path)).client_id("x" * 40 + "." + "y" * 15)


def test_a_mac_address_has_12_lower_case_hex_digits(tmp_path: Path) -> None:
    interface(tmp_path, "eth0", "FC:FB:EE:C0:FF:EE")
    assert Hardware(None, str(tmp_path)).client_id() == ("fcfbeec0ffee", "MAC address of eth0")


def test_the_first_usable_interface_by_name(tmp_path: Path) -> None:
    interface(tmp_path, "wlan0", "00:1b:21:00:00:03")
    interface(tmp_path, "eth1", "00:1b:21:00:00:02")
    interface(tmp_path, "docker0", "00:1b:21:00:00:01", physical=False)
    assert asked(tmp_path) == "001b21000002"


def test_the_configured_interfaces_in_their_order(tmp_path: Path) -> None:
    interface(tmp_path, "eth0", "00:1b:21:00:00:01")
    interface(tmp_path, "wlan0", "00:1b:21:00:00:02")
    assert asked(tmp_path, "nowhere0", "wlan0", "eth0") == "001b21000002"
    assert nothing(tmp_path, "nowhere0")


@pytest.mark.parametrize(
    "fault",
    [
        {"address": "02:1b:21:00:00:01"},  # locally administered
        {"address": "01:1b:21:00:00:01"},  # multicast
        {"address": "00:00:00:00:00:00"},
        {"address": "ff:ff:ff:ff:ff:ff"},
        {"address": ""},
        {"address": "00:1b:21:00:00"},
        {"address": "00:1b:21:00:00:01:02:03"},
        {"address": "zz:1b:21:00:00:01"},
        {"physical": False},
        {"kind": "772"},  # loopback
        {"kind": "512"},  # PPP
        {"kind": "801"},  # Wi-Fi in monitor mode
        {"assigned": "1"},  # random
        {"assigned": "2"},  # stolen from another
        {"assigned": "3"},  # set by somebody
        {"assigned": None},
    ],
    ids=str,
)
def test_never_a_random_virtual_or_local_address(tmp_path: Path, fault: dict[str, object]) -> None:
    arguments: dict[str, object] = {"address": "00:1b:21:00:00:01", **fault}
    interface(tmp_path, "eth0", **arguments)  # type: ignore[arg-type]
    assert nothing(tmp_path) and nothing(tmp_path, "eth0"), "also where it is named"


def test_no_hardware_at_all(tmp_path: Path) -> None:
    assert nothing(tmp_path)


def test_which_addresses_are_permanent() -> None:
    good = [f"{first:02x}1b21000001" for first in range(256) if is_permanent_address(f"{first:02x}1b21000001")]
    assert [text[:2] for text in good] == [f"{first:02x}" for first in range(0, 256, 4)]


# --- The command, on a machine that looks like a device ---


def on(root: Path) -> list[str]:
    """Starts a command with these hardware files in the place of this machine's own."""
    require("mounts")
    # An empty tree in the place of each source first, so that nothing of this machine is left.
    script = """
        set -e; root=$1; shift
        mkdir -p $root/sys/class/net $root/sys/class/dmi/id $root/sys/devices/soc0 $root/empty
        for source in sys/class/net sys/class/dmi/id sys/devices/soc0; do
            if [ -d /$source ]; then mount --bind $root/$source /$source; fi
        done
        if [ -d /sys/firmware/devicetree ]; then mount --bind $root/empty /sys/firmware/devicetree; fi
        exec "$@"
    """
    return ["unshare", "-m", "sh", "-c", script, "sh", str(root)]


def test_the_command_finds_the_mac_address(device: Device, tmp_path: Path) -> None:
    device.client_id = None
    device.command = [PLAIN]
    # A name that this machine doesn't have: its driver would be asked, and knows better than the files.
    interface(tmp_path / "root", "fake0", "00:1b:21:c0:ff:ee")
    run = device.run("-v", before=on(tmp_path / "root"))
    assert run.status == 69, run.err
    assert "001b21c0ffee" in run.err and "MAC address of fake0" in run.err
    assert f"request {device.request_hash()}" in run.err


def test_the_command_finds_nothing_and_says_so(device: Device, tmp_path: Path) -> None:
    device.client_id = None
    device.command = [PLAIN]
    interface(tmp_path / "root", "fake0", "02:1b:21:c0:ff:ee")
    run = device.run(before=on(tmp_path / "root"))
    assert run.status == 127 and "--client-id" in run.err and run.err.count("\n") == 1
    assert not device.key_file.exists()
