"""Files in the user's own directory: checked before use, replaced as a whole, and locked; contents are not interpreted.

A process that can write a file which a program reads can steer the program. So a file must be a plain file of limited
size in a real directory. Both must belong to the user (or root), and no other user may have write permission. Each file
is opened relative to the descriptor of the checked directory, and is checked after it was opened, so that no file can
be exchanged in between.
"""

import contextlib
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["Busy", "directory", "hold_lock", "names", "read", "remove", "replace"]

MOST_BYTES = 1 << 20
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Busy(RuntimeError):
    """Another process or thread holds a lock; the message names the process."""


def directory() -> Path:
    """Return the directory of the files: $LORA_KERNELS_CACHE, else lora_kernels in $XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        RuntimeError: There is no home directory.
    """
    own, shared = (os.environ.get(name, "") for name in ("LORA_KERNELS_CACHE", "XDG_CACHE_HOME"))
    if own:
        return Path(own).expanduser()
    # The XDG specification says to ignore a relative path.
    base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
    return base / "lora_kernels"


def read(folder: Path, name: str) -> bytes:
    """Read the contents of a file.

    Raises:
        FileNotFoundError: The file or the directory does not exist.
        OSError: The file cannot be read.
        ValueError: The file or the directory is not safe, or the file is too large; the message says what to do.
    """
    with _open_directory(folder) as at, os.fdopen(_open(name, os.O_RDONLY | os.O_NONBLOCK, at, folder), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a plain file; remove it")
        _check_owner(status, folder / name)
        contents = file.read(MOST_BYTES + 1)
    if len(contents) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES} bytes; remove it")
    return contents


def replace(folder: Path, name: str, contents: bytes) -> None:
    """Write a file (mode 0600), and create the directory (0700); readers see the whole old or the whole new file.

    Raises:
        OSError: The file cannot be written; the old file remains, and no other.
        ValueError: The directory is not safe.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _open_directory(folder) as at:
        partial = f".{name}.{secrets.token_hex(8)}"
        try:
            with os.fdopen(_open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, at, folder), "wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, name, src_dir_fd=at, dst_dir_fd=at)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial, dir_fd=at)
            raise


def names(folder: Path) -> list[str]:
    """List the names in the directory, sorted; none if the directory does not exist. Raises as `read` does."""
    try:
        with _open_directory(folder) as at:
            return sorted(os.listdir(at))
    except FileNotFoundError:
        return []


def remove(folder: Path, name: str) -> None:
    """Remove a file. Raises as `read` does."""
    with _open_directory(folder) as at:
        os.unlink(name, dir_fd=at)


_held: dict[str, threading.Lock] = {}
_held_guard = threading.Lock()


@contextlib.contextmanager
def hold_lock(folder: Path, name: str, wait: bool) -> Iterator[None]:
    """Hold the lock file `name`, created if needed, against every other thread and process of this machine.

    Args:
        folder: The directory, created if needed.
        name: Name of the lock file. The file stays, because two processes could hold the lock if one removed the file.
        wait: Whether to wait for the lock.

    Raises:
        Busy: Another thread or process holds the lock and `wait` is False.
        OSError: The file cannot be created or locked.
        ValueError: The directory is not safe.
    """
    # Windows has no fcntl, and no kernels to tune.
    import fcntl

    with _held_guard:
        threads = _held.setdefault(f"{folder}/{name}", threading.Lock())
    if not threads.acquire(blocking=wait):
        raise Busy(f"a thread of this process ({os.getpid()}) is at it")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _open_directory(folder) as at, os.fdopen(_open(name, os.O_RDWR | os.O_CREAT, at, folder), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                pid = file.read(20)
                raise Busy(f"process {pid.decode() if pid.isdigit() else 'unknown'} is at it") from None
            file.truncate(0)
            file.write(b"%d" % os.getpid())
            file.flush()
            # Closing the file releases the lock.
            yield
    finally:
        threads.release()


@contextlib.contextmanager
def _open_directory(folder: Path) -> Iterator[int]:
    """Open the directory, check its owner, and yield its descriptor."""
    try:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if os.path.islink(folder):
            raise ValueError(f"{folder} is a symbolic link; name the directory itself") from None
        raise error
    try:
        _check_owner(os.fstat(at), folder)
        yield at
    finally:
        os.close(at)


def _open(name: str, flags: int, at: int, folder: Path) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=at)
    except OSError as error:
        if os.path.islink(folder / name):
            raise ValueError("it is a symbolic link; remove it") from None
        raise error


def _check_owner(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise ValueError(f"{path} belongs to another user; remove it or choose another directory")
    if status.st_mode & _OTHERS_WRITE:
        raise ValueError(f"{path} can be written by others; chmod go-w it, if what it holds is yours")
