"""The combined file: lock, read, replace.

Responsible for this: whatever is killed or loses power, the path holds the whole old or the whole new content with
the right owner and mode; one process at a time works on it; nothing is written that doesn't change anything. Whoever
else may write to the file's folder spoils this file and nothing else: all work is done by name in the opened folder.
Leaves to others what the content means.

The lock is flock(2) on the key file itself, so that flock(1) sees it. A replacement is another inode: it is locked
before it gets the name, and whoever got a lock has to look whether the name still leads to what was locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Optional, Union

from fasteners import InterProcessLock  # type: ignore[import-untyped, unused-ignore]

from .errors import Locked, StorageError
from .settings import Permissions

MAXIMUM = 1 << 20  # bytes; a longer file is nothing that this program wrote
MAXIMUM_LINKS = 40  # as the kernel's, path_resolution(7)
MOUNT_POINT = "%s is mounted by itself, and can't be replaced: mount its folder"
IS_IN_MEMORY = "%s is in memory (%s): each boot begins with a new key and request"
IN_MEMORY = ("tmpfs", "ramfs", "rootfs")  # the last one is the first file system of all, which an initramfs is in


@contextmanager
def doing(what: str, path: str, but: Union[type[OSError], tuple[()]] = ()) -> Iterator[None]:
    """Turns what the system says into a `StorageError` that names what was done, "store" say, and to which file.

    `but`: errors that are left as they are.
    """
    try:
        yield
    except but:
        raise
    except OSError as error:
        raise StorageError("can't %s %s: %s" % (what, path, error.strerror or error)) from None


class FileLock(InterProcessLock):  # type: ignore[misc, unused-ignore]  # no types in older releases
    """flock(2) on a file that is already open: fasteners' own is a POSIX record lock, which flock(1) doesn't see."""

    def __init__(self, fd: int) -> None:
        """`fd`: a regular file's descriptor, which belongs to the lock from here on."""
        super().__init__("key file")  # a name without a folder: fasteners would make the folder
        self.lockfile = open(fd, "rb", buffering=0)  # noqa: SIM115

    @property
    def fd(self) -> int:
        """The descriptor of the file."""
        number: int = self.lockfile.fileno()
        return number

    def trylock(self) -> None:
        """Raises OSError, EAGAIN where another process holds the lock."""
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def unlock(self) -> None:
        """Gives the lock back."""
        fcntl.flock(self.fd, fcntl.LOCK_UN)

    def take(self) -> bool:
        """Takes the lock without waiting; False where another process has it. Raises OSError."""
        try:
            return bool(self.acquire(blocking=False))
        except RuntimeError as error:  # fasteners has put what happened into one of its own
            raise error.__context__ or error from None

    def drop(self) -> None:
        """Gives the lock back, if it is held, and closes the file."""
        if self.acquired:
            self.release()
        elif self.lockfile is not None:
            self.lockfile.close()


