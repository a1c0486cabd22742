"""What hardly ever happens, each by itself: the machine isn't ready, a certificate's date is none, a bug.

Most of it also happens for real in test_faults.py, to a whole run.
"""

from __future__ import annotations

import errno
import importlib
import os
import ssl
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from world import Authority

from caramel_embedded import (
    Identity,
    NotReady,
    UsageError,
    certificates,
    device,
    hardware,
    identity,
    settings,
    stored,
    tls,
    trust,
)
from caramel_embedded import __main__ as entry
from caramel_embedded.keyfile import KeyFile
from caramel_embedded.log import Log


def test_no_entropy_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    def unready(_size: int, flags: int) -> bytes:
        assert flags == os.GRND_NONBLOCK, "nothing may wait for it"
        raise BlockingIOError(errno.EAGAIN, "")

    monkeypatch.setattr(os, "getrandom", unready)
    with pytest.raises(NotReady, match="entropy"):
        stored.require_entropy()


@pytest.mark.parametrize("error", [ImportError("gone", name="OpenSSL.SSL"), RuntimeError("another interpreter's")])
def test_an_x509_package_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    class Broken:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name == "OpenSSL":
                raise error

    monkeypatch.delitem(sys.modules, "caramel_embedded.certificates", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "OpenSSL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(NotReady, match="lacks the Python package pyOpenSSL"):
        importlib.import_module("caramel_embedded.certificates")


def test_a_ca_whose_subject_can_be_in_no_request(authority: Authority) -> None:
    anchors = certificates.Anchors(authority.pem)
    anchors.subjects = [[(certificates.REQUIRED[0], "Sweden")]]
    with pytest.raises(UsageError, match="subject can't be used"):
        certificates.make("a", anchors, trust.Trust(authority.pem), ())


def test_a_system_without_files_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody = Identity(b"", b"", "a", b"")
    with pytest.raises(OSError, match="memfd_create"):
        nobody.load_into(context)
    assert "memfd_create" in str(tls.show(nobody, context))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "1970-01-01 00:00:00 UTC"),
        (2868066205, "2060-11-19 05:03:25 UTC"),
        (1e20, "1%s seconds after 1970" % ("0" * 20)),
    ],
)
def test_times_for_a_person(monkeypatch: pytest.MonkeyPatch, seconds: float, text: str) -> None:
    """Where `time_t` has 32 bits, the C library knows none after 2038."""

    def ends_in_2038(seconds: float) -> None:
        raise OverflowError("timestamp out of range for platform time_t")

    monkeypatch.setattr(time, "gmtime", ends_in_2038)
    assert identity.utc(seconds) == text


def test_an_interface_that_the_driver_knows_nothing_of() -> None:
    assert hardware._asked_of_driver("no-such-one") is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EIO, "Input/output error", "/a"), "Input/output error: /a"),
        (OSError("without a number"), "without a number"),
        (ModuleNotFoundError("gone", name="_ssl"), "this device lacks the Python package _ssl, or it is broken"),
        (MemoryError(), "out of memory"),
        (
            ZeroDivisionError("-----BEGIN PRIVATE KEY-----"),
            "internal error: ZeroDivisionError at test_last_resorts.py:",
        ),
    ],
)
@pytest.mark.parametrize("log", [True, False])
def test_what_went_wrong_in_a_line(error: Exception, text: str, log: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a bug only the type and the place: its text may hold anything, a key too."""
    try:
        raise error
    except Exception as raised:
        entry._report(raised, Log() if log else None, True)
    said = capfd.readouterr().err
    assert said.startswith("caramel-embedded: " + text) and said.count("\n") == 1
    assert "PRIVATE" not in said


def test_a_file_system_that_keeps_no_mode_is_said_and_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT: fchmod(2) succeeds and changes nothing."""
    path = tmp_path / "identity.pem"
    path.write_bytes(b"old")
    path.chmod(0o755)
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: None)
    file = KeyFile.open(str(path))
    assert file is not None
    nobody = Identity(b"", b"", "a", b"")
    before = path.stat().st_ino
    wanted = settings.Permissions(os.geteuid(), os.getegid(), 0o600)
    found: Any = types.SimpleNamespace(identity=nobody)
    said = device._Store(file, found, wanted, Log()).finish(nobody)
    file.close()
    assert len(said) == 1 and "0755 in the place of" in said[0] and "fmask=0177" in said[0]
    assert path.stat().st_ino == before
