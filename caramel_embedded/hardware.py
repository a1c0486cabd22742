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
from .settings import ClientId, is_client_id, same_name

# Device tree (Documentation/devicetree/usage-model in Linux), SoC bus (sysfs-devices-soc), DMI (sysfs-firmware-dmi).
SERIAL_NUMBER_FILES = (
    "proc/device-tree/serial-number",
    "sys/firmware/devicetree/base/serial-number",
    "sys/devices/soc0/serial_number",
    "sys/class/dmi/id/product_serial",
    "sys/class/dmi/id/board_serial",
)
# Whose number each of them is: the tree's, the chip's, the product's, the board's.
SERIAL_NUMBER_KINDS = "ttcpb"
# Kinds of addresses by what the adapter's port says of itself (sysfs-bus-usb, `removable`); None: it is at none.
BUILT_IN, REMOVABLE = "m", "r"
PORTS = {None: BUILT_IN, "fixed": BUILT_IN, "unknown": "u", "removable": REMOVABLE}

# Serial numbers that many boards share and no pattern tells: a vendor's kernel for Rockchip, an example in a BIOS,
# the UUID that AMI's firmware begins with.
SHARED_SERIALS = frozenset([
    "c3d9b8674f4b94f6", "sn123456fvgv3i0b8o5n6n7k", "03000200040005000006000700080009", "a1b2c3d4",
])  # fmt: skip
# Addresses that adapters of a whole product line share: LTE sticks (Huawei, Qualcomm, ZTE), USB Ethernet (JP1082,
# DM9601), boards whose memory for it was never written; and those that inventories (OCS, GLPI) have met too often.
SHARED_ADDRESSES = frozenset([
    "0c5b8f279a64", "582c80139263", "001e101f0000", "00a0c6000000", "344b50000000", "00e04c534458", "000203040506",
    "00904cc51238", "0001027d9b1c", "0008a1460635", "0008a166e21a", "0009dd103768", "000fea9ae2f0",
    "00105a7271f3", "00111185088b", "005345000000", "444553540000", "444553540001", "505054503030",
])  # fmt: skip

ARPHRD_ETHER = 1  # linux/if_arp.h: Ethernet and Wi-Fi
NET_ADDR_PERM = 0  # linux/netdevice.h, shown as addr_assign_type
SIOCETHTOOL = 0x8946  # linux/sockios.h
ETHTOOL_GPERMADDR = 0x20  # linux/ethtool.h


class Source(NamedTuple):
    """Something that may tell who the device is.

    Attributes: name: as a person would say it; id: None where it can't be read; kind: one letter; shared: whether
    other devices have the same one.
    """

    name: str
    id: Optional[str]
    kind: str
    shared: bool = False


class Hardware:
    """All that the hardware says of itself.

    Attributes: sources: what a new client ID may come from, in order; known: every ID that the hardware has; shared:
    IDs that other devices have, too.
    """

    def __init__(self, interfaces: Optional[Iterable[str]] = None, root: str = "/") -> None:
        """`interfaces`: whose MAC address may become a client ID, in this order; None: the physical ones, by name,
        those that can be unplugged last. `root`: where ``proc`` and ``sys`` are."""
        net = os.path.join(root, "sys/class/net")
        present = _names(net)
        addresses = {name: _address(net, name) for name in {*present, *(interfaces or ())}}
        serials = [_serial(*each, root) for each in zip(SERIAL_NUMBER_KINDS, SERIAL_NUMBER_FILES)]
        usable = [one for one in map(addresses.get, present if interfaces is None else interfaces) if one]
        if interfaces is None:
            usable.sort(key=lambda one: one.kind == REMOVABLE)
        found = [*filter(None, serials), *usable]
        self.sources: Sequence[Source] = [one for one in found if not one.shared]
        found += filter(None, map(addresses.get, present))
        self.known: Sequence[Source] = [one for one in _unique(found) if one.id and not one.shared]
        self.shared: Sequence[Source] = [one for one in _unique(found) if one.shared]

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """What the key file remembers the hardware by: a kind and 8 hex digits for each ID that it has."""
        return tuple(one.kind + fingerprint(str(one.id)) for one in self.known)

    def has(self, client_id: str, domain: Optional[str] = None, shared: bool = False) -> Optional[Source]:
        """The source that says `client_id`; with `shared` also one that other devices have."""
        for one in (*self.known, *(self.shared if shared else ())):
            own = str(one.id)
            if same_name(client_id, own) or (domain and same_name(client_id, _host_name(own, domain))):
                return one
        return None

    def holds(self, client_id: str, remembered: Iterable[str], domain: Optional[str] = None) -> bool:
        """Whether an identity is this machine's: they have an ID in common, and nothing of a kind contradicts it.

        `remembered`: fingerprints, with their kinds or as 2.0.0 wrote them, without.
        """
        then, now = _by_kind(remembered), _by_kind(self.fingerprints)
        serials = set(SERIAL_NUMBER_KINDS)
        # A serial number outweighs addresses: they come and go, and adapters are moved.
        if any(kind in then and kind in now and then[kind].isdisjoint(now[kind]) for kind in serials):
            return False
        remembers = set().union(*then.values())
        own = self.has(client_id, domain, shared=True)
        if (own and own.kind in serials) or any(not remembers.isdisjoint(now.get(kind, ())) for kind in serials):
            return True
        # What can be unplugged may be plugged into another machine; what is built in tells them apart.
        addresses = set().union(*(now[kind] for kind in now if kind not in serials))
        inside = then.get(BUILT_IN, set()), now.get(BUILT_IN, set())
        if all(inside) and inside[0].isdisjoint(addresses) and inside[1].isdisjoint(remembers):
            return False
        return own is not None or not remembers.isdisjoint(addresses)

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
            "the hardware has neither a serial number nor a network interface with a permanent address%s: "
            "give a client ID with --client-id or CARAMEL_CN"
            % "".join(", but a %s that other devices have, too" % one.name for one in self.shared[:1])
        )


