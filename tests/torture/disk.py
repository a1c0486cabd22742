"""Power cuts that also lose what was not flushed: every state that the disk could be in, from the trace of a run.

A kill leaves behind what the kernel has; a power cut only what has reached the disk. POSIX promises of that: a
file's bytes and owner after fsync(2) on it, a name after fsync(2) on the folder that it is in, in no order before
that. So the system calls of a traced run are replayed on a model of such a disk, and after each one everything that
could be found at the key file's path after a power cut is looked at: the last name that was flushed, and each one
since.

A disk with FAT promises less. Where a file's content begins and how long it is stands in its name's slot in the
folder, and the kernel writes a renamed file's new slot for the file, not for the folder: it has its content only
after another fsync(2) on the *file* (vfat_rename() and fat_write_inode() of Linux). Until the folder is flushed, the
old slot may be there as well; then two files share one content, and fsck.fat -a empties one of them. So the folder
comes first, then the file. `make powercut` looks at real ones.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Optional

from torture.fleet import DeviceUnderTest, Fleet, key_file_parts
from torture.report import Case

_LINE = re.compile(r"^(\d+) +([a-z0-9_]+)\((.*)\) += +(-?\d+)")
# A path, after the folder that it is relative to where the call has one, as strace -y shows it: 7</folder>, "name"
_PATH = re.compile(r'(?:\d+<([^<>]*)>, )?"((?:[^"\\]|\\.)*)"')


@dataclass
class _Inode:
    """A file or folder: what was written to it, and how much of that is on the disk."""

    what: str
    written: int = 0
    durable: int = 0
    dirty: bool = False  # owner, mode or time set and not flushed
    handed_over: bool = True  # nothing of owner and mode was set after the first byte
    folder: bool = False
    #: On FAT: the slot of its newest name says where its content is; that of the name before may do so, too.
    slot: bool = True
    old_slot: bool = False
    #: For folders: their own name is on the disk, and so is that of every folder above.
    reachable: bool = True

    @property
    def on_disk(self) -> bool:
        return self.durable == self.written and not self.dirty


@dataclass
class Disk:
    """The folder of one key file as the kernel sees it, and what a power cut could leave of it."""

    key_file: str
    old: Optional[_Inode]
    states: int = 0
    wrong: list[str] = field(default_factory=list)
    fat: bool = False

    def __post_init__(self) -> None:
        self._names: dict[str, Optional[_Inode]] = {self.key_file: self.old}
        self._flushed: Optional[_Inode] = self.old
        self._pending: list[Optional[_Inode]] = []
        self._fds: dict[int, _Inode] = {}
        self._folder = os.path.dirname(self.key_file)
        self._unreachable: set[str] = set()
        self.flushes: list[str] = []

    def _bind(self, path: str, inode: Optional[_Inode]) -> None:
        self._names[path] = inode
        if path == self.key_file:
            self._pending.append(inode)

    def replay(self, call: str, rest: str, result: int) -> None:
        """One successful system call of the main thread."""
        paths = [os.path.normpath(os.path.join(*each)) for each in _PATH.findall(rest)]
        number = re.match(r"\d+", rest)
        inode = self._fds.get(int(number[0])) if number else None
        if call in ("open", "openat", "creat") and paths:
            self._fds[result] = self._opened(paths[0], rest)
        elif call == "close" and number:
            self._fds.pop(int(number[0]), None)
        elif call in ("write", "pwrite64", "writev") and inode:
            inode.written += result
        elif call in ("ftruncate", "truncate") and inode:
            self.wrong.append("a file is cut")
        elif call in ("fchown", "fchmod", "utimensat", "futimens") and inode:
            inode.dirty = True
            inode.handed_over = inode.handed_over and (call.startswith("ut") or not inode.written)
        elif call in ("chown", "chmod", "lchown", "fchownat", "fchmodat") and paths and self._mine(paths[0]):
            self.wrong.append("owner or mode is set by name")
        elif call in ("fsync", "fdatasync") and inode:
            self._flush(inode)
        elif call in ("rename", "renameat", "renameat2") and self._mine(paths[-1]):
            renamed = self._names.get(paths[0])
            if renamed is not None:
                renamed.slot, renamed.old_slot = False, True
            self._bind(paths[-1], renamed)
            self._bind(paths[0], None)
        elif call in ("link", "linkat") and self._mine(paths[-1]):
            self._bind(paths[-1], self._names.get(paths[0]))
        elif call in ("unlink", "unlinkat") and self._mine(paths[-1]):
            self._bind(paths[-1], None)
        elif call in ("mkdir", "mkdirat") and self._folder.startswith(paths[-1]):
            self._unreachable.add(paths[-1])
        elif call in ("sendto", "sendmsg") or (call == "write" and "socket:" in rest):
            self._told("the network was told")
        self._look(call)

    def _mine(self, path: str) -> bool:
        return os.path.dirname(path) == self._folder

    def _opened(self, path: str, rest: str) -> _Inode:
        if "O_DIRECTORY" in rest:
            return _Inode(path, folder=True)
        if "O_TRUNC" in rest and self._names.get(path):
            self.wrong.append(f"{os.path.basename(path)} is written in place")
        known = self._names.get(path)
        if known is None:
            known = _Inode(path)
            if "O_CREAT" in rest and self._mine(path):
                self._bind(path, known)
        return known

    def _flush(self, inode: _Inode) -> None:
        self.flushes.append("folder" if inode.folder else "file")
        if not inode.folder:
            inode.durable, inode.dirty, inode.slot = inode.written, False, True
            if self.fat and inode.old_slot:
                self.wrong.append("two slots could have the same content, of which fsck empties one")
            return
        self._unreachable = {path for path in self._unreachable if os.path.dirname(path) != inode.what}
        if inode.what != self._folder:
            return
        for named in self._names.values():
            if named is not None:
                named.old_slot = False
        if self._pending:
            self._flushed, self._pending = self._pending[-1], []

    def _look(self, call: str) -> None:
        """What could be at the path if the power went now."""
        for found in [self._flushed, *self._pending]:
            self.states += 1
            if found is self.old or (found is None and self.old is None):
                continue
            if found is None:
                self.wrong.append(f"after {call}: the old content could be gone")
            elif found.written and found.durable != found.written:
                self.wrong.append(f"after {call}: the name could be there before the content")
            elif found.dirty and found.written:
                self.wrong.append(f"after {call}: the name could be there before its owner, mode or time")
            elif not found.written and self.old is not None:
                self.wrong.append(f"after {call}: an empty file could be in the old one's place")
            elif not found.handed_over:
                self.wrong.append(f"after {call}: owner or mode came after the first byte")

    def _told(self, whom: str) -> None:
        if any(found is not None and found.written for found in self._pending):
            self.wrong.append(f"{whom} before the folder was flushed")
        if self.fat and any(named is not None and not named.slot for named in self._names.values()):
            self.wrong.append(f"{whom} before a renamed file's slot was flushed")
        if self._unreachable and self._names.get(self.key_file) is not None:
            self.wrong.append(f"{whom} before the new folders' names were flushed")

    def end(self) -> None:
        """The run has said how it went: from now on nothing may be lost."""
        self._told("the caller was told")


def replayed(dut: DeviceUnderTest, trace: str, fat: bool = False) -> Disk:
    """What the traced run would have done to a disk that keeps only what was flushed; `fat`: to one with FAT."""
    old = _Inode("old", written=len(dut.old), durable=len(dut.old)) if dut.old is not None else None
    disk = Disk(str(dut.device.key_file), old, fat=fat)
    main = trace.split(None, 1)[0]
    for line in trace.splitlines():
        match = _LINE.match(line)
        if match and match[1] == main and int(match[4]) >= 0:
            disk.replay(match[2], match[3], int(match[4]))
    disk.end()
    return disk


def cases(fleet: Fleet, states: Optional[dict[str, int]] = None) -> list[Case]:
    """One for each scenario; `states` gets the number of states that were looked at."""

    def case(scenario: str) -> Case:
        def act() -> list[str]:
            from torture import power

            dut = fleet.scenarios[scenario]()
            run, trace = power.traced(dut)
            disk, fat = replayed(dut, trace), replayed(dut, trace, fat=True)
            wrong = list(dict.fromkeys([*disk.wrong, *(f"on FAT: {each}" for each in fat.wrong)]))
            if run.status != dut.status or key_file_parts(dut.content or b"") is None:
                wrong.append(f"the undisturbed run: {run}")
            if "file" not in disk.flushes or "folder" not in disk.flushes:
                wrong.append(f"flushed was only {disk.flushes}")
            if states is not None:
                states[scenario] = disk.states + fat.states
            if not wrong:
                fleet.forget(dut)
            return wrong

        return Case(f"{scenario}: what is on the disk", act)

    return [case(scenario) for scenario in fleet.scenarios]
