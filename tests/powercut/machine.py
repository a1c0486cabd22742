"""The machine whose power is cut: QEMU without KVM, started from a snapshot of a system that has just booted.

Booting takes many seconds, restoring one. So the guest boots once for each version of the program, stops before
anything of the disk is mounted, and its memory goes to a file (live migration); each cut begins from there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import queue
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Optional

from world import die_with_parent

HERE = Path(__file__).resolve().parent

#: Bytes of the disk, as many as mkfs.btrfs and mkfs.f2fs want, and of the flash memory (flash.c).
DISK = 128 << 20
FLASH = 8 << 20

#: Seconds that anything may take which isn't a load; generous, because machines are shared.
PATIENCE = 120.0

_KERNEL_LINE = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=1 tsc=unstable rdinit=/init"


class Failed(Exception):
    """The guest or QEMU did not do what it was told."""


class Machine:
    """One QEMU: from `booted` or `restored` until `cut` or `off`. `hardware`: what else it has, as QEMU's options."""

    def __init__(self, kernel: Path, initrd: Path, *hardware: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="powercut-")
        monitor = Path(self._folder.name) / "monitor"
        command = [
            "nice", "-n", "10", "qemu-system-x86_64", "-nodefaults", "-nographic", "-no-reboot",
            "-serial", "stdio", "-qmp", f"unix:{monitor},server=on,wait=off",
            "-kernel", str(kernel), "-initrd", str(initrd), "-append", _KERNEL_LINE,
            "-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-rng-pci",
            *hardware,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._folder.name,
            preexec_fn=die_with_parent,
        )
        self._events: queue.Queue[Optional[dict[str, Any]]] = queue.Queue()
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._monitor = _Monitor(monitor)

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                event = json.loads(line)
                if not isinstance(event, dict):
                    raise ValueError
            except ValueError:
                self.log.append(line.decode(errors="replace").rstrip())  # the kernel's, or QEMU's
            else:
                self._events.put(event)
        self._events.put(None)

    # --- Start and end

    @classmethod
    def booted(cls, kernel: Path, initrd: Path, *hardware: str) -> Machine:
        """A machine that has booted and waits for orders."""
        machine = cls(kernel, initrd, *hardware)
        try:
            machine.event("ready")
        except Failed:
            machine.cut()
            raise
        return machine

    @classmethod
    def restored(cls, guest: Path, disk: Path, flash: Path) -> Machine:
        """A machine that goes on where the snapshot was taken."""
        machine = cls(*_parts(guest, disk, flash), "-incoming", "defer")
        try:
            machine._monitor.migration()
            machine._monitor.do("migrate-incoming", uri=f"exec:cat {shlex.quote(str(guest / 'snapshot'))}")
            machine._monitor.migrated()
            machine._monitor.do("cont")
        except Failed as error:
            machine.cut()
            raise Failed(f"{error}; {machine.log[-5:]}") from None
        return machine

    def save(self, snapshot: Path) -> None:
        """Stops, and writes the snapshot."""
        self._monitor.do("stop")
        self._monitor.migration()
        self._monitor.do("migrate", uri=f"exec:cat >{shlex.quote(str(snapshot))}")
        self._monitor.migrated()

    def cut(self) -> list[dict[str, Any]]:
        """The power goes, at once. What the guest had said by then and nobody has read yet."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._monitor.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()
        self._folder.cleanup()
        rest: list[dict[str, Any]] = []
        while True:
            event = self._events.get()
            if event is None:
                return rest
            rest.append(event)

    def off(self) -> None:
        """The system is shut down, as by somebody who says so: the kernel tells its devices."""
        self.order("shell", script="sync; busybox poweroff -f")
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"it doesn't go off: {self.log[-5:]}") from None
        finally:
            self.cut()

    # --- Orders

    def order(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed(f"the machine is off: {self.log[-5:]}") from None

    def event(self, kind: str, others: Optional[list[dict[str, Any]]] = None, seconds: float = PATIENCE) -> Any:
        """The next event of this kind; `others` get what comes before. Raises `Failed`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise Failed(f"no {kind} in {seconds:g} s: {self.log[-5:]}") from None
            if event is None:
                self._events.put(None)
                raise Failed(f"the machine went off by itself: {self.log[-5:]}")
            if kind in event:
                return event[kind]
            if others is None or "failed" in event:
                raise Failed(f"{event} where {kind} was expected; {self.log[-5:]}")
            others.append(event)

    def done(self, do: str, others: Optional[list[dict[str, Any]]] = None, **arguments: Any) -> Any:
        """Gives an order and waits for its result. Raises `Failed`."""
        self.order(do, **arguments)
        return self.event("done", others)

    def shell(self, script: str) -> tuple[int, str]:
        """Runs a script; its exit status and output."""
        status, output = self.done("shell", script=script)
        return int(status), str(output)

    def wake(self) -> None:
        """Gives it the time, and randomness of its own."""
        self.done("now", seconds=time.time(), seed=base64.b64encode(os.urandom(48)).decode())


