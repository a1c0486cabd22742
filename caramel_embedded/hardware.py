"""Who am I: the client ID of a device that wasn't told one, and what makes the hardware the same as before.

The hardware's serial number where it is a real one, else the permanent MAC address of the first usable network
interface. Never anything that another device could have too, or that this one could lose: a vendor's placeholder,
a random, virtual or locally administered address.
"""

from __future__ import annotations

import array
import errno
import fcntl
import hashlib
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Optional

from .errors import UsageError
from .settings import ClientId, is_client_id

# Device tree (Documentation/devicetree/usage-model in Linux), SoC bus (sysfs-devices-soc), DMI (sysfs-firmware-dmi).
SERIAL_NUMBER_FILES = (
    "proc/device-tree/serial-number",
    "sys/firmware/devicetree/base/serial-number",
    "sys/devices/soc0/serial_number",
    "sys/class/dmi/id/product_serial",
    "sys/class/dmi/id/board_serial",
)

# What vendors leave in the field, compared without case, spaces and punctuation.
PLACEHOLDERS = frozenset([
    "tobefilledbyoem", "tobefilled", "tobefilledbymanufacturer", "defaultstring", "default",
    "systemserialnumber", "serialnumber", "serial", "systemserial", "chassisserialnumber",
    "baseboardserialnumber", "boardserialnumber", "productserialnumber", "sn", "notspecified", "notapplicable",
    "notavailable", "notprovided", "notdefined", "notset", "notused", "notassigned", "na", "none", "null",
    "nil", "empty", "unknown", "undefined", "unspecified", "invalid", "invalidserial", "dummy", "test",
    "sample", "example", "oem", "oemserial", "noserial", "noserialnumber", "0123456789", "123456789",
    "1234567890", "0123456789abcdef", "1234567890abcdef", "123456789abcdef", "12345678", "01234567", "1234567",
    "123456", "12345", "1234", "abcdefgh", "abcd", "deadbeef", "cafebabe", "badf00d", "ssn12345678901234567",
    "empty1234", "nosn",
])  # fmt: skip

ARPHRD_ETHER = 1  # linux/if_arp.h: Ethernet and Wi-Fi
NET_ADDR_PERM = 0  # linux/netdevice.h, shown as addr_assign_type
SIOCETHTOOL = 0x8946  # linux/sockios.h
ETHTOOL_GPERMADDR = 0x20  # linux/ethtool.h


class Source(NamedTuple):
    """Something that may tell who the device is. Attributes: name: as a person would say it; id: None where it can't
    be read."""

    name: str
    id: Optional[str]


class Hardware:
    """All that the hardware says of itself.

    Attributes: sources: what a new client ID may come from, in order; ids: every ID that the hardware has.
    """

    def __init__(self, interfaces: Optional[Iterable[str]] = None, root: str = "/") -> None:
        """`interfaces`: whose MAC address may become a client ID, in this order; None: the physical ones, by name.
        `root`: where ``proc`` and ``sys`` are."""
        net = os.path.join(root, "sys/class/net")
        present = _names(net)
        addresses = {name: _permanent_address(net, name) for name in {*present, *(interfaces or ())}}
        serials = [_serial("/" + name, os.path.join(root, name)) for name in SERIAL_NUMBER_FILES]
        usable = [
            Source("MAC address of " + name, addresses[name])
            for name in (present if interfaces is None else interfaces)
            if addresses[name]
        ]
        self.sources: Sequence[Source] = [*filter(None, serials), *usable]
        found = [source.id for source in self.sources if source.id] + [addresses[name] for name in present]
        self.ids: Sequence[str] = list(dict.fromkeys(filter(None, found)))

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """What the key file remembers the hardware by: 8 hex digits for each ID that it has."""
        return tuple(map(fingerprint, self.ids))

    def holds(self, client_id: str, remembered: Iterable[str], domain: Optional[str] = None) -> bool:
        """Whether an identity is this machine's: it has one of the IDs that are `remembered`, or `client_id` itself
        is one of its IDs."""
        return not set(self.fingerprints).isdisjoint(remembered) or any(
            client_id in (one, in_domain(one, domain)) for one in self.ids
        )

    def client_id(self, domain: Optional[str] = None) -> tuple[str, str]:
        """The client ID of a new identity, and the source that it came from. Raises `UsageError`."""
        for source in self.sources:
            if source.id is None:
                # The next one would do, until somebody asks who can read this one: an ID doesn't depend on who asks.
                raise UsageError(
                    "the %s can't be read by this user: run as root, or give a client ID with --client-id or "
                    "CARAMEL_CN" % source.name
                )
            return in_domain(source.id, domain), source.name
        raise UsageError(
            "the hardware has neither a serial number nor a network interface with a permanent address: "
            "give a client ID with --client-id or CARAMEL_CN"
        )


