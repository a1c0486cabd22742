"""Who am I: serial numbers and MAC addresses, on hardware of all kinds, and never what another device has, too."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Optional

import pytest
from needs import require
from talking import FIRST_TIME, Talking
from world import PLAIN

from caramel_embedded.errors import UsageError
from caramel_embedded.hardware import Hardware, is_permanent_address, is_real_serial, is_shared_address

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
    with pytest.raises(UsageError, match="--client-id"):
        asked(root, *names)
    return True


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


def words(text: str) -> list[str]:
    return text.split()


#: What vendors leave in the field; many from the lists of inventories (OCS, GLPI), which have met them.
FILLERS = words("""
    0 a 12 --- ........ 00000000-0000 0000000000000000 0x00000000 FFFFFFFF ffffffffffff xxxxxxxx XXXXXXXXXXXX
    NNNNNNN 1111111111 NA N/A None Not Unknown unknown Unknow INVALID empty EVAL IATPASS Standard OEM OEMID
    OEM_Serial SerialNumber SystemSerialNumb Not-Available ToBeFilledByO.E.M. deadbeef cafebabe deadbeefdeadbeef
    12345 123456 01234567 12345678 123456789 0123456789 1234567890 12345678901234567
    1234567890123456789012345678 9876543210 0987654321 6789012345 34567890 0123456789ABCDEF ABCDEF0123456789
    FEDCBA9876543210 01234567890123456789AB 0x12345678 1234567890ABCDEF1234567890ABCDEF 123456789123456789
    123456789000 12345000 12300000 00001234 00000001234567890 12345678-0000 BSN12345678901234567
    SSN12345678901234567 SYS-1234567890 SYS-9876543210 MB-1234567890 SN-1234567890 SN-12345 SN-7654321
    BSS-0123456789 X99-1234567890 B550M-0123456789 SerialNumber0123456789 Serial-1234 EMPTY1234 1234567890-SN
    SN-0000000000 12341234 1234512345 123123123 11223344 1122334455 112233445566 0011223344556677 AABBCCDDEEFF
    5a5a5a5a 55aa55aa a1b2c3d4 a1b2c3d4e5f6 1a2b3c4d5e6f abc123 ABC123456 ABCD1234 1234abcd 12344321
    ABCDEFGHIJ1234567890 0102030405060708 000102030405 102030405060 00020003-0004-0005-0006-000700080009
    0xdeadbeef 0xCAFEBABE c3d9b8674f4b94f6 SN-123456fvgv3i0b8o5n6n7k 03000200-0400-0500-0006-000700080009
""")
NO_ID = ["", " ", "To be filled by O.E.M.", "Default string", "a serial with spaces", "x" * 65, "comma,DNS:evil"]


@pytest.mark.parametrize("text", FILLERS + NO_ID)
def test_what_a_vendor_left_there_is_no_serial_number(tmp_path: Path, text: str) -> None:
    assert not is_real_serial(text)
    put(tmp_path, DMI, text.encode() + b"\n")
    assert nothing(tmp_path)
    interface(tmp_path, "eth0", "00:1b:21:aa:bb:cc")
    assert asked(tmp_path) == "001b21aabbcc"


REAL = words("""
    10000000c0ffee42 PF2X9ABC 5CG1234XYZ CNU1234ABC MXL2345X9Y C02XK0ABJG5H 7HJ9KQ2 HJKLMNPQ 4C4C4544-0042-3010
    VMware-56:4d SN-0042 SN-0001 SN-4711 SN-1002003 A1B2 BOARD-8821 SOC8821 PF_2X:9.ABC R90ABC12 S2345 GM0123470
    20210123 0x1b2d7e6a 2024-11-28 20240101-0001 SN20190807 0f5c2d1e 000000001b2d7e6a 12-3455 E7-B0-22
""")


@pytest.mark.parametrize("text", REAL)
def test_a_real_serial_number(tmp_path: Path, text: str) -> None:
    put(tmp_path, DMI, text.encode() + b"\n")
    assert asked(tmp_path) == text


DIGITS, HEX = "0123456789", "0123456789ABCDEF"
FORMS = [
    *((DIGITS, 9, "{}"), (DIGITS, 12, "{}"), (DIGITS, 7, "SN-{}"), (DIGITS, 4, "2026W31-{}")),
    *((HEX.lower(), 12, "{}"), (HEX, 16, "{}"), ("0123456789ABCDEFGHJKLMNPQRSTUVWXYZ", 10, "{}1")),
    ("BCDFGHJKLMNPQRSTVWXZ0123456789", 7, "{}"),  # those of a large vendor
]


@pytest.mark.parametrize(("alphabet", "length", "form"), FORMS)
def test_of_thousands_of_numbers_hardly_one_is_taken_for_a_filler(alphabet: str, length: int, form: str) -> None:
    chance = random.Random(f"{alphabet} {length} {form}")
    numbers = [form.format("".join(chance.choices(alphabet, k=length))) for _ in range(5000)]
    refused = [number for number in numbers if not is_real_serial(number)]
    assert len(refused) <= 5, refused


def test_numbers_that_go_up_from_one_are_real_but_for_the_first_of_all_numbers() -> None:
    """A vendor's production: what looks like a filler among them is one."""
    refused = [number for number in (f"TX-{count:06d}" for count in range(1, 20000)) if not is_real_serial(number)]
    assert len(refused) < 20 and {"TX-012345", "TX-001234"} <= set(refused), refused


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
    assert [source.id for source in hardware.known] == ["PRODUCT-8821", "001b21000002", "001b21000001"]
    assert [one[:-8] for one in hardware.fingerprints] == ["p", "m", "m"]
    assert hardware.holds("anything", hardware.fingerprints[2:])
    assert not hardware.holds("anything", ["00000000"])
    assert hardware.holds("001b21000001", []) and not hardware.holds("001b21000003", [])
    assert hardware.holds("001b21000001.example.com", [], "example.com")


