"""`--status`: what a person wants to know at a glance, and the same for machines."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import world
from needs import needs
from talking import ID, Talking, key
from world import Authority, answers, hours, now

#: What monitoring relies on: names, and what may stand there.
FORM: dict[str, Any] = {
    "version": str,
    "state": str,
    "exit_status": int,
    "client_id": str,
    "client_id_source": str,
    "server": (str, type(None)),
    "key_file": str,
    "file": {"owner": str, "group": str, "mode": str, "modified": int},
    "key": {"type": str, "bits": int, "holder": str, "chip": (str, type(None))},
    "request_sha256": (str, type(None)),
    "certificate": {
        "usable": bool,
        "why_not": (str, type(None)),
        "subject": (str, type(None)),
        "issuer": (str, type(None)),
        "serial_number": (str, type(None)),
        "not_before": (int, type(None)),
        "not_after": (int, type(None)),
        "seconds_left": (int, type(None)),
        "for_servers_only": (bool, type(None)),
        "chain": (int, type(None)),
    },
    "hook_owed": bool,
    "remarks": list,
    "clock": {"now": int, "floor": int, "believed": bool},
    "next": str,
    "retry_after": type(None),
}


@pytest.fixture
def device(new: Talking) -> Talking:
    new.server = "ca.example.com"
    return new


def has_form(value: Any, form: Any, name: str = "") -> None:
    if isinstance(form, dict):
        if value is None:
            assert name in ("file", "key", "certificate")
            return
        assert list(value) == list(form), name
        for key in form:
            has_form(value[key], form[key], key)
    else:
        assert isinstance(value, form), (name, value)


def status(
    device: Talking, *options: str, before: tuple[str, ...] = (), **more: Any
) -> tuple[int, dict[str, Any], str]:
    """The exit status, the values, and the text of the same state; neither may show the key or change the file."""
    was = device.snapshot()
    runs = [device.run("--status", *extra, *options, before=before, **more) for extra in ((), ("--json",))]
    assert device.snapshot() == was
    text, machine = runs
    assert (text.status, text.err, machine.err) == (machine.status, "", "")
    values = json.loads(machine.out)
    has_form(values, FORM)
    assert values["exit_status"] == machine.status
    for run in runs:
        assert run.out.isprintable() or set(run.out) - {"\n"} == set(run.out.replace("\n", ""))
        assert "PRIVATE KEY" not in run.out
        if was:
            # Not the least bit of the key, in whatever form.
            body = b"".join((device.block("PRIVATE KEY") or b"\n\n").split(b"\n")[1:-2]).decode()
            assert not any(body[at : at + 16] in run.out for at in range(0, max(len(body) - 16, 0)))
    return machine.status, values, text.out


def line(text: str, name: str) -> str:
    """What stands behind a name in the text."""
    (found,) = (line[16:].strip() for line in text.splitlines() if line[:16].strip() == name)
    return found


def test_nothing_there(device: Talking) -> None:
    code, values, text = status(device)
    assert (code, values["state"]) == (127, "none")
    assert values["file"] is values["key"] is values["certificate"] is values["request_sha256"] is None
    assert values["next"] == line(text, "next run") == "make a key and a request, and send the request"
    assert line(text, "client ID") == f"{ID}, from the command line"
    assert not device.key_file.exists()


def test_a_request_only(device: Talking) -> None:
    device.pending()
    code, values, text = status(device)
    assert (code, values["state"], values["certificate"]) == (69, "pending", None)
    assert values["request_sha256"] == line(text, "request") == device.request_hash()
    assert values["key"] == {"type": "RSA", "bits": 2048, "holder": "software", "chip": None}
    assert line(text, "certificate") == "none"
    assert "whether the request is signed" in values["next"]


def test_a_certificate(device: Talking, authority: Authority) -> None:
    device.has(authority.identity(ID, key=key(), not_before=now() - hours(1), not_after=now() + hours(50.5)), 0o640)
    code, values, text = status(device, "--mode", "640")
    assert (code, values["state"], values["remarks"]) == (0, "certified", [])
    certificate, seen = device.certificate, values["certificate"]
    assert certificate
    assert (seen["usable"], seen["why_not"]) == (True, None)
    assert seen["subject"] == "C=SE, ST=Östergötland, L=Linköping, O=Example AB, OU=Caramel, CN=" + ID
    assert seen["issuer"].endswith("CN=Caramel Signing Certificate")
    assert int(seen["serial_number"], 16) == certificate.serial_number
    assert seen["not_before"] == certificate.not_valid_before_utc.timestamp()
    assert seen["not_after"] == certificate.not_valid_after_utc.timestamp()
    assert 0 <= certificate.not_valid_after_utc.timestamp() - time.time() - seen["seconds_left"] < 60
    assert line(text, "subject") == seen["subject"] and line(text, "issuer") == seen["issuer"]
    assert line(text, "valid until").startswith(f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M:%S} UTC, 2 d 02 h ")
    assert (values["server"], values["key_file"]) == ("ca.example.com:443", str(device.key_file))
    assert values["file"]["mode"] == "0640" and "mode 0640" in text
    assert values["file"]["modified"] == device.key_file.stat().st_mtime_ns // 10**9
    assert values["next"] == "show the certificate, and ask for a newer one"
    assert values["clock"]["believed"] is True and "clock" not in text


def test_an_expired_certificate(device: Talking) -> None:
    device.certified(not_before=now() - hours(3), not_after=now() - hours(1))
    code, values, text = status(device)
    assert (code, values["state"], values["certificate"]["usable"]) == (69, "pending", False)
    assert values["certificate"]["why_not"].startswith("the stored certificate ended at ")
    assert -3700 < values["certificate"]["seconds_left"] < -3500
    assert line(text, "remark") == values["certificate"]["why_not"]
    assert values["next"] == "ask for a certificate, and drop the one in the file"


def test_a_certificate_that_is_not_usable(device: Talking, authority: Authority, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other", [("C", "SE"), ("O", "Line\x07feed"), ("CN", "Another")])
    request = world.signing_request(key(), authority.subject_for(ID))
    device.has(world.key_file_content(key(), request, other.sign(request, serial=0xABC)))
    code, values, text = status(device)
    assert (code, values["certificate"]["usable"]) == (69, False)
    assert values["certificate"]["issuer"] == line(text, "issuer") == "C=SE, O=Line?feed, CN=Another"
    assert values["certificate"]["serial_number"] == "0ABC"
    assert "is not by the trusted CA" in line(text, "remark")
    damaged = authority.sign(request).replace(b"CERTIFICATE-----\nM", b"CERTIFICATE-----\nN", 1)
    device.has(world.key_file_content(key(), request, damaged))
    code, values, text = status(device)
    assert (code, values["state"], values["certificate"]["subject"]) == (69, "pending", None)
    assert line(text, "certificate") == "not usable" and line(text, "remark")


@pytest.mark.parametrize("why", ["for another client ID", "there is no private key"])
def test_a_file_that_is_not_kept(device: Talking, authority: Authority, why: str) -> None:
    device.has(authority.identity("another", key=key(), certified=False) if "another" in why else b"hello\n")
    code, values, text = status(device)
    assert (code, values["state"], values["key"], values["certificate"]) == (127, "none", None, None)
    (remark,) = values["remarks"]
    assert why in remark and line(text, "remark") == remark
    assert line(text, "key") == "none that can be used"
    assert values["next"] == "start over with a new key"


def test_a_hook_that_is_owed(device: Talking) -> None:
    device.pending()
    assert device.hears(answers.certificate(device.signed()), options=["--hook", "false"]).status == 127
    code, values, text = status(device, "--hook", "false")
    assert (code, values["hook_owed"]) == (0, True)
    assert line(text, "next run").endswith("; call the hook, which is owed")
    assert status(device)[1]["hook_owed"] is False  # there is none to be called
    device.run("--hook", "true")  # the server is gone, the hook is called all the same
    assert status(device, "--hook", "true")[1]["hook_owed"] is False
    device.key_file.unlink()
    assert status(device, "--hook", "true")[1]["hook_owed"] is False


@needs("root")
def test_owner_and_mode_that_are_to_change(device: Talking, authority: Authority) -> None:
    device.has(authority.identity(ID, key=key(), certified=False), 0o644)
    assert status(device)[1]["next"].startswith("set the file's owner and mode; ")
    assert "owner" not in status(device, "--mode", "644")[1]["next"]
    assert status(device, "--mode", "644", "--group", "4242")[1]["next"].startswith("set the file's owner")
    os.chown(device.key_file, 4242, 4343)
    seen = status(device)[1]["file"]
    assert (seen["owner"], seen["group"], seen["mode"]) == ("4242", "4343", "0644")


def test_no_server_and_what_is_there_counts(device: Talking) -> None:
    device.certified()
    device.server = None
    code, values, _ = status(device)
    assert (code, values["server"], values["next"]) == (0, None, "nothing: no server is configured")


@pytest.mark.parametrize("source", ["the environment", "the file"])
def test_where_the_client_id_comes_from(device: Talking, source: str) -> None:
    device.client_id = None
    assert device.config
    env = {"CARAMEL_CN": ID} if source == "the environment" else {}
    if source == "the file":
        device.config.write_text(f"CARAMEL_CN={ID}\n")
        source = str(device.config)
    _, values, text = status(device, env=env)
    assert values["client_id_source"] == source
    assert line(text, "client ID") == f"{ID}, from {source}"


@needs("mounts")
def test_a_client_id_of_the_hardware(device: Talking, tmp_path: Path) -> None:
    """Of a machine whose /sys has a network interface, and nothing else that lasts."""
    net = tmp_path / "sys/class/net/eth7"
    (net / "device").mkdir(parents=True)
    for name, content in (("address", "00:1b:21:aa:bb:cc"), ("type", "1"), ("addr_assign_type", "0")):
        (net / name).write_text(f"{content}\n")
    device.client_id = None
    _, values, text = status(device, before=with_sys(tmp_path / "sys"))
    assert line(text, "client ID") == f"{values['client_id']}, from {values['client_id_source']}"
    assert (values["client_id"], "eth7" in values["client_id_source"]) == ("001b21aabbcc", True)


def with_sys(folder: Path) -> tuple[str, ...]:
    """Starts a command on a machine that has this /sys."""
    return ("unshare", "-m", "sh", "-c", f'mount --rbind {folder} /sys && exec "$@"', "sh")


@needs("mounts")
def test_a_good_file_needs_no_id_from_outside(device: Talking, authority: Authority, tmp_path: Path) -> None:
    """On a machine that has no ID of its own, and for a user who may not read it."""
    (tmp_path / "empty").mkdir()
    hidden = with_sys(tmp_path / "empty")
    device.client_id = None
    device.command = [world.PLAIN]
    assert device.run("--status", before=hidden).status == 127
    device.has(authority.identity(ID))
    code, values, _ = status(device, before=hidden)
    assert (code, values["state"]) == (0, "certified")
    assert (values["client_id"], values["client_id_source"]) == (ID, "the key file")
    (remark,) = values["remarks"]
    assert "give a client ID" in remark and values["next"] == "nothing: " + remark
    assert device.run(before=hidden).status == 127, "a check wants to know"


def test_a_setting_that_is_spelt_wrong_is_no_secret(device: Talking) -> None:
    assert device.config
    device.config.write_text("CARAMEL_TIMOUT=5\nCARMEL_HOOK=true\nEDITOR=vi\ncaramel_ca=x\n")
    _, values, text = status(
        device, env={"CARAMEL_MODUS": "640", "CARAMEL_MODE": "600", "LC_ALL": "C", "CARGO_HOME": "x"}
    )
    names = [remark.partition(" ")[0] for remark in values["remarks"]]
    assert names == ["CARAMEL_MODUS", "CARAMEL_TIMOUT", "CARMEL_HOOK", "caramel_ca"]
    assert "remark           CARAMEL_TIMOUT is no setting" in text


@needs("faketime")
def test_a_clock_that_is_wrong(device: Talking) -> None:
    device.certified()
    code, values, text = status(device, before=("faketime", "1970-01-02 00:00:00"))
    assert (code, values["clock"]["believed"]) == (0, False)
    assert values["clock"]["now"] < 200000 < values["clock"]["floor"]
    assert line(text, "clock").startswith("wrong: 1970-01-0")
    # Time left counts from the latest time that has certainly passed.
    assert 0 < values["certificate"]["seconds_left"] <= 4 * 24 * 3600


@needs("strace")
def test_neither_lock_nor_network_nor_a_write(device: Talking, tmp_path: Path) -> None:
    device.certified()
    device.command = [world.PLAIN]
    device.server = "localhost"
    trace = tmp_path / "trace"
    with open(device.key_file, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = device.run("--status", before=("strace", "-f", "-qq", "-o", str(trace)))
    assert run.status == 0
    calls = [text.split(maxsplit=1)[1] for text in trace.read_text().splitlines()]
    # (A look-up of the owner's name may ask nscd through a UNIX socket.)
    names = "socket(AF_INET flock( rename unlink mkdir fsync fdatasync utime chmod chown"
    forbidden = tuple(names.split())
    assert not [call for call in calls if call.startswith(forbidden)]
    writable = [call for call in calls if call.startswith("open") and ("O_WRONLY" in call or "O_RDWR" in call)]
    assert not [call for call in writable if '"/dev/' not in call]


def test_what_is_no_file_is_said_at_once(device: Talking) -> None:
    os.mkfifo(device.key_file)
    run = device.run("--status", "--json", timeout=20)
    assert (run.status, run.out, run.err.count("\n")) == (127, "", 1)
    assert str(device.key_file) in run.err


@pytest.mark.parametrize("options", [("--status", "--ca-cert", "/nonexistent"), ("--status", "--mode", "999")])
def test_wrong_usage_is_127_with_an_empty_output(device: Talking, options: tuple[str, ...]) -> None:
    run = device.run(*options)
    assert (run.status, run.out, run.err.count("\n")) == (127, "", 1)


def test_it_agrees_with_the_check(device: Talking) -> None:
    """What it calls usable is what a check goes on with."""
    for moment, usable in ((now() + hours(1), True), (now() - hours(1), False)):
        device.certified(not_before=now() - hours(24), not_after=moment)
        assert (status(device)[0] == 0) is usable
        assert device.hears(answers.PENDING).status == 69
        assert ("CERTIFICATE" in device.labels) is usable
