"""Settings: four layers, one format that a shell and systemd read alike, and a word on what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from needs import needs
from world import Authority, Device

from caramel_embedded import settings as module
from caramel_embedded.errors import UsageError
from caramel_embedded.settings import Settings, is_client_id, parse, server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The configuration file that a run is told of."""
    return tmp_path / "caramel.conf"


def settings(file: Path, text: str = "", options: dict[str, str] | None = None, **environment: str) -> Settings:
    file.write_text(text)
    return Settings.read({"CARAMEL_CONFIG": str(file), **(options or {})}, environment)


@pytest.fixture
def firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firmware with settings of its own."""
    content = {
        "baked.conf": b"CARAMEL_TIMEOUT=1\nCARAMEL_CN=baked\nCARAMEL_MODE=0400\nCARAMEL_CA=baked:1\nBUILD_TIME=77\n"
    }
    monkeypatch.setattr(module, "baked", lambda name: content.get(name))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firmware without any."""
    monkeypatch.setattr(module, "baked", lambda name: None)


@pytest.mark.usefixtures("firmware")
def test_the_later_layer_wins(file: Path) -> None:
    text = "CARAMEL_TIMEOUT=2\nCARAMEL_CN=file\nCARAMEL_MODE=0440\n"
    found = settings(file, text, {"CARAMEL_TIMEOUT": "4"}, CARAMEL_TIMEOUT="3", CARAMEL_CN="environment")
    assert (found.timeout, found.client_id) == (4, "environment")
    assert (found.permissions.mode, found.server) == (0o440, ("baked", 1))
    assert found.build_time == 77


@pytest.mark.usefixtures("firmware")
def test_an_empty_value_is_no_value(file: Path) -> None:
    found = settings(file, "CARAMEL_CN=\nCARAMEL_MODE=''\n", CARAMEL_TIMEOUT="")
    assert (found.client_id, found.permissions.mode, found.timeout) == ("baked", 0o400, 1)


@pytest.mark.usefixtures("plain")
def test_the_defaults(file: Path) -> None:
    found = settings(file)
    assert (found.server, found.ca_cert_file, found.client_id, found.interfaces, found.hook) == (None,) * 5
    assert (found.key_file, found.timeout, found.permissions.mode) == ("/var/lib/caramel/identity.pem", 60, 0o600)
    assert (found.permissions.owner, found.permissions.group, found.build_time) == (os.geteuid(), os.getegid(), 0)


@pytest.mark.usefixtures("plain")
def test_every_setting_can_be_in_every_layer(file: Path) -> None:
    texts = {
        "CARAMEL_CA": "ca.example.com:8443",
        "CARAMEL_CA_CERT": "/ca.pem",
        "CARAMEL_KEY_FILE": "/key.pem",
        "CARAMEL_CN": "me",
        "CARAMEL_INTERFACES": "eth0,wlan0",
        "CARAMEL_OWNER": "0",
        "CARAMEL_GROUP": "0",
        "CARAMEL_MODE": "0640",
        "CARAMEL_TIMEOUT": "7.5",
        "CARAMEL_HOOK": "systemctl restart 'my unit'",
    }
    lines = "".join(f'{name}="{text}"\n' for name, text in texts.items())
    for found in (settings(file, lines), settings(file, "", texts), settings(file, "", None, **texts)):
        assert found.server == ("ca.example.com", 8443)
        assert (found.ca_cert_file, found.key_file, found.client_id) == ("/ca.pem", "/key.pem", "me")
        assert (found.interfaces, found.permissions) == (("eth0", "wlan0"), (0, 0, 0o640))
        assert (found.timeout, found.hook) == (7.5, ("systemctl", "restart", "my unit"))


@pytest.mark.usefixtures("plain")
def test_the_file_may_be_absent_unless_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONFIG_FILE", str(tmp_path / "absent"))
    assert Settings.read({}, {}).server is None
    for options, environment in (({"CARAMEL_CONFIG": "/absent"}, {}), ({}, {"CARAMEL_CONFIG": "/absent"})):
        with pytest.raises(UsageError, match="/absent"):
            Settings.read(options, environment)