class Folder:
    """The folder of a key file, opened; what is done in it is done by name, and nowhere else.

    Attributes: path: of the key file itself; name: its name in the folder; shared: whether anybody but root and the
    caller may write to the folder.
    """

    def __init__(self, path: str, make: bool = False) -> None:
        """Follows `path`, absolute, folder by folder; with `make`, makes those that are missing.

        A symbolic link is followed where it and its folder belong to root or the caller, and nobody else may write
        there. Raises FileNotFoundError where a folder is missing, `StorageError`.
        """
        self.path = path
        self.fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with doing("open the folder of", path, but=FileNotFoundError):
                self.name = self._follow(path, make)
                self.shared = self._is_shared()
        except BaseException:
            self.close()
            raise
        if _PROC:
            self.path = os.path.join(os.readlink("/proc/self/fd/%d" % self.fd), self.name)

    def _follow(self, path: str, make: bool) -> str:
        parts, links = _parts(path), 0
        while True:
            name = parts.pop(0)
            try:
                status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            except FileNotFoundError:
                if not parts:
                    return name
                if not make:
                    raise
                self._make(name)
                parts.insert(0, name)
                continue
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > MAXIMUM_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if status.st_uid not in (0, os.geteuid()) or self._is_shared():
                    raise StorageError(
                        "%s: %s is a symbolic link that somebody else may have put there" % (path, name)
                    )
                target = os.readlink(name, dir_fd=self.fd)
                if target.startswith("/"):
                    self._go_to("/")
                parts = [*_parts(target), *parts]
            elif parts:
                self._go_to(name)
            else:
                return name

    def _go_to(self, name: str) -> None:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=self.fd)
        os.close(self.fd)
        self.fd = fd

    def _make(self, name: str) -> None:
        mask = os.umask(0o022)
        try:
            os.mkdir(name, 0o755, dir_fd=self.fd)
        except FileExistsError:
            return
        finally:
            os.umask(mask)
        self.sync()  # a folder that a power cut takes away takes the key along

    def _is_shared(self) -> bool:
        status = os.fstat(self.fd)
        return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & 0o022)

    def open(self, name: str, flags: int = os.O_RDONLY) -> int:
        """A descriptor of the regular file `name`. Raises FileNotFoundError, OSError, `StorageError`."""
        # O_NONBLOCK: somebody may have put a FIFO there.
        fd = os.open(name, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        status = os.fstat(fd)
        wrong = None
        if not stat.S_ISREG(status.st_mode):
            wrong = "is no regular file"
        elif status.st_nlink > 1 and self.shared:
            wrong = "is a hard link that somebody else may have put there"
        if wrong:
            os.close(fd)
            raise StorageError("%s %s" % (self.path_of(name), wrong))
        return fd

    def create(self, name: str) -> int:
        """A descriptor of the new file `name`, for its owner alone. Raises FileExistsError, OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self.fd)

    def leads_to(self, name: str, fd: int) -> bool:
        """Whether `name` is the file that `fd` is open on."""
        try:
            return os.path.samestat(os.stat(name, dir_fd=self.fd, follow_symlinks=False), os.fstat(fd))
        except FileNotFoundError:
            return False

    def path_of(self, name: str) -> str:
        """The path of the file `name`, for a person."""
        return os.path.join(os.path.dirname(self.path), name)

    def beside(self, suffix: str) -> str:
        """The name of a file that belongs to the key file, see `beside`."""
        return os.path.basename(beside(self.path, suffix))

    def put(self, name: str, data: bytes, modified: Optional[float], permissions: Permissions) -> FileLock:
        """Puts a new file with `data` in the place of `name`; a lock on it, which is held before it has the name.

        `modified`: seconds since 1970, UTC; None: now. Raises OSError: then the old file is still there.
        """
        # One fixed name: only the holder of the lock uses it, so there is never more than one to clean up.
        draft = self.beside("new")
        self.discard(draft)
        fd = self.create(draft)
        lock = FileLock(fd)
        try:
            _hand_over(fd, permissions)
            lock.take()
            unwritten = memoryview(data)
            while unwritten:
                unwritten = unwritten[os.write(fd, unwritten) :]
            if modified is not None:
                _set_time(fd, modified)
            os.fsync(fd)  # the content before the name: rename(2) alone promises no order
            os.rename(draft, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        except BaseException:
            lock.drop()
            self.discard(draft)
            raise
        return lock

    def sync(self, fd: Optional[int] = None) -> None:
        """Makes the names in the folder durable, then that of the file `fd` on a FAT. Raises `StorageError`."""
        with doing("flush the folder of", self.path):
            try:
                folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
            except PermissionError:
                os.sync()  # a folder that may be written to and not be read can't be flushed by itself
            else:
                try:
                    os.fsync(folder)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # some file systems (of FUSE) can't do that to a folder
                        raise
                finally:
                    os.close(folder)
            if fd is not None:
                # FAT keeps a file's size and start in its name's slot, and writes that slot for the file, not for
                # the folder: without this the renamed file is empty after a power cut. After the folder, because
                # two slots with one content make fsck.fat empty one of them.
                os.fsync(fd)

    @property
    def in_memory(self) -> Optional[str]:
        """The kind of file system, where the next boot finds nothing of it: tmpfs, ramfs, or an overlay over one."""
        mounted: dict[str, list[str]] = {}  # by device: kind, source, options
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
                for line in file:
                    fields = line.rstrip("\n").split(" ")  # proc_pid_mountinfo(5)
                    mounted[fields[2]] = fields[fields.index("-") + 1 :]
            kind, _, options = mounted[_device(os.fstat(self.fd))]
            if kind != "overlay":
                return kind if kind in IN_MEMORY else None
            # What is written lands in its upper layer.
            upper = next(option[9:] for option in options.split(",") if option.startswith("upperdir="))
            return kind if mounted[_device(os.stat(upper))][0] in IN_MEMORY else None
        except (OSError, LookupError, StopIteration):
            return None  # nothing that is known: a subvolume of btrfs, an upper layer that was mounted elsewhere

    def is_mount_point(self, fd: int) -> bool:
        """Whether the file that `fd` is open on is mounted by itself, so that no other one can get its name."""
        return _PROC and _mount(fd) != _mount(self.fd)

    def discard(self, name: str, fd: Optional[int] = None) -> None:
        """Removes the file `name`, where that is possible; with `fd`, only if it is the file that `fd` is open on."""
        try:
            if fd is None or self.leads_to(name, fd):
                os.unlink(name, dir_fd=self.fd)
        except OSError:
            pass  # not there, as a rule; where it can't be removed, making the next one fails and says why

    def close(self) -> None:
        """Closes the folder; so does the end of a ``with``."""
        os.close(self.fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_PROC = os.path.exists("/proc/self/fd")


def _device(status: os.stat_result) -> str:
    return "%d:%d" % (os.major(status.st_dev), os.minor(status.st_dev))


def _mount(fd: int) -> bytes:
    with open("/proc/self/fdinfo/%d" % fd, "rb") as file:
        return file.read().partition(b"mnt_id:")[2].partition(b"\n")[0]  # proc_pid_fdinfo(5)


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")] or ["."]


class KeyFile:
    """A file, locked, until `close`: the key file, or the hook's note beside it."""

    def __init__(self, folder: Folder, lock: FileLock, created: bool = False) -> None:
        self._folder = folder
        # Those of what was replaced too: who waits for one of them waits until the run ends.
        self._locks = [lock]
        self._created = created

    @classmethod
    def open(cls, path: str) -> Optional[KeyFile]:
        """The file at `path`, locked; None where there is none. Never waits. Raises `Locked`, `StorageError`."""
        try:
            folder = Folder(path)
        except FileNotFoundError:
            return None
        lock = None
        try:
            lock = _open_locked(folder)
        finally:
            if lock is None:
                folder.close()
        return lock and cls(folder, lock)

    @classmethod
    def create(cls, path: str, permissions: Permissions) -> KeyFile:
        """The file at `path`, locked, made empty where there is none; folders that are missing are made.

        Raises `Locked`, `StorageError`.
        """
        with doing("make the folder of", path):
            folder = Folder(path, make=True)
        try:
            for _ in range(3):
                lock = _open_locked(folder)
                if lock is not None:
                    return cls(folder, lock)
                with doing("make", path):
                    lock = _create_locked(folder, permissions)
                if lock is not None:
                    return cls(folder, lock, created=True)
            raise Locked("another process is making " + path)
        except BaseException:
            folder.close()
            raise

    @property
    def path(self) -> str:
        """The path of the file itself, where the caller's may be a symbolic link."""
        return self._folder.path

    @property
    def _fd(self) -> int:
        return self._locks[-1].fd

    @property
    def modified(self) -> float:
        """The modification time in seconds since 1970, UTC."""
        return int(os.fstat(self._fd).st_mtime)

    def read(self) -> bytes:
        """The content. Raises `StorageError`, also for a file that is too long to be a key file."""
        return read(self._fd, self.path)

    def prepare(self) -> None:
        """Makes sure that `replace` will be able to, as far as that can be known. Raises `StorageError`.

        For what is to be made with much effort: a key takes half a minute on a small device.
        """
        draft = self._folder.beside("new")
        with doing("store", self.path):
            if self.is_mount_point:
                raise StorageError(MOUNT_POINT % self.path)
            self._folder.discard(draft)
            fd = self._folder.create(draft)
            try:
                os.write(fd, bytes(8192))  # more than a key and its request take
            finally:
                os.close(fd)
                self._folder.discard(draft)

    @property
    def is_mount_point(self) -> bool:
        """Whether the file is mounted by itself: it can be read, and nothing can be put in its place."""
        return self._folder.is_mount_point(self._fd)

    @property
    def remarks(self) -> list[str]:
        """What is wrong with the place that the file is in, for a person; as a rule nothing."""
        return _remarks(self._folder, self._fd)

    def replace(self, data: bytes, modified: Optional[float], permissions: Permissions) -> None:
        """Puts `data` in the place of what was there, at once and durably.

        `modified`: the modification time in seconds since 1970, UTC; None: now. When this returns, a power cut can
        no longer bring back the old content. Raises `StorageError`: then the old content is still there.
        """
        with doing("store", self.path):
            lock = self._folder.put(self._folder.name, data, modified, permissions)
        # From here on the new content is there, and locked, whatever happens to the rest.
        self._created = False
        self._locks.append(lock)
        self._folder.sync(self._fd)

    @property
    def is_others(self) -> bool:
        """Whether the file belongs to neither root nor the caller: its owner may have it open for writing."""
        return os.fstat(self._fd).st_uid not in (0, os.geteuid())

    @property
    def permissions(self) -> Permissions:
        """The file's own."""
        status = os.fstat(self._fd)
        return Permissions(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))

    def set_permissions(self, permissions: Permissions) -> None:
        """Gives the file these in its place. Raises `StorageError`."""
        has = self.permissions.mode
        with doing("set owner, group and mode of", self.path):
            # Never more than one of the two allows: first what both do, then the owner, then the rest.
            if has & ~permissions.mode:
                os.fchmod(self._fd, has & permissions.mode)
            _hand_over(self._fd, permissions)

    def touch(self, modified: float) -> None:
        """Sets the modification time, seconds since 1970, UTC, where that is possible; the content stays."""
        try:
            _set_time(self._fd, modified)
        except OSError:
            pass  # it only saves bytes on the link

    def clean(self) -> None:
        """Removes what a killed run may have left beside the file."""
        self._folder.discard(self._folder.beside("new"))

    def close(self) -> None:
        """Gives the lock back. The file that this run made and put nothing in is removed. May be called again."""
        if not self._locks:
            return
        if self._created:
            self._folder.discard(self._folder.name, self._fd)
        for lock in self._locks:
            lock.drop()
        self._locks = []
        self._folder.close()


