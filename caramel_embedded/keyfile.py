"""The combined file: lock, read, replace.

Responsible for this: whatever is killed or loses power, the path holds the whole old or the whole new content with
the right owner and mode; one process at a time works on it; nothing is written that doesn't change anything. Leaves
to others what the content means.

The lock is flock(2) on the key file itself, so that flock(1) sees it. A replacement is another inode: it is locked
before it gets the name, and whoever got a lock has to look whether the path still names what was locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from .errors import Locked, StorageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Optional

MAXIMUM = 1 << 20  # bytes; a longer file is nothing that this program wrote


def _problem(what: str, path: str, error: OSError) -> StorageError:
    return StorageError("%s %s: %s" % (what, path, error.strerror or error))


class KeyFile:
    """The key file, locked, until `close`."""

    def __init__(self, path: str, fd: int, created: bool = False) -> None:
        self._path = path
        self._fd = fd
        self._locks = [fd]
        self._created = created

    @classmethod
    def open(cls, path: str) -> Optional[KeyFile]:
        """The file at `path`, locked; None where there is none. Symbolic links are followed.

        Never waits. Raises `Locked`, `StorageError`.
        """
        path = os.path.realpath(path)
        for _ in range(3):
            try:
                # Read-only, so that a read-only file system will do for a run that changes nothing, and so that no
                # stray output can ever land in the file. O_NONBLOCK: somebody may have put a FIFO there.
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise _problem("can't open", path, error) from None
            if _lock(path, fd):
                return cls(path, fd)
            os.close(fd)  # it was replaced or removed between open and flock
        raise Locked("another process is replacing " + path)

    @classmethod
    def create(cls, path: str, owner: int, group: int, mode: int) -> KeyFile:
        """The file at `path`, locked, made empty where there is none; folders that are missing are made.

        Raises `Locked`, `StorageError`.
        """
        target = os.path.realpath(path)
        _make_folder(os.path.dirname(target))
        for _ in range(3):
            try:
                fd = _create_empty(target, owner, group, mode)
            except FileExistsError:
                file = cls.open(target)
                if file is not None:
                    return file
            except OSError as error:
                raise _problem("can't make", target, error) from None
            else:
                if _lock(target, fd):
                    return cls(target, fd, created=True)
                os.close(fd)
        raise Locked("another process is making " + target)

    @property
    def path(self) -> str:
        """The path of the file itself, where the caller's may be a symbolic link."""
        return self._path

    @property
    def modified(self) -> float:
        """The modification time in seconds since 1970, UTC."""
        return int(os.fstat(self._fd).st_mtime)

    def read(self) -> bytes:
        """The content. Raises `StorageError`."""
        data = b""
        try:
            while len(data) <= MAXIMUM:
                piece = os.pread(self._fd, 65536, len(data))
                if not piece:
                    break
                data += piece
        except OSError as error:
            raise _problem("can't read", self._path, error) from None
        return data

    def has(self, owner: int, group: int, mode: int) -> bool:
        """Whether the file has this owner, group and mode."""
        status = os.fstat(self._fd)
        return (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (owner, group, mode)

    def replace(self, data: bytes, modified: Optional[float], owner: int, group: int, mode: int) -> None:
        """Puts `data` in the place of what was there, at once and durably.

        `modified`: the modification time in seconds since 1970, UTC; None: now. When this returns, a power cut can
        no longer bring back the old content. Raises `StorageError`: then the old content is still there.
        """
        fd = _put(self._path, data, modified, owner, group, mode)
        # From here on the new content is there, and locked, whatever happens to the rest.
        self._created = False
        self._locks.append(fd)
        self._fd = fd
        _sync_folder(os.path.dirname(self._path))

    def touch(self, modified: float) -> None:
        """Sets the modification time, seconds since 1970, UTC, where that is possible; the content stays."""
        try:
            os.utime(self._fd, (modified, modified))
        except (OSError, OverflowError):
            pass  # it only saves bytes on the link

    def clean(self) -> None:
        """Removes what a killed run may have left beside the file."""
        _discard(_draft(self._path))

    def close(self) -> None:
        """Gives the lock back. A file that this run made and put nothing in is removed."""
        if self._created:
            try:
                os.unlink(self._path)
            except OSError:
                pass
        for fd in self._locks:
            os.close(fd)
        self._locks = []


def replace(path: str, data: bytes) -> None:
    """Puts `data` in the place of the file at `path`, at once and durably; readable by its owner only.

    For what is kept beside a key file, by the holder of its lock. Raises `StorageError`.
    """
    os.close(_put(path, data, None, os.geteuid(), os.getegid(), 0o600))
    _sync_folder(os.path.dirname(path))


def _put(path: str, data: bytes, modified: Optional[float], owner: int, group: int, mode: int) -> int:
    """Gives the name `path` to a new file with `data`; its descriptor, which holds a lock on it."""
    draft = _draft(path)
    _discard(draft)
    try:
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _problem("can't make", draft, error) from None
    try:
        _hand_over(fd, owner, group, mode)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # locked before it has the name
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]
        if modified is not None:
            try:
                os.utime(fd, (modified, modified))
            except OverflowError:
                pass  # a time that this system can't count to; it only saves bytes on the link
        os.fsync(fd)  # the content before the name: rename(2) alone promises no order
        os.rename(draft, path)
    except BaseException as error:
        os.close(fd)
        _discard(draft)
        if isinstance(error, OSError):
            raise _problem("can't store", path, error) from None
        raise
    return fd


