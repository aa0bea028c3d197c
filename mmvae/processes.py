"""The process of a run and those around it: its memory, its signals, a launcher that it may lose, another run that wants its folder."""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from mmvae.folder import sync

_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # torchrun and accelerate tell their processes so


_MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -4, -3, -1  # of mallopt(3)


def keep_memory(keep: bool = True) -> bool:
    """Keep what this process frees for what it allocates next, instead of handing it back to the system.

    The features of a training step on a CPU are tens of megabytes; glibc returns blocks of that size, and the system clears their pages
    anew at every step. The recipes call this when they run on a CPU; a library should not decide it for its users.

    Arguments:
        keep: False to hand back what is free now, and for the limits that glibc by itself comes to with such blocks.

    Returns:
        Whether there was a ``mallopt`` to tell: glibc has it, other C libraries do not.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    values = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1} if keep else {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}
    told = [libc.mallopt(parameter, value) for parameter, value in values.items()]
    if not keep:
        libc.malloc_trim(0)
    return all(told)


class Signals:
    """Notes the first SIGTERM or SIGINT; a second one, more than a second later, ends the process at once.

    (Within a second it is taken for the same one: a terminal and a launcher often both send it.) A launcher that is gone counts as
    SIGTERM: it could neither be stopped nor tell how the run ended, and the same command could not be started again beside it.
    """

    def __init__(self) -> None:
        self._number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._launcher = os.getppid() if any(name in os.environ for name in _LAUNCHED) else None

    def __enter__(self) -> "Signals":
        with contextlib.suppress(ValueError):  # outside of the main thread signals cannot be handled
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> int:
        """The signal, 0 for none."""
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        return self._number or (signal.SIGTERM if orphaned else 0)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._number:
            self._number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > 1:
            os._exit(128 + number)


def make_folder(folder: Path) -> None:
    """Make a folder and what it lies in where they are missing, each flushed to the disk with its name."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


@contextlib.contextmanager
def locked(folder: Path, patience: float = 10.0) -> Iterator[str | None]:
    """Make a folder, see that it can be written, and keep other processes out of it; yields why not, or None.

    The system lets go of the lock when the process ends, however it ends, so nothing stale is ever left. It is a POSIX lock: processes
    forked from this one, such as those of a loader, do not hold it.

    Arguments:
        folder: the folder; its file ``.lock`` tells who holds it.
        patience: seconds to wait for another process, which may be about to end.
    """
    try:
        make_folder(folder)
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        yield f"{folder}: cannot be written: {error}"
        return
    with file:
        yield _lock(file, folder, time.monotonic() + patience)


def stranger(folder: Path, rank: int, agree: Callable[[int], int], patience: float = 10.0) -> int:
    """The rank that does not see what rank 0 writes into a folder, as on a machine that does not share it; 0 for none.

    Arguments:
        folder: the folder; rank 0 has it.
        rank: of this process; all of them call it.
        agree: gives the greatest of a number over the ranks.
        patience: seconds to wait for what another machine has written.
    """
    mine = folder / f".shared-{os.getpid()}"
    if rank == 0:
        mine.touch()
    mark, until = folder / f".shared-{agree(0 if rank else os.getpid())}", time.monotonic() + patience
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.1)
    lost = agree(0 if mark.exists() else rank)
    if rank == 0:
        mine.unlink()
    return lost


def _lock(file: Any, folder: Path, until: float) -> str | None:
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                file.seek(0)
                return f"{folder}: {file.read().strip()} is training into it: expected one run in a folder; stop that one or choose another"
            time.sleep(0.1)
        except OSError as error:  # there are file systems without locks
            warnings.warn(f"{folder}: cannot be locked ({error}): see to it that no other run trains into it", stacklevel=2)
            return None
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return None