class _Monitor:
    """QEMU's machine protocol (QMP)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise Failed("QEMU doesn't start") from None
                time.sleep(0.01)
        self._socket.settimeout(PATIENCE)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self.do("qmp_capabilities")

    def do(self, execute: str, **arguments: Any) -> Any:
        line: Optional[bytes] = None
        while True:
            try:
                if line is None:
                    self._socket.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
                line = self._lines.readline()
            except OSError:
                line = b""
            if not line:
                raise Failed(f"QEMU went away at {execute}")
            answer = json.loads(line)
            if "error" in answer:
                raise Failed(f"{execute}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def migration(self) -> None:
        """The flash stays in its file."""
        self.do("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        self.do("migrate-set-parameters", **{"max-bandwidth": 8 << 30})

    def migrated(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            status = self.do("query-migrate").get("status")
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                break
            time.sleep(0.02)
        raise Failed("the snapshot can't be saved or restored")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def _parts(guest: Path, disk: Path, flash: Path) -> tuple[Any, ...]:
    """What a machine with this disk and this flash memory consists of."""
    return (
        guest / "vmlinuz", guest / "start.img",
        "-machine", "q35,accel=tcg,nvdimm=on", "-cpu", "max", "-smp", "1", "-m", "448M,slots=1,maxmem=1G",
        "-drive", f"if=virtio,format=raw,readonly=on,file={guest / 'root.img'}",
        "-drive", f"if=virtio,format=raw,cache=writeback,file=nbd:unix:{disk}",
        # Memory that a file of the host backs outlives the machine: the guest takes it for flash.
        "-object", f"memory-backend-file,id=flash,share=on,mem-path={flash},size={FLASH}",
        "-device", "nvdimm,memdev=flash",
    )  # fmt: skip


def prepared(build: Path, program: Path, disk: Path, flash: Path) -> Path:
    """The folder of a guest that has this program and a snapshot; made where it isn't there. Raises `Failed`."""
    guest = build / "guest"
    if subprocess.run([str(HERE / "guest.sh"), str(guest)], stdin=subprocess.DEVNULL).returncode:
        raise Failed("there is no guest")
    sources = sorted((program / "caramel_embedded").glob("*.py"))
    sources += [program / "packaging" / "starter" / "caramel-embedded", HERE / "load.py"]
    parts = [
        (guest / "complete").read_bytes(),
        (HERE / "machine.py").read_bytes(),
        *(each.read_bytes() for each in sources),
    ]
    recipe = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    place = build / "program"
    if (place / "complete").exists() and (place / "complete").read_text() == recipe:
        return place
    shutil.rmtree(place, ignore_errors=True)
    (place / "tree" / "program" / "caramel_embedded").mkdir(parents=True)
    for source in sources:
        package = source.parent.name == "caramel_embedded"
        shutil.copy(source, place / "tree" / "program" / ("caramel_embedded" if package else ""))
    # An initial RAM file system may be several archives in a row.
    archive = subprocess.run(
        "find program | cpio --quiet -o -H newc", shell=True, cwd=place / "tree", stdout=subprocess.PIPE, check=True
    ).stdout
    first = (guest / "initrd.img").read_bytes()
    (place / "start.img").write_bytes(first + b"\0" * (-len(first) % 512) + archive)
    for name in ("vmlinuz", "root.img"):
        os.link(guest / name, place / name)
    machine = Machine.booted(*_parts(place, disk, flash))
    try:
        machine.save(place / "snapshot")
    finally:
        machine.cut()
    (place / "complete").write_text(recipe)
    return place
