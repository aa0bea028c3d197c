"""The files of a model folder: verified before anything is made of them, and replaced so that no mixture of two models can be loaded.

    model.safetensors  config.json  generation_config.json  manifest.json     (or model-0000k-of-0000n.safetensors and their index)

``manifest.json`` holds the size and sha256 of the other files and, at its end, of itself. A folder without one, of another tool or an
older version, is verified as far as can be: files, JSON, tensors, but not whether somebody changed a bit.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS, INDEX, CONFIG, MANIFEST = "model.safetensors", "model.safetensors.index.json", "config.json", "manifest.json"

_FORMAT = 1
_MOST_JSON = 2**24  # bytes: more is no configuration
_OPTIONAL = ("generation_config.json",)
_REFUSED = re.compile(r"adapter_config\.json|shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # these send transformers elsewhere
_REPLACED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class FolderError(ValueError):
    """A model folder is damaged, incomplete or not safe to read; the message names the file and the reason."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its path, safetensors' name of its type, and its shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, which no reader could understand in another way.

    Raises:
        FolderError: no UTF-8, a byte order mark, no object, a name twice, NaN or an infinity, too deep, or larger than 16 MiB.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
        return dict(pairs)

    def finite(word: str) -> float:
        if not math.isfinite(float(word)):
            raise ValueError(f"received {word}, expected a finite number")
        return float(word)

    try:
        if path.stat().st_size > _MOST_JSON:
            raise ValueError(f"has {path.stat().st_size:,} bytes, expected at most {_MOST_JSON:,}")
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
        if not isinstance(value, dict):
            raise ValueError(f"received a {type(value).__name__}, expected an object")
    except RecursionError:
        raise FolderError(f"{path}: nested too deeply, expected a configuration") from None
    except (ValueError, OSError) as error:
        raise FolderError(f"{path}: {error}") from error
    return value


@contextlib.contextmanager
def naming(*where: object) -> Iterator[None]:
    """Name a file in the errors of libraries that read it and do not.

    Arguments:
        where: parts of its path; empty ones are left out.

    Raises:
        FolderError: with the path and what the library said. An OSError stays as it is: it names the file.
    """
    try:
        yield
    except (FolderError, OSError):
        raise
    except Exception as error:  # of every kind: wrong types, missing fields, too deep, and the tokenizers' own
        path = "/".join(str(part) for part in where if part)
        raise FolderError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def verify(folder: Path) -> dict[str, Stored]:
    """Check every file that a model is made from, before anything is made from it.

    Arguments:
        folder: a local one, also a snapshot in the Hub's cache, whose files are links into the cache.

    Returns:
        Every tensor by its name.

    Raises:
        FolderError: a file is missing, leads out of the folder, is damaged or not the one in the manifest; a value is not finite; there are
            files that would make transformers read something else.
    """
    if not folder.is_dir():
        raise FolderError(f"{folder}: no such folder")
    for name in sorted(os.listdir(folder)):
        if _REFUSED.fullmatch(name):
            raise FolderError(f"{folder / name}: expected a whole model in {WEIGHTS}, without adapters or checkpoints of many ranks")
    files = [CONFIG, *(name for name in _OPTIONAL if os.path.lexists(folder / name)), *_weights(folder)]
    paths = [_regular(folder, name) for name in files]
    for path in paths:
        if path.suffix == ".json":
            read_json(path)
    if os.path.lexists(folder / MANIFEST):
        _compare(read_manifest(_regular(folder, MANIFEST)), paths)
    tensors: dict[str, Stored] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            found = _tensors(path)
            if twice := tensors.keys() & found.keys():
                raise FolderError(f"{path}: tensor {min(twice)!r} is in {tensors[min(twice)].path.name} too")
            tensors |= found
    return tensors


def _weights(folder: Path) -> list[str]:
    """Names of the files of weights; the index of several is one of them."""
    if os.path.lexists(folder / WEIGHTS):
        return [WEIGHTS]
    if not os.path.lexists(folder / INDEX):
        pickles = sorted(name for name in os.listdir(folder) if name.endswith(_PICKLES))
        found = f"; {pickles[0]} is not read, because pickles can run code" if pickles else ""
        raise FolderError(f"{folder / WEIGHTS}: not found, expected a model in safetensors{found}")
    index = _regular(folder, INDEX)
    content = read_json(index)
    for field in ("metadata", "weight_map"):
        if not isinstance(content.get(field), dict):
            raise FolderError(f"{index}: {field}: received {content.get(field)!r:.80}, expected an object")
    files = content["weight_map"]
    names = list(files.values())
    for name in names:
        if not isinstance(name, str) or not _REPLACED.fullmatch(name) or not name.endswith(".safetensors"):
            raise FolderError(f"{index}: weight_map: received the file {name!r}, expected names as model-00001-of-00002.safetensors")
    held = {name: set(_header(_regular(folder, name))) for name in sorted(set(names))}
    for tensor, name in files.items():
        if tensor not in held[name]:
            raise FolderError(f"{folder / name}: tensor {tensor!r} of {INDEX} is missing")
    return [INDEX, *held]


