"""Objects as files of a local or mounted disk."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from core.base.errors import RunError
from core.base.fault_points import fault_point
from core.object_store.base import Created, Entry, Listing, ObjectInfo, check_name, check_size, file_info

# Shared by all stores of the process: two of them may write the same name.
_SERIAL = itertools.count()
_TEMPORARY = re.compile(r"\.tmp~(?P<host>[^~]*)~(?P<space>\d+)~(?P<pid>\d+)~(?P<start>\d+)~\d+~.*", re.DOTALL)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into a RunError, with its own message for a full disk."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some space or choose a folder on another disk, then run the same command again to resume"
            raise RunError(f"disk full: no space left to write {path}; {advice}") from exc
        raise RunError(f"cannot write {path}: {exc.strerror or exc}; check the folder's permissions and disk") from exc


class LocalStore:
    """A folder on a local or mounted disk.

    A file appears under its name complete and synced, or not at all: it is written under a hidden temporary name in the
    same folder, synced, hard-linked to its name (which fails if the name is taken), and the folder is synced.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(os.path.abspath(os.path.expanduser(path)))
        self.url = str(self.root)

    def temporary_path(self, name: str) -> Path:
        """A hidden path, on the same filesystem as `name`, to write its content to; `create_file` consumes the file.

        Its name has host, process-id namespace, process id and start time, so that the leftover of a dead process can
        be distinguished from a file that is being written.
        """
        final = self._path(name)
        mark = "~".join(_process_mark(os.getpid()))
        return self._folder_of(final) / f".tmp~{mark}~{next(_SERIAL)}~{final.name[-80:]}"

    def create_bytes(self, name: str, data: bytes) -> Created:
        """See `ObjectStore`. Synced to the disk when it returns."""
        final = self._path(name)
        temporary = self._write_temporary(name, data)
        if _publish(temporary, final):
            return Created.CREATED
        return Created.ALREADY_SAME if final.read_bytes() == data else Created.ALREADY_DIFFERENT

    def create_file(self, name: str, local_path: Path, info: ObjectInfo) -> Created:
        """See `ObjectStore`. Synced to the disk when it returns.

        A file from `temporary_path` is linked and consumed, even when the name is taken or the disk is full. Any other
        file is copied and stays: through a link, a later change of it would change a committed object.
        """
        final = self._path(name)
        check_size(local_path, info)
        with _removing(local_path) if _is_temporary(local_path.name) else contextlib.nullcontext():
            linkable = _is_temporary(local_path.name) and _device(local_path) == _device(self._folder_of(final))
            created = _publish(local_path if linkable else self._copy_temporary(name, local_path), final)
        if created:
            return Created.CREATED
        return Created.ALREADY_SAME if file_info(final) == info else Created.ALREADY_DIFFERENT

    def replace_bytes(self, name: str, data: bytes) -> None:
        """See `ObjectStore`."""
        final = self._path(name)
        temporary = self._write_temporary(name, data)
        with _removing(temporary), disk_errors(final):
            _sync_file(temporary)
            os.replace(temporary, final)
            sync_folder(final.parent)

    def read_bytes(self, name: str) -> bytes:
        """See `ObjectStore`."""
        return self._path(name).read_bytes()

    def open(self, name: str) -> BinaryIO:
        """See `ObjectStore`."""
        return open(self._path(name), "rb")

    def info(self, name: str) -> ObjectInfo | None:
        """See `ObjectStore`."""
        try:
            return file_info(self._path(name))
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> list[str]:
        """See `ObjectStore`."""
        return sorted(name for name, _ in self._walk_names(prefix))

    def listing(self, prefix: str = "") -> Listing:
        """See `ObjectStore`."""
        entries = []
        for name, path in sorted(self._walk_names(prefix)):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                # Replacing an object creates a new file, so the inode changes.
                version = f"{stat.st_ino}-{stat.st_mtime_ns}"
                entries.append(Entry(name, stat.st_size, stat.st_mtime, version))
        return Listing(tuple(entries), time.time())

    def delete(self, name: str) -> None:
        """See `ObjectStore`."""
        path = self._path(name)
        with disk_errors(path):
            path.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """See `ObjectStore`. The folder need not exist yet."""
        existing = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
        return shutil.disk_usage(existing).free

    def remove_stale_temporaries(self, folder: str = "") -> tuple[Path, ...]:
        """Delete the temporary files of dead processes of this host below `folder`, and return their paths.

        Files of other hosts and of other process-id namespaces (containers) stay: this process cannot know whether
        their writers are alive.
        """
        stale = tuple(path for path in _walk(self.root / folder, _ignore) if _is_stale(path.name))
        for path in stale:
            with disk_errors(path):
                path.unlink(missing_ok=True)
        return stale

    def _walk_names(self, prefix: str) -> Iterator[tuple[str, Path]]:
        for path in _walk(self.root / prefix.rpartition("/")[0], _raise_unless_missing):
            name = path.relative_to(self.root).as_posix()
            if name.startswith(prefix) and not _is_temporary(path.name):
                yield name, path

    def _path(self, name: str) -> Path:
        return self.root / check_name(name)

    def _folder_of(self, final: Path) -> Path:
        with disk_errors(final):
            _make_folders(final.parent)
        return final.parent

    def _write_temporary(self, name: str, data: bytes) -> Path:
        temporary = self.temporary_path(name)
        with _removing_on_error(temporary), disk_errors(self._path(name)):
            temporary.write_bytes(data)
        return temporary

    def _copy_temporary(self, name: str, source: Path) -> Path:
        temporary = self.temporary_path(name)
        with _removing_on_error(temporary), disk_errors(self._path(name)):
            shutil.copyfile(source, temporary)
        return temporary


