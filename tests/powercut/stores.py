"""The file systems, each as a device would have it: how it is made, checked at boot, and mounted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Optional

_FLASH = "modprobe flash"


@dataclass(frozen=True)
class Store:
    """One file system. The scripts are for the guest's shell; it is mounted on /data."""

    name: str
    make: str
    mount: str
    #: What a system runs at boot before it mounts: exit status 0 or 1 is good (fsck(8)).
    check: str = ""
    #: Once after each start.
    attach: str = ""
    #: The same as `mount`, for a look that changes nothing; empty: there is none.
    look: str = ""
    unmount: str = "umount /data"
    #: Takes away what the program has made; empty: it stays.
    empty: str = "rm -rf /data/caramel"
    #: A folder of the lower layer, where there is one.
    lower: str = ""
    #: What the program is told to give the key file.
    owner: int = 1
    group: int = 2
    mode: int = 0o640
    #: What the file system makes of the mode, where it keeps none.
    shown: Optional[int] = None
    flash: bool = False
    #: Whether the disk has a cache that a power cut empties.
    cache: bool = True
    #: False: known to lose what was acknowledged, and documented; counted, and no failure.
    promised: bool = True


def _block(name: str, kind: str, make: str, options: str = "", check: str = "", **more: object) -> Store:
    extra = f",{options}" if options else ""
    return Store(
        name,
        make=make,
        mount=f"mount -t {kind} -o rw{extra} /dev/vdb /data",
        look=f"mount -t {kind} -o ro{extra} /dev/vdb /data",
        check=check,
        **more,  # type: ignore[arg-type]
    )


def _overlay(name: str, below: Store) -> Store:
    """An overlay whose upper layer is `below`, as images with a read-only root have it."""
    lower = "/run/lower"
    return Store(
        name,
        make=f"{below.make}; {below.mount}; mkdir /data/upper /data/work; umount /data",
        attach=below.attach,
        mount=f"mkdir -p {lower}; {below.mount.replace('/data', '/store')}; mount -t overlay"
        f" -o lowerdir={lower},upperdir=/store/upper,workdir=/store/work overlay /data",
        lower=lower,
        check=below.check,
        unmount="umount /data; umount /store",
        flash=below.flash,
    )


def _unjournaled(name: str, kind: str, make: str) -> tuple[Store, Store]:
    """On a disk without a cache, and on one with: there, the kernel doesn't flush at the end of each fsync(2), see
    ext4_fsync_nojournal() in its fs/ext4/fsync.c.
    """
    # -p leaves to a person what a power cut does to these.
    plain = _block(name, kind, make, check="e2fsck -y /dev/vdb", cache=False)
    return plain, replace(plain, name=f"{name}, disk with a volatile cache", cache=True, promised=False)


def _fat(name: str, make: str, check: str, options: str = "fmask=0177,dmask=0077", **more: object) -> Store:
    """One that keeps no owners and modes: all files have those of the mount options."""
    kind = name.split(",")[0]
    return _block(name, kind, make, options, check, owner=0, group=0, mode=0o600, **more)


#: FAT doesn't make folders at once, see `docs/device-makers.md`: so the image has made it.
_FOLDER = "mkfs.vfat /dev/vdb; mount -t vfat /dev/vdb /data; mkdir /data/caramel; umount /data"

#: The key file's slot and its draft's stand in different sectors, and the draft's comes first.
_CROWDED = """
    mkfs.vfat /dev/vdb; mount -t vfat /dev/vdb /data; mkdir /data/caramel; cd /data/caramel
    for name in a b c d e f g h i j k l m n; do touch other-$name; done
    touch identity.pem; rm other-a other-b; cd /; umount /data
"""

_VFAT_CHECK = "fsck.vfat -a /dev/vdb"

_FILES = "rm -f /data/caramel/identity.pem /data/caramel/.identity.pem.*"

_EXT4 = _block("ext4", "ext4", "mkfs.ext4 -q -F /dev/vdb", check="e2fsck -p /dev/vdb")
_UBIFS = Store(
    "UBIFS",
    attach=f"{_FLASH}; modprobe ubi",
    make="ubiformat -q -y /dev/mtd0; ubiattach -m 0 >/dev/null; ubimkvol /dev/ubi0 -N data -m >/dev/null",
    mount="[ -e /dev/ubi0 ] || ubiattach -m 0 >/dev/null; mount -t ubifs ubi0:data /data",
    look="[ -e /dev/ubi0 ] || ubiattach -m 0 >/dev/null; mount -t ubifs -o ro ubi0:data /data",
    flash=True,
)

STORES: dict[str, Store] = {
    store.name: store
    for store in (
        _EXT4,
        *_unjournaled("ext4 without journal", "ext4", "mkfs.ext4 -q -F -O ^has_journal /dev/vdb"),
        *_unjournaled("ext2", "ext2", "mkfs.ext2 -q -F /dev/vdb"),
        _block("f2fs", "f2fs", "mkfs.f2fs -q -f /dev/vdb", check="fsck.f2fs -a /dev/vdb"),
        _block("btrfs", "btrfs", "mkfs.btrfs -q -f --mixed /dev/vdb"),
        _fat("vfat", _FOLDER, _VFAT_CHECK, empty=_FILES),
        _fat("vfat, default options", _FOLDER, _VFAT_CHECK, "", empty=_FILES, shown=0o755),
        _fat("vfat, full folder", _CROWDED, _VFAT_CHECK, empty=""),
        _fat("vfat, folder made by the first run", "mkfs.vfat /dev/vdb", _VFAT_CHECK, promised=False),
        _fat("exfat", "mkfs.exfat /dev/vdb", "fsck.exfat -p /dev/vdb"),
        _overlay("overlay on ext4", _EXT4),
        _UBIFS,
        Store(
            "JFFS2",
            attach=_FLASH,
            make="flash_erase -q /dev/mtd0 0 0",
            mount="mount -t jffs2 mtd0 /data",
            look="mount -t jffs2 -o ro mtd0 /data",
            flash=True,
        ),
        _overlay("overlay on UBIFS", _UBIFS),
    )
}

#: What is tried where time is short: the one that lost keys, and the one that most have.
SHORT = ("vfat", "ext4")
