"""The hook: a command that runs once for each new certificate that is in place.

Responsible for owing it: a note beside the key file says for which certificate the hook has still to succeed. It is
written before the certificate is, and removed after the hook's good end; a power cut or a failure in between means
that the next run calls the hook again. The hook runs without the key file's lock, so it may start this program again;
the note is locked meanwhile, so that such a run, or one by cron, doesn't call the hook a second time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os

from . import identity, keyfile, trust
from .errors import CaramelError, StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Optional


class HookFailed(CaramelError):
    """The certificate is in place, the hook did not succeed: the next run calls it again."""


def owe(key_file: str, certificate: bytes) -> None:
    """Notes that the hook is owed for `certificate`, which is about to be stored in `key_file` (no symbolic link).

    What is owed for the one that is there stays owed until then. Raises `StorageError`.
    """
    lines = [_hash(certificate)]
    current = _certificate_in(key_file)
    if current is not None and current != certificate and is_owed(key_file):
        lines.append(_hash(current))
    keyfile.replace(_note(key_file), b"".join(line + b"\n" for line in lines))


def settle(key_file: str, command: Sequence[str], client_id: str, limit: float) -> bool:
    """Runs `command` if it is owed for the certificate in `key_file` (no symbolic link); whether it ran.

    `limit`: seconds. Raises `HookFailed`, `StorageError`.
    """
    note = _note(key_file)
    try:
        fd = os.open(note, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False  # nothing is owed
    except OSError as error:
        raise StorageError("can't read %s: %s" % (note, error.strerror)) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owed = os.read(fd, 4096).split()
        # A reader needs no lock: it sees the whole old or the whole new content.
        certificate = _certificate_in(key_file)
        if certificate is None or _hash(certificate) not in owed or not _is_named(fd, note):
            return False
        _run(command, _environment(key_file, certificate, client_id), limit)
        if _is_named(fd, note):
            os.unlink(note)
        return True
    except BlockingIOError:
        return False  # another run is at it; perhaps the hook itself has started this one
    except OSError as error:
        raise StorageError("can't settle %s: %s" % (note, error.strerror)) from None
    finally:
        os.close(fd)


def is_owed(key_file: str) -> bool:
    """Whether the hook is owed for the certificate in `key_file`, as far as the caller may see that."""
    certificate = _certificate_in(key_file)
    try:
        with open(_note(key_file), "rb") as file:
            return certificate is not None and _hash(certificate) in file.read(4096).split()
    except OSError:
        return False


def _note(key_file: str) -> str:
    folder, name = os.path.split(key_file)
    return os.path.join(folder, ".%s.hook" % name[:200])


def _certificate_in(key_file: str) -> Optional[bytes]:
    try:
        with open(key_file, "rb") as file:
            return identity.certificate_in(file.read(keyfile.MAXIMUM))
    except OSError:
        return None


def _is_named(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _environment(key_file: str, certificate: bytes, client_id: str) -> dict[str, str]:
    return {
        **os.environ,
        "CARAMEL_CN": client_id,
        "CARAMEL_KEY_FILE": key_file,
        "CARAMEL_NOT_AFTER": trust.utc(identity.not_after(certificate)),
    }


def _hash(certificate: bytes) -> bytes:
    return hashlib.sha256(certificate).hexdigest().encode()


def _run(command: Sequence[str], environment: Mapping[str, str], limit: float) -> None:
    import signal
    import subprocess

    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output belongs to --status; a hook's words are for whoever reads the log
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
