"""Who am I: the client ID of a device that wasn't told one.

The hardware's serial number where it is a real one, else the permanent MAC address of the first usable network
interface. Never anything that another device could have too, or that this one could lose: a vendor's placeholder,
a random, virtual or locally administered address.
"""

from __future__ import annotations

import os

from .errors import UsageError
from .settings import is_client_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Optional

# Device tree (Documentation/devicetree/usage-model in Linux), SoC bus (sysfs-devices-soc), DMI (sysfs-firmware-dmi).
SERIAL_NUMBER_FILES = (
    "proc/device-tree/serial-number",
    "sys/firmware/devicetree/base/serial-number",
    "sys/devices/soc0/serial_number",
    "sys/class/dmi/id/product_serial",
    "sys/class/dmi/id/board_serial",
)

# What vendors leave in the field, compared without case, spaces and punctuation.
PLACEHOLDERS = frozenset(
    [
        "tobefilledbyoem",
        "tobefilled",
        "tobefilledbymanufacturer",
        "defaultstring",
        "default",
        "systemserialnumber",
        "serialnumber",
        "serial",
        "systemserial",
        "chassisserialnumber",
        "baseboardserialnumber",
        "boardserialnumber",
        "productserialnumber",
        "sn",
        "notspecified",
        "notapplicable",
        "notavailable",
        "notprovided",
        "notdefined",
        "notset",
        "notused",
        "notassigned",
        "na",
        "none",
        "null",
        "nil",
        "empty",
        "unknown",
        "undefined",
        "unspecified",
        "invalid",
        "invalidserial",
        "dummy",
        "test",
        "sample",
        "example",
        "oem",
        "oemserial",
        "noserial",
        "noserialnumber",
        "0123456789",
        "123456789",
        "1234567890",
        "0123456789abcdef",
        "1234567890abcdef",
        "123456789abcdef",
        "12345678",
        "01234567",
        "1234567",
        "123456",
        "12345",
        "1234",
        "abcdefgh",
        "abcd",
        "deadbeef",
        "cafebabe",
        "badf00d",
        "ssn12345678901234567",
        "empty1234",
        "nosn",
    ]
)

ARPHRD_ETHER = 1  # linux/if_arp.h: Ethernet and Wi-Fi
NET_ADDR_PERM = 0  # linux/netdevice.h, shown as addr_assign_type
SIOCETHTOOL = 0x8946  # linux/sockios.h
ETHTOOL_GPERMADDR = 0x20  # linux/ethtool.h


def client_id(interfaces: Optional[Iterable[str]] = None, root: str = "/") -> tuple[str, str]:
    """The client ID, and where it came from as a person would say it.

    `interfaces`: whose MAC address may be used, in this order; None: the physical ones, by name. `root`: where
    ``proc`` and ``sys`` are. Raises `UsageError` where the hardware has nothing that lasts.
    """
    for name in SERIAL_NUMBER_FILES:
        serial = _first_line(os.path.join(root, name))
        if is_real_serial(serial):
            return serial, "serial number in /" + name
    net = os.path.join(root, "sys/class/net")
    for interface in _names(net) if interfaces is None else interfaces:
        address = _permanent_address(net, interface)
        if address:
            return address, "MAC address of " + interface
    raise UsageError(
        "the hardware has neither a serial number nor a network interface with a permanent address: "
        "give a client ID with --client-id or CARAMEL_CN"
    )


def is_real_serial(text: str) -> bool:
    """Whether `text` can be a device's own serial number and a client ID."""
    significant = "".join(filter(str.isalnum, text)).lower()
    # One or two different characters (zeros, "ff", "0x00000") are a pattern, no number.
    return (
        is_client_id(text)
        and len(significant) >= 4
        and len(set(significant.replace("x", "0"))) > 2
        and significant not in PLACEHOLDERS
        and significant.lstrip("0") not in PLACEHOLDERS
    )


def is_permanent_address(text: str) -> bool:
    """Whether `text`, 12 lower-case hex digits, is a universally administered unicast address (IEEE 802, 8.2)."""
    if len(text) != 12 or not set(text) <= set("0123456789abcdef"):
        return False
    return int(text[:2], 16) & 3 == 0 and int(text, 16) != 0


def _names(net: str) -> list[str]:
    try:
        return sorted(os.listdir(net))
    except OSError:
        return []


def _permanent_address(net: str, interface: str) -> Optional[str]:
    """The address that the interface was made with, None where it is no physical one or has no such address."""
    folder = os.path.join(net, interface)
    # A bridge, bond, VLAN, tunnel or veth has no device behind it.
    if not os.path.exists(os.path.join(folder, "device")):
        return None
    if _first_line(os.path.join(folder, "type")) != str(ARPHRD_ETHER):
        return None
    address = _asked_of_driver(interface) if net == "/sys/class/net" else None
    if address is None and _first_line(os.path.join(folder, "addr_assign_type")) == str(NET_ADDR_PERM):
        address = _first_line(os.path.join(folder, "address")).lower().replace(":", "")
    return address if address and is_permanent_address(address) else None


def _asked_of_driver(interface: str) -> Optional[str]:
    """The permanent address by ethtool(8)'s ioctl: a bond or an administrator may have changed the current one."""
    import array
    import fcntl
    import socket
    import struct

    # struct ethtool_perm_addr { __u32 cmd; __u32 size; __u8 data[]; }, pointed to by struct ifreq
    request = array.array("B", struct.pack("=II32s", ETHTOOL_GPERMADDR, 32, b""))
    pointer = struct.pack("16sP16x", os.fsencode(interface), request.buffer_info()[0])
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control.fileno(), SIOCETHTOOL, pointer)
    except OSError:
        return None
    size = struct.unpack_from("=I", request, 4)[0]
    address = bytes(request[8 : 8 + size]).hex()
    # Some drivers answer with zeros where they don't know.
    return address if size == 6 and int(address, 16) else None


def _first_line(path: str) -> str:
    """The text of a small sysfs or procfs file, "" where there is none; device tree strings end with NUL."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = file.read(4096) or b""
    except OSError:
        return ""
    return data.decode("ascii", "replace").split("\0")[0].strip()
