"""What tells that data has changed which is too large to be read by every run: a stream, and pictures that do not fit in memory."""

import functools
import hashlib
from pathlib import Path
from typing import Any

_WHOLE = 2**26  # bytes of a file up to which all of it is read; more would be read longer than an epoch of pictures


def content_fingerprint(name: str, rows: Any = None) -> str:
    """A digest that changes when data that is too large to be read at once changes, the same for every rank and run.

    Of each local file that is not hidden the name and the content: a copied folder is the same data. Of a file of more than 64 MiB the
    size, the first and last 4 KiB, and when it was last written: copy such files with their times. Of a Hub id the id and the
    fingerprint that `datasets` gives it.

    Arguments:
        name: what the data set was loaded by.
        rows: the loaded set, where it has a fingerprint of its own.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256(name.encode() if not Path(name).exists() else b"")
    path = Path(name).expanduser()
    shown = (file for file in sorted(path.rglob("*")) if not any(part.startswith(".") for part in file.relative_to(path).parts))
    files = [file for file in shown if file.is_file()] if path.is_dir() else [path] * path.is_file()
    for file in files:
        stat = file.stat()
        digest.update(repr((str(file.relative_to(path)), _digest(file.resolve(), stat.st_size, stat.st_mtime_ns))).encode())
    if not files:
        digest.update(str(getattr(rows, "_fingerprint", "")).encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=2**17)  # every split asks
def _digest(file: Path, size: int, written: int) -> str:
    with file.open("rb") as stream:
        if size <= _WHOLE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        head = stream.read(4096)
        stream.seek(size - 4096)
        return repr((size, written, head, stream.read(4096)))