def _regular(folder: Path, name: str) -> Path:
    """The path of a file that is really one, and lies in the folder, or in the cache that a snapshot of the Hub is part of."""
    path = folder / name
    try:
        real, mode = path.resolve(strict=True), path.stat().st_mode
    except (OSError, RuntimeError) as error:
        missing = "the file is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise FolderError(f"{path}: {missing}") from None
    inside = [folder.resolve()]
    snapshots = next((parent for parent in (inside[0], *inside[0].parents) if parent.name == "snapshots"), None)
    inside += [snapshots.parent / "blobs"] if snapshots else []
    if not any(real.is_relative_to(place) for place in inside):
        raise FolderError(f"{path}: leads to {real}, expected a file inside the folder")
    if not stat.S_ISREG(mode):
        raise FolderError(f"{path}: expected a regular file")
    return path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FolderError(f"{path}: damaged, or no safetensors: {error}") from error


def _header(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _tensors(path: Path) -> dict[str, Stored]:
    """What a file holds, all of it finite."""
    tensors = {}
    with _opened(path) as file:
        format_ = (file.metadata() or {}).get("format", "pt")
        if format_ != "pt":
            raise FolderError(f"{path}: metadata: received format {format_!r}, expected 'pt'")
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            tensors[name] = Stored(path, part.get_dtype(), tuple(part.get_shape()))
            if part.get_dtype() in ("F64", "F32", "F16", "BF16") and 0 not in tensors[name].shape:
                ends = torch.stack(file.get_tensor(name).aminmax())  # NaN if any is
                if not ends.isfinite().all():
                    raise FolderError(f"{path}: tensor {name!r}: received values from {ends[0]} to {ends[1]}, expected finite ones")
    return tensors


# ---- the manifest


def seal(content: Mapping[str, Any]) -> str:
    """JSON that ends with the sha256 of the rest, so that damage to it is seen too."""
    text = json.dumps(content, indent=1, allow_nan=False)
    return json.dumps({**content, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1)


def read_manifest(path: Path, format: int = _FORMAT) -> dict[str, Any]:
    """What :func:`seal` made, in the format of that number.

    Raises:
        FolderError: it is damaged, or of a newer version.
    """
    manifest = read_json(path)
    if path.read_text(encoding="utf-8") != seal({name: value for name, value in manifest.items() if name != "manifest_sha256"}):
        raise FolderError(f"{path}: the content is damaged (its sha256 is not the one inside it)")
    if manifest.get("format") != format:
        raise FolderError(f"{path}: format {manifest.get('format')!r}, expected {format}: written by another version of mmvae")
    return manifest


def _compare(manifest: Mapping[str, Any], paths: list[Path]) -> None:
    """Refuse files that are not those of the manifest."""
    files = manifest["files"]
    remedy = f"if it was changed on purpose, delete {MANIFEST}"
    for path in paths:
        expected = files.get(path.name)
        if expected is None:
            raise FolderError(f"{path}: {MANIFEST} does not know it; {remedy}")
        if path.stat().st_size != expected["size"]:
            raise FolderError(f"{path}: has {path.stat().st_size:,} bytes, expected the {expected['size']:,} of {MANIFEST}; {remedy}")
        if sha256(path) != expected["sha256"]:
            raise FolderError(f"{path}: the content is not that of {MANIFEST} (another sha256); {remedy}")
    if missing := files.keys() - {path.name for path in paths}:
        raise FolderError(f"{paths[0].parent / min(missing)}: the file is missing, which {MANIFEST} knows")


# ---- writing


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder to write a model's files into, which then replace those of ``folder`` together.

    The manifest comes first: until the last file has come, it fits neither model, so an interrupted replacement is refused, and before
    and after it the old and the new model load.

    Raises:
        OSError: the files cannot be written; the old ones are untouched.
    """
    made = folder / f".tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear_temporary(folder)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        yield made
        if any(made.iterdir()):  # not where another rank writes
            _replace(made, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: cannot write the model: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _replace(made: Path, folder: Path) -> None:
    new = sorted(made.iterdir())
    for path in new:
        path.chmod(0o666 & ~umask())  # safetensors writes 0600 whatever the umask is
        sync(path)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in new}
    write_text(made / MANIFEST, seal({"format": _FORMAT, "files": files}))
    for path in (made / MANIFEST, *new):
        path.replace(folder / path.name)
    sync(folder)
    for name in os.listdir(folder):
        if name not in files and (_REPLACED.fullmatch(name) or name in _OPTIONAL):
            (folder / name).unlink()


def clear_temporary(root: Path) -> None:
    """Remove the ``.tmp-*`` folders of processes that are gone."""
    for folder in root.glob(".tmp-*"):
        owner = folder.name.rpartition("-")[2]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write and flush."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def umask() -> int:
    """The process's mask of file permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