def beside(path: str, suffix: str) -> str:
    """The path of a file that belongs to the one at `path`: hidden, and as long as a name can be (255 bytes)."""
    folder, name = os.path.split(path)
    if len(os.fsencode(name)) > 240:
        import hashlib  # rare enough

        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return os.path.join(folder, ".%s.%s" % (name, suffix))


def peek(path: str) -> tuple[bytes, Optional[os.stat_result]]:
    """The content of the file at `path`, whole and without a lock, and what stat(2) says of it; b"" and None where
    there is none. Raises `StorageError`."""
    try:
        with doing("read", path, but=FileNotFoundError), Folder(path) as folder:
            fd = folder.open(folder.name)
            with open(fd, "rb"):  # closes it
                return read(fd, path), os.fstat(fd)
    except FileNotFoundError:
        return b"", None


def require_place(path: str, permissions: Permissions) -> None:
    """Raises `StorageError` if nothing can be stored at `path`, as far as that shows without writing.

    A disk that is full doesn't show.
    """
    with doing("store", path):
        with suppress(FileNotFoundError), Folder(path) as folder, open(folder.open(folder.name), "rb") as file:
            if folder.is_mount_point(file.fileno()):
                raise StorageError(MOUNT_POINT % path)
        parent = os.path.dirname(path)
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        if os.statvfs(parent).f_flag & os.ST_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        with open(os.memfd_create("owner"), "rb") as nowhere:
            _hand_over(nowhere.fileno(), permissions)


