"""The only way that archsearch reads and writes a file.

A file is written beside its place under a temporary name, forced to the disk and renamed, so that a reader
sees the old content or the new and never a part, whatever dies in between. A file is read only if it is a
regular one within a size limit, checked on the opened descriptor. Tensors are in ``tensor_files``.

Whatever the system refuses becomes one of our errors: ``ResourceError`` where we write, and where we read
the kind that the caller names, ``SpecError`` by default.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Final

from archsearch.bounded_yaml import Document, dump, parse, shown
from archsearch.errors import ArchsearchError, InUseError, ResourceError, SpecError

Location = str | os.PathLike[str]

MAX_YAML_BYTES: Final = 2**20
MAX_JSON_BYTES: Final = 16 * 2**20
LOCK_NAME: Final = ".lock"
LOOK_S: Final = 0.01

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TEMPORARY = re.compile(r"\.archsearch-([0-9a-f]{8})-([0-9]{1,7})-[0-9a-f]{16}\.tmp")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_CHUNK_BYTES = 2**20
_REMEDIES = {
    errno.ENOSPC: "free some space or choose another directory",
    errno.EDQUOT: "your quota is used up: free some space or choose another directory",
    errno.EROFS: "choose a directory that can be written",
    errno.EACCES: "choose a directory that you may write to",
    errno.EPERM: "choose a directory that you may write to",
    errno.ENOENT: "create the directory first",
    errno.ELOOP: "a symbolic link is not followed here: name the file itself",
    errno.EIO: "the disk reports an error: choose another one",
}
_unfinished: set[str] = set()  # temporary names that this process is writing now


# ---------------------------------------------------------------------------------------------- writing


def write_bytes(path: Location, data: bytes) -> None:
    """Write a file so that it holds the old content or the new one at any moment, also after a power cut.

    A symbolic link in the last place is replaced, not followed.

    Raises:
        ResourceError: If the system refuses; no temporary file is left.
    """
    path = Path(path)
    temporary = path.with_name(f".archsearch-{_host_tag()}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    _unfinished.add(temporary.name)
    try:
        _refuse_special(path)
        try:
            _write_new(temporary, data)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except (OSError, ValueError) as error:
        raise _refused(path, f"cannot write {len(data)} bytes", error) from error
    finally:
        _unfinished.discard(temporary.name)


def write_text(path: Location, text: str) -> None:
    """Write a file as UTF-8 with the line ends of ``text``, atomically as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_json(path: Location, data: object) -> None:
    """Write data as JSON, equal data as equal bytes: sorted keys, two spaces, LF, no NaN.

    Raises:
        SpecError: If the data are not plain values.
        ResourceError: If the system refuses.
    """
    try:
        text = json.dumps(data, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        encoded = text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"{named(path)}: cannot be written as JSON: {shown(str(error), 200)}") from error
    write_bytes(path, encoded + b"\n")


def write_yaml(path: Location, data: Mapping[str, Any]) -> None:
    """Write plain data as YAML in the order given; what is written reads back equal.

    Raises:
        SpecError: If the data are not plain values, or more than ``read_yaml`` would accept.
        ResourceError: If the system refuses.
    """
    try:
        encoded = dump(data).encode()
    except SpecError as error:
        raise SpecError(f"{named(path)}: {error}") from error
    if len(encoded) > MAX_YAML_BYTES:
        raise SpecError(f"{named(path)}: {len(encoded)} bytes of YAML: at most {MAX_YAML_BYTES}")
    write_bytes(path, encoded)


def append_line(path: Location, line: str) -> None:
    """Append one line to a record file and force it to the disk; lines of several writers do not mix.

    A last line that a killed writer left without its end stays alone: the new line starts on its own.

    Raises:
        SpecError: If ``line`` itself holds a line end.
        ResourceError: If the system refuses.
    """
    if "\n" in line or "\r" in line:
        raise SpecError(f"{named(path)}: a record must be one line, not {shown(line)}")
    data = line.encode() + b"\n"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        _refuse_special(Path(path))
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # until it is closed: what is looked at stays the end
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not size:
            _sync_directory(Path(path).parent)
    except (OSError, ValueError) as error:
        raise _refused(path, f"cannot append {len(data)} bytes", error) from error


