"""Files that survive a kill and a power cut: written beside their place, flushed, then renamed.

A rename is atomic but says nothing of the disk: without a flush before it, a power cut may leave
the new name with no contents; without one of the folder after it, the old name.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

# What a file system may say for a while only, and what to do about it.
PASSING = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room within its quota",
    errno.EROFS: "make its file system writable",
    errno.EIO: "look after its disk, which reports an error",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.ESTALE: "mount its file system again",
    errno.ETIMEDOUT: "look after its file server, which does not answer",
}

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def replace_text(file: Path, text: str) -> None:
    """As replace_bytes, in UTF-8."""
    replace_bytes(file, text.encode())


def replace_bytes(file: Path, contents: bytes) -> None:
    """Write `file` whole or not at all. Raises OSError, and then the old file is as it was.

    A link stays one. What is no regular file, such as /dev/stdout, is written to where it is.
    """
    if file.exists() and not file.is_file():
        file.write_bytes(contents)
        return
    file = Path(os.path.realpath(file))
    beside = file.with_name(f".{file.name}.new")
    try:
        with beside.open("wb") as stream:
            stream.write(contents)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)  # it takes room that may be what is missing
        error.filename = str(file)
        raise
    sync(file.parent)


def check_writable(file: Path) -> None:
    """Raises OSError where replace_bytes would, but for a disk that is full by then; writes nothing.

    Not even the file beside it, which may be another process's.
    """
    if file.exists() and not file.is_file():
        return
    file = Path(os.path.realpath(file))
    with suppress(FileNotFoundError):
        file.with_name(f".{file.name}.new").lstat()  # a name that is too long
    tempfile.NamedTemporaryFile(dir=file.parent, prefix=".writable-").close()


def append_text(file: Path, text: str) -> None:
    """Append whole lines to `file`, all or none. Raises OSError.

    Half a line that an earlier writer left at its end is cut off.
    """
    with os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as stream:
        end = _end_of_last_line(stream)
        stream.truncate(end)
        stream.seek(end)
        try:
            # Unbuffered, so that nothing is written again when the file is closed.
            _write_all(stream.fileno(), text.encode())
            os.fsync(stream.fileno())
        except OSError as error:
            os.ftruncate(stream.fileno(), end)
            error.filename = str(file)
            raise
    if end == 0:
        sync(file.parent)


def make_folder(place: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `place` by `fill`: whole or not at all. What was there is replaced.

    Raises OSError with an errno for what the file system says, whichever library heard it.
    """
    beside = place.with_name(f".{place.name}.new")
    remove_folder(beside)
    try:
        beside.mkdir(parents=True)
        fill(beside)
        for path in sorted(beside.rglob("*"), reverse=True):
            sync(path)
        sync(beside)
        remove_folder(place)
        os.replace(beside, place)
    except Exception as error:
        remove_folder(beside)
        if (number := errno_of(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(place)) from error
    sync(place.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk. Raises OSError."""
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    except OSError as error:
        # Some file systems know no flush of folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(number)


def errno_of(error: BaseException) -> int | None:
    """The file system's number in an error; safetensors and tokenizers have it in the text only."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _end_of_last_line(stream: IO[bytes]) -> int:
    end = stream.seek(0, os.SEEK_END)
    if end == 0:
        return 0
    stream.seek(end - 1)
    if stream.read(1) == b"\n":
        return end
    stream.seek(0)
    return stream.read().rfind(b"\n") + 1


def _write_all(number: int, contents: bytes) -> None:
    rest = memoryview(contents)
    while rest:
        rest = rest[os.write(number, rest) :]