def test_a_domain_makes_a_host_name(tmp_path: Path) -> None:
    put(tmp_path, DMI, b"PF_2X:9.ABC\n")
    assert Hardware(None, str(tmp_path)).client_id("example.com")[0] == "pf-2x-9-abc.example.com"
    with pytest.raises(UsageError, match="too long"):
        Hardware(None, str(tmp_path)).client_id("x" * 40 + "." + "y" * 15)


def test_the_first_usable_interface_by_name_or_the_configured_ones_in_their_order(tmp_path: Path) -> None:
    interface(tmp_path, "wlan0", "00:1b:21:00:00:03")
    interface(tmp_path, "eth1", "00:1B:21:C0:FF:EE")
    interface(tmp_path, "docker0", "00:1b:21:00:00:01", physical=False)
    assert Hardware(None, str(tmp_path)).client_id() == ("001b21c0ffee", "MAC address of eth1"), "in lower case"
    assert asked(tmp_path, "nowhere0", "wlan0", "eth1") == "001b21000003"
    assert nothing(tmp_path, "nowhere0")


#: What is wrong with an address, if it isn't empty, and then with the interface.
ADDRESSES = {
    "locally administered": "02:1b:21:00:00:01",
    "multicast": "01:1b:21:00:00:01",
    "zeros": "00:00:00:00:00:00",
    "ones": "ff:ff:ff:ff:ff:ff",
    "empty": "",
    "short": "00:1b:21:00:00",
    "long": "00:1b:21:00:00:01:02:03",
    "no hex": "zz:1b:21:00:00:01",
}
FAULTS: dict[str, dict[str, Any]] = {
    "virtual": {"physical": False},
    **{f"of type {kind}": {"kind": kind} for kind in ("772", "512", "801")},  # loopback, PPP, Wi-Fi in monitor mode
    **{f"assigned {how}": {"assigned": how} for how in ("1", "2", "3", None)},  # random, another's, somebody's
}


@pytest.mark.parametrize("fault", [*ADDRESSES, *FAULTS])
def test_never_a_random_virtual_or_local_address(tmp_path: Path, fault: str) -> None:
    interface(tmp_path, "eth0", ADDRESSES.get(fault, "00:1b:21:00:00:01"), **FAULTS.get(fault, {}))
    assert nothing(tmp_path) and nothing(tmp_path, "eth0"), "also where it is named"


SHARED = ["0c:5b:8f:27:9a:64", "00:02:03:04:05:06", "00:00:00:00:00:01", "00:E0:4C:53:44:58"]


@pytest.mark.parametrize("address", SHARED)
def test_an_address_that_all_adapters_of_a_model_have_is_none(tmp_path: Path, address: str) -> None:
    interface(tmp_path, "eth0", address)
    with pytest.raises(UsageError, match="MAC address of eth0 that other devices have, too"):
        asked(tmp_path)
    assert nothing(tmp_path, "eth0"), "also where it is named"
    interface(tmp_path, "wlan0", "00:1b:21:00:00:01")
    assert asked(tmp_path) == "001b21000001"


def test_no_hardware_at_all(tmp_path: Path) -> None:
    assert nothing(tmp_path)


def test_which_addresses_are_permanent() -> None:
    good = [f"{first:02x}1b21000001" for first in range(256) if is_permanent_address(f"{first:02x}1b21000001")]
    assert [text[:2] for text in good] == [f"{first:02x}" for first in range(0, 256, 4)]
    assert not any(map(is_shared_address, good))


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


@pytest.mark.parametrize(("address", "status"), [("00:1b:21:c0:ff:ee", 69), ("02:1b:21:c0:ff:ee", 127)])
def test_the_command_finds_the_mac_address_or_says_that_there_is_none(
    new: Talking, tmp_path: Path, address: str, status: int
) -> None:
    new.client_id = None
    new.command = [PLAIN]
    # A name that this machine doesn't have: its driver would be asked, and knows better than the files.
    interface(tmp_path / "root", "fake0", address)
    run = new.hears(*FIRST_TIME, options=["-v"], before=on(tmp_path / "root"))
    assert run.status == status, run.err
    if status == 69:
        assert "001b21c0ffee" in run.err and "MAC address of fake0" in run.err
        assert f"request {new.request_hash()}" in run.err
    else:
        assert "--client-id" in run.err and run.err.count("\n") == 1
        assert not new.key_file.exists()