def sweep(directory: Location) -> list[Path]:
    """Remove the temporary files that dead processes of this machine left in a directory; return them.

    Raises:
        ResourceError: If the directory cannot be read or a file cannot be removed.
    """
    swept = []
    try:
        for path in sorted(Path(directory).iterdir()):
            match = _TEMPORARY.fullmatch(path.name)
            if match and match[1] == _host_tag() and not _is_being_written(path.name, int(match[2])):
                path.unlink(missing_ok=True)
                swept.append(path)
    except (OSError, ValueError) as error:
        raise _refused(directory, "cannot remove old temporary files", error) from error
    return swept


# ---------------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def opened(path: Location, kind: type[ArchsearchError] = SpecError) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading and yield it with its size in bytes.

    Raises:
        ArchsearchError: Of ``kind``, if there is no such file, it is not a regular one, or reading fails.
    """
    try:
        # Without O_NONBLOCK the open itself would wait for ever on a FIFO that nobody writes.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise kind(f"{named(path)}: cannot be read: {_reason(error)}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise kind(f"{named(path)}: is {_sort_of(status.st_mode)}, not a regular file")
    try:
        with os.fdopen(descriptor, "rb") as file:
            yield file, status.st_size
    except OSError as error:
        raise kind(f"{named(path)}: cannot be read: {_reason(error)}") from error


def plain(text: str) -> str:
    """Return a text as the name of a file: letters, digits, points, underscores, and hyphens for the rest."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in text)


def read_bytes(path: Location, limit: int, kind: type[ArchsearchError] = SpecError) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
        ArchsearchError: Of ``kind``, if it is larger or cannot be read.
    """
    with opened(path, kind) as (file, size):
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        raise kind(f"{named(path)}: has {max(size, len(data))} bytes: at most {limit} are read")
    return data


def read_text(path: Location, limit: int, kind: type[ArchsearchError] = SpecError) -> str:
    """Read a regular UTF-8 file of at most ``limit`` bytes.

    Raises:
        ArchsearchError: Of ``kind``, as ``file: reason``.
    """
    data = read_bytes(path, limit, kind)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise kind(f"{named(path)}:{line}: is not UTF-8 text (byte {error.start})") from error


def read_json(path: Location, kind: type[ArchsearchError] = SpecError) -> Any:
    """Read a JSON file of at most ``MAX_JSON_BYTES``; a key that stands twice, NaN and infinity are refused.

    Raises:
        ArchsearchError: Of ``kind``, as ``file: reason``.
    """
    text = read_text(path, MAX_JSON_BYTES, kind)
    try:
        return json.loads(text, object_pairs_hook=distinct, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise kind(f"{named(path)}: is not the JSON that was expected: {shown(str(error), 200)}") from error


def read_yaml(path: Location) -> Document:
    """Read a YAML file of at most ``MAX_YAML_BYTES`` within the limits of ``bounded_yaml``.

    Raises:
        SpecError: As ``file:line: field: reason`` or ``file: reason``.
    """
    return parse(read_text(path, MAX_YAML_BYTES), named(path))


def sha256(path: Location, kind: type[ArchsearchError] = SpecError) -> str:
    """Return the SHA-256 of a regular file's content in hexadecimal digits.

    Raises:
        ArchsearchError: Of ``kind``, if it cannot be read.
    """
    digest = hashlib.sha256()
    with opened(path, kind) as (file, _):
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return JSON pairs as a dict.

    Raises:
        ValueError: If a key stands twice.
    """
    data = dict(pairs)
    if len(data) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"the key {shown(twice)} stands twice")
    return data


# ------------------------------------------------------------------------------------------ directories


