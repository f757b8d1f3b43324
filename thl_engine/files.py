"""Small files read within limits, and files that are replaced as a whole or not at all."""

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from thl_engine.errors import CheckpointError, said, shown
from thl_engine.memory import size

ALIGNMENT = 4096  # of offsets, lengths and addresses of direct reads on every common device, and so of pages in files
TEXT_LIMIT = 100_000_000  # bytes of JSON or other text; the safetensors library's cap on a header
VALUES_LIMIT = 500_000  # in a JSON text: what describes 60,000 tensors; they take up to 64 MiB
_log = logging.getLogger("thl_engine")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def open_regular(path: Path) -> BinaryIO:
    """An ordinary file, links followed, to be read. Raises OSError, also for what is none.

    A pipe, which could make its reader wait for ever, is not even opened for waiting, and neither is a device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "the name holds characters that no file's has") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a folder" if stat.S_ISDIR(mode) else "it is neither a file nor a folder")
    return open(descriptor, "rb")


def kind_of(path: Path, what: str) -> str:
    """ "file" or "folder"; a path that is neither, or cannot be reached, is a `CheckpointError`."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise CheckpointError(f"{path}: cannot open the {what}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot open the {what}: {said(error)}") from error
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISREG(mode):
        return "file"
    raise CheckpointError(f"{path}: the {what} is neither a file nor a folder")


def check_fetched(path: Path, start: bytes, error_type: type[Exception] = CheckpointError) -> None:
    """Refuses a Git LFS pointer, told by the first bytes of a file: a few lines that stand for the file itself."""
    known = LFS_POINTER[: len(start)]
    if len(known) >= 8 and start.startswith(known):
        raise error_type(f"{path}: a Git LFS pointer, not the file itself; fetch that: git lfs pull")