def remarks(path: str) -> list[str]:
    """`KeyFile.remarks` of the file at `path`, without a lock, and as far as the caller may see."""
    try:
        with Folder(path) as folder, open(folder.open(folder.name), "rb") as file:
            return _remarks(folder, file.fileno())
    except (OSError, StorageError):
        return []


def _remarks(folder: Folder, fd: int) -> list[str]:
    found = [MOUNT_POINT % folder.path] if folder.is_mount_point(fd) else []
    kind = folder.in_memory
    return [*found, IS_IN_MEMORY % (folder.path, kind)] if kind else found


def read(fd: int, path: str) -> bytes:
    """The content of an opened key file. Raises `StorageError`."""
    with doing("read", path), open(fd, "rb", closefd=False) as file:
        file.seek(0)
        data = file.read(MAXIMUM + 1)
    if len(data) > MAXIMUM:
        raise StorageError("%s is longer than %d bytes: it is no key file, and left as it is" % (path, MAXIMUM))
    return data


def _open_locked(folder: Folder) -> Optional[FileLock]:
    """A lock on the key file in `folder`; None where there is no file. Raises `Locked`, `StorageError`."""
    flags = os.O_RDONLY  # a read-only file system will do; and no stray output can ever land in the file
    for _ in range(3):
        try:
            with doing("open", folder.path, but=FileNotFoundError):
                lock = FileLock(folder.open(folder.name, flags))
        except FileNotFoundError:
            return None
        current = False
        try:
            if not lock.take():
                raise Locked("another process holds the lock on " + folder.path)
            current = folder.leads_to(folder.name, lock.fd)  # it may have been replaced between open and flock
        except OSError as error:
            # NFS makes a record lock of it, which wants a file that can be written.
            if error.errno != errno.EBADF or flags == os.O_RDWR:
                raise StorageError("can't lock %s: %s" % (folder.path, error.strerror)) from None
            flags = os.O_RDWR
        finally:
            if not current:
                lock.drop()
        if current:
            return lock
    raise Locked("another process is replacing " + folder.path)


