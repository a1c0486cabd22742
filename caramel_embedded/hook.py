"""The hook: a command that runs once for each new certificate that is in place.

Responsible for owing it: a note beside the key file says for which certificate the hook has still to succeed. It is
written before the certificate is, and removed after the hook's good end; a power cut or a failure in between means
that the next run calls the hook again. The hook runs without the key file's lock, so it may start this program again;
the note is locked meanwhile, so that such a run, or one by cron, doesn't call the hook a second time.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Mapping, Sequence

from .errors import CaramelError, StorageError
from .identity import certificate_in, remembered, utc
from .keyfile import MAXIMUM, FileLock, Folder, doing


class HookFailed(CaramelError):
    """The certificate is in place, the hook did not succeed: the next run calls it again."""


def owe(key_file: str, certificate: bytes) -> None:
    """Notes that the hook is owed for `certificate`, which is about to be stored in `key_file`.

    What is owed for the one that is there stays owed until then. Raises `StorageError`.
    """
    with Folder(key_file) as folder:
        name = folder.beside("hook")
        with doing("write", folder.path_of(name)):
            lines = [_hash(certificate)]
            current = certificate_in(_content(folder))
            if current is not None and current != certificate and _hash(current) in _owed(folder):
                lines.append(_hash(current))
            note = b"".join(line + b"\n" for line in lines)
            lock = folder.put(name, note, None, os.geteuid(), os.getegid(), 0o600)
            try:
                folder.sync(lock.fd)
            finally:
                lock.drop()


def settle(key_file: str, command: Sequence[str], client_id: str, limit: float) -> bool:
    """Runs `command` if it is owed for the certificate in `key_file`; whether it ran.

    `limit`: seconds. Raises `HookFailed`, `StorageError`.
    """
    try:
        with Folder(key_file) as folder:
            note = folder.beside("hook")
            with doing("read", folder.path_of(note), but=FileNotFoundError):
                lock = FileLock(folder.open(note))
            try:
                with doing("settle", folder.path_of(note), but=FileNotFoundError):
                    # Where another run is at it, perhaps the hook itself has started this one.
                    return lock.take() and _settle(folder, note, lock, command, client_id, limit)
            finally:
                lock.drop()
    except FileNotFoundError:
        return False  # nothing is owed


def _settle(folder: Folder, note: str, lock: FileLock, command: Sequence[str], client_id: str, limit: float) -> bool:
    data = _content(folder)
    certificate = certificate_in(data)
    owed = os.pread(lock.fd, 4096, 0).split()
    if certificate is None or _hash(certificate) not in owed or not folder.leads_to(note, lock.fd):
        return False
    _run(command, _environment(folder.path, data, client_id), limit)
    if folder.leads_to(note, lock.fd):
        os.unlink(note, dir_fd=folder.fd)
    return True


def is_owed(key_file: str) -> bool:
    """Whether the hook is owed for the certificate in `key_file`, as far as the caller may see that."""
    try:
        with Folder(key_file) as folder:
            certificate = certificate_in(_content(folder))
            return certificate is not None and _hash(certificate) in _owed(folder)
    except (OSError, StorageError):
        return False


def _read(folder: Folder, name: str, size: int) -> bytes:
    """What the file `name` holds, without a lock: a reader sees the whole old or the whole new content."""
    with open(folder.open(name), "rb") as file:
        return file.read(size)


def _content(folder: Folder) -> bytes:
    return _read(folder, folder.name, MAXIMUM)


def _owed(folder: Folder) -> list[bytes]:
    try:
        return _read(folder, folder.beside("hook"), 4096).split()
    except OSError:
        return []


def _environment(key_file: str, data: bytes, client_id: str) -> dict[str, str]:
    until = remembered(data).get("until", "").rstrip("Z").replace("T", " ")
    if not until:
        from . import certificates  # a file without the line of text: one that can't be written

        told = certificates.describe(certificate_in(data) or b"")
        until = utc(told.not_after) if told else ""
    return {
        **os.environ,
        "CARAMEL_CN": client_id,
        "CARAMEL_KEY_FILE": key_file,
        "CARAMEL_NOT_AFTER": until if until.endswith("UTC") else until + " UTC",
    }


def _hash(certificate: bytes) -> bytes:
    return hashlib.sha256(certificate).hexdigest().encode()


def _run(command: Sequence[str], environment: Mapping[str, str], limit: float) -> None:
    import subprocess  # most runs with a hook have none to call

    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output belongs to whoever asked for it; a hook's words are for the log
            env=environment,
            start_new_session=True,  # so that all of it can be ended
        )
    except (OSError, ValueError) as error:
        raise HookFailed("the hook %s can't be run: %s" % (command[0], getattr(error, "strerror", error))) from None
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        raise HookFailed("the hook %s was ended after %g seconds" % (command[0], limit)) from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status < 0:
        raise HookFailed("the hook %s was ended by signal %d" % (command[0], -status))
    if status > 0:
        raise HookFailed("the hook %s failed with status %d" % (command[0], status))