def read_text(path: Path, error_type: type[Exception] = CheckpointError) -> str:
    """A UTF-8 file of at most TEXT_LIMIT bytes."""
    try:
        with open_regular(path) as file:
            content = file.read(TEXT_LIMIT + 1)
        if len(content) > TEXT_LIMIT:
            raise error_type(f"{path}: larger than {TEXT_LIMIT} bytes, too large for this kind of file")
        check_fetched(path, content, error_type)
        return content.decode()
    except OSError as error:
        raise error_type(f"{path}: cannot read the file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise error_type(f"{path}: not UTF-8 text at byte {error.start}") from error


def parse_json(text: bytes | str, what: str, error_type: type[Exception] = CheckpointError) -> dict[str, Any]:
    """A JSON object of at most VALUES_LIMIT values, without duplicate keys, or `error_type`."""
    value = parse_any_json(text, what, error_type)
    if not isinstance(value, dict):
        raise error_type(f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_any_json(
    text: bytes | str, what: str, error_type: type[Exception] = CheckpointError, limit: int = VALUES_LIMIT
) -> Any:
    """The same of any JSON value, of at most `limit` values."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise error_type(f"{what}: {shown(name)} occurs twice")
            fields[name] = value
        return fields

    try:
        text = text.decode("utf-8", "surrogatepass") if isinstance(text, bytes) else text
        if _has_more_values(text, limit):
            raise error_type(f"{what} holds more than {limit} values, too many for this kind of file")
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, a number too long
        raise error_type(f"{what} is not valid JSON: {said(error)}") from error


def _has_more_values(text: str, limit: int) -> bool:
    """Whether a JSON text opens or separates more values than `limit`, before any of them is made.

    An empty list of three bytes takes 64 in memory. What stands in strings does not count, but is looked at only where
    the whole text has too many of the characters that count.
    """
    if _opened(text, 0, None) <= limit:
        return False
    text = text.replace("\\\\", "").replace('\\"', "")
    values = strings = at = 0
    while (start := text.find('"', at)) >= 0:
        values, strings = values + _opened(text, at, start), strings + 1
        if values > limit or strings > 2 * limit:
            return True
        at = text.find('"', start + 1) + 1
        if at == 0:  # no end of a string: not JSON
            return False
    return values + _opened(text, at, None) > limit


def _opened(text: str, start: int, stop: int | None) -> int:
    return text.count(",", start, stop) + text.count("[", start, stop) + text.count("{", start, stop)


@dataclass(frozen=True)
class FileMark:
    """What tells a file from another one, and from itself before it was written to again."""

    device: int
    inode: int
    nbytes: int
    modified: int  # nanoseconds


def mark_of(path: Path) -> FileMark:
    """The mark of a file as it is now, links followed. Raises CheckpointError where it cannot be reached."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be reached any more: {error.strerror}") from None
    return FileMark(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def lies_in_memory(folder: Path) -> bool:
    """Whether files of a folder take memory rather than a disk (tmpfs, ramfs); False where the system does not tell."""
    try:
        device = os.stat(folder).st_dev
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    own = f"{os.major(device)}:{os.minor(device)}"
    kinds = {mount.partition(" - ")[2].split(" ")[0] for mount in mounts if mount.split(" ")[2:3] == [own]}
    return bool(kinds & {"tmpfs", "ramfs"})


@contextmanager
def replacing(path: Path, nbytes: int) -> Iterator[int]:
    """A file descriptor whose content replaces `path` on success and vanishes on any failure.

    Until then the file has a temporary name beside `path` and is locked. Where its writer is killed it stays, unlocked,
    for the next writer of `path` to remove. Raises CheckpointError where there is no room for nbytes, or the system
    refuses; `path` is then as it was.
    """
    needs = f"it needs about {size(nbytes)}"
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a device, say, which root could replace
            kind = "a folder" if os.path.isdir(path) else "no ordinary file"
            raise CheckpointError(f"{path}: is {kind}, expected the name of the file to write")
        remove_left_over(path)
        free = shutil.disk_usage(path.parent).free
        if free < nbytes:
            raise CheckpointError(f"{path}: no space on the device: {needs}, {size(free)} are free")
        descriptor, temporary = _locked_temporary(path)
        try:
            yield descriptor
            os.fsync(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):  # renamed already
                os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)
        _sync(path.parent)  # the rename itself
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write: {error.strerror}; {needs}") from error


def remove_left_over(path: Path) -> None:
    """Removes what killed writers of `path` have left beside it, and says so; never what a living one is writing.

    It goes by the name, the owner and the lock that a writer holds for as long as its process lives.
    """
    names = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{8}\.partial")
    found: list[str] = []
    with suppress(OSError):
        found = [name for name in os.listdir(path.parent) if names.fullmatch(name)]
    for name in found:
        with suppress(OSError):  # it is locked, a link, gone by now, or on a file system without locks
            descriptor = os.open(path.with_name(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mark, there = os.fstat(descriptor), os.lstat(path.with_name(name))
                own = stat.S_ISREG(mark.st_mode) and mark.st_uid == os.geteuid()
                if own and os.path.samestat(mark, there):
                    os.unlink(path.with_name(name))
                    _log.warning("%s: removed %s, %s that a killed writer left", path, name, size(mark.st_size))
            finally:
                os.close(descriptor)


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new empty file beside `path`, locked: its descriptor and its name."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another writer took it for left over before it was locked, and removes it
            os.close(descriptor)
            continue
        except OSError:  # no locks here: nobody can lock it, so nobody removes it
            return descriptor, temporary
        if os.fstat(descriptor).st_nlink:
            return descriptor, temporary
        os.close(descriptor)  # it was removed already


def write_at(descriptor: int, buffer: memoryview | bytes, offset: int) -> None:
    """Writes all bytes at an offset of a file, in as many pieces as the system takes them. Raises OSError."""
    view = memoryview(buffer)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Writes a small file that is complete or, on any failure, as it was. Raises CheckpointError."""
    with replacing(path, len(content)) as descriptor:
        write_at(descriptor, content, 0)