@pytest.mark.usefixtures("plain")
def test_the_environment_names_the_file_and_an_option_another(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.conf"
    other.write_text("CARAMEL_CN=other\n")
    file.write_text("CARAMEL_CN=file\n")
    assert Settings.read({}, {"CARAMEL_CONFIG": str(other)}).client_id == "other"
    assert Settings.read({"CARAMEL_CONFIG": str(file)}, {"CARAMEL_CONFIG": str(other)}).client_id == "file"


@pytest.mark.usefixtures("plain")
def test_a_setting_of_a_later_version_does_not_stop_a_device(file: Path) -> None:
    assert settings(file, "CARAMEL_FUTURE=1\nPATH=/bin\nCARAMEL_AUTHORITY_CONFIG=x\n").unknown == ("CARAMEL_FUTURE",)


SAME_TO_ALL = """\
# a comment

  CARAMEL_TIMEOUT=5
CARAMEL_CA=ca.example.com:443
CARAMEL_CN='a'
CARAMEL_HOOK="logger -t caramel 'it is new'"
CARAMEL_INTERFACES=eth0,wlan0
CARAMEL_KEY_FILE='/data/with space/identity.pem'
CARAMEL_OWNER=
CARAMEL_CA=last.example.com
"""


@pytest.mark.parametrize("shell", ["sh", pytest.param("busybox sh", marks=needs("busybox"))])
def test_a_shell_reads_the_same(file: Path, shell: str) -> None:
    file.write_text(SAME_TO_ALL)
    ours = parse(SAME_TO_ALL, "x")
    names = " ".join(f'"${name}"' for name in ours)
    line = [*shell.split(), "-c", f'. "$1"; printf "%s\\n" {names}', "sh", str(file)]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=True)
    assert done.stdout.decode().splitlines() == list(ours.values())
    assert ours["CARAMEL_CA"] == "last.example.com" and len(ours) == 7
    assert ours["CARAMEL_HOOK"] == "logger -t caramel 'it is new'"


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("ca.example.com", "ca.example.com", 443),
        ("ca.example.com:8443", "ca.example.com", 8443),
        ("localhost", "localhost", 443),
        ("192.0.2.1:1", "192.0.2.1", 1),
        ("2001:db8::1", "2001:db8::1", 443),
        ("[2001:db8::1]", "2001:db8::1", 443),
        ("[2001:db8::1]:65535", "2001:db8::1", 65535),
        ("ca_server.local", "ca_server.local", 443),
        ("xn--nxasmq6b.example", "xn--nxasmq6b.example", 443),
    ],
)
def test_a_server_name(text: str, host: str, port: int) -> None:
    assert server(text) == (host, port)


def test_a_client_id_is_made_of_what_the_server_can_copy_unescaped() -> None:
    allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-"
    assert [chr(n) for n in range(0x250) if is_client_id(chr(n))] == sorted(allowed)
    assert (is_client_id(""), is_client_id("a" * 64), is_client_id("a" * 65)) == (False, True, False)


# --- By the command ---


def test_the_command_takes_its_settings_from_file_and_environment_alone(device: Device) -> None:
    configuration = device.folder / "device.conf"
    configuration.write_text(f"CARAMEL_CA={device.server}\nCARAMEL_CA_CERT='{device.ca}'\nCARAMEL_CN=from-the-file\n")
    env = {"CARAMEL_CONFIG": str(configuration), "CARAMEL_KEY_FILE": str(device.key_file)}
    run = device.run(env=env, bare=True)
    assert run.status == 69 and run.err.startswith("caramel-embedded: from-the-file: ")
    run = device.run("--client-id", "from-the-options", env={**env, "CARAMEL_CN": "from-the-environment"}, bare=True)
    assert run.err.startswith("caramel-embedded: from-the-options: ")
    assert device.run(env={**env, "CARAMEL_CN": "from-the-environment"}, bare=True).err.startswith(
        "caramel-embedded: from-the-environment: "
    )


def test_a_relative_path_means_the_current_folder(device: Device, authority: Authority) -> None:
    device.key_file = Path("relative.pem")
    shutil.copy(authority.certificate_file, device.folder / "ca.crt")
    device.ca = Path("ca.crt")
    assert device.run().status == 69
    assert (device.folder / "relative.pem").is_file()


# --- As it comes from a person's hands ---


@pytest.fixture
def named(tmp_path: Path, authority: Authority) -> Device:
    named = Device(tmp_path / "device", "localhost:9", authority.certificate_file, None)
    named.has(authority.identity("by-pipe"))
    return named


def shown(named: Device, *options: str, **how: Any) -> Any:
    run = named.run("--status", "--json", *options, **how)
    return json.loads(run.out) if run.status == 0 else run.err


@pytest.mark.parametrize("how", ["at once", "in pieces", "late", "a FIFO"])
def test_a_configuration_that_comes_through_a_pipe_is_read_to_its_end(
    named: Device, tmp_path: Path, how: str
) -> None:
    writer = {
        "at once": "printf 'CARAMEL_CN=by-pipe\\n'",
        "in pieces": "printf 'CARAMEL_CN=by-'; sleep 0.5; printf 'pipe\\n'; sleep 0.3; echo '#'",
        "late": "sleep 1; echo CARAMEL_CN=by-pipe",
        "a FIFO": "echo CARAMEL_CN=by-pipe",
    }[how]
    if how == "a FIFO":
        os.mkfifo(tmp_path / "fifo")
        named.config = tmp_path / "fifo"
        script = f'({writer}) >{named.config} & "$@"'
    else:
        named.config = Path("/dev/fd/3")
        script = f'exec 4>&1; {{ {writer}; }} | "$@" 3<&0 1>&4'
    found = shown(named, before=("sh", "-c", script, "sh"))
    assert (found["client_id"], found["client_id_source"]) == ("by-pipe", str(named.config)), found