@contextlib.contextmanager
def lock(directory: Location) -> Iterator[None]:
    """Hold a directory for this process alone; the kernel gives it back when the process dies.

    The lock file stays, since removing it would let two processes hold two files of one name.

    Raises:
        InUseError: If another process holds it; names the holder.
        ResourceError: If the system refuses.
    """
    path = Path(directory) / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as error:
        raise _refused(path, "cannot be locked", error) from error
    try:
        try:
            _take(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 512, 0).decode(errors="replace").strip() or "another process"
            raise InUseError(
                f"{named(directory)}: in use by {shown(holder, 200)[1:-1]}:"
                " wait for it or choose another directory"
            ) from None
        except OSError as error:
            raise _refused(path, "cannot be locked", error) from error
        start = datetime.now(timezone.utc).isoformat(timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()} since {start}\n"
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        except OSError as error:
            raise _refused(path, "cannot be locked", error) from error
        yield
    finally:
        # Closing is not enough where a child was forked: it still has the same open file.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def is_held(directory: Location) -> bool:
    """Return whether a process holds a directory by ``lock``; nothing is written.

    Raises:
        ResourceError: If the system refuses.
    """
    path = Path(directory) / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise _refused(path, "cannot be looked at", error) from error
    try:
        # Shared, so that several may look at once; closing gives it back.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise _refused(path, "cannot be looked at", error) from error
    finally:
        os.close(descriptor)
    return False


def probe(directory: Location, needed_bytes: int) -> None:
    """Create a directory if need be and prove that files can be written there, before long work starts.

    Raises:
        ResourceError: If it cannot be written or has less than ``needed_bytes`` of free space.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        trial = Path(directory) / f".archsearch-{_host_tag()}-{os.getpid()}-{secrets.token_hex(8)}.tmp"
        try:
            _write_new(trial, b"\0" * 4096)
        finally:
            trial.unlink(missing_ok=True)
        space = os.statvfs(directory)
    except (OSError, ValueError) as error:
        raise _refused(directory, f"cannot hold the {needed_bytes} bytes that are needed", error) from error
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"{named(directory)}: {needed_bytes} bytes are needed and {free_bytes} are free:"
            f" {_REMEDIES[errno.ENOSPC]}"
        )


def safe_name(name: str, what: str = "name") -> str:
    """Return ``name`` if it can be a file's or directory's name anywhere.

    Raises:
        SpecError: If not; says the rule.
    """
    if not _NAME.fullmatch(name):
        raise SpecError(
            f"{what} {shown(name)}: must be 1 to 64 of the characters A-Z a-z 0-9 . _ -"
            " and start with a letter or digit"
        )
    return name


def child(directory: Location, name: str, what: str = "name") -> Path:
    """Return the path of ``name`` in ``directory``, which a symbolic link may not lead out of.

    Raises:
        SpecError: If ``name`` is not safe, or leads elsewhere.
    """
    path = Path(directory) / safe_name(name, what)
    if not path.resolve().is_relative_to(Path(directory).resolve()):
        raise SpecError(f"{what} {shown(name)}: is a link that leads out of {named(directory)}: remove it")
    return path


def named(path: Location) -> str:
    """Return a path for a message: as it is, unless it would break the line."""
    text = os.fspath(path)
    return text if text.isprintable() else shown(text, 200)


# ---------------------------------------------------------------------------------------------- private


def _take(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOOK_S)  # who only looks with ``is_held`` has it for a moment
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _write_new(path: Path, data: bytes) -> None:
    descriptor = os.open(path, _NEW_FILE, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such call; their rename is on the server already.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _refuse_special(path: Path) -> None:
    """Refuse to put a file in the place of a device, a FIFO or a directory."""
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise ValueError(f"{_sort_of(mode)} stands in its place")


def _sort_of(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"


def _host_tag() -> str:
    """Return digits that differ between machines which share a directory."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_being_written(name: str, pid: int) -> bool:
    if pid == os.getpid():
        return name in _unfinished  # in a container every run may have the same process number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not finite")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _refused(path: Location, what: str, error: OSError | ValueError) -> ResourceError:
    remedy = _REMEDIES.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    return ResourceError(f"{named(path)}: {what}: {_reason(error)}{': ' + remedy if remedy else ''}")
