"""Checkpoint folders that are written whole or not at all, and read only after every byte was verified.

A checkpoint is a folder ``step-00001234`` of safetensors and JSON files, one ``<entry>.safetensors`` for each top-level
entry of the state:

    step-00001234/   model.safetensors  optimizer.safetensors  state.json  manifest.json

It is written as ``.tmp-<step>-<pid>`` in the same directory: every file is flushed to disk, ``manifest.json`` (sha256
and size of each file) last, then the folder, then it is renamed and the parent is flushed; only then are old
checkpoints deleted. So a crash at any moment leaves either the old set or the new one. A second checkpoint of the same
step is written beside the first as ``step-00001234.1``, never over it.

This file knows nothing of models: a state is nested dicts, lists and tuples of tensors and JSON values.

References:
    Pillai et al. (2014), All file systems are not created equal, https://www.usenix.org/conference/osdi14/technical-sessions/presentation/pillai
"""

import functools
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmvae.folder import FolderError, clear_temporary, read_manifest, seal, sha256, sync, umask, write_text
from mmvae.processes import make_folder
from mmvae.tree import compare, join, split

__all__ = ["CheckpointError", "choose", "compare", "find", "load", "newest", "save", "verify"]

_FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_ENTRY = re.compile(r"[A-Za-z0-9_-]+")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or does not fit; the message names the file and the reason."""


# ---- writing


def save(
    root: str | Path,
    step: int,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    best: int | None = None,
    info: Mapping[str, Any] | None = None,
    damaged: Collection[Path] = (),
    origin: str | None = None,
) -> Path:
    """Write one checkpoint atomically, then delete the old ones that nothing protects.

    Protected are: the one just written, those of step ``best``, and the newest ``max(keep, 2)`` complete ones. Folders
    that are incomplete or ``damaged`` are neither counted nor touched, except ``.tmp-`` folders of processes that are
    gone, which are removed.

    Arguments:
        root: folder that holds the checkpoints; made when it is missing.
        step: optimizer steps done, >= 0.
        state: entries (names of letters, digits, ``_`` and ``-``) of nested dicts (str or int keys), lists, tuples,
            tensors, and JSON values.
        keep: complete checkpoints to keep besides the best, >= 1 (the last two are kept in any case).
        best: step of the best checkpoint so far.
        info: JSON values that describe the run (configuration, fingerprint of the data, ...); see :func:`compare`.
        damaged: folders known to be, as those that :func:`newest` passed over.
        origin: the checkpoint of another folder that the run began with; see :func:`choose`.

    Returns:
        The folder written, ``root/step-<step>``.

    Raises:
        ValueError: ``keep`` or ``step`` is out of range.
        CheckpointError: the state holds something that cannot be saved, or the disk refused; earlier checkpoints are
            untouched.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: expected at least 1, the checkpoint just written is never deleted")
    if step < 0:
        raise ValueError(f"step={step}: expected >= 0")
    root = Path(root)
    temporary = root / f".tmp-{step}-{os.getpid()}"
    try:
        make_folder(root)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = _write_state(temporary, state)
        write_text(temporary / "manifest.json", seal(_manifest(step, files, dict(info or {}), origin)))
        sync(temporary)
        target = _free_name(root, step)
        temporary.rename(target)
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(tensor.nbytes for entry in state.values() for tensor in split(entry)[1].values())
        raise CheckpointError(
            f"{temporary}: cannot write the checkpoint of step {step} (about {size:,} bytes are needed): {error}; "
            "earlier checkpoints are untouched"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _rotate(root, target, keep, best, damaged)
    return target


def _write_state(folder: Path, state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write every file but the manifest, flushed; returns size and sha256 of each by name."""
    outline, written = {}, []
    for name, entry in state.items():
        if not isinstance(name, str) or not _ENTRY.fullmatch(name):
            raise CheckpointError(f"state entry {name!r}: expected a name of letters, digits, '_' and '-'")
        try:
            outline[name], tensors = split(entry, name)
        except TypeError as error:
            raise CheckpointError(f"state {error}") from None
        if tensors:
            path = folder / f"{name}.safetensors"
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~umask())  # safetensors writes 0600 whatever the umask is
            sync(path)
            written.append(path)
    written.append(folder / "state.json")
    write_text(written[-1], json.dumps(outline, allow_nan=False))
    return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in written}


def _manifest(step: int, files: dict[str, dict[str, Any]], info: dict[str, Any], origin: str | None) -> dict[str, Any]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    text = json.dumps(info, sort_keys=True, allow_nan=False)
    return {
        "format": _FORMAT,
        "step": step,
        "world_size": torch.distributed.get_world_size() if distributed else 1,
        "num_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "mmvae")},
        "info": json.loads(json.dumps(info)),
        "origin": origin,
        "info_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "files": files,
    }


@functools.cache  # reading it costs as much as writing a small checkpoint
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _free_name(root: Path, step: int) -> Path:
    path, revision = root / f"step-{step:08d}", 0
    while path.exists():
        revision += 1
        path = root / f"step-{step:08d}.{revision}"
    return path


def _rotate(root: Path, written: Path, keep: int, best: int | None, damaged: Collection[Path]) -> None:
    complete = [folder for folder in _folders(root) if folder not in (written, *damaged) and _looks_complete(folder)]
    for folder in complete[max(keep, 2) - 1 :]:
        if _number(folder)[0] != best:
            # renamed first: a crash inside the deletion must not leave half a checkpoint under a good name
            doomed = root / f".tmp-old{folder.name}-{os.getpid()}"
            folder.rename(doomed)
            shutil.rmtree(doomed)
    clear_temporary(root)


# ---- reading


def verify(folder: str | Path) -> dict[str, Any]:
    """Check that every file of a checkpoint is there and has the size and sha256 of the manifest.

    Returns:
        The manifest.

    Raises:
        CheckpointError: naming the file and the reason.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    number = _number(folder)
    if number and number[0] != manifest["step"]:
        raise CheckpointError(f"{folder}/manifest.json: is of step {manifest['step']}, expected {number[0]}")
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            size, digest = path.stat().st_size, sha256(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: the file is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if size != expected["size"]:
            raise CheckpointError(f"{path}: has {size:,} bytes, expected {expected['size']:,}")
        if digest != expected["sha256"]:
            raise CheckpointError(f"{path}: the content is damaged (its sha256 is not the one in the manifest)")
    return manifest


def newest(root: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint of the highest step that verifies.

    Returns:
        The folder, or None when there is none, and the newer folders that were passed over with the reason of each.
    """
    passed_over = []
    for folder in _folders(Path(root)):
        try:
            verify(folder)
        except CheckpointError as error:
            passed_over.append((folder, str(error)))
        else:
            return folder, passed_over
    return None, passed_over


def choose(root: str | Path, resume: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The checkpoint that a run in ``root`` goes on from; it may be of another folder, and is verified when it is loaded.

    Arguments:
        root: the run's own folder.
        resume: "auto": the newest there; "never": there must be none; else a path, and where the checkpoints in ``root`` are of a run
            that began with it, the newest of those.

    Returns:
        The folder, or None to start anew, and what :func:`newest` passed over in ``root``.

    Raises:
        CheckpointError: ``root`` holds checkpoints that are not to be there, or newer ones that would be gone on from next time.
    """
    root = Path(root)
    last, passed_over = newest(root)
    if resume == "never" and (last or passed_over):
        raise CheckpointError(f"{root}: holds checkpoints, and resume='never': expected an empty folder, or resume='auto'")
    if resume in ("auto", "never"):
        return last, passed_over
    given, chosen = Path(resume), Path(resume).resolve()
    if last is not None and chosen.parent != root.resolve():
        if _read_manifest(last).get("origin") == str(chosen):
            return last, passed_over
        expected = "an empty folder, or resume='auto' to go on from it"
        raise CheckpointError(f"{root}: {last.name} is of a run that did not begin with {given}; expected {expected}")
    if last is not None and chosen.is_dir() and chosen.name < last.name:
        expected = f"{last.name}, the newest, another folder to write into, or that newer checkpoints are deleted first"
        raise CheckpointError(f"{given}: {last.name} is newer, and would be gone on from next time; expected {expected}")
    return given, passed_over


def find(root: str | Path, step: int) -> Path | None:
    """The checkpoint of ``step``, the last one written for it that is complete, or None; :func:`load` verifies it."""
    for folder in _folders(Path(root)):
        if _number(folder)[0] == step and _looks_complete(folder):
            return folder
    return None


def load(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verify a checkpoint, then read it; tensors are on the CPU.

    Returns:
        The state as it was given to :func:`save` (a mapping of any kind comes back as a dict) and the manifest.

    Raises:
        CheckpointError: something is damaged or missing; nothing has been read then.

    Warns:
        UserWarning: torch version or number of threads are not those of the manifest, so equal bits cannot be promised.
    """
    folder = Path(folder)
    manifest = verify(folder)
    now = (torch.get_num_threads(), _version("torch"))
    then = (manifest["num_threads"], manifest["versions"]["torch"])
    if now != then:
        warnings.warn(
            f"{folder}: saved with {then[0]} threads and torch {then[1]}, read with {now[0]} threads and torch {now[1]}: "
            "going on from it will not give the very same bits",
            stacklevel=2,
        )
    outline = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state = {}
    for name, entry in outline.items():
        file = f"{name}.safetensors"
        state[name] = join(entry, load_file(folder / file) if file in manifest["files"] else {})
    return state, manifest


# ---- files


def _folders(root: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, highest step first."""
    found = [path for path in root.glob("step-*") if _number(path) and path.is_dir()]
    return sorted(found, key=_number, reverse=True)


def _number(folder: Path) -> tuple[int, int] | None:
    match = _FOLDER.fullmatch(folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _looks_complete(folder: Path) -> bool:
    """Whether every file has its size: what deleting old checkpoints goes by, as hashing them at each save would double its cost."""
    try:
        files = _read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == file["size"] for name, file in files.items())
    except (CheckpointError, OSError):
        return False


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.exists():
        raise CheckpointError(f"{path}: the file is missing, so the checkpoint was never finished")
    try:
        return read_manifest(path, _FORMAT)
    except FolderError as error:
        raise CheckpointError(str(error)) from error
