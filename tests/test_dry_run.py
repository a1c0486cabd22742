"""`--dry-run`: what a check would find and do, its exit status, and nothing changed, here or on the server."""

from __future__ import annotations

from pathlib import Path

import pytest
from needs import needs, require
from world import Authority, Caramel, Device, Run, Scripted, answers, hours, now

#: What a check with `--dry-run` says before it asks, in this order.
FIRST = ("dry run: ", "settings: ", "hardware: ", "client ID from ", "trusted CA: ", "clock: ", "key file ")
FIRST_BOOT = ("env", "TZ=UTC", "faketime", "--exclude-monotonic", "1970-01-01 00:00:10")


def rehearsed(device: Device, caramel: Caramel, *before: str, options: tuple[str, ...] = ()) -> Run:
    """One run, after which the folder, the file and the server are as they were. Each thing has its line."""
    requests, file = caramel.requests(), device.snapshot()
    folder = {path.name: path.stat().st_mtime_ns for path in device.folder.iterdir()}
    run = device.run("--dry-run", "--hook", "touch called", *options, before=before)
    assert (device.snapshot(), caramel.requests()) == (file, requests)
    assert {path.name: path.stat().st_mtime_ns for path in device.folder.iterdir()} == folder
    assert run.out == ""
    said = [line.removeprefix("caramel-embedded: ").removeprefix(f"{device.client_id}: ") for line in lines(run)]
    assert all(any(line.startswith(first) for line in said) for first in FIRST), run.err
    return run


def lines(run: Run) -> list[str]:
    return run.err.splitlines()


def pending(device: Device) -> None:
    assert device.run().status == 69


def certified(device: Device, caramel: Caramel) -> None:
    pending(device)
    caramel.sign(str(device.client_id))
    assert device.run().status == 0


def test_each_state_of_a_life(device: Device, caramel: Caramel) -> None:
    run = rehearsed(device, caramel)
    assert run.status == 69 and lines(run)[-1].endswith("a check would make a key, and send a request for it")
    assert not device.key_file.exists()
    pending(device)
    run = rehearsed(device, caramel)
    assert run.status == 69 and "a check would say: request " in lines(run)[-1]
    caramel.sign(str(device.client_id))
    run = rehearsed(device, caramel)
    assert run.status == 0 and "a check would say: new certificate, valid until " in lines(run)[-1]
    assert "a check would store what is new" in run.err and "a check would call the hook" in run.err
    assert device.run().status == 0
    run = rehearsed(device, caramel)
    assert run.status == 0 and "a check would say: certificate unchanged" in lines(run)[-1]
    assert "would store" not in run.err and "a check would call the hook" in run.err  # which was not set until now
    assert device.run("--hook", "true").status == 0
    assert "would call" not in rehearsed(device, caramel).err
    caramel.reject(str(device.client_id))
    run = rehearsed(device, caramel)
    assert run.status == 69 and "rejected the request" in lines(run)[-1] and "would make a new key" in lines(run)[-1]


def test_a_request_that_the_server_does_not_know(device: Device, caramel: Caramel, authority: Authority) -> None:
    device.has(authority.identity(str(device.client_id), certified=False))
    run = rehearsed(device, caramel)
    assert run.status == 69 and lines(run)[-1].endswith("doesn't know the request: a check would send it")


@pytest.mark.parametrize("fault", ["another CA", "nobody"])
@pytest.mark.parametrize("life", ["new", "certified"])
def test_a_server_that_cannot_be_had(device: Device, caramel: Caramel, tmp_path: Path, fault: str, life: str) -> None:
    if life == "certified":
        certified(device, caramel)
    with Scripted(Authority(tmp_path / "other").server(), [answers.REJECTED]) as server:
        device.server = server.address if fault == "another CA" else "localhost:9"
        run = rehearsed(device, caramel)
    word = "vouches for" if fault == "another CA" else "can't be reached"
    assert run.status == 127 and word in lines(run)[-1] and server.requests == []


@needs("mounts")
@pytest.mark.parametrize(
    ("fault", "life", "status"),
    [
        ("read-only", "new", 127),
        ("mounted by itself", "signed", 127),
        ("mounted by itself", "certified", 0),
        ("owner", "certified", 127),
        ("key command", "new", 127),
        ("key command", "certified", 0),
    ],
)
def test_what_a_check_could_not_store_or_make(
    device: Device, caramel: Caramel, fault: str, life: str, status: int
) -> None:
    """It ends as the check right after it, which finds the same."""
    if life != "new":
        pending(device)
        caramel.sign(str(device.client_id))
    if life == "certified":
        assert device.run().status == 0
    folder, file = str(device.folder), str(device.key_file)
    mounted = {
        "read-only": f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,ro "{folder}"',
        "mounted by itself": f'test ! -e "{file}" || mount --bind "{file}" "{file}"',
    }
    before = ["unshare", "--mount", "sh", "-c", mounted.get(fault, "true") + ' && exec "$@"', "sh"]
    if fault == "owner":
        before += ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    options = {"owner": ("--owner", "1234"), "key command": ("--key-command", "/there/is/none")}.get(fault, ())
    rehearsed = device.run("--dry-run", *options, before=before)
    real = device.run(*options, before=before)
    assert (rehearsed.status, real.status) == (status, status), (rehearsed, real)
    if status == 127:
        assert rehearsed.err.strip().rpartition(": ")[2] in real.err


def test_a_clock_in_1970(device: Device, caramel: Caramel) -> None:
    require("faketime")
    certified(device, caramel)
    run = rehearsed(device, caramel, *FIRST_BOOT)
    assert run.status == 0, run
    assert any("clock: 1970-01-01 " in line and "behind" in line for line in lines(run))


def test_a_file_that_is_locked(device: Device, caramel: Caramel) -> None:
    pending(device)
    before = device.snapshot()
    run = device.run("--dry-run", before=("flock", str(device.key_file)))
    assert (run.status, device.snapshot()) == (1, before)


def test_it_asks_and_never_posts(tmp_path: Path, authority: Authority) -> None:
    """Whatever the server says: everything it was sent is a GET."""
    device = Device(tmp_path / "device", None, authority.certificate_file)
    for says in (answers.UNKNOWN, answers.REJECTED, answers.PENDING, answers.page(500)):
        device.has(authority.identity(str(device.client_id), not_before=now() - hours(1)))
        before = device.snapshot()
        with Scripted(authority.server(file="dry.pem"), [says]) as server:
            device.server = server.address
            run = device.run("--dry-run", "--json")
        assert device.snapshot() == before and run.status == (127 if says == answers.page(500) else 69)
        assert [request.method for request in server.requests] == ["GET"]
        assert f'"status": {run.status}' in run.out


def test_it_is_not_the_status(device: Device) -> None:
    run = device.run("--dry-run", "--status")
    assert run.status == 127 and "not allowed with" in run.err