def identify(
    interfaces: Optional[Iterable[str]], domain: Optional[str], stored: Optional[str], remembered: Iterable[str]
) -> ClientId:
    """Who this device is: as in the key file, while the hardware is that of which it remembers an ID.

    `stored`: the ID in the key file, or None; `remembered`: the fingerprints beside it. Raises `UsageError`.
    """
    present = Hardware(interfaces)
    if stored and present.holds(stored, remembered, domain):
        return ClientId(stored, "key file, which was made on this hardware", present.fingerprints)
    return ClientId(*present.client_id(domain), present.fingerprints)


def fingerprint(client_id: str) -> str:
    """8 hex digits that tell an ID from others, and don't tell the ID."""
    return hashlib.sha256(client_id.encode()).hexdigest()[:8]


def in_domain(client_id: str, domain: Optional[str]) -> str:
    """`client_id` as a host name in `domain`, in lower case; unchanged without a domain. Raises `UsageError`."""
    if not domain:
        return client_id
    # What can't be in a label of a host name (RFC 1123, 2.1), "_" say, becomes a hyphen.
    label = "".join(c if c.isalnum() else "-" for c in client_id.lower()).strip("-")
    name = "%s.%s" % (label, domain)
    if len(label) > 63 or not is_client_id(name):
        raise UsageError("%s is too long for a client ID: 64 characters at most" % name)
    return name


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


def _serial(name: str, path: str) -> Optional[Source]:
    """The serial number in a file; None where there is none, or none that is real."""
    try:
        text = _first_line(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO):
            return None
        return Source("serial number in " + name, None)
    return Source("serial number in " + name, text) if is_real_serial(text) else None


def _names(net: str) -> list[str]:
    try:
        return sorted(os.listdir(net))
    except OSError:
        return []


def _permanent_address(net: str, interface: str) -> Optional[str]:
    """The address that the interface was made with, None where it is no physical one or has no such address."""
    folder = os.path.join(net, interface)
    try:
        # A bridge, bond, VLAN, tunnel or veth has no device behind it.
        if not os.path.exists(os.path.join(folder, "device")):
            return None
        if _first_line(os.path.join(folder, "type")) != str(ARPHRD_ETHER):
            return None
        address = _asked_of_driver(interface) if net == "/sys/class/net" else None
        if address is None and _first_line(os.path.join(folder, "addr_assign_type")) == str(NET_ADDR_PERM):
            address = _first_line(os.path.join(folder, "address")).lower().replace(":", "")
    except OSError:
        return None  # it is gone, or not there yet
    return address if address and is_permanent_address(address) else None


def _asked_of_driver(interface: str) -> Optional[str]:
    """The permanent address by ethtool(8)'s ioctl: a bond or an administrator may have changed the current one."""
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
    """The text of a small sysfs or procfs file; device tree strings end with NUL. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        data = file.read(4096) or b""
    return data.decode("ascii", "replace").split("\0")[0].strip()
