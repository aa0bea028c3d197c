"""What tells that data has changed which is too large to be read by every run: a stream, and pictures that do not fit in memory."""

import functools
import hashlib
from pathlib import Path
from typing import Any

_WHOLE = 2**28  # bytes of all files together up to which all of them are read: a fraction of a second


def content_fingerprint(name: str, rows: Any = None) -> str:
    """A digest that changes when data that is too large to be read at once changes, the same for every rank and run.

    Of each local file that is not hidden the name and the content: a copied folder is the same data. Where they have more than 256 MiB
    together, instead of the content the size, the first and last 4 KiB, and when each was last written: copy them with their times.
    Of a Hub id the id and the fingerprint that `datasets` gives it.

    Arguments:
        name: what the data set was loaded by.
        rows: the loaded set, where it has a fingerprint of its own.

    Returns:
        64 hexadecimal digits.
    """
    path, (folder, _, configuration) = Path(name).expanduser(), name.rpartition(":")
    if folder and not path.exists() and Path(folder).expanduser().is_dir():
        path = Path(folder).expanduser()
        digest = hashlib.sha256(configuration.encode())
    else:
        digest = hashlib.sha256(name.encode() if not Path(name).exists() else b"")
    shown = (file for file in sorted(path.rglob("*")) if not any(part.startswith(".") for part in file.relative_to(path).parts))
    files = [file for file in shown if file.is_file()] if path.is_dir() else [path] * path.is_file()
    found = [(file, file.stat()) for file in files]
    whole = sum(stat.st_size for _, stat in found) <= _WHOLE
    for file, stat in found:
        digest.update(repr((str(file.relative_to(path)), _digest(file.resolve(), stat.st_size, stat.st_mtime_ns, whole))).encode())
    if not files:
        digest.update(str(getattr(rows, "_fingerprint", "")).encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=2**17)  # every split asks
def _digest(file: Path, size: int, written: int, whole: bool) -> str:
    with file.open("rb") as stream:
        if whole:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        head = stream.read(4096)
        stream.seek(max(size - 4096, 0))
        return repr((size, written, head, stream.read(4096)))