@pytest.mark.parametrize("how", ["nobody comes", "nobody ends"])
def test_a_pipe_that_nobody_writes_to_is_no_empty_configuration(named: Device, tmp_path: Path, how: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    named.config = tmp_path / "fifo"
    writer = "" if how == "nobody comes" else f"{{ echo CARAMEL_CN=x; exec sleep 60; }} >{named.config} &"
    script = f'{writer} "$@"; status=$?; kill $! 2>&-; exit $status'
    run = named.run(before=("sh", "-c", script, "sh"))
    assert (run.status, "pipe" in run.err, str(named.config) in run.err) == (127, True, True), run.err
    assert run.seconds < 15


@pytest.mark.parametrize("path", ["/dev/stdin", "/dev/fd/0"])
def test_standard_input_is_no_empty_configuration(named: Device, path: str) -> None:
    named.config = Path(path)
    run = named.run("--status", before=("sh", "-c", 'echo CARAMEL_CN=by-pipe | "$@"', "sh"))
    assert (run.status, run.out, "standard input" in run.err, run.err.count("\n")) == (127, "", True, 1), run


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_text_as_notepad_saves_it_is_read(named: Device, authority: Authority, coding: str) -> None:
    assert named.config and named.ca
    mark = "\ufeff" if coding == "utf-16-be" else ""
    named.config.write_bytes(f"{mark}CARAMEL_CN=by-pipe\r\n".encode(coding))
    good = named.key_file.read_bytes()
    found = shown(named)
    assert (found["client_id"], found["state"], found["remarks"]) == ("by-pipe", "certified", [])
    named.ca = named.folder / "ca.pem"
    named.ca.write_bytes((mark + authority.pem.decode().replace("\n", "\r\n")).encode(coding))
    found = shown(named)
    assert (found["state"], found["certificate"]["usable"], named.key_file.read_bytes()) == ("certified", True, good)


@pytest.mark.parametrize("value", ["1_0", "٣", "1e1", "+5", " 5", "0x5", ".", ""])
def test_a_time_limit_is_digits(value: str) -> None:
    with pytest.raises(UsageError):
        module.VALUES["CARAMEL_TIMEOUT"](value)
    assert [module.VALUES["CARAMEL_TIMEOUT"](good) for good in ("5", "0.5", ".5", "86400")] == [5, 0.5, 0.5, 86400]


@pytest.mark.parametrize("name", ["CARAMEL_KEY_FILE", "CARAMEL_CA_CERT", "CARAMEL_CONFIG"])
@pytest.mark.parametrize("value", ["dir/", "/a/dir/", "/", ".", "a/..", "a/."])
def test_the_path_of_a_folder_is_no_files(name: str, value: str) -> None:
    with pytest.raises(UsageError, match="folder"):
        module.VALUES[name](value)


@needs("mounts")
def test_an_instance_is_what_the_unit_of_that_name_is(named: Device, tmp_path: Path) -> None:
    """Its file, its client ID and its key file; what is common to all counts before."""
    for folder in ("etc/caramel-embedded", "lib/web"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/caramel-embedded/web.conf").write_text("CARAMEL_KEY_TYPE=ec-p256\n")
    assert named.config
    named.config.write_text("CARAMEL_CN=the-machine\nCARAMEL_KEY_TYPE=rsa-4096\nCARAMEL_KEY_FILE=/nowhere/x.pem\n")
    mounts = f"mkdir -p /var/lib/caramel && mount --bind {tmp_path}/lib /var/lib/caramel"
    script = f'{mounts} && mount --rbind {tmp_path}/etc /etc && exec "$@"'
    before = ("unshare", "-m", "sh", "-c", script, "sh")
    line = [*named.command, "--config", str(named.config), "--server", "localhost:9", "--ca-cert", str(named.ca)]
    named.command = [*before, *line]
    run = named.run("--instance", "web", bare=True)
    assert (run.status, ": web: " in run.err, "can't be reached" in run.err) == (127, True, True), run.err
    made = (tmp_path / "lib/web/identity.pem").read_text()
    assert made.startswith("# caramel-embedded/1 id=web ")
    # Whatever the environment says of another identity.
    other = {"CARAMEL_CN": "other", "CARAMEL_KEY_FILE": f"{tmp_path}/other.pem"}
    told = json.loads(named.run("--instance", "web", "--status", "--json", bare=True, env=other).out)
    assert (told["client_id"], told["key"]["type"]) == ("web", "EC")
    assert told["key_file"] == "/var/lib/caramel/web/identity.pem"
    assert named.run("--instance", "../web", bare=True).status == 127
    # Tried by hand with the machine's own key file, it costs that file nothing.
    (tmp_path / "etc/caramel-embedded/web.conf").write_text("CARAMEL_CN=web.example.com\n")
    (tmp_path / "lib/identity.pem").write_bytes(named.key_file.read_bytes())
    named.command[named.command.index(str(named.config))] = "/etc/caramel-embedded/web.conf"
    run = named.run(bare=True)
    assert (run.status, "by-pipe" in run.err, "web.example.com" in run.err) == (127, True, True), run.err
    assert "--instance" in run.err and (tmp_path / "lib/identity.pem").read_bytes() == named.key_file.read_bytes()
    assert named.run("--instance", "..", bare=True).status == 127
