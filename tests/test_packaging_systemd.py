"""The units of packaging/systemd/: what systemd's own tools say of them, and what a real systemd does with them.

The second part boots this machine's systemd as process 1 of a container that shares nothing with the machine but
/usr and the network (systemd-nspawn(1), --volatile). Caramel, nginx and the program are real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from needs import needs
from world import ROOT, Authority, Caramel, Front, environment, until

PATIENCE = 60.0


def make(*words: str) -> None:
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "-f", "packaging/packaging.mk", *words],
        capture_output=True,
        text=True,
        env={"PATH": environment()["PATH"]},  # and no coverage
    )
    assert done.returncode == 0, done.stderr


@needs("systemd")
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    root = tmp_path / "root"
    make("install-systemd", f"DESTDIR={root}", "PREFIX=/usr")
    program = root / "usr/bin/caramel-embedded"
    program.parent.mkdir()
    for path in (program, root / "bin/sh"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/true\n")
        path.chmod(0o755)
    folder = root / "usr/lib/systemd/system"
    # What the units refer to, and a unit that waits by the drop-in.
    for name in ("network-online.target", "timers.target", "sysinit.target", "shutdown.target", "basic.target"):
        (folder / name).write_text("[Unit]\nDescription=stub\n")
    drop_in = root / "usr/share/doc/caramel-embedded/examples/needs-certificate.conf"
    (folder / "needs.service.d").mkdir()
    shutil.copy(drop_in, folder / "needs.service.d")
    (folder / "needs.service").write_text("[Service]\nExecStart=/usr/bin/caramel-embedded\n")
    names = sorted(path.name for path in folder.glob("caramel-embedded*") if path.is_file())
    names = [name.replace("@.", "@web.") for name in names]
    assert len(names) == 7
    names.append("needs.service")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={root}", *names],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs("systemd")
def test_an_instance_is_confined() -> None:
    """systemd-analyze's exposure level: 10 is everything open, ours is 1.3."""
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=yes",
            "--threshold=15",
            str(ROOT / "packaging/systemd/caramel-embedded@.service"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr


class Machine:
    """A systemd, booted with our units; `control` is a folder that both sides see."""

    def __init__(self, folder: Path, server: Front, ca: Path) -> None:
        self.control = folder / "control"
        self.control.mkdir()
        self.system = folder / "system"
        self.opt = folder / "opt"
        self.state = folder / "state"
        self.state.mkdir()
        self.log = folder / "boot.log"
        make("install-systemd", f"DESTDIR={folder / 'made'}", "PREFIX=/opt", "UNITDIR=/system")
        shutil.copytree(folder / "made/opt", self.opt)
        shutil.copytree(folder / "made/system", self.system)
        make(
            "zipapp", "PYTHON=/usr/bin/python3", f"SERVER={server.address}", f"CA_CERT={ca}",
            f"OUT={self.opt}/bin/caramel-embedded",
        )  # fmt: skip
        # Nothing of the machine's own services, and a faster pace.
        for name in ("systemd-firstboot.service", "systemd-networkd-wait-online.service", "console-getty.service"):
            (self.system / name).symlink_to("/dev/null")
        for name in ("caramel-embedded", "caramel-embedded@"):
            self.unit(f"{name}.service.d/pace.conf", "[Service]\nEnvironment=RETRY_FIRST=1 RETRY_MAX=1\n")
        self.unit("caramel-embedded-boot.timer.d/pace.conf", "[Timer]\nRandomizedDelaySec=0\n")
        self.unit("boot.target", "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n")

    def unit(self, name: str, text: str) -> None:
        path = self.system / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def wants(self, name: str) -> None:
        folder = self.system / "boot.target.wants"
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to(f"../{name}")

    def inside(self, *command: str) -> str:
        """Runs a command inside by way of the shell that the container's agent.service is."""
        number = len(list(self.control.glob("*.sh")))
        script = self.control / f"{number}.sh"
        draft = script.with_suffix(".draft")
        draft.write_text(" ".join(f"'{word}'" for word in command) + f" >/control/{number}.out 2>&1\n")
        draft.rename(script)
        done = self.control / f"{number}.done"
        until(f"{command} has run", done.exists, PATIENCE)
        return (self.control / f"{number}.out").read_text().strip()

    def state_of(self, unit: str) -> str:
        return self.inside("systemctl", "show", "--property=ActiveState", "--value", unit)

    @contextmanager
    def booted(self) -> Iterator[None]:
        self.unit(
            "agent.service",
            "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sh /control/agent\n",
        )
        (self.control / "agent").write_text(
            "n=0\nwhile :; do\n"
            "  if [ -e /control/$n.sh ]; then sh /control/$n.sh; : >/control/$n.done; n=$((n + 1)); fi\n"
            "  sleep 0.1\ndone\n"
        )
        self.wants("agent.service")
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [
                    "systemd-nspawn", "--quiet", "--directory=/", "--volatile=yes", "--register=no", "--keep-unit",
                    "--settings=no", "--link-journal=no", "--resolv-conf=bind-host", "--boot", "--console=pipe",
                    f"--machine=caramel-{os.getpid()}",
                    f"--bind={self.control}:/control", f"--bind-ro={self.opt}:/opt",
                    f"--bind-ro={self.system}:/etc/systemd/system", f"--bind={self.state}:/var/lib",
                    "--bind-ro=/etc/hosts", "--bind-ro=/etc/nsswitch.conf", "systemd.unit=boot.target",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        try:
            try:
                assert self.inside("echo", "up") == "up"
                yield
            except BaseException:
                print(self.log.read_text(errors="replace")[-3000:])
                print(self.inside("journalctl", "--no-pager", "-u", "caramel-embedded*")[-3000:])
                raise
        finally:
            # The first SIGTERM asks systemd for an orderly end, the second one doesn't ask.

            def ended() -> bool:
                process.terminate()
                return process.poll() is not None

            until("systemd-nspawn has ended", ended, PATIENCE, 0.3)


@pytest.fixture
def machine(tmp_path: Path, front: Front, authority: Authority) -> Machine:
    return Machine(tmp_path, front, authority.certificate_file)


@needs("nspawn")
def test_a_unit_that_needs_the_certificate_waits(machine: Machine, caramel: Caramel) -> None:
    client_id = "systemd-device"
    machine.unit("caramel-embedded.service.d/id.conf", f"[Service]\nEnvironment=CARAMEL_CN={client_id}\n")
    machine.unit("caramel-embedded-certificate.service.d/id.conf", f"[Service]\nEnvironment=CARAMEL_CN={client_id}\n")
    machine.unit("needs.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    machine.unit(
        "needs.service.d/needs-certificate.conf",
        (ROOT / "packaging/systemd/examples/needs-certificate.conf").read_text(),
    )
    machine.wants("needs.service")
    machine.wants("caramel-embedded-boot.timer")
    machine.wants("caramel-embedded.timer")
    with machine.booted():
        until("the server has the request", lambda: caramel.requests(client_id), PATIENCE)
        assert machine.state_of("caramel-embedded.service") == "activating"
        assert machine.state_of("caramel-embedded-certificate.service") == "activating"
        assert machine.state_of("needs.service") == "inactive"
        assert machine.inside("systemctl", "list-units", "--failed", "--no-legend", "caramel*", "needs*") == ""
        assert len(caramel.requests(client_id)) == 1

        caramel.sign(client_id)
        until("the waiting unit starts", lambda: machine.state_of("needs.service") == "active", PATIENCE)
        assert machine.state_of("caramel-embedded-certificate.service") == "active"
        until("the check is over", lambda: machine.state_of("caramel-embedded.service") == "inactive", PATIENCE)


@needs("nspawn")
def test_with_a_stored_certificate_nobody_waits_for_the_network(
    machine: Machine, caramel: Caramel, front: Front
) -> None:
    client_id = "systemd-offline"
    identity = caramel.authority.identity(client_id)
    (machine.state / "caramel").mkdir()
    key_file = machine.state / "caramel/identity.pem"
    key_file.write_bytes(identity)
    key_file.chmod(0o600)
    conf = f"[Service]\nEnvironment=CARAMEL_CN={client_id} CARAMEL_CA=localhost:1\n"
    for name in ("caramel-embedded", "caramel-embedded-certificate"):
        machine.unit(f"{name}.service.d/offline.conf", conf)
    machine.unit("needs.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    machine.unit(
        "needs.service.d/needs-certificate.conf",
        (ROOT / "packaging/systemd/examples/needs-certificate.conf").read_text(),
    )
    machine.wants("needs.service")
    machine.wants("caramel-embedded-boot.timer")
    with machine.booted():
        until("the unit starts", lambda: machine.state_of("needs.service") == "active", PATIENCE)
        until("the check is at it", lambda: machine.state_of("caramel-embedded.service") == "activating", PATIENCE)
        assert machine.state_of("needs.service") == "active"


@needs("nspawn")
def test_an_instance_has_its_own_user_and_works_confined(machine: Machine, caramel: Caramel) -> None:
    client_id = "web"
    with machine.booted():
        machine.inside("systemctl", "start", "--no-block", "caramel-embedded@web.service")
        until("the server has the request", lambda: caramel.requests(client_id), PATIENCE)
        assert machine.state_of("caramel-embedded@web.service") == "activating"
        machine.inside("systemctl", "start", "--no-block", "caramel-embedded-certificate@web.service")
        assert machine.state_of("caramel-embedded-certificate@web.service") == "activating"
        caramel.sign(client_id)
        gate = "caramel-embedded-certificate@web.service"
        until("it has the certificate", lambda: machine.state_of(gate) == "active", PATIENCE)
        assert machine.inside("stat", "-L", "-c", "%U %a", "/var/lib/caramel/web/identity.pem").endswith(" 600")
        owner = machine.inside("stat", "-L", "-c", "%u", "/var/lib/caramel/web/identity.pem")
        # The range of DynamicUser=, systemd.exec(5).
        assert 61184 <= int(owner) <= 65519
