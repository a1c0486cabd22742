# SPDX-License-Identifier: MIT OR Apache-2.0
"""What a key in a TPM costs an unchanged check, on a device of Debian 13: beside a key in the file, and one in the
file with OpenSSL's provider active. `make bench-keys` prints the table; docs/keys-in-hardware.md has its figures.

The TPM is swtpm, whose own time is not in the figures. Needs root.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import world
from world import Between, Device, Scripted, Tpm, answers

from bench.link import openssl
from bench.measure import Spawner

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "15"))


@dataclass
class Contender:
    """A device that has its certificate."""

    name: str
    device: Device
    wire: Between
    cpu: list[float]
    wall: list[float]
    commands: list[int]

    def check(self, spawner: Spawner) -> None:
        """One unchanged check. Raises AssertionError if it isn't one."""
        kept = self.device.snapshot()
        self.wire.commands.clear()
        # The spawner is in the tree already.
        line = self.device.arguments()[len(self.device.command) - 1 :]
        environment: Mapping[str, str] = world.environment(**self.wire.env)
        status, wall, cpu, _ = spawner.run(line, environment, self.device.folder)
        assert status == 0, spawner.output.read_text()
        assert self.device.snapshot() == kept
        self.cpu.append(cpu)
        self.wall.append(wall)
        self.commands.append(sum(self.wire.commands.values()))
        self.wire.chip.tidy()


def contenders(
    folder: Path, authority: world.Authority, nginx: world.Nginx, wire: Between, kind: str
) -> list[Contender]:
    """Three devices with keys of a kind."""
    made: list[Contender] = []
    for name in ("the key in the file", "the key in the file, the provider active", "the key in the TPM"):
        device = Device(folder / kind / str(len(made)), "", authority.certificate_file, "fffbeec0ffee")
        world.keys_in(wire.chip, device, kind)
        device.surroundings = wire.env
        assert device.config
        lines = device.config.read_text().splitlines(keepends=True)
        kept = ("CARAMEL_KEY_TYPE", "CARAMEL_OPENSSL_CONF", "CARAMEL_KEY_COMMAND")[: len(made) + 1]
        device.config.write_text("".join(line for line in lines if line.startswith(kept)))
        with Scripted(authority.server(), [answers.UNKNOWN, answers.PENDING, answers.PENDING]) as server:
            device.server = server.address
            run = device.run()
            assert run.status == 69, run
        assert (wire.chip.label in device.labels) is (len(made) == 2)
        device.server = nginx.address
        nginx.publish(device.request_hash(), authority.sign(device.request), world.now())
        for _ in range(2):  # it is stored, and the file has its time
            run = device.run()
            assert run.status == 0, run
            wire.chip.tidy()
        made.append(Contender(name, device, wire, [], [], []))
    return made


def main() -> None:
    """Prints the table."""
    tree = world.in_tree(world.trixie())
    print(f"OpenSSL {openssl(tree, '/usr/bin/python3')}, {ROUNDS} rounds\n")
    print("| key | | processor time | time | commands to the TPM |\n| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        authority = world.Authority(folder / "authority")
        wire = stack.enter_context(Between(stack.enter_context(Tpm(folder / "tpm"))))
        (folder / "static").mkdir()
        nginx = world.Nginx(
            *(folder / "nginx", None, authority.server()),
            client_ca=authority.certificate_file,
            static=folder / "static",
        )
        stack.enter_context(nginx)
        spawner = Spawner(folder, [*tree, "/usr/bin/python3"])
        stack.callback(spawner.close)
        for kind in ("ec-p256", "rsa-2048"):
            several = contenders(folder, authority, nginx, wire, kind)
            for _ in range(ROUNDS + 1):
                for each in several:
                    each.check(spawner)
            floor = several[0]
            for each in several:
                # The first round warms up. Ratios within a round: what else the machine does changes slowly.
                cpu = [one / other for one, other in zip(each.cpu[1:], floor.cpu[1:])]
                wall = [one / other for one, other in zip(each.wall[1:], floor.wall[1:])]
                commands = " or ".join(map(str, sorted(set(each.commands[1:]))))
                ratios = f"{statistics.median(cpu):.2f} | {statistics.median(wall):.2f}"
                print(f"| {kind} | {each.name} | {ratios} | {commands} |", flush=True)


if __name__ == "__main__":
    main()