def _publish(temporary: Path, final: Path) -> bool:
    """Link a finished file to its final name; False if the name is taken. The temporary name is removed."""
    with _removing(temporary), disk_errors(final):
        _sync_file(temporary)
        fault_point("disk.synced")
        try:
            _take_name(temporary, final)
        except FileExistsError:
            # Over NFS a link can succeed and its reply be lost: the retry then finds our own link.
            if not (temporary.exists() and os.path.samefile(temporary, final)):
                return False
        fault_point("disk.linked")
        sync_folder(final.parent)
        return True


def _take_name(temporary: Path, final: Path) -> None:
    try:
        os.link(temporary, final)
    except OSError as exc:
        if exc.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        _rename_exclusively(temporary, final)


def _rename_exclusively(temporary: Path, final: Path) -> None:
    """For filesystems without hard links (FAT, some network and FUSE mounts): Linux's rename without replacement.

    Creating the final name with O_EXCL and copying into it would be exclusive, too, but a partial file would be visible
    meanwhile, and after a crash it would occupy the name forever. Checking and then renaming is not exclusive. So a
    filesystem that supports neither is refused.
    """
    import ctypes

    no_replace, current_folder = 1, -100
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        if libc.renameat2(current_folder, os.fsencode(temporary), current_folder, os.fsencode(final), no_replace) == 0:
            return
        if ctypes.get_errno() == errno.EEXIST:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
    advice = "choose a folder on another filesystem, or a gs:// URL"
    raise RunError(f"{final.parent}: this filesystem supports neither hard links nor exclusive rename; {advice}")


@contextlib.contextmanager
def _removing(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _removing_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _device(path: Path) -> int:
    return path.stat().st_dev


def _make_folders(folder: Path) -> None:
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, as far as its filesystem supports it."""
    try:
        _sync_file(folder)
    except OSError as exc:
        # Some FUSE and network mounts cannot sync a folder; durability of their renames and links is out of our hands.
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR):
            raise


def _walk(folder: Path, on_error: Callable[[OSError], None]) -> Iterator[Path]:
    for parent, _, files in os.walk(folder, onerror=on_error):
        yield from (Path(parent, name) for name in files)


def _ignore(error: OSError) -> None:
    """Skips unreadable folders: what cannot be listed cannot be cleaned up."""


def _raise_unless_missing(error: OSError) -> None:
    """Skipping an unreadable folder would make it look empty; a missing one, or a file in its place, is empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise RunError(f"{error.filename}: cannot be listed: {error.strerror}; check its permissions") from error


def _is_temporary(file_name: str) -> bool:
    return _TEMPORARY.fullmatch(file_name) is not None


def _is_stale(file_name: str) -> bool:
    match = _TEMPORARY.fullmatch(file_name)
    if match is None:
        return False
    host, space, _, _ = _process_mark(os.getpid())
    if (match["host"], match["space"]) != (host, space):
        return False
    pid, start = int(match["pid"]), match["start"]
    return not _is_alive(pid) or _process_start(pid) != start


def _process_mark(pid: int) -> tuple[str, str, str, str]:
    """Host, process-id namespace, process id and start time: no two processes of one host share it."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return host, str(space), str(pid), _process_start(pid)


def _process_start(pid: int) -> str:
    """Clock ticks from boot to the start of a process; "0" where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "0"
    return stat.rpartition(")")[2].split()[19]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