def identify(
    interfaces: Optional[Iterable[str]],
    domain: Optional[str],
    stored: Optional[str],
    remembered: Iterable[str],
    sealed: bool,
) -> ClientId:
    """Who this device is: as in the key file, while the hardware is that of which it remembers an ID.

    `stored`: the ID in the key file, or None; `remembered`: the fingerprints beside it; `sealed`: whether they were
    judged good: else the hardware's own word comes first, and they count only if nothing else is known. Raises
    `UsageError`.
    """
    present = Hardware(interfaces)
    if stored and ((not sealed and present.has(stored, domain)) or present.holds(stored, remembered, domain)):
        return ClientId(stored, "key file, which was made on this hardware", present.fingerprints)
    return ClientId(*present.client_id(domain), present.fingerprints)


def _unique(sources: Iterable[Source]) -> list[Source]:
    """Each ID once, from the first source that has it."""
    found: dict[Optional[str], Source] = {}
    for one in sources:
        found.setdefault(one.id, one)
    return list(found.values())


def _by_kind(fingerprints: Iterable[str]) -> dict[str, set[str]]:
    """8 hex digits each by kind, which is "" for those that 2.0.0 wrote."""
    found: dict[str, set[str]] = {}
    for one in fingerprints:
        found.setdefault(one[:-8], set()).add(one[-8:])
    return found


def fingerprint(client_id: str) -> str:
    """8 hex digits of an ID."""
    return hashlib.sha256(client_id.encode()).hexdigest()[:8]


def in_domain(client_id: str, domain: Optional[str]) -> str:
    """`client_id` as a host name in `domain`, in lower case; unchanged without a domain. Raises `UsageError`."""
    if not domain:
        return client_id
    name = _host_name(client_id, domain)
    if name.index(".") > 63 or not is_client_id(name):
        raise UsageError("%s is too long for a client ID: 64 characters at most" % name)
    return name


def _host_name(client_id: str, domain: str) -> str:
    # What can't be in a label of a host name (RFC 1123, 2.1), "_" say, becomes a hyphen.
    label = "".join(c if c.isalnum() else "-" for c in client_id.lower()).strip("-")
    return "%s.%s" % (label, domain)


# --- What is one device's own ---

_ORDER = "0123456789abcdefghijklmnopqrstuvwxyz"
_LETTERS = _ORDER[10:]
# What comes after what where somebody counts; the digits go around.
_NEXT = frozenset([*zip(_ORDER, _ORDER[1:]), ("9", "0")])


def is_real_serial(text: str) -> bool:
    """Whether `text` can be a device's own serial number and a client ID."""
    significant = "".join(filter(str.isalnum, text)).lower()
    if significant.startswith("0x"):
        significant = significant[2:]
    return is_client_id(text) and len(significant) >= 4 and not _is_filler(significant)


