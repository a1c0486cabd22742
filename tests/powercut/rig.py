"""A disk and a flash memory that outlive their machine, and the power switch between them."""

from __future__ import annotations

import mmap
import random
import time
from pathlib import Path
from typing import Any, Optional

from powercut import volatile
from powercut.machine import DISK, FLASH, Failed, Machine
from powercut.stores import Store
from powercut.verdict import File


class Rig:
    """A disk and a flash memory, and one machine after the other that has them."""

    def __init__(self, guest: Path, folder: Path, store: Store, chance: random.Random) -> None:
        self.guest, self.store, self.chance = guest, store, chance
        self.disk = volatile.Disk(DISK)
        self.flash = folder / "flash"
        self.flash.write_bytes(b"\xff" * FLASH)
        self._server = volatile.Server(folder / "disk", self.disk)
        self.machine: Optional[Machine] = None
        #: Cuts after which the kernel would mount it only once it had been checked.
        self.unmountable = 0

    def start(self) -> Machine:
        """The power comes."""
        self._server.expect()
        self.machine = Machine.restored(self.guest, self._server.path, self.flash)
        self.machine.wake()
        self.do(self.store.attach)
        return self.machine

    def do(self, script: str) -> str:
        """Runs a script that has to succeed. Raises `Failed`."""
        assert self.machine
        status, output = self.machine.shell(script) if script else (0, "")
        if status:
            raise Failed(f"{self.store.name}: {script!r} ends with {status}: {output}")
        return output

    def make(self) -> None:
        """A new, empty file system."""
        self.start()
        self.do(self.store.make)
        # An empty UBIFS volume gets its file system from the first mount, which therefore has to be one for writing.
        self.do(f"{self.store.mount}; {self.store.unmount}; sync")
        self.disk.flush()  # unmounting doesn't
        self.cut()

    def cut(self) -> tuple[list[dict[str, Any]], str]:
        """The power goes. What the machine had said and nobody has read, and what it cost, for a person."""
        if self.machine is None:
            return [], ""
        said = self.machine.cut()
        self.machine = None
        self._server.settle()
        if self.store.flash:
            return said, ""
        survives = self.chance.choice(volatile.CUTS) if self.store.cache else "all"
        sectors = self.disk.cut(self.chance, survives)
        return said, f", {survives} of what was unflushed kept, {sectors} sectors lost"

    def written(self, seconds: float) -> None:
        """Waits until the guest has written something since the disk is watched, for at most so long."""
        if not self.store.flash:
            self.disk.wait(1, seconds)
            return
        deadline = time.monotonic() + seconds
        with open(self.flash, "rb") as file, mmap.mmap(file.fileno(), FLASH, prot=mmap.PROT_READ) as flash:
            before = flash[:]
            while flash[:] == before and time.monotonic() < deadline:
                time.sleep(0.01)

    def looked(self) -> list[list[File]]:
        """What is on the file system: as it is, and after what a system does at boot; it stays mounted.

        Where there is a check at boot, a kernel that refuses what it finds before that is counted, and no failure.
        """
        assert self.machine
        looks = []
        if self.store.look:
            status, output = self.machine.shell(self.store.look)
            if not status:
                looks.append(self.files())
                self.do(self.store.unmount)
            elif self.store.check:
                self.unmountable += 1
            else:
                raise Failed(f"{self.store.look} ends with {status}: {output}")
        if self.store.check:
            status, output = self.machine.shell(self.store.check)
            if status > 1:
                raise Failed(f"{self.store.check} ends with {status}: {output}")
        self.do(self.store.mount)
        looks.append(self.files())
        return looks

    def files(self) -> list[File]:
        assert self.machine
        return [File.told(told) for told in self.machine.done("look", folder="/data")]

    def tidy(self, files: list[File]) -> None:
        """Removes what the file system's check has saved."""
        if files:
            names = " ".join(f"'{file.path}'" for file in files)
            self.do(f"cd /data; rm -f {names}; sync -f /data")

    def close(self) -> None:
        if self.machine:
            self.machine.cut()
            self._server.settle()
        self._server.close()
