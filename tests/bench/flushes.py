# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the second flush of the key file costs: the program's own way to replace it, with that flush and without.

The file is flushed before it gets its name, then the folder is, and then the file once more, for the sake of FAT
(why stands in caramel_embedded/keyfile.py). Here it is measured what everybody else pays for it, on an ext4 of its
own, in a file of the folder:

    unshare --mount --propagation private python -m bench.flushes FOLDER ROUNDS

needs root, and prints JSON. The mount ends with the process, because it is in a name space of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from caramel_embedded.keyfile import Folder
from caramel_embedded.settings import Permissions

SIZE = 64 << 20  # bytes, of the file system
CONTENT = b"x" * 4600  # bytes; what a key file has
WITH, WITHOUT = "with", "without"


def replaced(folder: Folder, twice: bool) -> float:
    """Replaces the key file once; the seconds it took."""
    began = time.perf_counter()
    lock = folder.put(folder.name, CONTENT, None, Permissions(os.getuid(), os.getgid(), 0o600))
    folder.sync(lock.fd if twice else None)
    took = time.perf_counter() - began
    lock.drop()
    return took


def counters(device: str) -> list[int]:
    """Writes, sectors of 512 bytes written, and flushes that the device has seen so far (Linux, block/stat.rst)."""
    fields = Path("/sys/block", device, "stat").read_text().split()
    return [int(fields[4]), int(fields[6]), int(fields[15]) if len(fields) > 15 else 0]


def measured(folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of one replacement, and what reached the disk for it, with and without the second flush."""
    image, mounted = folder / "ext4.img", folder / "ext4"
    with open(image, "wb") as file:
        file.truncate(SIZE)
    mounted.mkdir()
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True, stdout=subprocess.DEVNULL)
    # `loop`: the device goes with the mount.
    subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True)
    try:
        return turns(Folder(str(mounted / "identity.pem")), device_of(mounted), rounds)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


def device_of(mounted: Path) -> str:
    """The name of the block device behind a mount."""
    number = os.stat(mounted).st_dev
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name


def turns(folder: Folder, device: str, rounds: int) -> dict[str, Any]:
    """Both ways, one after the other, so that what else the disk does hits both."""
    times: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    reached: dict[str, list[list[int]]] = {WITH: [], WITHOUT: []}
    try:
        for turn in range(rounds + 1):
            for way in (WITH, WITHOUT) if turn % 2 else (WITHOUT, WITH):
                before = counters(device)
                took = replaced(folder, way == WITH)
                if turn:  # the first one finds nothing to replace
                    times[way].append(1000 * took)
                    reached[way].append([new - old for new, old in zip(counters(device), before)])
    finally:
        folder.close()
    seen = {
        way: {
            "ms": [round(value, 3) for value in statistics.quantiles(times[way], n=4, method="inclusive")],
            "writes": statistics.mean(one[0] for one in reached[way]),
            "kB": statistics.mean(one[1] for one in reached[way]) * 512 / 1000,
            "flushes": statistics.mean(one[2] for one in reached[way]),
        }
        for way in (WITH, WITHOUT)
    }
    return {"rounds": rounds, **seen}


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """The same in a process and a name space of its own; empty where this machine can't do it."""
    folder.mkdir()
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-Es", "-m", "bench.flushes"]
    done = subprocess.run(
        [*command, str(folder), str(rounds)],
        capture_output=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).resolve().parents[1],
    )
    if done.returncode:
        print(f"bench: no file system of its own: {done.stderr.decode().strip()[-300:]}", file=sys.stderr)
        return {}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    print(json.dumps(measured(Path(sys.argv[1]), int(sys.argv[2]))))


if __name__ == "__main__":
    main()