def _is_filler(text: str) -> bool:
    """Whether `text`, of digits and lower-case letters, is what somebody writes who has no number.

    Lists can't win: it is a word, or it counts, alone, behind a short prefix, before zeros, doubled or in steps.
    """
    # Most vendors leave the vowels out of numbers, for the sake of what could be read in them. A word has some.
    if text in SHARED_SERIALS or (text.isalpha() and sum(map(text.count, "aeiouy")) * 4 >= len(text)):
        return True
    if len(set(text.replace("x", "0"))) < 3:
        return True  # zeros, "ff", "0x00000"
    # Something long that counts, whatever stands around it.
    if any(_run(text, at) >= 8 and len(text.strip("0")) - _run(text, at) <= 12 for at in range(len(text))):
        return True
    behind = text.lstrip(_LETTERS)
    for body in {text, behind} if len(text) - len(behind) <= 8 else {text}:
        core, unit = body.strip("0"), _once(body)
        if _counts(body) or _counts(core) or _counts(unit) or (len(body) > 3 and len(set(body)) == 1):
            return True
        if len(body) > 5 and (len(unit) * 3 <= len(body) or (body.endswith("000") and len(core) == _run(core) == 3)):
            return True
    return _in_runs(text.strip("0")) or _in_pairs(text) or _in_steps(text, 2) or _in_steps(text, 4)


def _run(text: str, start: int = 0) -> int:
    """How many characters from `start` on count, up or down."""
    pairs = list(zip(text[start:], text[start + 1 :]))
    up = next((number for number, pair in enumerate(pairs) if pair not in _NEXT), len(pairs))
    down = next((number for number, pair in enumerate(pairs) if pair[::-1] not in _NEXT), len(pairs))
    return 1 + max(up, down)


def _counts(text: str) -> bool:
    """Whether `text` counts from its first character to its last one. Four can be chance, but for the first ones."""
    return _run(text) == len(text) and (len(text) > 4 or text in ("0123", "1234", "4321", "3210", "9876", "abcd"))


def _in_runs(text: str) -> bool:
    """Whether `text` is some runs that count, each of three characters at least: abc123, 1234abcd, 12344321."""
    at = 0
    while at < len(text):
        length = _run(text, at)
        if length < 3:
            return False
        at += length
    return at > 5


def _in_pairs(text: str) -> bool:
    """Whether `text` counts in two voices: 112233, a1b2c3."""
    one, other = text[::2], text[1::2]
    together = one == other or one.isalpha() != other.isalpha()
    return len(text) > 5 and together and _run(one) == len(one) and _run(other) == len(other)


def _in_steps(text: str, width: int) -> bool:
    """Whether groups of so many hex digits count: 0102030405, 102030405060, 00020003000400050006."""
    if len(text) % width or len(text) < 4 * width or not set(text) <= set(_ORDER[:16]):
        return False
    numbers = [int(text[at : at + width], 16) for at in range(0, len(text), width)]
    steps = {second - first for first, second in zip(numbers, numbers[1:])}
    return len(steps) == 1 and steps <= {1, -1, 16, -16}


def _once(text: str) -> str:
    """What `text` repeats to its end; `text` itself where it doesn't."""
    lengths = range(1, len(text) // 2 + 1)
    return next((text[:n] for n in lengths if text == (text[:n] * len(text))[: len(text)]), text)


def is_permanent_address(text: str) -> bool:
    """Whether `text`, 12 lower-case hex digits, is a universally administered unicast address (IEEE 802, 8.2)."""
    if len(text) != 12 or not set(text) <= set("0123456789abcdef"):
        return False
    return int(text[:2], 16) & 3 == 0 and int(text, 16) != 0


def is_shared_address(text: str) -> bool:
    """Whether `text`, 12 lower-case hex digits, is an address that more than one adapter has."""
    return text in SHARED_ADDRESSES or len(set(text)) < 3


# --- Ask ---


def _serial(kind: str, path: str, root: str) -> Optional[Source]:
    """The serial number in a file; None where there is none, or none that can be a client ID."""
    name = "serial number in /" + path
    try:
        text = _first_line(os.path.join(root, path))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO):
            return None
        return Source(name, None, kind)
    return Source(name, text, kind, not is_real_serial(text)) if is_client_id(text) else None


def _names(net: str) -> list[str]:
    try:
        return sorted(os.listdir(net))
    except OSError:
        return []


def _address(net: str, interface: str) -> Optional[Source]:
    """The address that the interface was made with, None where it is no physical one or has no such address."""
    address = _permanent_address(net, interface)
    if address is None or not is_permanent_address(address):
        return None
    return Source("MAC address of " + interface, address, PORTS[_port(net, interface)], is_shared_address(address))


def _port(net: str, interface: str) -> Optional[str]:
    """What the ports above an adapter say of it, ``removable``, ``fixed`` or ``unknown``; None: it is at no port."""
    place = os.path.realpath(os.path.join(net, interface, "device"))
    words = set()
    while place != os.path.dirname(place):
        try:
            words.add(_first_line(os.path.join(place, "removable")))
        except OSError:
            pass  # most folders are no ports
        place = os.path.dirname(place)
    return next((word for word in ("removable", "unknown", "fixed") if word in words), None)


def _permanent_address(net: str, interface: str) -> Optional[str]:
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
    return address


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