def _create_locked(folder: Folder, permissions: Permissions) -> Optional[FileLock]:
    """A lock on a new and empty key file; None where another process was faster. Raises OSError.

    The file is locked before anything is in it. Whoever opens it before that sees an empty file.
    """
    try:
        lock = FileLock(folder.create(folder.name))
    except FileExistsError:
        return None
    made = False
    try:
        if lock.take():
            _hand_over(lock.fd, permissions)
            made = folder.leads_to(folder.name, lock.fd)
    except BaseException as error:
        # What somebody else has locked, or has put there meanwhile, may hold a key. If the system has no locks,
        # nobody has locked it.
        if lock.acquired or isinstance(error, OSError):
            folder.discard(folder.name, lock.fd)
        raise
    finally:
        if not made:
            lock.drop()
    return lock if made else None


def _hand_over(fd: int, permissions: Permissions) -> None:
    status = os.fstat(fd)
    # Only where it differs: file systems without owners refuse even that which changes nothing.
    if (status.st_uid, status.st_gid) != permissions[:2]:
        try:
            os.fchown(fd, permissions.owner, permissions.group)
        except PermissionError as error:
            if os.geteuid() == 0:
                raise  # a file system without owners, say
            text = "only root can give it to %d:%d (--owner, --group), and this is user %d"
            text %= (*permissions[:2], os.geteuid())
            raise PermissionError(error.errno, text) from None
    if stat.S_IMODE(status.st_mode) != permissions.mode:
        os.fchmod(fd, permissions.mode)


def _set_time(fd: int, modified: float) -> None:
    try:
        os.utime(fd, (modified, modified))
    except OverflowError:
        pass  # a time that this system can't count to; it only saves bytes on the link