def _draft(path: str) -> str:
    # One fixed name: only the holder of the lock uses it, so there is never more than one to clean up.
    folder, name = os.path.split(path)
    return os.path.join(folder, ".%s.new" % name[:200])


def _discard(draft: str) -> None:
    try:
        os.unlink(draft)
    except OSError:
        pass  # not there, as a rule; where it can't be removed, making the next one fails and says why


def _lock(path: str, fd: int) -> bool:
    """Locks `fd`; whether `path` still names it then. Raises `Locked`, or `StorageError` for what is no file."""
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise StorageError("%s is no regular file" % path)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Locked("another process holds the lock on " + path) from None
    except OSError as error:
        os.close(fd)
        raise _problem("can't lock", path, error) from None
    try:
        named = os.stat(path)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == (status.st_dev, status.st_ino)


def _create_empty(path: str, owner: int, group: int, mode: int) -> int:
    """An empty file with this owner, group and mode from the moment it has its name; its descriptor.

    O_TMPFILE and linkat(2), see open(2). A file system that has neither (FAT, JFFS2) gets a file that becomes what
    it should be a moment later; nothing is in it then. Raises FileExistsError, OSError.
    """
    folder = os.path.dirname(path)
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _hand_over(fd, owner, group, mode)
        except BaseException:
            os.unlink(path)
            os.close(fd)
            raise
        return fd
    try:
        _hand_over(fd, owner, group, mode)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # locked before it has a name
        # `src_dir_fd` means nothing before an absolute path, but makes Python call linkat(2), which follows the link.
        os.link("/proc/self/fd/%d" % fd, path, src_dir_fd=fd, follow_symlinks=True)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _hand_over(fd: int, owner: int, group: int, mode: int) -> None:
    status = os.fstat(fd)
    # Only where it differs: file systems without owners refuse even that which changes nothing.
    if (status.st_uid, status.st_gid) != (owner, group):
        os.fchown(fd, owner, group)
    if stat.S_IMODE(status.st_mode) != mode:
        os.fchmod(fd, mode)


def _make_folder(folder: str) -> None:
    missing = []
    while not os.path.isdir(folder) and folder != "/":
        missing.append(folder)
        folder = os.path.dirname(folder)
    for folder in reversed(missing):
        try:
            os.mkdir(folder, 0o755)
        except FileExistsError:
            pass
        except OSError as error:
            raise _problem("can't make the folder", folder, error) from None
        # A folder that a power cut takes away takes the key along.
        _sync_folder(os.path.dirname(folder))


def _sync_folder(folder: str) -> None:
    """Makes names in `folder` durable, see fsync(2). Raises `StorageError`."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some file systems (of FUSE, FAT on old kernels) can't do that to a folder; they have no order to keep.
            if error.errno != errno.EINVAL:
                raise
        finally:
            os.close(fd)
    except OSError as error:
        raise _problem("can't flush the folder", folder, error) from None
