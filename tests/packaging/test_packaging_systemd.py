"""The units of packaging/systemd/: what systemd's own tools say of them, and what a real systemd does with them.

The second part boots this machine's systemd as process 1 of a container that shares nothing with the machine but
/usr and the network (systemd-nspawn(1), --volatile). Caramel, nginx and the program are real. Most scenarios share
one boot: each has an instance of its own, and the first one has the device's own identity.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from needs import needs, slow
from world import (
    ROOT,
    Authority,
    Caramel,
    Daemon,
    Front,
    environment,
    free_port,
    until,
)

UNITS = ROOT / "packaging/systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
PATIENCE = 40.0

#: Whose systemd: this machine's, or that of a tree of another release (with Python and what the program needs).
TREE = os.environ.get("CARAMEL_TESTS_TREE", "/")


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
    program.write_text("#!/bin/true\n")
    program.chmod(0o755)
    folder = root / "usr/lib/systemd/system"
    # What the units refer to, and a unit that waits by the drop-in.
    for name in ("network-online.target", "timers.target", "sysinit.target", "shutdown.target", "basic.target"):
        (folder / name).write_text("[Unit]\nDescription=stub\n")
    examples = root / "usr/share/doc/caramel-embedded/examples"
    for unit, example in (
        ("needs.service", "needs-certificate"),
        ("caramel-embedded@alone.service", "instance-own-user"),
    ):
        (folder / f"{unit}.d").mkdir()
        shutil.copy(examples / f"{example}.conf", folder / f"{unit}.d")
    (folder / "needs.service").write_text("[Service]\nExecStart=/usr/bin/caramel-embedded\n")
    names = sorted(path.name for path in folder.glob("caramel-embedded*") if path.is_file())
    names = [name.replace("@.", "@web.") for name in names]
    assert len(names) == 7
    names += ["needs.service", "caramel-embedded@alone.service"]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={root}", *names],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs("systemd")
@pytest.mark.parametrize("name", [*SERVICES, "own user"])
def test_a_unit_has_what_it_needs_and_no_more(tmp_path: Path, name: str) -> None:
    """systemd-analyze's exposure level: 10 is everything open, 3 is where "OK" ends for most who ask."""
    path = tmp_path / "caramel-embedded@.service"
    if name == "own user":  # settings that come later win, as in a drop-in
        path.write_text(
            "".join((UNITS / part).read_text() for part in (path.name, "examples/instance-own-user.conf"))
        )
    else:
        path = UNITS / name
    most = 15 if name == "own user" else 29
    done = subprocess.run(
        ["systemd-analyze", "security", "--no-pager", "--offline=yes", f"--threshold={most}", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


class Machine:
    """A systemd, booted with our units; `control` is a folder that both sides see."""

    number = itertools.count()

    def __init__(self, folder: Path, server: str, ca: Path) -> None:
        self.folder = folder
        self.control = folder / "control"
        self.system = folder / "system"
        self.opt = folder / "opt"
        self.etc = folder / "etc"
        self.state = folder / "state"
        self.log = folder / "boot.log"
        for made in (self.control, self.etc / "caramel-embedded", self.state):
            made.mkdir(parents=True)
        self.conf("")
        make("install-systemd", f"DESTDIR={folder / 'made'}", "PREFIX=/opt", "UNITDIR=/system")
        shutil.copytree(folder / "made/opt", self.opt)
        shutil.copytree(folder / "made/system", self.system)
        make(
            "zipapp", "PYTHON=/usr/bin/python3", f"SERVER={server}", f"CA_CERT={ca}",
            f"OUT={self.opt}/bin/caramel-embedded",
        )  # fmt: skip
        # Nothing of the machine's own services, and a faster pace.
        for name in (
            "systemd-firstboot.service", "systemd-sysusers.service", "systemd-networkd-wait-online.service",
            "systemd-logind.service", "console-getty.service", "getty.target",
        ):  # fmt: skip
            (self.system / name).symlink_to("/dev/null")
        for name in ("caramel-embedded", "caramel-embedded@"):
            self.unit(f"{name}.service.d/pace.conf", "[Service]\nEnvironment=RETRY_FIRST=1 RETRY_MAX=1 SPREAD=0\n")
        self.unit("caramel-embedded-boot.timer.d/pace.conf", "[Timer]\nRandomizedDelaySec=0\n")
        (self.etc / "group").write_text(Path("/etc/group").read_text() + "readers:x:64999:\n")

    def unit(self, name: str, text: str) -> None:
        path = self.system / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def wants(self, name: str, target: str = "multi-user.target") -> None:
        folder = self.system / f"{target}.wants"
        folder.mkdir(exist_ok=True)
        (folder / name).symlink_to(f"../{name}")

    def needing(self, name: str, instance: str = "") -> None:
        """A service that can't do without the certificate."""
        drop_in = (UNITS / "examples/needs-certificate.conf").read_text()
        if instance:
            drop_in = drop_in.replace("certificate.service", f"certificate@{instance}.service")
        self.unit(name, "[Service]\nExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n")
        self.unit(f"{name}.d/needs-certificate.conf", drop_in)

    def conf(self, text: str, instance: str = "") -> None:
        """Settings of the device, or of an instance."""
        path = self.etc / "caramel-embedded" / f"{instance}.conf" if instance else self.etc / "caramel-embedded.conf"
        path.write_text(text)

    def inside(self, *command: str) -> str:
        """Runs a command inside by way of the shell that agent.service is; its output, both kinds."""
        number = len(list(self.control.glob("*.sh")))
        script = self.control / f"{number}.sh"
        draft = script.with_suffix(".draft")
        draft.write_text(shlex.join(command))
        draft.rename(script)
        done = self.control / f"{number}.done"
        until(f"{command} has run", done.exists, PATIENCE)
        return (self.control / f"{number}.out").read_text().strip()

    def state_of(self, unit: str) -> str:
        return self.inside("systemctl", "show", "--property=ActiveState", "--value", unit)

    def becomes(self, unit: str, state: str = "active", seconds: float = PATIENCE) -> None:
        until(f"{unit} is {state}", lambda: self.state_of(unit) == state, seconds, 0.1)

    def journal(self, unit: str) -> str:
        return self.inside("journalctl", "--no-pager", "--output=cat", "-u", unit)

    @contextmanager
    def booted(self) -> Iterator[None]:
        self.unit(
            "agent.service",
            "[Unit]\nDefaultDependencies=no\n[Service]\nExecStart=/bin/sh /control/agent\n",
        )
        (self.control / "agent").write_text(AGENT)
        self.wants("agent.service", "sysinit.target")
        name = f"caramel-{os.getpid()}-{next(Machine.number)}"
        groups = [
            top / name
            for top in map(Path, ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"))
            if (top / "cgroup.procs").exists()
        ]
        # What systemd-nspawn leaves in /run and in cgroups is in a /run and in cgroups of its own.
        launch = "mount -t tmpfs tmpfs /run\n"
        for group in groups:
            launch += f"mkdir -p {group} && echo $$ >{group}/cgroup.procs\n"
        # Newer releases of systemd want one hierarchy of cgroups.
        launch += 'SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 exec "$@"\n'
        container = Daemon(
            [
                "unshare", "--mount", "sh", "-ec", launch, "launch",
                "systemd-nspawn", "--quiet", f"--directory={TREE}", "--volatile=yes", "--register=no", "--keep-unit",
                "--settings=no", "--link-journal=no", "--resolv-conf=off", "--boot", "--console=pipe",
                f"--machine={name}",
                f"--bind={self.control}:/control", f"--bind-ro={self.opt}:/opt",
                f"--bind-ro={self.system}:/etc/systemd/system", f"--bind={self.state}:/var/lib",
                f"--bind-ro={self.etc}/caramel-embedded.conf:/etc/caramel-embedded.conf",
                f"--bind-ro={self.etc}/caramel-embedded:/etc/caramel-embedded",
                f"--bind-ro={self.etc}/group:/etc/group", "--bind-ro=/etc/passwd",
                "--bind-ro=/etc/hosts", "--bind-ro=/etc/nsswitch.conf", "--bind-ro=/etc/ssl",
                "systemd.unit=multi-user.target",
            ],
            self.log,
        )  # fmt: skip
        try:
            with container:
                try:
                    assert self.inside("echo", "up") == "up"
                    yield
                except BaseException:
                    print(self.log.read_text(errors="replace")[-3000:])
                    if container.alive:
                        print(self.inside("systemctl", "list-jobs", "--no-pager"))
                        print(self.inside("journalctl", "--no-pager", "-n", "200")[-8000:])
                    raise
        finally:
            for group in groups:
                until("its cgroups can go", lambda group=group: gone(group), PATIENCE)  # type: ignore[misc]


def gone(folder: Path) -> bool:
    """Removes a cgroup and those in it, as far as nobody is in them."""
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(path)
    return not folder.exists()


#: Runs the scripts that appear in /control, one after the other.
AGENT = """n=0
while :; do
    if [ -e /control/$n.sh ]; then
        sh /control/$n.sh >/control/$n.out 2>&1
        : >/control/$n.done
        n=$((n + 1))
    fi
    sleep 0.05
done
"""

OWN = "systemd-device"

HOOK = """#!/bin/sh
# Waits for what it restarts, and that waits for the certificate.
sleep 1000001 &
systemd-run --quiet --unit=kept sleep 1000002
systemctl restart needs.service || exit
echo restarted >>/control/hook.log
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, front: Front, authority: Authority) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"), front.address, authority.certificate_file)
    hook = machine.opt / "hook"
    hook.write_text(HOOK)
    hook.chmod(0o755)
    machine.conf(f"CARAMEL_CN={OWN}\nCARAMEL_HOOK=/opt/hook\nCARAMEL_GROUP=readers\nCARAMEL_MODE=0640\n")
    machine.needing("needs.service")
    machine.wants("needs.service")
    machine.unit("everyone.service", "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n")
    machine.wants("everyone.service")
    for timer in ("caramel-embedded-boot.timer", "caramel-embedded.timer"):
        machine.wants(timer, "timers.target")
    with machine.booted():
        yield machine


def start(machine: Machine, *units: str) -> None:
    assert machine.inside("systemctl", "daemon-reload") == ""
    assert machine.inside("systemctl", "start", "--no-block", *units) == ""


@slow
@needs("nspawn")
def test_a_unit_that_needs_the_certificate_waits_and_nobody_else(machine: Machine, caramel: Caramel) -> None:
    until("the server has the request", lambda: caramel.requests(OWN), PATIENCE)
    machine.becomes("multi-user.target")
    assert machine.state_of("everyone.service") == "active"
    assert machine.inside("systemctl", "is-system-running") == "starting"
    assert machine.state_of("needs.service") == "inactive"
    assert machine.state_of("caramel-embedded-certificate.service") == "activating"
    assert machine.inside("systemctl", "list-units", "--failed", "--no-legend", "caramel*", "needs*") == ""
    assert len(caramel.requests(OWN)) == 1

    # The hook restarts that unit, and waits until that is done.
    caramel.sign(OWN)
    machine.becomes("needs.service")
    machine.becomes("caramel-embedded-certificate.service")
    machine.becomes("caramel-embedded.service", "inactive")
    assert (machine.control / "hook.log").read_text() == "restarted\n"
    # What a hook leaves in the background goes with the unit; what it gives to systemd stays.
    assert machine.inside("pgrep", "-f", "sleep 1000001") == ""
    assert machine.state_of("kept.service") == "active"


@slow
@needs("nspawn")
def test_the_group_can_read_what_the_unit_made(machine: Machine, caramel: Caramel) -> None:
    key_file = "/var/lib/caramel/identity.pem"
    until("the server has the request", lambda: caramel.requests(OWN), PATIENCE)
    assert machine.inside("stat", "-c", "%U %G %a", key_file) == "root readers 640"
    assert machine.inside("stat", "-c", "%a", "/var/lib/caramel") == "755"
    assert "PRIVATE KEY" in as_a_reader(machine, key_file)


def as_a_reader(machine: Machine, path: str) -> str:
    return machine.inside("setpriv", "--reuid=nobody", "--regid=nogroup", "--groups=readers", "cat", path)


def user_of(machine: Machine, service: str) -> int:
    """Whose process it is; DynamicUser= takes 61184 to 65519, systemd.exec(5)."""
    process = machine.inside("systemctl", "show", "-P", "MainPID", service)
    return int(machine.inside("stat", "-c", "%u", f"/proc/{process}"))


@slow
@needs("nspawn")
@pytest.mark.parametrize(
    ("instance", "hook"),
    [
        ("fails", "false"),
        ("hangs", "sleep 1000003"),
        # Inside of a hook the environment's client ID and key file are no settings.
        ("again", "/opt/bin/caramel-embedded --client-id again --key-file /var/lib/caramel/again/identity.pem"),
    ],
)
def test_whatever_the_hook_does_the_unit_that_needs_the_certificate_starts(
    machine: Machine, caramel: Caramel, instance: str, hook: str
) -> None:
    machine.conf(f'CARAMEL_CONFIG=/dev/null\nCARAMEL_HOOK="{hook}"\n', instance)
    needs = f"needs-{instance}.service"
    machine.needing(needs, instance)
    start(machine, needs)
    until("the server has the request", lambda: caramel.requests(instance), PATIENCE)
    assert machine.state_of(needs) == "inactive"
    caramel.sign(instance)
    machine.becomes(needs)
    machine.becomes(f"caramel-embedded-certificate@{instance}.service")
    if instance == "again":
        machine.becomes(f"caramel-embedded@{instance}.service", "inactive")
    else:  # it is owed
        assert machine.state_of(f"caramel-embedded@{instance}.service") == "active"
        assert machine.inside("systemctl", "stop", f"caramel-embedded@{instance}.service") == ""


@slow
@needs("nspawn")
def test_settings_that_only_the_checks_have_make_no_storm(machine: Machine, caramel: Caramel) -> None:
    """The waiting unit looks into another file, where no certificate will ever be."""
    machine.unit(
        "caramel-embedded@own.service.d/file.conf",
        "[Service]\nEnvironment=CARAMEL_KEY_FILE=%S/caramel/own/other.pem\n",
    )
    machine.conf("CARAMEL_CONFIG=/dev/null\n", "own")
    machine.needing("needs-own.service", "own")
    start(machine, "needs-own.service")
    until("the server has the request", lambda: caramel.requests("own"), PATIENCE)
    caramel.sign("own")
    machine.becomes("caramel-embedded@own.service", "inactive")
    before = machine.journal("caramel-embedded@own.service").count("certificate")
    assert before > 0
    machine.inside("sleep", "12")
    assert machine.journal("caramel-embedded@own.service").count("certificate") == before
    assert machine.state_of("needs-own.service") == "inactive"
    machine.inside("systemctl", "stop", "needs-own.service", "caramel-embedded-certificate@own.service")


@slow
@needs("nspawn")
def test_an_instance_has_readers_and_restarts_services(machine: Machine, caramel: Caramel) -> None:
    instance, key_file = "web", "/var/lib/caramel/web/identity.pem"
    machine.unit("app.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    machine.conf('CARAMEL_GROUP=readers\nCARAMEL_MODE=0640\nCARAMEL_HOOK="systemctl restart app.service"\n', instance)
    # What "systemctl enable --now" starts; no hour goes by.
    start(machine, f"caramel-embedded@{instance}.timer")
    until("the server has the request", lambda: caramel.requests(instance), PATIENCE)
    caramel.sign(instance)
    machine.becomes("app.service")
    machine.becomes(f"caramel-embedded@{instance}.service", "inactive")
    assert machine.inside("stat", "-c", "%U %G %a", key_file) == "root readers 640"
    assert "PRIVATE KEY" in as_a_reader(machine, key_file)


@slow
@needs("nspawn")
def test_an_instance_with_a_user_of_its_own(machine: Machine, caramel: Caramel) -> None:
    """And there and back, with what it has."""
    instance, key_file = "alone", "/var/lib/caramel/alone/identity.pem"
    service, gate = f"caramel-embedded@{instance}.service", f"caramel-embedded-certificate@{instance}.service"
    # Nothing of what is common to all that this user can't do.
    machine.conf("CARAMEL_CONFIG=/dev/null\n", instance)
    drop_in = f"{service}.d/own-user.conf"
    machine.unit(drop_in, (UNITS / "examples/instance-own-user.conf").read_text())
    start(machine, service, gate)
    (request,) = until("the server has the request", lambda: caramel.requests(instance), PATIENCE)
    assert machine.state_of(gate) == "activating"
    assert 61184 <= user_of(machine, service) <= 65519
    # The shell had nothing to complain of: its pauses are random.
    assert "until-enrolled" not in machine.journal(service)

    assert machine.inside("systemctl", "stop", service) == ""
    (machine.system / drop_in).unlink()
    start(machine, service)
    caramel.sign(instance)
    machine.becomes(gate)
    machine.becomes(service, "inactive")
    assert machine.inside("stat", "-L", "-c", "%U %a", key_file) == "root 600"
    assert [now.sha256 for now in caramel.requests(instance)] == [request.sha256]


@slow
@needs("nspawn")
def test_machines_with_one_machine_id_are_not_in_step(machine: Machine) -> None:
    """Each start of the timer draws another moment of the hour, on one machine as on two of one ID."""
    moments = set()
    for _ in range(4):
        assert machine.inside("systemctl", "restart", "caramel-embedded.timer") == ""
        moments.add(machine.inside("systemctl", "show", "-P", "NextElapseUSecRealtime", "caramel-embedded.timer"))
    assert len(moments) > 1, moments


@slow
@needs("nspawn")
def test_with_a_stored_certificate_nobody_waits_for_the_network(tmp_path: Path, authority: Authority) -> None:
    client_id = "systemd-offline"
    machine = Machine(tmp_path, f"localhost:{free_port()}", authority.certificate_file)
    (machine.state / "caramel").mkdir()
    key_file = machine.state / "caramel/identity.pem"
    key_file.write_bytes(authority.identity(client_id))
    key_file.chmod(0o600)
    # A drop-in for all units of ours, systemd.unit(5).
    machine.unit("caramel-.service.d/settings.conf", f"[Service]\nEnvironment=CARAMEL_CN={client_id}\n")
    machine.needing("needs.service")
    machine.wants("needs.service")
    machine.wants("caramel-embedded-boot.timer", "timers.target")
    with machine.booted():
        machine.becomes("needs.service")
        machine.becomes("caramel-embedded.service")  # it is at it, in vain
        machine.becomes("multi-user.target")
        until("the boot is over", lambda: machine.inside("systemctl", "is-system-running") != "starting", PATIENCE)
        assert machine.state_of("needs.service") == "active"
        assert machine.state_of("caramel-embedded.service") == "active"
